//! The requests to a gate: dials, probes, the queueing of clients, and reservations.

use std::sync::Arc;
use std::time::Instant;

use crate::engine::id::ForwardId;
use crate::engine::rule::WhileDown;

use super::gate::{Full, Gate, GateState, LONGEST_PATIENCE, LOST_PROBES, PROBE_PATIENCE, SlotWake};
use super::quotas::Holder;
use super::slot::{Reservation, Slot, Stage};

/// The gate's answer to a request for a dial.
#[derive(Debug)]
pub(crate) enum Admission {
    Go(Slot),
    /// It is too soon: the caller asks again at that time.
    At(Instant),
    /// A cap is reached: the caller asks again later.
    Full(Full),
    /// The guest has answered nothing for so long that only a probe may go, to find out whether it
    /// runs.
    Probe(Slot),
}

impl Gate {
    /// Asks for a dial of `forward`.
    pub(crate) fn admit(self: &Arc<Gate>, forward: ForwardId, now: Instant) -> Admission {
        let mut state = self.state();
        match self.why_not(&mut state, Holder::Forward(forward), now) {
            Err(why) => why,
            // Only a probe may go then.
            Ok(()) if self.is_unanswered(&state) => self.begin_probe(&mut state, now),
            Ok(()) => {
                state.patience = PROBE_PATIENCE;
                Admission::Go(self.make_slot(&mut state, Holder::Forward(forward), Stage::Admitted))
            }
        }
    }

    /// Counts a dial of `holder` towards the pace.
    ///
    /// # Errors
    /// Returns why none may go now.
    fn why_not(
        &self,
        state: &mut GateState,
        holder: Holder,
        now: Instant,
    ) -> Result<(), Admission> {
        if state.is_hanging(now) {
            return Err(Admission::Full(Full::Hangs));
        }
        // A VM with a single slot reserves none for probes, so its probe may exceed the cap.
        let is_exempt = holder == Holder::Probes && state.quotas.cap() <= 1;
        if state.quotas.free_for(holder) == 0 && !is_exempt {
            state.wanted_at = Some(now);
            return Err(Admission::Full(state.why_full(holder)));
        }
        let limit = state.unanswered_limit;
        let is_waiting = state.next_probe.is_some_and(|at| now < at);
        let is_lost = self.unanswered() + state.pending >= limit.saturating_add(LOST_PROBES);
        if self.is_unanswered(state) && (is_waiting || is_lost) {
            return Err(Admission::Full(Full::Unanswered(limit)));
        }
        // A probe counts towards the pace as well.
        state.keep_pace(now).map_err(Admission::At)
    }

    /// Returns whether the guest has answered nothing for so long that only a probe may go.
    fn is_unanswered(&self, state: &GateState) -> bool {
        self.unanswered() + state.pending >= state.unanswered_limit
    }

    fn begin_probe(self: &Arc<Gate>, state: &mut GateState, now: Instant) -> Admission {
        state.next_probe = Some(now + state.patience);
        state.patience = match self.is_unanswered(state) {
            true => (state.patience * 2).min(LONGEST_PATIENCE),
            false => PROBE_PATIENCE,
        };
        Admission::Probe(self.make_slot(state, Holder::Probes, Stage::Admitted))
    }

    /// Asks for a probe: a dial of a port on which nobody listens. Its refusal says that the guest
    /// has answered all dials before it. One probe at a time serves all workers; a worker that has
    /// to wait for it is woken when its answer has come.
    pub(crate) fn admit_probe(
        self: &Arc<Gate>,
        now: Instant,
        worker: usize,
        wake: &SlotWake,
    ) -> Admission {
        let mut state = self.state();
        if let Some(at) = state.next_probe.filter(|&at| now < at) {
            state.waiting_for_probe.add(worker, wake);
            return Admission::At(at);
        }
        match self.why_not(&mut state, Holder::Probes, now) {
            Ok(()) => self.begin_probe(&mut state, now),
            Err(why) => why,
        }
    }

    /// Takes a slot of a holder, or queues for one.
    pub(super) fn make_slot(
        self: &Arc<Gate>,
        state: &mut GateState,
        holder: Holder,
        stage: Stage,
    ) -> Slot {
        match stage {
            Stage::Queued => state.quotas.queue(holder),
            _ => state.quotas.take(holder),
        }
        if stage == Stage::Admitted {
            state.pending += 1;
        }
        Slot {
            gate: Arc::clone(self),
            holder,
            epoch: state.epoch,
            stage,
            is_lost: false,
            drain: None,
        }
    }

    /// Queues a client, whether there will be a slot for it or not.
    pub(crate) fn queue_always(self: &Arc<Gate>, forward: ForwardId) -> Slot {
        let holder = Holder::Forward(forward);
        self.make_slot(&mut self.state(), holder, Stage::Queued)
    }

    /// Queues a client for which there will be a slot.
    ///
    /// # Errors
    /// Returns why there is none now. `wake` is called when that may have changed.
    pub(crate) fn queue(
        self: &Arc<Gate>,
        forward: ForwardId,
        worker: usize,
        wake: &SlotWake,
    ) -> Result<Slot, Full> {
        let holder = Holder::Forward(forward);
        let mut state = self.state();
        if state.quotas.may_queue(holder) {
            return Ok(self.make_slot(&mut state, holder, Stage::Queued));
        }
        state.waiting_for_slot.add(worker, wake);
        Err(state.why_full(holder))
    }

    /// Reserves slots for a forward. If it leads to the VM, `while_down` says what it does with its
    /// clients while the VM is down.
    ///
    /// # Errors
    /// Returns how many slots can be reserved, if there are too few.
    pub(crate) fn reserve(
        self: &Arc<Gate>,
        forward: ForwardId,
        slots: usize,
        while_down: Option<WhileDown>,
    ) -> Result<Reservation, usize> {
        let mut state = self.state();
        // A probe needs a slot besides that of the dial, where there are two.
        let holds = while_down == Some(WhileDown::HoldsClients);
        let probes = holds && self.traits.can_be_probed && state.quotas.cap() > 1;
        if probes && state.forwards.holding == 0 {
            state.quotas.reserve(Holder::Probes, 1)?;
        }
        let reserved = state.quotas.reserve(Holder::Forward(forward), slots);
        if let (Ok(()), Some(what)) = (reserved, while_down) {
            *state.forwards.count_of(what) += 1;
        }
        state.reserve_for_probes();
        reserved.map(|()| Reservation {
            gate: Arc::clone(self),
            forward,
            while_down,
            dialled_by: None,
        })
    }

    /// Returns whether the VM has a limit of connections.
    #[cfg(all(test, target_os = "linux"))]
    pub(crate) fn has_limit(&self) -> bool {
        self.state().limit().is_some()
    }

    /// Returns whether [`queue`](Gate::queue) would admit a client.
    #[cfg(all(test, target_os = "linux"))]
    pub(crate) fn would_queue(&self, forward: ForwardId) -> bool {
        self.state().quotas.may_queue(Holder::Forward(forward))
    }
}
