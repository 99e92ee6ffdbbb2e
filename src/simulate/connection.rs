//! One slot of the device: a host socket, a guest program, and the bytes between them.

use super::buffer::{Buffer, PAIR_BUFFER};
use super::closed::has_unread;
use super::guest::{Builtin, GuestSocket};
use super::http::Life;
use crate::sys::KERNEL_EDGES;
use mio::event::Event;
use mio::net::UnixStream;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::time::Instant;

/// How much is read at once.
pub(super) const CHUNK: usize = 64 * 1024;

/// What the device keeps for a host program that doesn't read (hyperkit's
/// `DEFAULT_WRITE_BUF_LENGTH`).
const TO_HOST: usize = 128 * 1024;

/// What fits in towards a guest program that doesn't read, such that with the client's own buffer
/// it comes to about hyperkit's 327,680 bytes: on Linux 212,992 by default, on macOS 131,072 where
/// the client has set as much as hyperkit does.
const TO_GUEST: usize = if cfg!(target_os = "linux") { 96 } else { 192 } * 1024;

/// As [`TO_GUEST`] where that buffer comes on top, which Linux doubles.
pub(super) const TO_PAIR: usize =
    TO_GUEST - PAIR_BUFFER * if cfg!(target_os = "linux") { 2 } else { 1 };

/// How a connection came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A line on `connect`.
    Line,
    /// A `guest_forwards` socket.
    Forward,
    /// A dial by the guest.
    Guest,
}

/// The guest's end.
#[derive(Debug)]
pub(super) enum Guest {
    /// The client of a VMM's socket hasn't said which port it wants.
    Unnamed,
    /// The guest's kernel hasn't answered yet.
    Unanswered,
    Builtin(Builtin),
    /// A server behind the guest port that hasn't accepted yet.
    Connecting(GuestSocket),
    Socket(GuestSocket),
    /// The guest has rebooted and knows nothing of this connection: it resets at the first packet.
    Forgotten,
    /// It never heard of it: its request was lost as the guest rebooted.
    Lost,
}

/// Readiness as edges told it; cleared by `WouldBlock`, or by a short read unless EOF is known to
/// be behind it (or the poller's edges are emulated and come only after a `WouldBlock`).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ready {
    read: bool,
    write: bool,
    /// The peer has ended its direction: a short read is not the last.
    read_closed: bool,
}

impl Ready {
    pub(super) fn note(&mut self, event: &Event) {
        self.read |= event.is_readable() || event.is_read_closed() || event.is_error();
        self.write |= event.is_writable() || event.is_write_closed() || event.is_error();
        self.read_closed |= event.is_read_closed() || event.is_error();
    }

    fn short_read(&mut self, n: usize) {
        self.read = self.read_closed || n == CHUNK || !KERNEL_EDGES;
    }
}

/// The result of one turn of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// There is nothing more to do until an event.
    Idle,
    /// There may be more.
    Again,
    /// The slot is free.
    Over,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) host: UnixStream,
    pub(super) origin: Origin,
    pub(super) port: u32,
    pub(super) since: Instant,
    pub(super) guest: Guest,
    pub(super) host_ready: Ready,
    pub(super) guest_ready: Ready,
    /// One direction goes on when the other has ended.
    pub(super) half_close: bool,
    /// In the device's work queue.
    pub(super) queued: bool,
    /// Bytes written to the host's program, and read from it.
    pub(super) sent: u64,
    pub(super) received: u64,
    pub(super) to_guest: Buffer,
    to_host: Buffer,
    /// The host's program has sent EOF.
    pub(super) host_eof: bool,
    /// It has closed both directions, before it got EOF.
    pub(super) host_gone: bool,
    /// It closed with bytes unread.
    pub(super) host_reset: bool,
    /// A read or write of it failed: the guest is reset and the slot freed.
    broken: bool,
    /// That was when the guest had ended, and bytes were left.
    undelivered: bool,
    /// It was told that the guest sends no more.
    pub(super) host_shut: bool,
    /// The guest's program sends no more; reads no more; was told that the host sends no more.
    guest_eof: bool,
    guest_deaf: bool,
    guest_shut: bool,
}

