//! When connections want a turn without an event.

use std::collections::BTreeSet;
use std::time::Instant;

use super::table::Id;

/// The timers of one worker's connections.
///
/// Invariant 7: a connection has one entry at most. A timer that is set anew replaces the old one, and a connection that
/// is forgotten takes its entry with it: what is kept does not grow with the connections that have ended.
#[derive(Debug, Default)]
pub(super) struct Timers(BTreeSet<(Instant, Id)>);

impl Timers {
    /// Sets the timer of a connection, whose present one is `timer`; `None` ends it.
    pub(super) fn set(&mut self, timer: &mut Option<Instant>, id: Id, at: Option<Instant>) {
        if *timer == at {
            return;
        }
        if let Some(before) = *timer {
            self.0.remove(&(before, id));
        }
        if let Some(at) = at {
            self.0.insert((at, id));
        }
        *timer = at;
    }

    /// Returns how many are set.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns the earliest one.
    pub(super) fn next(&self) -> Option<Instant> {
        self.0.first().map(|(at, _)| *at)
    }

    /// Takes out the earliest one, if it is due.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<Id> {
        match self.0.first() {
            Some((at, _)) if *at <= now => self.0.pop_first().map(|(_, id)| id),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::table::Table;
    use super::*;

    #[test]
    fn a_connection_has_one_entry_however_often_its_timer_is_set() {
        let (mut timers, mut table) = (Timers::default(), Table::new());
        let (one, other) = (table.insert('a'), table.insert('b'));
        let start = Instant::now();
        let after = |seconds| Some(start + Duration::from_secs(seconds));
        let (mut first, mut second) = (None, None);
        for seconds in (1..1000).rev() {
            timers.set(&mut first, one, after(seconds));
            timers.set(&mut second, other, after(2 * seconds));
            assert_eq!(timers.0.len(), 2);
        }
        assert_eq!(timers.next(), after(1));
        assert_eq!(timers.pop_due(start), None);
        assert_eq!(timers.pop_due(start + Duration::from_secs(1)), Some(one));
        first = None;
        timers.set(&mut first, one, after(1));
        timers.set(&mut first, one, None);
        timers.set(&mut second, other, None);
        assert!(timers.0.is_empty());
    }
}
