//! The header of the PROXY protocol, by which a proxy tells a server who its client is: versions 1
//! and 2, as haproxy's `doc/proxy-protocol.txt` (2020/03/05) has them.
//!
//! Of clients that have no address of TCP, version 2 has the command LOCAL, the family AF_UNSPEC
//! and one field (TLV) of the range that is left to applications. (haproxy tells of its own clients
//! from Unix sockets in the same way, with LOCAL, and refuses AF_UNSPEC with the command PROXY.)
//!
//! | type | value, in network byte order |
//! |---|---|
//! | 0xE0 | an AF_VSOCK client: its CID and its port, 32 bits each |
//! | 0xE1 | the process of a Unix client: its user id and, if it is known, its process id, 32 bits each |
//! | 0xE2 | an AF_HYPERV client: its VM's id and its service id, 16 bytes each |

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::str::FromStr;

use uuid::Uuid;

use crate::address::{Port, ServiceId, VmId};
use crate::name::{HvsockName, Peer, SocketName, VsockName};

/// A version of the PROXY protocol. It is written `v1` and `v2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "cli", derive(serde::Serialize))]
#[cfg_attr(feature = "cli", serde(rename_all = "lowercase"))]
pub enum ProxyProtocol {
    /// A line of text. It tells of TCP clients, and of others only that they are unknown.
    V1,
    /// The binary header. It tells of clients of each family.
    V2,
}

impl fmt::Display for ProxyProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ProxyProtocol::V1 => "v1",
            ProxyProtocol::V2 => "v2",
        })
    }
}

impl FromStr for ProxyProtocol {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<ProxyProtocol, &'static str> {
        match text {
            "v1" => Ok(ProxyProtocol::V1),
            "v2" => Ok(ProxyProtocol::V2),
            _ => Err("a version of the PROXY protocol is v1 or v2"),
        }
    }
}

/// What version 2 begins with.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// The bytes of version 2 up to its addresses.
const FIXED: usize = 16;

/// What version 1 begins with.
const WORD: &[u8] = b"PROXY ";

/// The longest line of version 1.
const LONGEST_LINE: usize = 107;

/// The longest header that is taken, as nginx has it (`NGX_PROXY_PROTOCOL_MAX_HEADER`).
pub(crate) const LONGEST: usize = 4096;

/// The version, and the command PROXY.
const PROXY: u8 = 0x21;
/// The version, and the command LOCAL: the proxy speaks for itself.
const LOCAL: u8 = 0x20;

const UNSPECIFIED: u8 = 0x00;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;

const CRC32C: u8 = 0x03;
const VSOCK: u8 = 0xE0;
const PROCESS: u8 = 0xE1;
const HYPERV: u8 = 0xE2;

/// A header that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// The number of its bytes.
    pub(crate) len: usize,
    /// The client. `None`: the header names none, and the client is the sender.
    pub(crate) client: Option<Peer>,
    /// The TCP address that the client connected to.
    pub(crate) destination: Option<SocketAddr>,
}

/// Returns the header that tells of a client, and of the address that it connected to.
pub(crate) fn encode(
    version: ProxyProtocol,
    client: Peer,
    destination: Option<SocketAddr>,
) -> Vec<u8> {
    let addresses = match client.name {
        SocketName::Tcp(source) => Some(same_family(source, destination)),
        _ => None,
    };
    match version {
        ProxyProtocol::V1 => encode_line(addresses),
        ProxyProtocol::V2 => encode_binary(client, addresses),
    }
}

/// Returns both addresses in one family.
fn same_family(source: SocketAddr, destination: Option<SocketAddr>) -> [SocketAddr; 2] {
    let plain = |it: SocketAddr| SocketAddr::new(it.ip().to_canonical(), it.port());
    let mapped = |it: SocketAddr| match it.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), it.port()),
        IpAddr::V6(_) => it,
    };
    let source = plain(source);
    let unknown = match source {
        SocketAddr::V4(_) => SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0),
        SocketAddr::V6(_) => SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0),
    };
    let both = [source, destination.map_or(unknown, plain)];
    match both[0].is_ipv4() == both[1].is_ipv4() {
        true => both,
        false => both.map(mapped),
    }
}

