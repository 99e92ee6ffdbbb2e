//! A connection's slot at a VM's gate, and a forward's reservation of slots. Both are given back by
//! being dropped.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::engine::health::VmIdentity;
use crate::engine::id::ForwardId;
use crate::engine::rule::WhileDown;

use super::gate::{Gate, PROBE_PATIENCE};
use super::quotas::Holder;

/// One of the connections that a VM may have. It is dropped after the connection's socket was
/// closed.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(super) gate: Arc<Gate>,
    pub(super) holder: Holder,
    /// The epoch of the VM that the slot was taken of; a VM that was restarted has another.
    pub(super) epoch: u64,
    pub(super) stage: Stage,
    pub(super) is_lost: bool,
    /// The number of the connection's drain, if the guest goes on sending.
    pub(super) drain: Option<u64>,
}

/// Why a drain is to be given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DrainEnd {
    /// It has lasted long enough.
    Due,
    /// It may be in the way: it is given up if clients wait, and it is one of the oldest of the
    /// drains that are more than their part of the slots.
    InTheWay,
}

/// How far a slot has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// No slot is taken yet: a client waits for one.
    Queued,
    /// The slot is taken; the dial may be made.
    Admitted,
    /// The dial of this number has the slot.
    Dialled(u64),
    /// A dial of the guest has it, and is served.
    Accepted,
    /// A dial of the guest has it, and is not served.
    TurnedAway,
    /// A dial of the guest had it, whose connection has ended without the guest.
    Held,
}

impl Slot {
    /// Returns whether the dial may be made, or was made.
    pub(crate) fn is_admitted(&self) -> bool {
        self.stage != Stage::Queued
    }

    /// Returns whether the slot is that of a guest's dial which is not served.
    pub(crate) fn is_turned_away(&self) -> bool {
        self.stage == Stage::TurnedAway
    }

    /// Returns the number of the dial, once it was made.
    fn number(&self) -> Option<u64> {
        match self.stage {
            Stage::Dialled(number) => Some(number),
            _ => None,
        }
    }

    /// Notes that the dial was made, and that the VM that got it has no identity.
    pub(crate) fn note_unidentified_dial(&mut self, now: Instant) {
        self.note_dial(None, now);
    }

    /// Notes that the dial was made. `vm` is the identity of the VM that got it.
    pub(crate) fn note_dial(&mut self, vm: Option<VmIdentity>, now: Instant) {
        let gate = &self.gate;
        let mut state = gate.state();
        state.has_connect_socket = matches!(vm, Some(VmIdentity::Socket(_)));
        state.identified_at = vm.map(|_| now).or(state.identified_at);
        let seen = vm.and_then(|vm| gate.note_identity(&mut state, vm, now));
        if state.epoch == self.epoch {
            state.pending = state.pending.saturating_sub(1);
        } else {
            // The slot was taken of another VM; this one has got the dial.
            self.epoch = state.epoch;
            state.quotas.take(self.holder);
        }
        let news = match gate.is_seen_by_dials() {
            true => None,
            false => state.health.mark_up(now),
        };
        let number = gate.dialled.fetch_add(1, Ordering::Relaxed) + 1;
        let answered = gate.answered.load(Ordering::Relaxed);
        state.silence.note_dial(number, answered, now);
        self.stage = Stage::Dialled(number);
        drop(state);
        gate.log_change(seen.or(news));
    }

    /// Notes that the guest has sent a byte or an EOF on this connection, or has made the
    /// connection.
    pub(crate) fn note_answer(&self, now: Instant) {
        let gate = &self.gate;
        if let Some(number) = self.number()
            && gate.answered.load(Ordering::Relaxed) < number
        {
            gate.answered.fetch_max(number, Ordering::Relaxed);
        }
        // The lock is taken at most once a second: what an older VM left behind says nothing about
        // this one.
        if gate.heard.is_due(now) && gate.state().epoch == self.epoch {
            gate.heard.note_heard(now);
        }
    }

    /// Notes the process that began to listen, and whether it had ended when the dial was made.
    /// Returns whether another one serves the socket: one that has served it before is about to be
    /// gone.
    pub(crate) fn note_listener(&self, process: Option<u32>, has_ended: bool) -> bool {
        let mut state = self.gate.state();
        if state.epoch == self.epoch {
            let process = process.and_then(|id| i32::try_from(id).ok());
            state.process = process.filter(|_| !has_ended);
            state.has_seen_process |= !has_ended;
            return has_ended && !state.has_seen_process;
        }
        has_ended
    }

    /// Notes that the process of the VM that got the dial has ended.
    pub(crate) fn note_vm_end(&self, now: Instant) {
        let mut state = self.gate.state();
        if state.epoch == self.epoch {
            let news = state.health.mark_down(now);
            state.is_looked_for = true;
            self.gate.forget_vm(&mut state);
            drop(state);
            self.gate.log_change(news);
        }
    }

    /// Returns whether a look that was begun after the dial has found its VM gone. If not, another
    /// look is asked for.
    pub(crate) fn check_vm_gone(&self) -> bool {
        let mut state = self.gate.state();
        let is_gone = self
            .number()
            .is_some_and(|number| number <= state.dialled_before_end);
        state.is_look_wanted |= !is_gone;
        is_gone
    }

