//! `hvsock expose`: a VM's ports here, our services there.

use std::io;

use clap::Args;

use super::kept::KeepTrying;
use super::options::{ProxyOptions, hyper_v_service};
use super::signals::EndSignals;
use super::spec::{Local, Locals, Remote, Remotes};
use super::{Failure, Outcome, arguments, carry, complain};
use crate::address::{HyperkitAddress, HyperkitVm, Port};
use crate::app::log::LogOptions;
use crate::error::{Error, Operation};
use crate::hyperkit::{Places, find};
use crate::proxy::{ForwardStatus, Rule};

/// Expose a VM's vsock ports as local sockets, and local services to its guest
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  hvsock expose --vm docker -L /tmp/docker.sock:2375
  hvsock expose --vm ~/.minikube/machines/minikube -L 8080:80 -L 2222:22
  hvsock expose --vm docker -L 8000-8010:8000-8010
  hvsock expose --vm ./linux-state -L 0:0x50 -R 5000:127.0.0.1:5000 -R 5001:/run/agent.sock
  hvsock expose --vm \"My VM\" -L //./pipe/docker_vm:2375      (Windows)")]
pub(super) struct Expose {
    /// The VM: its state directory, the name of one that can be found, or hyperkit:///STATE/DIR; on Windows a Hyper-V
    /// VM's name or id
    #[arg(long, value_name = "VM", value_parser = arguments::vm())]
    vm: String,
    /// Host to guest: listen on a TCP port (of 127.0.0.1 if ADDR is left out; 0 is chosen), a Unix socket or a named
    /// pipe, and lead to the guest's vsock port; 8000-8010:8000-8010 is a range
    #[arg(short = 'L', value_name = "[ADDR:]PORT:GUESTPORT|/PATH:GUESTPORT", value_parser = arguments::locals())]
    local: Vec<Locals>,
    /// Guest to host: when the guest dials HOSTPORT of CID 2, lead to TARGET (PORT, HOST:PORT, a path or a URI)
    #[arg(short = 'R', value_name = "HOSTPORT:TARGET", value_parser = arguments::remotes())]
    remote: Vec<Remotes>,
    #[command(flatten)]
    patience: KeepTrying,
    #[command(flatten)]
    options: ProxyOptions,
}

impl Expose {
    pub(super) fn log(&self) -> LogOptions {
        self.options.log().clone()
    }

    pub(super) fn run(self) -> Outcome {
        if self.local.is_empty() && self.remote.is_empty() {
            return Err(Failure::Usage(
                "nothing to expose: give at least one -L or -R".into(),
            ));
        }
        let rules = rules_of_vm(&self.vm, &self.local, &self.remote)?;
        let signals = EndSignals::take()?;
        carry(&self.options, self.patience, rules, describe, signals)
    }
}

/// A forward, on one line.
fn describe(forward: &ForwardStatus) -> String {
    let (listen, connect) = (&forward.listen, &forward.rule.connect);
    match (listen.guest_port(), connect.guest_port()) {
        (_, Some(port)) => format!("{listen} -> guest port {port}"),
        (Some(port), _) => format!("guest, to CID 2 port {port} -> {connect}"),
        _ => format!("{listen} -> {connect}"),
    }
}

/// Returns the rules of `-L` and `-R`.
pub(super) fn rules_of_vm(
    name: &str,
    local: &[Locals],
    remote: &[Remotes],
) -> Result<Vec<Rule>, Failure> {
    let hyperkit = match cfg!(windows) {
        true => None,
        false => Some(find(name, &Places::from_env())?),
    };
    hyperkit.as_ref().map_or(Ok(()), look_at)?;
    let vm = |port: Port| match &hyperkit {
        Some(vm) => Ok(HyperkitAddress {
            vm: vm.clone(),
            port,
        }
        .into()),
        None => hyper_v_service(name, port.into()),
    };
    let mut rules = Vec::new();
    for Local { listen, guest_port } in local.iter().flat_map(|it| &it.0) {
        rules.push(Rule::new(listen.clone(), vm(*guest_port)?));
    }
    for Remote { host_port, target } in remote.iter().flat_map(|it| &it.0) {
        rules.push(Rule::new(vm(*host_port)?, target.clone()));
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
