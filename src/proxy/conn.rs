//! One connection: what state it is in, and its turns. How it comes to be is told in `dialling`, how it ends in
//! `leaving`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::{Span, debug, debug_span, warn};

use crate::dial::{self, Dial};
use crate::error::{Error, Operation};
use crate::name::SocketName;
use crate::relay::{CLIENT, End, Pair, Readiness, SERVER, Socket, Turn};

use super::forward::Forward;
use super::gate::{Full, Gate, Permit, Place};
use super::handle::{ConnectionState, ConnectionStatus};
use super::observer::{ConnectionId, What};
use super::table::Id;
use super::worker::{Phase, Worker, after};
use super::world::World;

/// Bytes that one connection may move in each direction before the others have their turn.
const BUDGET: usize = 256 * 1024;

/// How long a half-close to a guest that has said nothing yet is kept back. hyperkit refuses by EOF, some 50 µs after
/// the dial: an EOF before our half-close is a refusal, one after it an empty answer.
const HOLD: Duration = Duration::from_millis(10);

/// How much can lie unread between us and a guest that has not accepted: more delivered than this, and it has.
/// (hyperkit asks for socket buffers of 256 KiB, `DEFAULT_WRITE_BUF_LENGTH`; kernels double it.)
const UNREAD: u64 = 1024 * 1024;

/// One connection.
#[derive(Debug)]
pub(crate) struct Conn<S: Socket> {
    /// How others call it; a probe has no name.
    pub(super) name: Option<ConnectionId>,
    pub(super) forward: Arc<Forward>,
    pub(super) state: State<S>,
    /// Leave to use the VM that was dialled.
    pub(super) permit: Option<Permit>,
    /// The place that it takes in the VM of the guest that dialled us.
    pub(super) place: Option<Place>,
    /// In the ready queue.
    pub(super) ready: bool,
    pub(super) timer: Option<Instant>,
    /// Bytes of each side that were counted.
    pub(super) counted: [u64; 2],
    pub(super) peer: SocketName,
    pub(super) since: Instant,
    pub(super) span: Span,
}

#[derive(Debug)]
pub(super) enum State<S: Socket> {
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
        /// Until when the client's half-close to hyperkit is kept back.
        hold: Option<Instant>,
        /// When a pair that can only end any more, or waits for one peer's end alone, must have done so.
        end: Option<Instant>,
    },
    /// Carried by threads of its own, which also take leave of the ends: one of them can't be waited for.
    Bridged,
    /// Taking leave of each end, until then (or until the proxy stops).
    Leaving {
        ends: [Option<Leave<S>>; 2],
        until: Option<Instant>,
    },
    /// Between two states, within one call.
    Moving,
}

impl<S> Leave<S> {
    /// An end to be read to its EOF.
    pub(super) fn new(end: End<S>) -> Leave<S> {
        Leave { end, reset: None }
    }
}

/// An end that is not to be closed at once.
#[derive(Debug)]
pub(super) struct Leave<S> {
    pub(super) end: End<S>,
    /// To be reset when the peer has what was sent before, instead of being read to its EOF: a reset overtakes. It is
    /// looked again after this pause.
    pub(super) reset: Option<Duration>,
}

impl<S: crate::relay::Socket> Conn<S> {
    pub(super) fn new(
        name: Option<ConnectionId>,
        forward: Arc<Forward>,
        peer: SocketName,
        since: Instant,
    ) -> Conn<S> {
        let rule = &forward.rule;
        let span = debug_span!("connection", listen = %rule.listen, connect = %rule.connect);
        let place = forward.gates[CLIENT].as_ref().map(Gate::place);
        Conn {
            name,
            forward,
            state: State::Moving,
            permit: None,
            place,
            ready: false,
            timer: None,
            counted: [0; 2],
            peer,
            since,
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
            State::Waiting { .. } | State::Bridged | State::Moving => {}
        }
    }

    /// What is to be told of it; `bridged` is what a bridge has delivered.
    pub(super) fn status(
        &self,
        bridged: Option<[u64; 2]>,
        now: Instant,
    ) -> Option<ConnectionStatus> {
        let moved = match &self.state {
            State::Relaying { pair, .. } => [CLIENT, SERVER].map(|side| pair.delivered(side)),
            _ => bridged.unwrap_or(self.counted),
        };
        Some(ConnectionStatus {
            id: self.name?,
            forward: self.forward.id,
            peer: self.peer,
            state: match &self.state {
                State::Waiting { .. } | State::Connecting { .. } => ConnectionState::Dialling,
                State::Relaying { .. } | State::Bridged => ConnectionState::Open,
                State::Leaving { .. } | State::Moving => ConnectionState::Ending,
            },
            sent: moved[CLIENT],
            received: moved[SERVER],
            age: now.saturating_duration_since(self.since),
        })
    }

