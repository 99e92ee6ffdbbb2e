//! The idle timeouts of a connection: how long no byte has moved, and what its rule says about it.
//!
//! Moving a byte sets no timer. A timer that is due compares the time of the last byte with the
//! timeout, and is set to what is left.

use std::time::{Duration, Instant};

use tracing::debug;

use crate::engine::counters::add_one;
use crate::engine::end_reason::EndReason;
use crate::engine::relay::Side;
use crate::engine::rule::Timeouts;
use crate::time::after;

use super::{Action, Connection, Context, Socket, State};

/// How often within a timeout the byte counts of relay threads are read. The threads count bytes,
/// but report no times.
const CHECKS: u32 = 4;

/// The time since which no byte has moved on a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Idle {
    /// The time of the last byte delivered, or of the connection's opening.
    last_moved: Instant,
    /// The time at which the first side ended.
    half_closed: Option<Instant>,
    /// The bytes that threads had delivered at the last check.
    delivered: u64,
}

/// The progress of relay threads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    /// The bytes of each side that were delivered to the other.
    pub(crate) delivered: [u64; 2],
    /// The side that has ended, if one has.
    pub(crate) half_closed: Option<Side>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Timeout {
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

    pub(super) fn note(&mut self, moved: bool, half_closed: bool, now: Instant) {
        if moved {
            self.last_moved = now;
        }
        if half_closed {
            self.half_closed.get_or_insert(now);
        }
    }

    /// Returns for how long no byte has moved.
    pub(super) fn time(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.last_moved)
    }

    /// Returns the time of the next timeout if no byte moves until then, and which timeout it is.
    fn next_timeout(&self, timeouts: &Timeouts) -> Option<(Instant, Timeout)> {
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

impl<S: Socket> Connection<S> {
    /// Cuts off an open connection on which no byte has moved for too long. Returns whether it did.
    pub(super) fn cut_if_idle(&mut self, cx: &mut Context<'_, S>) -> bool {
        let Some((at, timeout)) = self.idle.next_timeout(&self.forward.rule.timeouts) else {
            return false;
        };
        if cx.now < at {
            self.wake_by(at);
            return false;
        }
        let tally = &self.forward.tally;
        let (counter, why) = match timeout {
            Timeout::Idle => (&tally.idle, EndReason::IdleTimeout),
            Timeout::HalfClosed => (&tally.half_closed, EndReason::HalfClosedTimeout),
        };
        add_one(counter);
        self.debug(|| debug!(?timeout, "timed out"));
        self.cut(why, cx);
        true
    }

    /// Notes how far the threads are. They count bytes, but report no times: what has moved since
    /// the last look has moved now.
    pub(super) fn note_progress(&mut self, progress: Progress, now: Instant) {
        let delivered = progress.delivered.iter().sum();
        let moved = std::mem::replace(&mut self.idle.delivered, delivered) != delivered;
        self.idle.note(moved, progress.half_closed.is_some(), now);
    }

    /// Takes the progress of the threads.
    pub(crate) fn take_progress(&mut self, progress: Progress, cx: &mut Context<'_, S>) {
        if !matches!(self.state, State::OnThreads) || self.is_cut_off {
            return;
        }
        self.note_progress(progress, cx.now);
        let Some(time) = check_interval(&self.forward.rule.timeouts) else {
            return;
        };
        // Invariant 9: the threads were frozen as well. They read what has arrived before a timeout
        // is believed.
        let thawed = cx.thawed.is_some_and(|at| cx.now < after(at, time));
        if thawed || !self.cut_if_idle(cx) {
            self.wake_by(after(cx.now, time));
        }
    }

    pub(super) fn go_on_with_threads(&mut self, cx: &mut Context<'_, S>) {
        match self.is_cut_off {
            true => self.cut_threads(cx),
            false => cx.request(Action::LookAtThreads),
        }
    }
}

/// Returns how often the progress of threads is to be checked.
fn check_interval(timeouts: &Timeouts) -> Option<Duration> {
    let times = [timeouts.idle, timeouts.half_closed];
    times.into_iter().flatten().min().map(|time| time / CHECKS)
}
