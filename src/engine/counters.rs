//! What is counted of a forward.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::address::{Address, SocketKind};
use crate::engine::relay::Side;
use crate::error::{Error, Operation};
use crate::sys;

/// What was counted of a forward since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Deserialize, serde::Serialize))]
#[non_exhaustive]
pub struct Counters {
    /// Connections accepted.
    pub accepted: u64,
    /// Connections that are not closed yet, those that are being drained included.
    pub live: u64,
    /// Connections that could not be carried: the target refused, was not there, or a limit was reached.
    pub refused: u64,
    /// Why they could not; the sum is `refused`.
    pub refusals: Refusals,
    /// Connections that were open and on which nothing moved for longer than [`Timeouts`](super::Timeouts) allow.
    #[cfg_attr(feature = "cli", serde(flatten))]
    pub timed_out: TimedOut,
    /// Connections whose peer did not end within the drain timeout and were closed all the same.
    pub abandoned: u64,
    /// Bytes from the accepting to the dialled side.
    pub sent: u64,
    /// Bytes from the dialled to the accepting side.
    pub received: u64,
}

/// Connections that could not be carried, by what was in the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Deserialize, serde::Serialize))]
#[non_exhaustive]
pub struct Refusals {
    /// The target said no: its VM or its host is there, but nobody listens on that port.
    pub by_target: u64,
    /// The target was not there: no VM, no file, no such name, no way to it.
    pub absent: u64,
    /// It was not connected within the dial timeout, or within the time that the rule waits.
    pub dial_timeout: u64,
    /// A limit of its VM was reached, and stayed so for as long as a dial may take.
    pub full: u64,
    /// Anything else: no rights, no descriptors, the proxy's end.
    pub other: u64,
}

/// Connections that were cut off because nothing moved on them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Deserialize, serde::Serialize))]
#[non_exhaustive]
pub struct TimedOut {
    /// After [`Timeouts::idle`](super::Timeouts::idle).
    pub idle: u64,
    /// After [`Timeouts::half_closed`](super::Timeouts::half_closed).
    pub half_closed: u64,
}

/// Why a connection could not be carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    ByTarget,
    Absent,
    DialTimeout,
    Full,
    Other,
}

impl Reason {
    /// The reason that an error of a dial tells of.
    pub(crate) fn from_error(target: &Address, error: &Error) -> Reason {
        use io::ErrorKind::{
            BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable,
            NetworkUnreachable, NotFound, TimedOut,
        };
        match error.kind() {
            _ if error.operation() == Operation::Resolve => Reason::Absent,
            NotFound | HostUnreachable | NetworkUnreachable => Reason::Absent,
            // A socket's file that nobody listens on any more.
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

/// What the workers count of a forward together.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) accepted: AtomicU64,
    pub(crate) live: AtomicU64,
    refusals: [AtomicU64; 5],
    pub(crate) idle: AtomicU64,
    pub(crate) half_closed: AtomicU64,
    pub(crate) abandoned: AtomicU64,
    delivered: [AtomicU64; 2],
}

/// One more.
pub(crate) fn add_one(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Tally {
    pub(crate) fn refused(&self, reason: Reason) {
        add_one(&self.refusals[reason as usize]);
    }

    /// Counts bytes that `side` sent and the other was given.
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
        self.by_target + self.absent + self.dial_timeout + self.full + self.other
    }
}
