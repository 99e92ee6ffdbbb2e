//! Asks the hvsock processes of this user for their status.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::app::control::{self, Status, ask_status, read};
use crate::app::processes::{self, RunningProcess};
use crate::thread::start_thread;

/// How long a process may take to answer. A stopped process never does.
const PATIENCE: Duration = Duration::from_secs(2);

/// A running hvsock, and its status.
pub(crate) struct Hvsock {
    pub(crate) process: RunningProcess,
    /// The path of its control socket, and its status as JSON; `None` if it doesn't answer.
    pub(crate) answer: Option<(PathBuf, String)>,
}

impl Hvsock {
    pub(crate) fn status(&self) -> Option<Status> {
        let (_, answer) = self.answer.as_ref()?;
        read(answer).ok()
    }
}

/// Finds the hvsocks of this user, and asks all of them at once.
///
/// # Errors
/// Returns the system's error, if it doesn't list processes.
pub(crate) fn find() -> std::io::Result<Vec<Hvsock>> {
    let asking = processes::list()?.into_iter().map(|process| {
        let asked = process.clone();
        let thread = start_thread("hvsock-ask", "to ask an hvsock", move || ask(&asked));
        (process, thread)
    });
    // Start all threads before the first is joined.
    let asking: Vec<_> = asking.collect();
    let answered = asking.into_iter().map(|(process, thread)| Hvsock {
        answer: match thread {
            Ok(thread) => thread.join().ok().flatten(),
            // Without a thread, ask it here.
            Err(_) => ask(&process),
        },
        process,
    });
    Ok(answered.collect())
}

/// Asks a process at each path where its control socket may be. An answer from another process
/// doesn't count. Returns the path of the control socket, and the status as JSON.
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

/// Returns the path of a process' control socket: its own, the one of its command line, or else the
/// path where its own would be.
pub(crate) fn find_control_of(process: u32) -> PathBuf {
    let own = control::find_own_path(process);
    if own.symlink_metadata().is_ok() {
        return own;
    }
    let all = processes::list().unwrap_or_default();
    let meant = all.iter().find(|it| it.id == process);
    meant.and_then(ask).map_or(own, |(path, _)| path)
}

/// Returns a path of a process' command line as an absolute one, if its directory is known.
fn from_its_directory(process: u32, named: &str) -> Option<PathBuf> {
    let path = PathBuf::from(named);
    if path.is_absolute() {
        return Some(path);
    }
    let directory = std::fs::read_link(format!("/proc/{process}/cwd")).ok()?;
    Some(directory.join(path))
}
