//! Whether who is dialled is there: what is known of it, and what of that is news.

use std::fmt;
use std::time::{Duration, Instant, SystemTime};

use tracing::{info, warn};

use crate::error::Error;
use crate::sys::Identity;

/// Something to be told, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// It has gone; or it was never there, as far as is known.
    Gone { was_there: bool },
    /// It is there, and was gone for so long.
    Back(Duration),
    /// It was started anew, and nobody has noticed that it was gone.
    Restarted,
}

/// By what a VM is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VmIdentity {
    /// What its `connect` socket is.
    Socket(Identity),
    /// What its process' file is, where there is no such socket.
    PidFile(Identity),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Unknown,
    Up,
    Gone {
        since: Instant,
        /// The same on the wall's clock, which goes on while the machine sleeps.
        at: SystemTime,
        told: bool,
    },
}

/// How long after it has come back a dial may still fail that was begun before, on another worker.
const SETTLES: Duration = Duration::from_millis(100);

/// What is known of one VM or one server.
#[derive(Debug)]
pub(crate) struct Health {
    state: State,
    was_there: bool,
    /// What it was when it was seen last.
    identity: Option<VmIdentity>,
    /// It could not be seen since.
    unseen: bool,
    process: Option<i32>,
    back: Option<Instant>,
    /// What it was before, and until when that may still be seen.
    replaced: Option<(VmIdentity, Instant)>,
    /// A dial has found it, that it is back was told, and what it is now has not been seen since.
    told_before_seen: bool,
    restarts: u64,
}

impl Default for Health {
    fn default() -> Health {
        Health {
            state: State::Unknown,
            was_there: false,
            identity: None,
            unseen: false,
            process: None,
            back: None,
            replaced: None,
            told_before_seen: false,
            restarts: 0,
        }
    }
}

impl Health {
    /// Takes a dial that found nobody.
    pub(crate) fn mark_down(&mut self, now: Instant) -> Option<News> {
        match self.state {
            State::Gone { told: true, .. } => return None,
            State::Up if self.settles(now) => return None,
            State::Gone { .. } | State::Unknown | State::Up => {}
        }
        Some(self.gone(now))
    }

    /// It has come back just now.
    fn settles(&self, now: Instant) -> bool {
        self.back.is_some_and(|back| now < back + SETTLES)
    }

    fn gone(&mut self, now: Instant) -> News {
        self.set_gone(now, true);
        News::Gone {
            was_there: self.was_there,
        }
    }

    /// Takes it for gone; if it is so already, since when it was.
    fn set_gone(&mut self, now: Instant, told: bool) {
        let (since, at) = match self.state {
            State::Gone { since, at, .. } => (since, at),
            State::Unknown | State::Up => (now, SystemTime::now()),
        };
        self.state = State::Gone { since, at, told };
    }

    /// Takes a dial that found somebody.
    pub(crate) fn mark_up(&mut self, now: Instant) -> Option<News> {
        let before = std::mem::replace(&mut self.state, State::Up);
        self.was_there = true;
        match before {
            State::Gone { since, .. } => {
                self.told_before_seen = true;
                self.back = Some(now);
                Some(News::Back(now.saturating_duration_since(since)))
            }
            State::Unknown | State::Up => None,
        }
    }

    /// Takes what it is now; whether it is another than before.
    pub(crate) fn note_identity(
        &mut self,
        identity: VmIdentity,
        now: Instant,
    ) -> (bool, Option<News>) {
        // That a VM's socket is missing says nothing of who it is: one that begins has its pid file first. So once one
        // has had a socket, its pid file is no identity any more.
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
            self.restarts += 1;
            self.replaced = before.map(|before| (before, now + SETTLES));
        }
        let came = std::mem::take(&mut self.unseen) || is_new;
        // So may it be older than what a dial has found.
        let told = self.told_before_seen;
        self.told_before_seen &= !is_new && self.settles(now);
        let news = match self.state {
            State::Gone { .. } if came => {
                let news = self.mark_up(now);
                self.told_before_seen = false;
                news
            }
            // One that begins has its socket only after its other files.
            State::Up if is_new && !told && !self.settles(now) => Some(News::Restarted),
            _ => None,
        };
        (is_new, news)
    }

    /// Takes that there is nothing to be seen of it.
    pub(crate) fn note_absence(&mut self, now: Instant) -> Option<News> {
        self.unseen = true;
        self.process = None;
        match self.state {
            State::Up => Some(self.gone(now)),
            State::Unknown => {
                self.set_gone(now, false);
                None
            }
            State::Gone { .. } => None,
        }
    }

    /// Takes which process it is, of which a file tells that may be missing or an old one: only that a process has ended
    /// which had been alive says that it is gone.
    pub(crate) fn note_process(&mut self, process: Option<i32>, now: Instant) -> Option<News> {
        let before = std::mem::replace(&mut self.process, process);
        match (self.state, process) {
            (State::Unknown, Some(_)) => self.mark_up(now),
            (State::Up, None) if before.is_some() => Some(self.gone(now)),
            _ => None,
        }
    }

    /// Whether it is there; `None` if nothing is known.
    pub(crate) fn is_up(&self) -> Option<bool> {
        match self.state {
            State::Unknown => None,
            State::Up => Some(true),
            State::Gone { .. } => Some(false),
        }
    }

    pub(crate) fn gone_since(&self) -> Option<SystemTime> {
        match self.state {
            State::Gone { at, .. } => Some(at),
            State::Unknown | State::Up => None,
        }
    }

    pub(crate) fn restarts(&self) -> u64 {
        self.restarts
    }
}

/// Says in the log what is new of `subject`. `clients` are how many forwards refuse theirs meanwhile, and hold them.
pub(crate) fn log_change(
    news: News,
    subject: &dyn fmt::Display,
    error: Option<&Error>,
    clients: [usize; 2],
) {
    match news {
        News::Gone { was_there } => {
            let what = match was_there {
                true => "is gone",
                false => "is not there",
            };
            let why = error.map_or_else(String::new, |error| format!(": {error}"));
            match clients {
                [0, 0] => warn!("{subject} {what}{why}"),
                [_, 0] => warn!("{subject} {what}{why}; clients are refused until it is back"),
                [0, _] => warn!("{subject} {what}{why}; clients are held until it is back"),
                _ => warn!("{subject} {what}{why}; clients are refused or held until it is back"),
            }
        }
        News::Back(after) => {
            let seconds = after.as_secs_f64();
            info!("{subject} is back after {seconds:.1} s");
        }
        News::Restarted => info!("{subject} was started anew"),
    }
}

#[cfg(test)]
mod tests;
