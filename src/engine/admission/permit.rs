//! What is got at the gate, and given back when it is dropped: leave to dial, places, turns.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Gate, PROBE_PATIENCE, PROOFS};
use crate::engine::health::Sign;
use crate::engine::id::ForwardId;

/// One of the connections that the VM has now; dropped when its socket is closed.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) gate: Arc<Gate>,
    pub(crate) forward: ForwardId,
    pub(crate) epoch: u64,
}

impl Place {
    /// Notes that a byte or an end came from the guest on this connection, or the connection
    /// itself.
    pub(crate) fn heard(&self, now: Instant) {
        let gate = &self.gate;
        // The lock is taken once a second: what an older VM left behind is no sign of this one.
        if gate.heard.is_news(now) && gate.state().epoch == self.epoch {
            gate.heard.note(now);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        if state.epoch == self.epoch {
            state.shares.give_back(self.forward);
            state.wake();
        }
    }
}

/// An accepted client's right to the next place.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(crate) gate: Arc<Gate>,
    pub(crate) forward: ForwardId,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        state.shares.unqueue(self.forward);
        state.wake();
    }
}

/// The places that a forward keeps.
#[derive(Debug)]
pub(crate) struct Reservation {
    pub(crate) gate: Arc<Gate>,
    pub(crate) forward: ForwardId,
    pub(crate) holds: Option<bool>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        state.shares.give_up(self.forward);
        if let Some(holds) = self.holds {
            state.forwards[usize::from(holds)] -= 1;
        }
        if state.forwards[1] == 0 {
            state.shares.give_up(PROOFS);
        }
        state.wake();
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Dial,
    /// To find out whether the guest lives.
    Probe,
    /// To find out whether it has answered the dials before.
    Proof,
}

/// Leave to dial the VM once, and the place of the connection that comes of it.
#[derive(Debug)]
pub(crate) struct Permit {
    pub(crate) place: Place,
    /// The number of its dial, once there was one.
    pub(crate) number: Option<u64>,
    pub(crate) kind: Kind,
}

impl Permit {
    /// Takes that the device has got the dial: that of the VM that `vm` is a sign of.
    pub(crate) fn dialled(&mut self, vm: Option<Sign>, now: Instant) {
        let gate = &self.place.gate;
        let mut state = gate.state();
        state.has_connect_socket = matches!(vm, Some(Sign::Socket(_)));
        state.told = vm.map(|_| now).or(state.told);
        let seen = vm.and_then(|vm| gate.seen(&mut state, vm, now));
        if state.epoch == self.place.epoch {
            state.pending = state.pending.saturating_sub(1);
        } else {
            // It was admitted to another VM, and this one has it now.
            self.place.epoch = state.epoch;
            state.shares.take(self.place.forward);
        }
        let news = state.presence.connected(now);
        self.number = Some(gate.dialled.fetch_add(1, Ordering::Relaxed) + 1);
        drop(state);
        gate.tell(seen.or(news), None);
    }

    /// Notes that a byte or an end came from the guest on this connection just now.
    pub(crate) fn heard(&self, now: Instant) {
        self.answered();
        self.place.heard(now);
    }

    /// Notes that something came from the guest on this connection, now or before.
    pub(crate) fn answered(&self) {
        let gate = &self.place.gate;
        if let Some(number) = self.number
            && gate.answered.load(Ordering::Relaxed) < number
        {
            gate.answered.fetch_max(number, Ordering::Relaxed);
        }
    }

    /// Whether the guest has answered this dial, or one behind it. If it was refused, that can be read now.
    pub(crate) fn is_answered(&self) -> bool {
        let gate = &self.place.gate;
        // What another VM answers says nothing, nor does that this one has gone.
        let same = gate.state().epoch == self.place.epoch;
        let answered = gate.answered.load(Ordering::Relaxed);
        same && self.number.is_some_and(|number| number <= answered)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.place.gate.state();
        if state.epoch == self.place.epoch {
            let answered = self.place.gate.answered.load(Ordering::Relaxed);
            // One that was lost does not make room for another before its time.
            let lost = self.number.is_some_and(|number| number > answered);
            if self.kind == Kind::Probe && !lost {
                state.next_probe = None;
                state.patience = PROBE_PATIENCE;
            }
            if self.kind == Kind::Proof && !lost {
                state.next_proof = None;
            }
            if self.number.is_none() {
                state.pending = state.pending.saturating_sub(1);
            }
        }
    }
}
