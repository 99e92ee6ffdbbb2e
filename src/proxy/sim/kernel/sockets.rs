//! Connecting, reading, writing, and ending.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use nix::libc;

use crate::address::Port;
use crate::engine::relay::Readiness;
use crate::name::{SocketName, VsockName};

use super::{
    Fate, Kernel, ListenerKey, Move, Owner, Place, SILENT, Socket, SocketId, State, VMS, fail,
};

impl Kernel {
    /// Begins to connect; of a Unix socket it is done when this returns.
    pub(in crate::proxy::sim) fn connect(
        &mut self,
        place: &Place,
        owner: Owner,
    ) -> io::Result<SocketId> {
        let begun = self.begin_connect(place, owner);
        if let (Owner::Proxy, Err(e)) = (owner, &begun) {
            self.note_failure(place, e.raw_os_error().unwrap_or_default());
        }
        begun
    }

    /// Ends the VM of a CID. Sockets that connect to it are told nothing.
    pub(in crate::proxy::sim) fn lose_cid(&mut self, cid: u32) {
        self.cids.remove(&cid);
        let is_there = |it: &&Place| matches!(it, Place::Vsock { cid: its, .. } if *its == cid);
        for place in self.silent.clone().iter().filter(is_there) {
            self.note_fate(place, Fate::Absent);
        }
    }

    pub(super) fn note_fate(&mut self, place: &Place, fate: Fate) {
        self.fates.push((self.now, place.clone(), fate));
    }

    pub(super) fn note_failure(&mut self, place: &Place, number: i32) {
        let fate = match number {
            libc::ENOENT | libc::ENODEV => Fate::Absent,
            libc::ECONNREFUSED if place.is_unix() => Fate::Absent,
            libc::ECONNREFUSED | libc::ECONNRESET => Fate::Refused,
            libc::EAGAIN | libc::ETIMEDOUT => Fate::Silent,
            _ => Fate::Lack,
        };
        self.note_fate(place, fate);
    }

    pub(super) fn begin_connect(&mut self, place: &Place, owner: Owner) -> io::Result<SocketId> {
        let listener = match place {
            Place::Path(path) => match self.files.get(path) {
                None => return fail(libc::ENOENT),
                Some(file) => match file.listener.filter(|key| self.is_listening(*key)) {
                    Some(key) => Some(key),
                    None => return fail(libc::ECONNREFUSED),
                },
            },
            Place::Vsock { cid, .. } if !self.cids.contains(cid) => return fail(libc::ENODEV),
            _ => None,
        };
        if let Some(key) = listener
            && self.listeners[key.0].backlog.len() >= self.listeners[key.0].longest
        {
            return fail(libc::EAGAIN);
        }
        self.take_descriptor(owner)?;
        let name = match place {
            Place::Path(_) => SocketName::Unnamed,
            Place::Tcp(_) => {
                self.next_port += 1;
                SocketName::Tcp(SocketAddr::from(([127, 0, 0, 1], self.next_port)))
            }
            Place::Vsock { .. } => {
                self.next_port += 1;
                let port = Port(u32::from(self.next_port));
                SocketName::Vsock(VsockName { cid: 2, port })
            }
        };
        let id = self.new_socket(place, owner, State::Connecting, name);
        self.sockets[id.0].has_descriptor = owner == Owner::Proxy;
        self.progress += 1;
        match listener {
            Some(key) => self.establish(id, key),
            None => {
                let silent = self.silent.contains(place);
                let at = match place {
                    Place::Vsock { .. } if silent => Some(self.now + self.vsock_timeout),
                    _ if silent => None,
                    _ => Some(self.now + self.latency()),
                };
                self.sockets[id.0].target = Some(place.clone());
                self.moves.extend(at.map(|at| Move { at, socket: id }));
            }
        }
        Ok(id)
    }

