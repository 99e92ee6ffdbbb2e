//! How a connection ends: each side is closed, reset, or half-closed and read to its end, as it is owed.

use std::time::{Duration, Instant};

use tracing::warn;

use crate::dial;
use crate::engine::Phase;
use crate::engine::counters::{Reason, add_one};
use crate::engine::relay::{CloseMode, End, Readiness, Side};
use crate::time::after;

use super::{Action, Connection, Context, Socket, State};

/// How long a client that goes on sending is read from after it got its whole answer.
pub(crate) const LINGER: Duration = Duration::from_secs(5);

/// After how long it is looked whether a peer that is to be reset has got what was sent before; doubled each time, up
/// to the longest.
pub(crate) const RESET_PAUSE: Duration = Duration::from_millis(2);
pub(crate) const LONGEST_RESET_PAUSE: Duration = Duration::from_millis(128);

/// How long guests may take to end their connections when the proxy is told to end at once.
pub(crate) const LAST_DRAIN: Duration = Duration::from_secs(2);

/// Turns of an end that is emptied before it is closed by force: what a socket can hold, many times over.
const LAST_TURNS: usize = 64;

/// What the log says of guests that have not ended in time.
const NOT_ENDED: &str = "closed connections that the guest did not end within the drain timeout";

/// How long threads that were cut off may take to end before they are cut again.
const CUT_PAUSE: Duration = Duration::from_millis(10);

/// An end that is not to be closed at once.
#[derive(Debug)]
pub(crate) struct Closing<S> {
    pub(crate) end: End<S>,
    /// To be reset when the peer has what was sent before, instead of being read to its EOF: a reset overtakes. It is
    /// looked again after this pause.
    reset: Option<Duration>,
}

impl<S> Closing<S> {
    /// An end to be read to its EOF.
    pub(super) fn drain(end: End<S>) -> Closing<S> {
        Closing { end, reset: None }
    }

    /// An end to be reset once the peer has what was sent before.
    fn reset(end: End<S>) -> Closing<S> {
        Closing {
            end,
            reset: Some(RESET_PAUSE),
        }
    }
}

impl<S: Socket> Connection<S> {
    /// Ends a pair, done or not: closes, resets, or half-closes and goes on reading, as each side is owed.
    pub(super) fn close_pair(&mut self, cx: &mut Context<'_, S>) {
        let State::Relaying { pair, .. } = self.leave_state() else {
            return;
        };
        if pair.refused() {
            let error = dial::refused_by_eof(&self.forward.rule.connect);
            self.note_refusal(&error, Reason::ByTarget, cx.now);
        }
        let modes = Side::BOTH.map(|side| pair.close_mode(side));
        let mut ends = [None, None];
        for (side, mut end) in Side::BOTH.into_iter().zip(pair.into_ends(cx.pool)) {
            let mode = modes[side];
            // Rule 2 of a good neighbour: hyperkit reads EOF from us and is read to its EOF, whatever happened.
            let is_graceful = self.forward.needs_graceful_close(side);
            if is_graceful && !end.input_ended() || !is_graceful && mode == CloseMode::Linger {
                end.shutdown_write();
                ends[side] = Some(Closing::drain(end));
            } else if is_graceful || mode == CloseMode::Close {
                self.close_socket(side, end, cx);
            } else {
                ends[side] = Some(Closing::reset(end));
            }
        }
        self.begin_closing(ends, cx);
    }

    /// Begins to close what is left of it.
    pub(super) fn begin_closing(&mut self, ends: [Option<Closing<S>>; 2], cx: &mut Context<'_, S>) {
        let is_graceful =
            |side: Side| ends[side].is_some() && self.forward.needs_graceful_close(side);
        let drain = self.forward.rule.timeouts.drain;
        let time = match cx.phase {
            Phase::Cutting => LAST_DRAIN.min(drain),
            // Nobody who has gone holds up the end: the grace is for those who are there.
            Phase::Stopping => LINGER.min(drain),
            Phase::Running if is_graceful(Side::Client) || is_graceful(Side::Server) => drain,
            Phase::Running => LINGER,
        };
        self.wake_at = None;
        let until = Some(after(cx.now, time));
        self.enter(State::Closing { ends, until });
        self.go_on_closing(cx);
    }

