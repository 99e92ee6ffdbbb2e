//! The rules of a proxy: what it forwards where, and its timeouts and limits. They are plain data;
//! what follows from them is decided elsewhere.

use std::time::Duration;

use crate::address::{Address, AnyVm};
use crate::engine::proxy_header::ProxyProtocol;
use crate::engine::relay::Side;
use crate::engine::source::{Source, may_come};
use crate::listener::{DEFAULT_MODE, FileAccess};
use crate::name::SocketName;

/// A rule: every connection accepted at `listen` is forwarded to `connect`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rule {
    /// A name for people. No two rules of a proxy have the same.
    pub name: Option<String>,
    /// The address to listen at. A `hyperkit://` address is the port of the host (CID 2) that the
    /// guest dials, whatever the address's CID is.
    pub listen: Address,
    /// The address that each connection is forwarded to.
    pub connect: Address,
    /// Permissions of the file of a Unix listening socket, as for `chmod`: 0o600 lets only the
    /// owner connect. Named pipes ignore it; their address can say who may connect.
    pub mode: u32,
    /// The user id that is to own the file of a Unix listening socket, which only root may give
    /// away. `None`: that of this process; a file that is there already keeps its owner.
    pub owner: Option<u32>,
    /// The group id of the file of a Unix listening socket: one that this process' user is in,
    /// unless that is root. `None`: that of this process, or of the directory; a file that is there
    /// already keeps its group.
    pub group: Option<u32>,
    /// Where the clients of a `tcp://` or `vsock://` address may come from; others are refused.
    /// Empty: from anywhere.
    pub from: Vec<Source>,
    /// The timeouts of its connections.
    pub timeouts: Timeouts,
    /// How long a client is held whose target is absent or refuses, while the target is dialled
    /// again and again. The time counts from the accept, and [`Timeouts::dial`] does not bound it.
    /// Nothing that the client sends is forwarded before the target is known to have taken the
    /// connection. `None`: such a client is refused at once.
    pub wait: Option<Duration>,
    /// Slots among [`Limits::connections`](Limits::connections) that are reserved for this rule's
    /// connections; if a side of the rule is a VM, as many are reserved among those that the VM may
    /// have.
    pub reserved: usize,
    /// The most connections of this rule at a time; further clients wait in the listener's backlog,
    /// and further dials of a hyperkit guest are ended at once. Guests of other VMMs are not bound
    /// by it, unless their target is a program or a file: they are refused then. `None`: 64 if the
    /// target is a program or a file; else only the limits of all rules apply.
    pub connections: Option<usize>,
    /// The time after which TCP asks a peer that has sent nothing whether it is still there, of TCP
    /// clients and TCP targets; in whole seconds, from 1 to 32,767. A peer that is gone without a
    /// word is noticed a minute later: it is asked six times, every ten seconds. `None`: it is not
    /// asked, and never noticed as long as nothing is sent to it.
    pub keepalive: Option<Duration>,
    /// The version of the PROXY protocol by which the target is told first who the client is,
    /// before the client's bytes. `None`: it isn't told.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// The proxies that tell by the PROXY protocol, version 1 or 2, who their client is: what a
    /// client from there says counts in the place of its own address. One that says nothing within
    /// 5 s, or anything else, is refused. Clients from elsewhere say nothing. Networks and
    /// addresses are for `tcp://` listeners, CIDs for `vsock://` ones.
    pub accept_proxy: Vec<Source>,
}

/// The default of [`Rule::keepalive`]: a peer that is gone is noticed within two minutes.
const KEEPALIVE: Duration = Duration::from_secs(60);

impl Rule {
    /// Makes a rule with the default settings. Only the owner may use its Unix socket, if it has
    /// one.
    pub fn new(listen: Address, connect: Address) -> Rule {
        Rule {
            name: None,
            listen,
            connect,
            mode: DEFAULT_MODE,
            owner: None,
            group: None,
            from: Vec::new(),
            timeouts: Timeouts::default(),
            wait: None,
            reserved: 0,
            connections: None,
            keepalive: Some(KEEPALIVE),
            proxy_protocol: None,
            accept_proxy: Vec::new(),
        }
    }

    /// Returns who may use the file of its Unix listening socket.
    pub(crate) fn access(&self) -> FileAccess {
        FileAccess {
            mode: self.mode,
            owner: self.owner,
            group: self.group,
        }
    }

