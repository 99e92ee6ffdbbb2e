//! Where every dial to one hyperkit VM passes: pace, and the two caps that keep its device alive.
//!
//! Rule 5 of a good neighbour (`hyperkit.md`): a burst of dials overflows the ring of 512 replies in which the device
//! keeps what the guest hasn't fetched yet, and the VM dies; so it does of 512 dials to a guest that is not answering.
//!
//! hyperkit says nothing when a guest accepts. That a guest has taken a dial, and all before it, is known when the first
//! byte or the end comes on that very connection. (What comes on an older one may have lain in buffers since before the
//! guest stopped.) And services that wait for their client to speak send nothing: so when the cap is reached, a probe asks
//! the guest's kernel: a dial of a port where nobody listens, which it refuses as soon as it runs. The same probe tells a
//! client that is to be held from one whose dial the guest has taken.

mod heard;
pub(crate) mod quotas;
mod slot;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::address::HyperkitVm;
use crate::error::Error;

use crate::engine::health::{self, Health, News, VmIdentity};
use crate::engine::id::ForwardId;
use crate::engine::status::{VmStatus, wall_time};

use heard::LastHeard;
use quotas::{Holder, Quotas};
use slot::Stage;
pub(crate) use slot::{Reservation, Slot};

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

/// How long a look at a state directory takes at most, unless its file system hangs.
const HANGS: Duration = Duration::from_secs(2);

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
    Go(Slot),
    /// Too soon: ask again then.
    At(Instant),
    /// A cap is reached: ask again later.
    Full(Full),
    /// The guest has answered nothing for so long that one dial is to find out whether it lives; nothing else may go.
    Probe(Slot),
}

/// Which cap is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    Live(usize),
    /// So many places are free, and kept for others.
    Reserved(usize),
    Unanswered(u64),
    /// A look at its state directory doesn't end: neither would a dial, and it would stop the worker.
    Hangs,
}

impl std::fmt::Display for Full {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Full::Live(n) => write!(f, "all {n} connections that one VM may have are in use"),
            Full::Reserved(n) => write!(
                f,
                "the connections that its VM may have are in use but for {n}, which are reserved for others"
            ),
            Full::Hangs => f.write_str("its state directory doesn't answer (does its disk hang?)"),
            Full::Unanswered(n) => {
                write!(
                    f,
                    "the guest has not answered {n} dials (booting, paused or asleep?)"
                )
            }
        }
    }
}

/// Wakes a worker.
pub(crate) type Wake = Arc<dyn Fn() + Send + Sync>;

/// One VM's gate, shared by all workers.
#[derive(Debug)]
pub(crate) struct Gate {
    vm: HyperkitVm,
    state: Mutex<State>,
    /// Number of the last dial.
    dialled: AtomicU64,
    /// The highest number of a dial that was answered, and so were all before it: a guest takes them in order.
    answered: AtomicU64,
    heard: LastHeard,
}

struct State {
    health: Health,
    epoch: u64,
    quotas: Quotas,
    /// Dials that the guest may leave unanswered.
    may_lack: u64,
    /// Forwards that lead here, by whether they hold their clients while the VM isn't there.
    forwards: [usize; 2],
    /// Permits that have not become a dial yet.
    pending: u64,
    /// When the next dial would be due if all kept the average distance.
    due: Option<Instant>,
    /// A probe is on its way; another one may go then.
    next_probe: Option<Instant>,
    patience: Duration,
    /// When the VM was looked at last.
    looked: Option<Instant>,
    /// What was seen then is not known yet.
    is_looking: bool,
    /// When a dial told last which VM it is.
    told: Option<Instant>,
    /// The last dial went through the `connect` socket: any port can be dialled there.
    has_connect_socket: bool,
    /// Workers that wait for a place, by their numbers.
    sleepers: Vec<(usize, Wake)>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("health", &self.health)
            .field("quotas", &self.quotas)
            .finish_non_exhaustive()
    }
}

