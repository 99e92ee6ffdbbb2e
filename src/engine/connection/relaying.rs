//! The relaying of a connection whose two ends are connected: bytes and half-closes are passed on
//! until both directions have ended.
//!
//! The copying itself is [`relay`](crate::engine::relay)'s; here are its limits and what follows
//! from its end.

use tracing::debug;

use crate::engine::counters::add_one;
use crate::engine::end_reason::EndReason;
use crate::engine::observer::What;
use crate::engine::relay::{Ending, Pair, PairTurn, Side};
use crate::time::after;

use super::action::{Action, Context};
use super::closing::{how_ended, reason_of_end};
use super::idle::{Idle, Timeout};
use super::socket::ConnectionSocket;
use super::state::{Connection, State};

/// The bytes that one connection may move in each direction before the others have their turn.
const BUDGET: usize = 256 * 1024;

/// Whether the target has taken the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Acceptance {
    /// A refusal would be known by now, whatever form the target's family gives it.
    Known,
    /// A refusal by EOF may still come, where the family refuses that way.
    Unknown,
}

impl<S: ConnectionSocket> Connection<S> {
    /// Begins to relay between the client and its server, of which nothing was read yet.
    pub(super) fn begin_relaying(&mut self, acceptance: Acceptance, cx: &mut Context<'_, S>) {
        self.begin_relaying_after(None, acceptance, cx);
    }

    /// Begins to relay between the client and its server. `first` is what the server has sent
    /// already.
    pub(super) fn begin_relaying_after(
        &mut self,
        first: Option<(Box<[u8]>, usize)>,
        acceptance: Acceptance,
        cx: &mut Context<'_, S>,
    ) {
        self.win_race(cx);
        let (client, server) = match self.take_state() {
            State::Connecting { client, server, .. } | State::Proving { client, server, .. } => {
                (client, server)
            }
            other => return self.state = other,
        };
        self.log_debug(|| debug!("connected"));
        self.notify(What::Connected);
        add_one(&self.forward.tally.connected);
        self.forward.mark_up(cx.now);
        self.retries = None;
        self.idle = Idle::new(cx.now);
        self.wake_at = None;
        if self.forward.is_on_threads() {
            self.enter(State::OnThreads);
            return cx.request(Action::StartThreads([client.socket, server.socket]));
        }
        let header = self.header_for_target(&client);
        let mut pair = Pair::new(client, server);
        self.give_header(&header, &mut pair, cx.pool);
        let mut refusal_wait = None;
        if let Some(refusal) = self.forward.refusal_by_eof()
            && acceptance == Acceptance::Unknown
        {
            pair.expect_refusal_by_eof(refusal.unread);
            pair.withhold_half_close(Side::Client);
            refusal_wait = Some(cx.now + refusal.wait);
        }
        if let Some((buffer, len)) = first {
            pair.give(Side::Server, buffer, len);
        }
        for side in Side::BOTH {
            // A half-close towards a peer that takes it for the end of both directions is held back
            // until that peer has ended.
            if self.forward.half_close_ends_both(side) || !pair.ends[side].socket.has_half_close() {
                pair.withhold_half_close(side.other());
            }
            // A VM that dies ends its connections with an EOF. Where the other peer can be told by
            // a reset that its connection broke off, it is.
            if self.forward.needs_graceful_close(side) && self.knows_process(side) {
                pair.doubt_end(side);
            } else if self.forward.resets_when_gone(side) {
                pair.doubt_failure(side);
            }
        }
        self.enter(State::Relaying {
            pair,
            refusal_wait,
            drain_deadline: None,
        });
        cx.has_more_work = true;
    }

    /// Relays what can be relayed now.
    pub(super) fn relay(&mut self, cx: &mut Context<'_, S>) {
        let now = cx.now;
        let State::Relaying {
            pair,
            refusal_wait,
            drain_deadline,
        } = &mut self.state
        else {
            return;
        };
        let activity = |pair: &Pair<_>| {
            Side::BOTH.map(|side| {
                let end = &pair.ends[side];
                (end.received(), end.input_ended())
            })
        };
        let before = activity(pair);
        let mut turn = pair.turn(cx.pool, BUDGET);
        if let Some(until) = *refusal_wait
            && pair.is_withholding_half_close(Side::Client)
            && (pair.ends[Side::Server].received() > 0 || now >= until)
        {
            pair.release_half_close(Side::Client);
            turn = pair.turn(cx.pool, BUDGET);
        }
        let mut has_vm_ended = [false; 2];
        for side in Side::BOTH {
            if pair.has_doubtful_end(side) {
                let end = &pair.ends[side];
                let has_ended = (cx.has_peer_ended)(&end.socket);
                let can_tell = end.is_dead() || self.forward.can_reset(side.other());
                pair.settle_end(
                    side,
                    match has_ended && can_tell {
                        true => Ending::BrokenOff,
                        false => Ending::Whole,
                    },
                );
                has_vm_ended[side] = has_ended;
                turn = pair.turn(cx.pool, BUDGET);
            }
        }
        let mut moved = false;
        for side in Side::BOTH {
            let delivered = pair.delivered(side);
            moved |= delivered > self.counted[side];
            self.forward
                .tally
                .count_delivered(side, delivered - self.counted[side]);
            self.counted[side] = delivered;
        }
        let seen = activity(pair);
        for side in Side::BOTH {
            match &self.slots[side] {
                Some(slot) if has_vm_ended[side] && side == Side::Server => slot.note_vm_end(now),
                Some(slot) if seen[side] != before[side] => slot.note_answer(now),
                _ => {}
            }
        }
        if moved {
            self.idle.note_bytes(now);
        }
        if pair.is_half_closed() {
            self.idle.note_half_close(now);
        }
        if has_vm_ended.contains(&true) {
            EndReason::VmGone.note_in(&mut self.why);
        }
        let ended = Side::BOTH.map(|side| how_ended(&pair.ends[side]));
        let ended = Side::BOTH.into_iter().zip(ended);
        for (side, how) in ended.filter_map(|(side, how)| Some((side, how?))) {
            reason_of_end(side, how).note_in(&mut self.why);
        }
        match turn {
            PairTurn::Again => return cx.has_more_work = true,
            PairTurn::Done => return self.close_pair(cx),
            PairTurn::Wait
                if pair.is_withholding_half_close(Side::Client) && refusal_wait.is_some() =>
            {
                if let Some(until) = *refusal_wait {
                    self.wake_by(until);
                }
            }
            // A half-close that is held back may wait for an end that never comes: that peer may
            // not pass on its own end, or may wait for ours. It is waited for as long as bytes
            // move.
            PairTurn::Wait
                if pair.is_ending()
                    || pair.is_withholding_half_close(Side::Client)
                    || pair.is_withholding_half_close(Side::Server) =>
            {
                if moved && !pair.is_ending() {
                    *drain_deadline = None;
                }
                let end =
                    *drain_deadline.get_or_insert(after(now, self.forward.rule.timeouts.drain));
                if now >= end {
                    let gone = Side::BOTH
                        .into_iter()
                        .find(|side| pair.ends[*side].is_gone());
                    self.end_because(gone.map_or(EndReason::DrainTimeout, |side| {
                        reason_of_end(side, Ending::BrokenOff)
                    }));
                    return self.close_pair(cx);
                }
                self.wake_by(end);
            }
            PairTurn::Wait => {}
        }
        self.cut_if_idle(cx);
    }

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
        self.log_debug(|| debug!(?timeout, "timed out"));
        self.cut_off(why, cx);
        true
    }
}
