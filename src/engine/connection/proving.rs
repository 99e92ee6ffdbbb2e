//! Whether a guest has taken a dial, where its family tells a refusal by EOF and nothing else; and dials of which only
//! the refusal is wanted.

use std::sync::Arc;
use std::time::Instant;

use crate::dial;
use crate::engine::Phase;
use crate::engine::admission::Slot;
use crate::engine::forward::Forward;
use crate::engine::relay::{End, Readiness, Side};
use crate::name::SocketName;
use crate::time::after;

use super::closing::LAST_DRAIN;
use super::relaying::{Acceptance, HOLD};
use super::{Action, Closing, Connection, Context, Dialled, Socket, State};

impl<S: Socket> Connection<S> {
    /// Dials a port on which nobody listens: that the guest refuses tells that it lives, and has taken all dials before.
    /// [`begin_probe`](Connection::begin_probe) is to follow.
    pub(crate) fn probe(
        forward: Arc<Forward>,
        dialled: Dialled<S>,
        mut slot: Slot,
        phase: Phase,
        now: Instant,
    ) -> Connection<S> {
        slot.note_dial(dialled.identity, now);
        let mut end = End::new(dialled.socket);
        end.shutdown_write();
        // However long the answer takes, a probe is never given up: it may come at any time. But one of which no event
        // will tell is closed by the clock; and none outlives the proxy.
        let until = match phase {
            _ if dialled.watched.is_err() => Some(after(now, forward.rule.timeouts.drain)),
            Phase::Running => None,
            _ => Some(now + LAST_DRAIN),
        };
        let ends = [None, Some(Closing::drain(end))];
        let state = State::Closing { ends, until };
        let mut connection = Connection::new(None, forward, SocketName::Unnamed, state, now);
        connection.slots[Side::Server] = Some(slot);
        connection
    }

    /// Holds what the client sends back until the guest has taken the dial. What tells is the first byte, or that the
    /// guest has answered a dial behind this one.
    pub(super) fn begin_proving(&mut self, deadline: Instant, cx: &mut Context<'_, S>) {
        if let State::Connecting {
            client,
            server,
            dial,
        } = self.leave_state()
        {
            self.enter(State::Proving {
                client,
                server,
                dial,
                until: None,
            });
        }
        self.wake_at = Some(deadline);
        cx.request(Action::Prove);
    }

    /// Returns whether its dial still waits for an answer: `None` if it waits for none.
    pub(crate) fn is_answered(&self) -> Option<bool> {
        let is_proving = matches!(self.state, State::Proving { .. });
        let slot = self.slots[Side::Server].as_ref();
        is_proving.then(|| slot.is_some_and(Slot::is_answered))
    }

    /// Takes that no proof is to be had. So silence has to do: a guest that runs refuses within less.
    pub(crate) fn prove_by_silence(&mut self, cx: &mut Context<'_, S>) {
        if let State::Proving {
            until: until @ None,
            ..
        } = &mut self.state
        {
            *until = Some(cx.now + HOLD);
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
            return self.leave_server(cx);
        }
        if answered {
            // If it was a refusal, its EOF is there, whether an event has told of it or not.
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
        if (first.is_some() || refused)
            && let Some(slot) = slot
        {
            slot.note_answer(cx.now);
        }
        if refused {
            self.refused_by_eof(cx);
        } else if answered || first.is_some() {
            self.begin_relaying(first, Acceptance::Known, cx);
        } else if silent {
            self.begin_relaying(None, Acceptance::Unknown, cx);
        } else if cx.now >= deadline {
            self.time_out(cx);
        } else {
            self.wake_at = Some(wait_until);
        }
    }

    /// Takes that the guest has refused: the client is told, or held.
    fn refused_by_eof(&mut self, cx: &mut Context<'_, S>) {
        if let State::Proving {
            client,
            server,
            dial,
            ..
        } = self.leave_state()
        {
            self.enter(State::waiting(client, dial));
            self.close_socket(Side::Server, server, cx);
        }
        let error = dial::refused_by_eof(&self.forward.rule.connect);
        self.dial_failed(error, cx);
    }

    /// Looks at once whether the answer of a probe is there.
    pub(crate) fn begin_probe(&mut self, cx: &mut Context<'_, S>) {
        debug_assert!(self.forward.gates[Side::Server].is_some());
        self.go_on_closing(cx);
    }
}
