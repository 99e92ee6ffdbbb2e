//! The proxy: it forwards connections by rules, on a few threads with a mio event loop each. If a
//! family's sockets can't be polled (AF_HYPERV), a connection has two more threads.
//!
//! The loop accepts and dials, passes events to the engine, and carries out the actions that the
//! engine returns. It does not know what a family of sockets does.
//!
//! ```
//! # #[cfg(unix)] {
//! use hvsock::proxy::{Observer, What};
//! use hvsock::{Proxy, ProxyConfig, Rule};
//! use std::time::Duration;
//!
//! // A proxy may start without rules: they can be added and removed while it runs.
//! let mut config = ProxyConfig::new(Vec::new());
//! config.limits.vm_connections = 500;
//! config.observer = Some(Observer::new(|event| {
//!     if let What::Closed { sent, received, .. } = event.what {
//!         println!("{}: {sent} bytes up, {received} bytes down", event.peer);
//!     }
//! }));
//! let proxy = Proxy::start(config)?;
//!
//! let handle = proxy.handle();
//! let mut rule = Rule::new("tcp://127.0.0.1:0".parse()?,
//! "hyperkit://:80/path/to/state/dir".parse()?);
//! rule.name = Some("web".to_owned());
//! let web = handle.add(rule)?;
//! for forward in handle.forwards() {
//!     println!("{}: {} connections", forward.listen, forward.counters.live);
//! }
//! handle.remove(web, Duration::from_secs(5))?;
//!
//! proxy.stop(Duration::from_secs(5)); // lets existing connections finish
//! proxy.wait()?;
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

// The invariants that the loop keeps, with the numbers that they have in the engine as well
// (`engine/mod.rs` says where 1 to 4 and 7 are), and the files that hold them:
//
//  5. Work per turn is bounded. A connection that has work left goes to the back of a ready queue
//     (`connections/set.rs`), a listener to that of `listeners/schedule.rs`. What a turn costs does
//     not grow with the number of forwards or of idle connections.
//  6. Tokens carry a generation, and an event for an older one is dropped (`engine/table.rs`).
//  8. The loop touches sockets and the clock, and nothing else: no file, no name service, no write
//     that may wait. What may block is done by `housekeeper.rs`, names by `resolver.rs`. Whatever
//     happens outside the sockets, traffic flows and a signal ends the process.
//  9. Sockets, events and the time come to the loop only through `driver.rs`. After a freeze, what
//     has come is read before a timer is believed (`worker.rs`).
// 10. An accept error never ends a listener, and never spins: without descriptors it waits
//     (`listeners/accepting.rs`); one that is broken is bound again (`listeners/checks.rs`).
//     Descriptors are budgeted for all that has one (`descriptors.rs`).
// 11. One thing that can't be had, such as an address, never takes from the others what they have:
//     it is logged once, shown in the status, and tried again (`listeners/checks.rs`).

mod adapter;
mod connections;
mod controller;
mod cuts;
mod descriptors;
mod driver;
mod forbidden;
mod gates;
mod handle;
#[cfg(all(unix, feature = "cli"))]
mod handover;
mod housekeeper;
mod listeners;
mod loops;
mod mio_driver;
mod notifier;
mod relay_threads;
mod resolver;
mod rules;
mod shared;
#[cfg(all(test, target_os = "linux"))]
mod sim;
mod socket;
mod vm_look;
mod worker;

use std::io;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::address::{Address, Waiter};
use crate::engine::admission::Wake;
use crate::engine::forward::{AccessLog, Reports};
use crate::engine::relay::Side;
use crate::error::{Error, Operation, Result};
#[cfg(unix)]
use crate::keeper::{self, Keeper, Link};
use crate::listener::Listener;

use controller::Controller;
use descriptors::Descriptors;
use driver::Driver;
use gates::Gates;
use housekeeper::Housekeeper;
use mio_driver::MioDriver;
use rules::Binder;
pub(crate) use rules::all_are_wanted;
use shared::{Inbox, Shared};
use worker::Worker;

