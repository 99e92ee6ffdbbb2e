//! `hvsock vms`: lists the VMs that one can connect to.

use std::io::ErrorKind;
#[cfg(unix)]
use std::path::Path;
#[cfg(unix)]
use std::time::SystemTime;

use clap::Args;

use super::console::{complain, print, print_text};
use super::outcome::Outcome;
use super::table;
use crate::address::{CID_HOST, is_guest_cid};
use crate::hyperkit::{self, Places};
use crate::hyperv;
use crate::sys;
use crate::vsock;

/// List the VMs that can be found here, and this system's own CID
#[derive(Args, Debug)]
#[command(
    after_help = "hyperkit's VMs are found by their state directories, where minikube, Docker and linuxkit \
    keep them, and in the current directory; VMs of QEMU, Firecracker, Cloud Hypervisor, vhost-device-vsock and \
    `hvsock simulate --vsock-mux` by the command lines of their processes, and --vm takes what the list has under NAME or WHERE. On Windows, Hyper-V is asked, which takes an Administrator's or a Hyper-V \
    Administrator's rights.

Examples:
  hvsock vms
  hvsock expose --vm docker -L 2375:2375     with a NAME of the list"
)]
pub(super) struct VmsArgs {}

const HEADINGS: [&str; 4] = ["NAME", "KEPT BY", "STATE", "WHERE"];

impl VmsArgs {
    pub(super) fn run(self) -> Outcome {
        if cfg!(windows) {
            list_hyper_v_vms()?;
        } else {
            list_hyperkit_vms()?;
        }
        if cfg!(target_os = "linux") {
            print(match vsock::local_cid() {
                Ok(CID_HOST) => format!("this system's CID: {CID_HOST}, a host's"),
                Ok(cid) if is_guest_cid(cid) => format!("this system's CID: {cid}, a guest's"),
                Ok(_) => "this system's CID: none, it is neither guest nor host".to_owned(),
                Err(e) => format!("this system's CID: none ({e})"),
            })?;
        }
        Ok(())
    }
}

fn list_hyperkit_vms() -> Outcome {
    let survey = hyperkit::survey(&Places::from_env());
    let looked = format!("looked in {}", survey.looked.join(", "));
    let others = list_other_vms();
    if survey.found.is_empty() {
        if !others.is_empty() {
            let carriers = describe_carriers(&others);
            print_text(table::of(HEADINGS, others))?;
            carriers.iter().try_for_each(print)?;
        }
        print(format_args!("no hyperkit VM found; {looked}"))?;
        return Ok(());
    }
    let keepers = describe_keepers(&survey.found);
    let rows = survey.found.into_iter().map(|vm| {
        // The process may have ended since it was found.
        let state = match hyperkit::running_pid(&vm.vm.state_dir) {
            Some(process) => state_of(process),
            None => "gone",
        };
        let directory = vm.vm.state_dir.display().to_string();
        [vm.name, vm.source.to_string(), state.to_owned(), directory]
    });
    let rows: Vec<[String; 4]> = rows.chain(others).collect();
    let carriers = describe_carriers(&rows);
    print_text(table::of(HEADINGS, rows))?;
    carriers.iter().chain(&keepers).try_for_each(print)?;
    if survey.denied {
        complain(format_args!("there may be more; {looked}"));
    }
    Ok(())
}

/// Returns the state of a VM whose process is alive, in the words of `hvsock status`.
fn state_of(process: i32) -> &'static str {
    match sys::process_is_stopped(process) {
        true => "paused",
        false => "running",
    }
}

/// Returns the rows of running VMs of other VMMs.
#[cfg(unix)]
fn list_other_vms() -> Vec<[String; 4]> {
    use crate::app::{processes, vmms};
    // Some systems don't list processes.
    let found = vmms::find(&processes::list_all().unwrap_or_default()).into_iter();
    let row = |it: vmms::RunningVm| {
        let state = i32::try_from(it.process).map_or("running", state_of);
        [it.name, it.vmm.to_owned(), state.to_owned(), it.vm]
    };
    found.map(row).collect()
}

#[cfg(not(unix))]
fn list_other_vms() -> Vec<[String; 4]> {
    Vec::new()
}

/// Returns a line for each VM of the table and each hvsock of this user that carries it: what that
/// hvsock knows of its health and its slots. A process that runs may have a guest that hangs.
#[cfg(unix)]
fn describe_carriers(rows: &[[String; 4]]) -> Vec<String> {
    use crate::app::answering;
    let now = SystemTime::now();
    let mut lines = Vec::new();
    for hvsock in answering::find().unwrap_or_default() {
        let Some(status) = hvsock.status() else {
            continue;
        };
        for vm in status.vms() {
            // Either may lead through symlinks.
            let real = Path::new(&vm.directory).canonicalize().ok();
            let is_same = |place: &str| {
                place == vm.directory
                    || real.is_some() && real == Path::new(place).canonicalize().ok()
            };
            if let Some([name, ..]) = rows.iter().find(|[.., place]| is_same(place)) {
                let (process, health, slots) = (hvsock.process.id, vm.health(now), vm.slots());
                lines.push(format!(
                    "{name}: hvsock process {process} carries it: {health}; {slots}"
                ));
            }
        }
    }
    lines
}

#[cfg(not(unix))]
fn describe_carriers(_: &[[String; 4]]) -> Vec<String> {
    Vec::new()
}

/// Returns lines that describe the VMs' keepers, including those whose hvsock has ended.
#[cfg(unix)]
fn describe_keepers(vms: &[hyperkit::Discovered]) -> Vec<String> {
    use super::stop::describe;
    use crate::keeper::status::query;
    let lines = vms.iter().flat_map(|vm| {
        let directory = vm.vm.state_dir.canonicalize();
        let directory = directory.unwrap_or_else(|_| vm.vm.state_dir.clone());
        let all = query(&directory).into_iter();
        all.map(move |keeper| format!("{}: {}", vm.name, describe(&keeper, &directory)))
    });
    lines.collect()
}

#[cfg(not(unix))]
fn describe_keepers(_: &[hyperkit::Discovered]) -> Vec<String> {
    Vec::new()
}

fn list_hyper_v_vms() -> Outcome {
    let machines = match hyperv::list() {
        Err(e) if e.kind() == ErrorKind::Unsupported => {
            return print(format_args!("no VM found: {e}"));
        }
        machines => machines?,
    };
    if machines.is_empty() {
        return print("no VM found; asked Hyper-V");
    }
    let rows = machines.into_iter().map(|vm| {
        let id = vm.id.0.to_string();
        [vm.name, "Hyper-V".to_owned(), vm.state, id]
    });
    print_text(table::of(HEADINGS, rows))
}
