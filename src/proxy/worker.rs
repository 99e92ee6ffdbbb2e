//! One thread's loop: waits, latches what came, gives each connection with work a bounded turn.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::engine::Phase;
use crate::engine::connection::{Connection, LAST_DRAIN};
use crate::engine::relay::{Pool, Socket};
use crate::name::SocketName;

use super::accept::Listening;
use super::connections::Actions;
use super::descriptors::Descriptors;
use super::probing::Proofs;
use super::queue::DialQueue;
use super::world::{Event, World};
use crate::engine::admission::quotas::{Holder, Quotas};
use crate::engine::admission::{Slot, Wake};
use crate::engine::counters::add_one;
use crate::engine::forward::Forward;
use crate::engine::id::{ConnectionId, ForwardId};
use crate::engine::routes::Routes;
use crate::engine::rule::Limits;
use crate::engine::status::ConnectionStatus;
use crate::engine::table::{Id, Table};
use crate::engine::timers::Timers;

/// Bytes a buffer holds. A pair in flight borrows at most two.
const BUFFER: usize = 128 * 1024;

/// Buffers that a worker keeps though nobody needs them.
const KEEP: usize = 16;

/// How often buffers and pipes are looked for that nobody needs any more.
const TRIM: Duration = Duration::from_secs(1);

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

/// What a worker is told by others.
pub(crate) enum Command<W: World> {
    /// Carry this accepted connection.
    Adopt(W::Stream, SocketName, Arc<Forward>, Option<Slot>),
    /// Accept clients of this forward; say whether that goes.
    Listen(W::Listener, Arc<Forward>, Wanted, Sender<io::Result<()>>),
    /// Carry the clients of the forward of this id as this one says from now on; say so.
    Replace(Arc<Forward>, Wanted, Sender<()>),
    /// Give the file of the forward's socket these permissions; say whether that goes.
    SetMode(ForwardId, u32, Wanted, Sender<io::Result<()>>),
    /// Accept no more clients of this forward, say so, and cut off those that are there after this time.
    Remove(Arc<Forward>, Duration, Sender<()>),
    /// Say that it listens.
    Answer(Sender<()>),
    /// Say what is carried.
    Tell(Sender<Vec<ConnectionStatus>>),
    /// Accept no more clients, and cut off those that are there after this time.
    Stop(Duration),
}

/// Whether what a worker is told to do is still wanted: it begins, or the one that asked gives up, whichever is first.
/// What was given up does not happen.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted(Arc<AtomicU8>);

impl Wanted {
    const ASKED: u8 = 0;
    const BEGUN: u8 = 1;
    const GIVEN_UP: u8 = 2;

    fn decide(&self, on: u8) -> bool {
        let (release, acquire) = (Ordering::AcqRel, Ordering::Acquire);
        let decided = self.0.compare_exchange(Wanted::ASKED, on, release, acquire);
        decided.is_ok()
    }

    /// Begins it; false if it was given up.
    pub(crate) fn begin(&self) -> bool {
        self.decide(Wanted::BEGUN)
    }

    /// Gives it up; false if it was begun.
    pub(crate) fn give_up(&self) -> bool {
        self.decide(Wanted::GIVEN_UP)
    }
}

/// What a worker is told, and how it is woken to listen.
pub(crate) struct Inbox<W: World> {
    commands: Mutex<Vec<Command<W>>>,
    /// Connections of this worker.
    pub(crate) load: AtomicUsize,
    wake: Wake,
}

impl<W: World> Inbox<W> {
    pub(crate) fn new(wake: Wake) -> Inbox<W> {
        Inbox {
            commands: Mutex::default(),
            load: AtomicUsize::new(0),
            wake,
        }
    }

    /// What wakes its worker.
    pub(super) fn waker(&self) -> Wake {
        Arc::clone(&self.wake)
    }

