//! Linux: AF_VSOCK.

use std::io;

use socket2::{Domain, SockAddr, Socket, Type};

/// Begins to connect a non-blocking AF_VSOCK socket.
pub(crate) fn vsock_connect(cid: u32, port: u32) -> io::Result<Socket> {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::vsock(cid, port)) {
        Err(e) if e.raw_os_error() != Some(nix::libc::EINPROGRESS) => Err(e),
        _ => Ok(socket),
    }
}

/// Binds a non-blocking AF_VSOCK socket and listens.
pub(crate) fn vsock_listen(cid: u32, port: u32, backlog: i32) -> io::Result<Socket> {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    socket.bind(&SockAddr::vsock(cid, port))?;
    socket.listen(backlog)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// The CID and the port of an AF_VSOCK address.
pub(crate) fn vsock_of(address: &SockAddr) -> Option<(u32, u32)> {
    address.as_vsock_address()
}
