//! The identifiers of forwards and connections.

/// The identifier of a forward. A proxy never uses one twice, even after the forward was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ForwardId(pub(crate) u64);

/// Returns the number, counted from 0.
impl From<ForwardId> for u64 {
    fn from(id: ForwardId) -> u64 {
        id.0
    }
}

/// The identifier of a connection. A proxy never uses one twice, even after the connection was
/// closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub(crate) u64);

/// Returns the number.
impl From<ConnectionId> for u64 {
    fn from(id: ConnectionId) -> u64 {
        id.0
    }
}
