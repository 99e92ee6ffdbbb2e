//! A VM behind AF_VSOCK or behind its VMM's Unix socket: its socket, and its ports.

use super::carriers::Hvsocks;
use super::check::{Check, DoctorPlan, Verdict};
use super::{socket, system};
use crate::address::{Address, AnyVm, Port, VsockMuxAddress};
use crate::app::vm::VmPlace;
use crate::stream::Stream;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

/// How long a guest may take to end a connection of which only the end is wanted.
const LEAVE: Duration = Duration::from_secs(1);

pub(super) fn examine(vm: &VmPlace, plan: &DoctorPlan) -> Vec<Check> {
    let mut checks = Vec::new();
    match vm {
        VmPlace::VsockMux(mux) => checks.push(socket::examine("socket", &mux.path, "start the VM")),
        _ => checks.extend(system::vsock()),
    }
    let can_dial = checks.iter().all(|it| it.verdict != Verdict::Failed);
    let hvsocks = Hvsocks::ask(&plan.asked);
    let carriers = hvsocks.carriers(|place| match VmPlace::parse(place) {
        Some(Ok(other)) => is_same(&other, vm),
        _ => false,
    });
    let now = SystemTime::now();
    let health = carriers
        .iter()
        .map(|it| it.check("health", Some(it.vm.health(now))));
    checks.extend(health);
    let path = match vm {
        VmPlace::VsockMux(mux) => Some(mux.path.as_path()),
        _ => None,
    };
    checks.extend(hvsocks.unknown("health", &carriers, path));
    checks.extend(plan.ports.iter().map(|port| {
        let name = format!("port {port}");
        match can_dial {
            true => guest_port(name, &vm.guest_port(*port), plan.patience),
            false => Check::skipped(name, "there is no socket to dial it by"),
        }
    }));
    if plan.ports.is_empty() {
        let why = "not dialled: --port N says whether it answers";
        checks.push(Check::skipped("guest", why));
    }
    checks.extend(plan.host_ports.iter().map(|port| host_port(vm, *port)));
    checks
}

/// Returns whether two places are one VM's, however its socket's path is spelled.
fn is_same(one: &VmPlace, other: &VmPlace) -> bool {
    let real = |path: PathBuf| path.canonicalize().unwrap_or(path);
    let same = |vm: &VmPlace| match vm.any() {
        Some(AnyVm::VsockMux(path)) => Some(AnyVm::VsockMux(real(path))),
        other => other,
    };
    same(one) == same(other)
}

/// Checks whether a program in the guest takes a connection to this address.
fn guest_port(name: String, address: &Address, patience: Duration) -> Check {
    match Stream::connect_timeout(address, patience) {
        Ok(stream) => {
            let _ = stream.finish(LEAVE);
            Check::ok(name, "is listened on")
        }
        Err(e) => Check::error(name, &e),
    }
}

/// Checks whether a program of the host listens for the dials of the guest.
fn host_port(vm: &VmPlace, port: Port) -> Check {
    let name = format!("host port {port}");
    match vm {
        VmPlace::VsockMux(mux) => {
            let path = VsockMuxAddress {
                port,
                ..mux.clone()
            }
            .listen_path();
            let remedy = format!("run `hvsock expose -R {}:TARGET`", port.0);
            socket::examine(name, &path, &remedy)
        }
        _ => Check::skipped(name, "this system doesn't tell; `ss -l --vsock` does"),
    }
}