fn encode_line(addresses: Option<[SocketAddr; 2]>) -> Vec<u8> {
    let Some([source, destination]) = addresses else {
        return b"PROXY UNKNOWN\r\n".to_vec();
    };
    let family = match source {
        SocketAddr::V4(_) => "TCP4",
        SocketAddr::V6(_) => "TCP6",
    };
    let ips = format!("{} {}", source.ip(), destination.ip());
    let ports = format!("{} {}", source.port(), destination.port());
    format!("PROXY {family} {ips} {ports}\r\n").into_bytes()
}

fn encode_binary(client: Peer, addresses: Option<[SocketAddr; 2]>) -> Vec<u8> {
    let mut rest = Vec::new();
    let family = match addresses {
        Some(both) => {
            for address in both {
                match address.ip() {
                    IpAddr::V4(ip) => rest.extend(ip.octets()),
                    IpAddr::V6(ip) => rest.extend(ip.octets()),
                }
            }
            rest.extend(both.iter().flat_map(|it| it.port().to_be_bytes()));
            match both[0] {
                SocketAddr::V4(_) => TCP_OVER_IPV4,
                SocketAddr::V6(_) => TCP_OVER_IPV6,
            }
        }
        None => {
            encode_field(client, &mut rest);
            UNSPECIFIED
        }
    };
    let command = match family {
        UNSPECIFIED => LOCAL,
        _ => PROXY,
    };
    let mut header = SIGNATURE.to_vec();
    header.extend([command, family]);
    // It has less than 60 bytes.
    header.extend((rest.len() as u16).to_be_bytes());
    header.extend(rest);
    header
}

/// Adds what is known of a client that has no address of TCP.
fn encode_field(client: Peer, to: &mut Vec<u8>) {
    let (kind, value) = match (client.name, client.process) {
        (SocketName::Vsock(name), _) => {
            let numbers = [name.cid, name.port.0].map(u32::to_be_bytes);
            (VSOCK, numbers.concat())
        }
        (SocketName::Hvsock(name), _) => {
            let ids = [*name.vm.0.as_bytes(), *name.service.0.as_bytes()];
            (HYPERV, ids.concat())
        }
        (_, Some(process)) => {
            let mut value = process.user.to_be_bytes().to_vec();
            value.extend(process.id.into_iter().flat_map(u32::to_be_bytes));
            (PROCESS, value)
        }
        (_, None) => return,
    };
    to.push(kind);
    to.extend((value.len() as u16).to_be_bytes());
    to.extend(value);
}

/// Reads the header that stands at the beginning of `bytes`. Returns `None` if it goes on behind
/// them; it never does if they are [`LONGEST`].
///
/// # Errors
/// Returns why they begin with no header.
pub(crate) fn parse(bytes: &[u8]) -> Result<Option<Header>, &'static str> {
    let begins_with = |what: &[u8]| {
        let len = bytes.len().min(what.len());
        bytes[..len] == what[..len]
    };
    if begins_with(WORD) {
        parse_line(bytes)
    } else if begins_with(&SIGNATURE) {
        parse_binary(bytes)
    } else {
        Err("it doesn't begin with a header")
    }
}

fn parse_line(bytes: &[u8]) -> Result<Option<Header>, &'static str> {
    let head = &bytes[..bytes.len().min(LONGEST_LINE)];
    let Some(end) = head.windows(2).position(|two| two == b"\r\n") else {
        return match bytes.len() < LONGEST_LINE {
            true => Ok(None),
            false => Err("the header's line has no end"),
        };
    };
    let wrong = "the header's line is wrong";
    let line = str::from_utf8(&head[..end]).map_err(|_| wrong)?;
    let words: Vec<&str> = line.split(' ').collect();
    let mut header = Header {
        len: end + 2,
        client: None,
        destination: None,
    };
    // What follows UNKNOWN is to be ignored.
    if words.get(1) == Some(&"UNKNOWN") {
        return Ok(Some(header));
    }
    let [_, family, source, destination, from, to] = words[..] else {
        return Err(wrong);
    };
    let address = |ip: &str, port: &str| {
        let ip: IpAddr = match family {
            "TCP4" => ip.parse::<Ipv4Addr>().ok()?.into(),
            "TCP6" => ip.parse::<Ipv6Addr>().ok()?.into(),
            _ => return None,
        };
        let is_number = port.bytes().all(|byte| byte.is_ascii_digit());
        let port = port.parse().ok().filter(|_| is_number)?;
        Some(SocketAddr::new(ip, port))
    };
    let source = address(source, from).ok_or(wrong)?;
    header.client = Some(peer(SocketName::Tcp(source)));
    header.destination = Some(address(destination, to).ok_or(wrong)?);
    Ok(Some(header))
}

