//! One connection: what state it is in, and its turns. How it comes to be is told in `dialling`, how it ends in
//! `leaving`.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{Span, debug, debug_span, warn};

use crate::dial::Dial;
use crate::error::{Error, Operation};
use crate::name::SocketName;
use crate::relay::{CLIENT, End, Ending, Pair, Readiness, SERVER, Socket, Turn};

use super::counters::Reason;
use super::forward::Forward;
use super::gate::{Full, Permit, Place, Ticket};
use super::handle::{ConnectionState, ConnectionStatus};
use super::loops::Route;
use super::observer::{ConnectionId, What};
use super::quiet::Quiet;
use super::table::Id;
use super::worker::{Phase, Worker, after};
use super::world::World;

/// Bytes that one connection may move in each direction before the others have their turn.
const BUDGET: usize = 256 * 1024;

/// How long a half-close to a guest that has said nothing yet is kept back. hyperkit refuses by EOF, some 50 µs after
/// the dial: an EOF before our half-close is a refusal, one after it an empty answer.
pub(super) const HOLD: Duration = Duration::from_millis(10);

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
    /// Its right to a place in the VM that is to be dialled.
    pub(super) ticket: Option<Ticket>,
    /// What of it leads to another forward of ours, or comes from one.
    pub(super) route: Option<Box<Route>>,
    /// What is to be known of it while its target isn't there, if it is to be held then.
    pub(super) held: Option<Held>,
    pub(super) quiet: Quiet,
    /// In the ready queue.
    pub(super) ready: bool,
    /// Set by [`Worker::set_timer`] alone.
    pub(super) timer: Option<Instant>,
    /// Bytes of each side that were counted.
    pub(super) counted: [u64; 2],
    pub(super) peer: SocketName,
    pub(super) since: Instant,
    pub(super) span: Span,
    /// The name of its state, for what simulated runs reach.
    #[cfg(all(test, target_os = "linux"))]
    phase: &'static str,
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
    /// It is not known yet whether the guest has taken the dial. Until then, if that can't be found out otherwise.
    Proving {
        client: End<S>,
        server: End<S>,
        dial: Dial,
        until: Option<Instant>,
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

impl<S: Socket> State<S> {
    pub(super) fn waiting(client: End<S>, dial: Dial) -> State<S> {
        State::Waiting {
            client,
            dial,
            full: None,
        }
    }
}

/// A client that is held while its target isn't there.
#[derive(Debug)]
pub(super) struct Held {
    /// Before the next try after this one.
    pub(super) pause: Duration,
    /// When the next try is due, if none is under way.
    pub(super) redial: Option<Instant>,
    /// What the last one came to.
    pub(super) last: Option<(Error, Reason)>,
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
        let place = forward.gates[CLIENT]
            .as_ref()
            .map(|gate| gate.place(forward.id));
        if let Some(place) = &place {
            // That a guest dials us is a sign of life.
            place.heard(since);
        }
        Conn {
            name,
            forward,
            state: State::Moving,
            permit: None,
            place,
            ticket: None,
            route: None,
            held: None,
            quiet: Quiet::new(since),
            ready: false,
            timer: None,
            counted: [0; 2],
            peer,
            since,
            span,
            #[cfg(all(test, target_os = "linux"))]
            phase: "new",
        }
    }

    pub(super) fn latch(&mut self, side: usize, readiness: Readiness) {
        match &mut self.state {
            State::Waiting { client, .. }
            | State::Connecting { client, .. }
            | State::Proving { client, .. }
                if side == CLIENT =>
            {
                client.latch(readiness);
            }
            State::Connecting { server, .. } | State::Proving { server, .. } => {
                server.latch(readiness);
            }
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
                State::Waiting { .. } | State::Connecting { .. } | State::Proving { .. } => {
                    ConnectionState::Dialling
                }
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
    pub(super) fn refused(&self, error: &Error, reason: Reason, now: Instant) {
        let forward = &self.forward;
        forward.tally.refused(reason);
        forward.board.failed(error.to_string());
        self.tell(What::Refused(error));
        // Of those who are not there it was told when that was found.
        if reason == Reason::Absent {
            debug!("refused a client of {}: {error}", forward.rule.listen);
            return;
        }
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

    /// Goes over to another state.
    pub(super) fn enter(&mut self, state: State<S>) {
        #[cfg(all(test, target_os = "linux"))]
        self.note_phase(match &state {
            State::Waiting { .. } => "waiting",
            State::Connecting { .. } => "connecting",
            State::Proving { .. } => "proving",
            State::Relaying { .. } => "relaying",
            State::Bridged => "bridged",
            State::Leaving { .. } => "leaving",
            State::Moving => "moving",
        });
        self.state = state;
    }

    /// Notes the name of the state that it goes over to.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn note_phase(&mut self, phase: &'static str) {
        let before = std::mem::replace(&mut self.phase, phase);
        super::sim::note_transition(before, phase);
    }
}

impl<W: World> Worker<W> {
    /// Makes a pair of a client and the server that it was connected to.
    pub(super) fn connected(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        if matches!(conn.state, State::Connecting { .. }) {
            self.carry(id, None, false, now);
        }
    }

    /// Begins to carry between a client and its server, which has said this already. `taken` if a refusal would be known
    /// by now, however the server's family tells it.
    pub(super) fn carry(
        &mut self,
        id: Id,
        first: Option<(Box<[u8]>, usize)>,
        taken: bool,
        now: Instant,
    ) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let (client, server) = match conn.take_state() {
            State::Connecting { client, server, .. } | State::Proving { client, server, .. } => {
                (client, server)
            }
            other => {
                conn.state = other;
                return;
            }
        };
        conn.span.in_scope(|| debug!("connected"));
        conn.tell(What::Connected);
        conn.forward.found(now);
        (conn.ticket, conn.held) = (None, None);
        conn.quiet = Quiet::new(now);
        if conn.forward.is_bridged() {
            let ends = [client.socket, server.socket];
            let drain = conn.forward.rule.timeouts.drain;
            let begun = self
                .world
                .bridge(id.token(CLIENT), ends, &conn.forward, drain);
            self.timers.set(&mut conn.timer, id, None);
            conn.enter(State::Bridged);
            if let Err(e) = begun {
                let error = Error::new(Operation::Run, "a connection's thread", e);
                conn.refused(&error, Reason::Other, now);
                self.forget(id, now);
            } else {
                self.look_at_bridge(id, now);
            }
            return;
        }
        let mut pair = Pair::new(client, server);
        let mut hold = None;
        if conn.forward.rule.connect.refuses_in_silence() && !taken {
            pair.refuses_silently(UNREAD);
            pair.hold(CLIENT);
            hold = Some(now + HOLD);
        }
        if let Some((buffer, len)) = first {
            pair.give(SERVER, buffer, len);
        }
        // Towards a peer that takes a half-close for the end of both directions it is kept back until the peer has ended.
        for side in [CLIENT, SERVER] {
            if conn.forward.takes_half_close_for_the_end(side)
                || !pair.ends[side].socket.has_half_close()
            {
                pair.hold(1 - side);
            }
        }
        // A VM that dies ends its connections with an EOF, and a peer that can be told so is to know that it broke off.
        // Of a process that has gone already nothing can be learnt later: another serves in its place.
        for side in [CLIENT, SERVER] {
            if conn.forward.is_polite(side)
                && conn.forward.can_reset(1 - side)
                && !self.world.has_peer_ended(&pair.ends[side].socket)
            {
                pair.doubt_end(side);
            }
        }
        self.timers.set(&mut conn.timer, id, None);
        conn.enter(State::Relaying {
            pair,
            hold,
            end: None,
        });
        self.make_ready(id);
    }

    /// Gives a connection its turn: something came, or its time did.
    pub(super) fn step(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        match &mut conn.state {
            State::Waiting { client, dial, .. } => {
                if client.is_gone() {
                    return self.forget(id, now);
                }
                let deadline = dial.deadline();
                if now >= deadline {
                    return self.run_out(id, now);
                }
                if let Some(held) = &conn.held
                    && let Some(redial) = held.redial
                {
                    return match now < redial {
                        true => self.set_timer(id, redial),
                        false => self.begin_dial(id, now),
                    };
                }
                if conn.timer.is_none() {
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
                // First what has come: a connect may have succeeded while the process stood still.
                let attempt = match server.is_writable() {
                    true => match self.world.connected(&server.socket) {
                        Ok(true) => dial.shake_hands(&mut server.socket),
                        other => other,
                    },
                    false => Ok(false),
                };
                let attempt = match attempt {
                    Ok(false) if now >= dial.deadline() => return self.run_out(id, now),
                    Ok(false) if now >= dial.attempt_deadline() => {
                        Err(io::ErrorKind::TimedOut.into())
                    }
                    attempt => attempt,
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
                        conn.enter(State::waiting(client, dial));
                        self.world.close(server.socket);
                        if self.retry(id, e, now) {
                            self.connect(id, now);
                        }
                    }
                }
            }
            State::Proving { .. } => self.go_on_proving(id, now),
            State::Relaying { .. } => self.relay(id, now),
            State::Bridged
                if self.phase == Phase::Cutting
                    || conn.forward.is_cut()
                    || conn.quiet.is_over() =>
            {
                self.cut_bridge(id, now);
            }
            State::Bridged => self.look_at_bridge(id, now),
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
        let signs = |pair: &Pair<_>| {
            [CLIENT, SERVER].map(|side| {
                let end = &pair.ends[side];
                (end.received(), end.input_ended())
            })
        };
        let before = signs(pair);
        let mut turn = pair.turn(&mut self.pool, BUDGET);
        if let Some(until) = *hold
            && pair.is_holding(CLIENT)
            && (pair.ends[SERVER].received() > 0 || now >= until)
        {
            pair.release(CLIENT);
            turn = pair.turn(&mut self.pool, BUDGET);
        }
        for side in [CLIENT, SERVER] {
            if pair.has_doubtful_end(side) {
                let end = match self.world.has_peer_ended(&pair.ends[side].socket) {
                    true => Ending::BrokenOff,
                    false => Ending::Whole,
                };
                pair.settle_end(side, end);
                turn = pair.turn(&mut self.pool, BUDGET);
            }
        }
        let mut moved = false;
        for side in [CLIENT, SERVER] {
            let delivered = pair.delivered(side);
            moved |= delivered > conn.counted[side];
            conn.forward
                .tally
                .delivered(side, delivered - conn.counted[side]);
            conn.counted[side] = delivered;
        }
        if let Some(permit) = &conn.permit
            && (pair.ends[SERVER].received() > 0 || pair.ends[SERVER].input_ended())
        {
            permit.answered();
        }
        let seen = signs(pair);
        if let Some(permit) = &conn.permit
            && seen[SERVER] != before[SERVER]
        {
            permit.heard(now);
        }
        if let Some(place) = &conn.place
            && seen[CLIENT] != before[CLIENT]
        {
            place.heard(now);
        }
        conn.quiet.note(moved, pair.is_half_closed(), now);
        match turn {
            Turn::Again => self.make_ready(id),
            Turn::Done => self.leave(id, now),
            Turn::Wait if pair.is_holding(CLIENT) && hold.is_some() => {
                if let Some(until) = *hold {
                    self.arm(id, until);
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
                if now >= end {
                    return self.leave(id, now);
                }
                self.arm(id, end);
            }
            Turn::Wait => {}
        }
        if turn == Turn::Wait {
            self.cut_if_quiet(id, now);
        }
    }
}
