//! The interface between the loop and the operating system. Readiness, results of socket calls, and
//! time come to the loop through [`Driver`] and by no other way (invariant 9), so that a whole
//! worker can run against simulated sockets and a simulated clock.
//!
//! Nothing here decides anything: policy belongs to the engine and to the loop.

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

/// Whether a command to a worker is still wanted. Either the worker begins it, or the thread that
/// asked gives it up, whichever is first. A command that was given up has no effect.
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
    /// A look at a VM from outside has this result.
    VmSeen { gate: Arc<Gate>, look: VmLook },
    /// A look at a VM has failed, and says nothing about it.
    LookFailed { gate: Arc<Gate> },
    /// A listener's file was checked, or its address was bound again, with this result.
    Listener { of: ListenerId, found: Found<L> },
    /// The program that was dialled with this token has ended its output and itself, or was cut off:
    /// see [`Driver::dial`].
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

/// The identifier of a worker's listener: its token, and its forward, since tokens are used again.
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
    /// The check has failed, and says nothing about the file.
    Nothing,
}

/// Duplicates of a listener's sockets, for another process.
#[cfg(all(unix, feature = "cli"))]
#[derive(Debug)]
pub(crate) struct Lent {
    pub(crate) sockets: Vec<std::os::fd::OwnedFd>,
    /// The identity of the file that this process made for it.
    pub(crate) file: Option<crate::sys::Identity>,
}

/// What a worker needs of the operating system. Functions without `self` serve callers outside of
/// the workers' loops, which have no driver.
pub(crate) trait Driver: Sized {
    type Stream: ConnectionSocket;
    type Listener;

    /// Binds an address and listens on it. A Unix socket's file gets that access.
    ///
    /// # Errors
    /// Returns `AddrInUse` if another socket listens there, or else the system's error.
    fn bind(address: &Address, access: FileAccess) -> Result<Self::Listener>;
    /// Converts a socket that listened already.
    fn take_passed(listener: listener::Listener) -> Self::Listener;
    /// Returns the address that was bound for `asked`, with the port that was chosen.
    fn bound(listener: &Self::Listener, asked: &Address) -> Address;
    /// Returns what is unusual about a listener that was bound.
    fn note(listener: &Self::Listener) -> Option<&'static str>;
    /// Returns the time of the clock that [`now`](Driver::now) reads.
    fn clock() -> Instant;
    /// Waits for the answer of a worker, at most `patience`.
    ///
    /// # Errors
    /// Returns the errors of [`Receiver::recv_timeout`].
    fn receive<T>(
        answers: &Receiver<T>,
        patience: Duration,
    ) -> std::result::Result<T, RecvTimeoutError>;
    /// Returns the process' limit of descriptors, or `None` if none is known.
    fn descriptor_limit() -> Option<u64>;

    /// Returns the time.
    fn now(&self) -> Instant;
    /// Returns what the wall clock shows.
    fn wall_time(&self) -> SystemTime;
    /// Waits for events, at most `timeout`, and appends all that have come.
    fn wait(
        &mut self,
        events: &mut Vec<DriverEvent<Self::Stream, Self::Listener>>,
        timeout: Option<Duration>,
    ) -> io::Result<()>;

    /// Registers the listener of a rule, once. A keeper may be given a copy of it.
    fn watch_listener(
        &mut self,
        listener: &mut Self::Listener,
        token: usize,
        rule: &Rule,
    ) -> io::Result<()>;
    /// Accepts a client without waiting, and returns the name of its socket.
    ///
    /// # Errors
    /// Returns `WouldBlock` if no client waits; the system's error, which may be `Interrupted`.
    fn accept(&mut self, listener: &Self::Listener) -> io::Result<(Self::Stream, SocketName)>;
    /// Checks whether a listener's file is still there, and binds the address again if it is
    /// missing; the result is a [`DriverEvent::Listener`]. Returns false if the listener has no file
    /// of its own.
    fn check_file(&mut self, listener: &Self::Listener, of: ListenerId, rule: &Rule) -> bool;
    /// Closes the old listener, if there is one, and binds its address again; the result is an
    /// [`DriverEvent::Listener`].
    fn bind_again(&mut self, old: Option<Self::Listener>, of: ListenerId, rule: &Rule);
    /// Changes the owner, group and permissions of a listener's file, if that is still wanted then.
    /// The result is sent to `done`.
    fn set_access(
        &mut self,
        listener: &Self::Listener,
        access: FileAccess,
        wanted: StillWanted,
        done: Sender<io::Result<()>>,
    );
    /// Closes a listener and removes its file; a keeper that has a copy of it accepts there from
    /// now on.
    fn close_listener(&mut self, listener: Self::Listener) {
        self.close_listener_then(listener, channel().0);
    }
    /// Closes a listener as [`close_listener`](Driver::close_listener) does, and notifies `done`
    /// when its address can be bound again.
    fn close_listener_then(&mut self, listener: Self::Listener, done: Sender<()>);
    /// Has a keeper keep a listener that another process has left to this one since it was watched.
    #[cfg(all(unix, feature = "cli"))]
    fn keep_listener(&mut self, listener: &mut Self::Listener, rule: &Rule);
    /// Duplicates a listener's sockets, for another process.
    ///
    /// # Errors
    /// Returns `Unsupported` where no socket can be passed; the system's error, if there is no
    /// descriptor left.
    #[cfg(all(unix, feature = "cli"))]
    fn lend_listener(&self, listener: &Self::Listener) -> io::Result<Lent>;
    /// Closes a listener that another process has now, and leaves the file to that process. Clients
    /// that wait there are not lost by that.
    #[cfg(all(unix, feature = "cli"))]
    fn give_listener(&mut self, listener: Self::Listener);

