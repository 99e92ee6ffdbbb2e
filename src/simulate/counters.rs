//! The counters of the stand-in.

use super::rules::Rule;
use std::time::Duration;

/// What a [`Vm`](super::Vm) has seen since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Connections accepted on `connect` and on the `guest_forwards` sockets.
    pub accepted: u64,
    /// Those of them that asked for a guest port in good form.
    pub dials: u64,
    /// Dials that the guest took.
    pub answered: u64,
    /// Dials that the guest refused: no such service.
    pub refused: u64,
    /// Connections closed without an answer: a line cut short, malformed, for another CID, or none
    /// at all.
    pub silent_closes: u64,
    /// Connections closed at once because all slots were taken.
    pub turned_away: u64,
    /// Dials that the guest hasn't answered since it was paused, closed ones included.
    pub unanswered: u64,
    /// Slots that the guest's reboots have taken for good.
    pub lost_slots: u64,
    /// Connections in the device now: half-closed, closing, unanswered and lost ones included.
    pub live_slots: u64,
    /// The highest [`live_slots`](Counters::live_slots) so far.
    pub peak_slots: u64,
    /// The most dials that were in the ring to the guest at once.
    pub peak_burst: u64,
    /// How often the whole device stood still because a client had connected and not written its
    /// line yet. Stalls of microseconds can't be avoided: connect and write are two calls.
    pub stalls: u64,
    /// The longest of these stalls.
    pub longest_stall: Duration,
    /// Connections from the guest to a host port.
    pub guest_dials: u64,
    /// Guest dials that came to nothing: nobody listened, the listener was full, or all slots were
    /// taken.
    pub guest_dials_failed: u64,
    /// Of [`Dial::Paced`](super::Dial::Paced): dials that an echo answered with all that was sent.
    pub guest_echoes: u64,
    /// Bytes from the host to the guest.
    pub bytes_to_guest: u64,
    /// Bytes from the guest to the host.
    pub bytes_to_host: u64,
    pub(super) offences: [u64; Rule::ALL.len()],
}

impl Counters {
    /// Returns how often clients broke `rule`. It exceeds one only if the VM is
    /// [lenient](super::Builder::lenient).
    pub fn offences(&self, rule: Rule) -> u64 {
        self.offences[rule.index()]
    }

    /// Returns how often clients broke any rule.
    pub fn all_offences(&self) -> u64 {
        self.offences.iter().sum()
    }
}
