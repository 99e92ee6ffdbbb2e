//! What the network brings, and what pollers tell of it.

use std::time::Duration;

use nix::libc;

use crate::engine::relay::Readiness;

use super::{Kernel, Move, Owner, Place, Raised, SYN_AGAIN, SocketId, State};

impl Kernel {
    pub(super) fn latency(&mut self) -> Duration {
        match self.habits.slow_network {
            true => Duration::from_micros([0, 50, 2_000, 200_000][self.rng.usize(..4)]),
            false => Duration::from_micros([0, 0, 30][self.rng.usize(..3)]),
        }
    }

    pub(super) fn plan_delivery(&mut self, id: SocketId) {
        if self.moves.iter().any(|it| it.socket == id) {
            return;
        }
        let at = self.now + self.latency();
        self.moves.push(Move { at, socket: id });
    }

    /// When the network has something to do next.
    pub(in crate::proxy::sim) fn next_move(&self) -> Option<Duration> {
        self.moves.iter().map(|it| it.at).min()
    }

    /// Does one thing that is due; false if there is none.
    pub(in crate::proxy::sim) fn make_move(&mut self) -> bool {
        let due: Vec<usize> = (0..self.moves.len())
            .filter(|index| self.moves[*index].at <= self.now)
            .collect();
        if due.is_empty() {
            return false;
        }
        let index = due[self.rng.usize(..due.len())];
        let socket = self.moves.swap_remove(index).socket;
        match self.sockets[socket.0].state {
            State::Connecting => self.answer_connect(socket),
            State::Open | State::Closed => self.deliver(socket),
        }
        true
    }

    pub(super) fn answer_connect(&mut self, id: SocketId) {
        let Some(place) = self.sockets[id.0].target.clone() else {
            return;
        };
        let is_vsock = matches!(place, Place::Vsock { .. });
        let error = if is_vsock && self.silent.contains(&place) {
            libc::ETIMEDOUT
        } else {
            match self.bound.get(&place).copied() {
                Some(key) if self.is_listening(key) => {
                    let listener = &self.listeners[key.0];
                    if listener.backlog.len() < listener.longest {
                        return self.establish(id, key);
                    }
                    if !is_vsock {
                        if self.sockets[id.0].owner == Owner::Proxy {
                            self.note_failure(&place, libc::EAGAIN);
                        }
                        let at = self.now + SYN_AGAIN;
                        return self.moves.push(Move { at, socket: id });
                    }
                    libc::ECONNRESET
                }
                _ if is_vsock => libc::ECONNRESET,
                _ => libc::ECONNREFUSED,
            }
        };
        if self.sockets[id.0].owner == Owner::Proxy {
            self.note_failure(&place, error);
        }
        let socket = &mut self.sockets[id.0];
        socket.error = Some(error);
        socket.is_dead = true;
        self.raise_both(id);
    }

    /// Brings some of what is in flight to the peer; at last the end.
    pub(super) fn deliver(&mut self, id: SocketId) {
        let Some(peer) = self.sockets[id.0].peer else {
            return;
        };
        if self.sockets[id.0].is_dead {
            return;
        }
        let other = &self.sockets[peer.0];
        let room = other.capacity.saturating_sub(other.inbox.len());
        let is_closed = other.state == State::Closed;
        let len = self.sockets[id.0].flight.len();
        if is_closed && len > 0 {
            // What comes to a socket that was closed is answered by a reset.
            self.sockets[peer.0].is_dead = true;
            return self.be_reset(id, libc::ECONNRESET);
        }
        // Often all of it, at times a part.
        let mut n = len.min(room);
        if n > 1 && self.rng.u8(..4) == 0 {
            n = self.rng.usize(1..=n);
        }
        if n > 0 {
            let bytes: Vec<u8> = self.sockets[id.0].flight.drain(..n).collect();
            self.sockets[peer.0].inbox.extend(bytes);
            self.raise_readable(peer);
            let socket = &mut self.sockets[id.0];
            let free = socket.window - socket.flight.len();
            if free * 3 >= socket.window && socket.is_blocked {
                socket.is_blocked = false;
                self.raise_writable(id);
            }
            self.wake_owner(id);
        }
        let socket = &mut self.sockets[id.0];
        if socket.flight.is_empty() {
            if socket.half_closed && !socket.half_close_arrived {
                socket.half_close_arrived = true;
                self.sockets[peer.0].ended = true;
                self.raise_readable(peer);
            }
        } else if len.min(room) > 0 {
            self.plan_delivery(id);
        }
        self.progress += 1;
    }

