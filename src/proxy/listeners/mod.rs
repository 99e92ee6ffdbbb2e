//! The listeners of a worker: they accept in batches, survive every error, and keep their files.
//!
//! What becomes of an accepted connection is not known here: it is handed over to a worker.

mod accepting;
mod checks;
mod entries;
mod listening;
mod schedule;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use entries::Entries;
use listening::{Listening, Tenure};
use schedule::Schedule;

#[cfg(all(unix, feature = "cli"))]
use super::driver::Lent;
use super::driver::{Driver, ListenerId, StillWanted};
use super::shared::{Accepted, Accepting, TurnContext};
use crate::engine::forward::Forward;
use crate::engine::id::ForwardId;
use crate::engine::relay::Side;
use crate::listener::FileAccess;

/// The listeners of one worker.
#[derive(Debug)]
pub(super) struct Listeners<D: Driver> {
    entries: Entries<D::Listener>,
    schedule: Schedule,
    /// The accepted connections that this worker is to take over.
    accepted: Vec<Accepted<D::Stream>>,
    accepting: Accepting,
}

impl<D: Driver> Default for Listeners<D> {
    fn default() -> Listeners<D> {
        Listeners {
            entries: Entries::default(),
            schedule: Schedule::default(),
            accepted: Vec::new(),
            accepting: Accepting::default(),
        }
    }
}

