//! What becomes of a connection, without an operating system: events, results and the time go in, actions and
//! deadlines come out. [`proxy`](crate::proxy) is the loop around it.

pub(crate) mod admission;
pub(crate) mod connection;
pub(crate) mod counters;
pub(crate) mod forward;
pub(crate) mod health;
pub(crate) mod id;
pub(crate) mod log_limiter;
pub(crate) mod observer;
pub(crate) mod relay;
pub(crate) mod routes;
pub(crate) mod rule;
pub(crate) mod status;
pub(crate) mod table;
pub(crate) mod timers;

/// How far the proxy is on its way to the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    Running,
    /// No new clients; those that are there go on.
    Stopping,
    /// Clients are cut off; guests may still end their connections.
    Cutting,
}