    pub(super) fn wake(&mut self, actor: usize) {
        if !self.woken.contains(&actor) {
            self.woken.push(actor);
        }
    }

    /// Actors that something has happened to since.
    pub(in crate::proxy::sim) fn take_woken(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.woken)
    }

    pub(super) fn wake_owner(&mut self, id: SocketId) {
        if let Owner::Actor(actor) = self.sockets[id.0].owner {
            self.wake(actor);
        }
    }

    pub(super) fn raise(&mut self, id: SocketId, what: Readiness) {
        self.wake_owner(id);
        let socket = &mut self.sockets[id.0];
        let was = socket.raised;
        socket.raised.readable |= what.readable;
        socket.raised.writable |= what.writable;
        if let Some((worker, _)) = socket.watched
            && !was.readable
            && !was.writable
        {
            self.raised[worker].push(Raised::Socket(id));
        }
    }

    pub(super) fn raise_readable(&mut self, id: SocketId) {
        let readable = true;
        self.raise(
            id,
            Readiness {
                readable,
                ..Readiness::default()
            },
        );
    }

    pub(super) fn raise_writable(&mut self, id: SocketId) {
        let writable = true;
        self.raise(
            id,
            Readiness {
                writable,
                ..Readiness::default()
            },
        );
    }

    pub(super) fn raise_both(&mut self, id: SocketId) {
        let both = Readiness {
            readable: true,
            writable: true,
            ..Readiness::default()
        };
        self.raise(id, both);
    }

    /// Registers a socket with a worker's poller, which tells all that is so now.
    pub(in crate::proxy::sim) fn watch(&mut self, id: SocketId, worker: usize, token: usize) {
        let socket = &mut self.sockets[id.0];
        assert!(socket.watched.is_none(), "a socket is registered twice");
        socket.watched = Some((worker, token));
        socket.raised = Readiness::default();
        let now = self.readiness(id);
        if now.readable || now.writable {
            self.raise(id, now);
        }
    }

    /// What is so of a socket now.
    pub(super) fn readiness(&self, id: SocketId) -> Readiness {
        let socket = &self.sockets[id.0];
        if socket.state == State::Connecting && socket.error.is_none() {
            return Readiness::default();
        }
        let failed = socket.is_dead || socket.error.is_some();
        let room = match (socket.is_unix, socket.peer) {
            (true, Some(peer)) => {
                let other = &self.sockets[peer.0];
                other.state == State::Closed || other.deaf || other.inbox.len() < other.capacity
            }
            _ => socket.flight.len() < socket.window,
        };
        let read_closed = socket.ended || socket.deaf;
        Readiness {
            readable: !socket.inbox.is_empty() || read_closed || failed,
            writable: room || failed,
            failed,
            hidden: failed || read_closed,
            urgent: socket.mark.is_some(),
        }
    }

    /// Whether a worker's poller has something to tell.
    pub(in crate::proxy::sim) fn has_events(&self, worker: usize) -> bool {
        !self.raised[worker].is_empty()
    }

    /// What a worker's poller tells.
    pub(in crate::proxy::sim) fn take_events(
        &mut self,
        worker: usize,
        mut tell: impl FnMut(usize, Readiness),
    ) {
        for raised in std::mem::take(&mut self.raised[worker]) {
            match raised {
                Raised::Listener(key) => {
                    let listener = &mut self.listeners[key.0];
                    listener.is_raised = false;
                    if let (false, Some((_, token))) = (listener.is_closed, listener.watched) {
                        let readable = true;
                        let readiness = Readiness {
                            readable,
                            ..Readiness::default()
                        };
                        tell(token, readiness);
                    }
                }
                Raised::Socket(id) => {
                    let mut says = self.readiness(id);
                    let terse = self.habits.terse;
                    let socket = &mut self.sockets[id.0];
                    let changed = std::mem::take(&mut socket.raised);
                    if terse && !says.failed {
                        says.readable &= changed.readable;
                        says.writable &= changed.writable;
                        says.hidden &= changed.readable;
                        says.urgent &= changed.readable;
                    }
                    if let Some((_, token)) = socket.watched {
                        tell(token, says);
                    }
                }
            }
        }
    }
}