    pub(super) fn go_on_closing(&mut self, cx: &mut Context<'_, S>) {
        let now = cx.now;
        let State::Closing { ends, until } = &mut self.state else {
            return;
        };
        let mut look_again = None;
        for (side, slot) in Side::BOTH.into_iter().zip(ends.iter_mut()) {
            let Some(Closing { mut end, reset }) = slot.take() else {
                continue;
            };
            let before = (end.received(), end.input_ended());
            cx.has_more_work |= end.discard(cx.pool);
            if let Some(slot) = self.slots[side].as_ref().filter(|_| side == Side::Server)
                && (end.received(), end.input_ended()) != before
            {
                slot.note_answer(now);
            }
            if let Some(pause) = reset {
                if end.takes_nothing() || end.socket.unacknowledged() == 0 {
                    cx.request(Action::Reset(end.socket));
                    continue;
                }
                look_again =
                    Some(look_again.map_or(now + pause, |at: Instant| at.min(now + pause)));
            } else if end.input_ended() {
                cx.request(Action::Close(end.socket, self.slots[side].take()));
                continue;
            }
            let reset = reset.map(|pause| (2 * pause).min(LONGEST_RESET_PAUSE));
            *slot = Some(Closing { end, reset });
        }
        if ends.iter().all(Option::is_none) {
            return self.close(cx);
        }
        // What never became a socket, or was reset, has no slot any more, though the other side lingers.
        for side in Side::BOTH {
            if ends[side].is_none() {
                self.slots[side] = None;
            }
        }
        if cx.thawed == Some(now)
            && let Some(until) = until
        {
            // Invariant 9: the peer may have stood still as well, and have had no time to answer.
            let drain = self.forward.rule.timeouts.drain;
            *until = (*until).max(after(now, LAST_DRAIN.min(drain)));
        }
        let until = *until;
        if until.is_some_and(|until| now >= until) {
            return self.abandon(cx);
        }
        if let Some(at) = [until, look_again].into_iter().flatten().min() {
            self.wake_at = Some(at);
        }
    }

    /// Closes what did not end in time, with nothing unread in it.
    pub(crate) fn abandon(&mut self, cx: &mut Context<'_, S>) {
        let State::Closing { ends, .. } = &mut self.state else {
            return;
        };
        let ends = std::mem::take(ends);
        for (side, closing) in Side::BOTH.into_iter().zip(ends) {
            let Some(Closing { mut end, reset }) = closing else {
                continue;
            };
            if reset.is_some() {
                cx.request(Action::Reset(end.socket));
                continue;
            }
            // First nothing more may come (on Linux the device's next write fails, and it tells the guest), then what
            // has come is taken out: a close with data unread is what kills the VM.
            end.socket.shutdown_read();
            end.latch(Readiness {
                readable: true,
                ..Readiness::default()
            });
            for _ in 0..LAST_TURNS {
                if !end.discard(cx.pool) {
                    break;
                }
            }
            self.close_socket(side, end, cx);
            if self.forward.needs_graceful_close(side) {
                let text = match cx.phase {
                    Phase::Cutting => "closed connections that the guest had not ended yet",
                    _ => NOT_ENDED,
                };
                self.note_abandoned(text, cx.now);
            }
        }
        self.close(cx);
    }

    /// Counts an end that its peer has not ended in time.
    fn note_abandoned(&self, text: &str, now: Instant) {
        let forward = &self.forward;
        add_one(&forward.tally.abandoned);
        if forward.log_limiter.admit(text, now).is_some() {
            warn!("{}: {text}", forward.rule.connect);
        }
    }

    /// Shortens the time of what is being closed as the phase says.
    pub(super) fn hurry(&mut self, cx: &mut Context<'_, S>) {
        if let State::Closing { ends, .. } = &mut self.state {
            let ends = std::mem::take(ends);
            self.begin_closing(ends, cx);
        }
    }

    /// Shortens the time of what is being closed, when the proxy begins to stop: nobody is there for it. Probes have none
    /// before.
    pub(crate) fn begin_to_stop(&mut self, cx: &mut Context<'_, S>) {
        if let State::Closing { until, .. } = &mut self.state {
            let at = match *until {
                None => cx.now + LAST_DRAIN,
                Some(until) => until.min(cx.now + LINGER),
            };
            *until = Some(at);
            self.wake_by(at);
        }
    }

    /// Ends the threads, until they say that they have ended.
    pub(super) fn cut_threads(&mut self, cx: &mut Context<'_, S>) {
        cx.request(Action::CutThreads);
        self.wake_at = Some(cx.now + CUT_PAUSE);
    }

    /// Takes that the threads have ended, what they have delivered of each side, and whether a guest has not ended in
    /// time.
    pub(crate) fn take_threads_end(
        &mut self,
        delivered: [u64; 2],
        abandoned: bool,
        cx: &mut Context<'_, S>,
    ) {
        self.counted = delivered;
        if abandoned {
            self.note_abandoned(NOT_ENDED, cx.now);
        }
        self.close(cx);
    }

    /// Closes what it still has: it is over.
    pub(super) fn close(&mut self, cx: &mut Context<'_, S>) {
        match self.leave_state() {
            State::Waiting { client, .. } => self.close_socket(Side::Client, client, cx),
            State::Connecting { client, server, .. } | State::Proving { client, server, .. } => {
                self.close_socket(Side::Client, client, cx);
                self.close_socket(Side::Server, server, cx);
            }
            State::Relaying { .. } | State::OnThreads | State::Closing { .. } | State::Closed => {}
        }
        self.wake_at = None;
        self.enter(State::Closed);
        cx.request(Action::Drop);
    }
}
