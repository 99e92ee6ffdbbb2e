//! What is told and counted of connections, against what has happened: why clients are refused, who
//! is bounded by what, and whom the proxy has given up to wait for.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::engine::counters::Refusals;
use crate::engine::end_reason::{EndReason, RefusalReason};
use crate::engine::forward::Forward;
use crate::engine::relay::Side;
use crate::error::{Error, Operation};

use super::kernel::{Fate, Kernel, Place};

/// A connect whose answer is on its way takes no longer.
const ANSWERS: Duration = Duration::from_millis(300);

/// What rules lead to, by the text of its address.
#[derive(Clone, Debug)]
pub(super) struct Spot {
    pub(super) text: String,
    pub(super) places: Vec<Place>,
    pub(super) host: Option<String>,
}

/// What is possible in a run.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Bounds {
    /// The fewest connections that a VM may have.
    pub(super) vm_connections: usize,
    pub(super) vm_unanswered: usize,
    pub(super) has_chains: bool,
}

/// What has happened that may end connections from outside.
#[derive(Clone, Copy, Debug)]
pub(super) struct Happened {
    pub(super) vm_gone: bool,
    /// The connection's forward was removed.
    pub(super) removed: bool,
    /// The proxy was told to stop.
    pub(super) stop: bool,
    /// The operator has closed the connection.
    pub(super) closed: bool,
}

/// A connection that was told of.
#[derive(Clone, Debug)]
struct Entry {
    accepted: Duration,
    is_connected: bool,
    refused: Option<RefusalReason>,
    was_refused: bool,
    /// The rule that it came under; not known before its first turn is over.
    rule: Option<Arc<Forward>>,
}

/// How many connections a forward may have.
#[derive(Clone, Copy, Debug)]
struct Bound {
    most: usize,
    /// It holds for those who come after that; for all, if it did from the start.
    since: Option<Duration>,
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    pub(super) spots: Vec<Spot>,
    pub(super) limits: Bounds,
    forwards: BTreeMap<u64, Arc<Forward>>,
    /// What was counted before.
    refusals: BTreeMap<u64, Refusals>,
    entries: BTreeMap<u64, Entry>,
    live: BTreeMap<u64, usize>,
    bounds: BTreeMap<u64, Bound>,
    /// An addition has failed: nobody knows the forward whose clients are refused.
    pub(super) has_failed_additions: bool,
}

impl Ledger {
    pub(super) fn knows(&mut self, forward: &Arc<Forward>) {
        let known = self.forwards.entry(forward.id.0);
        known.or_insert_with(|| Arc::clone(forward));
    }

    /// Notes under which rule a connection has come.
    pub(super) fn comes_under(&mut self, connection: u64, forward: &Arc<Forward>) {
        self.knows(forward);
        if let Some(entry) = self.entries.get_mut(&connection) {
            entry.rule = Some(Arc::clone(forward));
        }
    }

    /// Notes how many connections a forward may have from now on, or from the start. Guests are
    /// accepted whatever the bound is.
    pub(super) fn bound(&mut self, forward: &Arc<Forward>, since: Option<Duration>) {
        self.knows(forward);
        self.unbound(forward.id.0);
        let most = forward
            .rule
            .connections
            .filter(|_| !forward.needs_graceful_close(Side::Client));
        if let Some(most) = most {
            self.bounds.insert(forward.id.0, Bound { most, since });
        }
    }

    /// Notes that some of the process stands still until then: who was accepted before a bound
    /// changed may be told of as late.
    pub(super) fn stands_still(&mut self, until: Duration) {
        for bound in self.bounds.values_mut() {
            bound.since = bound.since.map(|at| at.max(until));
        }
    }

    /// Notes that it is not certain how many connections a forward may have.
    pub(super) fn unbound(&mut self, forward: u64) {
        self.bounds.remove(&forward);
    }

    pub(super) fn accepted(&mut self, connection: u64, forward: u64, now: Duration) {
        let entry = Entry {
            accepted: now,
            is_connected: false,
            refused: None,
            was_refused: false,
            rule: None,
        };
        self.entries.insert(connection, entry);
        let live = self.live.entry(forward).or_default();
        *live += 1;
        // What comes from another forward is accepted all the same.
        if let Some(bound) = self.bounds.get(&forward)
            && bound.since.is_none_or(|at| now > at)
            && !self.limits.has_chains
        {
            assert!(
                *live <= bound.most,
                "{live} connections of forward {forward}, of {} since {:?}",
                bound.most,
                bound.since
            );
        }
    }

    pub(super) fn connected(&mut self, connection: u64) {
        if let Some(entry) = self.entries.get_mut(&connection) {
            entry.is_connected = true;
        }
    }

