//! Unix sockets, those of VMMs among them, and AF_VSOCK sockets, for an event loop.

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use mio::event::Source;
use socket2::{SockAddr, SockRef, Socket};

use crate::address::hyperkit::connect_line;
use crate::address::{HyperkitAddress, UnixAddress};
use crate::keeper::{Kept, Link, When};
use crate::name::PeerProcess;
use crate::sys::{self, Unconnected};

use super::closer;
use super::endpoint::{Endpoint, is_connected};

/// Whether descriptors may come with the bytes of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PassedDescriptors {
    /// The kernel has refused them since the socket was connected, or its family has none.
    Refused,
    MayCome,
    HaveCome,
}

impl PassedDescriptors {
    /// Returns what follows from the result of [`sys::refuse_descriptors`] or
    /// [`sys::refuses_descriptors`].
    pub(crate) fn refused(refused: bool) -> PassedDescriptors {
        match refused {
            true => PassedDescriptors::Refused,
            false => PassedDescriptors::MayCome,
        }
    }
}

/// A connected socket, or one whose connect is in progress.
#[derive(Debug)]
pub(crate) struct Local {
    /// The note that a keeper has a copy of it. It is the first field, and so dropped before the
    /// socket is closed.
    kept: Option<Kept>,
    /// mio has no name for an AF_VSOCK socket, but its Unix stream carries any stream socket.
    stream: mio::net::UnixStream,
    /// Whether it is an AF_VSOCK socket, whose connect may take a while.
    is_vsock: bool,
    /// The process that made the other end of a Unix socket, as far as the system tells. macOS
    /// doesn't once that has closed.
    peer: Option<PeerProcess>,
    descriptors: PassedDescriptors,
    /// Whether its EOF was read.
    has_ended: bool,
    is_half_closed: bool,
    /// Whether the last read ended where descriptors were passed: more may follow, and no event
    /// comes for it.
    #[cfg(target_os = "linux")]
    stopped: bool,
}