    /// Notes that the connection is drained, and its guest goes on sending.
    pub(crate) fn note_drain(&mut self) {
        let mut state = self.gate.state();
        if state.epoch == self.epoch && self.drain.is_none() {
            let number = state.next_drain;
            state.next_drain += 1;
            state.drains.push(number);
            self.drain = Some(number);
        }
    }

    /// Notes that the guest sends nothing for now.
    pub(crate) fn forget_drain(&mut self) {
        if let Some(drain) = self.drain.take() {
            self.gate.state().forget_drain(drain);
        }
    }

    /// Returns whether the connection's drain may be given up now. Each has the device put two
    /// replies into its ring, so they keep the pace of dials.
    pub(crate) fn may_give_up_drain(&self, why: DrainEnd, now: Instant) -> bool {
        let mut state = self.gate.state();
        let is_so = match why {
            DrainEnd::Due => true,
            DrainEnd::InTheWay => {
                let rank = self
                    .drain
                    .and_then(|it| state.drains.binary_search(&it).ok());
                rank.is_some_and(|rank| rank < state.drains_in_the_way(now))
            }
        };
        is_so && (state.epoch != self.epoch || state.keep_pace(now).is_ok())
    }

    /// Notes that the connection is closed though its guest has not ended it, and may never do:
    /// then the device's slot is taken as long as the VM lives, where it [can
    /// be](Slot::can_be_lost).
    pub(crate) fn mark_lost(&mut self) {
        self.is_lost = self.can_be_lost();
    }

    /// Notes that the connection has ended though its guest has not ended it, and that its socket
    /// stays open: the slot counts as lost until the guest ends it, too. Returns false, and notes
    /// nothing, if the slot [can't be lost](Slot::can_be_lost) or is of a VM that has gone.
    pub(crate) fn mark_held(&mut self) -> bool {
        let mut state = self.gate.state();
        if !self.gate.traits.loses_slots || state.epoch != self.epoch {
            return false;
        }
        state.quotas.give_back(self.holder);
        state.quotas.take(Holder::Lost);
        self.holder = Holder::Lost;
        if self.stage == Stage::Accepted {
            state.guests = state.guests.saturating_sub(1);
            self.stage = Stage::Held;
        }
        if let Some(drain) = self.drain.take() {
            state.forget_drain(drain);
        }
        state.wake();
        true
    }

    /// Returns whether the VMM keeps the slot of a connection that is closed before its guest has
    /// ended it.
    pub(crate) fn can_be_lost(&self) -> bool {
        self.gate.traits.loses_slots
    }

    /// Returns whether the guest has answered this dial, or a later one. If it was refused, the EOF
    /// can be read now.
    pub(crate) fn is_answered(&self) -> bool {
        // The number of a dial to an earlier VM may be answered by a later one.
        let is_same = self.gate.state().epoch == self.epoch;
        let answered = self.gate.answered.load(Ordering::Relaxed);
        is_same && self.number().is_some_and(|number| number <= answered)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        if self.stage == Stage::Queued {
            state.quotas.unqueue(self.holder);
            return state.wake();
        }
        if state.epoch != self.epoch {
            return;
        }
        let answered = self.gate.answered.load(Ordering::Relaxed);
        // A lost probe keeps the next one waiting for the whole patience.
        let is_unanswered = self.number().is_some_and(|number| number > answered);
        if self.holder == Holder::Probes && !is_unanswered {
            state.next_probe = None;
            state.patience = PROBE_PATIENCE;
        }
        if let Some(drain) = self.drain {
            state.forget_drain(drain);
        }
        match self.stage {
            Stage::Admitted => state.pending = state.pending.saturating_sub(1),
            Stage::Accepted => state.guests = state.guests.saturating_sub(1),
            Stage::Queued | Stage::Dialled(_) | Stage::TurnedAway | Stage::Held => {}
        }
        state.quotas.give_back(self.holder);
        if self.is_lost {
            state.quotas.take(Holder::Lost);
        }
        state.wake();
    }
}

/// The slots that a forward has reserved.
#[derive(Debug)]
pub(crate) struct Reservation {
    pub(super) gate: Arc<Gate>,
    pub(super) forward: ForwardId,
    pub(super) while_down: Option<WhileDown>,
    /// The gate of the VM whose guest dials the forward.
    pub(super) dialled_by: Option<Arc<Gate>>,
}

impl Reservation {
    /// Counts the forward among those that the guest of a VM dials, as long as its slots are
    /// reserved.
    pub(crate) fn count_guest_forward(mut self, gate: &Arc<Gate>) -> Reservation {
        gate.state().guest_forwards += 1;
        self.dialled_by = Some(Arc::clone(gate));
        self
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        state.quotas.release(Holder::Forward(self.forward));
        if let Some(what) = self.while_down {
            *state.forwards.count_of(what) -= 1;
        }
        state.reserve_for_probes();
        state.wake();
        drop(state);
        if let Some(gate) = &self.dialled_by {
            gate.state().guest_forwards -= 1;
        }
    }
}
