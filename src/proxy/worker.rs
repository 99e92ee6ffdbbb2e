//! One thread's loop: waits, latches what came, gives each connection with work a bounded turn.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::relay::Pool;

use super::Limits;
use super::accept::Listening;
use super::conn::Conn;
use super::dialling::DialQueue;
use super::forward::Forward;
use super::leaving::LAST_LEAVE;
use super::table::{Id, Table};
use super::world::{Event, World};

/// Bytes a buffer holds. A pair in flight borrows at most two.
const BUFFER: usize = 64 * 1024;

/// Unused buffers that a worker keeps.
const KEEP: usize = 64;

/// While it stops, how often a worker looks whether the others are done.
const STOP_TICK: Duration = Duration::from_millis(10);

/// How far the proxy is on its way to the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    Running,
    /// No new clients; those that are there go on.
    Stopping,
    /// Clients are cut off; guests are still taken leave of politely.
    Cutting,
}

/// What a worker is told by others.
#[derive(Debug)]
pub(crate) enum Command<S> {
    /// Carry this accepted connection.
    Adopt(S, Arc<Forward>),
    /// Accept no more clients, and cut off those that are there after this time.
    Stop(Duration),
}

/// What a worker is told, and how it is woken to listen.
pub(crate) struct Inbox<S> {
    commands: Mutex<Vec<Command<S>>>,
    /// Connections of this worker.
    pub(crate) load: AtomicUsize,
    wake: Box<dyn Fn() + Send + Sync>,
}

impl<S> Inbox<S> {
    pub(crate) fn new(wake: impl Fn() + Send + Sync + 'static) -> Inbox<S> {
        Inbox {
            commands: Mutex::default(),
            load: AtomicUsize::new(0),
            wake: Box::new(wake),
        }
    }

    pub(crate) fn send(&self, command: Command<S>) {
        self.commands
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(command);
        (self.wake)();
    }

    fn is_empty(&self) -> bool {
        self.commands
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_empty()
    }

    fn take(&self) -> Vec<Command<S>> {
        std::mem::take(&mut *self.commands.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<S> std::fmt::Debug for Inbox<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox")
            .field("load", &self.load)
            .finish_non_exhaustive()
    }
}

/// What the workers of a proxy share.
#[derive(Debug)]
pub(crate) struct Shared<S> {
    pub(crate) limits: Limits,
    pub(crate) forwards: Vec<Arc<Forward>>,
    pub(crate) inboxes: Vec<Inbox<S>>,
    /// Connections of all workers, counted from the accept on.
    pub(crate) live: AtomicUsize,
    /// Workers that have heard of the end: they hand nothing over any more.
    pub(crate) stopping: AtomicUsize,
}

/// A worker: its connections, its listeners, its part of the world.
pub(crate) struct Worker<W: World> {
    pub(super) world: W,
    pub(super) index: usize,
    pub(super) shared: Arc<Shared<W::Stream>>,
    pub(super) conns: Table<Conn<W::Stream>>,
    pub(super) listeners: Vec<Listening<W::Listener>>,
    pub(super) queues: Vec<DialQueue>,
    pub(super) pool: Pool,
    pub(super) phase: Phase,
    /// When the phase [`Phase::Cutting`] begins.
    cut_at: Option<Instant>,
    /// When that one ends, whoever is still there.
    end_at: Option<Instant>,
    /// Who has work left, in the order of their turns (invariant 5).
    pub(super) ready: VecDeque<Id>,
    timers: BinaryHeap<Reverse<(Instant, Id)>>,
}

/// That time from now; for "never" (`Duration::MAX`), which no clock reaches, a century.
pub(super) fn after(now: Instant, time: Duration) -> Instant {
    const NEVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    now + time.min(NEVER)
}

impl<W: World> Worker<W> {
    pub(crate) fn new(world: W, index: usize, shared: Arc<Shared<W::Stream>>) -> Worker<W> {
        Worker {
            world,
            index,
            shared,
            conns: Table::new(),
            listeners: Vec::new(),
            queues: Vec::new(),
            pool: Pool::new(BUFFER, KEEP),
            phase: Phase::Running,
            cut_at: None,
            end_at: None,
            ready: VecDeque::new(),
            timers: BinaryHeap::new(),
        }
    }

