//! Checks what can be wrong on the way to a VM, one by one, each with its remedy.
//!
//! A check that depends on a failed one is skipped, and says so. The VM is dialled as little as
//! possible: each dial is written, answered and closed as hyperkit's device needs it
//! (`hyperkit.md`). Sockets of others are inspected without connecting.

#[cfg(unix)]
mod carriers;
mod check;
#[cfg(unix)]
mod hyperkit;
#[cfg(windows)]
mod hyperv;
#[cfg(unix)]
mod socket;
mod system;
#[cfg(unix)]
mod target;
#[cfg(unix)]
mod vsock;

#[cfg(unix)]
pub(crate) use check::Asked;
pub(crate) use check::{Check, DoctorPlan, Verdict};

#[cfg(unix)]
use crate::app::vm::VmPlace;
#[cfg(unix)]
use crate::hyperkit::Places;

/// Makes all checks.
pub(crate) fn examine(plan: &DoctorPlan) -> Vec<Check> {
    let mut checks = vec![system::check_descriptors()];
    match &plan.vm {
        None => {
            checks.extend(system::check_vsock());
            #[cfg(unix)]
            checks.extend(carriers::examine());
        }
        #[cfg(unix)]
        Some(name) => match VmPlace::find_other(name, &Places::from_env()) {
            None => checks.extend(hyperkit::examine(name, plan)),
            Some(Ok(vm)) => checks.extend(vsock::examine(&vm, plan)),
            Some(Err(e)) => checks.push(Check::error("vm", &e)),
        },
        #[cfg(windows)]
        Some(vm) => checks.extend(hyperv::examine(vm, plan)),
    }
    checks
}
