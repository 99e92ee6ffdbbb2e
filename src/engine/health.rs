//! The health of a dialled VM or server: whether it is up or down, and which changes are worth a
//! line in the log.
//!
//! Observations and times come in; nothing is looked at or dialled here.

use std::fmt;
use std::time::{Duration, Instant, SystemTime};

use tracing::{info, warn};

use crate::engine::rule::WhileDown;
use crate::error::Error;
use crate::sys::Identity;

/// A change of health that is reported once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// The target is gone, or was never seen.
    Down { was_up: bool },
    /// The target is there for the first time, after it was seen to be absent.
    Appeared,
    /// The target is back, after so long a time.
    Up(Duration),
    /// The target was restarted, and its absence was not noticed.
    Restarted,
    /// The VM's process was stopped.
    Paused,
    /// The VM's process goes on, after so long a time.
    Resumed(Duration),
}

/// The number of forwards that lead to a target, by what they do while it is down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ForwardsTo {
    pub(crate) refusing: usize,
    pub(crate) holding: usize,
}

impl ForwardsTo {
    /// Returns the number of those that do this.
    pub(crate) fn count_of(&mut self, what: WhileDown) -> &mut usize {
        match what {
            WhileDown::RefusesClients => &mut self.refusing,
            WhileDown::HoldsClients => &mut self.holding,
        }
    }
}

/// The identity of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VmIdentity {
    /// The identity of its `connect` socket.
    Socket(Identity),
    /// The identity of its pid file, where there is no such socket.
    PidFile(Identity),
    /// It was reached by its CID, which does not tell one VM from the next.
    #[cfg_attr(not(unix), allow(dead_code))]
    Cid,
}

/// Whether the process of a VM goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ProcessState {
    /// It is not known to be stopped.
    #[default]
    Runs,
    IsStopped,
}

/// What a look at a VM from outside has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct VmLook {
    /// The VM's identity; `None` if there is no VM, or only the socket file that one has left
    /// behind.
    pub(crate) identity: Option<VmIdentity>,
    /// Whether a process has the VM's socket.
    pub(crate) is_alive: bool,
    /// The process that its pid file names, if that lives.
    pub(crate) process: Option<i32>,
    /// The state of its process, as far as the system tells.
    pub(crate) process_state: ProcessState,
}

/// What is known of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TargetState {
    Unknown,
    Up,
    Down {
        since: Instant,
        /// The same on the wall clock, which goes on while the machine sleeps.
        at: SystemTime,
        report: DownReport,
    },
}

/// Whether it was reported that a target is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DownReport {
    Made,
    /// A dial that finds the target absent makes it.
    Due,
}

/// How long after a return what another worker did before it may still be reported: a dial that
/// fails, or an earlier identity.
const SETTLE_TIME: Duration = Duration::from_millis(100);

/// The health of one VM or one server.
#[derive(Debug)]
pub(crate) struct Health {
    state: TargetState,
    was_up: bool,
    /// The identity that was seen last.
    identity: Option<VmIdentity>,
    /// Whether the target could not be seen since.
    was_absent: bool,
    process: Option<i32>,
    returned_at: Option<Instant>,
    /// The identity before that, and the time until which it may still be seen.
    replaced: Option<(VmIdentity, Instant)>,
    /// Whether a dial found the target, its return was reported, and its identity has not been seen
    /// since. The new identity is then no restart to be reported: a VM is dialled, found again, and
    /// only then looked at.
    reported_before_seen: bool,
    restarts: u64,
}

impl Default for Health {
    fn default() -> Health {
        Health {
            state: TargetState::Unknown,
            was_up: false,
            identity: None,
            was_absent: false,
            process: None,
            returned_at: None,
            replaced: None,
            reported_before_seen: false,
            restarts: 0,
        }
    }
}

impl Health {
    /// Marks the target down after a dial that found it absent.
    pub(crate) fn mark_down(&mut self, now: Instant) -> Option<News> {
        match self.state {
            TargetState::Down {
                report: DownReport::Made,
                ..
            } => return None,
            TargetState::Up if self.has_just_returned(now) => return None,
            TargetState::Down { .. } | TargetState::Unknown | TargetState::Up => {}
        }
        Some(self.mark_down_and_report(now))
    }

    /// Returns whether the target has returned just now.
    fn has_just_returned(&self, now: Instant) -> bool {
        self.returned_at.is_some_and(|at| now < at + SETTLE_TIME)
    }

    fn mark_down_and_report(&mut self, now: Instant) -> News {
        self.set_down(now, DownReport::Made);
        News::Down {
            was_up: self.was_up,
        }
    }

    /// Sets the state to down, keeping the earlier time if it is down already.
    fn set_down(&mut self, now: Instant, report: DownReport) {
        let (since, at) = match self.state {
            TargetState::Down { since, at, .. } => (since, at),
            TargetState::Unknown | TargetState::Up => (now, SystemTime::now()),
        };
        self.state = TargetState::Down { since, at, report };
    }

    /// Marks the target up after a dial that found it.
    pub(crate) fn mark_up(&mut self, now: Instant) -> Option<News> {
        let before = std::mem::replace(&mut self.state, TargetState::Up);
        let was_up = std::mem::replace(&mut self.was_up, true);
        match before {
            TargetState::Down { since, .. } => {
                self.reported_before_seen = true;
                self.returned_at = Some(now);
                Some(match was_up {
                    true => News::Up(now.saturating_duration_since(since)),
                    false => News::Appeared,
                })
            }
            TargetState::Unknown | TargetState::Up => None,
        }
    }

