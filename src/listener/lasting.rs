//! Listening for those who have no event loop, whatever becomes of the socket's file.

use std::fmt;
use std::time::{Duration, Instant};

use tracing::{error, info};

use super::Listener;
use super::nonblocking::FileState;
use crate::address::Address;
use crate::error::Result;
use crate::name::SocketName;
use crate::stream::Stream;

/// A [`Listener`] whose socket's file is made again if someone removes it.
#[derive(Debug)]
pub(crate) struct LastingListener {
    listener: Listener,
    /// Who came before the file was removed waits there.
    old: Option<Listener>,
    /// What was asked for.
    address: Address,
    mode: u32,
    watch: FileWatch,
}

impl LastingListener {
    /// As [`Listener::bind_with_mode`].
    ///
    /// # Errors
    /// As there.
    pub(crate) fn bind(address: &Address, mode: u32) -> Result<LastingListener> {
        Ok(LastingListener {
            listener: Listener::bind_with_mode(address, mode)?,
            old: None,
            address: address.clone(),
            mode,
            watch: FileWatch::default(),
        })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> &Address {
        self.listener.address()
    }

    /// As [`Listener::accept_timeout`].
    ///
    /// # Errors
    /// As there.
    pub(crate) fn accept_timeout(
        &mut self,
        timeout: Duration,
    ) -> Result<Option<(Stream, SocketName)>> {
        let state = || self.listener.inner.file_state();
        let again = || Listener::bind_with_mode(&self.address, self.mode);
        if let Some(made) = self.watch.look(&self.address, state, again) {
            self.old = Some(std::mem::replace(&mut self.listener, made));
        }
        if let Some(old) = &self.old {
            if let Some(accepted) = old.accept_timeout(Duration::ZERO)? {
                return Ok(Some(accepted));
            }
            self.old = None;
        }
        self.listener.accept_timeout(timeout)
    }
}

/// Looks now and then whether a socket's file is still there, for those who have no event loop that does.
#[derive(Debug, Default)]
pub(crate) struct FileWatch {
    next: Option<Instant>,
    complained: bool,
}

impl FileWatch {
    /// How often it looks.
    const EVERY: Duration = Duration::from_secs(1);

    /// Looks, if it is time; what `make` has made if the file was removed. What can't be mended is told once.
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
        let complained = std::mem::replace(&mut self.complained, trouble.is_some());
        if let Some(why) = trouble
            && !complained
        {
            error!("{what} {why}");
        }
        if made.is_some() {
            info!("made {what} again: its file had been removed");
        }
        made
    }
}
