//! Asks Hyper-V for its VMs, and finds one by its name.

#[cfg(test)]
mod tests;

use std::io;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::address::VmId;
use crate::error::{Error, Operation, Result};
use crate::lock::lock;

#[cfg(any(windows, test))]
use super::answer;
use super::machine::Machine;
#[cfg(any(windows, test))]
use super::powershell;

/// Returns the VMs of this host, by name. It starts a PowerShell to ask for them.
///
/// # Errors
/// `PermissionDenied` for a user who may not ask Hyper-V; `Unsupported` if Hyper-V's PowerShell
/// module or PowerShell isn't there, or on systems other than Windows; `TimedOut` if there is no
/// answer within 30 s; `InvalidData` if it isn't understood.
pub fn list() -> Result<Vec<Machine>> {
    ask().map_err(|failed| failed.into_error(Operation::List, "Hyper-V's VMs"))
}

/// Returns the id of the VM named `name`: the one of exactly this name, or else the only one whose
/// name differs from it in case alone.
///
/// A list that is less than a minute old is used again, so that a program that dials often doesn't
/// ask as often.
///
/// # Errors
/// `NotFound` if there is none; `InvalidInput` if there are several; as [`list`].
pub fn find(name: &str) -> Result<VmId> {
    static KNOWN: KnownMachines = KnownMachines(Mutex::new(None));
    KNOWN
        .find(name, ask)
        .map_err(|failed| failed.into_error(Operation::Find, &format!("VM {name:?}")))
}

/// The last list, and its time.
struct KnownMachines(Mutex<Option<(Instant, Vec<Machine>)>>);

const KNOWN_FOR: Duration = Duration::from_secs(60);

impl KnownMachines {
    fn find(
        &self,
        name: &str,
        ask: impl FnOnce() -> std::result::Result<Vec<Machine>, LookupFailed>,
    ) -> std::result::Result<VmId, LookupFailed> {
        let begun = Instant::now();
        let mut known = lock(&self.0);
        if let Some((at, machines)) = &*known {
            let found = find_in(machines, name);
            // A list that came while this call waited for another's is new enough.
            if *at >= begun || found.is_ok() && at.elapsed() < KNOWN_FOR {
                return found;
            }
        }
        let (_, machines) = known.insert((Instant::now(), ask()?));
        find_in(machines, name)
    }
}

/// Why there is no list, or no such VM in it, and what can be done about it; empty if nothing can.
#[derive(Debug)]
struct LookupFailed {
    cause: io::Error,
    remedy: &'static str,
}

impl LookupFailed {
    fn new(kind: io::ErrorKind, why: impl Into<String>, remedy: &'static str) -> LookupFailed {
        let cause = io::Error::new(kind, why.into());
        LookupFailed { cause, remedy }
    }

    fn into_error(self, operation: Operation, subject: &str) -> Error {
        let error = Error::new(operation, subject, self.cause);
        match (self.remedy, operation) {
            ("", _) => error,
            (BY_ID, _) | (_, Operation::List) => error.with_remedy(self.remedy),
            (remedy, _) => error.with_remedy(format!("{remedy}, or {BY_ID}")),
        }
    }
}

const BY_ID: &str = "name the VM by its id, which (Get-VM NAME).Id prints";

fn find_in(machines: &[Machine], name: &str) -> std::result::Result<VmId, LookupFailed> {
    let lower = name.to_lowercase();
    let exact: Vec<&Machine> = machines.iter().filter(|vm| vm.name == name).collect();
    let named = match exact.is_empty() {
        true => machines
            .iter()
            .filter(|vm| vm.name.to_lowercase() == lower)
            .collect(),
        false => exact,
    };
    match &named[..] {
        [one] => Ok(one.id),
        [] => {
            let names: Vec<String> = machines.iter().map(|vm| format!("{:?}", vm.name)).collect();
            let why = match names.is_empty() {
                true => "Hyper-V has no VM".to_owned(),
                false => format!("no VM has this name; there are {}", names.join(", ")),
            };
            Err(LookupFailed::new(io::ErrorKind::NotFound, why, ""))
        }
        several => {
            let ids: Vec<String> = several.iter().map(|vm| vm.id.0.to_string()).collect();
            let why = format!("several VMs have this name: {}", ids.join(", "));
            Err(LookupFailed::new(io::ErrorKind::InvalidInput, why, BY_ID))
        }
    }
}

/// The script that prints the VMs. Microsoft documents no other way to their names that is as
/// stable.
#[cfg(any(windows, test))]
const SCRIPT: &str = include_str!("list.ps1");

#[cfg(windows)]
fn ask() -> std::result::Result<Vec<Machine>, LookupFailed> {
    /// The time for an answer: PowerShell and Hyper-V's module are loaded first.
    const ANSWER: Duration = Duration::from_secs(30);
    ask_within(powershell::powershell(SCRIPT), ANSWER)
}

#[cfg(not(windows))]
fn ask() -> std::result::Result<Vec<Machine>, LookupFailed> {
    let why = "Hyper-V is on Windows only";
    Err(LookupFailed::new(io::ErrorKind::Unsupported, why, ""))
}

#[cfg(any(windows, test))]
fn ask_within(
    command: std::process::Command,
    timeout: Duration,
) -> std::result::Result<Vec<Machine>, LookupFailed> {
    use answer::{Why, one_line};
    use io::ErrorKind::{InvalidData, NotFound, Other, PermissionDenied, TimedOut, Unsupported};
    let printed = powershell::run(command, timeout).map_err(|e| {
        // "Not found" would mean the VM, which may come yet.
        let kind = match e.kind() {
            NotFound => Unsupported,
            kind => kind,
        };
        let remedy = match kind {
            TimedOut => "see whether Hyper-V's service, vmms, is well",
            _ => "see whether Windows PowerShell starts",
        };
        LookupFailed::new(kind, format!("PowerShell can't be asked: {e}"), remedy)
    })?;
    let mut machines = answer::parse(&printed.out).map_err(|why| match why {
        Some((Why::Denied, message)) => LookupFailed::new(
            PermissionDenied,
            one_line(&message),
            "run as Administrator, or as a member of the group Hyper-V Administrators",
        ),
        Some((Why::Module, message)) => LookupFailed::new(
            Unsupported,
            format!(
                "Hyper-V's PowerShell module can't be loaded: {}",
                one_line(&message)
            ),
            "turn Hyper-V and its management tools on",
        ),
        Some((Why::Other, message)) => LookupFailed::new(
            Other,
            one_line(&message),
            "see what Get-VM says in PowerShell",
        ),
        None => {
            let why = match one_line(&printed.errors).as_str() {
                "" => "PowerShell has not run our script to its end".to_owned(),
                errors => format!("PowerShell has failed: {errors}"),
            };
            LookupFailed::new(InvalidData, why, "see what Get-VM says in PowerShell")
        }
    })?;
    machines.sort_by(|a, b| (&a.name, a.id.0).cmp(&(&b.name, b.id.0)));
    Ok(machines)
}
