//! Checks of the listeners' files and of VMs, and listeners that are bound again.

use std::sync::Arc;

use tracing::{debug, error, info, warn};

use super::Listeners;
use super::listening::Tenure;
use super::schedule::CHECK_INTERVAL;
use crate::engine::Phase;
use crate::engine::relay::Side;
use crate::engine::status::Obstacle;
use crate::error::{Error, Operation};
use crate::proxy::driver::{Driver, Found, ListenerId};
use crate::proxy::shared::TurnContext;

/// How many listeners are checked in one turn. The others that are due have their turns next.
const CHECKS_PER_TURN: usize = 64;

impl<D: Driver> Listeners<D> {
    /// Checks the listeners that are due.
    pub(super) fn check_due(&mut self, cx: &mut TurnContext<'_, D>) {
        for _ in 0..CHECKS_PER_TURN {
            let Some(token) = self.schedule.pop_due_check(cx.now) else {
                break;
            };
            self.check_file(token, cx);
            self.look_at_vms(token, cx);
            // A connection of this process may wait by now, for which no slot need be free.
            if self.entries[token].waits_for_slot() {
                self.schedule.queue_listener(token);
            }
        }
    }

    /// Checks a socket's file, or tries again to bind the address.
    fn check_file(&mut self, token: usize, cx: &mut TurnContext<'_, D>) {
        let of = self.id_of(token);
        let listening = &mut self.entries[token];
        // One check at a time, since it may hang.
        if cx.phase != Phase::Running || !listening.pending.is_empty() {
            return;
        }
        let rule = &listening.forward.rule;
        match &listening.listener {
            None => self.bind_again(token, cx),
            Some(listener) if rule.listen.listen_path().is_some() => {
                if cx.driver.check_file(listener, of, rule) {
                    listening.pending.add_check();
                }
            }
            Some(_) => {}
        }
    }

    /// Looks at the VMs of a forward, so that a change is known before a client meets it.
    fn look_at_vms(&mut self, token: usize, cx: &mut TurnContext<'_, D>) {
        for gate in self.entries[token].forward.gates.iter().flatten() {
            if gate.begin_look(cx.now, CHECK_INTERVAL) {
                cx.driver.look_at_vm(gate);
            }
        }
    }

    /// Binds the address of a listener again that was shut down from outside (`ss -K`, or another
    /// process that shares it).
    pub(super) fn replace_broken(&mut self, token: usize, cx: &mut TurnContext<'_, D>) {
        let listening = &mut self.entries[token];
        listening.clear_readiness();
        // A listener that is about to be closed is left as it is: the close removes its file on
        // another thread (invariant 8).
        if cx.phase > Phase::Running || listening.tenure != Tenure::Served {
            return;
        }
        listening.set_obstacle(Obstacle::Lost, &"its listener was shut down");
        if listening.admit_warning("shut down", cx.now) {
            let listen = &listening.forward.rule.listen;
            warn!("the listener on {listen} was shut down from outside; binding it again");
        }
        if listening.listener.is_some() {
            self.bind_again(token, cx);
        }
        self.update_checks(token, cx.now + CHECK_INTERVAL);
    }

    /// Closes a listener, if it is open, and has its address bound again.
    fn bind_again(&mut self, token: usize, cx: &mut TurnContext<'_, D>) {
        let of = self.id_of(token);
        let listening = &mut self.entries[token];
        let old = listening.listener.take();
        listening.pending.add_check();
        cx.driver.bind_again(old, of, &listening.forward.rule);
    }

    /// Takes the result of checking a listener's file, or of binding its address again.
    pub(in crate::proxy) fn take_listener(
        &mut self,
        of: ListenerId,
        found: Found<D::Listener>,
        cx: &mut TurnContext<'_, D>,
    ) {
        let Some(listening) = self.entries.find_mut(of) else {
            if let Found::Bound(listener) = found {
                cx.driver.close_listener(listener);
            }
            return;
        };
        let on_closed = listening.pending.end_check();
        let is_given = listening.tenure == Tenure::Given;
        // Guests are accepted to the very end: closing a socket at which one waits would harm its
        // device.
        let takes_clients =
            cx.phase == Phase::Running || listening.forward.needs_graceful_close(Side::Client);
        match found {
            // If its file was removed, the process that has the listener makes it again.
            Found::Bound(listener) if !takes_clients || is_given => {
                cx.driver.close_listener(listener);
            }
            _ if is_given => {}
            Found::Bound(listener) => self.take_new_listener(of, listener, cx),
            found => self.take_file_state(of.token, found),
        }
        if let Some(done) = on_closed {
            self.end_listener(of.token, done, cx);
        } else if is_given && self.entries[of.token].pending.is_empty() {
            self.free_entry(of.token);
        }
    }

    /// Notes the state of a listener's file, or that it can't be bound again.
    fn take_file_state(&mut self, token: usize, found: Found<D::Listener>) {
        let listening = &mut self.entries[token];
        let forward = Arc::clone(&listening.forward);
        let listen = &forward.rule.listen;
        match found {
            Found::Nothing | Found::Bound(_) => {}
            Found::Ours => {
                if listening.is_lost() {
                    listening.end_loss();
                }
            }
            Found::Taken => {
                if listening.note_loss(&"another program has taken its place") {
                    error!(
                        "{listen} was taken over by another program; its clients don't reach us any more"
                    );
                }
            }
            Found::Failed(e) => {
                let what = match listening.listener {
                    Some(_) => "has been removed, and it can't be made again yet",
                    None => "can't be bound again yet",
                };
                if listening.note_loss(&e) {
                    error!("{listen} {what}: {e}");
                }
            }
        }
    }

    /// Puts a listener that was bound again in the place of the old one, which was shut down, or
    /// whose file was removed: a VM that starts may clear its directory, and cleaners of `/tmp`
    /// remove old files.
    fn take_new_listener(
        &mut self,
        of: ListenerId,
        mut listener: D::Listener,
        cx: &mut TurnContext<'_, D>,
    ) {
        let token = of.token;
        let was_shut_down = self.entries[token].listener.is_none();
        // Clients that wait at the old one connected earlier, and are accepted first.
        self.accept_waiting(token, cx);
        let listening = &mut self.entries[token];
        if let Some(old) = listening.listener.take() {
            cx.driver.close_listener(old);
        }
        let rule = &listening.forward.rule;
        if let Err(e) = cx.driver.watch_listener(&mut listener, token, rule) {
            // Invariant 11: it is logged once, shown in the status, and tried again each second.
            let e = Error::new(Operation::Listen, &rule.listen, e);
            cx.driver.close_listener(listener);
            return self.take_file_state(token, Found::Failed(e));
        }
        Self::note_name(&listener, of.forward, cx);
        listening.listener = Some(listener);
        listening.latch();
        let was_logged = listening.end_loss();
        let listen = &listening.forward.rule.listen;
        match was_shut_down {
            false => info!("made {listen} again: its file had been removed"),
            // The shutdown was logged; it may happen again and again.
            true if !was_logged => debug!("listening on {listen} again"),
            true => info!("listening on {listen} again"),
        }
        self.schedule.queue_listener(token);
        self.update_checks(token, cx.now + CHECK_INTERVAL);
    }
}
