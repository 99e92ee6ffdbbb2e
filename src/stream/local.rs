//! Sockets of one machine, for an event loop: Unix sockets, those of VMMs among them, and AF_VSOCK.

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use mio::event::Source;
use socket2::{Domain, SockAddr, SockRef, Socket, Type};

use crate::address::{HyperkitAddress, UnixAddress};
use crate::name::PeerProcess;
use crate::{hyperkit, sys};

use super::closer;
use super::endpoint::{Endpoint, is_connected};

/// Whether descriptors may come with the bytes of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Descriptors {
    /// The kernel has refused them since the socket was connected, or its family has none.
    Refused,
    MayCome,
    HaveCome,
}

impl Descriptors {
    /// Returns what follows from the result of [`sys::refuse_descriptors`] or
    /// [`sys::refuses_descriptors`].
    pub(crate) fn refused(refused: bool) -> Descriptors {
        match refused {
            true => Descriptors::Refused,
            false => Descriptors::MayCome,
        }
    }
}

/// A connected socket, or one whose connect is in progress.
#[derive(Debug)]
pub(crate) struct Local {
    /// mio has no name for an AF_VSOCK socket, but its Unix stream carries any stream socket.
    stream: mio::net::UnixStream,
    /// The connect may take a while.
    is_vsock: bool,
    /// The process that made the other end of a Unix socket, as far as the system tells. macOS
    /// doesn't once that has closed.
    peer: Option<PeerProcess>,
    descriptors: Descriptors,
    /// The last read ended where descriptors were passed: more may follow, and no event comes for
    /// it.
    #[cfg(target_os = "linux")]
    stopped: bool,
}

impl Local {
    pub(super) fn connect(endpoint: &Endpoint) -> io::Result<Local> {
        match endpoint {
            Endpoint::Unix(address) => connect_unix(address),
            Endpoint::Hyperkit(address) => connect_hyperkit(address),
            Endpoint::VsockMux(address) => connect_path(&address.path),
            Endpoint::Vsock(address) => {
                sys::vsock_connect(address.cid, address.port.0, address.buffer_size)
                    .map(Local::from_vsock)
            }
            Endpoint::Tcp(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Makes a stream of a non-blocking AF_VSOCK socket.
    pub(crate) fn from_vsock(socket: Socket) -> Local {
        let stream = std::os::unix::net::UnixStream::from(OwnedFd::from(socket));
        Local {
            stream: mio::net::UnixStream::from_std(stream),
            is_vsock: true,
            peer: None,
            descriptors: Descriptors::Refused,
            #[cfg(target_os = "linux")]
            stopped: false,
        }
    }

    /// Makes a stream of a Unix socket that has just been connected or accepted.
    pub(crate) fn from_unix(stream: mio::net::UnixStream, descriptors: Descriptors) -> Local {
        let peer = sys::connector(stream.as_fd()).ok();
        Local {
            stream,
            is_vsock: false,
            peer: peer.map(|peer| PeerProcess {
                // 0: of another PID namespace.
                id: peer.process.filter(|process| *process > 0),
                user: peer.user,
            }),
            descriptors,
            #[cfg(target_os = "linux")]
            stopped: false,
        }
    }

    /// Closes it; on another thread if it may hold unread descriptors, which are closed with it.
    pub(super) fn close(self) {
        let unread = || {
            let peeked = SockRef::from(&self.stream).peek(&mut [MaybeUninit::uninit()]);
            matches!(peeked, Ok(1..))
        };
        match self.descriptors {
            Descriptors::HaveCome => closer::close(self),
            Descriptors::MayCome if unread() => closer::close(self),
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

    pub(super) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.stream.shutdown(how)
    }

    /// Returns whether what it receives can go through a pipe. A splice would close the descriptors
    /// that came with it.
    #[cfg(target_os = "linux")]
    pub(super) fn can_splice_in(&self) -> bool {
        self.has_splice() && self.descriptors == Descriptors::Refused
    }

    /// Returns whether bytes can go through a pipe; AF_VSOCK's kernel code has no splice.
    #[cfg(target_os = "linux")]
    pub(super) fn has_splice(&self) -> bool {
        !self.is_vsock
    }

    /// Calls as mio's `try_io` does.
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
        if self.descriptors == Descriptors::Refused {
            return self.stream.read(buffer);
        }
        let receive = || sys::receive(self.stream.as_fd(), buffer);
        let received = self.stream.try_io(receive)?;
        if received.stopped {
            self.descriptors = Descriptors::HaveCome;
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

fn connect_path(path: &Path) -> io::Result<Local> {
    let connected = sys::with_short_path(path, |short| connect_to(&SockAddr::unix(short)?));
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
        UnixAddress::Path(path) => connect_path(path),
        UnixAddress::Abstract(name) => connect_to(&sys::abstract_address(name)?),
    }
}

fn connect_to(address: &SockAddr) -> io::Result<Local> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    sys::make_room(&SockRef::from(&socket));
    // Before it has a peer.
    let descriptors = Descriptors::refused(sys::refuse_descriptors(&socket));
    socket.connect(address)?;
    let stream = mio::net::UnixStream::from_std(socket.into());
    Ok(Local::from_unix(stream, descriptors))
}

/// Connects to the `connect` socket and asks for the port, or, where there is no such socket, to
/// the one that hyperkit's `guest_forwards=` made for the port.
fn connect_hyperkit(address: &HyperkitAddress) -> io::Result<Local> {
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
        // The rest would be too late: hyperkit has read what had come, and closed.
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
