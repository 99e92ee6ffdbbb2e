//! When the listeners of a worker have their turns: to accept clients, and to be checked. It knows
//! them by their tokens alone, and times come in.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::engine::admission::GateId;
use crate::engine::timers::Timers;

/// How often the files of Unix sockets, and VMs, are checked, as long as they are no more than
/// [`CHECKS_PER_INTERVAL`].
pub(super) const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// How many listeners a worker checks in that time. If it has more, each is checked the more
/// rarely, so that the work of an idle proxy is bounded.
const CHECKS_PER_INTERVAL: usize = 1000;

/// The turns of the listeners of one worker.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    /// The turns of each listener, by its token.
    turns: Vec<Turns>,
    /// The listeners at which a client may wait, in the order of their turns (invariant 5).
    queue: VecDeque<usize>,
    /// The listeners that wait for a slot, by the gate that tells when there may be one.
    waiting: HashMap<GateId, BTreeSet<usize>>,
    pauses: Timers<usize>,
    checks: Timers<usize>,
}

/// The turns of one listener.
#[derive(Clone, Copy, Debug, Default)]
struct Turns {
    is_queued: bool,
    /// The time before which the listener does not accept. It has a timer then.
    paused_until: Option<Instant>,
    /// The time of the next check. It has a timer then.
    check_at: Option<Instant>,
}

impl Schedule {
    fn turns(&mut self, token: usize) -> &mut Turns {
        if token >= self.turns.len() {
            self.turns.resize(token + 1, Turns::default());
        }
        &mut self.turns[token]
    }

    /// Puts a listener at the end of the queue of those that are to accept, once.
    pub(super) fn queue_listener(&mut self, token: usize) {
        if !std::mem::replace(&mut self.turns(token).is_queued, true) {
            self.queue.push_back(token);
        }
    }

    /// Returns whether a listener is queued to accept.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn is_queued(&self, token: usize) -> bool {
        self.turns.get(token).is_some_and(|it| it.is_queued)
    }

    /// Returns how many listeners are queued to accept.
    pub(super) fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Takes the listener that is to accept next out of the queue.
    pub(super) fn pop_queued(&mut self) -> Option<usize> {
        let token = self.queue.pop_front()?;
        self.turns(token).is_queued = false;
        Some(token)
    }

    /// Keeps a listener from accepting until a time.
    pub(super) fn pause_listener(&mut self, token: usize, until: Instant) {
        let before = self.turns(token).paused_until.replace(until);
        self.pauses.change(token, before, Some(until));
    }

    /// Lets a listener accept again.
    pub(super) fn end_pause(&mut self, token: usize) {
        let before = self.turns(token).paused_until.take();
        self.pauses.remove(token, before);
    }

    /// Returns whether a listener is kept from accepting for some time.
    pub(super) fn is_paused(&self, token: usize) -> bool {
        let turns = self.turns.get(token);
        turns.is_some_and(|it| it.paused_until.is_some())
    }

    /// Queues the listeners whose pause is over.
    pub(super) fn queue_rested(&mut self, now: Instant) {
        while let Some(token) = self.pauses.pop_due(now) {
            self.turns(token).paused_until = None;
            self.queue_listener(token);
        }
    }

    /// Has a listener queued when the gate tells that there may be a slot.
    pub(super) fn queue_when_freed(&mut self, token: usize, gate: GateId) {
        self.waiting.entry(gate).or_default().insert(token);
    }

    /// Queues the listeners that wait for a slot at a gate.
    pub(super) fn queue_waiting(&mut self, gate: GateId) {
        for token in self.waiting.remove(&gate).unwrap_or_default() {
            self.queue_listener(token);
        }
    }

    /// Begins the checks of a listener, the first one at `at`, or goes on with them.
    pub(super) fn begin_checks(&mut self, token: usize, at: Instant) {
        let turns = self.turns(token);
        if turns.check_at.is_none() {
            turns.check_at = Some(at);
            self.checks.change(token, None, Some(at));
        }
    }

    /// Ends the checks of a listener.
    pub(super) fn end_checks(&mut self, token: usize) {
        let before = self.turns(token).check_at.take();
        self.checks.remove(token, before);
    }

    /// Takes a listener whose check is due, and sets the time of its next one.
    pub(super) fn pop_due_check(&mut self, now: Instant) -> Option<usize> {
        let again = now + self.check_interval();
        let token = self.checks.pop_due(now)?;
        self.turns(token).check_at = Some(again);
        self.checks.change(token, None, Some(again));
        Some(token)
    }

    /// Returns the time between two checks of one listener.
    fn check_interval(&self) -> Duration {
        let rounds = self.checks.len().div_ceil(CHECKS_PER_INTERVAL).max(1);
        CHECK_INTERVAL * u32::try_from(rounds).unwrap_or(u32::MAX)
    }

    /// Returns the time of the next turn.
    pub(super) fn next(&self, now: Instant) -> Option<Instant> {
        let queued = (!self.queue.is_empty()).then_some(now);
        let times = [queued, self.pauses.next(), self.checks.next()];
        times.into_iter().flatten().min()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_queued_once() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        schedule.queue_listener(1);
        schedule.queue_listener(0);
        schedule.queue_listener(1);
        assert_eq!(schedule.queued(), 2);
        assert_eq!(schedule.next(now), Some(now));
        assert_eq!(schedule.pop_queued(), Some(1));
        schedule.queue_listener(1);
        assert_eq!(schedule.pop_queued(), Some(0));
        assert_eq!(schedule.pop_queued(), Some(1));
        assert_eq!(schedule.pop_queued(), None);
        assert_eq!(schedule.next(now), None);
    }

    #[test]
    fn a_listener_is_queued_when_its_last_pause_is_over() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        let later = now + Duration::from_millis(10);
        schedule.pause_listener(0, now);
        schedule.pause_listener(0, later);
        schedule.queue_rested(now);
        assert!(schedule.is_paused(0));
        assert_eq!(schedule.next(now), Some(later));
        schedule.queue_rested(later);
        assert!(!schedule.is_paused(0));
        assert_eq!(schedule.pop_queued(), Some(0));
        schedule.pause_listener(0, later);
        schedule.end_pause(0);
        assert_eq!(schedule.next(now), None);
    }

    #[test]
    fn many_listeners_are_checked_the_more_rarely() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        let count = 2 * CHECKS_PER_INTERVAL;
        for token in 0..count {
            schedule.begin_checks(token, now);
            schedule.begin_checks(token, now + CHECK_INTERVAL);
        }
        let checked: BTreeSet<_> = (0..count)
            .filter_map(|_| schedule.pop_due_check(now))
            .collect();
        assert_eq!(checked.len(), count);
        assert_eq!(schedule.pop_due_check(now), None);
        assert_eq!(schedule.next(now), Some(now + 2 * CHECK_INTERVAL));
        (0..count).for_each(|token| schedule.end_checks(token));
        assert_eq!(schedule.next(now), None);
    }
}
