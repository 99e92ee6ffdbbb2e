//! Unix sockets bound to a path, and the files that they leave in the file system.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};

use super::nonblocking::FileState;
use crate::error::{Error, Operation, Result};
use crate::sys::{self, Identity};

/// The file of a Unix socket that we made. Dropping it removes the file, if it is still ours.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    identity: Identity,
}

impl SocketFile {
    pub(crate) fn state(&self) -> FileState {
        match Identity::of(&self.path) {
            Ok(now) if now == self.identity => FileState::Ours,
            Ok(_) => FileState::Taken,
            Err(e) if e.kind() == io::ErrorKind::NotFound => FileState::Missing,
            // What can't be looked at can't be mended either.
            Err(_) => FileState::Ours,
        }
    }

    /// Gives it other permissions, unless it is somebody else's by now.
    pub(crate) fn set_mode(&self, mode: u32) -> io::Result<()> {
        match Identity::of(&self.path)? == self.identity {
            true => fs::set_permissions(&self.path, fs::Permissions::from_mode(mode)),
            false => Ok(()),
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // By identity, not by name: by now the name may be somebody else's.
        if Identity::of(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Binds a socket to `path`, and gives its file the permissions `mode`; errors speak of `subject`.
///
/// A file in the way is replaced only if it is a socket that nobody has bound.
///
/// # Errors
/// `AddrInUse` if somebody has; `AlreadyExists` if the file in the way is no socket; what the kernel says otherwise.
pub(crate) fn bind(
    subject: impl std::fmt::Display,
    path: &Path,
    kind: Type,
    mode: u32,
) -> Result<(Socket, SocketFile)> {
    let fail = |e: io::Error, remedy: Option<&str>| {
        let error = Error::new(Operation::Listen, &subject, e);
        match remedy {
            Some(remedy) => error.with_remedy(remedy),
            None => error,
        }
    };
    clear_the_way(path).map_err(|e| {
        let remedy = match e.kind() {
            io::ErrorKind::AddrInUse => {
                "another program listens there: stop it, or choose another path or port"
            }
            io::ErrorKind::AlreadyExists => "choose another path, or move the file away",
            io::ErrorKind::InvalidFilename => "choose a shorter name",
            io::ErrorKind::PermissionDenied => {
                "look at the permissions of the directory and of the file in the way"
            }
            _ => return fail(e, None),
        };
        fail(e, Some(remedy))
    })?;
    let bind = |short: &Path| {
        let socket = Socket::new(Domain::UNIX, kind, None)?;
        // Before anyone can send: what it accepts inherits it.
        sys::refuse_descriptors(&socket);
        socket.bind(&SockAddr::unix(short)?)?;
        // Dropped, and so removed again, if the next step fails.
        let file = SocketFile {
            path: path.to_path_buf(),
            identity: Identity::of(path)?,
        };
        // Before it listens nobody can connect, so there is no moment with other permissions than asked for.
        fs::set_permissions(short, fs::Permissions::from_mode(mode))?;
        Ok((socket, file))
    };
    sys::with_short_path(path, bind).map_err(|e| {
        let remedy = match e.kind() {
            io::ErrorKind::NotFound => "its directory doesn't exist: make it first",
            io::ErrorKind::PermissionDenied => "you may not write to its directory",
            io::ErrorKind::InvalidFilename => "choose a shorter name",
            _ => return fail(e, None),
        };
        fail(e, Some(remedy))
    })
}

/// Removes the file at `path` if it is a socket on which nobody listens.
fn clear_the_way(path: &Path) -> io::Result<()> {
    let before = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    if !before.file_type().is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "a file that is no socket is in the way",
        ));
    }
    let identity = Identity::of(path)?;
    match sys::is_socket_alive(path) {
        Ok(true) => {
            let why = "the socket is in use";
            Err(io::Error::new(io::ErrorKind::AddrInUse, why))
        }
        Ok(false) => {
            if Identity::of(path)? == identity {
                fs::remove_file(path)?;
            }
            Ok(())
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}
