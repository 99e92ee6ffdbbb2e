//! Events that tell a caller what happens to the connections of its proxy.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::name::{PeerProcess, SocketName};

use super::end_reason::EndReason;
use super::id::{ConnectionId, ForwardId};

/// An event of a connection.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Event<'a> {
    /// The forward that the connection belongs to.
    pub forward: ForwardId,
    /// The connection.
    pub connection: ConnectionId,
    /// The peer that was accepted, as far as the kernel knows its name.
    pub peer: SocketName,
    /// The process that made the peer, if it is a Unix socket.
    pub process: Option<PeerProcess>,
    /// What happened.
    pub what: What<'a>,
}

/// What happened to a connection. The first event of a connection is `Accepted`, the last is
/// `Closed`; each occurs at most once.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum What<'a> {
    /// The connection was accepted; its target is being connected.
    Accepted,
    /// The target is connected. (A hyperkit guest, or any other target that refuses by an EOF, may
    /// still refuse.)
    Connected,
    /// The connection could not be made: the target refused or was absent, or a limit was reached.
    Refused(&'a Error),
    /// Both sides are closed.
    Closed {
        /// Bytes from the accepting to the dialled side.
        sent: u64,
        /// Bytes from the dialled to the accepting side.
        received: u64,
        /// The time since the connection was accepted.
        age: Duration,
        /// Why it has ended.
        why: EndReason,
    },
}

/// A function that is called with each [`Event`], on the thread that caused it.
///
/// All connections of that thread wait until the function returns, so it must hand over whatever
/// takes time. If it panics, the proxy ends with an error.
#[derive(Clone)]
pub struct Observer(Arc<dyn Fn(&Event<'_>) + Send + Sync>);

impl Observer {
    /// Makes an observer that calls `tell`.
    pub fn new(tell: impl Fn(&Event<'_>) + Send + Sync + 'static) -> Observer {
        Observer(Arc::new(tell))
    }

    pub(crate) fn notify(&self, event: &Event<'_>) {
        (self.0)(event);
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}
