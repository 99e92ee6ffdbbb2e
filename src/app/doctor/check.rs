//! A check, and its result.

use std::fmt;

use crate::address::Port;
use crate::error::Error;

/// What to check.
#[derive(Clone, Debug)]
pub(crate) struct DoctorPlan {
    /// The VM as the user names it; without one only the system is checked.
    pub(crate) vm: Option<String>,
    /// The guest's ports on which a program should listen.
    pub(crate) ports: Vec<Port>,
    /// The host's ports that the guest dials, on which a program should listen.
    pub(crate) host_ports: Vec<Port>,
    /// How long the guest may take to answer a dial, and to end a connection.
    #[cfg(unix)]
    pub(crate) patience: std::time::Duration,
    /// The hvsocks to ask about the VM.
    #[cfg(unix)]
    pub(crate) asked: Asked,
}

/// The hvsocks to ask about a VM.
#[cfg(unix)]
#[derive(Clone, Debug)]
pub(crate) enum Asked {
    /// All running ones.
    All,
    /// The one with the control socket at that path.
    At(std::path::PathBuf),
    /// The one with that process id.
    Process(u32),
}

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Ok,
    /// It works, but not always, or not for all clients.
    Warning,
    Failed,
    /// It could not be checked.
    Skipped,
}

impl Verdict {
    /// Returns its name in JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Failed => "failed",
            Verdict::Skipped => "skipped",
        }
    }
}

/// The remedy for a guest that doesn't answer.
#[cfg(unix)]
pub(super) const UNANSWERED: &str = "wait, or wake it; if it stays so, restart the VM";

/// A check and its result.
#[derive(Clone, Debug)]
pub(crate) struct Check {
    pub(crate) name: String,
    pub(crate) verdict: Verdict,
    /// What was seen; if skipped, why.
    pub(crate) seen: String,
    /// What the user can do about it.
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

    pub(super) fn ok(name: impl fmt::Display, seen: impl fmt::Display) -> Check {
        Check::new(name, Verdict::Ok, seen)
    }

    pub(super) fn warning(name: impl fmt::Display, seen: impl fmt::Display, remedy: &str) -> Check {
        Check::new(name, Verdict::Warning, seen).with_remedy(remedy)
    }

    pub(super) fn failed(name: impl fmt::Display, seen: impl fmt::Display, remedy: &str) -> Check {
        Check::new(name, Verdict::Failed, seen).with_remedy(remedy)
    }

    pub(super) fn skipped(name: impl fmt::Display, why: impl fmt::Display) -> Check {
        Check::new(name, Verdict::Skipped, why)
    }

    /// Makes a failed check from an error.
    pub(super) fn error(name: impl fmt::Display, error: &Error) -> Check {
        let check = Check::new(name, Verdict::Failed, error.cause());
        match error.remedy() {
            Some(remedy) => check.with_remedy(remedy),
            None => check,
        }
    }

    /// Makes the check of a guest that hasn't answered a dial.
    #[cfg(unix)]
    pub(super) fn unanswered(name: impl fmt::Display, patience: std::time::Duration) -> Check {
        let seconds = patience.as_secs_f64();
        let seen = format!("no answer within {seconds} s: paused, asleep or still booting");
        Check::failed(name, seen, UNANSWERED)
    }

    /// Makes the check of a VM whose process is stopped, and will go on once it is continued.
    #[cfg(unix)]
    pub(super) fn stopped_process(process: impl fmt::Display) -> Check {
        let seen = format!("{process} is stopped, by SIGSTOP or a debugger");
        let remedy = format!("let it go on: kill -CONT {process}");
        Check::failed("process", seen, &remedy)
    }

    pub(super) fn with_remedy(mut self, remedy: impl Into<String>) -> Check {
        self.remedy = Some(remedy.into());
        self
    }

    #[cfg(unix)]
    pub(super) fn is_ok(&self) -> bool {
        matches!(self.verdict, Verdict::Ok | Verdict::Warning)
    }
}
