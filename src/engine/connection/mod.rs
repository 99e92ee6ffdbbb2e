//! One connection as a state machine: events, results and the time go in, [`Action`]s and a deadline come out.
//!
//! | state | what it waits for | then |
//! |---|---|---|
//! | [`Waiting`](State::Waiting) | a name, a slot of the VM, the next try | connecting, closing |
//! | [`Connecting`](State::Connecting) | its target | relaying, proving, waiting for the next address, closing |
//! | [`Proving`](State::Proving) | whether the guest has taken the dial | relaying, waiting for the next try, closing |
//! | [`Relaying`](State::Relaying) | bytes, half-closes, timeouts | closing |
//! | [`OnThreads`](State::OnThreads) | the end of the threads that carry it | closed |
//! | [`Closing`](State::Closing) | each peer's EOF, or the drain timeout | closed |
//!
//! Nothing here reaches into the loop. What has to be done by it is an [`Action`], in the order in which it is to be
//! done; what comes of it is told by the `take_` function that the action names.

mod closing;
mod dialling;
mod idle;
mod proving;
mod relaying;
#[cfg(all(test, target_os = "linux"))]
pub(crate) mod transitions;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{Span, debug, debug_span, warn};

use crate::dial::Dial;
use crate::engine::Phase;
use crate::engine::admission::quotas::Holder;
use crate::engine::admission::{Full, Slot};
use crate::engine::counters::Reason;
use crate::engine::forward::Forward;
use crate::engine::id::ConnectionId;
use crate::engine::observer::What;
use crate::engine::relay::{self, End, Pair, Pool, Readiness, Side};
use crate::engine::routes::{Route, Routes};
use crate::engine::status::{ConnectionState, ConnectionStatus};
use crate::engine::table::Id;
use crate::error::Error;
use crate::name::SocketName;

pub(crate) use closing::{Closing, LAST_DRAIN, LINGER, LONGEST_RESET_PAUSE, RESET_PAUSE};
pub(crate) use dialling::{Dialled, Held};
use idle::Idle;

/// What a connection asks of its sockets beside carrying bytes.
pub(crate) trait Socket: relay::Socket {
    /// Returns whether a connect that was begun is done.
    ///
    /// # Errors
    /// Why it has failed.
    fn connected(&self) -> io::Result<bool>;
    /// Takes nothing more from the peer.
    fn shutdown_read(&self);
    /// Returns how many bytes were written that a reset now would take away from the peer.
    fn unacknowledged(&self) -> usize;
    /// Returns what the kernel calls this end.
    fn local_name(&self) -> Option<SocketName>;
    /// Returns the name of the Unix listener that it was dialled at.
    fn unix_peer_name(&self) -> Option<Vec<u8>>;
    /// Returns whether this accepted Unix socket was connected by this very process.
    fn is_from_this_process(&self) -> bool;
}

/// What the loop is to do for a connection.
#[derive(Debug)]
pub(crate) enum Action<S> {
    /// Ask for the addresses of the target's name; [`Connection::take_addresses`].
    Resolve,
    /// Dial the target on a thread, for so long at most; [`Connection::take_dialled`].
    DialOnThread(Duration),
    /// Ask the gate of the target's VM for a slot; [`Connection::take_slot`].
    Admit,
    /// Begin to connect to [`Connection::endpoint`]; [`Connection::take_connect`].
    Connect,
    /// Explain why a dial has failed; [`Connection::take_explanation`].
    Explain(io::Error),
    /// Find out whether the guest has answered this dial; [`Connection::step`] once it has.
    Prove,
    /// Look whether the process at the other end of that side is ending; [`Connection::take_peer`].
    LookAtPeer(Side),
    /// Carry between these two by threads; [`Connection::take_threads_end`].
    StartThreads([S; 2]),
    /// Look how far the threads are; [`Connection::take_progress`].
    LookAtThreads,
    /// End the threads.
    CutThreads,
    /// Close a socket, and then give its slot back.
    Close(S, Option<Slot>),
    /// Close a socket so that its peer reads a reset, where the family can.
    Reset(S),
    /// Drop the connection: it is over.
    Drop,
}

