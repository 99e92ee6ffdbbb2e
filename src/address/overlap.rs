//! Which addresses are in each other's way where they are listened on, as far as the addresses
//! alone tell: their files are for who asks.

use std::net::IpAddr;

use super::{Address, Host, TcpAddress};

/// What two addresses may have in common of which only one can be listened on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ListenKey<'a> {
    /// A port of one IP address.
    IpPort(IpAddr, u16),
    /// A port of a name whose address isn't known.
    NamePort(&'a str, u16),
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
        let mut keys = Vec::from_iter(name_key(tcp));
        for ip in tcp.known_ips() {
            let kind = IpKind::of(ip);
            keys.push(ListenKey::IpPort(ip, tcp.port));
            keys.push(ListenKey::PortOfAny(kind, tcp.port));
            if ip.is_unspecified() {
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
        let mut keys = Vec::from_iter(name_key(tcp));
        for ip in tcp.known_ips() {
            let kind = IpKind::of(ip);
            keys.push(ListenKey::IpPort(ip, tcp.port));
            keys.push(match ip.is_unspecified() {
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
                let is_within = |one: IpAddr, other: IpAddr| {
                    cfg!(target_os = "linux")
                        && IpKind::of(one) == IpKind::of(other)
                        && (one.is_unspecified() || other.is_unspecified())
                };
                let have_one = |ip: &IpAddr| {
                    let mut others = other.known_ips().into_iter();
                    others.any(|it| it == *ip || is_within(*ip, it))
                };
                let is_same = (&one.host, one.family) == (&other.host, other.family);
                one.port == other.port && (is_same || one.known_ips().iter().any(have_one))
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
                // A name may stand for any address, and [::] for those of IPv4.
                let (ours, theirs) = (one.known_ips(), other.known_ips());
                let all = |ips: &[IpAddr]| ips.is_empty() || ips.iter().any(IpAddr::is_unspecified);
                let have_one = ours.iter().any(|ip| theirs.contains(ip));
                one.port == other.port && (have_one || all(&ours) || all(&theirs))
            }
            (Address::Vsock(one), Address::Vsock(other)) => one.port == other.port,
            _ => self == other,
        }
    }
}

impl IpKind {
    fn of(ip: IpAddr) -> IpKind {
        match ip {
            IpAddr::V4(_) => IpKind::V4,
            IpAddr::V6(_) => IpKind::V6,
        }
    }
}

/// Returns the key of a name whose addresses aren't known.
fn name_key(tcp: &TcpAddress) -> Option<ListenKey<'_>> {
    match &tcp.host {
        Host::Name(name) if tcp.known_ips().is_empty() => Some(ListenKey::NamePort(name, tcp.port)),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_both_families_is_in_the_way_of_each_of_them() {
        let all = [
            "localhost:80",
            "127.0.0.1:80",
            "[::1]:80",
            "*:80",
            "0.0.0.0:80",
            "[::]:80",
            "name:80",
            "localhost:81",
        ];
        let address = |text: &str| format!("tcp://{text}").parse::<Address>().unwrap();
        let of_all = |one: &str| matches!(one, "*:80" | "0.0.0.0:80" | "[::]:80");
        for one in all {
            for other in all {
                let certain = match (one, other) {
                    _ if one == other => true,
                    ("localhost:81" | "name:80", _) | (_, "localhost:81" | "name:80") => false,
                    ("0.0.0.0:80", it) | (it, "0.0.0.0:80") if it.starts_with('[') => false,
                    ("127.0.0.1:80", it) | (it, "127.0.0.1:80") if it.starts_with('[') => false,
                    _ if of_all(one) && of_all(other) => true,
                    _ if of_all(one) || of_all(other) => cfg!(target_os = "linux"),
                    _ => true,
                };
                let (ours, theirs) = (address(one), address(other));
                assert_eq!(ours.collides(&theirs), certain, "{one} {other}");
                let keys = theirs.listen_keys();
                let is_found = ours.colliding_keys().iter().any(|key| keys.contains(key));
                assert!(is_found || !certain, "{one} {other}");
                assert!(ours.may_collide(&theirs) || !certain, "{one} {other}");
            }
        }
        let [four, six] = ["tcp4://*:80", "tcp6://*:80"].map(|text| text.parse().unwrap());
        assert!(!Address::collides(&four, &six));
        let is_certain = cfg!(target_os = "linux");
        assert_eq!(four.collides(&address("localhost:80")), is_certain);
    }
}
