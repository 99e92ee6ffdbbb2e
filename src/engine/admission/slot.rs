//! A connection's slot at a VM's gate, and a forward's reservation of slots. Both are given back by
//! being dropped.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::engine::health::VmIdentity;
use crate::engine::id::ForwardId;

use super::quotas::Holder;
use super::{Gate, PROBE_PATIENCE};

/// One of the connections that a VM may have. It is dropped after the connection's socket was
/// closed.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(super) gate: Arc<Gate>,
    pub(super) holder: Holder,
    /// The epoch of the VM that the slot was taken of; a VM that was restarted has another.
    pub(super) epoch: u64,
    pub(super) stage: Stage,
}

/// How far a slot has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Waits for a free slot.
    Queued,
    /// Is taken; the dial may be made.
    Admitted,
    /// Is taken by the dial of this number.
    Dialled(u64),
    /// Is taken by a dial from the guest.
    Accepted,
}

impl Slot {
    /// Returns whether the dial may be made, or was made.
    pub(crate) fn is_admitted(&self) -> bool {
        self.stage != Stage::Queued
    }

    /// Returns the number of the dial, once it was made.
    fn number(&self) -> Option<u64> {
        match self.stage {
            Stage::Dialled(number) => Some(number),
            _ => None,
        }
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
            // It was admitted to another VM; this one has the dial now.
            self.epoch = state.epoch;
            state.quotas.take(self.holder);
        }
        let news = state.health.mark_up(now);
        let number = gate.dialled.fetch_add(1, Ordering::Relaxed) + 1;
        self.stage = Stage::Dialled(number);
        drop(state);
        gate.log_change(seen.or(news), None);
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
            gate.heard.note(now);
        }
    }

    /// Returns whether the guest has answered this dial, or a later one. If it was refused, the EOF
    /// can be read now.
    pub(crate) fn is_answered(&self) -> bool {
        // An answer of another VM says nothing, nor does the end of this one.
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
        // A lost probe does not make room for another before its time.
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

/// The slots that a forward has reserved.
#[derive(Debug)]
pub(crate) struct Reservation {
    pub(super) gate: Arc<Gate>,
    pub(super) forward: ForwardId,
    pub(super) holds: Option<bool>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        state.quotas.release(Holder::Forward(self.forward));
        if let Some(holds) = self.holds {
            state.forwards[usize::from(holds)] -= 1;
        }
        state.reserve_for_probes();
        state.wake();
    }
}