impl Gate {
    pub(crate) fn new(limits: GateLimits, vm: HyperkitVm) -> Gate {
        let state = State {
            health: Health::default(),
            epoch: 0,
            quotas: Quotas::new(limits.live),
            may_lack: limits.unanswered,
            forwards: [0; 2],
            pending: 0,
            due: None,
            next_probe: None,
            patience: PROBE_PATIENCE,
            looked: None,
            is_looking: false,
            told: None,
            has_connect_socket: true,
            sleepers: Vec::new(),
        };
        Gate {
            vm,
            state: Mutex::new(state),
            dialled: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            heard: LastHeard::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on these hold. Who is connected beyond them stays.
    pub(crate) fn set_limits(&self, limits: GateLimits) {
        let mut state = self.state();
        state.quotas.set_cap(limits.live);
        state.may_lack = limits.unanswered;
        state.keep_for_probes();
        state.wake();
    }

    /// Asks whether a dial of `forward` may go.
    pub(crate) fn admit(self: &Arc<Gate>, forward: ForwardId, now: Instant) -> Admission {
        let mut state = self.state();
        let admission = self.admit_to(&mut state, Holder::Forward(forward), now);
        match admission {
            Some(full) => full,
            // Nothing else may go then.
            None if self.is_unanswered(&state) => self.begin_probe(&mut state, now),
            None => {
                state.patience = PROBE_PATIENCE;
                Admission::Go(self.slot(&mut state, Holder::Forward(forward), Stage::Admitted))
            }
        }
    }

    /// Returns why no dial of `holder` may go now, or takes it into the pace of the others.
    fn admit_to(&self, state: &mut State, holder: Holder, now: Instant) -> Option<Admission> {
        if state.hangs(now) {
            return Some(Admission::Full(Full::Hangs));
        }
        // With a single slot there is none to be kept for probes.
        let is_exempt = holder == Holder::Probes && state.quotas.cap() <= 1;
        if state.quotas.free_for(holder) == 0 && !is_exempt {
            return Some(Admission::Full(why_full(&state.quotas, holder)));
        }
        let limit = state.may_lack;
        let is_waiting = state.next_probe.is_some_and(|at| now < at);
        let is_lost = self.unanswered() + state.pending >= limit + LOST_PROBES;
        if self.is_unanswered(state) && (is_waiting || is_lost) {
            return Some(Admission::Full(Full::Unanswered(limit)));
        }
        // A probe is a dial, too.
        let due = state.due.unwrap_or(now);
        let earliest = due.checked_sub(INTERVAL * (BURST - 1)).unwrap_or(now);
        if now < earliest {
            return Some(Admission::At(earliest));
        }
        state.due = Some(due.max(now) + INTERVAL);
        None
    }

    /// Returns whether the guest has answered nothing for so long that nothing but a probe may go.
    fn is_unanswered(&self, state: &State) -> bool {
        self.unanswered() + state.pending >= state.may_lack
    }

    fn begin_probe(self: &Arc<Gate>, state: &mut State, now: Instant) -> Admission {
        state.next_probe = Some(now + state.patience);
        state.patience = match self.is_unanswered(state) {
            true => (state.patience * 2).min(LONGEST_PATIENCE),
            false => PROBE_PATIENCE,
        };
        Admission::Probe(self.slot(state, Holder::Probes, Stage::Admitted))
    }

    /// Asks whether a probe may go: a dial of a port where nobody listens. Its refusal tells that the guest has answered
    /// all dials before it. One at a time serves all workers: one that is told to wait for it is woken when it has come.
    pub(crate) fn admit_probe(
        self: &Arc<Gate>,
        now: Instant,
        worker: usize,
        wake: &Wake,
    ) -> Admission {
        let mut state = self.state();
        if let Some(at) = state.next_probe.filter(|&at| now < at) {
            sleep(&mut state, worker, wake);
            return Admission::At(at);
        }
        let admission = self.admit_to(&mut state, Holder::Probes, now);
        admission.unwrap_or_else(|| self.begin_probe(&mut state, now))
    }

    fn slot(self: &Arc<Gate>, state: &mut State, holder: Holder, stage: Stage) -> Slot {
        match stage {
            Stage::Queued => state.quotas.line_up(holder),
            _ => state.quotas.take(holder),
        }
        if stage == Stage::Admitted {
            state.pending += 1;
        }
        Slot {
            gate: Arc::clone(self),
            holder,
            epoch: state.epoch,
            stage,
        }
    }

    /// Takes that a guest has dialled us: that takes a slot of its VM, too, and can't be refused one.
    pub(crate) fn accept(self: &Arc<Gate>, forward: ForwardId) -> Slot {
        let holder = Holder::Forward(forward);
        self.slot(&mut self.state(), holder, Stage::Accepted)
    }

    /// Queues a client, whether there will be a slot for it or not.
    pub(crate) fn queue_always(self: &Arc<Gate>, forward: ForwardId) -> Slot {
        let holder = Holder::Forward(forward);
        self.slot(&mut self.state(), holder, Stage::Queued)
    }

    /// Queues a client for which there will be a slot.
    ///
    /// # Errors
    /// Why there is none now. `wake` is called when that may have changed.
    pub(crate) fn queue(
        self: &Arc<Gate>,
        forward: ForwardId,
        worker: usize,
        wake: &Wake,
    ) -> Result<Slot, Full> {
        let holder = Holder::Forward(forward);
        let mut state = self.state();
        if state.quotas.may_queue(holder) {
            return Ok(self.slot(&mut state, holder, Stage::Queued));
        }
        sleep(&mut state, worker, wake);
        Err(why_full(&state.quotas, holder))
    }

    /// Keeps slots for a forward. One that leads here `holds` its clients while the VM isn't there, or does not.
    ///
    /// # Errors
    /// How many can be kept, if those are too many.
    pub(crate) fn reserve(
        self: &Arc<Gate>,
        forward: ForwardId,
        slots: usize,
        holds: Option<bool>,
    ) -> Result<Reservation, usize> {
        let mut state = self.state();
        // A probe needs a slot beside that of the dial, where there are two.
        let probes = holds == Some(true) && state.quotas.cap() > 1;
        if probes && state.forwards[1] == 0 {
            state.quotas.reserve(Holder::Probes, 1)?;
        }
        let reserved = state.quotas.reserve(Holder::Forward(forward), slots);
        if let (Ok(()), Some(holds)) = (reserved, holds) {
            state.forwards[usize::from(holds)] += 1;
        }
        state.keep_for_probes();
        reserved.map(|()| Reservation {
            gate: Arc::clone(self),
            forward,
            holds,
        })
    }

    /// A dial has failed as it does where no VM is.
    pub(crate) fn mark_down(&self, error: &Error, now: Instant) {
        let news = self.state().health.mark_down(now);
        self.log_change(news, Some(error));
    }

    /// Returns the VM.
    pub(crate) fn vm(&self) -> &HyperkitVm {
        &self.vm
    }

    /// Returns whether the VM is to be looked at now, by whoever asks first: the last look was so long ago, and is over.
    /// [`look`](Gate::look) is to follow.
    pub(crate) fn begin_look(&self, now: Instant, every: Duration) -> bool {
        let mut state = self.state();
        let soon = state
            .looked
            .is_some_and(|at| now.saturating_duration_since(at) < every);
        if state.is_looking || soon {
            return false;
        }
        state.is_looking = true;
        state.looked = Some(now);
        true
    }

    /// Takes what was seen of the VM.
    pub(crate) fn take_look(&self, vm: Option<VmIdentity>, process: Option<i32>, now: Instant) {
        let mut state = self.state();
        state.is_looking = false;
        // A dial has told meanwhile, and what was seen may be older.
        if state.told > state.looked {
            return;
        }
        let news = match vm {
            Some(vm) => {
                let news = self.note_identity(&mut state, vm, now);
                news.or(state.health.note_process(process, now))
            }
            None => state.health.note_absence(now),
        };
        drop(state);
        self.log_change(news, None);
    }

    /// Returns whether a port where nobody listens can be dialled: not where there are `guest_forwards` alone.
    pub(crate) fn can_be_probed(&self) -> bool {
        self.state().has_connect_socket
    }

    /// Takes the identity of the VM. Another one than before is another VM (rule 8): nothing that was held against the old one
    /// counts.
    fn note_identity(&self, state: &mut State, vm: VmIdentity, now: Instant) -> Option<News> {
        let (is_new, news) = state.health.note_identity(vm, now);
        if is_new {
            self.forget_vm(state);
        }
        news
    }

    /// The VM can't be connected to: what was held against it counts no more.
    pub(crate) fn vm_is_gone(&self) {
        self.forget_vm(&mut self.state());
    }

    fn forget_vm(&self, state: &mut State) {
        state.epoch += 1;
        self.heard.forget();
        state.quotas.clear();
        state.pending = 0;
        state.next_probe = None;
        state.patience = PROBE_PATIENCE;
        let dialled = self.dialled.load(Ordering::Relaxed);
        self.answered.fetch_max(dialled, Ordering::Relaxed);
        state.wake();
    }

    fn unanswered(&self) -> u64 {
        let answered = self.answered.load(Ordering::Relaxed);
        let dialled = self.dialled.load(Ordering::Relaxed);
        dialled.saturating_sub(answered)
    }

    pub(crate) fn status(&self, now: Instant) -> VmStatus {
        let state = self.state();
        VmStatus {
            connections: state.quotas.live(),
            limit: state.quotas.cap(),
            reserved: state.quotas.kept(),
            unanswered: self.unanswered(),
            last_heard: self.heard.at().map(|then| wall_time(then, now)),
            up: state.health.is_up().filter(|_| !state.hangs(now)),
            gone_since: state.health.gone_since(),
            restarts: state.health.restarts(),
        }
    }

    /// Says in the log what is new.
    fn log_change(&self, news: Option<News>, error: Option<&Error>) {
        let Some(news) = news else {
            return;
        };
        let forwards = self.state().forwards;
        let subject = format_args!("the VM at {}", self.vm.state_dir.display());
        health::log_change(news, &subject, error, forwards);
    }

    /// Returns whether [`queue`](Gate::queue) would let a client in.
    #[cfg(all(test, target_os = "linux"))]
    pub(crate) fn would_queue(&self, forward: ForwardId) -> bool {
        self.state().quotas.may_queue(Holder::Forward(forward))
    }

    /// Connections that count against the cap now.
    #[cfg(test)]
    fn live(&self) -> usize {
        self.state().quotas.live()
    }
}

/// Why a holder can have no slot, or no more than are asked for already.
fn why_full(quotas: &Quotas, holder: Holder) -> Full {
    match quotas.kept_from(holder) {
        0 => Full::Live(quotas.cap()),
        kept => Full::Reserved(kept),
    }
}

fn sleep(state: &mut State, worker: usize, wake: &Wake) {
    if state.sleepers.iter().all(|(number, _)| *number != worker) {
        state.sleepers.push((worker, Arc::clone(wake)));
    }
}

impl State {
    /// Keeps a slot for probes where forwards want them, and where it is not the only one.
    fn keep_for_probes(&mut self) {
        let slots = usize::from(self.forwards[1] > 0 && self.quotas.cap() > 1);
        // Where the others have reserved all, probes get what is free.
        let _ = self.quotas.reserve(Holder::Probes, slots);
    }

    /// Whether the last look has not ended within a time in which any file system answers.
    fn hangs(&self, now: Instant) -> bool {
        let late = |at| now.saturating_duration_since(at) >= HANGS;
        self.is_looking && self.looked.is_some_and(late)
    }

    /// There may be a place now.
    fn wake(&mut self) {
        for (_, wake) in self.sleepers.drain(..) {
            wake();
        }
    }
}

#[cfg(test)]
mod tests;
