//! Where the control socket is, and the directory around it.

use std::env;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::address::{Address, UnixAddress};
use crate::error::{Error, Operation, Result};
use crate::sys;

const NAME: &str = "control.sock";

/// Where the control socket is unless another place is asked for: in the user's runtime directory
/// (`$XDG_RUNTIME_DIR/hvsock`), or, on macOS and where there is none, in a directory of the user's among the temporary
/// files (`$TMPDIR/hvsock-UID`, or `/tmp/hvsock-UID`).
pub(crate) fn default_path() -> PathBuf {
    let absolute = |name| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|it| it.is_absolute())
    };
    let runtime = absolute("XDG_RUNTIME_DIR").filter(|_| cfg!(not(target_os = "macos")));
    let directory = match runtime {
        Some(runtime) => runtime.join("hvsock"),
        None => {
            let temporary = absolute("TMPDIR").unwrap_or_else(|| "/tmp".into());
            temporary.join(format!("hvsock-{}", sys::user_id()))
        }
    };
    directory.join(NAME)
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
    let directory = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return Ok(()),
    };
    let fail = |cause, remedy: String| {
        Err(Error::new(Operation::Listen, address(path), cause).with_remedy(remedy))
    };
    match DirBuilder::new().mode(0o700).create(directory) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            let what = format!("its directory {} can't be made: {e}", directory.display());
            let remedy = "choose another place with --control PATH";
            return fail(io::Error::new(e.kind(), what), remedy.to_owned());
        }
        _ => {}
    }
    let own = path == default_path();
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
        let remedy = match own {
            true => format!(
                "remove it, or `chmod 700 {}` if it is yours",
                directory.display()
            ),
            false => "give --control PATH in a directory of your own".to_owned(),
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
        return Some(format!("is that of user {owner}, not of {user}"));
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
