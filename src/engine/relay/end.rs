//! One end of a connection: a socket, and what is known of it.

use std::io;

use super::carrier::{Pipe, Pool};

/// What the relay asks of a non-blocking socket.
pub(crate) trait Socket {
    /// What bytes go through from one socket to another without being copied.
    type Pipe: Pipe;

    /// Whether a write that took less than it was given tells that the next one would block, and the poller
    /// raises an edge all the same. True of epoll and kqueue; pollers that emulate edges (Windows, mio's
    /// `poll`) arm the next one only when a call has said `WouldBlock`.
    const SHORT_WRITE_BLOCKS: bool;

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;

    /// Whether the last read, if it gave less than was asked for, has taken all there was, and the next byte, EOF or error
    /// is an edge: unless an event has said [`Readiness::hidden`].
    fn short_read_blocks(&self) -> bool {
        false
    }

    /// Whether its bytes can go through a pipe.
    fn has_splice(&self) -> bool {
        false
    }

    /// Whether what it receives can, too.
    fn can_splice_in(&self) -> bool {
        self.has_splice()
    }

    /// A read into a pipe that is empty. A short one says nothing.
    fn splice_in(&mut self, pipe: &mut Self::Pipe) -> io::Result<usize>;
    /// A write of `len` bytes, all that the pipe holds. A short one says nothing.
    fn splice_out(&mut self, pipe: &mut Self::Pipe, len: usize) -> io::Result<usize>;

    /// Half-close: the peer reads EOF after the last byte.
    fn shutdown_write(&mut self) -> io::Result<()>;

    /// Whether there is a half-close to be sent. Without one, nothing but a close tells the peer that no more comes.
    fn has_half_close(&self) -> bool {
        true
    }

    /// Whether it is certain that a peer which has ended has taken every byte that was sent to it.
    fn peer_took_all(&self) -> bool {
        false
    }

    /// Whether one poller has it for good. It has told already what came before the socket was accepted.
    fn is_settled(&self) -> bool {
        false
    }
}

/// What an event said of a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Readiness {
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// The connection has failed: what has come may still be read, and then a call will tell the error.
    pub(crate) failed: bool,
    /// Something may stand behind what a short read gives, of which no further event will tell: an EOF, an error, or what
    /// comes after urgent data.
    pub(crate) hidden: bool,
    /// Urgent data has come.
    pub(crate) urgent: bool,
}

/// What is known of one direction of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    Open,
    /// Input: EOF was read. Output: the half-close was sent.
    Closed,
    /// A call failed: nothing more comes or goes here.
    Failed(io::ErrorKind),
}

/// A socket with its latched readiness.
///
/// Invariant 1: a socket is registered once, readable and writable, with an edge-triggered poller. Readiness is
/// latched by events and cleared only by `WouldBlock`, by a short write, or by a short read of a socket whose short reads
/// are known to have taken all ([`Socket::short_read_blocks`]), as long as no event has said that something is hidden
/// behind it: an EOF that came with the data would never be seen.
#[derive(Debug)]
pub(crate) struct End<S> {
    pub(crate) socket: S,
    readable: bool,
    writable: bool,
    failed: bool,
    hidden: bool,
    urgent: bool,
    pub(crate) input: Half,
    pub(crate) output: Half,
    received: u64,
}

/// Calls per [`End::discard`] turn: with the buffer's size, the bound of its work.
const DISCARDS: usize = 4;

impl<S: Socket> End<S> {
    /// An end of which no event has told anything yet.
    pub(crate) fn new(socket: S) -> End<S> {
        End {
            socket,
            readable: false,
            writable: false,
            failed: false,
            hidden: false,
            urgent: false,
            input: Half::Open,
            output: Half::Open,
            received: 0,
        }
    }

    /// Latches what an event said.
    pub(crate) fn latch(&mut self, event: Readiness) {
        self.readable |= event.readable;
        self.writable |= event.writable;
        self.failed |= event.failed;
        self.hidden |= event.hidden || event.urgent;
        self.urgent |= event.urgent;
    }

