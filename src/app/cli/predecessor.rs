//! Finds connections that were left with the processes from which an hvsock has taken over.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::table;
use crate::app::control::{self, ConnectionInfo, Status, ask_status, read};

/// How long a predecessor may take to answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// How many take-overs are followed back: each may have happened within the grace of the earlier
/// one.
const MOST: usize = 8;

/// Asks a process that has handed over for its status, by its own control socket.
pub(super) fn find(process: u32) -> Option<Status> {
    let path = control::find_own_path(process);
    path.symlink_metadata().ok()?;
    let status: Status = read(&ask_status(&path, PATIENCE).ok()?).ok()?;
    (status.pid == process && status.successor.is_some()).then_some(status)
}

/// The greeting that a process started to take over finds on its standard input. Another program's
/// socket there, such as that of sshd's shell, has no greeting and is sent nothing.
pub(super) const TELL_WHY_NOT: &[u8] = b"hvsock upgrade\n";

/// Reports why this process can't take over to the process that has started it for that. Standard
/// input is a socket of that process then.
pub(super) fn tell_why_not(lines: &[String]) {
    let Ok(input) = io::stdin().as_fd().try_clone_to_owned() else {
        return;
    };
    let socket = UnixStream::from(input);
    let mut asked = [0; TELL_WHY_NOT.len()];
    let is_asked = socket.peer_addr().is_ok()
        && socket.set_nonblocking(true).is_ok()
        && (&socket).read_exact(&mut asked).is_ok();
    if is_asked && asked == TELL_WHY_NOT {
        // The process may have ended.
        let _ = (&socket).write_all(lines.join("\n").as_bytes());
    }
}

/// Returns the processes that have handed over to this one, directly or through others, and still
/// run.
fn find_predecessors(status: &Status) -> Vec<Status> {
    let mut found = Vec::new();
    let mut next = status.predecessor;
    for _ in 0..MOST {
        let Some(old) = next.and_then(find) else {
            break;
        };
        next = old.predecessor;
        found.push(old);
    }
    found
}

/// Returns a line for each predecessor that still has connections.
pub(super) fn left_behind(status: &Status) -> Vec<String> {
    let with_some = find_predecessors(status)
        .into_iter()
        .filter(|it| it.live > 0);
    let lines = with_some.map(|old| {
        let (pid, live) = (old.pid, table::counted(old.live as u64, "connection"));
        format!(
            "process {pid}, which was taken over from, still has {live}: `hvsock connections --pid {pid}`"
        )
    });
    lines.collect()
}

/// Returns the predecessor that has a connection of that id.
pub(super) fn owner(status: &Status, id: u64) -> Option<u32> {
    let has_it = |old: &Status| {
        let path = control::find_own_path(old.pid);
        let all = control::get::<Vec<ConnectionInfo>>(&path, "/v1/connections");
        all.is_ok_and(|all| all.iter().any(|it| it.id == id))
    };
    let mut old = find_predecessors(status).into_iter();
    old.find(has_it).map(|old| old.pid)
}
