//! Where there are no Unix sockets in mio, and no AF_VSOCK: nothing to connect to.

use std::io::{self, Read, Write};
use std::net::Shutdown;

use mio::event::Source;

use crate::sys::{AsSocket, BorrowedSocket, OwnedSocket};

use super::nonblocking::Endpoint;

/// A socket that there can't be.
#[derive(Debug)]
pub(crate) enum Local {}

impl Local {
    pub(super) fn connect(_: &Endpoint) -> io::Result<Local> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(super) fn connected(&self) -> io::Result<bool> {
        match *self {}
    }

    pub(super) fn shutdown(&self, _: Shutdown) -> io::Result<()> {
        match *self {}
    }

    pub(super) fn source(&mut self) -> &mut dyn Source {
        match *self {}
    }
}

impl Read for Local {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        match *self {}
    }
}

impl Write for Local {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        match *self {}
    }

    fn flush(&mut self) -> io::Result<()> {
        match *self {}
    }
}

impl From<Local> for OwnedSocket {
    fn from(local: Local) -> OwnedSocket {
        match local {}
    }
}

impl AsSocket for Local {
    fn as_socket(&self) -> BorrowedSocket<'_> {
        match *self {}
    }
}