    pub(crate) fn send(&self, command: Command<W>) {
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

    fn take(&self) -> Vec<Command<W>> {
        std::mem::take(&mut *self.commands.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<W: World> std::fmt::Debug for Inbox<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox")
            .field("load", &self.load)
            .finish_non_exhaustive()
    }
}

/// What the workers of a proxy share.
#[derive(Debug)]
pub(crate) struct Shared<W: World> {
    forwards: Mutex<Vec<Arc<Forward>>>,
    pub(crate) inboxes: Vec<Inbox<W>>,
    /// How many connections there may be: what the limits say, and no more than there are descriptors for. What a forward
    /// reserves in its VM is kept for it here as well.
    quotas: Mutex<Quotas>,
    /// As the limits say.
    most: usize,
    pub(super) descriptors: Descriptors,
    pub(super) routes: Routes,
    /// Connections of all workers, counted from the accept on.
    pub(crate) live: AtomicUsize,
    /// The end was asked for.
    pub(super) stop_asked: AtomicBool,
    /// Workers that have heard of the end: they hand nothing over any more.
    pub(crate) stopping: AtomicUsize,
    /// Workers that have ended.
    pub(crate) ended: AtomicUsize,
    /// Who gets the next listener.
    next: AtomicUsize,
    /// The number of the next connection.
    next_connection: AtomicU64,
}

impl<W: World> Shared<W> {
    pub(crate) fn new(
        limits: Limits,
        descriptors: Descriptors,
        forwards: Vec<Arc<Forward>>,
        inboxes: Vec<Inbox<W>>,
    ) -> Shared<W> {
        let mut quotas = Quotas::new(limits.connections.min(descriptors.room(forwards.len())));
        for forward in &forwards {
            keep(&mut quotas, forward);
        }
        Shared {
            next: AtomicUsize::new(forwards.len()),
            next_connection: AtomicU64::new(0),
            forwards: Mutex::new(forwards),
            inboxes,
            quotas: Mutex::new(quotas),
            most: limits.connections,
            descriptors,
            routes: Routes::default(),
            live: AtomicUsize::new(0),
            stop_asked: AtomicBool::new(false),
            stopping: AtomicUsize::new(0),
            ended: AtomicUsize::new(0),
        }
    }

    pub(super) fn forwards(&self) -> MutexGuard<'_, Vec<Arc<Forward>>> {
        self.forwards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn quotas(&self) -> MutexGuard<'_, Quotas> {
        self.quotas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why no connection of that forward may begin now, if so.
    pub(super) fn is_full_for(&self, forward: ForwardId) -> Option<io::Error> {
        let (quotas, holder) = (self.quotas(), Holder::Forward(forward));
        if quotas.free_for(holder) > 0 {
            return None;
        }
        if let Some(most) = quotas.is_at_its_bound(holder) {
            let why =
                format!("{most} connections of this forward are open, and more are not allowed");
            return Some(io::Error::other(why));
        }
        let (cap, kept) = (quotas.cap(), quotas.kept_from(holder));
        Some(io::Error::other(match kept {
            0 => format!("{cap} connections are open, and more are not allowed"),
            _ => format!(
                "{cap} connections may be open, and the last {kept} are reserved for others"
            ),
        }))
    }

    /// Returns whether a connection of another forward may wait to be accepted at that one.
    pub(super) fn may_come_from_us(&self, forward: &Forward) -> bool {
        let live = forward.tally.live.load(Ordering::Relaxed);
        self.routes.may_wait_at(forward.id, live)
    }

    /// A connection begins, or a probe.
    pub(super) fn begins(&self, forward: &Forward) {
        add_one(&forward.tally.live);
        self.quotas().take(Holder::Forward(forward.id));
        self.live.fetch_add(1, Ordering::AcqRel);
    }

    /// One has ended.
    pub(super) fn has_ended(&self, forward: &Forward) {
        forward.tally.live.fetch_sub(1, Ordering::Relaxed);
        self.quotas().give_back(Holder::Forward(forward.id));
        self.live.fetch_sub(1, Ordering::AcqRel);
    }

    /// Keeps for a forward what it reserves, until [`release`](Shared::release).
    pub(super) fn keep(&self, forward: &Forward) {
        keep(&mut self.quotas(), forward);
    }

    pub(super) fn release(&self, forward: &Forward) {
        self.quotas().give_up(Holder::Forward(forward.id));
        forward.keep_quota(None);
    }

    /// Allows as many connections as there are descriptors for beside so many listeners.
    pub(super) fn make_room(&self, listeners: usize) {
        let room = self.descriptors.room(listeners);
        self.quotas().set_cap(self.most.min(room));
    }

    /// Who is to have the next listener.
    pub(super) fn next_inbox(&self) -> usize {
        self.next.fetch_add(1, Ordering::Relaxed) % self.inboxes.len()
    }

    pub(super) fn next_connection(&self) -> ConnectionId {
        ConnectionId(self.next_connection.fetch_add(1, Ordering::Relaxed))
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stop_asked.load(Ordering::Acquire) || self.stopping.load(Ordering::Acquire) > 0
    }

    /// A worker has ended. If it has failed, the others are ended too: without it they would wait
    /// for its connections for ever.
    pub(super) fn worker_has_ended(&self, index: usize, failed: bool) {
        if failed {
            let lost = self.inboxes[index].load.swap(0, Ordering::AcqRel);
            self.live.fetch_sub(lost, Ordering::AcqRel);
            self.stopping.fetch_add(1, Ordering::AcqRel);
            for inbox in &self.inboxes {
                inbox.send(Command::Stop(Duration::ZERO));
            }
        }
        self.ended.fetch_add(1, Ordering::AcqRel);
    }

    /// Checks that nothing is counted any more.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn check_books(&self) {
        assert_eq!(self.quotas().live(), 0, "places are taken");
        let forwards = self.forwards();
        let reserved: usize = forwards.iter().map(|it| it.rule.reserved).sum();
        assert!(self.quotas().kept() <= reserved, "places are reserved");
        drop(forwards);
        for inbox in &self.inboxes {
            assert_eq!(inbox.load.load(Ordering::Relaxed), 0, "a worker has load");
        }
        self.routes.check_books();
    }

    /// Whether nobody listens to commands any more.
    pub(super) fn is_over(&self) -> bool {
        self.ended.load(Ordering::Acquire) >= self.inboxes.len()
    }
}

/// Keeps for a forward what it reserves, or as much of it as there are descriptors for, and bounds it.
fn keep(quotas: &mut Quotas, forward: &Forward) {
    let (reserved, listen) = (forward.rule.reserved, &forward.rule.listen);
    let holder = Holder::Forward(forward.id);
    quotas.bound(holder, forward.rule.connections);
    if let Err(left) = quotas.reserve(holder, reserved) {
        tracing::warn!("{listen} reserves {reserved} connections, and {left} are to be had");
        // So much is to be had.
        let _ = quotas.reserve(holder, left);
    }
}

/// A worker: its connections, its listeners, its part of the world.
pub(crate) struct Worker<W: World> {
    pub(super) world: W,
    pub(super) index: usize,
    pub(super) shared: Arc<Shared<W>>,
    pub(super) conns: Table<Connection<W::Stream>>,
    pub(super) actions: Actions<W::Stream>,
    pub(super) listeners: Vec<Listening<W::Listener>>,
    pub(super) queues: VecDeque<DialQueue>,
    pub(super) proofs: Vec<Proofs>,
    pub(super) pool: Pool<<W::Stream as Socket>::Pipe>,
    /// Forwards that were removed, and when their connections are cut off.
    removed: Vec<(Instant, Arc<Forward>)>,
    pub(super) phase: Phase,
    /// When the phase [`Phase::Cutting`] begins.
    cut_at: Option<Instant>,
    /// When that one ends, whoever is still there.
    end_at: Option<Instant>,
    /// When the process went on that had stood still.
    pub(super) thawed: Option<Instant>,
    /// When buffers and pipes that nobody needs any more are dropped.
    trim_at: Option<Instant>,
    /// Who has work left, in the order of their turns (invariant 5).
    pub(super) ready: VecDeque<Id>,
    pub(super) timers: Timers,
}

pub(super) use crate::time::after;

impl<W: World> Worker<W> {
    /// One of `shared`'s; its bytes may go through pipes if `splice`.
    pub(crate) fn new(world: W, index: usize, shared: Arc<Shared<W>>, splice: bool) -> Worker<W> {
        let pipes = match splice {
            true => shared.descriptors.pipes_of_a_worker(),
            false => 0,
        };
        Worker {
            world,
            index,
            shared,
            conns: Table::new(),
            actions: Actions::default(),
            listeners: Vec::new(),
            queues: VecDeque::new(),
            proofs: Vec::new(),
            pool: Pool::new(BUFFER, KEEP, pipes),
            removed: Vec::new(),
            phase: Phase::Running,
            cut_at: None,
            end_at: None,
            thawed: None,
            trim_at: None,
            ready: VecDeque::new(),
            timers: Timers::default(),
        }
    }

