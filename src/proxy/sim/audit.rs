//! What the connections of a worker show between its turns: that times and limits are kept, and
//! that what is counted is so.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::engine::Phase;
use crate::engine::connection::{Connection, State};
use crate::engine::forward::Forward;
use crate::engine::relay::Side;
use crate::proxy::worker::Worker;

use super::driver::{SimDriver, SimStream, SimWorld, place_of};
use super::slots::Slots;

/// How much later than its time something may happen.
const SLACK: Duration = Duration::from_millis(30);

/// What all have beyond their times after the process stood still.
const AFTER_STILL: Duration = Duration::from_secs(3);

/// How long a leave may take while the proxy stops: two of five seconds, if it is cut off
/// meanwhile.
const LAST_LEAVES: Duration = Duration::from_secs(12);

/// A worker and a connection.
type Key = (usize, u64);

/// What is known of an open connection.
#[derive(Clone, Debug)]
struct Pulse {
    forward: Arc<Forward>,
    delivered: u64,
    /// When something was delivered last.
    moved: Duration,
    /// When one side was seen to have ended.
    half_closed: Option<Duration>,
    idle: Option<Duration>,
    half_closed_time: Option<Duration>,
}

impl Pulse {
    /// When it is to be cut off, if nothing moves.
    fn end(&self) -> Option<Duration> {
        let idle = self.idle.map(|time| self.moved + time);
        let half_closed = self.half_closed.zip(self.half_closed_time);
        let half_closed = half_closed.map(|(at, time)| self.moved.max(at) + time);
        idle.into_iter().chain(half_closed).min()
    }
}

/// While the proxy stops, guests who come are not served, nobody is left to wait, and what is being
/// left has its time.
fn check_at_end(conn: &Connection<SimStream>, phase: Phase, is_late: bool) {
    let is_guests = conn.name.is_some() && conn.forward.needs_graceful_close(Side::Client);
    match &conn.state {
        State::Closing { times, .. } => {
            assert!(
                times.forced_at().is_some(),
                "one that has gone may hold up the end"
            );
        }
        State::Relaying { .. } => assert!(!is_late || !is_guests, "a guest is served at the end"),
        _ => {
            assert!(!is_late || !is_guests, "a guest is served at the end");
            assert!(phase < Phase::Cutting, "one is left to wait at the end");
        }
    }
}

/// Whether a time by which a connection is to be closed was not put off. Only the end bounds a
/// probe.
fn is_no_later(until: Option<Duration>, before: Option<Option<Duration>>, phase: Phase) -> bool {
    match (until, before) {
        (_, None) => true,
        (None, Some(before)) => before.is_none(),
        (Some(_), Some(None)) => phase > Phase::Running,
        (Some(until), Some(Some(before))) => until <= before,
    }
}

#[derive(Debug, Default)]
pub(super) struct Audit {
    pulses: BTreeMap<Key, Pulse>,
    /// The times at which the closes of connections began.
    began_to_close: BTreeMap<Key, Duration>,
    /// When it is to be closed, if its peers have not ended by then.
    closing: BTreeMap<Key, Option<Duration>>,
    /// Forwards that have found what they reserve.
    settled: RefCell<BTreeSet<u64>>,
    /// How many probes each worker has.
    probes: BTreeMap<usize, usize>,
    /// Since when it is not known of a dial whether it was taken.
    proofs: BTreeMap<Key, Duration>,
    /// Connections of a forward that were cut off because nothing moved.
    timed_out: BTreeMap<u64, u64>,
    /// Forwards that were removed, and when their connections are to be cut off.
    removed: BTreeMap<u64, Duration>,
    /// Those of which a worker that stands still has not heard yet, and the time that is left then.
    removed_late: BTreeMap<u64, Duration>,
    /// Until when the process stood still.
    still: Duration,
    /// When the end was asked for.
    stop: Option<Duration>,
    pub(super) slots: Slots,
}

impl Audit {
    /// Notes that all or some of the process stands still until that time.
    pub(super) fn stands_still(&mut self, until: Duration) {
        self.still = self.still.max(until);
        self.slots.stands_still();
        for (forward, grace) in &self.removed_late {
            self.removed.insert(*forward, self.still + *grace);
        }
    }

    /// Until when it stands still, or stood.
    pub(super) fn still(&self) -> Duration {
        self.still
    }

    /// Whether the end was asked for, or something has stood still.
    pub(super) fn is_disturbed(&self) -> bool {
        self.stop.is_some() || !self.still.is_zero()
    }

