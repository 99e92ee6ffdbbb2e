//! The proxy: rules that are carried by a few threads, each with a mio event loop. Where a family's sockets can't be waited
//! for (AF_HYPERV), a connection has two threads more.
//!
//! ```no_run
//! use hvsock::{Proxy, ProxyConfig, Rule};
//! use std::time::Duration;
//!
//! let rule = Rule::new("tcp://127.0.0.1:0".parse()?, "hyperkit://:80/path/to/state/dir".parse()?);
//! let proxy = Proxy::start(ProxyConfig::new(vec![rule]))?;
//! println!("listening on {}", proxy.forwards()[0].listen);
//! proxy.stop(Duration::from_secs(5));
//! proxy.wait()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod accept;
mod bridge;
mod conn;
mod crossing;
mod dialling;
mod forward;
mod gate;
mod leaving;
mod table;
mod worker;
mod world;

use std::io;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::address::{Address, CID_ANY, HyperkitVm, PORT_ANY};
use crate::dial;
use crate::error::{Error, Operation, Result};
use crate::listener::nonblocking::{Listener, not_carried};
use crate::relay::CLIENT;
use crate::stream::nonblocking::{Stream, Target, Waiter};
use crate::sys;

use forward::Forward;
use gate::{Gate, GateLimits};
use worker::{Command, Inbox, Shared, Worker};
use world::MioWorld;

pub use forward::{Counters, Rule};

/// What bounds a proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Connections of all rules at a time; more clients wait in the listeners' backlogs. Guests that dial the host are
    /// not bound by it. Each connection has two descriptors: the process' limit of them lowers this one.
    pub connections: usize,
    /// Connections to one hyperkit VM at a time; more wait to be dialled. hyperkit has 1,024 slots, and closes the
    /// excess; started with 256 descriptors, it hangs beyond 245.
    pub vm_connections: usize,
    /// Dials to one hyperkit VM without a sign of life from the guest; more wait. hyperkit aborts at 512.
    pub vm_unanswered: usize,
    /// How long a client may wait until its target is connected; a `hvsock://` one has a second at most.
    pub dial_timeout: Duration,
    /// How long a guest may take to end a connection after the half-close, before it is closed all the same. Guests of
    /// Hyper-V are guests, too.
    pub drain_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 10_000,
            vm_connections: 900,
            vm_unanswered: 64,
            dial_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(60),
        }
    }
}

/// What a proxy is to do.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ProxyConfig {
    /// What is carried where.
    pub rules: Vec<Rule>,
    /// Threads; one a core if not said.
    pub workers: Option<NonZeroUsize>,
    /// What bounds it.
    pub limits: Limits,
}

impl ProxyConfig {
    /// These rules, one thread a core, the usual limits.
    pub fn new(rules: Vec<Rule>) -> ProxyConfig {
        ProxyConfig {
            rules,
            workers: None,
            limits: Limits::default(),
        }
    }
}

/// A rule that is carried, and what has been counted of it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ForwardStatus {
    /// Where it listens: with the port that was chosen, where the rule said port 0 (of vsock the highest).
    pub listen: Address,
    /// Where its connections go.
    pub connect: Address,
    /// Counted since the start.
    pub counters: Counters,
}

/// Stops a proxy from another thread.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<Shared<Stream>>);

impl Stopper {
    /// As [`Proxy::stop`].
    pub fn stop(&self, grace: Duration) {
        for inbox in &self.0.inboxes {
            inbox.send(Command::Stop(grace));
        }
    }
}

impl Stopper {
    /// Connections that are not closed yet.
    pub fn connections(&self) -> usize {
        self.0.live.load(Ordering::Relaxed)
    }
}

