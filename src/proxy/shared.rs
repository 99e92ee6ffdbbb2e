//! What the workers of a proxy share: the forwards, the process' quotas, the counts, and the
//! inboxes through which they get commands. No socket is used here.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::engine::Phase;
use crate::engine::admission::quotas::{Holder, Quotas, ReachedLimit};
use crate::engine::admission::{GateId, NotServed, Slot, SlotWake, Wake};
use crate::engine::counters::add_one;
use crate::engine::forward::Forward;
use crate::engine::id::{ConnectionId, ForwardId};
use crate::engine::relay::Carried;
use crate::engine::routes::Routes;
use crate::engine::rule::Limits;
use crate::engine::status::ConnectionStatus;
use crate::error::counted;
use crate::listener::FileAccess;
use crate::lock::lock;
use crate::name::SocketName;

use super::cuts::Cuts;
use super::descriptors::Descriptors;
#[cfg(all(unix, feature = "cli"))]
use super::driver::Lent;
use super::driver::{Driver, StillWanted};
use super::gates::Gates;

/// The context of one turn of a worker's loop.
pub(super) struct TurnContext<'a, D: Driver> {
    pub(super) driver: &'a mut D,
    /// The worker's number.
    pub(super) index: usize,
    pub(super) shared: &'a Shared<D>,
    pub(super) phase: Phase,
    /// The time at which the process last went on after a freeze.
    pub(super) resumed_at: Option<Instant>,
    pub(super) now: Instant,
}

/// A connection that was accepted.
#[derive(Debug)]
pub(crate) struct Accepted<S> {
    pub(super) stream: S,
    pub(super) peer: SocketName,
    pub(super) forward: Arc<Forward>,
    /// The slot of the VM whose guest it is, and the one that is queued at the VM that the forward
    /// leads to.
    pub(super) slots: [Option<Slot>; 2],
    /// Whether it is served, if it is a guest.
    pub(super) served: Result<(), NotServed>,
}

/// Whether the listeners accept clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Accepting {
    #[default]
    On,
    /// All clients have to wait, since another process may serve them yet.
    #[cfg_attr(not(all(unix, feature = "cli")), allow(dead_code))]
    Suspended,
}

/// A command to a worker.
pub(crate) enum WorkerCommand<D: Driver> {
    /// Take over this accepted connection.
    Adopt(Accepted<D::Stream>),
    /// Accept clients of this forward, and report whether that is possible.
    Listen(
        D::Listener,
        Arc<Forward>,
        StillWanted,
        Sender<io::Result<()>>,
    ),
    /// Replace the forward of the same id for new clients, and report it.
    Replace(Arc<Forward>, StillWanted, Sender<()>),
    /// Change the owner, group and permissions of the forward's socket file, and report the result.
    SetAccess(ForwardId, FileAccess, StillWanted, Sender<io::Result<()>>),
    /// Accept no more clients of this forward, report that, and cut off its connections after this
    /// time, which is noted.
    Remove(Arc<Forward>, Duration, Arc<Cuts>, Sender<()>),
    /// Accept no clients, and change no file, or do so again; report it.
    #[cfg(all(unix, feature = "cli"))]
    SetAccepting(Accepting, Sender<()>),
    /// Report duplicates of all listeners.
    #[cfg(all(unix, feature = "cli"))]
    Lend(Sender<Vec<(ForwardId, io::Result<Lent>)>>),
    /// Leave the listeners of these forwards to the process that has their duplicates, and report
    /// it.
    #[cfg(all(unix, feature = "cli"))]
    Give(Arc<[ForwardId]>, Sender<()>),
    /// Answer.
    Ping(Sender<()>),
    /// Report the status of all connections.
    ListConnections(Sender<Vec<ConnectionStatus>>),
    /// Cut off this connection, and report what its status was, if it is this worker's.
    Close(ConnectionId, Sender<Option<ConnectionStatus>>),
    /// Accept no more clients, and cut off all connections after this time.
    Stop(Duration),
}

/// The inbox of a worker, and the function that wakes it.
pub(crate) struct Inbox<D: Driver> {
    commands: Mutex<Vec<WorkerCommand<D>>>,
    /// The number of the worker's connections.
    pub(crate) load: AtomicUsize,
    /// What the worker's connections have delivered, by carrier.
    pub(super) carried: Arc<Carried>,
    wake: Wake,
    /// The gates at which there may be a slot again.
    freed: Arc<Mutex<Vec<GateId>>>,
    slot_wake: SlotWake,
}