/// What a connection is given with each call.
#[derive(Debug)]
pub(crate) struct Context<'a, S: Socket> {
    /// By what the loop knows the connection.
    pub(crate) id: Id,
    pub(crate) now: Instant,
    pub(crate) phase: Phase,
    /// When the process went on that had stood still.
    pub(crate) thawed: Option<Instant>,
    pub(crate) routes: &'a Routes,
    pub(crate) pool: &'a mut Pool<S::Pipe>,
    /// What the loop is to do, of all connections.
    pub(crate) actions: &'a mut VecDeque<(Id, Action<S>)>,
    /// The connection has work left: [`Connection::step`] is to be called again, after the others.
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
    /// How others call it; a probe has no name.
    pub(crate) name: Option<ConnectionId>,
    pub(crate) forward: Arc<Forward>,
    pub(crate) state: State<S>,
    /// When [`step`](Connection::step) is to be called, if nothing comes before.
    pub(crate) wake_at: Option<Instant>,
    /// Set by the loop alone: it stands in the ready queue.
    pub(crate) is_queued: bool,
    /// The slot of each side's VM.
    pub(crate) slots: [Option<Slot>; 2],
    /// What of it leads to another forward of ours, or comes from one.
    route: Option<Box<Route>>,
    /// What is to be known of it while its target isn't there, if it is to be held then.
    pub(crate) held: Option<Held>,
    idle: Idle,
    /// See [`Dialled::is_inherited`].
    is_inherited: bool,
    /// Bytes of each side that were counted.
    counted: [u64; 2],
    peer: SocketName,
    pub(crate) since: Instant,
    span: Span,
    /// The name of its state.
    #[cfg(all(test, target_os = "linux"))]
    state_name: &'static str,
}

#[derive(Debug)]
pub(crate) enum State<S: relay::Socket> {
    /// For a name, for a slot, or for another try.
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
    /// Carried by threads of its own, which also close the ends gracefully: one of them can't be waited for.
    OnThreads,
    /// Each end is closed gracefully or reset, until then (or until the proxy stops).
    Closing {
        ends: [Option<Closing<S>>; 2],
        until: Option<Instant>,
    },
    /// It has no socket any more.
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

