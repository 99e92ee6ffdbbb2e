//! Addresses to listen on and to connect to.
//!
//! | address | what it is |
//! |---|---|
//! | `hyperkit://[CID]:PORT/STATE/DIR` | a vsock port of a hyperkit VM, by its state directory |
//! | `vsock://[CID]:PORT` | Linux `AF_VSOCK` |
//! | `hvsock://VM/SERVICE` | Windows `AF_HYPERV` |
//! | `vsock-mux://:PORT/PATH` | a vsock port behind the Unix socket of Firecracker, Cloud Hypervisor or vhost-device-vsock |
//! | `unix:///PATH`, `unix:REL`, `unix:@NAME`, `/PATH`, `./REL`, `../REL` | a Unix socket |
//! | `npipe:////./pipe/NAME`, `//./pipe/NAME`, `\\.\pipe\NAME` | a named pipe of Windows |
//! | `tcp://HOST:PORT` | TCP; to listen on, `localhost` and `*` are IPv4 and IPv6 |
//! | `tcp4://HOST:PORT`, `tcp6://HOST:PORT` | TCP over IPv4 alone, or IPv6 alone |
//! | `exec:/PROGRAM[?arg=…&env=…&pty=yes]` | to connect to: a program that is started for each connection |
//! | `file:/PATH` | to connect to: the content of a file |
//!
//! Every address parses and prints on every system, whether or not that system can dial it, and
//! what it prints parses to the same address. Ports and CIDs are decimal, or hex behind `0x`. In
//! URIs, names and paths are percent-encoded; `/./rel` is the relative path `rel`.

mod error;
mod exec;
mod hvsock;
pub(crate) mod hyperkit;
mod npipe;
#[cfg(feature = "cli")]
pub(crate) mod overlap;
mod parse;
mod port;
#[cfg(test)]
mod proptests;
mod tcp;
#[cfg(test)]
mod tests;
#[cfg(feature = "cli")]
mod text;
pub(crate) mod transport;
mod unix;
mod uri;
mod vm;
mod vsock;

use std::fmt;

pub use error::{AddressError, Part};
pub use exec::{ExecAddress, FileAddress};
#[cfg(any(windows, test))]
pub(crate) use hvsock::parse_guid;
#[cfg(feature = "cli")]
pub(crate) use hvsock::parse_service;
pub use hvsock::{HvsockAddress, ServiceId, Vm, VmId};
pub(crate) use hyperkit::is_guest_cid;
pub use hyperkit::{HyperkitAddress, HyperkitVm};
pub use npipe::NpipeAddress;
pub use port::{Port, PortError};
pub use tcp::{Host, IpFamily, TcpAddress};
#[cfg(feature = "cli")]
pub(crate) use text::as_text;
pub(crate) use transport::{EofRefusal, HalfClose, Reset, SeenBy, SocketKind, VmTraits, Waiter};
pub use unix::{UnixAddress, VsockMuxAddress};
pub use vm::AnyVm;
pub use vsock::{CID_ANY, CID_HOST, CID_HYPERVISOR, CID_LOCAL, PORT_ANY, VsockAddress};

/// An address of any family.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A vsock port of a hyperkit VM.
    Hyperkit(HyperkitAddress),
    /// Linux `AF_VSOCK`.
    Vsock(VsockAddress),
    /// Windows `AF_HYPERV`.
    Hvsock(HvsockAddress),
    /// A vsock port behind a VM monitor's Unix socket.
    VsockMux(VsockMuxAddress),
    /// A Unix socket.
    Unix(UnixAddress),
    /// A named pipe of Windows.
    Npipe(NpipeAddress),
    /// TCP.
    Tcp(TcpAddress),
    /// A program that is started for each connection.
    Exec(ExecAddress),
    /// The content of a file.
    File(FileAddress),
}

impl Address {
    /// Parses what may be no UTF-8, as arguments of a command may: a path that stands there as it
    /// is, or a URI, in which such bytes mean the same as percent-encoded ones.
    ///
    /// # Errors
    /// As those of `Address::from_str`.
    #[cfg(all(feature = "cli", unix))]
    pub(crate) fn from_os(input: &std::ffi::OsStr) -> Result<Address, AddressError> {
        text::as_text(input).parse()
    }

    /// Returns its scheme, which stands before `:` when it is printed.
    pub fn scheme(&self) -> &'static str {
        self.transport().scheme
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Hyperkit(address) => address.fmt(f),
            Address::Vsock(address) => address.fmt(f),
            Address::Hvsock(address) => address.fmt(f),
            Address::VsockMux(address) => address.fmt(f),
            Address::Unix(address) => address.fmt(f),
            Address::Npipe(address) => address.fmt(f),
            Address::Tcp(address) => address.fmt(f),
            Address::Exec(address) => address.fmt(f),
            Address::File(address) => address.fmt(f),
        }
    }
}

macro_rules! from {
    ($($kind:ident: $inner:ty),*) => {$(
        impl From<$inner> for Address {
            fn from(address: $inner) -> Address {
                Address::$kind(address)
            }
        }
    )*};
}

from!(Hyperkit: HyperkitAddress, Vsock: VsockAddress, Hvsock: HvsockAddress, VsockMux: VsockMuxAddress, Unix: UnixAddress, Npipe: NpipeAddress, Tcp: TcpAddress, Exec: ExecAddress, File: FileAddress);
