//! The listeners of a worker: they accept in batches, survive every error, and keep their files.
//!
//! What becomes of an accepted connection is not known here: it is handed over to a worker.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use tracing::{debug, error, info, warn};

use crate::engine::relay::Side;
use crate::listener::FileAccess;
use crate::listener::nonblocking::{has_client_left, is_broken};
use crate::name::SocketName;

#[cfg(all(unix, feature = "cli"))]
use super::driver::Lent;
use super::driver::{Driver, Found, ListenerId, StillWanted};
use super::shared::{Accepted, Accepting, Command, TurnContext};
use crate::engine::Phase;
#[cfg(all(test, target_os = "linux"))]
use crate::engine::admission::Gate;
use crate::engine::admission::quotas::Holder;
use crate::engine::admission::{Full, GateId, Guest, NotServed, Slot};
use crate::engine::counters::add_one;
use crate::engine::forward::Forward;
use crate::engine::id::ForwardId;
use crate::engine::log_limiter::LogLimiter;
use crate::engine::status::Obstacle;
use crate::engine::timers::Timers;
use crate::error::{Error, Operation};
use crate::stream::socket::Socket;

/// The connections that one listener may accept before the others have their turn.
const BATCH: usize = 64;

/// The most connections that [`accept_all`](Listeners::accept_all) accepts at one listener.
const LONGEST_BACKLOG: usize = 4096;

/// How long a listener that can't accept now waits before it tries again.
const PAUSE: Duration = Duration::from_millis(20);

/// How often the files of Unix sockets, and VMs, are checked, as long as they are no more than
/// [`CHECKS_PER_INTERVAL`].
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// How many listeners a worker checks in that time. If it has more, each is checked the more
/// rarely, so that the work of an idle proxy is bounded.
const CHECKS_PER_INTERVAL: usize = 1000;

/// How many listeners are checked in one turn. The others that are due have their turns next.
const CHECKS_PER_TURN: usize = 64;

/// How many listeners accept in one turn.
const ACCEPTS_PER_TURN: usize = 256;

/// Which of the clients that wait at a listener are accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clients {
    /// Those for which the VM that the forward leads to has a slot.
    WithSlot,
    All,
}

/// A listener in a worker's loop.
#[derive(Debug)]
pub(crate) struct Listening<L> {
    listener: Option<L>,
    forward: Arc<Forward>,
    /// Whether a client may wait to be accepted.
    ready: bool,
    /// Whether the listener is in the ready queue.
    is_queued: bool,
    /// The time before which the listener does not accept. It has a timer then.
    paused_until: Option<Instant>,
    /// Why its VM has no slot for the next client. The gate wakes the worker when that may have
    /// changed.
    full: Option<Full>,
    log_limiter: LogLimiter,
    /// The time of the next check of the socket's file and of the VMs. It has a timer then.
    check_at: Option<Instant>,
    /// How many checks of the file, or requests to bind the address again, are not answered yet.
    pending_checks: u32,
    /// Whether it was logged that the file or the address is lost.
    lost: bool,
    /// The obstacle that status reports.
    obstacle: Option<Obstacle>,
    /// Whether the forward was removed; the entry may be used for another listener.
    removed: bool,
    /// Whether another process has the listener now.
    given: bool,
    /// The sender that is notified when the address is free. It waits for pending checks of the
    /// file.
    on_closed: Option<Sender<()>>,
}

impl<L> Listening<L> {
    /// Returns whether the listener is to accept as soon as it can.
    pub(super) fn wants_turn(&self) -> bool {
        self.listener.is_some() && self.ready && self.paused_until.is_none() && self.full.is_none()
    }

