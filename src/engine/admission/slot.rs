//! What a connection holds of its VM's connections, and what a forward keeps of them; given back by being dropped.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::engine::health::VmIdentity;
use crate::engine::id::ForwardId;

use super::quotas::Holder;
use super::{Gate, PROBE_PATIENCE};

/// One of the connections that a VM may have. It is dropped after its socket was closed.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(super) gate: Arc<Gate>,
    pub(super) holder: Holder,
    /// Of the VM that it was taken of; one that was started anew has another.
    pub(super) epoch: u64,
    pub(super) stage: Stage,
}

/// How far a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The next free one is to be its.
    Queued,
    /// It is taken, and its dial may be made.
    Admitted,
    /// It is taken by the dial of this number.
    Dialled(u64),
    /// It is taken by a guest that has dialled us.
    Accepted,
}

impl Slot {
    /// Returns whether its dial may be made, or was made.
    pub(crate) fn is_admitted(&self) -> bool {
        self.stage != Stage::Queued
    }

    /// Returns the number of its dial, once that was made.
    fn number(&self) -> Option<u64> {
        match self.stage {
            Stage::Dialled(number) => Some(number),
            _ => None,
        }
    }

    /// Takes that the device has got the dial: that of the VM that `vm` is the identity of.
    pub(crate) fn note_dial(&mut self, vm: Option<VmIdentity>, now: Instant) {
        let gate = &self.gate;
        let mut state = gate.state();
        state.has_connect_socket = matches!(vm, Some(VmIdentity::Socket(_)));
        state.told = vm.map(|_| now).or(state.told);
        let seen = vm.and_then(|vm| gate.note_identity(&mut state, vm, now));
        if state.epoch == self.epoch {
            state.pending = state.pending.saturating_sub(1);
        } else {
            // It was admitted to another VM, and this one has it now.
            self.epoch = state.epoch;
            state.quotas.take(self.holder);
        }
        let news = state.health.mark_up(now);
        let number = gate.dialled.fetch_add(1, Ordering::Relaxed) + 1;
        self.stage = Stage::Dialled(number);
        drop(state);
        gate.log_change(seen.or(news), None);
    }

    /// Notes that a byte or an end came from the guest on this connection, or the connection itself.
    pub(crate) fn note_answer(&self, now: Instant) {
        let gate = &self.gate;
        if let Some(number) = self.number()
            && gate.answered.load(Ordering::Relaxed) < number
        {
            gate.answered.fetch_max(number, Ordering::Relaxed);
        }
        // The lock is taken once a second: what an older VM left behind is no sign of this one.
        if gate.heard.is_news(now) && gate.state().epoch == self.epoch {
            gate.heard.note(now);
        }
    }

    /// Returns whether the guest has answered this dial, or one behind it. If it was refused, that can be read now.
    pub(crate) fn is_answered(&self) -> bool {
        // What another VM answers says nothing, nor does that this one has gone.
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
        // A probe that was lost does not make room for another before its time.
        let is_lost = self.number().is_some_and(|number| number > answered);
        if self.holder == Holder::Probes && !is_lost {
            state.next_probe = None;
            state.patience = PROBE_PATIENCE;
        }
        if self.stage == Stage::Admitted {
            state.pending = state.pending.saturating_sub(1);
        }
        state.quotas.give_back(self.holder);
        state.wake();
    }
}

/// The slots that a forward keeps.
#[derive(Debug)]
pub(crate) struct Reservation {
    pub(super) gate: Arc<Gate>,
    pub(super) forward: ForwardId,
    pub(super) holds: Option<bool>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        state.quotas.give_up(Holder::Forward(self.forward));
        if let Some(holds) = self.holds {
            state.forwards[usize::from(holds)] -= 1;
        }
        state.keep_for_probes();
        state.wake();
    }
}
