//! Dials of which only the refusal is wanted: it tells that the guest lives, and has answered all dials before.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::address::{Address, HyperkitAddress, PORT_ANY};
use crate::dial;
use crate::engine::connection::{Connection, Dialed};
use crate::engine::relay::SERVER;
use crate::stream::endpoint::Endpoint;

use super::queue::FULL_PAUSE;
use super::worker::Worker;
use super::world::World;
use crate::engine::admission::{Admission, Gate, Slot};
use crate::engine::forward::Forward;
use crate::engine::table::Id;

/// When a proof that is under way is asked after, if no wake-up tells of it before.
const PROOF_LOOK: Duration = Duration::from_secs(1);

/// Connections of this worker to one VM of which it is not known yet whether the guest has taken them.
#[derive(Debug)]
pub(crate) struct Proofs {
    gate: Arc<Gate>,
    waiting: Vec<Id>,
    next: Instant,
    /// No proof is tried before this time: the last one could not be sent. Its slot, given back,
    /// wakes the other workers, whose own may fail as well and wake this one.
    not_before: Option<Instant>,
}

impl<W: World> Worker<W> {
    /// Dials a port on which nobody listens: that the guest refuses tells that it lives, and has taken all dials before.
    ///
    /// However long that takes, this one is never given up: its answer may come at any time. False if it could not be
    /// sent now.
    pub(super) fn probe(&mut self, slot: Slot, forward: &Arc<Forward>, now: Instant) -> bool {
        let (Address::Hyperkit(target), Some(gate)) =
            (&forward.rule.connect, &forward.gates[SERVER])
        else {
            return false;
        };
        let probe = HyperkitAddress {
            vm: target.vm.clone(),
            // To which nothing can be bound.
            port: PORT_ANY,
        };
        let (mut stream, sign) = match self.world.connect(&Endpoint::Hyperkit(probe)) {
            Ok(connected) => connected,
            Err(e) => {
                drop(slot);
                // A full backlog (the device stands still) or no descriptor left here says nothing of the VM: what the
                // guest has not answered is still there.
                let gone = dial::says_gone(&e) && gate.can_be_probed();
                if gone {
                    gate.vm_is_gone();
                }
                return gone;
            }
        };
        let id = self.conns.next_id();
        let watched = self.world.watch(&mut stream, id.token(SERVER));
        let dialed = Dialed {
            socket: stream,
            sign,
            is_inherited: false,
            watched,
        };
        self.shared.inboxes[self.index]
            .load
            .fetch_add(1, Ordering::Relaxed);
        self.shared.begins(forward);
        let probe = Connection::probe(Arc::clone(forward), dialed, slot, self.phase, now);
        self.conns.insert(probe);
        self.with(id, now, Connection::begin_probe);
        true
    }

    /// Has a connection take its turn once the guest has answered its dial, or one behind it.
    pub(super) fn queue_proof(&mut self, id: Id, forward: &Arc<Forward>, now: Instant) {
        let Some(gate) = &forward.gates[SERVER] else {
            return;
        };
        match self
            .proofs
            .iter_mut()
            .find(|it| Arc::ptr_eq(&it.gate, gate))
        {
            Some(proofs) => proofs.waiting.push(id),
            None => self.proofs.push(Proofs {
                gate: Arc::clone(gate),
                waiting: vec![id],
                next: now,
                not_before: None,
            }),
        }
    }

    pub(super) fn next_proof(&self) -> Option<Instant> {
        self.proofs.iter().map(|proofs| proofs.next).min()
    }

    /// Goes on with those whose dials have been answered, and sends a proof for those that are left.
    pub(super) fn proof_turns(&mut self, now: Instant) {
        for mut proofs in std::mem::take(&mut self.proofs) {
            let mut unanswered = None;
            let waiting = std::mem::take(&mut proofs.waiting);
            for id in waiting {
                let Some(connection) = self.conns.get_mut(id) else {
                    continue;
                };
                match connection.is_answered() {
                    Some(true) => self.make_ready(id),
                    Some(false) => {
                        unanswered = Some(Arc::clone(&connection.forward));
                        proofs.waiting.push(id);
                    }
                    None => {}
                }
            }
            if let Some(forward) = unanswered {
                proofs.next = match proofs.not_before.filter(|at| now < *at) {
                    Some(at) => at,
                    None => self.send_proof(&mut proofs, &forward, now),
                };
                self.proofs.push(proofs);
            }
        }
    }

    /// Sends a proof if none is under way; when that is to be looked at again.
    fn send_proof(&mut self, proofs: &mut Proofs, forward: &Arc<Forward>, now: Instant) -> Instant {
        let wake = self.shared.inboxes[self.index].waker();
        let slot = match proofs.gate.admit_probe(now, self.index, &wake) {
            Admission::Go(slot) | Admission::Probe(slot) => slot,
            Admission::At(at) => return at.min(now + PROOF_LOOK),
            Admission::Full(_) => return now + FULL_PAUSE,
        };
        if self.probe(slot, forward, now) {
            return now + PROOF_LOOK;
        }
        if !proofs.gate.can_be_probed() {
            for &id in &proofs.waiting {
                self.with(id, now, Connection::prove_by_silence);
            }
        }
        let again = now + FULL_PAUSE;
        proofs.not_before = Some(again);
        again
    }
}
