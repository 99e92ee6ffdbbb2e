//! Whether a guest has fallen silent: it has answered none of its latest dials for a while, though
//! it has been asked.
//!
//! That a dial to hyperkit brings nothing back says little: its service may wait for the client. So
//! after [`ASKED_AFTER`] one probe is sent, which a guest that runs answers at once, and with it
//! all dials before. Only a guest that answers neither is called silent.
//!
//! Other VMMs say themselves that a dial was taken or refused. Where they say nothing, a probe is
//! sent as well: it stays when the clients have given up, and its answer is the end of the silence.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::gate::{Gate, GateState};
use crate::engine::health::{News, ProcessState};
use crate::error::plural;

/// How long a guest may answer nothing before it is asked.
const ASKED_AFTER: Duration = Duration::from_secs(25);

/// How long a guest may answer nothing before that is reported.
const SILENT_AFTER: Duration = Duration::from_secs(30);

/// What is to be done about a guest's silence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SilenceCheck {
    Done,
    /// A probe is wanted. [`Gate::note_missing_probe`] must follow if there can be none.
    ProbeWanted,
}

/// What is to be reported of a guest.
enum SilenceNews {
    /// It has fallen silent. So many of the dials that it hasn't answered are probes.
    Silent { probes: u64 },
    /// It answers again.
    Answers { after: Duration },
}

impl GateState {
    /// Notes the state of the VM's process. Returns what is to be reported.
    fn note_process(&mut self, process: ProcessState, now: Instant) -> Option<News> {
        let news = self.silence.note_process(process, self.epoch, now);
        if self.health.is_up() == Some(false) {
            // That it is gone was reported, and is the end of a stop.
            self.silence.forget_stop();
            return None;
        }
        news
    }
}

impl Gate {
    /// Returns the time since which no dial was answered and nothing else came from the guest;
    /// `None` if all dials were answered. The earlier of several dials may be forgotten: then
    /// something has come since.
    fn nothing_since(&self, state: &GateState) -> Option<Instant> {
        if !self.traits.shows_hangs || self.open_dials() == 0 {
            return None;
        }
        let (_, dialled_at) = state.silence.oldest?;
        Some(self.heard.at().map_or(dialled_at, |at| at.max(dialled_at)))
    }

    /// Looks whether the guest is silent, and reports that once, and its end. `process` is the
    /// state of the VM's process, as a look at it has just found. It is called after what has come
    /// from the guest was read.
    pub(crate) fn check_silence(&self, process: ProcessState, now: Instant) -> SilenceCheck {
        let mut state = self.state();
        let news = state.note_process(process, now);
        let (found, is_probe_wanted) = self.judge_silence(&mut state, process, now);
        // What is logged may take its time.
        drop(state);
        self.log_change(news);
        match found {
            Some(SilenceNews::Answers { after }) => {
                let (seconds, vm) = (after.as_secs(), &self.vm);
                info!("the guest of the VM at {vm} answers again, after {seconds} s");
            }
            Some(SilenceNews::Silent { probes }) => self.warn_of_silence(probes, process),
            None => {}
        }
        match is_probe_wanted {
            true => SilenceCheck::ProbeWanted,
            false => SilenceCheck::Done,
        }
    }

    /// Returns what is to be reported of the guest's silence, and whether a probe is wanted.
    fn judge_silence(
        &self,
        state: &mut GateState,
        process: ProcessState,
        now: Instant,
    ) -> (Option<SilenceNews>, bool) {
        let is_stopped = process == ProcessState::IsStopped;
        let nothing_since = self.nothing_since(state);
        let lasts = nothing_since.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let is_gone = state.health.is_up() == Some(false);
        if lasts < ASKED_AFTER {
            state.silence.is_probe_missing = false;
        }
        // This is so as well of a probe that was lost, until the next one may go.
        let is_probed = state.next_probe.is_some();
        let is_asked = is_probed || is_stopped || state.silence.is_probe_missing;
        let epoch = state.epoch;
        match state.silence.reported {
            // The report is about a VM that is gone, or was replaced by another one.
            Some((_, of)) if is_gone || of != epoch => state.silence.reported = None,
            Some((since, _)) if lasts < SILENT_AFTER => {
                state.silence.reported = None;
                let after = now.saturating_duration_since(since);
                return (Some(SilenceNews::Answers { after }), false);
            }
            None if !is_gone && is_asked && lasts >= SILENT_AFTER => {
                state.silence.reported = nothing_since.map(|since| (since, epoch));
                let probes = u64::from(is_probed);
                return (Some(SilenceNews::Silent { probes }), false);
            }
            _ => {}
        }
        let wants_probe = lasts >= ASKED_AFTER && !is_probed && !is_stopped && !is_gone;
        (None, wants_probe && state.has_connect_socket)
    }

