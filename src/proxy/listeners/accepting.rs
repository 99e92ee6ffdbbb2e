//! Accepting clients: in batches, and in spite of every error. What becomes of an accepted
//! connection is not known here: it is handed over to a worker.
//!
//! A listener that can't accept now waits in one of two ways:
//!
//! - A limit of the process or of the forward is reached (the status says full), or the system
//!   refuses to accept (paused): it tries again every [`PAUSE`] (`pause_listener`).
//! - The VM that the forward leads to has no slot (full as well): its gate tells when it may have
//!   one (`await_vm_slot`).

use std::fmt::Display;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tracing::warn;

use super::Listeners;
use crate::engine::admission::quotas::Holder;
use crate::engine::admission::{Full, GuestSlot, NotServed, Slot};
use crate::engine::counters::add_one;
use crate::engine::forward::Forward;
use crate::engine::relay::Side;
use crate::engine::status::Obstacle;
use crate::listener::nonblocking::{has_client_left, is_broken};
use crate::name::SocketName;
use crate::proxy::driver::Driver;
use crate::proxy::shared::{Accepted, Accepting, TurnContext, WorkerCommand};
use crate::stream::socket::Socket;

/// The connections that one listener may accept before the others have their turn.
const BATCH: usize = 64;

/// The most connections that [`accept_all`](Listeners::accept_all) accepts at one listener.
const LONGEST_BACKLOG: usize = 4096;

/// How long a listener that can't accept now waits before it tries again.
const PAUSE: Duration = Duration::from_millis(20);

/// How many listeners accept in one turn.
const ACCEPTS_PER_TURN: usize = 256;

/// Which of the clients that wait at a listener are accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AcceptedClients {
    /// Those for which the VM that the forward leads to has a slot.
    WithSlot,
    All,
}

impl<D: Driver> Listeners<D> {
    /// Has the listeners accept that are queued.
    pub(super) fn accept_queued(&mut self, cx: &mut TurnContext<'_, D>) {
        for _ in 0..self.schedule.queued().min(ACCEPTS_PER_TURN) {
            let Some(token) = self.schedule.pop_queued() else {
                break;
            };
            if self.entries[token].is_ready() && !self.schedule.is_paused(token) {
                self.accept_from(token, AcceptedClients::WithSlot, cx);
            }
        }
    }

    /// Accepts all clients that wait at the listeners now.
    pub(in crate::proxy) fn accept_all(&mut self, cx: &mut TurnContext<'_, D>) {
        for token in 0..self.entries.all().len() {
            self.accept_waiting(token, cx);
        }
    }

    /// Accepts all clients that wait at a listener now, whether an event has reported them or not.
    pub(super) fn accept_waiting(&mut self, token: usize, cx: &mut TurnContext<'_, D>) {
        if self.accepting == Accepting::Suspended {
            return;
        }
        self.entries[token].latch();
        self.schedule.end_pause(token);
        // As many turns as the longest backlog needs.
        for _ in 0..LONGEST_BACKLOG / BATCH {
            let listening = &self.entries[token];
            let may_accept = listening.is_ready() && listening.listener.is_some();
            if !may_accept || self.schedule.is_paused(token) {
                break;
            }
            self.accept_from(token, AcceptedClients::All, cx);
        }
    }

    /// Accepts clients that wait at a listener.
    fn accept_from(&mut self, token: usize, clients: AcceptedClients, cx: &mut TurnContext<'_, D>) {
        for _ in 0..BATCH {
            if self.accept_next(token, clients, cx).is_break() {
                break;
            }
        }
        if self.wants_turn(token) {
            self.schedule.queue_listener(token);
        }
    }

