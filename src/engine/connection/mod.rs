//! One connection as a state machine: events, results and the time go in; [`Action`]s and a
//! deadline come out.
//!
//! | state | what it waits for | then |
//! |---|---|---|
//! | [`Waiting`](State::Waiting) | the client's header, a name, a slot of the VM, the next dial | connecting, closing, closed |
//! | [`Connecting`](State::Connecting) | its target | relaying, proving, waiting, closing, closed |
//! | [`Proving`](State::Proving) | whether the guest took the dial | relaying, waiting, closing |
//! | [`Relaying`](State::Relaying) | bytes, half-closes, timeouts | closing |
//! | [`OnThreads`](State::OnThreads) | the end of the relay threads | closed |
//! | [`Closing`](State::Closing) | each peer's EOF, or the drain timeout | closed |
//!
//! The engine never calls the loop. What the loop has to do is an [`Action`]; actions are carried
//! out in their order, and the result is handed back through the `take_` method that the action's
//! doc names.

mod closing;
mod dialling;
mod idle;
mod proving;
mod proxied;
mod racing;
mod relaying;
#[cfg(all(test, target_os = "linux"))]
pub(crate) mod transitions;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use tracing::level_filters::LevelFilter;
use tracing::{Span, debug, error_span, info, warn};

use crate::dial::{Dial, Race};
use crate::engine::Phase;
use crate::engine::admission::quotas::Holder;
use crate::engine::admission::{Full, Slot};
use crate::engine::end_reason::{EndReason, Reason};
use crate::engine::ended::EndedConnection;
use crate::engine::forward::Forward;
use crate::engine::id::ConnectionId;
use crate::engine::observer::What;
use crate::engine::relay::{self, End, Pair, Pool, Readiness, Side};
use crate::engine::routes::{Route, Routes};
use crate::engine::status::{ConnectionState, ConnectionStatus, Waiting};
use crate::engine::table::Id;
use crate::error::Error;
use crate::name::{Peer, PeerProcess, SocketName};

/// The target of the lines of the access log, by which they can be filtered.
const ACCESS: &str = "hvsock::access";

pub(crate) use closing::{Closing, LAST_DRAIN, LINGER};
pub(crate) use dialling::{Dialled, Held};
use idle::Idle;
pub(crate) use idle::Progress;
use proxied::Proxied;

/// What a connection needs of its sockets besides carrying bytes.
pub(crate) trait Socket: relay::Socket {
    /// Returns whether a connect that was begun is done.
    ///
    /// # Errors
    /// Returns why the connect failed.
    fn connected(&self) -> io::Result<bool>;
    /// Shuts down the input: nothing more is taken from the peer.
    fn shutdown_read(&self);
    /// Returns how many bytes were written that a reset would now discard before the peer has them.
    fn unacknowledged(&self) -> usize;
    /// Returns the local name that the kernel gives this socket.
    fn local_name(&self) -> Option<SocketName>;
    /// Returns the name of the Unix listener at which the socket was dialled.
    fn unix_peer_name(&self) -> Option<Vec<u8>>;
    /// Returns the process that made the other end, if it is a Unix socket.
    fn peer_process(&self) -> Option<PeerProcess>;
    /// Returns how many bytes have come that were not read yet, as far as the system tells.
    fn unread(&self) -> Option<u64>;
    /// Returns whether this accepted Unix socket was connected by this process.
    fn is_from_this_process(&self) -> bool;
    /// Returns whether another process has a copy of it, and will close it gracefully when this
    /// process has ended.
    fn is_guarded(&self) -> bool;
}

