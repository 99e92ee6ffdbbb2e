//! A connection that is relayed by threads: their progress, their idle timeouts and their end.

use std::io;
use std::time::{Duration, Instant};

use crate::engine::end_reason::{EndReason, RefusalReason};
use crate::engine::relay::{Ending, Side};
use crate::engine::rule::Timeouts;
use crate::error::{Error, Operation};
use crate::time::after;

use super::action::{Action, Context};
use super::closing::{NOT_ENDED, reason_of_end};
use super::socket::ConnectionSocket;
use super::state::{Connection, State};

/// How often within a timeout the byte counts of relay threads are read. The threads count bytes,
/// but report no times.
const CHECKS: u32 = 4;

/// How long threads may take to end after they were cut off, before they are cut off again.
const CUT_PAUSE: Duration = Duration::from_millis(10);

/// The progress of relay threads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    /// The bytes of each side that were delivered to the other.
    pub(crate) delivered: [u64; 2],
    /// The side that has ended, if one has.
    pub(crate) half_closed: Option<Side>,
}

/// The result of relay threads that have ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ThreadsResult {
    /// The bytes of each side that were delivered to the other.
    pub(crate) delivered: [u64; 2],
    /// Whether a side did not end within the drain timeout that it was given.
    pub(crate) abandoned: bool,
    /// The side that ended first, and how. One that broke off comes before one that did not.
    pub(crate) first: Option<(Side, Ending)>,
}

impl<S: ConnectionSocket> Connection<S> {
    /// Takes the error of threads that could not be started; both sockets were reset.
    pub(crate) fn take_threads_failure(&mut self, error: io::Error, cx: &mut Context<'_, S>) {
        let error = Error::new(Operation::Run, "a connection's thread", error);
        self.end_because(EndReason::Refused(RefusalReason::Other));
        self.note_refusal(&error, RefusalReason::Other, cx.now);
        self.close(cx);
    }

    /// Notes how far the threads are. They count bytes, but report no times: what has moved since
    /// the last look has moved now.
    pub(super) fn note_progress(&mut self, progress: Progress, now: Instant) {
        let delivered = progress.delivered.iter().sum();
        if std::mem::replace(&mut self.idle.delivered, delivered) != delivered {
            self.idle.note_bytes(now);
        }
        if progress.half_closed.is_some() {
            self.idle.note_half_close(now);
        }
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
        let was_frozen = cx.resumed_at.is_some_and(|at| cx.now < after(at, time));
        if was_frozen || !self.cut_if_idle(cx) {
            self.wake_by(after(cx.now, time));
        }
    }

    pub(super) fn go_on_with_threads(&mut self, cx: &mut Context<'_, S>) {
        match self.is_cut_off {
            true => self.cut_threads(cx),
            false => cx.request(Action::LookAtThreads),
        }
    }

    /// Requests the end of the threads, and tries again until they report that they have ended.
    pub(super) fn cut_threads(&mut self, cx: &mut Context<'_, S>) {
        cx.request(Action::CutThreads);
        self.wake_at = Some(cx.now + CUT_PAUSE);
    }

    /// Takes the result of the threads, which have ended.
    pub(crate) fn take_threads_end(&mut self, result: ThreadsResult, cx: &mut Context<'_, S>) {
        self.counted = result.delivered;
        if let Some((side, ending)) = result.first {
            self.end_because(reason_of_end(side, ending));
        }
        if result.abandoned {
            self.note_abandoned(NOT_ENDED, cx.now);
        }
        self.close(cx);
    }
}

/// Returns how often the progress of threads is to be checked.
fn check_interval(timeouts: &Timeouts) -> Option<Duration> {
    let times = [timeouts.idle, timeouts.half_closed];
    times.into_iter().flatten().min().map(|time| time / CHECKS)
}
