//! The order in which the addresses of a name are tried, by what has become of earlier dials.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::dial::interleave_families;

/// How long an address is tried after the others, once it has failed or was slower than one of them.
const REMEMBERED: Duration = Duration::from_secs(60);

/// The addresses of a target that have failed lately.
#[derive(Debug, Default)]
pub(crate) struct Addresses {
    failed: Vec<(SocketAddr, Instant)>,
}

impl Addresses {
    /// Returns the addresses that a name was resolved to in the order in which they are to be tried.
    pub(crate) fn order(&mut self, found: Vec<SocketAddr>, now: Instant) -> Vec<SocketAddr> {
        self.forget_old(now);
        let mut found = interleave_families(found);
        // The sort is stable.
        found.sort_by_key(|address| self.failed.iter().any(|(failed, _)| failed == address));
        found
    }

    /// Notes that a dial of that address has failed, or has had no answer when another one had.
    pub(crate) fn note_failure(&mut self, address: SocketAddr, now: Instant) {
        self.forget_old(now);
        self.failed.retain(|(failed, _)| *failed != address);
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
mod tests {
    use super::*;

    #[test]
    fn what_has_failed_is_tried_last_for_a_while() {
        let [a, b, c] = [1, 2, 3].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let (mut addresses, start) = (Addresses::default(), Instant::now());
        addresses.note_failure(a, start);
        assert_eq!(addresses.order(vec![a, b, c], start), [b, c, a]);
        addresses.note_failure(b, start);
        assert_eq!(addresses.order(vec![a, b, c], start), [c, a, b]);
        addresses.note_success(a);
        assert_eq!(addresses.order(vec![a, b, c], start), [a, c, b]);
        let later = start + REMEMBERED;
        assert_eq!(addresses.order(vec![a, b, c], later), [a, b, c]);
    }
}
