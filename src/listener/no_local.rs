//! Where there are no Unix sockets in mio, and no AF_VSOCK: nothing to listen on.

use std::io;

use mio::event::Source;

use super::Peer;
use super::nonblocking::{FileState, not_carried};
use crate::address::{Address, Port};
use crate::error::{Operation, Result};
use crate::stream::local::Local;
use crate::sys::{AsSocket, BorrowedSocket};

/// A listener that there can't be.
#[derive(Debug)]
pub(crate) enum LocalListener {}

impl LocalListener {
    pub(super) fn bind(address: &Address, _: u32) -> Result<LocalListener> {
        Err(not_carried(Operation::Listen, address))
    }

    pub(super) fn accept(&self) -> io::Result<(Local, Peer)> {
        match *self {}
    }

    pub(super) fn vsock_port(&self) -> Option<Port> {
        match *self {}
    }

    pub(super) fn file_state(&self) -> FileState {
        match *self {}
    }

    pub(super) fn with_source<T>(&mut self, _: impl FnOnce(&mut dyn Source) -> T) -> T {
        match *self {}
    }
}

impl AsSocket for LocalListener {
    fn as_socket(&self) -> BorrowedSocket<'_> {
        match *self {}
    }
}
