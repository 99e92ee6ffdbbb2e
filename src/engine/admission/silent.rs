//! What is known of a guest's silence: see [`silence`](super::silence).

use std::time::Instant;

/// What is known of a guest's silence.
#[derive(Debug, Default)]
pub(super) struct Silence {
    /// The number and the time of the oldest dial that is not answered. It may be answered by now.
    pub(super) oldest: Option<(u64, Instant)>,
    /// Whether no probe could be sent.
    pub(super) is_probe_missing: bool,
    /// The time since which the guest is silent, and the epoch of the VM, once it was reported.
    pub(super) reported: Option<(Instant, u64)>,
    /// Whether the VM's process is stopped.
    pub(super) is_stopped: bool,
}

impl Silence {
    /// Notes a dial. `answered` is the number of the last one that was answered before.
    pub(super) fn note_dial(&mut self, number: u64, answered: u64, now: Instant) {
        if self.oldest.is_none_or(|(oldest, _)| oldest <= answered) {
            self.oldest = Some((number, now));
        }
    }

    /// Returns the time since which the guest is silent, if that was reported.
    pub(super) fn since(&self) -> Option<Instant> {
        self.reported.map(|(since, _)| since)
    }

    /// Returns whether the VM's process is stopped.
    pub(super) fn is_stopped(&self) -> bool {
        self.is_stopped
    }
}
