//! Unix sockets bound to a path, and the files that they leave in the file system.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::{fs, io};

use socket2::{Domain, SockAddr, Socket, Type};

use super::state::FileState;
use crate::error::{Error, Operation, Result};
use crate::listener::FileAccess;
use crate::sys::{self, Identity, Place};

/// The file of a Unix socket that this process made, or has from the process that made it. Dropping
/// it removes the file, if it is still that one and no other process has it.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    identity: Identity,
    /// Whether another process has the socket, and removes the file.
    is_left: AtomicBool,
}

impl SocketFile {
    fn new(path: &Path, identity: Identity) -> SocketFile {
        SocketFile {
            path: path.to_owned(),
            identity,
            is_left: AtomicBool::new(false),
        }
    }

    /// Returns the file of a socket that another process hands over. It is that process' until
    /// [`own`](SocketFile::own).
    #[cfg(feature = "cli")]
    pub(crate) fn handed(path: &Path, identity: Identity) -> SocketFile {
        let file = SocketFile::new(path, identity);
        file.leave();
        file
    }

    /// Makes the file this process' own: it is removed at the end.
    #[cfg(feature = "cli")]
    pub(crate) fn own(&self) {
        self.is_left.store(false, Ordering::Relaxed);
    }

    /// Returns whether the file is another process'.
    pub(crate) fn is_left(&self) -> bool {
        self.is_left.load(Ordering::Relaxed)
    }

    pub(crate) fn state(&self) -> FileState {
        match Identity::of(&self.path) {
            Ok(now) if now == self.identity => FileState::Ours,
            Ok(_) => FileState::Taken,
            Err(e) if e.kind() == io::ErrorKind::NotFound => FileState::Missing,
            // A file that can't be looked at can't be restored.
            Err(_) => FileState::Ours,
        }
    }

    /// Returns the directory that it is in.
    pub(crate) fn directory(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new(""))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn identity(&self) -> Identity {
        self.identity
    }

    /// Leaves the file to another process that has the socket: it is not removed.
    pub(crate) fn leave(&self) {
        self.is_left.store(true, Ordering::Relaxed);
    }

    /// Renames the file within its directory, replacing what has the new name.
    ///
    /// # Errors
    /// Returns the system's error; the file keeps its name then.
    pub(crate) fn rename(mut self, path: &Path) -> io::Result<SocketFile> {
        let name = path.file_name().unwrap_or_default();
        Place::of(&self.path)?.rename(self.identity, name)?;
        self.path = path.to_path_buf();
        Ok(self)
    }

    /// Sets its owner, its group and its permissions, unless another file has its name by now.
    pub(crate) fn set_access(&self, access: FileAccess) -> io::Result<()> {
        let place = Place::of(&self.path)?;
        let FileAccess { mode, owner, group } = access;
        if !place.is_owned(owner, group)? {
            // The old group must not get the new one's permissions meanwhile, nor the new group the
            // old one's.
            place.set_mode(self.identity, mode & 0o700)?;
            place.set_owner(self.identity, owner, group)?;
        }
        place.set_mode(self.identity, mode)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_left() {
            return;
        }
        // Another file may have the name by now, or none.
        let _ = Place::of(&self.path).and_then(|place| place.remove(self.identity));
    }
}

/// Binds a socket to `path`, and gives its file that owner, group and permissions; errors speak of
/// `subject`.
///
/// A file in the way is replaced only if it is a socket that no process has bound.
///
/// # Errors
/// Returns `AddrInUse` if one has; `AlreadyExists` if the file in the way is no socket; what the
/// kernel says otherwise.
pub(crate) fn bind(
    subject: impl std::fmt::Display,
    path: &Path,
    kind: Type,
    access: FileAccess,
) -> Result<(Socket, SocketFile)> {
    let mode = access.mode;
    let fail = |e: io::Error, remedy: Option<&str>| {
        let error = Error::new(Operation::Listen, &subject, e);
        match remedy {
            Some(remedy) => error.with_remedy(remedy),
            None => error,
        }
    };
    remove_dead_socket(path).map_err(|e| {
        let remedy = match e.kind() {
            io::ErrorKind::AddrInUse => {
                "another program listens there: stop it, or choose another path or port"
            }
            io::ErrorKind::AlreadyExists => "choose another path, or move the file away",
            io::ErrorKind::InvalidFilename => "choose a shorter name, or a shorter path",
            io::ErrorKind::PermissionDenied => {
                "look at the permissions of the directory and of the file in the way"
            }
            _ => return fail(e, None),
        };
        fail(e, Some(remedy))
    })?;
    let bind = |short: &Path| {
        let socket = Socket::new(Domain::UNIX, kind, None)?;
        // This is set before a peer can send, and is inherited by what the socket accepts.
        sys::refuse_descriptors(&socket);
        sys::set_bound_mode(&socket, mode);
        socket.bind(&SockAddr::unix(short)?)?;
        // No client can connect before it listens, so the permissions are never others than asked
        // for.
        let file = SocketFile::new(path, Place::of(path)?.finish_bind(mode)?);
        Ok((socket, file))
    };
    let (socket, file) = sys::with_short_path(path, bind).map_err(|e| {
        let remedy = match e.kind() {
            io::ErrorKind::NotFound if path.parent().is_some_and(Path::is_dir) => {
                "no socket can be made in its directory: choose another one"
            }
            io::ErrorKind::NotFound => "its directory doesn't exist: make it first",
            io::ErrorKind::PermissionDenied => "you may not write to its directory",
            io::ErrorKind::ReadOnlyFilesystem => {
                "its file system can't be written: choose a directory on another one"
            }
            io::ErrorKind::StorageFull => "its disk is full: make room, or choose another path",
            io::ErrorKind::InvalidFilename => "choose a shorter name, or a shorter path",
            _ => return fail(e, None),
        };
        fail(e, Some(remedy))
    })?;
    if access.owner.is_some() || access.group.is_some() {
        // No client can connect before it listens.
        file.set_access(access)
            .map_err(|e| explain_access(&subject, access, e))?;
    }
    Ok((socket, file))
}

