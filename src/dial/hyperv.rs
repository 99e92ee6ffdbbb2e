//! Connects to a Hyper-V service on the caller's thread: the kernel keeps the time.

use std::io;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::explain;
use crate::address::{Address, HvsockAddress, Vm};
use crate::error::{Operation, Result};
use crate::hyperv::lookup;
use crate::stream::Stream;
use crate::stream::endpoint::not_carried;
use crate::sys::{self, HvOptions};
use crate::time::after;

/// Connects, one attempt after the other until `timeout`: a connect that came before its server's
/// listen may never notice it.
pub(super) fn connect(address: &Address, timeout: Duration) -> Result<Stream> {
    let Address::Hvsock(hvsock) = address else {
        return Err(not_carried(Operation::Connect, address));
    };
    let vm = vm_id(hvsock)?;
    let attempt = address.transport().connect_timeout.unwrap_or(timeout);
    let deadline = after(Instant::now(), timeout);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match sys::hv_connect(vm, hvsock.service.0, left.min(attempt), hv_options(hvsock)) {
            Ok(socket) => return Ok(Stream::from_connected(socket, address)),
            Err(e) if e.kind() == io::ErrorKind::TimedOut && left > attempt => {}
            Err(e) => return Err(explain(address, e)),
        }
    }
}

/// Checks that such sockets can be made, and that the address names a VM.
pub(super) fn check_supported(address: &Address, hvsock: &HvsockAddress) -> Result<()> {
    vm_id(hvsock)?;
    let made = sys::hv_socket(hv_options(hvsock));
    made.map(drop).map_err(|e| explain(address, e))
}

pub(crate) fn hv_options(hvsock: &HvsockAddress) -> HvOptions {
    HvOptions {
        connected_suspend: hvsock.connected_suspend,
        container_passthru: hvsock.container_passthru,
    }
}

/// Returns the id of the VM, which is looked up if it is named.
pub(crate) fn vm_id(hvsock: &HvsockAddress) -> Result<Uuid> {
    match &hvsock.vm {
        Vm::Id(id) => Ok(id.0),
        Vm::Name(name) => lookup::find(name).map(|id| id.0),
    }
}