    /// Whether a connection was refused because its target has not answered.
    pub(super) fn has_timed_out(&self, connection: u64) -> bool {
        let entry = self.entries.get(&connection);
        entry.is_some_and(|it| it.refused == Some(RefusalReason::DialTimeout))
    }

    pub(super) fn closed(&mut self, forward: u64) {
        *self.live.entry(forward).or_default() -= 1;
    }

    /// A connection has ended: why it is said to have has happened. `happened`: what has, of what
    /// may end connections from outside.
    pub(super) fn check_end(&self, connection: u64, why: EndReason, happened: Happened) {
        let Some(entry) = self.entries.get(&connection) else {
            panic!("connection {connection} has ended, and was not accepted");
        };
        let timeouts = entry.rule.as_ref().map(|it| it.rule.timeouts);
        let is_so = match why {
            EndReason::ClientClosed
            | EndReason::ServerClosed
            | EndReason::ClientReset
            | EndReason::ServerReset
            | EndReason::DrainTimeout => entry.is_connected && !entry.was_refused,
            EndReason::ClientGaveUp => !entry.is_connected && !entry.was_refused,
            EndReason::IdleTimeout => {
                entry.is_connected && timeouts.is_none_or(|it| it.idle.is_some())
            }
            EndReason::HalfClosedTimeout => {
                entry.is_connected && timeouts.is_none_or(|it| it.half_closed.is_some())
            }
            EndReason::VmGone => entry.is_connected && happened.vm_gone,
            EndReason::Refused(reason) => {
                entry.was_refused && entry.refused.is_none_or(|it| it == reason)
            }
            // One that could not be added is given up, and its clients with it.
            EndReason::Removed => happened.removed || self.has_failed_additions,
            EndReason::Stopped => happened.stop,
            EndReason::ClosedOnRequest => happened.closed,
            // Nothing is relayed by threads here, and no program is started.
            EndReason::Failed | EndReason::ProgramFailed(_) => false,
        };
        assert!(
            is_so,
            "connection {connection} is said to have ended by {why:?}: {entry:?}"
        );
        let by_force = matches!(
            why,
            EndReason::Refused(_)
                | EndReason::Removed
                | EndReason::Stopped
                | EndReason::ClosedOnRequest
                | EndReason::IdleTimeout
                | EndReason::HalfClosedTimeout
        );
        assert!(
            by_force || !entry.was_refused,
            "connection {connection} was refused, and is said to have ended by {why:?}"
        );
    }

    /// The reason that was counted just now, if the forward is known.
    fn counted(&mut self, forward: u64) -> Option<RefusalReason> {
        let now = self.forwards.get(&forward)?.tally.counters().refusals;
        let before = self.refusals.insert(forward, now).unwrap_or_default();
        let reasons = [
            (RefusalReason::ByTarget, now.by_target - before.by_target),
            (RefusalReason::Absent, now.absent - before.absent),
            (
                RefusalReason::DialTimeout,
                now.dial_timeout - before.dial_timeout,
            ),
            (RefusalReason::Full, now.full - before.full),
            (
                RefusalReason::NotAllowed,
                now.not_allowed - before.not_allowed,
            ),
            (RefusalReason::NoHeader, now.no_header - before.no_header),
            (RefusalReason::Other, now.other - before.other),
        ];
        let mut counted = reasons.into_iter().filter(|(_, more)| *more > 0);
        match (counted.next(), counted.next()) {
            (Some((reason, 1)), None) => Some(reason),
            // One that was refused before its forward was known.
            _ => None,
        }
    }

    /// What was refused of a forward, or cut off since its VM was gone, as it was told.
    pub(super) fn refused_of(&self, forward: u64) -> u64 {
        let counters = self.forwards.get(&forward).map(|it| it.tally.counters());
        counters.map_or(0, |it| {
            it.refused + it.ended.vm_gone + it.timed_out.idle + it.timed_out.half_closed
        })
    }

    /// How many connections were closed though a guest had not ended them, as all forwards count.
    pub(super) fn abandoned(&self) -> u64 {
        let counters = self.forwards.values().map(|it| it.tally.counters());
        counters.map(|it| it.abandoned).sum()
    }

