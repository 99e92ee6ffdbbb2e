//! Who waits for leave to dial a VM: one queue a forward, so that a noisy one is in nobody's way.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::relay::SERVER;

use super::worker::Worker;
use super::world::World;
use crate::engine::admission::{Admission, Gate};
use crate::engine::forward::Forward;
use crate::engine::table::Id;

/// How long a dial waits when a cap of its VM is reached before it asks again.
pub(super) const FULL_PAUSE: Duration = Duration::from_millis(10);

/// How often a VM is looked at while a cap of it is reached.
const FULL_LOOK: Duration = Duration::from_millis(50);

/// The connections of one forward and this worker that wait for leave to dial, first come, first served.
#[derive(Debug)]
pub(crate) struct DialQueue {
    forward: Arc<Forward>,
    gate: Arc<Gate>,
    waiting: VecDeque<Id>,
    next: Instant,
}

impl<W: World> Worker<W> {
    pub(super) fn queue_dial(&mut self, id: Id, forward: &Arc<Forward>, now: Instant) {
        let Some(gate) = &forward.gates[SERVER] else {
            return;
        };
        // Those of other forwards have their turns before it.
        let alone = self.queues.iter().all(|it| !Arc::ptr_eq(&it.gate, gate));
        let its = |queue: &DialQueue| Arc::ptr_eq(&queue.forward, forward);
        match self.queues.iter().position(its) {
            Some(queue) => self.queues[queue].waiting.push_back(id),
            None => self.queues.push_back(DialQueue {
                forward: Arc::clone(forward),
                gate: Arc::clone(gate),
                waiting: VecDeque::from([id]),
                next: now,
            }),
        }
        if alone {
            self.dial_turns(now);
        }
    }

    pub(super) fn next_dial(&self) -> Option<Instant> {
        self.queues.iter().map(|queue| queue.next).min()
    }

    /// Dials as many of those who wait as their VMs' gates let through, one of each queue after the other.
    pub(super) fn dial_turns(&mut self, now: Instant) {
        // A dial that fails at once may come back to the end of its queue: that one has its turn later.
        let mut turns: usize = self.queues.iter().map(|queue| queue.waiting.len()).sum();
        let mut idle = 0;
        while turns > 0 && idle < self.queues.len() {
            let Some(mut queue) = self.queues.pop_front() else {
                return;
            };
            match queue.next <= now && self.dial_turn(&mut queue, now) {
                true => (turns, idle) = (turns - 1, 0),
                false => idle += 1,
            }
            if !queue.waiting.is_empty() {
                self.queues.push_back(queue);
            }
        }
    }

    /// Lets the first who waits dial; false if it can't now.
    fn dial_turn(&mut self, queue: &mut DialQueue, now: Instant) -> bool {
        let Some(&id) = queue.waiting.front() else {
            return false;
        };
        // Who has left since, or was refused, needs no dial.
        let connection = self.conns.get_mut(id);
        if !connection.is_some_and(|it| it.is_waiting()) {
            queue.waiting.pop_front();
            return true;
        }
        match queue.gate.admit(queue.forward.id, now) {
            Admission::Go(slot) => {
                queue.waiting.pop_front();
                self.with(id, now, |it, cx| it.take_slot(slot, cx));
                return true;
            }
            Admission::At(at) => queue.next = at,
            Admission::Probe(slot) => {
                if self.probe(slot, &queue.forward, now) {
                    return true;
                }
                queue.next = now + FULL_PAUSE;
            }
            Admission::Full(why) => {
                queue.next = now + FULL_PAUSE;
                // Another VM may be there by now, which has none of that.
                self.look_at_vm(&queue.gate, now, FULL_LOOK);
                let conns = &mut self.conns;
                queue.waiting.retain(|id| {
                    let connection = conns.get_mut(*id);
                    connection.is_some_and(|it| it.take_full(why))
                });
            }
        }
        false
    }
}
