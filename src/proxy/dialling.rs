//! How a connection comes to be: adopted, its target named, let through the VM's gate, connected, or refused.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::dial::{self, Begun, Dial, Next};
use crate::error::{Error, Operation};
use crate::listener::nonblocking::not_carried;
use crate::name::SocketName;
use crate::relay::{CLIENT, End, Readiness, SERVER, Socket};
use crate::stream::nonblocking::{Endpoint, Target};

use super::conn::{Conn, Held, Leave, State};
use super::counters::Reason;
use super::forward::Forward;
use super::gate::{Full, Gate, Ticket};
use super::loops::{Ends, Route};
use super::observer::What;
use super::table::Id;
use super::worker::{Phase, Worker, after};
use super::world::World;

/// How long a client is held before its target is dialled again, doubled with each time up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

impl<W: World> Worker<W> {
    /// Takes over an accepted connection and begins to dial its target.
    pub(super) fn adopt(
        &mut self,
        mut stream: W::Stream,
        peer: SocketName,
        forward: Arc<Forward>,
        ticket: Option<Ticket>,
        now: Instant,
    ) {
        let name = self.shared.next_connection();
        let mut conn = Conn::new(Some(name), Arc::clone(&forward), peer, now);
        conn.tell(What::Accepted);
        conn.ticket = ticket;
        conn.held = forward.wait().map(|_| Held {
            pause: FIRST_PAUSE,
            redial: None,
            last: None,
        });
        let id = self.conns.insert(conn);
        let drain = forward.rule.timeouts.drain;
        let crossed = match forward.is_crossed(CLIENT) {
            true => self.world.cross(CLIENT, &mut stream, drain),
            false => Ok(()),
        };
        let watched = crossed.and_then(|()| self.world.watch(&mut stream, id.token(CLIENT)));
        let patience = forward.wait().unwrap_or(forward.rule.timeouts.dial);
        let deadline = after(now, patience);
        // Guests find the port bound until the very end, but are not served any more.
        let closed = match self.phase {
            Phase::Running => forward.is_cut(),
            Phase::Stopping => forward.is_polite(CLIENT),
            Phase::Cutting => true,
        };
        let mut client = End::new(stream);
        client.latch(Readiness {
            readable: client.socket.is_settled(),
            ..Readiness::default()
        });
        if let Some(conn) = self.conns.get_mut(id) {
            conn.enter(State::waiting(client, Dial::new(deadline)));
        }
        match watched {
            Err(e) => {
                let error = Error::new(Operation::Accept, &forward.rule.listen, e);
                self.refuse(id, &error, Reason::Other, now);
            }
            Ok(()) if closed => self.refuse_at_the_end(id, now),
            Ok(()) if !self.note_client(id, now) => self.refuse_loop(id, now),
            Ok(()) => self.begin_dial(id, now),
        }
    }

    /// Notes that a client may be a dialled socket of ours; false if it has come by a circle.
    fn note_client(&mut self, id: Id, now: Instant) -> bool {
        let Some(conn) = self.conns.get_mut(id) else {
            return true;
        };
        let forward = conn.forward.id;
        let State::Waiting { client, .. } = &conn.state else {
            return true;
        };
        if conn.peer == SocketName::Unnamed {
            let is_ours = || self.world.is_from_us(&client.socket);
            return self.shared.routes.accepted_from_us(forward, is_ours, now);
        }
        let peer = conn.peer;
        let ends = || Ends::accepted(self.world.name_of(&client.socket)?, peer);
        let mut route = Route::default();
        let goes_on = self.shared.routes.accepted(ends, forward, &mut route);
        conn.route = route.kept();
        goes_on
    }