    /// Begins to connect; the connection waits for `patience` at most. For a hyperkit VM it also
    /// returns the VM's identity.
    fn connect(
        &mut self,
        endpoint: &Endpoint,
        patience: Duration,
    ) -> io::Result<(Self::Stream, Option<VmIdentity>)>;
    /// Explains why a dial failed. Returns `None` if that requires a look at files; the result is
    /// then a [`DriverEvent::Explained`].
    fn explain(&mut self, token: usize, address: &Address, error: io::Error) -> Option<Error>;
    /// Returns the name by which clients know a listener, if they know one.
    fn name_of_listener(&mut self, listener: &Self::Listener) -> Option<ListenerName>;
    /// Registers a stream, readable and writable, once.
    fn watch(&mut self, stream: &mut Self::Stream, token: usize) -> io::Result<()>;
    /// Has TCP ask a peer that has been silent for `time` whether it is still there; `None`: it
    /// asks none. Other families always know.
    fn set_keepalive(&mut self, stream: &Self::Stream, time: Option<Duration>);
    /// Closes a stream.
    fn close(&mut self, stream: Self::Stream);
    /// Closes a stream so that its peer reads a reset, where the family can reset.
    fn reset(&mut self, stream: Self::Stream);
    /// Leaves a stream to the keeper, which closes it when this process has ended.
    fn leave(&mut self, stream: Self::Stream);

    /// Resolves `host`; the result is a [`DriverEvent::Resolved`].
    fn resolve(&mut self, token: usize, host: &str, port: u16);
    /// Returns whether the process at the other end of a stream is ending or has ended, as far as
    /// the system tells.
    fn has_peer_ended(&mut self, stream: &Self::Stream) -> bool;
    /// Releases what was kept for connections, since there are none any more.
    fn release_unused(&mut self);
    /// Looks up the VM behind the state directory of `gate`, and whether its process lives; the
    /// result is a [`DriverEvent::VmSeen`].
    fn look_at_vm(&mut self, gate: &Arc<Gate>);

    /// Connects to the target of a forward, to which connecting blocks; the result is a
    /// [`DriverEvent::Dialled`]. If it is a program, a [`DriverEvent::ProgramEnded`] tells the end of
    /// it, before that event or after it.
    fn dial(
        &mut self,
        token: usize,
        connection: Option<ConnectionId>,
        forward: &Arc<Forward>,
        timeout: Duration,
    );
    /// Relays between two streams on threads, since at least one of them can't be polled, until
    /// [`DriverEvent::ThreadsEnded`]. Draining a side may take `drain`.
    ///
    /// # Errors
    /// Returns the reason if no thread can be started; both streams were reset then.
    fn start_threads(
        &mut self,
        token: usize,
        streams: [Self::Stream; 2],
        forward: &Arc<Forward>,
        drain: Duration,
    ) -> io::Result<()>;
    /// Replaces `stream`, the end of `side`, which no poller can wait for, by one that can be
    /// polled. What is written to it at the end may take `drain` to arrive.
    ///
    /// # Errors
    /// Returns the reason if there can be no adapter. The stream is to be closed then; it may lead
    /// nowhere.
    fn insert_adapter(
        &mut self,
        side: Side,
        stream: &mut Self::Stream,
        drain: Duration,
    ) -> io::Result<()>;
    /// Returns the progress of relay threads, or `None` if there are none under the token.
    fn threads_progress(&self, token: usize) -> Option<Progress>;
    /// Cuts relay threads off. It is called again until [`DriverEvent::ThreadsEnded`] comes.
    fn cut_threads(&mut self, token: usize);
}
