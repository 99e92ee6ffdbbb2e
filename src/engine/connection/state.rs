//! A connection, its states, and the calls that go to the state that it is in.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use crate::dial::{Dial, Race};
use crate::engine::admission::quotas::Holder;
use crate::engine::admission::{Full, Slot};
use crate::engine::end_reason::EndReason;
use crate::engine::forward::Forward;
use crate::engine::id::ConnectionId;
use crate::engine::relay::{End, Pair, Readiness, Side};
use crate::engine::routes::Route;
use crate::name::Peer;
use crate::stream::socket::Socket;

use super::action::{Action, Context};
use super::closing_end::Closing;
use super::closing_times::ClosingTimes;
use super::idle::Idle;
use super::retries::Retries;
use super::socket::ConnectionSocket;
#[cfg(all(test, target_os = "linux"))]
use super::transitions;

/// One connection.
#[derive(Debug)]
pub(crate) struct Connection<S: Socket> {
    /// The public identifier; a probe has none, nor has a remnant.
    pub(crate) name: Option<ConnectionId>,
    /// Whether this is what is left of a connection that has ended: a socket that is read until
    /// the guest ends it, which it has not done in time. The slot counts as lost until then.
    pub(crate) is_remnant: bool,
    pub(crate) forward: Arc<Forward>,
    pub(crate) state: State<S>,
    /// The time at which [`step`](Connection::step) is to be called, if no event comes before.
    pub(crate) wake_at: Option<Instant>,
    /// Whether the connection stands in the ready queue. Only the loop sets it.
    pub(crate) is_queued: bool,
    /// The slot of each side that is a VM, of any family.
    pub(crate) slots: [Option<Slot>; 2],
    /// How the connection leads to another forward of this process, or comes from one.
    pub(super) route: Option<Box<Route>>,
    /// The retries, if the client is held while its target is absent.
    pub(crate) retries: Option<Retries>,
    /// What the client has said of its own client, if it is a proxy.
    pub(super) proxied: Option<Box<Proxied>>,
    pub(super) idle: Idle,
    /// Whether another process serves the target's socket than the one that began to listen. The
    /// system doesn't name it, so nothing is known of its end.
    pub(super) is_inherited: bool,
    /// The bytes of each side that the counters include already.
    pub(super) counted: [u64; 2],
    pub(super) peer: Peer,
    pub(crate) since: Instant,
    /// Why the connection ends, as far as it is known.
    pub(super) why: Option<EndReason>,
    /// The program that it leads to.
    pub(super) program: Program,
    /// The error for which the client was refused.
    pub(super) error: Option<Arc<str>>,
    /// Whether it was [cut off](Connection::cut_off). Relay threads are cut again until they have
    /// ended.
    pub(super) is_cut_off: bool,
    /// The name of the current state.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) state_name: &'static str,
}

#[derive(Debug)]
pub(crate) enum State<S: Socket> {
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
    /// Each end is drained or reset.
    Closing {
        ends: [Option<Closing<S>>; 2],
        times: ClosingTimes,
    },
    /// The connection has no socket any more.
    Closed,
}

impl<S: Socket> State<S> {
    pub(super) fn waiting(client: End<S>, dial: Dial) -> State<S> {
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

/// What is known of a connection's program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Program {
    /// There is none.
    #[default]
    None,
    Running,
    /// Both sides are closed, and nothing but its end is waited for, until then.
    Awaited(Instant),
    /// It has ended, or nothing will be heard of it.
    Ended,
}

/// What is known of a client that comes by way of a proxy.
#[derive(Debug)]
pub(super) struct Proxied {
    /// The time by which the header has to be there. `None`: it is.
    pub(super) until: Option<Instant>,
    /// What was read: of the header, or of what stands behind it.
    pub(super) read: Vec<u8>,
    /// The address that the client connected to, if the header says so.
    pub(super) destination: Option<SocketAddr>,
}

impl<S: Socket> Connection<S> {
    /// Makes a connection that a client has made.
    pub(super) fn new(
        name: ConnectionId,
        forward: Arc<Forward>,
        peer: Peer,
        state: State<S>,
        now: Instant,
    ) -> Connection<S> {
        let mut connection = Connection::internal(forward, peer, state, now);
        connection.name = Some(name);
        connection
    }

    /// Makes a connection that no client has made, and nobody is told of.
    pub(super) fn internal(
        forward: Arc<Forward>,
        peer: Peer,
        state: State<S>,
        now: Instant,
    ) -> Connection<S> {
        #[cfg(all(test, target_os = "linux"))]
        transitions::report_transition("new", state.name());
        Connection {
            name: None,
            is_remnant: false,
            forward,
            #[cfg(all(test, target_os = "linux"))]
            state_name: state.name(),
            state,
            wake_at: None,
            is_queued: false,
            slots: [None, None],
            route: None,
            retries: None,
            proxied: None,
            idle: Idle::new(now),
            is_inherited: false,
            counted: [0; 2],
            peer,
            since: now,
            why: None,
            program: Program::None,
            error: None,
            is_cut_off: false,
        }
    }

    /// Changes to another state.
    pub(super) fn enter(&mut self, state: State<S>) {
        #[cfg(all(test, target_os = "linux"))]
        {
            let name = state.name();
            let before = std::mem::replace(&mut self.state_name, name);
            transitions::report_transition(before, name);
        }
        self.state = state;
    }

    /// Takes the sockets out of a state that ends; [`enter`](Connection::enter) must follow.
    pub(super) fn take_state(&mut self) -> State<S> {
        std::mem::replace(&mut self.state, State::Closed)
    }

    /// Ensures that [`step`](Connection::step) is called at `at` or before.
    pub(super) fn wake_by(&mut self, at: Instant) {
        self.wake_at = Some(self.wake_at.map_or(at, |before| before.min(at)));
    }

    /// Returns the holder that the connection's slots are counted for.
    pub(crate) fn holder(&self) -> Holder {
        match self.name {
            Some(_) => Holder::Forward(self.forward.id),
            None if self.is_remnant => Holder::Lost,
            None => Holder::Probes,
        }
    }

    /// Returns whether the connection is being closed, or was cut off: its end has begun.
    pub(crate) fn is_ending(&self) -> bool {
        self.is_cut_off || matches!(self.state, State::Closing { .. } | State::Closed)
    }

    /// Returns whether the connection is [`Waiting`](State::Waiting).
    pub(crate) fn is_waiting(&self) -> bool {
        matches!(self.state, State::Waiting { .. })
    }

    /// Notes why the connection ends: see [`EndReason::note_in`].
    pub(super) fn end_because(&mut self, why: EndReason) {
        why.note_in(&mut self.why);
    }

    /// Requests the close of a side's socket; its slot is given back after that.
    pub(super) fn close_socket(&mut self, side: Side, end: End<S>, cx: &mut Context<'_, S>)
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

impl<S: ConnectionSocket> Connection<S> {
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
    pub(crate) fn cut_off(&mut self, why: EndReason, cx: &mut Context<'_, S>) {
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
}
