//! `tcp://HOST:PORT`, and of one family of IP `tcp4://HOST:PORT` and `tcp6://HOST:PORT`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use super::port::parse_u16;
use super::uri::{self, Uri};
use super::{AddressError, Part};

/// Addresses that show how one of either family, of IPv4 and of IPv6 is written.
pub(super) const TCP_EXAMPLE: &str = "tcp://127.0.0.1:8080";
pub(super) const TCP4_EXAMPLE: &str = "tcp4://*:8080";
pub(super) const TCP6_EXAMPLE: &str = "tcp6://*:8080";

/// The families of IP that a [`TcpAddress`] may be of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum IpFamily {
    /// IPv4 and IPv6: `tcp://`.
    #[default]
    Either,
    /// IPv4 alone: `tcp4://`.
    V4,
    /// IPv6 alone: `tcp6://`.
    V6,
}

impl IpFamily {
    /// Returns whether it has that address.
    pub fn includes(self, ip: &IpAddr) -> bool {
        match self {
            IpFamily::Either => true,
            IpFamily::V4 => ip.is_ipv4(),
            IpFamily::V6 => ip.is_ipv6(),
        }
    }

    /// Returns the scheme of its addresses.
    pub(super) fn scheme(self) -> &'static str {
        match self {
            IpFamily::Either => "tcp",
            IpFamily::V4 => "tcp4",
            IpFamily::V6 => "tcp6",
        }
    }
}

/// The host of a [`TcpAddress`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// All addresses of this machine, to listen on: `*`. As a target it is this machine.
    Any,
    /// An IP address; IPv6 stands in brackets.
    Ip(IpAddr),
    /// A name that a dial resolves; also an IPv6 address with its zone, `fe80::1%en0`,
    /// which system resolvers take. Never empty.
    Name(String),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Any => f.write_str("*"),
            Host::Ip(IpAddr::V4(ip)) => ip.fmt(f),
            Host::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]"),
            Host::Name(name) => {
                if let Some((ip, zone)) = split_zone(name) {
                    // %25 is how RFC 6874 writes the zone's own % in a URI.
                    write!(f, "[{ip}%25{}]", uri::encode_name(zone.as_bytes()))
                } else if name.parse::<Ipv4Addr>().is_ok() {
                    uri::write_guarded_name(f, name)
                } else {
                    uri::encode_name(name.as_bytes()).fmt(f)
                }
            }
        }
    }
}

/// A TCP address: `tcp://HOST:PORT`, `tcp4://HOST:PORT` or `tcp6://HOST:PORT`.
///
/// To listen on `localhost` or `*` is to listen on IPv4 and IPv6, as far as the machine has them;
/// to listen on another name is to listen on the first address of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TcpAddress {
    /// The host.
    pub host: Host,
    /// The port; 0 lets the system choose one to listen on.
    pub port: u16,
    /// The families of IP in which its host is looked for.
    pub family: IpFamily,
}

impl TcpAddress {
    /// Makes the address of a host, of either family of IP.
    pub fn new(host: Host, port: u16) -> TcpAddress {
        let family = IpFamily::Either;
        TcpAddress { host, port, family }
    }

    /// Returns it as std has it; `None` if its host is a name, or all addresses.
    pub(crate) fn socket_addr(&self) -> Option<SocketAddr> {
        match self.host {
            Host::Ip(ip) => Some(SocketAddr::new(ip, self.port)),
            Host::Name(_) | Host::Any => None,
        }
    }

    /// Returns the addresses that its host stands for, the one of IPv4 first, as far as that is
    /// known without resolving it: there is none for a name but `localhost`.
    pub(crate) fn known_ips(&self) -> Vec<IpAddr> {
        let both: [IpAddr; 2] = match &self.host {
            Host::Ip(ip) => return vec![*ip],
            Host::Any => [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
            // RFC 6761, section 6.3: it is a loopback address, whatever a name server says.
            Host::Name(name) if name.eq_ignore_ascii_case("localhost") => {
                [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]
            }
            Host::Name(_) => return Vec::new(),
        };
        let is_included = |ip: &IpAddr| self.family.includes(ip);
        both.into_iter().filter(is_included).collect()
    }

    /// Returns the address that was bound when this one was asked for: with the port that the
    /// kernel chose, and a name resolved, unless it stands for addresses of either family.
    pub(crate) fn bound_at(&self, bound: SocketAddr) -> TcpAddress {
        let host = match &self.host {
            Host::Name(_) if self.known_ips().len() < 2 => Host::Ip(bound.ip()),
            host => host.clone(),
        };
        let (port, family) = (bound.port(), self.family);
        TcpAddress { host, port, family }
    }
}

impl fmt::Display for TcpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = self.family.scheme();
        write!(f, "{scheme}://{}:{}", self.host, self.port)
    }
}

