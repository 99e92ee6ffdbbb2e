//! The listeners of a worker: accepting in batches, surviving every error, keeping their files.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use tracing::{debug, error, info, warn};

use crate::engine::relay::{Side, Socket};
use crate::listener::nonblocking::{has_client_left, is_broken};

use super::driver::{Driver, Found, ListenerId, Wanted};
use super::shared::{Accepted, Command, TurnContext};
use crate::engine::Phase;
use crate::engine::admission::quotas::Holder;
use crate::engine::admission::{Full, Slot};
use crate::engine::counters::add_one;
use crate::engine::forward::Forward;
use crate::engine::id::ForwardId;
use crate::engine::log_limiter::LogLimiter;
use crate::engine::status::Obstacle;

/// Connections that one listener may accept before the others have their turn.
const BATCH: usize = 64;

/// What [`accept_all`](Listeners::accept_all) takes from one listener at most.
const LONGEST_BACKLOG: usize = 4096;

/// How long a listener that can't accept now waits before it looks again.
const PAUSE: Duration = Duration::from_millis(20);

/// How often the files of Unix sockets are looked after.
const WATCH: Duration = Duration::from_secs(1);

/// A listener in a worker's loop.
#[derive(Debug)]
pub(crate) struct Listening<L> {
    listener: Option<L>,
    forward: Arc<Forward>,
    /// Someone waits to be accepted, as far as is known.
    pub(super) ready: bool,
    /// Not before this time.
    paused: Option<Instant>,
    /// Its VM has no place for it: the gate wakes us when that may have changed.
    full: Option<Full>,
    log_limiter: LogLimiter,
    /// When its socket's file and its VM are to be looked after.
    watch: Instant,
    /// How often it was asked what has become of its file, or to bind it again, without an answer yet.
    asked: u32,
    lost: bool,
    /// What status says of it.
    obstacle: Option<Obstacle>,
    /// Its forward is gone: another may have its place.
    removed: bool,
    /// Who is to be told that the address is free, once it is known what has become of the file.
    leaves: Option<Sender<()>>,
}

impl<L> Listening<L> {
    /// Returns whether it waits to be woken though its clients would be let in.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn sleeps_in_vain(&self) -> bool {
        let is_asleep = self.listener.is_some() && self.ready && self.full.is_some();
        let gate = self.forward.gates[Side::Server].as_ref();
        is_asleep && gate.is_none_or(|gate| gate.would_queue(self.forward.id))
    }

    /// Notes what keeps clients from being accepted.
    fn set_obstacle(&mut self, obstacle: Obstacle, why: &dyn std::fmt::Display) {
        self.obstacle = Some(obstacle);
        self.forward
            .status_cell
            .set_obstacle(obstacle, why.to_string());
    }

    /// Someone was accepted, or nobody waits.
    fn unblock(&mut self) {
        // Who comes to a socket whose file is lost came before that.
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
    all: Vec<Listening<D::Listener>>,
    /// Connections of this worker that were accepted and are to be taken over.
    accepted: Vec<Accepted<D::Stream>>,
}

impl<D: Driver> Default for Listeners<D> {
    fn default() -> Listeners<D> {
        Listeners {
            all: Vec::new(),
            accepted: Vec::new(),
        }
    }
}