impl<D: Driver> Listeners<D> {
    /// Returns all listeners.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn all(&self) -> &[Listening<D::Listener>] {
        self.entries.all()
    }

    /// Returns whether a listener wants a turn and will not have one.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn has_forgotten(&self) -> bool {
        let mut tokens = 0..self.entries.all().len();
        tokens.any(|token| self.wants_turn(token) && !self.schedule.is_queued(token))
    }

    /// Returns whether a listener is to accept as soon as it can.
    fn wants_turn(&self, token: usize) -> bool {
        self.entries[token].can_accept() && !self.schedule.is_paused(token)
    }

    /// Takes the connections that were accepted for this worker.
    pub(super) fn take_accepted(&mut self) -> Vec<Accepted<D::Stream>> {
        std::mem::take(&mut self.accepted)
    }

    /// Latches that a client waits at the listener of a token.
    pub(super) fn latch(&mut self, token: usize) {
        if let Some(listening) = self.entries.get_mut(token) {
            listening.latch();
            self.schedule.queue_listener(token);
        }
    }

    /// Returns the identifier of a listener.
    fn id_of(&self, token: usize) -> ListenerId {
        let forward = self.entries[token].forward.id;
        ListenerId { token, forward }
    }

    /// Begins or ends the checks of a listener after a change of what they depend on.
    fn update_checks(&mut self, token: usize, at: Instant) {
        match self.entries[token].needs_checks() {
            true => self.schedule.begin_checks(token, at),
            false => self.schedule.end_checks(token),
        }
    }

    /// Adds a bound listener.
    ///
    /// # Errors
    /// Returns the poller's error, if it can't watch the listener.
    pub(super) fn add(
        &mut self,
        mut listener: D::Listener,
        forward: Arc<Forward>,
        cx: &mut TurnContext<'_, D>,
    ) -> io::Result<()> {
        let token = self.entries.next_token();
        cx.driver
            .watch_listener(&mut listener, token, &forward.rule)?;
        Self::note_name(&listener, forward.id, cx);
        let token = self.entries.insert(Listening::new(listener, forward));
        self.schedule.queue_listener(token);
        self.update_checks(token, cx.now);
        Ok(())
    }

    /// Closes a listener whose addition was given up. Guests that wait there are refused as usual,
    /// since closing their connections at once would harm their device.
    pub(super) fn give_up(
        &mut self,
        listener: D::Listener,
        forward: Arc<Forward>,
        cx: &mut TurnContext<'_, D>,
    ) {
        if !forward.needs_graceful_close(Side::Client) {
            return cx.driver.close_listener(listener);
        }
        forward.cut.store(true, Ordering::Release);
        let id = forward.id;
        // A listener that can't be watched is dropped there, which closes it.
        if self.add(listener, forward, cx).is_ok() {
            self.remove(id, channel().0, cx);
        }
    }

    /// Notes the name by which the clients of a forward know its listener.
    fn note_name(listener: &D::Listener, forward: ForwardId, cx: &mut TurnContext<'_, D>) {
        if let Some(name) = cx.driver.name_of_listener(listener) {
            cx.shared.routes.add_listener(name, forward);
        }
    }

    /// Notes that a listener's forward was removed, or is another process' now.
    fn end_tenure(&mut self, token: usize, tenure: Tenure) {
        self.entries[token].tenure = tenure;
        self.entries.forget_forward(token);
        self.schedule.end_checks(token);
    }

    /// Frees the entry of a listener that has ended.
    fn free_entry(&mut self, token: usize) {
        self.schedule.end_pause(token);
        self.entries.free_entry(token);
    }

    /// Removes the listener of a forward, if this worker has it, and notifies `done` when its
    /// address is free. Clients that wait there are served.
    pub(super) fn remove(
        &mut self,
        forward: ForwardId,
        done: Sender<()>,
        cx: &mut TurnContext<'_, D>,
    ) {
        let Some(token) = self.entries.token_of(forward) else {
            // The thread that asked may have given up.
            let _ = done.send(());
            return;
        };
        self.end_tenure(token, Tenure::Removed);
        let pending = &mut self.entries[token].pending;
        match pending.is_empty() {
            true => self.end_listener(token, done, cx),
            // The address may be bound again meanwhile.
            false => pending.hold_notice(done),
        }
    }

    /// Closes the listener of a removed forward, once no check of its file is pending.
    fn end_listener(&mut self, token: usize, done: Sender<()>, cx: &mut TurnContext<'_, D>) {
        self.accept_waiting(token, cx);
        match self.withdraw_listener(token, cx) {
            Some(listener) => cx.driver.close_listener_then(listener, done),
            None => {
                let _ = done.send(());
            }
        }
        self.free_entry(token);
    }

    /// Takes the listener of a removed forward out, and notes that no client comes any more.
    fn withdraw_listener(
        &mut self,
        token: usize,
        cx: &mut TurnContext<'_, D>,
    ) -> Option<D::Listener> {
        let listening = &mut self.entries[token];
        cx.shared.routes.remove_listener(listening.forward.id);
        listening.forward.closed.store(true, Ordering::Release);
        listening.listener.take()
    }

    /// Changes the owner, group and permissions of a forward's socket file, if this worker has the
    /// listener.
    pub(super) fn set_access(
        &mut self,
        forward: ForwardId,
        access: FileAccess,
        wanted: StillWanted,
        done: Sender<io::Result<()>>,
        cx: &mut TurnContext<'_, D>,
    ) {
        let token = self.entries.token_of(forward);
        match token.and_then(|token| self.entries[token].listener.as_ref()) {
            Some(listener) => cx.driver.set_access(listener, access, wanted, done),
            // The thread that asked may have given up.
            None => drop(done.send(Ok(()))),
        }
    }

    /// Replaces the rule for the clients that are accepted from now on, if this worker has the
    /// forward's listener.
    pub(super) fn replace_forward(&mut self, forward: Arc<Forward>, now: Instant) {
        if let Some(token) = self.entries.token_of(forward.id) {
            let listening = &mut self.entries[token];
            // The new rule may lead to another VM, which may have a slot.
            listening.end_wait_for_slot();
            listening.forward = forward;
            self.schedule.queue_listener(token);
            self.update_checks(token, now);
        }
    }

    /// Sets whether all listeners, those that are added later included, accept clients.
    #[cfg(all(unix, feature = "cli"))]
    pub(super) fn set_accepting(&mut self, accepting: Accepting, cx: &mut TurnContext<'_, D>) {
        self.accepting = accepting;
        if accepting == Accepting::Suspended {
            return;
        }
        for it in self.entries.all_mut() {
            if let Some(listener) = &mut it.listener {
                cx.driver.keep_listener(listener, &it.forward.rule);
            }
        }
    }

    /// Returns duplicates of all listeners, for another process.
    #[cfg(all(unix, feature = "cli"))]
    pub(super) fn lend_listeners(
        &mut self,
        cx: &mut TurnContext<'_, D>,
    ) -> Vec<(ForwardId, io::Result<Lent>)> {
        let lend = |it: &Listening<D::Listener>| {
            let is_served = it.tenure == Tenure::Served;
            let listener = it.listener.as_ref().filter(|_| is_served)?;
            Some((it.forward.id, cx.driver.lend_listener(listener)))
        };
        self.entries.all().iter().filter_map(lend).collect()
    }

    /// Leaves the listeners of these forwards, if this worker has them, to another process. Clients
    /// that wait there are that process'.
    #[cfg(all(unix, feature = "cli"))]
    pub(super) fn give_listeners(&mut self, forwards: &[ForwardId], cx: &mut TurnContext<'_, D>) {
        for &id in forwards {
            let Some(token) = self.entries.token_of(id) else {
                continue;
            };
            self.end_tenure(token, Tenure::Given);
            if let Some(listener) = self.withdraw_listener(token, cx) {
                cx.driver.give_listener(listener);
            }
            let listening = &mut self.entries[token];
            listening.note_closed();
            if listening.pending.is_empty() {
                self.free_entry(token);
            }
        }
    }

    /// Returns the time of the next turn without an event.
    pub(super) fn next(&self, now: Instant) -> Option<Instant> {
        match self.accepting {
            Accepting::On => self.schedule.next(now),
            // Only a command ends that.
            Accepting::Suspended => None,
        }
    }

    /// Has the listeners accept at which clients may wait, and checks those that are due. What is
    /// left for the next turn goes to the back of its queue.
    pub(super) fn take_turns(&mut self, cx: &mut TurnContext<'_, D>) {
        if self.accepting == Accepting::Suspended {
            return;
        }
        self.schedule.queue_rested(cx.now);
        for gate in cx.shared.inboxes[cx.index].take_freed() {
            self.schedule.queue_waiting(gate);
        }
        self.accept_queued(cx);
        self.check_due(cx);
    }

    /// Closes all listeners except those that guests dial: hyperkit can't bear an unbound port.
    pub(super) fn close_client_listeners(&mut self, cx: &mut TurnContext<'_, D>) {
        for listening in self.entries.all_mut() {
            if !listening.forward.needs_graceful_close(Side::Client)
                && let Some(listener) = listening.listener.take()
            {
                cx.driver.close_listener(listener);
                listening.note_closed();
            }
        }
    }

    /// Closes all listeners.
    pub(super) fn close_all(&mut self, cx: &mut TurnContext<'_, D>) {
        for listening in self.entries.all_mut() {
            if let Some(listener) = listening.listener.take() {
                cx.driver.close_listener(listener);
            }
        }
    }
}
