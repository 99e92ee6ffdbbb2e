//! Probes: dials of which only the refusal is wanted. It says that the guest runs, and has answered
//! all earlier dials. When one may be sent is decided by the VM's gate.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::dial;
use crate::engine::connection::{Connection, Dialled};
use crate::engine::relay::Side;
use crate::stream::endpoint::Target;

use super::queues::{FULL_PAUSE, ProbeQueue};
use super::set::Connections;
use crate::engine::admission::quotas::Holder;
use crate::engine::admission::{Admission, Gate, Slot};
use crate::engine::forward::Forward;
use crate::engine::table::Id;
use crate::proxy::driver::Driver;
use crate::proxy::shared::TurnContext;

/// How often a pending probe is checked, if no wake-up comes before.
const PROBE_LOOK: Duration = Duration::from_secs(1);

impl<D: Driver> Connections<D> {
    /// Sends a probe: dials a port on which nobody listens. However long the answer takes, the
    /// probe is not given up, since it may come at any time.
    ///
    /// Returns false if it could not be sent and may be tried later. Returns true as well if the
    /// dial shows that there is no VM: then no answer is waited for any more.
    pub(super) fn send_probe(
        &mut self,
        slot: Slot,
        forward: &Arc<Forward>,
        cx: &mut TurnContext<'_, D>,
    ) -> bool {
        let Some(gate) = &forward.gates[Side::Server] else {
            return false;
        };
        let address = gate.vm().probe_address();
        let Some(Target::Endpoint(probe)) = address.as_ref().map(Target::of) else {
            return false;
        };
        let (mut stream, identity) = match cx.driver.connect(&probe, forward.rule.timeouts.dial) {
            Ok(connected) => connected,
            Err(e) => {
                drop(slot);
                // A full backlog (the device hangs), or the lack of a descriptor here, says nothing
                // about the VM: what the guest has not answered is still pending.
                let gone = dial::proves_no_listener(&e) && gate.can_be_probed();
                if gone {
                    gate.note_vm_gone();
                }
                return gone;
            }
        };
        let id = self.table.next_id();
        let has_listener_ended = cx.driver.has_peer_ended(&stream);
        let watched = cx.driver.watch(&mut stream, id.token(Side::Server));
        let dialled = Dialled {
            socket: stream,
            identity,
            has_listener_ended,
            watched,
        };
        cx.shared.inboxes[cx.index]
            .load
            .fetch_add(1, Ordering::Relaxed);
        cx.shared.note_begin(forward, Holder::Probes);
        let probe =
            Connection::for_probe(Arc::clone(forward), probe, dialled, slot, cx.phase, cx.now);
        self.table.insert(probe);
        self.call_connection(id, cx, Connection::begin_probe);
        true
    }

    /// Sends a probe to a guest that has been silent for long. This happens once in a silence, so
    /// the search for a forward may grow with their number.
    pub(in crate::proxy) fn probe_silent_vm(
        &mut self,
        gate: &Arc<Gate>,
        cx: &mut TurnContext<'_, D>,
    ) {
        let leads_there = |forward: &&Arc<Forward>| {
            let its = forward.gates[Side::Server].as_ref();
            its.is_some_and(|its| Arc::ptr_eq(its, gate))
        };
        let forward = cx.shared.forwards().iter().find(leads_there).cloned();
        let Some(forward) = forward else {
            return;
        };
        let wake = cx.shared.inboxes[cx.index].slot_waker();
        let is_sent = match gate.admit_probe(cx.now, cx.index, wake) {
            Admission::Go(slot) | Admission::Probe(slot) => self.send_probe(slot, &forward, cx),
            // The next look at the VM tries again.
            Admission::At(_) => return,
            Admission::Full(_) => false,
        };
        if !is_sent {
            gate.note_missing_probe();
        }
    }

    /// Queues a connection for a turn once the guest has answered its dial, or a later one.
    pub(super) fn queue_probe(&mut self, id: Id, forward: &Arc<Forward>, now: Instant) {
        let Some(gate) = &forward.gates[Side::Server] else {
            return;
        };
        match self
            .probes
            .iter_mut()
            .find(|it| Arc::ptr_eq(&it.gate, gate))
        {
            Some(probes) => probes.waiting.push(id),
            None => self.probes.push(ProbeQueue {
                gate: Arc::clone(gate),
                waiting: vec![id],
                next: now,
                not_before: None,
            }),
        }
    }

    /// Returns the time at which a probe is to be looked after.
    pub(super) fn next_probe(&self) -> Option<Instant> {
        self.probes.iter().map(|probes| probes.next).min()
    }

    /// Makes the connections ready whose dials were answered, and sends a probe for those that are
    /// left.
    pub(super) fn probe_turns(&mut self, cx: &mut TurnContext<'_, D>) {
        for mut probes in std::mem::take(&mut self.probes) {
            let mut unanswered = None;
            let waiting = std::mem::take(&mut probes.waiting);
            for id in waiting {
                let Some(connection) = self.table.get_mut(id) else {
                    continue;
                };
                match connection.is_answered() {
                    Some(true) => self.make_ready(id),
                    Some(false) => {
                        unanswered = Some(Arc::clone(&connection.forward));
                        probes.waiting.push(id);
                    }
                    None => {}
                }
            }
            if let Some(forward) = unanswered {
                probes.next = match probes.not_before.filter(|at| cx.now < *at) {
                    Some(at) => at,
                    None => self.send_probe_for(&mut probes, &forward, cx),
                };
                self.probes.push(probes);
            }
        }
    }

    /// Sends a probe if none is pending. Returns when to check again.
    fn send_probe_for(
        &mut self,
        probes: &mut ProbeQueue,
        forward: &Arc<Forward>,
        cx: &mut TurnContext<'_, D>,
    ) -> Instant {
        let wake = cx.shared.inboxes[cx.index].slot_waker();
        let slot = match probes.gate.admit_probe(cx.now, cx.index, wake) {
            Admission::Go(slot) | Admission::Probe(slot) => slot,
            Admission::At(at) => return at.min(cx.now + PROBE_LOOK),
            Admission::Full(_) => return cx.now + FULL_PAUSE,
        };
        if self.send_probe(slot, forward, cx) {
            return cx.now + PROBE_LOOK;
        }
        if !probes.gate.can_be_probed() {
            for &id in &probes.waiting {
                self.call_connection(id, cx, Connection::prove_by_silence);
            }
        }
        let again = cx.now + FULL_PAUSE;
        probes.not_before = Some(again);
        again
    }
}
