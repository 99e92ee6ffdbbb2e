//! `hvsock expose`: exposes a VM's ports here, and services of the host to its guest.

use clap::Args;
use clap_complete::ArgValueCompleter;

use super::arguments;
use super::carrying::{WantedRules, carry};
use super::complete;
use super::kept::KeepTrying;
use super::options::ProxyOptions;
use super::outcome::{Failure, Outcome};
use super::rules::rules_of_vm_to_come;
use super::signals::EndSignals;
use super::spec::{Locals, Remotes};
use crate::app::log::LogOptions;
use crate::proxy::ForwardStatus;

/// Expose a VM's vsock ports as local sockets, and local services to its guest
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  hvsock expose --vm docker -L /tmp/docker.sock:2375
  hvsock expose --vm ~/.minikube/machines/minikube -L 8080:80 -L 2222:22
  hvsock expose --vm docker -L 8000-8010:8000-8010
  hvsock expose --vm ./linux-state -L 0:0x50 -R 5000:5000 -R 5001:/run/a.sock
  hvsock expose --vm vsock-mux:///run/fc.sock -L 2222:22 -R 5000:127.0.0.1:8080
  hvsock expose --vm \"My VM\" -L //./pipe/docker_vm:2375      (Windows)")]
pub(super) struct ExposeArgs {
    /// The VM: its state directory, the name of one that can be found, or hyperkit:///STATE/DIR;
    /// vsock://CID for a guest of this Linux host; vsock-mux:///PATH for one of Firecracker or its
    /// kin; on Windows a Hyper-V VM's name or id
    #[arg(long, value_name = "VM", add = ArgValueCompleter::new(complete::vm), value_parser = arguments::vm())]
    vm: String,
    /// Host to guest: listen on a TCP port (of 127.0.0.1 if ADDR is left out; 0 is chosen), a Unix
    /// socket or a named pipe, and lead to the guest's vsock port; 8000-8010:8000-8010 is a range
    #[arg(short = 'L', value_name = "[ADDR:]PORT:GUESTPORT|/PATH:GUESTPORT", value_parser = arguments::locals())]
    local: Vec<Locals>,
    /// Guest to host: when the guest dials HOSTPORT of CID 2, lead to TARGET (PORT, HOST:PORT, a
    /// path or a URI)
    #[arg(short = 'R', value_name = "HOSTPORT:TARGET", value_parser = arguments::remotes())]
    remote: Vec<Remotes>,
    #[command(flatten)]
    patience: KeepTrying,
    #[command(flatten)]
    options: ProxyOptions,
}

impl ExposeArgs {
    pub(super) fn log(&self) -> LogOptions {
        self.options.log().clone()
    }

    pub(super) fn run(self) -> Outcome {
        if self.local.is_empty() && self.remote.is_empty() {
            return Err(Failure::Usage(
                "nothing to expose: give at least one -L or -R".into(),
            ));
        }
        let (rules, later) = rules_of_vm_to_come(&self.vm, &self.local, &self.remote)?;
        let signals = EndSignals::take()?;
        let wanted = WantedRules { rules, later };
        carry(&self.options, self.patience, wanted, describe, signals)
    }
}

/// Describes a forward on one line.
fn describe(forward: &ForwardStatus) -> String {
    let (listen, connect) = (&forward.listen, &forward.rule.connect);
    match (listen.guest_port(), connect.guest_port()) {
        (_, Some(port)) => format!("{listen} -> guest port {port}"),
        (Some(port), _) => format!("guest, to CID 2 port {port} -> {connect}"),
        _ => format!("{listen} -> {connect}"),
    }
}
