//! A simulated kernel: sockets, listeners, files and descriptors, with the edges, the errors and the
//! limits of Linux'.
//!
//! Every socket of a run is here, those of the proxy and those of its peers. A connection has two
//! [`Socket`]s. What one writes reaches the other at once (Unix), or by a later [`Kernel::deliver`]
//! (TCP, AF_VSOCK): until then a reset takes it away.
//!
//! What it imitates:
//! - **Edges** (epoll, kqueue): a socket is due an event when data, an end or an error comes, and when
//!   a third of the send queue is free again after a write was short or would have blocked; not
//!   before. The event says all that is so (epoll), or only what has changed (`terse`, kqueue).
//! - **Reset** (TCP, AF_VSOCK): what was in flight is lost, what has arrived can still be read, the
//!   error is told once, to a read or to a write. A close with data unread is a reset, and so is what
//!   is sent to a socket that was closed.
//! - **Unix**: no reset. A close with data unread gives the peer ECONNRESET behind what it has; what is
//!   written to a socket that was closed, or whose receiving side was shut, is EPIPE. A full backlog is
//!   EAGAIN, and no event tells when it isn't any more.
//! - **Urgent data** (TCP): a read ends at the mark, and an event tells of it.
//! - **Listeners**: a backlog, EADDRINUSE, EINVAL once somebody has shut it down, EMFILE when the
//!   process has no descriptor left; the client waits in the backlog then.
//! - **Connects**: of TCP refused, established, or silent for ever; of AF_VSOCK ECONNRESET where nobody
//!   listens, ETIMEDOUT after two seconds where the guest is silent, ENODEV for no such CID.
//!
//! It asserts that the proxy writes nothing after its half-close.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fastrand::Rng;
use nix::libc;

use crate::address::Port;
use crate::engine::relay::Readiness;
use crate::name::{SocketName, VsockName};

/// How long AF_VSOCK waits for a guest that is silent (Linux: `VSOCK_DEFAULT_CONNECT_TIMEOUT`).
const VSOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// After how long TCP tries a full backlog again.
const SYN_AGAIN: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SocketId(usize);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ListenerKey(usize);

/// Where something listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Place {
    Tcp(SocketAddr),
    Path(PathBuf),
    Vsock { cid: u32, port: u32 },
}

impl Place {
    fn is_unix(&self) -> bool {
        matches!(self, Place::Path(_))
    }
}

/// Whose a socket is: who is told when something happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Owner {
    /// The proxy, with its process' descriptors.
    Proxy,
    /// The actor of that number.
    Actor(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Connecting,
    Open,
    Closed,
}

#[derive(Debug)]
struct Socket {
    is_unix: bool,
    owner: Owner,
    peer: Option<SocketId>,
    state: State,
    /// Where it is being connected to.
    target: Option<Place>,
    /// It counts as a descriptor of the proxy.
    has_descriptor: bool,
    /// What has come and was not read.
    inbox: VecDeque<u8>,
    /// How much can lie there.
    capacity: usize,
    /// What was written and has not arrived. Not of Unix.
    flight: VecDeque<u8>,
    window: usize,
    /// Behind so many bytes of the inbox stands urgent data.
    mark: Option<usize>,
    half_closed: bool,
    /// The half-close has arrived.
    half_close_arrived: bool,
    /// The peer's end has come.
    ended: bool,
    /// It takes nothing any more.
    deaf: bool,
    /// Nothing comes or goes any more.
    is_dead: bool,
    error: Option<i32>,
    name: SocketName,
    peer_name: SocketName,
    /// The path of the listener that it was connected to.
    listener_path: Option<PathBuf>,
    watched: Option<(usize, usize)>,
    raised: Readiness,
    /// A write was short or would have blocked: room will be an edge.
    is_blocked: bool,
    written: u64,
    read: u64,
    born: Duration,
}

