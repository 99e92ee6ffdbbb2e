//! Host sockets that the device has closed, watched for a close by their peer with data unread.
//!
//! The slot is free and the client sees EOF, as after a close. But only this end shows whether the
//! client reads all that was written to it before it closes, so the end is kept. Linux only: other
//! systems don't tell.

use mio::net::UnixStream;
use mio::{Interest, Registry, Token};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;

/// How many are watched at a time; the oldest is dropped first.
const LIMIT: usize = 256;

/// Returns how many bytes from the peer wait on `stream`, at most one. Clears a pending error.
fn peek(stream: &UnixStream) -> nix::Result<usize> {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(stream.as_raw_fd(), &mut [0], flags)
}

/// Returns whether bytes from the peer wait on `stream`.
pub(super) fn has_unread(stream: &UnixStream) -> bool {
    peek(stream).is_ok_and(|n| n > 0)
}

/// Returns whether the peer of `stream` closed with bytes unread.
pub(super) fn was_reset(stream: &UnixStream) -> bool {
    let error = stream.take_error().ok().flatten();
    error.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
}

#[derive(Debug)]
struct Watched {
    stream: UnixStream,
    port: u32,
    /// How many more events come until the peer has closed for certain.
    events: u8,
}

#[derive(Debug, Default)]
pub(super) struct ClosedSockets {
    watched: HashMap<usize, Watched>,
    order: VecDeque<usize>,
}

impl ClosedSockets {
    /// Shuts `stream` down, and watches what its peer does. `half_closed`: the peer has sent EOF.
    /// Returns true if the peer has closed with bytes unread already.
    pub(super) fn watch(
        &mut self,
        mut stream: UnixStream,
        port: u32,
        half_closed: bool,
        registry: &Registry,
        token: Token,
    ) -> bool {
        if !cfg!(target_os = "linux") {
            return false;
        }
        match peek(&stream) {
            Err(Errno::ECONNRESET) => return true,
            // Unread bytes of the peer's make a close a reset, and only a close.
            Ok(1) => return false,
            Ok(_) | Err(_) => {}
        }
        // Each by itself: macOS ends neither where one has ended. They fail only where that is so,
        // or where the peer has gone, and then there is an event at once.
        let _ = stream.shutdown(Shutdown::Read);
        let _ = stream.shutdown(Shutdown::Write);
        let watching = registry.reregister(&mut stream, token, Interest::READABLE);
        if watching.is_err() {
            return was_reset(&stream);
        }
        let watched = Watched {
            stream,
            port,
            // One for the registration, one for the peer's half-close unless that was before, and
            // one for its close.
            events: if half_closed { 2 } else { 3 },
        };
        self.watched.insert(token.0, watched);
        self.order.push_back(token.0);
        while self.order.len() > LIMIT {
            if let Some(oldest) = self.order.pop_front() {
                self.watched.remove(&oldest);
            }
        }
        false
    }

    /// Handles an event on a watched socket. Returns its guest port if its peer closed with bytes
    /// unread.
    pub(super) fn event(&mut self, token: Token) -> Option<u32> {
        let watched = self.watched.get_mut(&token.0)?;
        let reset = was_reset(&watched.stream).then_some(watched.port);
        watched.events -= 1;
        if watched.events == 0 || reset.is_some() {
            self.watched.remove(&token.0);
            self.order.retain(|&other| other != token.0);
        }
        reset
    }
}
