//! The dial of a connection: its target is resolved, admitted by the VM's gate and connected.
//!
//! Names, gates and connects belong to the loop; they are only requested here, and their results
//! are taken.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::dial::{self, Begun, Dial, Next, Race};
use crate::engine::Phase;
use crate::engine::admission::{Full, Gate, Slot};
use crate::engine::end_reason::{EndReason, RefusalReason};
use crate::engine::health::VmIdentity;
use crate::engine::relay::{End, Readiness, Side};
use crate::error::{Error, Operation};
use crate::stream::endpoint::{Endpoint, Target, not_carried};
use crate::stream::peer_names::{ListenerName, PeerNames};

use super::action::{Action, Context};
use super::relaying::Acceptance;
use super::socket::ConnectionSocket;
use super::state::{Connection, State};

/// A socket that was created and has begun to connect.
#[derive(Debug)]
pub(crate) struct Dialled<S> {
    pub(crate) socket: S,
    /// The identity of the VM, if the target is one that has a file.
    pub(crate) identity: Option<VmIdentity>,
    /// Whether the process that began to listen had ended before the connect.
    pub(crate) has_listener_ended: bool,
    /// Whether the poller could register the socket.
    pub(crate) watched: io::Result<()>,
}

impl<S: ConnectionSocket> Connection<S> {
    /// Notes that the dialled socket may lead to a listener of this process. Returns false if that
    /// closes a loop of forwards.
    pub(super) fn note_dial(&mut self, cx: &mut Context<'_, S>) -> bool {
        let State::Connecting { server, race, .. } = &self.state else {
            return true;
        };
        let (routes, forward) = (cx.routes, self.forward.id);
        let endpoint = race.dial.endpoint().filter(|it| routes.may_reach(it));
        let Some(endpoint) = endpoint else {
            return true;
        };
        let mut route = self.route.take().map(|it| *it).unwrap_or_default();
        let is_acyclic = match endpoint {
            endpoint if !endpoint.connects_at_once() => {
                let here = server.socket.local_name();
                if let Some(ends) = here.and_then(|here| PeerNames::of_dialled(here, endpoint)) {
                    if race.earlier().next().is_none() {
                        // The names of the attempts that have failed.
                        routes.forget_dialled(&mut route);
                    }
                    routes.note_dial(forward, ends, &mut route);
                }
                true
            }
            _ => match server.socket.unix_peer_name() {
                Some(name) => {
                    routes.note_arrival(forward, &ListenerName::Unix(name), &mut route, cx.now)
                }
                None => true,
            },
        };
        self.route = route.into_box();
        is_acyclic
    }

    /// Begins to dial the target, for the first time or again.
    pub(super) fn begin_dial(&mut self, cx: &mut Context<'_, S>) {
        let State::Waiting { dial, .. } = &mut self.state else {
            return;
        };
        if let Some(retries) = &mut self.retries {
            retries.note_dial();
        }
        let deadline = dial.deadline();
        let target = &self.forward.rule.connect;
        // A VM is dialled only with a slot of its gate.
        let is_gated = self.forward.gates[Side::Server].is_some();
        if self.forward.is_blocking(Side::Server) {
            match is_gated {
                true => cx.request(Action::Admit),
                false => self.dial_on_thread(cx),
            }
        } else {
            match Target::of(target) {
                Target::Endpoint(endpoint) => {
                    dial.add([endpoint]);
                    cx.request(match is_gated {
                        true => Action::Admit,
                        false => Action::Connect,
                    });
                }
                Target::Name { .. } => cx.request(Action::Resolve),
                #[cfg(unix)]
                Target::OnThread => {
                    let left = deadline.saturating_duration_since(cx.now);
                    cx.request(Action::DialOnThread(left));
                }
                Target::NotCarried => {
                    let error = not_carried(Operation::Connect, target);
                    return self.refuse(&error, RefusalReason::Other, cx);
                }
            }
        }
        self.wake_at = self.wake_at.or(Some(deadline));
    }

    /// Has a thread dial the target.
    fn dial_on_thread(&self, cx: &mut Context<'_, S>) {
        if let State::Waiting { dial, .. } = &self.state {
            let left = dial.deadline().saturating_duration_since(cx.now);
            let patience = dial::limit_timeout(&self.forward.rule.connect, left);
            cx.request(Action::DialOnThread(patience));
        }
    }

