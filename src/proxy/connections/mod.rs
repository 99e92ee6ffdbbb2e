//! The loop's part in connections: it takes over accepted ones, passes events to them, and carries
//! out the actions that they request. What a connection does next is decided by the
//! [engine](crate::engine::connection) alone.

mod dials;
mod probes;
mod queues;
mod set;

pub(super) use set::Connections;