impl<D: Driver> Listeners<D> {
    /// Returns all of them.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn all(&self) -> &[Listening<D::Listener>] {
        &self.all
    }

    /// Takes out what was accepted for this worker.
    pub(super) fn take_accepted(&mut self) -> Vec<Accepted<D::Stream>> {
        std::mem::take(&mut self.accepted)
    }

    /// Latches that somebody waits at the listener of a token.
    pub(super) fn latch(&mut self, token: usize) {
        if let Some(listening) = self.all.get_mut(token) {
            listening.ready = true;
        }
    }

    /// Takes over a bound listener.
    ///
    /// # Errors
    /// The poller can't watch it.
    pub(super) fn add(
        &mut self,
        listener: D::Listener,
        forward: Arc<Forward>,
        cx: &mut TurnContext<'_, D>,
    ) -> io::Result<()> {
        let mut listener = listener;
        let is_free = |it: &Listening<D::Listener>| it.removed && it.asked == 0;
        let free = self.all.iter().position(is_free);
        let index = free.unwrap_or(self.all.len());
        cx.driver.watch_listener(&mut listener, index)?;
        Self::note_mark(&listener, forward.id, cx);
        let watch = cx.now;
        let listening = Listening {
            listener: Some(listener),
            forward,
            ready: true,
            paused: None,
            full: None,
            log_limiter: LogLimiter::default(),
            watch,
            asked: 0,
            lost: false,
            obstacle: None,
            removed: false,
            leaves: None,
        };
        match self.all.get_mut(index) {
            Some(place) => *place = listening,
            None => self.all.push(listening),
        }
        Ok(())
    }

    /// Closes a listener that is not to be taken over, after its addition was given up. Guests that
    /// wait there are refused as any others: one that is closed at once hurts its device.
    pub(super) fn give_up(
        &mut self,
        listener: D::Listener,
        forward: Arc<Forward>,
        cx: &mut TurnContext<'_, D>,
    ) {
        if !forward.needs_graceful_close(Side::Client) {
            return cx.driver.close_listener(listener, None);
        }
        forward.cut.store(true, Ordering::Release);
        let id = forward.id;
        // One that can't be watched is closed by that.
        if self.add(listener, forward, cx).is_ok() {
            self.remove(id, channel().0, cx);
        }
    }

    /// Notes by what the clients of a forward know it.
    fn note_mark(listener: &D::Listener, forward: ForwardId, cx: &mut TurnContext<'_, D>) {
        if let Some(mark) = cx.driver.name_of_listener(listener) {
            cx.shared.routes.listens(mark, forward);
        }
    }

    /// Where the listener of a forward is, if this worker has it.
    fn listener_of(&self, forward: ForwardId) -> Option<usize> {
        let its = |it: &Listening<D::Listener>| !it.removed && it.forward.id == forward;
        self.all.iter().position(its)
    }

    /// Ends the listener of a forward, if this worker has it, and tells when its address is free. Who waits there is
    /// served.
    pub(super) fn remove(
        &mut self,
        forward: ForwardId,
        done: Sender<()>,
        cx: &mut TurnContext<'_, D>,
    ) {
        let Some(index) = self.listener_of(forward) else {
            // Who asked may have given up.
            let _ = done.send(());
            return;
        };
        let listening = &mut self.all[index];
        listening.removed = true;
        match listening.asked {
            0 => self.end_listener(index, done, cx),
            // It may be bound again meanwhile.
            _ => listening.leaves = Some(done),
        }
    }

    /// Closes a listener whose forward is gone, once nothing is asked about its file any more.
    fn end_listener(&mut self, index: usize, done: Sender<()>, cx: &mut TurnContext<'_, D>) {
        self.accept_waiting(index, cx);
        let listening = &mut self.all[index];
        cx.shared.routes.listens_no_more(listening.forward.id);
        listening.forward.closed.store(true, Ordering::Release);
        match listening.listener.take() {
            Some(listener) => cx.driver.close_listener(listener, Some(done)),
            None => {
                let _ = done.send(());
            }
        }
    }

    /// Gives the file of a forward's socket other permissions, if this worker has its listener.
    pub(super) fn set_mode(
        &mut self,
        forward: ForwardId,
        mode: u32,
        wanted: Wanted,
        done: Sender<io::Result<()>>,
        cx: &mut TurnContext<'_, D>,
    ) {
        let index = self.listener_of(forward);
        match index.and_then(|index| self.all[index].listener.as_ref()) {
            Some(listener) => cx.driver.set_mode(listener, mode, wanted, done),
            // Who asked may have given up.
            None => drop(done.send(Ok(()))),
        }
    }

    /// Gives the clients that are accepted from now on another rule, if this worker has the forward's listener.
    pub(super) fn replace_forward(&mut self, forward: Arc<Forward>) {
        if let Some(index) = self.listener_of(forward.id) {
            let listening = &mut self.all[index];
            // Where there was no place there may be one: it may be another VM's.
            listening.full = None;
            listening.forward = forward;
        }
    }

    /// When a listener wants to be looked at without an event.
    pub(super) fn next(&self, now: Instant) -> Option<Instant> {
        let wants = |listening: &Listening<D::Listener>| {
            let ready =
                (listening.ready && listening.full.is_none() && listening.listener.is_some())
                    .then(|| listening.paused.unwrap_or(now));
            let watched = !listening.removed
                && (listening.listener.is_none() || is_watched(&listening.forward));
            [ready, watched.then_some(listening.watch)]
                .into_iter()
                .flatten()
                .min()
        };
        self.all.iter().filter_map(wants).min()
    }

    pub(super) fn take_turns(&mut self, cx: &mut TurnContext<'_, D>) {
        for index in 0..self.all.len() {
            let listening = &mut self.all[index];
            if listening.paused.is_some_and(|at| at <= cx.now) {
                listening.paused = None;
            }
            if listening.ready && listening.paused.is_none() {
                self.accept_from(index, false, cx);
            }
            let listening = &mut self.all[index];
            if listening.watch <= cx.now && !listening.removed {
                listening.watch = cx.now + WATCH;
                self.look_after(index, cx);
                self.look_at_vms(index, cx);
            }
        }
    }

    /// Accepts all who wait at the listeners now.
    pub(super) fn accept_all(&mut self, cx: &mut TurnContext<'_, D>) {
        for index in 0..self.all.len() {
            self.accept_waiting(index, cx);
        }
    }

    /// Accepts all who wait at a listener now, whether an event has told of them or not.
    fn accept_waiting(&mut self, index: usize, cx: &mut TurnContext<'_, D>) {
        let listening = &mut self.all[index];
        (listening.ready, listening.paused) = (true, None);
        // As many turns as the longest backlog takes.
        for _ in 0..LONGEST_BACKLOG / BATCH {
            let listening = &self.all[index];
            if !listening.ready || listening.paused.is_some() || listening.listener.is_none() {
                break;
            }
            self.accept_from(index, true, cx);
        }
    }

    /// Accepts who waits at a listener: those for whom there is a place in its VM, or `all` of them.
    fn accept_from(&mut self, index: usize, all: bool, cx: &mut TurnContext<'_, D>) {
        for _ in 0..BATCH {
            let listening = &mut self.all[index];
            if listening.listener.is_none() {
                return;
            }
            // Guests are accepted whatever happens: hyperkit stands still until they are. So is what
            // comes from another forward: the place that it waits for may be that one's.
            let forward = &listening.forward;
            if !forward.needs_graceful_close(Side::Client)
                && let Some(reason) = cx.shared.is_full_for(forward.id)
                && !cx.shared.may_come_from_us(forward)
            {
                return self.pause(index, Obstacle::Full, cx, &reason);
            }
            let slot = match self.queue_for_slot(index, all, cx) {
                Ok(slot) => slot,
                Err(full) => {
                    let known = self.all[index].full.replace(full) == Some(full);
                    if !known {
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
                    debug!(listen = %forward.rule.listen, ?peer, "accepted");
                    add_one(&forward.tally.accepted);
                    cx.shared.begins(&forward, Holder::Forward(forward.id));
                    let accepted = Accepted {
                        stream,
                        peer,
                        forward,
                        slot,
                    };
                    self.hand_over(accepted, cx);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    listening.ready = false;
                    listening.unblock();
                    return;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The next one may not have left.
                Err(e) if has_client_left(&e) => {}
                Err(e) if is_broken(&e) => return self.replace_broken(index, cx),
                // Invariant 10: no error ends a listener. Most often descriptors ran out: a close brings one.
                Err(e) => return self.pause(index, Obstacle::Paused, cx, &e),
            }
        }
    }

    /// Binds the address of a listener again that somebody has shut down (`ss -K`, or another process that has it).
    fn replace_broken(&mut self, index: usize, cx: &mut TurnContext<'_, D>) {
        let listening = &mut self.all[index];
        let forward = Arc::clone(&listening.forward);
        listening.ready = false;
        listening.set_obstacle(Obstacle::Lost, &"its listener was shut down");
        if listening.log_limiter.admit("shut down", cx.now).is_some() {
            let listen = &forward.rule.listen;
            warn!("the listener on {listen} was shut down from outside; binding it again");
        }
        if let Some(old) = listening.listener.take()
            && cx.phase == Phase::Running
            && !listening.removed
        {
            self.bind_again(index, Some(old), cx);
        }
    }

    fn bind_again(&mut self, index: usize, old: Option<D::Listener>, cx: &mut TurnContext<'_, D>) {
        let listening = &mut self.all[index];
        listening.asked += 1;
        let of = ListenerId {
            token: index,
            forward: listening.forward.id,
        };
        cx.driver.bind_again(old, of, &listening.forward.rule);
    }

    /// A client's right to a place in the VM that its forward leads to, if there is one.
    fn queue_for_slot(
        &self,
        index: usize,
        all: bool,
        cx: &TurnContext<'_, D>,
    ) -> Result<Option<Slot>, Full> {
        let forward = &self.all[index].forward;
        match &forward.gates[Side::Server] {
            // Guests are accepted whatever happens.
            Some(gate) if !forward.needs_graceful_close(Side::Client) && !all => {
                let wake = cx.shared.inboxes[cx.index].waker();
                match gate.queue(forward.id, cx.index, &wake) {
                    // As with all places: it may be that one's.
                    Err(_) if cx.shared.may_come_from_us(forward) => {
                        Ok(Some(gate.queue_always(forward.id)))
                    }
                    entered => entered.map(Some),
                }
            }
            Some(gate) => Ok(Some(gate.queue_always(forward.id))),
            None => Ok(None),
        }
    }

    fn pause(
        &mut self,
        index: usize,
        obstacle: Obstacle,
        cx: &mut TurnContext<'_, D>,
        reason: &io::Error,
    ) {
        let listening = &mut self.all[index];
        // It looks again by itself, whatever its VM was like before.
        (listening.paused, listening.full) = (Some(cx.now + PAUSE), None);
        self.block(index, obstacle, reason, cx);
    }

    /// Says why clients have to wait.
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

    /// Gives a connection to the worker that has the fewest.
    fn hand_over(&mut self, accepted: Accepted<D::Stream>, cx: &mut TurnContext<'_, D>) {
        let load = |index: &usize| cx.shared.inboxes[*index].load.load(Ordering::Relaxed);
        let mine = load(&cx.index);
        // Once the end has begun the others may be gone.
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

    /// Looks whether the VMs of a forward are there: so it is known without a client who finds out.
    fn look_at_vms(&mut self, index: usize, cx: &mut TurnContext<'_, D>) {
        let forward = Arc::clone(&self.all[index].forward);
        for gate in forward.gates.iter().flatten() {
            if gate.begin_look(cx.now, WATCH) {
                cx.driver.look_at_vm(gate);
            }
        }
    }

    /// Has a socket's file looked after, and one that could not be bound again tried again.
    fn look_after(&mut self, index: usize, cx: &mut TurnContext<'_, D>) {
        let listening = &mut self.all[index];
        // One question at a time: what is asked may hang.
        if cx.phase != Phase::Running || listening.asked > 0 {
            return;
        }
        match &listening.listener {
            None => self.bind_again(index, None, cx),
            Some(listener) if listening.forward.rule.listen.listen_path().is_some() => {
                listening.asked += 1;
                let of = ListenerId {
                    token: index,
                    forward: listening.forward.id,
                };
                let rule = &listening.forward.rule;
                if !cx.driver.check_file(listener, of, rule) {
                    listening.asked -= 1;
                }
            }
            Some(_) => {}
        }
    }

    /// Takes what has become of a listener's file, or of binding its address again.
    pub(super) fn take_listener(
        &mut self,
        of: ListenerId,
        found: Found<D::Listener>,
        cx: &mut TurnContext<'_, D>,
    ) {
        let its = |it: &&mut Listening<D::Listener>| it.forward.id == of.forward;
        let Some(listening) = self.all.get_mut(of.token).filter(its) else {
            if let Found::Bound(listener) = found {
                cx.driver.close_listener(listener, None);
            }
            return;
        };
        listening.asked -= 1;
        let leaves = match listening.asked {
            0 => listening.leaves.take(),
            _ => None,
        };
        // Guests are accepted to the very end: one that waits at a socket which is closed is hurt.
        let takes_clients =
            cx.phase == Phase::Running || listening.forward.needs_graceful_close(Side::Client);
        match found {
            Found::Bound(listener) if !takes_clients => cx.driver.close_listener(listener, None),
            found => self.take_found(of, found, cx),
        }
        if let Some(done) = leaves {
            self.end_listener(of.token, done, cx);
        }
    }

    /// Goes on with a listener's file as it is. One that someone removed was made again: a VM that starts may clear its
    /// directory, and cleaners of `/tmp` remove what is old.
    fn take_found(
        &mut self,
        of: ListenerId,
        found: Found<D::Listener>,
        cx: &mut TurnContext<'_, D>,
    ) {
        let listening = &mut self.all[of.token];
        let forward = Arc::clone(&listening.forward);
        let listen = &forward.rule.listen;
        match found {
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
                // The old one first, who waits there before that.
                let was_shut_down = listening.listener.is_none();
                self.accept_waiting(of.token, cx);
                let listening = &mut self.all[of.token];
                if let Some(old) = listening.listener.take() {
                    cx.driver.close_listener(old, None);
                }
                if let Err(e) = cx.driver.watch_listener(&mut listener, of.token) {
                    cx.driver.close_listener(listener, None);
                    listening.set_obstacle(Obstacle::Lost, &e);
                    error!("cannot watch {listen}: {e}");
                    return;
                }
                let listening = &mut self.all[of.token];
                match was_shut_down {
                    false => info!("made {listen} again: its file had been removed"),
                    // That it was shut down was told; it may be so again and again.
                    true if !listening.lost => debug!("listening on {listen} again"),
                    true => info!("listening on {listen} again"),
                }
                Self::note_mark(&listener, of.forward, cx);
                let listening = &mut self.all[of.token];
                listening.listener = Some(listener);
                (listening.ready, listening.lost) = (true, false);
                listening.clear_obstacle();
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

    /// Closes all listeners but those that guests dial: an unbound port is what hyperkit can't stand.
    pub(super) fn close_those_of_clients(&mut self, cx: &mut TurnContext<'_, D>) {
        for listening in &mut self.all {
            if !listening.forward.needs_graceful_close(Side::Client)
                && let Some(listener) = listening.listener.take()
            {
                cx.driver.close_listener(listener, None);
                listening.set_obstacle(Obstacle::Closed, &"");
            }
        }
    }

    pub(super) fn close_all(&mut self, cx: &mut TurnContext<'_, D>) {
        for listening in &mut self.all {
            if let Some(listener) = listening.listener.take() {
                cx.driver.close_listener(listener, None);
            }
        }
    }
}

/// Whether there is something to be looked at now and then.
fn is_watched(forward: &Forward) -> bool {
    forward.rule.listen.listen_path().is_some() || forward.gate().is_some()
}