    /// Returns its name.
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
        peer: SocketName,
        state: State<S>,
        now: Instant,
    ) -> Connection<S> {
        let rule = &forward.rule;
        let span = debug_span!("connection", listen = %rule.listen, connect = %rule.connect);
        let guest = forward.gates[Side::Client].as_ref();
        let guest = guest.map(|gate| gate.accept(forward.id));
        if let Some(guest) = &guest {
            // That it dials us is a sign of life.
            guest.note_answer(now);
        }
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
            slots: [guest, None],
            route: None,
            held: None,
            idle: Idle::new(now),
            is_inherited: false,
            counted: [0; 2],
            peer,
            since: now,
            span,
        }
    }

    /// Goes over to another state.
    fn enter(&mut self, state: State<S>) {
        #[cfg(all(test, target_os = "linux"))]
        {
            let name = state.name();
            let before = std::mem::replace(&mut self.state_name, name);
            transitions::note(before, name);
        }
        self.state = state;
    }

    /// Takes the sockets out of a state that is over; [`enter`](Connection::enter) is to follow.
    fn leave_state(&mut self) -> State<S> {
        std::mem::replace(&mut self.state, State::Closed)
    }

    /// Has [`step`](Connection::step) called at `at` at the latest.
    fn wake_by(&mut self, at: Instant) {
        self.wake_at = Some(self.wake_at.map_or(at, |before| before.min(at)));
    }

    /// Returns what its slots are counted for.
    pub(crate) fn holder(&self) -> Holder {
        match self.name {
            Some(_) => Holder::Forward(self.forward.id),
            None => Holder::Probes,
        }
    }

    /// Returns whether it is [`Waiting`](State::Waiting).
    pub(crate) fn is_waiting(&self) -> bool {
        matches!(self.state, State::Waiting { .. })
    }

    /// Tells the observer.
    fn notify(&self, what: What<'_>) {
        if let Some(name) = self.name {
            self.forward.notify_observer(name, self.peer, what);
        }
    }

    /// Counts a client that could not be carried, and says why, unless that was said a moment ago.
    fn note_refusal(&self, error: &Error, reason: Reason, now: Instant) {
        let forward = &self.forward;
        forward.tally.refused(reason);
        forward.status_cell.set_error(error.to_string());
        self.notify(What::Refused(error));
        // Of those who are not there it was told when that was found.
        if reason == Reason::Absent {
            debug!("refused a client of {}: {error}", forward.rule.listen);
            return;
        }
        if let Some(more) = forward.log_limiter.admit(&error.to_string(), now) {
            match more {
                0 => warn!("refused a client of {}: {error}", forward.rule.listen),
                _ => warn!(
                    "refused a client of {}: {error} ({more} more since the last line)",
                    forward.rule.listen
                ),
            }
        }
    }

    /// Returns what is to be told of it; `on_threads` is what its threads have delivered.
    pub(crate) fn status(
        &self,
        on_threads: Option<[u64; 2]>,
        now: Instant,
    ) -> Option<ConnectionStatus> {
        let moved = match &self.state {
            State::Relaying { pair, .. } => Side::BOTH.map(|side| pair.delivered(side)),
            _ => on_threads.unwrap_or(self.counted),
        };
        Some(ConnectionStatus {
            id: self.name?,
            forward: self.forward.id,
            peer: self.peer,
            state: match &self.state {
                State::Waiting { .. } | State::Connecting { .. } | State::Proving { .. } => {
                    ConnectionState::Dialling
                }
                State::Relaying { .. } | State::OnThreads => ConnectionState::Open,
                State::Closing { .. } | State::Closed => ConnectionState::Ending,
            },
            sent: moved[Side::Client],
            received: moved[Side::Server],
            age: now.saturating_duration_since(self.since),
        })
    }

    /// Returns the socket of a side while it is [`Relaying`](State::Relaying).
    pub(crate) fn socket(&self, side: Side) -> Option<&S> {
        match &self.state {
            State::Relaying { pair, .. } => Some(&pair.ends[side].socket),
            _ => None,
        }
    }

    /// Has the socket of a side closed, and its slot given back.
    fn close_socket(&mut self, side: Side, end: End<S>, cx: &mut Context<'_, S>)
    where
        S: Socket,
    {
        cx.request(Action::Close(end.socket, self.slots[side].take()));
    }

    /// Latches what an event has said of one side's socket; [`step`](Connection::step) is to follow.
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
    /// Goes on: something has come, or its time has.
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

    /// Cuts it off, or shortens the time of its closing.
    pub(crate) fn cut(&mut self, cx: &mut Context<'_, S>) {
        match &self.state {
            State::Waiting { .. } | State::Connecting { .. } | State::Proving { .. } => {
                self.refuse_at_the_end(cx);
            }
            State::Relaying { .. } => self.close_pair(cx),
            State::OnThreads => self.cut_threads(cx),
            State::Closing { .. } => self.hurry(cx),
            State::Closed => {}
        }
    }

    /// Tells of the end, once it is [`Closed`](State::Closed) and its sockets are.
    pub(crate) fn end(mut self, routes: &Routes, now: Instant) -> Arc<Forward> {
        self.span.in_scope(|| {
            debug!(
                sent = self.counted[Side::Client],
                received = self.counted[Side::Server],
                "closed"
            )
        });
        self.notify(What::Closed {
            sent: self.counted[Side::Client],
            received: self.counted[Side::Server],
            age: now.saturating_duration_since(self.since),
        });
        if let Some(route) = self.route.take() {
            routes.forget(*route);
        }
        self.forward
    }
}
