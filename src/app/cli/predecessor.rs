//! What has stayed with the processes from which an hvsock has taken over.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::table;
use crate::app::control::{self, ConnectionInfo, Status, ask_status, read};

/// How long such a process may take to answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// How many take-overs are followed back: each may have happened within the grace of the one
/// before.
const MOST: usize = 8;

/// Asks a process that has handed over for its status, by the control socket under its number.
pub(super) fn find(process: u32) -> Option<Status> {
    let path = control::find_own_path(process);
    path.symlink_metadata().ok()?;
    let status: Status = read(&ask_status(&path, PATIENCE).ok()?).ok()?;
    (status.pid == process && status.successor.is_some()).then_some(status)
}

/// What a process that was started to take over finds at its standard input: whatever else has a
/// socket there, as a shell of sshd's has, is told nothing.
pub(super) const TELL_WHY_NOT: &[u8] = b"hvsock upgrade\n";

/// Tells the process that has started this one to take over why it doesn't, by standard input,
/// which is a socket of that one's then.
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
        // One that has gone wants to know nothing.
        let _ = (&socket).write_all(lines.join("\n").as_bytes());
    }
}

/// Returns the processes that have handed over, one to the next and the last to this one, and still
/// run.
fn predecessors(status: &Status) -> Vec<Status> {
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

/// Returns a line for each process with connections that were left with it.
pub(super) fn left_behind(status: &Status) -> Vec<String> {
    let with_some = predecessors(status).into_iter().filter(|it| it.live > 0);
    let lines = with_some.map(|old| {
        let (pid, live) = (old.pid, table::counted(old.live as u64, "connection"));
        format!(
            "process {pid}, which was taken over from, still has {live}: `hvsock connections --pid {pid}`"
        )
    });
    lines.collect()
}

/// Returns the process that has a connection of that number, if it was left with one.
pub(super) fn owner(status: &Status, id: u64) -> Option<u32> {
    let has_it = |old: &Status| {
        let path = control::find_own_path(old.pid);
        let all = control::get::<Vec<ConnectionInfo>>(&path, "/v1/connections");
        all.is_ok_and(|all| all.iter().any(|it| it.id == id))
    };
    let mut old = predecessors(status).into_iter();
    old.find(has_it).map(|old| old.pid)
}
