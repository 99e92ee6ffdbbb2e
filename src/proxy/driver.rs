//! The interface between the loop and the operating system. Readiness, results of socket calls and
//! time come to the loop only through [`Driver`] (invariant 9), so that a whole worker can run
//! against simulated sockets and a simulated clock.
//!
//! It contains no policy, which belongs to the engine and to the loop.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant, SystemTime};

use crate::address::Address;
use crate::engine::connection::{ConnectionSocket, Progress, ThreadsResult};
use crate::engine::relay::{Readiness, Side};
use crate::error::{Error, Result};
use crate::listener::{self, FileAccess};
use crate::name::SocketName;
use crate::stream::endpoint::Endpoint;

use crate::engine::admission::Gate;
use crate::engine::end_reason::ProgramFailure;
use crate::engine::forward::Forward;
use crate::engine::health::{VmIdentity, VmLook};
use crate::engine::id::{ConnectionId, ForwardId};
use crate::engine::rule::Rule;
use crate::stream::peer_names::ListenerName;

/// The state of a command to a worker: either the worker begins it, or the thread that sent it
/// gives it up, whichever is first. A command that was given up has no effect.
#[derive(Clone, Debug, Default)]
pub(crate) struct StillWanted(Arc<AtomicU8>);

impl StillWanted {
    const ASKED: u8 = 0;
    const BEGUN: u8 = 1;
    const GIVEN_UP: u8 = 2;

    fn decide(&self, on: u8) -> bool {
        let (release, acquire) = (Ordering::AcqRel, Ordering::Acquire);
        let decided = self
            .0
            .compare_exchange(StillWanted::ASKED, on, release, acquire);
        decided.is_ok()
    }

    /// Begins the command. Returns false if it was given up.
    pub(crate) fn begin(&self) -> bool {
        self.decide(StillWanted::BEGUN)
    }

    /// Gives the command up. Returns false if it was begun.
    pub(crate) fn give_up(&self) -> bool {
        self.decide(StillWanted::GIVEN_UP)
    }
}

/// An event that one wait of the loop returns.
#[derive(Debug)]
pub(crate) enum DriverEvent<S, L> {
    /// The socket registered under this token became ready.
    Ready { token: usize, readiness: Readiness },
    /// The name that was resolved with this token has these addresses.
    Resolved {
        token: usize,
        addresses: io::Result<Vec<SocketAddr>>,
    },
    /// The dial that was begun with this token has ended with this result.
    Dialled { token: usize, stream: Result<S> },
    /// The relay threads that were started with this token have closed their streams.
    ThreadsEnded { token: usize, result: ThreadsResult },
    /// A check of a VM from outside has this result.
    VmSeen { gate: Arc<Gate>, look: VmLook },
    /// A check of a VM has failed, so nothing is known about it.
    LookFailed { gate: Arc<Gate> },
    /// A listener's file was checked, or its address was bound again, with this result.
    Listener { of: ListenerId, found: Found<L> },
    /// The program that was dialled with this token has closed its output and exited, or was cut
    /// off: see [`Driver::dial`].
    #[cfg_attr(not(unix), allow(dead_code))]
    ProgramEnded {
        token: usize,
        /// The connection, which may have ended before.
        connection: ConnectionId,
        forward: Arc<Forward>,
        failure: Option<ProgramFailure>,
    },
    /// The dial of this token failed for this reason.
    Explained { token: usize, error: Error },
}

/// The identifier of a worker's listener: its token and its forward, since tokens are reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ListenerId {
    pub(crate) token: usize,
    pub(crate) forward: ForwardId,
}

/// The result of checking a listener's file or of binding its address again.
#[derive(Debug)]
pub(crate) enum Found<L> {
    /// The file is the listener's own.
    Ours,
    /// The file belongs to another program.
    Taken,
    /// The file was missing; a new listener was bound.
    Bound(L),
    /// The file is missing, and no listener can be bound.
    Failed(Error),
    /// The check has failed, so nothing is known about the file.
    Nothing,
}

