//! What a client must not do to hyperkit's device, and how the stand-in notices.
//!
//! | rule | real device | how it is seen here |
//! |---|---|---|
//! | [`Rule::CloseUnread`] | aborts | Linux sets `ECONNRESET` on this end when a peer closes with a non-empty receive queue. Ends that the device has closed already are watched a little longer. Other systems leave no trace: not seen there |
//! | [`Rule::Unanswered`] | aborts: a ring of 512 replies overflows | dials since the guest was paused are counted, closed ones included |
//! | [`Rule::Burst`] | aborts, the same ring | [`Ring`] |
//! | [`Rule::ImmediateClose`] | deadlocks: `setsockopt` fails on the closed socket, and the error path takes two locks in the wrong order | both directions closed by the peer within [`AT_ONCE`] of the accept, before the device sent it a byte or EOF |
//! | [`Rule::Probe`] | the same | the same, on a `guest_forwards` socket, with nothing sent |
//! | [`Rule::NoListener`] | deadlocks on the same error path, after a failed `connect` | `ENOENT` or `ECONNREFUSED` on a port that was listened on before |
//! | [`Rule::AcceptAndClose`] | deadlocks, as the immediate close | as the immediate close, on a connection that the guest dialled |
//!
//! The real device falls for most of these once in some tens to thousands of tries. The stand-in
//! falls the first time, so that a test is deterministic. Source: hyperkit's `pci_virtio_sock.c`
//! (`send_response_common`, `shutdown_local_sock`, `handle_connect_fd`, `connect_sock`), and that
//! code under load.

use std::fmt;
use std::time::{Duration, Instant};

/// A peer that closes both directions this soon after the connection was made has closed "at once".
pub(crate) const AT_ONCE: Duration = Duration::from_millis(20);

/// So many dials that a paused guest hasn't answered overflow the ring (`VTSOCK_REPLYRINGSZ`).
pub(crate) const UNANSWERED_LIMIT: u64 = 512;

/// So many dials at once the ring takes while the guest is awake: 600 were fine, 800 were not.
const RING: u64 = 600;

/// The awake guest takes one dial off the ring in this time.
const DRAIN: Duration = Duration::from_micros(100);

/// A rule of hyperkit's device that a client can break.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rule {
    /// A host program closed a connection while bytes that the device had written to it were
    /// unread.
    CloseUnread,
    /// 512 dials while the guest answered none.
    Unanswered,
    /// Over 600 dials in a shorter time than the guest needs to take them.
    Burst,
    /// A client connected, wrote its line and closed at once.
    ImmediateClose,
    /// A client connected to a `guest_forwards` socket and closed at once, with nothing sent.
    Probe,
    /// The guest dialled a host port that has no listener any more.
    NoListener,
    /// A host program accepted the guest's connection and closed it at once.
    AcceptAndClose,
}

impl Rule {
    /// Every rule.
    pub const ALL: [Rule; 7] = [
        Rule::CloseUnread,
        Rule::Unanswered,
        Rule::Burst,
        Rule::ImmediateClose,
        Rule::Probe,
        Rule::NoListener,
        Rule::AcceptAndClose,
    ];

    /// Returns what becomes of a VM whose client breaks this rule.
    pub fn consequence(self) -> FateKind {
        match self {
            Rule::CloseUnread | Rule::Unanswered | Rule::Burst => FateKind::Died,
            Rule::ImmediateClose | Rule::Probe | Rule::NoListener | Rule::AcceptAndClose => {
                FateKind::Hung
            }
        }
    }

    pub(super) fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rule::CloseUnread => "a connection was closed with data unread",
            Rule::Unanswered => "512 dials without an answer",
            Rule::Burst => "over 600 dials at once",
            Rule::ImmediateClose => "a dial was closed at once",
            Rule::Probe => "a forward socket was probed",
            Rule::NoListener => "the guest dialled a port on which nobody listens",
            Rule::AcceptAndClose => "a connection from the guest was accepted and closed at once",
        })
    }
}