    pub(super) fn new_socket(
        &mut self,
        place: &Place,
        owner: Owner,
        state: State,
        name: SocketName,
    ) -> SocketId {
        let id = SocketId(self.sockets.len());
        let listener_path = match place {
            Place::Path(path) => Some(path.clone()),
            _ => None,
        };
        let peer_name = match place {
            Place::Path(_) => SocketName::Unnamed,
            Place::Tcp(address) => SocketName::Tcp(*address),
            Place::Vsock { cid, port } => SocketName::Vsock(VsockName {
                cid: *cid,
                port: Port(*port),
            }),
        };
        self.sockets.push(Socket {
            is_unix: place.is_unix(),
            owner,
            peer: None,
            state,
            target: None,
            has_descriptor: false,
            inbox: VecDeque::new(),
            capacity: self.habits.capacity,
            flight: VecDeque::new(),
            window: self.habits.window,
            mark: None,
            half_closed: false,
            half_close_arrived: false,
            ended: false,
            deaf: false,
            is_dead: false,
            error: None,
            name,
            peer_name,
            listener_path,
            watched: None,
            raised: Readiness::default(),
            is_blocked: false,
            written: 0,
            read: 0,
            read_at: None,
            born: self.now,
        });
        id
    }

    /// Puts a connecting socket into a listener's backlog.
    pub(super) fn establish(&mut self, id: SocketId, key: ListenerKey) {
        let (place, owner) = {
            let listener = &self.listeners[key.0];
            (listener.place.clone(), listener.owner)
        };
        let (name, peer_name) = (self.sockets[id.0].peer_name, self.sockets[id.0].name);
        let accepted = self.new_socket(&place, owner, State::Open, name);
        self.sockets[accepted.0].peer_name = peer_name;
        self.sockets[accepted.0].peer = Some(id);
        if self.listeners[key.0].is_inherited {
            self.gone.insert(accepted);
        }
        let socket = &mut self.sockets[id.0];
        socket.peer = Some(accepted);
        socket.state = State::Open;
        if socket.owner == Owner::Proxy {
            self.note_fate(&place, Fate::Taken);
        }
        self.raise_writable(id);
        self.listeners[key.0].backlog.push_back(accepted);
        self.raise_listener(key);
    }

    /// What a connect that was begun has come to: done, or not yet.
    pub(in crate::proxy::sim) fn connected(&mut self, id: SocketId) -> io::Result<bool> {
        let socket = &mut self.sockets[id.0];
        // An actor that connects has done so at once, whatever has come since.
        if socket.state == State::Open && socket.owner != Owner::Proxy {
            return Ok(true);
        }
        match socket.error.take() {
            Some(number) => fail(number),
            None => Ok(socket.state == State::Open),
        }
    }

    /// Reads what has come.
    pub(in crate::proxy::sim) fn read(
        &mut self,
        id: SocketId,
        buffer: &mut [u8],
    ) -> io::Result<usize> {
        let socket = &mut self.sockets[id.0];
        if socket.state == State::Connecting {
            return fail(libc::ENOTCONN);
        }
        if !socket.inbox.is_empty() && !buffer.is_empty() {
            let mut n = buffer.len().min(socket.inbox.len());
            match socket.mark {
                Some(0) => socket.mark = None,
                Some(mark) => {
                    n = n.min(mark);
                    socket.mark = Some(mark - n);
                }
                None => {}
            }
            for (slot, byte) in buffer.iter_mut().zip(socket.inbox.drain(..n)) {
                *slot = byte;
            }
            socket.read += n as u64;
            socket.read_at = Some(self.now);
            self.progress += 1;
            self.note_room(id);
            return Ok(n);
        }
        if let Some(number) = socket.error.take() {
            self.progress += 1;
            return fail(number);
        }
        if socket.ended || socket.deaf || socket.is_dead {
            return Ok(0);
        }
        fail(libc::EAGAIN)
    }

    /// What was read has made room: at a Unix socket for the peer, elsewhere for what is in flight.
    pub(super) fn note_room(&mut self, id: SocketId) {
        let Some(peer) = self.sockets[id.0].peer else {
            return;
        };
        if self.sockets[id.0].is_unix {
            let socket = &self.sockets[id.0];
            let room = socket.capacity - socket.inbox.len().min(socket.capacity);
            if room * 3 >= socket.capacity && self.sockets[peer.0].is_blocked {
                self.sockets[peer.0].is_blocked = false;
                self.raise_writable(peer);
            }
            self.wake_owner(peer);
        } else if !self.sockets[peer.0].flight.is_empty() {
            self.plan_delivery(peer);
        }
    }

