//! Connected sockets for an event loop.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use mio::event::Source;
use mio::{Interest, Registry, Token};
use socket2::SockRef;

use crate::address::{Address, Host, HyperkitAddress, UnixAddress, VsockAddress, VsockMuxAddress};
use crate::hyperkit;
use crate::mux::Handshake;
use crate::relay::Socket;
use crate::sys;

/// What it takes to connect to an address.
#[derive(Debug)]
pub(crate) enum Target<'a> {
    Endpoint(Endpoint),
    /// The name is to be resolved first.
    Name {
        host: &'a str,
        port: u16,
    },
    /// This system has no such sockets, or this version doesn't carry them.
    NotCarried,
}

impl Target<'_> {
    pub(crate) fn of(address: &Address) -> Target<'_> {
        Target::Endpoint(match address {
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
            },
        })
    }
}

/// An address to connect to with no name left to resolve.
#[derive(Clone, Debug)]
pub(crate) enum Endpoint {
    Tcp(SocketAddr),
    Unix(UnixAddress),
    Hyperkit(HyperkitAddress),
    Vsock(VsockAddress),
    /// The Unix socket at this path; a [`Handshake`] for the port is to follow.
    VsockMux(VsockMuxAddress),
}

impl Endpoint {
    /// What is to be said and heard on the connected socket before it is the peer's.
    pub(crate) fn handshake(&self) -> Option<Handshake> {
        match self {
            Endpoint::VsockMux(address) => Some(Handshake::new(address.port)),
            _ => None,
        }
    }

    /// Whether a connect is done when it returns.
    pub(crate) fn connects_at_once(&self) -> bool {
        !matches!(self, Endpoint::Tcp(_) | Endpoint::Vsock(_))
    }
}

/// A connected stream, or one whose connect is in progress.
#[derive(Debug)]
pub(crate) enum Stream {
    Tcp(mio::net::TcpStream),
    Unix(mio::net::UnixStream),
    /// An AF_VSOCK socket. mio has no name for one, but its Unix stream carries any stream socket.
    Vsock(mio::net::UnixStream),
}

impl Stream {
    /// Begins to connect, without blocking. [`Stream::connected`] says when it is done.
    ///
    /// To hyperkit the line that names the port is written before this returns: between connect and line the device
    /// stands still for everybody.
    ///
    /// # Errors
    /// `WouldBlock` when a Unix listener's backlog is full: try again later. Otherwise what the kernel says.
    pub(crate) fn connect(endpoint: &Endpoint) -> io::Result<Stream> {
        match endpoint {
            Endpoint::Tcp(address) => Ok(Stream::Tcp(mio::net::TcpStream::connect(*address)?)),
            Endpoint::Unix(address) => Ok(Stream::Unix(connect_unix(address)?)),
            Endpoint::Hyperkit(address) => Ok(Stream::Unix(connect_hyperkit(address)?)),
            Endpoint::VsockMux(address) => Ok(Stream::Unix(connect_path(&address.path)?)),
            Endpoint::Vsock(address) => {
                let socket = sys::vsock_connect(address.cid, address.port.0, address.buffer_size)?;
                Ok(Stream::from_vsock(socket))
            }
        }
    }

    /// A stream of a non-blocking AF_VSOCK socket.
    pub(crate) fn from_vsock(socket: socket2::Socket) -> Stream {
        let stream = std::os::unix::net::UnixStream::from(OwnedFd::from(socket));
        Stream::Vsock(mio::net::UnixStream::from_std(stream))
    }

