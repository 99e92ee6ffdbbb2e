//! The closing of a connection. Each side is closed, reset, or half-closed and read to its EOF, as
//! its family and the way in which the pair ended require.
//!
//! Which of these a side needs is decided here; the sockets themselves are closed by the loop,
//! through [`Action`]s. No socket call here waits for its peer.

use std::io;
use std::time::{Duration, Instant};

use tracing::warn;

use crate::dial;
use crate::engine::Phase;
use crate::engine::counters::add_one;
use crate::engine::end_reason::{EndReason, Reason};
use crate::engine::forward::Forward;
use crate::engine::relay::{CloseMode, End, Ending, Half, Readiness, Side};
use crate::time::after;

use super::{Action, Connection, Context, Socket, State};

/// How long input is read and discarded from a client that has received its whole answer and goes
/// on sending.
pub(crate) const LINGER: Duration = Duration::from_secs(5);

/// The pause before the first check whether a peer that is to be reset has received what was sent
/// before. It doubles with each check, up to [`LONGEST_RESET_PAUSE`].
pub(crate) const RESET_PAUSE: Duration = Duration::from_millis(2);
pub(crate) const LONGEST_RESET_PAUSE: Duration = Duration::from_millis(128);

/// How long guests may take to end their connections when the proxy has to end at once.
pub(crate) const LAST_DRAIN: Duration = Duration::from_secs(2);

/// How often an end is read empty before it is closed by force. This is many times what a socket
/// can hold.
const LAST_TURNS: usize = 64;

/// The log message about guests that did not end their connections in time.
const NOT_ENDED: &str = "closed connections that the guest did not end within the drain timeout";

/// How long threads may take to end after they were cut off, before they are cut off again.
const CUT_PAUSE: Duration = Duration::from_millis(10);

/// An end that must not be closed at once.
#[derive(Debug)]
pub(crate) struct Closing<S> {
    pub(crate) end: End<S>,
    /// The pause before the next check, if the end is to be reset rather than read to its EOF. A
    /// reset overtakes data, so it waits until the peer has what was sent before.
    reset: Option<Duration>,
}

impl<S> Closing<S> {
    /// Makes an end that is read to its EOF.
    pub(super) fn drain(end: End<S>) -> Closing<S> {
        Closing { end, reset: None }
    }

    /// Makes an end that is reset once the peer has what was sent before.
    fn reset(end: End<S>) -> Closing<S> {
        Closing {
            end,
            reset: Some(RESET_PAUSE),
        }
    }
}

