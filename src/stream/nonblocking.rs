//! Connected sockets for an event loop.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use mio::event::Source;
use mio::{Interest, Registry, Token};
use socket2::{SockRef, TcpKeepalive};

use super::blocking;
use super::endpoint::{Endpoint, is_connected};
#[cfg(windows)]
use super::inner::Inner;
use super::local::Local;
use super::socket::Socket;
use crate::address::Address;
#[cfg(unix)]
use crate::keeper::Link;
use crate::name::{PeerProcess, SocketName};
use crate::sys::{self, AsSocket};

/// How often TCP probes a silent peer, and how many probes without an answer end the connection: it
/// ends after a minute of them, with the default keepalive of a minute two minutes after the last
/// byte.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 6;

/// A connected stream, or one whose connect is in progress.
#[derive(Debug)]
pub(crate) enum Stream {
    Tcp(mio::net::TcpStream),
    Local(Local),
    /// A stream whose calls block: no poller can wait for it, and no loop may read or write it.
    Blocking(blocking::Stream),
}

impl Stream {
    /// Begins to connect, without blocking. [`Stream::connected`] says when it is done.
    ///
    /// To hyperkit the line that names the port is written before this returns: between connect and
    /// line the device stands still for everybody.
    ///
    /// The caller waits for `patience` at most. Linux gives up an AF_VSOCK connect a second later,
    /// and keeps its socket until then, whatever has become of it.
    ///
    /// # Errors
    /// Returns `WouldBlock` when a Unix listener's backlog is full: try again later. Otherwise what
    /// the kernel says.
    pub(crate) fn connect(endpoint: &Endpoint, patience: Duration) -> io::Result<Stream> {
        let stream = match endpoint {
            Endpoint::Tcp(address) => Stream::Tcp(mio::net::TcpStream::connect(*address)?),
            other => Stream::Local(Local::connect(other, patience)?),
        };
        stream.set_options();
        Ok(stream)
    }

    /// Connects, and has a keeper keep a copy of it if it leads to a hyperkit VM, from before it is
    /// connected.
    ///
    /// # Errors
    /// Returns the errors of [`connect`](Stream::connect).
    #[cfg(unix)]
    pub(crate) fn connect_kept(
        endpoint: &Endpoint,
        patience: Duration,
        keeper: Option<&Link>,
    ) -> io::Result<Stream> {
        match endpoint {
            Endpoint::Hyperkit(address) => {
                let stream = Stream::Local(Local::connect_kept(address, keeper)?);
                stream.set_options();
                Ok(stream)
            }
            _ => Stream::connect(endpoint, patience),
        }
    }

    /// Returns whether the connect that was begun is done. Ask after an event said that the stream
    /// is writable.
    ///
    /// # Errors
    /// Returns why it failed.
    pub(crate) fn connected(&self) -> io::Result<bool> {
        match self {
            Stream::Tcp(stream) => is_connected(SockRef::from(stream)),
            Stream::Local(stream) => stream.connected(),
            Stream::Blocking(_) => Ok(true),
        }
    }

    /// Sets the options that every stream has: see [`set_tcp_options`].
    pub(crate) fn set_options(&self) {
        // This is for programs that don't ignore SIGPIPE. Accepted sockets don't inherit the option
        // on macOS.
        #[cfg(target_vendor = "apple")]
        let _ = match self {
            Stream::Tcp(stream) => SockRef::from(stream).set_nosigpipe(true),
            Stream::Local(stream) => SockRef::from(&stream.as_socket()).set_nosigpipe(true),
            Stream::Blocking(_) => Ok(()),
        };
        if let Stream::Tcp(stream) = self {
            set_tcp_options(SockRef::from(stream));
        }
    }

    /// Has a keeper keep a copy of it, until it is closed.
    #[cfg(unix)]
    pub(crate) fn keep(&mut self, keeper: &Link) {
        if let Stream::Local(stream) = self {
            stream.keep(keeper);
        }
    }

    /// Returns whether it was given to a keeper.
    #[cfg(unix)]
    pub(crate) fn is_kept(&self) -> bool {
        matches!(self, Stream::Local(stream) if stream.is_kept())
    }

