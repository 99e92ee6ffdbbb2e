//! Connections on which nothing moves: ended after the times that their rule sets.
//!
//! No byte sets a timer. One that is due looks when something moved last, and is set to what is left from then.

use std::time::{Duration, Instant};

use tracing::debug;

use crate::relay::CLIENT;

use super::conn::State;
use super::counters::add_one;
use super::forward::Timeouts;
use super::table::Id;
use super::worker::{Worker, after};
use super::world::World;

/// A bridge's bytes are counted by its threads; so often within its time it is looked whether some were.
const LOOKS: u32 = 4;

/// Since when nothing has moved on a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quiet {
    /// When a byte was delivered last, or the connection opened.
    moved: Instant,
    /// When one side ended.
    half_closed: Option<Instant>,
    /// What a bridge had delivered then.
    delivered: u64,
    /// Its time is over.
    over: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Idle,
    HalfClosed,
}

impl Quiet {
    pub(super) fn new(now: Instant) -> Quiet {
        Quiet {
            moved: now,
            half_closed: None,
            delivered: 0,
            over: false,
        }
    }

    pub(super) fn note(&mut self, moved: bool, half_closed: bool, now: Instant) {
        if moved {
            self.moved = now;
        }
        if half_closed {
            self.half_closed.get_or_insert(now);
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    /// When its time is over, if nothing moves until then, and why.
    fn end(&self, timeouts: &Timeouts) -> Option<(Instant, Kind)> {
        let idle = timeouts
            .idle
            .map(|time| (after(self.moved, time), Kind::Idle));
        let half_closed = self.half_closed.zip(timeouts.half_closed);
        let half_closed =
            half_closed.map(|(at, time)| (after(self.moved.max(at), time), Kind::HalfClosed));
        [idle, half_closed]
            .into_iter()
            .flatten()
            .min_by_key(|(at, _)| *at)
    }
}

impl<W: World> Worker<W> {
    /// Has [`step`](Worker::step) called at `at`, or earlier.
    pub(super) fn arm(&mut self, id: Id, at: Instant) {
        let armed = self.conns.get_mut(id).and_then(|conn| conn.timer);
        if armed.is_none_or(|armed| armed > at) {
            self.set_timer(id, at);
        }
    }

    /// Cuts an open connection off if nothing has moved on it for too long; whether it was.
    pub(super) fn cut_if_quiet(&mut self, id: Id, now: Instant) -> bool {
        let Some(conn) = self.conns.get_mut(id) else {
            return false;
        };
        let Some((at, kind)) = conn.quiet.end(&conn.forward.rule.timeouts) else {
            return false;
        };
        if now < at {
            self.arm(id, at);
            return false;
        }
        let tally = &conn.forward.tally;
        add_one(match kind {
            Kind::Idle => &tally.idle,
            Kind::HalfClosed => &tally.half_closed,
        });
        conn.quiet.over = true;
        conn.span.in_scope(|| debug!(?kind, "timed out"));
        self.cut(id, now);
        true
    }

    /// Looks whether something moved on a bridge.
    pub(super) fn look_at_bridge(&mut self, id: Id, now: Instant) {
        let Some(progress) = self.world.bridged(id.token(CLIENT)) else {
            return;
        };
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        if !matches!(conn.state, State::Bridged) {
            return;
        }
        let delivered = progress.delivered.iter().sum();
        let moved = std::mem::replace(&mut conn.quiet.delivered, delivered) != delivered;
        conn.quiet.note(moved, progress.half_closed, now);
        let Some(time) = often(&conn.forward.rule.timeouts) else {
            return;
        };
        // Invariant 9: its threads stood still as well. They read what has come before its time is believed.
        let thawed = self.thawed.is_some_and(|at| now < after(at, time));
        if thawed || !self.cut_if_quiet(id, now) {
            self.arm(id, after(now, time));
        }
    }
}

/// How often a bridge is to be looked at.
fn often(timeouts: &Timeouts) -> Option<Duration> {
    let times = [timeouts.idle, timeouts.half_closed];
    times.into_iter().flatten().min().map(|time| time / LOOKS)
}
