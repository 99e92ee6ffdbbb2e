//! The drain of one end: how fast it is read, and when it is given up before its time.
//!
//! A drain reads what a guest sends on a connection that nobody listens to any more, until the EOF
//! that ends it in order. Most guests end it at once. One that goes on sending is read slowly, so
//! that it costs little, and is given up after [`LONGEST_SENDING`], or before that if clients wait
//! and drains have more than their part of the VM's slots. The drain timeout itself is applied by
//! `engine/connection/closing.rs`, which closes by force what has not ended by then.
//!
//! What a close does to hyperkit's device depends on the guest (`pci_virtio_sock.c`):
//!
//! - A guest that sends is told. The device's next write fails with EPIPE, it shuts both directions
//!   down, and answers the guest's next packet by a reset, which frees the slot; if no packet
//!   comes, it does so by itself after 30 s (`SHUTDOWN_RST_DELAY`). So to give up such a drain
//!   gives its slot back.
//! - A guest that is silent is told of nothing but our half-close, which it knew: its slot is lost
//!   until it sends or ends. To give up such a drain early would gain nothing, so it keeps the
//!   whole drain timeout, and after that the socket stays open, where it can be, to see the end.
//! - If the guest has closed, and the device still holds more for us than the socket's buffer
//!   takes, the close kills the VM. While an end is read slowly, the device does hold more. So
//!   before it is closed, it is read at full speed until nothing is left ([`Pace::Last`]).

use std::time::{Duration, Instant};

/// How many bytes are read at full speed. Most downloads that a client cancels end within them.
pub(crate) const UNHURRIED: u64 = 4 * 1024 * 1024;

/// How long a guest may go on sending less than that at full speed.
const SENDS_ON: Duration = Duration::from_secs(1);

/// The time between two reads of a guest that goes on sending. With the size of a buffer, 128 KiB,
/// that is at most 1.3 MB a second.
const PACE: Duration = Duration::from_millis(100);

/// How long a guest may go on sending before its drain is given up.
pub(crate) const LONGEST_SENDING: Duration = Duration::from_secs(10);

/// A guest that has sent nothing for so long is silent.
pub(crate) const SILENCE: Duration = Duration::from_secs(5);

/// How long a guest that goes on sending may pause and still count as such, for those that wait.
const PAUSES: Duration = Duration::from_secs(1);

/// More bytes than the device and the sockets hold between them: what comes after so many was sent
/// since.
const HELD: u64 = 1024 * 1024;

/// How long nothing must come before the device counts as empty. It writes what it holds as soon as
/// its thread runs.
const EMPTY: Duration = Duration::from_millis(50);

/// How long an end that is given up is read at full speed.
pub(crate) const LAST_READS: Duration = Duration::from_secs(1);

/// How an end is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    Full,
    /// One read at a time, not before then.
    Slow(Instant),
    /// At full speed, until it can be closed.
    Last {
        /// The number of bytes read when that began.
        from: u64,
        until: Instant,
    },
}

/// What is to be done with an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DrainReading {
    /// Read as much as one turn may.
    Full,
    Once,
    /// Wait: it is not time yet.
    Later,
}

/// The result of a turn of an end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DrainTurn {
    /// What has been received by now.
    pub(crate) received: u64,
    /// Whether the end was read in this turn.
    pub(crate) was_read: bool,
    /// Whether more can be read at once.
    pub(crate) is_readable: bool,
    /// Whether the end may be read slowly from now on.
    pub(crate) may_slow: bool,
}

/// What follows from a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DrainStep {
    /// Wait for an event.
    Wait,
    /// Go on at that time.
    At(Instant),
    /// Go on after the others.
    Again,
    /// The guest goes on sending, and is read slowly from now on.
    Slower,
    /// The guest, which is read slowly, sends nothing for now. Wait for an event.
    Paused,
    /// The guest has gone on sending: its drain is given up if others need its slot.
    MayGiveUp,
    /// The guest has gone on sending for too long: its drain is given up.
    GiveUp,
    /// Nothing is left: the end can be closed.
    Close,
}

