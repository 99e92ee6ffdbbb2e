//! Probes: dials of which only the refusal is wanted. It tells that the guest lives, and has answered all dials before.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::address::{Address, HyperkitAddress, PORT_ANY};
use crate::dial;
use crate::engine::connection::{Connection, Dialled};
use crate::engine::relay::Side;
use crate::stream::endpoint::Endpoint;

use super::{Connections, FULL_PAUSE};
use crate::engine::admission::quotas::Holder;
use crate::engine::admission::{Admission, Gate, Slot};
use crate::engine::forward::Forward;
use crate::engine::table::Id;
use crate::proxy::driver::Driver;
use crate::proxy::shared::TurnContext;

/// When a probe that is under way is asked after, if no wake-up tells of it before.
const PROBE_LOOK: Duration = Duration::from_secs(1);

/// Connections of this worker to one VM of which it is not known yet whether the guest has taken them.
#[derive(Debug)]
pub(in crate::proxy) struct ProbeQueue {
    gate: Arc<Gate>,
    waiting: Vec<Id>,
    next: Instant,
    /// No probe is tried before this time: the last one could not be sent. Its slot, given back,
    /// wakes the other workers, whose own may fail as well and wake this one.
    not_before: Option<Instant>,
}

impl<D: Driver> Connections<D> {
    /// Dials a port on which nobody listens: that the guest refuses tells that it lives, and has taken all dials before.
    ///
    /// However long that takes, this one is never given up: its answer may come at any time. False if it could not be
    /// sent now.
    pub(super) fn probe(
        &mut self,
        slot: Slot,
        forward: &Arc<Forward>,
        cx: &mut TurnContext<'_, D>,
    ) -> bool {
        let (Address::Hyperkit(target), Some(gate)) =
            (&forward.rule.connect, &forward.gates[Side::Server])
        else {
            return false;
        };
        let probe = HyperkitAddress {
            vm: target.vm.clone(),
            // To which nothing can be bound.
            port: PORT_ANY,
        };
        let (mut stream, identity) = match cx.driver.connect(&Endpoint::Hyperkit(probe)) {
            Ok(connected) => connected,
            Err(e) => {
                drop(slot);
                // A full backlog (the device stands still) or no descriptor left here says nothing of the VM: what the
                // guest has not answered is still there.
                let gone = dial::proves_no_listener(&e) && gate.can_be_probed();
                if gone {
                    gate.vm_is_gone();
                }
                return gone;
            }
        };
        let id = self.table.next_id();
        let watched = cx.driver.watch(&mut stream, id.token(Side::Server));
        let dialled = Dialled {
            socket: stream,
            identity,
            is_inherited: false,
            watched,
        };
        cx.shared.inboxes[cx.index]
            .load
            .fetch_add(1, Ordering::Relaxed);
        cx.shared.begins(forward, Holder::Probes);
        let probe = Connection::probe(Arc::clone(forward), dialled, slot, cx.phase, cx.now);
        self.table.insert(probe);
        self.with(id, cx, Connection::begin_probe);
        true
    }

    /// Has a connection take its turn once the guest has answered its dial, or one behind it.
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

    pub(super) fn next_probe(&self) -> Option<Instant> {
        self.probes.iter().map(|probes| probes.next).min()
    }

    /// Goes on with those whose dials have been answered, and sends a probe for those that are left.
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
                    None => self.send_probe(&mut probes, &forward, cx),
                };
                self.probes.push(probes);
            }
        }
    }

    /// Sends a probe if none is under way; when that is to be looked at again.
    fn send_probe(
        &mut self,
        probes: &mut ProbeQueue,
        forward: &Arc<Forward>,
        cx: &mut TurnContext<'_, D>,
    ) -> Instant {
        let wake = cx.shared.inboxes[cx.index].waker();
        let slot = match probes.gate.admit_probe(cx.now, cx.index, &wake) {
            Admission::Go(slot) | Admission::Probe(slot) => slot,
            Admission::At(at) => return at.min(cx.now + PROBE_LOOK),
            Admission::Full(_) => return cx.now + FULL_PAUSE,
        };
        if self.probe(slot, forward, cx) {
            return cx.now + PROBE_LOOK;
        }
        if !probes.gate.can_be_probed() {
            for &id in &probes.waiting {
                self.with(id, cx, Connection::prove_by_silence);
            }
        }
        let again = cx.now + FULL_PAUSE;
        probes.not_before = Some(again);
        again
    }
}
