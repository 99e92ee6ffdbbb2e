//! Checks a VM behind AF_VSOCK or behind its VMM's Unix socket: its socket, and its ports.

use super::carriers::{CarryingProcess, Hvsocks, VmFinding};
use super::check::{Check, DoctorPlan, Verdict};
use super::{socket, system};
use crate::address::{Address, AnyVm, Port, VsockMuxAddress};
use crate::app::processes;
use crate::app::vm::VmPlace;
use crate::app::vmms::{self, RunningVm};
use crate::stream::Stream;
use crate::sys;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

/// How long a guest may take to end a connection that is being closed.
const LEAVE: Duration = Duration::from_secs(1);

pub(super) fn examine(vm: &VmPlace, plan: &DoctorPlan) -> Vec<Check> {
    let mut checks = Vec::new();
    match vm {
        VmPlace::VsockMux(mux) => checks.push(socket::examine("socket", &mux.path, "start the VM")),
        _ => checks.extend(system::check_vsock()),
    }
    let process = check_process(vm);
    let why_undialled = match &process {
        _ if checks.iter().any(|it| it.verdict == Verdict::Failed) => {
            Some("there is no socket to dial it by")
        }
        Some(process) if process.verdict == Verdict::Failed => Some("its process is stopped"),
        _ => None,
    };
    let is_stopped = |process: &Check| process.verdict == Verdict::Failed;
    let found = match process.as_ref().is_some_and(is_stopped) {
        true => VmFinding::Stopped,
        false => VmFinding::Nothing,
    };
    checks.extend(process);
    let hvsocks = Hvsocks::ask(&plan.asked);
    let carriers = hvsocks.carriers(|place| match VmPlace::parse(place) {
        Some(Ok(other)) => is_same(&other, vm),
        _ => false,
    });
    let now = SystemTime::now();
    checks.extend(carriers.iter().map(|it| it.check_health(found, now)));
    checks.extend(carriers.iter().map(CarryingProcess::check_slots));
    let path = match vm {
        VmPlace::VsockMux(mux) => Some(mux.path.as_path()),
        _ => None,
    };
    checks.extend(hvsocks.check_unknown(&carriers, path));
    checks.extend(plan.ports.iter().map(|port| {
        let name = format!("port {port}");
        match why_undialled {
            None => check_guest_port(name, &vm.guest_port(*port), plan.patience),
            Some(why) => Check::skipped(name, why),
        }
    }));
    if plan.ports.is_empty() {
        let why = "not dialled: --port N says whether it answers";
        checks.push(Check::skipped("guest", why));
    }
    checks.extend(
        plan.host_ports
            .iter()
            .map(|port| check_host_port(vm, *port)),
    );
    checks
}

/// Checks whether the VM's process runs, if it can be found by its command line.
fn check_process(vm: &VmPlace) -> Option<Check> {
    let is_meant = |it: &RunningVm| match VmPlace::parse(&it.vm) {
        Some(Ok(other)) => is_same(&other, vm),
        _ => false,
    };
    let mut running = vmms::find(&processes::list_all().ok()?).into_iter();
    let RunningVm { vmm, process, .. } = running.find(is_meant)?;
    let is_stopped = i32::try_from(process).is_ok_and(sys::process_is_stopped);
    Some(match is_stopped {
        true => Check::stopped_process(process),
        false => Check::ok("process", format_args!("{process} runs, of {vmm}")),
    })
}

/// Returns whether two places are those of one VM, however the socket's path is spelled.
fn is_same(one: &VmPlace, other: &VmPlace) -> bool {
    let real = |path: PathBuf| path.canonicalize().unwrap_or(path);
    let same = |vm: &VmPlace| match vm.any() {
        Some(AnyVm::VsockMux(path)) => Some(AnyVm::VsockMux(real(path))),
        other => other,
    };
    same(one) == same(other)
}

/// Checks whether a program in the guest accepts a connection to this address.
fn check_guest_port(name: String, address: &Address, patience: Duration) -> Check {
    match Stream::connect_timeout(address, patience) {
        Ok(stream) => {
            let _ = stream.finish(LEAVE);
            Check::ok(name, "is listened on")
        }
        Err(e) if e.kind() == io::ErrorKind::TimedOut => Check::unanswered(name, patience),
        Err(e) => Check::error(name, &e),
    }
}

/// Checks whether a program of the host listens for the guest's dials.
fn check_host_port(vm: &VmPlace, port: Port) -> Check {
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