pub use crate::engine::counters::{Counters, EndCounts, Refusals, TimedOut};
pub use crate::engine::end_reason::{EndReason, ProgramFailure, RefusalReason};
pub use crate::engine::ended::EndedConnection;
pub use crate::engine::id::{ConnectionId, ForwardId};
pub use crate::engine::observer::{Event, Observer, What};
pub use crate::engine::proxy_header::ProxyProtocol;
pub use crate::engine::rule::{Limits, Rule, Timeouts, VmLimits};
#[cfg(all(unix, feature = "cli"))]
pub(crate) use crate::engine::source::may_come;
pub use crate::engine::source::{Source, SourceError};
pub use crate::engine::status::{
    CarriedBytes, ConnectionState, ConnectionStatus, ForwardState, ForwardStatus, LastError,
    VmStatus, Waiting,
};
#[cfg(feature = "cli")]
pub(crate) use descriptors::Descriptors as ProcessDescriptors;
#[cfg(feature = "cli")]
pub(crate) use forbidden::leads_to;
pub use handle::Handle;
#[cfg(all(unix, feature = "cli"))]
pub(crate) use handover::Offered;
#[cfg(feature = "cli")]
pub(crate) use loops::{Candidate, RuleIndex, describe as describe_loop};
#[cfg(feature = "cli")]
pub(crate) use rules::{check_name, check_rule};

/// The configuration of a proxy.
#[derive(Debug)]
#[non_exhaustive]
pub struct ProxyConfig {
    /// The rules: which addresses are forwarded where.
    pub rules: Vec<Rule>,
    /// The number of threads. `None`: one per core.
    pub workers: Option<NonZeroUsize>,
    /// Whether bytes may pass from socket to socket through pipes (`splice(2)`), where the system
    /// supports it, a connection moves many bytes, and measuring has shown that it costs less here
    /// than to copy them. Otherwise they are copied, as on other systems.
    pub splice: bool,
    /// The limits of the proxy.
    pub limits: Limits,
    /// The limits of single VMs.
    pub vms: Vec<VmLimits>,
    /// The observer of the connections.
    pub observer: Option<Observer>,
    /// Whether the line of each connection that has ended is logged at the level info, not debug.
    /// It has the target `hvsock::access`.
    pub access_log: bool,
    /// Targets that no rule may have, whoever its clients are: the addresses at which this program
    /// is controlled or watched, which a guest must not reach. A file is recognized through
    /// symbolic links and under other names, a TCP port under each of this machine's addresses. A
    /// host's name is assumed to be possibly this machine's.
    pub forbidden: Vec<Address>,
    /// Sockets that listen already, such as those that a service manager has passed. A rule whose
    /// address one of them listens at uses that socket, and binds none. A socket that another
    /// program has bound (`TryFrom<OwnedFd>`) is kept when its forward is removed: clients wait
    /// there until another forward uses it. Each must be used by one of the rules; if there is no
    /// rule at all, they are kept for rules that are added later.
    pub listeners: Vec<Listener>,
    /// The number of descriptors that the program needs besides this proxy. They are not used for
    /// connections.
    pub other_descriptors: usize,
    /// The program that keeps hyperkit VMs whole when this proxy is gone: see
    /// [`keeper`](mod@crate::keeper). `None`: there is none. It is started when the first rule with
    /// a hyperkit VM comes.
    #[cfg(unix)]
    pub keeper: Option<Keeper>,
}

impl ProxyConfig {
    /// Makes a configuration of these rules, with one thread per core and the default limits.
    pub fn new(rules: Vec<Rule>) -> ProxyConfig {
        ProxyConfig {
            rules,
            workers: None,
            splice: true,
            limits: Limits::default(),
            vms: Vec::new(),
            observer: None,
            access_log: false,
            forbidden: Vec::new(),
            listeners: Vec::new(),
            other_descriptors: 0,
            #[cfg(unix)]
            keeper: None,
        }
    }
}

