//! A simulated kernel: sockets, listeners, files and descriptors, with the edges, the errors and
//! the limits of Linux'.
//!
//! Every socket of a run is here, those of the proxy and those of its peers. A connection has two
//! [`Socket`]s. What one writes reaches the other at once (Unix), or by a later [`Kernel::deliver`]
//! (TCP, AF_VSOCK): until then a reset takes it away.
//!
//! What it imitates:
//! - **Edges** (epoll, kqueue): a socket is due an event when data, an end or an error comes, and
//!   when a third of the send queue is free again after a write was short or would have blocked;
//!   not before. The event says all that is so (epoll), or only what has changed (`terse`, kqueue).
//! - **Reset** (TCP, AF_VSOCK): what was in flight is lost, what has arrived can still be read, the
//!   error is told once, to a read or to a write. A close with data unread is a reset, and so is
//!   what is sent to a socket that was closed.
//! - **Unix**: no reset. A close with data unread gives the peer ECONNRESET behind what it has;
//!   what is written to a socket that was closed, or whose receiving side was shut, is EPIPE. A
//!   full backlog is EAGAIN, and no event tells when it isn't any more.
//! - **Urgent data** (TCP): a read ends at the mark, and an event tells of it.
//! - **Listeners**: a backlog, EADDRINUSE, EINVAL once somebody has shut it down, EMFILE when the
//!   process has no descriptor left; the client waits in the backlog then.
//! - **Connects**: of TCP refused, established, or silent for ever; of AF_VSOCK ECONNRESET where
//!   nobody listens, ETIMEDOUT after a while where the guest is silent, ENODEV for no such CID.
//!
//! It asserts that the proxy writes nothing after its half-close.

mod looks;
mod network;
mod sockets;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fastrand::Rng;
use nix::libc;

use crate::engine::relay::Readiness;
use crate::name::SocketName;

/// A guest that has sent nothing for so long is silent.
pub(super) const SILENT: Duration = Duration::from_secs(5);

/// How long AF_VSOCK waits for a guest that is silent unless a plan is about that time (Linux:
/// `VSOCK_DEFAULT_CONNECT_TIMEOUT`).
pub(super) const VSOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// How the paths of VMs begin.
pub(super) const VMS: &str = "/sim/vm";

/// After how long TCP tries a full backlog again.
const SYN_AGAIN: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SocketId(usize);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ListenerKey(usize);

/// What a dial of the proxy has come to, or the connection that came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Somebody listens there.
    Taken,
    /// There is nobody, and nothing.
    Absent,
    /// Nobody listens there.
    Refused,
    /// Whoever listens there has ended it: without a byte, or by a reset.
    Ended,
    /// The process of the VM there has ended without a byte.
    Died,
    /// There is no answer, or no room.
    Silent,
    /// This process has no descriptor for it.
    Lack,
}

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
    /// When something was read last.
    read_at: Option<Duration>,
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
    /// How long AF_VSOCK waits for a guest that is silent.
    pub(super) vsock_timeout: Duration,
    moves: Vec<Move>,
    /// What each worker's poller is to tell: sockets and listeners.
    raised: Vec<Vec<Raised>>,
    /// Actors whose sockets something has happened to.
    woken: Vec<usize>,
    /// Descriptors that the proxy has.
    pub(super) descriptors: usize,
    /// How many of the whole machine's are left to it.
    pub(super) left: usize,
    /// Whether a poller can watch another listener.
    pub(super) can_watch: bool,
    /// Counts what has happened: a turn in which nothing has is one without progress.
    pub(super) progress: u64,
    /// Unix sockets whose peer, the proxy's, was closed with bytes unread that they had written.
    pub(super) closed_unread: HashSet<SocketId>,
    /// What the dials of the proxy have come to, and when.
    pub(super) fates: Vec<(Duration, Place, Fate)>,
    /// Names that were found to have no address, and when.
    pub(super) missing: Vec<(Duration, String)>,
    /// Sockets to VMs of which the proxy waits for the end no longer.
    pub(super) abandoned: u64,
    /// The times at which slots were lost, by the state directory of their VM: the proxy has closed
    /// its end of a connection, and the guest, which had been silent, had not ended it.
    pub(super) lost: BTreeMap<PathBuf, Vec<Duration>>,
    /// Sockets of the proxy whose peers are asked whether they are still there.
    pub(super) kept_alive: HashSet<SocketId>,
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
            vsock_timeout: VSOCK_TIMEOUT,
            moves: Vec::new(),
            raised: (0..workers).map(|_| Vec::new()).collect(),
            woken: Vec::new(),
            descriptors: 0,
            left: usize::MAX,
            can_watch: true,
            progress: 0,
            closed_unread: HashSet::new(),
            fates: Vec::new(),
            missing: Vec::new(),
            abandoned: 0,
            lost: BTreeMap::new(),
            kept_alive: HashSet::new(),
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
    pub(super) fn listens_at(&self, path: &Path) -> bool {
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

    /// Whether the file of a listener is still its own; `None` if there is no file, or it needs
    /// none.
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
        let listener = &mut self.listeners[key.0];
        let waiting = std::mem::take(&mut listener.backlog);
        let fate = match listener.is_inherited {
            true => Fate::Ended,
            false => Fate::Died,
        };
        self.gone.extend(&waiting);
        for id in waiting {
            self.close_as(id, fate);
        }
        self.close_listener(key);
    }

    pub(super) fn place_of(&self, key: ListenerKey) -> Place {
        self.listeners[key.0].place.clone()
    }

    /// Watches a listener, unless the machine has no more memory for that.
    pub(super) fn watch_listener(
        &mut self,
        key: ListenerKey,
        worker: usize,
        token: usize,
    ) -> io::Result<()> {
        if !self.can_watch {
            return fail(libc::ENOSPC);
        }
        self.listeners[key.0].watched = Some((worker, token));
        if !self.listeners[key.0].backlog.is_empty() {
            self.raise_listener(key);
        }
        Ok(())
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
}
