//! The proof that a guest has taken a dial, where the family refuses with an EOF and nothing else;
//! and probes, dials of which only the refusal is wanted.
//!
//! When a probe may be sent, and where to, is decided by the gate and the loop.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::dial::Dial;
use crate::engine::Phase;
use crate::engine::admission::Slot;
use crate::engine::forward::Forward;
use crate::engine::relay::{End, Readiness, Side};
use crate::name::{Peer, SocketName};
use crate::stream::endpoint::Endpoint;
use crate::time::after;

use super::action::{Action, Context};
use super::closing::LAST_DRAIN;
use super::closing_end::Closing;
use super::closing_times::ClosingTimes;
use super::dialling::Dialled;
use super::relaying::Acceptance;
use super::socket::ConnectionSocket;
use super::state::{Connection, State};

impl<S: ConnectionSocket> Connection<S> {
    /// Makes a probe of a socket that was dialled at `endpoint`, a port on which nobody listens.
    /// The guest's refusal says that it runs and has taken all earlier dials.
    /// [`begin_probe`](Connection::begin_probe) must follow.
    pub(crate) fn for_probe(
        forward: Arc<Forward>,
        endpoint: Endpoint,
        dialled: Dialled<S>,
        mut slot: Slot,
        phase: Phase,
        now: Instant,
    ) -> Connection<S> {
        slot.note_dial(dialled.identity, now);
        let process = dialled.socket.peer_process().and_then(|it| it.id);
        let is_inherited = slot.note_listener(process, dialled.has_listener_ended);
        let mut dial = Dial::new(now);
        dial.add([endpoint]);
        dial.begin_attempt(now);
        let end = Closing::dialled(End::new(dialled.socket), dial);
        // However long the answer takes, a probe is not given up, since the answer may come at any
        // time. But a probe for which no event can arrive is closed by a timer, and none outlives
        // the proxy.
        let until = match phase {
            _ if dialled.watched.is_err() => Some(after(now, forward.rule.timeouts.drain)),
            Phase::Running => None,
            _ => Some(now + LAST_DRAIN),
        };
        let ends = [None, Some(end)];
        let state = State::Closing {
            ends,
            times: ClosingTimes::ending_at(until),
        };
        let no_client = Peer {
            name: SocketName::Unnamed,
            process: None,
        };
        let mut connection = Connection::internal(forward, no_client, state, now);
        connection.is_inherited = is_inherited;
        connection.slots[Side::Server] = Some(slot);
        connection
    }

    /// Holds back what the client sends until the guest has taken the dial. The first byte says so,
    /// or the guest's answer to a later dial.
    pub(super) fn begin_proving(&mut self, deadline: Instant, cx: &mut Context<'_, S>) {
        if let State::Connecting {
            client,
            server,
            race,
        } = self.take_state()
        {
            self.enter(State::Proving {
                client,
                server,
                dial: race.dial,
                until: None,
            });
        }
        self.wake_at = Some(deadline);
        cx.request(Action::Prove);
    }

    /// Returns whether the guest has answered the dial, or `None` if no answer is being waited for.
    pub(crate) fn is_answered(&self) -> Option<bool> {
        let is_proving = matches!(self.state, State::Proving { .. });
        let slot = self.slots[Side::Server].as_ref();
        is_proving.then(|| slot.is_some_and(Slot::is_answered))
    }

    /// Ends the proof after a moment without a refusal, since no probe can be sent. A guest that
    /// runs refuses within less time.
    pub(crate) fn prove_by_silence(&mut self, cx: &mut Context<'_, S>) {
        let refusal = self.forward.refusal_by_eof();
        if let State::Proving {
            until: until @ None,
            ..
        } = &mut self.state
        {
            *until = Some(cx.now + refusal.map_or(Duration::ZERO, |it| it.wait));
            self.wake_at = *until;
        }
    }

    pub(super) fn go_on_proving(&mut self, cx: &mut Context<'_, S>) {
        let slot = self.slots[Side::Server].as_ref();
        let answered = slot.is_some_and(Slot::is_answered);
        let State::Proving {
            client,
            server,
            dial,
            until,
        } = &mut self.state
        else {
            return;
        };
        if client.is_gone() {
            return self.close_without_client(cx);
        }
        if answered {
            // If the dial was refused, its EOF can be read now, whether an event has said so or
            // not.
            server.latch(Readiness {
                readable: true,
                ..Readiness::default()
            });
        }
        let mut first = None;
        if server.is_readable() {
            let mut buffer = cx.pool.take_buffer();
            match server.read(&mut buffer) {
                Some(n) => first = Some((buffer, n)),
                None => cx.pool.give_buffer(buffer),
            }
        }
        let (refused, deadline) = (server.input_ended(), dial.deadline());
        let wait_until = until.map_or(deadline, |until| until.min(deadline));
        let silent = until.is_some_and(|until| cx.now >= until);
        if refused {
            return self.take_refusal(cx);
        }
        if first.is_some()
            && let Some(slot) = slot
        {
            slot.note_answer(cx.now);
        }
        if answered || first.is_some() {
            self.begin_relaying_after(first, Acceptance::Known, cx);
        } else if silent {
            self.begin_relaying(Acceptance::Unknown, cx);
        } else if cx.now >= deadline {
            self.time_out(cx);
        } else {
            self.wake_at = Some(wait_until);
        }
    }

    /// Takes the guest's refusal, or the end of its VM: the client is refused, or held.
    fn take_refusal(&mut self, cx: &mut Context<'_, S>) {
        let mut has_vm_ended = false;
        let mut error = None;
        if let State::Proving {
            client,
            server,
            dial,
            ..
        } = self.take_state()
        {
            error = Some(self.refused_by_eof(&server));
            has_vm_ended = self.has_vm_ended(&server, cx);
            // The end of the VM says nothing of other dials.
            if !has_vm_ended && let Some(slot) = &self.slots[Side::Server] {
                slot.note_answer(cx.now);
            }
            self.enter(State::waiting(client, dial));
            self.close_socket(Side::Server, server, cx);
        }
        if has_vm_ended {
            return self.take_vm_end(cx);
        }
        if let Some(error) = error {
            self.dial_failed(error, cx);
        }
    }

    /// Reads at once whether the answer to a probe has arrived.
    pub(crate) fn begin_probe(&mut self, cx: &mut Context<'_, S>) {
        debug_assert!(self.forward.gates[Side::Server].is_some());
        self.go_on_closing(cx);
    }
}
