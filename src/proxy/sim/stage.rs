//! The stage of one run: who acts when, on which clock, in an order that the seed draws.
//!
//! All that could happen at one time is listed (a worker's turn, an actor's, a delivery of the
//! network, a job of the housekeeper), and one of it is drawn. When nothing can happen, the clock
//! goes on to the next time at which something can.

use std::cell::{Cell, Ref, RefCell, RefMut};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fastrand::Rng;

use crate::engine::admission::Wake;
use crate::engine::connection::State;
use crate::proxy::driver::{Driver, DriverEvent};
use crate::proxy::worker::{Turn, Wait, Worker};

use super::driver::{SimDriver, SimListener, SimStream, SimWorld, set_world};
use super::judge::Judge;
use super::kernel::Kernel;
use super::world::World;

/// More steps than any run needs, and those that it may take for each second on its clock: what
/// can't go on is looked at again every 20 ms.
const MOST_STEPS: u64 = 100_000;
const STEPS_A_SECOND: u64 = 1_000;

/// A wait that takes so much longer means that the process stood still.
const FREEZE: Duration = Duration::from_millis(500);

/// So many turns of a worker without progress, at one time, are a spin; and so many of all workers,
/// which wake each other.
const SPIN: u32 = 3;
const SPIN_TOGETHER: u32 = 200;

type SimEvent = DriverEvent<SimStream, SimListener>;

/// Something that acts: a client, a server, a VM, an operator.
pub(super) trait Actor {
    fn describe(&self) -> String;
    /// Does what it can do now, or a part of it; returns when it wants to act again, if nothing
    /// happens to its sockets before.
    fn act(&mut self, stage: &Rc<Stage>) -> Option<Duration>;
    /// Whether it has nothing left to do.
    fn is_done(&self) -> bool;
}

struct Seat {
    /// Until when it stands still; its events it has got before.
    stalled: Option<Duration>,
    worker: Worker<SimDriver>,
    wait: Wait,
    events: Vec<SimEvent>,
    /// Turns without progress, and when they were.
    idle: (Duration, u32),
}

pub(super) struct Stage {
    pub(super) world: Rc<SimWorld>,
    seats: RefCell<Vec<Option<Seat>>>,
    wakes: Vec<Arc<AtomicBool>>,
    cast: RefCell<Vec<Option<Box<dyn Actor>>>>,
    dues: RefCell<Vec<Option<Duration>>>,
    awake: RefCell<Vec<usize>>,
    judge: RefCell<Judge>,
    steps: Cell<u64>,
    /// Turns of all workers without progress: since when, and at which point.
    idle: Cell<(Duration, u64, u32)>,
}

impl std::fmt::Debug for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stage").finish_non_exhaustive()
    }
}

thread_local! {
    /// The stage of the run on this thread.
    static STAGE: RefCell<Option<Rc<Stage>>> = const { RefCell::new(None) };
}

/// Sets the stage of this thread, and its world.
pub(super) fn set_stage(stage: Option<Rc<Stage>>) {
    let world = stage.as_ref().map(|stage| Rc::clone(&stage.world));
    set_world(world, |end| this_stage().step_until(end));
    STAGE.with(|it| *it.borrow_mut() = stage);
}

/// Returns the stage of this thread.
pub(super) fn this_stage() -> Rc<Stage> {
    STAGE.with(|it| it.borrow().clone().expect("no run on this thread"))
}

impl Stage {
    pub(super) fn new(kernel: Kernel, workers: usize, rng: Rng, logs: bool) -> Rc<Stage> {
        Rc::new(Stage {
            world: Rc::new(World::new(kernel, workers, rng, logs)),
            seats: RefCell::default(),
            wakes: (0..workers).map(|_| Arc::default()).collect(),
            cast: RefCell::default(),
            dues: RefCell::default(),
            awake: RefCell::default(),
            judge: RefCell::default(),
            steps: Cell::new(0),
            idle: Cell::default(),
        })
    }

