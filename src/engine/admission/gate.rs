//! The gate of a VM: what is counted of it, its health, and the pace of its dials.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::address::{AnyVm, SeenBy, VmTraits};
use crate::error::{Error, plural};
use crate::lock::lock;

use crate::engine::health::{self, ForwardsTo, Health, News, VmIdentity, VmLook};
use crate::engine::status::{VmStatus, wall_time};
use crate::sys;

use super::heard::LastHeard;
use super::quotas::{Holder, OtherSlots, Quotas};
use super::silent::Silence;

/// The average interval between two dials. 100 µs never harmed the device.
pub(super) const INTERVAL: Duration = Duration::from_micros(150);

/// How many dials may follow each other without a pause. Poll timeouts count in milliseconds, so
/// the pace is kept per millisecond. The number is far below the 512 replies that the device's ring
/// holds.
pub(super) const BURST: u32 = 8;

/// The time after which a probe counts as lost, and another one may go. A guest that rebooted
/// forgets what it had not answered, and nothing ever arrives on such a connection. The time
/// doubles with each lost probe, up to [`LONGEST_PATIENCE`], since each holds a slot for good.
pub(super) const PROBE_PATIENCE: Duration = Duration::from_secs(30);
pub(super) const LONGEST_PATIENCE: Duration = Duration::from_secs(3600);

/// How many probes may be lost. With the highest cap of unanswered dials they are still fewer than
/// the device's 512.
pub(super) const LOST_PROBES: u64 = 64;

/// The part of a VM's slots that drains of guests which go on sending may have while clients wait:
/// a tenth.
const FOR_DRAINS: usize = 10;

/// The number of taken slots from which on a refusal may be the device's, which has none left. With
/// fewer taken it is the guest's.
const MANY_SLOTS: usize = 10;

/// The part of a VM's slots that the guest's dials leave for those of the host: a ninth, 100 of
/// 900. With 800 dials of the guest held, and every further one ended gracefully, 3,001 did the
/// device no harm.
const FOR_THE_HOST: usize = 9;

/// How long after a dial has found no slot a client counts as waiting. Dials ask again far sooner.
pub(super) const WANTED: Duration = Duration::from_millis(200);

/// The time after which a look at a state directory counts as hanging.
const HANG_TIME: Duration = Duration::from_secs(2);

/// The caps of one VM. A VM that no number of connections or dials harms has those that it was
/// given, or [`UNLIMITED`](GateLimits::UNLIMITED).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GateLimits {
    /// Connections at a time.
    pub(crate) live: usize,
    /// Dials since the guest last answered one.
    pub(crate) unanswered: u64,
}

impl GateLimits {
    pub(crate) const UNLIMITED: GateLimits = GateLimits {
        live: usize::MAX,
        unanswered: u64::MAX,
    };
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
                "the one connection that the VM may have is lost until the guest ends it (end its program there, or restart the VM)",
            ),
            Full::Live { cap, lost: 0 } => {
                write!(f, "all {cap} connections that one VM may have are in use")
            }
            Full::Live { cap, lost } => write!(
                f,
                "all {cap} connections that one VM may have are in use, {lost} of them lost until the guest ends them (end their programs there, or restart the VM)"
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
    pub(super) id: GateId,
    pub(super) vm: AnyVm,
    /// What is true of the VMs of its family.
    pub(super) traits: &'static VmTraits,
    pub(super) state: Mutex<GateState>,
    /// The number of the last dial.
    pub(super) dialled: AtomicU64,
    /// The highest number of a dial that was answered. All dials before it were taken too: a guest
    /// takes them in order.
    pub(super) answered: AtomicU64,
    pub(super) heard: LastHeard,
}

