//! Rules: what none may ask for, and how one becomes a listener and a forward.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::address::{Address, Host, HyperkitVm, TcpAddress, Waiter};
use crate::engine::relay::Side;
use crate::error::{Error, Operation, Result};
use crate::stream::endpoint::{Target, not_carried};
use crate::{dial, listener};

use super::driver::Driver;
use super::forbidden::leads_to;
use super::loops;
use crate::engine::admission::{Gate, GateLimits, Reservation};
use crate::engine::forward::Forward;
use crate::engine::id::ForwardId;
use crate::engine::observer::Observer;
use crate::engine::rule::{Rule, VmLimits};

/// Refuses a rule that can't work, whatever the system says and whatever other rules there are.
fn check_alone(rule: &Rule, waiter: fn(&Address) -> Waiter) -> Result<()> {
    if waiter(&rule.connect) == Waiter::Thread {
        dial::check_supported(&rule.connect)?;
    } else if matches!(Target::of(&rule.connect), Target::NotCarried) {
        return Err(not_carried(Operation::Connect, &rule.connect));
    }
    let invalid = |operation, address, why: &str| {
        let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
        Err(Error::new(operation, address, cause))
    };
    if let Some((why, remedy)) = rule.connect.why_no_target() {
        let error = invalid(Operation::Connect, &rule.connect, why);
        return error.map_err(|error| match remedy {
            Some(remedy) => error.with_remedy(remedy),
            None => error,
        });
    }
    check_bridge(rule, waiter)?;
    if let Some(most) = rule.connections.filter(|most| *most < rule.reserved.max(1)) {
        let why = match most {
            0 => "it may have no connection at all".to_owned(),
            _ => format!(
                "it reserves {} connections, and may have {most}",
                rule.reserved
            ),
        };
        return invalid(Operation::Listen, &rule.listen, &why);
    }
    if rule.listen == rule.connect && !rule.listen.leaves_port_to_kernel() {
        let why = "it would connect to itself";
        return invalid(Operation::Connect, &rule.connect, why);
    }
    Ok(())
}

/// Refuses what a bridge can't carry: it doesn't know of refusals by EOF, nor keeps half-closes back.
fn check_bridge(rule: &Rule, waiter: fn(&Address) -> Waiter) -> Result<()> {
    let [listen, connect] = [&rule.listen, &rule.connect];
    for (one, other) in [(listen, connect), (connect, listen)] {
        if waiter(one) == Waiter::Thread && other.transport().needs_graceful_close {
            let why = format!(
                "{} can't lead to a {} address or from one",
                one,
                other.scheme()
            );
            let cause = io::Error::new(io::ErrorKind::Unsupported, why);
            return Err(Error::new(Operation::Connect, connect, cause)
                .with_remedy("have a Unix socket between them, with a forward for each half"));
        }
    }
    Ok(())
}

/// Names of forwards and VMs stand in logs, in tables and on command lines.
///
/// # Errors
/// Why that is none.
#[cfg(feature = "cli")]
pub(crate) fn check_name(name: &str) -> std::result::Result<(), &'static str> {
    /// Bytes.
    const LONGEST: usize = 100;
    match name {
        "" => Err("a name can't be empty"),
        name if name.len() > LONGEST => Err("a name can't have more than 100 bytes"),
        name if name.chars().any(char::is_control) => {
            Err("a name can't have control characters in it")
        }
        name if name.trim() != name => Err("a name can't begin or end with a blank"),
        _ => Ok(()),
    }
}

/// As [`Proxy::start`](super::Proxy::start) would refuse it, without trying to listen.
#[cfg(feature = "cli")]
pub(crate) fn check_rule(rule: &Rule) -> Result<()> {
    check_alone(rule, Waiter::of)
}