    /// A client was refused: what is told and counted as the reason has happened since it came.
    /// `is_ending`: all are to go, or those of this forward, or it was closed. `is_slow`: something
    /// stands still.
    pub(super) fn check_refusal(
        &mut self,
        (forward, connection): (u64, u64),
        error: &Error,
        (is_ending, is_slow): (bool, bool),
        kernel: &Kernel,
    ) {
        let now = kernel.now;
        let reason = self.counted(forward);
        let Some(entry) = self.entries.get(&connection).cloned() else {
            panic!("connection {connection} is refused, and was not accepted");
        };
        if let Some(entry) = self.entries.get_mut(&connection) {
            entry.was_refused = true;
        }
        let (text, since) = (error.to_string(), entry.accepted);
        let told = reason_of(&text);
        assert!(
            reason.is_none() || told.is_none() || reason == told,
            "{reason:?} is counted, and told: {text}"
        );
        let Some(reason) = reason.or(told) else {
            return;
        };
        if let Some(entry) = self.entries.get_mut(&connection) {
            entry.refused = Some(reason);
        }
        let spots = self.spots.iter();
        let spots: Vec<&Spot> = spots.filter(|spot| spot.text == error.subject()).collect();
        let happened = |fate: Fate| {
            let there = |place: &Place| spots.iter().any(|spot| spot.places.contains(place));
            let mut fates = kernel
                .fates
                .iter()
                .rev()
                .take_while(|(at, ..)| *at >= since);
            fates.any(|(_, place, it)| *it == fate && (fate == Fate::Lack || there(place)))
        };
        let is_missing = || {
            let its = |host: &String| spots.iter().any(|it| it.host.as_ref() == Some(host));
            kernel
                .missing
                .iter()
                .any(|(at, host)| *at >= since && its(host))
        };
        let patience = entry.rule.as_ref().map(|rule| {
            let patience = rule.rule.hold_time().unwrap_or(rule.rule.timeouts.dial);
            since.saturating_add(patience)
        });
        let is_late = patience.is_some_and(|end| now >= end);
        let is_so = match reason {
            RefusalReason::ByTarget => happened(Fate::Refused) || happened(Fate::Ended),
            RefusalReason::Absent => happened(Fate::Absent) || happened(Fate::Died) || is_missing(),
            RefusalReason::DialTimeout => {
                let is_silent = is_late || happened(Fate::Silent);
                let fits = !text.contains("has not answered") || self.limits.vm_unanswered < 64;
                is_silent && fits && (is_slow || !was_answered(&entry, &spots, &text, kernel))
            }
            // A guest's dial can't wait.
            RefusalReason::Full if error.operation() == Operation::Accept => {
                self.limits.vm_connections < 100 || text.contains("of this forward")
            }
            // No rule of the simulated world bounds where its clients come from.
            RefusalReason::NotAllowed => false,
            // No rule of the simulated world takes headers.
            RefusalReason::NoHeader => false,
            RefusalReason::Full => is_late && self.limits.vm_connections < 100,
            RefusalReason::Other => {
                let is_circle = text.contains("leads back") && self.limits.has_chains;
                is_ending || is_circle || self.has_failed_additions || happened(Fate::Lack)
            }
        };
        assert!(
            is_so,
            "connection {connection}, come at {since:?}, is refused as {reason:?}: {text}"
        );
        // Of one that was held it was known by then that it was taken.
        let is_held = entry
            .rule
            .as_ref()
            .is_some_and(|it| it.rule.hold_time().is_some());
        assert!(
            !entry.is_connected || reason == RefusalReason::ByTarget && !is_held,
            "connection {connection} is refused as {reason:?} after it was connected: {text}"
        );
    }
}

/// Whether one that was held is said to have had no answer, though each dial had one.
fn was_answered(entry: &Entry, spots: &[&Spot], text: &str, kernel: &Kernel) -> bool {
    let is_held = entry.rule.as_ref().is_some_and(|rule| {
        // Behind a gate that has a limit, or by its name, it may not have been dialled at all.
        let gate = rule.gates[Side::Server].as_ref();
        let is_free = gate.is_none_or(|gate| !gate.has_limit());
        rule.rule.hold_time().is_some() && is_free
    });
    if !is_held || !text.contains("no connection within") {
        return false;
    }
    let here = |(at, place, fate): &(Duration, Place, Fate)| {
        let is_here = spots
            .iter()
            .any(|spot| spot.host.is_none() && spot.places.contains(place));
        (*at >= entry.accepted && is_here).then_some((*at, *fate))
    };
    let fates: Vec<_> = kernel.fates.iter().filter_map(here).collect();
    let told = |fate: &Fate| matches!(fate, Fate::Absent | Fate::Refused);
    let first = fates
        .first()
        .is_some_and(|(at, _)| *at <= entry.accepted + ANSWERS);
    first && fates.iter().all(|(_, fate)| told(fate))
}

/// The reason that a text tells of, where it tells of one for certain.
fn reason_of(text: &str) -> Option<RefusalReason> {
    let has = |words: &str| text.contains(words);
    if has("proxy is stopping") || has("leads back") {
        Some(RefusalReason::Other)
    } else if has("in use") {
        Some(RefusalReason::Full)
    } else if has("has not answered") || has("doesn't answer") || has("no connection within") {
        Some(RefusalReason::DialTimeout)
    } else {
        None
    }
}
