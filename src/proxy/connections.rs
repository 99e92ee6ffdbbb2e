//! The loop's part in its connections: it takes them over, gives them what has come, and does what they ask for.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::engine::connection::{Action, Connection, Context, Dialed};
use crate::engine::relay::{CLIENT, SERVER};
use crate::error::Error;
use crate::name::SocketName;
use crate::stream::endpoint::Target;

use super::worker::Worker;
use super::world::World;
use crate::engine::admission::Slot;
use crate::engine::forward::Forward;
use crate::engine::status::ConnectionStatus;
use crate::engine::table::Id;

/// What connections have asked for and has not been done yet.
#[derive(Debug)]
pub(super) struct Actions<S> {
    queue: VecDeque<(Id, Action<S>)>,
    /// They are being done: what is asked for meanwhile comes after it.
    are_running: bool,
}

impl<S> Default for Actions<S> {
    fn default() -> Actions<S> {
        Actions {
            queue: VecDeque::new(),
            are_running: false,
        }
    }
}

impl<W: World> Worker<W> {
    /// Takes over an accepted connection and begins to dial its target.
    pub(super) fn adopt(
        &mut self,
        mut stream: W::Stream,
        peer: SocketName,
        forward: Arc<Forward>,
        slot: Option<Slot>,
        now: Instant,
    ) {
        let id = self.conns.next_id();
        let drain = forward.rule.timeouts.drain;
        let crossed = match forward.is_crossed(CLIENT) {
            true => self.world.cross(CLIENT, &mut stream, drain),
            false => Ok(()),
        };
        let watched = crossed.and_then(|()| self.world.watch(&mut stream, id.token(CLIENT)));
        let name = self.shared.next_connection();
        let connection = Connection::accepted(name, forward, stream, peer, slot, now);
        self.conns.insert(connection);
        self.with(id, now, |connection, cx| connection.begin(watched, cx));
    }