/// A running proxy. Dropping it stops it at once, and waits for that.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared<Stream>>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl Proxy {
    /// Binds all listeners and starts the threads.
    ///
    /// # Errors
    /// The first listener that can't be bound; then none stays. `Unsupported` for families that aren't carried.
    pub fn start(config: ProxyConfig) -> Result<Proxy> {
        Proxy::start_with(config, Waiter::of)
    }

    /// As [`start`](Proxy::start), where `waiter` says what can wait for whose sockets.
    fn start_with(config: ProxyConfig, waiter: fn(&Address) -> Waiter) -> Result<Proxy> {
        let fail = |e| Error::new(Operation::Run, "the proxy", e);
        let mut gates: Vec<(PathBuf, Arc<Gate>)> = Vec::new();
        let gate_limits = GateLimits {
            live: config.limits.vm_connections,
            unanswered: config.limits.vm_unanswered as u64,
        };
        let mut bound = Vec::new();
        for mut rule in config.rules {
            let mut gate_at = |address: &Address| match address {
                Address::Hyperkit(hyperkit) => Some(gate_of(&mut gates, &hyperkit.vm, gate_limits)),
                _ => None,
            };
            let rule_gates = [gate_at(&rule.listen), gate_at(&rule.connect)];
            if waiter(&rule.connect) != Waiter::Thread {
                if matches!(Target::of(&rule.connect), Target::NotCarried) {
                    return Err(not_carried(Operation::Connect, &rule.connect));
                }
            } else {
                dial::check(&rule.connect)?;
            }
            check(
                &rule,
                bound
                    .iter()
                    .map(|(_, forward): &(_, Arc<Forward>)| &forward.rule),
            )?;
            let listener = Listener::bind(&rule.listen, rule.mode)?;
            rule.listen = listener.bound(&rule.listen);
            if rule.listen == rule.connect {
                let cause =
                    io::Error::new(io::ErrorKind::InvalidInput, "it would connect to itself");
                return Err(Error::new(Operation::Connect, &rule.connect, cause));
            }
            bound.push((listener, Arc::new(Forward::new(rule, rule_gates, waiter))));
        }
        let cores = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let count = config.workers.unwrap_or_else(cores).get();
        let needed = DESCRIPTORS_PER_WORKER * count + bound.len() + 8;
        if let Some(limit) = sys::descriptor_limit().filter(|&limit| limit < needed as u64) {
            let why = format!("the process may have {limit} descriptors, and {needed} are needed");
            let remedy = "raise the limit with `ulimit -n`, or ask for fewer workers";
            return Err(fail(io::Error::other(why)).with_remedy(remedy));
        }
        let mut worlds = Vec::new();
        let mut inboxes = Vec::new();
        for _ in 0..count {
            let world = MioWorld::new().map_err(fail)?;
            let waker = world.waker();
            inboxes.push(Inbox::new(move || {
                // It fails only when the loop is gone, and then there is nobody to wake.
                let _ = waker.wake();
            }));
            worlds.push(world);
        }
        let forwards = bound
            .iter()
            .map(|(_, forward)| Arc::clone(forward))
            .collect();
        let mut limits = config.limits;
        let guests = bound.iter().any(|(_, forward)| forward.is_polite(CLIENT));
        if let Some(room) = room_for_connections(guests) {
            limits.connections = limits.connections.min(room);
        }
        let shared = Arc::new(Shared {
            limits,
            forwards,
            inboxes,
            live: AtomicUsize::new(0),
            stopping: AtomicUsize::new(0),
        });
        let mut workers: Vec<Worker<MioWorld>> = worlds
            .into_iter()
            .enumerate()
            .map(|(index, world)| Worker::new(world, index, Arc::clone(&shared)))
            .collect();
        for (index, (listener, forward)) in bound.into_iter().enumerate() {
            workers[index % count]
                .add_listener(listener, forward)
                .map_err(fail)?;
        }
        let mut proxy = Proxy {
            shared,
            threads: Vec::new(),
        };
        for (index, worker) in workers.into_iter().enumerate() {
            let thread = std::thread::Builder::new().name(format!("hvsock-{index}"));
            let shared = Arc::clone(&proxy.shared);
            let run = move || run_to_the_end(worker, index, &shared);
            let thread = thread.spawn(run).map_err(|e| {
                // Those that run need not wait for those that never will.
                proxy
                    .shared
                    .stopping
                    .fetch_add(count - index, Ordering::AcqRel);
                fail(e)
            })?;
            proxy.threads.push(thread);
        }
        Ok(proxy)
    }

    /// The rules, in the order in which they were given.
    pub fn forwards(&self) -> Vec<ForwardStatus> {
        let status = |forward: &Arc<Forward>| ForwardStatus {
            listen: forward.rule.listen.clone(),
            connect: forward.rule.connect.clone(),
            counters: forward.counters(),
        };
        self.shared.forwards.iter().map(status).collect()
    }

    /// Accepts no more clients, lets those that are there finish, and cuts them off after `grace`.
    ///
    /// Returns at once; [`wait`](Proxy::wait) waits for the end. Called again it can only shorten the time. Guests are
    /// taken leave of politely even then, for two seconds at most.
    pub fn stop(&self, grace: Duration) {
        self.stopper().stop(grace);
    }

    /// Something that can stop the proxy while another thread waits for it.
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Waits until the proxy has stopped.
    ///
    /// # Errors
    /// What ended a thread before it was told to.
    pub fn wait(mut self) -> Result<()> {
        self.join()
    }

    fn join(&mut self) -> Result<()> {
        let mut result = Ok(());
        for thread in self.threads.drain(..) {
            let ended = match thread.join() {
                Ok(ended) => ended,
                Err(_) => Err(io::Error::other("a worker panicked")),
            };
            if let Err(e) = ended {
                result = Err(Error::new(Operation::Run, "the proxy", e));
            }
        }
        result
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if !self.threads.is_empty() {
            self.stop(Duration::ZERO);
            let _ = self.join();
        }
    }
}

