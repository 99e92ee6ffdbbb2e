//! The loop of one thread: it waits, latches events, and gives each connection with work a bounded
//! turn.
//!
//! It does not know what a family of sockets does, nor what a connection is about to do next.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::engine::Phase;
use crate::engine::admission::SilenceCheck;
use crate::engine::connection::LAST_DRAIN;
use crate::engine::end_reason::EndReason;
use crate::engine::forward::Forward;
use crate::engine::id::ForwardId;
use crate::engine::table::Id;
use crate::time::after;

use super::connections::Connections;
use super::cuts::Cuts;
use super::driver::{Driver, DriverEvent};
use super::listeners::Listeners;
use super::shared::{Shared, TurnContext, WorkerCommand};

/// How much longer than asked for a wait must take to mean that the process was frozen (SIGSTOP, a
/// sleeping machine).
const FREEZE: Duration = Duration::from_millis(500);

/// How often a worker checks during the stop whether the others are done.
const STOP_TICK: Duration = Duration::from_millis(10);

/// How many removed forwards are looked at when another is removed, so that those of which nothing
/// is left are forgotten.
const FORGOTTEN_PER_REMOVAL: usize = 4;

/// Whether another turn of the loop follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    Again,
    /// The proxy has stopped.
    Last,
}

/// A wait for events, before a turn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    pub(super) begun: Instant,
    /// The longest time of the wait. `None`: until an event comes.
    pub(super) timeout: Option<Duration>,
}

/// A worker, with its connections, its listeners and its driver.
pub(crate) struct Worker<D: Driver> {
    pub(super) driver: D,
    pub(super) index: usize,
    pub(super) shared: Arc<Shared<D>>,
    pub(super) connections: Connections<D>,
    pub(super) listeners: Listeners<D>,
    /// The removed forwards whose connections go on, each with the time at which its connections
    /// are cut off, and where that is noted.
    removed: BTreeMap<(Instant, ForwardId), (Arc<Forward>, Arc<Cuts>)>,
    /// The removed forward that was looked at last, to be forgotten if nothing of it is left.
    looked_at: Option<(Instant, ForwardId)>,
    pub(super) phase: Phase,
    /// The time at which [`Phase::Cutting`] begins.
    cut_at: Option<Instant>,
    /// The time at which that phase ends, whatever is left.
    end_at: Option<Instant>,
    /// The time at which the process last went on after a freeze.
    resumed_at: Option<Instant>,
}

/// Calls a method of a part of the worker with the context of this turn.
macro_rules! call {
    ($self:ident.$part:ident.$method:ident($($argument:expr),*), $now:expr) => {{
        let mut cx = TurnContext {
            driver: &mut $self.driver,
            index: $self.index,
            shared: &$self.shared,
            phase: $self.phase,
            resumed_at: $self.resumed_at,
            now: $now,
        };
        $self.$part.$method($($argument,)* &mut cx)
    }};
}

impl<D: Driver> Worker<D> {
    /// Makes a worker of `shared`. Its bytes may pass through so many pipes at a time.
    pub(crate) fn new(driver: D, index: usize, shared: Arc<Shared<D>>, pipes: usize) -> Worker<D> {
        let carried = Arc::clone(&shared.inboxes[index].carried);
        Worker {
            driver,
            index,
            shared,
            connections: Connections::new(pipes, carried),
            listeners: Listeners::default(),
            removed: BTreeMap::new(),
            looked_at: None,
            phase: Phase::Running,
            cut_at: None,
            end_at: None,
            resumed_at: None,
        }
    }

    /// Adds a bound listener.
    ///
    /// # Errors
    /// Returns the poller's error, if it can't watch the listener.
    pub(crate) fn add_listener(
        &mut self,
        listener: D::Listener,
        forward: Arc<Forward>,
    ) -> io::Result<()> {
        let now = self.driver.now();
        call!(self.listeners.add(listener, forward), now)
    }

