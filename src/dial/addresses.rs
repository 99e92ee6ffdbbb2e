//! The order in which the addresses of a name are tried, by what has become of earlier dials.

use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::interleave_families;
use crate::address::Address;
use crate::lock::lock;

/// How long an address is tried after the others, once it has failed or was slower than one of
/// them.
const REMEMBERED: Duration = Duration::from_secs(60);

/// How many addresses are remembered, the latest ones.
const MOST_REMEMBERED: usize = 64;

/// The addresses that dials outside of any forward know of.
static OWN: Mutex<FailedAddresses> = Mutex::new(FailedAddresses { failed: Vec::new() });

/// Addresses that have failed lately.
#[derive(Debug, Default)]
pub(crate) struct FailedAddresses {
    failed: Vec<(SocketAddr, Instant)>,
}

impl FailedAddresses {
    /// Returns what dials outside of any forward know. The lock is held for moments.
    pub(crate) fn own() -> MutexGuard<'static, FailedAddresses> {
        lock(&OWN)
    }

    /// Returns the addresses that the name in `target` was resolved to in the order in which they
    /// are to be tried: those of its family of IP.
    pub(crate) fn order(
        &mut self,
        target: &Address,
        mut found: Vec<SocketAddr>,
        now: Instant,
    ) -> Vec<SocketAddr> {
        self.forget_old(now);
        let family = target.as_tcp().map(|tcp| tcp.family).unwrap_or_default();
        found.retain(|address| family.includes(&address.ip()));
        let mut found = interleave_families(found);
        // The sort is stable: addresses that have not failed keep their order.
        found.sort_by_key(|address| self.failed.iter().any(|(failed, _)| failed == address));
        found
    }

    /// Notes that a dial of that address has failed, or has had no answer when another one had.
    pub(crate) fn note_failure(&mut self, address: SocketAddr, now: Instant) {
        self.forget_old(now);
        self.failed.retain(|(failed, _)| *failed != address);
        if self.failed.len() >= MOST_REMEMBERED {
            self.failed.remove(0);
        }
        self.failed.push((address, now));
    }

    /// Notes that a dial of that address has succeeded.
    pub(crate) fn note_success(&mut self, address: SocketAddr) {
        self.failed.retain(|(failed, _)| *failed != address);
    }

    fn forget_old(&mut self, now: Instant) {
        let is_new = |since: &Instant| now.saturating_duration_since(*since) < REMEMBERED;
        self.failed.retain(|(_, since)| is_new(since));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_has_failed_is_tried_last_for_a_while() {
        let [a, b, c] = [1, 2, 3].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let (mut addresses, start) = (FailedAddresses::default(), Instant::now());
        let target: Address = "tcp://name:1".parse().unwrap();
        addresses.note_failure(a, start);
        assert_eq!(addresses.order(&target, vec![a, b, c], start), [b, c, a]);
        addresses.note_failure(b, start);
        assert_eq!(addresses.order(&target, vec![a, b, c], start), [c, a, b]);
        addresses.note_success(a);
        assert_eq!(addresses.order(&target, vec![a, b, c], start), [a, c, b]);
        let later = start + REMEMBERED;
        assert_eq!(addresses.order(&target, vec![a, b, c], later), [a, b, c]);
    }
    #[test]
    fn a_target_of_one_family_has_the_addresses_of_that_one() {
        let four = SocketAddr::from(([127, 0, 0, 1], 1));
        let six = SocketAddr::from(([0; 16], 1));
        for (target, order) in [
            ("tcp://name:1", vec![six, four]),
            ("tcp4://name:1", vec![four]),
            ("tcp6://name:1", vec![six]),
        ] {
            let target = target.parse().unwrap();
            let found = FailedAddresses::default().order(&target, vec![six, four], Instant::now());
            assert_eq!(found, order, "{target}");
        }
    }
}
