//! The admission of connections to one hyperkit VM: the pace of dials, and the two caps that keep
//! the VM's device alive.
//!
//! Rule 5 of a good neighbour (`hyperkit.md`): a burst of dials overflows the ring of 512 replies
//! in which the device keeps what the guest has not fetched yet, and the VM dies. So it does after
//! 512 dials to a guest that does not answer.
//!
//! hyperkit reports nothing when a guest accepts. A guest has taken a dial, and all dials before
//! it, once the first byte or the EOF arrives on that very connection. (What arrives on an older
//! one may have lain in buffers since before the guest stopped.) Services that wait for their
//! client to speak send nothing. So when the cap is reached, a probe asks the guest's kernel: a
//! dial of a port on which nobody listens, which the kernel refuses as soon as it runs. The same
//! probe tells whether the dial of a held client was taken.
//!
//! A guest dials the host whether there is a slot or not, and each of its dials has taken one by the
//! time it is accepted. So a guest's dials are bounded by their end: those beyond their share
//! ([`guests`]) are not served, but ended at once, gracefully.
//!
//! What is counted are the slots that the device counts. A connection that was closed though its
//! guest never ended it keeps its slot in the device: it is [lost](Slot::lose) until the VM is
//! another one.
//!
//! A VM that has no slot free meets three kinds of client:
//!
//! | client | where it waits | until |
//! |---|---|---|
//! | one that is not accepted yet | in its listener's backlog | the gate wakes the worker ([`Gate::queue`]) |
//! | one that is: it was held, or a forward of this process dialled it | in a queue of its forward | its dial timeout; the gate is asked every 10 ms ([`Gate::admit`]) |
//! | a guest of the VM, which dials the host | nowhere: it is accepted | it is ended at once ([`Gate::accept`]) |
//!
//! A gate decides and counts. It knows no socket, and makes no dial.

mod guests;
mod heard;
pub(crate) mod quotas;
#[cfg_attr(not(all(unix, feature = "cli")), allow(dead_code))]
pub(crate) mod sharing;
mod silence;
mod slot;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::address::HyperkitVm;
use crate::error::{Error, plural};

use crate::engine::health::{self, Health, News, VmIdentity};
use crate::engine::id::ForwardId;
use crate::engine::status::{VmStatus, wall_time};

pub(crate) use guests::{Guest, NotServed};
use heard::LastHeard;
use quotas::{Holder, Quotas};
use sharing::OtherSlots;
use silence::Silence;
pub(crate) use silence::SilenceCheck;
use slot::Stage;
pub(crate) use slot::{DrainEnd, Reservation, Slot};

/// The average interval between two dials. 100 µs never harmed the device.
const INTERVAL: Duration = Duration::from_micros(150);

/// How many dials may follow each other without a pause. Poll timeouts count in milliseconds, so
/// the pace is kept per millisecond. The number is far below the 512 replies that the device's ring
/// holds.
const BURST: u32 = 8;

/// The time after which a probe counts as lost, and another one may go. A guest that rebooted
/// forgets what it had not answered, and nothing ever arrives on such a connection. The time
/// doubles with each lost probe, up to [`LONGEST_PATIENCE`], since each holds a slot for good.
const PROBE_PATIENCE: Duration = Duration::from_secs(30);
const LONGEST_PATIENCE: Duration = Duration::from_secs(3600);

/// How many probes may be lost. With the highest cap of unanswered dials they are still fewer than
/// the device's 512.
const LOST_PROBES: u64 = 64;

/// The part of a VM's slots that drains of guests which go on sending may have while clients wait: a
/// tenth.
const FOR_DRAINS: usize = 10;

/// From how many slots on that are taken a refusal may be the device's, which has none left. With
/// hardly any taken it is the guest's.
const CROWD: usize = 10;

/// How long after a dial has found no slot a client counts as waiting. Dials ask again far sooner.
const WANTED: Duration = Duration::from_millis(200);

/// The time after which a look at a state directory counts as hanging.
const HANG_TIME: Duration = Duration::from_secs(2);

/// The caps of one VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GateLimits {
    /// Connections at a time.
    pub(crate) live: usize,
    /// Dials since the guest last answered one.
    pub(crate) unanswered: u64,
}

/// The gate's answer to a request for a dial.
#[derive(Debug)]
pub(crate) enum Admission {
    Go(Slot),
    /// It is too soon: the caller asks again at that time.
    At(Instant),
    /// A cap is reached: the caller asks again later.
    Full(Full),
    /// The guest has answered nothing for so long that only a probe may go, to find out whether it
    /// runs.
    Probe(Slot),
}