    /// Tells the observer.
    pub(super) fn tell(&self, what: What<'_>) {
        if let Some(name) = self.name {
            self.forward.tell(name, self.peer, what);
        }
    }

    /// Counts a client that could not be carried, and says why, unless that was said a moment ago.
    pub(super) fn refused(&self, error: &Error, now: Instant) {
        let forward = &self.forward;
        forward.refused.fetch_add(1, Ordering::Relaxed);
        self.tell(What::Refused(error));
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

    pub(super) fn take_state(&mut self) -> State<S> {
        std::mem::replace(&mut self.state, State::Moving)
    }
}

impl<W: World> Worker<W> {
    /// Makes a pair of a client and the server that it was connected to.
    pub(super) fn connected(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let State::Connecting { client, server, .. } = conn.take_state() else {
            return;
        };
        conn.span.in_scope(|| debug!("connected"));
        conn.tell(What::Connected);
        if conn.forward.is_bridged() {
            let ends = [client.socket, server.socket];
            let drain = conn.forward.rule.timeouts.drain;
            let begun = self
                .world
                .bridge(id.token(CLIENT), ends, &conn.forward, drain);
            conn.timer = None;
            conn.state = State::Bridged;
            if let Err(e) = begun {
                let error = Error::new(Operation::Run, "a connection's thread", e);
                conn.refused(&error, now);
                self.forget(id, now);
            }
            return;
        }
        let mut pair = Pair::new(client, server);
        let mut hold = None;
        if conn.forward.rule.connect.refuses_in_silence() {
            pair.refuses_silently(UNREAD);
            pair.hold(CLIENT);
            hold = Some(now + HOLD);
        }
        // Towards a peer that takes a half-close for the end of both directions it is kept back until the peer has ended.
        for side in [CLIENT, SERVER] {
            if conn.forward.takes_half_close_for_the_end(side)
                || !pair.ends[side].socket.has_half_close()
            {
                pair.hold(1 - side);
            }
        }
        conn.timer = None;
        conn.state = State::Relaying {
            pair,
            hold,
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
                    return self.forget(id, now);
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
                        && (conn.permit.is_some() || conn.forward.gates[SERVER].is_none());
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
                if client.is_gone() {
                    return self.forget_client(id, now);
                }
                if now >= dial.deadline() {
                    let why = "no connection within the dial timeout";
                    let cause = io::Error::new(io::ErrorKind::TimedOut, why);
                    let error = dial::explain(&conn.forward.rule.connect, cause);
                    return self.refuse(id, &error, now);
                }
                let attempt = if now >= dial.attempt_deadline() {
                    Err(io::ErrorKind::TimedOut.into())
                } else if server.is_writable() {
                    match self.world.connected(&server.socket) {
                        Ok(true) => dial.shake_hands(&mut server.socket),
                        other => other,
                    }
                } else {
                    Ok(false)
                };
                match attempt {
                    Ok(true) => self.connected(id, now),
                    Ok(false) => {
                        let deadline = dial.attempt_deadline();
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
            State::Bridged if self.phase == Phase::Cutting || conn.forward.is_cut() => {
                self.cut_bridge(id, now);
            }
            // An event from before.
            State::Bridged => {}
            State::Leaving { .. } => self.go_on_leaving(id, now),
            State::Moving => {}
        }
    }

    pub(super) fn relay(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let State::Relaying { pair, hold, end } = &mut conn.state else {
            return;
        };
        let mut turn = pair.turn(&mut self.pool, BUDGET);
        if let Some(until) = *hold
            && pair.is_holding(CLIENT)
            && (pair.ends[SERVER].received() > 0 || now >= until)
        {
            pair.release(CLIENT);
            turn = pair.turn(&mut self.pool, BUDGET);
        }
        let mut moved = false;
        for side in [CLIENT, SERVER] {
            let delivered = pair.delivered(side);
            moved |= delivered > conn.counted[side];
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
            Turn::Wait if pair.is_holding(CLIENT) && hold.is_some() => {
                if let Some(until) = *hold {
                    self.set_timer(id, until);
                }
            }
            // A half-close that is kept back may wait for an end that never comes: that peer may not pass its own on,
            // or wait for ours. As long as bytes move there is something to wait for.
            Turn::Wait
                if pair.is_ending() || pair.is_holding(CLIENT) || pair.is_holding(SERVER) =>
            {
                if moved && !pair.is_ending() {
                    *end = None;
                }
                let end = *end.get_or_insert(after(now, conn.forward.rule.timeouts.drain));
                if now < end {
                    self.set_timer(id, end)
                } else {
                    self.leave(id, now)
                }
            }
            Turn::Wait => {}
        }
    }
}