impl Connection {
    pub(super) fn new(host: UnixStream, origin: Origin, port: u32, guest: Guest) -> Connection {
        Connection {
            host,
            origin,
            port,
            since: Instant::now(),
            guest,
            host_ready: Ready::default(),
            guest_ready: Ready::default(),
            half_close: true,
            queued: false,
            sent: 0,
            received: 0,
            to_guest: Buffer::new(TO_GUEST),
            to_host: Buffer::new(TO_HOST),
            host_eof: false,
            host_gone: false,
            host_reset: false,
            broken: false,
            undelivered: false,
            host_shut: false,
            guest_eof: false,
            guest_deaf: false,
            guest_shut: false,
        }
    }

    /// Returns whether the host's program has sent anything, read or not.
    pub(super) fn has_input(&self) -> bool {
        self.received > 0 || has_unread(&self.host)
    }

    /// Returns whether the guest has ended with bytes for the host left in the device.
    pub(super) fn has_undelivered(&self) -> bool {
        self.undelivered || self.guest_eof && !self.to_host.is_empty()
    }

    /// Returns whether a program that dials at a pace has got its text back.
    pub(super) fn is_answered_caller(&self) -> bool {
        matches!(&self.guest, Guest::Builtin(Builtin::Caller(caller)) if caller.is_answered())
    }

    /// Has the guest forget this connection.
    pub(super) fn forget(&mut self) {
        self.guest = match self.guest {
            Guest::Unnamed => return,
            Guest::Unanswered | Guest::Lost => Guest::Lost,
            _ => Guest::Forgotten,
        };
        self.to_guest.clear();
    }

    pub(super) fn guest_event(&mut self, event: &Event) {
        self.guest_ready.note(event);
        // What it sent before is still read.
        self.guest_deaf |= event.is_write_closed() || event.is_error();
    }

    /// Moves bytes, as many as one turn may.
    pub(super) fn turn(&mut self, scratch: &mut [u8], paused: bool) -> Turn {
        match self.guest {
            Guest::Unnamed => {
                let moved = self.read_host(scratch) && !self.broken;
                return match self.broken {
                    true => Turn::Over,
                    false if moved => Turn::Again,
                    false => Turn::Idle,
                };
            }
            Guest::Unanswered | Guest::Connecting(_) => return Turn::Idle,
            Guest::Forgotten => return self.turn_forgotten(scratch, paused),
            Guest::Lost if self.host_gone => return Turn::Over,
            Guest::Lost => return Turn::Idle,
            Guest::Builtin(_) | Guest::Socket(_) => {}
        }
        let mut moved = self.flush();
        moved |= self.read_host(scratch);
        if !paused {
            moved |= self.run_guest(scratch);
        }
        if self.host_eof && !self.half_close {
            // It has ended both directions: what isn't out by now is lost.
            self.to_host.clear();
        }
        moved |= self.flush();
        if self.is_over() {
            return Turn::Over;
        }
        if moved {
            return Turn::Again;
        }
        self.to_guest.release();
        self.to_host.release();
        Turn::Idle
    }