    /// Waits for the client's header, an address, a slot or the time of the next dial.
    pub(super) fn go_on_waiting(&mut self, cx: &mut Context<'_, S>) {
        if let Some(until) = self.awaits_header() {
            return self.go_on_reading_header(until, cx);
        }
        let State::Waiting { client, dial, .. } = &self.state else {
            return;
        };
        if client.is_gone() {
            self.end_because(EndReason::ClientGaveUp);
            return self.close(cx);
        }
        let deadline = dial.deadline();
        if cx.now >= deadline {
            return self.time_out(cx);
        }
        if let Some(redial) = self.retries.as_ref().and_then(|retries| retries.redial) {
            match cx.now < redial {
                true => self.wake_at = Some(redial),
                false => self.begin_dial(cx),
            }
        } else if self.wake_at.is_none() {
            // The timer was that of the next dial, unless the dial still waits for an address or a
            // slot.
            let slot = self.slots[Side::Server].as_ref();
            let is_admitted = slot.is_none_or(Slot::is_admitted);
            if dial.endpoint().is_some() && is_admitted {
                cx.request(Action::Connect);
            }
            self.wake_at = Some(deadline);
        }
    }

    /// Returns the endpoint that is to be connected next.
    pub(crate) fn endpoint(&self) -> Option<&Endpoint> {
        match &self.state {
            State::Waiting { dial, .. } => dial.endpoint(),
            State::Connecting { race, .. } => race.dial.next_endpoint(),
            _ => None,
        }
    }

    /// Returns how long the attempt at [`endpoint`](Connection::endpoint) may take. One of a client
    /// that is held is not the last.
    pub(crate) fn patience(&self, now: Instant) -> Duration {
        let dial = match &self.state {
            State::Waiting { dial, .. } => dial,
            State::Connecting { race, .. } => &race.dial,
            _ => return Duration::ZERO,
        };
        let left = dial.deadline().saturating_duration_since(now);
        match self.retries {
            Some(_) => left.min(self.forward.rule.timeouts.dial),
            None => left,
        }
    }

    /// Returns whether an EOF from the server may mean that its VM has died.
    pub(crate) fn doubts_server(&self) -> bool {
        self.forward.needs_graceful_close(Side::Server)
    }

    /// Takes the result of resolving the target's name.
    pub(crate) fn take_addresses(
        &mut self,
        addresses: io::Result<Vec<SocketAddr>>,
        cx: &mut Context<'_, S>,
    ) {
        let State::Waiting { dial, .. } = &mut self.state else {
            return;
        };
        let target = &self.forward.rule.connect;
        let order = |found| self.forward.addresses().order(target, found, cx.now);
        let error = match addresses.map(order) {
            Ok(order) if !order.is_empty() => {
                dial.add(order.into_iter().map(Endpoint::Tcp));
                return cx.request(Action::Connect);
            }
            Ok(_) => io::Error::new(io::ErrorKind::NotFound, "the name has no address"),
            Err(e) => e,
        };
        let error = Error::new(Operation::Resolve, &self.forward.rule.connect, error);
        let error = error.with_remedy("is the name right, and does DNS answer?");
        self.dial_failed(error, cx);
    }

    /// Takes a slot of the target's VM, in place of the one that was queued.
    pub(crate) fn take_slot(&mut self, slot: Slot, cx: &mut Context<'_, S>) {
        self.slots[Side::Server] = Some(slot);
        match self.forward.is_blocking(Side::Server) {
            true => self.dial_on_thread(cx),
            false => cx.request(Action::Connect),
        }
    }

    /// Takes the reason why the gate has no slot now. Returns false if none is wanted any more.
    pub(crate) fn take_full(&mut self, why: Full) -> bool {
        match &mut self.state {
            State::Waiting { full, .. } => {
                *full = Some(why);
                true
            }
            _ => false,
        }
    }

    /// Takes the result of a dial on a thread: a connected socket, and whether the poller could
    /// register it where it has to.
    pub(crate) fn take_dialled(
        &mut self,
        dialled: Result<(S, io::Result<()>), Error>,
        cx: &mut Context<'_, S>,
    ) {
        match dialled {
            // The client has gone, or was refused in the meantime.
            Ok((socket, _)) if !self.is_waiting() => cx.request(Action::Discard(socket)),
            Err(_) if !self.is_waiting() => {}
            Ok((socket, Err(e))) => {
                let error = Error::new(Operation::Connect, &self.forward.rule.connect, e);
                cx.request(Action::Discard(socket));
                self.refuse(&error, RefusalReason::Other, cx);
            }
            Ok((socket, Ok(()))) => {
                if let Some(slot) = &mut self.slots[Side::Server] {
                    slot.note_unidentified_dial(cx.now);
                }
                self.note_program();
                if let State::Waiting { client, dial, .. } = self.take_state() {
                    let server = End::new(socket);
                    let race = Race::new(dial);
                    self.enter(State::Connecting {
                        client,
                        server,
                        race,
                    });
                }
                self.begin_relaying(Acceptance::Unknown, cx);
            }
            Err(error) => self.dial_failed(error, cx),
        }
    }

