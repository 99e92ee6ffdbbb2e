//! The device's thread: one loop over all its sockets, as in hyperkit.

use super::closed::ClosedSockets;
use super::connection::{CHUNK, Connection, Guest, Turn};
use super::counters::Counters;
use super::dial::{DialListener, Dialling, Paced};
use super::directory::Listeners;
use super::guest::GuestSocket;
use super::plan::{Plan, Shared};
use super::rules::{Fate, FateKind, Ring, Rule};
use super::slots::{Key, MAX_SLOTS, Slots, Subject};
use mio::event::Event;
use mio::net::UnixListener;
use mio::{Events, Interest, Poll, Waker};
use socket2::SockRef;
use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

/// How many connections have their turn before the sockets are polled again.
const TURNS: usize = 32;

/// How long it sleeps when a dial waits for the guest's next answer, under 100 µs away.
const TO_NEXT_ANSWER: Duration = Duration::from_micros(25);

/// How long the loop sleeps at most while dials come, so that it knows when none had come (see
/// [`Ring`]).
const HEARTBEAT: Duration = Duration::from_millis(5);

/// The same while no dials come.
const IDLE: Duration = Duration::from_millis(250);

/// What a [`Vm`](super::Vm) asks of its device.
#[derive(Debug)]
pub(super) enum Command {
    Pause(Sender<()>),
    Resume(Sender<()>),
    Reboot(Sender<()>),
    Dial(u32, StdUnixStream, Sender<io::Result<()>>),
    StopDialling(Sender<()>),
    Stop(Sender<()>),
}

/// A listening socket of the state directory.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) socket: UnixListener,
    /// The guest port it stands for; `None`: the client's line tells.
    pub(super) port: Option<u32>,
    pub(super) ready: bool,
}

pub(super) struct Device {
    pub(super) plan: Plan,
    pub(super) poll: Poll,
    pub(super) listeners: Vec<Listener>,
    pub(super) dial_listeners: Vec<DialListener>,
    pub(super) slots: Slots,
    /// Dials that the guest hasn't answered, in order.
    pub(super) dials: VecDeque<Key>,
    /// Guest programs that are to dial.
    pub(super) dialling: Vec<Dialling>,
    pub(super) paced: Vec<Paced>,
    /// Slots that the guest's last reboot takes for good, as what was in them ends.
    pub(super) to_lose: usize,
    /// A client that has connected and not written its line: the device waits for it alone.
    pub(super) stall: Option<(mio::net::UnixStream, Instant)>,
    pub(super) paused: bool,
    pub(super) ring: Ring,
    pub(super) last_dial: Option<Instant>,
    pub(super) counters: Counters,
    pub(super) fate: Option<Fate>,
    work: VecDeque<Key>,
    pub(super) closed_sockets: ClosedSockets,
    /// How many sockets it has watched.
    pub(super) closed_count: usize,
    scratch: Vec<u8>,
    inbox: Receiver<Command>,
    shared: Arc<Shared>,
}

