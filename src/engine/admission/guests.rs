//! The dials that a guest makes to this host: which of them are served.
//!
//! hyperkit connects to the host's socket before anyone here can refuse, and a dial that finds no
//! listener, or a listener that closes at once, can hang its device for good (`hyperkit.md`). So
//! every dial is accepted, and one that is not served is ended at once: half-closed, read to its
//! EOF, closed. It has its slot for as long as the guest's program takes to end it.
//!
//! The guest's dials have a share of the VM's slots, so that a target which hangs leaves some for
//! the host's dials, and enough of the device's 1,024 for those that are being ended.

use std::fmt;
use std::sync::Arc;

use tracing::warn;

use super::quotas::Holder;
use super::slot::Stage;
use super::{Full, Gate, Slot, State, why_full};
use crate::engine::id::ForwardId;

/// The part of a VM's slots that the guest's dials leave for those of the host: a ninth, 100 of
/// 900. With 800 dials of the guest held, and every further one ended gracefully, 3,001 did the
/// device no harm.
const FOR_THE_HOST: usize = 9;

/// The part of the guest's share that one of several forwards leaves to the others: a quarter.
const FOR_THE_OTHERS: usize = 4;

/// Returns how many of the guest's dials are served at a time, where the VM may have so many
/// connections.
pub(super) fn share(cap: usize) -> usize {
    cap - cap / FOR_THE_HOST
}

/// A dial that a guest has made: its slot, and whether it is served.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) slot: Slot,
    pub(crate) served: Result<(), NotServed>,
}

/// Why a dial of a guest is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotServed {
    /// The VM has no slot that is free for it.
    Full(Full),
    /// The guest has so many connections, which is its share.
    Share(usize),
    /// The forward has so many: the rest of the guest's share is for the other forwards.
    ShareOfForward(usize),
    /// The forward has so many, which is the most that its rule allows.
    Forward(usize),
}

impl fmt::Display for NotServed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotServed::Full(full) => full.fmt(f),
            NotServed::Share(n) => write!(
                f,
                "{n} connections that the VM's guest has made are in use, as many as it may have"
            ),
            NotServed::ShareOfForward(n) => write!(
                f,
                "{n} connections that the VM's guest has made to this forward are in use, and more are reserved for others"
            ),
            NotServed::Forward(n) => write!(
                f,
                "{n} connections of this forward are in use, and more are not allowed"
            ),
        }
    }
}

impl Gate {
    /// Takes a slot for a dial that the guest has made to `forward`, and decides whether it is
    /// served. `bound` is the most connections that its rule allows, if it has as many.
    pub(crate) fn accept(self: &Arc<Gate>, forward: ForwardId, bound: Option<usize>) -> Guest {
        let mut state = self.state();
        let holder = Holder::Forward(forward);
        let served = match bound {
            Some(most) => Err(NotServed::Forward(most)),
            None => state.serves_guest(holder),
        };
        let slot = match served {
            Ok(()) => {
                state.guests += 1;
                self.slot(&mut state, holder, Stage::Accepted)
            }
            Err(_) => {
                state.turned_away += 1;
                self.slot(&mut state, Holder::TurnedAway, Stage::TurnedAway)
            }
        };
        let is_told = served.is_ok() || std::mem::replace(&mut state.has_told_turned_away, true);
        drop(state);
        if let (Err(why), false) = (served, is_told) {
            let vm = self.vm.state_dir.display();
            warn!(
                "the guest of the VM at {vm} dials more than can be served: {why}; such dials are ended at once (does a target hang? `hvsock status` counts them)"
            );
        }
        Guest { slot, served }
    }
}

impl State {
    /// Returns why no further dial of the guest to that forward is served now, if so.
    fn serves_guest(&self, holder: Holder) -> Result<(), NotServed> {
        if self.quotas.free_for(holder) == 0 {
            return Err(NotServed::Full(why_full(&self.quotas, holder)));
        }
        // What it has reserved it gets.
        if self.quotas.has_unused(holder) {
            return Ok(());
        }
        let share = share(self.quotas.cap());
        if self.guests >= share {
            return Err(NotServed::Share(share));
        }
        let most = share - share / FOR_THE_OTHERS;
        if self.guest_forwards > 1 && self.quotas.live_of(holder) >= most {
            return Err(NotServed::ShareOfForward(most));
        }
        Ok(())
    }
}