/// Refuses a rule that others stand in the way of.
fn check_beside<'a>(rule: &'a Rule, others: impl Iterator<Item = &'a Rule> + Clone) -> Result<()> {
    let invalid = |why: String| {
        let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
        Err(Error::new(Operation::Listen, &rule.listen, cause))
    };
    if let Some(name) = &rule.name
        && others
            .clone()
            .any(|other| other.name.as_ref() == Some(name))
    {
        return invalid(format!("another forward has the name {name:?}"));
    }
    if !rule.listen.leaves_port_to_kernel()
        && others.clone().any(|other| other.listen == rule.listen)
    {
        return invalid("it is given twice".to_owned());
    }
    if let Some(trail) = loops::find(rule, others) {
        let why = loops::describe(&trail);
        let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
        return Err(Error::new(Operation::Connect, &rule.connect, cause)
            .with_remedy("connect to another address"));
    }
    Ok(())
}

/// Refuses a passed socket that no rule wants: its clients would wait for ever.
pub(crate) fn all_are_wanted(passed: &[listener::Listener], rules: &[Rule]) -> Result<()> {
    let is_wanted = |it: &listener::Listener| rules.iter().any(|rule| it.is_at(&rule.listen));
    let Some(left) = passed.iter().find(|it| !is_wanted(it)) else {
        return Ok(());
    };
    let why = "its socket was passed to us, and no rule listens there";
    let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
    let mut asked = rules.iter().map(|rule| &rule.listen);
    let near = asked.find(|asked| left.is_near(asked));
    let remedy = near.map_or_else(
        || "add a rule that does, or have it not passed".to_owned(),
        |asked| agree(left.address(), asked),
    );
    Err(Error::new(Operation::Listen, left.address(), cause).with_remedy(remedy))
}

/// A socket that listened already. One that somebody else has bound is kept while forwards come and go: nobody could bind
/// it again.
#[derive(Debug)]
struct Passed {
    socket: listener::Listener,
    /// Who has used it last.
    by: Option<ForwardId>,
}

/// Binds rules, and knows the VMs that they lead to.
#[derive(Debug)]
pub(super) struct Binder {
    gates: Mutex<Vec<(PathBuf, Arc<Gate>)>>,
    limits: GateLimits,
    waiter: fn(&Address) -> Waiter,
    observer: Option<Observer>,
    passed: Mutex<Vec<Passed>>,
    next: AtomicU64,
    /// Held by whoever changes the forwards, to the end of it: two that ask for one address are told apart.
    change: Mutex<()>,
    forbidden: Vec<Address>,
}

impl Binder {
    pub(super) fn new(
        limits: GateLimits,
        waiter: fn(&Address) -> Waiter,
        observer: Option<Observer>,
        passed: Vec<listener::Listener>,
        forbidden: Vec<Address>,
    ) -> Binder {
        Binder {
            gates: Mutex::default(),
            limits,
            waiter,
            observer,
            passed: Mutex::new(
                passed
                    .into_iter()
                    .map(|socket| Passed { socket, by: None })
                    .collect(),
            ),
            next: AtomicU64::new(0),
            change: Mutex::default(),
            forbidden,
        }
    }

    /// Refuses a rule that leads where none may lead.
    fn permit(&self, rule: &Rule) -> Result<()> {
        let Some(place) = self.forbidden.iter().find(|it| leads_to(&rule.connect, it)) else {
            return Ok(());
        };
        let why = format!(
            "from {place} this hvsock is controlled or watched, and no forward may lead there, lest a guest get at it"
        );
        let cause = io::Error::new(io::ErrorKind::PermissionDenied, why);
        Err(Error::new(Operation::Connect, &rule.connect, cause)
            .with_remedy("connect to another address, by number if it is a name"))
    }