    /// Ends both directions of one that was given to a keeper, which is to be closed.
    #[cfg(unix)]
    pub(crate) fn end_kept(&mut self) {
        if let Stream::Local(stream) = self {
            stream.end_kept();
        }
    }

    /// Returns whether a keeper has a copy of it.
    pub(crate) fn is_guarded(&self) -> bool {
        match self {
            #[cfg(unix)]
            Stream::Local(stream) => stream.is_guarded(),
            _ => false,
        }
    }

    /// Leaves it to the keeper, which ends it when this process has ended.
    #[cfg(unix)]
    pub(crate) fn leave(self) {
        if let Stream::Local(stream) = self {
            stream.leave();
        }
    }

    /// Has TCP ask a peer that has been silent for `time` whether it is still there; `None`: it
    /// asks none.
    pub(crate) fn set_keepalive(&self, time: Option<Duration>) {
        let Stream::Tcp(stream) = self else {
            return;
        };
        let socket = SockRef::from(stream);
        // Setting it fails only on a connection that has ended, which the next read reports.
        let _ = match time {
            None => socket.set_keepalive(false),
            Some(time) => socket.set_tcp_keepalive(
                &TcpKeepalive::new()
                    .with_time(time.max(Duration::from_secs(1)))
                    .with_interval(KEEPALIVE_INTERVAL)
                    .with_retries(KEEPALIVE_RETRIES),
            ),
        };
    }

    /// Closes, without waiting for the close of descriptors that the peer has passed.
    pub(crate) fn close(self) {
        #[cfg(unix)]
        if let Stream::Local(stream) = self {
            stream.close();
        }
    }

    /// Closes so that the peer reads a reset and not an EOF, where the family can.
    pub(crate) fn reset(self) {
        match self {
            Stream::Tcp(stream) => {
                let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            }
            #[cfg(unix)]
            Stream::Local(stream) => stream.close(),
            #[cfg(windows)]
            Stream::Local(pipe) => pipe.reset(),
            Stream::Blocking(stream) => stream.abort(),
        }
    }

    /// Returns how many written bytes a [`reset`](Stream::reset) would discard before the peer has
    /// them.
    pub(crate) fn unacknowledged(&self) -> usize {
        match self {
            Stream::Tcp(stream) => sys::unacknowledged(stream),
            // What was written is in the peer's own queue, and AF_VSOCK has no reset.
            Stream::Local(_) => 0,
            Stream::Blocking(stream) => stream.unacknowledged(),
        }
    }

    /// Returns the name of the Unix listener that it was connected to.
    pub(crate) fn peer_name(&self) -> Option<Vec<u8>> {
        match self {
            #[cfg(unix)]
            Stream::Local(stream) => stream.peer_name(),
            _ => None,
        }
    }

    /// Returns whether this process may have made the other end of a Unix socket: it has, or the
    /// peer had gone before it could be asked (macOS).
    pub(crate) fn is_from_us(&self) -> bool {
        match self {
            #[cfg(unix)]
            Stream::Local(stream) => stream
                .peer_process()
                .and_then(|peer| peer.id)
                .is_none_or(|process| process == std::process::id()),
            _ => false,
        }
    }

    /// Returns the process that made the other end of a Unix socket, as far as the system tells.
    pub(crate) fn peer_process(&self) -> Option<PeerProcess> {
        match self {
            #[cfg(unix)]
            Stream::Local(stream) => stream.peer_process(),
            _ => None,
        }
    }

    /// Returns how many bytes have come that were not read yet, as far as the system tells.
    pub(crate) fn unread(&self) -> Option<u64> {
        match self {
            #[cfg(unix)]
            Stream::Tcp(stream) => sys::unread(stream),
            #[cfg(unix)]
            Stream::Local(stream) => sys::unread(&stream.as_socket()),
            _ => None,
        }
    }

    /// Returns the name of this end.
    pub(crate) fn local_addr(&self) -> io::Result<SocketName> {
        match self {
            Stream::Tcp(stream) => stream.local_addr().map(SocketName::Tcp),
            #[cfg(unix)]
            Stream::Local(stream) => {
                let name = SockRef::from(&stream.as_socket()).local_addr()?;
                Ok(SocketName::of(&name))
            }
            #[cfg(windows)]
            Stream::Local(_) => Ok(SocketName::Unnamed),
            Stream::Blocking(stream) => stream.local_addr(),
        }
    }

