//! Listeners for callers without an event loop that outlast errors: the socket and its file are
//! made again.

use std::time::{Duration, Instant};
use std::{fmt, thread};

use tracing::{debug, error, info, warn};

use super::blocking::Listener;
use super::file::FileState;
use super::nonblocking::is_broken;
use crate::address::Address;
use crate::error::Result;
use crate::name::SocketName;
use crate::stream::Stream;

/// The pause after an error, which most often says that descriptors ran out.
const PAUSE: Duration = Duration::from_millis(100);

/// A [`Listener`] that no error ends: its socket's file is made again if someone removes it, and
/// the socket is bound again if someone shuts it down.
#[derive(Debug)]
pub(crate) struct LastingListener {
    /// The listener; `None` if it was broken and can't be bound again yet.
    listener: Option<Listener>,
    /// The listener whose file was removed: clients that came before wait there.
    old: Option<Listener>,
    /// Where it listens.
    address: Address,
    mode: u32,
    watch: FileWatch,
    /// Whether an error was logged since the last client came.
    has_logged: bool,
}

impl LastingListener {
    /// Binds as [`Listener::bind_with_mode`] does.
    ///
    /// # Errors
    /// Returns the same errors.
    pub(crate) fn bind(address: &Address, mode: u32) -> Result<LastingListener> {
        let listener = Listener::bind_with_mode(address, mode)?;
        Ok(LastingListener {
            address: listener.address().clone(),
            listener: Some(listener),
            old: None,
            mode,
            watch: FileWatch::default(),
            has_logged: false,
        })
    }

    /// Returns the address that it listens on.
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// Waits for a connection, at most `timeout` or a little longer; `None` if none has come.
    pub(crate) fn accept_timeout(&mut self, timeout: Duration) -> Option<(Stream, SocketName)> {
        self.restore_file();
        if let Some(old) = &self.old {
            // The old listener is dropped after an error as well: no client can find it any more.
            if let Ok(Some(accepted)) = old.accept_timeout(Duration::ZERO) {
                return Some(accepted);
            }
            self.old = None;
        }
        let accepted = match &self.listener {
            Some(listener) => listener.accept_timeout(timeout),
            None => Listener::bind_with_mode(&self.address, self.mode).map(|made| {
                debug!("listening on {} again", self.address);
                self.listener = Some(made);
                None
            }),
        };
        match accepted {
            Ok(Some(accepted)) => {
                self.has_logged = false;
                Some(accepted)
            }
            Ok(None) => None,
            Err(e) => {
                let broken = is_broken(e.cause());
                if broken {
                    // The old listener is closed first, since it still has the address.
                    self.listener = None;
                }
                if !std::mem::replace(&mut self.has_logged, true) {
                    match broken {
                        true => warn!("{e}: the listener was shut down, and is bound again"),
                        false => warn!("{e}; going on"),
                    }
                }
                thread::sleep(PAUSE.min(timeout));
                None
            }
        }
    }

    fn restore_file(&mut self) {
        let Some(listener) = &self.listener else {
            return;
        };
        let state = || listener.inner.file_state();
        let bind = || Listener::bind_with_mode(&self.address, self.mode);
        if let Some(made) = self.watch.look(&self.address, state, bind) {
            self.old = self.listener.replace(made);
        }
    }
}

/// Checks now and then that a socket's file is still there, for callers without an event loop that
/// does.
#[derive(Debug, Default)]
pub(crate) struct FileWatch {
    next: Option<Instant>,
    has_logged: bool,
}

impl FileWatch {
    /// How often it looks.
    const EVERY: Duration = Duration::from_secs(1);

    /// Looks at the file, if it is time, and returns what `make` has made if it was removed. An
    /// error of `make` is logged once.
    pub(crate) fn look<T>(
        &mut self,
        what: impl fmt::Display,
        state: impl FnOnce() -> FileState,
        make: impl FnOnce() -> Result<T>,
    ) -> Option<T> {
        let now = Instant::now();
        if self.next.is_some_and(|next| now < next) {
            return None;
        }
        self.next = Some(now + FileWatch::EVERY);
        let (made, trouble) = match state() {
            FileState::Ours => (None, None),
            FileState::Taken => {
                let why = "was taken over by another program; its clients don't reach us any more";
                (None, Some(why.to_owned()))
            }
            FileState::Missing => match make() {
                Ok(made) => (Some(made), None),
                Err(e) => {
                    let why = format!("has been removed, and it can't be made again yet: {e}");
                    (None, Some(why))
                }
            },
        };
        let has_logged = std::mem::replace(&mut self.has_logged, trouble.is_some());
        if let Some(why) = trouble
            && !has_logged
        {
            error!("{what} {why}");
        }
        if made.is_some() {
            info!("made {what} again: its file had been removed");
        }
        made
    }
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::listener::nonblocking::has_client_left;

    /// Shuts a listener down, as `ss -K` does, or another process that has the socket.
    fn shut_down(listener: &LastingListener) {
        let listener = listener.listener.as_ref().unwrap();
        socket2::SockRef::from(listener)
            .shutdown(std::net::Shutdown::Both)
            .unwrap();
    }

    fn serves(listener: &mut LastingListener) {
        // The address may have been free for a moment.
        let address = listener.address().clone();
        let client = std::thread::spawn(move || {
            let deadline = Instant::now() + Duration::from_secs(20);
            let mut client = loop {
                match Stream::connect(&address) {
                    Ok(client) => break client,
                    Err(e) => assert!(Instant::now() < deadline, "{e}"),
                }
                thread::sleep(Duration::from_millis(5));
            };
            client.write_all(b"x").unwrap();
            client
        });
        let deadline = Instant::now() + Duration::from_secs(20);
        let accepted = loop {
            if let Some((stream, _)) = listener.accept_timeout(Duration::from_millis(20)) {
                break Some(stream);
            }
            if Instant::now() > deadline {
                break None;
            }
        };
        let mut accepted = accepted.unwrap_or_else(|| panic!("nobody came to {listener:?}"));
        accepted.read_exact(&mut [0]).unwrap();
        client.join().unwrap();
    }

    #[test]
    fn a_listener_that_was_shut_down_is_bound_again_at_its_address() {
        let root = tempfile::tempdir().unwrap();
        let unix = format!("unix://{}", root.path().join("s").display());
        for address in ["tcp://127.0.0.1:0", &unix] {
            let mut listener = LastingListener::bind(&address.parse().unwrap(), 0o600).unwrap();
            let bound = listener.address().clone();
            for _ in 0..2 {
                shut_down(&listener);
                serves(&mut listener);
                assert_eq!(listener.address(), &bound);
            }
        }
    }

    #[test]
    fn a_broken_listener_is_told_from_a_client_that_has_left() {
        let listener = Listener::bind(&"tcp://127.0.0.1:0".parse().unwrap()).unwrap();
        let nobody = listener.accept_now().unwrap_err();
        assert!(!is_broken(&nobody), "{nobody:?}");
        socket2::SockRef::from(&listener)
            .shutdown(std::net::Shutdown::Both)
            .unwrap();
        let error = listener.accept_timeout(Duration::ZERO).unwrap_err();
        assert!(is_broken(error.cause()), "{error:?}");
        let left: std::io::Error = std::io::ErrorKind::InvalidInput.into();
        assert!(!is_broken(&left) && has_client_left(&left));
    }
}