    /// Returns whether the listener wants a turn and will not have one.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn is_forgotten(&self) -> bool {
        self.wants_turn() && !self.is_queued
    }

    /// Returns whether something of the listener is checked regularly.
    fn is_checked(&self) -> bool {
        !self.removed && (self.listener.is_none() || needs_checks(&self.forward))
    }

    /// Returns whether the listener waits to be woken although its clients would be admitted.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn sleeps_in_vain(&self) -> bool {
        let is_asleep = self.listener.is_some() && self.ready && self.full.is_some();
        let gate = self.forward.gates[Side::Server].as_ref();
        is_asleep && gate.is_none_or(|gate| gate.would_queue(self.forward.id))
    }

    /// Returns the gate whose VM has no slot for the listener's clients.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn full_gate(&self) -> Option<&Arc<Gate>> {
        let is_full = self.listener.is_some() && self.ready && self.full.is_some();
        self.forward.gates[Side::Server]
            .as_ref()
            .filter(|_| is_full)
    }

    /// Notes what keeps clients from being accepted.
    fn set_obstacle(&mut self, obstacle: Obstacle, why: &dyn std::fmt::Display) {
        self.obstacle = Some(obstacle);
        self.forward
            .status_cell
            .set_obstacle(obstacle, why.to_string());
    }

    /// Notes that a client was accepted, or that none waits.
    fn unblock(&mut self) {
        // A client that arrives at a lost file's socket connected before the file was lost.
        if self.obstacle != Some(Obstacle::Lost) {
            self.clear_obstacle();
        }
    }

    fn clear_obstacle(&mut self) {
        if self.obstacle.take().is_some() {
            self.forward.status_cell.clear_obstacle();
        }
    }
}

/// The listeners of one worker.
#[derive(Debug)]
pub(super) struct Listeners<D: Driver> {
    /// The listeners by their tokens.
    all: Vec<Listening<D::Listener>>,
    /// The listeners of the forwards that were not removed.
    tokens: HashMap<ForwardId, usize>,
    /// The entries that may be used for another listener.
    free: Vec<usize>,
    /// The listeners at which a client may wait, in the order of their turns (invariant 5).
    ready: VecDeque<usize>,
    /// The listeners that wait for a slot, by the gate that tells when there may be one.
    waiting: HashMap<GateId, BTreeSet<usize>>,
    pauses: Timers<usize>,
    checks: Timers<usize>,
    /// The accepted connections that this worker is to take over.
    accepted: Vec<Accepted<D::Stream>>,
    accepting: Accepting,
}

impl<D: Driver> Default for Listeners<D> {
    fn default() -> Listeners<D> {
        Listeners {
            all: Vec::new(),
            tokens: HashMap::new(),
            free: Vec::new(),
            ready: VecDeque::new(),
            waiting: HashMap::new(),
            pauses: Timers::default(),
            checks: Timers::default(),
            accepted: Vec::new(),
            accepting: Accepting::default(),
        }
    }
}

