//! `hyperkit://[CID]:PORT/STATE/DIR`, and the same without a port for the VM alone.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::port::parse_u32;
use super::uri::{self, Uri};
use super::{AddressError, Part, Port};
use crate::hyperkit::{CONNECT_NAME, GUEST_CID, HOST_CID};

const SCHEME: &str = "hyperkit";
const EXAMPLE: &str = "hyperkit://:80/path/to/state";
const VM_EXAMPLE: &str = "hyperkit:///path/to/state";
const NO_DIR: &str = "to the VM's state directory is missing";

/// A hyperkit VM, known by its state directory: `hyperkit://[CID]/STATE/DIR[?connect=NAME][&prefix=P]`.
///
/// Only what differs from [`HyperkitVm::new`] is printed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HyperkitVm {
    /// The directory that holds the sockets; neither empty nor `/`. `/./rel` in the URI is the relative `rel`.
    pub state_dir: PathBuf,
    /// The guest's CID, `guest_cid=` of hyperkit: from 3 (the host is 2) to 4294967294.
    pub cid: u32,
    /// The file name of the socket that takes connections, `CONNECT_SOCKET_NAME` of hyperkit's build: `connect`, or `@connect` for an old Docker.
    pub connect: String,
    /// What stands before names such as `00000002.00000050`, `PRI_ADDR_PREFIX` of hyperkit's build: nothing, or `@` for an old Docker.
    pub prefix: String,
}

impl HyperkitVm {
    /// The VM of this state directory, with the names and the CID that hyperkit has by default.
    pub fn new(state_dir: impl Into<PathBuf>) -> HyperkitVm {
        HyperkitVm {
            state_dir: state_dir.into(),
            cid: GUEST_CID,
            connect: CONNECT_NAME.to_owned(),
            prefix: String::new(),
        }
    }

    fn from_uri(uri: &Uri<'_>, cid: &str) -> Result<HyperkitVm, AddressError> {
        let mut vm = HyperkitVm::new(uri.file(NO_DIR)?);
        if !cid.is_empty() {
            vm.cid = parse_u32(cid).map_err(|reason| uri.error(Part::Cid, cid, reason))?;
            if !is_guest_cid(vm.cid) {
                return Err(uri.error(Part::Cid, cid, "is no guest's (3 to 4294967294)"));
            }
        }
        for (key, value) in uri.query(&["connect", "prefix"])? {
            if value.contains(['/', '\0']) {
                return Err(uri.error(Part::Query, key, "is part of a file name: no / and no NUL"));
            }
            if key == "prefix" {
                vm.prefix = value;
            } else if matches!(value.as_str(), "" | "." | "..") {
                return Err(uri.error(Part::Query, key, "wants the name of a socket"));
            } else {
                vm.connect = value;
            }
        }
        Ok(vm)
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, port: Option<Port>) -> fmt::Result {
        write!(f, "{SCHEME}://")?;
        if self.cid != GUEST_CID {
            write!(f, "{}", self.cid)?;
        }
        if let Some(Port(port)) = port {
            write!(f, ":{port}")?;
        }
        uri::write_file(f, &self.state_dir)?;
        let connect = (self.connect != CONNECT_NAME).then_some(self.connect.as_str());
        let prefix = (!self.prefix.is_empty()).then_some(self.prefix.as_str());
        uri::write_query(f, &[("connect", connect), ("prefix", prefix)])
    }
}

/// Whether hyperkit would take it as `guest_cid=` (`pci_vtsock_init`).
pub(crate) fn is_guest_cid(cid: u32) -> bool {
    cid > HOST_CID && cid < u32::MAX
}

impl fmt::Display for HyperkitVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, None)
    }
}

impl FromStr for HyperkitVm {
    type Err = AddressError;

    fn from_str(input: &str) -> Result<HyperkitVm, AddressError> {
        let uri = Uri::parse(input, SCHEME, VM_EXAMPLE)?;
        if let Some((_, port)) = uri.authority.split_once(':') {
            return Err(uri.error(Part::Port, port, "is not taken here: only the VM is named"));
        }
        HyperkitVm::from_uri(&uri, uri.authority)
    }
}

/// A vsock port of a hyperkit VM: `hyperkit://[CID]:PORT/STATE/DIR[?connect=NAME][&prefix=P]`.
///
/// To dial, it is the guest's port; to listen, the host's port that this VM's guest dials.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HyperkitAddress {
    /// The VM.
    pub vm: HyperkitVm,
    /// The port.
    pub port: Port,
}

impl HyperkitAddress {
    /// That port of the VM with this state directory.
    pub fn new(state_dir: impl Into<PathBuf>, port: impl Into<Port>) -> HyperkitAddress {
        HyperkitAddress {
            vm: HyperkitVm::new(state_dir),
            port: port.into(),
        }
    }
}

impl fmt::Display for HyperkitAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.vm.write(f, Some(self.port))
    }
}

impl FromStr for HyperkitAddress {
    type Err = AddressError;

    fn from_str(input: &str) -> Result<HyperkitAddress, AddressError> {
        let uri = Uri::parse(input, SCHEME, EXAMPLE)?;
        let (cid, port) = uri.split_port()?;
        Ok(HyperkitAddress {
            port: uri.port(port)?,
            vm: HyperkitVm::from_uri(&uri, cid)?,
        })
    }
}
