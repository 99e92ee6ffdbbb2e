//! The checks of rules, and the binding of a rule to a listener and a forward. It runs on the
//! callers' threads, never on a worker's.

use std::collections::HashSet;
use std::io;
#[cfg(all(unix, feature = "cli"))]
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

#[cfg(all(unix, feature = "cli"))]
use crate::address::AnyVm;
use crate::address::{Address, TcpAddress, Waiter};
use crate::engine::relay::Side;
use crate::error::{Error, Operation, Result, counted};
use crate::listener::{Key, Ready};
use crate::lock::lock;
use crate::stream::endpoint::{Target, not_carried};
#[cfg(unix)]
use crate::sys;
use crate::{dial, listener};

use super::driver::Driver;
use super::forbidden::leads_to;
use super::gates::Gates;
use super::loops::{self, Candidate, RuleIndex};
#[cfg(all(unix, feature = "cli"))]
use crate::engine::admission::sharing::{OtherSlots, Remainder};
use crate::engine::admission::{Gate, Reservation};
use crate::engine::ended::EndedConnection;
use crate::engine::forward::{Forward, Reports};
use crate::engine::id::ForwardId;
use crate::engine::rule::{Rule, VmLimits};

/// Checks a rule by itself: refuses one that can't work on any system and with any other rules.
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
    if rule.listen.why_no_listener().is_some() {
        return Err(not_carried(Operation::Listen, &rule.listen));
    }
    if let Some(source) = rule.from.iter().find(|it| !it.suits(&rule.listen)) {
        let (listen, scheme) = (&rule.listen, rule.listen.scheme());
        let why = format!("no client of a {scheme} address comes from {source}");
        let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
        let remedy = "tcp:// addresses have networks in from, vsock:// ones CIDs, others none; of a Unix socket mode, owner and group say who may come";
        return Err(Error::new(Operation::Listen, listen, cause).with_remedy(remedy));
    }
    if let Some((why, remedy)) = rule.connect.why_no_target() {
        let error = invalid(Operation::Connect, &rule.connect, why);
        return error.map_err(|error| match remedy {
            Some(remedy) => error.with_remedy(remedy),
            None => error,
        });
    }
    #[cfg(unix)]
    if let Some(path) = rule.listen.listen_path() {
        sys::check_socket_name(&path).map_err(|e| {
            Error::new(Operation::Listen, &rule.listen, e)
                .with_remedy("choose a shorter name, or a shorter path")
        })?;
    }
    check_relay_threads(rule, waiter)?;
    check_proxy_protocol(rule, waiter)?;
    if let Some(most) = rule
        .most_connections()
        .filter(|most| *most < rule.reserved.max(1))
    {
        let why = match most {
            0 => "it may have no connection at all".to_owned(),
            _ => format!(
                "it reserves {}, and may have {most}",
                counted(rule.reserved as u64, "connection")
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

/// Refuses what the PROXY protocol can't do.
fn check_proxy_protocol(rule: &Rule, waiter: fn(&Address) -> Waiter) -> Result<()> {
    let waiters = [waiter(&rule.listen), waiter(&rule.connect)];
    let is_on_threads = waiters.contains(&Waiter::Thread) && !waiters.contains(&Waiter::Poller);
    if is_on_threads && rule.proxy_protocol.is_some() {
        let why = format!("from {} it is told of no client", rule.listen);
        let cause = io::Error::new(io::ErrorKind::Unsupported, why);
        return Err(Error::new(Operation::Connect, &rule.connect, cause)
            .with_remedy("leave proxy-protocol out, or have a TCP socket between them"));
    }
    let mut from = rule.accept_proxy.iter();
    let Some(source) = from.find(|it| !it.suits(&rule.listen)) else {
        return Ok(());
    };
    let scheme = rule.listen.scheme();
    let why = format!("no client of a {scheme} address comes from {source}");
    let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
    Err(Error::new(Operation::Listen, &rule.listen, cause)
        .with_remedy("in accept-proxy, tcp:// addresses have networks, vsock:// ones CIDs"))
}

/// Refuses a rule that relay threads can't carry: they neither know refusals by EOF nor hold back
/// half-closes.
fn check_relay_threads(rule: &Rule, waiter: fn(&Address) -> Waiter) -> Result<()> {
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

/// Checks the name of a forward or a VM. Names are shown in logs and tables, and used on command
/// lines.
///
/// # Errors
/// Returns why the name is not allowed.
#[cfg(feature = "cli")]
pub(crate) fn check_name(name: &str) -> std::result::Result<(), &'static str> {
    /// The most bytes.
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

/// Checks a rule as [`Proxy::start`](super::Proxy::start) does, without listening.
#[cfg(feature = "cli")]
pub(crate) fn check_rule(rule: &Rule) -> Result<()> {
    check_alone(rule, Waiter::of)
}

/// Checks a rule against the other rules: those of the index but the one that it replaces.
fn check_beside(rule: &Rule, index: &RuleIndex, candidate: Candidate) -> Result<()> {
    let replaced = candidate.replaced();
    let is_another = |id: Option<u64>| id.is_some() && id != replaced;
    let invalid = |why: String| {
        let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
        Err(Error::new(Operation::Listen, &rule.listen, cause))
    };
    if let Some(name) = &rule.name
        && is_another(index.named(name))
    {
        return invalid(format!("another forward has the name {name:?}"));
    }
    if !rule.listen.leaves_port_to_kernel() && is_another(index.listening_on(&rule.listen)) {
        return invalid("it is given twice".to_owned());
    }
    if let Some(trail) = index.find_loop(candidate, rule) {
        let why = loops::describe(&trail);
        let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
        return Err(Error::new(Operation::Connect, &rule.connect, cause)
            .with_remedy("connect to another address"));
    }
    Ok(())
}

/// Refuses a passed socket that no rule wants, since its clients would wait for ever.
pub(crate) fn all_are_wanted(passed: &[listener::Listener], rules: &[Rule]) -> Result<()> {
    if passed.is_empty() {
        return Ok(());
    }
    let keys = |rule: &Rule| Key::wanted(rule.name.as_deref(), &rule.listen);
    let wanted: HashSet<Key> = rules.iter().flat_map(keys).collect();
    let is_wanted = |it: &listener::Listener| it.keys().iter().any(|key| wanted.contains(key));
    let Some(left) = passed.iter().find(|it| !is_wanted(it)) else {
        return Ok(());
    };
    let why = "its socket was passed to us, and no rule listens there";
    let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
    let mut asked = rules.iter().map(|rule| &rule.listen);
    let near = asked.find(|asked| left.is_near(asked));
    let remedy = near.map_or_else(
        || "add a rule that does, or have it not passed".to_owned(),
        |asked| describe_mismatch(left.address(), asked),
    );
    Err(Error::new(Operation::Listen, left.address(), cause).with_remedy(remedy))
}

/// A socket that listened already. One that another program has bound is kept while forwards are
/// added and removed, since this process could not bind it again.
#[derive(Debug)]
struct Passed {
    socket: listener::Listener,
    /// The forward that used it last.
    used_by: Option<ForwardId>,
}

/// The part of a proxy that binds rules.
#[derive(Debug)]
pub(super) struct Binder {
    gates: Arc<Gates>,
    /// The rules of the forwards that there are.
    index: Mutex<RuleIndex>,
    waiter: fn(&Address) -> Waiter,
    reports: Reports,
    passed: Mutex<Ready<Passed>>,
    next: AtomicU64,
    /// The lock that a change of the forwards holds to its end, so that two rules for one address
    /// can't be bound at once.
    change: Mutex<()>,
    forbidden: Vec<Address>,
}

impl Binder {
    pub(super) fn new(
        gates: Arc<Gates>,
        waiter: fn(&Address) -> Waiter,
        reports: Reports,
        passed: Vec<listener::Listener>,
        forbidden: Vec<Address>,
    ) -> Binder {
        let passed = passed.into_iter().map(|socket| Passed {
            socket,
            used_by: None,
        });
        let passed = passed.collect();
        Binder {
            gates,
            index: Mutex::default(),
            waiter,
            reports,
            passed: Mutex::new(Ready::new(passed, |it| &it.socket)),
            next: AtomicU64::new(0),
            change: Mutex::default(),
            forbidden,
        }
    }

    /// Refuses a rule with a forbidden target.
    fn check_forbidden(&self, rule: &Rule) -> Result<()> {
        let Some(forbidden) = self.forbidden.iter().find(|it| leads_to(&rule.connect, it)) else {
            return Ok(());
        };
        let why = format!(
            "from {forbidden} this hvsock is controlled or watched, and no forward may lead there, lest a guest get at it"
        );
        let cause = io::Error::new(io::ErrorKind::PermissionDenied, why);
        Err(Error::new(Operation::Connect, &rule.connect, cause)
            .with_remedy("connect to another address, by number if it is a name"))
    }

    /// Waits until no other thread changes the forwards. No worker waits for this, nor does a
    /// thread that inspects or stops the proxy.
    pub(super) fn begin_change(&self) -> MutexGuard<'_, ()> {
        lock(&self.change)
    }

    fn index(&self) -> MutexGuard<'_, RuleIndex> {
        lock(&self.index)
    }

    /// Binds a rule beside those that are bound already, for the worker `home`.
    pub(super) fn bind<D: Driver>(
        &self,
        mut rule: Rule,
        home: usize,
    ) -> Result<(D::Listener, Arc<Forward>)> {
        check_alone(&rule, self.waiter)?;
        self.check_forbidden(&rule)?;
        check_beside(&rule, &self.index(), Candidate::New)?;
        let id = ForwardId(self.next.fetch_add(1, Ordering::Relaxed));
        let listener = match self.take_passed(&rule, id)? {
            Some(listener) => D::take_passed(listener),
            None => D::bind(&rule.listen, rule.access()).map_err(|e| match e.kind() {
                io::ErrorKind::AddrInUse => self.explain(e, &rule.listen),
                _ => e,
            })?,
        };
        let asked = D::bound(&listener, &rule.listen);
        let asked = std::mem::replace(&mut rule.listen, asked);
        // Checked again, because the port that was chosen may be the target's.
        check_alone(&rule, self.waiter)?;
        check_beside(&rule, &self.index(), Candidate::New)?;
        let gates = Side::BOTH.map(|side| self.gate_of(&rule, side));
        let quota = reserve_at_vm(&rule, &gates, id)?;
        let reports = self.reports.clone();
        let mut forward = Forward::new(id, rule, asked, gates, quota, self.waiter, reports);
        forward.home = home;
        forward.status_cell.set_note(D::note(&listener));
        self.index().insert(id.0, &forward.rule);
        Ok((listener, Arc::new(forward)))
    }

    pub(super) fn set_access_log(&self, is_on: bool) {
        self.reports.access_log.set(is_on);
    }

    /// Returns the last connections that have ended, the oldest first.
    pub(super) fn ended(&self) -> Vec<EndedConnection> {
        self.reports.ended.list()
    }

    /// Forgets the rule of a forward that was removed.
    pub(super) fn forget_rule(&self, forward: ForwardId) {
        self.index().remove(forward.0);
    }

    /// Returns whether no forward uses a passed socket.
    fn is_unused(&self, passed: &Passed) -> bool {
        let index = self.index();
        passed.used_by.is_none_or(|id| !index.contains(id.0))
    }

    fn passed(&self) -> MutexGuard<'_, Ready<Passed>> {
        lock(&self.passed)
    }

    /// Returns the socket of a rule that listens already, if one was passed and none of the others
    /// uses it.
    fn take_passed(&self, rule: &Rule, id: ForwardId) -> Result<Option<listener::Listener>> {
        if self.passed().is_empty() {
            return Ok(None);
        }
        let keys = Key::wanted(rule.name.as_deref(), &rule.listen);
        let mut passed = self.passed();
        let Some(first) = passed.find(&keys, |it| self.is_unused(it)) else {
            return Ok(None);
        };
        // One address may have a socket of each family of IP.
        let joins = |first: &Passed, it: &Passed| {
            self.is_unused(it) && first.socket.is_joined_by(&rule.listen, &it.socket)
        };
        let other = passed.find_beside(first, &keys, joins);
        let mut take = |number| -> Result<Option<listener::Listener>> {
            let Some(found) = passed.get_mut(number) else {
                return Ok(None);
            };
            found.socket.prepare(&rule.listen)?;
            if let Some(again) = found.socket.share()? {
                found.used_by = Some(id);
                return Ok(Some(again));
            }
            Ok(passed.remove(number).map(|found| found.socket))
        };
        let other = other.map(&mut take).transpose()?.flatten();
        let Some(mut listener) = take(first)? else {
            return Ok(None);
        };
        if let Some(other) = other {
            listener.join(other);
        }
        #[cfg(unix)]
        listener.complete(&rule.listen);
        Ok(Some(listener))
    }

    /// Returns the forwards that listen on a socket which another program has bound.
    #[cfg(all(unix, feature = "cli"))]
    pub(super) fn on_foreign_sockets(&self) -> HashSet<ForwardId> {
        self.passed().iter().filter_map(|it| it.used_by).collect()
    }

    /// Calls `f` with each passed socket that no forward uses.
    #[cfg(all(unix, feature = "cli"))]
    pub(super) fn for_each_unused(
        &self,
        mut f: impl FnMut(&listener::Listener) -> io::Result<()>,
    ) -> io::Result<()> {
        let passed = self.passed();
        let mut free = passed.iter().filter(|it| self.is_unused(it));
        free.try_for_each(|it| f(&it.socket))
    }

    /// Leaves the passed sockets to another process.
    #[cfg(all(unix, feature = "cli"))]
    pub(super) fn give_passed(&self) {
        for it in self.passed().take_all() {
            if let Some(file) = it.socket.file() {
                file.leave();
            }
        }
    }

    /// Adds to an error about an address in use which passed socket has it, if one may be meant.
    fn explain(&self, error: Error, address: &Address) -> Error {
        let passed = self.passed();
        let near = passed
            .iter()
            .find(|it| it.socket.is_near(address) && self.is_unused(it));
        match near {
            Some(near) => {
                let near = near.socket.address();
                let remedy = describe_mismatch(near, address);
                error.with_remedy(format!("{near} was passed to us, but {remedy}"))
            }
            None => error,
        }
    }

    /// Closes the passed sockets that are still kept.
    pub(super) fn close_passed(&self) {
        // A thread that holds the lock may wait for a file or a name; the stop does not wait for
        // it.
        if let Ok(mut passed) = self.passed.try_lock() {
            drop(passed.take_all());
        }
    }

    /// Makes a forward with another rule for one that listens already. The old one has no slots
    /// reserved from then on.
    pub(super) fn replace(&self, rule: Rule, old: &Forward) -> Result<Arc<Forward>> {
        if rule.listen != old.asked {
            let why = format!("this forward listens on {}", old.asked);
            let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
            return Err(Error::new(Operation::Listen, &rule.listen, cause)
                .with_remedy("remove it, and add another one"));
        }
        let listen = old.rule.listen.clone();
        let rule = Rule { listen, ..rule };
        check_alone(&rule, self.waiter)?;
        self.check_forbidden(&rule)?;
        check_beside(&rule, &self.index(), Candidate::InPlaceOf(old.id.0))?;
        let gates = Side::BOTH.map(|side| self.gate_of(&rule, side));
        let waiter = (self.waiter)(&rule.connect);
        // Otherwise the new slots would have to be free besides the old ones.
        old.release_quota();
        let quota =
            reserve_at_vm(&rule, &gates, old.id).inspect_err(|_| self.reserve_slots_again(old))?;
        self.index().insert(old.id.0, &rule);
        Ok(Arc::new(old.with_rule(rule, gates, quota, waiter)))
    }

    /// Reserves the slots of a forward again, after its replacement has failed.
    pub(super) fn reserve_slots_again(&self, forward: &Forward) {
        let quota = reserve_at_vm(&forward.rule, &forward.gates, forward.id);
        // As many slots are free as before, unless the VM's limit was lowered since.
        forward.set_quota(quota.unwrap_or(None));
        self.index().insert(forward.id.0, &forward.rule);
    }

    /// Sets the limits of a VM.
    pub(super) fn set_limits(&self, limits: &VmLimits) {
        self.gates.set_limits(limits);
    }

    /// Keeps the remainder of each VM's slots, and returns it with the path of the VM's socket.
    #[cfg(all(unix, feature = "cli"))]
    pub(super) fn keep_remainders(&self, what: Remainder) -> Vec<(PathBuf, OtherSlots)> {
        let gates = self.gates.all().into_iter();
        // A VM without a socket is not shared: it does not die of what both processes allow it.
        let remainder =
            |(vm, gate): (AnyVm, Arc<Gate>)| Some((socket_of(&vm)?, gate.keep_remainder(what)?));
        gates.filter_map(remainder).collect()
    }

    /// Takes all slots of all VMs again.
    #[cfg(all(unix, feature = "cli"))]
    pub(super) fn take_whole(&self) {
        self.gates.all().values().for_each(|gate| gate.take_whole());
    }

    /// Leaves out the slots that another process has of the VM with that socket, if it is known
    /// here.
    #[cfg(all(unix, feature = "cli"))]
    pub(super) fn leave_out(&self, socket: &Path, slots: OtherSlots) {
        let mut gates = self.gates.all().into_iter();
        let its = |(vm, _): &(AnyVm, _)| socket_of(vm).is_some_and(|path| path == socket);
        if let Some((_, gate)) = gates.find(its) {
            gate.leave_out(slots);
        }
    }

    /// Notes that the other process has ended.
    #[cfg(all(unix, feature = "cli"))]
    pub(super) fn forget_other(&self) {
        self.gates
            .all()
            .values()
            .for_each(|gate| gate.forget_other());
    }

    /// Returns the gate of the VM of a rule's side, if that is one.
    fn gate_of(&self, rule: &Rule, side: Side) -> Option<Arc<Gate>> {
        rule.vm(side).map(|vm| self.gates.gate_of(&vm))
    }
}

/// Describes how a rule and a passed socket that differ only slightly can be made to match.
fn describe_mismatch(passed: &Address, asked: &Address) -> String {
    // systemd takes no names.
    let systemd = match asked.as_tcp().and_then(TcpAddress::socket_addr) {
        Some(address) => format!(" (ListenStream={address})"),
        None => String::new(),
    };
    format!(
        "a rule listens on {asked}: have it listen on {passed}, or pass a socket of {asked}{systemd}"
    )
}

/// Reserves the slots that a rule asks for, at the VM that it leads to, or else at the one that
/// dials it.
fn reserve_at_vm(
    rule: &Rule,
    gates: &[Option<Arc<Gate>>; 2],
    id: ForwardId,
) -> Result<Option<Reservation>> {
    let fail = |address, why: String, remedy| {
        let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
        Err(Error::new(Operation::Listen, address, cause).with_remedy(remedy))
    };
    let (gate, while_down) = match gates {
        [_, Some(gate)] => (gate, Some(rule.while_down())),
        [Some(gate), None] => (gate, None),
        [None, None] => return Ok(None),
    };
    match gate.reserve(id, rule.reserved, while_down) {
        Ok(reservation) => Ok(Some(match &gates[Side::Client] {
            Some(gate) => reservation.count_guest_forward(gate),
            None => reservation,
        })),
        Err(left) => {
            let wanted = counted(rule.reserved as u64, "connection");
            let why = format!("it reserves {wanted} of its VM, which has {left} left");
            let remedy = "reserve fewer, or allow the VM more connections";
            fail(&rule.listen, why, remedy)
        }
    }
}

/// Returns the path of the socket at which a VM, whose path is canonical, is dialled.
#[cfg(all(unix, feature = "cli"))]
fn socket_of(vm: &AnyVm) -> Option<PathBuf> {
    match vm {
        AnyVm::Hyperkit(vm) => Some(vm.connect_path()),
        AnyVm::VsockMux(path) => Some(path.clone()),
        AnyVm::Vsock(_) | AnyVm::Hvsock(_) => None,
    }
}