    /// Returns the name of the other end.
    pub(crate) fn peer_addr(&self) -> io::Result<SocketName> {
        match self {
            Stream::Tcp(stream) => stream.peer_addr().map(SocketName::Tcp),
            #[cfg(unix)]
            Stream::Local(stream) => {
                let name = SockRef::from(&stream.as_socket()).peer_addr()?;
                Ok(SocketName::of(&name))
            }
            #[cfg(windows)]
            Stream::Local(_) => Ok(SocketName::Unnamed),
            Stream::Blocking(stream) => stream.peer_addr(),
        }
    }

    /// Shuts the reading side down: on Linux the peer's next write fails, on macOS it goes nowhere.
    pub(crate) fn shutdown_read(&self) {
        let _ = match self {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Read),
            #[cfg(unix)]
            Stream::Local(stream) => stream.shutdown_read(),
            #[cfg(windows)]
            Stream::Local(stream) => stream.shutdown(Shutdown::Read),
            Stream::Blocking(stream) => stream.shutdown(Shutdown::Read),
        };
    }
}

impl Socket for Stream {
    type Pipe = sys::Pipe;

    const SHORT_WRITE_BLOCKS: bool = sys::KERNEL_EDGES;

    // macOS' kqueue doesn't report urgent data.
    #[cfg(target_os = "linux")]
    fn short_read_blocks(&self) -> bool {
        sys::KERNEL_EDGES
            && match self {
                Stream::Tcp(_) => true,
                Stream::Local(stream) => stream.short_read_blocks(),
                Stream::Blocking(_) => false,
            }
    }

    #[cfg(target_os = "linux")]
    fn has_splice(&self) -> bool {
        match self {
            Stream::Tcp(_) => true,
            Stream::Local(stream) => stream.has_splice(),
            Stream::Blocking(_) => false,
        }
    }

    #[cfg(target_os = "linux")]
    fn can_splice_in(&self) -> bool {
        match self {
            Stream::Local(stream) => stream.can_splice_in(),
            other => other.has_splice(),
        }
    }

    fn cost_class(&self) -> usize {
        match self {
            Stream::Tcp(_) => 0,
            Stream::Local(_) | Stream::Blocking(_) => 1,
        }
    }

    fn clock(&self) -> Instant {
        Instant::now()
    }

    #[cfg(target_os = "linux")]
    fn splice_in(&mut self, pipe: &mut sys::Pipe) -> io::Result<usize> {
        self.try_io(|socket| pipe.fill(socket))
    }

    #[cfg(target_os = "linux")]
    fn splice_out(&mut self, pipe: &mut sys::Pipe, len: usize) -> io::Result<usize> {
        self.try_io(|socket| pipe.empty(socket, len))
    }

    #[cfg(not(target_os = "linux"))]
    fn splice_in(&mut self, pipe: &mut sys::Pipe) -> io::Result<usize> {
        match *pipe {}
    }

    #[cfg(not(target_os = "linux"))]
    fn splice_out(&mut self, pipe: &mut sys::Pipe, _: usize) -> io::Result<usize> {
        match *pipe {}
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.read(buffer),
            Stream::Local(stream) => stream.read(buffer),
            Stream::Blocking(stream) => stream.read(buffer),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.write(bytes),
            Stream::Local(stream) => stream.write(bytes),
            Stream::Blocking(stream) => stream.write(bytes),
        }
    }

    // A Unix socket's ioctl counts what its peer has not read (`unix_outq_len`). What the peer
    // leaves unread at its close is dropped, but the socket's error is set before.
    #[cfg(target_os = "linux")]
    fn peer_took_all(&self) -> bool {
        match self {
            Stream::Local(stream) if sys::AS_ON_LINUX => {
                stream.has_splice()
                    && sys::unacknowledged(&stream.as_socket()) == 0
                    && matches!(SockRef::from(&stream.as_socket()).take_error(), Ok(None))
            }
            _ => false,
        }
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Write),
            #[cfg(unix)]
            Stream::Local(stream) => stream.half_close(),
            #[cfg(windows)]
            Stream::Local(stream) => stream.shutdown(Shutdown::Write),
            Stream::Blocking(stream) => stream.shutdown(Shutdown::Write),
        }
    }

    #[cfg(windows)]
    fn has_half_close(&self) -> bool {
        match self {
            Stream::Tcp(_) => true,
            Stream::Local(pipe) => pipe.has_half_close(),
            Stream::Blocking(_) => true,
        }
    }

    #[cfg(windows)]
    fn is_settled(&self) -> bool {
        match self {
            Stream::Tcp(_) => false,
            Stream::Local(pipe) => pipe.is_settled(),
            Stream::Blocking(_) => false,
        }
    }
}

