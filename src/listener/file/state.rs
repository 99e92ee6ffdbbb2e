//! The state of a listening socket's file.

/// The state of a listening socket's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(unix), allow(dead_code))]
pub(crate) enum FileState {
    /// The file is there, or there is none to look for.
    Ours,
    /// It was removed: no client can find the socket any more.
    Missing,
    /// It was replaced: another file has its name.
    Taken,
}
