//! Who may have how many of a VM's places, or of the process': a cap for all, and places that are kept for some.

use std::collections::HashMap;

use crate::engine::id::ForwardId;

/// The places of one VM or of the process, by forward.
#[derive(Debug)]
pub(crate) struct Shares {
    cap: usize,
    live: usize,
    /// Free places that are kept: what each forward has reserved and doesn't use.
    kept: usize,
    /// Those with nothing in them are left out.
    shares: HashMap<ForwardId, Share>,
}

#[derive(Debug, Default)]
struct Share {
    reserved: usize,
    live: usize,
    queued: usize,
    /// How many places it may have at a time, whatever is free.
    most: Option<usize>,
}

impl Share {
    fn unused(&self) -> usize {
        self.reserved.saturating_sub(self.live)
    }
}

impl Shares {
    pub(crate) fn new(cap: usize) -> Shares {
        Shares {
            cap,
            live: 0,
            kept: 0,
            shares: HashMap::new(),
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

    fn change(&mut self, forward: ForwardId, change: impl FnOnce(&mut Share)) {
        let share = self.shares.entry(forward).or_default();
        let (unused, live) = (share.unused(), share.live);
        change(share);
        self.kept = self.kept + share.unused() - unused;
        self.live = self.live + share.live - live;
        if share.reserved + share.live + share.queued == 0 && share.most.is_none() {
            self.shares.remove(&forward);
        }
    }

    /// Keeps places for a forward; how many there are to be had if those are too many.
    pub(crate) fn reserve(&mut self, forward: ForwardId, places: usize) -> Result<(), usize> {
        let others = self.shares.iter().filter(|(id, _)| **id != forward);
        let taken = others.map(|(_, share)| share.reserved).sum();
        let left = self.cap.saturating_sub(taken);
        if places > left {
            return Err(left);
        }
        self.change(forward, |share| share.reserved = places);
        Ok(())
    }

    /// Bounds how many places a forward may have at a time.
    pub(crate) fn bound(&mut self, forward: ForwardId, most: Option<usize>) {
        self.change(forward, |share| share.most = most);
    }

    /// Neither keeps places for a forward any longer, nor bounds it.
    pub(crate) fn give_up(&mut self, forward: ForwardId) {
        self.change(forward, |share| {
            share.reserved = 0;
            share.most = None;
        });
    }

    pub(crate) fn take(&mut self, forward: ForwardId) {
        self.change(forward, |share| share.live += 1);
    }

    pub(crate) fn give_back(&mut self, forward: ForwardId) {
        self.change(forward, |share| share.live = share.live.saturating_sub(1));
    }

    /// Free places that this forward may have.
    pub(crate) fn free_for(&self, forward: ForwardId) -> usize {
        match self.is_at_its_bound(forward) {
            Some(_) => 0,
            None => self.cap.saturating_sub(self.live + self.kept_from(forward)),
        }
    }

    /// The places that a forward may have, if it has all of them.
    pub(crate) fn is_at_its_bound(&self, forward: ForwardId) -> Option<usize> {
        let share = self.shares.get(&forward)?;
        share.most.filter(|most| share.live >= *most)
    }

    /// Free places that are kept for others than this forward.
    pub(crate) fn kept_from(&self, forward: ForwardId) -> usize {
        self.kept - self.shares.get(&forward).map_or(0, Share::unused)
    }

    /// A client of the forward is to be dialled for; false if all that is free waits for others of it.
    pub(crate) fn queue(&mut self, forward: ForwardId) -> bool {
        let queued = self.shares.get(&forward).map_or(0, |share| share.queued);
        let free = queued < self.free_for(forward);
        if free {
            self.line_up(forward);
        }
        free
    }

    /// Returns whether [`queue`](Shares::queue) would let one in.
    #[cfg(all(test, target_os = "linux"))]
    pub(crate) fn would_queue(&self, forward: ForwardId) -> bool {
        let queued = self.shares.get(&forward).map_or(0, |share| share.queued);
        queued < self.free_for(forward)
    }

    pub(crate) fn line_up(&mut self, forward: ForwardId) {
        self.change(forward, |share| share.queued += 1);
    }

    pub(crate) fn unqueue(&mut self, forward: ForwardId) {
        self.change(forward, |share| {
            share.queued = share.queued.saturating_sub(1)
        });
    }

    /// All connections are gone.
    pub(crate) fn clear(&mut self) {
        let forwards: Vec<ForwardId> = self.shares.keys().copied().collect();
        for forward in forwards {
            self.change(forward, |share| share.live = 0);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const NOISY: ForwardId = ForwardId(0);
    const DOCKER: ForwardId = ForwardId(1);

    #[test]
    fn what_is_reserved_is_nobody_elses() {
        let mut shares = Shares::new(10);
        shares.reserve(DOCKER, 3).unwrap();
        assert_eq!((shares.free_for(NOISY), shares.free_for(DOCKER)), (7, 10));
        for _ in 0..7 {
            shares.take(NOISY);
        }
        assert_eq!((shares.free_for(NOISY), shares.free_for(DOCKER)), (0, 3));
        shares.take(DOCKER);
        assert_eq!((shares.free_for(NOISY), shares.free_for(DOCKER)), (0, 2));
        shares.give_back(NOISY);
        assert_eq!((shares.free_for(NOISY), shares.free_for(DOCKER)), (1, 3));
        shares.give_up(DOCKER);
        assert_eq!((shares.free_for(NOISY), shares.free_for(DOCKER)), (3, 3));
    }

    #[test]
    fn who_uses_more_than_it_reserved_keeps_nothing_free() {
        let mut shares = Shares::new(4);
        shares.reserve(DOCKER, 1).unwrap();
        for _ in 0..3 {
            shares.take(DOCKER);
        }
        assert_eq!((shares.kept(), shares.free_for(NOISY)), (0, 1));
        // A guest takes a place whatever is left.
        shares.take(NOISY);
        shares.take(NOISY);
        assert_eq!((shares.live(), shares.free_for(DOCKER)), (5, 0));
        shares.clear();
        assert_eq!((shares.kept(), shares.free_for(NOISY)), (1, 3));
    }

    #[test]
    fn no_more_can_be_reserved_than_there_is() {
        let mut shares = Shares::new(10);
        shares.reserve(DOCKER, 8).unwrap();
        assert_eq!(shares.reserve(NOISY, 3), Err(2));
        shares.reserve(NOISY, 2).unwrap();
        shares.give_up(DOCKER);
        shares.reserve(NOISY, 10).unwrap();
    }

    #[test]
    fn who_is_bounded_has_no_more_though_others_have() {
        let mut shares = Shares::new(10);
        shares.bound(NOISY, Some(2));
        shares.take(NOISY);
        assert_eq!(shares.is_at_its_bound(NOISY), None);
        assert!(shares.free_for(NOISY) > 0);
        shares.take(NOISY);
        assert_eq!(shares.is_at_its_bound(NOISY), Some(2));
        assert_eq!((shares.free_for(NOISY), shares.free_for(DOCKER)), (0, 8));
        shares.give_back(NOISY);
        assert!(shares.free_for(NOISY) > 0);
        // It holds though none is there now, until it is taken back.
        shares.give_back(NOISY);
        shares.take(NOISY);
        shares.take(NOISY);
        assert_eq!(shares.free_for(NOISY), 0);
        shares.give_up(NOISY);
        assert_eq!(shares.free_for(NOISY), 8);
        shares.clear();
        assert!(shares.shares.is_empty());
    }

    #[test]
    fn no_more_are_queued_than_there_are_places() {
        let mut shares = Shares::new(2);
        shares.take(DOCKER);
        assert!(shares.queue(NOISY));
        assert!(!shares.queue(NOISY));
        shares.unqueue(NOISY);
        assert!(shares.queue(NOISY));
        shares.give_back(DOCKER);
        assert!(shares.queue(NOISY));
        shares.unqueue(NOISY);
        shares.unqueue(NOISY);
        assert!(shares.shares.is_empty());
    }
}
