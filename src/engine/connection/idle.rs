//! The idle timeouts of a connection: how long no byte has moved, and what its rule says about it.
//!
//! Moving a byte sets no timer. A timer that is due compares the time of the last byte with the
//! timeout, and is set to what is left. `cut_if_idle` in `relaying.rs` does so.

use std::time::{Duration, Instant};

use crate::engine::rule::Timeouts;
use crate::time::after;

/// The time since which no byte has moved on a connection, and that of its half-close.
#[derive(Clone, Copy, Debug)]
pub(super) struct Idle {
    /// The time of the last byte delivered, or of the connection's opening.
    last_moved: Instant,
    /// The time at which the first side ended.
    half_closed: Option<Instant>,
    /// The bytes that threads had delivered at the last check.
    pub(super) delivered: u64,
}

/// The timeouts of a connection on which nothing moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timeout {
    Idle,
    HalfClosed,
}

impl Idle {
    pub(super) fn new(now: Instant) -> Idle {
        Idle {
            last_moved: now,
            half_closed: None,
            delivered: 0,
        }
    }

    /// Notes that bytes were delivered.
    pub(super) fn note_bytes(&mut self, now: Instant) {
        self.last_moved = now;
    }

    /// Notes that a side has ended.
    pub(super) fn note_half_close(&mut self, now: Instant) {
        self.half_closed.get_or_insert(now);
    }

    /// Returns for how long no byte has moved.
    pub(super) fn time(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.last_moved)
    }

    /// Returns the time of the next timeout if no byte moves until then, and which timeout it is.
    pub(super) fn next_timeout(&self, timeouts: &Timeouts) -> Option<(Instant, Timeout)> {
        let idle = timeouts
            .idle
            .map(|time| (after(self.last_moved, time), Timeout::Idle));
        let half_closed = self.half_closed.zip(timeouts.half_closed);
        let half_closed = half_closed
            .map(|(at, time)| (after(self.last_moved.max(at), time), Timeout::HalfClosed));
        [idle, half_closed]
            .into_iter()
            .flatten()
            .min_by_key(|(at, _)| *at)
    }
}