/// Whether a VM died or hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FateKind {
    /// The process aborted: all its sockets are closed.
    Died,
    /// The device deadlocked: its sockets stay open, and nothing moves any more.
    Hung,
}

/// How a VM ended, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fate {
    /// Died or hung.
    pub kind: FateKind,
    /// The rule that a client broke.
    pub rule: Rule,
    /// Which connection, when, and how.
    pub detail: String,
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            FateKind::Died => "the VM died",
            FateKind::Hung => "the VM's device hangs",
        };
        write!(f, "{kind}: {} ({})", self.rule, self.detail)
    }
}

/// The ring in which dials wait for the guest, one taken every [`DRAIN`].
///
/// Nothing tells when a queued connection was made, and our own thread may have slept while it was.
/// So all connections accepted since the socket was last known to be empty are taken as spread over
/// the whole time since then: the guest takes that many before the ring counts as full. Dials
/// spaced by [`DRAIN`] hence never overflow it, however late they are seen; a burst that came while
/// we slept long may be missed.
#[derive(Debug)]
pub(crate) struct Ring {
    /// Up to when the guest's time is used up.
    used: Instant,
}

impl Ring {
    pub(crate) fn new(now: Instant) -> Ring {
        Ring { used: now }
    }

    fn could_take(&self, now: Instant) -> u64 {
        let time = now.saturating_duration_since(self.used);
        (time.as_nanos() / DRAIN.as_nanos()) as u64
    }

    /// Returns how many of `waiting` dials are in the ring at `now`.
    pub(crate) fn level(&self, waiting: usize, now: Instant) -> u64 {
        (waiting as u64).saturating_sub(self.could_take(now))
    }

    /// Returns whether so many overflow it.
    pub(crate) fn overflows(level: u64) -> bool {
        level > RING
    }

    /// Takes what the guest can of `waiting` dials. Returns how many that is.
    pub(crate) fn take(&mut self, waiting: usize, now: Instant) -> usize {
        let taken = self.could_take(now).min(waiting as u64);
        self.used += DRAIN * u32::try_from(taken).unwrap_or(u32::MAX);
        taken as usize
    }

    /// Notes that no dial waited at `now`: the guest is idle, and takes the next one at once.
    pub(crate) fn idle(&mut self, now: Instant) {
        if let Some(ready) = now.checked_sub(DRAIN) {
            self.used = self.used.max(ready);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(start: Instant, micros: u64) -> Instant {
        start + Duration::from_micros(micros)
    }

    #[test]
    fn a_burst_overflows() {
        let start = Instant::now();
        let mut ring = Ring::new(start);
        // 800 within ten milliseconds, each seen as it comes.
        let (mut waiting, mut most) = (0, 0);
        for i in 0..800 {
            let now = after(start, i * 12);
            waiting += 1;
            most = most.max(ring.level(waiting, now));
            waiting -= ring.take(waiting, now);
        }
        assert!(Ring::overflows(most));
        assert!(!Ring::overflows(600));
    }

    #[test]
    fn spaced_dials_do_not() {
        let start = Instant::now();
        let mut ring = Ring::new(start);
        for i in 1..=10_000 {
            let now = after(start, i * 100);
            assert_eq!(ring.level(1, now), 0);
            assert_eq!(ring.take(1, now), 1);
        }
        // Nor if the device slept for 200 ms, and 2,000 queued.
        let mut ring = Ring::new(start);
        let awake = after(start, 200_000);
        assert_eq!(ring.level(2_000, awake), 0);
        assert_eq!(ring.take(2_000, awake), 2_000);
    }

    #[test]
    fn idle_time_is_not_saved() {
        let start = Instant::now();
        let mut ring = Ring::new(start);
        let later = after(start, 1_000_000);
        ring.idle(later);
        assert_eq!(ring.take(10, later), 1);
        assert_eq!(ring.level(700, later), 700);
    }
}