#[derive(Debug)]
struct Listener {
    place: Place,
    owner: Owner,
    backlog: VecDeque<SocketId>,
    longest: usize,
    /// Somebody has shut it down.
    is_broken: bool,
    is_closed: bool,
    /// Whoever began to listen is gone, and has left it to another process.
    is_inherited: bool,
    watched: Option<(usize, usize)>,
    is_raised: bool,
}

/// A file of a directory: of a socket, or another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct File {
    pub(super) inode: u64,
    pub(super) listener: Option<ListenerKey>,
}

/// What may happen between two calls, later than now or at once.
#[derive(Clone, Copy, Debug)]
struct Move {
    at: Duration,
    socket: SocketId,
}

/// How this run's kernel behaves.
#[derive(Clone, Debug)]
pub(super) struct Habits {
    /// How much a receive queue holds.
    pub(super) capacity: usize,
    /// How much of TCP can be in flight.
    pub(super) window: usize,
    /// An event says only what has changed.
    pub(super) terse: bool,
    /// One write in so many is urgent, of an actor that sends such data.
    pub(super) slow_network: bool,
    /// Descriptors that the proxy's process may have.
    pub(super) descriptors: usize,
    pub(super) backlog: usize,
}

/// The sockets of one run.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) now: Duration,
    pub(super) habits: Habits,
    rng: Rng,
    sockets: Vec<Socket>,
    listeners: Vec<Listener>,
    bound: HashMap<Place, ListenerKey>,
    pub(super) files: BTreeMap<PathBuf, File>,
    next_inode: u64,
    next_port: u16,
    /// Places that never answer.
    pub(super) silent: HashSet<Place>,
    /// CIDs that there are.
    pub(super) cids: HashSet<u32>,
    moves: Vec<Move>,
    /// What each worker's poller is to tell: sockets and listeners.
    raised: Vec<Vec<Raised>>,
    /// Actors whose sockets something has happened to.
    woken: Vec<usize>,
    /// Descriptors that the proxy has.
    pub(super) descriptors: usize,
    /// How many of the whole machine's are left to it.
    pub(super) left: usize,
    /// Counts what has happened: a turn in which nothing has is one without progress.
    pub(super) progress: u64,
    /// Unix sockets whose peer, the proxy's, was closed with bytes unread that they had written.
    pub(super) closed_unread: HashSet<SocketId>,
    /// Sockets whose process is gone, or is not the one that the other end is told of.
    pub(super) gone: HashSet<SocketId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Raised {
    Socket(SocketId),
    Listener(ListenerKey),
}

fn fail<T>(number: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(number))
}

impl Kernel {
    pub(super) fn new(habits: Habits, workers: usize, rng: Rng) -> Kernel {
        Kernel {
            now: Duration::ZERO,
            habits,
            rng,
            sockets: Vec::new(),
            listeners: Vec::new(),
            bound: HashMap::new(),
            files: BTreeMap::new(),
            next_inode: 1,
            next_port: 40_000,
            silent: HashSet::new(),
            cids: HashSet::new(),
            moves: Vec::new(),
            raised: (0..workers).map(|_| Vec::new()).collect(),
            woken: Vec::new(),
            descriptors: 0,
            left: usize::MAX,
            progress: 0,
            closed_unread: HashSet::new(),
            gone: HashSet::new(),
        }
    }

    // Files.

    /// Makes a file, in place of what was there.
    pub(super) fn make_file(&mut self, path: &Path, listener: Option<ListenerKey>) -> File {
        let file = File {
            inode: self.next_inode,
            listener,
        };
        self.next_inode += 1;
        self.files.insert(path.to_owned(), file);
        file
    }

    /// Whether somebody listens behind the file of that path.
    fn listens_at(&self, path: &Path) -> bool {
        let listener = self.files.get(path).and_then(|file| file.listener);
        listener.is_some_and(|key| self.is_listening(key))
    }

