//! Which addresses are in each other's way where they are listened on, as far as the addresses
//! alone tell: their files are for who asks.

use super::{Address, Host, TcpAddress};

/// What two addresses have in common of which only one can be listened on.
#[derive(PartialEq, Eq, Hash)]
pub(crate) enum ListenKey<'a> {
    TcpPort(u16),
    Address(&'a Address),
}

impl Address {
    /// Returns what it has in common with each address that it [collides](Address::collides) with.
    pub(crate) fn listen_key(&self) -> ListenKey<'_> {
        match self {
            Address::Tcp(tcp) => ListenKey::TcpPort(tcp.port),
            other => ListenKey::Address(other),
        }
    }

    /// Returns whether it is certain that only one of the two can be listened on.
    pub(crate) fn collides(&self, other: &Address) -> bool {
        if self.leaves_port_to_kernel() || other.leaves_port_to_kernel() {
            return false;
        }
        match (self, other) {
            (Address::Tcp(one), Address::Tcp(other)) => {
                let all = |tcp: &TcpAddress| tcp.socket_addr().is_some_and(|it| is_wide(&it));
                // Elsewhere one of all addresses may have another listener.
                let all = cfg!(target_os = "linux")
                    && is_one_kind(one, other)
                    && (all(one) || all(other));
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

/// Returns whether both are IPv4, or both IPv6.
fn is_one_kind(one: &TcpAddress, other: &TcpAddress) -> bool {
    match (&one.host, &other.host) {
        (Host::Ip(one), Host::Ip(other)) => one.is_ipv4() == other.is_ipv4(),
        _ => false,
    }
}
