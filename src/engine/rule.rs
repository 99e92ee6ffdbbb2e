//! What a proxy is to carry where, and what bounds it.

use std::time::Duration;

use crate::address::{Address, HyperkitVm};
use crate::listener::DEFAULT_MODE;

/// Every connection accepted at `listen` is carried to `connect`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rule {
    /// What people call it. No two of a proxy have the same.
    pub name: Option<String>,
    /// Where to listen. A `hyperkit://` address is the port of the host (CID 2) that the guest dials, whatever its CID.
    pub listen: Address,
    /// Where each connection goes.
    pub connect: Address,
    /// Permissions of the file of a Unix listening socket, as for `chmod`: 0o600 lets only the owner connect. Named
    /// pipes take no other; their address can say who may connect.
    pub mode: u32,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// How long a client is held whose target is not there or refuses, while it is dialled again and again; counted from
    /// the accept, and [`Timeouts::dial`] does not bound it. Nothing of what the client sends is sent before it is known
    /// that the target has taken the connection. `None`: such a client is refused at once.
    pub wait: Option<Duration>,
    /// Places among [`Limits::connections`](Limits::connections) that only this rule's connections
    /// may have, and where a side of it is a hyperkit VM as many among
    /// [`Limits::vm_connections`](Limits::vm_connections).
    pub reserved: usize,
    /// Connections of this rule at a time; more clients wait in the listener's backlog. Guests that dial
    /// the host are not bound by it. `None`: what bounds all rules bounds it.
    pub connections: Option<usize>,
}

impl Rule {
    /// A rule whose Unix socket, if it has one, only its owner may use.
    pub fn new(listen: Address, connect: Address) -> Rule {
        Rule {
            name: None,
            listen,
            connect,
            mode: DEFAULT_MODE,
            timeouts: Timeouts::default(),
            wait: None,
            reserved: 0,
            connections: None,
        }
    }
}

/// How long the connections of a rule may take for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Timeouts {
    /// How long a client may wait until its target is connected; a `hvsock://` one has a second at most.
    pub dial: Duration,
    /// How long a guest may take to end a connection after the half-close, before it is closed all the same. Guests of
    /// Hyper-V are guests, too.
    pub drain: Duration,
    /// How long an open connection may go on without a byte either way before it is cut off: its client and its target
    /// are told that it broke off, where their family can tell, and guests are taken leave of. `None`: for ever.
    /// A connection with a `hvsock://` side may take a quarter longer.
    pub idle: Option<Duration>,
    /// The same for a connection of which one side has ended: how long no byte may come from the other. `None`: for ever.
    pub half_closed: Option<Duration>,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            dial: Duration::from_secs(30),
            drain: Duration::from_secs(60),
            idle: None,
            half_closed: None,
        }
    }
}

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
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 10_000,
            vm_connections: 900,
            vm_unanswered: 64,
        }
    }
}

/// What bounds the use of one hyperkit VM, in place of what [`Limits`] has for all.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmLimits {
    /// Which one; its CID doesn't matter.
    pub vm: HyperkitVm,
    /// As [`Limits::vm_connections`].
    pub connections: usize,
    /// As [`Limits::vm_unanswered`].
    pub unanswered: usize,
}

impl VmLimits {
    /// The usual ones.
    pub fn new(vm: HyperkitVm) -> VmLimits {
        let usual = Limits::default();
        VmLimits {
            vm,
            connections: usual.vm_connections,
            unanswered: usual.vm_unanswered,
        }
    }
}