/// The duplicates of a listener's sockets for another process.
#[cfg(all(unix, feature = "cli"))]
#[derive(Debug)]
pub(crate) struct Lent {
    pub(crate) sockets: Vec<std::os::fd::OwnedFd>,
    /// The identity of the file that this process made for it.
    pub(crate) file: Option<crate::sys::Identity>,
}

/// The operations of the operating system that a worker needs. Functions without `self` are for
/// callers outside of the workers' loops, which have no driver.
pub(crate) trait Driver: Sized {
    type Stream: ConnectionSocket;
    type Listener;

    /// Binds an address and listens on it. The file of a Unix socket gets `access`.
    ///
    /// # Errors
    /// Returns `AddrInUse` if another socket listens there, or else the system's error.
    fn bind(address: &Address, access: FileAccess) -> Result<Self::Listener>;
    /// Converts a socket that listened already.
    fn take_passed(listener: listener::Listener) -> Self::Listener;
    /// Returns the address that was bound for `asked`, with the port that the kernel chose.
    fn bound(listener: &Self::Listener, asked: &Address) -> Address;
    /// Returns what is unusual about a listener that was bound.
    fn note(listener: &Self::Listener) -> Option<&'static str>;
    /// Returns the time of the clock that [`now`](Driver::now) reads.
    fn clock() -> Instant;
    /// Waits for the answer of a worker, for at most `patience`.
    ///
    /// # Errors
    /// Returns the errors of [`Receiver::recv_timeout`].
    fn receive<T>(
        answers: &Receiver<T>,
        patience: Duration,
    ) -> std::result::Result<T, RecvTimeoutError>;
    /// Returns the process's limit of descriptors, if one is known.
    fn descriptor_limit() -> Option<u64>;

    /// Returns the time.
    fn now(&self) -> Instant;
    /// Returns the time of the wall clock.
    fn wall_time(&self) -> SystemTime;
    /// Waits for events, for at most `timeout`, and appends all that have come.
    fn wait(
        &mut self,
        events: &mut Vec<DriverEvent<Self::Stream, Self::Listener>>,
        timeout: Option<Duration>,
    ) -> io::Result<()>;

    /// Registers the listener of a rule, once, and gives a keeper a copy of it where one keeps it.
    fn watch_listener(
        &mut self,
        listener: &mut Self::Listener,
        token: usize,
        rule: &Rule,
    ) -> io::Result<()>;
    /// Accepts a client without waiting, and returns the name of its socket.
    ///
    /// # Errors
    /// Returns `WouldBlock` if no client waits, or else the system's error, which may be
    /// `Interrupted`.
    fn accept(&mut self, listener: &Self::Listener) -> io::Result<(Self::Stream, SocketName)>;
    /// Checks whether a listener's file still exists, and binds the address again if it is missing.
    /// The result is a [`DriverEvent::Listener`]. Returns false if the listener has no file of its
    /// own.
    fn check_file(&mut self, listener: &Self::Listener, of: ListenerId, rule: &Rule) -> bool;
    /// Closes the old listener, if there is one, and binds its address again. The result is a
    /// [`DriverEvent::Listener`].
    fn bind_again(&mut self, old: Option<Self::Listener>, of: ListenerId, rule: &Rule);
    /// Changes the owner, group and permissions of a listener's file, unless `wanted` was given up
    /// by then. The result is sent to `done`.
    fn set_access(
        &mut self,
        listener: &Self::Listener,
        access: FileAccess,
        wanted: StillWanted,
        done: Sender<io::Result<()>>,
    );
    /// Closes a listener and removes its file. A keeper that has a copy of it accepts its clients
    /// from now on.
    fn close_listener(&mut self, listener: Self::Listener) {
        self.close_listener_then(listener, channel().0);
    }
    /// Closes a listener as [`close_listener`](Driver::close_listener) does, and notifies `done`
    /// when its address can be bound again.
    fn close_listener_then(&mut self, listener: Self::Listener, done: Sender<()>);
    /// Gives a keeper a copy of a listener that another process has handed over since it was
    /// registered.
    #[cfg(all(unix, feature = "cli"))]
    fn keep_listener(&mut self, listener: &mut Self::Listener, rule: &Rule);
    /// Duplicates a listener's sockets, for another process.
    ///
    /// # Errors
    /// Returns `Unsupported` where no socket can be passed, or the system's error if no descriptor
    /// is left.
    #[cfg(all(unix, feature = "cli"))]
    fn lend_listener(&self, listener: &Self::Listener) -> io::Result<Lent>;
    /// Closes a listener that another process has now, without removing its file. Waiting clients
    /// are not lost.
    #[cfg(all(unix, feature = "cli"))]
    fn give_listener(&mut self, listener: Self::Listener);