    /// Returns whether the process has stood still.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn has_slept(&self) -> bool {
        self.resumed_at.is_some()
    }

    /// Runs until the proxy has stopped.
    ///
    /// # Errors
    /// Returns the poller's error, if it can't wait any more.
    pub(crate) fn run(mut self) -> io::Result<()> {
        let mut events = Vec::new();
        loop {
            let wait = self.next_wait();
            self.driver.wait(&mut events, wait.timeout)?;
            if self.turn(&mut events, wait)? == Turn::Last {
                return Ok(());
            }
        }
    }

    /// Returns the wait before the next turn.
    pub(super) fn next_wait(&self) -> Wait {
        let begun = self.driver.now();
        let timeout = self.timeout(begun);
        Wait { begun, timeout }
    }

    /// Does the work of one turn after a wait, and drains the events that it returned.
    ///
    /// # Errors
    /// Returns the errors of [`run`](Worker::run).
    pub(super) fn turn(
        &mut self,
        events: &mut Vec<DriverEvent<D::Stream, D::Listener>>,
        wait: Wait,
    ) -> io::Result<Turn> {
        let now = self.driver.now();
        if wait
            .timeout
            .is_some_and(|timeout| now > after(wait.begun, timeout) + FREEZE)
        {
            self.resumed_at = Some(now);
            // Guests may have been frozen as well.
            self.end_at = self.end_at.map(|at| at.max(now + LAST_DRAIN));
        }
        if self.connections.has_due_timer(now) {
            // Invariant 9: what has come is read before a timer is believed. The process may have
            // been frozen since the events were fetched, and may so have missed the event that
            // shows that a peer is not idle.
            self.driver.wait(events, Some(Duration::ZERO))?;
        }
        for event in events.drain(..) {
            self.take_event(event, now);
        }
        for command in self.shared.inboxes[self.index].take() {
            self.run_command(command, now);
        }
        call!(self.listeners.take_turns(), now);
        self.adopt_accepted(now);
        call!(self.connections.take_turns(), now);
        self.cut_removed(now);
        if self.cut_at.is_some_and(|at| at <= now) {
            self.cut_all(now);
        }
        if self.phase > Phase::Running && self.is_over(now) {
            if self.phase < Phase::Cutting {
                self.shared.cuts.finish_worker();
            }
            call!(self.listeners.close_all(), now);
            return Ok(Turn::Last);
        }
        if self.end_at.is_some_and(|at| at <= now) {
            call!(self.listeners.close_all(), now);
            call!(self.connections.abandon_all(), now);
            return Ok(Turn::Last);
        }
        Ok(Turn::Again)
    }

    /// Passes an event to the part of the worker that it is about.
    fn take_event(&mut self, event: DriverEvent<D::Stream, D::Listener>, now: Instant) {
        match event {
            DriverEvent::Ready { token, readiness } if token < Id::FIRST => {
                // A client of a named pipe makes it writable.
                if readiness.readable || readiness.writable {
                    self.listeners.latch(token);
                }
            }
            DriverEvent::VmSeen { gate, look } => {
                gate.take_look(&look, now);
                if self.phase == Phase::Running
                    && gate.check_silence(look.process_state, now) == SilenceCheck::ProbeWanted
                {
                    call!(self.connections.probe_silent_vm(&gate), now);
                }
            }
            DriverEvent::LookFailed { gate } => gate.end_look(),
            DriverEvent::Listener { of, found } => {
                call!(self.listeners.take_listener(of, found), now);
                self.adopt_accepted(now);
            }
            event => call!(self.connections.take_event(event), now),
        }
    }

    /// Carries out a command. The thread that sent it may have given up by now.
    fn run_command(&mut self, command: WorkerCommand<D>, now: Instant) {
        match command {
            WorkerCommand::Adopt(accepted) => call!(self.connections.adopt(accepted), now),
            WorkerCommand::Listen(listener, forward, wanted, done) => match wanted.begin() {
                true => drop(done.send(call!(self.listeners.add(listener, forward), now))),
                false => call!(self.listeners.give_up(listener, forward), now),
            },
            WorkerCommand::Replace(forward, wanted, done) => {
                if wanted.begin() {
                    self.listeners.replace_forward(forward, now);
                    let _ = done.send(());
                }
            }
            WorkerCommand::SetAccess(forward, access, wanted, done) => {
                call!(
                    self.listeners.set_access(forward, access, wanted, done),
                    now
                );
            }
            WorkerCommand::Remove(forward, grace, cuts, done) => {
                call!(self.listeners.remove(forward.id, done), now);
                self.adopt_accepted(now);
                self.remove((forward, cuts), after(now, grace));
            }
            #[cfg(all(unix, feature = "cli"))]
            WorkerCommand::SetAccepting(accepting, done) => {
                call!(self.listeners.set_accepting(accepting), now);
                let _ = done.send(());
            }
            #[cfg(all(unix, feature = "cli"))]
            WorkerCommand::Lend(done) => {
                drop(done.send(call!(self.listeners.lend_listeners(), now)))
            }
            #[cfg(all(unix, feature = "cli"))]
            WorkerCommand::Give(forwards, done) => {
                call!(self.listeners.give_listeners(&forwards), now);
                let _ = done.send(());
            }
            WorkerCommand::Ping(done) => drop(done.send(())),
            WorkerCommand::ListConnections(done) => {
                drop(done.send(call!(self.connections.statuses(), now)))
            }
            WorkerCommand::Close(name, done) => {
                drop(done.send(call!(self.connections.close(name), now)))
            }
            WorkerCommand::Stop(grace) => self.stop(grace, now),
        }
        self.adopt_accepted(now);
    }

    /// Takes over the clients that were accepted for this worker.
    fn adopt_accepted(&mut self, now: Instant) {
        for accepted in self.listeners.take_accepted() {
            call!(self.connections.adopt(accepted), now);
        }
    }

    /// Returns how long there is nothing to do unless an event comes; `None` means for ever.
    fn timeout(&self, now: Instant) -> Option<Duration> {
        // mio's fallback by poll(2) may lose a wake-up that comes while a socket is being
        // registered, so the inbox is checked as well.
        if !self.shared.inboxes[self.index].is_empty() {
            return Some(Duration::ZERO);
        }
        let stop = (self.phase > Phase::Running).then(|| now + STOP_TICK);
        let next = [
            stop,
            self.cut_at,
            self.end_at,
            self.connections.next(now),
            self.listeners.next(now),
            self.removed.keys().next().map(|(at, _)| *at),
        ]
        .into_iter()
        .flatten()
        .min();
        next.map(|at| at.saturating_duration_since(now))
    }

    /// Begins to stop: accepts no more clients, and cuts all connections off after `grace`.
    fn stop(&mut self, grace: Duration, now: Instant) {
        let at = after(now, grace);
        self.cut_at = Some(self.cut_at.map_or(at, |before| before.min(at)));
        if self.phase == Phase::Running {
            // A client that the kernel has connected by now is still served.
            self.accept_all(now);
            self.phase = Phase::Stopping;
            self.shared.stopping.fetch_add(1, Ordering::AcqRel);
            call!(self.listeners.close_client_listeners(), now);
            call!(self.connections.begin_to_stop(), now);
        }
    }

    /// Has the connections of a removed forward cut off at `at`.
    fn remove(&mut self, removed: (Arc<Forward>, Arc<Cuts>), at: Instant) {
        self.removed.insert((at, removed.0.id), removed);
        // Those of which nothing is left are forgotten sooner: each removal looks at a few.
        for _ in 0..FORGOTTEN_PER_REMOVAL {
            let next = match self.looked_at {
                Some(last) => self.removed.range((Excluded(last), Unbounded)).next(),
                None => self.removed.iter().next(),
            };
            let Some((&key, (forward, cuts))) = next else {
                self.looked_at = None;
                break;
            };
            // This is read first: the worker that accepted the last client has counted it before.
            let may_come = !forward.closed.load(Ordering::Acquire);
            if !may_come && forward.tally.live.load(Ordering::Relaxed) == 0 {
                cuts.finish_worker();
                self.removed.remove(&key);
            }
            self.looked_at = Some(key);
        }
    }

    /// Cuts off the connections of removed forwards whose grace is over.
    fn cut_removed(&mut self, now: Instant) {
        let mut cut = HashMap::new();
        while let Some(first) = self.removed.first_entry().filter(|it| it.key().0 <= now) {
            let (forward, cuts) = first.remove();
            // A connection that is handed over after this is cut off when it arrives.
            forward.cut.store(true, Ordering::Release);
            cut.insert(forward.id, cuts);
        }
        if !cut.is_empty() {
            call!(self.connections.cut_those_of(&cut, EndReason::Removed), now);
            cut.values().for_each(|cuts| cuts.finish_worker());
        }
    }

    /// Cuts all connections off. Guests have a moment more to end theirs.
    fn cut_all(&mut self, now: Instant) {
        self.cut_at = None;
        if self.phase < Phase::Cutting {
            self.phase = Phase::Cutting;
            // Guests that go on dialling are each closed gracefully, but can't delay the end for
            // ever.
            self.end_at = Some(now + 2 * LAST_DRAIN);
            let cuts = &Arc::clone(&self.shared).cuts;
            call!(self.connections.cut_all(cuts, EndReason::Stopped), now);
            cuts.finish_worker();
        }
    }

    /// Accepts all clients that wait at the listeners now.
    fn accept_all(&mut self, now: Instant) {
        call!(self.listeners.accept_all(), now);
        self.adopt_accepted(now);
    }

    /// Returns whether the connections of all workers have ended, none can be handed over any more,
    /// and no guest waits to be accepted.
    fn is_over(&mut self, now: Instant) -> bool {
        // This is read first: a worker that has not received the stop yet may still count a
        // connection and hand it over.
        if self.shared.stopping.load(Ordering::Acquire) < self.shared.inboxes.len() {
            return false;
        }
        let none = |shared: &Shared<D>| shared.live.load(Ordering::Acquire) == 0;
        if !none(&self.shared) {
            return false;
        }
        self.accept_all(now);
        none(&self.shared)
    }
}