/// What the loop is to do for a connection.
#[derive(Debug)]
pub(crate) enum Action<S> {
    /// Resolve the target's name; the result goes to [`Connection::take_addresses`].
    Resolve,
    /// Dial the target on a thread, for at most so long; the result goes to
    /// [`Connection::take_dialled`].
    DialOnThread(Duration),
    /// Ask the gate of the target's VM for a slot; it goes to [`Connection::take_slot`], and the
    /// reason why there is none yet to [`Connection::take_full`].
    Admit,
    /// Begin to connect to [`Connection::endpoint`]; the result goes to
    /// [`Connection::take_connect`].
    Connect,
    /// Explain why a dial failed; the explanation goes to [`Connection::take_explanation`].
    Explain(io::Error),
    /// Find out whether the guest has answered this dial; [`Connection::step`] is called once it
    /// has.
    Prove,
    /// Find out whether the process at the other end of that side is ending; the answer goes to
    /// [`Connection::take_peer`].
    LookAtPeer(Side),
    /// Relay between these two sockets on threads; their end goes to
    /// [`Connection::take_threads_end`].
    StartThreads([S; 2]),
    /// Read the progress of the threads; it goes to [`Connection::take_progress`].
    LookAtThreads,
    /// End the threads.
    CutThreads,
    /// Close a socket, then give its slot back.
    Close(S, Option<Slot>),
    /// Close a socket so that its peer reads a reset; where the family has none, close it.
    Reset(S),
    /// Leave a socket to the process that has a copy of it.
    Leave(S),
    /// Drop the connection, which is closed.
    Drop,
}

/// What every call of a connection is given.
#[derive(Debug)]
pub(crate) struct Context<'a, S: Socket> {
    /// The loop's identifier of the connection.
    pub(crate) id: Id,
    pub(crate) now: Instant,
    pub(crate) phase: Phase,
    /// The time at which the process last went on after a freeze.
    pub(crate) thawed: Option<Instant>,
    pub(crate) routes: &'a Routes,
    pub(crate) pool: &'a mut Pool<S::Pipe>,
    /// The queue of actions, of all connections.
    pub(crate) actions: &'a mut VecDeque<(Id, Action<S>)>,
    /// Whether the connection has work left: [`Connection::step`] is to be called again, after the
    /// others.
    pub(crate) has_more_work: bool,
}

impl<S: Socket> Context<'_, S> {
    fn request(&mut self, action: Action<S>) {
        self.actions.push_back((self.id, action));
    }
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Connection<S: relay::Socket> {
    /// The public identifier; a probe has none.
    pub(crate) name: Option<ConnectionId>,
    pub(crate) forward: Arc<Forward>,
    pub(crate) state: State<S>,
    /// The time at which [`step`](Connection::step) is to be called, if no event comes before.
    pub(crate) wake_at: Option<Instant>,
    /// Whether the connection stands in the ready queue. Only the loop sets it.
    pub(crate) is_queued: bool,
    /// The slot of each side that is a hyperkit VM.
    pub(crate) slots: [Option<Slot>; 2],
    /// How the connection leads to another forward of this process, or comes from one.
    route: Option<Box<Route>>,
    /// The retries, if the client is held while its target is absent.
    pub(crate) held: Option<Held>,
    /// What the client has said of its own client, if it is a proxy.
    proxied: Option<Box<Proxied>>,
    idle: Idle,
    /// See [`Dialled::is_inherited`].
    is_inherited: bool,
    /// The bytes of each side that the counters include already.
    counted: [u64; 2],
    peer: Peer,
    pub(crate) since: Instant,
    /// Why the connection ends, as far as it is known.
    why: Option<EndReason>,
    /// The error for which the client was refused.
    error: Option<Arc<str>>,
    /// Whether it was [cut off](Connection::cut). Relay threads are cut again until they have ended.
    is_cut_off: bool,
    /// The name of the current state.
    #[cfg(all(test, target_os = "linux"))]
    state_name: &'static str,
}

#[derive(Debug)]
pub(crate) enum State<S: relay::Socket> {
    /// Waits for the client's header, for an address, for a slot, or for the next dial.
    Waiting {
        client: End<S>,
        dial: Dial,
        full: Option<Full>,
    },
    /// `server` is the latest attempt's; those at other addresses may be under way still.
    Connecting {
        client: End<S>,
        server: End<S>,
        race: Race<S>,
    },
    /// It is not known yet whether the guest has taken the dial. `until` ends the wait if no probe
    /// can tell.
    Proving {
        client: End<S>,
        server: End<S>,
        dial: Dial,
        until: Option<Instant>,
    },
    Relaying {
        pair: Pair<S>,
        /// The time until which the client's half-close to hyperkit is held back, for a refusal to
        /// be told from an empty answer.
        refusal_wait: Option<Instant>,
        /// The end of the drain timeout, set while a peer is gone or a half-close is held back.
        drain_deadline: Option<Instant>,
    },
    /// Relayed by threads, which also drain and close the ends, because one of them can't be
    /// polled.
    OnThreads,
    /// Each end is drained or reset, until the given time (or until the proxy stops). `settled` is
    /// when the slots of ends that were given up are free again, if there are such.
    Closing {
        ends: [Option<Closing<S>>; 2],
        until: Option<Instant>,
        settled: Option<Instant>,
    },
    /// The connection has no socket any more.
    Closed,
}

