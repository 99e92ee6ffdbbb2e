//! The closing of a connection. Each side is closed, reset, or half-closed and read to its EOF, as
//! its family and the way in which the pair ended require.
//!
//! Which of these a side needs is decided here; the sockets themselves are closed by the loop,
//! through [`Action`]s. No socket call here waits for its peer.
//!
//! The drain timeout is applied at these places:
//!
//! - here, to the whole of a closing (`time_to_close`);
//! - here, to a reset that waits until its peer has received what was sent before (`close_pair`),
//!   which has [`LINGER`] at least, but no longer than the whole;
//! - in `relaying.rs`, while a peer is gone or a half-close is held back: then the pair is closed;
//! - in `proving.rs`, to a probe for which no event can arrive;
//! - by relay threads, which are told it by `Reporter::drain_timeout`, and by adapters
//!   (`proxy/adapter.rs`).
//!
//! When the time of a closing is over, `close_by_force` acts: it resets what was to be reset, hands
//! over or holds the socket of a silent guest where it can, and has `give_up` read out and close
//! the rest.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::dial::Dial;
use crate::engine::Phase;
use crate::engine::admission::{DrainEnd, Slot};
use crate::engine::end_reason::{EndReason, RefusalReason};
use crate::engine::forward::Forward;
use crate::engine::relay::{CloseMode, End, Ending, Half, Readiness, Side};
use crate::stream::closing::ResetWait;
use crate::stream::draining::{Drain, DrainReading, DrainStep, DrainTurn};
use crate::time::after;

use super::action::{Action, Context};
use super::closing_end::{Closing, How};
use super::closing_times::ClosingTimes;
use super::socket::ConnectionSocket;
use super::state::{Connection, Program, State};

/// How long input is read and discarded from a client that has received its whole answer and goes
/// on sending.
pub(crate) const LINGER: Duration = Duration::from_secs(5);

/// How long guests may take to end their connections when the proxy has to end at once.
pub(crate) const LAST_DRAIN: Duration = Duration::from_secs(2);

/// How often an end is read empty before it is closed by force. This is many times what a socket
/// can hold.
const LAST_TURNS: usize = 64;

/// The log messages about guests that did not end their connections in time.
pub(super) const NOT_ENDED: &str =
    "closed connections that the guest did not end within the drain timeout";
const LOST: &str = "closed connections that the guest did not end within the drain timeout; their slots are lost until the VM is restarted";
const HELD: &str = "the guest did not end connections within the drain timeout; their slots are lost until it ends them or the VM is restarted";
const SENDS_ON: &str =
    "closed connections on which the guest went on sending though nobody was left to read";

