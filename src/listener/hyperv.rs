//! Listening on a Hyper-V service.

use std::io;
use std::time::Duration;

use super::defaults::BACKLOG;
use crate::address::{Address, HvsockAddress};
use crate::dial::{self, hv_options, vm_id};
use crate::error::{Error, Operation, Result};
use crate::name::SocketName;
use crate::stream::Stream;
use crate::sys::{self, Acceptor};

#[derive(Debug)]
pub(crate) struct HypervListener {
    acceptor: Acceptor,
    address: Address,
}

impl HypervListener {
    pub(super) fn bind(address: &Address, hvsock: &HvsockAddress) -> Result<HypervListener> {
        let vm = vm_id(hvsock)?;
        let acceptor = sys::hv_listen(vm, hvsock.service.0, BACKLOG, hv_options(hvsock))
            .map_err(|e| explain(address, e))?;
        Ok(HypervListener::new(acceptor, address.clone()))
    }

    pub(crate) fn new(acceptor: Acceptor, address: Address) -> HypervListener {
        HypervListener { acceptor, address }
    }

    pub(super) fn accept(&self) -> io::Result<(Stream, SocketName)> {
        let socket = self.acceptor.accept()?;
        let peer = socket.peer_addr();
        let peer = peer.map_or(SocketName::Unnamed, |peer| SocketName::of(&peer));
        Ok((Stream::from_connected(socket, &self.address), peer))
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketName> {
        self.acceptor.local_addr().map(|name| SocketName::of(&name))
    }

    pub(super) fn wait(&self, timeout: Duration) -> io::Result<()> {
        self.acceptor.wait(timeout)
    }

    pub(super) fn watch(&mut self, notify: impl Fn() + Send + 'static) -> io::Result<()> {
        self.acceptor.watch(notify)
    }
}

fn explain(address: &Address, cause: io::Error) -> Error {
    let remedy = match cause.kind() {
        io::ErrorKind::AddrInUse => "another program listens on that service: choose another one",
        io::ErrorKind::PermissionDenied => {
            "the service must be registered, or you must be an administrator"
        }
        io::ErrorKind::AddrNotAvailable => {
            "no VM has that id now: start it first, or listen to all with hvsock:///SERVICE or hvsock://children/SERVICE"
        }
        _ => return dial::explain_hvsock(Operation::Listen, address, cause),
    };
    Error::new(Operation::Listen, address, cause).with_remedy(remedy)
}