impl Device {
    pub(super) fn new(
        mut plan: Plan,
        listeners: Listeners,
        mut dial_listeners: Vec<DialListener>,
        paced: Vec<Paced>,
        inbox: Receiver<Command>,
        shared: Arc<Shared>,
    ) -> io::Result<(Device, Waker)> {
        plan.slots = plan.slots.min(MAX_SLOTS);
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), Subject::Waker.token())?;
        let mut listening = Vec::new();
        for (index, (mut socket, port)) in listeners.into_iter().enumerate() {
            let token = Subject::Listener(index).token();
            poll.registry()
                .register(&mut socket, token, Interest::READABLE)?;
            listening.push(Listener {
                socket,
                port,
                ready: false,
            });
        }
        for (index, dial_listener) in dial_listeners.iter_mut().enumerate() {
            dial_listener.register(poll.registry(), Subject::DialListener(index).token())?;
        }
        let device = Device {
            plan,
            poll,
            listeners: listening,
            dial_listeners,
            slots: Slots::default(),
            dials: VecDeque::new(),
            dialling: Vec::new(),
            paced,
            to_lose: 0,
            stall: None,
            paused: false,
            ring: Ring::new(Instant::now()),
            last_dial: None,
            counters: Counters::default(),
            fate: None,
            work: VecDeque::new(),
            closed_sockets: ClosedSockets::default(),
            closed_count: 0,
            scratch: vec![0; CHUNK],
            inbox,
            shared,
        };
        Ok((device, waker))
    }

    pub(super) fn run(mut self) {
        let mut events = Events::with_capacity(4 * MAX_SLOTS);
        while self.fate.is_none() {
            if let Some(done) = self.commands() {
                return self.power_off(&done);
            }
            if self.stall.is_some() {
                self.wait_for_line();
            } else {
                self.turn(&mut events);
            }
            self.publish();
        }
        if self.fate.as_ref().map(|fate| fate.kind) == Some(FateKind::Hung) {
            self.hang();
        }
    }

    /// Behaves as a deadlocked device: its sockets stay open until it is powered off.
    fn hang(self) {
        while let Ok(command) = self.inbox.recv() {
            match command {
                Command::Pause(_)
                | Command::Resume(_)
                | Command::Reboot(_)
                | Command::StopDialling(_) => {}
                Command::Dial(_, _, reply) => {
                    let error = io::Error::new(io::ErrorKind::TimedOut, "the VM's device hangs");
                    let _ = reply.send(Err(error));
                }
                Command::Stop(done) => return self.power_off(&done),
            }
        }
    }

    fn power_off(self, done: &Sender<()>) {
        // A child that another thread forks may have copies of them for a moment, and a client be
        // taken by a listener that only it has.
        for listener in &self.listeners {
            let _ = SockRef::from(&listener.socket).shutdown(Shutdown::Both);
        }
        drop(self);
        // Without the handle it has no receiver.
        let _ = done.send(());
    }

    /// Carries out the commands that have come. Returns the reply of one to power off.
    fn commands(&mut self) -> Option<Sender<()>> {
        loop {
            let done = match self.inbox.try_recv() {
                Ok(Command::Pause(done)) => {
                    self.paused = true;
                    done
                }
                Ok(Command::Resume(done)) => {
                    self.resume();
                    done
                }
                Ok(Command::Reboot(done)) => {
                    self.reboot();
                    done
                }
                Ok(Command::Dial(port, ours, reply)) => {
                    match GuestSocket::of_pair(ours) {
                        Ok(socket) => {
                            let dialling = Dialling::new(port, socket, Some(reply));
                            self.dialling.push(dialling);
                        }
                        Err(error) => drop(reply.send(Err(error))),
                    }
                    continue;
                }
                Ok(Command::StopDialling(done)) => {
                    self.paced.clear();
                    done
                }
                Ok(Command::Stop(done)) => return Some(done),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return None,
            };
            let _ = done.send(());
        }
    }

    fn resume(&mut self) {
        if !self.paused {
            return;
        }
        self.paused = false;
        // The guest finds all that was dialled meanwhile at once.
        self.ring.idle(Instant::now());
        self.counters.unanswered = 0;
        for key in self.slots.keys() {
            self.queue(key);
        }
    }

    fn reboot(&mut self) {
        for key in self.slots.keys() {
            if let Some(connection) = self.slots.get(key) {
                connection.forget();
                self.queue(key);
            }
        }
        self.to_lose = self.plan.lost_at_reboot.min(self.slots.live());
        self.dials.clear();
        self.counters.unanswered = 0;
        // The programs have gone with their sockets.
        self.dialling.clear();
    }

    fn turn(&mut self, events: &mut Events) {
        let before = Instant::now();
        let timeout = self.poll_timeout(before);
        if timeout == TO_NEXT_ANSWER {
            // Poll can't sleep for so short a time.
            std::thread::sleep(TO_NEXT_ANSWER);
        }
        let timeout = (timeout != TO_NEXT_ANSWER).then_some(timeout);
        if let Err(error) = self.poll.poll(events, timeout.or(Some(Duration::ZERO)))
            && error.kind() != io::ErrorKind::Interrupted
        {
            // A failure of the stand-in itself is no client's fault.
            tracing::error!(%error, "the stand-in's poll failed");
            std::thread::sleep(HEARTBEAT);
        }
        for event in events.iter() {
            self.event(event);
            if self.fate.is_some() {
                return;
            }
        }
        if self.dials.is_empty() && !self.has_arrivals() {
            self.ring.idle(before);
        }
        // In this order: by now poll has told whether a client left before the guest's answer.
        self.answer();
        self.accept();
        if self.fate.is_some() || self.stall.is_some() {
            return;
        }
        self.dial_host();
        for _ in 0..TURNS {
            let Some(key) = self.work.pop_front() else {
                break;
            };
            self.turn_connection(key);
            if self.fate.is_some() {
                return;
            }
        }
    }

    /// Returns how long poll may sleep.
    fn poll_timeout(&self, now: Instant) -> Duration {
        let paced = self.paced.iter().map(Paced::due).min();
        match paced.filter(|_| !self.paused) {
            Some(due) => self.rest(now).min(due.saturating_duration_since(now)),
            None => self.rest(now),
        }
    }

    /// Returns how long it may, but for programs that dial at a pace.
    fn rest(&self, now: Instant) -> Duration {
        let answers = !self.paused && !self.dials.is_empty();
        if self.has_arrivals() && !self.leaves_clients_waiting() || !self.work.is_empty() {
            Duration::ZERO
        } else if answers && self.ring.level(1, now) > 0 {
            TO_NEXT_ANSWER
        } else if answers {
            Duration::ZERO
        } else if self
            .last_dial
            .is_some_and(|dial| now - dial < Duration::from_secs(10))
        {
            HEARTBEAT
        } else {
            IDLE
        }
    }

    /// Returns whether connections may wait to be accepted.
    fn has_arrivals(&self) -> bool {
        self.listeners.iter().any(|listener| listener.ready)
    }

    fn event(&mut self, event: &Event) {
        match Subject::of(event.token()) {
            Subject::Waker => {}
            Subject::Listener(index) => {
                if let Some(listener) = self.listeners.get_mut(index) {
                    listener.ready = true;
                }
            }
            Subject::DialListener(index) => {
                if let Some(dial_listener) = self.dial_listeners.get_mut(index) {
                    dial_listener.ready = true;
                }
            }
            Subject::Host(key) => self.host_event(key, event),
            Subject::Guest(key) => self.guest_event(key, event),
            Subject::Closed(_) => {
                if let Some(port) = self.closed_sockets.event(event.token()) {
                    let detail = format!("port {port}, after the guest had closed");
                    self.note_offence(Rule::CloseUnread, detail);
                }
            }
        }
    }

    fn guest_event(&mut self, key: Key, event: &Event) {
        let Some(connection) = self.slots.get(key) else {
            return;
        };
        connection.guest_event(event);
        if let Guest::Connecting(socket) = &connection.guest {
            match socket.connected() {
                Ok(false) => return,
                Ok(true) => {
                    let guest = std::mem::replace(&mut connection.guest, Guest::Unanswered);
                    if let Guest::Connecting(socket) = guest {
                        connection.guest = Guest::Socket(socket);
                    }
                    self.counters.answered += 1;
                    self.confirm(key);
                }
                Err(_) => return self.refuse(key),
            }
        }
        self.queue(key);
    }

    fn turn_connection(&mut self, key: Key) {
        let Some(connection) = self.slots.get(key) else {
            return;
        };
        connection.queued = false;
        let was_gone = connection.host_gone;
        let (sent, received) = (connection.sent, connection.received);
        let turn = connection.turn(&mut self.scratch, self.paused);
        self.counters.bytes_to_host += connection.sent - sent;
        self.counters.bytes_to_guest += connection.received - received;
        if connection.host_reset || connection.host_gone && !was_gone {
            self.check_host_end(key);
        }
        match turn {
            Turn::Idle => {}
            Turn::Again => self.queue(key),
            Turn::Over => return self.free(key),
        }
        let connection = self.slots.get(key);
        if connection.is_some_and(|it| matches!(it.guest, Guest::Unnamed)) {
            self.read_mux_line(key);
        }
    }

    pub(super) fn queue(&mut self, key: Key) {
        if let Some(connection) = self.slots.get(key)
            && !connection.queued
        {
            connection.queued = true;
            self.work.push_back(key);
        }
    }

    /// Returns how many slots are taken.
    pub(super) fn taken(&self) -> usize {
        let lost = usize::try_from(self.counters.lost_slots).unwrap_or(usize::MAX);
        self.slots.live().saturating_add(lost)
    }

    pub(super) fn insert(&mut self, connection: Connection) -> Option<Key> {
        let key = self.slots.insert(connection);
        let live = self.taken() as u64;
        self.counters.peak_slots = self.counters.peak_slots.max(live);
        self.counters.live_slots = live;
        let both = Interest::READABLE | Interest::WRITABLE;
        let connection = self.slots.get(key)?;
        let token = Subject::Host(key).token();
        if let Err(error) = self
            .poll
            .registry()
            .register(&mut connection.host, token, both)
        {
            tracing::error!(%error, "the stand-in cannot watch a connection");
            self.refuse(key);
            return None;
        }
        Some(key)
    }

    pub(super) fn remove(&mut self, key: Key) -> Option<Connection> {
        let connection = self.slots.remove(key);
        self.counters.live_slots = self.taken() as u64;
        connection
    }

    fn publish(&self) {
        let mut state = self.shared.lock();
        if state.0 != self.counters || state.1 != self.fate {
            state.0 = self.counters;
            state.1.clone_from(&self.fate);
            self.shared.changed.notify_all();
        }
    }
}
