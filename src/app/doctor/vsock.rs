//! A VM behind AF_VSOCK or behind its VMM's Unix socket: its socket, and its ports.

use super::check::{Check, Plan, Verdict};
use super::{socket, system};
use crate::address::{Address, AnyVm, Port, VsockMuxAddress};
use crate::app::control::{self, Status};
use crate::app::vm::VmPlace;
use crate::stream::Stream;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// How long a guest may take to end a connection of which only the end is wanted.
const LEAVE: Duration = Duration::from_secs(1);

pub(super) fn examine(vm: &VmPlace, plan: &Plan) -> Vec<Check> {
    let mut checks = Vec::new();
    match vm {
        VmPlace::VsockMux(mux) => checks.push(socket::examine("socket", &mux.path, "start the VM")),
        _ => checks.extend(system::vsock()),
    }
    checks.extend(known(vm, plan.control.as_deref()));
    let can_dial = checks.iter().all(|it| it.verdict != Verdict::Failed);
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

/// What an hvsock that runs knows of the VM: the one of that control socket, or the usual one.
fn known(vm: &VmPlace, control: Option<&Path>) -> Option<Check> {
    let name = "health";
    let path = control.map_or_else(control::find_path, Path::to_path_buf);
    let status = match (control::get::<Status>(&path, "/v1/status"), control) {
        (Ok(status), _) => status,
        // Most often none runs.
        (Err(_), None) => return None,
        (Err(e), Some(_)) => return Some(Check::skipped(name, e)),
    };
    let its = |it: &&control::Vm| match VmPlace::parse(&it.directory) {
        Some(Ok(other)) => is_same(&other, vm),
        _ => false,
    };
    let Some(known) = status.vms().into_iter().find(its) else {
        let why = format!("the hvsock at {} doesn't lead to it", path.display());
        return control.map(|_| Check::skipped(name, why));
    };
    let seen = format!("{}; {}", known.health(SystemTime::now()), known.slots());
    Some(match known.status.up {
        Some(false) => Check::warning(name, seen, "start the VM"),
        _ => Check::ok(name, seen),
    })
}

/// Whether two places are one VM's, however its socket's path is spelled.
fn is_same(one: &VmPlace, other: &VmPlace) -> bool {
    let real = |path: PathBuf| path.canonicalize().unwrap_or(path);
    let same = |vm: &VmPlace| match vm.any() {
        Some(AnyVm::VsockMux(path)) => Some(AnyVm::VsockMux(real(path))),
        other => other,
    };
    same(one) == same(other)
}

/// Whether a program in the guest takes a connection to this address.
fn guest_port(name: String, address: &Address, patience: Duration) -> Check {
    match Stream::connect_timeout(address, patience) {
        Ok(stream) => {
            let _ = stream.finish(LEAVE);
            Check::ok(name, "is listened on")
        }
        Err(e) => Check::error(name, &e),
    }
}

/// Whether a program of the host listens for the dials of the guest.
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
