//! What is known of a guest's silence: see [`silence`](super::silence).

use std::time::Instant;

use crate::engine::health::{News, ProcessState};

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
    /// The time since which it is stopped, and the epoch of the VM, once that was reported.
    pub(super) reported_stop: Option<(Instant, u64)>,
}

impl Silence {
    /// Notes a dial. `answered` is the number of the last one that was answered before.
    pub(super) fn note_dial(&mut self, number: u64, answered: u64, now: Instant) {
        if self.oldest.is_none_or(|(oldest, _)| oldest <= answered) {
            self.oldest = Some((number, now));
        }
    }

    /// Notes the state of the process of the VM of this epoch. Returns what is to be reported.
    pub(super) fn note_process(
        &mut self,
        process: ProcessState,
        epoch: u64,
        now: Instant,
    ) -> Option<News> {
        self.is_stopped = process == ProcessState::IsStopped;
        match (self.reported_stop, process) {
            (Some((_, of)), ProcessState::IsStopped) if of == epoch => None,
            (_, ProcessState::IsStopped) => {
                self.reported_stop = Some((now, epoch));
                Some(News::Paused)
            }
            (reported, ProcessState::Runs) => {
                self.reported_stop = None;
                // Of another VM, its start was reported.
                let (since, _) = reported.filter(|(_, of)| *of == epoch)?;
                Some(News::Resumed(now.saturating_duration_since(since)))
            }
        }
    }

    /// Returns the time since which the guest is silent, if that was reported.
    pub(super) fn silent_since(&self) -> Option<Instant> {
        self.reported.map(|(since, _)| since)
    }

    /// Returns whether the VM's process is stopped.
    pub(super) fn is_stopped(&self) -> bool {
        self.is_stopped
    }
}
