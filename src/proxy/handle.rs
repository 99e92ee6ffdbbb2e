//! What another thread can do with a proxy that runs: look at it, add and remove forwards, stop it.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::address::{Address, HyperkitVm};
use crate::dial;
use crate::error::{Error, Operation, Result};
use crate::listener::nonblocking::{Listener, not_carried};
use crate::name::SocketName;
use crate::relay::CLIENT;
use crate::stream::nonblocking::{Target, Waiter};

use super::forward::{Counters, Forward, Rule};
use super::gate::{Gate, GateLimits};
use super::rules;
use super::worker::{Command, Shared};
use super::world::MioWorld;

/// Which forward of a proxy is meant. No two of one proxy are the same, also after one was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ForwardId(pub(super) u64);

/// A rule that is carried, and what has been counted of it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ForwardStatus {
    /// Which one it is.
    pub id: ForwardId,
    /// Where it listens: with the port that was chosen, where the rule said port 0 (of vsock the highest).
    pub listen: Address,
    /// Where its connections go.
    pub connect: Address,
    /// Counted since the start.
    pub counters: Counters,
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectionState {
    /// Its target is being connected to, or waited for.
    Dialling,
    /// Bytes can go both ways.
    Open,
    /// Carried to its end; what is left is to close it as its peers need it.
    Ending,
}

/// A connection that is carried now.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ConnectionStatus {
    /// Whose it is.
    pub forward: ForwardId,
    /// Who it is from, as far as the kernel knows.
    pub peer: SocketName,
    /// How far it is.
    pub state: ConnectionState,
    /// Bytes from the accepting to the dialled side.
    pub sent: u64,
    /// Bytes from the dialled to the accepting side.
    pub received: u64,
    /// How long ago it was accepted.
    pub age: Duration,
}

/// A proxy that runs, for whoever is to look at it, change it or stop it from another thread. It doesn't keep it running.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(super) shared: Arc<Shared<MioWorld>>,
    pub(super) binder: Arc<Binder>,
}

/// How long a worker may take to answer: it does at once, unless it has ended.
const ANSWER: Duration = Duration::from_secs(5);

impl Handle {
    /// The forwards, in the order in which they were given.
    pub fn forwards(&self) -> Vec<ForwardStatus> {
        let status = |forward: &Arc<Forward>| ForwardStatus {
            id: forward.id,
            listen: forward.rule.listen.clone(),
            connect: forward.rule.connect.clone(),
            counters: forward.counters(),
        };
        self.shared.forwards().iter().map(status).collect()
    }

    /// Begins to carry another rule; how it is called.
    ///
    /// # Errors
    /// As those of [`Proxy::start`](super::Proxy::start); `NotConnected` if the proxy is stopping.
    pub fn add(&self, rule: Rule) -> Result<ForwardId> {
        // Held to the end: two that ask for one address at a time are told apart here.
        let mut forwards = self.shared.forwards();
        let (listener, forward) = self.binder.bind(rule, &forwards)?;
        let (id, listen) = (forward.id, forward.rule.listen.clone());
        let fail = |e| Error::new(Operation::Listen, &listen, e);
        if self.shared.is_stopping() {
            return Err(fail(stopping()));
        }
        if forward.is_polite(CLIENT) {
            self.shared.make_room_for_guests();
        }
        let (tell, told) = channel();
        let index = self.shared.next_inbox();
        self.shared.inboxes[index].send(Command::Listen(listener, Arc::clone(&forward), tell));
        match told.recv_timeout(ANSWER) {
            Ok(Ok(())) => forwards.push(forward),
            Ok(Err(e)) => return Err(fail(e)),
            Err(_) => return Err(fail(stopping())),
        }
        Ok(id)
    }

    /// Stops to listen for a forward, and forgets it. Its connections go on, and are cut off after `grace`. When this
    /// returns, its address is free again, and no new client is taken; who was connected by then, as far as the kernel is
    /// concerned, is still served.
    ///
    /// Of a hyperkit VM's port this is not without danger: a guest that dials a port on which nobody listens any more
    /// may hang its device.
    ///
    /// # Errors
    /// `NotFound` if there is none of that id.
    pub fn remove(&self, id: ForwardId, grace: Duration) -> Result<()> {
        let mut forwards = self.shared.forwards();
        let Some(index) = forwards.iter().position(|forward| forward.id == id) else {
            let cause = io::Error::new(io::ErrorKind::NotFound, "there is none of that id");
            return Err(Error::new(Operation::Find, "the forward", cause));
        };
        let forward = forwards.remove(index);
        self.ask_all(|tell| Command::Remove(Arc::clone(&forward), grace, tell));
        Ok(())
    }

