//! The listeners of a worker: accepting in batches, surviving every error, keeping their files.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use crate::address::Address;
use crate::listener::nonblocking::FileState;
use crate::name::SocketName;
use crate::relay::{CLIENT, SERVER, Socket};

use super::counters::add_one;
use super::forward::{Complaints, Forward};
use super::gate::{Full, Ticket};
use super::status::Obstacle;
use super::worker::{Command, Phase, Worker};
use super::world::World;

/// Connections that one listener may accept before the others have their turn.
const BATCH: usize = 64;

/// What [`accept_all`](Worker::accept_all) takes from one listener at most.
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
    complaints: Complaints,
    /// When its socket's file and its VM are to be looked after.
    watch: Instant,
    lost: bool,
    /// What status says of it.
    obstacle: Option<Obstacle>,
    /// Its forward is gone: another may have its place.
    removed: bool,
}

impl<L> Listening<L> {
    /// Notes what keeps clients from being accepted.
    fn set_obstacle(&mut self, obstacle: Obstacle, why: &dyn std::fmt::Display, now: Instant) {
        self.obstacle = Some(obstacle);
        self.forward.board.blocked(obstacle, why.to_string(), now);
    }

    /// Someone was accepted, or nobody waits.
    fn unblock(&mut self) {
        // Who comes to a socket whose file is lost came before that.
        if self.obstacle != Some(Obstacle::Lost) {
            self.found();
        }
    }

    fn found(&mut self) {
        if self.obstacle.take().is_some() {
            self.forward.board.unblocked();
        }
    }
}

impl<W: World> Worker<W> {
    /// Takes over a bound listener.
    pub(crate) fn add_listener(
        &mut self,
        listener: W::Listener,
        forward: Arc<Forward>,
    ) -> io::Result<()> {
        let mut listener = listener;
        let free = self.listeners.iter().position(|it| it.removed);
        let index = free.unwrap_or(self.listeners.len());
        self.world.watch_listener(&mut listener, index)?;
        let watch = self.world.now();
        let listening = Listening {
            listener: Some(listener),
            forward,
            ready: true,
            paused: None,
            full: None,
            complaints: Complaints::default(),
            watch,
            lost: false,
            obstacle: None,
            removed: false,
        };
        match self.listeners.get_mut(index) {
            Some(place) => *place = listening,
            None => self.listeners.push(listening),
        }
        Ok(())
    }

    /// Ends the listener of a forward, if this worker has it. Who waits there is served.
    pub(super) fn remove_listener(&mut self, forward: &Arc<Forward>, now: Instant) {
        let its = |it: &Listening<W::Listener>| !it.removed && it.forward.id == forward.id;
        if let Some(index) = self.listeners.iter().position(its) {
            self.accept_waiting(index, now);
            let listening = &mut self.listeners[index];
            listening.removed = true;
            if let Some(listener) = listening.listener.take() {
                self.world.close_listener(listener);
            }
        }
    }

    /// Gives the clients that are accepted from now on another rule, if this worker has the forward's listener.
    pub(super) fn replace_forward(&mut self, forward: Arc<Forward>) -> io::Result<()> {
        let its = |it: &&mut Listening<W::Listener>| !it.removed && it.forward.id == forward.id;
        let Some(listening) = self.listeners.iter_mut().find(its) else {
            return Ok(());
        };
        let mode = forward.rule.mode;
        if let Some(listener) = &listening.listener
            && mode != listening.forward.rule.mode
        {
            self.world.set_mode(listener, mode)?;
        }
        // Where there was no place there may be one: it may be another VM's.
        listening.full = None;
        listening.forward = forward;
        Ok(())
    }

    /// When a listener wants to be looked at without an event.
    pub(super) fn next_accept(&self, now: Instant) -> Option<Instant> {
        let wants = |listening: &Listening<W::Listener>| {
            let ready =
                (listening.ready && listening.full.is_none() && listening.listener.is_some())
                    .then(|| listening.paused.unwrap_or(now));
            let watched = !listening.removed && is_watched(&listening.forward);
            [ready, watched.then_some(listening.watch)]
                .into_iter()
                .flatten()
                .min()
        };
        self.listeners.iter().filter_map(wants).min()
    }