    /// Runs until the proxy has stopped.
    ///
    /// # Errors
    /// What the poller says, if it can't wait any more.
    pub(crate) fn run(mut self) -> io::Result<()> {
        let mut events = Vec::new();
        loop {
            let wait = self.next_wait();
            self.world.wait(&mut events, wait.timeout)?;
            if self.turn(&mut events, wait)? == Turn::Last {
                return Ok(());
            }
        }
    }

    /// Returns the wait that is to come before the next turn.
    pub(super) fn next_wait(&self) -> Wait {
        let begun = self.world.now();
        let timeout = self.timeout(begun);
        Wait { begun, timeout }
    }

    /// Does what is to be done after a wait, and takes the events out that it brought.
    ///
    /// # Errors
    /// As those of [`run`](Worker::run).
    pub(super) fn turn(
        &mut self,
        events: &mut Vec<Event<W::Stream, W::Listener>>,
        wait: Wait,
    ) -> io::Result<Turn> {
        let now = self.world.now();
        if wait
            .timeout
            .is_some_and(|timeout| now > after(wait.begun, timeout) + FREEZE)
        {
            self.thawed = Some(now);
            // Guests may have stood still as well.
            self.end_at = self.end_at.map(|at| at.max(now + LAST_DRAIN));
        }
        if self.timers.next().is_some_and(|at| at <= now) {
            // Invariant 9: what has come is read before a timer is believed. The process may have
            // stood still since the events were fetched, and may so have missed what tells that a
            // peer is not idle.
            self.world.wait(events, Some(Duration::ZERO))?;
        }
        for event in events.drain(..) {
            self.take_event(event, now);
        }
        for command in self.shared.inboxes[self.index].take() {
            match command {
                Command::Adopt(stream, peer, forward, slot) => {
                    self.adopt(stream, peer, forward, slot, now);
                }
                Command::Listen(listener, forward, wanted, tell) => match wanted.begin() {
                    true => drop(tell.send(self.add_listener(listener, forward))),
                    false => self.give_up_listener(listener, forward, now),
                },
                Command::Replace(forward, wanted, tell) => {
                    if wanted.begin() {
                        self.replace_forward(forward);
                        let _ = tell.send(());
                    }
                }
                Command::SetMode(forward, mode, wanted, tell) => {
                    self.set_mode(forward, mode, wanted, tell);
                }
                Command::Remove(forward, grace, tell) => {
                    self.remove(forward, grace, tell, now);
                }
                Command::Answer(tell) => drop(tell.send(())),
                Command::Tell(tell) => drop(tell.send(self.connections(now))),
                Command::Stop(grace) => self.stop(grace, now),
            }
        }
        self.run_timers(now);
        self.accept_turns(now);
        self.dial_turns(now);
        // Only those who are ready now: who has more work goes to the back and waits for the next
        // round.
        for _ in 0..self.ready.len() {
            let Some(id) = self.ready.pop_front() else {
                break;
            };
            if let Some(connection) = self.conns.get_mut(id) {
                connection.is_queued = false;
                self.with(id, now, Connection::step);
            }
        }
        self.proof_turns(now);
        self.cut_removed(now);
        self.trim_pool(now);
        if self.cut_at.is_some_and(|at| at <= now) {
            self.cut_all(now);
        }
        if self.phase > Phase::Running && self.is_over(now) {
            self.close_listeners();
            return Ok(Turn::Last);
        }
        if self.end_at.is_some_and(|at| at <= now) {
            self.close_listeners();
            self.abandon_all(now);
            return Ok(Turn::Last);
        }
        Ok(Turn::Again)
    }