    /// Whether the connect that was begun is done. Ask after an event said that the stream is writable.
    ///
    /// # Errors
    /// Why it failed.
    pub(crate) fn connected(&self) -> io::Result<bool> {
        let socket = match self {
            Stream::Tcp(stream) => SockRef::from(stream),
            Stream::Vsock(stream) => SockRef::from(stream),
            Stream::Unix(_) => return Ok(true),
        };
        if let Some(error) = socket.take_error()? {
            return Err(error);
        }
        match socket.peer_addr() {
            Ok(_) => Ok(true),
            // macOS, of a peer that has come and gone.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Small messages are sent at once, for a relay has no reason to wait for more; and a peer that vanished without a
    /// word is noticed in the end (after two hours, as systems have it).
    pub(crate) fn set_options(&self) {
        if let Stream::Tcp(stream) = self {
            // They fail only on a connection that has ended, as the next read will say.
            let _ = stream.set_nodelay(true);
            let _ = SockRef::from(stream).set_keepalive(true);
        }
    }

    /// Closes so that the peer reads a reset and not an EOF, where the family can.
    pub(crate) fn reset(self) {
        if let Stream::Tcp(stream) = &self {
            let _ = SockRef::from(stream).set_linger(Some(std::time::Duration::ZERO));
        }
    }

    /// Bytes written that a [`reset`](Stream::reset) now would take away from the peer.
    pub(crate) fn unacknowledged(&self) -> usize {
        match self {
            Stream::Tcp(stream) => sys::unacknowledged(stream),
            // Written is there: it lies in the peer's own queue. And AF_VSOCK has no reset to send.
            Stream::Unix(_) | Stream::Vsock(_) => 0,
        }
    }

    /// Takes nothing more: on Linux the peer's next write fails, on macOS it goes nowhere.
    pub(crate) fn shutdown_read(&self) {
        let _ = match self {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Read),
            Stream::Unix(stream) | Stream::Vsock(stream) => stream.shutdown(Shutdown::Read),
        };
    }
}

fn connect_path(path: &Path) -> io::Result<mio::net::UnixStream> {
    let connected = sys::with_short_path(path, |short| mio::net::UnixStream::connect(short));
    match connected {
        Err(e)
            if sys::FULL_BACKLOG_REFUSES
                && e.kind() == io::ErrorKind::ConnectionRefused
                && sys::is_socket_alive(path).unwrap_or(false) =>
        {
            Err(io::ErrorKind::WouldBlock.into())
        }
        other => other,
    }
}

fn connect_unix(address: &UnixAddress) -> io::Result<mio::net::UnixStream> {
    match address {
        UnixAddress::Path(path) => connect_path(path),
        UnixAddress::Abstract(name) => {
            mio::net::UnixStream::connect_addr(&sys::abstract_address(name)?)
        }
    }
}

/// Connects to the `connect` socket and asks for the port, or, where there is no such socket, to the one that
/// hyperkit's `guest_forwards=` made for the port.
fn connect_hyperkit(address: &HyperkitAddress) -> io::Result<mio::net::UnixStream> {
    let vm = &address.vm;
    let connected = connect_path(&vm.connect_path());
    let mut stream = match connected {
        Ok(stream) => stream,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let forward = vm.forward_path(address.port);
            return match connect_path(&forward) {
                Err(second) if second.kind() == io::ErrorKind::NotFound => Err(e),
                other => other,
            };
        }
        Err(e) => return Err(e),
    };
    let line = hyperkit::connect_line(vm.cid, address.port.0);
    match stream.write(&line) {
        Ok(n) if n == line.len() => Ok(stream),
        // The rest would come too late: hyperkit has read what was there and closed.
        Ok(n) => Err(io::Error::new(
            io::ErrorKind::WriteZero,
            format!(
                "only {n} of the line's {} bytes could be written at once",
                line.len()
            ),
        )),
        Err(e) => Err(e),
    }
}

impl Socket for Stream {
    const SHORT_WRITE_BLOCKS: bool = sys::KERNEL_EDGES;

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.read(buffer),
            Stream::Unix(stream) | Stream::Vsock(stream) => stream.read(buffer),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.write(bytes),
            Stream::Unix(stream) | Stream::Vsock(stream) => stream.write(bytes),
        }
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Stream::Unix(stream) | Stream::Vsock(stream) => stream.shutdown(Shutdown::Write),
        }
    }
}

impl Stream {
    fn source(&mut self) -> &mut dyn Source {
        match self {
            Stream::Tcp(stream) => stream,
            Stream::Unix(stream) | Stream::Vsock(stream) => stream,
        }
    }
}

impl Source for Stream {
    fn register(&mut self, registry: &Registry, token: Token, what: Interest) -> io::Result<()> {
        self.source().register(registry, token, what)
    }

    fn reregister(&mut self, registry: &Registry, token: Token, what: Interest) -> io::Result<()> {
        self.source().reregister(registry, token, what)
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        self.source().deregister(registry)
    }
}

impl From<Stream> for OwnedFd {
    fn from(stream: Stream) -> OwnedFd {
        match stream {
            Stream::Tcp(stream) => stream.into(),
            Stream::Unix(stream) | Stream::Vsock(stream) => stream.into(),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Tcp(stream) => stream.as_fd(),
            Stream::Unix(stream) | Stream::Vsock(stream) => stream.as_fd(),
        }
    }
}
