//! The counters of a forward. Any thread may add to them; they know no socket and no clock.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::engine::end_reason::{EndReason, ProgramFailure, RefusalReason};
use crate::engine::relay::Side;

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
    /// Connections that were closed by force, because their guest did not end them within the drain
    /// timeout, or went on sending to nobody.
    pub abandoned: u64,
    /// The connections that have ended, by [`EndReason`].
    #[cfg_attr(feature = "cli", serde(default))]
    pub ended: EndCounts,
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
    /// The client is a proxy that is to say who its client is, by the PROXY protocol, and has not.
    #[cfg_attr(feature = "cli", serde(default))]
    pub no_header: u64,
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

/// Connections that have ended, by [`EndReason`]; the sum is the number of all that have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(
    feature = "cli",
    derive(serde::Deserialize, serde::Serialize),
    serde(default)
)]
#[non_exhaustive]
pub struct EndCounts {
    /// [`EndReason::ClientClosed`].
    pub client_closed: u64,
    /// [`EndReason::ServerClosed`].
    pub server_closed: u64,
    /// [`EndReason::ClientReset`].
    pub client_reset: u64,
    /// [`EndReason::ServerReset`].
    pub server_reset: u64,
    /// [`EndReason::ClientGaveUp`].
    pub client_gave_up: u64,
    /// [`EndReason::IdleTimeout`].
    pub idle_timeout: u64,
    /// [`EndReason::HalfClosedTimeout`].
    pub half_closed_timeout: u64,
    /// [`EndReason::DrainTimeout`].
    pub drain_timeout: u64,
    /// [`EndReason::VmGone`].
    pub vm_gone: u64,
    /// [`EndReason::Refused`].
    pub refused: u64,
    /// [`EndReason::ClosedOnRequest`].
    pub closed_on_request: u64,
    /// [`EndReason::Removed`].
    pub removed: u64,
    /// [`EndReason::Stopped`].
    pub stopped: u64,
    /// [`EndReason::Failed`].
    pub failed: u64,
    /// [`EndReason::ProgramFailed`]. One that is known too late is counted by what came before.
    pub program_failed: u64,
}

/// The counters of a forward, shared by the workers.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) accepted: AtomicU64,
    /// Connections whose target was connected, whatever became of them.
    pub(crate) connected: AtomicU64,
    pub(crate) live: AtomicU64,
    refusals: [AtomicU64; RefusalReason::COUNT],
    pub(crate) idle: AtomicU64,
    pub(crate) half_closed: AtomicU64,
    pub(crate) abandoned: AtomicU64,
    ended: [AtomicU64; EndReason::COUNT],
    delivered: [AtomicU64; 2],
}

/// Adds one to a counter.
pub(crate) fn add_one(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Tally {
    /// Counts a client that was refused.
    pub(crate) fn count_refusal(&self, reason: RefusalReason) {
        add_one(&self.refusals[reason as usize]);
    }

    /// Counts a connection that has ended.
    pub(crate) fn count_end(&self, why: EndReason) {
        add_one(&self.ended[why.index()]);
    }

    /// Counts bytes that `side` sent and that were delivered to the other side.
    pub(crate) fn count_delivered(&self, side: Side, bytes: u64) {
        if bytes > 0 {
            self.delivered[side].fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Returns the counters as they are now.
    pub(crate) fn counters(&self) -> Counters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let of = |reason: RefusalReason| get(&self.refusals[reason as usize]);
        let refusals = Refusals {
            by_target: of(RefusalReason::ByTarget),
            absent: of(RefusalReason::Absent),
            dial_timeout: of(RefusalReason::DialTimeout),
            full: of(RefusalReason::Full),
            not_allowed: of(RefusalReason::NotAllowed),
            no_header: of(RefusalReason::NoHeader),
            other: of(RefusalReason::Other),
        };
        let ended = |why: EndReason| get(&self.ended[why.index()]);
        let ended = EndCounts {
            client_closed: ended(EndReason::ClientClosed),
            server_closed: ended(EndReason::ServerClosed),
            client_reset: ended(EndReason::ClientReset),
            server_reset: ended(EndReason::ServerReset),
            client_gave_up: ended(EndReason::ClientGaveUp),
            idle_timeout: ended(EndReason::IdleTimeout),
            half_closed_timeout: ended(EndReason::HalfClosedTimeout),
            drain_timeout: ended(EndReason::DrainTimeout),
            vm_gone: ended(EndReason::VmGone),
            refused: ended(EndReason::Refused(RefusalReason::Other)),
            closed_on_request: ended(EndReason::ClosedOnRequest),
            removed: ended(EndReason::Removed),
            stopped: ended(EndReason::Stopped),
            failed: ended(EndReason::Failed),
            program_failed: ended(ANY_FAILURE),
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
            ended,
            sent: get(&self.delivered[Side::Client]),
            received: get(&self.delivered[Side::Server]),
        }
    }
}

/// The failures of programs, all of which are counted as one reason.
const ANY_FAILURE: EndReason = EndReason::ProgramFailed(ProgramFailure::Status(1));

impl EndCounts {
    /// Returns each count with the [name](EndReason::name) of its reason.
    pub fn by_reason(&self) -> impl Iterator<Item = (&'static str, u64)> {
        [
            (EndReason::ClientClosed, self.client_closed),
            (EndReason::ServerClosed, self.server_closed),
            (EndReason::ClientReset, self.client_reset),
            (EndReason::ServerReset, self.server_reset),
            (EndReason::ClientGaveUp, self.client_gave_up),
            (EndReason::IdleTimeout, self.idle_timeout),
            (EndReason::HalfClosedTimeout, self.half_closed_timeout),
            (EndReason::DrainTimeout, self.drain_timeout),
            (EndReason::VmGone, self.vm_gone),
            (EndReason::Refused(RefusalReason::Other), self.refused),
            (EndReason::ClosedOnRequest, self.closed_on_request),
            (EndReason::Removed, self.removed),
            (EndReason::Stopped, self.stopped),
            (EndReason::Failed, self.failed),
            (ANY_FAILURE, self.program_failed),
        ]
        .into_iter()
        .map(|(why, count)| (why.name(), count))
    }
}

impl Refusals {
    fn sum(&self) -> u64 {
        let limits = self.full + self.not_allowed + self.no_header;
        self.by_target + self.absent + self.dial_timeout + limits + self.other
    }
}