impl Local {
    /// Connects. `patience` is for AF_VSOCK: see [`sys::vsock_connect`].
    pub(super) fn connect(endpoint: &Endpoint, patience: Duration) -> io::Result<Local> {
        match endpoint {
            Endpoint::Unix(address) => connect_unix(address),
            Endpoint::Hyperkit(address) => connect_hyperkit(address, None),
            Endpoint::VsockMux(address) => connect_path(&address.path, None),
            Endpoint::Vsock(address) => {
                let (cid, port, buffer_size) = (address.cid, address.port.0, address.buffer_size);
                sys::vsock_connect(cid, port, buffer_size, patience).map(Local::from_vsock)
            }
            Endpoint::Tcp(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Connects to a hyperkit VM. A keeper, if there is one, keeps the connection from before it
    /// is made: when this process is killed, nothing is closed that the device has just accepted.
    pub(super) fn connect_kept(
        address: &HyperkitAddress,
        keeper: Option<&Link>,
    ) -> io::Result<Local> {
        connect_hyperkit(address, keeper)
    }

    /// Makes a stream of a non-blocking AF_VSOCK socket.
    pub(crate) fn from_vsock(socket: Socket) -> Local {
        let stream = std::os::unix::net::UnixStream::from(OwnedFd::from(socket));
        Local {
            kept: None,
            stream: mio::net::UnixStream::from_std(stream),
            is_vsock: true,
            peer: None,
            descriptors: PassedDescriptors::Refused,
            has_ended: false,
            is_half_closed: false,
            #[cfg(target_os = "linux")]
            stopped: false,
        }
    }

    /// Makes a stream of a Unix socket that has just been connected or accepted.
    pub(crate) fn from_unix(stream: mio::net::UnixStream, descriptors: PassedDescriptors) -> Local {
        let peer = sys::connector(stream.as_fd()).ok();
        Local {
            kept: None,
            stream,
            is_vsock: false,
            peer: peer.map(|peer| PeerProcess {
                // A process of another PID namespace has the number 0.
                id: peer.process.filter(|process| *process > 0),
                user: peer.user,
            }),
            descriptors,
            has_ended: false,
            is_half_closed: false,
            #[cfg(target_os = "linux")]
            stopped: false,
        }
    }

    /// Has a keeper keep a copy of it, until it is closed.
    pub(super) fn keep(&mut self, keeper: &Link) {
        self.kept = keeper.keep_connection(self.stream.as_fd());
    }

    /// Returns whether a keeper has a copy of it.
    pub(super) fn is_guarded(&self) -> bool {
        self.kept.as_ref().is_some_and(Kept::is_guarded)
    }

    /// Returns whether it was given to a keeper.
    pub(super) fn is_kept(&self) -> bool {
        self.kept.is_some()
    }

    /// Ends both directions, for a close doesn't while a keeper has a copy, and has the keeper
    /// close that.
    pub(super) fn end_kept(&mut self) {
        let Some(kept) = self.kept.take() else {
            return;
        };
        let socket = SockRef::from(&self.stream);
        let is_at_its_end = || match socket.peek(&mut [MaybeUninit::uninit()]) {
            Ok(bytes) => bytes == 0,
            Err(e) => e.kind() != io::ErrorKind::WouldBlock,
        };
        // The directions are shut down one after the other: a call for both fails on macOS if one
        // has ended.
        if !self.is_half_closed {
            let _ = socket.shutdown(Shutdown::Write);
        }
        let when = match self.has_ended || is_at_its_end() {
            true => When::Later,
            false => {
                let _ = socket.shutdown(Shutdown::Read);
                // On macOS the shutdown alone doesn't keep the peer from writing.
                When::Now
            }
        };
        kept.release(when);
    }

    /// Leaves it to the keeper, which ends it when this process has ended.
    pub(super) fn leave(mut self) {
        if let Some(kept) = self.kept.take() {
            kept.leave();
        }
    }

    /// Closes it; on another thread if it may hold unread descriptors, which are closed with it.
    pub(super) fn close(self) {
        let unread = || {
            let peeked = SockRef::from(&self.stream).peek(&mut [MaybeUninit::uninit()]);
            matches!(peeked, Ok(1..))
        };
        match self.descriptors {
            PassedDescriptors::HaveCome => closer::close(self),
            PassedDescriptors::MayCome if unread() => closer::close(self),
            _ => {}
        }
    }

    /// Returns whether a short read means that no more has come. AF_VSOCK is not known to keep
    /// that.
    #[cfg(target_os = "linux")]
    pub(super) fn short_read_blocks(&self) -> bool {
        !self.is_vsock && !self.stopped
    }

    pub(super) fn connected(&self) -> io::Result<bool> {
        match self.is_vsock {
            true => is_connected(SockRef::from(&self.stream)),
            false => Ok(true),
        }
    }

    pub(super) fn peer_process(&self) -> Option<PeerProcess> {
        self.peer
    }

    pub(super) fn peer_name(&self) -> Option<Vec<u8>> {
        match self.is_vsock {
            true => None,
            false => sys::unix_name(&self.stream.peer_addr().ok()?),
        }
    }

    pub(super) fn half_close(&mut self) -> io::Result<()> {
        self.is_half_closed = true;
        self.stream.shutdown(Shutdown::Write)
    }

    pub(super) fn shutdown_read(&self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Read)
    }

    /// Returns whether what it receives can go through a pipe. A splice would close the descriptors
    /// that came with it.
    #[cfg(target_os = "linux")]
    pub(super) fn can_splice_in(&self) -> bool {
        self.has_splice() && self.descriptors == PassedDescriptors::Refused
    }

    /// Returns whether bytes can go through a pipe; AF_VSOCK's kernel code has no splice.
    #[cfg(target_os = "linux")]
    pub(super) fn has_splice(&self) -> bool {
        !self.is_vsock
    }

    /// Makes a call through mio's `try_io`.
    #[cfg(target_os = "linux")]
    pub(super) fn try_io<T>(&self, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.stream.try_io(call)
    }

    pub(super) fn source(&mut self) -> &mut dyn Source {
        &mut self.stream
    }
}

impl Read for Local {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.descriptors == PassedDescriptors::Refused {
            let read = self.stream.read(buffer)?;
            self.has_ended |= read == 0 && !buffer.is_empty();
            return Ok(read);
        }
        let receive = || sys::receive(self.stream.as_fd(), buffer);
        let received = self.stream.try_io(receive)?;
        if received.stopped {
            self.descriptors = PassedDescriptors::HaveCome;
        }
        closer::close_passed(received.descriptors)?;
        #[cfg(target_os = "linux")]
        {
            self.stopped = received.stopped;
        }
        Ok(received.bytes)
    }
}

impl Write for Local {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl From<Local> for OwnedFd {
    fn from(local: Local) -> OwnedFd {
        local.stream.into()
    }
}

impl AsFd for Local {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn connect_path(path: &Path, keeper: Option<&Link>) -> io::Result<Local> {
    let connected = sys::with_short_path(path, |short| connect_to(&SockAddr::unix(short)?, keeper));
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

fn connect_unix(address: &UnixAddress) -> io::Result<Local> {
    match address {
        UnixAddress::Path(path) => connect_path(path, None),
        UnixAddress::Abstract(name) => connect_to(&sys::abstract_address(name)?, None),
    }
}

fn connect_to(address: &SockAddr, keeper: Option<&Link>) -> io::Result<Local> {
    let (unconnected, kept) = match keeper {
        Some(keeper) => keeper.keep_unconnected()?,
        None => (Unconnected::new()?, None),
    };
    let Unconnected {
        socket,
        refuses_descriptors,
    } = unconnected;
    socket.connect(address)?;
    let stream = mio::net::UnixStream::from_std(socket.into());
    let mut stream = Local::from_unix(stream, PassedDescriptors::refused(refuses_descriptors));
    stream.kept = kept;
    Ok(stream)
}

/// Connects to the `connect` socket and asks for the port, or, where there is no such socket, to
/// the one that hyperkit's `guest_forwards=` made for the port.
fn connect_hyperkit(address: &HyperkitAddress, keeper: Option<&Link>) -> io::Result<Local> {
    let vm = &address.vm;
    let connected = connect_path(&vm.connect_path(), keeper);
    let mut stream = match connected {
        Ok(stream) => stream,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let forward = vm.forward_path(address.port);
            return match connect_path(&forward, keeper) {
                Err(second) if second.kind() == io::ErrorKind::NotFound => Err(e),
                other => other,
            };
        }
        Err(e) => return Err(e),
    };
    let line = connect_line(vm.cid, address.port.0);
    match stream.write(&line) {
        Ok(n) if n == line.len() => Ok(stream),
        // The rest of the line would come too late: hyperkit has read the first part, and closed.
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