    /// Waits until nobody else changes the forwards. No worker, and nobody who looks or asks for the end, waits for this.
    pub(super) fn begin_change(&self) -> MutexGuard<'_, ()> {
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Binds a rule beside others, for the worker `home`.
    pub(super) fn bind<D: Driver>(
        &self,
        mut rule: Rule,
        home: usize,
        others: &[Arc<Forward>],
    ) -> Result<(D::Listener, Arc<Forward>)> {
        check_alone(&rule, self.waiter)?;
        self.permit(&rule)?;
        check_beside(&rule, others.iter().map(|forward| &forward.rule))?;
        let id = ForwardId(self.next.fetch_add(1, Ordering::Relaxed));
        let listener = match self.take(&rule.listen, id, others)? {
            Some(listener) => D::take_passed(listener),
            None => D::bind(&rule.listen, rule.mode).map_err(|e| match e.kind() {
                io::ErrorKind::AddrInUse => self.explain(e, &rule.listen, others),
                _ => e,
            })?,
        };
        let asked = D::bound(&listener, &rule.listen);
        let asked = std::mem::replace(&mut rule.listen, asked);
        // Again: the port that was chosen may be the target's.
        check_alone(&rule, self.waiter)?;
        check_beside(&rule, others.iter().map(|forward| &forward.rule))?;
        let gates = [self.gate_of(&rule.listen), self.gate_of(&rule.connect)];
        let quota = reserve_slots(&rule, &gates, id)?;
        let observer = self.observer.clone();
        let mut forward = Forward::new(id, rule, asked, gates, quota, self.waiter, observer);
        forward.home = home;
        Ok((listener, Arc::new(forward)))
    }

    fn passed(&self) -> MutexGuard<'_, Vec<Passed>> {
        self.passed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The socket that listens on `address` already, if one was passed and none of the others has it.
    fn take(
        &self,
        address: &Address,
        id: ForwardId,
        others: &[Arc<Forward>],
    ) -> Result<Option<listener::Listener>> {
        let mut passed = self.passed();
        let is_free = |it: &Passed| !others.iter().any(|other| Some(other.id) == it.by);
        let fits = |it: &Passed| it.socket.is_at(address) && is_free(it);
        let Some(index) = passed.iter().position(fits) else {
            return Ok(None);
        };
        passed[index].socket.prepare(address)?;
        let listener = match passed[index].socket.share()? {
            Some(again) => {
                passed[index].by = Some(id);
                again
            }
            None => passed.swap_remove(index).socket,
        };
        Ok(Some(listener))
    }

    /// Says of an address in use which passed socket has it, if one may be meant.
    fn explain(&self, error: Error, address: &Address, others: &[Arc<Forward>]) -> Error {
        let passed = self.passed();
        let is_free = |it: &Passed| !others.iter().any(|other| Some(other.id) == it.by);
        let near = passed
            .iter()
            .find(|it| it.socket.is_near(address) && is_free(it));
        match near {
            Some(near) => {
                let near = near.socket.address();
                let remedy = agree(near, address);
                error.with_remedy(format!("{near} was passed to us, but {remedy}"))
            }
            None => error,
        }
    }

    /// Keeps no socket that was passed any longer.
    pub(super) fn let_passed_go(&self) {
        // Who looks for one now may wait for a file or a name: the end doesn't wait for that.
        if let Ok(mut passed) = self.passed.try_lock() {
            passed.clear();
        }
    }

