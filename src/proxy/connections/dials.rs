//! The dials that wait for a slot of their VM, in one queue per forward, so that a busy forward
//! does not delay the others. Whether a dial may go is decided by the VM's gate.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::relay::Side;

use super::queues::{DialQueue, FULL_PAUSE};
use super::set::Connections;
use crate::engine::admission::Admission;
use crate::engine::forward::Forward;
use crate::engine::table::Id;
use crate::proxy::driver::Driver;
use crate::proxy::shared::TurnContext;

/// How often a VM is looked at while one of its caps is reached.
const FULL_LOOK: Duration = Duration::from_millis(50);

impl<D: Driver> Connections<D> {
    /// Queues a connection for a slot of its VM.
    pub(super) fn queue_dial(
        &mut self,
        id: Id,
        forward: &Arc<Forward>,
        cx: &mut TurnContext<'_, D>,
    ) {
        let Some(gate) = &forward.gates[Side::Server] else {
            return;
        };
        // If the gate has queues already, they have their turns first.
        let is_first_queue = self.dials.iter().all(|it| !Arc::ptr_eq(&it.gate, gate));
        let its = |queue: &DialQueue| Arc::ptr_eq(&queue.forward, forward);
        match self.dials.iter().position(its) {
            Some(queue) => self.dials[queue].waiting.push_back(id),
            None => self.dials.push_back(DialQueue {
                forward: Arc::clone(forward),
                gate: Arc::clone(gate),
                waiting: VecDeque::from([id]),
                next: cx.now,
            }),
        }
        if is_first_queue {
            self.dial_turns(cx);
        }
    }

    /// Returns the time at which a gate is to be asked again.
    pub(super) fn next_dial(&self) -> Option<Instant> {
        self.dials.iter().map(|queue| queue.next).min()
    }

    /// Dials for as many waiting connections as their VMs' gates admit, one of each queue in turn.
    pub(super) fn dial_turns(&mut self, cx: &mut TurnContext<'_, D>) {
        // A dial that fails at once may be queued again: it has its turn later.
        let mut turns: usize = self.dials.iter().map(|queue| queue.waiting.len()).sum();
        let mut not_due = 0;
        while turns > 0 && not_due < self.dials.len() {
            let Some(mut queue) = self.dials.pop_front() else {
                return;
            };
            match queue.next <= cx.now && self.dial_turn(&mut queue, cx) {
                true => (turns, not_due) = (turns - 1, 0),
                false => not_due += 1,
            }
            if !queue.waiting.is_empty() {
                self.dials.push_back(queue);
            }
        }
    }

    /// Dials for the first waiting connection. Returns false if it can't now.
    fn dial_turn(&mut self, queue: &mut DialQueue, cx: &mut TurnContext<'_, D>) -> bool {
        let Some(&id) = queue.waiting.front() else {
            return false;
        };
        // A connection whose client has gone, or was refused, needs no dial.
        let connection = self.table.get_mut(id);
        if !connection.is_some_and(|it| it.is_waiting()) {
            queue.waiting.pop_front();
            return true;
        }
        match queue.gate.admit(queue.forward.id, cx.now) {
            Admission::Go(slot) => {
                queue.waiting.pop_front();
                self.call_connection(id, cx, |it, to| it.take_slot(slot, to));
                return true;
            }
            Admission::At(at) => queue.next = at,
            Admission::Probe(slot) => {
                if self.send_probe(slot, &queue.forward, cx) {
                    return true;
                }
                queue.next = cx.now + FULL_PAUSE;
            }
            Admission::Full(why) => {
                queue.forward.note_wait(&why, cx.now);
                queue.next = cx.now + FULL_PAUSE;
                // Another VM may be there by now, whose caps are not reached.
                if queue.gate.begin_look(cx.now, FULL_LOOK) {
                    cx.driver.look_at_vm(&queue.gate);
                }
                let table = &mut self.table;
                queue.waiting.retain(|id| {
                    let connection = table.get_mut(*id);
                    connection.is_some_and(|it| it.take_full(why))
                });
            }
        }
        false
    }
}
