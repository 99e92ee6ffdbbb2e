//! The time at which a guest was last heard from.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The precision of that time. Bytes within one step cost no more than one atomic load.
const STEP: Duration = Duration::from_secs(1);

/// The time of the latest byte or end that came from a guest, kept without a lock.
#[derive(Debug, Default)]
pub(crate) struct LastHeard {
    /// The time of the first one.
    first: OnceLock<Instant>,
    /// The milliseconds since then, plus one; 0 if nothing has come yet.
    at: AtomicU64,
}

impl LastHeard {
    /// Returns whether the time is to be noted: it is later than the last one by at least a step.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        let at = self.at.load(Ordering::Relaxed);
        at == 0 || self.number(now) >= at + STEP.as_millis() as u64
    }

    /// Notes that something has come from the guest.
    pub(crate) fn note_heard(&self, now: Instant) {
        self.at.fetch_max(self.number(now), Ordering::Relaxed);
    }

    /// Forgets the time, because the VM is another one now.
    pub(crate) fn forget_time(&self) {
        self.at.store(0, Ordering::Relaxed);
    }

    /// Returns the time at which something came last.
    pub(crate) fn at(&self) -> Option<Instant> {
        match self.at.load(Ordering::Relaxed) {
            0 => None,
            at => self.first.get()?.checked_add(Duration::from_millis(at - 1)),
        }
    }

    fn number(&self, now: Instant) -> u64 {
        let first = *self.first.get_or_init(|| now);
        let since = now.saturating_duration_since(first).as_millis();
        u64::try_from(since)
            .unwrap_or(u64::MAX - 1)
            .saturating_add(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_may_be_one_before_it_was_made() {
        let then = Instant::now();
        let heard = LastHeard::default();
        assert_eq!(heard.at(), None);
        heard.note_heard(then);
        assert_eq!(heard.at(), Some(then));
        assert!(!heard.is_due(then + STEP / 2));
        heard.note_heard(then + 2 * STEP);
        assert_eq!(heard.at(), Some(then + 2 * STEP));
    }
}
