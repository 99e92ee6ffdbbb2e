//! `hvsock stop`: ends a running hvsock and, on request, the keepers of VMs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use clap_complete::ArgValueCompleter;
use indicatif::HumanDuration;
use serde_json::Value;

use super::console::{complain, print};
use super::control::{Which, duration, query};
use super::outcome::{Failure, Outcome};
use super::{complete, table};
use crate::address::Port;
use crate::app::control::{self, Unanswered, ask, read};
use crate::app::values::parse_time;
use crate::error::counted_have;
use crate::hyperkit::{Places, find};
use crate::keeper::status::{self as keepers, KeeperStatus, PortState};
use crate::sys;

/// Stop an hvsock that runs, and wait for its end
///
/// The keeper of its VMs stays: it ends what guests have not ended yet, and goes on accepting what
/// they dial, until another hvsock takes that over or the VM ends.
#[derive(Args, Debug)]
#[command(
    after_help = "Without a keeper a VM whose guest goes on dialling a port of the host may hang.

Examples:
  hvsock stop
  hvsock stop --keeper            its keeper, too
  hvsock stop docker --keeper     keepers of that VM whose hvsock has ended"
)]
pub(super) struct StopArgs {
    /// A VM (its state directory, the name of one that can be found, or hyperkit:///STATE/DIR): end
    /// its keepers whose hvsock has ended, and no hvsock
    #[arg(value_name = "VM", requires = "keeper", conflicts_with_all = ["grace", "control"], add = ArgValueCompleter::new(complete::vm), value_parser = super::arguments::vm())]
    vm: Option<String>,
    /// End the keeper as well. Nobody listens then on the ports that the guest dials: a VM whose
    /// guest goes on dialling them may hang
    #[arg(long)]
    keeper: bool,
    /// Seconds that live connections may take to finish [default: that of the hvsock's own --grace]
    #[arg(long, value_name = "SECONDS", value_parser = parse_time)]
    grace: Option<Duration>,
    #[command(flatten)]
    which: Which,
}

/// How often the process' end is checked.
const LOOK: Duration = Duration::from_millis(100);

/// How much longer than its grace an hvsock may take, since it closes guests' connections
/// gracefully.
const LEAVE: Duration = Duration::from_secs(10);

impl StopArgs {
    pub(super) fn run(self) -> Outcome {
        if let Some(vm) = &self.vm {
            return end_orphans(vm);
        }
        let path = self.which.path();
        if !self.keeper {
            return self.stop(&path, |end| wait_for_socket(&path, end));
        }
        let before: control::Status = control::get(&path, "/v1/status").map_err(|e| match e {
            Unanswered::Absent(_) => Failure::Failed(format!(
                "{e}. If a keeper is left, name its VM: `hvsock stop VM --keeper`; `hvsock vms` lists them"
            )),
            other => other.into(),
        })?;
        // The keeper notices the proxy's end only when the whole process has ended.
        self.stop(&path, |end| wait_for_process(before.pid, end))?;
        let directories = before.vms().into_iter();
        for (directory, keeper) in keepers_in(directories.map(|vm| PathBuf::from(&vm.directory))) {
            if keeper.proxy == before.pid {
                end_keeper(&directory, &keeper)?;
            }
        }
        Ok(())
    }

    /// Stops the hvsock whose control socket is at `path`. `has_ended` waits for its end, at most
    /// until the given time.
    fn stop(&self, path: &Path, has_ended: impl FnOnce(Instant) -> bool) -> Outcome {
        let call = format!("/v1/stop{}", query(self.grace));
        let answer: Value = read(&ask(path, "POST", &call, "")?)?;
        let grace = duration(answer["grace_seconds"].as_f64().unwrap_or(0.0));
        let live = answer["live"].as_u64().unwrap_or(0);
        if live > 0 && !grace.is_zero() {
            complain(format_args!(
                "{} {} s to finish; `hvsock stop --grace 0` cuts off what is left",
                counted_have(live, "connection"),
                grace.as_secs()
            ));
        }
        let end = crate::time::after(Instant::now(), grace.saturating_add(LEAVE));
        match has_ended(end) {
            true => print("stopped"),
            false => Err(Failure::Failed(format!(
                "it has not ended within {} and {} more",
                HumanDuration(grace),
                HumanDuration(LEAVE)
            ))),
        }
    }
}

