//! Sockets of one machine, for an event loop: Unix sockets, those of VMMs among them, and AF_VSOCK.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use mio::event::Source;
use socket2::SockRef;

use crate::address::{HyperkitAddress, UnixAddress};
use crate::hyperkit;
use crate::sys;

use super::nonblocking::{Endpoint, is_connected};

/// A connected socket, or one whose connect is in progress.
#[derive(Debug)]
pub(crate) struct Local {
    /// mio has no name for an AF_VSOCK socket, but its Unix stream carries any stream socket.
    stream: mio::net::UnixStream,
    /// The connect may take a while.
    is_vsock: bool,
    /// The last read ended where descriptors were passed: there may be more behind it, of which no event tells.
    #[cfg(target_os = "linux")]
    stopped: bool,
}

impl Local {
    pub(super) fn connect(endpoint: &Endpoint) -> io::Result<Local> {
        match endpoint {
            Endpoint::Unix(address) => connect_unix(address).map(Local::from),
            Endpoint::Hyperkit(address) => connect_hyperkit(address).map(Local::from),
            Endpoint::VsockMux(address) => connect_path(&address.path).map(Local::from),
            Endpoint::Vsock(address) => {
                sys::vsock_connect(address.cid, address.port.0, address.buffer_size)
                    .map(Local::from_vsock)
            }
            Endpoint::Tcp(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// A stream of a non-blocking AF_VSOCK socket.
    pub(crate) fn from_vsock(socket: socket2::Socket) -> Local {
        let stream = std::os::unix::net::UnixStream::from(OwnedFd::from(socket));
        Local {
            is_vsock: true,
            ..Local::from(mio::net::UnixStream::from_std(stream))
        }
    }

    /// See the relay's `Socket`. Not known of AF_VSOCK.
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

    pub(super) fn peer_name(&self) -> Option<Vec<u8>> {
        match self.is_vsock {
            true => None,
            false => sys::unix_name(&self.stream.peer_addr().ok()?),
        }
    }

    pub(super) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.stream.shutdown(how)
    }

    /// Whether its bytes can go through a pipe: not those of AF_VSOCK, whose kernel code has no splice.
    #[cfg(target_os = "linux")]
    pub(super) fn has_splice(&self) -> bool {
        !self.is_vsock
    }

    /// See mio's `try_io`.
    #[cfg(target_os = "linux")]
    pub(super) fn try_io<T>(&self, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.stream.try_io(call)
    }

    pub(super) fn source(&mut self) -> &mut dyn Source {
        &mut self.stream
    }
}

impl From<mio::net::UnixStream> for Local {
    fn from(stream: mio::net::UnixStream) -> Local {
        Local {
            stream,
            is_vsock: false,
            #[cfg(target_os = "linux")]
            stopped: false,
        }
    }
}

impl Read for Local {
    #[cfg(target_os = "linux")]
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let receive = || sys::receive(self.stream.as_fd(), buffer);
        let (n, stopped) = self.stream.try_io(receive)?;
        self.stopped = stopped;
        Ok(n)
    }

    #[cfg(not(target_os = "linux"))]
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer)
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
