//! Quotas of the connections of one VM, or of the process: a cap for all, and slots that are
//! reserved for some.
//!
//! Only counts are kept here; the gate decides which client waits, and for how long.

use std::collections::HashMap;
use std::fmt;

use crate::engine::id::ForwardId;
use crate::error::counted;

/// A party that slots are counted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Holder {
    /// The connections of a forward.
    Forward(ForwardId),
    /// The probes of a VM.
    Probes,
    /// The dials of a guest that are not served, until they have ended.
    TurnedAway,
    /// A process whose listeners this one has taken over, until it has ended.
    Predecessor,
    /// The slots that are lost: of connections that were closed before their guest has ended them
    /// ([`Slot::mark_lost`](super::Slot::mark_lost)), and of those whose end is still waited for
    /// ([`Slot::mark_held`](super::Slot::mark_held)). Of the process' connections, these last.
    Lost,
}

/// The most connections that a forward may have, which it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReachedLimit(pub(crate) usize);

impl fmt::Display for ReachedLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let open = counted(self.0 as u64, "connection");
        write!(f, "this forward has {open} open, and more are not allowed")
    }
}

/// The slots of a VM that another process has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct OtherSlots {
    /// Those that it uses or may still use.
    pub(crate) used: usize,
    /// Those that it has lost, as far as it knows.
    pub(crate) lost: usize,
}

/// The slots of one VM or of the process, by holder.
#[derive(Debug)]
pub(crate) struct Quotas {
    cap: usize,
    live: usize,
    /// The free slots that are reserved: for each holder, what it has reserved and does not use.
    kept: usize,
    /// What all holders have reserved together.
    reserved: usize,
    /// The quotas. One that is empty is left out.
    quotas: HashMap<Holder, Quota>,
}

#[derive(Debug, Default)]
struct Quota {
    reserved: usize,
    live: usize,
    queued: usize,
    /// The most slots that the holder may have at a time, whatever is free.
    most: Option<usize>,
}

impl Quota {
    fn unused(&self) -> usize {
        self.reserved.saturating_sub(self.live)
    }
}

impl Quotas {
    pub(crate) fn new(cap: usize) -> Quotas {
        Quotas {
            cap,
            live: 0,
            kept: 0,
            reserved: 0,
            quotas: HashMap::new(),
        }
    }

    pub(crate) fn cap(&self) -> usize {
        self.cap
    }

    pub(crate) fn set_cap(&mut self, cap: usize) {
        self.cap = cap;
    }

    /// Returns how many slots are taken.
    pub(crate) fn live(&self) -> usize {
        self.live
    }

    /// Returns how many free slots are reserved.
    pub(crate) fn kept(&self) -> usize {
        self.kept
    }

    /// Changes a holder's quota, and all sums with it.
    fn change(&mut self, holder: Holder, change: impl FnOnce(&mut Quota)) {
        let quota = self.quotas.entry(holder).or_default();
        let (unused, live, reserved) = (quota.unused(), quota.live, quota.reserved);
        change(quota);
        self.reserved = self.reserved + quota.reserved - reserved;
        self.kept = self.kept + quota.unused() - unused;
        self.live = self.live + quota.live - live;
        if quota.reserved + quota.live + quota.queued == 0 && quota.most.is_none() {
            self.quotas.remove(&holder);
        }
    }

    /// Returns how many slots a holder has.
    pub(crate) fn live_of(&self, holder: Holder) -> usize {
        self.quotas.get(&holder).map_or(0, |quota| quota.live)
    }

    /// Returns whether a holder has taken fewer slots than it has reserved.
    pub(crate) fn has_unused(&self, holder: Holder) -> bool {
        let quota = self.quotas.get(&holder);
        quota.is_some_and(|quota| quota.unused() > 0)
    }

    /// Reserves slots for a holder in place of those that it has reserved before. If there are too
    /// few, returns how many can be reserved.
    pub(crate) fn reserve(&mut self, holder: Holder, slots: usize) -> Result<(), usize> {
        let own = self.quotas.get(&holder).map_or(0, |quota| quota.reserved);
        let left = self.cap.saturating_sub(self.reserved - own);
        if slots > left {
            return Err(left);
        }
        self.change(holder, |quota| quota.reserved = slots);
        Ok(())
    }

    /// Limits how many slots a holder may have at a time.
    pub(crate) fn set_limit(&mut self, holder: Holder, most: Option<usize>) {
        self.change(holder, |quota| quota.most = most);
    }

    /// Ends a holder's reservation and its limit.
    pub(crate) fn release(&mut self, holder: Holder) {
        self.change(holder, |quota| {
            quota.reserved = 0;
            quota.most = None;
        });
    }

    /// Takes a slot, whether one is free or not.
    pub(crate) fn take(&mut self, holder: Holder) {
        self.change(holder, |quota| quota.live += 1);
    }

    /// Gives a slot back.
    pub(crate) fn give_back(&mut self, holder: Holder) {
        self.change(holder, |quota| quota.live = quota.live.saturating_sub(1));
    }

    /// Returns how many more slots a holder may take.
    pub(crate) fn free_for(&self, holder: Holder) -> usize {
        match self.reached_limit(holder) {
            Some(_) => 0,
            None => self.cap.saturating_sub(self.live + self.kept_from(holder)),
        }
    }

    /// Returns a holder's limit, if it has reached it.
    pub(crate) fn reached_limit(&self, holder: Holder) -> Option<ReachedLimit> {
        let quota = self.quotas.get(&holder)?;
        let most = quota.most.filter(|most| quota.live >= *most);
        most.map(ReachedLimit)
    }