fn wait_for_socket(path: &Path, end: Instant) -> bool {
    wait(end, || {
        let status = control::get::<control::Status>(path, "/v1/status");
        matches!(status, Err(Unanswered::Absent(_)))
    })
}

fn wait_for_process(pid: u32, end: Instant) -> bool {
    let process = sys::Process::new(pid);
    wait(end, || process.is_ending())
}

fn wait(end: Instant, mut is_over: impl FnMut() -> bool) -> bool {
    while !is_over() {
        if Instant::now() >= end {
            return false;
        }
        thread::sleep(LOOK);
    }
    true
}

/// Returns the keepers that answer in these directories, each once.
fn keepers_in(
    directories: impl Iterator<Item = PathBuf>,
) -> impl Iterator<Item = (PathBuf, KeeperStatus)> {
    let mut seen = BTreeSet::new();
    let all = directories.flat_map(|directory| {
        let keepers = keepers::query(&directory).into_iter();
        keepers.map(move |keeper| (directory.clone(), keeper))
    });
    all.filter(move |(_, keeper)| seen.insert(keeper.pid))
}

/// Ends the keepers of a VM whose hvsocks have ended.
fn end_orphans(vm: &str) -> Outcome {
    let directory = find(vm, &Places::from_env())?.state_dir;
    let shown = directory.display();
    let all = keepers::query(&directory);
    if all.is_empty() {
        let why = format!("there is no keeper in {shown}, or none that this user may ask");
        return Err(Failure::Failed(why));
    }
    let (orphans, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|it| it.proxy_ended);
    for keeper in &orphans {
        end_keeper(&directory, keeper)?;
    }
    for keeper in &others {
        complain(format_args!(
            "keeper {} stays: its hvsock, process {}, runs; `hvsock stop --keeper` ends both",
            keeper.pid, keeper.proxy
        ));
    }
    match orphans.is_empty() {
        true => Err(Failure::Silent),
        false => Ok(()),
    }
}

/// Ends a keeper, and prints the risk of that.
fn end_keeper(directory: &Path, keeper: &KeeperStatus) -> Outcome {
    let pid = keeper.pid;
    keepers::end(directory, pid)
        .map_err(|e| Failure::Failed(format!("keeper {pid} can't be ended: {e}")))?;
    let connections = match keeper.connections {
        0 => String::new(),
        n => format!("; {} cut off", table::counted(n as u64, "connection")),
    };
    print(format_args!("ended keeper {pid}{connections}"))?;
    for it in &keeper.ports {
        let vm = it.path.parent().unwrap_or(Path::new("")).display();
        complain(format_args!(
            "nobody listens on port {} of {vm} any more: if its guest goes on dialling it, the VM may hang",
            Port(it.port)
        ));
    }
    Ok(())
}

/// Describes a keeper, with its ports in `directory`, however that path is spelled.
pub(super) fn describe(keeper: &KeeperStatus, directory: &Path) -> String {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let its = real(directory);
    let of = |state| {
        let mut ports = keeper.ports.iter();
        let is_its = |path: &Path| path.parent().is_some_and(|it| real(it) == its);
        let names: Vec<String> = ports
            .by_ref()
            .filter(|it| it.state == state && is_its(&it.path))
            .map(|it| Port(it.port).to_string())
            .collect();
        (!names.is_empty()).then(|| names.join(", "))
    };
    let connections = table::counted(keeper.connections as u64, "connection");
    let (pid, proxy) = (keeper.pid, keeper.proxy);
    let held = of(PortState::Held).map(|ports| format!(" and of port {ports}"));
    let served = of(PortState::Serving).map(|ports| format!(", accepts on port {ports}"));
    let served = served.unwrap_or_default();
    let given_up = match keeper.given_up {
        0 => String::new(),
        n => format!("; gave up {n} whose guest went on sending"),
    };
    match keeper.proxy_ended {
        false => format!(
            "keeper {pid} of hvsock process {proxy} has copies of {connections}{}{served}{given_up}",
            held.unwrap_or_default()
        ),
        true => format!(
            "keeper {pid}, whose hvsock process {proxy} has ended, ends {connections}{served}{given_up}"
        ),
    }
}