impl<S: ConnectionSocket> Connection<S> {
    /// Ends a pair, whether it is done or not: closes each side, resets it, or half-closes it and
    /// drains it.
    pub(super) fn close_pair(&mut self, cx: &mut Context<'_, S>) {
        let State::Relaying { pair, .. } = self.take_state() else {
            return;
        };
        if pair.was_refused() {
            let error = self.refused_by_eof(&pair.ends[Side::Server]);
            self.end_because(EndReason::Refused(RefusalReason::ByTarget));
            self.note_refusal(&error, RefusalReason::ByTarget, cx.now);
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
                let longest = LINGER.max(self.forward.rule.timeouts.drain);
                ends[side] = Some(Closing::reset(end, after(cx.now, longest)));
            }
        }
        self.begin_closing(ends, cx);
    }

    /// Begins to close the ends that are left.
    pub(super) fn begin_closing(&mut self, ends: [Option<Closing<S>>; 2], cx: &mut Context<'_, S>) {
        let time = time_to_close(&self.forward, &ends, cx.phase);
        self.wake_at = None;
        let times = ClosingTimes::ending_at(Some(after(cx.now, time)));
        self.enter(State::Closing { ends, times });
        self.go_on_closing(cx);
    }

    /// Goes on to close the ends that are left, and ends the connection after the last.
    pub(super) fn go_on_closing(&mut self, cx: &mut Context<'_, S>) {
        let now = cx.now;
        let State::Closing { ends, times } = &mut self.state else {
            return;
        };
        let (mut ends, mut times) = (std::mem::take(ends), *times);
        let mut check_at: Option<Instant> = None;
        for side in Side::BOTH {
            let Some(closing) = ends[side].take() else {
                continue;
            };
            match self.go_on_closing_end(side, closing, cx) {
                CloseProgress::Open {
                    closing,
                    check_at: at,
                } => {
                    ends[side] = Some(closing);
                    check_at = check_at.into_iter().chain(at).min();
                }
                CloseProgress::Closed => {}
                CloseProgress::GivenUp => times.note_given_up(now),
            }
        }
        times.settle(now);
        let is_closed = ends.iter().all(Option::is_none);
        if cx.resumed_at == Some(now) && !is_closed {
            // Invariant 9: the peer may have been frozen as well, and had no time to answer.
            let drain = self.forward.rule.timeouts.drain;
            times.extend_to(after(now, LAST_DRAIN.min(drain)));
        }
        // A side that never had a socket, or whose socket was reset, needs no slot any more, even
        // while the other side is drained.
        for side in Side::BOTH {
            if ends[side].is_none() && times.settled().is_none() {
                self.slots[side] = None;
            }
        }
        self.state = State::Closing { ends, times };
        match times.settled() {
            Some(at) if is_closed && cx.phase == Phase::Running => self.wake_at = Some(at),
            _ if is_closed => self.close(cx),
            _ if times.are_over(now) => self.close_by_force(cx),
            _ => self.wake_at = times.next(check_at).or(self.wake_at),
        }
    }

    /// Goes on with the close of one end.
    fn go_on_closing_end(
        &mut self,
        side: Side,
        closing: Closing<S>,
        cx: &mut Context<'_, S>,
    ) -> CloseProgress<S> {
        let Closing { end, how } = closing;
        match how {
            How::Drain(drain) => self.go_on_draining(side, end, drain, cx),
            How::ShakeHands(dial) => self.go_on_shaking_hands(side, end, dial, cx),
            How::Reset(wait) => self.go_on_resetting(side, end, wait, cx),
        }
    }

    /// Notes that the guest of that side has answered, if more came than `before`: what was
    /// received, and whether the input had ended.
    fn note_answer(&self, side: Side, end: &End<S>, before: (u64, bool), cx: &mut Context<'_, S>) {
        if let Some(slot) = self.slots[side].as_ref().filter(|_| side == Side::Server)
            && (end.received(), end.input_ended()) != before
        {
            // The end of a VM is no answer of its guest.
            if end.received() > 0 || !self.has_vm_ended(end, cx) {
                slot.note_answer(cx.now);
            }
        }
    }

    /// Waits for a VMM's answer to a dial that was given up, then half-closes the end and drains
    /// it.
    fn go_on_shaking_hands(
        &mut self,
        side: Side,
        mut end: End<S>,
        mut dial: Box<Dial>,
        cx: &mut Context<'_, S>,
    ) -> CloseProgress<S> {
        match dial.shake_hands(&mut end.socket) {
            Ok(false) => {
                let how = How::ShakeHands(dial);
                return Closing { end, how }.wait_until(None);
            }
            Ok(true) => self.note_handshake(cx),
            Err(_) => {}
        }
        // If there is no connection after all, the drain reads its end.
        end.shutdown_write();
        let drain = Drain::new(end.received());
        self.go_on_draining(side, end, drain, cx)
    }

    /// Resets an end if its peer has received what was sent before.
    fn go_on_resetting(
        &mut self,
        side: Side,
        mut end: End<S>,
        mut wait: ResetWait,
        cx: &mut Context<'_, S>,
    ) -> CloseProgress<S> {
        let before = (end.received(), end.input_ended());
        end.discard(cx.pool);
        self.note_answer(side, &end, before, cx);
        cx.has_more_work |= end.is_readable();
        let check_at = match end.takes_nothing() {
            true => None,
            false => wait.check(end.socket.unacknowledged(), cx.now),
        };
        match check_at {
            None => {
                cx.request(Action::Reset(end.socket));
                CloseProgress::Closed
            }
            at => {
                let how = How::Reset(wait);
                Closing { end, how }.wait_until(at)
            }
        }
    }

    /// Reads what a turn may of an end, and closes it if it is time.
    fn go_on_draining(
        &mut self,
        side: Side,
        mut end: End<S>,
        mut drain: Drain,
        cx: &mut Context<'_, S>,
    ) -> CloseProgress<S> {
        let now = cx.now;
        if cx.resumed_at == Some(now) {
            drain.note_freeze(now);
        }
        let before = (end.received(), end.input_ended());
        let was_read = match drain.reading(now) {
            DrainReading::Full => {
                end.discard(cx.pool);
                true
            }
            DrainReading::Once => {
                end.discard_once(cx.pool);
                true
            }
            DrainReading::Later => false,
        };
        self.note_answer(side, &end, before, cx);
        if end.input_ended() {
            self.close_socket(side, end, cx);
            return CloseProgress::Closed;
        }
        let turn = DrainTurn {
            received: end.received(),
            was_read,
            is_readable: end.is_readable(),
            // A client is drained for a few seconds only, and a stop must not be delayed.
            may_slow: cx.phase == Phase::Running && self.forward.needs_graceful_close(side),
        };
        let mut next = drain.take_turn(turn, now);
        if self.is_remnant && drain.wants_end() {
            // Once it is closed, the guest's next packet has the device end the connection.
            next = DrainStep::GiveUp;
        }
        let slot = &mut self.slots[side];
        if let Some(slot) = slot {
            match next {
                DrainStep::Slower | DrainStep::MayGiveUp | DrainStep::GiveUp => slot.note_drain(),
                DrainStep::Paused => slot.forget_drain(),
                DrainStep::Wait | DrainStep::At(_) | DrainStep::Again | DrainStep::Close => {}
            }
        }
        let why = match next {
            DrainStep::GiveUp => Some(DrainEnd::Due),
            DrainStep::MayGiveUp => Some(DrainEnd::InTheWay),
            _ => None,
        };
        let may_give_up = |why| match slot {
            Some(slot) => slot.may_give_up_drain(why, now),
            // Its family has no slots.
            None => why == DrainEnd::Due,
        };
        if why.is_some_and(may_give_up) {
            drain.give_up(now);
            next = DrainStep::Again;
        }
        let at = match next {
            DrainStep::Close => {
                return match self.give_up(side, end, Gone::Sending, cx) {
                    true => CloseProgress::GivenUp,
                    false => CloseProgress::Closed,
                };
            }
            DrainStep::Again => {
                cx.has_more_work = true;
                None
            }
            DrainStep::At(at) => Some(at),
            DrainStep::Slower | DrainStep::GiveUp | DrainStep::MayGiveUp => {
                Some(drain.next_read(now))
            }
            DrainStep::Wait | DrainStep::Paused => None,
        };
        let how = How::Drain(drain);
        Closing { end, how }.wait_until(at)
    }

    /// Closes by force an end that is not ended yet, after reading out what is unread. Returns
    /// whether its slot is still taken.
    fn give_up(
        &mut self,
        side: Side,
        mut end: End<S>,
        guest: Gone,
        cx: &mut Context<'_, S>,
    ) -> bool {
        // What has arrived is read, so that the device has none of it left; then the input is shut
        // down (on Linux the device's next write then fails, and it tells the guest); then what has
        // come meanwhile is read. A close with unread data kills the VM.
        read_out(&mut end, cx);
        let has_ended = end.input_ended();
        if !has_ended {
            end.socket.shutdown_read();
            read_out(&mut end, cx);
        }
        if has_ended || !self.forward.needs_graceful_close(side) {
            self.close_socket(side, end, cx);
            return false;
        }
        let text = match (cx.phase, guest) {
            (Phase::Cutting, _) => "closed connections that the guest had not ended yet",
            (_, Gone::Sending) => SENDS_ON,
            (_, Gone::Silent) if self.can_lose_slot(side) => LOST,
            (_, Gone::Silent) => NOT_ENDED,
        };
        self.note_abandoned(text, cx.now);
        match guest {
            // The slot is given back once the device has told the guest.
            Gone::Sending if self.can_lose_slot(side) => cx.request(Action::Discard(end.socket)),
            Gone::Sending | Gone::Silent => {
                if let Some(slot) = &mut self.slots[side] {
                    slot.mark_lost();
                }
                self.close_socket(side, end, cx);
            }
        }
        self.slots[side].is_some()
    }

    /// Returns whether the VMM of a side keeps the slot of a connection that its guest has not
    /// ended.
    fn can_lose_slot(&self, side: Side) -> bool {
        self.slots[side].as_ref().is_some_and(Slot::can_be_lost)
    }

    /// Closes by force what has not ended in time.
    pub(crate) fn close_by_force(&mut self, cx: &mut Context<'_, S>) {
        let State::Closing { ends, .. } = &mut self.state else {
            return;
        };
        let ends = std::mem::take(ends);
        let (mut is_settling, mut held) = (false, [None, None]);
        for (side, closing) in Side::BOTH.into_iter().zip(ends) {
            let Some(Closing { end, how }) = closing else {
                continue;
            };
            let guest = match how {
                How::Reset(_) => {
                    cx.request(Action::Reset(end.socket));
                    continue;
                }
                How::Drain(drain) if drain.is_sending(cx.now) => Gone::Sending,
                How::Drain(_) | How::ShakeHands(_) => Gone::Silent,
            };
            // At the end of the process, its keeper has all the time that the guest needs.
            if (cx.phase == Phase::Cutting || self.is_remnant) && end.socket.is_guarded() {
                // The process may live on for a while, as that of a proxy that has handed over.
                if let (true, Some(slot)) = (self.is_remnant, &mut self.slots[side]) {
                    slot.mark_lost();
                }
                cx.request(Action::Leave(end.socket));
                continue;
            }
            if let (Gone::Silent, How::Drain(_)) = (guest, &how)
                && self.try_hold(side, cx)
            {
                self.note_abandoned(HELD, cx.now);
                held[side] = Some(Closing::drain(end));
                continue;
            }
            is_settling |= self.give_up(side, end, guest, cx);
        }
        if held.iter().any(Option::is_some) {
            let mut times = ClosingTimes::ending_at(None);
            if is_settling {
                times.note_given_up(cx.now);
            }
            self.state = State::Closing { ends: held, times };
            return cx.request(Action::Hold);
        }
        match &mut self.state {
            State::Closing { times, .. } if is_settling && cx.phase == Phase::Running => {
                times.note_given_up(cx.now);
                self.wake_at = times.settled();
            }
            _ => self.close(cx),
        }
    }

    /// Has the slot of a side count as lost until its silent guest ends the socket, which is to
    /// stay open. Returns false, and does nothing, if it may not.
    fn try_hold(&mut self, side: Side, cx: &Context<'_, S>) -> bool {
        cx.phase == Phase::Running
            && self.program == Program::None
            && (cx.may_hold)()
            && self.slots[side].as_mut().is_some_and(Slot::mark_held)
    }

    /// Takes what is left of the connection: the ends that its guests have not ended. The rest has
    /// ended.
    ///
    /// A close would tell a silent guest nothing, and its slot would be as much taken as before.
    /// While the socket is open, the guest's end is seen, and the slot is known to be free again. A
    /// guest that sends would be told by a close, so its drain is given up then.
    pub(crate) fn take_remnant(&mut self, now: Instant) -> Connection<S> {
        let forward = Arc::clone(&self.forward);
        let state = self.take_state();
        self.enter(State::Closed);
        let mut remnant = Connection::internal(forward, self.peer, state, now);
        remnant.is_remnant = true;
        remnant.is_inherited = self.is_inherited;
        remnant.is_queued = self.is_queued;
        remnant.slots = std::mem::take(&mut self.slots);
        // What came since the last turn is read.
        remnant.wake_at = Some(now);
        remnant
    }

    /// Shortens the closing to what the current phase allows. A probe may take as long as the proxy
    /// runs, and so may a remnant.
    pub(crate) fn shorten_closing(&mut self, cx: &mut Context<'_, S>) {
        let State::Closing { ends, times } = &mut self.state else {
            return;
        };
        if cx.phase > Phase::Running {
            for closing in ends.iter_mut().flatten() {
                if let How::Drain(drain) = &mut closing.how {
                    drain.end_slowness();
                }
            }
        }
        let is_closed = ends.iter().all(Option::is_none);
        let at = match times.forced_at() {
            // Its slots are not waited for.
            _ if is_closed && cx.phase > Phase::Running => cx.now,
            None if cx.phase == Phase::Running => return,
            // It has had its time.
            None if self.is_remnant => cx.now,
            None => cx.now + LAST_DRAIN,
            Some(until) => until.min(after(cx.now, time_to_close(&self.forward, ends, cx.phase))),
        };
        times.set_end(at);
        self.wake_by(at);
    }

    /// Closes all sockets that are left and ends the connection.
    pub(super) fn close(&mut self, cx: &mut Context<'_, S>) {
        self.abandon_race(cx);
        match self.take_state() {
            State::Waiting { client, .. } => self.close_socket(Side::Client, client, cx),
            State::Connecting { client, server, .. } | State::Proving { client, server, .. } => {
                self.close_socket(Side::Client, client, cx);
                self.close_socket(Side::Server, server, cx);
            }
            closing @ State::Closing { .. } => self.state = closing,
            State::Relaying { .. } | State::OnThreads | State::Closed => {}
        }
        self.wake_at = None;
        if self.awaits_program(cx) {
            return;
        }
        self.enter(State::Closed);
        cx.request(Action::Drop);
    }
}

/// What has become of an end in a step of its close.
enum CloseProgress<S> {
    /// It is open still. The next step is due at that time, or after an event.
    Open {
        closing: Closing<S>,
        check_at: Option<Instant>,
    },
    Closed,
    /// It was closed by force, and its guest is told.
    GivenUp,
}

impl<S> Closing<S> {
    /// Returns that the end is open still, and when the next step is due.
    fn wait_until(self, check_at: Option<Instant>) -> CloseProgress<S> {
        CloseProgress::Open {
            closing: self,
            check_at,
        }
    }
}

/// What a guest does whose connection is closed by force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gone {
    /// It sends, so it is told, and its slot comes back.
    Sending,
    /// It knows nothing of the close, and its slot is lost.
    Silent,
}

/// Reads and drops what there is.
fn read_out<S: ConnectionSocket>(end: &mut End<S>, cx: &mut Context<'_, S>) {
    end.latch(Readiness {
        readable: true,
        ..Readiness::default()
    });
    for _ in 0..LAST_TURNS {
        if !end.discard(cx.pool) {
            break;
        }
    }
}

/// Returns how a side has ended, if it has.
pub(super) fn how_ended<S: ConnectionSocket>(end: &End<S>) -> Option<Ending> {
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
