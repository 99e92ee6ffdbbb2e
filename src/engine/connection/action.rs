//! What a connection asks of the loop, and what each of its calls is given.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use crate::engine::Phase;
use crate::engine::admission::Slot;
use crate::engine::relay::Pool;
use crate::engine::routes::Routes;
use crate::engine::table::Id;
use crate::stream::socket::Socket;

/// What the loop is to do for a connection.
#[derive(Debug)]
pub(crate) enum Action<S> {
    /// Resolve the target's name; the result goes to [`super::Connection::take_addresses`].
    Resolve,
    /// Dial the target on a thread, for at most so long; the result goes to
    /// [`super::Connection::take_dialled`].
    DialOnThread(Duration),
    /// Ask the gate of the target's VM for a slot; it goes to [`super::Connection::take_slot`], and
    /// the reason why there is none yet to [`super::Connection::take_full`].
    Admit,
    /// Begin to connect to [`super::Connection::endpoint`]; the result goes to
    /// [`super::Connection::take_connect`].
    Connect,
    /// Explain why a dial failed; the explanation goes to [`super::Connection::take_explanation`].
    Explain(io::Error),
    /// Find out whether the guest has answered this dial; [`super::Connection::step`] is called
    /// once it has.
    Prove,
    /// Relay between these two sockets on threads; their end goes to
    /// [`super::Connection::take_threads_end`].
    StartThreads([S; 2]),
    /// Read the progress of the threads; it goes to [`super::Connection::take_progress`].
    LookAtThreads,
    /// End the threads.
    CutThreads,
    /// Close a socket, then give its slot back.
    Close(S, Option<Slot>),
    /// Close a socket that has no slot.
    Discard(S),
    /// Close a socket so that its peer reads a reset; where the family has none, close it.
    Reset(S),
    /// Leave a socket to the process that has a copy of it.
    Leave(S),
    /// Drop the connection, which is closed.
    Drop,
    /// Drop the connection, but for what is left of it, [`super::Connection::take_remnant`], which
    /// takes its place.
    Hold,
}

/// What every call of a connection is given.
pub(crate) struct Context<'a, S: Socket> {
    /// The loop's identifier of the connection.
    pub(crate) id: Id,
    pub(crate) now: Instant,
    pub(crate) phase: Phase,
    /// The time at which the process last went on after a freeze.
    pub(crate) resumed_at: Option<Instant>,
    pub(crate) routes: &'a Routes,
    pub(crate) pool: &'a mut Pool<S::Pipe>,
    /// The queue of actions, of all connections.
    pub(crate) actions: &'a mut VecDeque<(Id, Action<S>)>,
    /// Returns whether the process at the other end of a socket is ending or has ended, as far as
    /// the system tells. The call costs some microseconds.
    pub(crate) has_peer_ended: &'a mut dyn FnMut(&S) -> bool,
    /// Returns whether a socket may stay open for a guest that has not ended its connection.
    pub(crate) may_hold: &'a dyn Fn() -> bool,
    /// Whether the connection has work left: [`super::Connection::step`] is to be called again,
    /// after the others.
    pub(crate) has_more_work: bool,
}

impl<S: Socket> Context<'_, S> {
    pub(super) fn request(&mut self, action: Action<S>) {
        self.actions.push_back((self.id, action));
    }
}