    /// Runs until the proxy has stopped.
    ///
    /// # Errors
    /// What the poller says, if it can't wait any more.
    pub(crate) fn run(mut self) -> io::Result<()> {
        let mut events = Vec::new();
        loop {
            let timeout = self.timeout(self.world.now());
            self.world.wait(&mut events, timeout)?;
            let now = self.world.now();
            for event in events.drain(..) {
                self.take_event(event, now);
            }
            for command in self.shared.inboxes[self.index].take() {
                match command {
                    Command::Adopt(stream, forward) => self.adopt(stream, forward, now),
                    Command::Stop(grace) => self.stop(grace, now),
                }
            }
            self.run_timers(now);
            self.accept_turns(now);
            self.dial_turns(now);
            // Only those who are ready now: who has more work goes to the back and waits for the next round.
            for _ in 0..self.ready.len() {
                let Some(id) = self.ready.pop_front() else {
                    break;
                };
                if let Some(conn) = self.conns.get_mut(id) {
                    conn.ready = false;
                    self.step(id, now);
                }
            }
            if self.cut_at.is_some_and(|at| at <= now) {
                self.cut_all(now);
            }
            if self.phase > Phase::Running && self.is_over(now) {
                self.close_listeners();
                return Ok(());
            }
            if self.end_at.is_some_and(|at| at <= now) {
                self.close_listeners();
                self.abandon_all(now);
                return Ok(());
            }
        }
    }

    fn take_event(&mut self, event: Event<W::Stream>, now: Instant) {
        match event {
            Event::Ready { token, readiness } if token < Id::FIRST => {
                if let Some(listening) = self.listeners.get_mut(token) {
                    // That a pipe's client has come makes it writable.
                    listening.ready |= readiness.readable || readiness.writable;
                }
            }
            Event::Ready { token, readiness } => {
                let (id, side) = Id::from_token(token);
                if let Some(conn) = self.conns.get_mut(id) {
                    conn.latch(side, readiness);
                    self.make_ready(id);
                }
            }
            Event::Resolved { token, addresses } => {
                self.resolved(Id::from_token(token).0, addresses, now)
            }
            Event::Dialled { token, stream } => {
                self.dialled(Id::from_token(token).0, stream, now);
            }
            Event::Bridged { token, ended } => {
                self.bridge_ended(Id::from_token(token).0, ended, now);
            }
        }
    }

    /// Puts a connection at the end of the ready queue, once.
    pub(super) fn make_ready(&mut self, id: Id) {
        if let Some(conn) = self.conns.get_mut(id)
            && !conn.ready
        {
            conn.ready = true;
            self.ready.push_back(id);
        }
    }

    /// Has [`step`](Worker::step) called at `at`, instead of when it was set to before.
    pub(super) fn set_timer(&mut self, id: Id, at: Instant) {
        if let Some(conn) = self.conns.get_mut(id)
            && conn.timer != Some(at)
        {
            conn.timer = Some(at);
            self.timers.push(Reverse((at, id)));
        }
    }

    fn run_timers(&mut self, now: Instant) {
        while let Some(Reverse((at, id))) = self.timers.peek().copied() {
            if at > now {
                break;
            }
            self.timers.pop();
            // A timer that was set anew, or whose connection is gone, says nothing.
            if let Some(conn) = self.conns.get_mut(id)
                && conn.timer == Some(at)
            {
                conn.timer = None;
                self.make_ready(id);
            }
        }
    }

    fn timeout(&self, now: Instant) -> Option<Duration> {
        // mio's poll fallback may lose a wake-up while a socket is registered: so the inbox is looked into as well.
        if !self.ready.is_empty() || !self.shared.inboxes[self.index].is_empty() {
            return Some(Duration::ZERO);
        }
        let timer = self.timers.peek().map(|Reverse((at, _))| *at);
        let stop = (self.phase > Phase::Running).then(|| now + STOP_TICK);
        let next = [
            timer,
            stop,
            self.cut_at,
            self.end_at,
            self.next_accept(now),
            self.next_dial(),
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
            self.close_client_listeners();
            self.end_probes(now);
        }
    }

    fn cut_all(&mut self, now: Instant) {
        self.cut_at = None;
        if self.phase < Phase::Cutting {
            self.phase = Phase::Cutting;
            // Guests that go on dialling each get their leave, but can't keep us for ever.
            self.end_at = Some(now + 2 * LAST_LEAVE);
            for id in self.conns.ids() {
                self.cut(id, now);
            }
        }
    }

    /// All connections of all workers have ended, none can be handed over any more, and no guest waits at the door.
    fn is_over(&mut self, now: Instant) -> bool {
        // First this: who has not heard of the end yet may still count a connection and hand it to us.
        if self.shared.stopping.load(Ordering::Acquire) < self.shared.inboxes.len() {
            return false;
        }
        let none = |shared: &Shared<W::Stream>| shared.live.load(Ordering::Acquire) == 0;
        if !none(&self.shared) {
            return false;
        }
        self.accept_all(now);
        none(&self.shared)
    }
}