    pub(super) fn stop_asked(&mut self, now: Duration) {
        self.stop.get_or_insert(now);
    }

    /// Whether the end was not asked for yet.
    pub(super) fn is_before_stop(&self, at: Duration) -> bool {
        self.stop.is_none_or(|stop| at < stop)
    }

    /// Whether the connections of a forward are to end, or all are.
    pub(super) fn is_ending(&self, forward: u64) -> bool {
        self.stop.is_some() || self.removed.contains_key(&forward)
    }

    /// Whether a forward was removed.
    pub(super) fn is_removed(&self, forward: u64) -> bool {
        self.removed.contains_key(&forward)
    }

    /// Whether the end was asked for.
    pub(super) fn is_stopping(&self) -> bool {
        self.stop.is_some()
    }

    /// Notes that a forward is being removed: nothing bounds it any more.
    pub(super) fn removed(&mut self, forward: u64, cut_at: Duration) {
        self.removed.insert(forward, cut_at);
    }

    /// Notes that a forward is removed as soon as all workers go on.
    pub(super) fn removed_late(&mut self, forward: u64, grace: Duration) {
        self.removed_late.insert(forward, grace);
        self.removed.insert(forward, self.still + grace);
    }

    /// Looks at a worker after its turn.
    pub(super) fn look_at(&mut self, worker: &mut Worker<SimDriver>, world: &SimWorld) {
        self.slots.look_at(worker, world);
        let now = world.now();
        let index = worker.index;
        let (mut timers, mut open, mut began) = (0, BTreeMap::new(), BTreeMap::new());
        let mut closing = BTreeMap::new();
        let has_slept = worker.has_slept();
        let (mut proving, mut probes, mut let_in) = (BTreeMap::new(), 0, 0);
        let phase = worker.phase;
        if phase > Phase::Running {
            world.stopped.borrow_mut().entry(index).or_insert(now);
        }
        let end_since = world.stopped.borrow().get(&index).copied();
        for id in worker.connections.table.ids() {
            let Some(conn) = worker.connections.table.get_mut(id) else {
                continue;
            };
            let key = (index, id.token(Side::Client) as u64);
            timers += usize::from(conn.wake_at.is_some());
            probes += usize::from(conn.name.is_none());
            let is_in = conn.slots[Side::Server].is_some();
            let_in += usize::from(conn.name.is_some() && is_in);
            if let Some(end) = end_since {
                check_at_end(conn, phase, world.time_of(conn.since) > end);
            }
            match &conn.state {
                State::Relaying { .. } => {
                    let pulse = self.pulse(key, conn, now);
                    open.insert(key, pulse);
                }
                State::Proving { .. } => {
                    proving.insert(key, *self.proofs.get(&key).unwrap_or(&now));
                }
                State::Closing { ends, times } => {
                    // Though the other side lingers.
                    let has_left =
                        ends[Side::Server].is_some() || conn.slots[Side::Server].is_none();
                    let has_left = has_left
                        && (ends[Side::Client].is_some() || conn.slots[Side::Client].is_none());
                    assert!(
                        has_left || times.settled().is_some(),
                        "a socket is closed, and keeps its slot in its VM"
                    );
                    began.insert(key, *self.began_to_close.get(&key).unwrap_or(&now));
                    if conn.is_remnant {
                        // It has had its time.
                        continue;
                    }
                    let until = times.forced_at().map(|at| world.time_of(at));
                    let before = self.closing.get(&key).copied();
                    assert!(
                        has_slept || is_no_later(until, before, phase),
                        "a connection may be closed at {until:?}, after {before:?}"
                    );
                    closing.insert(key, until);
                }
                _ => {}
            }
        }
        assert_eq!(
            worker.connections.timers.len(),
            timers,
            "worker {index}: timers"
        );
        let most_in = world.most_in.get().filter(|_| phase == Phase::Running);
        assert!(
            most_in.is_none_or(|most| let_in <= most),
            "{let_in} clients of a VM are let in, of {most_in:?}"
        );
        let mine = (index, 0)..=(index, u64::MAX);
        let before: Vec<_> = self
            .pulses
            .range(mine.clone())
            .map(|(key, it)| (*key, it.clone()))
            .collect();
        self.pulses.retain(|key, _| !mine.contains(key));
        self.check_cuts(&before, &open, now);
        self.pulses.extend(open);
        self.began_to_close.retain(|key, _| !mine.contains(key));
        self.began_to_close.extend(began);
        self.closing.retain(|key, _| !mine.contains(key));
        self.closing.extend(closing);
        self.probes.insert(index, probes);
        self.proofs.retain(|key, _| !mine.contains(key));
        self.proofs.extend(proving);
    }

