//! Syslog messages of local programs, carried over a stream: what vsudd's `-syslog` did.
//!
//! Programs write datagrams to a Unix socket, as `/dev/log` is one. Each goes on as a frame of RFC 6587's octet counting
//! (RFC 5425 has the same): its length in decimal, a space, its bytes.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use socket2::Type;
use tracing::{info, warn};

use crate::address::Address;
use crate::error::Result;
use crate::listener::file::{self, SocketFile};
use crate::serve::{LOOK, Stop};
use crate::stream::Stream;
use crate::sys::{self, AsSocket, Wanted};

/// How long a message may be; longer ones are cut off, as syslog daemons do. Linux' `net.core.wmem_default` lets no
/// program send more than some 200 KiB.
const LONGEST_MESSAGE: usize = 256 * 1024;

/// How much is kept while there is no connection; then the oldest messages are let go of. Programs are never made to
/// wait.
const MOST_KEPT: usize = 4 * 1024 * 1024;

/// How long a dial may take, and how long there is no other after one that failed.
const DIAL: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_secs(1);

/// How long the last messages may take when the end is asked for.
const LAST: Duration = Duration::from_secs(2);

/// How long a message may take to be written.
const STUCK: Duration = Duration::from_secs(10);

/// The socket that programs write to.
#[derive(Debug)]
pub(crate) struct Log {
    socket: UnixDatagram,
    _file: SocketFile,
}

impl Log {
    /// Binds the socket at `path`, with these permissions.
    ///
    /// # Errors
    /// As those of a [`Listener`](crate::Listener).
    pub(crate) fn bind(path: &Path, mode: u32) -> Result<Log> {
        let (socket, file) = file::bind(path.display(), path, Type::DGRAM, mode)?;
        let socket = UnixDatagram::from(std::os::fd::OwnedFd::from(socket));
        let fail = |e| crate::Error::new(crate::Operation::Listen, path.display(), e);
        socket.set_nonblocking(true).map_err(fail)?;
        Ok(Log {
            socket,
            _file: file,
        })
    }
}

/// Messages on their way.
#[derive(Debug, Default)]
struct Queue {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Let go of since that was last told.
    lost: u64,
}

impl Queue {
    fn push(&mut self, message: &[u8]) {
        let mut frame = format!("{} ", message.len()).into_bytes();
        frame.extend_from_slice(message);
        self.bytes += frame.len();
        self.frames.push_back(frame);
        while self.bytes > MOST_KEPT {
            self.bytes -= self.frames.pop_front().map_or(0, |frame| frame.len());
            self.lost += 1;
        }
    }

    fn pop(&mut self) -> Option<Vec<u8>> {
        let frame = self.frames.pop_front()?;
        self.bytes -= frame.len();
        Some(frame)
    }

    fn put_back(&mut self, frame: Vec<u8>) {
        self.bytes += frame.len();
        self.frames.push_front(frame);
    }
}

/// Carries messages from `log` to `target` until `stop` is asked for. A connection that is lost is made again, and what
/// came meanwhile is kept, in bounds.
///
/// # Errors
/// What waiting for messages says.
pub(crate) fn carry(log: &Log, target: &Address, stop: &Stop) -> io::Result<()> {
    let kept = Kept::default();
    thread::scope(|scope| {
        // Apart from the dials, however long those take: the kernel keeps a few messages only, and then programs wait.
        let taking = scope.spawn(|| take(log, &kept, stop));
        let mut link = Link::new(target);
        while !taking.is_finished() {
            kept.wait(link.next_try());
            link.deliver(&kept);
        }
        let end = Instant::now() + LAST;
        while !kept.is_empty() && Instant::now() < end && !stop.is_urgent() {
            link.deliver(&kept);
            thread::sleep(link.next_try().min(LOOK));
        }
        if !kept.is_empty() {
            warn!("{} messages were not delivered", kept.lock().frames.len());
        }
        link.end();
        match taking.join() {
            Ok(taken) => taken,
            Err(_) => Err(io::Error::other(
                "the thread that takes messages has panicked",
            )),
        }
    })
}

/// A queue that two threads have.
#[derive(Debug, Default)]
struct Kept {
    queue: Mutex<Queue>,
    came: Condvar,
}

