//! A Unix socket before it is connected.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use socket2::{Domain, SockRef, Socket, Type};

use super::{make_room, refuse_descriptors};

/// A stream socket that doesn't block, with the options that it is to have before it has a peer.
#[derive(Debug)]
pub(crate) struct Unconnected {
    pub(crate) socket: Socket,
    /// Whether the kernel refuses descriptors that its peer passes.
    pub(crate) refuses_descriptors: bool,
}

impl Unconnected {
    /// Makes one.
    ///
    /// # Errors
    /// Returns what the kernel says, such as that there is no descriptor left.
    pub(crate) fn new() -> io::Result<Unconnected> {
        // On Linux that spares two calls.
        #[cfg(target_os = "linux")]
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
        #[cfg(not(target_os = "linux"))]
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        #[cfg(not(target_os = "linux"))]
        socket.set_nonblocking(true)?;
        make_room(&SockRef::from(&socket));
        let refuses_descriptors = refuse_descriptors(&socket);
        Ok(Unconnected {
            socket,
            refuses_descriptors,
        })
    }
}

impl AsFd for Unconnected {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
