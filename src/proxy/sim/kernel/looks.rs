//! What actors and the judge look at.

use std::path::Path;
use std::time::Duration;

use crate::name::SocketName;

use super::{Kernel, Listener, Owner, Place, Socket, SocketId, State};

impl Kernel {
    /// Whether a socket is connected, and nothing has gone wrong with it.
    pub(in crate::proxy::sim) fn is_sound(&self, id: SocketId) -> bool {
        let socket = &self.sockets[id.0];
        let has_failed = socket.is_dead || socket.error.is_some();
        socket.state == State::Open && !has_failed && !socket.ended
    }

    /// The listeners of the proxy that are open.
    pub(in crate::proxy::sim) fn listeners_of_proxy(&self) -> impl Iterator<Item = &Place> {
        let open = |it: &&Listener| it.owner == Owner::Proxy && !it.is_closed;
        self.listeners.iter().filter(open).map(|it| &it.place)
    }

    pub(in crate::proxy::sim) fn is_unix(&self, id: SocketId) -> bool {
        self.sockets[id.0].is_unix
    }

    pub(in crate::proxy::sim) fn name_of(&self, id: SocketId) -> SocketName {
        self.sockets[id.0].name
    }

    pub(in crate::proxy::sim) fn peer_name_of(&self, id: SocketId) -> SocketName {
        self.sockets[id.0].peer_name
    }

    /// The path of the Unix listener that a socket was connected to.
    pub(in crate::proxy::sim) fn listener_path(&self, id: SocketId) -> Option<&Path> {
        self.sockets[id.0].listener_path.as_deref()
    }

    pub(in crate::proxy::sim) fn owner_of_peer(&self, id: SocketId) -> Option<Owner> {
        let peer = self.sockets[id.0].peer?;
        Some(self.sockets[peer.0].owner)
    }

    pub(in crate::proxy::sim) fn is_closed(&self, id: SocketId) -> bool {
        self.sockets[id.0].state == State::Closed
    }

    pub(in crate::proxy::sim) fn has_half_closed(&self, id: SocketId) -> bool {
        self.sockets[id.0].half_closed
    }

    /// When it was made, on either side.
    pub(in crate::proxy::sim) fn born(&self, id: SocketId) -> Duration {
        self.sockets[id.0].born
    }

    /// Whether the process that had the peer is gone.
    pub(in crate::proxy::sim) fn is_peer_gone(&self, id: SocketId) -> bool {
        let peer = self.sockets[id.0].peer;
        peer.is_some_and(|peer| self.gone.contains(&peer))
    }

    /// Whether any process that the proxy talks to is gone.
    pub(in crate::proxy::sim) fn is_anybody_gone(&self) -> bool {
        !self.gone.is_empty()
    }

    /// Whether the peer has closed both directions.
    pub(in crate::proxy::sim) fn has_peer_closed(&self, id: SocketId) -> bool {
        let peer = self.sockets[id.0].peer;
        peer.is_some_and(|peer| self.sockets[peer.0].state == State::Closed)
    }

    /// Whether the peer has half-closed, or more, and it has come.
    pub(in crate::proxy::sim) fn has_peer_ended(&self, id: SocketId) -> bool {
        self.sockets[id.0].ended
    }

    /// The error that waits to be told.
    pub(in crate::proxy::sim) fn error_of(&self, id: SocketId) -> Option<i32> {
        self.sockets[id.0].error
    }

    /// Bytes that have come and were not read.
    pub(in crate::proxy::sim) fn unread(&self, id: SocketId) -> usize {
        self.sockets[id.0].inbox.len()
    }

    /// Bytes that this end wrote, and read.
    pub(in crate::proxy::sim) fn moved(&self, id: SocketId) -> [u64; 2] {
        [self.sockets[id.0].written, self.sockets[id.0].read]
    }

    /// How much of what the proxy has written to a TCP socket did not come, nor will.
    pub(in crate::proxy::sim) fn lost(&self, id: SocketId) -> Option<u64> {
        let socket = &self.sockets[id.0];
        let peer = &self.sockets[socket.peer?.0];
        let is_of_proxy = peer.owner == Owner::Proxy && !socket.is_unix;
        let come = socket.read + socket.inbox.len() as u64;
        is_of_proxy.then(|| peer.written - come)
    }

    /// The open connections, in words.
    pub(in crate::proxy::sim) fn describe(&self) -> Vec<String> {
        let open = |(_, it): &(usize, &Socket)| it.state != State::Closed;
        let sockets = self.sockets.iter().enumerate().filter(open);
        let describe = |(id, it): (usize, &Socket)| {
            format!(
                "{id} of {:?} to {:?}: {} of {} unread, {} of {} in flight, half-closed {}, ended {}, dead {}, {:?}, raised {:?}, blocked {}",
                it.owner,
                it.peer,
                it.inbox.len(),
                it.capacity,
                it.flight.len(),
                it.window,
                it.half_closed,
                it.ended,
                it.is_dead,
                it.error,
                it.raised,
                it.is_blocked
            )
        };
        sockets.map(describe).collect()
    }

    /// Sockets of the proxy that are open.
    pub(in crate::proxy::sim) fn open_of_proxy(&self) -> usize {
        let open = |it: &&Socket| it.owner == Owner::Proxy && it.has_descriptor;
        self.sockets.iter().filter(open).count()
    }
}
