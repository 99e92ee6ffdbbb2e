//! How long nothing has moved on a connection, and what its rule says of that.
//!
//! No byte sets a timer. One that is due looks when something moved last, and is set to what is left from then.

use std::time::{Duration, Instant};

use tracing::debug;

use crate::engine::counters::add_one;
use crate::engine::rule::Timeouts;
use crate::time::after;

use super::{Action, Connection, Context, Socket, State};

/// The bytes of threads are counted by them; so often within a timeout it is looked whether some were.
const LOOKS: u32 = 4;

/// Since when nothing has moved on a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Idle {
    /// When a byte was delivered last, or the connection opened.
    moved: Instant,
    /// When one side ended.
    half_closed: Option<Instant>,
    /// What threads had delivered then.
    delivered: u64,
    /// It has timed out.
    over: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Timeout {
    Idle,
    HalfClosed,
}

impl Idle {
    pub(super) fn new(now: Instant) -> Idle {
        Idle {
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

    pub(super) fn has_timed_out(&self) -> bool {
        self.over
    }

    /// When it times out, if nothing moves until then, and which timeout that is.
    fn end(&self, timeouts: &Timeouts) -> Option<(Instant, Timeout)> {
        let idle = timeouts
            .idle
            .map(|time| (after(self.moved, time), Timeout::Idle));
        let half_closed = self.half_closed.zip(timeouts.half_closed);
        let half_closed =
            half_closed.map(|(at, time)| (after(self.moved.max(at), time), Timeout::HalfClosed));
        [idle, half_closed]
            .into_iter()
            .flatten()
            .min_by_key(|(at, _)| *at)
    }
}

impl<S: Socket> Connection<S> {
    /// Cuts an open connection off if nothing has moved on it for too long; returns whether it was.
    pub(super) fn cut_if_idle(&mut self, cx: &mut Context<'_, S>) -> bool {
        let Some((at, timeout)) = self.idle.end(&self.forward.rule.timeouts) else {
            return false;
        };
        if cx.now < at {
            self.wake_by(at);
            return false;
        }
        let tally = &self.forward.tally;
        add_one(match timeout {
            Timeout::Idle => &tally.idle,
            Timeout::HalfClosed => &tally.half_closed,
        });
        self.idle.over = true;
        self.span.in_scope(|| debug!(?timeout, "timed out"));
        self.cut(cx);
        true
    }

    /// Takes how far the threads are: the bytes of each side that they have delivered, and whether one has ended.
    pub(crate) fn take_progress(
        &mut self,
        delivered: [u64; 2],
        half_closed: bool,
        cx: &mut Context<'_, S>,
    ) {
        if !matches!(self.state, State::OnThreads) {
            return;
        }
        let delivered = delivered.iter().sum();
        let moved = std::mem::replace(&mut self.idle.delivered, delivered) != delivered;
        self.idle.note(moved, half_closed, cx.now);
        let Some(time) = look_interval(&self.forward.rule.timeouts) else {
            return;
        };
        // Invariant 9: the threads stood still as well. They read what has come before a timeout is believed.
        let thawed = cx.thawed.is_some_and(|at| cx.now < after(at, time));
        if thawed || !self.cut_if_idle(cx) {
            self.wake_by(after(cx.now, time));
        }
    }

    pub(super) fn go_on_with_threads(&mut self, cx: &mut Context<'_, S>) {
        use crate::engine::Phase;
        if cx.phase == Phase::Cutting || self.forward.is_cut() || self.idle.has_timed_out() {
            self.cut_threads(cx);
        } else {
            cx.request(Action::LookAtThreads);
        }
    }
}

/// How often threads are to be looked at.
fn look_interval(timeouts: &Timeouts) -> Option<Duration> {
    let times = [timeouts.idle, timeouts.half_closed];
    times.into_iter().flatten().min().map(|time| time / LOOKS)
}
