//! The life of one connection: dial, relay, take leave.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::{Span, debug, debug_span, warn};

use crate::address::{Address, Host, HyperkitAddress, Port};
use crate::dial::{self, Dial, Next};
use crate::error::{Error, Operation};
use crate::listener::not_carried;
use crate::relay::{CLIENT, End, Farewell, Pair, Readiness, SERVER, Turn};
use crate::stream::Endpoint;

use super::forward::Forward;
use super::gate::{Admission, Full, Gate, Permit};
use super::table::Id;
use super::worker::{Phase, Worker};
use super::world::World;

/// Bytes that one connection may move in each direction before the others have their turn.
const BUDGET: usize = 256 * 1024;

/// How long a half-close to a guest that has said nothing yet is kept back. hyperkit refuses by EOF, some 50 µs after
/// the dial: an EOF before our half-close is a refusal, one after it an empty answer.
const HOLD: Duration = Duration::from_millis(10);

/// How much can lie unread between us and a guest that has not accepted: more delivered than this, and it has.
/// (hyperkit asks for socket buffers of 256 KiB, `DEFAULT_WRITE_BUF_LENGTH`; kernels double it.)
const UNREAD: u64 = 1024 * 1024;

/// How long a client that goes on sending is read from after it got its whole answer.
const LINGER: Duration = Duration::from_secs(5);

/// How often it is looked whether a peer that is to be reset has got what was sent before.
const RESET_PAUSE: Duration = Duration::from_millis(2);

/// How long guests are taken leave of when the proxy is told to end at once.
const LAST_LEAVE: Duration = Duration::from_secs(2);

/// The port of a probe: `VMADDR_PORT_ANY` (`linux/vm_sockets.h`), to which nothing can be bound.
const PROBE_PORT: Port = Port(u32::MAX);

/// How long a dial waits when a cap of its VM is reached before it asks again.
const FULL_PAUSE: Duration = Duration::from_millis(10);

/// Turns of an end that is emptied before it is closed by force: what a socket can hold, many times over.
const LAST_TURNS: usize = 64;

/// One connection.
#[derive(Debug)]
pub(crate) struct Conn<S> {
    forward: Arc<Forward>,
    state: State<S>,
    /// Leave to use the VM that was dialled.
    permit: Option<Permit>,
    /// In the ready queue.
    pub(super) ready: bool,
    pub(super) timer: Option<Instant>,
    /// Bytes of each side that were counted.
    counted: [u64; 2],
    span: Span,
}

#[derive(Debug)]
enum State<S> {
    /// For a name, for leave to dial, or for another try.
    Waiting {
        client: End<S>,
        dial: Dial,
        full: Option<Full>,
    },
    Connecting {
        client: End<S>,
        server: End<S>,
        dial: Dial,
    },
    Relaying {
        pair: Pair<S>,
        /// Until when the client's half-close is kept back.
        hold: Instant,
        /// When a pair that can only end any more must have done so.
        end: Option<Instant>,
    },
    /// Taking leave of each end, until then (or until the proxy stops).
    Leaving {
        ends: [Option<Leave<S>>; 2],
        until: Option<Instant>,
    },
    /// Between two states, within one call.
    Moving,
}

/// An end that is not to be closed at once.
#[derive(Debug)]
struct Leave<S> {
    end: End<S>,
    /// To be reset when the peer has what was sent before, instead of being read to its EOF: a reset overtakes.
    reset: bool,
}

impl<S: crate::relay::Socket> Conn<S> {
    fn new(forward: Arc<Forward>) -> Conn<S> {
        let rule = &forward.rule;
        let span = debug_span!("connection", listen = %rule.listen, connect = %rule.connect);
        Conn {
            forward,
            state: State::Moving,
            permit: None,
            ready: false,
            timer: None,
            counted: [0; 2],
            span,
        }
    }

    pub(super) fn latch(&mut self, side: usize, readiness: Readiness) {
        match &mut self.state {
            State::Waiting { client, .. } | State::Connecting { client, .. } if side == CLIENT => {
                client.latch(readiness);
            }
            State::Connecting { server, .. } => server.latch(readiness),
            State::Relaying { pair, .. } => pair.ends[side].latch(readiness),
            State::Leaving { ends, .. } => {
                if let Some(leave) = &mut ends[side] {
                    leave.end.latch(readiness);
                }
            }
            State::Waiting { .. } | State::Moving => {}
        }
    }

