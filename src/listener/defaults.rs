//! What a listening socket has unless it is asked to have another.

/// The permissions of a Unix socket's file unless others are asked for: its owner's.
pub const DEFAULT_MODE: u32 = 0o600;

/// Who may use the file of a Unix listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileAccess {
    /// Its permissions.
    pub(crate) mode: u32,
    /// Its owner; `None`: the user of this process.
    pub(crate) owner: Option<u32>,
    /// Its group; `None`: that which the system gives it.
    pub(crate) group: Option<u32>,
}

impl From<u32> for FileAccess {
    fn from(mode: u32) -> FileAccess {
        FileAccess {
            mode,
            owner: None,
            group: None,
        }
    }
}

/// How many connections may wait to be accepted; the kernel lowers it to its own limit
/// (`net.core.somaxconn`, `kern.ipc.somaxconn`).
pub(super) const BACKLOG: i32 = 4096;