/// The cap that is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// All slots are taken; so many of them are lost.
    Live {
        cap: usize,
        lost: usize,
    },
    /// So many slots are free, and reserved for others.
    Reserved(usize),
    Unanswered(u64),
    /// A look at the VM's state directory hangs. A dial would hang as well, and block the worker.
    Hangs,
}

impl std::fmt::Display for Full {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Full::Live { cap: 1, lost: 0 } => {
                f.write_str("the one connection that the VM may have is in use")
            }
            Full::Live { cap: 1, .. } => f.write_str(
                "the one connection that the VM may have is lost to a program in the guest that doesn't end its own (restart the VM)",
            ),
            Full::Live { cap, lost: 0 } => {
                write!(f, "all {cap} connections that one VM may have are in use")
            }
            Full::Live { cap, lost } => write!(
                f,
                "all {cap} connections that one VM may have are in use, {lost} of them lost to programs in the guest that don't end theirs (restart the VM)"
            ),
            Full::Reserved(n) => write!(
                f,
                "the connections that its VM may have are in use but for {n}, which are reserved for others"
            ),
            Full::Hangs => f.write_str("its state directory doesn't answer (does its disk hang?)"),
            Full::Unanswered(n) => {
                write!(
                    f,
                    "the guest has not answered {n} dial{} (booting, paused or asleep?)",
                    plural(*n)
                )
            }
        }
    }
}

/// A function that wakes a worker.
pub(crate) type Wake = Arc<dyn Fn() + Send + Sync>;

/// A function that tells a worker that there may be a slot at a gate again, and wakes it.
pub(crate) type SlotWake = Arc<dyn Fn(GateId) + Send + Sync>;

/// The identifier of a gate in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct GateId(u64);