    fn take_state(&mut self) -> State<S> {
        std::mem::replace(&mut self.state, State::Moving)
    }
}

/// The connections of this worker that wait for leave to dial one VM, first come, first served.
#[derive(Debug)]
pub(crate) struct DialQueue {
    gate: Arc<Gate>,
    waiting: VecDeque<Id>,
    next: Instant,
}

impl<W: World> Worker<W> {
    /// Takes over an accepted connection and begins to dial its target.
    pub(super) fn adopt(&mut self, mut stream: W::Stream, forward: Arc<Forward>, now: Instant) {
        let id = self.conns.insert(Conn::new(Arc::clone(&forward)));
        let watched = self.world.watch(&mut stream, id.token(CLIENT));
        let deadline = now + self.shared.limits.dial_timeout;
        let mut dial = Dial::new(deadline);
        let target = &forward.rule.connect;
        // Guests find the port bound until the very end, but are not served any more.
        let closed = match self.phase {
            Phase::Running => false,
            Phase::Stopping => forward.is_polite(CLIENT),
            Phase::Cutting => true,
        };
        let ready = match target {
            _ if watched.is_err() || closed => Some(false),
            Address::Hyperkit(hyperkit) => {
                dial.add([Endpoint::Hyperkit(hyperkit.clone())]);
                None
            }
            Address::Unix(unix) => {
                dial.add([Endpoint::Unix(unix.clone())]);
                Some(true)
            }
            Address::Tcp(tcp) => match &tcp.host {
                Host::Ip(ip) => {
                    dial.add([Endpoint::Tcp(SocketAddr::new(*ip, tcp.port))]);
                    Some(true)
                }
                Host::Name(name) => {
                    self.world.resolve(id.token(SERVER), name, tcp.port);
                    None
                }
            },
            _ => Some(false),
        };
        let queued = dial.endpoint().is_some() && ready.is_none();
        if let Some(conn) = self.conns.get_mut(id) {
            conn.state = State::Waiting {
                client: End::new(stream),
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

    fn queue_dial(&mut self, id: Id, forward: &Forward, now: Instant) {
        let Some(gate) = &forward.gate else { return };
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

    fn dial_turn(&mut self, index: usize, now: Instant) {
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
                Admission::Probe(permit) => self.probe(permit, &forward, now),
                Admission::Full(why) => {
                    self.queues[index].next = now + FULL_PAUSE;
                    for id in &self.queues[index].waiting {
                        if let Some(Conn {
                            state: State::Waiting { full, .. },
                            ..
                        }) = self.conns.get_mut(*id)
                        {
                            *full = Some(why);
                        }
                    }
                }
            }
        }
    }

    /// Dials a port on which nobody listens: that the guest refuses tells that it lives, and has taken all dials before.
    ///
    /// However long that takes, there is no second probe, so this one is never given up.
    fn probe(&mut self, mut permit: Permit, forward: &Arc<Forward>, now: Instant) {
        let (Address::Hyperkit(target), Some(gate)) = (&forward.rule.connect, &forward.gate) else {
            return;
        };
        let target = HyperkitAddress {
            vm: target.vm.clone(),
            port: PROBE_PORT,
        };
        let Ok(mut stream) = self.world.connect(&Endpoint::Hyperkit(target)) else {
            drop(permit);
            gate.vm_is_gone();
            return;
        };
        permit.dialled();
        let id = self.conns.insert(Conn::new(Arc::clone(forward)));
        forward.live.fetch_add(1, Ordering::Relaxed);
        self.shared.inboxes[self.index]
            .load
            .fetch_add(1, Ordering::Relaxed);
        self.shared.live.fetch_add(1, Ordering::AcqRel);
        let watched = self.world.watch(&mut stream, id.token(SERVER));
        let mut end = End::new(stream);
        end.shutdown_write();
        let until = watched.is_err().then_some(now);
        if let Some(conn) = self.conns.get_mut(id) {
            conn.permit = Some(permit);
            conn.state = State::Leaving {
                ends: [None, Some(Leave { end, reset: false })],
                until,
            };
        }
        self.go_on_leaving(id, now);
    }

    /// Tries the dial's next endpoint, and the ones behind it.
    fn connect(&mut self, id: Id, now: Instant) {
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
            let at_once = !matches!(endpoint, Endpoint::Tcp(_));
            let attempt = self.world.connect(endpoint);
            if attempt.is_ok()
                && let Some(permit) = &mut conn.permit
            {
                permit.dialled();
            }
            let attempt = attempt.and_then(|mut stream| {
                match self.world.watch(&mut stream, id.token(SERVER)) {
                    Ok(()) => Ok(stream),
                    Err(e) => {
                        self.world.close(stream);
                        Err(e)
                    }
                }
            });
            match attempt {
                Ok(stream) => {
                    let State::Waiting { client, dial, .. } = conn.take_state() else {
                        return;
                    };
                    let mut server = End::new(stream);
                    if at_once {
                        // A socket just connected has room; no need to wait until an event says so.
                        server.latch(Readiness {
                            writable: true,
                            ..Readiness::default()
                        });
                        conn.state = State::Connecting {
                            client,
                            server,
                            dial,
                        };
                        return self.connected(id, now);
                    }
                    conn.state = State::Connecting {
                        client,
                        server,
                        dial,
                    };
                    return;
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
    fn retry(&mut self, id: Id, error: io::Error, now: Instant) -> bool {
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

    /// Makes a pair of a client and the server that it was connected to.
    fn connected(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let State::Connecting { client, server, .. } = conn.take_state() else {
            return;
        };
        conn.span.in_scope(|| debug!("connected"));
        let mut pair = Pair::new(client, server);
        if conn.forward.is_polite(SERVER) {
            pair.refuses_silently(UNREAD);
            pair.hold();
        }
        conn.timer = None;
        conn.state = State::Relaying {
            pair,
            hold: now + HOLD,
            end: None,
        };
        self.make_ready(id);
    }

    /// Gives a connection its turn: something came, or its time did.
    pub(super) fn step(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        match &mut conn.state {
            State::Waiting { client, dial, full } => {
                if client.is_gone() {
                    return self.forget(id);
                }
                if now >= dial.deadline() {
                    let why = match full {
                        Some(full) => full.to_string(),
                        None => "no connection within the dial timeout".to_owned(),
                    };
                    let cause = io::Error::new(io::ErrorKind::TimedOut, why);
                    let error = Error::new(Operation::Connect, &conn.forward.rule.connect, cause);
                    return self.refuse(id, &error, now);
                }
                if conn.timer.is_none() {
                    let deadline = dial.deadline();
                    // The timer was that of another try, unless the dial still waits for a name or for leave.
                    let again = dial.endpoint().is_some()
                        && (conn.permit.is_some() || conn.forward.gate.is_none());
                    self.set_timer(id, deadline);
                    if again {
                        self.connect(id, now);
                    }
                }
            }
            State::Connecting {
                client,
                server,
                dial,
            } => {
                let attempt = if client.is_gone() {
                    return self.forget(id);
                } else if now >= dial.deadline() {
                    Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "no connection within the dial timeout",
                    ))
                } else if server.is_writable() {
                    self.world.connected(&server.socket)
                } else {
                    Ok(false)
                };
                match attempt {
                    Ok(true) => self.connected(id, now),
                    Ok(false) => {
                        let deadline = dial.deadline();
                        self.set_timer(id, deadline);
                    }
                    Err(e) => {
                        let State::Connecting {
                            client,
                            server,
                            dial,
                        } = conn.take_state()
                        else {
                            return;
                        };
                        conn.state = State::Waiting {
                            client,
                            dial,
                            full: None,
                        };
                        self.world.close(server.socket);
                        if self.retry(id, e, now) {
                            self.connect(id, now);
                        }
                    }
                }
            }
            State::Relaying { .. } => self.relay(id, now),
            State::Leaving { .. } => self.go_on_leaving(id, now),
            State::Moving => {}
        }
    }

    fn relay(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let State::Relaying { pair, hold, end } = &mut conn.state else {
            return;
        };
        let mut turn = pair.turn(&mut self.pool, BUDGET);
        if pair.is_holding() && (pair.ends[SERVER].received() > 0 || now >= *hold) {
            pair.release();
            turn = pair.turn(&mut self.pool, BUDGET);
        }
        for side in [CLIENT, SERVER] {
            let delivered = pair.delivered(side);
            conn.forward.count(side, delivered - conn.counted[side]);
            conn.counted[side] = delivered;
        }
        if let Some(permit) = &conn.permit
            && (pair.ends[SERVER].received() > 0 || pair.ends[SERVER].input_ended())
        {
            permit.answered();
        }
        match turn {
            Turn::Again => self.make_ready(id),
            Turn::Done => self.leave(id, now),
            Turn::Wait if pair.is_holding() => {
                let hold = *hold;
                self.set_timer(id, hold);
            }
            Turn::Wait if pair.is_ending() => {
                let end = *end.get_or_insert(now + self.shared.limits.drain_timeout);
                if now < end {
                    self.set_timer(id, end)
                } else {
                    self.leave(id, now)
                }
            }
            Turn::Wait => {}
        }
    }

    /// Ends a pair, done or not: closes, resets, or half-closes and goes on reading, as each side is owed.
    fn leave(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let State::Relaying { pair, .. } = conn.take_state() else {
            return;
        };
        if pair.refused() {
            let error = dial::refused_in_silence(&conn.forward.rule.connect);
            conn.forward.refused.fetch_add(1, Ordering::Relaxed);
            complain(&conn.forward, &error, now);
        }
        let farewells = [pair.farewell(CLIENT), pair.farewell(SERVER)];
        let sides = pair.into_ends(&mut self.pool).into_iter().zip(farewells);
        let mut leaving = [None, None];
        for (side, (mut end, farewell)) in sides.enumerate() {
            // Rule 2 of a good neighbour: hyperkit reads EOF from us and is read to its EOF, whatever happened.
            let polite = conn.forward.is_polite(side);
            if polite && !end.input_ended() || !polite && farewell == Farewell::Linger {
                end.shutdown_write();
                leaving[side] = Some(Leave { end, reset: false });
            } else if polite || farewell == Farewell::Close {
                self.world.close(end.socket);
            } else {
                leaving[side] = Some(Leave { end, reset: true });
            }
        }
        self.begin_leaving(id, leaving, now);
    }

    fn begin_leaving(&mut self, id: Id, leaving: [Option<Leave<W::Stream>>; 2], now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let polite = |side: usize| leaving[side].is_some() && conn.forward.is_polite(side);
        let time = match self.phase {
            Phase::Cutting => LAST_LEAVE.min(self.shared.limits.drain_timeout),
            _ if polite(CLIENT) || polite(SERVER) => self.shared.limits.drain_timeout,
            _ => LINGER,
        };
        conn.timer = None;
        conn.state = State::Leaving {
            ends: leaving,
            until: Some(now + time),
        };
        self.go_on_leaving(id, now);
    }

    fn go_on_leaving(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let State::Leaving { ends, until } = &mut conn.state else {
            return;
        };
        let mut more = false;
        let mut look_again = None;
        for (side, slot) in ends.iter_mut().enumerate() {
            let Some(Leave { mut end, reset }) = slot.take() else {
                continue;
            };
            more |= end.discard(&mut self.pool);
            if let Some(permit) = conn.permit.as_ref().filter(|_| side == SERVER)
                && (end.received() > 0 || end.input_ended())
            {
                permit.answered();
            }
            if reset {
                if end.is_dead() || self.world.unacknowledged(&end.socket) == 0 {
                    self.world.reset(end.socket);
                    continue;
                }
                look_again = Some(now + RESET_PAUSE);
            } else if end.input_ended() {
                self.world.close(end.socket);
                continue;
            }
            *slot = Some(Leave { end, reset });
        }
        if ends.iter().all(Option::is_none) {
            return self.forget(id);
        }
        let until = *until;
        if until.is_some_and(|until| now >= until) {
            return self.abandon(id, now);
        }
        if let Some(at) = [until, look_again].into_iter().flatten().min() {
            self.set_timer(id, at);
        }
        if more {
            self.make_ready(id);
        }
    }

    /// Closes what did not end in time, with nothing unread in it.
    fn abandon(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let State::Leaving { ends, .. } = conn.take_state() else {
            return;
        };
        for (side, leave) in ends.into_iter().enumerate() {
            let Some(Leave { mut end, reset }) = leave else {
                continue;
            };
            if reset {
                self.world.reset(end.socket);
                continue;
            }
            // First nothing more may come (the device's next write fails, and it tells the guest), then what has come
            // is taken out: a close with data unread is what kills the VM.
            self.world.shutdown_read(&end.socket);
            end.latch(Readiness {
                readable: true,
                ..Readiness::default()
            });
            for _ in 0..LAST_TURNS {
                if !end.discard(&mut self.pool) {
                    break;
                }
            }
            self.world.close(end.socket);
            if conn.forward.is_polite(side) {
                conn.forward.abandoned.fetch_add(1, Ordering::Relaxed);
                let text = "closed a connection that hyperkit did not end within the drain timeout";
                if let Some(more) = conn.forward.complaints.admit(text, now) {
                    warn!(more, "{}: {text}", conn.forward.rule.connect);
                }
            }
        }
        self.forget(id);
    }

    /// Ends a connection that could not be made, and says why.
    fn refuse(&mut self, id: Id, error: &Error, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        conn.forward.refused.fetch_add(1, Ordering::Relaxed);
        complain(&conn.forward, error, now);
        let client = match conn.take_state() {
            State::Waiting { client, .. } => client,
            State::Connecting { client, server, .. } => {
                self.world.close(server.socket);
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
            let leave = Leave {
                end: client,
                reset: false,
            };
            self.begin_leaving(id, [Some(leave), None], now);
        } else {
            self.world.reset(client.socket);
            self.forget(id);
        }
    }

    /// Sets an end to what has none while the proxy runs: probes.
    pub(super) fn end_probes(&mut self, now: Instant) {
        for id in self.conns.ids() {
            if let Some(conn) = self.conns.get_mut(id)
                && let State::Leaving {
                    until: until @ None,
                    ..
                } = &mut conn.state
            {
                *until = Some(now + LAST_LEAVE);
                self.set_timer(id, now + LAST_LEAVE);
            }
        }
    }

    /// Cuts a connection off, or shortens its leave.
    pub(super) fn cut(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        match &mut conn.state {
            State::Waiting { .. } | State::Connecting { .. } => {
                let cause =
                    io::Error::new(io::ErrorKind::ConnectionAborted, "the proxy is stopping");
                let error = Error::new(Operation::Connect, &conn.forward.rule.connect, cause);
                self.refuse(id, &error, now);
            }
            State::Relaying { .. } => self.leave(id, now),
            State::Leaving { ends, .. } => {
                let ends = std::mem::take(ends);
                self.begin_leaving(id, ends, now);
            }
            State::Moving => {}
        }
    }

    /// Takes a connection out of the books, closing what it still has.
    fn forget(&mut self, id: Id) {
        let Some(conn) = self.conns.remove(id) else {
            return;
        };
        match conn.state {
            State::Waiting { client, .. } => self.world.close(client.socket),
            State::Connecting { client, server, .. } => {
                self.world.close(client.socket);
                self.world.close(server.socket);
            }
            State::Relaying { .. } | State::Leaving { .. } | State::Moving => {}
        }
        conn.span.in_scope(|| {
            debug!(
                sent = conn.counted[CLIENT],
                received = conn.counted[SERVER],
                "closed"
            )
        });
        drop(conn.permit);
        conn.forward.live.fetch_sub(1, Ordering::Relaxed);
        self.shared.inboxes[self.index]
            .load
            .fetch_sub(1, Ordering::Relaxed);
        self.shared.live.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Says why a client was refused, unless it was said a moment ago.
fn complain(forward: &Forward, error: &Error, now: Instant) {
    if let Some(more) = forward.complaints.admit(&error.to_string(), now) {
        match more {
            0 => warn!("refused a client of {}: {error}", forward.rule.listen),
            _ => warn!(
                "refused a client of {}: {error} ({more} more since the last line)",
                forward.rule.listen
            ),
        }
    }
}