    pub(super) fn accept_turns(&mut self, now: Instant) {
        for index in 0..self.listeners.len() {
            let listening = &mut self.listeners[index];
            if listening.paused.is_some_and(|at| at <= now) {
                listening.paused = None;
            }
            if listening.ready && listening.paused.is_none() {
                self.accept_from(index, false, now);
            }
            let listening = &mut self.listeners[index];
            if listening.watch <= now && !listening.removed {
                listening.watch = now + WATCH;
                self.look_after(index, now);
                self.look_at_vms(index, now);
            }
        }
    }

    /// Accepts all who wait at the listeners now.
    pub(super) fn accept_all(&mut self, now: Instant) {
        for index in 0..self.listeners.len() {
            self.accept_waiting(index, now);
        }
    }

    fn accept_waiting(&mut self, index: usize, now: Instant) {
        // As many turns as the longest backlog takes.
        for _ in 0..LONGEST_BACKLOG / BATCH {
            let listening = &self.listeners[index];
            if !listening.ready || listening.paused.is_some() {
                break;
            }
            self.accept_from(index, true, now);
        }
    }

    /// Accepts who waits at a listener: those for whom there is a place in its VM, or `all` of them.
    fn accept_from(&mut self, index: usize, all: bool, now: Instant) {
        for _ in 0..BATCH {
            let listening = &mut self.listeners[index];
            if listening.listener.is_none() {
                return;
            }
            // Guests are accepted whatever happens: hyperkit stands still until they are.
            if !listening.forward.is_polite(CLIENT)
                && let Some(reason) = self.shared.is_full_for(listening.forward.id)
            {
                return self.pause(index, Obstacle::Full, now, &reason);
            }
            let ticket = match self.ticket(index, all) {
                Ok(ticket) => ticket,
                Err(full) => {
                    let known = self.listeners[index].full.replace(full) == Some(full);
                    if !known {
                        self.block(index, Obstacle::Full, &full, now);
                    }
                    return;
                }
            };
            let listening = &mut self.listeners[index];
            let Some(listener) = &listening.listener else {
                return;
            };
            listening.full = None;
            match self.world.accept(listener) {
                Ok((stream, peer)) => {
                    listening.unblock();
                    let forward = Arc::clone(&listening.forward);
                    tracing::debug!(listen = %forward.rule.listen, ?peer, "accepted");
                    add_one(&forward.tally.accepted);
                    self.shared.begins(&forward);
                    self.hand_over(stream, peer, forward, ticket, now);
                }
                Err(e) => match e.kind() {
                    io::ErrorKind::WouldBlock => {
                        listening.ready = false;
                        listening.unblock();
                        return;
                    }
                    // The client left before it was accepted; the next may not have. (macOS then may give a socket
                    // without an address, of which mio makes InvalidInput.)
                    io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::InvalidInput
                    | io::ErrorKind::Interrupted => {}
                    // Invariant 10: no error ends a listener. Most often descriptors ran out: a close brings one.
                    _ => return self.pause(index, Obstacle::Paused, now, &e),
                },
            }
        }
    }

    /// A client's right to a place in the VM that its forward leads to, if there is one.
    fn ticket(&self, index: usize, all: bool) -> Result<Option<Ticket>, Full> {
        let forward = &self.listeners[index].forward;
        match &forward.gates[SERVER] {
            // Guests are accepted whatever happens.
            Some(gate) if !forward.is_polite(CLIENT) && !all => {
                let wake = self.shared.inboxes[self.index].waker();
                gate.enter(forward.id, self.index, &wake).map(Some)
            }
            Some(gate) => Ok(Some(gate.line_up(forward.id))),
            None => Ok(None),
        }
    }

    fn pause(&mut self, index: usize, obstacle: Obstacle, now: Instant, reason: &io::Error) {
        self.listeners[index].paused = Some(now + PAUSE);
        self.block(index, obstacle, reason, now);
    }

    /// Says why clients have to wait.
    fn block(
        &mut self,
        index: usize,
        obstacle: Obstacle,
        reason: &dyn std::fmt::Display,
        now: Instant,
    ) {
        let listening = &mut self.listeners[index];
        listening.set_obstacle(obstacle, reason, now);
        let key = match obstacle {
            Obstacle::Full => "full",
            _ => "paused",
        };
        if listening.complaints.admit(key, now).is_some() {
            let listen = &listening.forward.rule.listen;
            warn!("not accepting on {listen} for now: {reason}; new clients wait");
        }
    }

