//! Rules: what none may ask for, and how one becomes a listener and a forward.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::address::{Address, CID_ANY, HyperkitVm, PORT_ANY};
use crate::dial;
use crate::error::{Error, Operation, Result};
use crate::listener;
use crate::listener::nonblocking::{Listener, not_carried};
use crate::stream::nonblocking::{Target, Waiter};

use super::forbidden::leads_to;
use super::forward::{Forward, Rule};
use super::gate::{Gate, GateLimits, Reservation};
use super::handle::ForwardId;
use super::observer::Observer;

/// Refuses a rule that can't work, whatever the system says.
fn check<'a>(rule: &Rule, mut others: impl Iterator<Item = &'a Rule> + Clone) -> Result<()> {
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
    if let Some(name) = &rule.name
        && others
            .clone()
            .any(|other| other.name.as_ref() == Some(name))
    {
        let why = format!("another forward has the name {name:?}");
        let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
        return Err(Error::new(Operation::Listen, &rule.listen, cause));
    }
    if !chosen && others.any(|other| other.listen == rule.listen) {
        return invalid(Operation::Listen, &rule.listen, "it is given twice");
    }
    Ok(())
}

/// Binds rules, and knows the VMs that they lead to.
#[derive(Debug)]
pub(super) struct Binder {
    gates: Mutex<Vec<(PathBuf, Arc<Gate>)>>,
    limits: GateLimits,
    waiter: fn(&Address) -> Waiter,
    observer: Option<Observer>,
    /// Those that listen already.
    passed: Mutex<Vec<listener::Listener>>,
    next: AtomicU64,
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
            passed: Mutex::new(passed),
            next: AtomicU64::new(0),
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
        self.permit(&rule)?;
        check(&rule, others.iter().map(|forward| &forward.rule))?;
        self.check_bridge(&rule)?;
        let listener = match self.take(&rule.listen)? {
            Some(listener) => listener,
            None => Listener::bind(&rule.listen, rule.mode)?,
        };
        let asked = listener.bound(&rule.listen);
        let asked = std::mem::replace(&mut rule.listen, asked);
        if rule.listen == rule.connect {
            let cause = io::Error::new(io::ErrorKind::InvalidInput, "it would connect to itself");
            return Err(Error::new(Operation::Connect, &rule.connect, cause));
        }
        let gates = [self.gate_of(&rule.listen), self.gate_of(&rule.connect)];
        let id = ForwardId(self.next.fetch_add(1, Ordering::Relaxed));
        let places = keep_places(&rule, &gates, id)?;
        let observer = self.observer.clone();
        let forward = Forward::new(id, rule, asked, gates, places, self.waiter, observer);
        Ok((listener, Arc::new(forward)))
    }

    fn passed(&self) -> MutexGuard<'_, Vec<listener::Listener>> {
        self.passed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The socket that listens on `address` already, if one was passed.
    fn take(&self, address: &Address) -> Result<Option<Listener>> {
        let mut passed = self.passed();
        let Some(index) = passed.iter().position(|passed| passed.is_at(address)) else {
            return Ok(None);
        };
        let listener = passed.swap_remove(index);
        listener.prepare(address)?;
        Ok(Some(listener.into_nonblocking()))
    }

    /// Refuses a passed socket that no rule has taken: its clients would wait for ever.
    pub(super) fn all_are_taken(&self) -> Result<()> {
        let passed = self.passed();
        let Some(left) = passed.first() else {
            return Ok(());
        };
        let why = "its socket was passed to us, and no rule listens there";
        let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
        Err(Error::new(Operation::Listen, left.address(), cause)
            .with_remedy("add a rule that does, or have it not passed"))
    }

    /// Refuses what a bridge can't carry: it doesn't know of refusals by EOF, nor keeps half-closes back.
    fn check_bridge(&self, rule: &Rule) -> Result<()> {
        let [listen, connect] = [&rule.listen, &rule.connect];
        for (one, other) in [(listen, connect), (connect, listen)] {
            if (self.waiter)(one) == Waiter::Thread && other.is_delicate() {
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
        let gate = Arc::new(Gate::new(self.limits, hyperkit.vm.clone()));
        gates.push((socket, Arc::clone(&gate)));
        Some(gate)
    }
}

/// Keeps the places that a rule reserves, in the VM that it leads to, or else in the one that dials it.
fn keep_places(
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
        [None, None] if rule.reserved > 0 => {
            let why = format!("it reserves {} connections of a VM", rule.reserved);
            let remedy = "leave that out: none of its addresses is of a hyperkit VM";
            return fail(&rule.listen, why, remedy);
        }
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

/// One VM has one gate, however its directory is spelled.
fn socket_of(vm: &HyperkitVm) -> PathBuf {
    let directory = vm.state_dir.canonicalize();
    directory.map_or_else(|_| vm.connect_path(), |real| real.join(&vm.connect))
}