impl GateId {
    fn next() -> GateId {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        GateId(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// The admission gate of one VM, shared by all workers.
#[derive(Debug)]
pub(crate) struct Gate {
    id: GateId,
    vm: HyperkitVm,
    state: Mutex<State>,
    /// The number of the last dial.
    dialled: AtomicU64,
    /// The highest number of a dial that was answered. All dials before it were taken too: a guest
    /// takes them in order.
    answered: AtomicU64,
    heard: LastHeard,
}

struct State {
    /// The gate's.
    id: GateId,
    health: Health,
    epoch: u64,
    quotas: Quotas,
    /// How many dials the guest may leave unanswered.
    unanswered_limit: u64,
    /// The number of forwards that lead to the VM: those that refuse their clients while the VM is
    /// down, and those that hold them.
    forwards: [usize; 2],
    /// The forwards at which the guest dials.
    guest_forwards: usize,
    /// The guest's dials that are served now.
    guests: usize,
    /// How many of the guest's dials were not served since the VM is known, and whether the log says
    /// so.
    turned_away: u64,
    has_told_turned_away: bool,
    /// The slots that were admitted and have not become a dial yet.
    pending: u64,
    /// The time at which the next dial would be due if all kept the average interval.
    next_dial: Option<Instant>,
    /// The time at which another probe may go, while one is under way.
    next_probe: Option<Instant>,
    patience: Duration,
    /// The time of the last look at the VM.
    looked_at: Option<Instant>,
    /// Whether the result of that look is still to come.
    is_looking: bool,
    /// The time at which a dial last told the VM's identity.
    identified_at: Option<Instant>,
    /// Whether the last dial went through the `connect` socket, where any port can be dialled.
    has_connect_socket: bool,
    /// The workers that wait for a slot, since clients do.
    waiting_for_slot: WaitingWorkers,
    /// The workers that wait for the answer to a probe.
    waiting_for_probe: WaitingWorkers,
    /// The time at which a dial last found no free slot.
    wanted_at: Option<Instant>,
    silence: Silence,
    /// The drains of guests that go on sending, the oldest first, by their numbers.
    drains: Vec<u64>,
    next_drain: u64,
    /// The cap, while this process leaves some of its slots to a successor.
    whole_cap: Option<usize>,
    /// The slots that its predecessor still has.
    others: OtherSlots,
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
        let id = GateId::next();
        let state = State {
            id,
            health: Health::default(),
            epoch: 0,
            quotas: Quotas::new(limits.live),
            unanswered_limit: limits.unanswered,
            forwards: [0; 2],
            guest_forwards: 0,
            guests: 0,
            turned_away: 0,
            has_told_turned_away: false,
            pending: 0,
            next_dial: None,
            next_probe: None,
            patience: PROBE_PATIENCE,
            looked_at: None,
            is_looking: false,
            identified_at: None,
            has_connect_socket: true,
            waiting_for_slot: WaitingWorkers::default(),
            waiting_for_probe: WaitingWorkers::default(),
            wanted_at: None,
            silence: Silence::default(),
            drains: Vec::new(),
            next_drain: 0,
            whole_cap: None,
            others: OtherSlots::default(),
        };
        Gate {
            id,
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

    /// Sets the caps. Connections beyond them stay.
    pub(crate) fn set_limits(&self, limits: GateLimits) {
        let mut state = self.state();
        state.quotas.set_cap(limits.live);
        state.unanswered_limit = limits.unanswered;
        state.reserve_for_probes();
        state.wake();
    }

    /// Asks for a dial of `forward`.
    pub(crate) fn admit(self: &Arc<Gate>, forward: ForwardId, now: Instant) -> Admission {
        let mut state = self.state();
        let admission = self.admit_to(&mut state, Holder::Forward(forward), now);
        match admission {
            Some(full) => full,
            // Only a probe may go then.
            None if self.is_unanswered(&state) => self.begin_probe(&mut state, now),
            None => {
                state.patience = PROBE_PATIENCE;
                Admission::Go(self.slot(&mut state, Holder::Forward(forward), Stage::Admitted))
            }
        }
    }

    /// Returns why no dial of `holder` may go now; otherwise counts it towards the pace.
    fn admit_to(&self, state: &mut State, holder: Holder, now: Instant) -> Option<Admission> {
        if state.is_hanging(now) {
            return Some(Admission::Full(Full::Hangs));
        }
        // If there is a single slot, none is reserved for probes.
        let is_exempt = holder == Holder::Probes && state.quotas.cap() <= 1;
        if state.quotas.free_for(holder) == 0 && !is_exempt {
            state.wanted_at = Some(now);
            return Some(Admission::Full(why_full(&state.quotas, holder)));
        }
        let limit = state.unanswered_limit;
        let is_waiting = state.next_probe.is_some_and(|at| now < at);
        let is_lost = self.unanswered() + state.pending >= limit + LOST_PROBES;
        if self.is_unanswered(state) && (is_waiting || is_lost) {
            return Some(Admission::Full(Full::Unanswered(limit)));
        }
        // A probe counts towards the pace as well.
        state.keep_pace(now).err().map(Admission::At)
    }

    /// Returns whether the guest has answered nothing for so long that only a probe may go.
    fn is_unanswered(&self, state: &State) -> bool {
        self.unanswered() + state.pending >= state.unanswered_limit
    }

    fn begin_probe(self: &Arc<Gate>, state: &mut State, now: Instant) -> Admission {
        state.next_probe = Some(now + state.patience);
        state.patience = match self.is_unanswered(state) {
            true => (state.patience * 2).min(LONGEST_PATIENCE),
            false => PROBE_PATIENCE,
        };
        Admission::Probe(self.slot(state, Holder::Probes, Stage::Admitted))
    }

    /// Asks for a probe: a dial of a port on which nobody listens. Its refusal says that the guest
    /// has answered all dials before it. One probe at a time serves all workers; a worker that has
    /// to wait for it is woken when its answer has come.
    pub(crate) fn admit_probe(
        self: &Arc<Gate>,
        now: Instant,
        worker: usize,
        wake: &SlotWake,
    ) -> Admission {
        let mut state = self.state();
        if let Some(at) = state.next_probe.filter(|&at| now < at) {
            state.waiting_for_probe.add(worker, wake);
            return Admission::At(at);
        }
        let admission = self.admit_to(&mut state, Holder::Probes, now);
        admission.unwrap_or_else(|| self.begin_probe(&mut state, now))
    }

    fn slot(self: &Arc<Gate>, state: &mut State, holder: Holder, stage: Stage) -> Slot {
        match stage {
            Stage::Queued => state.quotas.queue(holder),
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
            is_lost: false,
            drain: None,
        }
    }

    /// Queues a client, whether there will be a slot for it or not.
    pub(crate) fn queue_always(self: &Arc<Gate>, forward: ForwardId) -> Slot {
        let holder = Holder::Forward(forward);
        self.slot(&mut self.state(), holder, Stage::Queued)
    }

    /// Queues a client for which there will be a slot.
    ///
    /// # Errors
    /// Returns why there is none now. `wake` is called when that may have changed.
    pub(crate) fn queue(
        self: &Arc<Gate>,
        forward: ForwardId,
        worker: usize,
        wake: &SlotWake,
    ) -> Result<Slot, Full> {
        let holder = Holder::Forward(forward);
        let mut state = self.state();
        if state.quotas.may_queue(holder) {
            return Ok(self.slot(&mut state, holder, Stage::Queued));
        }
        state.waiting_for_slot.add(worker, wake);
        Err(why_full(&state.quotas, holder))
    }

    /// Reserves slots for a forward. If it leads to the VM, `holds` says whether it holds its
    /// clients while the VM is down.
    ///
    /// # Errors
    /// Returns how many slots can be reserved, if there are too few.
    pub(crate) fn reserve(
        self: &Arc<Gate>,
        forward: ForwardId,
        slots: usize,
        holds: Option<bool>,
    ) -> Result<Reservation, usize> {
        let mut state = self.state();
        // A probe needs a slot besides that of the dial, where there are two.
        let probes = holds == Some(true) && state.quotas.cap() > 1;
        if probes && state.forwards[1] == 0 {
            state.quotas.reserve(Holder::Probes, 1)?;
        }
        let reserved = state.quotas.reserve(Holder::Forward(forward), slots);
        if let (Ok(()), Some(holds)) = (reserved, holds) {
            state.forwards[usize::from(holds)] += 1;
        }
        state.reserve_for_probes();
        reserved.map(|()| Reservation {
            gate: Arc::clone(self),
            forward,
            holds,
            dialled_by: None,
        })
    }

    /// Returns whether so many slots are taken or lost that the device itself may have none left:
    /// other programs' connections, and what was lost before, take slots that are not known here.
    pub(crate) fn may_lack_slots(&self) -> bool {
        self.state().quotas.live() >= CROWD
    }

    /// Returns the slots that were lost to connections which their guest never ended.
    #[cfg(test)]
    fn lost(&self) -> usize {
        self.state().quotas.live_of(Holder::Lost)
    }

    /// Marks the VM down after a dial that failed as it does where no VM is.
    pub(crate) fn mark_down(&self, error: &Error, now: Instant) {
        let news = self.state().health.mark_down(now);
        self.log_change(news, Some(error));
    }

    pub(crate) fn id(&self) -> GateId {
        self.id
    }

    /// Returns the VM.
    pub(crate) fn vm(&self) -> &HyperkitVm {
        &self.vm
    }

    /// Returns whether the caller is to look at the VM now: the last look is over, and was at least
    /// `every` ago. [`take_look`](Gate::take_look) or [`end_look`](Gate::end_look) must follow.
    pub(crate) fn begin_look(&self, now: Instant, every: Duration) -> bool {
        let mut state = self.state();
        let soon = state
            .looked_at
            .is_some_and(|at| now.saturating_duration_since(at) < every);
        if state.is_looking || soon {
            return false;
        }
        state.is_looking = true;
        state.looked_at = Some(now);
        true
    }

    /// Takes the result of a look at the VM.
    pub(crate) fn take_look(&self, vm: Option<VmIdentity>, process: Option<i32>, now: Instant) {
        let mut state = self.state();
        state.is_looking = false;
        // A dial has told the identity since, and what the look saw may be older.
        if state.identified_at > state.looked_at {
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

    /// Takes that a look at the VM has failed: nothing was learnt.
    pub(crate) fn end_look(&self) {
        self.state().is_looking = false;
    }

    /// Returns whether a port on which nobody listens can be dialled. It can't where there are
    /// `guest_forwards` alone.
    pub(crate) fn can_be_probed(&self) -> bool {
        self.state().has_connect_socket
    }

    /// Notes the VM's identity. Another identity is another VM (rule 8): nothing counted for the
    /// old one applies to it.
    fn note_identity(&self, state: &mut State, vm: VmIdentity, now: Instant) -> Option<News> {
        let (is_new, news) = state.health.note_identity(vm, now);
        if is_new {
            self.forget_vm(state);
        }
        news
    }

    /// Forgets what was counted for the VM, since it can't be connected to any more.
    pub(crate) fn note_vm_gone(&self) {
        self.forget_vm(&mut self.state());
    }

    fn forget_vm(&self, state: &mut State) {
        state.epoch += 1;
        self.heard.forget();
        state.quotas.clear();
        state.others = OtherSlots::default();
        (state.guests, state.turned_away) = (0, 0);
        state.has_told_turned_away = false;
        state.drains.clear();
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
        let lost = state.quotas.live_of(Holder::Lost);
        VmStatus {
            connections: state.quotas.live() - lost,
            limit: state.quotas.cap(),
            lost,
            guests: state.guests,
            guest_limit: guests::share(state.quotas.cap()),
            turned_away: state.turned_away,
            reserved: state.quotas.kept(),
            unanswered: self.unanswered(),
            last_heard: self.heard.at().map(|then| wall_time(then, now)),
            silent_since: state.silence.since().map(|then| wall_time(then, now)),
            paused: state.silence.is_stopped(),
            up: state.health.is_up().filter(|_| !state.is_hanging(now)),
            gone_since: state.health.gone_since(),
            restarts: state.health.restarts(),
        }
    }

    /// Logs a change of the VM's health.
    fn log_change(&self, news: Option<News>, error: Option<&Error>) {
        let Some(news) = news else {
            return;
        };
        let forwards = self.state().forwards;
        let subject = format_args!("the VM at {}", self.vm.state_dir.display());
        health::log_change(news, &subject, error, forwards);
    }

    /// Returns whether [`queue`](Gate::queue) would admit a client.
    #[cfg(all(test, target_os = "linux"))]
    pub(crate) fn would_queue(&self, forward: ForwardId) -> bool {
        self.state().quotas.may_queue(Holder::Forward(forward))
    }

    /// Returns the connections that count against the cap now.
    #[cfg(test)]
    fn live(&self) -> usize {
        self.state().quotas.live()
    }
}

/// Returns why a holder can have no slot, or no more than are queued for already.
fn why_full(quotas: &Quotas, holder: Holder) -> Full {
    match quotas.kept_from(holder) {
        0 => Full::Live {
            cap: quotas.cap(),
            lost: quotas.live_of(Holder::Lost),
        },
        kept => Full::Reserved(kept),
    }
}

/// The workers that are to be woken, by their numbers.
#[derive(Default)]
struct WaitingWorkers(Vec<(usize, SlotWake)>);

impl WaitingWorkers {
    fn add(&mut self, worker: usize, wake: &SlotWake) {
        if self.0.iter().all(|(number, _)| *number != worker) {
            self.0.push((worker, Arc::clone(wake)));
        }
    }

    fn wake(&mut self, gate: GateId) {
        for (_, wake) in self.0.drain(..) {
            wake(gate);
        }
    }
}

impl State {
    /// Reserves a slot for probes where forwards need them and it is not the only one.
    fn reserve_for_probes(&mut self) {
        let slots = usize::from(self.forwards[1] > 0 && self.quotas.cap() > 1);
        // If the others have reserved all slots, probes get what is free.
        let _ = self.quotas.reserve(Holder::Probes, slots);
    }

    /// Counts a dial, or something else that has the device put a reply into its ring, towards the
    /// pace.
    ///
    /// # Errors
    /// Returns when it may go, if it is too soon.
    fn keep_pace(&mut self, now: Instant) -> Result<(), Instant> {
        let due = self.next_dial.unwrap_or(now);
        let earliest = due.checked_sub(INTERVAL * (BURST - 1)).unwrap_or(now);
        if now < earliest {
            return Err(earliest);
        }
        self.next_dial = Some(due.max(now) + INTERVAL);
        Ok(())
    }

    fn forget_drain(&mut self, drain: u64) {
        if let Ok(index) = self.drains.binary_search(&drain) {
            self.drains.remove(index);
        }
    }

    /// Returns how many drains of guests that go on sending there are beyond their part of the
    /// slots, while clients wait for one.
    fn drains_in_the_way(&self, now: Instant) -> usize {
        let lately = |at| now.saturating_duration_since(at) < WANTED;
        if self.waiting_for_slot.0.is_empty() && !self.wanted_at.is_some_and(lately) {
            return 0;
        }
        let most = (self.quotas.cap() / FOR_DRAINS).max(1);
        self.drains.len().saturating_sub(most)
    }

    /// Returns whether the last look has not ended within the time in which a file system answers.
    fn is_hanging(&self, now: Instant) -> bool {
        let late = |at| now.saturating_duration_since(at) >= HANG_TIME;
        self.is_looking && self.looked_at.is_some_and(late)
    }

    /// Wakes the workers that wait: there may be a slot now, or a probe was answered.
    fn wake(&mut self) {
        self.waiting_for_slot.wake(self.id);
        self.waiting_for_probe.wake(self.id);
    }
}

#[cfg(test)]
mod tests;