pub(super) struct GateState {
    /// The gate's identifier.
    pub(super) id: GateId,
    /// The gate's traits.
    pub(super) traits: &'static VmTraits,
    pub(super) health: Health,
    pub(super) epoch: u64,
    pub(super) quotas: Quotas,
    /// How many dials the guest may leave unanswered.
    pub(super) unanswered_limit: u64,
    /// The forwards that lead to the VM.
    pub(super) forwards: ForwardsTo,
    /// The forwards at which the guest dials.
    pub(super) guest_forwards: usize,
    /// The guest's dials that are served now.
    pub(super) guests: usize,
    /// How many of the guest's dials were not served since the VM is known, and whether the log
    /// says so.
    pub(super) turned_away: u64,
    pub(super) has_told_turned_away: bool,
    /// The slots that were admitted and have not become a dial yet.
    pub(super) pending: u64,
    /// The time at which the next dial would be due if all kept the average interval.
    pub(super) next_dial: Option<Instant>,
    /// The time at which another probe may go, while one is under way.
    pub(super) next_probe: Option<Instant>,
    pub(super) patience: Duration,
    /// The time of the last look at the VM.
    pub(super) looked_at: Option<Instant>,
    /// Whether the result of that look is still to come.
    pub(super) is_looking: bool,
    /// Whether the last dial that found no VM said that there is no such CID, or the VM's end did.
    pub(super) is_looked_for: bool,
    /// Whether a dial that has had no answer for a while asks for a look.
    pub(super) is_look_wanted: bool,
    /// The number of the last dial before the last look.
    pub(super) dialled_before_look: u64,
    /// The number of the last dial before the last look that has found no such CID.
    pub(super) dialled_before_end: u64,
    /// The time at which a dial last told the VM's identity.
    pub(super) identified_at: Option<Instant>,
    /// Whether the last dial went through the `connect` socket, where any port can be dialled.
    pub(super) has_connect_socket: bool,
    /// The workers that wait for a slot, since clients do.
    pub(super) waiting_for_slot: WaitingWorkers,
    /// The workers that wait for the answer to a probe.
    pub(super) waiting_for_probe: WaitingWorkers,
    /// The time at which a dial last found no free slot.
    pub(super) wanted_at: Option<Instant>,
    pub(super) silence: Silence,
    /// The drains of guests that go on sending, the oldest first, by their numbers.
    pub(super) drains: Vec<u64>,
    pub(super) next_drain: u64,
    /// Whether the process that began to listen was alive at a dial.
    pub(super) has_seen_process: bool,
    /// That process, if the last dial found it alive.
    pub(super) process: Option<i32>,
    /// The cap, while this process leaves some of its slots to a successor.
    pub(super) whole_cap: Option<usize>,
    /// The slots that its predecessor still has.
    pub(super) others: OtherSlots,
}

impl std::fmt::Debug for GateState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GateState")
            .field("health", &self.health)
            .field("quotas", &self.quotas)
            .finish_non_exhaustive()
    }
}

