//! `vsock://[CID]:PORT`, the addresses of Linux's `AF_VSOCK`.

use std::fmt;
use std::str::FromStr;

use super::port::parse_u32;
use super::uri::{self, Uri};
use super::{AddressError, Part, Port};

/// Any CID, to listen on (`VMADDR_CID_ANY`).
pub const CID_ANY: u32 = u32::MAX;
/// The hypervisor itself (`VMADDR_CID_HYPERVISOR`).
pub const CID_HYPERVISOR: u32 = 0;
/// This system itself (`VMADDR_CID_LOCAL`).
pub const CID_LOCAL: u32 = 1;
/// The host, as its guests dial it (`VMADDR_CID_HOST`).
pub const CID_HOST: u32 = 2;

/// To listen on, a port of the kernel's choice; to connect to, none (`VMADDR_PORT_ANY`).
pub const PORT_ANY: Port = Port(u32::MAX);

/// The CIDs that have names; the numbers are those of Linux's `include/uapi/linux/vm_sockets.h`.
const NAMES: [(&str, u32); 4] = [
    ("any", CID_ANY),
    ("hypervisor", CID_HYPERVISOR),
    ("local", CID_LOCAL),
    ("host", CID_HOST),
];

/// An address of Linux's `AF_VSOCK`: `vsock://[CID]:PORT`.
///
/// The CID is a number or one of `any`, `hypervisor`, `local`, `host`; left out it is `any`, and
/// printed so. `?buffer-size=BYTES` sets the socket's buffer, `?framing=yes` speaks in the frames
/// of [`framing`](crate::framing).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct VsockAddress {
    /// The context id of a VM or of the host.
    pub cid: u32,
    /// The port.
    pub port: Port,
    /// How many bytes the peer may send ahead of our reading (`SO_VM_SOCKETS_BUFFER_SIZE`), at
    /// least 128; `None`: the kernel's 256 KiB. Newer kernels (seen: Debian's 6.1.0-56) let no
    /// sender go further than its own size, either.
    pub buffer_size: Option<u64>,
    /// The peer speaks in frames ([`framing`](crate::framing)).
    pub framing: bool,
}

impl VsockAddress {
    /// Makes the address of a port of a CID, with no option set.
    pub fn new(cid: u32, port: impl Into<Port>) -> VsockAddress {
        VsockAddress {
            cid,
            port: port.into(),
            buffer_size: None,
            framing: false,
        }
    }
}

const BUFFER_SIZE: &str = "buffer-size";
pub(super) const FRAMING: &str = "framing";

/// The kernel's `VSOCK_DEFAULT_BUFFER_MIN_SIZE` (`net/vmw_vsock/af_vsock.c`): less is raised to it
/// in silence.
const LEAST_BUFFER: u64 = 128;

impl fmt::Display for VsockAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("vsock://")?;
        if self.cid != CID_ANY {
            write!(f, "{}", self.cid)?;
        }
        write!(f, ":{}", self.port.0)?;
        let size = self.buffer_size.map(|size| size.to_string());
        let framing = self.framing.then_some("yes");
        uri::write_query(f, &[(BUFFER_SIZE, size.as_deref()), (FRAMING, framing)])
    }
}

impl FromStr for VsockAddress {
    type Err = AddressError;

    fn from_str(input: &str) -> Result<VsockAddress, AddressError> {
        let uri = Uri::parse(input, "vsock", "vsock://3:1024")?;
        let (cid, port) = uri.split_port()?;
        let cid = parse_cid(cid).map_err(|reason| uri.error(Part::Cid, cid, reason))?;
        let mut address = VsockAddress::new(cid, uri.port(port)?);
        uri.no_path()?;
        for (key, value) in uri.query(&[BUFFER_SIZE, FRAMING])? {
            if key == FRAMING {
                address.framing = uri.yes_or_no(key, &value)?;
                continue;
            }
            let size = value.parse().ok().filter(|&size| size >= LEAST_BUFFER);
            let reason = "is a number of bytes, at least 128";
            let size = size.ok_or_else(|| uri.error(Part::Query, key, reason))?;
            address.buffer_size = Some(size);
        }
        Ok(address)
    }
}

fn parse_cid(text: &str) -> Result<u32, String> {
    if text.is_empty() {
        return Ok(CID_ANY);
    }
    if let Some((_, cid)) = NAMES
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(text))
    {
        return Ok(*cid);
    }
    if text.starts_with(|c: char| c.is_ascii_alphabetic()) {
        return Err("is neither a number nor any, hypervisor, local or host".to_owned());
    }
    parse_u32(text)
}
