//! hyperkit's VMs: their state directories, the 18-byte line that asks for a connection, and their sockets alone.
//!
//! Source of every name and number here: hyperkit's `src/lib/pci_virtio_sock.c`.
//!
//! ```
//! # #[cfg(unix)] {
//! use hvsock::address::HyperkitAddress;
//! use hvsock::hyperkit::{Listener, Stream};
//! use std::io::{Read, Write};
//! use std::net::Shutdown;
//! # use hvsock::simulate::{Service, Vm};
//! # let dir = tempfile::tempdir()?;
//! # let vm = Vm::builder(dir.path()).guest(7, Service::Echo).start()?;
//! # let state_dir = dir.path();
//!
//! let mut stream = Stream::connect(&HyperkitAddress::new(state_dir, 7))?;
//! stream.write_all(b"hello")?;
//! stream.shutdown(Shutdown::Write)?;
//! let mut echo = String::new();
//! stream.read_to_string(&mut echo)?;
//! assert_eq!(echo, "hello");
//!
//! // And when the guest dials port 5000 of its host (CID 2):
//! let listener = Listener::bind(&HyperkitAddress::new(state_dir, 5000))?;
//! # let mut guest = vm.dial(5000)?;
//! # guest.write_all(b"hi")?;
//! # guest.shutdown(Shutdown::Write)?;
//! let (mut from_guest, _) = listener.accept()?;
//! let mut request = String::new();
//! from_guest.read_to_string(&mut request)?;
//! # assert_eq!(request, "hi");
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod discovery;
mod state;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

pub use crate::address::HyperkitVm;
use crate::address::{HyperkitAddress, Port};
use crate::family;
#[cfg(all(unix, feature = "cli"))]
pub(crate) use state::configured_cid;
#[cfg(unix)]
pub(crate) use state::running_pid;

#[cfg(feature = "cli")]
pub(crate) use discovery::survey;
pub use discovery::{Discovered, Places, Source, discover, find};

/// A connection with a hyperkit guest. Dropping it is not enough: see [`finish`](crate::Stream::finish).
pub type Stream = family::Stream<HyperkitAddress>;
/// A port of the host that a hyperkit guest dials.
pub type Listener = family::Listener<HyperkitAddress>;

/// The CID of the host, as the guest dials it (`VMADDR_CID_HOST`).
pub const HOST_CID: u32 = 2;

/// The CID of the guest unless hyperkit's `guest_cid=` said otherwise.
pub const GUEST_CID: u32 = 3;

/// The name of the socket on which hyperkit takes connections to the guest (`CONNECT_SOCKET_NAME`).
pub const CONNECT_NAME: &str = "connect";

/// How many bytes [`connect_line`] has.
pub const LINE_LEN: usize = 18;

/// The line that asks hyperkit for a connection to `port` of the guest `cid`: `%08x.%08x\n`.
///
/// hyperkit takes it with one `read` of 18 bytes and closes in silence if fewer are there at that moment: write it in one piece, at once after connect.
pub fn connect_line(cid: u32, port: u32) -> [u8; LINE_LEN] {
    let mut line = [b'\n'; LINE_LEN];
    line[..LINE_LEN - 1].copy_from_slice(socket_name(cid, port).as_bytes());
    line
}

/// The cid and the port in a [`connect_line`]; `None` if hyperkit would not understand it.
pub fn parse_connect_line(line: &[u8; LINE_LEN]) -> Option<(u32, u32)> {
    let text = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let (cid, port) = text.split_once('.')?;
    Some((
        u32::from_str_radix(cid, 16).ok()?,
        u32::from_str_radix(port, 16).ok()?,
    ))
}

/// The file name of a socket in the state directory: `%08x.%08x` (cid, port; `PRIaddr`).
pub fn socket_name(cid: u32, port: u32) -> String {
    format!("{cid:08x}.{port:08x}")
}

/// The file in the state directory to which hyperkit writes its pid, in decimal (`-F`, as hyperkit's Go package passes it).
pub const PID_NAME: &str = "hyperkit.pid";

/// How many bytes hyperkit takes as the path of its state directory (`pci_vtsock_init`: "path too long").
///
/// A socket's path on macOS has at most 104 bytes with its closing NUL (`sun_path`), and the longest name needs 18 of them: `/00000003.00000050`.
pub const MAX_STATE_DIR: usize = 104 - "/00000003.00000050".len() - 1;

impl HyperkitVm {
    /// The socket on which hyperkit takes connections to any port of the guest, each begun by a [`connect_line`].
    pub fn connect_path(&self) -> PathBuf {
        self.state_dir.join(&self.connect)
    }

    /// The socket of a guest port that was given at hyperkit's start (`guest_forwards=`): no line there.
    pub fn forward_path(&self, port: Port) -> PathBuf {
        self.socket_path(self.cid, port)
    }

    /// The link to [`forward_path`](HyperkitVm::forward_path) by which the guest's CID need not be known: `guest.%08x`, without the prefix.
    pub fn guest_link_path(&self, port: Port) -> PathBuf {
        self.state_dir.join(format!("guest.{:08x}", port.0))
    }

    /// Where a program of the host listens for guests that dial the host's `port`.
    pub fn listen_path(&self, port: Port) -> PathBuf {
        self.socket_path(HOST_CID, port)
    }

    /// The file with hyperkit's pid. It is not there where `vsock_dir` in hyperkit.json puts the sockets elsewhere than the state.
    pub fn pid_path(&self) -> PathBuf {
        self.state_dir.join(PID_NAME)
    }

    fn socket_path(&self, cid: u32, port: Port) -> PathBuf {
        let name = socket_name(cid, port.0);
        self.state_dir.join(format!("{}{name}", self.prefix))
    }
}