    fn take_event(&mut self, event: Event<W::Stream, W::Listener>, now: Instant) {
        match event {
            Event::Ready { token, readiness } if token < Id::FIRST => {
                if let Some(listening) = self.listeners.get_mut(token) {
                    // That a pipe's client has come makes it writable.
                    listening.ready |= readiness.readable || readiness.writable;
                }
            }
            Event::Ready { token, readiness } => {
                let (id, side) = Id::from_token(token);
                if let Some(connection) = self.conns.get_mut(id) {
                    connection.latch(side, readiness);
                    self.make_ready(id);
                }
            }
            Event::Resolved { token, addresses } => {
                let id = Id::from_token(token).0;
                self.with(id, now, |it, cx| it.take_addresses(addresses, cx));
            }
            Event::Dialled { token, stream } => {
                self.dialled(Id::from_token(token).0, stream, now);
            }
            Event::Bridged { token, ended } => {
                let id = Id::from_token(token).0;
                self.with(id, now, |it, cx| {
                    it.take_threads_end(ended.delivered, ended.abandoned, cx);
                });
            }
            Event::VmSeen {
                gate,
                sign,
                process,
            } => gate.look(sign, process, now),
            Event::Listener { of, found } => self.listener_found(of, found, now),
            Event::Explained { token, error } => {
                let id = Id::from_token(token).0;
                self.with(id, now, |it, cx| it.take_explanation(error, cx));
            }
        }
    }

