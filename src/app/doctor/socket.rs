//! Checks the file of a Unix socket.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use super::check::Check;
use crate::sys;

/// Checks that a process listens on a socket, and that this user may connect, without connecting.
/// `start` says how to start the missing program.
pub(super) fn examine(name: impl fmt::Display, path: &Path, start: &str) -> Check {
    let shown = path.display();
    match fs::metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            let remedy = "move it away, and start again what should listen there";
            return Check::failed(name, format_args!("{shown} is no socket"), remedy);
        }
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Check::failed(name, format_args!("there is no {shown}"), start);
        }
        Err(e) => {
            let remedy = "run as the user who runs the VM";
            return Check::failed(name, format_args!("{shown}: {e}"), remedy);
        }
    }
    match sys::is_socket_alive(path) {
        Ok(true) => Check::ok(name, format_args!("{shown} is listened on")),
        Ok(false) => Check::failed(
            name,
            format_args!("nobody listens on {shown}: it is left over"),
            start,
        ),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Check::failed(
            name,
            format_args!("this user may not connect to {shown}"),
            "run as the user who runs the VM, or have its permissions changed",
        ),
        Err(e) => Check::failed(name, format_args!("{shown}: {e}"), start),
    }
}