    fn warn_of_silence(&self, probes: u64, process: ProcessState) {
        let dials = self.open_dials().saturating_sub(probes).max(1);
        let vm = &self.vm;
        let why = match process {
            ProcessState::IsStopped => "its process is stopped",
            ProcessState::Runs => "it is paused or hangs",
        };
        warn!(
            "the guest of the VM at {vm} has answered none of {dials} dial{} for {} s: {why}; `hvsock doctor --vm {vm}` tells more",
            plural(dials),
            SILENT_AFTER.as_secs()
        );
    }

    /// Notes that no probe can be sent: the device takes none, or has no slot for it.
    pub(crate) fn note_missing_probe(&self) {
        self.state().silence.is_probe_missing = true;
    }
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use super::super::{Admission, GateLimits, Slot, SlotWake};
    use super::*;
    use crate::address::{AnyVm, HyperkitVm};
    use crate::engine::health::{VmIdentity, VmLook};
    use crate::engine::id::ForwardId;
    use crate::sys::Identity;

    const SECOND: Duration = Duration::from_secs(1);

    fn gate() -> Arc<Gate> {
        let limits = GateLimits {
            live: 900,
            unanswered: 64,
        };
        Arc::new(Gate::new(limits, HyperkitVm::new("/tmp/vm").into()))
    }

    fn identity(number: u64) -> Option<VmIdentity> {
        Some(VmIdentity::Socket(Identity::numbered(number)))
    }

    fn slot(admission: Admission, now: Instant) -> Slot {
        match admission {
            Admission::Go(mut slot) | Admission::Probe(mut slot) => {
                slot.note_dial(identity(1), now);
                slot
            }
            other => panic!("{other:?}"),
        }
    }

    fn dial(gate: &Arc<Gate>, now: Instant) -> Slot {
        slot(gate.admit(ForwardId(1), now), now)
    }

    fn probe(gate: &Arc<Gate>, now: Instant) -> Slot {
        let wake: SlotWake = Arc::new(|_| ());
        slot(gate.admit_probe(now, 0, &wake), now)
    }

    fn is_silent(gate: &Gate, now: Instant) -> bool {
        gate.status(now).silent_since.is_some()
    }

    #[test]
    fn a_guest_that_answers_neither_its_clients_nor_a_probe_is_silent() {
        let (gate, start) = (gate(), Instant::now());
        let first = dial(&gate, start);
        let _second = dial(&gate, start + 20 * SECOND);
        let check = |seconds| gate.check_silence(ProcessState::Runs, start + seconds * SECOND);
        assert_eq!(check(24), SilenceCheck::Done);
        assert_eq!(check(25), SilenceCheck::ProbeWanted);
        let probe = probe(&gate, start + 25 * SECOND);
        // One is enough.
        for seconds in 26..30 {
            assert_eq!(check(seconds), SilenceCheck::Done);
            assert!(!is_silent(&gate, start));
        }
        check(30);
        assert!(is_silent(&gate, start));
        let since = gate.state().silence.silent_since();
        assert_eq!(since, Some(start));
        for seconds in [31, 100, 3600] {
            assert_eq!(check(seconds), SilenceCheck::Done);
            assert!(is_silent(&gate, start));
        }
        // Of the second one nothing is known yet.
        first.note_answer(start + 3600 * SECOND);
        check(3601);
        assert!(!is_silent(&gate, start));
        probe.note_answer(start + 3602 * SECOND);
        drop(probe);
        assert_eq!(check(9000), SilenceCheck::Done);
    }

    #[test]
    fn a_service_that_waits_for_its_client_is_asked_once() {
        let (gate, start) = (gate(), Instant::now());
        let _silent = dial(&gate, start);
        let at = start + 25 * SECOND;
        assert_eq!(
            gate.check_silence(ProcessState::Runs, at),
            SilenceCheck::ProbeWanted
        );
        let probe = probe(&gate, at);
        probe.note_answer(at + SECOND);
        drop(probe);
        for seconds in [2, 10, 100, 1000] {
            let at = at + seconds * SECOND;
            assert_eq!(
                gate.check_silence(ProcessState::Runs, at),
                SilenceCheck::Done
            );
            assert!(!is_silent(&gate, at));
        }
    }

    #[test]
    fn what_comes_on_an_older_connection_is_a_sign_too() {
        let (gate, start) = (gate(), Instant::now());
        let talking = dial(&gate, start);
        let _silent = dial(&gate, start);
        for seconds in 0..100 {
            let at = start + seconds * SECOND;
            talking.note_answer(at);
            assert_eq!(
                gate.check_silence(ProcessState::Runs, at),
                SilenceCheck::Done
            );
            assert!(!is_silent(&gate, at));
        }
    }