    /// Writes as much as there is room for.
    pub(in crate::proxy::sim) fn write(&mut self, id: SocketId, bytes: &[u8]) -> io::Result<usize> {
        let socket = &mut self.sockets[id.0];
        assert!(
            socket.owner != Owner::Proxy || !socket.half_closed,
            "the proxy writes behind its half-close"
        );
        if socket.state == State::Connecting {
            return fail(libc::EAGAIN);
        }
        if !socket.is_unix
            && let Some(number) = socket.error.take()
        {
            self.progress += 1;
            return fail(number);
        }
        let Some(peer) = socket
            .peer
            .filter(|_| !socket.is_dead && !socket.half_closed)
        else {
            return fail(libc::EPIPE);
        };
        let room = if socket.is_unix {
            let other = &self.sockets[peer.0];
            if other.state == State::Closed || other.deaf {
                return fail(libc::EPIPE);
            }
            other.capacity.saturating_sub(other.inbox.len())
        } else {
            socket.window.saturating_sub(socket.flight.len())
        };
        let n = room.min(bytes.len());
        let socket = &mut self.sockets[id.0];
        socket.is_blocked |= n < bytes.len();
        if n == 0 && !bytes.is_empty() {
            return fail(libc::EAGAIN);
        }
        socket.written += n as u64;
        self.progress += 1;
        if socket.is_unix {
            self.sockets[peer.0].inbox.extend(&bytes[..n]);
            self.raise_readable(peer);
        } else {
            socket.flight.extend(&bytes[..n]);
            self.plan_delivery(id);
        }
        Ok(n)
    }

    /// Has what a TCP socket has in flight stand before urgent data, once it has arrived.
    pub(in crate::proxy::sim) fn mark_urgent(&mut self, id: SocketId) {
        let socket = &self.sockets[id.0];
        let Some(peer) = socket.peer.filter(|_| !socket.is_unix) else {
            return;
        };
        let ahead = self.sockets[peer.0].inbox.len() + socket.flight.len();
        let other = &mut self.sockets[peer.0];
        if other.mark.is_none() && other.state == State::Open {
            other.mark = Some(ahead);
            self.raise_readable(peer);
        }
    }

    /// Half-closes.
    pub(in crate::proxy::sim) fn shutdown_write(&mut self, id: SocketId) -> io::Result<()> {
        let socket = &mut self.sockets[id.0];
        if socket.is_dead && !socket.is_unix || socket.state != State::Open {
            return fail(libc::ENOTCONN);
        }
        if std::mem::replace(&mut socket.half_closed, true) {
            return Ok(());
        }
        self.progress += 1;
        let (is_unix, peer) = (socket.is_unix, socket.peer);
        match peer {
            Some(peer) if is_unix => {
                self.sockets[id.0].half_close_arrived = true;
                self.sockets[peer.0].ended = true;
                self.raise_readable(peer);
            }
            _ => self.plan_delivery(id),
        }
        Ok(())
    }

    /// Notes that the slot of a VM's socket is lost, if its guest was silent.
    fn note_lost(&mut self, id: SocketId) {
        let socket = &self.sockets[id.0];
        let is_silent = socket.read_at.is_none_or(|at| self.now >= at + SILENT);
        let directory = socket.listener_path.as_ref().and_then(|it| it.parent());
        if let (true, Some(directory)) = (is_silent, directory) {
            let lost = self.lost.entry(directory.to_owned()).or_default();
            lost.push(self.now);
        }
    }

    /// Takes nothing more.
    pub(in crate::proxy::sim) fn shutdown_read(&mut self, id: SocketId) {
        let socket = &mut self.sockets[id.0];
        socket.deaf = true;
        let is_vms = |path: &PathBuf| path.to_string_lossy().starts_with(VMS);
        if socket.owner == Owner::Proxy && socket.listener_path.as_ref().is_some_and(is_vms) {
            self.abandoned += 1;
            self.note_lost(id);
        }
        let socket = &mut self.sockets[id.0];
        if let (true, Some(peer)) = (socket.is_unix, socket.peer) {
            self.raise_writable(peer);
        }
    }