    /// Takes the result of beginning to connect.
    pub(crate) fn take_connect(
        &mut self,
        connect: io::Result<Dialled<S>>,
        cx: &mut Context<'_, S>,
    ) {
        if let State::Connecting { .. } = self.state {
            return self.take_further_connect(connect, cx);
        }
        let dialled = match connect {
            Ok(dialled) => dialled,
            Err(e) => return self.attempt_failed(e, cx),
        };
        if let Some(slot) = &mut self.slots[Side::Server] {
            slot.note_dial(dialled.identity, cx.now);
            let process = dialled.socket.peer_process().and_then(|it| it.id);
            self.is_inherited = slot.note_listener(process, dialled.has_listener_ended);
        }
        let (client, mut dial) = match self.take_state() {
            State::Waiting { client, dial, .. } => (client, dial),
            other => {
                self.state = other;
                return cx.request(Action::Discard(dialled.socket));
            }
        };
        let mut server = End::new(dialled.socket);
        let begun = dial.begin_attempt(cx.now);
        let deadline = dial.deadline();
        // A socket that has just connected has room; no event needs to say so.
        server.latch(Readiness {
            writable: begun != Begun::InProgress,
            ..Readiness::default()
        });
        let race = Race::new(dial);
        self.enter(State::Connecting {
            client,
            server,
            race,
        });
        if !self.note_dial(cx) {
            return self.refuse_loop(cx);
        }
        let target = &self.forward.rule.connect;
        if let Err(e) = dialled.watched {
            let error = Error::new(Operation::Connect, target, e);
            return self.refuse(&error, RefusalReason::Other, cx);
        }
        match begun {
            Begun::Connected
                if self.retries.is_some() && self.forward.refusal_by_eof().is_some() =>
            {
                self.begin_proving(deadline, cx);
            }
            Begun::Connected => self.begin_relaying(Acceptance::Unknown, cx),
            Begun::Handshake => self.go_on_connecting(cx),
            Begun::InProgress => self.wait_for_answers(cx),
        }
    }

    /// Returns whether the process at the other end of a side is that which the system names.
    pub(super) fn knows_process(&self, side: Side) -> bool {
        side == Side::Client || !self.is_inherited
    }

    /// Returns whether a connection to a VM has ended because its VM has, and notes that.
    pub(super) fn has_vm_ended(&self, server: &End<S>, cx: &mut Context<'_, S>) -> bool {
        let has_ended = self.doubts_server()
            && self.knows_process(Side::Server)
            && (cx.has_peer_ended)(&server.socket);
        if has_ended && let Some(slot) = &self.slots[Side::Server] {
            slot.note_vm_end(cx.now);
        }
        has_ended
    }

    pub(super) fn go_on_connecting(&mut self, cx: &mut Context<'_, S>) {
        let State::Connecting { client, .. } = &self.state else {
            return;
        };
        if client.is_gone() {
            return self.close_without_client(cx);
        }
        self.look_at_earlier(cx);
        let State::Connecting { server, race, .. } = &mut self.state else {
            return;
        };
        // Readiness is handled first: a connect may have succeeded while the process was frozen.
        let attempt = match server.is_writable() {
            true => match server.socket.connected() {
                Ok(true) => race.dial.shake_hands(&mut server.socket),
                other => other,
            },
            false => Ok(false),
        };
        let was_asked = race.dial.is_shaking_hands();
        match attempt {
            Ok(true) => {
                if was_asked {
                    self.note_handshake(cx);
                }
                self.begin_relaying(Acceptance::Unknown, cx);
            }
            Ok(false) if cx.now >= race.dial.deadline() => self.time_out(cx),
            Ok(false) => match self.check_vm_gone(cx) {
                true => self.attempt_ended(dial::vm_is_gone(), cx),
                false => self.wait_for_answers(cx),
            },
            Err(_) if self.return_to_earlier(cx) => {}
            Err(error) => self.attempt_ended(error, cx),
        }
    }

