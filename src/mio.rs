//! The sockets for an event loop of mio's.
//!
//! They are used as mio's own: register, wait for an event, and call until `WouldBlock`, for events
//! are edges.
//!
//! A stream that leads to a VM (`hyperkit://`, `vsock-mux://`) is not to be dropped before a read
//! has said EOF or has failed: half-close, and read on until then.
//!
//! ```
//! # #[cfg(all(unix, feature = "simulate"))] {
//! use hvsock::address::HyperkitAddress;
//! use mio::{Events, Interest, Poll, Token};
//! use std::io::{self, Read, Write};
//! use std::net::Shutdown;
//! # use hvsock::simulate::{Service, Vm};
//! # let dir = tempfile::tempdir()?;
//! # let vm = Vm::builder(dir.path()).guest(7, Service::Echo).start()?;
//! # let state_dir = dir.path();
//!
//! let mut poll = Poll::new()?;
//! let mut stream = hvsock::mio::Stream::connect(&HyperkitAddress::new(state_dir, 7).into())?;
//! poll.registry().register(&mut stream, Token(0), Interest::READABLE | Interest::WRITABLE)?;
//! let mut events = Events::with_capacity(16);
//! while !stream.is_connected()? {
//!     poll.poll(&mut events, None)?;
//! }
//! stream.write_all(b"hello")?; // so little fits; see `WouldBlock`
//! stream.shutdown(Shutdown::Write)?;
//! let mut echo = Vec::new();
//! loop {
//!     match stream.read_to_end(&mut echo) {
//!         Ok(_) => break,
//!         Err(e) if e.kind() == io::ErrorKind::WouldBlock => poll.poll(&mut events, None)?,
//!         Err(e) => return Err(e.into()),
//!     }
//! }
//! assert_eq!(echo, b"hello");
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::io::{self, Read, Write};
use std::net::Shutdown;
#[cfg(unix)]
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use ::mio::event::Source;
use ::mio::{Interest, Registry, Token};

use crate::address::{Address, Waiter};
use crate::dial::explain;
use crate::error::{Error, Operation, Result};
use crate::listener::{DEFAULT_MODE, nonblocking as listener};
use crate::name::SocketName;
use crate::stream::endpoint::{Target, not_carried};
use crate::stream::nonblocking;
use crate::stream::socket::Socket;
use crate::stream::vsock_mux::Handshake;
#[cfg(unix)]
use crate::sys::AsSocket;

/// How long an AF_VSOCK connect may take, as that of [`crate::Stream::connect`].
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// A non-blocking stream of any family but AF_HYPERV, for whose sockets no poller can wait.
///
/// Dropping it closes it. Of a hyperkit VM that is not enough: its device can hang or die when a
/// connection is closed that has not been read to its end. Half-close and read to EOF first.
#[derive(Debug)]
pub struct Stream {
    inner: nonblocking::Stream,
    address: Address,
    /// The connect is in progress.
    connecting: bool,
    /// The handshake that is still to be done.
    handshake: Option<Handshake>,
}

impl Stream {
    /// Begins to connect to `address`. Nothing blocks, whatever the family;
    /// [`is_connected`](Stream::is_connected) says when it is done. An AF_VSOCK connect fails after
    /// 31 s.
    ///
    /// # Errors
    /// `WouldBlock` if the backlog of a Unix socket's listener is full, or all instances of a pipe
    /// are taken: try again later. `InvalidInput` for a TCP name, which has to be resolved first.
    /// `Unsupported` for AF_HYPERV, programs and files, and for families that this system doesn't
    /// carry; what the kernel says otherwise.
    pub fn connect(address: &Address) -> Result<Stream> {
        let fail = |kind, why: &str| {
            let cause = io::Error::new(kind, why.to_owned());
            Err(Error::new(Operation::Connect, address, cause))
        };
        if Waiter::of(address) == Waiter::Thread {
            return fail(io::ErrorKind::Unsupported, NO_POLLER);
        }
        let endpoint = match Target::of(address) {
            Target::Endpoint(endpoint) => endpoint,
            Target::Name { .. } => {
                return fail(io::ErrorKind::InvalidInput, "a name is not resolved here");
            }
            #[cfg(unix)]
            Target::OnThread => {
                let why = "a program or a file is not dialled without blocking: use hvsock::Stream";
                return fail(io::ErrorKind::Unsupported, why);
            }
            Target::NotCarried => return Err(not_carried(Operation::Connect, address)),
        };
        let inner = nonblocking::Stream::connect(&endpoint, CONNECT_TIMEOUT)
            .map_err(|e| explain(address, e))?;
        Ok(Stream {
            inner,
            address: address.clone(),
            connecting: !endpoint.connects_at_once(),
            handshake: endpoint.handshake(),
        })
    }