    /// The connections that are carried now, of all forwards, those that were removed included.
    pub fn connections(&self) -> Vec<ConnectionStatus> {
        let answers = self.ask_all(Command::Tell);
        answers.into_iter().flatten().collect()
    }

    /// How many connections are not closed yet.
    pub fn live(&self) -> usize {
        self.shared.live.load(Ordering::Relaxed)
    }

    /// As [`Proxy::stop`](super::Proxy::stop).
    pub fn stop(&self, grace: Duration) {
        for inbox in &self.shared.inboxes {
            inbox.send(Command::Stop(grace));
        }
    }

    /// Tells all workers something, and waits for their answers. Those that have ended give none.
    fn ask_all<T>(
        &self,
        command: impl Fn(std::sync::mpsc::Sender<T>) -> Command<MioWorld>,
    ) -> Vec<T> {
        let (tell, told) = channel();
        for inbox in &self.shared.inboxes {
            inbox.send(command(tell.clone()));
        }
        drop(tell);
        let end = Instant::now() + ANSWER;
        let mut answers = Vec::new();
        while answers.len() < self.shared.inboxes.len() && !self.shared.is_over() {
            match told.recv_timeout(LOOK) {
                Ok(answer) => answers.push(answer),
                Err(RecvTimeoutError::Timeout) if Instant::now() < end => {}
                Err(_) => break,
            }
        }
        answers
    }
}

/// How often it is looked whether there is still somebody to answer.
const LOOK: Duration = Duration::from_millis(50);

fn stopping() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the proxy is stopping")
}

/// Binds rules, and knows the VMs that they lead to.
#[derive(Debug)]
pub(super) struct Binder {
    gates: Mutex<Vec<(PathBuf, Arc<Gate>)>>,
    limits: GateLimits,
    waiter: fn(&Address) -> Waiter,
    next: Mutex<u64>,
}

impl Binder {
    pub(super) fn new(limits: GateLimits, waiter: fn(&Address) -> Waiter) -> Binder {
        Binder {
            gates: Mutex::default(),
            limits,
            waiter,
            next: Mutex::new(0),
        }
    }

    /// Binds a rule beside others.
    pub(super) fn bind(
        &self,
        mut rule: Rule,
        others: &[Arc<Forward>],
    ) -> Result<(Listener, Arc<Forward>)> {
        if (self.waiter)(&rule.connect) == Waiter::Thread {
            dial::check(&rule.connect)?;
        } else if matches!(Target::of(&rule.connect), Target::NotCarried) {
            return Err(not_carried(Operation::Connect, &rule.connect));
        }
        rules::check(&rule, others.iter().map(|forward| &forward.rule))?;
        let listener = Listener::bind(&rule.listen, rule.mode)?;
        rule.listen = listener.bound(&rule.listen);
        if rule.listen == rule.connect {
            let cause = io::Error::new(io::ErrorKind::InvalidInput, "it would connect to itself");
            return Err(Error::new(Operation::Connect, &rule.connect, cause));
        }
        let gates = [self.gate_of(&rule.listen), self.gate_of(&rule.connect)];
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let id = ForwardId(*next);
        *next += 1;
        Ok((
            listener,
            Arc::new(Forward::new(id, rule, gates, self.waiter)),
        ))
    }

    /// The gate of the VM that an address is of, if it is hyperkit's.
    fn gate_of(&self, address: &Address) -> Option<Arc<Gate>> {
        let Address::Hyperkit(hyperkit) = address else {
            return None;
        };
        let socket = socket_of(&hyperkit.vm);
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, gate)) = gates.iter().find(|(known, _)| *known == socket) {
            return Some(Arc::clone(gate));
        }
        let gate = Arc::new(Gate::new(self.limits));
        gates.push((socket, Arc::clone(&gate)));
        Some(gate)
    }
}

/// One VM has one gate, however its directory is spelled.
fn socket_of(vm: &HyperkitVm) -> PathBuf {
    let directory = vm.state_dir.canonicalize();
    directory.map_or_else(|_| vm.connect_path(), |real| real.join(&vm.connect))
}
