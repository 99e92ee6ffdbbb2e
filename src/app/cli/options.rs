//! Options that several commands share, and their values.

use std::io;
use std::num::NonZeroUsize;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use clap_complete::ArgValueCompleter;

use super::arguments;
use super::complete;
#[cfg(unix)]
use super::console::complain;
use super::given::GivenOptions;
use super::outcome::{Failure, Outcome};
use crate::address::{Address, HvsockAddress, Port, parse_service};
use crate::app::log::LogOptions;
use crate::app::ranges::is_number;
use crate::app::rule_options::RuleOptions;
use crate::app::values::{local_address, number, parse_some_time, parse_time};
use crate::app::vm::VmPlace;
use crate::error::{Error, Operation};
use crate::hyperkit::Places;
#[cfg(unix)]
use crate::keeper::Keeper;
use crate::proxy::{ProxyConfig, Rule};
use crate::sys;

/// One end of a connection: a URI, or a port of a VM.
#[derive(Args, Debug)]
pub(super) struct PeerArgs {
    /// Where to connect or listen, of TCP HOST:PORT or a port of 127.0.0.1, too; with --vm a vsock
    /// port alone
    #[arg(value_name = "ADDRESS", add = ArgValueCompleter::new(complete::address), value_parser = arguments::address_text())]
    address: String,
    /// The VM that ADDRESS is a port of: its state directory, the name of one that can be found, or
    /// hyperkit:///STATE/DIR, vsock://CID or vsock-mux:///PATH; on Windows a Hyper-V VM's name or
    /// id, and ADDRESS may be a service's GUID
    #[arg(long, value_name = "VM", add = ArgValueCompleter::new(complete::vm), value_parser = arguments::vm())]
    vm: Option<String>,
}

/// How often a missing VM is looked for.
const LOOK_FOR_VM: Duration = Duration::from_millis(200);

impl PeerArgs {
    /// Returns its address. A VM that can't be found is looked for until `deadline`.
    pub(super) fn address(&self, deadline: Instant) -> Result<Address, Failure> {
        let Some(vm) = &self.vm else {
            let text = &self.address;
            let parsed = text.parse::<Address>();
            return parsed.or_else(|e| match text.contains(':') || is_number(text) {
                // `forward` takes the same spellings.
                true => local_address(text).map_err(Failure::Usage),
                false => Err(Failure::Usage(e.to_string())),
            });
        };
        let places = Places::from_env();
        let vm = loop {
            match VmPlace::find(vm, &places) {
                Ok(vm) => break vm,
                Err(e) if e.kind() == io::ErrorKind::NotFound && Instant::now() < deadline => {
                    thread::sleep(LOOK_FOR_VM);
                }
                Err(e) => return Err(no_vm(vm, &e)),
            }
        };
        if let VmPlace::HyperV(vm) = vm {
            let service = parse_service(&self.address);
            let service =
                service.map_err(|e| Failure::Usage(format!("{:?} with --vm {e}", self.address)))?;
            return Ok(HvsockAddress::new(vm, service).into());
        }
        let port: Port = self
            .address
            .parse()
            .map_err(|e| Failure::Usage(format!("{:?} with --vm: {e}", self.address)))?;
        Ok(vm.guest_port(port))
    }
}

/// Refuses an address to which nothing can ever connect, or at which nothing can ever listen.
pub(super) fn refuse_impossible(operation: Operation, address: &Address) -> Outcome {
    let why = match operation {
        Operation::Listen => address.why_no_listener().map(|(why, it)| (why, Some(it))),
        _ => address.why_no_target(),
    };
    let Some((why, remedy)) = why else {
        return Ok(());
    };
    let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
    let error = Error::new(operation, address, cause);
    let error = match remedy {
        Some(remedy) => error.with_remedy(remedy),
        None => error,
    };
    Err(Failure::Usage(error.to_string()))
}

/// Returns the failure to find a VM: of usage if the name can mean no VM, else that there is none.
pub(super) fn no_vm(name: &str, error: &Error) -> Failure {
    // A URI of another scheme names no VM. A hyperkit URI may be right and its directory wrong.
    let is_other_uri = name.contains("://") && !name.starts_with("hyperkit://");
    let are_wrong = cfg!(windows) || name.is_empty() || is_other_uri;
    match error.kind() {
        io::ErrorKind::InvalidInput if are_wrong => Failure::Usage(error.to_string()),
        _ => Failure::Failed(error.to_string()),
    }
}