    /// Another rule for a forward that listens already, which keeps no places of its VM from now on.
    pub(super) fn replace<'a>(
        &self,
        rule: Rule,
        old: &Forward,
        others: impl Iterator<Item = &'a Arc<Forward>> + Clone,
    ) -> Result<Arc<Forward>> {
        if rule.listen != old.asked {
            let why = format!("this forward listens on {}", old.asked);
            let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
            return Err(Error::new(Operation::Listen, &rule.listen, cause)
                .with_remedy("remove it, and add another one"));
        }
        let listen = old.rule.listen.clone();
        let rule = Rule { listen, ..rule };
        check_alone(&rule, self.waiter)?;
        self.permit(&rule)?;
        check_beside(&rule, others.map(|forward| &forward.rule))?;
        let gates = [old.gates[Side::Client].clone(), self.gate_of(&rule.connect)];
        let waiter = (self.waiter)(&rule.connect);
        // Otherwise the new ones would have to be free beside the old ones.
        old.keep_quota(None);
        let quota = reserve_slots(&rule, &gates, old.id).inspect_err(|_| self.restore(old))?;
        Ok(Arc::new(old.with_rule(rule, gates, quota, waiter)))
    }

    /// Has a forward keep its places again, after another rule for it has failed.
    pub(super) fn restore(&self, forward: &Forward) {
        let quota = reserve_slots(&forward.rule, &forward.gates, forward.id);
        // There are as many as before, unless the VM has got fewer since.
        forward.keep_quota(quota.unwrap_or(None));
    }

    /// Bounds the use of a VM from now on.
    pub(super) fn limit(&self, limits: &VmLimits) {
        self.gate_of_vm(&limits.vm).set_limits(GateLimits {
            live: limits.connections,
            unanswered: limits.unanswered as u64,
        });
    }

    /// The gate of the VM that an address is of, if it is hyperkit's.
    fn gate_of(&self, address: &Address) -> Option<Arc<Gate>> {
        match address {
            Address::Hyperkit(hyperkit) => Some(self.gate_of_vm(&hyperkit.vm)),
            _ => None,
        }
    }

    fn gate_of_vm(&self, vm: &HyperkitVm) -> Arc<Gate> {
        let socket = socket_of(vm);
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, gate)) = gates.iter().find(|(known, _)| *known == socket) {
            return Arc::clone(gate);
        }
        let gate = Arc::new(Gate::new(self.limits, vm.clone()));
        gates.push((socket, Arc::clone(&gate)));
        gate
    }
}

/// Says how a rule and a passed socket that nearly meet can be made to meet.
fn agree(passed: &Address, asked: &Address) -> String {
    let systemd = match asked {
        // systemd takes no names.
        Address::Tcp(TcpAddress {
            host: Host::Ip(ip),
            port,
        }) => format!(" (ListenStream={})", SocketAddr::new(*ip, *port)),
        _ => String::new(),
    };
    format!(
        "a rule listens on {asked}: have it listen on {passed}, or pass a socket of {asked}{systemd}"
    )
}

/// Keeps the places that a rule reserves, in the VM that it leads to, or else in the one that dials it.
fn reserve_slots(
    rule: &Rule,
    gates: &[Option<Arc<Gate>>; 2],
    id: ForwardId,
) -> Result<Option<Reservation>> {
    let fail = |address, why: String, remedy| {
        let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
        Err(Error::new(Operation::Listen, address, cause).with_remedy(remedy))
    };
    let (gate, holds) = match gates {
        [_, Some(gate)] => (gate, Some(rule.wait.is_some_and(|wait| !wait.is_zero()))),
        [Some(gate), None] => (gate, None),
        [None, None] => return Ok(None),
    };
    match gate.reserve(id, rule.reserved, holds) {
        Ok(places) => Ok(Some(places)),
        Err(left) => {
            let wanted = rule.reserved;
            let why = format!("it reserves {wanted} connections of its VM, and {left} are left");
            let remedy = "reserve fewer, or allow the VM more connections";
            fail(&rule.listen, why, remedy)
        }
    }
}

/// One VM has one gate, however its directory is spelled, and be it there or not yet.
fn socket_of(vm: &HyperkitVm) -> PathBuf {
    let directory = std::path::absolute(&vm.state_dir).unwrap_or_else(|_| vm.state_dir.clone());
    let real = directory.ancestors().find_map(|there| {
        let missing = directory.strip_prefix(there).ok()?;
        Some(there.canonicalize().ok()?.join(missing))
    });
    real.unwrap_or(directory).join(&vm.connect)
}
