//! Dials of which only the refusal is wanted: it tells that the guest lives, and has answered all dials before.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::address::{Address, HyperkitAddress, PORT_ANY};
use crate::dial;
use crate::name::SocketName;
use crate::relay::{End, Readiness, SERVER};
use crate::stream::nonblocking::Endpoint;

use super::conn::{Conn, HOLD, Leave, State};
use super::forward::Forward;
use super::gate::{Admission, Gate, Permit};
use super::leaving::LAST_LEAVE;
use super::queue::FULL_PAUSE;
use super::table::Id;
use super::worker::{Phase, Worker, after};
use super::world::World;

/// When a proof that is under way is asked after, if no wake-up tells of it before.
const PROOF_LOOK: Duration = Duration::from_secs(1);

/// Connections of this worker to one VM of which it is not known yet whether the guest has taken them.
#[derive(Debug)]
pub(crate) struct Proofs {
    gate: Arc<Gate>,
    waiting: Vec<Id>,
    next: Instant,
    /// No proof is tried before this time: the last one could not be sent. Its permit, given back,
    /// wakes the other workers, whose own may fail as well and wake this one.
    not_before: Option<Instant>,
}

impl<W: World> Worker<W> {
    /// Dials a port on which nobody listens: that the guest refuses tells that it lives, and has taken all dials before.
    ///
    /// However long that takes, this one is never given up: its answer may come at any time. False if it could not be
    /// sent now.
    pub(super) fn probe(
        &mut self,
        mut permit: Permit,
        forward: &Arc<Forward>,
        now: Instant,
    ) -> bool {
        let (Address::Hyperkit(target), Some(gate)) =
            (&forward.rule.connect, &forward.gates[SERVER])
        else {
            return false;
        };
        let probe = HyperkitAddress {
            vm: target.vm.clone(),
            // To which nothing can be bound.
            port: PORT_ANY,
        };
        let (mut stream, sign) = match self.world.connect(&Endpoint::Hyperkit(probe)) {
            Ok(connected) => connected,
            Err(e) => {
                drop(permit);
                // A full backlog (the device stands still) or no descriptor left here says nothing of the VM: what the
                // guest has not answered is still there.
                let gone = dial::says_gone(&e) && gate.can_be_probed();
                if gone {
                    gate.vm_is_gone();
                }
                return gone;
            }
        };
        permit.dialled(sign, now);
        let conn = Conn::new(None, Arc::clone(forward), SocketName::Unnamed, now);
        let id = self.conns.insert(conn);
        self.shared.inboxes[self.index]
            .load
            .fetch_add(1, Ordering::Relaxed);
        self.shared.begins(forward);
        let watched = self.world.watch(&mut stream, id.token(SERVER));
        let mut end = End::new(stream);
        end.shutdown_write();
        // One of which no event will tell is closed by the clock; and none outlives the proxy.
        let until = match self.phase {
            _ if watched.is_err() => Some(after(now, forward.rule.timeouts.drain)),
            Phase::Running => None,
            _ => Some(now + LAST_LEAVE),
        };
        if let Some(conn) = self.conns.get_mut(id) {
            conn.permit = Some(permit);
            conn.enter(State::Leaving {
                ends: [None, Some(Leave::new(end))],
                until,
            });
        }
        self.go_on_leaving(id, now);
        true
    }

    /// Holds what the client sends back until the guest has taken the dial. hyperkit tells a refusal by EOF and nothing
    /// else: so what tells is the first byte, or that the guest has answered a dial behind this one.
    pub(super) fn prove(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let Some(gate) = &conn.forward.gates[SERVER] else {
            return;
        };
        match self
            .proofs
            .iter_mut()
            .find(|it| Arc::ptr_eq(&it.gate, gate))
        {
            Some(proofs) => proofs.waiting.push(id),
            None => self.proofs.push(Proofs {
                gate: Arc::clone(gate),
                waiting: vec![id],
                next: now,
                not_before: None,
            }),
        }
        match conn.take_state() {
            State::Connecting {
                client,
                server,
                dial,
            } => {
                let deadline = dial.deadline();
                conn.enter(State::Proving {
                    client,
                    server,
                    dial,
                    until: None,
                });
                self.set_timer(id, deadline);
            }
            other => conn.state = other,
        }
    }

