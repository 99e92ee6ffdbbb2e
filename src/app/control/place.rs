//! Where the control socket is, and the directory around it.

use std::env;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use crate::address::{Address, UnixAddress};
use crate::error::{Error, Operation, Result};
use crate::sys;

const NAME: &str = "control.sock";

/// Where the control socket is unless another place is asked for: in the user's runtime directory
/// (`$XDG_RUNTIME_DIR/hvsock`), or, on macOS and where there is none, in a directory of the user's among the temporary
/// files (`$TMPDIR/hvsock-UID`, or `/tmp/hvsock-UID`).
///
/// A directory that is named and isn't there, as after `su`, is passed over.
pub(crate) fn default_path() -> PathBuf {
    let mut places = places();
    let there = places.iter().position(|(parent, _)| parent.is_dir());
    // The last one is /tmp.
    let at = there.unwrap_or(places.len() - 1);
    places.swap_remove(at).1
}

/// The usual places, the first choice first: the directory that must be there, and the socket below it.
fn places() -> Vec<(PathBuf, PathBuf)> {
    let absolute = |name| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|it| it.is_absolute())
    };
    let runtime = absolute("XDG_RUNTIME_DIR").filter(|_| cfg!(not(target_os = "macos")));
    let mut places = Vec::new();
    if let Some(runtime) = runtime {
        let socket = runtime.join("hvsock").join(NAME);
        places.push((runtime, socket));
    }
    for temporary in absolute("TMPDIR").into_iter().chain(["/tmp".into()]) {
        let own = format!("hvsock-{}", sys::user_id());
        let socket = temporary.join(own).join(NAME);
        if !places.iter().any(|(_, known)| *known == socket) {
            places.push((temporary, socket));
        }
    }
    places
}

/// The paths at which a control socket is usually, the first choice first.
pub(super) fn usual_paths() -> Vec<PathBuf> {
    places().into_iter().map(|(_, socket)| socket).collect()
}

fn is_usual(path: &Path) -> bool {
    usual_paths().iter().any(|usual| usual == path)
}

/// Returns where an hvsock is that was started in another environment, perhaps: the first usual place at which one
/// answers, or else the first one with a file, or the default.
pub(crate) fn find_path() -> PathBuf {
    let usual = usual_paths();
    let there: Vec<&PathBuf> = usual
        .iter()
        .filter(|it| it.symlink_metadata().is_ok())
        .collect();
    let chosen = match there[..] {
        [] => None,
        [only] => Some(only),
        [first, ..] => there
            .iter()
            .copied()
            .find(|it| check(it).is_ok() && UnixStream::connect(it).is_ok())
            .or(Some(first)),
    };
    chosen.cloned().unwrap_or_else(default_path)
}

/// The address of the socket at `path`.
pub(super) fn address(path: &Path) -> Address {
    Address::Unix(UnixAddress::Path(path.to_path_buf()))
}

/// Sees to a directory for the socket at `path` in which nobody else can put one in its place: makes it if it isn't
/// there, for this user alone. Of the default place it must be the user's alone; of another it will do that none but he and root
/// can rename what is in it, for the socket itself lets nobody else in.
///
/// # Errors
/// `PermissionDenied` if the directory is open to others; what the system says otherwise.
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

/// Refuses the default place if others can put a socket there, before anybody connects to it. Of
/// another place the user has said that it is the right one.
///
/// # Errors
/// `PermissionDenied` if its directory is open to others; but not if there is none.
pub(super) fn check(path: &Path) -> Result<()> {
    match directory_of(path) {
        Some(directory) if is_usual(path) && directory.symlink_metadata().is_ok() => {
            look_at(path, directory, Operation::Connect)
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
fn look_at(path: &Path, directory: &Path, operation: Operation) -> Result<()> {
    let fail = |cause, remedy: String| {
        Err(Error::new(operation, address(path), cause).with_remedy(remedy))
    };
    let own = is_usual(path);
    // A symbolic link in the default place may be anybody's.
    let metadata = match own {
        true => fs::symlink_metadata(directory),
        false => fs::metadata(directory),
    };
    let metadata = match metadata {
        Ok(metadata) => metadata,
        Err(e) => return fail(e, "look at its directory's permissions".to_owned()),
    };
    if let Some(why) = objection(&metadata, own) {
        let why = format!("its directory {} {why}", directory.display());
        let cause = io::Error::new(io::ErrorKind::PermissionDenied, why);
        let elsewhere = "give --control PATH in a directory of your own";
        let remedy = match own {
            true if metadata.uid() != sys::user_id() => format!("have it removed, or {elsewhere}"),
            true => format!(
                "remove it, or `chmod 700 {}` if it is yours",
                directory.display()
            ),
            false => elsewhere.to_owned(),
        };
        return fail(cause, remedy);
    }
    Ok(())
}

/// What is wrong with a directory; `own`: it is to be this user's alone.
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