    /// Begins to connect. The connection waits for at most `patience`. For a hyperkit VM it also
    /// returns the VM's identity.
    fn connect(
        &mut self,
        endpoint: &Endpoint,
        patience: Duration,
    ) -> io::Result<(Self::Stream, Option<VmIdentity>)>;
    /// Explains why a dial failed. Returns `None` if that requires reading files; the result is
    /// then a [`DriverEvent::Explained`].
    fn explain(&mut self, token: usize, address: &Address, error: io::Error) -> Option<Error>;
    /// Returns the name by which clients know a listener, if it has one.
    fn name_of_listener(&mut self, listener: &Self::Listener) -> Option<ListenerName>;
    /// Registers a stream as readable and writable, once.
    fn watch(&mut self, stream: &mut Self::Stream, token: usize) -> io::Result<()>;
    /// Sets the time after which TCP probes an idle peer; `None` turns keepalive off. Other
    /// families always notice when a peer is gone.
    fn set_keepalive(&mut self, stream: &Self::Stream, time: Option<Duration>);
    /// Closes a stream.
    fn close(&mut self, stream: Self::Stream);
    /// Closes a stream so that its peer reads a reset, where the family can reset.
    fn reset(&mut self, stream: Self::Stream);
    /// Leaves a stream to the keeper, which closes it when this process has ended.
    fn leave(&mut self, stream: Self::Stream);

    /// Resolves `host`; the result is a [`DriverEvent::Resolved`].
    fn resolve(&mut self, token: usize, host: &str, port: u16);
    /// Returns whether the peer of a stream, a process or a VM, is ending or has ended, as far as
    /// the system tells.
    fn has_peer_ended(&mut self, stream: &Self::Stream) -> bool;
    /// Releases what was kept for connections, after the last of them has ended.
    fn release_unused(&mut self);
    /// Checks which VM has the state directory of `gate`, and whether its process lives. The result
    /// is a [`DriverEvent::VmSeen`].
    fn look_at_vm(&mut self, gate: &Arc<Gate>);

    /// Connects to a target of a forward whose connect blocks. The result is a
    /// [`DriverEvent::Dialled`]. If it is a program, its end is a [`DriverEvent::ProgramEnded`],
    /// before that event or after it.
    fn dial(
        &mut self,
        token: usize,
        connection: Option<ConnectionId>,
        forward: &Arc<Forward>,
        timeout: Duration,
    );
    /// Relays between two streams on threads until [`DriverEvent::ThreadsEnded`], since at least
    /// one of them can't be polled. Draining a side may take `drain`.
    ///
    /// # Errors
    /// Returns the system's error if no thread can be started. Both streams were reset then.
    fn start_threads(
        &mut self,
        token: usize,
        streams: [Self::Stream; 2],
        forward: &Arc<Forward>,
        drain: Duration,
    ) -> io::Result<()>;
    /// Replaces `stream`, the end of `side`, which can't be polled, by one that can. The last bytes
    /// written to it may take `drain` to arrive.
    ///
    /// # Errors
    /// Returns the system's error if no adapter can be made. The stream must be closed then, since
    /// it may lead nowhere.
    fn insert_adapter(
        &mut self,
        side: Side,
        stream: &mut Self::Stream,
        drain: Duration,
    ) -> io::Result<()>;
    /// Returns the progress of the relay threads of a token, if there are such.
    fn threads_progress(&self, token: usize) -> Option<Progress>;
    /// Cuts relay threads off. It must be called again until [`DriverEvent::ThreadsEnded`] comes.
    fn cut_threads(&mut self, token: usize);
}