    /// Calls a connection, and does what it asks for.
    pub(super) fn with(
        &mut self,
        id: Id,
        now: Instant,
        call: impl FnOnce(&mut Connection<W::Stream>, &mut Context<'_, W::Stream>),
    ) {
        let Some(connection) = self.conns.get_mut(id) else {
            return;
        };
        let timer = connection.wake_at;
        let mut cx = Context {
            id,
            now,
            phase: self.phase,
            thawed: self.thawed,
            routes: &self.shared.routes,
            pool: &mut self.pool,
            actions: &mut self.actions.queue,
            again: false,
        };
        call(connection, &mut cx);
        let again = cx.again;
        self.timers.change(id, timer, connection.wake_at);
        if again {
            self.make_ready(id);
        }
        self.run_actions(now);
    }

    fn run_actions(&mut self, now: Instant) {
        if std::mem::replace(&mut self.actions.are_running, true) {
            return;
        }
        while let Some((id, action)) = self.actions.queue.pop_front() {
            self.run_action(id, action, now);
        }
        self.actions.are_running = false;
    }

    fn run_action(&mut self, id: Id, action: Action<W::Stream>, now: Instant) {
        let action = match action {
            // These are owed even if the connection is gone.
            Action::Close(stream, slot) => {
                self.world.close(stream);
                return drop(slot);
            }
            Action::Reset(stream) => return self.world.reset(stream),
            Action::Drop => return self.drop_connection(id, now),
            other => other,
        };
        let Some(connection) = self.conns.get_mut(id) else {
            return;
        };
        let forward = Arc::clone(&connection.forward);
        let (rule, token) = (&forward.rule, id.token(SERVER));
        match action {
            Action::Resolve => {
                if let Target::Name { host, port } = Target::of(&rule.connect) {
                    self.world.resolve(token, host, port);
                }
            }
            Action::DialOnThread(patience) => self.world.dial(token, &rule.connect, patience),
            Action::Admit => self.queue_dial(id, &forward, now),
            Action::Connect => self.connect(id, now),
            Action::Explain(error) => {
                if let Some(error) = self.world.explain(token, &rule.connect, error) {
                    self.with(id, now, |it, cx| it.take_explanation(error, cx));
                }
            }
            Action::Prove => self.queue_proof(id, &forward, now),
            Action::LookAtPeer(side) => {
                let socket = connection.socket(side);
                let is_ending = socket.is_some_and(|it| self.world.has_peer_ended(it));
                self.with(id, now, |it, cx| it.take_peer(side, is_ending, cx));
            }
            Action::StartThreads(streams) => {
                let drain = rule.timeouts.drain;
                let begun = self
                    .world
                    .bridge(id.token(CLIENT), streams, &forward, drain);
                match begun {
                    Ok(()) => self.look_at_threads(id, now),
                    Err(e) => self.with(id, now, |it, cx| it.take_threads_failure(e, cx)),
                }
            }
            Action::LookAtThreads => self.look_at_threads(id, now),
            Action::CutThreads => self.world.cut_bridge(id.token(CLIENT)),
            Action::Close(..) | Action::Reset(_) | Action::Drop => {}
        }
    }

    /// Begins to connect a connection to its endpoint.
    fn connect(&mut self, id: Id, now: Instant) {
        let connection = self.conns.get_mut(id);
        let Some(endpoint) = connection.as_ref().and_then(|it| it.endpoint()) else {
            return;
        };
        let asks = connection.as_ref().is_some_and(|it| it.doubts_server());
        let connected = self.world.connect(endpoint);
        let dialed = connected.map(|(mut socket, sign)| {
            // Asked at once: of one that is gone later, the connection broke off.
            let is_inherited = asks && self.world.has_peer_ended(&socket);
            let watched = self.world.watch(&mut socket, id.token(SERVER));
            Dialed {
                socket,
                sign,
                is_inherited,
                watched,
            }
        });
        self.with(id, now, |it, cx| it.take_connect(dialed, cx));
    }

    /// Takes what a dial on a thread of its own has come to.
    pub(super) fn dialled(
        &mut self,
        id: Id,
        dialed: std::result::Result<W::Stream, Error>,
        now: Instant,
    ) {
        let forward = self.conns.get_mut(id).map(|it| Arc::clone(&it.forward));
        let dialed = match (dialed, forward) {
            (Ok(stream), None) => return self.world.close(stream),
            (Ok(mut stream), Some(forward)) if forward.is_crossed(SERVER) => {
                let drain = forward.rule.timeouts.drain;
                let crossed = self.world.cross(SERVER, &mut stream, drain);
                let watched =
                    crossed.and_then(|()| self.world.watch(&mut stream, id.token(SERVER)));
                Ok((stream, watched))
            }
            (dialed, _) => dialed.map(|stream| (stream, Ok(()))),
        };
        self.with(id, now, |it, cx| it.take_dialed(dialed, cx));
    }

    fn look_at_threads(&mut self, id: Id, now: Instant) {
        if let Some(progress) = self.world.bridged(id.token(CLIENT)) {
            let (delivered, half_closed) = (progress.delivered, progress.half_closed);
            self.with(id, now, |it, cx| {
                it.take_progress(delivered, half_closed, cx);
            });
        }
    }

    /// Takes a connection that is over out of the books.
    fn drop_connection(&mut self, id: Id, now: Instant) {
        let Some(connection) = self.conns.remove(id) else {
            return;
        };
        self.timers.change(id, connection.wake_at, None);
        let forward = connection.end(&self.shared.routes, now);
        let load = &self.shared.inboxes[self.index].load;
        if load.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.world.rest();
        }
        self.shared.has_ended(&forward);
    }

    /// Cuts a connection off.
    pub(super) fn cut(&mut self, id: Id, now: Instant) {
        self.with(id, now, |it, cx| it.cut(cx));
    }

    /// Shortens the time of what is being closed, when the proxy begins to stop.
    pub(super) fn hurry_closing(&mut self, now: Instant) {
        for id in self.conns.ids() {
            self.with(id, now, |it, cx| it.begin_to_stop(cx));
        }
    }

    /// Closes all that is still there, as the last thing before the end.
    pub(super) fn abandon_all(&mut self, now: Instant) {
        for id in self.conns.ids() {
            self.cut(id, now);
            self.with(id, now, |it, cx| it.abandon(cx));
        }
    }

    /// Returns what is to be told of all connections.
    pub(super) fn connections(&mut self, now: Instant) -> Vec<ConnectionStatus> {
        let mut all = Vec::new();
        for id in self.conns.ids() {
            let progress = self.world.bridged(id.token(CLIENT));
            let delivered = progress.map(|progress| progress.delivered);
            let connection = self.conns.get_mut(id);
            all.extend(connection.and_then(|it| it.status(delivered, now)));
        }
        all
    }
}
