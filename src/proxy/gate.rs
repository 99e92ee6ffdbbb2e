//! Where every dial to one hyperkit VM passes: pace, and the two caps that keep its device alive.
//!
//! Rule 5 of a good neighbour (`hyperkit.md`): a burst of dials overflows the ring of 512 replies in which the device
//! keeps what the guest hasn't fetched yet, and the VM dies; so it does of 512 dials to a guest that is not answering.
//!
//! hyperkit says nothing when a guest accepts. That a guest has taken a dial, and all before it, is known when the first
//! byte or the end comes on that very connection. (What comes on an older one may have lain in buffers since before the
//! guest stopped.) And services that wait for their client to speak send nothing: so when the cap is reached, one dial
//! to a port where nobody listens asks the guest's kernel, which answers by refusing as soon as it runs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::sys::Identity;

use super::status::VmStatus;

/// The average distance of two dials. 100 µs never hurt the device.
const INTERVAL: Duration = Duration::from_micros(150);

/// How many dials may follow each other without a pause: poll timeouts count in milliseconds, so the pace is kept by
/// the millisecond. Far below the 512 that the device's ring holds.
const BURST: u32 = 8;

/// When a probe counts as lost, and another one may go: a guest that rebooted forgets what it had not answered, and
/// nothing ever comes on such a connection. Doubled with each, for each holds a slot for good.
const PROBE_PATIENCE: Duration = Duration::from_secs(30);
const LONGEST_PATIENCE: Duration = Duration::from_secs(3600);

/// How many probes may be lost. With the highest cap of unanswered dials they are still fewer than the device's 512.
const LOST_PROBES: u64 = 64;

/// The caps of one VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GateLimits {
    /// Connections at a time.
    pub(crate) live: usize,
    /// Dials without a sign of life from the guest since.
    pub(crate) unanswered: u64,
}

/// Whether a dial may go.
#[derive(Debug)]
pub(crate) enum Admission {
    Go(Permit),
    /// Too soon: ask again then.
    At(Instant),
    /// A cap is reached: ask again later.
    Full(Full),
    /// The guest has answered nothing for so long that one dial is to find out whether it lives; nothing else may go.
    Probe(Permit),
}

/// Which cap is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    Live(usize),
    Unanswered(u64),
}

impl std::fmt::Display for Full {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Full::Live(n) => write!(f, "all {n} connections that one VM may have are in use"),
            Full::Unanswered(n) => {
                write!(
                    f,
                    "the guest has not answered {n} dials (booting, paused or asleep?)"
                )
            }
        }
    }
}

/// One VM's gate, shared by all workers.
#[derive(Debug)]
pub(crate) struct Gate {
    limits: Mutex<GateLimits>,
    state: Mutex<State>,
    /// Number of the last dial.
    dialled: AtomicU64,
    /// The highest number of a dial that was answered, and so were all before it: a guest takes them in order.
    answered: AtomicU64,
}

#[derive(Debug)]
struct State {
    vm: Option<Identity>,
    epoch: u64,
    live: usize,
    /// Permits that have not become a dial yet.
    reserved: u64,
    /// When the next dial would be due if all kept the average distance.
    due: Option<Instant>,
    /// A probe is on its way; another one may go then.
    next_probe: Option<Instant>,
    patience: Duration,
}

