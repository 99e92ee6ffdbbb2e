//! The path of the control socket, and its directory.

use std::env;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::address::{Address, UnixAddress};
use crate::error::{Error, Operation, Result};
use crate::sys;

const NAME: &str = "control.sock";

/// The program's name.
const PROGRAM: &str = "hvsock";

/// Returns the default path of the control socket: in the user's runtime directory
/// (`$XDG_RUNTIME_DIR/hvsock`); on macOS, or without a runtime directory, in a directory of the
/// user among the temporary files (`$TMPDIR/hvsock-UID`, or `/tmp/hvsock-UID`).
///
/// Ignores a directory of the environment that doesn't exist, as after `su`.
pub(crate) fn default_path() -> PathBuf {
    directory().join(NAME)
}

/// Returns the user's directory of control sockets.
fn directory() -> PathBuf {
    let mut places = places();
    let there = places.iter().position(|(parent, _)| parent.is_dir());
    // The last one is /tmp.
    let at = there.unwrap_or(places.len() - 1);
    places.swap_remove(at).1
}

/// Returns the usual places, the first choice first: the directory that must exist, and the
/// directory of control sockets in it.
fn places() -> Vec<(PathBuf, PathBuf)> {
    let absolute = |name| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|it| it.is_absolute())
    };
    let runtime = absolute("XDG_RUNTIME_DIR").filter(|_| cfg!(not(target_os = "macos")));
    let mut places = Vec::new();
    if let Some(runtime) = runtime {
        let directory = runtime.join(PROGRAM);
        places.push((runtime, directory));
    }
    for temporary in absolute("TMPDIR").into_iter().chain(["/tmp".into()]) {
        let directory = temporary.join(format!("{PROGRAM}-{}", sys::user_id()));
        if !places.iter().any(|(_, known)| *known == directory) {
            places.push((temporary, directory));
        }
    }
    places
}

/// Returns the usual directories of control sockets, the first choice first.
fn usual_directories() -> impl Iterator<Item = PathBuf> {
    places().into_iter().map(|(_, directory)| directory)
}

/// Returns the usual paths of a control socket, the first choice first.
pub(super) fn usual_paths() -> Vec<PathBuf> {
    usual_directories().map(|it| it.join(NAME)).collect()
}

fn is_usual(at: &Path) -> bool {
    usual_directories().any(|usual| usual == at)
}

/// Returns the path of a process' own control socket, which it has if it was given no path: beside
/// the default one, under the process id.
pub(super) fn own_path(process: u32) -> PathBuf {
    own_path_in(&directory(), process)
}

fn own_path_in(directory: &Path, process: u32) -> PathBuf {
    directory.join(format!("{process}.sock"))
}

/// Returns the paths where the control socket of a process may be that was given no path and may
/// have another environment: in each usual place its own, and the default one.
pub(crate) fn paths_of(process: u32) -> impl Iterator<Item = PathBuf> {
    usual_directories().flat_map(move |it| [own_path_in(&it, process), it.join(NAME)])
}

/// Returns the path of a process' own control socket: the first usual place with that file, or else
/// where it would be.
pub(crate) fn find_own_path(process: u32) -> PathBuf {
    let mut own = usual_directories().map(|it| own_path_in(&it, process));
    let there = own.find(|it| it.symlink_metadata().is_ok());
    there.unwrap_or_else(|| own_path(process))
}

/// Returns the process whose own control socket has this address, if it is such an address.
pub(super) fn process_of(place: &str) -> Option<u32> {
    let process = place
        .rsplit('/')
        .next()?
        .strip_suffix(".sock")?
        .parse()
        .ok()?;
    let mut own = usual_directories().map(|it| own_path_in(&it, process));
    own.any(|path| address(&path).to_string() == place)
        .then_some(process)
}

/// Returns the path of the control socket to use if the user names none, for an hvsock that may
/// have another environment. That is the first usual path on which one answers; or else the first
/// one with a file; or else the own socket of the only process of this environment; or else the
/// default.
pub(crate) fn find_path() -> PathBuf {
    let mut there = usual_paths();
    there.retain(|it| it.symlink_metadata().is_ok());
    if there.len() > 1
        && let Some(at) = there
            .iter()
            .position(|it| check(it).is_ok() && is_alive(it))
    {
        return there.swap_remove(at);
    }
    if let Some(first) = there.into_iter().next() {
        return first;
    }
    let own = own_sockets();
    let mut alive = own.into_iter().filter(|(_, path)| is_alive(path));
    match (alive.next(), alive.next()) {
        (Some((_, path)), None) => path,
        _ => default_path(),
    }
}