/// Whether there is a keeper.
#[cfg(unix)]
#[derive(Args, Clone, Copy, Debug)]
pub(super) struct KeeperOptions {
    /// Start no keeper, the small process that ends a VM's connections gracefully when this one is
    /// killed, and goes on accepting what the guest dials: without it, the VM may die or hang then
    #[arg(long)]
    no_keeper: bool,
}

#[cfg(unix)]
impl KeeperOptions {
    /// Has the proxy start a keeper, if one is wanted and can run.
    pub(super) fn apply(self, config: &mut ProxyConfig) {
        if self.no_keeper {
            return;
        }
        match Keeper::of_this_program() {
            Ok(keeper) => config.keeper = Some(keeper),
            Err(e) => complain(format_args!("no keeper: where is this program? {e}")),
        }
    }
}

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Limits")]
pub(super) struct ProxyOptions {
    #[cfg(unix)]
    #[command(flatten)]
    control: super::control_socket::ControlOptions,
    #[command(flatten)]
    rule: GivenOptions,
    #[command(flatten)]
    log: LogOptions,
    /// Log a line for each connection that has ended, with why it has (HVSOCK_LOG=debug logs them,
    /// too)
    #[arg(long, help_heading = None)]
    access_log: bool,
    /// Threads, at most 256 [default: one a core]
    #[arg(long, value_name = "N", value_parser = number::<u16>(1..=256))]
    workers: Option<u16>,
    /// Copy bytes where they could be handed from socket to socket (Linux' splice), as on other
    /// systems
    #[arg(long)]
    no_splice: bool,
    #[cfg(unix)]
    #[command(flatten)]
    keeper: KeeperOptions,
    /// Seconds that live connections may take to finish after the first SIGINT or SIGTERM
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = parse_time)]
    grace: Duration,
    /// Seconds without a connection after which it ends, for sockets by which a service manager
    /// starts it again [default: it goes on]
    #[arg(long, value_name = "SECONDS", value_parser = parse_some_time)]
    exit_idle: Option<Duration>,
    /// Connections at a time to one VM [default: 900 to a hyperkit VM (about 200 if it runs with
    /// 256 descriptors), to others as many as there may be], at most 1000; up to eight ninths of
    /// them may be its guest's, whose dials beyond that are ended at once
    #[arg(long, value_name = "N", value_parser = number::<u16>(1..=1000))]
    vm_connections: Option<u16>,
    /// Dials to one hyperkit VM that the guest may leave unanswered before more clients wait, at
    /// most 400
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = number::<u16>(1..=400))]
    vm_unanswered: u16,
}

impl ProxyOptions {
    /// Returns the configuration of a proxy for these rules, with as many connections as
    /// descriptors allow.
    pub(super) fn config(&self, rules: impl IntoIterator<Item = Rule>) -> ProxyConfig {
        let rules = rules
            .into_iter()
            .map(|rule| self.rule.all.applied_to(rule))
            .collect();
        let mut config = ProxyConfig::new(rules);
        config.workers = self.workers.and_then(|n| NonZeroUsize::new(n.into()));
        config.splice = !self.no_splice;
        config.access_log = self.access_log;
        // If the limit can't be raised the proxy uses the lower one.
        let _ = sys::raise_descriptor_limit();
        config.limits.connections = usize::MAX;
        if let Some(most) = self.vm_connections {
            config.limits.vm_connections = most.into();
            config.limits.other_vm_connections = Some(most.into());
        }
        config.limits.vm_unanswered = self.vm_unanswered.into();
        #[cfg(unix)]
        self.keeper.apply(&mut config);
        config
    }

    /// Returns the options of rules that are added later.
    pub(super) fn rule(&self) -> &RuleOptions {
        &self.rule.all
    }

    /// Returns the given keys that apply only to the file of a Unix socket.
    pub(super) fn given_access(&self) -> Vec<&'static str> {
        self.rule.access()
    }

    #[cfg(unix)]
    pub(super) fn control(&self) -> &super::control_socket::ControlOptions {
        &self.control
    }

    /// Returns where the log goes.
    pub(super) fn log(&self) -> &LogOptions {
        &self.log
    }

    pub(super) fn grace(&self) -> Duration {
        self.grace
    }

    pub(super) fn exit_idle(&self) -> Option<Duration> {
        self.exit_idle
    }
}
