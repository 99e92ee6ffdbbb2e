//! Hyper-V's VMs: their names and ids.
//!
//! AF_HYPERV knows VMs by their ids alone, people by their names. Windows PowerShell's `Get-VM` knows both; it is asked
//! for all VMs, and a name is looked for here, so that no name ever gets into a script. On systems other than Windows
//! every call says `Unsupported`.

#[cfg(any(windows, test))]
mod answer;
#[cfg(any(windows, test))]
mod powershell;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::address::VmId;
use crate::error::{Error, Operation, Result};

/// A VM of Hyper-V.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The name that Hyper-V's manager shows. Several VMs may have the same one, and there may be any character in it.
    pub name: String,
    /// Its id, by which it is dialled.
    pub id: VmId,
    /// What Hyper-V says of it (`Microsoft.HyperV.PowerShell.VMState`): `Running`, `Off`, `Saved`, …
    pub state: String,
}

/// The VMs of this host, by name. It takes a second or more.
///
/// # Errors
/// `PermissionDenied` for a user who may not ask Hyper-V; `Unsupported` if Hyper-V's PowerShell module or PowerShell
/// isn't there, or on systems other than Windows; `TimedOut` if there is no answer within 30 s; `InvalidData` if it isn't
/// understood.
pub fn list() -> Result<Vec<Machine>> {
    ask().map_err(|failed| failed.doing(Operation::List, "Hyper-V's VMs"))
}

/// The id of the VM that a person calls `name`: the one of exactly this name, else the one whose name differs from it by
/// small and capital letters alone.
///
/// If the name stands in a list that is less than a minute old, that will do: who dials often doesn't ask as often.
///
/// # Errors
/// `NotFound` if there is none; `InvalidInput` if there are several; as [`list`].
pub fn find(name: &str) -> Result<VmId> {
    let failed = |failed: Failed| failed.doing(Operation::Find, &format!("VM {name:?}"));
    let begun = Instant::now();
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((at, machines)) = &*known {
        let found = find_in(machines, name);
        // What has come while we waited for another's answer is news for us, too.
        if *at >= begun || found.is_ok() && at.elapsed() < KNOWN_FOR {
            return found.map_err(failed);
        }
    }
    let machines = ask().map_err(failed)?;
    let (_, machines) = known.insert((Instant::now(), machines));
    find_in(machines, name).map_err(failed)
}

/// The last list, and when it came.
static KNOWN: Mutex<Option<(Instant, Vec<Machine>)>> = Mutex::new(None);

const KNOWN_FOR: Duration = Duration::from_secs(60);

/// Why there is no list, or no such VM in it, and what can be done.
#[derive(Debug)]
struct Failed {
    cause: io::Error,
    remedy: &'static str,
}

impl Failed {
    fn new(kind: io::ErrorKind, why: impl Into<String>, remedy: &'static str) -> Failed {
        let cause = io::Error::new(kind, why.into());
        Failed { cause, remedy }
    }

    fn doing(self, operation: Operation, subject: &str) -> Error {
        let error = Error::new(operation, subject, self.cause);
        match self.remedy {
            "" => error,
            remedy => error.with_remedy(remedy),
        }
    }
}

fn find_in(machines: &[Machine], name: &str) -> std::result::Result<VmId, Failed> {
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
            Err(Failed::new(io::ErrorKind::NotFound, why, ""))
        }
        several => {
            let ids: Vec<String> = several.iter().map(|vm| vm.id.0.to_string()).collect();
            let why = format!("several VMs have this name: {}", ids.join(", "));
            let remedy = "give the id instead of the name";
            Err(Failed::new(io::ErrorKind::InvalidInput, why, remedy))
        }
    }
}

/// Prints the VMs. Microsoft documents no other way to their names that is as stable.
#[cfg(any(windows, test))]
const SCRIPT: &str = include_str!("list.ps1");

#[cfg(windows)]
fn ask() -> std::result::Result<Vec<Machine>, Failed> {
    /// The first start after a boot takes some seconds.
    const ANSWER: Duration = Duration::from_secs(30);
    ask_within(powershell::powershell(SCRIPT), ANSWER)
}

#[cfg(not(windows))]
fn ask() -> std::result::Result<Vec<Machine>, Failed> {
    let why = "Hyper-V is on Windows only";
    Err(Failed::new(io::ErrorKind::Unsupported, why, ""))
}

#[cfg(any(windows, test))]
fn ask_within(
    command: std::process::Command,
    timeout: Duration,
) -> std::result::Result<Vec<Machine>, Failed> {
    use answer::Why;
    use io::ErrorKind::{InvalidData, NotFound, Other, PermissionDenied, TimedOut, Unsupported};
    const BY_ID: &str = "name the VM by its id, which (Get-VM NAME).Id prints";
    let printed = powershell::run(command, timeout).map_err(|e| {
        // "Not found" is what a VM may be that comes later.
        let kind = match e.kind() {
            NotFound => Unsupported,
            kind => kind,
        };
        let remedy = match kind {
            TimedOut => "is Hyper-V's service (vmms) well?",
            _ => "name the VM by its id, which Hyper-V's manager shows",
        };
        Failed::new(kind, format!("PowerShell can't be asked: {e}"), remedy)
    })?;
    let mut machines = answer::parse(&printed.out).map_err(|why| match why {
        Some((Why::Denied, message)) => Failed::new(
            PermissionDenied,
            answer::one_line(&message),
            "run as Administrator, or as a member of the group Hyper-V Administrators; or name the VM by its id",
        ),
        Some((Why::Module, message)) => Failed::new(
            Unsupported,
            format!("Hyper-V's PowerShell module can't be loaded: {}", answer::one_line(&message)),
            "is Hyper-V on, with its management tools? Or name the VM by its id",
        ),
        Some((Why::Other, message)) => Failed::new(Other, answer::one_line(&message), BY_ID),
        None => {
            let complaint = answer::one_line(&printed.complaint);
            let why = match complaint.as_str() {
                "" => "PowerShell's answer is not one of our script".to_owned(),
                complaint => format!("PowerShell has failed: {complaint}"),
            };
            Failed::new(InvalidData, why, BY_ID)
        }
    })?;
    machines.sort_by(|a, b| (&a.name, a.id.0).cmp(&(&b.name, b.id.0)));
    Ok(machines)
}