    /// Returns whether a client of that name may come.
    pub(crate) fn admits(&self, client: &SocketName) -> bool {
        may_come(&self.from, client)
    }

    /// Returns the VM of a side: the one that is dialled, or the one whose guest dials.
    pub(crate) fn vm(&self, side: Side) -> Option<AnyVm> {
        let only = match self.from[..] {
            [source] => source.as_cid(),
            _ => None,
        };
        match side {
            Side::Client => self.listen.dialling_vm(only),
            Side::Server => self.connect.vm(),
        }
    }

    /// Returns how long clients are held while the target is down.
    pub(crate) fn hold_time(&self) -> Option<Duration> {
        self.wait.filter(|wait| !wait.is_zero())
    }

    /// Returns what is done with clients while the target is down.
    pub(crate) fn while_down(&self) -> WhileDown {
        match self.hold_time() {
            None => WhileDown::RefusesClients,
            Some(_) => WhileDown::HoldsClients,
        }
    }

    /// Returns the most connections that it may have at a time; `None`: as many as all may have.
    pub(crate) fn most_connections(&self) -> Option<usize> {
        self.connections.or(self.connect.transport().connections)
    }
}

/// What a forward does with its clients while its target is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WhileDown {
    RefusesClients,
    HoldsClients,
}

/// The timeouts of a rule's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Timeouts {
    /// How long a client may wait until its target is connected; at most a second if the target is
    /// a `hvsock://` address.
    pub dial: Duration,
    /// The drain timeout: how long a guest may take to end a connection that is being closed, or
    /// whose half-close is held back, before the connection is closed nevertheless. A guest that
    /// goes on sending though nobody is left to read is given up after ten seconds, or when clients
    /// wait and such connections have more than a tenth of its VM's slots; it is read slowly until
    /// then. A guest of Hyper-V has the whole drain timeout, also if it goes on sending. For a
    /// half-close that was passed on see [`half_closed`](Timeouts::half_closed).
    pub drain: Duration,
    /// The idle timeout: how long an open connection may go on without a byte in either direction
    /// before it is cut off. Its client and its target are reset, where their family can be, and
    /// guests are closed gracefully. `None`: for ever. A connection with a `hvsock://` side may
    /// take a quarter longer.
    pub idle: Option<Duration>,
    /// The idle timeout of a connection of which one side has ended: how long no byte may come from
    /// the other. `None`: for ever.
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

/// The limits of a proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Connections of all rules at a time; further clients wait in the listeners' backlogs. Guests
    /// that dial the host are not bound by it. Each connection takes two descriptors, so the
    /// process' descriptor limit may lower this one.
    pub connections: usize,
    /// Connections to one hyperkit VM at a time; further clients wait in the listener's backlog,
    /// and those that can't be made to wait there (guests, chained forwards) to be dialled.
    /// hyperkit has 1,024 slots and closes what exceeds them; started with 256 descriptors, it
    /// hangs beyond 245.
    ///
    /// Connections that the guest makes to the host may be eight ninths of them (800 of 900), and
    /// of one of several forwards three quarters of that (600). The guest can't be made to wait, so
    /// what it dials beyond is accepted and ended at once, gracefully.
    pub vm_connections: usize,
    /// Unanswered dials to one hyperkit VM at a time; further clients wait. hyperkit aborts at 512.
    pub vm_unanswered: usize,
    /// As [`vm_connections`](Limits::vm_connections), of a VM of another family. `None`: no limit
    /// but that of all connections.
    pub other_vm_connections: Option<usize>,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 10_000,
            vm_connections: 900,
            vm_unanswered: 64,
            other_vm_connections: None,
        }
    }
}

/// The limits of one VM, in place of those that [`Limits`] has for all.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmLimits {
    /// The VM.
    pub vm: AnyVm,
    /// As [`Limits::vm_connections`]. `None`: as many as [`Limits`] says for its family.
    pub connections: Option<usize>,
    /// As [`Limits::vm_unanswered`], of a hyperkit VM. `None`: as many as [`Limits`] says. It means
    /// nothing for a VM of another family.
    pub unanswered: Option<usize>,
}

impl VmLimits {
    /// Makes the limits of a VM that [`Limits`] says.
    pub fn new(vm: impl Into<AnyVm>) -> VmLimits {
        VmLimits {
            vm: vm.into(),
            connections: None,
            unanswered: None,
        }
    }
}