/// A running proxy. Dropping it stops it at once, and waits for its end.
#[derive(Debug)]
pub struct Proxy {
    handle: Handle,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl Proxy {
    /// Binds all listeners and starts the threads.
    ///
    /// # Errors
    /// Returns the error of the first listener that can't be bound; no listener stays bound then.
    /// Returns `Unsupported` for families that can't be forwarded; `InvalidInput` for one of
    /// [`listeners`](ProxyConfig::listeners) that no rule uses (if there are no rules, they are
    /// kept for those that are added later), and for a rule that leads back to itself; and an error
    /// if the process may have too few descriptors for a single connection besides its listeners.
    pub fn start(config: ProxyConfig) -> Result<Proxy> {
        Proxy::start_with(config, Waiter::of)
    }

    /// Starts the proxy and waits for its end, as [`start`](Proxy::start) and [`wait`](Proxy::wait)
    /// do, with the first worker on the caller's thread. With one worker there is no other thread.
    /// Once all listeners are bound, `begun` is called with the handle, by which the proxy can be
    /// stopped.
    ///
    /// # Errors
    /// Returns the errors of [`start`](Proxy::start) and [`wait`](Proxy::wait).
    pub fn run(config: ProxyConfig, begun: impl FnOnce(Handle)) -> Result<()> {
        let (handle, mut workers) = prepare(config, Waiter::of)?;
        let first = workers.remove(0);
        let mut proxy = Proxy::spawn(handle, workers)?;
        begun(proxy.handle());
        let ended = run_worker(first, 0, &proxy.handle.controller.shared);
        let others = proxy.join();
        ended.map_err(fail).and(others)
    }

    /// Starts the proxy as [`start`](Proxy::start) does, where `waiter` says what can wait for the
    /// sockets of an address.
    fn start_with(config: ProxyConfig, waiter: fn(&Address) -> Waiter) -> Result<Proxy> {
        let (handle, workers) = prepare(config, waiter)?;
        Proxy::spawn(handle, workers)
    }

    fn spawn(handle: Handle, workers: Vec<Worker<MioDriver>>) -> Result<Proxy> {
        let mut proxy = Proxy {
            handle,
            threads: Vec::new(),
        };
        for worker in workers {
            let index = worker.index;
            let thread = std::thread::Builder::new().name(format!("hvsock-{index}"));
            let shared = Arc::clone(&proxy.handle.controller.shared);
            let run = move || run_worker(worker, index, &shared);
            let thread = thread.spawn(run).map_err(|e| {
                // The workers that run need not wait for those that never will.
                let shared = &proxy.handle.controller.shared;
                let missing = shared.inboxes.len() - proxy.threads.len();
                shared.stopping.fetch_add(missing, Ordering::AcqRel);
                shared.ended.fetch_add(missing, Ordering::AcqRel);
                fail(e)
            })?;
            proxy.threads.push(thread);
        }
        Ok(proxy)
    }

    /// Returns the status of all forwards: see [`Handle::forwards`].
    pub fn forwards(&self) -> Vec<ForwardStatus> {
        self.handle.forwards()
    }

    /// Stops the proxy: accepts no more clients, lets the existing connections finish, and cuts
    /// them off after `grace`.
    ///
    /// Returns at once; [`wait`](Proxy::wait) waits for the end. Calling it again can only shorten
    /// the time. Connections of guests are closed gracefully even after `grace`, for at most two
    /// seconds.
    pub fn stop(&self, grace: Duration) {
        self.handle.stop(grace);
    }

    /// Returns a handle, with which other threads can inspect, change and stop the proxy.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Waits until the proxy has stopped.
    ///
    /// # Errors
    /// Returns the error that ended a thread before the proxy was stopped.
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

fn fail(cause: io::Error) -> Error {
    Error::new(Operation::Run, "the proxy", cause)
}

/// Prepares a proxy with the driver for real sockets.
fn prepare(
    config: ProxyConfig,
    waiter: fn(&Address) -> Waiter,
) -> Result<(Handle, Vec<Worker<MioDriver>>)> {
    let mut housekeeper = None;
    #[cfg(unix)]
    let mut config = config;
    #[cfg(unix)]
    let keeper = config.keeper.take().map(Link::new);
    #[cfg(unix)]
    if keeper.is_some() {
        config.other_descriptors += keeper::DESCRIPTORS;
    }
    let make = || {
        let housekeeper = match &mut housekeeper {
            Some(there) => there,
            none => none.insert(Housekeeper::start()?),
        };
        let driver = MioDriver::new(
            housekeeper.clone(),
            #[cfg(unix)]
            keeper.clone(),
        )?;
        let waker = driver.waker();
        let wake: Wake = Arc::new(move || {
            // Waking fails only when the loop is gone; then there is nothing to wake.
            let _ = waker.wake();
        });
        Ok((driver, wake))
    };
    let (controller, workers) = assemble(config, waiter, make)?;
    let handle = Handle {
        controller,
        #[cfg(unix)]
        keeper: keeper.map(|keeper| keeper.view()),
    };
    Ok((handle, workers))
}

/// Binds all listeners, and makes the workers. `make` makes the driver of each, and the function
/// that ends a wait of that driver.
fn assemble<D: Driver>(
    config: ProxyConfig,
    waiter: fn(&Address) -> Waiter,
    mut make: impl FnMut() -> io::Result<(D, Wake)>,
) -> Result<(Controller<D>, Vec<Worker<D>>)> {
    // If there are no rules, the sockets are kept for those that are added later.
    if !config.rules.is_empty() {
        all_are_wanted(&config.listeners, &config.rules)?;
    }
    let reports = Reports {
        observer: config.observer,
        access_log: Arc::new(AccessLog::new(config.access_log)),
        ended: Arc::default(),
    };
    let gates = Arc::new(Gates::new(config.limits.clone()));
    let binder = Binder::new(
        Arc::clone(&gates),
        waiter,
        reports,
        config.listeners,
        config.forbidden,
    );
    for limits in &config.vms {
        binder.set_limits(limits);
    }
    let cores = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let count = config.workers.unwrap_or_else(cores).get();
    let descriptors = Descriptors::new(count, config.other_descriptors, D::descriptor_limit);
    let sockets = config.rules.iter().map(|it| it.listen.listening_sockets());
    let sockets = sockets.sum();
    if descriptors.connection_room(sockets) == 0 {
        return Err(descriptors.too_few(Operation::Run, "the proxy", sockets));
    }
    let (mut listeners, mut forwards) = (Vec::new(), Vec::new());
    for (index, rule) in config.rules.into_iter().enumerate() {
        let (listener, forward) = binder.bind::<D>(rule, index % count)?;
        listeners.push(listener);
        forwards.push(forward);
    }
    if forwards
        .iter()
        .any(|forward| forward.needs_graceful_close(Side::Client))
    {
        descriptors.keep_some_for_guests();
    }
    let mut drivers = Vec::new();
    let mut inboxes = Vec::new();
    for _ in 0..count {
        let (driver, wake) = make().map_err(fail)?;
        inboxes.push(Inbox::new(wake));
        drivers.push(driver);
    }
    let bound: Vec<_> = listeners.into_iter().zip(forwards.clone()).collect();
    let shared = Arc::new(Shared::new(
        config.limits,
        gates,
        descriptors,
        forwards,
        inboxes,
    ));
    let pipes = match config.splice {
        true => shared.descriptors.pipes_of_a_worker(),
        false => 0,
    };
    let mut workers: Vec<Worker<D>> = drivers
        .into_iter()
        .enumerate()
        .map(|(index, driver)| Worker::new(driver, index, Arc::clone(&shared), pipes))
        .collect();
    for (listener, forward) in bound {
        workers[forward.home]
            .add_listener(listener, forward)
            .map_err(fail)?;
    }
    let binder = Arc::new(binder);
    Ok((Controller { shared, binder }, workers))
}

/// Runs a worker, and notes its end.
fn run_worker<D: Driver>(worker: Worker<D>, index: usize, shared: &Shared<D>) -> io::Result<()> {
    let run = AssertUnwindSafe(|| worker.run());
    let ended = catch_unwind(run).unwrap_or_else(|_| Err(io::Error::other("a worker panicked")));
    shared.note_worker_end(index, &ended);
    ended
}

#[cfg(test)]
mod tests;