    pub(crate) fn is_readable(&self) -> bool {
        self.readable && self.input == Half::Open
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Bytes read so far.
    pub(crate) fn received(&self) -> u64 {
        self.received
    }

    /// Nothing will come any more.
    pub(crate) fn input_ended(&self) -> bool {
        self.input != Half::Open
    }

    /// The peer is gone: a read failed. No peer that can still take bytes makes a read fail.
    pub(crate) fn is_dead(&self) -> bool {
        matches!(self.input, Half::Failed(_))
    }

    /// The peer is gone, whether a call has told of it yet or only an event.
    pub(crate) fn is_gone(&self) -> bool {
        self.failed || self.is_dead()
    }

    /// What was sent and hasn't arrived will not arrive any more: a write failed, or the connection has. A peer whose
    /// EOF was read before its reset is dead by no read.
    pub(crate) fn takes_nothing(&self) -> bool {
        self.is_gone() || matches!(self.output, Half::Failed(_))
    }

    /// Reads once; `None` when nothing came (would block, EOF or error: the latch and `input` say which).
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let n = self.socket.read(buffer);
        let n = self.note_read(n)?;
        if n < buffer.len() && !self.hidden && self.socket.short_read_blocks() {
            self.readable = false;
        }
        Some(n)
    }

    /// Whether bytes from here can go through a pipe. Of what stands behind urgent data a splice tells nothing; an error
    /// it tells as a read does.
    pub(crate) fn has_splice(&self) -> bool {
        !self.urgent && self.socket.can_splice_in()
    }

    /// As [`read`](End::read), into a pipe that is empty. Only a read tells of an end: `None` may mean as well that
    /// there is no splice here any more.
    pub(crate) fn splice_in(&mut self, pipe: &mut S::Pipe) -> Option<usize> {
        match self.socket.splice_in(pipe) {
            // An EOF, or urgent data of which no event has told yet: Linux' splice says the same of both.
            Ok(0) => {
                self.urgent = true;
                self.hidden = true;
                None
            }
            n => self.note_read(n),
        }
    }

    fn note_read(&mut self, read: io::Result<usize>) -> Option<usize> {
        match read {
            Ok(0) => {
                self.input = match self.output {
                    // A kernel tells an error once. Where a write was told of it (Linux' TCP), the read that should
                    // have failed finds an EOF that no peer sent. EPIPE alone says nothing of what comes from there.
                    Half::Failed(kind) if kind != io::ErrorKind::BrokenPipe => Half::Failed(kind),
                    _ => Half::Closed,
                };
                None
            }
            Ok(n) => {
                self.received += n as u64;
                Some(n)
            }
            Err(e) => {
                match e.kind() {
                    io::ErrorKind::WouldBlock => self.readable = false,
                    // Readable still: the next turn tries again.
                    io::ErrorKind::Interrupted => {}
                    kind => self.input = Half::Failed(kind),
                }
                None
            }
        }
    }

    /// Writes once; how many bytes went (none: the latch and `output` say why).
    pub(crate) fn write(&mut self, bytes: &[u8]) -> usize {
        let written = self.socket.write(bytes);
        let is_short = matches!(written, Ok(n) if n < bytes.len());
        let n = self.note_write(written);
        if S::SHORT_WRITE_BLOCKS && is_short {
            self.writable = false;
        }
        n
    }

    /// As [`write`](End::write), of the `len` bytes that the pipe holds.
    pub(crate) fn splice_out(&mut self, pipe: &mut S::Pipe, len: usize) -> usize {
        let written = self.socket.splice_out(pipe, len);
        self.note_write(written)
    }

    fn note_write(&mut self, written: io::Result<usize>) -> usize {
        match written {
            Ok(n) => {
                if n == 0 {
                    self.writable = false;
                }
                n
            }
            Err(e) => {
                match e.kind() {
                    io::ErrorKind::WouldBlock => self.writable = false,
                    io::ErrorKind::Interrupted => {}
                    kind => self.output = Half::Failed(kind),
                }
                0
            }
        }
    }

    /// Sends the half-close, once.
    pub(crate) fn shutdown_write(&mut self) {
        if self.output == Half::Open {
            // An error says that the peer has closed already: then there is nobody to tell.
            let _ = self.socket.shutdown_write();
            self.output = Half::Closed;
        }
    }

    /// Reads and drops a bounded amount of what can be read; true if more can be read at once.
    pub(crate) fn discard(&mut self, pool: &mut Pool<S::Pipe>) -> bool {
        if !self.is_readable() {
            return false;
        }
        let mut buffer = pool.take_buffer();
        for _ in 0..DISCARDS {
            if !self.is_readable() {
                break;
            }
            self.read(&mut buffer);
        }
        pool.give_buffer(buffer);
        self.is_readable()
    }
}
