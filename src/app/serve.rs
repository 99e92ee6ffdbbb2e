//! Serves clients on a thread each, for programs that use the bytes: shared by `cat --echo` and
//! `stress --server`.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use tracing::warn;

use crate::listener::lasting::LastingListener;
use crate::lock::{lock, recover};
use crate::name::SocketName;
use crate::stream::Stream;
use crate::stream::closing::{CloseOutcome, GracefulClose};
use crate::sys::Wanted;
use crate::thread::start_scoped_thread;
use crate::time::after;

/// How often a wait checks whether it is to end.
pub(crate) const LOOK: Duration = Duration::from_millis(100);

/// How many bytes an echo reads ahead of what its peer takes. An echo that stopped reading while it
/// writes would stall hyperkit's device (rule 4 of a good neighbour).
const AHEAD: usize = 4 * 1024 * 1024;

/// Tells threads to end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stop(Arc<AtomicUsize>);

impl Stop {
    /// Requests the end: at the first call nothing new is begun; at the next all is broken off.
    pub(crate) fn request_end(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn is_asked(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    pub(crate) fn is_urgent(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 1
    }
}

/// The connections that are being served.
#[derive(Debug, Default)]
struct ServedStreams {
    live: Mutex<HashMap<u64, Arc<Stream>>>,
    left: Condvar,
}

impl ServedStreams {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Stream>>> {
        lock(&self.live)
    }

    /// Waits at most `timeout` until fewer than `limit` are served. Returns whether that is so.
    fn wait_for_room(&self, limit: usize, timeout: Duration) -> bool {
        let wait = self
            .left
            .wait_timeout_while(self.lock(), timeout, |live| live.len() >= limit);
        let (live, _) = recover(wait);
        live.len() < limit
    }

    fn shutdown(&self, how: Shutdown) {
        for stream in self.lock().values() {
            let _ = stream.shutdown(how);
        }
    }
}

/// The most clients at a time: each has a thread. More wait in the backlog.
const MOST_CLIENTS: usize = 10_000;

/// The longest wait for the peer, or for our own `shutdown`, which doesn't wake Windows' poll.
const IDLE: Duration = match cfg!(windows) {
    true => LOOK,
    false => Duration::from_secs(3600),
};

/// The limits of a server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ServePlan {
    /// How many clients are served in all. `None`: no limit.
    pub(crate) in_all: Option<u64>,
    /// How long clients may take to finish when the server is stopped.
    pub(crate) grace: Duration,
}

/// Serves clients, with a number each, until `stop` is requested or all are served.
///
/// Once stopped, accepts no more clients and half-closes the connections; those that haven't ended
/// after the grace, or at the second request, are cut off. Prints errors of single clients and of
/// accepting, and goes on.
pub(crate) fn serve(
    listener: &mut LastingListener,
    plan: ServePlan,
    stop: &Stop,
    handle: impl Fn(u64, &Stream, SocketName) + Sync,
) {
    let clients = ServedStreams::default();
    let handle = |number, stream: &Stream, peer| {
        handle(number, stream, peer);
        // A guest's connection must not just be closed, whatever happened.
        if stream.address().transport().needs_graceful_close {
            close_gracefully(stream, plan.grace, |_| !stop.is_urgent());
        }
        clients.lock().remove(&number);
        clients.left.notify_all();
    };
    thread::scope(|scope| {
        let mut number = 0;
        let mut full = false;
        while !stop.is_asked() && plan.in_all != Some(number) {
            if !clients.wait_for_room(MOST_CLIENTS, LOOK) {
                if !std::mem::replace(&mut full, true) {
                    warn!("{MOST_CLIENTS} clients are being served; more have to wait");
                }
                continue;
            }
            let Some((stream, peer)) = listener.accept_timeout(LOOK) else {
                continue;
            };
            let stream = Arc::new(stream);
            clients.lock().insert(number, Arc::clone(&stream));
            let serve = {
                let (handle, stream) = (&handle, Arc::clone(&stream));
                move || handle(number, &stream, peer)
            };
            let purpose = format!("to serve {peer}");
            if let Err(e) = start_scoped_thread(scope, "hvsock-serve", &purpose, serve) {
                warn!("{e}");
                clients.lock().remove(&number);
            }
            number += 1;
        }
        if stop.is_asked() {
            clients.shutdown(Shutdown::Write);
            let end = after(Instant::now(), plan.grace);
            while !clients.wait_for_room(1, LOOK) && Instant::now() < end && !stop.is_urgent() {}
            clients.shutdown(Shutdown::Both);
        }
    });
}

/// Closes a guest's connection gracefully: half-closes it and reads to its end, for at most
/// `patience`, while `goes_on` returns true of the time passed. Returns whether the guest has ended
/// it.
pub(crate) fn close_gracefully(
    stream: &Stream,
    patience: Duration,
    mut goes_on: impl FnMut(Duration) -> bool,
) -> bool {
    let begun = Instant::now();
    let mut close = GracefulClose::new(after(begun, patience));
    loop {
        let now = Instant::now();
        if let Some(outcome) = stream.go_on_closing(&mut close, now + LOOK) {
            return matches!(outcome, CloseOutcome::PeerEnded);
        }
        if !goes_on(begun.elapsed()) {
            close.set_until(now);
        }
    }
}

/// Sends bytes back until EOF, then half-closes. Returns how many bytes those were, including
/// `first`, which were read already.
///
/// # Errors
/// Returns the error of a read or a write.
pub(crate) fn echo(stream: &Stream, first: &[u8]) -> io::Result<u64> {
    stream.set_nonblocking(true)?;
    let mut total = first.len() as u64;
    let mut ahead = VecDeque::from(first.to_vec());
    let mut buffer = vec![0; 64 * 1024];
    let mut eof = false;
    loop {
        let mut blocked = false;
        while !blocked && !ahead.is_empty() {
            match completed((&*stream).write(ahead.as_slices().0))? {
                Some(n) => drop(ahead.drain(..n)),
                None => blocked = true,
            }
        }
        if eof && ahead.is_empty() {
            // Without a half-close, the close ends the connection.
            if stream.has_half_close() {
                stream.half_close()?;
            }
            return Ok(total);
        }
        let mut wanted = Wanted::Writable;
        if !eof && ahead.len() < AHEAD {
            match completed((&*stream).read(&mut buffer))? {
                Some(0) => eof = true,
                Some(n) => {
                    total += n as u64;
                    ahead.extend(&buffer[..n]);
                }
                None if blocked => wanted = Wanted::Either,
                None => wanted = Wanted::Readable,
            }
            if wanted == Wanted::Writable {
                continue;
            }
        }
        stream.wait(wanted, IDLE)?;
    }
}

/// Returns the result of a call on a non-blocking socket; `None` if it would block.
pub(crate) fn completed<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(done) => Ok(Some(done)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_client_that_has_said_nothing_and_gone_is_no_failure() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let ours = std::os::fd::OwnedFd::from(ours);
        let ours = Stream::from_socket(ours, "unix:///s".parse().unwrap());
        drop(theirs);
        assert_eq!(echo(&ours, b"").unwrap(), 0);
    }
}
