//! Windows' Hyper-V: the sockets of AF_HYPERV alone, and its VMs' names and ids.
//!
//! ```no_run
//! use hvsock::address::{HvsockAddress, Port, Vm};
//! use hvsock::hyperv::{Stream, find};
//!
//! let guest = Stream::connect(&HvsockAddress::new(Vm::Id(find("My VM")?), Port(2375)))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! AF_HYPERV knows VMs by their ids, people by their names. Windows PowerShell's `Get-VM` knows
//! both: it is asked for all VMs, and the name is looked for here, so that no name gets into a
//! script. On systems other than Windows every call fails with `Unsupported`.

#[cfg(any(windows, test))]
mod answer;
pub(crate) mod lookup;
mod machine;
#[cfg(any(windows, test))]
mod powershell;

use crate::address::HvsockAddress;
use crate::family;

pub use lookup::{find, list};
pub use machine::Machine;

/// A connected AF_HYPERV stream.
pub type Stream = family::Stream<HvsockAddress>;
/// A listening AF_HYPERV socket.
pub type Listener = family::Listener<HvsockAddress>;
