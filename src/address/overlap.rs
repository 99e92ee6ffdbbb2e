//! Which addresses are in each other's way where they are listened on, as far as the addresses
//! alone tell: their files are for who asks.

use super::{Address, Host, TcpAddress};

/// What two addresses may have in common of which only one can be listened on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ListenKey<'a> {
    TcpPort(&'a Host, u16),
    /// A port of all IPv4 addresses, or of all IPv6 ones.
    PortOfAll(IpKind, u16),
    /// A port of any of them.
    PortOfAny(IpKind, u16),
    Address(&'a Address),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum IpKind {
    V4,
    V6,
}

impl Address {
    /// Returns what it is known by to those that [collide](Address::collides) with it.
    pub(crate) fn listen_keys(&self) -> Vec<ListenKey<'_>> {
        let Address::Tcp(tcp) = self else {
            return vec![ListenKey::Address(self)];
        };
        let mut keys = vec![ListenKey::TcpPort(&tcp.host, tcp.port)];
        if let Some(kind) = kind_of(tcp) {
            keys.push(ListenKey::PortOfAny(kind, tcp.port));
            if is_for_all(tcp) {
                keys.push(ListenKey::PortOfAll(kind, tcp.port));
            }
        }
        keys
    }

    /// Returns the keys of which each address that it [collides](Address::collides) with has one.
    /// One that has a key need not collide.
    pub(crate) fn colliding_keys(&self) -> Vec<ListenKey<'_>> {
        let Address::Tcp(tcp) = self else {
            return vec![ListenKey::Address(self)];
        };
        let mut keys = vec![ListenKey::TcpPort(&tcp.host, tcp.port)];
        if let Some(kind) = kind_of(tcp) {
            keys.push(match is_for_all(tcp) {
                true => ListenKey::PortOfAny(kind, tcp.port),
                false => ListenKey::PortOfAll(kind, tcp.port),
            });
        }
        keys
    }

    /// Returns whether it is certain that only one of the two can be listened on.
    pub(crate) fn collides(&self, other: &Address) -> bool {
        if self.leaves_port_to_kernel() || other.leaves_port_to_kernel() {
            return false;
        }
        match (self, other) {
            (Address::Tcp(one), Address::Tcp(other)) => {
                // Elsewhere one of all addresses may have another listener.
                let all = cfg!(target_os = "linux")
                    && kind_of(one).is_some()
                    && kind_of(one) == kind_of(other)
                    && (is_for_all(one) || is_for_all(other));
                one.port == other.port && (one.host == other.host || all)
            }
            _ => self == other,
        }
    }

    /// Returns whether who listens on one may be in the way of who wants to on the other.
    pub(crate) fn may_collide(&self, other: &Address) -> bool {
        if self.leaves_port_to_kernel() || other.leaves_port_to_kernel() {
            return false;
        }
        match (self, other) {
            (Address::Tcp(one), Address::Tcp(other)) => {
                // A name may stand for any address.
                let all = |tcp: &TcpAddress| tcp.socket_addr().is_none_or(|it| is_wide(&it));
                one.port == other.port && (one.host == other.host || all(one) || all(other))
            }
            (Address::Vsock(one), Address::Vsock(other)) => one.port == other.port,
            _ => self == other,
        }
    }
}

/// Returns whether it stands for all addresses of the machine.
fn is_wide(address: &std::net::SocketAddr) -> bool {
    address.ip().is_unspecified()
}

/// Returns whether it is known to stand for all addresses of its kind.
fn is_for_all(tcp: &TcpAddress) -> bool {
    tcp.socket_addr().is_some_and(|it| is_wide(&it))
}

fn kind_of(tcp: &TcpAddress) -> Option<IpKind> {
    match &tcp.host {
        Host::Ip(ip) if ip.is_ipv4() => Some(IpKind::V4),
        Host::Ip(_) => Some(IpKind::V6),
        Host::Name(_) => None,
    }
}