impl Gate {
    pub(crate) fn new(limits: GateLimits, vm: AnyVm) -> Gate {
        let id = GateId::next();
        let traits = vm.traits();
        let state = GateState {
            id,
            traits,
            health: Health::default(),
            epoch: 0,
            quotas: Quotas::new(limits.live),
            unanswered_limit: limits.unanswered,
            forwards: ForwardsTo::default(),
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
            is_looked_for: false,
            is_look_wanted: false,
            dialled_before_look: 0,
            dialled_before_end: 0,
            identified_at: None,
            has_connect_socket: true,
            waiting_for_slot: WaitingWorkers::default(),
            waiting_for_probe: WaitingWorkers::default(),
            wanted_at: None,
            silence: Silence::default(),
            drains: Vec::new(),
            next_drain: 0,
            has_seen_process: false,
            process: None,
            whole_cap: None,
            others: OtherSlots::default(),
        };
        Gate {
            id,
            traits,
            vm,
            state: Mutex::new(state),
            dialled: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            heard: LastHeard::default(),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, GateState> {
        lock(&self.state)
    }

    /// Sets the caps. Connections beyond them stay.
    pub(crate) fn set_limits(&self, limits: GateLimits) {
        let mut state = self.state();
        state.quotas.set_cap(limits.live);
        state.unanswered_limit = limits.unanswered;
        state.reserve_for_probes();
        state.wake();
    }

    /// Returns whether so many slots are taken or lost that the device itself may have none left:
    /// other programs' connections, and what was lost before, take slots that are not known here.
    pub(crate) fn may_lack_slots(&self) -> bool {
        self.state().quotas.live() >= MANY_SLOTS
    }

    /// Returns the slots that were lost to connections which their guest never ended.
    #[cfg(test)]
    pub(super) fn lost(&self) -> usize {
        self.state().quotas.live_of(Holder::Lost)
    }

    /// Marks the VM down after a dial that failed as it does where no VM is.
    pub(crate) fn mark_down(&self, error: &Error, now: Instant) {
        let mut state = self.state();
        state.is_looked_for = sys::is_no_such_cid(error.cause());
        let news = state.health.mark_down(now);
        drop(state);
        self.log_failed_dial(news, error);
    }

    /// Marks the VM up, since its guest has answered a dial or has made one.
    pub(crate) fn mark_up(&self, now: Instant) {
        let news = self.state().mark_up(now);
        self.log_change(news);
    }

    /// Returns whether only its guest's answers to dials tell whether the VM runs: a connect that
    /// was begun says nothing.
    pub(crate) fn is_seen_by_dials(&self) -> bool {
        self.traits.seen_by == SeenBy::Dials
    }

    pub(crate) fn id(&self) -> GateId {
        self.id
    }

    /// Returns the VM.
    pub(crate) fn vm(&self) -> &AnyVm {
        &self.vm
    }

    /// Returns whether the caller is to look at the VM now: the last look is over, and was at least
    /// `every` ago. [`take_look`](Gate::take_look) or [`end_look`](Gate::end_look) must follow.
    pub(crate) fn begin_look(&self, now: Instant, every: Duration) -> bool {
        let mut state = self.state();
        let soon = state
            .looked_at
            .is_some_and(|at| now.saturating_duration_since(at) < every);
        if state.is_looking || soon || !state.is_worth_a_look() {
            return false;
        }
        state.is_looking = true;
        state.looked_at = Some(now);
        state.is_look_wanted = false;
        state.dialled_before_look = self.dialled.load(Ordering::Relaxed);
        true
    }

    /// Takes the result of a look at the VM.
    pub(crate) fn take_look(&self, look: &VmLook, now: Instant) {
        let mut state = self.state();
        state.is_looking = false;
        // A dial has told the identity since, and what the look saw may be older.
        if state.identified_at > state.looked_at {
            return;
        }
        let news = match look.identity {
            // One that is there and answers nothing is not up for that.
            Some(VmIdentity::Cid) if !state.is_looked_for => None,
            Some(VmIdentity::Cid) => state.mark_up(now),
            None if self.is_seen_by_dials() => {
                state.dialled_before_end = state.dialled_before_look;
                state.is_looked_for = true;
                state.health.note_absence(now)
            }
            Some(vm) => {
                let news = self.note_identity(&mut state, vm, now);
                let news = news.or(state.health.note_process(look.process, now));
                match look.is_alive {
                    true => news.or(state.health.note_listener(now)),
                    false => news,
                }
            }
            None => state.health.note_absence(now),
        };
        drop(state);
        self.log_change(news);
    }

    /// Notes that a look at the VM has failed, so that another one may be made.
    pub(crate) fn end_look(&self) {
        self.state().is_looking = false;
    }

    /// Returns whether a port on which nobody listens can be dialled. It can't where there are
    /// `guest_forwards` alone.
    pub(crate) fn can_be_probed(&self) -> bool {
        self.traits.can_be_probed && self.state().has_connect_socket
    }

    /// Notes the VM's identity. Another identity is another VM (rule 8): nothing counted for the
    /// old one applies to it.
    pub(super) fn note_identity(
        &self,
        state: &mut GateState,
        vm: VmIdentity,
        now: Instant,
    ) -> Option<News> {
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

    pub(super) fn forget_vm(&self, state: &mut GateState) {
        state.epoch += 1;
        self.heard.forget_time();
        state.quotas.clear();
        state.others = OtherSlots::default();
        (state.guests, state.turned_away) = (0, 0);
        state.has_told_turned_away = false;
        state.drains.clear();
        state.has_seen_process = false;
        state.process = None;
        state.pending = 0;
        state.next_probe = None;
        state.patience = PROBE_PATIENCE;
        let dialled = self.dialled.load(Ordering::Relaxed);
        self.answered.fetch_max(dialled, Ordering::Relaxed);
        state.wake();
    }

    /// Returns how many of the latest dials the guest has not answered, where that number is
    /// limited.
    pub(super) fn unanswered(&self) -> u64 {
        match self.traits.needs_pacing {
            true => self.open_dials(),
            false => 0,
        }
    }

    /// Returns how many of the latest dials the guest has not answered, whether that harms or not.
    pub(super) fn open_dials(&self) -> u64 {
        let answered = self.answered.load(Ordering::Relaxed);
        let dialled = self.dialled.load(Ordering::Relaxed);
        dialled.saturating_sub(answered)
    }

    /// Returns the process that has the VM's socket, as the last dial found it.
    pub(crate) fn process(&self) -> Option<i32> {
        self.state().process
    }

    pub(crate) fn status(&self, now: Instant) -> VmStatus {
        let state = self.state();
        let lost = state.quotas.live_of(Holder::Lost);
        let predecessor = state.quotas.live_of(Holder::Predecessor);
        let probes = state.quotas.live_of(Holder::Probes);
        VmStatus {
            connections: state.quotas.live() - lost - predecessor - probes,
            // One that hands over keeps fewer.
            limit: state.whole_cap.or(state.limit()),
            lost,
            predecessor,
            probes,
            guests: state.guests,
            guest_limit: state.limit().map(|_| state.guest_quota()),
            turned_away: state.turned_away,
            reserved: state.quotas.kept(),
            unanswered: self.unanswered(),
            last_heard: self.heard.at().map(|then| wall_time(then, now)),
            silent_since: state
                .silence
                .silent_since()
                .map(|then| wall_time(then, now)),
            paused: state.silence.is_stopped(),
            up: state.health.is_up().filter(|_| !state.is_hanging(now)),
            gone_since: state.health.gone_since(),
            restarts: state.health.restarts(),
        }
    }

    /// Logs a change of the VM's health.
    pub(super) fn log_change(&self, news: Option<News>) {
        self.log_news(news, None);
    }

    /// Logs a change of the VM's health that a failed dial has shown.
    fn log_failed_dial(&self, news: Option<News>, error: &Error) {
        self.log_news(news, Some(error));
    }

    fn log_news(&self, news: Option<News>, error: Option<&Error>) {
        let Some(news) = news else {
            return;
        };
        let forwards = self.state().forwards;
        let subject = format_args!("the VM at {}", self.vm);
        health::log_change(news, &subject, error, forwards);
    }

    /// Returns the connections that count against the cap now.
    #[cfg(test)]
    pub(super) fn live(&self) -> usize {
        self.state().quotas.live()
    }
}

/// The workers that are to be woken, by their numbers.
#[derive(Default)]
pub(super) struct WaitingWorkers(Vec<(usize, SlotWake)>);

impl WaitingWorkers {
    pub(super) fn add(&mut self, worker: usize, wake: &SlotWake) {
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

impl GateState {
    /// Returns the most connections; `None` if there is no such limit.
    pub(super) fn limit(&self) -> Option<usize> {
        Some(self.quotas.cap()).filter(|cap| *cap < GateLimits::UNLIMITED.live)
    }

    /// Returns whether a look can tell something that is not known. Where only dials tell, the look
    /// is a dial: it is made only while there is no such VM, so that no guest gets it, and while a
    /// dial has no answer, which may have been that of a VM that is gone.
    fn is_worth_a_look(&self) -> bool {
        match self.traits.seen_by {
            SeenBy::Files => true,
            SeenBy::Dials => {
                self.is_look_wanted || self.is_looked_for && self.health.is_up() == Some(false)
            }
        }
    }

    /// Marks the VM up. A CID that was gone and is back is another VM, though nothing else tells
    /// one from the next.
    fn mark_up(&mut self, now: Instant) -> Option<News> {
        let news = self.health.mark_up(now);
        if self.traits.seen_by == SeenBy::Dials
            && self.is_looked_for
            && matches!(news, Some(News::Up(_)))
        {
            self.health.count_restart();
        }
        news
    }

    /// Returns how many of the guest's dials are served at a time.
    pub(super) fn guest_quota(&self) -> usize {
        self.quotas.cap() - self.quotas.cap() / FOR_THE_HOST
    }

    /// Returns why a holder can have no slot, or no more than are queued for already.
    pub(super) fn why_full(&self, holder: Holder) -> Full {
        match self.quotas.kept_from(holder) {
            0 => Full::Live {
                cap: self.quotas.cap(),
                lost: self.quotas.live_of(Holder::Lost),
            },
            kept => Full::Reserved(kept),
        }
    }

    /// Reserves a slot for probes where forwards need them and it is not the only one.
    pub(super) fn reserve_for_probes(&mut self) {
        let is_probed = self.traits.can_be_probed && self.forwards.holding > 0;
        let slots = usize::from(is_probed && self.quotas.cap() > 1);
        // If the others have reserved all slots, probes get what is free.
        let _ = self.quotas.reserve(Holder::Probes, slots);
    }

    /// Counts a dial, or something else that has the device put a reply into its ring, towards the
    /// pace.
    ///
    /// # Errors
    /// Returns when it may go, if it is too soon.
    pub(super) fn keep_pace(&mut self, now: Instant) -> Result<(), Instant> {
        if !self.traits.needs_pacing {
            return Ok(());
        }
        let due = self.next_dial.unwrap_or(now);
        let earliest = due.checked_sub(INTERVAL * (BURST - 1)).unwrap_or(now);
        if now < earliest {
            return Err(earliest);
        }
        self.next_dial = Some(due.max(now) + INTERVAL);
        Ok(())
    }

    pub(super) fn forget_drain(&mut self, drain: u64) {
        if let Ok(index) = self.drains.binary_search(&drain) {
            self.drains.remove(index);
        }
    }

    /// Returns how many drains of guests that go on sending there are beyond their part of the
    /// slots, while clients wait for one.
    pub(super) fn drains_in_the_way(&self, now: Instant) -> usize {
        let lately = |at| now.saturating_duration_since(at) < WANTED;
        if self.waiting_for_slot.0.is_empty() && !self.wanted_at.is_some_and(lately) {
            return 0;
        }
        let most = (self.quotas.cap() / FOR_DRAINS).max(1);
        self.drains.len().saturating_sub(most)
    }

    /// Returns whether the last look has not ended within the time in which a file system answers.
    pub(super) fn is_hanging(&self, now: Instant) -> bool {
        let late = |at| now.saturating_duration_since(at) >= HANG_TIME;
        self.is_looking && self.looked_at.is_some_and(late)
    }

    /// Wakes the workers that wait: there may be a slot now, or a probe was answered.
    pub(super) fn wake(&mut self) {
        self.waiting_for_slot.wake(self.id);
        self.waiting_for_probe.wake(self.id);
    }
}
