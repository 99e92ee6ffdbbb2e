//! The status of forwards, connections and VMs, as a caller reads it, and the cell in which workers
//! leave it. Nothing is looked up here.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use crate::address::Address;
use crate::lock::lock;
use crate::name::{PeerProcess, SocketName};

use super::id::{ConnectionId, ForwardId};
use super::rule::Rule;
use crate::engine::counters::Counters;

/// The status of a forward.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ForwardStatus {
    /// The forward's identifier.
    pub id: ForwardId,
    /// The rule as it was given.
    pub rule: Rule,
    /// The address that was bound. If the rule said port 0 (for vsock, the highest port), it has
    /// the port that was chosen.
    pub listen: Address,
    /// Whether the forward accepts clients now.
    pub state: ForwardState,
    /// What is unusual about its socket.
    pub note: Option<&'static str>,
    /// The VM that the forward dials, or else the one that dials it.
    pub vm: Option<VmStatus>,
    /// Why the last client that was refused was refused.
    pub last_error: Option<LastError>,
    /// The counters since the start.
    pub counters: Counters,
}

/// Whether a forward accepts clients.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ForwardState {
    /// It accepts clients.
    Listening,
    /// A limit is reached: new clients wait in the backlog until a connection ends. Guests are
    /// never made to wait: those beyond a limit are ended at once.
    Full {
        /// The limit.
        why: String,
        /// The time at which it was reached.
        since: SystemTime,
    },
    /// The system refuses to accept, as it does when descriptors run out: new clients wait in the
    /// backlog. (On macOS one that was to be accepted without a descriptor is lost.)
    Paused {
        /// The system's error.
        why: String,
        /// The time of its first occurrence.
        since: SystemTime,
    },
    /// The socket's file belongs to another program, or can't be created again: no client can
    /// connect.
    Lost {
        /// What happened to the file.
        why: String,
        /// The time at which it was noticed.
        since: SystemTime,
    },
    /// The proxy is stopping: no client is accepted any more.
    Closed,
}

/// Bytes that were delivered, in both directions, by what has carried them. Those of connections
/// that have threads of their own (AF_HYPERV) are not among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Deserialize, serde::Serialize))]
#[non_exhaustive]
pub struct CarriedBytes {
    /// Bytes that were copied into a buffer and out of it.
    pub copied: u64,
    /// Bytes that went through a pipe (`splice(2)`).
    pub spliced: u64,
}

/// The state of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "cli",
    derive(serde::Deserialize, serde::Serialize),
    serde(rename_all = "snake_case")
)]
#[non_exhaustive]
pub enum ConnectionState {
    /// The target is being connected to.
    Dialling,
    /// The target is waited for: it was absent when it was dialled, or its VM has no free slot.
    Held,
    /// Bytes can pass in both directions.
    Open,
    /// The client has ended what it sends; the server may go on.
    HalfClosedByClient,
    /// The server has ended what it sends; the client may go on.
    HalfClosedByServer,
    /// All bytes were forwarded, or it was cut off; the sockets are being closed.
    Closing,
}

/// Writes it in words: `half-closed by client`.
impl fmt::Display for ConnectionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            ConnectionState::Dialling => "dialling",
            ConnectionState::Held => "held",
            ConnectionState::Open => "open",
            ConnectionState::HalfClosedByClient => "half-closed by client",
            ConnectionState::HalfClosedByServer => "half-closed by server",
            ConnectionState::Closing => "closing",
        })
    }
}

/// Bytes that were sent by one peer of a connection and were not delivered to the other yet, in the
/// buffers of the system and of the proxy. `None` where the system doesn't tell. What a Unix or an
/// AF_VSOCK socket holds for its peer is not among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Deserialize, serde::Serialize))]
#[non_exhaustive]
pub struct Waiting {
    /// Bytes on their way to the dialled side.
    pub to_server: Option<u64>,
    /// Bytes on their way to the accepting side.
    pub to_client: Option<u64>,
}

/// The status of a live connection.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ConnectionStatus {
    /// The connection's identifier.
    pub id: ConnectionId,
    /// The forward that it belongs to.
    pub forward: ForwardId,
    /// The peer that was accepted, as far as the kernel knows its name.
    pub peer: SocketName,
    /// The process that made the peer, if it is a Unix socket.
    pub process: Option<PeerProcess>,
    /// The state.
    pub state: ConnectionState,
    /// Bytes from the accepting to the dialled side.
    pub sent: u64,
    /// Bytes from the dialled to the accepting side.
    pub received: u64,
    /// Bytes that wait on their way, while it is open and not relayed by threads.
    pub waiting: Option<Waiting>,
    /// The time since the last byte was delivered, or else since it was accepted or opened. (Of one
    /// that threads relay, since bytes were last seen to have been.)
    pub idle: Duration,
    /// The time since it was accepted.
    pub age: Duration,
}

