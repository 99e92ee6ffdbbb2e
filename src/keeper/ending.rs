//! The graceful end of connections whose proxy is gone: each is half-closed, read to its EOF, and
//! closed. A close before that can kill the VM.
//!
//! A guest that goes on sending is read slowly, and given up in the end, by the same rules as the
//! proxy's own drains (`stream/draining.rs`, which says why and has the numbers): before it is closed, it is
//! read at full speed until the device holds nothing. The device is told by that, and gives the slot
//! back.

use std::io::{ErrorKind, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::stream::draining::{
    EMPTY, HELD, LAST_READS, LONGEST_SENDING, PACE, SENDS_ON, SILENCE, UNHURRIED,
};

/// How much is read at once.
const BUFFER: usize = 64 * 1024;

/// How often one connection is read in a turn, so that the others have theirs.
const READS: usize = 4;

/// How it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    Full,
    /// Not before then.
    Slow(Instant),
    /// At full speed, to be closed.
    Last {
        /// What had been read by then.
        from: u64,
        until: Instant,
    },
}

/// A connection that is ended.
#[derive(Debug)]
pub(super) struct Ending {
    stream: UnixStream,
    pace: Pace,
    received: u64,
    /// The time of the last byte, and since when the guest has been sending without a silence.
    last: Instant,
    sending_since: Option<Instant>,
    /// Whether it has something to be read, as far as is known.
    pub(super) ready: bool,
}

/// What a turn has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// It is to be closed now.
    Ended,
    Open,
    /// It is to be closed now, though its guest goes on sending.
    GivenUp,
}

/// What reading has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// Nothing more can come.
    Ended,
    /// There is more.
    Some,
    /// That was all for now.
    All,
}

impl Ending {
    /// Half-closes a connection.
    pub(super) fn begin(connection: OwnedFd, now: Instant) -> Ending {
        let stream = UnixStream::from(connection);
        // An accepted one is not yet; and it fails for none that can be read.
        let _ = stream.set_nonblocking(true);
        let _ = stream.shutdown(Shutdown::Write);
        Ending {
            stream,
            pace: Pace::Full,
            received: 0,
            last: now,
            sending_since: None,
            ready: true,
        }
    }

    /// Returns whether it is to be waited for until it can be read.
    pub(super) fn is_waited_for(&self, now: Instant) -> bool {
        !matches!(self.pace, Pace::Slow(next) if now < next)
    }

    /// Returns when its turn comes though nothing has.
    pub(super) fn wakes_at(&self, now: Instant) -> Option<Instant> {
        match self.pace {
            _ if self.ready => Some(now),
            Pace::Slow(next) if now < next => Some(next),
            Pace::Last { until, .. } => Some(until.min(self.last + EMPTY)),
            _ => None,
        }
    }

    /// Reads and discards some of what has come, if it is time.
    pub(super) fn take_turn(&mut self, buffer: &mut Vec<u8>, now: Instant) -> Turn {
        let is_due = self.ready || matches!(self.pace, Pace::Last { .. });
        if !is_due || !self.is_waited_for(now) {
            return Turn::Open;
        }
        self.ready = false;
        let reads = match self.pace {
            Pace::Slow(_) => 1,
            _ => READS,
        };
        let has_more = match self.read(buffer, reads, now) {
            Outcome::Ended => return Turn::Ended,
            Outcome::Some => true,
            Outcome::All => false,
        };
        match self.pace {
            Pace::Last { from, until } => {
                let is_newly_sent = self.received - from > HELD;
                let is_empty = now >= self.last + EMPTY;
                if now >= until || !has_more && (is_newly_sent || is_empty) {
                    self.break_off(buffer);
                    return Turn::GivenUp;
                }
            }
            Pace::Full | Pace::Slow(_) => self.set_pace(now),
        }
        Turn::Open
    }

    /// Reads at most so often.
    fn read(&mut self, buffer: &mut Vec<u8>, reads: usize, now: Instant) -> Outcome {
        buffer.resize(BUFFER, 0);
        for _ in 0..reads {
            match self.stream.read(buffer) {
                Ok(0) => return Outcome::Ended,
                Ok(n) => {
                    let was_silent = now.saturating_duration_since(self.last) >= SILENCE;
                    if was_silent || self.sending_since.is_none() {
                        self.sending_since = Some(now);
                    }
                    self.last = now;
                    self.received += n as u64;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Outcome::All,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // Nothing more can come of it.
                Err(_) => return Outcome::Ended,
            }
        }
        Outcome::Some
    }

    fn set_pace(&mut self, now: Instant) {
        let is_silent = now.saturating_duration_since(self.last) >= SILENCE;
        let since = self.sending_since.filter(|_| !is_silent);
        let sending = since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        if sending >= LONGEST_SENDING {
            self.pace = Pace::Last {
                from: self.received,
                until: now + LAST_READS,
            };
        } else if self.received > UNHURRIED || sending >= SENDS_ON {
            self.pace = Pace::Slow(now + PACE);
        }
    }

    /// Reads what has come, and has the VM's next write fail: it is to be closed now, with as little
    /// harm as is possible.
    pub(super) fn break_off(&mut self, buffer: &mut Vec<u8>) {
        /// Many times what a socket can hold.
        const READS: usize = 64;
        let now = self.last;
        if self.read(buffer, READS, now) != Outcome::Ended {
            let _ = self.stream.shutdown(Shutdown::Read);
            let _ = self.read(buffer, READS, now);
        }
    }
}

impl AsFd for Ending {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A connection that is ended, and the guest's end of it.
    fn pair(now: Instant) -> (Ending, UnixStream) {
        let (ours, guest) = UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        (Ending::begin(ours.into(), now), guest)
    }

    /// Sends as much as there is room for; whether there can be more.
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
        let (mut ending, guest) = pair(begun);
        let (mut buffer, mut now, mut turns) = (Vec::new(), begun, 0);
        loop {
            assert!(send(&guest), "it was cut off after {turns} turns");
            ending.ready |= ending.is_waited_for(now);
            match ending.take_turn(&mut buffer, now) {
                Turn::Open => {}
                Turn::Ended => panic!(),
                Turn::GivenUp => break,
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
        let (mut ending, guest) = pair(begun);
        let (mut buffer, mut now) = (Vec::new(), begun);
        for _ in 0..20 {
            (&guest).write_all(b"some").unwrap();
            ending.ready = true;
            assert_eq!(ending.take_turn(&mut buffer, now), Turn::Open);
            now += SILENCE;
        }
        assert_eq!(ending.wakes_at(now), None);
        // A child that another test forks may still hold a copy: a close would be no EOF yet.
        guest.shutdown(Shutdown::Both).unwrap();
        ending.ready = true;
        assert_eq!(ending.take_turn(&mut buffer, now), Turn::Ended);
    }

    #[test]
    fn a_socket_that_was_never_connected_has_ended() {
        let now = Instant::now();
        let mut ending = Ending::begin(crate::sys::Unconnected::new().unwrap().socket.into(), now);
        assert_eq!(ending.take_turn(&mut Vec::new(), now), Turn::Ended);
    }
}