impl FromStr for TcpAddress {
    type Err = AddressError;

    fn from_str(input: &str) -> Result<TcpAddress, AddressError> {
        let scheme = input.split_once(':').map_or("", |(scheme, _)| scheme);
        let (family, example) = match scheme.to_ascii_lowercase().as_str() {
            "tcp4" => (IpFamily::V4, TCP4_EXAMPLE),
            "tcp6" => (IpFamily::V6, TCP6_EXAMPLE),
            _ => (IpFamily::Either, TCP_EXAMPLE),
        };
        let uri = Uri::parse(input, family.scheme(), example)?;
        if let Some(example) = unbracketed(uri.authority) {
            return Err(uri.error_with_example(
                Part::Host,
                uri.authority,
                "is an IPv6 address without its brackets",
                example,
            ));
        }
        let (host, port) = match uri.authority.split_once(']') {
            Some((_, "")) => return Err(uri.error(Part::Port, "", "is missing")),
            _ => uri.split_port()?,
        };
        let address = TcpAddress {
            host: parse_host(&uri, host)?,
            port: parse_u16(port).map_err(|reason| uri.error(Part::Port, port, reason))?,
            family,
        };
        let zoned = match &address.host {
            Host::Name(name) => split_zone(name).map(|(ip, _)| IpAddr::from(ip)),
            _ => None,
        };
        let ip = address.socket_addr().map(|it| it.ip()).or(zoned);
        if ip.is_some_and(|ip| !family.includes(&ip)) {
            return Err(uri.error(Part::Host, host, "is of the other family of IP"));
        }
        uri.ends_here()?;
        Ok(address)
    }
}

fn parse_host(uri: &Uri<'_>, host: &str) -> Result<Host, AddressError> {
    let error = |reason: &str| Err(uri.error(Part::Host, host, reason));
    if host.is_empty() {
        return error("is missing (localhost is this machine alone, * any network)");
    }
    if host == "*" {
        return Ok(Host::Any);
    }
    if let Some(inner) = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        return match inner.split_once('%') {
            None => match inner.parse::<Ipv6Addr>() {
                Ok(ip) => Ok(Host::Ip(ip.into())),
                Err(_) => error("is no IPv6 address"),
            },
            Some((ip, zone)) => {
                // A zone of the bare number 25 is one, a % written as RFC 6874 wants it has more
                // behind it.
                let zone = match zone.strip_prefix("25") {
                    Some(rest) if !rest.is_empty() => rest,
                    _ => zone,
                };
                match ip.parse::<Ipv6Addr>() {
                    Ok(ip) => Ok(Host::Name(format!("{ip}%{}", uri.name(Part::Host, zone)?))),
                    Err(_) => error("is no IPv6 address"),
                }
            }
        };
    }
    if let Ok(ip) = host.parse::<Ipv4Addr>() {
        return Ok(Host::Ip(ip.into()));
    }
    let raw = |c: char| c.is_ascii() && !c.is_ascii_alphanumeric() && !"-._~%".contains(c);
    if let Some(bad) = host.chars().find(|c| raw(*c)) {
        return error(&format!("has {bad:?} in it"));
    }
    uri.name(Part::Host, host).map(Host::Name)
}

/// Splits an IPv6 address and its zone, if `name` is these two in their only form: printing loses
/// nothing then.
fn split_zone(name: &str) -> Option<(Ipv6Addr, &str)> {
    let (text, zone) = name.split_once('%')?;
    let ip: Ipv6Addr = text.parse().ok()?;
    (!zone.is_empty() && ip.to_string() == text).then_some((ip, zone))
}

/// Returns the address that an IPv6 address without brackets means, with or without a port behind
/// it.
fn unbracketed(authority: &str) -> Option<String> {
    if let Some((host, port)) = authority.rsplit_once(':')
        && let (Ok(ip), Ok(port)) = (host.parse::<Ipv6Addr>(), parse_u16(port))
    {
        return Some(format!("tcp://[{ip}]:{port}"));
    }
    let ip = authority.parse::<Ipv6Addr>().ok()?;
    Some(format!("tcp://[{ip}]:8080"))
}
