//! The engine decides what happens to a connection, without an operating system: events, results
//! and the time come in; actions and deadlines go out. [`proxy`](crate::proxy) is the loop around
//! it. Nothing here knows mio, files, threads or the system's clock.
//!
//! A module imports only those below it in this table (a test compares it with the code):
//!
//! | module | what it is | what it imports |
//! |---|---|---|
//! | [`connection`] | a connection as a state machine | all below; `dial`, `stream` |
//! | [`forward`] | a rule as workers share it: gates, counters, health | all below; `dial`, for a name's addresses |
//! | [`admission`] | the gate of a VM: slots, quotas, pace, guests | `health`, `id`, `rule`, `status`; `sys`, for error codes |
//! | [`routes`] | the connections between forwards, to refuse loops | `id`; `stream`, for sockets' names |
//! | [`observer`] | events for the caller | `end_reason`, `id` |
//! | [`ended`] | the last connections that have ended | `end_reason`, `id`, `rule` |
//! | [`status`] | what a forward's status reports | `counters`, `id`, `rule` |
//! | [`health`] | whether a VM or a server is up | `rule`; `sys`, for identities |
//! | [`counters`] | what is counted of a forward | `end_reason`; `relay`, for sides |
//! | [`end_reason`] | why connections end | `sys`, for error codes |
//! | [`rule`] | what a proxy forwards, and its limits | `proxy_header`, `source`; `relay`, for sides; `listener`, for defaults |
//! | [`timers`] | the deadlines of connections | nothing |
//! | [`table`] | connections by token and generation | `relay`, for sides |
//! | [`relay`] | two sockets and the bytes between them | `stream`, for the traits of sockets and pipes |
//! | [`proxy_header`] | the header of the PROXY protocol | nothing |
//! | [`source`] | where clients may come from | nothing |
//! | [`log_limiter`] | the rate limit of log lines | nothing |
//! | [`id`] | identifiers | nothing |
//!
//! All may import `address`, `error`, `lock`, `name` and `time`, and log through `tracing`. The
//! invariants have numbers, the same in the engine and in the loop. Each stands above the code that
//! relies on it: 1 to 5 in [`relay`], 6 in [`table`], 7 in [`timers`] and [`relay`], 9 where
//! [`connection`] handles a freeze. Those that the loop keeps (5, 6 and 8 to 11) are listed in
//! `proxy/mod.rs`, below the page's own text.

pub(crate) mod admission;
pub(crate) mod connection;
pub(crate) mod counters;
pub(crate) mod end_reason;
pub(crate) mod ended;
pub(crate) mod forward;
pub(crate) mod health;
pub(crate) mod id;
pub(crate) mod log_limiter;
pub(crate) mod observer;
pub(crate) mod proxy_header;
pub(crate) mod relay;
pub(crate) mod routes;
pub(crate) mod rule;
pub(crate) mod source;
pub(crate) mod status;
pub(crate) mod table;
pub(crate) mod timers;

/// The phase of the proxy's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    Running,
    /// No client is accepted any more; existing connections go on.
    Stopping,
    /// Clients are cut off; guests may still end their connections.
    Cutting,
}