    /// Notes that a dialled socket may lead to a listener of ours; false if that closes a circle.
    fn note_dial(&mut self, id: Id, now: Instant) -> bool {
        let Some(conn) = self.conns.get_mut(id) else {
            return true;
        };
        let State::Connecting { server, dial, .. } = &conn.state else {
            return true;
        };
        let (routes, forward) = (&self.shared.routes, conn.forward.id);
        let endpoint = dial.endpoint().filter(|it| routes.may_reach(it));
        let Some(endpoint) = endpoint else {
            return true;
        };
        let mut route = conn.route.take().map(|it| *it).unwrap_or_default();
        let goes_on = match endpoint {
            Endpoint::Tcp(_) | Endpoint::Vsock(_) => {
                let here = self.world.name_of(&server.socket);
                if let Some(ends) = here.and_then(|here| Ends::dialled(here, endpoint)) {
                    routes.dialled(forward, ends, &mut route);
                }
                true
            }
            _ => match self.world.mark_of_peer(&server.socket) {
                Some(name) => routes.reached(forward, &name, &mut route, now),
                None => true,
            },
        };
        conn.route = route.kept();
        goes_on
    }

    /// Refuses a client that would be led round in a circle.
    fn refuse_loop(&mut self, id: Id, now: Instant) {
        if let Some(conn) = self.conns.get_mut(id) {
            let why = "it leads back to a forward of this hvsock that its client has come through";
            let error = Error::new(
                Operation::Connect,
                &conn.forward.rule.connect,
                io::Error::other(why),
            );
            let error = error.with_remedy("have the forward lead elsewhere");
            self.refuse(id, &error, Reason::Other, now);
        }
    }

