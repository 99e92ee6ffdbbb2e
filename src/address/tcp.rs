//! `tcp://HOST:PORT`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use super::port::parse_u16;
use super::uri::{self, Uri};
use super::{AddressError, Part};

/// The host of a [`TcpAddress`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// An IP address; IPv6 stands in brackets.
    Ip(IpAddr),
    /// A name that a dial resolves; also an IPv6 address with its zone, `fe80::1%en0`,
    /// which system resolvers take. Never empty.
    Name(String),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
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

/// A TCP address: `tcp://HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TcpAddress {
    /// The host.
    pub host: Host,
    /// The port; 0 lets the system choose one to listen on.
    pub port: u16,
}

impl TcpAddress {
    /// Returns it as std has it; `None` if its host is a name.
    pub(crate) fn socket_addr(&self) -> Option<SocketAddr> {
        match self.host {
            Host::Ip(ip) => Some(SocketAddr::new(ip, self.port)),
            Host::Name(_) => None,
        }
    }
}

impl fmt::Display for TcpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tcp://{}:{}", self.host, self.port)
    }
}

impl FromStr for TcpAddress {
    type Err = AddressError;

    fn from_str(input: &str) -> Result<TcpAddress, AddressError> {
        let uri = Uri::parse(input, "tcp", "tcp://127.0.0.1:8080")?;
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
        };
        uri.ends_here()?;
        Ok(address)
    }
}

fn parse_host(uri: &Uri<'_>, host: &str) -> Result<Host, AddressError> {
    let error = |reason: &str| Err(uri.error(Part::Host, host, reason));
    if host.is_empty() {
        return error("is missing (127.0.0.1 is this machine alone, 0.0.0.0 any network)");
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