impl<D: Driver> Inbox<D> {
    pub(crate) fn new(wake: Wake) -> Inbox<D> {
        let freed = Arc::<Mutex<Vec<GateId>>>::default();
        let slot_wake: SlotWake = {
            let (freed, wake) = (Arc::clone(&freed), Arc::clone(&wake));
            Arc::new(move |gate| {
                lock(&freed).push(gate);
                wake();
            })
        };
        Inbox {
            commands: Mutex::default(),
            load: AtomicUsize::new(0),
            carried: Arc::default(),
            wake,
            freed,
            slot_wake,
        }
    }

    /// Returns the function by which the worker learns that a gate may have a slot again.
    pub(super) fn slot_waker(&self) -> &SlotWake {
        &self.slot_wake
    }

    /// Takes the gates at which there may be a slot again.
    pub(super) fn take_freed(&self) -> Vec<GateId> {
        std::mem::take(&mut *lock(&self.freed))
    }

    /// Sends a command, and wakes the worker.
    pub(crate) fn send(&self, command: WorkerCommand<D>) {
        lock(&self.commands).push(command);
        (self.wake)();
    }

    pub(super) fn is_empty(&self) -> bool {
        lock(&self.commands).is_empty() && lock(&self.freed).is_empty()
    }

    /// Takes the commands that were sent.
    pub(super) fn take(&self) -> Vec<WorkerCommand<D>> {
        std::mem::take(&mut *lock(&self.commands))
    }
}

impl<D: Driver> std::fmt::Debug for Inbox<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox")
            .field("load", &self.load)
            .finish_non_exhaustive()
    }
}

/// The forwards of a proxy, in the order in which they were added.
#[derive(Debug, Default)]
pub(super) struct Forwards {
    all: BTreeMap<ForwardId, Arc<Forward>>,
    /// How many sockets they listen on. It is counted as they come and go: each change asks for it.
    listening_sockets: usize,
}

impl Forwards {
    fn new(forwards: Vec<Arc<Forward>>) -> Forwards {
        let mut all = Forwards::default();
        forwards.into_iter().for_each(|it| all.insert(it));
        all
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Forward>> {
        self.all.values()
    }

    pub(super) fn get(&self, id: ForwardId) -> Option<&Arc<Forward>> {
        self.all.get(&id)
    }

    /// Inserts a forward, or replaces the one of the same id.
    pub(super) fn insert(&mut self, forward: Arc<Forward>) {
        self.remove(forward.id);
        self.listening_sockets += forward.rule.listen.listening_sockets();
        self.all.insert(forward.id, forward);
    }

    pub(super) fn remove(&mut self, id: ForwardId) -> Option<Arc<Forward>> {
        let removed = self.all.remove(&id)?;
        self.listening_sockets -= removed.rule.listen.listening_sockets();
        Some(removed)
    }
}

/// The part of the process' connections that remnants may have: an eighth.
const FOR_REMNANTS: usize = 8;

/// What the workers of a proxy share.
#[derive(Debug)]
pub(crate) struct Shared<D: Driver> {
    forwards: Mutex<Forwards>,
    pub(crate) inboxes: Vec<Inbox<D>>,
    /// The connections that the process may have: as many as the limits allow, and no more than
    /// there are descriptors for. What a forward reserves at its VM is reserved for it here as
    /// well.
    quotas: Mutex<Quotas>,
    /// The limit that was configured.
    most: usize,
    pub(super) gates: Arc<Gates>,
    pub(super) descriptors: Descriptors,
    pub(super) routes: Routes,
    /// The connections and probes of all workers, counted from the accept or dial on.
    pub(crate) live: AtomicUsize,
    /// How many of them are probes or remnants, which no client has made or is behind any more.
    unnamed: AtomicUsize,
    /// The time at which the proxy began, and how many milliseconds later the last connection
    /// ended.
    begun: Instant,
    last_end: AtomicU64,
    /// Whether the proxy was told to stop.
    pub(super) stop_asked: AtomicBool,
    /// The number of workers that have begun to stop. They hand no connection over any more.
    pub(crate) stopping: AtomicUsize,
    /// The number of workers that have ended.
    pub(crate) ended: AtomicUsize,
    /// What is cut off at the end of the grace of all connections.
    pub(super) cuts: Cuts,
    /// The counter that chooses the worker of the next listener.
    next: AtomicUsize,
    /// The identifier of the next connection.
    next_connection: AtomicU64,
}

impl<D: Driver> Shared<D> {
    pub(crate) fn new(
        limits: Limits,
        gates: Arc<Gates>,
        descriptors: Descriptors,
        forwards: Vec<Arc<Forward>>,
        inboxes: Vec<Inbox<D>>,
    ) -> Shared<D> {
        let forwards_by_id = Forwards::new(forwards.clone());
        let room = descriptors.connection_room(forwards_by_id.listening_sockets);
        let mut quotas = Quotas::new(limits.connections.min(room));
        for forward in &forwards {
            reserve_in(&mut quotas, forward);
        }
        Shared {
            cuts: Cuts::new(inboxes.len()),
            next: AtomicUsize::new(forwards.len()),
            next_connection: AtomicU64::new(0),
            forwards: Mutex::new(forwards_by_id),
            inboxes,
            quotas: Mutex::new(quotas),
            most: limits.connections,
            gates,
            descriptors,
            routes: Routes::default(),
            live: AtomicUsize::new(0),
            unnamed: AtomicUsize::new(0),
            begun: D::clock(),
            last_end: AtomicU64::new(0),
            stop_asked: AtomicBool::new(false),
            stopping: AtomicUsize::new(0),
            ended: AtomicUsize::new(0),
        }
    }

