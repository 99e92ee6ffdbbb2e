//! What has stayed with the processes from which an hvsock has taken over.

use std::time::Duration;

use super::table;
use crate::app::control::{self, Status, ask_status, read};

/// How long such a process may take to answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// How many take-overs are followed back: each may have happened within the grace of the one before.
const MOST: usize = 8;

/// Asks a process that has handed over for its status, by the control socket under its number.
pub(super) fn find(process: u32) -> Option<Status> {
    let path = control::find_own_path(process);
    path.symlink_metadata().ok()?;
    let status: Status = read(&ask_status(&path, PATIENCE).ok()?).ok()?;
    (status.pid == process && status.successor.is_some()).then_some(status)
}

/// Returns a line for each process with connections that were left with it.
pub(super) fn left_behind(status: &Status) -> Vec<String> {
    let mut lines = Vec::new();
    let mut next = status.predecessor;
    for _ in 0..MOST {
        let Some(old) = next.and_then(find) else {
            break;
        };
        if old.live > 0 {
            let (pid, live) = (old.pid, table::counted(old.live as u64, "connection"));
            lines.push(format!(
                "process {pid}, which was taken over from, still has {live}: `hvsock connections --pid {pid}`"
            ));
        }
        next = old.predecessor;
    }
    lines
}