impl Stream {
    /// Makes a call that mio has no name for. mio's emulated edges come only after a `WouldBlock`
    /// that it has seen.
    #[cfg(target_os = "linux")]
    fn try_io<T>(
        &self,
        call: impl FnOnce(std::os::fd::BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        match self {
            Stream::Tcp(stream) => stream.try_io(|| call(stream.as_socket())),
            Stream::Local(stream) => stream.try_io(|| call(stream.as_socket())),
            Stream::Blocking(stream) => call(stream.as_socket()),
        }
    }

    /// Returns the source that a poller waits for; `None` for a blocking stream.
    fn source(&mut self) -> Option<&mut dyn Source> {
        match self {
            Stream::Tcp(stream) => Some(stream),
            Stream::Local(stream) => Some(stream.source()),
            Stream::Blocking(_) => None,
        }
    }
}

/// A blocking stream is no source: no event ever comes.
impl Source for Stream {
    fn register(&mut self, registry: &Registry, token: Token, what: Interest) -> io::Result<()> {
        self.source()
            .map_or(Ok(()), |source| source.register(registry, token, what))
    }

    fn reregister(&mut self, registry: &Registry, token: Token, what: Interest) -> io::Result<()> {
        self.source()
            .map_or(Ok(()), |source| source.reregister(registry, token, what))
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        self.source()
            .map_or(Ok(()), |source| source.deregister(registry))
    }
}

#[cfg(unix)]
impl std::os::fd::AsFd for Stream {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Stream::Tcp(stream) => stream.as_fd(),
            Stream::Local(stream) => stream.as_socket(),
            Stream::Blocking(stream) => stream.as_fd(),
        }
    }
}

#[cfg(unix)]
impl From<Stream> for sys::OwnedSocket {
    fn from(stream: Stream) -> sys::OwnedSocket {
        match stream {
            Stream::Tcp(stream) => stream.into(),
            Stream::Local(stream) => stream.into(),
            Stream::Blocking(stream) => stream.socket.into(),
        }
    }
}

impl Stream {
    /// Returns its socket, if it has one that can be waited for.
    pub(crate) fn socket(&self) -> Option<sys::BorrowedSocket<'_>> {
        match self {
            Stream::Tcp(stream) => Some(stream.as_socket()),
            #[cfg(unix)]
            Stream::Local(stream) => Some(stream.as_socket()),
            #[cfg(windows)]
            Stream::Local(_) => None,
            Stream::Blocking(_) => None,
        }
    }
}

/// Has small messages sent at once, for a relay has no reason to wait for more, and turns keepalive
/// on: a peer that vanished is noticed in the end (after two hours by default).
pub(crate) fn set_tcp_options(socket: SockRef<'_>) {
    // Setting them fails only on a connection that has ended, which the next read reports.
    let _ = socket.set_tcp_nodelay(true);
    let _ = socket.set_keepalive(true);
}

impl blocking::Stream {
    /// Makes a blocking stream of the event loop's.
    pub(crate) fn from_nonblocking(
        stream: Stream,
        address: &Address,
    ) -> io::Result<blocking::Stream> {
        if let Stream::Blocking(stream) = stream {
            return Ok(stream);
        }
        #[cfg(unix)]
        let socket = socket2::Socket::from(sys::OwnedSocket::from(stream));
        #[cfg(windows)]
        let socket = match stream {
            Stream::Tcp(stream) => Inner::Socket(sys::OwnedSocket::from(stream).into()),
            Stream::Local(pipe) => Inner::from_pipe(pipe.into_free())?,
            Stream::Blocking(stream) => stream.socket,
        };
        socket.set_nonblocking(false)?;
        Ok(blocking::Stream::new(socket, address.clone()))
    }
}