/// Returns the error of a file whose owner or group can't be set.
fn explain_access(subject: impl std::fmt::Display, access: FileAccess, cause: io::Error) -> Error {
    let what = match access {
        FileAccess {
            owner: Some(owner),
            group: None,
            ..
        } => format!("owner {owner}"),
        FileAccess {
            owner: None,
            group: Some(group),
            ..
        } => format!("group {group}"),
        _ => "owner and group".to_owned(),
    };
    let kind = cause.kind();
    let why = format!("its file can't be given the {what}: {cause}");
    let error = Error::new(Operation::Listen, subject, io::Error::new(kind, why));
    match (kind, access.owner) {
        (io::ErrorKind::PermissionDenied, None) => {
            error.with_remedy("give it a group that you are in, or run as root")
        }
        (io::ErrorKind::PermissionDenied, Some(_)) => {
            error.with_remedy("only root gives files away: leave the owner out, or run as root")
        }
        _ => error,
    }
}

/// Removes the file at `path` if it is a socket that no process has.
fn remove_dead_socket(path: &Path) -> io::Result<()> {
    let before = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    let kind = before.file_type();
    if !kind.is_socket() {
        let what = match () {
            () if kind.is_dir() => "a directory".to_owned(),
            () if kind.is_symlink() => match fs::read_link(path) {
                Ok(to) => format!("a symbolic link to {}", to.display()),
                Err(_) => "a symbolic link".to_owned(),
            },
            () => "a file that is no socket".to_owned(),
        };
        let why = format!("{what} is in the way");
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
    }
    let place = Place::of(path)?;
    let identity = place.identity()?;
    match sys::is_socket_alive(path) {
        Ok(true) => {
            let why = "the socket is in use";
            Err(io::Error::new(io::ErrorKind::AddrInUse, why))
        }
        Ok(false) => {
            // Only the file that was found dead is removed.
            place.remove(identity)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn bind_at(path: &Path, mode: u32) -> (Socket, SocketFile) {
        bind("it", path, Type::STREAM, mode.into()).unwrap()
    }

    #[test]
    fn a_file_has_the_permissions_that_were_asked_for_whatever_the_umask_takes() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("s");
        for asked in [0o600, 0o666, 0o777, 0o000] {
            let (_socket, file) = bind_at(&path, asked);
            assert_eq!(mode(&path), asked);
            file.set_access(0o660.into()).unwrap();
            assert_eq!(mode(&path), 0o660);
            drop(file);
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_link_in_its_place_is_not_followed_and_not_removed() {
        let root = tempfile::tempdir().unwrap();
        let (path, other) = (root.path().join("s"), root.path().join("other"));
        fs::write(&other, "").unwrap();
        fs::set_permissions(&other, fs::Permissions::from_mode(0o640)).unwrap();
        let (_socket, file) = bind_at(&path, 0o600);
        fs::rename(&path, root.path().join("moved")).unwrap();
        symlink(&other, &path).unwrap();
        file.set_access(0o666.into()).unwrap();
        assert_eq!(mode(&other), 0o640);
        drop(file);
        assert!(path.is_symlink() && other.exists());
    }

    /// As a directory that another user owns may be, on the way to it.
    #[test]
    fn a_socket_in_a_directory_that_was_exchanged_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let (one, two) = (root.path().join("one"), root.path().join("two"));
        fs::create_dir(&one).unwrap();
        let (_socket, file) = bind_at(&one.join("s"), 0o600);
        fs::rename(&one, &two).unwrap();
        fs::create_dir(&one).unwrap();
        let _other = std::os::unix::net::UnixListener::bind(one.join("s")).unwrap();
        let before = mode(&one.join("s"));
        file.set_access(0o606.into()).unwrap();
        drop(file);
        assert_eq!(mode(&one.join("s")), before);
    }

    /// What the permissions are set on is looked at after the bind, and is what was looked at.
    #[test]
    fn what_has_taken_the_place_of_a_socket_just_bound_keeps_its_permissions() {
        let root = tempfile::tempdir().unwrap();
        let (path, other) = (root.path().join("s"), root.path().join("other"));
        fs::write(&other, "").unwrap();
        fs::set_permissions(&other, fs::Permissions::from_mode(0o640)).unwrap();
        symlink(&other, &path).unwrap();
        for asked in [0o666, 0o777] {
            let error = Place::of(&path).unwrap().finish_bind(asked).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        }
        assert_eq!(mode(&other), 0o640);
    }
}