/// Refuses a rule that can't work, whatever the system says.
fn check<'a>(rule: &Rule, mut others: impl Iterator<Item = &'a Rule>) -> Result<()> {
    let invalid = |operation, address, why| {
        let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
        Err(Error::new(operation, address, cause))
    };
    if matches!(&rule.connect, Address::Tcp(tcp) if tcp.port == 0) {
        let why = "port 0 can't be connected to";
        return invalid(Operation::Connect, &rule.connect, why);
    }
    if matches!(&rule.connect, Address::Vsock(vsock) if vsock.cid == CID_ANY) {
        let why = "there is no CID to connect to";
        return invalid(Operation::Connect, &rule.connect, why)
            .map_err(|error| error.with_remedy("name one, as in vsock://3:1024"));
    }
    if matches!(&rule.connect, Address::Npipe(pipe) if pipe.sddl.is_some()) {
        let why = "sddl says who may connect: it belongs to the address that is listened on";
        return invalid(Operation::Connect, &rule.connect, why);
    }
    let chosen = match &rule.listen {
        Address::Tcp(tcp) => tcp.port == 0,
        Address::Vsock(vsock) => vsock.port == PORT_ANY,
        _ => false,
    };
    if !chosen && others.any(|other| other.listen == rule.listen) {
        return invalid(Operation::Listen, &rule.listen, "it is given twice");
    }
    Ok(())
}

/// A poller, its waker and its registry's copy.
const DESCRIPTORS_PER_WORKER: usize = 3;

/// Descriptors that are not connections: listeners, pollers, standard streams, and some to spare.
const SPARE: u64 = 64;

/// Descriptors for the connections of guests, which can't be made to wait: hyperkit has 1,024 slots.
const FOR_GUESTS: u64 = 2 * 1024;

/// How many connections the process has descriptors for. None is ever accepted that they don't suffice for: on macOS a
/// connection that can't be given a descriptor is lost.
fn room_for_connections(guests: bool) -> Option<usize> {
    let left = sys::descriptor_limit()?.saturating_sub(SPARE);
    let left = match guests {
        true => left - FOR_GUESTS.min(left / 2),
        false => left,
    };
    Some(usize::try_from(left / 2).unwrap_or(usize::MAX).max(1))
}

/// Runs a worker; if it fails, ends the others too: without it they would wait for its connections for ever.
fn run_to_the_end(
    worker: Worker<MioWorld>,
    index: usize,
    shared: &Shared<Stream>,
) -> io::Result<()> {
    let run = AssertUnwindSafe(|| worker.run());
    let ended = catch_unwind(run).unwrap_or_else(|_| Err(io::Error::other("a worker panicked")));
    if ended.is_err() {
        let lost = shared.inboxes[index].load.swap(0, Ordering::AcqRel);
        shared.live.fetch_sub(lost, Ordering::AcqRel);
        shared.stopping.fetch_add(1, Ordering::AcqRel);
        for inbox in &shared.inboxes {
            inbox.send(Command::Stop(Duration::ZERO));
        }
    }
    ended
}

fn gate_of(
    gates: &mut Vec<(PathBuf, Arc<Gate>)>,
    vm: &HyperkitVm,
    limits: GateLimits,
) -> Arc<Gate> {
    // One VM has one gate, however its directory is spelled.
    let directory = vm.state_dir.canonicalize();
    let socket = directory.map_or_else(|_| vm.connect_path(), |real| real.join(&vm.connect));
    if let Some((_, gate)) = gates.iter().find(|(known, _)| *known == socket) {
        return Arc::clone(gate);
    }
    let gate = Arc::new(Gate::new(limits));
    gates.push((socket, Arc::clone(&gate)));
    gate
}

#[cfg(test)]
mod tests;