impl<S: relay::Socket> State<S> {
    fn waiting(client: End<S>, dial: Dial) -> State<S> {
        State::Waiting {
            client,
            dial,
            full: None,
        }
    }

    /// Returns the state's name.
    #[cfg(all(test, target_os = "linux"))]
    fn name(&self) -> &'static str {
        match self {
            State::Waiting { .. } => "waiting",
            State::Connecting { .. } => "connecting",
            State::Proving { .. } => "proving",
            State::Relaying { .. } => "relaying",
            State::OnThreads => "on threads",
            State::Closing { .. } => "closing",
            State::Closed => "closed",
        }
    }
}

impl<S: relay::Socket> Connection<S> {
    fn new(
        name: Option<ConnectionId>,
        forward: Arc<Forward>,
        peer: Peer,
        state: State<S>,
        now: Instant,
    ) -> Connection<S> {
        #[cfg(all(test, target_os = "linux"))]
        transitions::note("new", state.name());
        Connection {
            name,
            forward,
            #[cfg(all(test, target_os = "linux"))]
            state_name: state.name(),
            state,
            wake_at: None,
            is_queued: false,
            slots: [None, None],
            route: None,
            held: None,
            proxied: None,
            idle: Idle::new(now),
            is_inherited: false,
            counted: [0; 2],
            peer,
            since: now,
            why: None,
            error: None,
            is_cut_off: false,
        }
    }

    /// Changes to another state.
    fn enter(&mut self, state: State<S>) {
        #[cfg(all(test, target_os = "linux"))]
        {
            let name = state.name();
            let before = std::mem::replace(&mut self.state_name, name);
            transitions::note(before, name);
        }
        self.state = state;
    }

    /// Takes the sockets out of a state that ends; [`enter`](Connection::enter) must follow.
    fn take_state(&mut self) -> State<S> {
        std::mem::replace(&mut self.state, State::Closed)
    }

    /// Ensures that [`step`](Connection::step) is called at `at` or before.
    fn wake_by(&mut self, at: Instant) {
        self.wake_at = Some(self.wake_at.map_or(at, |before| before.min(at)));
    }

    /// Returns the holder that the connection's slots are counted for.
    pub(crate) fn holder(&self) -> Holder {
        match self.name {
            Some(_) => Holder::Forward(self.forward.id),
            None => Holder::Probes,
        }
    }

    /// Returns whether the connection is [`Waiting`](State::Waiting).
    pub(crate) fn is_waiting(&self) -> bool {
        matches!(self.state, State::Waiting { .. })
    }

    /// Returns the span of the connection's log lines. It is made for each of them, so that a
    /// connection of which nothing is logged costs none.
    fn span(&self) -> Span {
        let forward = self.forward.label();
        match self.name {
            Some(ConnectionId(id)) => error_span!("connection", id, %forward, peer = %self.peer),
            None => error_span!("probe", %forward),
        }
    }

    /// Writes a line at the level debug, in the connection's span.
    fn debug(&self, write: impl FnOnce()) {
        if LevelFilter::current() >= LevelFilter::DEBUG {
            self.span().in_scope(write);
        }
    }

    /// Notes why the connection ends: see [`EndReason::note`].
    fn end_because(&mut self, why: EndReason) {
        why.note(&mut self.why);
    }

    /// Notifies the observer.
    fn notify(&self, what: What<'_>) {
        if let Some(name) = self.name {
            self.forward.notify_observer(name, self.peer, what);
        }
    }

