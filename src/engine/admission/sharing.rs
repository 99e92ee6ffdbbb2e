//! The slots of a VM that two processes share for a while: one that has handed its listeners over
//! and lets its connections finish, and its successor.
//!
//! The device counts the connections of both. So the old one tells the new one how many slots it
//! may still use, takes no more than those, and the new one leaves them out. What is lost stays
//! lost when the old one has ended.

use super::gate::Gate;
use super::quotas::Holder;
pub(crate) use super::quotas::OtherSlots;

/// What this process may still use of a VM's slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Remainder {
    /// What it uses, and half of what is free: both processes accept for a moment.
    HalfOfFree,
    /// What its connections and its waiting clients use: it accepts no others.
    Used,
}

impl Gate {
    /// Takes no more slots than the remainder from now on, and returns it: a successor is to leave
    /// it out. It gets smaller as connections end, when this is called again. Returns `None` if the
    /// VM has no limit.
    pub(crate) fn keep_remainder(&self, what: Remainder) -> Option<OtherSlots> {
        let mut state = self.state();
        if state.whole_cap.is_none() {
            state.limit()?;
        }
        let cap = state.quotas.cap();
        let whole = *state.whole_cap.get_or_insert(cap);
        let lost = state.quotas.live_of(Holder::Lost);
        let (live, queued) = (state.quotas.live(), state.quotas.queued());
        let mut kept = live + queued;
        match what {
            Remainder::HalfOfFree => kept += whole.saturating_sub(kept) / 2,
            Remainder::Used => {
                state.quotas.end_reservations();
                // One slot is for the probe that may be needed.
                kept += usize::from(kept > lost);
            }
        }
        let kept = kept.min(whole);
        state.quotas.set_cap(kept);
        Some(OtherSlots {
            used: kept.saturating_sub(lost),
            lost,
        })
    }

    /// Takes all slots again after [`Remainder::HalfOfFree`], for there is no successor after all.
    pub(crate) fn take_whole(&self) {
        let mut state = self.state();
        if let Some(whole) = state.whole_cap.take() {
            state.quotas.set_cap(whole);
            state.wake();
        }
    }

    /// Counts the slots that another process has now as taken, in place of those that it had
    /// before.
    pub(crate) fn leave_out(&self, now: OtherSlots) {
        let mut state = self.state();
        let before = std::mem::replace(&mut state.others, now);
        let lost = state.quotas.live_of(Holder::Lost) + now.lost;
        state
            .quotas
            .set_live(Holder::Lost, lost.saturating_sub(before.lost));
        state.quotas.set_live(Holder::Predecessor, now.used);
        state.wake();
    }

    /// Notes that the other process has ended. The slots that it has lost stay lost.
    pub(crate) fn forget_other(&self) {
        let lost = self.state().others.lost;
        self.leave_out(OtherSlots { used: 0, lost });
    }
}
