//! What this user may do with a file, without doing it.

use std::fs::Metadata;
use std::os::unix::fs::PermissionsExt;
#[cfg(feature = "cli")]
use std::path::Path;

#[cfg(feature = "cli")]
use nix::unistd::{AccessFlags, access};

/// Returns whether anybody may start a file as a program.
pub(crate) fn is_program(file: &Metadata) -> bool {
    file.permissions().mode() & 0o111 != 0
}

/// Returns whether a file is a socket.
#[cfg(feature = "cli")]
pub(crate) fn may_be_socket(file: &Metadata) -> bool {
    std::os::unix::fs::FileTypeExt::is_socket(&file.file_type())
}

/// Returns whether this user may start a program.
#[cfg(feature = "cli")]
pub(crate) fn may_start(program: &Path) -> bool {
    access(program, AccessFlags::X_OK).is_ok()
}

/// Returns whether this user may read a file.
#[cfg(feature = "cli")]
pub(crate) fn may_read(file: &Path) -> bool {
    access(file, AccessFlags::R_OK).is_ok()
}