    pub(super) fn kernel(&self) -> RefMut<'_, Kernel> {
        self.world.kernel()
    }

    pub(super) fn now(&self) -> Duration {
        self.world.now()
    }

    /// Adds a line to the story, if one is told.
    pub(super) fn log(&self, line: impl FnOnce() -> String) {
        self.world.log(line);
    }

    pub(super) fn judge(&self) -> RefMut<'_, Judge> {
        self.judge.borrow_mut()
    }

    pub(super) fn verdicts(&self) -> Ref<'_, Judge> {
        self.judge.borrow()
    }

    pub(super) fn steps(&self) -> u64 {
        self.steps.get()
    }

    /// What wakes a worker.
    pub(super) fn wake_of(&self, worker: usize) -> Wake {
        let flag = Arc::clone(&self.wakes[worker]);
        Arc::new(move || flag.store(true, Ordering::Relaxed))
    }

    /// Puts the workers on the stage.
    pub(super) fn seat(&self, workers: Vec<Worker<SimDriver>>) {
        let seats = workers.into_iter().map(|worker| {
            Some(Seat {
                stalled: None,
                wait: worker.next_wait(),
                worker,
                events: Vec::new(),
                idle: (Duration::ZERO, 0),
            })
        });
        *self.seats.borrow_mut() = seats.collect();
    }

    /// Takes all off the stage: what is still there knows the stage, and would keep it.
    pub(super) fn clear(&self) {
        let seats = std::mem::take(&mut *self.seats.borrow_mut());
        drop(seats);
        let jobs = std::mem::take(&mut *self.world.jobs.borrow_mut());
        drop(jobs);
        let cast = std::mem::take(&mut *self.cast.borrow_mut());
        drop(cast);
        let mail = std::mem::take(&mut *self.world.mail.borrow_mut());
        drop(mail);
    }

    /// The number that the next actor will have.
    pub(super) fn next_actor(&self) -> usize {
        self.cast.borrow().len()
    }

    /// Adds an actor, which acts first at that time.
    pub(super) fn add(&self, actor: Box<dyn Actor>, at: Duration) -> usize {
        self.cast.borrow_mut().push(Some(actor));
        self.dues.borrow_mut().push(Some(at));
        self.next_actor() - 1
    }

    /// Puts an event into a worker's mail; what comes after its end is dropped.
    fn post(&self, worker: usize, event: SimEvent) {
        let has_ended = self.seats.borrow().get(worker).is_none_or(Option::is_none);
        match self.world.mail.borrow_mut().get_mut(worker) {
            Some(mail) if !has_ended => mail.push(event),
            _ => {}
        }
    }

    /// Lets the machine sleep: nothing happens meanwhile.
    pub(super) fn sleep(&self, time: Duration) {
        self.kernel().now += time;
        let now = self.now();
        self.judge().stands_still(now);
    }

    /// Lets a worker stand still, after it has got its events.
    pub(super) fn stall(&self, worker: usize, until: Duration) {
        let mut seats = self.seats.borrow_mut();
        if let Some(Some(seat)) = seats.get_mut(worker)
            && seat.stalled.is_none()
        {
            let _ = seat.worker.driver.wait(&mut seat.events, None);
            seat.stalled = Some(until);
            self.judge().stands_still(until);
        }
    }

    /// Lets all workers go on.
    pub(super) fn end_stalls(&self) {
        let now = self.now();
        for seat in self.seats.borrow_mut().iter_mut().flatten() {
            seat.stalled = seat.stalled.map(|until| until.min(now));
        }
    }

    /// Until when workers stand still.
    pub(super) fn stalled_until(&self) -> Duration {
        self.verdicts().audit.still()
    }

    /// Does one thing, or lets time pass until one can be done; false once it is `end`.
    pub(super) fn step_until(&self, end: Duration) -> bool {
        if self.now() >= end {
            return false;
        }
        self.step(Some(end))
    }

    /// Does one thing, or lets time pass; false if nothing will ever happen by itself.
    pub(super) fn step(&self, end: Option<Duration>) -> bool {
        #[derive(Clone, Copy)]
        enum What {
            Worker(usize),
            Actor(usize),
            Network,
            Job(usize),
        }
        self.steps.set(self.steps.get() + 1);
        let now = self.now();
        let most = MOST_STEPS + now.as_secs() * STEPS_A_SECOND;
        assert!(self.steps.get() < most, "the run doesn't end");
        let mut next: Option<Duration> = end;
        let mut can: Vec<What> = Vec::with_capacity(8);
        let mut at = |when: Duration, what: What, can: &mut Vec<What>| match when <= now {
            true => can.push(what),
            false => next = Some(next.map_or(when, |before| before.min(when))),
        };
        for (index, seat) in self.seats.borrow().iter().enumerate() {
            let Some(seat) = seat else { continue };
            if let Some(until) = seat.stalled {
                at(until, What::Worker(index), &mut can);
                continue;
            }
            let is_woken = self.wakes[index].load(Ordering::Relaxed)
                || self.kernel().has_events(index)
                || !self.world.mail.borrow()[index].is_empty();
            let due = seat.wait.timeout.map(|timeout| {
                let begun = self.world.time_of(seat.wait.begun);
                begun.saturating_add(timeout)
            });
            match (is_woken, due) {
                (true, _) => at(now, What::Worker(index), &mut can),
                (false, Some(due)) => at(due, What::Worker(index), &mut can),
                (false, None) => {}
            }
        }
        let woken = self.kernel().take_woken();
        let mut awake = self.awake.borrow_mut();
        for actor in woken {
            if !awake.contains(&actor) {
                awake.push(actor);
            }
        }
        for (index, due) in self.dues.borrow().iter().enumerate() {
            if self.cast.borrow()[index].is_none() {
                continue;
            }
            if awake.contains(&index) {
                at(now, What::Actor(index), &mut can);
            } else if let Some(due) = due {
                at(*due, What::Actor(index), &mut can);
            }
        }
        drop(awake);
        if let Some(when) = self.kernel().next_move() {
            at(when, What::Network, &mut can);
        }
        for (index, job) in self.world.jobs.borrow().iter().enumerate() {
            at(job.at, What::Job(index), &mut can);
        }
        if can.is_empty() {
            return match next {
                Some(next) => {
                    self.check_times();
                    self.kernel().now = next;
                    true
                }
                None => false,
            };
        }
        let drawn = self.world.rng().usize(..can.len());
        match can[drawn] {
            What::Worker(index) => self.turn(index),
            What::Actor(index) => self.act(index),
            What::Network => drop(self.kernel().make_move()),
            What::Job(index) => {
                let job = self.world.jobs.borrow_mut().swap_remove(index);
                if let Some(event) = (job.run)(&self.world) {
                    self.post(job.worker, event);
                }
            }
        }
        true
    }

    /// The connections of a worker that wait for an answer which is there, and their clients for
    /// them.
    fn answered(&self, worker: &mut Worker<SimDriver>) -> Vec<u64> {
        let kernel = self.kernel();
        let mut answered = Vec::new();
        for id in worker.connections.table.ids() {
            let Some(conn) = worker.connections.table.get_mut(id) else {
                continue;
            };
            if let (State::Connecting { client, server, .. }, Some(name)) = (&conn.state, conn.name)
                && !kernel.is_unix(server.socket.id)
                && [client, server]
                    .iter()
                    .all(|end| kernel.is_sound(end.socket.id))
            {
                answered.push(name.into());
            }
        }
        answered
    }

    fn check_times(&self) {
        for seat in self.seats.borrow_mut().iter_mut().flatten() {
            let verdicts = self.verdicts();
            verdicts.audit.check_times(&mut seat.worker, &self.world);
            if seat.stalled.is_none() {
                verdicts.audit.check_listeners(&seat.worker, &self.world);
            }
        }
    }

    fn act(&self, index: usize) {
        self.awake.borrow_mut().retain(|actor| *actor != index);
        let Some(mut actor) = self.cast.borrow_mut()[index].take() else {
            return;
        };
        let due = actor.act(&this_stage());
        self.dues.borrow_mut()[index] = due;
        self.cast.borrow_mut()[index] = Some(actor);
    }

    fn turn(&self, index: usize) {
        let Some(mut seat) = self.seats.borrow_mut()[index].take() else {
            return;
        };
        let now = self.now();
        let woken = self.wakes[index].swap(false, Ordering::Relaxed);
        let progress = self.kernel().progress;
        if seat.stalled.take().is_none() {
            let _ = seat.worker.driver.wait(&mut seat.events, None);
        }
        let has_events = !seat.events.is_empty();
        let due = seat.wait.timeout.map(|timeout| seat.wait.begun + timeout);
        let answered = match due.is_some_and(|at| self.world.instant() > at + FREEZE) {
            true => self.answered(&mut seat.worker),
            false => Vec::new(),
        };
        let turn = seat.worker.turn(&mut seat.events, seat.wait);
        let turn = turn.expect("a simulated poller does not fail");
        for connection in answered {
            assert!(
                !self.verdicts().ledger.has_timed_out(connection),
                "connection {connection} had its answer while the process stood still"
            );
        }
        self.judge().look_at(index, &mut seat.worker, &self.world);
        if turn == Turn::Last {
            let shared = Arc::clone(&seat.worker.shared);
            drop(seat);
            let mail = self.world.take_mail(index);
            drop(mail);
            shared.note_worker_end(index, &Ok(()));
            self.log(|| format!("worker {index} has ended"));
            return;
        }
        seat.wait = seat.worker.next_wait();
        let wants_more = seat.wait.timeout == Some(Duration::ZERO);
        let moved = woken || has_events || self.kernel().progress > progress;
        seat.idle = match wants_more && !moved {
            true if seat.idle.0 == now => (now, seat.idle.1 + 1),
            true => (now, 1),
            false => (now, 0),
        };
        assert!(seat.idle.1 < SPIN, "worker {index} spins");
        let progress = self.kernel().progress;
        let idle = match self.idle.get() {
            (since, point, turns) if since == now && point == progress => turns + 1,
            _ => 0,
        };
        assert!(idle < SPIN_TOGETHER, "workers wake each other");
        self.idle.set((now, progress, idle));
        self.seats.borrow_mut()[index] = Some(seat);
    }

    /// Whether all workers have ended.
    pub(super) fn is_over(&self) -> bool {
        self.seats.borrow().iter().all(Option::is_none)
    }

    /// Whether all actors have done what they wanted.
    pub(super) fn is_played(&self) -> bool {
        let cast = self.cast.borrow();
        cast.iter().flatten().all(|actor| actor.is_done())
    }

    /// What those actors are that have not.
    pub(super) fn unfinished(&self) -> Vec<String> {
        let cast = self.cast.borrow();
        let left = cast.iter().flatten().filter(|actor| !actor.is_done());
        left.map(|actor| actor.describe()).collect()
    }
}
