//! One end of a connection: a socket with its latched readiness and the state of both its halves.

use std::io;

use crate::stream::socket::Socket;

use super::carrier::Pool;

/// What an event says about a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Readiness {
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// The connection has failed: what has arrived may still be read; then a call returns the
    /// error.
    pub(crate) failed: bool,
    /// Something may follow what a short read returns, for which no further event comes: an EOF, an
    /// error, or what follows urgent data.
    pub(crate) hidden: bool,
    /// Urgent data has arrived.
    pub(crate) urgent: bool,
}

/// The state of one direction of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    Open,
    /// Input: EOF was read. Output: the half-close was sent.
    Closed,
    /// A call failed: nothing more passes in this direction.
    Failed(io::ErrorKind),
}

/// A socket with its latched readiness.
///
/// Invariant 1: a socket is registered once, readable and writable, with an edge-triggered poller.
/// Readiness is latched by events. It is cleared only by `WouldBlock`, by a short write, or by a
/// short read of a socket whose short reads are known to have taken all
/// ([`Socket::short_read_blocks`]), and the latter only while no event has said that something is
/// hidden behind it. Otherwise an EOF that came with the data would never be seen.
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
    was_reset: bool,
}

/// Reads per [`End::discard`]; with the buffer's size it bounds the work.
const DISCARDS: usize = 4;

impl<S: Socket> End<S> {
    /// Makes an end for which no event has come yet.
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
            was_reset: false,
        }
    }

    /// Latches what an event says.
    pub(crate) fn latch(&mut self, event: Readiness) {
        self.readable |= event.readable;
        self.writable |= event.writable;
        self.failed |= event.failed;
        self.hidden |= event.hidden || event.urgent;
        self.urgent |= event.urgent;
    }

    /// Latches this in the place of what events have said so far, which may not have been about
    /// this socket.
    pub(crate) fn restart_latch(&mut self, readiness: Readiness) {
        (self.readable, self.writable) = (false, false);
        (self.failed, self.hidden, self.urgent) = (false, false, false);
        self.latch(readiness);
    }

    pub(crate) fn is_readable(&self) -> bool {
        self.readable && self.input == Half::Open
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Returns the number of bytes read so far.
    pub(crate) fn received(&self) -> u64 {
        self.received
    }

    /// Returns whether a call has reported a reset. A Unix socket of Linux reports one if its peer
    /// closed with bytes unread.
    pub(crate) fn was_reset(&self) -> bool {
        self.was_reset
    }

    /// Returns whether nothing more will arrive.
    pub(crate) fn input_ended(&self) -> bool {
        self.input != Half::Open
    }

    /// Returns whether the peer is gone: a read failed. No peer that can still take bytes makes a
    /// read fail.
    pub(crate) fn is_dead(&self) -> bool {
        matches!(self.input, Half::Failed(_))
    }

    /// Returns whether the peer is gone, whether a call has reported it yet or only an event.
    pub(crate) fn is_gone(&self) -> bool {
        self.failed || self.is_dead()
    }

    /// Returns whether what was sent and has not arrived will never arrive: a write failed, or the
    /// connection has. A peer whose EOF was read before its reset makes no read fail.
    pub(crate) fn takes_nothing(&self) -> bool {
        self.is_gone() || matches!(self.output, Half::Failed(_))
    }

    /// Reads once. Returns `None` if nothing was read: it would block, or there was an EOF or an
    /// error; the latch and `input` say which.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let n = self.socket.read(buffer);
        let n = self.note_read(n)?;
        if n < buffer.len() && !self.hidden && self.socket.short_read_blocks() {
            self.readable = false;
        }
        Some(n)
    }

    /// Returns whether bytes from here can pass through a pipe. A splice does not see what follows
    /// urgent data; it reports an error as a read does.
    pub(crate) fn has_splice(&self) -> bool {
        !self.urgent && self.socket.can_splice_in()
    }

    /// Reads once, as [`read`](End::read) does, into an empty pipe. Only a read reports an EOF:
    /// `None` may also mean that nothing can be spliced from here any more.
    pub(crate) fn splice_in(&mut self, pipe: &mut S::Pipe) -> Option<usize> {
        match self.socket.splice_in(pipe) {
            // This is an EOF, or urgent data that no event has reported yet: Linux' splice returns
            // the same for both.
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
                    // A kernel reports an error once. If a write got it (Linux' TCP), the read that
                    // should have failed finds an EOF that no peer sent. EPIPE alone says nothing
                    // about the input.
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
                    // The end is readable still: the next turn tries again.
                    io::ErrorKind::Interrupted => {}
                    kind => {
                        self.was_reset |= kind == io::ErrorKind::ConnectionReset;
                        self.input = Half::Failed(kind);
                    }
                }
                None
            }
        }
    }

    /// Writes once. Returns how many bytes were taken; if none, the latch and `output` say why.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> usize {
        let written = self.socket.write(bytes);
        let is_short = matches!(written, Ok(n) if n < bytes.len());
        let n = self.note_write(written);
        if S::SHORT_WRITE_BLOCKS && is_short {
            self.writable = false;
        }
        n
    }

    /// Writes once, as [`write`](End::write) does, of the `len` bytes that the pipe holds.
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
                    kind => {
                        self.was_reset |= kind == io::ErrorKind::ConnectionReset;
                        self.output = Half::Failed(kind);
                    }
                }
                0
            }
        }
    }

    /// Sends the half-close, once.
    pub(crate) fn shutdown_write(&mut self) {
        if self.output == Half::Open {
            // An error says that the peer has closed already: then nobody needs to be told.
            let _ = self.socket.shutdown_write();
            self.output = Half::Closed;
        }
    }

    /// Reads and drops a bounded amount of input. Returns whether more can be read at once.
    pub(crate) fn discard(&mut self, pool: &mut Pool<S::Pipe>) -> bool {
        self.discard_reads(DISCARDS, pool)
    }

    /// Reads once, and drops it. Returns whether more can be read at once.
    pub(crate) fn discard_once(&mut self, pool: &mut Pool<S::Pipe>) -> bool {
        self.discard_reads(1, pool)
    }

    fn discard_reads(&mut self, reads: usize, pool: &mut Pool<S::Pipe>) -> bool {
        if !self.is_readable() {
            return false;
        }
        let mut buffer = pool.take_buffer();
        for _ in 0..reads {
            if !self.is_readable() {
                break;
            }
            self.read(&mut buffer);
        }
        pool.give_buffer(buffer);
        self.is_readable()
    }
}