    /// Ends a connection that the guest has forgotten at its first packet: the guest resets.
    fn turn_forgotten(&mut self, scratch: &mut [u8], paused: bool) -> Turn {
        self.flush();
        if self.host_ready.read && !paused && !self.broken {
            match self.host.read(scratch) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.host_ready.read = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => return Turn::Again,
                Err(error) => self.host_failed(&error),
                Ok(_) => return Turn::Over,
            }
        }
        if self.broken { Turn::Over } else { Turn::Idle }
    }

    /// Says something to the host's program in the guest's place.
    pub(super) fn say(&mut self, text: &[u8]) {
        self.to_host.push(text);
    }

    /// Writes to the host's program: bytes, then EOF. Returns whether anything was written.
    fn flush(&mut self) -> bool {
        let mut moved = false;
        while !self.to_host.is_empty() && self.host_ready.write {
            match self.host.write(self.to_host.bytes()) {
                Ok(n) => {
                    self.to_host.consume(n);
                    self.sent += n as u64;
                    moved = true;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.host_ready.write = false;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    self.host_failed(&error);
                    return true;
                }
            }
        }
        let tells = self.half_close && !self.host_shut && !self.guest_deaf;
        if self.guest_eof && self.to_host.is_empty() && tells {
            self.host_shut = true;
            // It fails only if the peer has gone, of which an event comes.
            let _ = self.host.shutdown(Shutdown::Write);
            moved = true;
        }
        moved
    }

    /// Notes that the host's program has gone while it was written to, or with bytes unread.
    fn host_failed(&mut self, error: &io::Error) {
        let reset = |error: &io::Error| error.kind() == ErrorKind::ConnectionReset;
        let pending = self.host.take_error().ok().flatten();
        self.host_reset |= reset(error) || pending.as_ref().is_some_and(reset);
        self.host_eof = true;
        self.host_gone = true;
        self.undelivered = self.has_undelivered();
        self.broken = true;
        self.to_host.clear();
    }

    fn read_host(&mut self, scratch: &mut [u8]) -> bool {
        let room = self.to_guest.space().min(scratch.len());
        // A guest that has closed gets no more; what is unread then makes the close a reset.
        if !self.host_ready.read || self.host_eof || self.guest_deaf || room == 0 {
            return false;
        }
        match self.host.read(&mut scratch[..room]) {
            Ok(0) => self.host_eof = true,
            Ok(n) => {
                self.received += n as u64;
                if n < room {
                    self.host_ready.short_read(n);
                }
                self.to_guest.push(&scratch[..n]);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.host_ready.read = false;
                return false;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => self.host_failed(&error),
        }
        true
    }

    fn run_guest(&mut self, scratch: &mut [u8]) -> bool {
        let before = (self.to_guest.len(), self.to_host.len(), self.guest_eof);
        match &mut self.guest {
            Guest::Builtin(program) => {
                if self.guest_deaf {
                    return false;
                }
                match program.run(&mut self.to_guest, self.host_eof, &mut self.to_host) {
                    Life::Running => {}
                    Life::SentAll => self.guest_eof = true,
                    Life::Closed => {
                        self.guest_eof = true;
                        self.guest_deaf = true;
                    }
                    Life::Reset => {
                        self.to_host.clear();
                        self.broken = true;
                        return false;
                    }
                }
                before != (self.to_guest.len(), self.to_host.len(), self.guest_eof)
            }
            Guest::Socket(_) => self.write_guest() | self.read_guest(scratch),
            _ => false,
        }
    }

    fn write_guest(&mut self) -> bool {
        let Guest::Socket(socket) = &mut self.guest else {
            return false;
        };
        let mut moved = false;
        if self.guest_deaf {
            self.to_guest.clear();
        }
        while !self.to_guest.is_empty() && self.guest_ready.write {
            match socket.write(self.to_guest.bytes()) {
                Ok(n) => {
                    self.to_guest.consume(n);
                    moved = true;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.guest_ready.write = false;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    self.guest_deaf = true;
                    self.to_guest.clear();
                    return true;
                }
            }
        }
        if self.host_eof && self.to_guest.is_empty() && !self.guest_shut {
            self.guest_shut = true;
            socket.shutdown_write();
            moved = true;
        }
        moved
    }

    fn read_guest(&mut self, scratch: &mut [u8]) -> bool {
        let room = self.to_host.space().min(scratch.len());
        if self.guest_eof || !self.guest_ready.read || room == 0 {
            return false;
        }
        let Guest::Socket(socket) = &mut self.guest else {
            return false;
        };
        match socket.read(&mut scratch[..room]) {
            Ok(0) => self.guest_eof = true,
            Ok(n) => {
                if n < room {
                    self.guest_ready.short_read(n);
                }
                self.to_host.push(&scratch[..n]);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.guest_ready.read = false;
                return false;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => {
                self.guest_eof = true;
                self.guest_deaf = true;
            }
        }
        true
    }

    /// Returns whether the device frees the slot: the guest has closed and all that it sent is out;
    /// or both directions have ended, which the host's end may do alone; or a write failed, and the
    /// guest was reset.
    fn is_over(&self) -> bool {
        if self.broken {
            return true;
        }
        let told = self.guest_shut || matches!(self.guest, Guest::Builtin(_));
        let host_ended = self.host_eof && self.to_guest.is_empty() && told;
        if host_ended && !self.half_close {
            return true;
        }
        if !self.guest_eof || !self.to_host.is_empty() {
            return false;
        }
        // TCP doesn't tell a close from a half-close, which would be kept from the host for ever.
        let may_be_closed = matches!(self.guest, Guest::Socket(GuestSocket::Tcp(_)));
        self.guest_deaf || host_ended || may_be_closed && !self.half_close
    }
}
