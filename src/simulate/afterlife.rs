//! Host sockets that the device is done with, watched for a close with data unread.
//!
//! The slot is free and the client sees EOF, as after a close. But whether the client reads what was written to it before it closes shows only on our end, and
//! that end must then still exist. Linux only: other systems don't tell.

use mio::net::UnixStream;
use mio::{Interest, Registry, Token};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;

/// How many are watched at once; the oldest goes first.
const LIMIT: usize = 256;

/// How many bytes of the peer are seen to be waiting on `stream`, at most one. Takes a pending error off it.
fn peek(stream: &UnixStream) -> nix::Result<usize> {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(stream.as_raw_fd(), &mut [0], flags)
}

/// Whether bytes of the peer are waiting on `stream`.
pub(super) fn has_unread(stream: &UnixStream) -> bool {
    peek(stream).is_ok_and(|n| n > 0)
}

/// Whether the peer of `stream` closed with bytes of ours unread.
pub(super) fn was_reset(stream: &UnixStream) -> bool {
    let error = stream.take_error().ok().flatten();
    error.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
}

#[derive(Debug)]
struct Watched {
    stream: UnixStream,
    port: u32,
    /// How many events there are until the peer has surely closed.
    events: u8,
}

#[derive(Debug, Default)]
pub(super) struct Afterlife {
    watched: HashMap<usize, Watched>,
    order: VecDeque<usize>,
}

impl Afterlife {
    /// Ends `stream` for its peer, and watches what the peer does. `half_closed`: the peer has sent EOF. True if it has closed with bytes unread already.
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
            // One for the registration, one for the peer's half-close unless that was before, and one for its close.
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

    /// An event on a watched socket: the guest port it was for, if its peer closed with bytes unread.
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
