//! Connected sockets of any family that is carried: blocking ones, and those of an event loop.

mod blocking;
#[cfg(windows)]
mod blocking_pipe;
#[cfg(unix)]
pub(crate) mod closer;
pub(crate) mod closing;
pub(crate) mod draining;
pub(crate) mod endpoint;
#[cfg(windows)]
mod inner;
#[cfg(unix)]
pub(crate) mod local;
#[cfg(windows)]
#[path = "pipe.rs"]
pub(crate) mod local;
pub(crate) mod nonblocking;
pub(crate) mod peer_names;
pub(crate) mod socket;
pub(crate) mod vsock_mux;

pub use blocking::Stream;
pub(crate) use blocking::{is_timeout, refuse_zero};
