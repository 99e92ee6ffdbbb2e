//! Listening sockets for an event loop.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use mio::event::Source;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use socket2::{Domain, Socket, Type};

use super::Peer;
use super::file::{self, FileState, SocketFile};
use crate::address::{Address, Host, Port, TcpAddress, UnixAddress, VsockAddress};
use crate::dial;
use crate::error::{Error, Operation, Result};
use crate::mux;
use crate::stream::nonblocking::Stream;
use crate::sys;

/// How many connections may wait to be accepted; the kernel lowers it to its own limit (`net.core.somaxconn`,
/// `kern.ipc.somaxconn`).
const BACKLOG: i32 = 4096;

/// A listening socket. Dropping it removes the socket's file, if that is still ours.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(mio::net::TcpListener),
    Unix(UnixListener),
    Vsock(Socket),
}

/// A listening Unix socket and its file.
#[derive(Debug)]
pub(crate) struct UnixListener {
    listener: mio::net::UnixListener,
    file: Option<SocketFile>,
}

impl Listener {
    /// Binds `address` and listens on it. A Unix socket's file gets the permissions `mode`, before anyone can connect.
    ///
    /// A file in the way is replaced only if it is a socket on which nobody listens.
    ///
    /// # Errors
    /// `AddrInUse` if somebody listens there; `AlreadyExists` if the file in the way is no socket; what the kernel
    /// says otherwise. `Unsupported` for a family that isn't carried.
    pub(crate) fn bind(address: &Address, mode: u32) -> Result<Listener> {
        match address {
            Address::Tcp(tcp) => bind_tcp(address, tcp),
            Address::Unix(UnixAddress::Path(path)) => bind_path(address, path, mode),
            Address::Unix(UnixAddress::Abstract(name)) => bind_abstract(address, name),
            Address::Hyperkit(hyperkit) => {
                bind_path(address, &hyperkit.vm.listen_path(hyperkit.port), mode)
            }
            Address::Vsock(vsock) => bind_vsock(address, vsock),
            Address::VsockMux(to) => bind_path(address, &mux::listen_path(&to.path, to.port), mode),
            other => Err(not_carried(Operation::Listen, other)),
        }
    }

    /// Accepts one connection, non-blocking; who it is from, for the log.
    pub(crate) fn accept(&self) -> io::Result<(Stream, Peer)> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept()?;
                Ok((Stream::Tcp(stream), Peer::Tcp(peer)))
            }
            Listener::Unix(unix) => {
                let (stream, _) = unix.listener.accept()?;
                Ok((Stream::Unix(stream), Peer::Unknown))
            }
            Listener::Vsock(listener) => {
                let (socket, address) = listener.accept()?;
                socket.set_nonblocking(true)?;
                let peer = sys::vsock_of(&address).map_or(Peer::Unknown, |(cid, port)| {
                    let port = Port(port);
                    Peer::Vsock { cid, port }
                });
                Ok((Stream::from_vsock(socket), peer))
            }
        }
    }

    /// The address that was bound when `asked` was asked for: it says what the kernel chose for TCP port 0, and for the
    /// highest vsock port, `VMADDR_PORT_ANY`.
    pub(crate) fn bound(&self, asked: &Address) -> Address {
        match (self, asked) {
            (Listener::Tcp(listener), Address::Tcp(_)) => match listener.local_addr() {
                Ok(bound) => Address::Tcp(TcpAddress {
                    host: Host::Ip(bound.ip()),
                    port: bound.port(),
                }),
                Err(_) => asked.clone(),
            },
            (Listener::Vsock(listener), Address::Vsock(vsock)) => {
                let bound = listener.local_addr().ok();
                let mut vsock = vsock.clone();
                if let Some((_, port)) = bound.and_then(|bound| sys::vsock_of(&bound)) {
                    vsock.port = Port(port);
                }
                Address::Vsock(vsock)
            }
            _ => asked.clone(),
        }
    }

    /// What has become of the socket's file.
    pub(crate) fn file_state(&self) -> FileState {
        let Listener::Unix(UnixListener {
            file: Some(file), ..
        }) = self
        else {
            return FileState::Ours;
        };
        file.state()
    }
}

/// The error for a family whose sockets this system, or this version, doesn't carry.
pub(crate) fn not_carried(operation: Operation, address: &Address) -> Error {
    let cause = io::Error::new(
        io::ErrorKind::Unsupported,
        format!("{} sockets are not carried here", address.scheme()),
    );
    Error::new(operation, address, cause)
        .with_remedy("use a hyperkit://, vsock://, vsock-mux://, unix: or tcp:// address")
}