    /// Counts a refused client, and logs the reason; a repeated one only now and then.
    fn note_refusal(&mut self, error: &Error, reason: Reason, now: Instant) {
        let text = error.to_string();
        self.error = Some(text.as_str().into());
        let forward = &self.forward;
        forward.tally.refused(reason);
        self.notify(What::Refused(error));
        let connected = forward.tally.connected.load(Ordering::Relaxed);
        forward.status_cell.set_error(text.clone(), connected);
        let is_turned_away = self.slots[Side::Client]
            .as_ref()
            .is_some_and(Slot::is_turned_away);
        // The absence of a target was logged when it was noticed, and that a guest dials too much
        // by the gate.
        if reason == Reason::Absent || is_turned_away {
            return self.debug(|| debug!("refused a client of {}: {error}", forward.rule.listen));
        }
        if let Some(more) = forward.log_limiter.admit(&text, now) {
            self.span().in_scope(|| match more {
                0 => warn!("refused a client of {}: {error}", forward.rule.listen),
                _ => warn!(
                    "refused a client of {}: {error} ({more} more since the last line)",
                    forward.rule.listen
                ),
            });
        }
    }

    /// Returns the state in the words of a status. `half_closed` is the side that has ended.
    fn state_word(&self, half_closed: Option<Side>) -> ConnectionState {
        match &self.state {
            State::Waiting { full, .. } => {
                let redials = self.held.as_ref().is_some_and(|held| held.redial.is_some());
                let slot = self.slots[Side::Server].as_ref();
                let is_queued = slot.is_some_and(|slot| !slot.is_admitted());
                match full.is_some() || redials || is_queued {
                    true => ConnectionState::Held,
                    false => ConnectionState::Dialling,
                }
            }
            State::Connecting { .. } | State::Proving { .. } => ConnectionState::Dialling,
            State::OnThreads if self.is_cut_off => ConnectionState::Closing,
            State::Relaying { .. } | State::OnThreads => match half_closed {
                None => ConnectionState::Open,
                Some(Side::Client) => ConnectionState::HalfClosedByClient,
                Some(Side::Server) => ConnectionState::HalfClosedByServer,
            },
            State::Closing { .. } | State::Closed => ConnectionState::Closing,
        }
    }

    /// Returns the socket of a side while the connection is [`Relaying`](State::Relaying).
    pub(crate) fn socket(&self, side: Side) -> Option<&S> {
        match &self.state {
            State::Relaying { pair, .. } => Some(&pair.ends[side].socket),
            _ => None,
        }
    }

    /// Requests the close of a side's socket; its slot is given back after that.
    fn close_socket(&mut self, side: Side, end: End<S>, cx: &mut Context<'_, S>)
    where
        S: Socket,
    {
        cx.request(Action::Close(end.socket, self.slots[side].take()));
    }

    /// Latches the readiness of one side's socket; [`step`](Connection::step) must follow.
    pub(crate) fn latch(&mut self, side: Side, readiness: Readiness)
    where
        S: Socket,
    {
        match &mut self.state {
            State::Waiting { client, .. }
            | State::Connecting { client, .. }
            | State::Proving { client, .. }
                if side == Side::Client =>
            {
                client.latch(readiness);
            }
            State::Connecting { server, .. } | State::Proving { server, .. } => {
                server.latch(readiness);
            }
            State::Relaying { pair, .. } => pair.ends[side].latch(readiness),
            State::Closing { ends, .. } => {
                if let Some(closing) = &mut ends[side] {
                    closing.end.latch(readiness);
                }
            }
            State::Waiting { .. } | State::OnThreads | State::Closed => {}
        }
    }
}

impl<S: Socket> Connection<S> {
    /// Returns the connection's status. `on_threads` is how far its threads are.
    pub(crate) fn status(
        &mut self,
        on_threads: Option<Progress>,
        now: Instant,
    ) -> Option<ConnectionStatus> {
        if let Some(progress) = on_threads {
            self.note_progress(progress, now);
        }
        let (mut moved, mut half_closed, mut waiting) = (self.counted, None, None);
        if let State::Relaying { pair, .. } = &self.state {
            moved = Side::BOTH.map(|side| pair.delivered(side));
            half_closed = pair.half_closed_by();
            waiting = Some(Waiting {
                to_server: bytes_on_their_way(pair, Side::Client),
                to_client: bytes_on_their_way(pair, Side::Server),
            });
        } else if let Some(progress) = on_threads {
            (moved, half_closed) = (progress.delivered, progress.half_closed);
        }
        Some(ConnectionStatus {
            id: self.name?,
            forward: self.forward.id,
            peer: self.peer.name,
            process: self.peer.process,
            state: self.state_word(half_closed),
            sent: moved[Side::Client],
            received: moved[Side::Server],
            waiting,
            idle: self.idle.time(now),
            age: now.saturating_duration_since(self.since),
        })
    }