    /// Of a VMM that says itself whether a dial was taken: a line without an answer says it all.
    #[test]
    fn a_vmm_that_answers_no_dial_is_asked_once_and_no_other_is() {
        let limits = GateLimits::UNLIMITED;
        let vm = AnyVm::VsockMux("/run/vm".into());
        let gate = Arc::new(Gate::new(limits, vm));
        let start = Instant::now();
        let at = |seconds| start + seconds * SECOND;
        let taken = dial(&gate, start);
        taken.note_answer(start);
        assert_eq!(
            gate.check_silence(ProcessState::Runs, at(1_000)),
            SilenceCheck::Done
        );
        let given_up = dial(&gate, at(1_000));
        drop(given_up);
        let check = |seconds| gate.check_silence(ProcessState::Runs, at(seconds));
        assert_eq!(check(1_024), SilenceCheck::Done);
        assert_eq!(check(1_025), SilenceCheck::ProbeWanted);
        let probe = probe(&gate, at(1_025));
        for seconds in [1_026, 1_030, 1_031, 5_000] {
            assert_eq!(check(seconds), SilenceCheck::Done);
            assert_eq!(is_silent(&gate, at(seconds)), seconds >= 1_030);
        }
        // Nothing harms it, so nothing is limited.
        assert_eq!(gate.status(at(5_000)).unanswered, 0);
        probe.note_answer(at(5_000));
        drop(probe);
        assert_eq!(check(5_001), SilenceCheck::Done);
        assert!(!is_silent(&gate, at(5_001)));
        assert_eq!(check(9_000), SilenceCheck::Done);
    }

    /// A CID is marked down by a dial that times out.
    #[test]
    fn a_cid_is_not_asked() {
        let gate = Arc::new(Gate::new(GateLimits::UNLIMITED, AnyVm::Vsock(3)));
        let start = Instant::now();
        drop(dial(&gate, start));
        let at = start + 1_000 * SECOND;
        assert_eq!(
            gate.check_silence(ProcessState::Runs, at),
            SilenceCheck::Done
        );
        assert!(!is_silent(&gate, at));
    }

    #[test]
    fn a_stop_of_its_process_is_reported_once_and_so_is_its_end() {
        let (gate, start) = (gate(), Instant::now());
        let at = |seconds| start + seconds * SECOND;
        let see = |number| {
            assert!(gate.begin_look(at(number), SECOND));
            let identity = identity(u64::from(number));
            let look = VmLook {
                identity,
                ..VmLook::default()
            };
            gate.take_look(&look, at(number));
        };
        let note = |process, seconds| gate.state().note_process(process, at(seconds));
        let (runs, stopped) = (ProcessState::Runs, ProcessState::IsStopped);
        see(1);
        assert_eq!(note(runs, 1), None);
        assert_eq!(note(stopped, 2), Some(News::Paused));
        assert_eq!(note(stopped, 3), None);
        // It may have been killed just now: only one that goes on for a while goes on.
        assert_eq!(note(runs, 4), None);
        assert!(!gate.status(at(4)).paused);
        assert_eq!(note(stopped, 5), None);
        assert_eq!(note(runs, 9), None);
        assert_eq!(note(runs, 10), Some(News::Resumed(7 * SECOND)));
        assert_eq!(note(runs, 11), None);
        // Another VM doesn't go on.
        assert_eq!(note(stopped, 11), Some(News::Paused));
        see(12);
        assert_eq!((note(runs, 12), note(runs, 12)), (None, None));
        // Nor does one that is gone.
        assert_eq!(note(stopped, 13), Some(News::Paused));
        assert!(gate.begin_look(at(14), SECOND));
        assert_eq!(note(runs, 14), None);
        gate.take_look(&VmLook::default(), at(14));
        assert_eq!(note(runs, 14), None);
        assert_eq!(note(stopped, 15), None);
    }

    #[test]
    fn a_vm_that_is_stopped_or_takes_no_dial_need_not_be_asked() {
        let (gate, start) = (gate(), Instant::now());
        let _silent = dial(&gate, start);
        let at = |seconds| start + seconds * SECOND;
        assert_eq!(
            gate.check_silence(ProcessState::IsStopped, at(29)),
            SilenceCheck::Done
        );
        assert!(gate.status(at(29)).paused);
        gate.check_silence(ProcessState::IsStopped, at(30));
        assert!(is_silent(&gate, at(30)));

        let gate = self::gate();
        let _silent = dial(&gate, start);
        assert_eq!(
            gate.check_silence(ProcessState::Runs, at(25)),
            SilenceCheck::ProbeWanted
        );
        gate.note_missing_probe();
        gate.check_silence(ProcessState::Runs, at(30));
        assert!(is_silent(&gate, at(30)));
        // Another VM knows nothing of it.
        assert!(gate.begin_look(at(31), SECOND));
        gate.take_look(
            &VmLook {
                identity: identity(2),
                ..VmLook::default()
            },
            at(31),
        );
        gate.check_silence(ProcessState::Runs, at(31));
        assert!(!is_silent(&gate, at(31)));
    }
}
