//! What a listening socket has unless it is asked to have another.

/// The permissions of a Unix socket's file unless others are asked for: its owner's.
pub const DEFAULT_MODE: u32 = 0o600;

/// How many connections may wait to be accepted; the kernel lowers it to its own limit
/// (`net.core.somaxconn`, `kern.ipc.somaxconn`).
pub(super) const BACKLOG: i32 = 4096;