    pub(super) fn forwards(&self) -> MutexGuard<'_, Forwards> {
        lock(&self.forwards)
    }

    /// Returns how many sockets the forwards listen on.
    pub(super) fn listening_sockets(&self) -> usize {
        self.forwards().listening_sockets
    }

    fn quotas(&self) -> MutexGuard<'_, Quotas> {
        lock(&self.quotas)
    }

    /// Returns why no connection of that forward may begin now, if so.
    pub(super) fn is_full_for(&self, forward: ForwardId) -> Option<io::Error> {
        let (quotas, holder) = (self.quotas(), Holder::Forward(forward));
        if quotas.free_for(holder) > 0 {
            return None;
        }
        if let Some(limit) = quotas.reached_limit(holder) {
            return Some(io::Error::other(limit.to_string()));
        }
        let (cap, kept) = (quotas.cap(), quotas.kept_from(holder));
        let cap = counted(cap as u64, "connection");
        Some(io::Error::other(match kept {
            0 => format!("this process has {cap} open, and more are not allowed"),
            _ => format!("this process may have {cap}, and keeps the last {kept} for others"),
        }))
    }

    /// Returns the limit of a forward's connections, if it is reached.
    pub(super) fn reached_limit(&self, forward: ForwardId) -> Option<ReachedLimit> {
        self.quotas().reached_limit(Holder::Forward(forward))
    }

    /// Returns whether a connection dialled by another forward may wait to be accepted at this one.
    pub(super) fn may_come_from_us(&self, forward: &Forward) -> bool {
        let live = forward.tally.live.load(Ordering::Relaxed);
        self.routes.may_wait_at(forward.id, live)
    }

    /// Counts a connection of a forward that begins, or a probe of its VM or a remnant, which is no
    /// connection of the forward and takes none of its slots.
    pub(super) fn note_begin(&self, forward: &Forward, holder: Holder) {
        match holder {
            Holder::Probes | Holder::Lost => {
                self.unnamed.fetch_add(1, Ordering::Relaxed);
            }
            _ => add_one(&forward.tally.live),
        }
        self.quotas().take(holder);
        self.live.fetch_add(1, Ordering::AcqRel);
    }

    /// Counts the end of a connection, probe or remnant.
    pub(super) fn note_end(&self, forward: &Forward, holder: Holder, now: Instant) {
        if matches!(holder, Holder::Probes | Holder::Lost) {
            self.unnamed.fetch_sub(1, Ordering::Relaxed);
        } else {
            forward.tally.live.fetch_sub(1, Ordering::Relaxed);
            let age = now.saturating_duration_since(self.begun).as_millis();
            // This is noted first: a caller that finds no connection must find the time at which
            // the last one ended.
            self.last_end
                .fetch_max(u64::try_from(age).unwrap_or(u64::MAX), Ordering::Release);
        }
        self.quotas().give_back(holder);
        self.live.fetch_sub(1, Ordering::AcqRel);
    }

    /// Returns whether one more remnant may be held: they have no more than their part of the
    /// process' connections.
    pub(super) fn may_hold(&self) -> bool {
        let quotas = self.quotas();
        quotas.live_of(Holder::Lost) < quotas.cap() / FOR_REMNANTS
    }

    /// Returns how many connections there are that clients have made.
    pub(super) fn connections(&self) -> usize {
        let unnamed = self.unnamed.load(Ordering::Relaxed);
        self.live.load(Ordering::Acquire).saturating_sub(unnamed)
    }

    /// Returns how long there has been no connection, or `None` if there is one.
    pub(super) fn idle_for(&self) -> Option<Duration> {
        if self.connections() > 0 {
            return None;
        }
        let last_end = Duration::from_millis(self.last_end.load(Ordering::Acquire));
        let age = D::clock().saturating_duration_since(self.begun);
        Some(age.saturating_sub(last_end))
    }

    /// Reserves a forward's slots, until [`release`](Shared::release).
    pub(super) fn reserve_slots(&self, forward: &Forward) {
        reserve_in(&mut self.quotas(), forward);
    }

    /// Gives a forward's reserved slots back.
    pub(super) fn release(&self, forward: &Forward) {
        self.quotas().release(Holder::Forward(forward.id));
        forward.release_quota();
    }

    /// Allows as many connections as there are descriptors for besides so many listeners.
    pub(super) fn make_room(&self, listeners: usize) {
        let room = self.descriptors.connection_room(listeners);
        self.quotas().set_cap(self.most.min(room));
    }

    /// Returns the worker that is to have the next listener.
    pub(super) fn next_inbox(&self) -> usize {
        self.next.fetch_add(1, Ordering::Relaxed) % self.inboxes.len()
    }

    pub(super) fn next_connection(&self) -> ConnectionId {
        ConnectionId(self.next_connection.fetch_add(1, Ordering::Relaxed))
    }

    /// Returns whether the proxy was told to stop.
    pub(super) fn is_stopping(&self) -> bool {
        self.stop_asked.load(Ordering::Acquire) || self.stopping.load(Ordering::Acquire) > 0
    }

    /// Notes the end of a worker. If it has failed, the others are stopped: otherwise they would
    /// wait for its connections for ever.
    pub(super) fn note_worker_end(&self, index: usize, ended: &io::Result<()>) {
        if ended.is_err() {
            let lost = self.inboxes[index].load.swap(0, Ordering::AcqRel);
            self.live.fetch_sub(lost, Ordering::AcqRel);
            self.stopping.fetch_add(1, Ordering::AcqRel);
            for inbox in &self.inboxes {
                inbox.send(WorkerCommand::Stop(Duration::ZERO));
            }
        }
        self.ended.fetch_add(1, Ordering::AcqRel);
    }

    /// Checks that nothing is counted any more.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn check_counts(&self) {
        assert_eq!(self.quotas().live(), 0, "slots are taken");
        let forwards = self.forwards();
        let reserved: usize = forwards.iter().map(|it| it.rule.reserved).sum();
        assert!(self.quotas().kept() <= reserved, "slots are reserved");
        drop(forwards);
        for inbox in &self.inboxes {
            assert_eq!(inbox.load.load(Ordering::Relaxed), 0, "a worker has load");
        }
        self.routes.check_counts();
    }

    /// Returns whether no worker is left to take commands.
    pub(super) fn is_over(&self) -> bool {
        self.ended.load(Ordering::Acquire) >= self.inboxes.len()
    }
}

/// Reserves a forward's slots, or as many as there are descriptors for, and sets its limit.
fn reserve_in(quotas: &mut Quotas, forward: &Forward) {
    let (reserved, listen) = (forward.rule.reserved, &forward.rule.listen);
    let holder = Holder::Forward(forward.id);
    quotas.set_limit(holder, forward.rule.most_connections());
    if let Err(left) = quotas.reserve(holder, reserved) {
        let reserved = counted(reserved as u64, "connection");
        tracing::warn!("{listen} reserves {reserved}, of which it can have {left}");
        // As many as are left.
        let _ = quotas.reserve(holder, left);
    }
}