    /// Returns how many free slots are reserved for other holders.
    pub(crate) fn kept_from(&self, holder: Holder) -> usize {
        self.kept - self.quotas.get(&holder).map_or(0, Quota::unused)
    }

    /// Returns whether one more client may be queued: fewer of the holder are queued than it may
    /// take slots.
    pub(crate) fn may_queue(&self, holder: Holder) -> bool {
        let queued = self.quotas.get(&holder).map_or(0, |quota| quota.queued);
        queued < self.free_for(holder)
    }

    /// Counts a client that waits for a slot.
    pub(crate) fn queue(&mut self, holder: Holder) {
        self.change(holder, |quota| quota.queued += 1);
    }

    /// Counts a client that waits no more.
    pub(crate) fn unqueue(&mut self, holder: Holder) {
        self.change(holder, |quota| {
            quota.queued = quota.queued.saturating_sub(1)
        });
    }

    /// Returns how many clients are queued, of all holders.
    pub(crate) fn queued(&self) -> usize {
        self.quotas.values().map(|quota| quota.queued).sum()
    }

    /// Sets how many slots a holder has.
    pub(crate) fn set_live(&mut self, holder: Holder, live: usize) {
        self.change(holder, |quota| quota.live = live);
    }

    /// Ends all reservations: there are no new clients that they could serve.
    pub(crate) fn end_reservations(&mut self) {
        let holders: Vec<Holder> = self.quotas.keys().copied().collect();
        for holder in holders {
            self.change(holder, |quota| quota.reserved = 0);
        }
    }

    /// Forgets all connections.
    pub(crate) fn clear(&mut self) {
        let holders: Vec<Holder> = self.quotas.keys().copied().collect();
        for holder in holders {
            self.change(holder, |quota| quota.live = 0);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const NOISY: Holder = Holder::Forward(ForwardId(0));
    const DOCKER: Holder = Holder::Forward(ForwardId(1));

    #[test]
    fn reserved_slots_are_not_for_other_holders() {
        let mut quotas = Quotas::new(10);
        quotas.reserve(DOCKER, 3).unwrap();
        assert_eq!((quotas.free_for(NOISY), quotas.free_for(DOCKER)), (7, 10));
        for _ in 0..7 {
            quotas.take(NOISY);
        }
        assert_eq!((quotas.free_for(NOISY), quotas.free_for(DOCKER)), (0, 3));
        quotas.take(DOCKER);
        assert_eq!((quotas.free_for(NOISY), quotas.free_for(DOCKER)), (0, 2));
        quotas.give_back(NOISY);
        assert_eq!((quotas.free_for(NOISY), quotas.free_for(DOCKER)), (1, 3));
        quotas.release(DOCKER);
        assert_eq!((quotas.free_for(NOISY), quotas.free_for(DOCKER)), (3, 3));
    }

    #[test]
    fn a_holder_that_uses_more_than_it_reserved_has_nothing_reserved_left() {
        let mut quotas = Quotas::new(4);
        quotas.reserve(DOCKER, 1).unwrap();
        for _ in 0..3 {
            quotas.take(DOCKER);
        }
        assert_eq!((quotas.kept(), quotas.free_for(NOISY)), (0, 1));
        // A dial from a guest takes a slot whatever is left.
        quotas.take(NOISY);
        quotas.take(NOISY);
        assert_eq!((quotas.live(), quotas.free_for(DOCKER)), (5, 0));
        quotas.clear();
        assert_eq!((quotas.kept(), quotas.free_for(NOISY)), (1, 3));
    }

    #[test]
    fn no_more_can_be_reserved_than_there_is() {
        let mut quotas = Quotas::new(10);
        quotas.reserve(DOCKER, 8).unwrap();
        assert_eq!(quotas.reserve(NOISY, 3), Err(2));
        quotas.reserve(NOISY, 2).unwrap();
        quotas.release(DOCKER);
        quotas.reserve(NOISY, 10).unwrap();
    }

    #[test]
    fn a_limited_holder_gets_no_more_though_others_do() {
        let mut quotas = Quotas::new(10);
        quotas.set_limit(NOISY, Some(2));
        quotas.take(NOISY);
        assert_eq!(quotas.reached_limit(NOISY), None);
        assert!(quotas.free_for(NOISY) > 0);
        quotas.take(NOISY);
        assert_eq!(quotas.reached_limit(NOISY), Some(ReachedLimit(2)));
        assert_eq!((quotas.free_for(NOISY), quotas.free_for(DOCKER)), (0, 8));
        quotas.give_back(NOISY);
        assert!(quotas.free_for(NOISY) > 0);
        // The limit outlives the last connection, until it is released.
        quotas.give_back(NOISY);
        quotas.take(NOISY);
        quotas.take(NOISY);
        assert_eq!(quotas.free_for(NOISY), 0);
        quotas.release(NOISY);
        assert_eq!(quotas.free_for(NOISY), 8);
        quotas.clear();
        assert!(quotas.quotas.is_empty());
    }

    #[test]
    fn no_more_are_queued_than_there_are_slots() {
        let mut quotas = Quotas::new(2);
        quotas.take(DOCKER);
        assert!(quotas.may_queue(NOISY));
        quotas.queue(NOISY);
        assert!(!quotas.may_queue(NOISY));
        quotas.unqueue(NOISY);
        assert!(quotas.may_queue(NOISY));
        quotas.queue(NOISY);
        quotas.give_back(DOCKER);
        assert!(quotas.may_queue(NOISY));
        quotas.queue(NOISY);
        quotas.unqueue(NOISY);
        quotas.unqueue(NOISY);
        assert!(quotas.quotas.is_empty());
    }
}
