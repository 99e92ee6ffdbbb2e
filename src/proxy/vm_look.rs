//! What can be learned of a VM from outside, without a connection that it would have to serve:
//! which one it is, and whether it runs. All but [`is_cid_gone`] may block on the file system.

use std::path::Path;
#[cfg(unix)]
use std::time::Duration;

#[cfg(unix)]
use crate::address::VsockAddress;
use crate::address::{AnyVm, HyperkitVm};
use crate::engine::health::{ProcessState, VmIdentity, VmLook};
use crate::hyperkit;
use crate::stream::endpoint::Endpoint;
#[cfg(unix)]
use crate::stream::nonblocking::Stream;
use crate::sys::{self, Identity};

/// A port on which hardly anybody listens, to find out whether there is a CID.
#[cfg(unix)]
const UNUSED_PORT: u32 = u32::MAX - 1;

/// Returns the identity of the VM whose socket an endpoint stands for, or `None` if there is none.
pub(super) fn identity_behind(endpoint: &Endpoint) -> Option<VmIdentity> {
    match endpoint {
        Endpoint::Hyperkit(to) => identity_of_hyperkit(&to.vm),
        Endpoint::VsockMux(to) => identity_of_socket(&to.path),
        _ => None,
    }
}

/// Returns the identity of the socket by which a VM is dialled, or `None` if there is none.
fn identity_of_socket(path: &Path) -> Option<VmIdentity> {
    Identity::of(path).ok().map(VmIdentity::Socket)
}

/// Returns the identity of a hyperkit VM, or `None` if there is none.
fn identity_of_hyperkit(vm: &HyperkitVm) -> Option<VmIdentity> {
    // A VM with `guest_forwards` alone has no `connect` socket.
    identity_of_socket(&vm.connect_path()).or_else(|| {
        let pid_file = Identity::of(&vm.pid_path());
        pid_file.ok().map(VmIdentity::PidFile)
    })
}

/// Looks at a VM from outside, without a connection to its socket. `process` is the one that had it
/// at the last dial.
pub(super) fn look_at(vm: &AnyVm, process: Option<i32>) -> VmLook {
    let mut look = match vm {
        AnyVm::Hyperkit(vm) => look_at_socket(&vm.connect_path(), || identity_of_hyperkit(vm)),
        AnyVm::VsockMux(path) => look_at_socket(path, || identity_of_socket(path)),
        other => VmLook {
            identity: identity_of_cid(other),
            ..VmLook::default()
        },
    };
    if let AnyVm::Hyperkit(vm) = vm {
        look.process = hyperkit::running_pid(&vm.state_dir);
    }
    let process = look.process.or(process.filter(|_| look.is_alive));
    look.process_state = match process.is_some_and(sys::process_is_stopped) {
        true => ProcessState::IsStopped,
        false => ProcessState::Runs,
    };
    look
}

/// Looks at the socket by which a VM is dialled. A VM that was killed leaves the file behind, so
/// the kernel is asked whether a process has the socket, which the VMM doesn't notice.
#[cfg(unix)]
fn look_at_socket(path: &Path, identity: impl FnOnce() -> Option<VmIdentity>) -> VmLook {
    let is_alive = sys::is_socket_alive(path);
    let identity = match is_alive {
        Ok(false) => None,
        // What can't be asked says nothing.
        Ok(true) | Err(_) => identity(),
    };
    VmLook {
        identity,
        is_alive: is_alive.unwrap_or(false),
        ..VmLook::default()
    }
}

#[cfg(not(unix))]
fn look_at_socket(_: &Path, identity: impl FnOnce() -> Option<VmIdentity>) -> VmLook {
    VmLook {
        identity: identity(),
        ..VmLook::default()
    }
}

/// Returns the identity of a VM that is reached by its CID, or `None` if there is none.
#[cfg(unix)]
fn identity_of_cid(vm: &AnyVm) -> Option<VmIdentity> {
    let AnyVm::Vsock(cid) = vm else {
        return None;
    };
    match is_cid_gone(*cid) {
        true => None,
        false => Some(VmIdentity::Cid),
    }
}

/// Returns whether no VM has this CID. It begins a connect, and doesn't wait.
#[cfg(unix)]
pub(super) fn is_cid_gone(cid: u32) -> bool {
    let port = VsockAddress::new(cid, UNUSED_PORT);
    // Else the connect was begun, and is refused later or not answered.
    let begun = Stream::connect(&Endpoint::Vsock(port), Duration::ZERO);
    begun.is_err_and(|e| sys::is_no_such_cid(&e))
}

#[cfg(not(unix))]
fn identity_of_cid(_: &AnyVm) -> Option<VmIdentity> {
    None
}
