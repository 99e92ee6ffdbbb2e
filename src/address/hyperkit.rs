//! `hyperkit://[CID]:PORT/STATE/DIR`, and the same without a port for the VM alone.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::port::parse_u32;
use super::uri::{self, Uri};
use super::{AddressError, PORT_ANY, Part, Port};

const SCHEME: &str = "hyperkit";
const EXAMPLE: &str = "hyperkit://:80/path/to/state";
const VM_EXAMPLE: &str = "hyperkit:///path/to/state";
const NO_DIR: &str = "to the VM's state directory is missing";

/// A hyperkit VM, known by its state directory:
/// `hyperkit://[CID]/STATE/DIR[?connect=NAME][&prefix=P]`.
///
/// Only what differs from [`HyperkitVm::new`] is printed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HyperkitVm {
    /// The directory that holds the sockets; neither empty nor `/`. `/./rel` in the URI is the
    /// relative `rel`.
    pub state_dir: PathBuf,
    /// The guest's CID, `guest_cid=` of hyperkit: from 3 (the host is 2) to 4294967294.
    pub cid: u32,
    /// The file name of the socket that takes connections, `CONNECT_SOCKET_NAME` of hyperkit's
    /// build: `connect`, or `@connect` for an old Docker.
    pub connect: String,
    /// What stands before names such as `00000002.00000050`, `PRI_ADDR_PREFIX` of hyperkit's build:
    /// nothing, or `@` for an old Docker.
    pub prefix: String,
}

impl HyperkitVm {
    /// Makes the VM of a state directory, with the names and the CID that hyperkit has by default.
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

/// Returns whether hyperkit would take `cid` as `guest_cid=` (`pci_vtsock_init`).
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
    /// Makes the address of a port of the VM with this state directory.
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

/// The CID of the host, as the guest dials it (`VMADDR_CID_HOST`).
pub const HOST_CID: u32 = 2;

/// The CID of the guest unless hyperkit's `guest_cid=` said otherwise.
pub const GUEST_CID: u32 = 3;

/// The name of the socket on which hyperkit takes connections to the guest (`CONNECT_SOCKET_NAME`).
pub const CONNECT_NAME: &str = "connect";

/// How many bytes [`connect_line`] has.
pub const LINE_LEN: usize = 18;

/// Returns the line that asks hyperkit for a connection to `port` of the guest `cid`:
/// `%08x.%08x\n`.
///
/// hyperkit takes it with one `read` of 18 bytes, and closes without an answer if fewer have come:
/// write it in one piece, at once after the connect.
pub fn connect_line(cid: u32, port: u32) -> [u8; LINE_LEN] {
    let mut line = [b'\n'; LINE_LEN];
    line[..LINE_LEN - 1].copy_from_slice(socket_name(cid, port).as_bytes());
    line
}

/// Parses the CID and the port out of a [`connect_line`]; `None` if hyperkit wouldn't understand
/// it.
pub fn parse_connect_line(line: &[u8; LINE_LEN]) -> Option<(u32, u32)> {
    let text = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let (cid, port) = text.split_once('.')?;
    Some((
        u32::from_str_radix(cid, 16).ok()?,
        u32::from_str_radix(port, 16).ok()?,
    ))
}

/// Returns the file name of a socket in the state directory: `%08x.%08x` (cid, port; `PRIaddr`).
pub fn socket_name(cid: u32, port: u32) -> String {
    format!("{cid:08x}.{port:08x}")
}

/// The file in the state directory to which hyperkit writes its pid, in decimal (`-F`, as
/// hyperkit's Go package passes it).
pub const PID_NAME: &str = "hyperkit.pid";

/// How many bytes hyperkit takes as the path of its state directory (`pci_vtsock_init`: "path too
/// long").
///
/// A socket's path on macOS has at most 104 bytes with its closing NUL (`sun_path`), and the
/// longest name needs 18 of them: `/00000003.00000050`.
pub const MAX_STATE_DIR: usize = 104 - "/00000003.00000050".len() - 1;

impl HyperkitVm {
    /// Returns the address of a port on which no program of the guest can listen. A running guest
    /// refuses it, once it has answered all earlier dials.
    pub(crate) fn probe_address(&self) -> HyperkitAddress {
        HyperkitAddress {
            vm: self.clone(),
            port: PORT_ANY,
        }
    }

    /// Returns the path of the socket on which hyperkit takes connections to any port of the guest.
    /// Each begins with a [`connect_line`].
    pub fn connect_path(&self) -> PathBuf {
        self.state_dir.join(&self.connect)
    }

    /// Returns the path of the socket of a guest port that was given at hyperkit's start
    /// (`guest_forwards=`). No line is written there.
    pub fn forward_path(&self, port: Port) -> PathBuf {
        self.socket_path(self.cid, port)
    }

    /// Returns the path of the link to [`forward_path`](HyperkitVm::forward_path) that has no CID
    /// in it: `guest.%08x`, without the prefix.
    pub fn guest_link_path(&self, port: Port) -> PathBuf {
        self.state_dir.join(format!("guest.{:08x}", port.0))
    }

    /// Returns the path at which a program of the host listens for guests that dial the host's
    /// `port`.
    pub fn listen_path(&self, port: Port) -> PathBuf {
        self.socket_path(HOST_CID, port)
    }

    /// Returns the path of the file with hyperkit's pid. There is none where `vsock_dir` in
    /// hyperkit.json puts the sockets elsewhere than the state.
    pub fn pid_path(&self) -> PathBuf {
        self.state_dir.join(PID_NAME)
    }

    fn socket_path(&self, cid: u32, port: Port) -> PathBuf {
        let name = socket_name(cid, port.0);
        self.state_dir.join(format!("{}{name}", self.prefix))
    }
}