impl Kept {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_empty(&self) -> bool {
        self.lock().frames.is_empty()
    }

    /// Waits a while for messages; at least `pause`, if that is shorter.
    fn wait(&self, pause: Duration) {
        thread::sleep(pause.min(LOOK));
        let none = |queue: &mut Queue| queue.frames.is_empty();
        drop(self.came.wait_timeout_while(self.lock(), LOOK, none));
    }
}

/// Takes what programs write, until the end is asked for.
fn take(log: &Log, kept: &Kept, stop: &Stop) -> io::Result<()> {
    let mut buffer = vec![0; LONGEST_MESSAGE];
    loop {
        match log.socket.recv(&mut buffer) {
            Ok(n) => {
                kept.lock().push(&buffer[..n]);
                kept.came.notify_one();
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if stop.is_asked() {
                    return Ok(());
                }
                sys::wait(log.socket.as_socket(), Wanted::Readable, LOOK)?;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// The connection to where messages go.
#[derive(Debug)]
struct Link<'a> {
    target: &'a Address,
    stream: Option<Stream>,
    /// The last frame written: that the peer was gone by then only the next write tells.
    last: Option<Vec<u8>>,
    /// No dial before.
    next: Instant,
    complained: bool,
}

impl<'a> Link<'a> {
    fn new(target: &'a Address) -> Link<'a> {
        Link {
            target,
            stream: None,
            last: None,
            next: Instant::now(),
            complained: false,
        }
    }

    /// How long until it may be tried again.
    fn next_try(&self) -> Duration {
        if self.stream.is_some() {
            return Duration::ZERO;
        }
        self.next.saturating_duration_since(Instant::now())
    }

    /// Writes what is there, as long as it can.
    fn deliver(&mut self, kept: &Kept) {
        if !self.next_try().is_zero() {
            return;
        }
        loop {
            let Some(frame) = kept.lock().pop() else {
                return;
            };
            if let Err(why) = self.write(&frame) {
                let mut queue = kept.lock();
                queue.put_back(frame);
                if let Some(last) = self.last.take() {
                    queue.put_back(last);
                }
                drop(queue);
                if !std::mem::replace(&mut self.complained, true) {
                    warn!("{why}; keeping messages until it can be had");
                }
                self.stream = None;
                self.next = Instant::now() + PAUSE;
                return;
            }
            self.last = Some(frame);
            if std::mem::take(&mut self.complained) {
                info!("connected to {}", self.target);
            }
            let lost = std::mem::take(&mut kept.lock().lost);
            if lost > 0 {
                warn!("{lost} messages were let go of while there was no connection");
            }
        }
    }

    fn write(&mut self, frame: &[u8]) -> std::result::Result<(), String> {
        // A collector never says anything: what can be read is its end.
        let gone = |stream: &mut Stream| {
            sys::wait(stream.as_socket(), Wanted::Readable, Duration::ZERO).unwrap_or(true)
        };
        if self.stream.as_mut().is_some_and(gone) {
            self.stream = None;
        }
        if self.stream.is_none() {
            let stream =
                Stream::connect_timeout(self.target, DIAL).map_err(|error| error.to_string())?;
            let bounded = stream.set_write_timeout(Some(STUCK));
            bounded.map_err(|error| error.to_string())?;
            self.stream = Some(stream);
        }
        match &mut self.stream {
            Some(stream) => stream
                .write_all(frame)
                .map_err(|error| format!("the connection to {} broke: {error}", self.target)),
            None => Ok(()),
        }
    }

    /// Ends the connection, all that was written having arrived.
    fn end(self) {
        if let Some(stream) = self.stream {
            if self.target.is_delicate() {
                let _ = stream.finish(LAST);
            } else {
                let _ = stream.shutdown(Shutdown::Write);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_are_let_go_of_and_counted() {
        let mut queue = Queue::default();
        for n in 0..5 {
            queue.push(&vec![n; MOST_KEPT / 4]);
        }
        assert_eq!((queue.frames.len(), queue.lost), (3, 2));
        let frame = queue.pop().unwrap_or_default();
        assert!(frame.starts_with(b"1048576 ") && frame.ends_with(&[2]));
        let before = queue.bytes;
        queue.put_back(frame);
        assert_eq!(queue.bytes, before + 1_048_576 + 8);
    }
}