    /// Begins to dial the target of a connection that waits, for the first time or once more.
    pub(super) fn begin_dial(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let State::Waiting { dial, .. } = &mut conn.state else {
            return;
        };
        if let Some(held) = &mut conn.held {
            held.redial = None;
        }
        let deadline = dial.deadline();
        let forward = Arc::clone(&conn.forward);
        let target = &forward.rule.connect;
        if forward.is_blocking(SERVER) {
            let patience = dial::patience(target, deadline.saturating_duration_since(now));
            self.world.dial(id.token(SERVER), target, patience);
        } else {
            match Target::of(target) {
                Target::Endpoint(endpoint) => {
                    // To hyperkit only with leave of its gate.
                    let queued = matches!(endpoint, Endpoint::Hyperkit(_));
                    dial.add([endpoint]);
                    match queued {
                        true => self.queue_dial(id, &forward, now),
                        false => self.connect(id, now),
                    }
                }
                Target::Name { host, port } => self.world.resolve(id.token(SERVER), host, port),
                Target::NotCarried => {
                    let error = not_carried(Operation::Connect, target);
                    self.refuse(id, &error, Reason::Other, now);
                }
            }
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
        let error = error.with_remedy("is the name right, and does DNS answer?");
        self.failed(id, error, now);
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
                        return self.refuse(id, &error, Reason::Other, now);
                    }
                }
                if let State::Waiting { client, dial, .. } = conn.take_state() {
                    conn.enter(State::Connecting {
                        client,
                        server: End::new(server),
                        dial,
                    });
                }
                self.connected(id, now);
            }
            // The client has left, or was refused in the meantime.
            (Ok(server), None) => self.world.close(server),
            (Err(error), _) => self.failed(id, error, now),
        }
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
            match self.world.connect(endpoint) {
                Ok((mut stream, sign)) => {
                    if let Some(permit) = &mut conn.permit {
                        permit.dialled(sign, now);
                    }
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
                    conn.enter(State::Connecting {
                        client,
                        server,
                        dial,
                    });
                    if !self.note_dial(id, now) {
                        return self.refuse_loop(id, now);
                    }
                    let Some(conn) = self.conns.get_mut(id) else {
                        return;
                    };
                    if let Err(e) = watched {
                        let target = &conn.forward.rule.connect;
                        let error = Error::new(Operation::Connect, target, e);
                        return self.refuse(id, &error, Reason::Other, now);
                    }
                    return match begun {
                        Begun::Connected
                            if conn.held.is_some()
                                && conn.forward.rule.connect.refuses_in_silence() =>
                        {
                            self.prove(id, now);
                        }
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
                let target = &conn.forward.rule.connect;
                if let Some(error) = self.world.explain(id.token(SERVER), target, error) {
                    self.failed(id, error, now);
                }
                false
            }
        }
    }

    /// Takes what the failure of a dial was explained as.
    pub(super) fn explained(&mut self, id: Id, error: Error, now: Instant) {
        let conn = self.conns.get_mut(id);
        if conn.is_some_and(|conn| matches!(conn.state, State::Waiting { .. })) {
            self.failed(id, error, now);
        }
    }

    /// Takes the failure of a dial: the client is held until another one is to be tried, or refused.
    pub(super) fn failed(&mut self, id: Id, error: Error, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let reason = Reason::of(&conn.forward.rule.connect, &error);
        if reason == Reason::Absent {
            conn.forward.found_nobody(&error, now);
        }
        let ending = self.phase == Phase::Cutting || conn.forward.is_cut();
        if let (Some(held), State::Waiting { dial, full, .. }) = (&mut conn.held, &mut conn.state)
            && dial::may_come(&error)
            && !ending
        {
            let redial = (now + held.pause).min(dial.deadline());
            held.pause = (held.pause * 2).min(LONGEST_PAUSE);
            held.redial = Some(redial);
            held.last = Some((error, reason));
            *dial = Dial::new(dial.deadline());
            *full = None;
            // It keeps its right to a place, and nothing of this dial.
            conn.ticket = conn.ticket.take().or_else(|| {
                let gate = conn.forward.gates[SERVER].as_ref();
                gate.map(|gate| Gate::line_up(gate, conn.forward.id))
            });
            conn.permit = None;
            return self.set_timer(id, redial);
        }
        self.refuse(id, &error, reason, now);
    }

    /// Refuses a client whose time is over.
    pub(super) fn run_out(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let target = &conn.forward.rule.connect;
        let late = |why: String| io::Error::new(io::ErrorKind::TimedOut, why);
        let full = match &conn.state {
            State::Waiting { full, .. } => *full,
            _ => None,
        };
        let last = conn.held.as_mut().and_then(|held| held.last.take());
        let (error, reason) = match (&conn.state, full, last) {
            (_, Some(full), _) => {
                let reason = match full {
                    Full::Unanswered(_) | Full::Hangs => Reason::DialTimeout,
                    Full::Live(_) | Full::Reserved(_) => Reason::Full,
                };
                let error = Error::new(Operation::Connect, target, late(full.to_string()));
                (error, reason)
            }
            (State::Proving { .. }, ..) => {
                let cause = late("the guest doesn't answer".to_owned());
                let error = Error::new(Operation::Connect, target, cause);
                let error = error.with_remedy("is it booting, paused or asleep?");
                (error, Reason::DialTimeout)
            }
            (_, None, Some(last)) => last,
            (state, None, None) => {
                let cause = late("no connection within the dial timeout".to_owned());
                let error = match state {
                    State::Connecting { .. } => dial::explain(target, cause),
                    _ => Error::new(Operation::Connect, target, cause),
                };
                (error, Reason::DialTimeout)
            }
        };
        self.refuse(id, &error, reason, now);
    }

    /// Refuses a client because the proxy is stopping, or its forward was removed.
    pub(super) fn refuse_at_the_end(&mut self, id: Id, now: Instant) {
        if let Some(conn) = self.conns.get_mut(id) {
            let cause = io::Error::new(io::ErrorKind::ConnectionAborted, "the proxy is stopping");
            let error = Error::new(Operation::Connect, &conn.forward.rule.connect, cause);
            self.refuse(id, &error, Reason::Other, now);
        }
    }

    /// Ends a connection that could not be made, and says why.
    pub(super) fn refuse(&mut self, id: Id, error: &Error, reason: Reason, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
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
            State::Proving {
                client, mut server, ..
            } => {
                server.shutdown_write();
                leaving[SERVER] = Some(Leave::new(server));
                client
            }
            other => {
                conn.state = other;
                return;
            }
        };
        conn.ticket = None;
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
            State::Proving {
                client, mut server, ..
            } => {
                self.world.close(client.socket);
                server.shutdown_write();
                self.begin_leaving(id, [None, Some(Leave::new(server))], now);
            }
            state => {
                conn.state = state;
                self.forget(id, now);
            }
        }
    }
}