    /// Closes. What is unread is a reset to the peer, or to that of a Unix socket an error.
    pub(in crate::proxy::sim) fn close(&mut self, id: SocketId) {
        self.close_as(id, Fate::Ended);
    }

    /// Closes. If nothing was written, that is what the dial of the proxy has come to.
    pub(in crate::proxy::sim) fn close_as(&mut self, id: SocketId, fate: Fate) {
        let socket = &mut self.sockets[id.0];
        if socket.state == State::Closed {
            return;
        }
        let was_connecting = socket.state == State::Connecting;
        // That is how a VM refuses.
        if socket.owner != Owner::Proxy
            && socket.written == 0
            && let Some(path) = socket.listener_path.clone()
        {
            self.note_fate(&Place::Path(path), fate);
        }
        let socket = &mut self.sockets[id.0];
        let unread = !socket.inbox.is_empty();
        self.end_descriptor(id);
        let socket = &mut self.sockets[id.0];
        socket.inbox.clear();
        if was_connecting {
            return;
        }
        let Some(peer) = socket.peer else {
            return;
        };
        if socket.is_unix {
            socket.half_closed = true;
            if unread && socket.owner == Owner::Proxy {
                self.closed_unread.insert(peer);
            }
            let other = &mut self.sockets[peer.0];
            if other.state == State::Closed {
                return;
            }
            other.ended = true;
            if unread {
                other.error = Some(libc::ECONNRESET);
            }
            self.raise_both(peer);
        } else if unread {
            self.reset_peer(id);
        } else {
            socket.half_closed = true;
            self.plan_delivery(id);
        }
    }

    /// Closes so that the peer reads a reset, where the family can.
    pub(in crate::proxy::sim) fn reset(&mut self, id: SocketId) {
        if self.sockets[id.0].is_unix {
            return self.close(id);
        }
        if self.sockets[id.0].state == State::Closed {
            return;
        }
        self.end_descriptor(id);
        self.reset_peer(id);
    }

    /// Tells the peer of a TCP socket that nothing goes any more: what is in flight is lost.
    pub(super) fn reset_peer(&mut self, id: SocketId) {
        let socket = &mut self.sockets[id.0];
        socket.flight.clear();
        socket.is_dead = true;
        if let Some(peer) = socket.peer {
            self.be_reset(peer, libc::ECONNRESET);
        }
    }

    pub(super) fn be_reset(&mut self, id: SocketId, number: i32) {
        let socket = &mut self.sockets[id.0];
        if socket.is_dead {
            return;
        }
        socket.is_dead = true;
        socket.flight.clear();
        // It may have been connected, and nobody has heard of it yet.
        if socket.owner == Owner::Proxy
            && let Some(place) = socket.target.clone()
        {
            self.note_fate(&place, Fate::Ended);
        }
        let socket = &mut self.sockets[id.0];
        // After an orderly end no error is left to be told to a read.
        if socket.state == State::Open && !socket.ended {
            socket.error = Some(number);
        }
        self.raise_both(id);
    }

    pub(super) fn end_descriptor(&mut self, id: SocketId) {
        let socket = &mut self.sockets[id.0];
        socket.state = State::Closed;
        socket.watched = None;
        self.progress += 1;
        if std::mem::take(&mut socket.has_descriptor) {
            self.give_descriptor(Owner::Proxy);
        }
    }

    /// Bytes that a reset now would take away from the peer.
    pub(in crate::proxy::sim) fn unacknowledged(&self, id: SocketId) -> usize {
        self.sockets[id.0].flight.len()
    }

    /// Whether the peer of a Unix socket has taken all, as far as the kernel knows.
    pub(in crate::proxy::sim) fn peer_took_all(&self, id: SocketId) -> bool {
        let socket = &self.sockets[id.0];
        let peer = socket.peer.map(|peer| &self.sockets[peer.0]);
        socket.is_unix && socket.error.is_none() && peer.is_some_and(|peer| peer.inbox.is_empty())
    }
}