impl<S: Socket> Connection<S> {
    /// Ends a pair, whether it is done or not: closes each side, resets it, or half-closes it and
    /// drains it.
    pub(super) fn close_pair(&mut self, cx: &mut Context<'_, S>) {
        let State::Relaying { pair, .. } = self.take_state() else {
            return;
        };
        if pair.refused() {
            let error = dial::refused_by_eof(&self.forward.rule.connect);
            self.end_because(EndReason::Refused(Reason::ByTarget));
            self.note_refusal(&error, Reason::ByTarget, cx.now);
        }
        let modes = Side::BOTH.map(|side| pair.close_mode(side));
        let mut ends = [None, None];
        for (side, mut end) in Side::BOTH.into_iter().zip(pair.into_ends(cx.pool)) {
            let mode = modes[side];
            // Rule 2 of a good neighbour: hyperkit must read EOF from us, and must be read to its
            // EOF, whatever happened.
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

    /// Begins to close the ends that are left.
    pub(super) fn begin_closing(&mut self, ends: [Option<Closing<S>>; 2], cx: &mut Context<'_, S>) {
        let time = time_to_close(&self.forward, &ends, cx.phase);
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
        let mut check_at = None;
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
                check_at = Some(check_at.map_or(now + pause, |at: Instant| at.min(now + pause)));
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
        // A side that never had a socket, or whose socket was reset, needs no slot any more, even
        // while the other side is drained.
        for side in Side::BOTH {
            if ends[side].is_none() {
                self.slots[side] = None;
            }
        }
        if cx.thawed == Some(now)
            && let Some(until) = until
        {
            // Invariant 9: the peer may have been frozen as well, and had no time to answer.
            let drain = self.forward.rule.timeouts.drain;
            *until = (*until).max(after(now, LAST_DRAIN.min(drain)));
        }
        let until = *until;
        if until.is_some_and(|until| now >= until) {
            return self.abandon(cx);
        }
        if let Some(at) = [until, check_at].into_iter().flatten().min() {
            self.wake_at = Some(at);
        }
    }

    /// Closes by force what has not ended in time, after reading out what is unread.
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
            // First the input is shut down (on Linux the device's next write then fails, and it
            // tells the guest); then what has arrived is read. A close with unread data kills the
            // VM.
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

    /// Counts and logs an end that the peer has not ended in time.
    fn note_abandoned(&self, text: &str, now: Instant) {
        let forward = &self.forward;
        add_one(&forward.tally.abandoned);
        if forward.log_limiter.admit(text, now).is_some() {
            self.span()
                .in_scope(|| warn!("{}: {text}", forward.rule.connect));
        }
    }

    /// Shortens the closing to what the current phase allows. A probe may take as long as the proxy
    /// runs.
    pub(crate) fn shorten_closing(&mut self, cx: &mut Context<'_, S>) {
        let State::Closing { ends, until } = &mut self.state else {
            return;
        };
        let at = match *until {
            None if cx.phase == Phase::Running => return,
            None => cx.now + LAST_DRAIN,
            Some(until) => until.min(after(cx.now, time_to_close(&self.forward, ends, cx.phase))),
        };
        *until = Some(at);
        self.wake_by(at);
    }

    /// Requests the end of the threads, and tries again until they report that they have ended.
    pub(super) fn cut_threads(&mut self, cx: &mut Context<'_, S>) {
        cx.request(Action::CutThreads);
        self.wake_at = Some(cx.now + CUT_PAUSE);
    }

    /// Takes the end of the threads: the bytes that they delivered from each side, whether a guest
    /// failed to end its connection in time, and which side has ended first, and how.
    pub(crate) fn take_threads_end(
        &mut self,
        delivered: [u64; 2],
        abandoned: bool,
        first: Option<(Side, Ending)>,
        cx: &mut Context<'_, S>,
    ) {
        self.counted = delivered;
        if let Some((side, ending)) = first {
            self.end_because(reason_of_end(side, ending));
        }
        if abandoned {
            self.note_abandoned(NOT_ENDED, cx.now);
        }
        self.close(cx);
    }

    /// Closes all sockets that are left and ends the connection.
    pub(super) fn close(&mut self, cx: &mut Context<'_, S>) {
        match self.take_state() {
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

/// Returns how a side has ended, if it has.
pub(super) fn how_ended<S: Socket>(end: &End<S>) -> Option<Ending> {
    match end.output {
        _ if end.is_dead() => Some(Ending::BrokenOff),
        // That a peer takes no more is all that a close says to who writes.
        Half::Failed(kind) if kind != io::ErrorKind::BrokenPipe => Some(Ending::BrokenOff),
        Half::Failed(_) => Some(Ending::Whole),
        _ => end.input_ended().then_some(Ending::Whole),
    }
}

/// Returns the reason that the end of a side stands for.
pub(super) fn reason_of_end(side: Side, ending: Ending) -> EndReason {
    match (side, ending) {
        (Side::Client, Ending::Whole) => EndReason::ClientClosed,
        (Side::Client, Ending::BrokenOff) => EndReason::ClientReset,
        (Side::Server, Ending::Whole) => EndReason::ServerClosed,
        (Side::Server, Ending::BrokenOff) => EndReason::ServerReset,
    }
}

/// Returns how long the ends that are left may take to close.
fn time_to_close<S>(forward: &Forward, ends: &[Option<Closing<S>>; 2], phase: Phase) -> Duration {
    let drain = forward.rule.timeouts.drain;
    let is_graceful = |side: &Side| ends[*side].is_some() && forward.needs_graceful_close(*side);
    match phase {
        Phase::Cutting => LAST_DRAIN.min(drain),
        // A peer that is no longer there must not delay the stop.
        Phase::Stopping => LINGER.min(drain),
        Phase::Running if Side::BOTH.iter().any(is_graceful) => drain,
        Phase::Running => LINGER,
    }
}
