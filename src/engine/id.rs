//! The numbers of forwards and connections.

/// Which forward of a proxy is meant. No two of one proxy are the same, also after one was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "cli", derive(serde::Serialize))]
pub struct ForwardId(pub(crate) u64);

/// Its number, counted from 0.
impl From<ForwardId> for u64 {
    fn from(id: ForwardId) -> u64 {
        id.0
    }
}

/// Which connection of a proxy is meant. No two of one proxy are the same, also after one was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "cli", derive(serde::Serialize))]
pub struct ConnectionId(pub(crate) u64);

/// Its number.
impl From<ConnectionId> for u64 {
    fn from(id: ConnectionId) -> u64 {
        id.0
    }
}