    /// Gives a connection to the worker that has the fewest.
    fn hand_over(
        &mut self,
        stream: W::Stream,
        peer: SocketName,
        forward: Arc<Forward>,
        ticket: Option<Ticket>,
        now: Instant,
    ) {
        let load = |index: &usize| self.shared.inboxes[*index].load.load(Ordering::Relaxed);
        let mine = load(&self.index);
        // Once the end has begun the others may be gone.
        let least = (0..self.shared.inboxes.len())
            .min_by_key(load)
            .filter(|index| self.phase == Phase::Running && load(index) < mine);
        let to = match stream.is_settled() {
            true => self.index,
            false => least.unwrap_or(self.index),
        };
        self.shared.inboxes[to].load.fetch_add(1, Ordering::Relaxed);
        if to == self.index {
            self.adopt(stream, peer, forward, ticket, now);
        } else {
            self.shared.inboxes[to].send(Command::Adopt(stream, peer, forward, ticket));
        }
    }

    /// Looks whether the VMs of a forward are there: so it is known without a client who finds out.
    fn look_at_vms(&mut self, index: usize, now: Instant) {
        let forward = Arc::clone(&self.listeners[index].forward);
        for gate in forward.gates.iter().flatten() {
            if let Some(vm) = gate.is_to_be_looked_at(now, WATCH) {
                let sign = self.world.vm_sign(vm);
                let process = self.world.vm_process(vm);
                gate.look(sign, process, now);
            }
        }
    }

    /// Makes a socket's file again that someone removed: a VM that starts may clear its directory, and cleaners of
    /// `/tmp` remove what is old.
    fn look_after(&mut self, index: usize, now: Instant) {
        let listening = &mut self.listeners[index];
        if self.phase != Phase::Running || !has_file(&listening.forward) {
            return;
        }
        let state = match &listening.listener {
            Some(listener) => self.world.file_state(listener),
            None => FileState::Missing,
        };
        let forward = Arc::clone(&listening.forward);
        let rule = &forward.rule;
        match state {
            FileState::Ours => {}
            FileState::Taken => {
                let why = "another program has taken its place";
                listening.set_obstacle(Obstacle::Lost, &why, now);
                if !listening.lost {
                    listening.lost = true;
                    error!(
                        "{} was taken over by another program; its clients don't reach us any more",
                        rule.listen
                    );
                }
            }
            FileState::Missing => match self.world.listen(&rule.listen, rule.mode) {
                Ok(mut listener) => {
                    // The old one first, who waits there before that.
                    listening.ready = listening.listener.is_some();
                    self.accept_from(index, true, now);
                    let listening = &mut self.listeners[index];
                    let rule = &listening.forward.rule;
                    if let Some(old) = listening.listener.take() {
                        self.world.close_listener(old);
                    }
                    if let Err(e) = self.world.watch_listener(&mut listener, index) {
                        error!("cannot watch {}: {e}", rule.listen);
                        return;
                    }
                    info!("made {} again: its file had been removed", rule.listen);
                    listening.listener = Some(listener);
                    listening.ready = true;
                    listening.lost = false;
                    listening.found();
                }
                Err(e) => {
                    listening.set_obstacle(Obstacle::Lost, &e, now);
                    if !listening.lost {
                        listening.lost = true;
                        error!(
                            "{} has been removed, and it can't be made again yet: {e}",
                            rule.listen
                        );
                    }
                }
            },
        }
    }

    /// Closes all listeners but those that guests dial: an unbound port is what hyperkit can't stand.
    pub(super) fn close_client_listeners(&mut self, now: Instant) {
        for listening in &mut self.listeners {
            if !listening.forward.is_polite(CLIENT)
                && let Some(listener) = listening.listener.take()
            {
                self.world.close_listener(listener);
                listening.set_obstacle(Obstacle::Closed, &"", now);
            }
        }
    }

    pub(super) fn close_listeners(&mut self) {
        for listening in &mut self.listeners {
            if let Some(listener) = listening.listener.take() {
                self.world.close_listener(listener);
            }
        }
    }
}

/// Whether there is something to be looked at now and then.
fn is_watched(forward: &Forward) -> bool {
    has_file(forward) || forward.gate().is_some()
}

/// Whether the forward listens on a socket with a file.
fn has_file(forward: &Forward) -> bool {
    use crate::address::UnixAddress::Path;
    matches!(
        forward.rule.listen,
        Address::Hyperkit(_) | Address::VsockMux(_) | Address::Unix(Path(_))
    )
}
