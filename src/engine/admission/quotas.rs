//! Who may have how many of the connections of a VM, or of the process: a cap for all, and slots that are kept for some.

use std::collections::HashMap;

use crate::engine::id::ForwardId;

/// What has slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Holder {
    /// The connections of a forward.
    Forward(ForwardId),
    /// The probes of a VM.
    Probes,
}

/// The slots of one VM or of the process, by what has them.
#[derive(Debug)]
pub(crate) struct Quotas {
    cap: usize,
    live: usize,
    /// Free slots that are kept: what each holder has reserved and doesn't use.
    kept: usize,
    /// Those with nothing in them are left out.
    quotas: HashMap<Holder, Quota>,
}

#[derive(Debug, Default)]
struct Quota {
    reserved: usize,
    live: usize,
    queued: usize,
    /// How many slots it may have at a time, whatever is free.
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
            quotas: HashMap::new(),
        }
    }

    pub(crate) fn cap(&self) -> usize {
        self.cap
    }

    pub(crate) fn set_cap(&mut self, cap: usize) {
        self.cap = cap;
    }

    pub(crate) fn live(&self) -> usize {
        self.live
    }

    pub(crate) fn kept(&self) -> usize {
        self.kept
    }

    fn change(&mut self, holder: Holder, change: impl FnOnce(&mut Quota)) {
        let quota = self.quotas.entry(holder).or_default();
        let (unused, live) = (quota.unused(), quota.live);
        change(quota);
        self.kept = self.kept + quota.unused() - unused;
        self.live = self.live + quota.live - live;
        if quota.reserved + quota.live + quota.queued == 0 && quota.most.is_none() {
            self.quotas.remove(&holder);
        }
    }

    /// Keeps slots for a holder; how many there are to be had if those are too many.
    pub(crate) fn reserve(&mut self, holder: Holder, slots: usize) -> Result<(), usize> {
        let others = self.quotas.iter().filter(|(id, _)| **id != holder);
        let taken = others.map(|(_, quota)| quota.reserved).sum();
        let left = self.cap.saturating_sub(taken);
        if slots > left {
            return Err(left);
        }
        self.change(holder, |quota| quota.reserved = slots);
        Ok(())
    }

    /// Bounds how many slots a holder may have at a time.
    pub(crate) fn bound(&mut self, holder: Holder, most: Option<usize>) {
        self.change(holder, |quota| quota.most = most);
    }

    /// Neither keeps slots for a holder any longer, nor bounds it.
    pub(crate) fn give_up(&mut self, holder: Holder) {
        self.change(holder, |quota| {
            quota.reserved = 0;
            quota.most = None;
        });
    }

    pub(crate) fn take(&mut self, holder: Holder) {
        self.change(holder, |quota| quota.live += 1);
    }

    pub(crate) fn give_back(&mut self, holder: Holder) {
        self.change(holder, |quota| quota.live = quota.live.saturating_sub(1));
    }

    /// Free slots that this holder may have.
    pub(crate) fn free_for(&self, holder: Holder) -> usize {
        match self.is_at_its_bound(holder) {
            Some(_) => 0,
            None => self.cap.saturating_sub(self.live + self.kept_from(holder)),
        }
    }

    /// The slots that a holder may have, if it has all of them.
    pub(crate) fn is_at_its_bound(&self, holder: Holder) -> Option<usize> {
        let quota = self.quotas.get(&holder)?;
        quota.most.filter(|most| quota.live >= *most)
    }

    /// Free slots that are kept for others than this holder.
    pub(crate) fn kept_from(&self, holder: Holder) -> usize {
        self.kept - self.quotas.get(&holder).map_or(0, Quota::unused)
    }

    /// Returns whether one more may be queued: what is free is not asked for by others of it.
    pub(crate) fn may_queue(&self, holder: Holder) -> bool {
        let queued = self.quotas.get(&holder).map_or(0, |quota| quota.queued);
        queued < self.free_for(holder)
    }

    pub(crate) fn line_up(&mut self, holder: Holder) {
        self.change(holder, |quota| quota.queued += 1);
    }

    pub(crate) fn unqueue(&mut self, holder: Holder) {
        self.change(holder, |quota| {
            quota.queued = quota.queued.saturating_sub(1)
        });
    }

    /// All connections are gone.
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
    fn what_is_reserved_is_nobody_elses() {
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
        quotas.give_up(DOCKER);
        assert_eq!((quotas.free_for(NOISY), quotas.free_for(DOCKER)), (3, 3));
    }

    #[test]
    fn who_uses_more_than_it_reserved_keeps_nothing_free() {
        let mut quotas = Quotas::new(4);
        quotas.reserve(DOCKER, 1).unwrap();
        for _ in 0..3 {
            quotas.take(DOCKER);
        }
        assert_eq!((quotas.kept(), quotas.free_for(NOISY)), (0, 1));
        // A guest takes a place whatever is left.
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
        quotas.give_up(DOCKER);
        quotas.reserve(NOISY, 10).unwrap();
    }

    #[test]
    fn who_is_bounded_has_no_more_though_others_have() {
        let mut quotas = Quotas::new(10);
        quotas.bound(NOISY, Some(2));
        quotas.take(NOISY);
        assert_eq!(quotas.is_at_its_bound(NOISY), None);
        assert!(quotas.free_for(NOISY) > 0);
        quotas.take(NOISY);
        assert_eq!(quotas.is_at_its_bound(NOISY), Some(2));
        assert_eq!((quotas.free_for(NOISY), quotas.free_for(DOCKER)), (0, 8));
        quotas.give_back(NOISY);
        assert!(quotas.free_for(NOISY) > 0);
        // It holds though none is there now, until it is taken back.
        quotas.give_back(NOISY);
        quotas.take(NOISY);
        quotas.take(NOISY);
        assert_eq!(quotas.free_for(NOISY), 0);
        quotas.give_up(NOISY);
        assert_eq!(quotas.free_for(NOISY), 8);
        quotas.clear();
        assert!(quotas.quotas.is_empty());
    }

    #[test]
    fn no_more_are_queued_than_there_are_places() {
        let mut quotas = Quotas::new(2);
        quotas.take(DOCKER);
        assert!(quotas.may_queue(NOISY));
        quotas.line_up(NOISY);
        assert!(!quotas.may_queue(NOISY));
        quotas.unqueue(NOISY);
        assert!(quotas.may_queue(NOISY));
        quotas.line_up(NOISY);
        quotas.give_back(DOCKER);
        assert!(quotas.may_queue(NOISY));
        quotas.line_up(NOISY);
        quotas.unqueue(NOISY);
        quotas.unqueue(NOISY);
        assert!(quotas.quotas.is_empty());
    }
}
