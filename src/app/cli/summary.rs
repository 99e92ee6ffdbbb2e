//! What has changed when a file was applied, for people and programs.

use std::collections::HashSet;
use std::fmt;
use std::time::Duration;

use crate::app::config::quote_key;

/// How often pending forwards are retried.
pub(super) const TRY_AGAIN: Duration = Duration::from_secs(2);

/// What has changed when the file was applied, by the forwards' names. Prints as counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Summary {
    pub(super) added: Vec<String>,
    pub(super) changed: Vec<String>,
    pub(super) removed: Vec<String>,
    pub(super) kept: Vec<String>,
    /// The forwards that can't be had now, and why; they are retried.
    pub(super) failed: Vec<Failed>,
    /// Other changed settings, as `key = value`.
    pub(super) settings: Vec<String>,
    /// Changed keys that need a restart.
    pub(super) restart: Vec<&'static str>,
    /// What is dangerous about the change.
    pub(super) warnings: Vec<String>,
}

/// A forward that can't be had now.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Failed {
    pub(super) name: String,
    pub(super) why: String,
    /// Whether what it lacks is expected to be missing at times, such as a VM.
    pub(super) waits: bool,
    pub(super) retried: Retried,
}

/// When a pending forward is retried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Retried {
    /// After [`TRY_AGAIN`].
    Soon,
    /// Only at a requested reload: another listener has to be closed for it.
    OnReload,
}

impl Failed {
    /// Returns why it can't be had, and what is done about it.
    pub(super) fn reason(&self) -> String {
        let why = &self.why;
        match self.retried {
            Retried::Soon => tried_again(why),
            Retried::OnReload => format!(
                "{why}; it listens where it did, and is tried again when the file is read again"
            ),
        }
    }
}

impl Summary {
    /// Returns whether nothing has changed.
    pub(super) fn is_empty(&self) -> bool {
        let Summary {
            added,
            changed,
            removed,
            failed,
            settings,
            restart,
            ..
        } = self;
        added.is_empty()
            && changed.is_empty()
            && removed.is_empty()
            && failed.is_empty()
            && settings.is_empty()
            && restart.is_empty()
    }

    /// Counts a forward that was both removed and added as moved.
    pub(super) fn join_moves(&mut self) {
        let added: HashSet<&String> = self.added.iter().collect();
        let again = |name: &mut String| added.contains(name);
        let moved: Vec<String> = self.removed.extract_if(.., again).collect();
        let names: HashSet<&String> = moved.iter().collect();
        self.added.retain(|name| !names.contains(name));
        self.changed.extend(moved);
    }

    /// Returns the report for the control socket.
    #[cfg(unix)]
    pub(super) fn report(&self) -> SummaryReport {
        let failed = self.failed.iter();
        SummaryReport {
            added: self.added.clone(),
            changed: self.changed.clone(),
            removed: self.removed.clone(),
            kept: self.kept.clone(),
            failed: failed.map(|it| (it.name.clone(), it.why.clone())).collect(),
            settings: self.settings.clone(),
            restart: self.restart.iter().copied().map(str::to_owned).collect(),
            warnings: self.warnings.clone(),
        }
    }

    /// Returns what a user should know, line by line.
    pub(super) fn troubles(&self) -> Vec<String> {
        let mut told = failures(&self.failed);
        let restart = |key: &&str| format!("{key} has changed in the file, which takes a restart");
        told.extend(self.restart.iter().map(restart));
        told.extend(self.warnings.clone());
        told
    }
}

/// A [`Summary`] as the control socket reports it.
#[cfg(unix)]
#[derive(Debug, serde::Deserialize, serde::Serialize)]
pub(super) struct SummaryReport {
    added: Vec<String>,
    changed: Vec<String>,
    removed: Vec<String>,
    kept: Vec<String>,
    /// The forwards that can't be had now, each with the reason.
    pub(super) failed: std::collections::BTreeMap<String, String>,
    #[serde(default)]
    settings: Vec<String>,
    restart: Vec<String>,
    warnings: Vec<String>,
}

#[cfg(unix)]
impl SummaryReport {
    /// Returns what has changed, line by line.
    pub(super) fn changes(&self) -> Vec<String> {
        let named = [
            ("added", &self.added),
            ("changed", &self.changed),
            ("removed", &self.removed),
        ];
        let named = named.into_iter().filter(|(_, names)| !names.is_empty());
        let mut told: Vec<String> = named
            .map(|(what, names)| format!("{what}: {}", names.join(", ")))
            .collect();
        told.extend(self.settings.iter().map(|it| format!("now {it}")));
        if told.is_empty() && self.failed.is_empty() {
            told.push("nothing has changed".to_owned());
        }
        told
    }

    /// Returns what differs from the file, and what is dangerous, line by line.
    pub(super) fn troubles(&self) -> Vec<String> {
        let failed = self.failed.iter();
        let mut told: Vec<String> = failed
            .map(|(name, why)| format!("[forward.{}]: {why}", quote_key(name)))
            .collect();
        let restart =
            |key: &String| format!("{key} has changed in the file, which takes a restart");
        told.extend(self.restart.iter().map(restart));
        told.extend(self.warnings.clone());
        told
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = [
            (&self.added, "added"),
            (&self.changed, "changed"),
            (&self.removed, "removed"),
            (&self.kept, "kept"),
        ];
        let counts = counts.map(|(names, what)| format!("{} {what}", names.len()));
        f.write_str(&counts.join(", "))?;
        let waiting = self.failed.iter().filter(|it| it.waits).count();
        // The words of `hvsock status`.
        for (count, state) in [
            (self.failed.len() - waiting, "failed"),
            (waiting, "waiting"),
        ] {
            if count > 0 {
                write!(f, ", {count} {state}")?;
            }
        }
        Ok(())
    }
}

/// Describes the forwards that can't be had now, line by line.
pub(super) fn failures(failed: &[Failed]) -> Vec<String> {
    let line = |it: &Failed| format!("[forward.{}]: {}", quote_key(&it.name), it.reason());
    failed.iter().map(line).collect()
}

/// Describes why something can't be had that is retried.
pub(super) fn tried_again(why: &str) -> String {
    format!("{why}; it is tried again every {} s", TRY_AGAIN.as_secs())
}