impl Gate {
    pub(crate) fn new(limits: GateLimits) -> Gate {
        let state = State {
            vm: None,
            epoch: 0,
            live: 0,
            reserved: 0,
            due: None,
            next_probe: None,
            patience: PROBE_PATIENCE,
        };
        Gate {
            limits: Mutex::new(limits),
            state: Mutex::new(state),
            dialled: AtomicU64::new(0),
            answered: AtomicU64::new(0),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn limits(&self) -> GateLimits {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on these hold. Who is connected beyond them goes on.
    pub(super) fn set_limits(&self, limits: GateLimits) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
    }

    /// Asks for leave to dial the VM whose `connect` socket is `vm` now.
    ///
    /// Another identity than before is another VM (rule 8): nothing that was held against the old one counts.
    pub(crate) fn admit(self: &Arc<Gate>, now: Instant, vm: Option<Identity>) -> Admission {
        let limits = self.limits();
        let mut state = self.state();
        if vm.is_some() && vm != state.vm {
            if state.vm.is_some() {
                self.forget_vm(&mut state);
            }
            state.vm = vm;
        }
        if state.live >= limits.live {
            return Admission::Full(Full::Live(limits.live));
        }
        let limit = limits.unanswered;
        let unanswered = self.unanswered() + state.reserved;
        if unanswered >= limit {
            if state.next_probe.is_some_and(|at| now < at) || unanswered >= limit + LOST_PROBES {
                return Admission::Full(Full::Unanswered(limit));
            }
            state.next_probe = Some(now + state.patience);
            state.patience = (state.patience * 2).min(LONGEST_PATIENCE);
            return Admission::Probe(self.permit(&mut state, true));
        }
        state.patience = PROBE_PATIENCE;
        let due = state.due.unwrap_or(now);
        let earliest = due.checked_sub(INTERVAL * (BURST - 1)).unwrap_or(now);
        if now < earliest {
            return Admission::At(earliest);
        }
        state.due = Some(due.max(now) + INTERVAL);
        Admission::Go(self.permit(&mut state, false))
    }

    fn permit(self: &Arc<Gate>, state: &mut State, probe: bool) -> Permit {
        state.reserved += 1;
        Permit {
            place: self.take_place(state),
            number: None,
            probe,
        }
    }

    /// A guest has dialled us: that takes a place in its VM, too, and can't be refused one.
    pub(crate) fn place(self: &Arc<Gate>) -> Place {
        self.take_place(&mut self.state())
    }

    fn take_place(self: &Arc<Gate>, state: &mut State) -> Place {
        state.live += 1;
        Place {
            gate: Arc::clone(self),
            epoch: state.epoch,
        }
    }

    /// The VM can't be connected to: what was held against it counts no more.
    pub(crate) fn vm_is_gone(&self) {
        self.forget_vm(&mut self.state());
    }

    fn forget_vm(&self, state: &mut State) {
        state.epoch += 1;
        state.live = 0;
        state.reserved = 0;
        state.next_probe = None;
        state.patience = PROBE_PATIENCE;
        let dialled = self.dialled.load(Ordering::Relaxed);
        self.answered.fetch_max(dialled, Ordering::Relaxed);
    }

    fn unanswered(&self) -> u64 {
        let answered = self.answered.load(Ordering::Relaxed);
        let dialled = self.dialled.load(Ordering::Relaxed);
        dialled.saturating_sub(answered)
    }

    pub(super) fn status(&self) -> VmStatus {
        VmStatus {
            connections: self.state().live,
            limit: self.limits().live,
            reserved: 0,
            unanswered: self.unanswered(),
            up: None,
            gone_since: None,
            restarts: 0,
        }
    }

    /// Connections that count against the cap now.
    #[cfg(test)]
    fn live(&self) -> usize {
        self.state().live
    }
}

/// One of the connections that the VM has now; dropped when its socket is closed.
#[derive(Debug)]
pub(crate) struct Place {
    gate: Arc<Gate>,
    epoch: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        if state.epoch == self.epoch {
            state.live = state.live.saturating_sub(1);
        }
    }
}

/// Leave to dial the VM once, and the place of the connection that comes of it.
#[derive(Debug)]
pub(crate) struct Permit {
    place: Place,
    /// The number of its dial, once there was one.
    number: Option<u64>,
    probe: bool,
}

impl Permit {
    /// The device has got the dial.
    pub(crate) fn dialled(&mut self) {
        let gate = &self.place.gate;
        let mut state = gate.state();
        if state.epoch == self.place.epoch {
            state.reserved = state.reserved.saturating_sub(1);
        }
        self.number = Some(gate.dialled.fetch_add(1, Ordering::Relaxed) + 1);
    }

