//! The gates of the VMs that a proxy leads to, or whose guests dial it: one a VM, and its limits.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::address::{Address, AnyVm, HyperkitVm, VsockAddress};
use crate::engine::admission::{Gate, GateLimits};
use crate::engine::rule::{Limits, VmLimits};
use crate::lock::lock;
use crate::name::SocketName;

/// So many gates are kept, whether anything uses them or not.
const FEW: usize = 64;

/// The gates, which rules and workers share.
#[derive(Debug)]
pub(super) struct Gates {
    /// The workers take this lock, too: nothing that may block is done while it is held.
    all: Mutex<GateTable>,
    limits: Limits,
}

/// All gates, by what identifies a VM. Guests of any CID may dial a listener on a vsock port, so
/// what nothing uses is dropped: when there are twice as many as were left the last time. So there
/// are at most twice as many as are used, and one more costs the same however many there are.
#[derive(Debug)]
struct GateTable {
    gates: HashMap<AnyVm, GateEntry>,
    /// The number at which those are dropped that nothing uses.
    sweep_at: usize,
}

#[derive(Debug)]
struct GateEntry {
    gate: Arc<Gate>,
    /// Whether it has limits of its own.
    is_limited: bool,
}

impl GateEntry {
    /// Returns whether nothing would be lost with it: no forward, connection or client has it, and
    /// it knows nothing that a VMM suffers for.
    fn is_unused(&self) -> bool {
        let traits = self.gate.vm().traits();
        let is_harmed = traits.needs_pacing || traits.loses_slots;
        // With the lock nobody can get it from here meanwhile.
        !self.is_limited && !is_harmed && Arc::strong_count(&self.gate) == 1
    }
}

impl GateTable {
    fn insert(&mut self, identity: AnyVm, gate: Arc<Gate>) -> &mut GateEntry {
        if self.gates.len() >= self.sweep_at {
            self.gates.retain(|_, entry| !entry.is_unused());
            self.sweep_at = FEW.max(self.gates.len() * 2);
        }
        let is_limited = false;
        let entry = GateEntry { gate, is_limited };
        self.gates.entry(identity).or_insert(entry)
    }
}

impl Gates {
    pub(super) fn new(limits: Limits) -> Gates {
        let all = GateTable {
            gates: HashMap::new(),
            sweep_at: FEW,
        };
        Gates {
            all: Mutex::new(all),
            limits,
        }
    }

    /// Returns the gate of a VM. This may look at its files.
    pub(super) fn gate_of(&self, vm: &AnyVm) -> Arc<Gate> {
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
        let mut all = lock(&self.all);
        if let Some(entry) = all.gates.get(&identity) {
            return Arc::clone(&entry.gate);
        }
        let limits = self.limits_of(&VmLimits::new(vm.clone()));
        let gate = Arc::new(Gate::new(limits, vm.clone()));
        Arc::clone(&all.insert(identity, gate).gate)
    }

    /// Sets the limits of a VM.
    pub(super) fn set_limits(&self, limits: &VmLimits) {
        let identity = canonical(&limits.vm);
        let gate = self.insert(identity.clone(), &limits.vm);
        gate.set_limits(self.limits_of(limits));
        if let Some(entry) = lock(&self.all).gates.get_mut(&identity) {
            entry.is_limited = limits.connections.is_some() || limits.unanswered.is_some();
        }
    }

    /// Returns all of them.
    #[cfg(all(unix, feature = "cli"))]
    pub(super) fn all(&self) -> HashMap<AnyVm, Arc<Gate>> {
        let all = lock(&self.all);
        let gates = all.gates.iter();
        gates
            .map(|(identity, entry)| (identity.clone(), Arc::clone(&entry.gate)))
            .collect()
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
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::address::Port;
    use crate::engine::id::ForwardId;
    use crate::name::VsockName;

    /// Guests that have dialled once, of all CIDs that there are, leave nothing behind.
    #[test]
    fn gates_that_nothing_uses_are_dropped() {
        let gates = Gates::new(Limits::default());
        let guest = |cid| {
            let port = Port(5000);
            let guest = SocketName::Vsock(VsockName { cid, port });
            gates.of_guest(&guest).unwrap()
        };
        let count = || lock(&gates.all).gates.len();
        // One has a connection, one has limits, one would be harmed, and one has had all of that.
        let connected = guest(3);
        let slot = connected.accept(ForwardId(0), None, Instant::now());
        drop(connected);
        let mut limits = VmLimits::new(AnyVm::Vsock(4));
        limits.connections = Some(5);
        gates.set_limits(&limits);
        let hyperkit = AnyVm::Hyperkit(HyperkitVm::new("/nowhere/vm"));
        drop(gates.gate_of(&hyperkit));
        limits.vm = AnyVm::Vsock(5);
        gates.set_limits(&limits);
        limits.connections = None;
        gates.set_limits(&limits);
        let kept = [3, 4].map(|cid| Arc::downgrade(&guest(cid)));
        let idle = Arc::downgrade(&guest(5));
        for cid in 1_000..3_000 {
            drop(guest(cid));
            assert!(count() <= FEW, "{}", count());
        }
        let alive = kept.iter().filter(|gate| gate.upgrade().is_some());
        assert_eq!(alive.count(), 2);
        assert!(idle.upgrade().is_none());
        let hyperkit = Arc::downgrade(&gates.gate_of(&hyperkit));
        // As many as are used are no reason to look for others at each.
        let used: Vec<_> = (10_000..10_500).map(guest).collect();
        assert!(lock(&gates.all).sweep_at >= 2 * FEW);
        drop((used, slot));
        for cid in 20_000..22_000 {
            drop(guest(cid));
        }
        assert!(count() <= FEW, "{}", count());
        assert!(kept[0].upgrade().is_none() && kept[1].upgrade().is_some());
        assert!(hyperkit.upgrade().is_some());
    }

    #[test]
    fn a_guest_is_known_by_its_cid() {
        let gates = Gates::new(Limits::default());
        let of = |cid| {
            let port = Port(5000);
            gates.of_guest(&SocketName::Vsock(VsockName { cid, port }))
        };
        let its = gates.gate_of(&AnyVm::Vsock(3));
        assert!(of(3).is_some_and(|gate| Arc::ptr_eq(&gate, &its)));
        assert!(of(4).is_some_and(|gate| !Arc::ptr_eq(&gate, &its)));
        // The host is no VM.
        assert!(of(2).is_none());
        assert!(gates.of_guest(&SocketName::Unnamed).is_none());
    }
}
