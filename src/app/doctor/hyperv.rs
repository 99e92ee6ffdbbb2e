//! Checks a VM of Hyper-V.

use super::check::{Check, DoctorPlan};
use crate::address::{Port, ServiceId, VmId};
use crate::error::counted;
use crate::hyperv::{self, Machine};
use crate::services;

pub(super) fn examine(name: &str, plan: &DoctorPlan) -> Vec<Check> {
    let mut checks = Vec::new();
    let machine = match hyperv::list() {
        Ok(machines) => {
            let seen = format!("tells of {}", counted(machines.len() as u64, "VM"));
            checks.push(Check::ok("Hyper-V", seen));
            let (check, machine) = find_vm(name, machines);
            checks.push(check);
            machine
        }
        Err(e) => {
            checks.push(Check::error("Hyper-V", &e));
            checks.push(Check::skipped("vm", "Hyper-V doesn't tell of its VMs"));
            None
        }
    };
    checks.push(machine.map_or_else(
        || Check::skipped("state", "the VM wasn't found"),
        |machine| match machine.state.as_str() {
            "Running" => Check::ok("state", &machine.state),
            state => Check::failed("state", state, "start it: Start-VM in PowerShell"),
        },
    ));
    checks.extend(plan.ports.iter().map(|port| {
        let why = format!("not tried here: `hvsock cat --vm VM {}` does", port.0);
        Check::skipped(format_args!("port {port}"), why)
    }));
    checks.extend(plan.host_ports.iter().map(|port| check_registration(*port)));
    checks
}

/// Finds the VM with this name or id.
fn find_vm(name: &str, machines: Vec<Machine>) -> (Check, Option<Machine>) {
    let id = match name.parse().map(VmId) {
        Ok(id) => id,
        Err(_) => match hyperv::find(name) {
            Ok(id) => id,
            Err(e) => return (Check::error("vm", &e), None),
        },
    };
    match machines.into_iter().find(|machine| machine.id == id) {
        Some(machine) => (Check::ok("vm", id.0), Some(machine)),
        None => {
            let remedy = "`hvsock vms` lists those that there are";
            let check = Check::failed("vm", "there is none of that id", remedy);
            (check, None)
        }
    }
}

/// Checks whether Hyper-V lets guests dial a port of this host.
fn check_registration(port: Port) -> Check {
    let name = format!("host port {port}");
    let id = ServiceId::from_port(port);
    match services::list() {
        Ok(all) => match all.into_iter().find(|service| service.id == id) {
            Some(service) => Check::ok(name, format_args!("registered, as {:?}", service.name)),
            None => Check::failed(
                name,
                "not in the registry: guests can't dial it",
                &format!("`hvsock register {}`, once, as Administrator", port.0),
            ),
        },
        Err(e) => Check::error(name, &e),
    }
}
