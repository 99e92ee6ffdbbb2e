//! How a connection comes to be: adopted, its target named, let through the VM's gate, connected, or refused.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::address::{Address, HyperkitAddress, PORT_ANY};
use crate::dial::{self, Begun, Dial, Next};
use crate::error::{Error, Operation};
use crate::listener::nonblocking::not_carried;
use crate::name::SocketName;
use crate::relay::{CLIENT, End, Readiness, SERVER, Socket};
use crate::stream::nonblocking::{Endpoint, Target};

use super::conn::{Conn, Leave, State};
use super::counters::{Reason, add_one};
use super::forward::Forward;
use super::gate::{Admission, Gate, Permit};
use super::leaving::LAST_LEAVE;
use super::observer::What;
use super::table::Id;
use super::worker::{Phase, Worker, after};
use super::world::World;

/// How long a dial waits when a cap of its VM is reached before it asks again.
const FULL_PAUSE: Duration = Duration::from_millis(10);

/// The connections of this worker that wait for leave to dial one VM, first come, first served.
#[derive(Debug)]
pub(crate) struct DialQueue {
    gate: Arc<Gate>,
    waiting: VecDeque<Id>,
    next: Instant,
}

impl<W: World> Worker<W> {
    /// Takes over an accepted connection and begins to dial its target.
    pub(super) fn adopt(
        &mut self,
        mut stream: W::Stream,
        peer: SocketName,
        forward: Arc<Forward>,
        now: Instant,
    ) {
        let name = self.shared.next_connection();
        let conn = Conn::new(Some(name), Arc::clone(&forward), peer, now);
        conn.tell(What::Accepted);
        let id = self.conns.insert(conn);
        let drain = forward.rule.timeouts.drain;
        let crossed = match forward.is_crossed(CLIENT) {
            true => self.world.cross(CLIENT, &mut stream, drain),
            false => Ok(()),
        };
        let watched = crossed.and_then(|()| self.world.watch(&mut stream, id.token(CLIENT)));
        let deadline = after(now, forward.rule.timeouts.dial);
        let mut dial = Dial::new(deadline);
        let target = &forward.rule.connect;
        // Guests find the port bound until the very end, but are not served any more.
        let closed = match self.phase {
            Phase::Running => forward.is_cut(),
            Phase::Stopping => forward.is_polite(CLIENT),
            Phase::Cutting => true,
        };
        let ready = match target {
            _ if watched.is_err() || closed => Some(false),
            _ if forward.is_blocking(SERVER) => {
                let limit = forward.rule.timeouts.dial;
                let patience = dial::patience(target, limit);
                self.world.dial(id.token(SERVER), target, patience);
                None
            }
            _ => match Target::of(target) {
                Target::Endpoint(endpoint) => {
                    // To hyperkit only with leave of its gate.
                    let at_once = !matches!(endpoint, Endpoint::Hyperkit(_));
                    dial.add([endpoint]);
                    at_once.then_some(true)
                }
                Target::Name { host, port } => {
                    self.world.resolve(id.token(SERVER), host, port);
                    None
                }
                Target::NotCarried => Some(false),
            },
        };
        let queued = dial.endpoint().is_some() && ready.is_none();
        let mut client = End::new(stream);
        client.latch(Readiness {
            readable: client.socket.is_settled(),
            ..Readiness::default()
        });
        if let Some(conn) = self.conns.get_mut(id) {
            conn.state = State::Waiting {
                client,
                dial,
                full: None,
            };
        }
        match ready {
            Some(true) => self.connect(id, now),
            Some(false) => {
                let error = match watched {
                    Err(e) => Error::new(Operation::Accept, &forward.rule.listen, e),
                    Ok(()) if closed => {
                        let cause = io::Error::other("the proxy is stopping");
                        Error::new(Operation::Connect, target, cause)
                    }
                    Ok(()) => not_carried(Operation::Connect, target),
                };
                self.refuse(id, &error, now);
            }
            None if queued => self.queue_dial(id, &forward, now),
            None => {}
        }
        if let Some(conn) = self.conns.get_mut(id)
            && conn.timer.is_none()
            && matches!(conn.state, State::Waiting { .. } | State::Connecting { .. })
        {
            self.set_timer(id, deadline);
        }
    }

