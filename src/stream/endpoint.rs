//! Endpoints: what a connect to an address connects to.

use std::io;
use std::net::SocketAddr;

use socket2::SockRef;

use super::vsock_mux::Handshake;
#[cfg(windows)]
use crate::address::NpipeAddress;
use crate::address::{Address, Host, HyperkitAddress, UnixAddress, VsockAddress, VsockMuxAddress};
use crate::error::{Error, Operation};

/// The way to connect to an address.
#[derive(Debug)]
pub(crate) enum Target<'a> {
    Endpoint(Endpoint),
    /// A name that has to be resolved first.
    Name {
        host: &'a str,
        port: u16,
    },
    /// A program or a file: it is dialled by [`dial::on_thread`](crate::dial::on_thread), since
    /// that may block.
    #[cfg(unix)]
    OnThread,
    /// Nothing: this system has no such sockets, or they are not carried.
    NotCarried,
}

impl Target<'_> {
    pub(crate) fn of(address: &Address) -> Target<'_> {
        Target::Endpoint(match address {
            #[cfg(windows)]
            Address::Npipe(pipe) => Endpoint::Npipe(pipe.clone()),
            #[cfg(not(windows))]
            Address::Npipe(_) => return Target::NotCarried,
            _ if cfg!(not(unix)) && !matches!(address, Address::Tcp(_)) => {
                return Target::NotCarried;
            }
            #[cfg(unix)]
            Address::Exec(_) | Address::File(_) => return Target::OnThread,
            #[cfg(not(unix))]
            Address::Exec(_) | Address::File(_) => return Target::NotCarried,
            Address::Hyperkit(hyperkit) => Endpoint::Hyperkit(hyperkit.clone()),
            Address::Unix(unix) => Endpoint::Unix(unix.clone()),
            Address::VsockMux(mux) => Endpoint::VsockMux(mux.clone()),
            Address::Vsock(vsock) => Endpoint::Vsock(vsock.clone()),
            Address::Hvsock(_) => return Target::NotCarried,
            Address::Tcp(tcp) => match &tcp.host {
                Host::Ip(ip) => Endpoint::Tcp(SocketAddr::new(*ip, tcp.port)),
                Host::Name(host) => {
                    let port = tcp.port;
                    return Target::Name { host, port };
                }
                Host::Any => {
                    let (host, port) = ("localhost", tcp.port);
                    return Target::Name { host, port };
                }
            },
        })
    }
}

/// An address to connect to with no name left to resolve.
#[derive(Clone, Debug)]
#[cfg_attr(not(unix), allow(dead_code))]
pub(crate) enum Endpoint {
    Tcp(SocketAddr),
    Unix(UnixAddress),
    Hyperkit(HyperkitAddress),
    Vsock(VsockAddress),
    /// The Unix socket at this path; a [`Handshake`] for the port is to follow.
    VsockMux(VsockMuxAddress),
    #[cfg(windows)]
    Npipe(NpipeAddress),
}

impl Endpoint {
    /// Returns the handshake that follows the connect, if there is one.
    pub(crate) fn handshake(&self) -> Option<Handshake> {
        match self {
            Endpoint::VsockMux(address) => Some(Handshake::new(address.port)),
            _ => None,
        }
    }

    /// Returns whether a connect is done when it returns.
    pub(crate) fn connects_at_once(&self) -> bool {
        !matches!(self, Endpoint::Tcp(_) | Endpoint::Vsock(_))
    }
}

/// Returns the error for a family whose sockets this system doesn't carry.
pub(crate) fn not_carried(operation: Operation, address: &Address) -> Error {
    if let (Operation::Listen, Some((why, remedy))) = (operation, address.why_no_listener()) {
        let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
        return Error::new(operation, address, cause).with_remedy(remedy);
    }
    let why = match address {
        Address::Exec(_) => "programs are not started here".to_owned(),
        Address::File(_) => "files are not sent here".to_owned(),
        Address::Npipe(_) => "named pipes are Windows'".to_owned(),
        other => {
            let scheme = other.scheme();
            format!("{scheme} sockets are not carried here")
        }
    };
    let cause = io::Error::new(io::ErrorKind::Unsupported, why);
    Error::new(operation, address, cause).with_remedy(match cfg!(unix) {
        true => "use a hyperkit://, vsock://, vsock-mux://, unix: or tcp:// address",
        false => "use a tcp://, npipe:// or hvsock:// address",
    })
}

/// Returns whether a connect that was begun is done.
pub(super) fn is_connected(socket: SockRef<'_>) -> io::Result<bool> {
    if let Some(error) = socket.take_error()? {
        return Err(error);
    }
    match socket.peer_addr() {
        Ok(_) => Ok(true),
        // macOS returns this if the peer was connected and has gone.
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(false),
        Err(e) => Err(e),
    }
}