    /// Returns whether it is connected, the handshake of vsock-mux included. Ask after each event
    /// until it is; until then reads and writes fail with `WouldBlock`. What a listener accepted is
    /// connected.
    ///
    /// # Errors
    /// Why it can't be connected: as those of [`crate::Stream::connect_timeout`]. hyperkit doesn't
    /// say whether the guest has accepted: see there.
    pub fn is_connected(&mut self) -> Result<bool> {
        self.advance().map_err(|e| explain(&self.address, e))
    }

    fn advance(&mut self) -> io::Result<bool> {
        if self.connecting {
            if !self.inner.connected()? {
                return Ok(false);
            }
            self.connecting = false;
        }
        if let Some(handshake) = &mut self.handshake {
            if !handshake.advance(&mut self.inner)? {
                return Ok(false);
            }
            self.handshake = None;
        }
        Ok(true)
    }

    fn ready(&self) -> io::Result<()> {
        match self.connecting || self.handshake.is_some() {
            true => Err(io::ErrorKind::WouldBlock.into()),
            false => Ok(()),
        }
    }

    /// Returns the address that was dialled, or that of the listener that accepted it.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Returns the name of this end, as far as its family has one.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn local_addr(&self) -> io::Result<SocketName> {
        self.inner.local_addr()
    }

    /// Returns the name of the other end, as far as its family has one.
    ///
    /// # Errors
    /// What the kernel says: that there is no connection yet, or none any more, for example. As
    /// [`crate::Stream::peer_addr`] says, macOS gives no name once both directions have ended.
    pub fn peer_addr(&self) -> io::Result<SocketName> {
        self.inner.peer_addr()
    }

    /// Shuts one direction down, or both. After `Shutdown::Write`, a half-close, the peer reads EOF
    /// behind the last byte, and its answer can still be read. After `Shutdown::Read` nothing more
    /// is taken from the peer.
    ///
    /// # Errors
    /// What the kernel says of a half-close.
    pub fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        if how != Shutdown::Write {
            self.inner.shutdown_read();
        }
        match how {
            Shutdown::Read => Ok(()),
            _ => self.inner.shutdown_write(),
        }
    }
}

const NO_POLLER: &str =
    "no poller can wait for AF_HYPERV or for frames: use the blocking sockets, or framing::Framed";

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.ready()?;
        Socket::read(&mut self.inner, buffer)
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.ready()?;
        Socket::write(&mut self.inner, bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(unix)]
impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

#[cfg(unix)]
impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl Source for Stream {
    fn register(&mut self, registry: &Registry, token: Token, what: Interest) -> io::Result<()> {
        self.inner.register(registry, token, what)
    }

    fn reregister(&mut self, registry: &Registry, token: Token, what: Interest) -> io::Result<()> {
        self.inner.reregister(registry, token, what)
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        self.inner.deregister(registry)
    }
}

/// A listening socket of any family but AF_HYPERV. Dropping it removes the socket's file, if that
/// is still its own.
#[derive(Debug)]
pub struct Listener {
    inner: listener::Listener,
    address: Address,
}

impl Listener {
    /// Listens on `address`; a Unix socket is its owner's alone.
    ///
    /// # Errors
    /// As those of [`crate::Listener::bind_with_mode`]; `Unsupported` also for AF_HYPERV.
    pub fn bind(address: &Address) -> Result<Listener> {
        if Waiter::of(address) == Waiter::Thread {
            let cause = io::Error::new(io::ErrorKind::Unsupported, NO_POLLER);
            return Err(Error::new(Operation::Listen, address, cause));
        }
        let inner = listener::Listener::bind(address, DEFAULT_MODE.into())?;
        let address = inner.bound(address);
        Ok(Listener { inner, address })
    }

    /// Returns the address that it listens on, with the port that the kernel chose if it was to
    /// choose one.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Returns the name of the socket, as far as its family has one, with the port that the kernel
    /// chose.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn local_addr(&self) -> io::Result<SocketName> {
        self.inner.local_addr()
    }

    /// Accepts a connection that has come, and returns its peer's name.
    ///
    /// # Errors
    /// `WouldBlock` if none is; what the kernel says otherwise. An error that concerns one client,
    /// or descriptors, doesn't end the listener.
    pub fn accept(&self) -> io::Result<(Stream, SocketName)> {
        let (inner, name) = self.inner.accept()?;
        let stream = Stream {
            inner,
            address: self.address.clone(),
            connecting: false,
            handshake: None,
        };
        Ok((stream, name))
    }
}

#[cfg(unix)]
impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        AsSocket::as_socket(&self.inner)
    }
}

#[cfg(unix)]
impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl Source for Listener {
    fn register(&mut self, registry: &Registry, token: Token, _: Interest) -> io::Result<()> {
        self.inner.watch(registry, token, || {})
    }

    fn reregister(&mut self, registry: &Registry, token: Token, what: Interest) -> io::Result<()> {
        self.deregister(registry)?;
        self.register(registry, token, what)
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        self.inner.unwatch(registry)
    }
}