    /// Notes the identity that was seen. Returns whether it is another one than before, and what is
    /// to be reported.
    pub(crate) fn note_identity(
        &mut self,
        identity: VmIdentity,
        now: Instant,
    ) -> (bool, Option<News>) {
        // A missing socket says nothing about the identity: a VM that starts has its pid file
        // first. So once a VM has had a socket, its pid file is no identity any more.
        if matches!(
            (self.identity, identity),
            (Some(VmIdentity::Socket(_)), VmIdentity::PidFile(_))
        ) {
            return (false, self.note_absence(now));
        }
        // What another worker has seen may be older than what is known.
        if let Some((old, until)) = self.replaced
            && old == identity
            && now < until
        {
            return (false, None);
        }
        let before = self.identity.replace(identity);
        let is_new = match (before, identity) {
            (None, _) | (Some(VmIdentity::PidFile(_)), VmIdentity::Socket(_)) => false,
            (Some(before), _) => before != identity,
        };
        if is_new {
            // Of its process nothing was seen yet.
            self.process = None;
            self.restarts += 1;
            self.replaced = before.map(|before| (before, now + SETTLE_TIME));
        }
        let has_returned = std::mem::take(&mut self.was_absent) || is_new;
        // A dial may have found the target before this look.
        let was_reported = self.reported_before_seen;
        self.reported_before_seen &= !is_new && self.has_just_returned(now);
        let news = match self.state {
            TargetState::Down { .. } if has_returned => {
                let news = self.mark_up(now);
                self.reported_before_seen = false;
                news
            }
            // A VM that starts has its socket only after its other files.
            TargetState::Up if is_new && !was_reported && !self.has_just_returned(now) => {
                Some(News::Restarted)
            }
            _ => None,
        };
        (is_new, news)
    }

    /// Notes that nothing of the target can be seen.
    pub(crate) fn note_absence(&mut self, now: Instant) -> Option<News> {
        self.was_absent = true;
        self.process = None;
        match self.state {
            TargetState::Up => Some(self.mark_down_and_report(now)),
            TargetState::Unknown => {
                self.set_down(now, DownReport::Due);
                None
            }
            TargetState::Down { .. } => None,
        }
    }

    /// Notes the process that the pid file names. The file may be missing or stale, so only the end
    /// of a process that was alive marks the target down.
    pub(crate) fn note_process(&mut self, process: Option<i32>, now: Instant) -> Option<News> {
        let before = std::mem::replace(&mut self.process, process);
        match (self.state, process) {
            (TargetState::Unknown, Some(_)) => self.mark_up(now),
            (TargetState::Up, None) if before.is_some() => Some(self.mark_down_and_report(now)),
            _ => None,
        }
    }

    /// Notes that a process has the target's socket. That it is the target's own is known only
    /// until something else was found.
    pub(crate) fn note_listener(&mut self, now: Instant) -> Option<News> {
        match self.state {
            TargetState::Unknown => self.mark_up(now),
            TargetState::Up | TargetState::Down { .. } => None,
        }
    }

    /// Returns whether the target is up, or `None` if nothing is known.
    pub(crate) fn is_up(&self) -> Option<bool> {
        match self.state {
            TargetState::Unknown => None,
            TargetState::Up => Some(true),
            TargetState::Down { .. } => Some(false),
        }
    }

    /// Returns the time since which the target is gone; `None` if it was never there.
    pub(crate) fn gone_since(&self) -> Option<SystemTime> {
        match self.state {
            TargetState::Down { at, .. } => Some(at).filter(|_| self.was_up),
            TargetState::Unknown | TargetState::Up => None,
        }
    }

    /// Counts a restart that no identity has told.
    pub(crate) fn count_restart(&mut self) {
        self.restarts += 1;
    }

    pub(crate) fn restarts(&self) -> u64 {
        self.restarts
    }
}

/// Logs a change of `subject`'s health. `forwards` are those that lead to it.
pub(crate) fn log_change(
    news: News,
    subject: &dyn fmt::Display,
    error: Option<&Error>,
    forwards: ForwardsTo,
) {
    match news {
        News::Down { was_up } => {
            let (what, until) = match was_up {
                true => ("is gone", "it is back"),
                false => ("is not there", "it is"),
            };
            let why = error.map_or_else(String::new, |error| format!(": {error}"));
            // A remedy may be a question.
            let clients = if why.ends_with('?') {
                " Clients"
            } else {
                "; clients"
            };
            match (forwards.refusing, forwards.holding) {
                (0, 0) => warn!("{subject} {what}{why}"),
                (_, 0) => warn!("{subject} {what}{why}{clients} are refused until {until}"),
                (0, _) => warn!("{subject} {what}{why}{clients} are held until {until}"),
                _ => warn!("{subject} {what}{why}{clients} are refused or held until {until}"),
            }
        }
        News::Appeared => info!("{subject} is there"),
        News::Up(after) => {
            let seconds = after.as_secs_f64();
            info!("{subject} is back after {seconds:.1} s");
        }
        News::Restarted => info!("{subject} was started anew"),
        News::Paused => warn!(
            "{subject} is paused: its process is stopped, and answers no client until a SIGCONT"
        ),
        News::Resumed(after) => {
            let seconds = after.as_secs_f64();
            info!("{subject} goes on after {seconds:.1} s");
        }
    }
}

#[cfg(test)]
mod tests;
