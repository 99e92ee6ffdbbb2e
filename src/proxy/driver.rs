//! What the loop learns from the world, and does to it (invariant 9): readiness, results of socket calls, and time come through
//! [`Driver`] and nowhere else, so that a whole worker can run against simulated sockets and a simulated clock.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use crate::address::Address;
use crate::engine::connection::Socket;
use crate::engine::relay::{Readiness, Side};
use crate::error::{Error, Result};
use crate::listener;
use crate::name::SocketName;
use crate::stream::endpoint::Endpoint;

use super::relay_threads::{Ended, Progress};
use crate::engine::admission::Gate;
use crate::engine::forward::Forward;
use crate::engine::health::VmIdentity;
use crate::engine::id::ForwardId;
use crate::engine::routes::ListenerName;
use crate::engine::rule::Rule;

/// Whether what a worker is told to do is still wanted: it begins, or the one that asked gives up, whichever is first.
/// What was given up does not happen.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted(Arc<AtomicU8>);

impl Wanted {
    const ASKED: u8 = 0;
    const BEGUN: u8 = 1;
    const GIVEN_UP: u8 = 2;

    fn decide(&self, on: u8) -> bool {
        let (release, acquire) = (Ordering::AcqRel, Ordering::Acquire);
        let decided = self.0.compare_exchange(Wanted::ASKED, on, release, acquire);
        decided.is_ok()
    }

    /// Begins it; false if it was given up.
    pub(crate) fn begin(&self) -> bool {
        self.decide(Wanted::BEGUN)
    }

    /// Gives it up; false if it was begun.
    pub(crate) fn give_up(&self) -> bool {
        self.decide(Wanted::GIVEN_UP)
    }
}

/// What the loop learns in one wait.
#[derive(Debug)]
pub(crate) enum Event<S, L> {
    /// The socket registered under this token became ready.
    Ready { token: usize, readiness: Readiness },
    /// The name asked for with this token has these addresses.
    Resolved {
        token: usize,
        addresses: io::Result<Vec<SocketAddr>>,
    },
    /// The dial that was begun with this token has come to this.
    Dialled { token: usize, stream: Result<S> },
    /// The bridge that was begun with this token has closed its streams.
    ThreadsEnded { token: usize, ended: Ended },
    /// What was seen of a VM from outside.
    VmSeen {
        gate: Arc<Gate>,
        identity: Option<VmIdentity>,
        process: Option<i32>,
    },
    /// What has become of a listener's file, or of a listener that was to be bound again.
    Listener { of: ListenerId, found: Found<L> },
    /// Why the dial of this token has failed.
    Explained { token: usize, error: Error },
}

/// A listener of a worker: its token, and the forward whose it is, for a token is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ListenerId {
    pub(crate) token: usize,
    pub(crate) forward: ForwardId,
}

/// What was found where a listener's socket should be.
#[derive(Debug)]
pub(crate) enum Found<L> {
    /// Its file is there.
    Ours,
    /// Another program's file is there.
    Taken,
    /// There was none; a new one was bound.
    Bound(L),
    /// There is none, and none can be bound.
    Failed(Error),
}

/// Everything a worker asks of its surroundings; and what those ask who look at a proxy and change
/// it from outside of its workers' loops, which have no driver at hand.
pub(crate) trait Driver: Sized {
    type Stream: Socket;
    type Listener;

    /// Binds an address and listens on it. A Unix socket's file gets the permissions `mode`.
    ///
    /// # Errors
    /// `AddrInUse` if somebody listens there; what the system says otherwise.
    fn bind(address: &Address, mode: u32) -> Result<Self::Listener>;
    /// Takes over a socket that listened already.
    fn take_passed(listener: listener::Listener) -> Self::Listener;
    /// Returns the address that was bound when `asked` was asked for: with the port that was
    /// chosen.
    fn bound(listener: &Self::Listener, asked: &Address) -> Address;
    /// Returns the time, on the clock that [`now`](Driver::now) shows.
    fn clock() -> Instant;
    /// Waits for what a worker has to tell, at most `patience`.
    ///
    /// # Errors
    /// As those of [`Receiver::recv_timeout`].
    fn receive<T>(
        told: &Receiver<T>,
        patience: Duration,
    ) -> std::result::Result<T, RecvTimeoutError>;
    /// Returns how many descriptors the process may have; `None` if no limit is known.
    fn descriptor_limit() -> Option<u64>;

