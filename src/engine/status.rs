//! What can be told of a forward that is carried.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::address::Address;
use crate::name::SocketName;

use super::id::{ConnectionId, ForwardId};
use super::rule::Rule;
use crate::engine::counters::Counters;

/// A rule that is carried, and what has been counted of it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ForwardStatus {
    /// Which one it is.
    pub id: ForwardId,
    /// The rule as it was given.
    pub rule: Rule,
    /// Where it listens: with the port that was chosen, where the rule said port 0 (of vsock the highest).
    pub listen: Address,
    /// Whether it takes clients now.
    pub state: ForwardState,
    /// The hyperkit VM that it leads to, or else the one that dials it.
    pub vm: Option<VmStatus>,
    /// Why the last client that could not be carried was refused.
    pub last_error: Option<LastError>,
    /// Counted since the start.
    pub counters: Counters,
}

/// Whether a forward takes clients.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ForwardState {
    /// It does.
    Listening,
    /// A limit is reached: new clients wait in the backlog until a connection ends. Guests are never made to wait.
    Full {
        /// Which limit.
        why: String,
        /// Since when.
        since: SystemTime,
    },
    /// The system refuses to accept, as it does when descriptors run out: new clients wait in the backlog.
    Paused {
        /// What it says.
        why: String,
        /// Since when.
        since: SystemTime,
    },
    /// Its socket's file is another program's, or can't be made again: no client finds it.
    Lost {
        /// What happened to it.
        why: String,
        /// Since when.
        since: SystemTime,
    },
    /// The proxy is stopping: it takes no more clients.
    Closed,
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "cli",
    derive(serde::Serialize),
    serde(rename_all = "lowercase")
)]
#[non_exhaustive]
pub enum ConnectionState {
    /// Its target is being connected to, or waited for.
    Dialling,
    /// Bytes can go both ways.
    Open,
    /// Carried to its end; what is left is to close it as its peers need it.
    Ending,
}

/// A connection that is carried now.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "cli", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ConnectionStatus {
    /// Which one it is.
    pub id: ConnectionId,
    /// Whose it is.
    pub forward: ForwardId,
    /// Who it is from, as far as the kernel knows.
    pub peer: SocketName,
    /// How far it is.
    pub state: ConnectionState,
    /// Bytes from the accepting to the dialled side.
    pub sent: u64,
    /// Bytes from the dialled to the accepting side.
    pub received: u64,
    /// How long ago it was accepted.
    #[cfg_attr(
        feature = "cli",
        serde(rename = "age_seconds", serialize_with = "crate::time::write_seconds")
    )]
    pub age: Duration,
}

/// A hyperkit VM. All forwards of one VM tell the same of it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Deserialize, serde::Serialize))]
#[non_exhaustive]
pub struct VmStatus {
    /// Connections to it and from it now.
    pub connections: usize,
    /// How many there may be ([`Limits::vm_connections`](super::rule::Limits::vm_connections)).
    pub limit: usize,
    /// How many of those that are free are kept for forwards that reserve them.
    pub reserved: usize,
    /// How many of the latest dials have brought nothing back yet, neither a byte nor an end. Those
    /// to services that wait for their client to speak are among them: it alone is no sign that the
    /// guest is gone.
    pub unanswered: u64,
    /// When a byte or an end came last from the guest, on whichever connection, or it dialled us;
    /// exact to a second. `None` if it hasn't been heard from since it was started or first seen.
    #[cfg_attr(feature = "cli", serde(with = "crate::time::unix_option"))]
    pub last_heard: Option<SystemTime>,
    /// Whether it runs, as far as its sockets and its process tell; `None` while nothing is known.
    pub up: Option<bool>,
    /// Since when it is known to be gone.
    #[cfg_attr(feature = "cli", serde(with = "crate::time::unix_option"))]
    pub gone_since: Option<SystemTime>,
    /// How often it was started anew since the proxy has known it.
    pub restarts: u64,
}

/// Why a client was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Deserialize, serde::Serialize))]
#[non_exhaustive]
pub struct LastError {
    /// What the log says.
    pub text: String,
    /// When.
    #[cfg_attr(feature = "cli", serde(with = "crate::time::unix"))]
    pub at: SystemTime,
}

/// Returns the time on the wall when the loop's clock, which shows `now`, showed `then`.
pub(crate) fn wall_time(then: Instant, now: Instant) -> SystemTime {
    let wall = SystemTime::now();
    let ago = now.saturating_duration_since(then);
    wall.checked_sub(ago).unwrap_or(wall)
}

/// Why a listener takes nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Obstacle {
    Full,
    Paused,
    Lost,
    Closed,
}

#[derive(Debug, Default)]
struct Known {
    obstacle: Option<(Obstacle, String, SystemTime)>,
    error: Option<LastError>,
}

/// What workers leave behind for whoever asks how a forward is.
#[derive(Debug, Default)]
pub(crate) struct StatusCell(Mutex<Known>);

impl StatusCell {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes why the listener takes nobody. The time of an obstacle that lasts is that of its beginning.
    pub(crate) fn set_obstacle(&self, obstacle: Obstacle, why: String) {
        let mut known = self.known();
        match &mut known.obstacle {
            Some((before, text, _)) if *before == obstacle => *text = why,
            other => *other = Some((obstacle, why, SystemTime::now())),
        }
    }

    /// Notes that the listener takes clients again.
    pub(crate) fn clear_obstacle(&self) {
        self.known().obstacle = None;
    }

    pub(crate) fn set_error(&self, text: String) {
        let at = SystemTime::now();
        self.known().error = Some(LastError { text, at });
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

    pub(crate) fn last_error(&self) -> Option<LastError> {
        self.known().error.clone()
    }
}
