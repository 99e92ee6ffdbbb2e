//! Carries syslog messages of local programs over a stream, as vsudd's `-syslog` did.
//!
//! Programs write datagrams to a Unix socket such as `/dev/log`. Each is sent as a frame in RFC
//! 6587's octet counting (the same as RFC 5425's): its length in decimal, a space, its bytes.

mod link;
mod queue;

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::thread;

use socket2::{SockRef, Type};
use tracing::warn;

use crate::address::Address;
use crate::app::serve::{LOOK, Stop};
use crate::error::{Error, Operation, Result};
use crate::listener::file::{self, SocketFile};
use crate::listener::lasting::FileWatch;
use crate::stream::closer;
use crate::sys::{self, AsSocket, Wanted};
use crate::thread::start_scoped_thread;

use link::SyslogLink;
use queue::SyncQueue;

/// The longest message in bytes; longer ones are cut off, as syslog daemons do. Linux'
/// `net.core.wmem_default` lets no program send more than some 200 KiB.
const LONGEST_MESSAGE: usize = 256 * 1024;

/// The socket that programs write to.
#[derive(Debug)]
pub(crate) struct Log {
    socket: UnixDatagram,
    file: SocketFile,
    path: PathBuf,
    mode: u32,
}

impl Log {
    /// Binds the socket at `path`, with these permissions.
    ///
    /// # Errors
    /// Returns those of a [`Listener`](crate::Listener).
    pub(crate) fn bind(path: &Path, mode: u32) -> Result<Log> {
        let (socket, file) = file::bind(path.display(), path, Type::DGRAM, mode.into())?;
        // (On macOS it would hold only 4 KiB of messages.)
        sys::make_room(&SockRef::from(&socket));
        let socket = UnixDatagram::from(std::os::fd::OwnedFd::from(socket));
        let fail = |e| Error::new(Operation::Listen, path.display(), e);
        socket.set_nonblocking(true).map_err(fail)?;
        Ok(Log {
            socket,
            file,
            path: path.to_owned(),
            mode,
        })
    }
}

/// Carries messages from `log` to `target` until `stop` is requested. Returns how many were not
/// delivered. A lost connection is made again; messages are kept meanwhile, up to a limit.
///
/// # Errors
/// Returns the error of receiving messages.
pub(crate) fn carry(log: Log, target: &Address, stop: &Stop) -> io::Result<u64> {
    let kept = SyncQueue::default();
    thread::scope(|scope| {
        // On a separate thread, since a dial may take long: the kernel keeps only a few messages,
        // and then programs block.
        let taking = || {
            let taken = receive_messages(log, &kept, stop);
            if taken.is_err() {
                stop.request_end();
            }
            taken
        };
        let taking = start_scoped_thread(scope, "hvsock-take", "to take messages", taking)?;
        let mut link = SyslogLink::new(target, stop);
        while !(link.is_over() || taking.is_finished() && kept.is_empty()) {
            match link.pause() {
                pause if pause.is_zero() => kept.wait(LOOK),
                pause => thread::sleep(pause.min(LOOK)),
            }
            link.deliver(&kept);
        }
        let taken = taking.join();
        let undelivered = link.end(&kept);
        match taken {
            Ok(taken) => taken.map(|()| undelivered),
            Err(_) => Err(io::Error::other(
                "the thread that takes messages has panicked",
            )),
        }
    })
}

/// Receives what programs write, until the end is requested.
fn receive_messages(mut log: Log, kept: &SyncQueue, stop: &Stop) -> io::Result<()> {
    let mut buffer = vec![0; LONGEST_MESSAGE];
    let mut watch = FileWatch::default();
    loop {
        match sys::receive(log.socket.as_socket(), &mut buffer) {
            Ok(received) => {
                kept.push(&buffer[..received.bytes]);
                // Datagrams have no connection to break off.
                let _ = closer::close_passed(received.descriptors);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if stop.is_asked() {
                    return Ok(());
                }
                if sys::is_shut_down(log.socket.as_socket()) {
                    warn!("{} was shut down, and is made again", log.path.display());
                    match bind_again(log, stop) {
                        Some(made) => log = made,
                        None => return Ok(()),
                    }
                    continue;
                }
                let again = || Log::bind(&log.path, log.mode);
                if let Some(made) = watch.look(log.path.display(), || log.file.state(), again) {
                    log = made;
                }
                sys::wait(log.socket.as_socket(), Wanted::Readable, LOOK)?;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Binds the socket again, as soon as that is possible; `None` if the end was requested.
fn bind_again(old: Log, stop: &Stop) -> Option<Log> {
    let (path, mode) = (old.path.clone(), old.mode);
    // The old socket still has the path.
    drop(old);
    while !stop.is_asked() {
        if let Ok(made) = Log::bind(&path, mode) {
            return Some(made);
        }
        thread::sleep(LOOK);
    }
    None
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_socket_that_was_shut_down_is_made_again() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("log");
        let log = Log::bind(&path, 0o600).unwrap();
        let both = std::net::Shutdown::Both;
        socket2::SockRef::from(&log.socket).shutdown(both).unwrap();
        let (kept, stop) = (SyncQueue::default(), Stop::default());
        thread::scope(|scope| {
            let taking = scope.spawn(|| receive_messages(log, &kept, &stop));
            let program = UnixDatagram::unbound().unwrap();
            let deadline = Instant::now() + Duration::from_secs(20);
            while kept.is_empty() && Instant::now() < deadline {
                let _ = program.send_to(b"hello", &path);
                thread::sleep(Duration::from_millis(5));
            }
            stop.request_end();
            taking.join().unwrap().unwrap();
        });
        assert!(!kept.is_empty(), "nobody takes it");
    }
}
