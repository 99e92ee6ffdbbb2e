//! The names of sockets by which this process recognizes its own connections: a connection that one
//! of its forwards has dialled may arrive at a listener of another.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::address::CID_LOCAL;
use crate::name::SocketName;

use super::endpoint::Endpoint;

/// The name of a listener of this process, as its clients know it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ListenerName {
    Tcp(SocketAddr),
    /// The port of an AF_VSOCK socket.
    Vsock(u32),
    /// The name that a Unix socket was bound to.
    #[cfg_attr(not(unix), allow(dead_code))]
    Unix(Vec<u8>),
}

/// What is known of a listener without its whole name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ListenerKind {
    /// A TCP socket on that port, of whatever address.
    Tcp(u16),
    Vsock(u32),
    /// A Unix socket, of whatever name.
    Unix,
}

impl ListenerName {
    /// Returns the name of a listener whose socket has this name, if clients know it.
    pub(crate) fn from_socket(name: SocketName) -> Option<ListenerName> {
        match name {
            SocketName::Tcp(address) => Some(ListenerName::Tcp(address)),
            SocketName::Vsock(name) => Some(ListenerName::Vsock(name.port.0)),
            _ => None,
        }
    }

    /// Returns the listener's kind.
    pub(crate) fn kind(&self) -> ListenerKind {
        match self {
            ListenerName::Tcp(address) => ListenerKind::Tcp(address.port()),
            ListenerName::Vsock(port) => ListenerKind::Vsock(*port),
            ListenerName::Unix(_) => ListenerKind::Unix,
        }
    }
}

impl ListenerKind {
    /// Returns the kind of the listener that an endpoint leads to, if it is on this machine.
    pub(crate) fn of(endpoint: &Endpoint) -> ListenerKind {
        match endpoint {
            Endpoint::Tcp(to) => ListenerKind::Tcp(to.port()),
            Endpoint::Vsock(to) => ListenerKind::Vsock(to.port.0),
            _ => ListenerKind::Unix,
        }
    }

    /// Returns whether a socket that is dialled there has a name of its own, by which it is
    /// recognized when it is accepted. Otherwise the listener's name is known once it is connected.
    pub(crate) fn names_its_clients(self) -> bool {
        self != ListenerKind::Unix
    }
}

/// The names of a connection of this machine with itself, which both its ends know. (The name of
/// one end is not enough: the kernel gives one port to several connections with different targets.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum PeerNames {
    Tcp {
        dialling: SocketAddr,
        listening: SocketAddr,
    },
    /// The ports of AF_VSOCK sockets.
    Vsock { dialling: u32, listening: u32 },
}

impl PeerNames {
    /// Returns the names of a dialled socket with the local name `here` that connects to
    /// `endpoint`.
    pub(crate) fn of_dialled(here: SocketName, endpoint: &Endpoint) -> Option<PeerNames> {
        match (here, endpoint) {
            (SocketName::Tcp(here), Endpoint::Tcp(to)) => Some(PeerNames::Tcp {
                dialling: canonical(here),
                listening: canonical(*to),
            }),
            (SocketName::Vsock(here), Endpoint::Vsock(to)) => Some(PeerNames::Vsock {
                dialling: here.port.0,
                listening: to.port.0,
            }),
            _ => None,
        }
    }

    /// Returns the names of an accepted socket with the local name `here` and the peer `peer`.
    pub(crate) fn of_accepted(here: SocketName, peer: SocketName) -> Option<PeerNames> {
        match (here, peer) {
            (SocketName::Tcp(here), SocketName::Tcp(peer)) => Some(PeerNames::Tcp {
                dialling: canonical(peer),
                listening: canonical(here),
            }),
            (SocketName::Vsock(here), SocketName::Vsock(peer)) if peer.cid == CID_LOCAL => {
                Some(PeerNames::Vsock {
                    dialling: peer.port.0,
                    listening: here.port.0,
                })
            }
            _ => None,
        }
    }

    /// Returns the kind of the listener that the connection leads to.
    pub(crate) fn listener(&self) -> ListenerKind {
        match self {
            PeerNames::Tcp { listening, .. } => ListenerKind::Tcp(listening.port()),
            PeerNames::Vsock { listening, .. } => ListenerKind::Vsock(*listening),
        }
    }
}

/// Returns the form of an address that both ends agree on. One may speak IPv6 and the other IPv4,
/// and a connect to the unspecified address goes to the loopback one.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(reached_by(address.ip().to_canonical()), address.port())
}

/// Returns the address that a connect to `ip` goes to: for the unspecified one, the loopback one.
pub(crate) fn reached_by(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    }
}
