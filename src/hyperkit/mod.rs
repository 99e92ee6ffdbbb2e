//! hyperkit's VMs: their state directories, the 18-byte line that asks for a connection, and their
//! sockets alone.
//!
//! Source of every name and number here: hyperkit's `src/lib/pci_virtio_sock.c`.
//!
//! ```
//! # #[cfg(all(unix, feature = "simulate"))] {
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
pub(crate) mod state;
#[cfg(test)]
mod tests;

pub use crate::address::HyperkitVm;
pub use crate::address::hyperkit::{
    CONNECT_NAME, GUEST_CID, HOST_CID, LINE_LEN, MAX_STATE_DIR, PID_NAME, connect_line,
    parse_connect_line, socket_name,
};

use crate::address::HyperkitAddress;
use crate::family;
#[cfg(all(unix, feature = "cli"))]
pub(crate) use state::configured_cid;
#[cfg(all(unix, feature = "cli"))]
pub(crate) use state::holds_vm;
pub(crate) use state::running_pid;

#[cfg(all(unix, feature = "cli"))]
pub(crate) use discovery::NO_DIRECTORY;
pub use discovery::{Discovered, Places, Source, discover, find};
#[cfg(feature = "cli")]
pub(crate) use discovery::{survey, uri_of_vmm};

/// A connection with a hyperkit guest. Dropping it is not enough: see
/// [`finish`](crate::Stream::finish).
pub type Stream = family::Stream<HyperkitAddress>;
/// A port of the host that a hyperkit guest dials.
pub type Listener = family::Listener<HyperkitAddress>;