/// Returns the own sockets of processes of this environment, with the process ids. Some may be left
/// by killed processes. Those of other environments are not included.
fn own_sockets() -> Vec<(u32, PathBuf)> {
    let directory = directory();
    // A directory of another user has none of this user's sockets.
    if look_at(&default_path(), &directory, Operation::Connect).is_err() {
        return Vec::new();
    }
    let files = fs::read_dir(directory).into_iter().flatten().flatten();
    let own = files.filter_map(|file| {
        let name = file.file_name();
        let process = name.to_str()?.strip_suffix(".sock")?.parse().ok()?;
        Some((process, file.path()))
    });
    own.collect()
}

/// Returns the processes of this environment that have their own control socket.
pub(super) fn processes_with_own_sockets() -> Vec<u32> {
    let own = own_sockets().into_iter();
    let mut processes: Vec<u32> = own
        .filter(|(_, path)| is_alive(path))
        .map(|(process, _)| process)
        .collect();
    processes.sort_unstable();
    processes
}

fn is_alive(path: &Path) -> bool {
    sys::is_socket_alive(path).unwrap_or(false)
}

/// Removes the sockets of killed processes, but not of a process that is about to listen.
pub(super) fn remove_stale() {
    for (process, path) in own_sockets() {
        let runs = i32::try_from(process).is_ok_and(sys::process_is_alive)
            && sys::program_name(process).is_none_or(|program| program == PROGRAM);
        if !runs && matches!(sys::is_socket_alive(&path), Ok(false)) {
            // Another process may have removed it.
            let _ = fs::remove_file(&path);
        }
    }
}

/// Returns the address of the socket at `path`.
pub(super) fn address(path: &Path) -> Address {
    Address::Unix(UnixAddress::Path(path.to_path_buf()))
}

/// Makes a directory for the socket at `path`, for this user alone, if it doesn't exist. Checks
/// that no other user can replace a socket in it: the default directory must be accessible to this
/// user only; in others, only this user and root may rename files, since the socket's own
/// permissions keep others out.
///
/// # Errors
/// Returns `PermissionDenied` if the directory is open to others, or the system's error.
pub(super) fn prepare(path: &Path) -> Result<()> {
    let Some(directory) = directory_of(path) else {
        return Ok(());
    };
    match DirBuilder::new().mode(0o700).create(directory) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            let what = format!("its directory {} can't be made: {e}", directory.display());
            let cause = io::Error::new(e.kind(), what);
            Err(Error::new(Operation::Listen, address(path), cause)
                .with_remedy("choose another place with --control PATH"))
        }
        _ => look_at(path, directory, Operation::Listen),
    }
}

/// Refuses the default place if others can put a socket there, before a client connects. Any other
/// path was named by the user, and is trusted.
///
/// # Errors
/// Returns `PermissionDenied` if its directory is open to others; a missing one is no error.
pub(super) fn check(path: &Path) -> Result<()> {
    match directory_of(path) {
        Some(at) if is_usual(at) && at.symlink_metadata().is_ok() => {
            look_at(path, at, Operation::Connect)
        }
        _ => Ok(()),
    }
}

fn directory_of(path: &Path) -> Option<&Path> {
    let parent = path.parent()?;
    Some(match parent.as_os_str().is_empty() {
        true => Path::new("."),
        false => parent,
    })
}

/// Refuses a directory in which others can put a socket.
fn look_at(path: &Path, at: &Path, operation: Operation) -> Result<()> {
    let fail = |cause, remedy: String| {
        Err(Error::new(operation, address(path), cause).with_remedy(remedy))
    };
    let own = is_usual(at);
    // In the default place a symbolic link may be another user's.
    let metadata = match own {
        true => fs::symlink_metadata(at),
        false => fs::metadata(at),
    };
    let metadata = match metadata {
        Ok(metadata) => metadata,
        Err(e) => return fail(e, "look at its directory's permissions".to_owned()),
    };
    if let Some(why) = objection(&metadata, own) {
        let why = format!("its directory {} {why}", at.display());
        let cause = io::Error::new(io::ErrorKind::PermissionDenied, why);
        let elsewhere = "give --control PATH in a directory of your own";
        let remedy = match own {
            true if metadata.uid() != sys::user_id() => format!("have it removed, or {elsewhere}"),
            true => format!("remove it, or `chmod 700 {}` if it is yours", at.display()),
            false => elsewhere.to_owned(),
        };
        return fail(cause, remedy);
    }
    Ok(())
}

/// Returns what is wrong with a directory. With `own` it must be accessible to this user only.
fn objection(directory: &fs::Metadata, own: bool) -> Option<String> {
    let (owner, mode) = (directory.uid(), directory.mode() & 0o7777);
    let user = sys::user_id();
    if !directory.is_dir() {
        return Some("is no directory".to_owned());
    }
    if owner != user && (own || owner != 0) {
        return Some(format!("is that of user {owner}, not of user {user}"));
    }
    if own && mode & 0o077 != 0 {
        return Some(format!("is open to others (its mode is {mode:o})"));
    }
    let sticky = mode & 0o1000 != 0;
    if mode & 0o022 != 0 && !sticky {
        return Some(format!("may be written by others (its mode is {mode:o})"));
    }
    None
}