    pub(super) fn next_proof(&self) -> Option<Instant> {
        self.proofs.iter().map(|proofs| proofs.next).min()
    }

    /// Goes on with those whose dials have been answered, and sends a proof for those that are left.
    pub(super) fn proof_turns(&mut self, now: Instant) {
        for mut proofs in std::mem::take(&mut self.proofs) {
            let mut unanswered = None;
            let waiting = std::mem::take(&mut proofs.waiting);
            for id in waiting {
                let Some(conn) = self.conns.get_mut(id) else {
                    continue;
                };
                if !matches!(conn.state, State::Proving { .. }) {
                    continue;
                }
                if conn.permit.as_ref().is_some_and(Permit::is_answered) {
                    self.make_ready(id);
                } else {
                    unanswered = Some(Arc::clone(&conn.forward));
                    proofs.waiting.push(id);
                }
            }
            if let Some(forward) = unanswered {
                proofs.next = match proofs.not_before.filter(|at| now < *at) {
                    Some(at) => at,
                    None => self.send_proof(&mut proofs, &forward, now),
                };
                self.proofs.push(proofs);
            }
        }
    }

    /// Sends a proof if none is under way; when that is to be looked at again.
    fn send_proof(&mut self, proofs: &mut Proofs, forward: &Arc<Forward>, now: Instant) -> Instant {
        let wake = self.shared.inboxes[self.index].waker();
        let permit = match proofs.gate.admit_proof(now, self.index, &wake) {
            Admission::Go(permit) | Admission::Probe(permit) => permit,
            Admission::At(at) => return at.min(now + PROOF_LOOK),
            Admission::Full(_) => return now + FULL_PAUSE,
        };
        if self.probe(permit, forward, now) {
            return now + PROOF_LOOK;
        }
        if !proofs.gate.can_be_probed() {
            for &id in &proofs.waiting {
                self.prove_by_silence(id, now);
            }
        }
        let again = now + FULL_PAUSE;
        proofs.not_before = Some(again);
        again
    }

    /// Without a proof to be had, silence has to do: a guest that runs refuses within less.
    fn prove_by_silence(&mut self, id: Id, now: Instant) {
        if let Some(conn) = self.conns.get_mut(id)
            && let State::Proving {
                until: until @ None,
                ..
            } = &mut conn.state
        {
            *until = Some(now + HOLD);
            self.set_timer(id, now + HOLD);
        }
    }

    /// Gives a connection its turn whose dial may have been answered by now.
    pub(super) fn go_on_proving(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let answered = conn.permit.as_ref().is_some_and(Permit::is_answered);
        let State::Proving {
            client,
            server,
            dial,
            until,
        } = &mut conn.state
        else {
            return;
        };
        if client.is_gone() {
            return self.forget_client(id, now);
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
            let mut buffer = self.pool.take_buffer();
            match server.read(&mut buffer) {
                Some(n) => first = Some((buffer, n)),
                None => self.pool.give_buffer(buffer),
            }
        }
        let (refused, deadline) = (server.input_ended(), dial.deadline());
        let wait_until = until.map_or(deadline, |until| until.min(deadline));
        let silent = until.is_some_and(|until| now >= until);
        if (first.is_some() || refused)
            && let Some(permit) = &conn.permit
        {
            permit.heard(now);
        }
        if refused {
            self.refused_in_silence(id, now);
        } else if answered || silent || first.is_some() {
            let taken = answered || first.is_some();
            self.carry(id, first, taken, now);
        } else if now >= deadline {
            self.run_out(id, now);
        } else {
            self.set_timer(id, wait_until);
        }
    }

    /// The guest has refused: the client is told, or held.
    fn refused_in_silence(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        match conn.take_state() {
            State::Proving {
                client,
                server,
                dial,
                ..
            } => {
                conn.enter(State::waiting(client, dial));
                self.world.close(server.socket);
                let error = dial::refused_in_silence(&conn.forward.rule.connect);
                self.failed(id, error, now);
            }
            other => conn.state = other,
        }
    }
}
