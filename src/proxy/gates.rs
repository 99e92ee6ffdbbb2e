//! The gates of the VMs that a proxy leads to, or whose guests dial it: one a VM, and its limits.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::address::{Address, AnyVm, HyperkitVm, VsockAddress};
use crate::engine::admission::{Gate, GateLimits};
use crate::engine::rule::{Limits, VmLimits};
use crate::lock::lock;
use crate::name::SocketName;

/// The gates, which rules and workers share.
#[derive(Debug)]
pub(super) struct Gates {
    /// The gates, by what identifies a VM. The workers take this lock as well: nothing that may
    /// block is done while it is held.
    all: Mutex<HashMap<AnyVm, Arc<Gate>>>,
    limits: Limits,
}

impl Gates {
    pub(super) fn new(limits: Limits) -> Gates {
        Gates {
            all: Mutex::default(),
            limits,
        }
    }

    /// Returns the gate of a VM. This may look at its files.
    pub(super) fn of(&self, vm: &AnyVm) -> Arc<Gate> {
        self.insert(canonical(vm), vm)
    }

    /// Returns the gate of the VM whose guest a client is, if its name says so: a listener on a
    /// vsock port may have those of several VMs.
    pub(super) fn of_guest(&self, client: &SocketName) -> Option<Arc<Gate>> {
        let SocketName::Vsock(client) = client else {
            return None;
        };
        let vm = Address::from(VsockAddress::new(client.cid, client.port)).vm()?;
        Some(self.insert(vm.clone(), &vm))
    }

    fn insert(&self, identity: AnyVm, vm: &AnyVm) -> Arc<Gate> {
        let new = || {
            let limits = self.limits_of(&VmLimits::new(vm.clone()));
            Arc::new(Gate::new(limits, vm.clone()))
        };
        Arc::clone(lock(&self.all).entry(identity).or_insert_with(new))
    }

    /// Sets the limits of a VM.
    pub(super) fn set_limits(&self, limits: &VmLimits) {
        self.of(&limits.vm).set_limits(self.limits_of(limits));
    }

    /// Returns all of them.
    #[cfg(all(unix, feature = "cli"))]
    pub(super) fn all(&self) -> HashMap<AnyVm, Arc<Gate>> {
        lock(&self.all).clone()
    }

    /// Returns the caps that a VM's limits mean.
    fn limits_of(&self, limits: &VmLimits) -> GateLimits {
        let (all, none) = (&self.limits, GateLimits::UNLIMITED);
        match limits.vm.traits().needs_pacing {
            true => GateLimits {
                live: limits.connections.unwrap_or(all.vm_connections),
                unanswered: limits.unanswered.unwrap_or(all.vm_unanswered) as u64,
            },
            false => GateLimits {
                live: limits
                    .connections
                    .or(all.other_vm_connections)
                    .unwrap_or(none.live),
                ..none
            },
        }
    }
}

/// Returns what identifies a VM. One VM has one gate, however its path is spelled, and whether it
/// exists yet or not.
fn canonical(vm: &AnyVm) -> AnyVm {
    match vm {
        AnyVm::Hyperkit(vm) => {
            let mut same = HyperkitVm::new(canonical_path(&vm.state_dir));
            same.connect.clone_from(&vm.connect);
            AnyVm::Hyperkit(same)
        }
        AnyVm::VsockMux(path) => AnyVm::VsockMux(canonical_path(path)),
        AnyVm::Vsock(_) | AnyVm::Hvsock(_) => vm.clone(),
    }
}

fn canonical_path(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let real = path.ancestors().find_map(|there| {
        let missing = path.strip_prefix(there).ok()?;
        let real = there.canonicalize().ok()?;
        // Joined with nothing it would end in a slash.
        Some(match missing.as_os_str().is_empty() {
            true => real,
            false => real.join(missing),
        })
    });
    real.unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Port;
    use crate::name::VsockName;

    #[test]
    fn a_guest_is_known_by_its_cid() {
        let gates = Gates::new(Limits::default());
        let of = |cid| {
            let port = Port(5000);
            gates.of_guest(&SocketName::Vsock(VsockName { cid, port }))
        };
        let its = gates.of(&AnyVm::Vsock(3));
        assert!(of(3).is_some_and(|gate| Arc::ptr_eq(&gate, &its)));
        assert!(of(4).is_some_and(|gate| !Arc::ptr_eq(&gate, &its)));
        // The host is no VM.
        assert!(of(2).is_none());
        assert!(gates.of_guest(&SocketName::Unnamed).is_none());
    }
}