    /// Accepts the next client. Breaks if none can be accepted after it now.
    fn accept_next(
        &mut self,
        token: usize,
        clients: AcceptedClients,
        cx: &mut TurnContext<'_, D>,
    ) -> ControlFlow<()> {
        let slot = self.admit_next(token, clients, cx)?;
        let listening = &mut self.entries[token];
        let Some(listener) = &listening.listener else {
            return ControlFlow::Break(());
        };
        match cx.driver.accept(listener) {
            Ok((stream, peer)) => {
                listening.unblock();
                let forward = Arc::clone(&listening.forward);
                add_one(&forward.tally.accepted);
                let (guest, served) = take_guest(&forward, &peer, cx);
                cx.shared.note_begin(&forward, Holder::Forward(forward.id));
                let accepted = Accepted {
                    stream,
                    peer,
                    forward,
                    slots: [guest, slot],
                    served,
                };
                self.hand_over(accepted, cx);
                return ControlFlow::Continue(());
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                listening.clear_readiness();
                listening.unblock();
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return ControlFlow::Continue(()),
            // The next client may still be there.
            Err(e) if has_client_left(&e) => return ControlFlow::Continue(()),
            Err(e) if is_broken(&e) => self.replace_broken(token, cx),
            // Invariant 10: an accept error never ends a listener, and never spins. Most often
            // descriptors ran out, and a close frees one.
            Err(e) => self.pause_listener(token, Obstacle::Paused, &e, cx),
        }
        ControlFlow::Break(())
    }

    /// Returns the slot of the VM that the next client's forward leads to, if there is a VM. Breaks
    /// if the client has to wait.
    fn admit_next(
        &mut self,
        token: usize,
        clients: AcceptedClients,
        cx: &mut TurnContext<'_, D>,
    ) -> ControlFlow<(), Option<Slot>> {
        let listening = &self.entries[token];
        if listening.listener.is_none() {
            return ControlFlow::Break(());
        }
        // Guests are accepted whatever happens: hyperkit blocks until they are. So are connections
        // that another forward has dialled: the connection that they belong to may have the slot
        // that is missing.
        let forward = &listening.forward;
        if !forward.needs_graceful_close(Side::Client)
            && let Some(reason) = cx.shared.is_full_for(forward.id)
            && !cx.shared.may_come_from_us(forward)
        {
            self.pause_listener(token, Obstacle::Full, &reason, cx);
            return ControlFlow::Break(());
        }
        match queue_for_slot(forward, clients, cx) {
            Ok(slot) => {
                self.entries[token].end_wait_for_slot();
                ControlFlow::Continue(slot)
            }
            Err(full) => {
                self.await_vm_slot(token, full, cx);
                ControlFlow::Break(())
            }
        }
    }

    /// Has a listener wait until the VM that its forward leads to may have a slot.
    fn await_vm_slot(&mut self, token: usize, full: Full, cx: &mut TurnContext<'_, D>) {
        let listening = &mut self.entries[token];
        if let Some(gate) = &listening.forward.gates[Side::Server] {
            self.schedule.queue_when_freed(token, gate.id());
        }
        if listening.note_full_vm(full) {
            self.report_obstacle(token, Obstacle::Full, &full, cx);
        }
    }

    /// Has a listener try again in a moment: a limit of the process or of the forward is reached,
    /// or the system refuses to accept.
    fn pause_listener(
        &mut self,
        token: usize,
        obstacle: Obstacle,
        reason: &dyn Display,
        cx: &mut TurnContext<'_, D>,
    ) {
        // The listener tries again by itself, whatever the state of its VM was.
        self.entries[token].end_wait_for_slot();
        self.schedule.pause_listener(token, cx.now + PAUSE);
        self.report_obstacle(token, obstacle, reason, cx);
    }

    /// Reports why clients have to wait.
    fn report_obstacle(
        &mut self,
        token: usize,
        obstacle: Obstacle,
        reason: &dyn Display,
        cx: &mut TurnContext<'_, D>,
    ) {
        let listening = &mut self.entries[token];
        listening.set_obstacle(obstacle, reason);
        let kind = match obstacle {
            Obstacle::Full => "full",
            _ => "paused",
        };
        if listening.admit_warning(kind, cx.now) {
            let listen = &listening.forward.rule.listen;
            warn!("not accepting on {listen} for now: {reason}; new clients wait");
        }
    }

    /// Hands a connection over to the worker with the fewest.
    fn hand_over(&mut self, accepted: Accepted<D::Stream>, cx: &mut TurnContext<'_, D>) {
        let load = |index: &usize| cx.shared.inboxes[*index].load.load(Ordering::Relaxed);
        let mine = load(&cx.index);
        // Once the stop has begun, other workers may have ended.
        let least = (0..cx.shared.inboxes.len())
            .min_by_key(load)
            .filter(|index| !cx.shared.is_stopping() && load(index) < mine);
        let to = match accepted.stream.is_settled() {
            true => cx.index,
            false => least.unwrap_or(cx.index),
        };
        cx.shared.inboxes[to].load.fetch_add(1, Ordering::Relaxed);
        if to == cx.index {
            self.accepted.push(accepted);
        } else {
            cx.shared.inboxes[to].send(WorkerCommand::Adopt(accepted));
        }
    }
}

/// Queues the next client of a forward for a slot of the VM that it leads to, if there is one.
fn queue_for_slot<D: Driver>(
    forward: &Forward,
    clients: AcceptedClients,
    cx: &TurnContext<'_, D>,
) -> Result<Option<Slot>, Full> {
    let Some(gate) = &forward.gates[Side::Server] else {
        return Ok(None);
    };
    // Guests are accepted whatever happens.
    if clients == AcceptedClients::All || forward.needs_graceful_close(Side::Client) {
        return Ok(Some(gate.queue_always(forward.id)));
    }
    let wake = cx.shared.inboxes[cx.index].slot_waker();
    match gate.queue(forward.id, cx.index, wake) {
        // As with the process' slots, the client's own connection may have the slot that is
        // missing.
        Err(_) if cx.shared.may_come_from_us(forward) => Ok(Some(gate.queue_always(forward.id))),
        queued => queued.map(Some),
    }
}

/// Takes a slot for a client that was accepted, if it is a guest. Returns it, and whether the guest
/// is served.
fn take_guest<D: Driver>(
    forward: &Forward,
    peer: &SocketName,
    cx: &TurnContext<'_, D>,
) -> (Option<Slot>, Result<(), NotServed>) {
    // A client that may not come is refused soon.
    let gate = forward.rule.admits(peer).then(|| {
        let its = forward.gates[Side::Client].clone();
        its.or_else(|| cx.shared.gates.of_guest(peer))
    });
    let Some(gate) = gate.flatten() else {
        return (None, Ok(()));
    };
    let limit = cx.shared.reached_limit(forward.id);
    let GuestSlot { slot, served } = gate.accept(forward.id, limit, cx.now);
    (Some(slot), served)
}