/// The state of a drain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drain {
    pace: Pace,
    /// The number of bytes received when it began.
    from: u64,
    received: u64,
    /// The time of the last byte.
    last: Option<Instant>,
    /// The time since which the guest has been sending without a silence.
    sending_since: Option<Instant>,
}

impl Drain {
    /// Makes the drain of an end that has received so many bytes.
    pub(crate) fn new(received: u64) -> Drain {
        Drain {
            pace: Pace::Full,
            from: received,
            received,
            last: None,
            sending_since: None,
        }
    }

    /// Returns how the end is to be read now.
    pub(crate) fn reading(&self, now: Instant) -> DrainReading {
        match self.pace {
            Pace::Full | Pace::Last { .. } => DrainReading::Full,
            Pace::Slow(next) if now >= next => DrainReading::Once,
            Pace::Slow(_) => DrainReading::Later,
        }
    }

    /// Returns whether the guest is sending.
    pub(crate) fn is_sending(&self, now: Instant) -> bool {
        let is_recent = |at| now.saturating_duration_since(at) < SILENCE;
        self.last.is_some_and(is_recent)
    }

    /// Returns whether something has come, and the drain was not given up yet.
    pub(crate) fn wants_end(&self) -> bool {
        self.received > self.from && !matches!(self.pace, Pace::Last { .. })
    }

    /// Notes that the process was frozen: the guest may have been unable to end.
    pub(crate) fn note_freeze(&mut self, now: Instant) {
        self.sending_since = self.sending_since.map(|_| now);
        if let Pace::Last { until, .. } = &mut self.pace {
            *until = (*until).max(now + EMPTY);
        }
    }

    /// Reads at full speed from now on, whatever comes: the proxy stops.
    pub(crate) fn end_slowness(&mut self) {
        if matches!(self.pace, Pace::Slow(_)) {
            self.pace = Pace::Full;
        }
    }

    /// Reads the rest at full speed, to be closed.
    pub(crate) fn give_up(&mut self, now: Instant) {
        self.pace = Pace::Last {
            from: self.received,
            until: now + LAST_READS,
        };
    }

    /// Takes the result of a turn, and returns what follows.
    pub(crate) fn take_turn(&mut self, turn: DrainTurn, now: Instant) -> DrainStep {
        let DrainTurn {
            received,
            was_read,
            is_readable,
            may_slow,
        } = turn;
        let has_come = received > self.received;
        if has_come {
            if !self.is_sending(now) || self.sending_since.is_none() {
                self.sending_since = Some(now);
            }
            self.last = Some(now);
        }
        self.received = received;
        let sending = self.sending_since.filter(|_| has_come);
        let sending = sending.map(|since| now.saturating_duration_since(since));
        match self.pace {
            Pace::Full => {
                let is_much = received - self.from > UNHURRIED;
                if may_slow && has_come && (is_much || sending >= Some(SENDS_ON)) {
                    self.pace = Pace::Slow(now + PACE);
                    return DrainStep::Slower;
                }
                match is_readable {
                    true => DrainStep::Again,
                    false => DrainStep::Wait,
                }
            }
            Pace::Slow(next) if !was_read => match is_readable {
                true => DrainStep::At(next),
                false => DrainStep::Wait,
            },
            Pace::Slow(_) => {
                self.pace = Pace::Slow(now + PACE);
                match sending {
                    Some(time) if time >= LONGEST_SENDING => DrainStep::GiveUp,
                    Some(_) => DrainStep::MayGiveUp,
                    None => match self.last.map(|at| at + PAUSES) {
                        Some(at) if now < at => DrainStep::At(at),
                        _ => DrainStep::Paused,
                    },
                }
            }
            Pace::Last { from, until } => {
                let is_newly_sent = received - from > HELD;
                let is_empty = self.last.is_none_or(|at| now >= at + EMPTY);
                if now >= until || !is_readable && (is_newly_sent || is_empty) {
                    return DrainStep::Close;
                }
                match is_readable {
                    true => DrainStep::Again,
                    false => DrainStep::At(until.min(now + EMPTY)),
                }
            }
        }
    }