    pub(super) fn is_listening(&self, key: ListenerKey) -> bool {
        let listener = &self.listeners[key.0];
        !listener.is_closed && !listener.is_broken
    }

    // Listeners.

    /// Binds and listens. A file that nobody listens on any more is replaced.
    pub(super) fn listen(&mut self, place: &Place, owner: Owner) -> io::Result<ListenerKey> {
        let taken = match place {
            Place::Path(path) => self.listens_at(path),
            place => self.bound.contains_key(place),
        };
        if taken {
            return fail(libc::EADDRINUSE);
        }
        self.take_descriptor(owner)?;
        let key = ListenerKey(self.listeners.len());
        self.listeners.push(Listener {
            place: place.clone(),
            owner,
            backlog: VecDeque::new(),
            longest: self.habits.backlog,
            is_broken: false,
            is_closed: false,
            is_inherited: false,
            watched: None,
            is_raised: false,
        });
        match place {
            Place::Path(path) => drop(self.make_file(path, Some(key))),
            place => drop(self.bound.insert(place.clone(), key)),
        }
        self.progress += 1;
        Ok(key)
    }

    /// Whether the file of a listener is still its own; `None` if there is no file, or it needs none.
    pub(super) fn has_file(&self, key: ListenerKey) -> Option<bool> {
        match &self.listeners[key.0].place {
            Place::Path(path) => {
                let file = self.files.get(path)?;
                Some(file.listener == Some(key))
            }
            _ => Some(true),
        }
    }

    /// Who listens at a place now.
    pub(super) fn listener_at(&self, place: &Place) -> Option<ListenerKey> {
        let key = match place {
            Place::Path(path) => self.files.get(path)?.listener?,
            place => *self.bound.get(place)?,
        };
        Some(key).filter(|key| self.is_listening(*key))
    }

    /// Leaves a listener to another process than the one that the other ends are told of.
    pub(super) fn inherit(&mut self, key: ListenerKey) {
        self.listeners[key.0].is_inherited = true;
    }

    /// Closes a listener whose process ends, and with it who waits there.
    pub(super) fn end_listener(&mut self, key: ListenerKey) {
        self.gone.extend(&self.listeners[key.0].backlog);
        self.close_listener(key);
    }

    pub(super) fn place_of(&self, key: ListenerKey) -> Place {
        self.listeners[key.0].place.clone()
    }

    pub(super) fn watch_listener(&mut self, key: ListenerKey, worker: usize, token: usize) {
        self.listeners[key.0].watched = Some((worker, token));
        if !self.listeners[key.0].backlog.is_empty() {
            self.raise_listener(key);
        }
    }

    /// Whether a worker accepts there.
    pub(super) fn is_watched(&self, key: ListenerKey) -> bool {
        self.listeners[key.0].watched.is_some()
    }

    /// Takes the first who waits.
    pub(super) fn accept(&mut self, key: ListenerKey) -> io::Result<SocketId> {
        let listener = &self.listeners[key.0];
        let owner = listener.owner;
        if listener.is_broken {
            return fail(libc::EINVAL);
        }
        if listener.backlog.is_empty() {
            return fail(libc::EAGAIN);
        }
        self.take_descriptor(owner)?;
        let listener = &mut self.listeners[key.0];
        let Some(id) = listener.backlog.pop_front() else {
            return fail(libc::EAGAIN);
        };
        self.sockets[id.0].has_descriptor = owner == Owner::Proxy;
        self.progress += 1;
        Ok(id)
    }

    /// How many wait to be accepted.
    pub(super) fn waiting(&self, key: ListenerKey) -> usize {
        self.listeners[key.0].backlog.len()
    }

    /// Closes a listener; who waits there is reset. Its file stays.
    pub(super) fn close_listener(&mut self, key: ListenerKey) {
        let listener = &mut self.listeners[key.0];
        if std::mem::replace(&mut listener.is_closed, true) {
            return;
        }
        let waiting = std::mem::take(&mut listener.backlog);
        let (owner, place) = (listener.owner, listener.place.clone());
        if self.bound.get(&place) == Some(&key) {
            self.bound.remove(&place);
        }
        self.give_descriptor(owner);
        for id in waiting {
            self.drop_waiting(id);
        }
        self.progress += 1;
    }

