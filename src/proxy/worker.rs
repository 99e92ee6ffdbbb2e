//! One thread's loop: waits, latches what came, gives each connection with work a bounded turn.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use crate::engine::Phase;
use crate::engine::connection::LAST_DRAIN;
use crate::engine::forward::Forward;
use crate::engine::table::Id;
use crate::time::after;

use super::connections::Connections;
use super::driver::{Driver, Event};
use super::listeners::Listeners;
use super::shared::{Command, Shared, TurnContext};

/// A wait that takes so much longer than asked for tells that the process stood still (SIGSTOP, a machine asleep).
const FREEZE: Duration = Duration::from_millis(500);

/// While it stops, how often a worker looks whether the others are done.
const STOP_TICK: Duration = Duration::from_millis(10);

/// Whether another turn of a worker's loop follows the one that is over.
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
    /// How long it takes at most; `None`: until something comes.
    pub(super) timeout: Option<Duration>,
}

/// A worker: its connections, its listeners, its part of the driver.
pub(crate) struct Worker<D: Driver> {
    pub(super) driver: D,
    pub(super) index: usize,
    pub(super) shared: Arc<Shared<D>>,
    pub(super) connections: Connections<D>,
    pub(super) listeners: Listeners<D>,
    /// Forwards that were removed, and when their connections are cut off.
    removed: Vec<(Instant, Arc<Forward>)>,
    pub(super) phase: Phase,
    /// When the phase [`Phase::Cutting`] begins.
    cut_at: Option<Instant>,
    /// When that one ends, whatever is still there.
    end_at: Option<Instant>,
    /// When the process went on that had stood still.
    thawed: Option<Instant>,
}

/// Calls a method of a part of the worker with what it has at hand.
macro_rules! call {
    ($self:ident.$part:ident.$method:ident($($argument:expr),*), $now:expr) => {{
        let mut cx = TurnContext {
            driver: &mut $self.driver,
            index: $self.index,
            shared: &$self.shared,
            phase: $self.phase,
            thawed: $self.thawed,
            now: $now,
        };
        $self.$part.$method($($argument,)* &mut cx)
    }};
}

impl<D: Driver> Worker<D> {
    /// One of `shared`'s; its bytes may go through pipes if `splice`.
    pub(crate) fn new(driver: D, index: usize, shared: Arc<Shared<D>>, splice: bool) -> Worker<D> {
        let pipes = match splice {
            true => shared.descriptors.pipes_of_a_worker(),
            false => 0,
        };
        Worker {
            driver,
            index,
            shared,
            connections: Connections::new(pipes),
            listeners: Listeners::default(),
            removed: Vec::new(),
            phase: Phase::Running,
            cut_at: None,
            end_at: None,
            thawed: None,
        }
    }

    /// Takes over a bound listener.
    ///
    /// # Errors
    /// The poller can't watch it.
    pub(crate) fn add_listener(
        &mut self,
        listener: D::Listener,
        forward: Arc<Forward>,
    ) -> io::Result<()> {
        let now = self.driver.now();
        call!(self.listeners.add(listener, forward), now)
    }

    /// Runs until the proxy has stopped.
    ///
    /// # Errors
    /// What the poller says, if it can't wait any more.
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

    /// Returns the wait that is to come before the next turn.
    pub(super) fn next_wait(&self) -> Wait {
        let begun = self.driver.now();
        let timeout = self.timeout(begun);
        Wait { begun, timeout }
    }