    fn now(&self) -> Instant;
    /// Waits for events, at most `timeout`, and appends all that have come.
    fn wait(
        &mut self,
        events: &mut Vec<Event<Self::Stream, Self::Listener>>,
        timeout: Option<Duration>,
    ) -> io::Result<()>;

    fn watch_listener(&mut self, listener: &mut Self::Listener, token: usize) -> io::Result<()>;
    fn accept(&mut self, listener: &Self::Listener) -> io::Result<(Self::Stream, SocketName)>;
    /// Looks whether a listener's file is still there, and binds the address again if it isn't; [`Event::Listener`]
    /// answers. False if it has no file of its own.
    fn check_file(&mut self, listener: &Self::Listener, of: ListenerId, rule: &Rule) -> bool;
    /// Binds an address again, after its listener was closed, if there is one; [`Event::Listener`] answers.
    fn bind_again(&mut self, old: Option<Self::Listener>, of: ListenerId, rule: &Rule);
    /// Gives a listener's file other permissions, if they are still wanted then; `done` gets what has come of it.
    fn set_mode(
        &mut self,
        listener: &Self::Listener,
        mode: u32,
        wanted: Wanted,
        done: Sender<io::Result<()>>,
    );
    /// Closes a listener and removes its file; `done` is told when its address is free again.
    fn close_listener(&mut self, listener: Self::Listener, done: Option<Sender<()>>);

    /// Begins to connect. Of a hyperkit VM: and by what it is known.
    fn connect(&mut self, endpoint: &Endpoint) -> io::Result<(Self::Stream, Option<VmIdentity>)>;
    /// Explains why a dial has failed; `None` if that takes a look at files: then [`Event::Explained`] answers.
    fn explain(&mut self, token: usize, address: &Address, error: io::Error) -> Option<Error>;
    /// By what a listener's clients know it, if they do.
    fn name_of_listener(&mut self, listener: &Self::Listener) -> Option<ListenerName>;
    /// Registers a stream, readable and writable, once.
    fn watch(&mut self, stream: &mut Self::Stream, token: usize) -> io::Result<()>;
    fn close(&mut self, stream: Self::Stream);
    /// Closes so that the peer reads a reset, where the family can.
    fn reset(&mut self, stream: Self::Stream);

    /// Asks for the addresses of `host`; [`Event::Resolved`] answers.
    fn resolve(&mut self, token: usize, host: &str, port: u16);
    /// Whether the process at the other end of a stream is ending or has ended, as far as the system tells.
    fn has_peer_ended(&mut self, stream: &Self::Stream) -> bool;
    /// Lets go of what was kept for connections: there are none.
    fn rest(&mut self);
    /// Looks which VM stands behind the state directory of `gate` now, and whether its process lives; [`Event::VmSeen`]
    /// answers.
    fn look_at_vm(&mut self, gate: &Arc<Gate>);

    /// Connects to an address to which connecting blocks; [`Event::Dialled`] answers.
    fn dial(&mut self, token: usize, address: &Address, timeout: Duration);
    /// Carries between two streams, of which one at least can't be waited for, until [`Event::ThreadsEnded`]. It may take
    /// `drain` to take leave of a side.
    ///
    /// # Errors
    /// It can't be begun; both were reset.
    fn start_threads(
        &mut self,
        token: usize,
        streams: [Self::Stream; 2],
        forward: &Arc<Forward>,
        drain: Duration,
    ) -> io::Result<()>;
    /// Puts a stream for which a poller can wait in the place of one, that of `side`, for which none can. What is written
    /// to it at the end may take `drain` to arrive.
    ///
    /// # Errors
    /// It can't be had: the stream is as it was.
    fn insert_adapter(
        &mut self,
        side: Side,
        stream: &mut Self::Stream,
        drain: Duration,
    ) -> io::Result<()>;
    /// How far a bridge is; `None` if there is none.
    fn threads_progress(&self, token: usize) -> Option<Progress>;
    /// Breaks a bridge off, which is to be tried again until [`Event::ThreadsEnded`].
    fn cut_threads(&mut self, token: usize);
}
