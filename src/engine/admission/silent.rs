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
    /// The time at which it was first seen to go on after that.
    pub(super) resumed_at: Option<Instant>,
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
        let reported = self.reported_stop.filter(|(_, of)| *of == epoch);
        match (reported, process) {
            (Some(_), ProcessState::IsStopped) => {
                self.resumed_at = None;
                None
            }
            (None, ProcessState::IsStopped) => {
                self.reported_stop = Some((now, epoch));
                self.resumed_at = None;
                Some(News::Paused)
            }
            // Of another VM, its start was reported.
            (None, ProcessState::Runs) => {
                self.forget_stop();
                None
            }
            (Some((since, _)), ProcessState::Runs) => match self.resumed_at {
                // A process that was killed runs until it has ended, and its VM is gone at the next
                // look.
                None => {
                    self.resumed_at = Some(now);
                    None
                }
                Some(at) => {
                    self.forget_stop();
                    Some(News::Resumed(at.saturating_duration_since(since)))
                }
            },
        }
    }

    /// Forgets that a stop was reported.
    pub(super) fn forget_stop(&mut self) {
        (self.reported_stop, self.resumed_at) = (None, None);
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
