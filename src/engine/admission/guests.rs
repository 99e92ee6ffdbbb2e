//! The dials that a guest makes to this host: which of them are served.
//!
//! hyperkit connects to the host's socket before anyone here can refuse, and a dial that finds no
//! listener, or a listener that closes at once, can hang its device for good (`hyperkit.md`). So
//! every dial is accepted, and one that is not served is ended at once: half-closed, read to its
//! EOF, closed. It has its slot for as long as the guest's program takes to end it.
//!
//! The guest's dials have a quota of the VM's slots, so that a target which hangs leaves some for
//! the host's dials, and enough of the device's 1,024 for those that are being ended.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use crate::error::counted;

use tracing::warn;

use super::gate::{Full, Gate, GateState};
use super::quotas::{Holder, ReachedLimit};
use super::slot::{Slot, Stage};
use crate::engine::id::ForwardId;

/// The part of the guest's quota that one of several forwards leaves to the others: a quarter.
const FOR_THE_OTHERS: usize = 4;

/// A dial that a guest has made: its slot, and whether it is served.
#[derive(Debug)]
pub(crate) struct GuestSlot {
    pub(crate) slot: Slot,
    pub(crate) served: Result<(), NotServed>,
}

/// Why a dial of a guest is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotServed {
    /// The VM has no slot that is free for it.
    Full(Full),
    /// The guest has so many connections, which is its quota.
    GuestQuota(usize),
    /// The forward has so many: the rest of the guest's quota is for the other forwards.
    ForwardQuota(usize),
    /// The forward has the most that its rule allows.
    Forward(ReachedLimit),
}

impl fmt::Display for NotServed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotServed::Full(full) => full.fmt(f),
            NotServed::GuestQuota(n) => {
                let made = counted(*n as u64, "connection");
                write!(f, "the VM's guest has made {made}, which is its quota")
            }
            NotServed::ForwardQuota(n) => {
                let made = counted(*n as u64, "connection");
                write!(
                    f,
                    "the VM's guest has made {made} to this forward, and more are reserved for others"
                )
            }
            NotServed::Forward(limit) => limit.fmt(f),
        }
    }
}

impl Gate {
    /// Takes a slot for a dial that the guest has made to `forward`, and decides whether it is
    /// served. `limit` is that of its rule, if it is reached.
    pub(crate) fn accept(
        self: &Arc<Gate>,
        forward: ForwardId,
        limit: Option<ReachedLimit>,
        now: Instant,
    ) -> GuestSlot {
        if self.is_seen_by_dials() {
            self.mark_up(now);
        }
        let mut state = self.state();
        let holder = Holder::Forward(forward);
        let served = match limit {
            Some(limit) => Err(NotServed::Forward(limit)),
            None => state.serves_guest(holder),
        };
        let slot = match served {
            Ok(()) => {
                state.guests += 1;
                self.make_slot(&mut state, holder, Stage::Accepted)
            }
            Err(_) => {
                state.turned_away += 1;
                self.make_slot(&mut state, Holder::TurnedAway, Stage::TurnedAway)
            }
        };
        let is_told = served.is_ok() || std::mem::replace(&mut state.has_told_turned_away, true);
        drop(state);
        if let (Err(why), false) = (served, is_told) {
            let vm = &self.vm;
            warn!(
                "the guest of the VM at {vm} dials more than can be served: {why}; such dials are ended at once (does a target hang? `hvsock status` counts them)"
            );
        }
        GuestSlot { slot, served }
    }
}

impl GateState {
    /// Returns why no further dial of the guest to that forward is served now, if so.
    fn serves_guest(&self, holder: Holder) -> Result<(), NotServed> {
        if self.quotas.free_for(holder) == 0 {
            return Err(NotServed::Full(self.why_full(holder)));
        }
        // The slots that it has reserved are its own, whatever the quota says.
        if self.quotas.has_unused(holder) {
            return Ok(());
        }
        let quota = self.guest_quota();
        if self.guests >= quota {
            return Err(NotServed::GuestQuota(quota));
        }
        let most = quota - quota / FOR_THE_OTHERS;
        if self.guest_forwards > 1 && self.quotas.live_of(holder) >= most {
            return Err(NotServed::ForwardQuota(most));
        }
        Ok(())
    }
}
