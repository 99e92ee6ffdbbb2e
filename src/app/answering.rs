//! The hvsock processes that can be asked for their status.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::app::control::{self, Status, ask_status, read};
use crate::app::processes::{self, RunningProcess};
use crate::thread::start_thread;

/// How long a process may take to answer. One that is stopped never does.
const PATIENCE: Duration = Duration::from_secs(2);

/// An hvsock that runs, and what it says of itself.
pub(crate) struct Hvsock {
    pub(crate) process: RunningProcess,
    /// Where it is controlled, and its status as JSON; `None` if it doesn't answer.
    pub(crate) answer: Option<(PathBuf, String)>,
}

impl Hvsock {
    pub(crate) fn status(&self) -> Option<Status> {
        let (_, answer) = self.answer.as_ref()?;
        read(answer).ok()
    }
}

/// Finds the hvsocks of this user, and asks them all at once.
///
/// # Errors
/// Returns the system's error, if it doesn't tell of processes.
pub(crate) fn find() -> std::io::Result<Vec<Hvsock>> {
    let asking = processes::list()?.into_iter().map(|process| {
        let asked = process.clone();
        let thread = start_thread("hvsock-ask", "to ask an hvsock", move || ask(&asked));
        (process, thread)
    });
    // All are begun before the first is waited for.
    let asking: Vec<_> = asking.collect();
    let answered = asking.into_iter().map(|(process, thread)| Hvsock {
        answer: match thread {
            Ok(thread) => thread.join().ok().flatten(),
            // Without a thread of its own it is asked in its turn.
            Err(_) => ask(&process),
        },
        process,
    });
    Ok(answered.collect())
}

/// Asks a process at each place where its control socket may be; another's answer is none. Returns
/// where it is controlled, and its status as JSON.
fn ask(process: &RunningProcess) -> Option<(PathBuf, String)> {
    let named = process.option("control").filter(|named| *named != "off");
    let named = named.and_then(|named| from_its_directory(process.id, named));
    let usual = control::paths_of(process.id);
    let places = named.into_iter().chain(usual);
    let mut answers = places
        .filter(|path| path.symlink_metadata().is_ok())
        .filter_map(|path| {
            let answer = ask_status(&path, PATIENCE).ok()?;
            let status: Value = serde_json::from_str(&answer).ok()?;
            (status["pid"] == process.id).then_some((path, answer))
        });
    answers.next()
}

/// Returns where a process is controlled: its own socket, or the one that it was given, or else
/// where its own would be.
pub(crate) fn find_control_of(process: u32) -> PathBuf {
    let own = control::find_own_path(process);
    if own.symlink_metadata().is_ok() {
        return own;
    }
    let all = processes::list().unwrap_or_default();
    let meant = all.iter().find(|it| it.id == process);
    meant.and_then(ask).map_or(own, |(path, _)| path)
}

/// Returns the path that a process means by `named`, if that can be known.
fn from_its_directory(process: u32, named: &str) -> Option<PathBuf> {
    let path = PathBuf::from(named);
    if path.is_absolute() {
        return Some(path);
    }
    let directory = std::fs::read_link(format!("/proc/{process}/cwd")).ok()?;
    Some(directory.join(path))
}
