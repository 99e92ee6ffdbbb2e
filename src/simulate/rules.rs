//! What a client must not do to hyperkit's device, and how the stand-in notices.
//!
//! What is known of the device was measured on its own code, `pci_virtio_sock.c`, under load.
//!
//! | rule | what was measured | how it is seen here |
//! |---|---|---|
//! | [`Rule::CloseUnread`] | "closes with data unread after the guest has closed": aborts if more is unread than the device's socket buffer holds; with 200 KB or less, or in mid-stream, it did not | Linux sets `ECONNRESET` on this end when a peer closes with a non-empty receive queue: an offence if the guest has ended and bytes are still in the device. If [strict](super::Builder::strict), whatever is unread, also on ends that the device has closed already, which are watched a little longer. Other systems leave no trace: not seen there |
//! | [`Rule::Unanswered`] | "512 or more dials that the guest hasn't answered": aborts, a ring of 512 replies overflows | dials since the guest was paused are counted, closed ones included |
//! | [`Rule::Burst`] | "800 to 1,000 dials at once, guest healthy": aborts, the same ring; 600 were fine | [`Ring`] |
//! | [`Rule::ImmediateClose`] | "connect, line, immediate close": deadlocks, for `setsockopt` fails on the closed socket, and the error path takes two locks in the wrong order; after 0 to 1 ms it hung, after 10 ms it did not | both directions closed by the peer within [`AT_ONCE`] of the accept (if strict, [`AT_ONCE_STRICT`]), before the device sent it a byte or EOF |
//! | [`Rule::Probe`] | "connect and close on a `guest_forwards` socket (a health probe)": the same | the same, with nothing sent |
//! | [`Rule::NoListener`] | "the guest dials a host port on which nobody listens", "a dialled port whose socket file is gone or left over": the same error path, after a failed `connect`; deadlocks after 1 to some thousand, three were enough | so many failed dials ([`Builder::failed_dials`](super::Builder::failed_dials)) |
//! | [`Rule::FullListener`] | the same, where "a full listener refuses", as macOS' do | the same, for a listener whose backlog is full |
//! | [`Rule::NoSlot`] | "guest dials when the slots or descriptors are gone": refusals, and the same deadlock, for a descriptor of `FD_SETSIZE` and more goes down that error path | the same, when all slots are taken |
//! | [`Rule::AcceptAndClose`] | "a host listener accepts and closes at once": deadlocks, as the immediate close; closing 50 ms later was fine | as the immediate close, within [`AT_ONCE_STRICT`], on a connection that the guest dialled |
//!
//! Slots that no host program can keep from being lost are no rules: "1 or 2 are lost at each
//! reboot of the guest" ([`Builder::lost_at_reboot`](super::Builder::lost_at_reboot)), and "a
//! guest's program that ignores EOF keeps its slot for good".
//!
//! The real device falls for most of these once in some tens to thousands of tries. The stand-in
//! falls the first time, and of failed dials at a number that is always the same, so that a test is
//! deterministic. In the code it is `send_response_common`, `shutdown_local_sock`,
//! `handle_connect_fd` and `connect_sock`.

use std::fmt;
use std::time::{Duration, Instant};

/// A peer that closes both directions this soon after the connection was made has closed "at once":
/// the device was seen to hang within 1 ms of it, and not after 10 ms.
const AT_ONCE: Duration = Duration::from_millis(10);

/// The same for a strict VM, and for what the guest has dialled: there 50 ms were seen to be
/// enough.
const AT_ONCE_STRICT: Duration = Duration::from_millis(20);

/// So many failed dials of the guest hang a VM by default: three were seen to be enough.
pub(super) const FAILED_DIALS: u64 = 3;

/// Whether a VM punishes more than hyperkit's device was seen to punish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strictness {
    /// What the device was seen to fall for.
    Measured,
    /// What may hurt it, too: every close with data unread, and a close 10 to 20 ms after a dial.
    Strict,
}

impl Strictness {
    /// Returns how soon a close is one "at once".
    pub(crate) fn at_once(self) -> Duration {
        match self {
            Strictness::Measured => AT_ONCE,
            Strictness::Strict => AT_ONCE_STRICT,
        }
    }
}

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
    /// A host program closed a connection whose guest had ended, while more was unread than the
    /// device could write; if the VM is [strict](super::Builder::strict), while anything was
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
    /// The guest dialled a host port that has no listener, or none any more.
    NoListener,
    /// The guest dialled a host port whose listener had no room for it.
    FullListener,
    /// The guest dialled the host when all slots were taken.
    NoSlot,
    /// A host program accepted the guest's connection and closed it at once.
    AcceptAndClose,
}

impl Rule {
    /// Every rule.
    pub const ALL: [Rule; 9] = [
        Rule::CloseUnread,
        Rule::Unanswered,
        Rule::Burst,
        Rule::ImmediateClose,
        Rule::Probe,
        Rule::NoListener,
        Rule::FullListener,
        Rule::NoSlot,
        Rule::AcceptAndClose,
    ];

    /// Returns what becomes of a VM whose client breaks this rule.
    pub fn consequence(self) -> FateKind {
        match self {
            Rule::CloseUnread | Rule::Unanswered | Rule::Burst => FateKind::Died,
            Rule::ImmediateClose
            | Rule::Probe
            | Rule::NoListener
            | Rule::FullListener
            | Rule::NoSlot
            | Rule::AcceptAndClose => FateKind::Hung,
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
            Rule::FullListener => "the guest dialled a port whose listener was full",
            Rule::NoSlot => "the guest dialled when all slots were taken",
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
