//! What can be wrong on the way to a VM, tried one by one, each with its remedy.
//!
//! A check that can't be made because an earlier one failed is skipped, and says so. The VM is
//! asked as little as can be: each dial is written, answered and closed as hyperkit's device needs
//! it (`hyperkit.md`), and sockets are looked at without connecting to them.

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

/// Looks at all of it.
pub(crate) fn examine(plan: &DoctorPlan) -> Vec<Check> {
    let mut checks = vec![system::descriptors()];
    match &plan.vm {
        None => {
            checks.extend(system::vsock());
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
