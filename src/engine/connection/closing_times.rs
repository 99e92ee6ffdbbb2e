//! The times of a connection's closing.

use std::time::{Duration, Instant};

use crate::time::after;

/// How long the slot of a drain that was given up stays taken. The guest is sending, so the device
/// shuts its connection down at once, and frees the slot at its next packet.
const SETTLING: Duration = Duration::from_secs(1);

/// When a connection that is being closed is closed by force, and when its slots are free.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClosingTimes {
    until: Option<Instant>,
    settled: Option<Instant>,
}

impl ClosingTimes {
    /// Makes the times of a closing that may take until then; `None`: until the proxy stops.
    pub(super) fn ending_at(until: Option<Instant>) -> ClosingTimes {
        let settled = None;
        ClosingTimes { until, settled }
    }

    /// Returns when what has not ended is closed by force, if not when the proxy stops.
    pub(crate) fn forced_at(self) -> Option<Instant> {
        self.until
    }

    /// Sets when what has not ended is closed by force.
    pub(super) fn set_end(&mut self, until: Instant) {
        self.until = Some(until);
    }

    /// Gives what has not ended time until then at least.
    pub(super) fn extend_to(&mut self, at: Instant) {
        self.until = self.until.map(|until| until.max(at));
    }

    /// Returns whether what has not ended is to be closed by force.
    pub(super) fn are_over(self, now: Instant) -> bool {
        self.until.is_some_and(|until| now >= until)
    }

    /// Notes that an end was closed by force, and its guest is told. Its slot stays taken for a
    /// moment.
    pub(super) fn note_given_up(&mut self, now: Instant) {
        self.settled = Some(after(now, SETTLING));
    }

    /// Returns when the slots of ends that were given up are free again, if there are such.
    pub(crate) fn settled(self) -> Option<Instant> {
        self.settled
    }

    /// Notes whether the slots of ends that were given up are free again by now.
    pub(super) fn settle(&mut self, now: Instant) {
        self.settled = self.settled.filter(|at| now < *at);
    }

    /// Returns the time of the next step of a closing, which is due at `check_at` as well.
    pub(super) fn next(self, check_at: Option<Instant>) -> Option<Instant> {
        [self.until, self.settled, check_at]
            .into_iter()
            .flatten()
            .min()
    }
}