    /// Shuts a listener down, as `ss -K` does, or another process that has it.
    pub(super) fn break_listener(&mut self, key: ListenerKey) {
        let listener = &mut self.listeners[key.0];
        if listener.is_closed {
            return;
        }
        listener.is_broken = true;
        let waiting = std::mem::take(&mut listener.backlog);
        for id in waiting {
            self.drop_waiting(id);
        }
        self.raise_listener(key);
    }

    fn drop_waiting(&mut self, id: SocketId) {
        match self.sockets[id.0].is_unix {
            true => self.close(id),
            false => self.reset(id),
        }
    }

    fn raise_listener(&mut self, key: ListenerKey) {
        let listener = &mut self.listeners[key.0];
        match (listener.owner, listener.watched) {
            (Owner::Actor(actor), _) => self.wake(actor),
            (Owner::Proxy, Some((worker, _))) => {
                if !std::mem::replace(&mut listener.is_raised, true) {
                    self.raised[worker].push(Raised::Listener(key));
                }
            }
            (Owner::Proxy, None) => {}
        }
    }

    fn take_descriptor(&mut self, owner: Owner) -> io::Result<()> {
        if owner == Owner::Proxy {
            if self.descriptors >= self.left.min(self.habits.descriptors) {
                return fail(libc::EMFILE);
            }
            self.descriptors += 1;
        }
        Ok(())
    }

    fn give_descriptor(&mut self, owner: Owner) {
        if owner == Owner::Proxy {
            self.descriptors -= 1;
        }
    }

    // Connecting.

