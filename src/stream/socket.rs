//! What the relay needs of a non-blocking socket, and of a pipe between two of them. Tests have
//! sockets and pipes of their own.

use std::fmt::Debug;
use std::io;
use std::time::Instant;

use crate::sys;

/// A channel through which bytes pass without being copied: a pipe for `splice(2)`, or nothing
/// where there is none.
pub(crate) trait Pipe: Sized + Debug {
    /// Makes an empty pipe, if the system gives one.
    fn new() -> Option<Self>;
}

impl Pipe for sys::Pipe {
    fn new() -> Option<sys::Pipe> {
        sys::Pipe::new()
    }
}

/// The number of cost classes that sockets may have.
pub(crate) const COST_CLASSES: usize = 2;

/// What the relay needs of a non-blocking socket.
pub(crate) trait Socket {
    /// The channel for bytes that pass from one socket to another without being copied.
    type Pipe: Pipe;

    /// Whether a write that took less than it was given says that the next one would block, and the
    /// poller raises an edge nevertheless. This is true of epoll and kqueue. Pollers that emulate
    /// edges (Windows, mio's `poll`) arm the next edge only when a call has returned `WouldBlock`.
    const SHORT_WRITE_BLOCKS: bool;

    /// Reads once, without waiting.
    ///
    /// # Errors
    /// Returns `WouldBlock` if nothing is there; `Interrupted`, after which the call is made again;
    /// otherwise an error that ends the input.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
    /// Writes once, without waiting.
    ///
    /// # Errors
    /// Returns `WouldBlock` if there is no room; `Interrupted`, after which the call is made again;
    /// otherwise an error that ends the output.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;

    /// Returns whether the last read, if it returned less than was asked for, has taken all there
    /// was, so that the next byte, EOF or error raises an edge; unless an event has said that
    /// something is hidden behind it.
    fn short_read_blocks(&self) -> bool {
        false
    }

    /// Returns whether the socket's bytes can pass through a pipe.
    fn has_splice(&self) -> bool {
        false
    }

    /// Returns whether what the socket receives can pass through a pipe.
    fn can_splice_in(&self) -> bool {
        self.has_splice()
    }

    /// Returns the socket's cost class, below [`COST_CLASSES`]. A byte costs about the same on all
    /// sockets of a class.
    fn cost_class(&self) -> usize {
        0
    }

    /// Returns the time of the clock by which the cost of calls is measured.
    fn clock(&self) -> Instant;

    /// Reads into an empty pipe. A short read has no meaning.
    fn splice_in(&mut self, pipe: &mut Self::Pipe) -> io::Result<usize>;
    /// Writes `len` bytes, all that the pipe holds. A short write has no meaning.
    fn splice_out(&mut self, pipe: &mut Self::Pipe, len: usize) -> io::Result<usize>;

    /// Sends the half-close: the peer reads EOF after the last byte.
    fn shutdown_write(&mut self) -> io::Result<()>;

    /// Returns whether the socket can send a half-close. If it can't, only a close tells the peer
    /// that no more comes.
    fn has_half_close(&self) -> bool {
        true
    }

    /// Returns whether it is certain that a peer which has ended has taken every byte that was sent
    /// to it.
    fn peer_took_all(&self) -> bool {
        false
    }

    /// Returns whether one poller has the socket for good, and has reported what came before the
    /// accept.
    fn is_settled(&self) -> bool {
        false
    }
}
