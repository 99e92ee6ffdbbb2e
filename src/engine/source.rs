//! Where the clients of a rule may come from.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use crate::address::{Address, Port};
use crate::name::SocketName;

/// Where clients may come from: a network of IP addresses (`192.168.7.0/24`), an IP address
/// (`::1`), or a VM's CID (`3`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    /// The addresses whose first bits are those; the other bits are 0.
    Network {
        address: IpAddr,
        bits: u8,
    },
    Cid(u32),
}

impl Source {
    /// Makes the source of one CID.
    pub fn cid(cid: u32) -> Source {
        Source(Kind::Cid(cid))
    }

    /// Returns whether a client of that name comes from there.
    pub fn includes(&self, client: &SocketName) -> bool {
        match (self.0, client) {
            (Kind::Cid(cid), SocketName::Vsock(name)) => name.cid == cid,
            (Kind::Network { address, bits }, SocketName::Tcp(name)) => {
                // A client of `[::]` that has come over IPv4 has a name of IPv6.
                let ip = name.ip().to_canonical();
                ip.is_ipv4() == address.is_ipv4() && masked(ip, bits) == address
            }
            _ => false,
        }
    }

    /// Returns whether clients of a listener may have such names.
    pub(crate) fn suits(&self, listen: &Address) -> bool {
        matches!(
            (self.0, listen),
            (Kind::Cid(_), Address::Vsock(_)) | (Kind::Network { .. }, Address::Tcp(_))
        )
    }

    /// Returns it as a CID, if it is one.
    pub(crate) fn as_cid(&self) -> Option<u32> {
        match self.0 {
            Kind::Cid(cid) => Some(cid),
            Kind::Network { .. } => None,
        }
    }
}

/// Returns whether a client of that name may come: every one may where no source is named.
pub(crate) fn may_come(from: &[Source], client: &SocketName) -> bool {
    from.is_empty() || from.iter().any(|source| source.includes(client))
}

impl From<IpAddr> for Source {
    fn from(address: IpAddr) -> Source {
        let address = address.to_canonical();
        let bits = length(address);
        Source(Kind::Network { address, bits })
    }
}

/// Returns how many bits an address has.
fn length(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// Returns the address with all but its first bits 0.
fn masked(address: IpAddr, bits: u8) -> IpAddr {
    match address {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
            IpAddr::V4((u32::from(ip) & mask).into())
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from(u128::from(ip) & mask))
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Kind::Cid(cid) => cid.fmt(f),
            Kind::Network { address, bits } if bits == length(address) => address.fmt(f),
            Kind::Network { address, bits } => write!(f, "{address}/{bits}"),
        }
    }
}

/// Why a text is no [`Source`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceError(String);

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for SourceError {}

impl FromStr for Source {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Source, SourceError> {
        let wrong = || {
            let right =
                "a network such as 192.168.7.0/24, an address such as ::1, or a CID such as 3";
            SourceError(format!("{text:?} is none; write {right}"))
        };
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(address.into());
        }
        let Some((address, bits)) = text.split_once('/') else {
            // CIDs are written as ports are.
            let cid: Port = text.parse().map_err(|_| wrong())?;
            return Ok(Source::cid(cid.0));
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let is_number = bits.bytes().all(|byte| byte.is_ascii_digit());
        let bits = bits.parse().ok().filter(|_| is_number);
        let bits: u8 = bits
            .filter(|bits| *bits <= length(address))
            .ok_or_else(wrong)?;
        let network = masked(address, bits);
        if network != address {
            let why =
                format!("{text} is an address in a network; write {network}/{bits}, or {address}");
            return Err(SourceError(why));
        }
        Ok(Source(Kind::Network { address, bits }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::name::VsockName;

    fn includes(source: &str, client: &str) -> bool {
        let source: Source = source.parse().unwrap();
        assert_eq!(source.to_string().parse(), Ok(source));
        let client = match client.parse() {
            Ok(cid) => SocketName::Vsock(VsockName { cid, port: Port(9) }),
            Err(_) => SocketName::Tcp((client.parse::<IpAddr>().unwrap(), 9).into()),
        };
        source.includes(&client)
    }

    #[test]
    fn a_network_has_the_addresses_with_its_bits() {
        for (source, inside, outside) in [
            ("192.168.7.0/24", "192.168.7.255", "192.168.8.0"),
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.1"),
            ("127.0.0.1", "127.0.0.1", "127.0.0.2"),
            ("192.168.7.0/24", "::ffff:192.168.7.1", "::ffff:192.168.6.1"),
            ("0.0.0.0/0", "1.2.3.4", "::1"),
            ("::/0", "::1", "1.2.3.4"),
            ("::1", "::1", "::2"),
            ("fe80::/10", "febf::1", "fec0::1"),
            ("3", "3", "4"),
            ("0x10", "16", "0.0.0.16"),
            ("0.0.0.0/0", "1.2.3.4", "3"),
        ] {
            assert!(includes(source, inside), "{source} {inside}");
            assert!(!includes(source, outside), "{source} {outside}");
        }
    }

    #[test]
    fn what_is_none_is_told() {
        for (text, part) in [
            ("192.168.7.5/24", "write 192.168.7.0/24, or 192.168.7.5"),
            ("192.168.7.0/33", "is none"),
            ("192.168.7.0/+8", "is none"),
            ("::/129", "is none"),
            ("example.org", "is none"),
            ("-1", "is none"),
            ("", "is none"),
        ] {
            let why = text.parse::<Source>().unwrap_err().to_string();
            assert!(why.contains(part), "{text}: {why}");
        }
    }
}