    /// Closes the socket of an attempt that has failed.
    fn attempt_ended(&mut self, error: io::Error, cx: &mut Context<'_, S>) {
        let (mut was_asked, mut has_vm_ended) = (false, false);
        if let State::Connecting {
            client,
            server,
            race,
        } = self.take_state()
        {
            if let Some(endpoint) = race.dial.endpoint() {
                self.note_failed(endpoint, cx);
            }
            was_asked = race.dial.is_shaking_hands();
            has_vm_ended = self.has_vm_ended(&server, cx);
            self.enter(State::waiting(client, race.dial));
            cx.request(Action::Discard(server.socket));
        }
        if was_asked && !has_vm_ended {
            self.note_handshake(cx);
        }
        match has_vm_ended {
            true => self.take_vm_end(cx),
            false => self.attempt_failed(error, cx),
        }
    }

    /// Returns whether the VM that was dialled is gone: nothing tells the socket, which would wait
    /// for its whole timeout. The first time it is asked is a while after the dial.
    fn check_vm_gone(&self, cx: &Context<'_, S>) -> bool {
        let is_due = self.wake_at.is_none_or(|at| at <= cx.now);
        let slot = self.slots[Side::Server].as_ref();
        is_due
            && self.forward.resets_when_gone(Side::Server)
            && slot.is_some_and(Slot::check_vm_gone)
    }

    /// Notes that the VMM has answered the dial, whether it was taken or refused.
    pub(super) fn note_handshake(&self, cx: &Context<'_, S>) {
        if let Some(slot) = &self.slots[Side::Server] {
            slot.note_answer(cx.now);
        }
    }

    /// Tries the next endpoint after one has failed, or the same one again, or gives up.
    fn attempt_failed(&mut self, error: io::Error, cx: &mut Context<'_, S>) {
        let State::Waiting { dial, .. } = &mut self.state else {
            return;
        };
        match dial.note_failure(cx.now, error) {
            Next::Now => cx.request(Action::Connect),
            Next::At(at) => self.wake_at = Some(at),
            Next::GiveUp(error) => cx.request(Action::Explain(error)),
        }
    }

    /// Returns the error of a target that has refused by an EOF, at that end. A VM that has no slot
    /// left does the same, and where that may be so both are named: where many are taken, and where
    /// the end is a reset. A device without a slot leaves the line unread, whatever follows it; a
    /// guest that refuses leaves at most what follows.
    pub(super) fn refused_by_eof(&self, server: &End<S>) -> Error {
        let target = &self.forward.rule.connect;
        let gate = self.forward.gates[Side::Server].as_ref();
        match server.was_reset() || gate.is_some_and(|gate| gate.may_lack_slots()) {
            true => dial::refused_by_guest_or_device(target),
            false => dial::refused_by_eof(target),
        }
    }

    /// Takes the explained error of a dial that failed.
    pub(crate) fn take_explanation(&mut self, error: Error, cx: &mut Context<'_, S>) {
        if self.is_waiting() {
            self.dial_failed(error, cx);
        }
    }

    /// Takes that the VM has ended before its guest has answered the dial.
    pub(super) fn take_vm_end(&mut self, cx: &mut Context<'_, S>) {
        let error = dial::vm_has_ended(&self.forward.rule.connect);
        self.dial_failed_because(RefusalReason::Absent, error, cx);
    }

    /// Takes the failure of a dial: holds the client until the next dial, or refuses it.
    pub(super) fn dial_failed(&mut self, error: Error, cx: &mut Context<'_, S>) {
        let reason = RefusalReason::from_error(&self.forward.rule.connect, &error);
        self.dial_failed_because(reason, error, cx);
    }

    fn dial_failed_because(
        &mut self,
        reason: RefusalReason,
        error: Error,
        cx: &mut Context<'_, S>,
    ) {
        let now = cx.now;
        self.forward.note_failed_dial(reason, &error, now);
        let is_ending = cx.phase == Phase::Cutting || self.forward.is_cut();
        if let (Some(retries), State::Waiting { dial, full, .. }) =
            (&mut self.retries, &mut self.state)
            && dial::is_worth_retrying(&error)
            && !is_ending
        {
            let redial = retries.take_failure(error, reason, dial.deadline(), now);
            *dial = Dial::new(dial.deadline());
            *full = None;
            // The client stays in the queue for a slot, and keeps nothing of this dial.
            if self.slots[Side::Server]
                .as_ref()
                .is_none_or(Slot::is_admitted)
            {
                let gate = self.forward.gates[Side::Server].as_ref();
                self.slots[Side::Server] =
                    gate.map(|gate| Gate::queue_always(gate, self.forward.id));
            }
            self.wake_at = Some(redial);
            return;
        }
        self.refuse(&error, reason, cx);
    }
}