fn parse_binary(bytes: &[u8]) -> Result<Option<Header>, &'static str> {
    let Some((fixed, rest)) = bytes.split_first_chunk::<FIXED>() else {
        return Ok(None);
    };
    let [command, family] = [fixed[12], fixed[13]];
    let len = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    if !matches!(command, PROXY | LOCAL) {
        return Err("the header has an unknown version or command");
    }
    if FIXED + len > LONGEST {
        return Err("the header is too long");
    }
    let Some(rest) = rest.get(..len) else {
        return Ok(None);
    };
    let mut header = Header {
        len: FIXED + len,
        client: None,
        destination: None,
    };
    // Whatever a proxy that speaks for itself has in the place of addresses is to be ignored.
    if command == LOCAL && family != UNSPECIFIED {
        return Ok(Some(header));
    }
    let short = "the header is too short for its addresses";
    // Unix addresses (2 × 108 bytes), and those of datagrams, say nothing that is of use here.
    let fields = match family {
        UNSPECIFIED => rest,
        TCP_OVER_IPV4 | 0x12 => {
            let (addresses, fields) = rest.split_first_chunk::<12>().ok_or(short)?;
            let [a, b, c, d, e, f, g, h, ports @ ..] = *addresses;
            let ips = [[a, b, c, d].into(), [e, f, g, h].into()];
            note_addresses(&mut header, family, ips, ports);
            fields
        }
        TCP_OVER_IPV6 | 0x22 => {
            let (source, more) = rest.split_first_chunk::<16>().ok_or(short)?;
            let (destination, more) = more.split_first_chunk::<16>().ok_or(short)?;
            let (ports, fields) = more.split_first_chunk::<4>().ok_or(short)?;
            let ips = [(*source).into(), (*destination).into()];
            note_addresses(&mut header, family, ips, *ports);
            fields
        }
        0x31 | 0x32 => rest.get(216..).ok_or(short)?,
        _ => return Err("the header has an unknown family"),
    };
    let mut left = fields;
    while !left.is_empty() {
        let broken = "a field of the header is cut short";
        let ([kind, high, low], more) = left.split_first_chunk::<3>().ok_or(broken)?;
        let size = usize::from(u16::from_be_bytes([*high, *low]));
        let (value, more) = more.split_at_checked(size).ok_or(broken)?;
        if *kind == CRC32C {
            let at = header.len - more.len() - value.len();
            check_crc(&bytes[..header.len], at, value)?;
        }
        if family == UNSPECIFIED {
            header.client = parse_field(*kind, value).or(header.client);
        }
        left = more;
    }
    Ok(Some(header))
}

fn note_addresses(header: &mut Header, family: u8, ips: [IpAddr; 2], ports: [u8; 4]) {
    if !matches!(family, TCP_OVER_IPV4 | TCP_OVER_IPV6) {
        return;
    }
    let [a, b, c, d] = ports;
    let [source, destination] = [(ips[0], [a, b]), (ips[1], [c, d])]
        .map(|(ip, port)| SocketAddr::new(ip, u16::from_be_bytes(port)));
    header.client = Some(peer(SocketName::Tcp(source)));
    header.destination = Some(destination);
}

fn peer(name: SocketName) -> Peer {
    Peer {
        name,
        process: None,
    }
}

/// Returns the client that one of our own fields names. A process is passed over: it may be one of
/// another machine, where the same number means something else here.
fn parse_field(kind: u8, value: &[u8]) -> Option<Peer> {
    let number = |at: usize| {
        let bytes = value.get(at..)?.first_chunk::<4>()?;
        Some(u32::from_be_bytes(*bytes))
    };
    let id = |at: usize| Some(Uuid::from_bytes(*value.get(at..)?.first_chunk::<16>()?));
    match (kind, value.len()) {
        (VSOCK, 8) => Some(peer(SocketName::Vsock(VsockName {
            cid: number(0)?,
            port: Port(number(4)?),
        }))),
        (HYPERV, 32) => Some(peer(SocketName::Hvsock(HvsockName {
            vm: VmId(id(0)?),
            service: ServiceId(id(16)?),
        }))),
        _ => None,
    }
}

