//! Telling a caller what happens to the connections of its proxy.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::name::SocketName;

use super::id::{ConnectionId, ForwardId};

/// Something that happened to a connection.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Event<'a> {
    /// Whose it is.
    pub forward: ForwardId,
    /// Which one it is.
    pub connection: ConnectionId,
    /// Who it is from, as far as the kernel knows.
    pub peer: SocketName,
    /// What happened.
    pub what: What<'a>,
}

/// What happens to connections. The first of each is `Accepted`, the last `Closed`; each comes once at most.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum What<'a> {
    /// It was accepted; now its target is being connected.
    Accepted,
    /// Its target is connected. (A hyperkit guest, and whoever else refuses by an EOF, may refuse even now.)
    Connected,
    /// It could not be carried: its target refused or was not there, or a limit was reached.
    Refused(&'a Error),
    /// All of it is closed, and its peers were taken leave of.
    Closed {
        /// Bytes from the accepting to the dialled side.
        sent: u64,
        /// Bytes from the dialled to the accepting side.
        received: u64,
        /// Since it was accepted.
        age: Duration,
    },
}

/// A function that is told of each [`Event`], by the thread that caused it.
///
/// All connections of that thread wait until it returns: it hands over what takes time. If it panics, the proxy ends with
/// an error.
#[derive(Clone)]
pub struct Observer(Arc<dyn Fn(&Event<'_>) + Send + Sync>);

impl Observer {
    /// Calls that function.
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