    fn pulse(&self, key: Key, conn: &Connection<SimStream>, now: Duration) -> Pulse {
        let State::Relaying { pair, .. } = &conn.state else {
            unreachable!("only open connections have a pulse");
        };
        let timeouts = &conn.forward.rule.timeouts;
        let delivered = pair.delivered(Side::Client) + pair.delivered(Side::Server);
        let before = self.pulses.get(&key);
        let moved = before.filter(|it| it.delivered == delivered);
        let half_closed = before.and_then(|it| it.half_closed);
        Pulse {
            forward: Arc::clone(&conn.forward),
            delivered,
            moved: moved.map_or(now, |it| it.moved),
            half_closed: half_closed.or_else(|| pair.is_half_closed().then_some(now)),
            idle: timeouts.idle,
            half_closed_time: timeouts.half_closed,
        }
    }

    /// Only those on which nothing has moved for their time are cut off for that.
    fn check_cuts(&mut self, before: &[(Key, Pulse)], open: &BTreeMap<Key, Pulse>, now: Duration) {
        for (_, pulse) in before {
            let forward = pulse.forward.id.0;
            let tally = pulse.forward.tally.counters().timed_out;
            let count = tally.idle + tally.half_closed;
            let known = self.timed_out.insert(forward, count).unwrap_or(0);
            let idle = |(key, it): &&(Key, Pulse)| {
                it.forward.id.0 == forward
                    && !open.contains_key(key)
                    && it.end().is_some_and(|end| end <= now)
            };
            let idle = before.iter().filter(idle).count() as u64;
            assert!(
                count <= known + idle,
                "{} connections of forward {forward} are cut off as idle, and {idle} were",
                count - known
            );
        }
    }

    /// What is kept for a forward is there for it, once it has been: before, others may have it.
    fn check_reserved_slots(&self, worker: &Worker<SimDriver>, has_probes: bool, now: Instant) {
        let shared = &worker.shared;
        for forward in shared.forwards().iter() {
            let live = forward.tally.live.load(Ordering::Relaxed);
            if forward.home != worker.index || live >= forward.rule.reserved as u64 {
                continue;
            }
            let full = shared.is_full_for(forward.id);
            let gate = forward.gates[Side::Server].as_ref();
            let is_let_in = gate.is_none_or(|gate| gate.would_queue(forward.id));
            if !self.settled.borrow().contains(&forward.id.0) {
                if full.is_none() && is_let_in {
                    self.settled.borrow_mut().insert(forward.id.0);
                }
                continue;
            }
            // A probe takes what there is: it can't wait.
            assert!(
                full.is_none() || has_probes,
                "{forward:?} finds no place: {full:?}"
            );
            // A place that is lost is nobody's.
            let has_lost = gate.is_some_and(|gate| gate.status(now).lost > 0);
            assert!(
                is_let_in || has_lost,
                "{forward:?} finds no place in its VM"
            );
            let kept = gate.map_or(u64::MAX, |gate| gate.status(now).reserved as u64);
            let least = forward.rule.reserved as u64 - live;
            assert!(kept >= least, "{forward:?} is kept no place in its VM");
        }
    }

    /// Notes that what a forward reserves may have changed.
    pub(super) fn unsettles(&mut self, forward: u64) {
        self.settled.borrow_mut().remove(&forward);
    }

    /// Looks whether the listeners of a worker are as they are to be.
    pub(super) fn check_listeners(&self, worker: &Worker<SimDriver>, world: &SimWorld) {
        let in_vain = worker.listeners.all().iter().any(|it| it.sleeps_in_vain());
        assert!(!in_vain, "a listener sleeps, and its VM has a place");
        let forwards: Vec<_> = worker.shared.forwards().iter().cloned().collect();
        let sockets = forwards.iter().map(|it| it.rule.listen.listening_sockets());
        assert_eq!(
            worker.shared.listening_sockets(),
            sockets.sum::<usize>(),
            "the sockets that are listened on are counted wrongly"
        );
        let forgotten = worker.listeners.has_forgotten();
        assert!(
            !forgotten,
            "a listener wants a turn, and is not queued for one"
        );
        if world.keeps_slots.get() {
            let probes: usize = self.probes.values().sum();
            self.check_reserved_slots(worker, probes > 0, world.instant());
        }
        if worker.phase == Phase::Running || world.has_lost_files.get() {
            return;
        }
        let forwards = worker.shared.forwards();
        for forward in forwards.iter().filter(|it| it.home == worker.index) {
            let is_guests = forward.needs_graceful_close(Side::Client);
            let place = place_of(&forward.rule.listen);
            let listens = world.kernel().listener_at(&place).is_some();
            assert_eq!(
                listens, is_guests,
                "while the proxy stops, guests find their ports, and others none: {place:?}"
            );
        }
    }

