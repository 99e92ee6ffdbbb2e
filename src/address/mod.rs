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
//! | `tcp://HOST:PORT` | TCP |
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
mod port;
#[cfg(test)]
mod proptests;
mod tcp;
#[cfg(test)]
mod tests;
pub(crate) mod transport;
mod unix;
mod uri;
mod vsock;

use std::fmt;
use std::str::FromStr;

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
pub use tcp::{Host, TcpAddress};
pub(crate) use transport::{HalfClose, Refusal, Reset, SocketKind, Waiter};
pub use unix::{UnixAddress, VsockMuxAddress};
#[cfg(feature = "cli")]
pub(crate) use uri::as_text;
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

const TCP_EXAMPLE: &str = "tcp://127.0.0.1:8080";

impl Address {
    /// Parses what may be no UTF-8, as arguments of a command may: a path that stands there as it is,
    /// or a URI, in which such bytes mean the same as percent-encoded ones.
    ///
    /// # Errors
    /// As those of [`Address::from_str`].
    #[cfg(feature = "cli")]
    pub(crate) fn from_os(input: &std::ffi::OsStr) -> Result<Address, AddressError> {
        uri::as_text(input).parse()
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

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(input: &str) -> Result<Address, AddressError> {
        if NpipeAddress::is_plain(input) {
            return input.parse().map(Address::Npipe);
        }
        if ["/", "./", "../"].iter().any(|s| input.starts_with(s)) {
            return UnixAddress::from_plain(input).map(Address::Unix);
        }
        let scheme = input.split_once(':').map_or("", |(scheme, _)| scheme);
        match scheme.to_ascii_lowercase().as_str() {
            "hyperkit" => input.parse().map(Address::Hyperkit),
            "vsock" => input.parse().map(Address::Vsock),
            "hvsock" => input.parse().map(Address::Hvsock),
            "vsock-mux" => input.parse().map(Address::VsockMux),
            "unix" => input.parse().map(Address::Unix),
            "npipe" => input.parse().map(Address::Npipe),
            "tcp" => input.parse().map(Address::Tcp),
            "exec" => input.parse().map(Address::Exec),
            "file" => input.parse().map(Address::File),
            _ => Err(unknown(input, scheme)),
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

/// Returns the error for an input of no known scheme, with the example that comes nearest to it.
fn unknown(input: &str, scheme: &str) -> AddressError {
    if input.is_empty() {
        return AddressError::new(input, Part::Address, "", "is empty", TCP_EXAMPLE);
    }
    let list = transport::ALL.map(|row| row.scheme).join(", ");
    let missing = format!("is missing (known: {list})");
    let behind = input.rsplit_once(':').map_or(input, |(_, behind)| behind);
    if !input.contains("://") && behind.starts_with(|c: char| c.is_ascii_digit()) {
        // HOST:PORT, PORT or :PORT.
        let example = ["tcp://", "tcp://127.0.0.1:", "tcp://127.0.0.1"]
            .map(|start| format!("{start}{input}").parse::<TcpAddress>());
        let example = match (example.iter().flatten().next(), &example[0]) {
            (Some(address), _) => address.to_string(),
            (None, Err(error)) => error.example().to_owned(),
            (None, Ok(_)) => TCP_EXAMPLE.to_owned(),
        };
        return AddressError::new(input, Part::Scheme, "", missing, example);
    }
    if !input.contains(':') {
        // What looks like a file's name was to be a path.
        let file = input.contains('/') || input.ends_with(".sock");
        let example = match UnixAddress::from_plain(&format!("./{input}")) {
            Ok(path) if file => path.to_string(),
            _ => TCP_EXAMPLE.to_owned(),
        };
        return AddressError::new(input, Part::Scheme, "", missing, example);
    }
    let letters = |s: &str| s.replace(|c: char| !c.is_alphanumeric(), "").to_lowercase();
    let near = transport::ALL
        .iter()
        .find(|row| letters(row.scheme) == letters(scheme));
    AddressError::new(
        input,
        Part::Scheme,
        scheme,
        format!("is unknown (known: {list})"),
        near.map_or(TCP_EXAMPLE, |row| row.example),
    )
}
