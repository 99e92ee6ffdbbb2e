//! The counters of a forward. Any thread may add to them; they know no socket and no clock.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::address::{Address, SocketKind};
use crate::engine::relay::Side;
use crate::error::{Error, Operation};
use crate::sys;

/// The counters of a forward since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Deserialize, serde::Serialize))]
#[non_exhaustive]
pub struct Counters {
    /// Connections accepted.
    pub accepted: u64,
    /// Connections that are not closed yet, including those that are being drained.
    pub live: u64,
    /// Connections that could not be made: the target refused or was absent, or a limit was
    /// reached.
    pub refused: u64,
    /// The refused connections by reason; their sum is `refused`.
    pub refusals: Refusals,
    /// Open connections that were cut off because no byte moved for longer than
    /// [`Timeouts`](super::rule::Timeouts) allow.
    #[cfg_attr(feature = "cli", serde(flatten))]
    pub timed_out: TimedOut,
    /// Connections that were closed because their peer did not end them within the drain timeout.
    pub abandoned: u64,
    /// Bytes from the accepting to the dialled side.
    pub sent: u64,
    /// Bytes from the dialled to the accepting side.
    pub received: u64,
}

/// Connections that could not be made, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Deserialize, serde::Serialize))]
#[non_exhaustive]
pub struct Refusals {
    /// The target refused: its VM or host is there, but nobody listens on that port.
    pub by_target: u64,
    /// The target was absent: no VM, no file, no such name, no route.
    pub absent: u64,
    /// The target was not connected within the dial timeout, or within the rule's `wait`.
    pub dial_timeout: u64,
    /// A limit of the VM was reached, and stayed so for as long as a dial may take.
    pub full: u64,
    /// The client came from where the rule lets none come from.
    #[cfg_attr(feature = "cli", serde(default))]
    pub not_allowed: u64,
    /// Any other reason: no permission, no descriptors, the end of the proxy.
    pub other: u64,
}

/// Connections that were cut off because no byte moved on them, by timeout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Deserialize, serde::Serialize))]
#[non_exhaustive]
pub struct TimedOut {
    /// Cut off after [`Timeouts::idle`](super::rule::Timeouts::idle).
    pub idle: u64,
    /// Cut off after [`Timeouts::half_closed`](super::rule::Timeouts::half_closed).
    pub half_closed: u64,
}

/// The reason why a connection could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    ByTarget,
    Absent,
    DialTimeout,
    Full,
    NotAllowed,
    Other,
}

impl Reason {
    /// Returns the reason that the error of a dial stands for.
    pub(crate) fn from_error(target: &Address, error: &Error) -> Reason {
        use io::ErrorKind::{
            BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable,
            NetworkUnreachable, NotFound, TimedOut,
        };
        match error.kind() {
            _ if error.operation() == Operation::Resolve => Reason::Absent,
            NotFound | HostUnreachable | NetworkUnreachable => Reason::Absent,
            // A socket file on which nobody listens any more.
            ConnectionRefused
                if error.cause().raw_os_error().is_some()
                    && target.transport().socket == SocketKind::Unix =>
            {
                Reason::Absent
            }
            _ if sys::is_no_such_cid(error.cause()) => Reason::Absent,
            ConnectionRefused | ConnectionReset | ConnectionAborted | BrokenPipe => {
                Reason::ByTarget
            }
            TimedOut => Reason::DialTimeout,
            _ => Reason::Other,
        }
    }
}

/// The counters of a forward, shared by the workers.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) accepted: AtomicU64,
    pub(crate) live: AtomicU64,
    refusals: [AtomicU64; 6],
    pub(crate) idle: AtomicU64,
    pub(crate) half_closed: AtomicU64,
    pub(crate) abandoned: AtomicU64,
    delivered: [AtomicU64; 2],
}

/// Adds one to a counter.
pub(crate) fn add_one(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Tally {
    pub(crate) fn refused(&self, reason: Reason) {
        add_one(&self.refusals[reason as usize]);
    }

    /// Counts bytes that `side` sent and that were delivered to the other side.
    pub(crate) fn delivered(&self, side: Side, bytes: u64) {
        if bytes > 0 {
            self.delivered[side].fetch_add(bytes, Ordering::Relaxed);
        }
    }

    pub(crate) fn counters(&self) -> Counters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let of = |reason: Reason| get(&self.refusals[reason as usize]);
        let refusals = Refusals {
            by_target: of(Reason::ByTarget),
            absent: of(Reason::Absent),
            dial_timeout: of(Reason::DialTimeout),
            full: of(Reason::Full),
            not_allowed: of(Reason::NotAllowed),
            other: of(Reason::Other),
        };
        Counters {
            accepted: get(&self.accepted),
            live: get(&self.live),
            refused: refusals.sum(),
            refusals,
            timed_out: TimedOut {
                idle: get(&self.idle),
                half_closed: get(&self.half_closed),
            },
            abandoned: get(&self.abandoned),
            sent: get(&self.delivered[Side::Client]),
            received: get(&self.delivered[Side::Server]),
        }
    }
}

impl Refusals {
    fn sum(&self) -> u64 {
        let limits = self.full + self.not_allowed;
        self.by_target + self.absent + self.dial_timeout + limits + self.other
    }
}