    /// Looks, before the clock goes on, whether a time has passed without what was to happen then.
    pub(super) fn check_times(&self, worker: &mut Worker<SimDriver>, world: &SimWorld) {
        let now = world.now();
        if now < self.still + AFTER_STILL {
            return;
        }
        self.slots.check_times(now);
        let late = |at: Duration| now > at.saturating_add(SLACK);
        let (index, phase) = (worker.index, worker.phase);
        for id in worker.connections.table.ids() {
            let Some(conn) = worker.connections.table.get_mut(id) else {
                continue;
            };
            let key = (index, id.token(Side::Client) as u64);
            let forward = &conn.forward;
            let timeouts = &forward.rule.timeouts;
            let cut = self.removed.get(&forward.id.0).copied();
            let is_left = matches!(conn.state, State::Closing { .. });
            assert!(
                is_left || !cut.is_some_and(late),
                "a connection outlives its forward, which was removed"
            );
            match &conn.state {
                State::Waiting { .. } | State::Connecting { .. } | State::Proving { .. } => {
                    let patience = forward.rule.hold_time().unwrap_or(timeouts.dial);
                    let end = world.time_of(conn.since).saturating_add(patience);
                    assert!(
                        !late(end),
                        "a client was to be served or refused at {end:?}"
                    );
                    // While the proxy stops, a proof is not waited for as long; and with its rule
                    // goes the place that is kept for it.
                    let is_kept = self.stop.is_none() && cut.is_none();
                    let proves_within = world.proves_within.get().filter(|_| is_kept);
                    let proves_by = self.proofs.get(&key).zip(proves_within);
                    let proves_by = proves_by.and_then(|(since, within)| {
                        let gate = forward.gates[Side::Server].as_ref()?;
                        // The place of the proof may be lost.
                        if gate.status(world.instant()).lost > 0 {
                            return None;
                        }
                        let ready = world.ready_since(gate.vm().path()?);
                        Some(ready.max(*since).max(self.still).saturating_add(within))
                    });
                    assert!(
                        !proves_by.is_some_and(late),
                        "it was to be known at {proves_by:?} whether a guest has taken a dial"
                    );
                    let redial = conn.retries.as_ref().and_then(|retries| retries.redial);
                    let redial = redial.map(|at| world.time_of(at));
                    assert!(
                        !redial.is_some_and(late),
                        "a target was to be dialled again at {redial:?}"
                    );
                }
                State::Relaying {
                    pair,
                    refusal_wait: hold,
                    drain_deadline: end,
                } => {
                    let hold = hold.filter(|_| pair.is_withholding_half_close(Side::Client));
                    let is_ending = pair.is_ending()
                        || Side::BOTH
                            .iter()
                            .any(|side| pair.is_withholding_half_close(*side));
                    let end = end.filter(|_| is_ending);
                    for at in [hold, end].into_iter().flatten() {
                        let at = world.time_of(at);
                        assert!(
                            !late(at),
                            "a half-close was to be passed on, or all ended, at {at:?}"
                        );
                    }
                    let end = self.pulses.get(&key).and_then(Pulse::end);
                    assert!(
                        !end.is_some_and(late),
                        "nothing has moved on a connection, which was to be cut off at {end:?}"
                    );
                }
                State::Closing { ends, times } => {
                    // A slot stays a while after its socket was closed.
                    let until = match ends {
                        [None, None] => times.settled(),
                        _ => times.forced_at(),
                    };
                    let until = until.map(|at| world.time_of(at));
                    assert!(
                        !until.is_some_and(late),
                        "a connection was to be closed at {until:?}"
                    );
                    let since = self.began_to_close.get(&key).copied().unwrap_or(now);
                    let stop = self.stop.filter(|_| phase > Phase::Running);
                    let last = stop.map(|at| at.max(since) + LAST_LEAVES);
                    assert!(
                        !last.is_some_and(late),
                        "one that has gone holds up the end since {since:?}"
                    );
                }
                State::OnThreads | State::Closed => {}
            }
        }
    }
}
