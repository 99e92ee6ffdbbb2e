//! What becomes of a listening socket's file.

/// What has become of a listening socket's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(unix), allow(dead_code))]
pub(crate) enum FileState {
    /// There, or there is none to look for.
    Ours,
    /// Removed: nobody can find the socket any more.
    Missing,
    /// Somebody else's file has its name.
    Taken,
}