/// The status of a VM, the same for all forwards of that VM.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Deserialize, serde::Serialize))]
#[non_exhaustive]
pub struct VmStatus {
    /// Connections to the VM and from it now; probes are none of them.
    pub connections: usize,
    /// The limit of connections ([`Limits::vm_connections`](super::rule::Limits::vm_connections));
    /// `None` if the VM has none of its own.
    pub limit: Option<usize>,
    /// The slots of the VM that were lost: their connections have ended after the drain timeout, or
    /// by force, and their programs in the guest have not ended them, so the device still counts
    /// them. They come back when the guest ends them, where it can be seen, or when the VM is
    /// restarted, and are taken from the limit until then.
    #[cfg_attr(feature = "cli", serde(default))]
    pub lost: usize,
    /// The slots that are left to the process from which this one has taken over, until it has
    /// ended. They are none of `connections`, and are taken from the limit.
    #[cfg_attr(feature = "cli", serde(default))]
    pub predecessor: usize,
    /// Dials of the proxy's own by which it asks whether the guest answers, and which the guest has
    /// not answered yet. They are none of `connections`, and are taken from the limit.
    #[cfg_attr(feature = "cli", serde(default))]
    pub probes: usize,
    /// Connections that the guest has made, and that are served.
    #[cfg_attr(feature = "cli", serde(default))]
    pub guests: usize,
    /// How many connections of the guest are served at a time; `None` if there is no limit.
    #[cfg_attr(feature = "cli", serde(default))]
    pub guest_limit: Option<usize>,
    /// How many dials of the guest were ended at once since the VM was started or first seen,
    /// because a limit was reached.
    #[cfg_attr(feature = "cli", serde(default))]
    pub turned_away: u64,
    /// The free slots that are reserved for forwards.
    pub reserved: usize,
    /// How many of the latest dials have not been answered yet, with neither a byte nor an EOF.
    /// Dials to services that wait for their client to speak are among them, so the number alone
    /// does not mean that the guest is gone. Counted of hyperkit VMs only.
    pub unanswered: u64,
    /// When the guest last sent a byte or an EOF on any connection, or dialled the host; exact to a
    /// second. `None` if nothing has come since the VM was started or first seen.
    #[cfg_attr(feature = "cli", serde(with = "crate::time::unix_option"))]
    pub last_heard: Option<SystemTime>,
    /// The time since which the guest has answered no dial and sent nothing else. `None` unless
    /// that is so for 30 s, and the guest was asked: it has not answered a dial either that a guest
    /// which runs refuses at once.
    #[cfg_attr(feature = "cli", serde(default, with = "crate::time::unix_option"))]
    pub silent_since: Option<SystemTime>,
    /// Whether the VM's process is stopped, by SIGSTOP or a debugger. Only Linux tells.
    #[cfg_attr(feature = "cli", serde(default))]
    pub paused: bool,
    /// Whether the VM runs, as far as its sockets, its process and its answers to dials tell.
    /// `None` while nothing is known.
    pub up: Option<bool>,
    /// The time since which the VM is known to be gone. `None` if it was never there.
    #[cfg_attr(feature = "cli", serde(with = "crate::time::unix_option"))]
    pub gone_since: Option<SystemTime>,
    /// How often the VM was restarted since the proxy has known it.
    pub restarts: u64,
}

/// The reason for which a client was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Deserialize, serde::Serialize))]
#[non_exhaustive]
pub struct LastError {
    /// The error's text, as in the log.
    pub text: String,
    /// The time of the refusal.
    #[cfg_attr(feature = "cli", serde(with = "crate::time::unix"))]
    pub at: SystemTime,
    /// How many clients' targets were connected since: if there are any, the error is over.
    #[cfg_attr(feature = "cli", serde(default))]
    pub connected_since: u64,
}

/// Converts `then`, a time of the loop's clock that shows `now`, to the wall clock.
pub(crate) fn wall_time(then: Instant, now: Instant) -> SystemTime {
    let wall = SystemTime::now();
    let ago = now.saturating_duration_since(then);
    wall.checked_sub(ago).unwrap_or(wall)
}

/// The reason why a listener accepts no client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Obstacle {
    Full,
    Paused,
    Lost,
    Closed,
}

#[derive(Debug, Default)]
struct KnownStatus {
    obstacle: Option<(Obstacle, String, SystemTime)>,
    /// The last error, and how many clients' targets had been connected by then.
    error: Option<(Arc<str>, SystemTime, u64)>,
    note: Option<&'static str>,
}

/// A cell in which workers leave the status of a forward for those who ask.
#[derive(Debug, Default)]
pub(crate) struct StatusCell(Mutex<KnownStatus>);

impl StatusCell {
    fn known(&self) -> MutexGuard<'_, KnownStatus> {
        lock(&self.0)
    }

    /// Notes why the listener accepts no client. An obstacle that lasts keeps the time of its
    /// beginning.
    pub(crate) fn set_obstacle(&self, obstacle: Obstacle, why: String) {
        let mut known = self.known();
        match &mut known.obstacle {
            Some((before, text, _)) if *before == obstacle => *text = why,
            other => *other = Some((obstacle, why, SystemTime::now())),
        }
    }

    /// Notes that the listener accepts clients again.
    pub(crate) fn clear_obstacle(&self) {
        self.known().obstacle = None;
    }

    /// Notes what is unusual about the socket that was bound.
    pub(crate) fn set_note(&self, note: Option<&'static str>) {
        self.known().note = note;
    }

    pub(crate) fn note(&self) -> Option<&'static str> {
        self.known().note
    }

    /// Notes why a client was refused. `connected` is how many clients' targets have been
    /// connected.
    pub(crate) fn set_error(&self, text: Arc<str>, connected: u64) {
        self.known().error = Some((text, SystemTime::now(), connected));
    }

    pub(crate) fn state(&self) -> ForwardState {
        let known = self.known();
        let Some((obstacle, why, since)) = &known.obstacle else {
            return ForwardState::Listening;
        };
        let (why, since) = (why.clone(), *since);
        match obstacle {
            Obstacle::Full => ForwardState::Full { why, since },
            Obstacle::Paused => ForwardState::Paused { why, since },
            Obstacle::Lost => ForwardState::Lost { why, since },
            Obstacle::Closed => ForwardState::Closed,
        }
    }

    /// Returns the last error. `connected` is how many clients' targets have been connected.
    pub(crate) fn last_error(&self, connected: u64) -> Option<LastError> {
        let (text, at, before) = self.known().error.clone()?;
        Some(LastError {
            text: text.to_string(),
            at,
            connected_since: connected.saturating_sub(before),
        })
    }
}