fn bind_tcp(address: &Address, tcp: &TcpAddress) -> Result<Listener> {
    let socket_address = match &tcp.host {
        Host::Ip(ip) => SocketAddr::new(*ip, tcp.port),
        Host::Name(name) => (name.as_str(), tcp.port)
            .to_socket_addrs()
            .and_then(|mut all| all.next().ok_or(io::ErrorKind::NotFound.into()))
            .map_err(|e| Error::new(Operation::Resolve, name, e))?,
    };
    let listen = || {
        let socket = Socket::new(Domain::for_address(socket_address), Type::STREAM, None)?;
        // Without it a port stays unusable for a minute after a restart. On Windows it means something else.
        #[cfg(unix)]
        socket.set_reuse_address(true)?;
        socket.bind(&socket_address.into())?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        Ok(mio::net::TcpListener::from_std(socket.into()))
    };
    listen().map(Listener::Tcp).map_err(|e: io::Error| {
        let remedy = match e.kind() {
            io::ErrorKind::AddrInUse => {
                Some("another program listens there: choose another port, or 0 for a free one")
            }
            io::ErrorKind::PermissionDenied => {
                Some("ports below 1024 need rights: choose a higher one")
            }
            io::ErrorKind::AddrNotAvailable => {
                Some("no interface of this machine has that address")
            }
            _ => None,
        };
        let error = Error::new(Operation::Listen, address, e);
        match remedy {
            Some(remedy) => error.with_remedy(remedy),
            None => error,
        }
    })
}

fn bind_vsock(address: &Address, vsock: &VsockAddress) -> Result<Listener> {
    let listener = sys::vsock_listen(vsock.cid, vsock.port.0, BACKLOG, vsock.buffer_size);
    listener.map(Listener::Vsock).map_err(|e| {
        let remedy = match e.kind() {
            io::ErrorKind::AddrInUse => "another program listens there: choose another port",
            io::ErrorKind::PermissionDenied => "ports below 1024 need rights: choose a higher one",
            io::ErrorKind::AddrNotAvailable => {
                let remedy = match sys::local_cid() {
                    Ok(cid) => format!("this system has CID {cid}: leave the CID out"),
                    Err(_) => "that CID is not this system's: leave it out".to_owned(),
                };
                return Error::new(Operation::Listen, address, e).with_remedy(remedy);
            }
            _ => return dial::explain_vsock(Operation::Listen, address, e),
        };
        Error::new(Operation::Listen, address, e).with_remedy(remedy)
    })
}

fn bind_path(address: &Address, path: &Path, mode: u32) -> Result<Listener> {
    let (socket, file) = file::bind(address, path, Type::STREAM, mode)?;
    let listen = || {
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)
    };
    listen().map_err(|e| Error::new(Operation::Listen, address, e))?;
    Ok(Listener::Unix(UnixListener {
        listener: mio::net::UnixListener::from_std(socket.into()),
        file: Some(file),
    }))
}

fn bind_abstract(address: &Address, name: &[u8]) -> Result<Listener> {
    sys::abstract_address(name)
        .and_then(|name| mio::net::UnixListener::bind_addr(&name))
        .map(|listener| {
            Listener::Unix(UnixListener {
                listener,
                file: None,
            })
        })
        .map_err(|e| Error::new(Operation::Listen, address, e))
}

impl Listener {
    /// Calls `f` with what mio knows to register.
    fn with_source<T>(&mut self, f: impl FnOnce(&mut dyn Source) -> T) -> T {
        match self {
            Listener::Tcp(listener) => f(listener),
            Listener::Unix(unix) => f(&mut unix.listener),
            Listener::Vsock(socket) => f(&mut SourceFd(&socket.as_raw_fd())),
        }
    }
}

impl Source for Listener {
    fn register(&mut self, registry: &Registry, token: Token, what: Interest) -> io::Result<()> {
        self.with_source(|source| source.register(registry, token, what))
    }

    fn reregister(&mut self, registry: &Registry, token: Token, what: Interest) -> io::Result<()> {
        self.with_source(|source| source.reregister(registry, token, what))
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        self.with_source(|source| source.deregister(registry))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Tcp(listener) => listener.as_fd(),
            Listener::Unix(unix) => unix.listener.as_fd(),
            Listener::Vsock(socket) => socket.as_fd(),
        }
    }
}