    /// Something came from the guest on this connection.
    pub(crate) fn answered(&self) {
        let gate = &self.place.gate;
        if let Some(number) = self.number
            && gate.answered.load(Ordering::Relaxed) < number
        {
            gate.answered.fetch_max(number, Ordering::Relaxed);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.place.gate.state();
        if state.epoch == self.place.epoch {
            let answered = self.place.gate.answered.load(Ordering::Relaxed);
            // One that was lost does not make room for another before its time.
            if self.probe && self.number.is_none_or(|number| number <= answered) {
                state.next_probe = None;
                state.patience = PROBE_PATIENCE;
            }
            if self.number.is_none() {
                state.reserved = state.reserved.saturating_sub(1);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn gate(live: usize, unanswered: u64) -> Arc<Gate> {
        Arc::new(Gate::new(GateLimits { live, unanswered }))
    }

    fn go(gate: &Arc<Gate>, now: Instant) -> Permit {
        match gate.admit(now, None) {
            Admission::Go(mut permit) => {
                permit.dialled();
                permit
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn dials_keep_their_distance_on_average() {
        let gate = gate(10_000, 10_000);
        let start = Instant::now();
        let mut now = start;
        let mut times = Vec::new();
        while times.len() < 1000 {
            match gate.admit(now, None) {
                Admission::Go(mut permit) => {
                    permit.dialled();
                    times.push(now);
                }
                Admission::At(then) => {
                    assert!(then > now);
                    // A poller's millisecond.
                    now = then + Duration::from_micros(900);
                }
                other => panic!("{other:?}"),
            }
        }
        for window in times.windows(BURST as usize + 1) {
            let span = window[BURST as usize] - window[0];
            assert!(
                span >= INTERVAL,
                "{BURST} dials and one more within {span:?}"
            );
        }
        let average = (times[999] - start) / 1000;
        assert!(average >= Duration::from_micros(100), "{average:?}");
    }

    #[test]
    fn a_guest_that_answers_nothing_is_not_dialled_without_end() {
        let gate = gate(900, 64);
        let mut now = Instant::now();
        let mut permits = Vec::new();
        for _ in 0..64 {
            now += Duration::from_millis(1);
            permits.push(go(&gate, now));
        }
        now += Duration::from_secs(1);
        let Admission::Probe(mut probe) = gate.admit(now, None) else {
            panic!()
        };
        probe.dialled();
        assert!(matches!(
            gate.admit(now, None),
            Admission::Full(Full::Unanswered(64))
        ));
        // Dropping them is no answer.
        let last = permits.pop().unwrap();
        permits.clear();
        assert!(matches!(
            gate.admit(now, None),
            Admission::Full(Full::Unanswered(64))
        ));
        last.answered();
        drop(go(&gate, now));
    }

    #[test]
    fn old_connections_say_nothing_of_newer_dials() {
        let gate = gate(900, 3);
        let mut now = Instant::now();
        let first = go(&gate, now);
        first.answered();
        for _ in 0..3 {
            now += Duration::from_millis(1);
            drop(go(&gate, now));
        }
        first.answered();
        assert!(matches!(gate.admit(now, None), Admission::Probe(_)));
    }

    #[test]
    fn an_answered_probe_lets_the_others_through() {
        let gate = gate(900, 1);
        let mut now = Instant::now();
        let _silent = go(&gate, now);
        now += Duration::from_millis(1);
        let Admission::Probe(mut probe) = gate.admit(now, None) else {
            panic!()
        };
        probe.dialled();
        assert!(matches!(gate.admit(now, None), Admission::Full(_)));
        probe.answered();
        drop(probe);
        drop(go(&gate, now));
    }

    #[test]
    fn a_probe_that_a_reboot_swallowed_locks_nobody_out() {
        let gate = gate(900, 1);
        let mut now = Instant::now();
        let _silent = go(&gate, now);
        let mut lost = Vec::new();
        for patience in [30, 60, 120] {
            let Admission::Probe(mut probe) = gate.admit(now, None) else {
                panic!()
            };
            probe.dialled();
            lost.push(probe);
            now += Duration::from_secs(patience - 1);
            assert!(matches!(gate.admit(now, None), Admission::Full(_)));
            now += Duration::from_secs(1);
        }
        lost.pop().unwrap().answered();
        drop(go(&gate, now));
    }

    #[test]
    fn lost_probes_are_not_enough_to_kill_the_device() {
        let gate = gate(900, 4);
        let mut now = Instant::now();
        let mut dials = 0;
        for _ in 0..1000 {
            match gate.admit(now, None) {
                Admission::Go(mut permit) | Admission::Probe(mut permit) => {
                    permit.dialled();
                    dials += 1;
                }
                _ => {}
            }
            now += LONGEST_PATIENCE;
        }
        assert_eq!(dials, 4 + LOST_PROBES);
    }

    // It takes the identities of two files, which only Unix has.
    #[cfg(unix)]
    #[test]
    fn a_new_vm_starts_afresh_and_old_permits_do_not_count() {
        let directory = tempfile::tempdir().unwrap();
        let (one, two) = (directory.path().join("one"), directory.path().join("two"));
        std::fs::write(&one, "").unwrap();
        std::fs::write(&two, "").unwrap();
        let (one, two) = (Identity::of(&one).ok(), Identity::of(&two).ok());
        let gate = gate(1, 64);
        let now = Instant::now();
        let Admission::Go(old) = gate.admit(now, one) else {
            panic!()
        };
        assert!(matches!(
            gate.admit(now, one),
            Admission::Full(Full::Live(1))
        ));
        let Admission::Go(new) = gate.admit(now, two) else {
            panic!()
        };
        drop(old);
        assert_eq!(gate.live(), 1);
        drop(new);
        assert_eq!(gate.live(), 0);
    }

    #[test]
    fn who_dialled_us_takes_a_place_too() {
        let gate = gate(2, 64);
        let now = Instant::now();
        let guests = [gate.place(), gate.place()];
        assert!(matches!(
            gate.admit(now, None),
            Admission::Full(Full::Live(2))
        ));
        drop(guests);
        assert_eq!(gate.live(), 0);
        drop(go(&gate, now));
    }

    #[test]
    fn a_permit_that_never_became_a_dial_leaves_no_trace() {
        let gate = gate(2, 1);
        let now = Instant::now();
        for _ in 0..3 {
            match gate.admit(now, None) {
                Admission::Go(permit) => drop(permit),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(gate.live(), 0);
    }
}
