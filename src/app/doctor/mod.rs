//! What can be wrong on the way to a VM, tried one by one, each with its remedy.
//!
//! A check that can't be made because an earlier one failed is skipped, and says so. The VM is asked as little as can be:
//! each dial is written, answered and taken leave of as hyperkit's device needs it (`hyperkit.md`), and sockets are
//! looked at without connecting to them.

#[cfg(unix)]
mod hyperkit;
#[cfg(windows)]
mod hyperv;
mod system;

use std::fmt;

use crate::address::Port;
use crate::error::Error;

/// What is to be looked at.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The VM as a person calls it; without one the system alone.
    pub(crate) vm: Option<String>,
    /// Ports on which programs in the guest should listen.
    pub(crate) ports: Vec<Port>,
    /// Ports that the guest dials, on which something here should listen.
    pub(crate) host_ports: Vec<Port>,
    /// How long the guest may take to answer, and to end a connection.
    #[cfg(unix)]
    pub(crate) patience: std::time::Duration,
}

/// What came of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Ok,
    /// It works, but not always, or not for all.
    Warning,
    Failed,
    /// It could not be looked at.
    Skipped,
}

impl Verdict {
    /// Its name in JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Failed => "failed",
            Verdict::Skipped => "skipped",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug)]
pub(crate) struct Check {
    pub(crate) name: String,
    pub(crate) verdict: Verdict,
    /// What was seen; of a skipped one, why it wasn't looked at.
    pub(crate) seen: String,
    /// What a person can do about it.
    pub(crate) remedy: Option<String>,
}

impl Check {
    fn new(name: impl fmt::Display, verdict: Verdict, seen: impl fmt::Display) -> Check {
        Check {
            name: name.to_string(),
            verdict,
            seen: seen.to_string(),
            remedy: None,
        }
    }

    fn ok(name: impl fmt::Display, seen: impl fmt::Display) -> Check {
        Check::new(name, Verdict::Ok, seen)
    }

    fn warning(name: impl fmt::Display, seen: impl fmt::Display, remedy: &str) -> Check {
        Check::new(name, Verdict::Warning, seen).with_remedy(remedy)
    }

    fn failed(name: impl fmt::Display, seen: impl fmt::Display, remedy: &str) -> Check {
        Check::new(name, Verdict::Failed, seen).with_remedy(remedy)
    }

    fn skipped(name: impl fmt::Display, why: impl fmt::Display) -> Check {
        Check::new(name, Verdict::Skipped, why)
    }

    /// An error as a check that failed.
    fn error(name: impl fmt::Display, error: &Error) -> Check {
        let check = Check::new(name, Verdict::Failed, error.cause());
        match error.remedy() {
            Some(remedy) => check.with_remedy(remedy),
            None => check,
        }
    }

    fn with_remedy(mut self, remedy: impl Into<String>) -> Check {
        self.remedy = Some(remedy.into());
        self
    }

    #[cfg(unix)]
    fn is_ok(&self) -> bool {
        matches!(self.verdict, Verdict::Ok | Verdict::Warning)
    }
}

/// Looks at all of it.
pub(crate) fn examine(plan: &Plan) -> Vec<Check> {
    let mut checks = vec![system::descriptors()];
    match &plan.vm {
        None => checks.extend(system::vsock()),
        #[cfg(unix)]
        Some(vm) => checks.extend(hyperkit::examine(vm, plan)),
        #[cfg(windows)]
        Some(vm) => checks.extend(hyperv::examine(vm, plan)),
    }
    checks
}