    /// Puts a connection at the end of the ready queue, once.
    pub(super) fn make_ready(&mut self, id: Id) {
        if let Some(connection) = self.conns.get_mut(id)
            && !connection.is_queued
        {
            connection.is_queued = true;
            self.ready.push_back(id);
        }
    }

    fn run_timers(&mut self, now: Instant) {
        while let Some(id) = self.timers.pop_due(now) {
            if let Some(connection) = self.conns.get_mut(id) {
                connection.wake_at = None;
                self.make_ready(id);
            }
        }
    }

    /// Returns how long there is nothing to do unless something comes; `None`: for ever.
    fn timeout(&self, now: Instant) -> Option<Duration> {
        // mio's poll fallback may lose a wake-up while a socket is registered: so the inbox is looked into as well.
        if !self.ready.is_empty() || !self.shared.inboxes[self.index].is_empty() {
            return Some(Duration::ZERO);
        }
        let timer = self.timers.next();
        let stop = (self.phase > Phase::Running).then(|| now + STOP_TICK);
        let next = [
            timer,
            stop,
            self.cut_at,
            self.end_at,
            self.trim_at,
            self.next_accept(now),
            self.next_dial(),
            self.next_proof(),
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
            self.close_client_listeners();
            self.hurry_closing(now);
        }
    }

    /// Takes a forward out: nobody is accepted any more, and who is there has that time.
    fn remove(&mut self, forward: Arc<Forward>, grace: Duration, tell: Sender<()>, now: Instant) {
        self.remove_listener(forward.id, tell, now);
        // Of those removed before, all workers know by now: what has no connection gets none any more.
        self.removed
            .retain(|(_, before)| before.tally.live.load(Ordering::Relaxed) > 0);
        self.removed.push((after(now, grace), forward));
    }

    /// Cuts off the connections of removed forwards whose time has come.
    fn cut_removed(&mut self, now: Instant) {
        let due = self.removed.extract_if(.., |(at, _)| *at <= now);
        for (_, forward) in due.collect::<Vec<_>>() {
            // What is handed over after this is cut off when it comes.
            forward.cut.store(true, Ordering::Release);
            for id in self.conns.ids() {
                let connection = self.conns.get_mut(id);
                if connection.is_some_and(|it| it.forward.id == forward.id) {
                    self.cut(id, now);
                }
            }
        }
    }

    /// A pipe rests for a second or two before it is closed.
    fn trim_pool(&mut self, now: Instant) {
        if self.trim_at.is_some_and(|at| at <= now) {
            self.pool.trim();
            self.trim_at = None;
        }
        if self.trim_at.is_none() && self.pool.wants_trim() {
            self.trim_at = Some(now + TRIM);
        }
    }

    fn cut_all(&mut self, now: Instant) {
        self.cut_at = None;
        if self.phase < Phase::Cutting {
            self.phase = Phase::Cutting;
            // Guests that go on dialling each get their leave, but can't keep us for ever.
            self.end_at = Some(now + 2 * LAST_DRAIN);
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
        let none = |shared: &Shared<W>| shared.live.load(Ordering::Acquire) == 0;
        if !none(&self.shared) {
            return false;
        }
        self.accept_all(now);
        none(&self.shared)
    }
}
