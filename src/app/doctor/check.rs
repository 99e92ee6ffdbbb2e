//! One check: what it looks at, and what came of it.

use std::fmt;

use crate::address::Port;
use crate::error::Error;

/// What is to be looked at.
#[derive(Clone, Debug)]
pub(crate) struct DoctorPlan {
    /// The VM as a person calls it; without one the system alone.
    pub(crate) vm: Option<String>,
    /// Ports on which programs in the guest should listen.
    pub(crate) ports: Vec<Port>,
    /// Ports that the guest dials, on which something here should listen.
    pub(crate) host_ports: Vec<Port>,
    /// How long the guest may take to answer, and to end a connection.
    #[cfg(unix)]
    pub(crate) patience: std::time::Duration,
    /// Which hvsocks are asked what they have of the VM.
    #[cfg(unix)]
    pub(crate) asked: Asked,
}

/// Which hvsocks are asked what they have of a VM.
#[cfg(unix)]
#[derive(Clone, Debug)]
pub(crate) enum Asked {
    /// All that run.
    All,
    /// The one whose control socket has that path.
    At(std::path::PathBuf),
    /// That process.
    Process(u32),
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

    /// Makes a check that failed of an error.
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

    /// Makes the check of a VM's process that doesn't run, but will go on when it is let.
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