impl<D: Driver> Listeners<D> {
    /// Returns all listeners.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn all(&self) -> &[Listening<D::Listener>] {
        &self.all
    }

    /// Takes the connections that were accepted for this worker.
    pub(super) fn take_accepted(&mut self) -> Vec<Accepted<D::Stream>> {
        std::mem::take(&mut self.accepted)
    }

    /// Latches that a client waits at the listener of a token.
    pub(super) fn latch(&mut self, token: usize) {
        if let Some(listening) = self.all.get_mut(token) {
            listening.ready = true;
            self.make_ready(token);
        }
    }

    /// Puts a listener at the end of the ready queue, once.
    fn make_ready(&mut self, index: usize) {
        if !std::mem::replace(&mut self.all[index].is_queued, true) {
            self.ready.push_back(index);
        }
    }

    /// Sets the time before which a listener does not accept.
    fn set_pause(&mut self, index: usize, until: Instant) {
        let before = self.all[index].paused_until.replace(until);
        self.pauses.change(index, before, Some(until));
    }

    /// Lets a listener accept again.
    fn clear_pause(&mut self, index: usize) {
        let before = self.all[index].paused_until.take();
        self.pauses.remove(index, before);
    }

    /// Sets the time of a listener's next check.
    fn set_check(&mut self, index: usize, at: Instant) {
        let before = self.all[index].check_at.replace(at);
        self.checks.change(index, before, Some(at));
    }

    /// Ends the checks of a listener.
    fn clear_check(&mut self, index: usize) {
        let before = self.all[index].check_at.take();
        self.checks.remove(index, before);
    }

    /// Begins or ends the checks of a listener after a change of what they depend on.
    fn begin_checks(&mut self, index: usize, at: Instant) {
        let listening = &self.all[index];
        match (listening.is_checked(), listening.check_at) {
            (true, None) => self.set_check(index, at),
            (false, Some(_)) => self.clear_check(index),
            _ => {}
        }
    }

    /// Returns the time between two checks of one listener.
    fn check_interval(&self) -> Duration {
        let rounds = self.checks.len().div_ceil(CHECKS_PER_INTERVAL).max(1);
        CHECK_INTERVAL * u32::try_from(rounds).unwrap_or(u32::MAX)
    }

    /// Adds a bound listener.
    ///
    /// # Errors
    /// Returns the poller's error, if it can't watch the listener.
    pub(super) fn add(
        &mut self,
        listener: D::Listener,
        forward: Arc<Forward>,
        cx: &mut TurnContext<'_, D>,
    ) -> io::Result<()> {
        let mut listener = listener;
        let free = self.free.last().copied();
        let index = free.unwrap_or(self.all.len());
        cx.driver
            .watch_listener(&mut listener, index, &forward.rule)?;
        Self::note_name(&listener, forward.id, cx);
        self.tokens.insert(forward.id, index);
        let listening = Listening {
            listener: Some(listener),
            forward,
            ready: true,
            // The queue may still have the entry from its last use.
            is_queued: free.is_some_and(|index| self.all[index].is_queued),
            paused_until: None,
            full: None,
            log_limiter: LogLimiter::default(),
            check_at: None,
            pending_checks: 0,
            lost: false,
            obstacle: None,
            removed: false,
            given: false,
            on_closed: None,
        };
        match self.free.pop() {
            Some(index) => self.all[index] = listening,
            None => self.all.push(listening),
        }
        self.make_ready(index);
        self.begin_checks(index, cx.now);
        Ok(())
    }

    /// Closes a listener whose addition was given up. Guests that wait there are refused as usual,
    /// since closing their connections at once would harm their device.
    pub(super) fn give_up(
        &mut self,
        listener: D::Listener,
        forward: Arc<Forward>,
        cx: &mut TurnContext<'_, D>,
    ) {
        if !forward.needs_graceful_close(Side::Client) {
            return cx.driver.close_listener(listener);
        }
        forward.cut.store(true, Ordering::Release);
        let id = forward.id;
        // A listener that can't be watched is dropped there, which closes it.
        if self.add(listener, forward, cx).is_ok() {
            self.remove(id, channel().0, cx);
        }
    }

    /// Notes the name by which the clients of a forward know its listener.
    fn note_name(listener: &D::Listener, forward: ForwardId, cx: &mut TurnContext<'_, D>) {
        if let Some(name) = cx.driver.name_of_listener(listener) {
            cx.shared.routes.add_listener(name, forward);
        }
    }

    /// Returns the index of a forward's listener, if this worker has it.
    fn listener_of(&self, forward: ForwardId) -> Option<usize> {
        self.tokens.get(&forward).copied()
    }

    /// Notes that a listener's forward was removed.
    fn note_removed(&mut self, index: usize) {
        self.all[index].removed = true;
        self.tokens.remove(&self.all[index].forward.id);
        self.clear_check(index);
    }

    /// Frees the entry of a listener that has ended.
    fn free_entry(&mut self, index: usize) {
        self.clear_pause(index);
        self.free.push(index);
    }

    /// Removes the listener of a forward, if this worker has it, and notifies `done` when its
    /// address is free. Clients that wait there are served.
    pub(super) fn remove(
        &mut self,
        forward: ForwardId,
        done: Sender<()>,
        cx: &mut TurnContext<'_, D>,
    ) {
        let Some(index) = self.listener_of(forward) else {
            // The thread that asked may have given up.
            let _ = done.send(());
            return;
        };
        self.note_removed(index);
        let listening = &mut self.all[index];
        match listening.pending_checks {
            0 => self.end_listener(index, done, cx),
            // The address may be bound again meanwhile.
            _ => listening.on_closed = Some(done),
        }
    }

    /// Closes the listener of a removed forward, once no check of its file is pending.
    fn end_listener(&mut self, index: usize, done: Sender<()>, cx: &mut TurnContext<'_, D>) {
        self.accept_waiting(index, cx);
        let listening = &mut self.all[index];
        cx.shared.routes.remove_listener(listening.forward.id);
        listening.forward.closed.store(true, Ordering::Release);
        match listening.listener.take() {
            Some(listener) => cx.driver.close_listener_then(listener, done),
            None => {
                let _ = done.send(());
            }
        }
        self.free_entry(index);
    }

    /// Changes the owner, group and permissions of a forward's socket file, if this worker has the
    /// listener.
    pub(super) fn set_access(
        &mut self,
        forward: ForwardId,
        access: FileAccess,
        wanted: StillWanted,
        done: Sender<io::Result<()>>,
        cx: &mut TurnContext<'_, D>,
    ) {
        let index = self.listener_of(forward);
        match index.and_then(|index| self.all[index].listener.as_ref()) {
            Some(listener) => cx.driver.set_access(listener, access, wanted, done),
            // The thread that asked may have given up.
            None => drop(done.send(Ok(()))),
        }
    }

    /// Replaces the rule for the clients that are accepted from now on, if this worker has the
    /// forward's listener.
    pub(super) fn replace_forward(&mut self, forward: Arc<Forward>, now: Instant) {
        if let Some(index) = self.listener_of(forward.id) {
            let listening = &mut self.all[index];
            // The new rule may lead to another VM, which may have a slot.
            listening.full = None;
            listening.forward = forward;
            self.make_ready(index);
            self.begin_checks(index, now);
        }
    }

    /// Sets whether all listeners, those that are added later included, accept clients.
    #[cfg(all(unix, feature = "cli"))]
    pub(super) fn set_accepting(&mut self, accepting: Accepting, cx: &mut TurnContext<'_, D>) {
        self.accepting = accepting;
        if accepting == Accepting::Suspended {
            return;
        }
        for it in &mut self.all {
            if let Some(listener) = &mut it.listener {
                cx.driver.keep_listener(listener, &it.forward.rule);
            }
        }
    }

    /// Returns duplicates of all listeners, for another process.
    #[cfg(all(unix, feature = "cli"))]
    pub(super) fn lend(
        &mut self,
        cx: &mut TurnContext<'_, D>,
    ) -> Vec<(ForwardId, io::Result<Lent>)> {
        let lend = |it: &Listening<D::Listener>| {
            let listener = it.listener.as_ref().filter(|_| !it.removed)?;
            Some((it.forward.id, cx.driver.lend_listener(listener)))
        };
        self.all.iter().filter_map(lend).collect()
    }

    /// Leaves the listeners of these forwards, if this worker has them, to another process. Clients
    /// that wait there are that process'.
    #[cfg(all(unix, feature = "cli"))]
    pub(super) fn give(&mut self, forwards: &[ForwardId], cx: &mut TurnContext<'_, D>) {
        for &id in forwards {
            let Some(index) = self.listener_of(id) else {
                continue;
            };
            self.note_removed(index);
            let listening = &mut self.all[index];
            listening.given = true;
            cx.shared.routes.remove_listener(id);
            listening.forward.closed.store(true, Ordering::Release);
            if let Some(listener) = listening.listener.take() {
                cx.driver.give_listener(listener);
            }
            listening.set_obstacle(Obstacle::Closed, &"");
            if listening.pending_checks == 0 {
                self.free_entry(index);
            }
        }
    }

    /// Returns the time of the next turn without an event.
    pub(super) fn next(&self, now: Instant) -> Option<Instant> {
        // Only a command ends that.
        if self.accepting == Accepting::Suspended {
            return None;
        }
        let ready = (!self.ready.is_empty()).then_some(now);
        let times = [ready, self.pauses.next(), self.checks.next()];
        times.into_iter().flatten().min()
    }

    /// Has the listeners accept at which clients may wait, and checks those that are due. What is
    /// left for the next turn goes to the back of its queue.
    pub(super) fn take_turns(&mut self, cx: &mut TurnContext<'_, D>) {
        if self.accepting == Accepting::Suspended {
            return;
        }
        while let Some(index) = self.pauses.pop_due(cx.now) {
            self.all[index].paused_until = None;
            self.make_ready(index);
        }
        for gate in cx.shared.inboxes[cx.index].take_freed() {
            for index in self.waiting.remove(&gate).unwrap_or_default() {
                self.make_ready(index);
            }
        }
        for _ in 0..self.ready.len().min(ACCEPTS_PER_TURN) {
            let Some(index) = self.ready.pop_front() else {
                break;
            };
            let listening = &mut self.all[index];
            listening.is_queued = false;
            if listening.ready && listening.paused_until.is_none() {
                self.accept_from(index, Clients::WithSlot, cx);
            }
        }
        let again = cx.now + self.check_interval();
        for _ in 0..CHECKS_PER_TURN {
            let Some(index) = self.checks.pop_due(cx.now) else {
                break;
            };
            self.all[index].check_at = None;
            self.set_check(index, again);
            self.check_file(index, cx);
            self.look_at_vms(index, cx);
            // A connection of this process may wait by now, for which no slot need be free.
            if self.all[index].full.is_some() {
                self.make_ready(index);
            }
        }
    }

    /// Accepts all clients that wait at the listeners now.
    pub(super) fn accept_all(&mut self, cx: &mut TurnContext<'_, D>) {
        for index in 0..self.all.len() {
            self.accept_waiting(index, cx);
        }
    }

    /// Accepts all clients that wait at a listener now, whether an event has reported them or not.
    fn accept_waiting(&mut self, index: usize, cx: &mut TurnContext<'_, D>) {
        if self.accepting == Accepting::Suspended {
            return;
        }
        self.all[index].ready = true;
        self.clear_pause(index);
        // As many turns as the longest backlog needs.
        for _ in 0..LONGEST_BACKLOG / BATCH {
            let listening = &self.all[index];
            if !listening.ready || listening.paused_until.is_some() || listening.listener.is_none()
            {
                break;
            }
            self.accept_from(index, Clients::All, cx);
        }
    }

    /// Accepts clients that wait at a listener.
    fn accept_from(&mut self, index: usize, clients: Clients, cx: &mut TurnContext<'_, D>) {
        self.accept_batch(index, clients, cx);
        if self.all[index].wants_turn() {
            self.make_ready(index);
        }
    }

    /// Accepts as many clients as have their turn now.
    fn accept_batch(&mut self, index: usize, clients: Clients, cx: &mut TurnContext<'_, D>) {
        for _ in 0..BATCH {
            let listening = &mut self.all[index];
            if listening.listener.is_none() {
                return;
            }
            // Guests are accepted whatever happens: hyperkit blocks until they are. So are
            // connections that another forward has dialled: the connection that they belong to may
            // have the slot that is missing.
            let forward = &listening.forward;
            if !forward.needs_graceful_close(Side::Client)
                && let Some(reason) = cx.shared.is_full_for(forward.id)
                && !cx.shared.may_come_from_us(forward)
            {
                return self.pause(index, Obstacle::Full, cx, &reason);
            }
            let slot = match self.queue_for_slot(index, clients, cx) {
                Ok(slot) => slot,
                Err(full) => {
                    let is_reported = self.all[index].full.replace(full) == Some(full);
                    if let Some(gate) = &self.all[index].forward.gates[Side::Server] {
                        self.waiting.entry(gate.id()).or_default().insert(index);
                    }
                    if !is_reported {
                        self.block(index, Obstacle::Full, &full, cx);
                    }
                    return;
                }
            };
            let listening = &mut self.all[index];
            let Some(listener) = &listening.listener else {
                return;
            };
            listening.full = None;
            match cx.driver.accept(listener) {
                Ok((stream, peer)) => {
                    listening.unblock();
                    let forward = Arc::clone(&listening.forward);
                    add_one(&forward.tally.accepted);
                    let (guest, served) = take_guest(&forward, &peer, cx);
                    cx.shared.note_begin(&forward, Holder::Forward(forward.id));
                    let accepted = Accepted {
                        stream,
                        peer,
                        forward,
                        slots: [guest, slot],
                        served,
                    };
                    self.hand_over(accepted, cx);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    listening.ready = false;
                    listening.unblock();
                    return;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The next client may still be there.
                Err(e) if has_client_left(&e) => {}
                Err(e) if is_broken(&e) => return self.replace_broken(index, cx),
                // Invariant 10: no error ends a listener. Most often descriptors ran out, and a
                // close frees one.
                Err(e) => return self.pause(index, Obstacle::Paused, cx, &e),
            }
        }
    }

    /// Binds the address of a listener again that was shut down from outside (`ss -K`, or another
    /// process that shares it).
    fn replace_broken(&mut self, index: usize, cx: &mut TurnContext<'_, D>) {
        let listening = &mut self.all[index];
        let forward = Arc::clone(&listening.forward);
        listening.ready = false;
        // A listener that is about to be closed is left as it is: the close removes its file on
        // another thread (invariant 8).
        if cx.phase > Phase::Running || listening.removed {
            return;
        }
        listening.set_obstacle(Obstacle::Lost, &"its listener was shut down");
        if listening.log_limiter.admit("shut down", cx.now).is_some() {
            let listen = &forward.rule.listen;
            warn!("the listener on {listen} was shut down from outside; binding it again");
        }
        if listening.listener.is_some() {
            self.bind_again(index, cx);
        }
        self.begin_checks(index, cx.now + CHECK_INTERVAL);
    }

    /// Closes a listener, if it is open, and has its address bound again.
    fn bind_again(&mut self, index: usize, cx: &mut TurnContext<'_, D>) {
        let listening = &mut self.all[index];
        let old = listening.listener.take();
        listening.pending_checks += 1;
        let of = ListenerId {
            token: index,
            forward: listening.forward.id,
        };
        cx.driver.bind_again(old, of, &listening.forward.rule);
    }

    /// Queues the next client for a slot of the VM that its forward leads to, if there is one.
    fn queue_for_slot(
        &self,
        index: usize,
        clients: Clients,
        cx: &TurnContext<'_, D>,
    ) -> Result<Option<Slot>, Full> {
        let forward = &self.all[index].forward;
        match &forward.gates[Side::Server] {
            // Guests are accepted whatever happens.
            Some(gate)
                if clients == Clients::WithSlot && !forward.needs_graceful_close(Side::Client) =>
            {
                let wake = cx.shared.inboxes[cx.index].slot_waker();
                match gate.queue(forward.id, cx.index, wake) {
                    // As with the process' slots, the client's own connection may have the slot
                    // that is missing.
                    Err(_) if cx.shared.may_come_from_us(forward) => {
                        Ok(Some(gate.queue_always(forward.id)))
                    }
                    queued => queued.map(Some),
                }
            }
            Some(gate) => Ok(Some(gate.queue_always(forward.id))),
            None => Ok(None),
        }
    }

    /// Has a listener try again in a moment.
    fn pause(
        &mut self,
        index: usize,
        obstacle: Obstacle,
        cx: &mut TurnContext<'_, D>,
        reason: &io::Error,
    ) {
        // The listener tries again by itself, whatever the state of its VM was.
        self.all[index].full = None;
        self.set_pause(index, cx.now + PAUSE);
        self.block(index, obstacle, reason, cx);
    }

    /// Reports why clients have to wait.
    fn block(
        &mut self,
        index: usize,
        obstacle: Obstacle,
        reason: &dyn std::fmt::Display,
        cx: &mut TurnContext<'_, D>,
    ) {
        let listening = &mut self.all[index];
        listening.set_obstacle(obstacle, reason);
        let key = match obstacle {
            Obstacle::Full => "full",
            _ => "paused",
        };
        if listening.log_limiter.admit(key, cx.now).is_some() {
            let listen = &listening.forward.rule.listen;
            warn!("not accepting on {listen} for now: {reason}; new clients wait");
        }
    }

    /// Hands a connection over to the worker with the fewest.
    fn hand_over(&mut self, accepted: Accepted<D::Stream>, cx: &mut TurnContext<'_, D>) {
        let load = |index: &usize| cx.shared.inboxes[*index].load.load(Ordering::Relaxed);
        let mine = load(&cx.index);
        // Once the stop has begun, other workers may have ended.
        let least = (0..cx.shared.inboxes.len())
            .min_by_key(load)
            .filter(|index| !cx.shared.is_stopping() && load(index) < mine);
        let to = match accepted.stream.is_settled() {
            true => cx.index,
            false => least.unwrap_or(cx.index),
        };
        cx.shared.inboxes[to].load.fetch_add(1, Ordering::Relaxed);
        if to == cx.index {
            self.accepted.push(accepted);
        } else {
            cx.shared.inboxes[to].send(Command::Adopt(accepted));
        }
    }

    /// Looks at the VMs of a forward, so that a change is known before a client meets it.
    fn look_at_vms(&mut self, index: usize, cx: &mut TurnContext<'_, D>) {
        let forward = Arc::clone(&self.all[index].forward);
        for gate in forward.gates.iter().flatten() {
            if gate.begin_look(cx.now, CHECK_INTERVAL) {
                cx.driver.look_at_vm(gate);
            }
        }
    }

    /// Checks a socket's file, or tries again to bind the address.
    fn check_file(&mut self, index: usize, cx: &mut TurnContext<'_, D>) {
        let listening = &mut self.all[index];
        // One check at a time, since it may hang.
        if cx.phase != Phase::Running || listening.pending_checks > 0 {
            return;
        }
        match &listening.listener {
            None => self.bind_again(index, cx),
            Some(listener) if listening.forward.rule.listen.listen_path().is_some() => {
                listening.pending_checks += 1;
                let of = ListenerId {
                    token: index,
                    forward: listening.forward.id,
                };
                let rule = &listening.forward.rule;
                if !cx.driver.check_file(listener, of, rule) {
                    listening.pending_checks -= 1;
                }
            }
            Some(_) => {}
        }
    }

    /// Takes the result of checking a listener's file, or of binding its address again.
    pub(super) fn take_listener(
        &mut self,
        of: ListenerId,
        found: Found<D::Listener>,
        cx: &mut TurnContext<'_, D>,
    ) {
        let its = |it: &&mut Listening<D::Listener>| it.forward.id == of.forward;
        let Some(listening) = self.all.get_mut(of.token).filter(its) else {
            if let Found::Bound(listener) = found {
                cx.driver.close_listener(listener);
            }
            return;
        };
        listening.pending_checks -= 1;
        let on_closed = match listening.pending_checks {
            0 => listening.on_closed.take(),
            _ => None,
        };
        // Guests are accepted to the very end: closing a socket at which one waits would harm its
        // device.
        let takes_clients =
            cx.phase == Phase::Running || listening.forward.needs_graceful_close(Side::Client);
        match found {
            // If its file was removed, the process that has the listener makes it again.
            Found::Bound(listener) if !takes_clients || listening.given => {
                cx.driver.close_listener(listener);
            }
            _ if listening.given => {}
            found => self.take_file_state(of, found, cx),
        }
        if let Some(done) = on_closed {
            self.end_listener(of.token, done, cx);
        } else if self.all[of.token].given && self.all[of.token].pending_checks == 0 {
            self.free_entry(of.token);
        }
    }

    /// Acts on the state of a listener's file. A file that was removed was created again: a VM that
    /// starts may clear its directory, and cleaners of `/tmp` remove old files.
    fn take_file_state(
        &mut self,
        of: ListenerId,
        found: Found<D::Listener>,
        cx: &mut TurnContext<'_, D>,
    ) {
        let listening = &mut self.all[of.token];
        let forward = Arc::clone(&listening.forward);
        let listen = &forward.rule.listen;
        match found {
            Found::Nothing => {}
            Found::Ours => {
                if listening.obstacle == Some(Obstacle::Lost) {
                    listening.lost = false;
                    listening.clear_obstacle();
                }
            }
            Found::Taken => {
                let why = "another program has taken its place";
                listening.set_obstacle(Obstacle::Lost, &why);
                if !listening.lost {
                    listening.lost = true;
                    error!(
                        "{listen} was taken over by another program; its clients don't reach us any more"
                    );
                }
            }
            Found::Bound(mut listener) => {
                // Clients that wait at the old one connected earlier, and are accepted first.
                let was_shut_down = listening.listener.is_none();
                self.accept_waiting(of.token, cx);
                let listening = &mut self.all[of.token];
                if let Some(old) = listening.listener.take() {
                    cx.driver.close_listener(old);
                }
                let rule = &forward.rule;
                if let Err(e) = cx.driver.watch_listener(&mut listener, of.token, rule) {
                    cx.driver.close_listener(listener);
                    // Invariant 11: it is tried again each second, and logged once.
                    let e = Error::new(Operation::Listen, listen, e);
                    return self.take_file_state(of, Found::Failed(e), cx);
                }
                let listening = &mut self.all[of.token];
                match was_shut_down {
                    false => info!("made {listen} again: its file had been removed"),
                    // The shutdown was logged; it may happen again and again.
                    true if !listening.lost => debug!("listening on {listen} again"),
                    true => info!("listening on {listen} again"),
                }
                Self::note_name(&listener, of.forward, cx);
                let listening = &mut self.all[of.token];
                listening.listener = Some(listener);
                (listening.ready, listening.lost) = (true, false);
                listening.clear_obstacle();
                self.make_ready(of.token);
                self.begin_checks(of.token, cx.now + CHECK_INTERVAL);
            }
            Found::Failed(e) => {
                listening.set_obstacle(Obstacle::Lost, &e);
                let what = match listening.listener {
                    Some(_) => "has been removed, and it can't be made again yet",
                    None => "can't be bound again yet",
                };
                if !std::mem::replace(&mut listening.lost, true) {
                    error!("{listen} {what}: {e}");
                }
            }
        }
    }

    /// Closes all listeners except those that guests dial: hyperkit can't bear an unbound port.
    pub(super) fn close_client_listeners(&mut self, cx: &mut TurnContext<'_, D>) {
        for listening in &mut self.all {
            if !listening.forward.needs_graceful_close(Side::Client)
                && let Some(listener) = listening.listener.take()
            {
                cx.driver.close_listener(listener);
                listening.set_obstacle(Obstacle::Closed, &"");
            }
        }
    }

    /// Closes all listeners.
    pub(super) fn close_all(&mut self, cx: &mut TurnContext<'_, D>) {
        for listening in &mut self.all {
            if let Some(listener) = listening.listener.take() {
                cx.driver.close_listener(listener);
            }
        }
    }
}

/// Takes a slot for a client that was accepted, if it is a guest. Returns it, and whether the guest
/// is served.
fn take_guest<D: Driver>(
    forward: &Forward,
    peer: &SocketName,
    cx: &TurnContext<'_, D>,
) -> (Option<Slot>, Result<(), NotServed>) {
    // A client that may not come is refused soon.
    let gate = forward.rule.admits(peer).then(|| {
        let its = forward.gates[Side::Client].clone();
        its.or_else(|| cx.shared.gates.of_guest(peer))
    });
    let Some(gate) = gate.flatten() else {
        return (None, Ok(()));
    };
    let limit = cx.shared.reached_limit(forward.id);
    let Guest { slot, served } = gate.accept(forward.id, limit, cx.now);
    (Some(slot), served)
}

/// Returns whether a forward has something that is checked regularly.
fn needs_checks(forward: &Forward) -> bool {
    forward.rule.listen.listen_path().is_some() || forward.gate().is_some()
}