    /// Does what is to be done after a wait, and takes the events out that it brought.
    ///
    /// # Errors
    /// As those of [`run`](Worker::run).
    pub(super) fn turn(
        &mut self,
        events: &mut Vec<Event<D::Stream, D::Listener>>,
        wait: Wait,
    ) -> io::Result<Turn> {
        let now = self.driver.now();
        if wait
            .timeout
            .is_some_and(|timeout| now > after(wait.begun, timeout) + FREEZE)
        {
            self.thawed = Some(now);
            // Guests may have stood still as well.
            self.end_at = self.end_at.map(|at| at.max(now + LAST_DRAIN));
        }
        if self.connections.has_due_timer(now) {
            // Invariant 9: what has come is read before a timer is believed. The process may have
            // stood still since the events were fetched, and may so have missed what tells that a
            // peer is not idle.
            self.driver.wait(events, Some(Duration::ZERO))?;
        }
        for event in events.drain(..) {
            self.take_event(event, now);
        }
        for command in self.shared.inboxes[self.index].take() {
            self.obey(command, now);
        }
        call!(self.listeners.take_turns(), now);
        self.adopt_accepted(now);
        call!(self.connections.take_turns(), now);
        self.cut_removed(now);
        if self.cut_at.is_some_and(|at| at <= now) {
            self.cut_all(now);
        }
        if self.phase > Phase::Running && self.is_over(now) {
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

    fn take_event(&mut self, event: Event<D::Stream, D::Listener>, now: Instant) {
        match event {
            Event::Ready { token, readiness } if token < Id::FIRST => {
                // That a pipe's client has come makes it writable.
                if readiness.readable || readiness.writable {
                    self.listeners.latch(token);
                }
            }
            Event::VmSeen {
                gate,
                identity,
                process,
            } => gate.take_look(identity, process, now),
            Event::Listener { of, found } => {
                call!(self.listeners.take_listener(of, found), now);
                self.adopt_accepted(now);
            }
            event => call!(self.connections.take_event(event), now),
        }
    }

    /// Does what the worker is told. Whoever asked may have given up by now.
    fn obey(&mut self, command: Command<D>, now: Instant) {
        match command {
            Command::Adopt(accepted) => call!(self.connections.adopt(accepted), now),
            Command::Listen(listener, forward, wanted, done) => match wanted.begin() {
                true => drop(done.send(call!(self.listeners.add(listener, forward), now))),
                false => call!(self.listeners.give_up(listener, forward), now),
            },
            Command::Replace(forward, wanted, done) => {
                if wanted.begin() {
                    self.listeners.replace_forward(forward);
                    let _ = done.send(());
                }
            }
            Command::SetMode(forward, mode, wanted, done) => {
                call!(self.listeners.set_mode(forward, mode, wanted, done), now);
            }
            Command::Remove(forward, grace, done) => self.remove(forward, grace, done, now),
            Command::Ping(done) => drop(done.send(())),
            Command::ListConnections(done) => {
                drop(done.send(call!(self.connections.statuses(), now)))
            }
            Command::Stop(grace) => self.stop(grace, now),
        }
        self.adopt_accepted(now);
    }

    fn adopt_accepted(&mut self, now: Instant) {
        for accepted in self.listeners.take_accepted() {
            call!(self.connections.adopt(accepted), now);
        }
    }

    /// Returns how long there is nothing to do unless something comes; `None`: for ever.
    fn timeout(&self, now: Instant) -> Option<Duration> {
        // mio's poll fallback may lose a wake-up while a socket is registered: so the inbox is looked into as well.
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
            self.removed.iter().map(|(at, _)| *at).min(),
        ]
        .into_iter()
        .flatten()
        .min();
        next.map(|at| at.saturating_duration_since(now))
    }

    fn stop(&mut self, grace: Duration, now: Instant) {
        let at = after(now, grace);
        self.cut_at = Some(self.cut_at.map_or(at, |before| before.min(at)));
        if self.phase == Phase::Running {
            // Who is connected by now, as far as the kernel is concerned, is still served.
            self.accept_all(now);
            self.phase = Phase::Stopping;
            self.shared.stopping.fetch_add(1, Ordering::AcqRel);
            call!(self.listeners.close_those_of_clients(), now);
            call!(self.connections.begin_to_stop(), now);
        }
    }

    /// Takes a forward out: nobody is accepted any more, and who is there has that time.
    fn remove(&mut self, forward: Arc<Forward>, grace: Duration, tell: Sender<()>, now: Instant) {
        call!(self.listeners.remove(forward.id, tell), now);
        self.adopt_accepted(now);
        // First this: whoever accepted the last one has counted it before.
        let may_come = |it: &Forward| !it.closed.load(Ordering::Acquire);
        let has_some = |it: &Forward| it.tally.live.load(Ordering::Relaxed) > 0;
        self.removed
            .retain(|(_, before)| may_come(before) || has_some(before));
        self.removed.push((after(now, grace), forward));
    }

    /// Cuts off the connections of removed forwards whose time has come.
    fn cut_removed(&mut self, now: Instant) {
        let due = self.removed.extract_if(.., |(at, _)| *at <= now);
        for (_, forward) in due.collect::<Vec<_>>() {
            // What is handed over after this is cut off when it comes.
            forward.cut.store(true, Ordering::Release);
            call!(self.connections.cut(Some(forward.id)), now);
        }
    }

    fn cut_all(&mut self, now: Instant) {
        self.cut_at = None;
        if self.phase < Phase::Cutting {
            self.phase = Phase::Cutting;
            // Guests that go on dialling each get their leave, but can't keep us for ever.
            self.end_at = Some(now + 2 * LAST_DRAIN);
            call!(self.connections.cut(None), now);
        }
    }

    /// Accepts all that wait at the listeners now.
    fn accept_all(&mut self, now: Instant) {
        call!(self.listeners.accept_all(), now);
        self.adopt_accepted(now);
    }

    /// All connections of all workers have ended, none can be handed over any more, and no guest waits at the door.
    fn is_over(&mut self, now: Instant) -> bool {
        // First this: who has not heard of the end yet may still count a connection and hand it to us.
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
