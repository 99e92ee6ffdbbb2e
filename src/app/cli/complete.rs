//! Completes a command line for a shell, whose script (`hvsock completions`) runs this program for
//! each completion.
//!
//! It uses clap_complete's dynamic engine: the names of forwards and VMs are known only at that
//! time, so no static script can have them. The engine is marked unstable since script and program
//! must be of one version; they are installed together.

use std::ffi::{OsStr, OsString};
use std::process::ExitCode;
use std::sync::mpsc::channel;
use std::time::Duration;

use clap::Command;
use clap_complete::engine::{
    ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter,
};
use clap_complete::env::{CompleteEnv, Shells};

use super::console::complain;
use super::man;
use crate::hyperkit::{self, Places};
use crate::thread::start_thread;

/// The variable in which a script names its shell.
const SHELL: &str = "HVSOCK_COMPLETE";

/// How long the lookup of a name may take. The user waits for it.
const PATIENCE: Duration = Duration::from_secs(1);

/// Answers a shell that asks for completions. Returns `None` if this run is no such request.
pub(super) fn answer(
    arguments: impl IntoIterator<Item = OsString>,
    hvsock: Command,
) -> Option<ExitCode> {
    std::env::var_os(SHELL)?;
    let here = std::env::current_dir().ok();
    let pages = man::names(&hvsock);
    let page = move |begun: &OsStr| {
        let names = pages.iter().map(|name| (name.clone(), String::new()));
        filter_matching(begun, names)
    };
    let page = ArgValueCompleter::new(page);
    let hvsock = hvsock.mut_subcommand("man", |man| man.mut_arg("of", |of| of.add(page)));
    let asked = CompleteEnv::with_factory(|| hvsock.clone()).var(SHELL);
    match asked.try_complete(arguments, here.as_deref()) {
        Ok(true) => Some(ExitCode::SUCCESS),
        Ok(false) => None,
        Err(e) => {
            complain(e);
            Some(ExitCode::FAILURE)
        }
    }
}

/// Returns the script by which a shell asks for completions.
pub(super) fn script(shell: &str) -> Option<Vec<u8>> {
    let shells = Shells::builtins();
    let mut script = Vec::new();
    let completer = shells.completer(shell)?;
    // Writing to memory can't fail.
    let _ = completer.write_registration(SHELL, "hvsock", "hvsock", "hvsock", &mut script);
    if shell == "zsh" {
        // zsh runs a file of its fpath for the first completion: that one must be answered, too.
        script
            .extend(b"[ \"$funcstack[1]\" = _hvsock ] && _clap_dynamic_completer_hvsock \"$@\"\n");
    }
    Some(script)
}

/// Completes a VM: its name, or a directory.
pub(super) fn vm(begun: &OsStr) -> Vec<CompletionCandidate> {
    if is_path(begun) {
        return PathCompleter::dir().complete(begun);
    }
    let found = run_in_time(|| hyperkit::discover(&Places::from_env())).unwrap_or_default();
    let names = found.into_iter().map(|vm| {
        let state = if vm.running { "running" } else { "gone" };
        (vm.name, format!("{}, {state}", vm.source))
    });
    filter_matching(begun, names.chain(list_other_vms()))
}

/// Returns the names of running VMs of other VMMs, each with its VMM.
#[cfg(unix)]
fn list_other_vms() -> Vec<(String, String)> {
    use crate::app::{processes, vmms};
    let running = run_in_time(processes::list_all).and_then(Result::ok);
    let found = vmms::find(&running.unwrap_or_default()).into_iter();
    found
        .map(|vm| (vm.name, format!("{}, {}", vm.vmm, vm.vm)))
        .collect()
}

#[cfg(not(unix))]
fn list_other_vms() -> Vec<(String, String)> {
    Vec::new()
}

/// Completes an address if it is a path.
pub(super) fn address(begun: &OsStr) -> Vec<CompletionCandidate> {
    match is_path(begun) {
        true => PathCompleter::any().complete(begun),
        false => Vec::new(),
    }
}

/// Completes the name of a forward of the running hvsock.
#[cfg(unix)]
pub(super) fn forward(begun: &OsStr) -> Vec<CompletionCandidate> {
    use crate::app::control::{Status, find_path, get};
    let status = run_in_time(|| get::<Status>(&find_path(), "/v1/status").ok()).flatten();
    let forwards = status.map(|status| status.forwards).unwrap_or_default();
    let names = forwards
        .into_iter()
        .map(|it| (it.label(), format!("{} -> {}", it.listen, it.connect)));
    filter_matching(begun, names)
}

/// Completes the id of a connection of the running hvsock.
#[cfg(unix)]
pub(super) fn connection(begun: &OsStr) -> Vec<CompletionCandidate> {
    use crate::app::control::{ConnectionInfo, Status, find_path, get};
    let found = run_in_time(|| {
        let path = find_path();
        let status: Status = get(&path, "/v1/status").ok()?;
        let connections: Vec<ConnectionInfo> = get(&path, "/v1/connections").ok()?;
        Some((status, connections))
    });
    let Some((status, connections)) = found.flatten() else {
        return Vec::new();
    };
    let names = connections.iter().map(|it| {
        let (forward, peer) = (status.name_of(it.forward), it.peer_in_short());
        (
            it.id.to_string(),
            format!("{forward}, from {peer}, {}", it.state),
        )
    });
    filter_matching(begun, names)
}

/// Completes the process id of a running hvsock.
#[cfg(unix)]
pub(super) fn process(begun: &OsStr) -> Vec<CompletionCandidate> {
    let found = run_in_time(crate::app::answering::find).and_then(Result::ok);
    let names = found.into_iter().flatten().filter_map(|it| {
        let forwards = it.status()?.forwards;
        let first = forwards
            .first()
            .map(|it| format!("{} -> {}", it.listen, it.connect));
        let more = match forwards.len() {
            0 | 1 => String::new(),
            n => format!(", and {} more", n - 1),
        };
        let what = format!("{}{more}", first.unwrap_or_default());
        Some((it.process.id.to_string(), what))
    });
    filter_matching(begun, names)
}

fn is_path(begun: &OsStr) -> bool {
    let begun = begun.to_string_lossy();
    begun.contains(std::path::is_separator) || begun.starts_with('.')
}

/// Returns the names that begin with `begun`, each with what it is.
fn filter_matching(
    begun: &OsStr,
    names: impl Iterator<Item = (String, String)>,
) -> Vec<CompletionCandidate> {
    let begun = begun.to_string_lossy();
    let names = names.filter(|(name, _)| name.starts_with(&*begun));
    let candidates = names.map(|(name, what)| {
        let what = (!what.is_empty()).then(|| what.into());
        CompletionCandidate::new(name).help(what)
    });
    candidates.collect()
}

/// Calls `look` on a thread, since it may hang on a disk or a process. Returns `None` if it takes
/// longer than [`PATIENCE`], or if no thread can be started.
fn run_in_time<T: Send + 'static>(look: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (found, answer) = channel();
    start_thread("hvsock-look", "to look up a name", move || {
        found.send(look())
    })
    .ok()?;
    answer.recv_timeout(PATIENCE).ok()
}
