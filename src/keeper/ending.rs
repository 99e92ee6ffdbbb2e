//! The graceful end of connections whose proxy is gone: each is half-closed, read to its EOF, and
//! closed. A close before that can kill the VM.
//!
//! How fast a guest that goes on sending is read, and when it is given up, is decided as for the
//! proxy's own drains, by [`Drain`].

use std::io::{ErrorKind, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use crate::stream::draining::{Drain, DrainReading, DrainStep, DrainTurn};

/// How much is read at once.
const BUFFER: usize = 64 * 1024;

/// How often one connection is read in a turn, so that the others have theirs.
const READS: usize = 4;

/// A connection that is ended.
#[derive(Debug)]
pub(super) struct EndingConnection {
    stream: UnixStream,
    drain: Drain,
    received: u64,
    /// The time of its next turn, if nothing comes before.
    wake_at: Option<Instant>,
    /// Whether something may be there to be read.
    pub(super) ready: bool,
}

/// The result of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EndingTurn {
    /// It is to be closed now.
    Ended,
    Open,
    /// It is to be closed now, though its guest goes on sending.
    GivenUp,
}

/// The result of reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReadResult {
    /// Nothing more can come.
    Ended,
    /// There is more.
    Some,
    /// All that had come was read.
    All,
}

impl EndingConnection {
    /// Half-closes a connection.
    pub(super) fn begin(connection: OwnedFd) -> EndingConnection {
        let stream = UnixStream::from(connection);
        // An accepted socket may still block. The call fails for no socket that can be read.
        let _ = stream.set_nonblocking(true);
        let _ = stream.shutdown(Shutdown::Write);
        EndingConnection {
            stream,
            drain: Drain::new(0),
            received: 0,
            wake_at: None,
            ready: true,
        }
    }

    /// Returns whether it waits until it can be read.
    pub(super) fn is_waited_for(&self, now: Instant) -> bool {
        self.drain.reading(now) != DrainReading::Later
    }

    /// Returns the time of its next turn, if nothing comes before.
    pub(super) fn wakes_at(&self, now: Instant) -> Option<Instant> {
        match self.is_waited_for(now) {
            true if self.ready => Some(now),
            true => self.wake_at,
            false => Some(self.drain.next_read(now)),
        }
    }

    /// Reads and discards some of what has come, if its turn is due.
    pub(super) fn take_turn(&mut self, buffer: &mut Vec<u8>, now: Instant) -> EndingTurn {
        let is_due = self.ready || self.wake_at.is_some_and(|at| at <= now);
        let reads = match self.drain.reading(now) {
            DrainReading::Full if is_due => READS,
            DrainReading::Once if is_due => 1,
            _ => return EndingTurn::Open,
        };
        (self.ready, self.wake_at) = (false, None);
        let is_readable = match self.read(buffer, reads) {
            ReadResult::Ended => return EndingTurn::Ended,
            ReadResult::Some => true,
            ReadResult::All => false,
        };
        let turn = DrainTurn {
            received: self.received,
            was_read: true,
            is_readable,
            may_slow: true,
        };
        self.wake_at = match self.drain.take_turn(turn, now) {
            DrainStep::Close => {
                self.break_off(buffer);
                return EndingTurn::GivenUp;
            }
            DrainStep::GiveUp => {
                self.drain.give_up(now);
                Some(now)
            }
            DrainStep::Again => Some(now),
            DrainStep::At(at) => Some(at),
            // No client of this process waits for the slot.
            DrainStep::Slower | DrainStep::MayGiveUp => Some(self.drain.next_read(now)),
            DrainStep::Wait | DrainStep::Paused => None,
        };
        EndingTurn::Open
    }

    /// Reads and discards, with at most `reads` calls.
    fn read(&mut self, buffer: &mut Vec<u8>, reads: usize) -> ReadResult {
        buffer.resize(BUFFER, 0);
        for _ in 0..reads {
            match self.stream.read(buffer) {
                Ok(0) => return ReadResult::Ended,
                Ok(n) => {
                    self.received += n as u64;
                    // A short read has taken all there was.
                    if n < buffer.len() {
                        return ReadResult::All;
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return ReadResult::All,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // Nothing more can come of it.
                Err(_) => return ReadResult::Ended,
            }
        }
        ReadResult::Some
    }

    /// Reads what has come, and has the VM's next write fail, so that a close now does as little
    /// harm as possible.
    pub(super) fn break_off(&mut self, buffer: &mut Vec<u8>) {
        /// Many times what a socket can hold.
        const READS: usize = 64;
        if self.read(buffer, READS) != ReadResult::Ended {
            let _ = self.stream.shutdown(Shutdown::Read);
            let _ = self.read(buffer, READS);
        }
    }
}

impl AsFd for EndingConnection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use super::*;
    use crate::stream::draining::{LAST_READS, LONGEST_SENDING, SILENCE, UNHURRIED};

    /// Returns a connection that is ended, and the guest's end of it.
    fn pair() -> (EndingConnection, UnixStream) {
        let (ours, guest) = UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        (EndingConnection::begin(ours.into()), guest)
    }

    /// Sends as much as there is room for. Returns whether there can be more.
    fn send(mut guest: &UnixStream) -> bool {
        loop {
            if let Err(e) = guest.write_all(&[7; BUFFER]) {
                return e.kind() == ErrorKind::WouldBlock;
            }
        }
    }

    #[test]
    fn a_guest_that_sends_on_is_read_slowly_and_given_up() {
        let begun = Instant::now();
        let (mut ending, guest) = pair();
        let (mut buffer, mut now, mut turns) = (Vec::new(), begun, 0);
        loop {
            assert!(send(&guest), "it was cut off after {turns} turns");
            ending.ready |= ending.is_waited_for(now);
            match ending.take_turn(&mut buffer, now) {
                EndingTurn::Open => {}
                EndingTurn::Ended => panic!(),
                EndingTurn::GivenUp => break,
            }
            turns += 1;
            assert!(turns < 1000);
            let at = ending.wakes_at(now).unwrap_or(now);
            now = at.max(now + Duration::from_micros(10));
        }
        assert!(now >= begun + LONGEST_SENDING && now < begun + LONGEST_SENDING + 2 * LAST_READS);
        let most = UNHURRIED + (110 + 25 * READS as u64) * BUFFER as u64;
        assert!(ending.received < most, "{}", ending.received);
        // It is told, and nothing of it is unread.
        assert!(!send(&guest));
    }

    #[test]
    fn a_guest_that_sends_now_and_then_may_end_by_itself() {
        let begun = Instant::now();
        let (mut ending, guest) = pair();
        let (mut buffer, mut now) = (Vec::new(), begun);
        for _ in 0..20 {
            (&guest).write_all(b"some").unwrap();
            ending.ready = true;
            assert_eq!(ending.take_turn(&mut buffer, now), EndingTurn::Open);
            now += SILENCE;
        }
        assert_eq!(ending.wakes_at(now), None);
        // A child that another test forks may still hold a copy: a close would be no EOF yet.
        guest.shutdown(Shutdown::Write).unwrap();
        ending.ready = true;
        assert_eq!(ending.take_turn(&mut buffer, now), EndingTurn::Ended);
    }

    #[test]
    fn a_socket_that_was_never_connected_has_ended() {
        let now = Instant::now();
        let mut ending =
            EndingConnection::begin(crate::sys::Unconnected::new().unwrap().socket.into());
        assert_eq!(ending.take_turn(&mut Vec::new(), now), EndingTurn::Ended);
    }
}