    /// Returns when to go on after [`DrainStep::MayGiveUp`], [`DrainStep::GiveUp`] or
    /// [`DrainStep::Slower`].
    pub(crate) fn next_read(&self, now: Instant) -> Instant {
        match self.pace {
            Pace::Slow(next) => next,
            _ => now,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUFFER: u64 = 128 * 1024;

    /// A drain, with what it has received and the time.
    struct Guest {
        drain: Drain,
        received: u64,
        now: Instant,
    }

    impl Guest {
        fn new() -> Guest {
            Guest {
                drain: Drain::new(0),
                received: 0,
                now: Instant::now(),
            }
        }

        /// Reads so much, if it is time; whether more can be read then.
        fn reads(&mut self, bytes: u64, is_readable: bool) -> DrainStep {
            let (reading, now) = (self.drain.reading(self.now), self.now);
            let has_read = reading != DrainReading::Later;
            if has_read {
                self.received += bytes;
            }
            let turn = DrainTurn {
                received: self.received,
                was_read: has_read,
                is_readable,
                may_slow: true,
            };
            self.drain.take_turn(turn, now)
        }

        fn waits(&mut self, time: Duration) {
            self.now += time;
        }
    }

    #[test]
    fn a_guest_that_sends_on_is_read_slowly_and_given_up() {
        let mut guest = Guest::new();
        let begun = guest.now;
        while guest.reads(4 * BUFFER, true) == DrainStep::Again {}
        assert!((UNHURRIED..UNHURRIED + 5 * BUFFER).contains(&guest.received));
        let before = guest.received;
        let mut next = guest.reads(BUFFER, true);
        while next != DrainStep::GiveUp {
            guest.now = match next {
                DrainStep::At(at) => at,
                _ => guest.drain.next_read(guest.now),
            };
            next = guest.reads(BUFFER, true);
        }
        let took = guest.now - begun;
        assert!(took >= LONGEST_SENDING && took < LONGEST_SENDING + 2 * PACE);
        assert!(guest.received - before <= 101 * BUFFER);
        // A guest that only drips is read slowly, too.
        let mut guest = Guest::new();
        let begun = guest.now;
        while guest.reads(1, false) != DrainStep::GiveUp {
            guest.waits(2 * PACE);
        }
        assert!(guest.now - begun < LONGEST_SENDING + 3 * PACE);
    }

    #[test]
    fn a_guest_that_falls_silent_begins_anew() {
        let mut guest = Guest::new();
        for _ in 0..10 {
            for _ in 0..30 {
                assert!(!matches!(guest.reads(1, false), DrainStep::GiveUp));
                guest.waits(2 * PACE);
            }
            assert!(guest.drain.is_sending(guest.now));
            guest.waits(SILENCE);
            assert!(!guest.drain.is_sending(guest.now));
        }
    }

    #[test]
    fn what_is_given_up_is_closed_when_the_device_holds_nothing() {
        let mut guest = Guest::new();
        while guest.reads(4 * BUFFER, true) == DrainStep::Again {}
        guest.drain.give_up(guest.now);
        // What has come may be what the device held before.
        assert!(matches!(guest.reads(4 * BUFFER, false), DrainStep::At(_)));
        assert_eq!(guest.reads(4 * BUFFER, true), DrainStep::Again);
        assert_eq!(guest.reads(BUFFER, false), DrainStep::Close);
        // A guest that falls silent has nothing on its way.
        guest.drain.give_up(guest.now);
        let DrainStep::At(at) = guest.reads(BUFFER, false) else {
            panic!()
        };
        guest.now = at;
        assert_eq!(guest.reads(0, false), DrainStep::Close);
        // One that is faster than we are is not read for ever.
        guest.drain.give_up(guest.now);
        assert_eq!(guest.reads(8 * BUFFER, true), DrainStep::Again);
        guest.waits(LAST_READS);
        assert_eq!(guest.reads(8 * BUFFER, true), DrainStep::Close);
    }

    #[test]
    fn what_stops_is_read_at_full_speed() {
        let mut guest = Guest::new();
        while guest.reads(4 * BUFFER, true) == DrainStep::Again {}
        assert_eq!(guest.drain.reading(guest.now), DrainReading::Later);
        guest.drain.end_slowness();
        assert_eq!(guest.drain.reading(guest.now), DrainReading::Full);
    }
}