/// Checks the sum of a header, which stands at `at` in it.
fn check_crc(header: &[u8], at: usize, sum: &[u8]) -> Result<(), &'static str> {
    match crc32c(header, at..at + sum.len()).to_be_bytes() == sum {
        true => Ok(()),
        false => Err("the header's checksum is wrong"),
    }
}

/// Returns the CRC32c of bytes (RFC 4960, appendix B), of which those in `zeroed` count as 0.
fn crc32c(bytes: &[u8], zeroed: Range<usize>) -> u32 {
    /// Castagnoli's polynomial, its bits reversed.
    const POLYNOMIAL: u32 = 0x82F6_3B78;
    let mut crc = u32::MAX;
    for (index, byte) in bytes.iter().enumerate() {
        crc ^= match zeroed.contains(&index) {
            true => 0,
            false => u32::from(*byte),
        };
        for _ in 0..8 {
            let is_odd = crc & 1 == 1;
            crc = (crc >> 1) ^ if is_odd { POLYNOMIAL } else { 0 };
        }
    }
    !crc
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::name::PeerProcess;

    const VERSIONS: [ProxyProtocol; 2] = [ProxyProtocol::V1, ProxyProtocol::V2];

    fn tcp(address: &str) -> Peer {
        peer(SocketName::Tcp(address.parse().unwrap()))
    }

    /// Clients of each family, and whether version 1 can tell of them.
    fn clients() -> Vec<(Peer, bool)> {
        let process = |id| Peer {
            name: SocketName::Unnamed,
            process: Some(PeerProcess { id, user: 501 }),
        };
        let ids = [Uuid::from_u128(7), Uuid::from_u128(9 << 100)];
        vec![
            (tcp("10.1.2.3:4567"), true),
            (tcp("[2001:db8::1]:65535"), true),
            (
                peer(SocketName::Vsock(VsockName {
                    cid: 3,
                    port: Port(0xFFFF_FFFE),
                })),
                false,
            ),
            (process(Some(4711)), false),
            (process(None), false),
            (
                peer(SocketName::Hvsock(HvsockName {
                    vm: VmId(ids[0]),
                    service: ServiceId(ids[1]),
                })),
                false,
            ),
        ]
    }

    #[test]
    fn what_is_written_is_read_and_its_beginning_is_incomplete() {
        for (client, is_of_v1) in clients() {
            let destination = match client.name {
                SocketName::Tcp(SocketAddr::V4(_)) => Some("127.0.0.1:80"),
                SocketName::Tcp(_) => Some("[::1]:80"),
                _ => None,
            };
            let destination = destination.map(|it| it.parse().unwrap());
            for version in VERSIONS {
                let mut bytes = encode(version, client, destination);
                let len = bytes.len();
                for cut in 0..len {
                    assert_eq!(parse(&bytes[..cut]), Ok(None), "{version} {cut}");
                }
                let is_told = is_of_v1 || version == ProxyProtocol::V2 && client.process.is_none();
                let right = Header {
                    len,
                    client: is_told.then_some(client),
                    destination,
                };
                bytes.extend(b"GET / HTTP/1.1\r\n");
                assert_eq!(parse(&bytes), Ok(Some(right)), "{version} {client}");
            }
        }
        let nobody = peer(SocketName::Unnamed);
        let header = encode(ProxyProtocol::V2, nobody, None);
        assert_eq!(parse(&header).unwrap().unwrap().client, None);
    }

    /// The examples of the specification and of haproxy's documentation.
    #[test]
    fn the_bytes_are_those_of_the_specification() {
        let (source, destination) = (tcp("192.168.0.1:56324"), "192.168.0.11:443");
        let destination = Some(destination.parse().unwrap());
        let line = b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n";
        assert_eq!(encode(ProxyProtocol::V1, source, destination), line);
        let binary =
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\xa8\0\x01\xc0\xa8\0\x0b\xdc\x04\x01\xbb";
        assert_eq!(encode(ProxyProtocol::V2, source, destination), binary);
        let guest = VsockName {
            cid: 3,
            port: Port(1024),
        };
        let binary = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\x0b\xe0\0\x08\0\0\0\x03\0\0\x04\0";
        let guest = peer(SocketName::Vsock(guest));
        assert_eq!(encode(ProxyProtocol::V2, guest, None), binary);
        assert_eq!(encode(ProxyProtocol::V1, guest, None), b"PROXY UNKNOWN\r\n");
        let long = "PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\nx";
        let header = parse(long.as_bytes()).unwrap().unwrap();
        assert_eq!((header.len, header.client), (long.len() - 1, None));
    }

    #[test]
    fn addresses_of_two_families_are_told_in_one() {
        let both = |source: &str, destination: Option<&str>| {
            let destination = destination.map(|it| it.parse().unwrap());
            let line = encode(ProxyProtocol::V1, tcp(source), destination);
            String::from_utf8(line).unwrap()
        };
        for (source, destination, right) in [
            (
                "[::ffff:10.0.0.1]:1",
                Some("[::ffff:10.0.0.2]:2"),
                "TCP4 10.0.0.1 10.0.0.2 1 2",
            ),
            (
                "10.0.0.1:1",
                Some("[::1]:2"),
                "TCP6 ::ffff:10.0.0.1 ::1 1 2",
            ),
            ("10.0.0.1:1", None, "TCP4 10.0.0.1 0.0.0.0 1 0"),
            ("[::1]:1", None, "TCP6 ::1 :: 1 0"),
        ] {
            assert_eq!(both(source, destination), format!("PROXY {right}\r\n"));
        }
    }

    #[test]
    fn a_proxy_may_speak_for_itself() {
        let local =
            b"\r\n\r\n\0\r\nQUIT\n\x20\x11\0\x0c\xc0\xa8\0\x01\xc0\xa8\0\x0b\xdc\x04\x01\xbb";
        let header = parse(local).unwrap().unwrap();
        assert_eq!((header.len, header.client), (28, None));
    }

    #[test]
    fn a_checksum_has_to_be_right() {
        assert_eq!(crc32c(b"123456789", 0..0), 0xE306_9283);
        let fields = b"\xe0\0\x08\0\0\0\x03\0\0\x04\0\x03\0\x04\xff\xff\xff\xff";
        let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\0\0\x12".to_vec();
        header.extend(fields);
        assert_eq!(parse(&header), Err("the header's checksum is wrong"));
        let at = header.len() - 4;
        let sum = crc32c(&header, at..at + 4).to_be_bytes();
        header[at..].copy_from_slice(&sum);
        assert!(parse(&header).unwrap().unwrap().client.is_some());
    }

    #[test]
    fn what_is_no_header_is_told_as_soon_as_it_is_known() {
        for wrong in [
            &b"G"[..],
            b"PROXX",
            b"\r\n\r\n\0\r\nQUIX",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
            b"PROXY TCP4 ::1 ::1 1 2\r\n",
            b"PROXY TCP6 1.2.3.4 5.6.7.8 1 2\r\n",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 1 65536\r\n",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 +1 2\r\n",
            b"PROXY TCP4  1.2.3.4 5.6.7.8 1 2\r\n",
            b"PROXY \xff\r\n",
            &[b"PROXY UNKNOWN ".to_vec(), vec![b'x'; 100]].concat(),
            b"\r\n\r\n\0\r\nQUIT\n\x11\x11\0\0",
            b"\r\n\r\n\0\r\nQUIT\n\x22\x11\0\0",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0b12345678901",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x41\0\0",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x31\0\x01x",
            b"\r\n\r\n\0\r\nQUIT\n\x21\0\0\x02xx",
            b"\r\n\r\n\0\r\nQUIT\n\x21\0\0\x04\xe0\0\x02x",
            b"\r\n\r\n\0\r\nQUIT\n\x21\0\xff\xff",
        ] {
            let found = parse(wrong);
            assert!(
                found.is_err(),
                "{:?}: {found:?}",
                String::from_utf8_lossy(wrong)
            );
        }
    }

    /// Whatever stands there, nothing is read beyond it, and the longest are decided.
    #[test]
    fn any_bytes_are_decided() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..20_000 {
            let (client, _) = clients()[random.usize(..6)];
            let mut bytes = encode(VERSIONS[random.usize(..2)], client, None);
            let tail = random.usize(..LONGEST * 2);
            bytes.extend((0..tail).map(|_| random.u8(..)));
            let at = random.usize(..bytes.len().min(64));
            bytes[at] = random.u8(..);
            match parse(&bytes) {
                Ok(Some(header)) => assert!(header.len <= bytes.len()),
                Ok(None) => assert!(bytes.len() < LONGEST),
                Err(_) => {}
            }
        }
    }
}