    /// Takes the addresses of a target's name.
    pub(super) fn resolved(
        &mut self,
        id: Id,
        addresses: io::Result<Vec<SocketAddr>>,
        now: Instant,
    ) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let State::Waiting { dial, .. } = &mut conn.state else {
            return;
        };
        let error = match addresses {
            Ok(addresses) if !addresses.is_empty() => {
                dial.add(addresses.into_iter().map(Endpoint::Tcp));
                return self.connect(id, now);
            }
            Ok(_) => io::Error::new(io::ErrorKind::NotFound, "the name has no address"),
            Err(e) => e,
        };
        let error = Error::new(Operation::Resolve, &conn.forward.rule.connect, error);
        self.refuse(
            id,
            &error.with_remedy("is the name right, and does DNS answer?"),
            now,
        );
    }

    /// Takes what a dial on a thread of its own has come to.
    pub(super) fn dialled(
        &mut self,
        id: Id,
        server: std::result::Result<W::Stream, Error>,
        now: Instant,
    ) {
        let conn = self.conns.get_mut(id);
        let waiting = conn.filter(|conn| matches!(conn.state, State::Waiting { .. }));
        match (server, waiting) {
            (Ok(mut server), Some(conn)) => {
                if conn.forward.is_crossed(SERVER) {
                    let drain = conn.forward.rule.timeouts.drain;
                    let crossed = self.world.cross(SERVER, &mut server, drain);
                    let watched =
                        crossed.and_then(|()| self.world.watch(&mut server, id.token(SERVER)));
                    if let Err(e) = watched {
                        let error = Error::new(Operation::Connect, &conn.forward.rule.connect, e);
                        self.world.close(server);
                        return self.refuse(id, &error, now);
                    }
                }
                if let State::Waiting { client, dial, .. } = conn.take_state() {
                    conn.state = State::Connecting {
                        client,
                        server: End::new(server),
                        dial,
                    };
                }
                self.connected(id, now);
            }
            // The client has left, or was refused in the meantime.
            (Ok(server), None) => self.world.close(server),
            (Err(error), _) => self.refuse(id, &error, now),
        }
    }

    pub(super) fn queue_dial(&mut self, id: Id, forward: &Forward, now: Instant) {
        let Some(gate) = &forward.gates[SERVER] else {
            return;
        };
        let known = self
            .queues
            .iter()
            .position(|queue| Arc::ptr_eq(&queue.gate, gate));
        let queue = known.unwrap_or_else(|| {
            self.queues.push(DialQueue {
                gate: Arc::clone(gate),
                waiting: VecDeque::new(),
                next: now,
            });
            self.queues.len() - 1
        });
        self.queues[queue].waiting.push_back(id);
        self.dial_turn(queue, now);
    }

    pub(super) fn next_dial(&self) -> Option<Instant> {
        self.queues
            .iter()
            .filter(|queue| !queue.waiting.is_empty())
            .map(|queue| queue.next)
            .min()
    }

    /// Dials as many of those who wait as their VMs' gates let through.
    pub(super) fn dial_turns(&mut self, now: Instant) {
        for index in 0..self.queues.len() {
            self.dial_turn(index, now);
        }
    }

    pub(super) fn dial_turn(&mut self, index: usize, now: Instant) {
        while let Some(&id) = self.queues[index].waiting.front() {
            if self.queues[index].next > now {
                return;
            }
            let waiting = |conn: &mut Conn<W::Stream>| match &conn.state {
                State::Waiting { .. } => Some(Arc::clone(&conn.forward)),
                _ => None,
            };
            // Who has left since, or was refused, needs no dial.
            let Some(forward) = self.conns.get_mut(id).and_then(waiting) else {
                self.queues[index].waiting.pop_front();
                continue;
            };
            let Address::Hyperkit(target) = &forward.rule.connect else {
                return;
            };
            let vm = self.world.vm_identity(&target.vm);
            match self.queues[index].gate.admit(now, vm) {
                Admission::Go(permit) => {
                    self.queues[index].waiting.pop_front();
                    if let Some(conn) = self.conns.get_mut(id) {
                        conn.permit = Some(permit);
                    }
                    self.connect(id, now);
                }
                Admission::At(at) => self.queues[index].next = at,
                Admission::Probe(permit) => {
                    if !self.probe(permit, &forward, now) {
                        self.queues[index].next = now + FULL_PAUSE;
                    }
                }
                Admission::Full(why) => {
                    self.queues[index].next = now + FULL_PAUSE;
                    let conns = &mut self.conns;
                    // Who has left since needs no dial.
                    self.queues[index]
                        .waiting
                        .retain(|id| match conns.get_mut(*id) {
                            Some(Conn {
                                state: State::Waiting { full, .. },
                                ..
                            }) => {
                                *full = Some(why);
                                true
                            }
                            _ => false,
                        });
                }
            }
        }
    }

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
        let forward_path = target.vm.forward_path(target.port);
        let target = HyperkitAddress {
            vm: target.vm.clone(),
            // To which nothing can be bound.
            port: PORT_ANY,
        };
        let mut stream = match self.world.connect(&Endpoint::Hyperkit(target)) {
            Ok(stream) => stream,
            Err(e) => {
                drop(permit);
                // A full backlog (the device stands still) or no descriptor left here says nothing of the VM: what the
                // guest has not answered is still there. Nor does it with `guest_forwards` alone, where there is no
                // socket to probe.
                let nothing_to_probe =
                    e.kind() == io::ErrorKind::NotFound && self.world.exists(&forward_path);
                let gone = dial::says_gone(&e) && !nothing_to_probe;
                if gone {
                    gate.vm_is_gone();
                }
                return gone;
            }
        };
        permit.dialled();
        let conn = Conn::new(None, Arc::clone(forward), SocketName::Unnamed, now);
        let id = self.conns.insert(conn);
        add_one(&forward.tally.live);
        self.shared.inboxes[self.index]
            .load
            .fetch_add(1, Ordering::Relaxed);
        self.shared.live.fetch_add(1, Ordering::AcqRel);
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
            conn.state = State::Leaving {
                ends: [None, Some(Leave::new(end))],
                until,
            };
        }
        self.go_on_leaving(id, now);
        true
    }

    /// Tries the dial's next endpoint, and the ones behind it.
    pub(super) fn connect(&mut self, id: Id, now: Instant) {
        loop {
            let Some(conn) = self.conns.get_mut(id) else {
                return;
            };
            let State::Waiting { dial, .. } = &conn.state else {
                return;
            };
            let Some(endpoint) = dial.endpoint() else {
                return;
            };
            let attempt = self.world.connect(endpoint);
            if attempt.is_ok()
                && let Some(permit) = &mut conn.permit
            {
                permit.dialled();
            }
            match attempt {
                Ok(mut stream) => {
                    let State::Waiting {
                        client, mut dial, ..
                    } = conn.take_state()
                    else {
                        return;
                    };
                    let watched = self.world.watch(&mut stream, id.token(SERVER));
                    let mut server = End::new(stream);
                    let begun = dial.begun(now);
                    let attempt_deadline = dial.attempt_deadline();
                    // A socket just connected has room; no need to wait until an event says so.
                    server.latch(Readiness {
                        writable: begun != Begun::InProgress,
                        ..Readiness::default()
                    });
                    conn.state = State::Connecting {
                        client,
                        server,
                        dial,
                    };
                    if let Err(e) = watched {
                        let target = &conn.forward.rule.connect;
                        let error = Error::new(Operation::Connect, target, e);
                        return self.refuse(id, &error, now);
                    }
                    return match begun {
                        Begun::Connected => self.connected(id, now),
                        Begun::Handshake => self.step(id, now),
                        Begun::InProgress => self.set_timer(id, attempt_deadline),
                    };
                }
                Err(e) => {
                    if !self.retry(id, e, now) {
                        return;
                    }
                }
            }
        }
    }

    /// Whether another endpoint is to be tried now, after the last one failed with `error`.
    pub(super) fn retry(&mut self, id: Id, error: io::Error, now: Instant) -> bool {
        let Some(conn) = self.conns.get_mut(id) else {
            return false;
        };
        let State::Waiting { dial, .. } = &mut conn.state else {
            return false;
        };
        match dial.failed(now, error) {
            Next::Now => true,
            Next::At(at) => {
                self.set_timer(id, at);
                false
            }
            Next::GiveUp(error) => {
                let error = dial::explain(&conn.forward.rule.connect, error);
                self.refuse(id, &error, now);
                false
            }
        }
    }

    /// Ends a connection that could not be made, and says why.
    pub(super) fn refuse(&mut self, id: Id, error: &Error, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let reason = Reason::of(&conn.forward.rule.connect, error);
        conn.refused(error, reason, now);
        let mut leaving = [None, None];
        let client = match conn.take_state() {
            State::Waiting { client, .. } => client,
            State::Connecting {
                client,
                mut server,
                dial,
            } => {
                if dial.is_shaking_hands() {
                    leaving[SERVER] = Some(Leave::new(server));
                } else if conn.forward.is_polite(SERVER) {
                    server.shutdown_write();
                    leaving[SERVER] = Some(Leave::new(server));
                } else {
                    self.world.close(server.socket);
                }
                client
            }
            other => {
                conn.state = other;
                return;
            }
        };
        let mut client = client;
        // Rule 3 of a good neighbour: a guest that can't be served is not closed at once.
        if conn.forward.is_polite(CLIENT) && !client.is_dead() {
            client.shutdown_write();
            leaving[CLIENT] = Some(Leave::new(client));
        } else {
            self.world.reset(client.socket);
        }
        self.begin_leaving(id, leaving, now);
    }

    /// The client left while its target was being connected.
    pub(super) fn forget_client(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        match conn.take_state() {
            State::Connecting {
                client,
                server,
                dial,
            } if dial.is_shaking_hands() => {
                self.world.close(client.socket);
                self.begin_leaving(id, [None, Some(Leave::new(server))], now);
            }
            state => {
                conn.state = state;
                self.forget(id, now);
            }
        }
    }
}
