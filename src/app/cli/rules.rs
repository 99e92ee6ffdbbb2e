//! The rules that the words of a command line ask for.

use std::io;

use super::console::complain;
use super::options::no_vm;
use super::outcome::Failure;
use super::spec::{Local, Locals, Remote, Remotes};
use crate::address::{Address, HyperkitVm};
use crate::app::vm::VmPlace;
use crate::error::{Error, Operation};
use crate::hyperkit::Places;
use crate::proxy::Rule;

/// Returns the rules of `-L` and `-R`.
pub(super) fn rules_of_vm(
    name: &str,
    local: &[Locals],
    remote: &[Remotes],
) -> Result<Vec<Rule>, Failure> {
    let vm = VmPlace::find(name, &Places::from_env()).map_err(|e| no_vm(name, &e))?;
    if let VmPlace::Hyperkit(vm) = &vm {
        look_at(vm)?;
    }
    let mut rules = Vec::new();
    for Local { listen, guest_port } in local.iter().flat_map(|it| &it.0) {
        rules.push(Rule::new(listen.clone(), vm.guest_port(*guest_port)));
    }
    for Remote { host_port, target } in remote.iter().flat_map(|it| &it.0) {
        let mut rule = Rule::new(vm.host_port(*host_port), target.clone());
        rule.from = vm.sources();
        rules.push(rule);
    }
    Ok(rules)
}

/// Says at once what every client would find out: that there is no directory, that it can't be used, that no VM runs.
fn look_at(vm: &HyperkitVm) -> crate::Result<()> {
    let directory = vm.state_dir.display();
    match vm.connect_path().symlink_metadata() {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound && vm.state_dir.is_dir() => {
            complain(format_args!(
                "the VM is not running (no socket {:?} in {directory}); clients are refused until it is",
                vm.connect
            ));
            Ok(())
        }
        Err(e) => {
            let remedy = match e.kind() {
                io::ErrorKind::NotFound => "there is no such state directory: is the path right?",
                io::ErrorKind::PermissionDenied => "run as the user who runs the VM",
                _ => "is it a VM's state directory?",
            };
            Err(
                Error::new(Operation::Find, format_args!("a VM in {directory}"), e)
                    .with_remedy(remedy),
            )
        }
    }
}

/// Returns the rules of addresses to listen on, each with the one to connect to behind it.
pub(super) fn rules_of(addresses: &[Address]) -> Result<Vec<Rule>, Failure> {
    let (pairs, rest) = addresses.as_chunks::<2>();
    if let [alone] = rest {
        return Err(Failure::Usage(format!(
            "{alone} has no address to connect to: addresses come in pairs"
        )));
    }
    let pairs = pairs.iter().cloned();
    Ok(pairs
        .map(|[listen, connect]| Rule::new(listen, connect))
        .collect())
}
