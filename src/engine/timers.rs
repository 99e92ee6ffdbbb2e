//! The deadlines of connections and listeners that want a turn without an event. Times come in; no
//! clock is read here.

use std::collections::BTreeSet;
use std::time::Instant;

/// The timers of what one worker has, such as its connections, by their identifiers.
///
/// Invariant 7: each has at most one entry. Setting a timer replaces the old one, and the entry of
/// a connection is removed with it, so what is kept does not grow with the connections that have
/// ended.
#[derive(Debug)]
pub(crate) struct Timers<K>(BTreeSet<(Instant, K)>);

impl<K> Default for Timers<K> {
    fn default() -> Timers<K> {
        Timers(BTreeSet::new())
    }
}

impl<K: Copy + Ord> Timers<K> {
    /// Changes the timer of `id` from `before` to `at`; `None` is no timer.
    pub(crate) fn change(&mut self, id: K, before: Option<Instant>, at: Option<Instant>) {
        if before == at {
            return;
        }
        if let Some(before) = before {
            self.0.remove(&(before, id));
        }
        if let Some(at) = at {
            self.0.insert((at, id));
        }
    }

    /// Removes the timer of `id`, if it has one: that of `before`.
    pub(crate) fn remove(&mut self, id: K, before: Option<Instant>) {
        self.change(id, before, None);
    }

    /// Returns the number of timers.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns the earliest time.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.0.first().map(|(at, _)| *at)
    }

    /// Removes the earliest timer, if it is due, and returns whose it is.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<K> {
        match self.0.first() {
            Some((at, _)) if *at <= now => self.0.pop_first().map(|(_, id)| id),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::engine::table::Table;

    #[test]
    fn a_connection_has_one_entry_however_often_its_timer_is_set() {
        let (mut timers, mut table) = (Timers::default(), Table::new());
        let (one, other) = (table.insert('a'), table.insert('b'));
        let start = Instant::now();
        let after = |seconds| Some(start + Duration::from_secs(seconds));
        let (mut first, mut second) = (None, None);
        for seconds in (1..1000).rev() {
            let (one_at, other_at) = (after(seconds), after(2 * seconds));
            timers.change(one, std::mem::replace(&mut first, one_at), one_at);
            timers.change(other, std::mem::replace(&mut second, other_at), other_at);
            assert_eq!(timers.0.len(), 2);
        }
        assert_eq!(timers.next(), after(1));
        assert_eq!(timers.pop_due(start), None);
        assert_eq!(timers.pop_due(start + Duration::from_secs(1)), Some(one));
        timers.change(one, None, after(1));
        timers.remove(one, after(1));
        timers.remove(other, second);
        assert!(timers.0.is_empty());
    }
}