    /// Goes on after an event or after the deadline.
    pub(crate) fn step(&mut self, cx: &mut Context<'_, S>) {
        match &self.state {
            State::Waiting { .. } => self.go_on_waiting(cx),
            State::Connecting { .. } => self.go_on_connecting(cx),
            State::Proving { .. } => self.go_on_proving(cx),
            State::Relaying { .. } => self.relay(cx),
            State::OnThreads => self.go_on_with_threads(cx),
            State::Closing { .. } => self.go_on_closing(cx),
            State::Closed => {}
        }
    }

    /// Cuts the connection off, for that reason, or shortens its closing.
    pub(crate) fn cut(&mut self, why: EndReason, cx: &mut Context<'_, S>) {
        if !matches!(self.state, State::Closing { .. } | State::Closed) {
            self.end_because(why);
        }
        self.is_cut_off = true;
        match &self.state {
            State::Waiting { .. } | State::Connecting { .. } | State::Proving { .. } => {
                self.refuse_cut_off(cx);
            }
            State::Relaying { .. } => self.close_pair(cx),
            State::OnThreads => self.cut_threads(cx),
            State::Closing { .. } => self.shorten_closing(cx),
            State::Closed => {}
        }
    }

    /// Reports the end of a connection that is [`Closed`](State::Closed), after its sockets were
    /// closed.
    pub(crate) fn end(mut self, routes: &Routes, now: Instant) -> Arc<Forward> {
        if self.name.is_some() {
            self.report_end(now);
        }
        if let Some(route) = self.route.take() {
            routes.forget(*route);
        }
        self.forward
    }

    /// Counts the end, and reports it to the log and to the observer.
    fn report_end(&self, now: Instant) {
        let why = self.why.unwrap_or(EndReason::Failed);
        let [sent, received] = self.counted;
        let age = now.saturating_duration_since(self.since);
        self.forward.tally.ended(why);
        self.log_access(why, age);
        self.notify(What::Closed {
            sent,
            received,
            age,
            why,
        });
        if let Some(id) = self.name {
            self.forward.ended().note(EndedConnection {
                id,
                forward: self.forward.id,
                rule: Arc::clone(&self.forward.rule),
                peer: self.peer.name,
                process: self.peer.process,
                sent,
                received,
                age,
                at: SystemTime::now(),
                why,
                error: self.error.clone(),
            });
        }
    }

    /// Writes the line of the access log. It has all in it, and stands in no span, so that it can
    /// be filtered by its target alone.
    fn log_access(&self, why: EndReason, age: Duration) {
        let (forward, peer) = (self.forward.label(), self.peer);
        // Not called target: that is what tracing calls the part of the program.
        let connect = &self.forward.rule.connect;
        let id = self.name.map(u64::from);
        let [sent, received] = self.counted;
        let seconds = age.as_secs_f64();
        // The level of a line is a part of its place in the source.
        macro_rules! log {
            ($level:ident) => {
                $level!(
                    target: ACCESS, id, %forward, %peer, %connect, sent, received, seconds, %why,
                    "closed"
                )
            };
        }
        match self.forward.access_log().is_on() {
            true => log!(info),
            false => log!(debug),
        }
    }
}

/// Returns how many bytes of what `side` sends are on their way to the other side: not read yet,
/// held by the relay, or not taken yet where the system tells so.
fn bytes_on_their_way<S: Socket>(pair: &Pair<S>, side: Side) -> Option<u64> {
    let unread = pair.ends[side].socket.unread()?;
    let sent = pair.ends[side.other()].socket.unacknowledged();
    Some(unread + (pair.held(side) + sent) as u64)
}
