//! No file: named pipes are not in the file system.

use std::io;

use super::state::FileState;

/// The file of a listener: there is none.
#[derive(Debug)]
pub(crate) enum SocketFile {}

impl SocketFile {
    pub(crate) fn directory(&self) -> &std::path::Path {
        match *self {}
    }

    pub(crate) fn state(&self) -> FileState {
        match *self {}
    }

    pub(crate) fn set_access(&self, _: crate::listener::FileAccess) -> io::Result<()> {
        match *self {}
    }
}