    /// Begins to connect; of a Unix socket it is done when this returns.
    pub(super) fn connect(&mut self, place: &Place, owner: Owner) -> io::Result<SocketId> {
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
                    Place::Vsock { .. } if silent => Some(self.now + VSOCK_TIMEOUT),
                    _ if silent => None,
                    _ => Some(self.now + self.latency()),
                };
                self.sockets[id.0].target = Some(place.clone());
                self.moves.extend(at.map(|at| Move { at, socket: id }));
            }
        }
        Ok(id)
    }

    fn new_socket(
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
            born: self.now,
        });
        id
    }

    /// Puts a connecting socket into a listener's backlog.
    fn establish(&mut self, id: SocketId, key: ListenerKey) {
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
        self.raise_writable(id);
        self.listeners[key.0].backlog.push_back(accepted);
        self.raise_listener(key);
    }

    /// What a connect that was begun has come to: done, or not yet.
    pub(super) fn connected(&mut self, id: SocketId) -> io::Result<bool> {
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

    // Sockets.

    /// Reads what has come.
    pub(super) fn read(&mut self, id: SocketId, buffer: &mut [u8]) -> io::Result<usize> {
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
    fn note_room(&mut self, id: SocketId) {
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
    pub(super) fn write(&mut self, id: SocketId, bytes: &[u8]) -> io::Result<usize> {
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
    pub(super) fn mark_urgent(&mut self, id: SocketId) {
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
    pub(super) fn shutdown_write(&mut self, id: SocketId) -> io::Result<()> {
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

    /// Takes nothing more.
    pub(super) fn shutdown_read(&mut self, id: SocketId) {
        let socket = &mut self.sockets[id.0];
        socket.deaf = true;
        if let (true, Some(peer)) = (socket.is_unix, socket.peer) {
            self.raise_writable(peer);
        }
    }

    /// Closes. What is unread is a reset to the peer, or to that of a Unix socket an error.
    pub(super) fn close(&mut self, id: SocketId) {
        let socket = &mut self.sockets[id.0];
        if socket.state == State::Closed {
            return;
        }
        let was_connecting = socket.state == State::Connecting;
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
    pub(super) fn reset(&mut self, id: SocketId) {
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
    fn reset_peer(&mut self, id: SocketId) {
        let socket = &mut self.sockets[id.0];
        socket.flight.clear();
        socket.is_dead = true;
        if let Some(peer) = socket.peer {
            self.be_reset(peer, libc::ECONNRESET);
        }
    }

    fn be_reset(&mut self, id: SocketId, number: i32) {
        let socket = &mut self.sockets[id.0];
        if socket.is_dead {
            return;
        }
        socket.is_dead = true;
        socket.flight.clear();
        // After an orderly end no error is left to be told to a read.
        if socket.state == State::Open && !socket.ended {
            socket.error = Some(number);
        }
        self.raise_both(id);
    }

    fn end_descriptor(&mut self, id: SocketId) {
        let socket = &mut self.sockets[id.0];
        socket.state = State::Closed;
        socket.watched = None;
        self.progress += 1;
        if std::mem::take(&mut socket.has_descriptor) {
            self.give_descriptor(Owner::Proxy);
        }
    }

    /// Bytes that a reset now would take away from the peer.
    pub(super) fn unacknowledged(&self, id: SocketId) -> usize {
        self.sockets[id.0].flight.len()
    }

    /// Whether the peer of a Unix socket has taken all, as far as the kernel knows.
    pub(super) fn peer_took_all(&self, id: SocketId) -> bool {
        let socket = &self.sockets[id.0];
        let peer = socket.peer.map(|peer| &self.sockets[peer.0]);
        socket.is_unix && socket.error.is_none() && peer.is_some_and(|peer| peer.inbox.is_empty())
    }

    // What actors and the judge look at.

    pub(super) fn is_unix(&self, id: SocketId) -> bool {
        self.sockets[id.0].is_unix
    }

    pub(super) fn name_of(&self, id: SocketId) -> SocketName {
        self.sockets[id.0].name
    }

    pub(super) fn peer_name_of(&self, id: SocketId) -> SocketName {
        self.sockets[id.0].peer_name
    }

    /// The path of the Unix listener that a socket was connected to.
    pub(super) fn listener_path(&self, id: SocketId) -> Option<&Path> {
        self.sockets[id.0].listener_path.as_deref()
    }

    pub(super) fn owner_of_peer(&self, id: SocketId) -> Option<Owner> {
        let peer = self.sockets[id.0].peer?;
        Some(self.sockets[peer.0].owner)
    }

    pub(super) fn is_closed(&self, id: SocketId) -> bool {
        self.sockets[id.0].state == State::Closed
    }

    pub(super) fn has_half_closed(&self, id: SocketId) -> bool {
        self.sockets[id.0].half_closed
    }

    /// When it was made, on either side.
    pub(super) fn born(&self, id: SocketId) -> Duration {
        self.sockets[id.0].born
    }

    /// Whether the process that had the peer is gone.
    pub(super) fn is_peer_gone(&self, id: SocketId) -> bool {
        let peer = self.sockets[id.0].peer;
        peer.is_some_and(|peer| self.gone.contains(&peer))
    }

    /// Whether the peer has closed both directions.
    pub(super) fn has_peer_closed(&self, id: SocketId) -> bool {
        let peer = self.sockets[id.0].peer;
        peer.is_some_and(|peer| self.sockets[peer.0].state == State::Closed)
    }

    /// Whether the peer has half-closed, or more, and it has come.
    pub(super) fn has_peer_ended(&self, id: SocketId) -> bool {
        self.sockets[id.0].ended
    }

    /// The error that waits to be told.
    pub(super) fn error_of(&self, id: SocketId) -> Option<i32> {
        self.sockets[id.0].error
    }

    /// Bytes that have come and were not read.
    pub(super) fn unread(&self, id: SocketId) -> usize {
        self.sockets[id.0].inbox.len()
    }

    /// Bytes that this end wrote, and read.
    pub(super) fn moved(&self, id: SocketId) -> [u64; 2] {
        [self.sockets[id.0].written, self.sockets[id.0].read]
    }

    /// How much of what the proxy has written to a TCP socket did not come, nor will.
    pub(super) fn lost(&self, id: SocketId) -> Option<u64> {
        let socket = &self.sockets[id.0];
        let peer = &self.sockets[socket.peer?.0];
        let is_of_proxy = peer.owner == Owner::Proxy && !socket.is_unix;
        let come = socket.read + socket.inbox.len() as u64;
        is_of_proxy.then(|| peer.written - come)
    }

    /// The open connections, in words.
    pub(super) fn describe(&self) -> Vec<String> {
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
    pub(super) fn open_of_proxy(&self) -> usize {
        let open = |it: &&Socket| it.owner == Owner::Proxy && it.has_descriptor;
        self.sockets.iter().filter(open).count()
    }

    // The network.

    fn latency(&mut self) -> Duration {
        match self.habits.slow_network {
            true => Duration::from_micros([0, 50, 2_000, 200_000][self.rng.usize(..4)]),
            false => Duration::from_micros([0, 0, 30][self.rng.usize(..3)]),
        }
    }

    fn plan_delivery(&mut self, id: SocketId) {
        if self.moves.iter().any(|it| it.socket == id) {
            return;
        }
        let at = self.now + self.latency();
        self.moves.push(Move { at, socket: id });
    }

    /// When the network has something to do next.
    pub(super) fn next_move(&self) -> Option<Duration> {
        self.moves.iter().map(|it| it.at).min()
    }

    /// Does one thing that is due; false if there is none.
    pub(super) fn make_move(&mut self) -> bool {
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

    fn answer_connect(&mut self, id: SocketId) {
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
                        let at = self.now + SYN_AGAIN;
                        return self.moves.push(Move { at, socket: id });
                    }
                    libc::ECONNRESET
                }
                _ if is_vsock => libc::ECONNRESET,
                _ => libc::ECONNREFUSED,
            }
        };
        let socket = &mut self.sockets[id.0];
        socket.error = Some(error);
        socket.is_dead = true;
        self.raise_both(id);
    }

    /// Brings some of what is in flight to the peer; at last the end.
    fn deliver(&mut self, id: SocketId) {
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

    // Events.

    fn wake(&mut self, actor: usize) {
        if !self.woken.contains(&actor) {
            self.woken.push(actor);
        }
    }

    /// Actors that something has happened to since.
    pub(super) fn take_woken(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.woken)
    }

    fn wake_owner(&mut self, id: SocketId) {
        if let Owner::Actor(actor) = self.sockets[id.0].owner {
            self.wake(actor);
        }
    }

    fn raise(&mut self, id: SocketId, what: Readiness) {
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

    fn raise_readable(&mut self, id: SocketId) {
        let readable = true;
        self.raise(
            id,
            Readiness {
                readable,
                ..Readiness::default()
            },
        );
    }

    fn raise_writable(&mut self, id: SocketId) {
        let writable = true;
        self.raise(
            id,
            Readiness {
                writable,
                ..Readiness::default()
            },
        );
    }

    fn raise_both(&mut self, id: SocketId) {
        let both = Readiness {
            readable: true,
            writable: true,
            ..Readiness::default()
        };
        self.raise(id, both);
    }

    /// Registers a socket with a worker's poller, which tells all that is so now.
    pub(super) fn watch(&mut self, id: SocketId, worker: usize, token: usize) {
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
    fn readiness(&self, id: SocketId) -> Readiness {
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
    pub(super) fn has_events(&self, worker: usize) -> bool {
        !self.raised[worker].is_empty()
    }

    /// What a worker's poller tells.
    pub(super) fn take_events(&mut self, worker: usize, mut tell: impl FnMut(usize, Readiness)) {
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
