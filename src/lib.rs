//! A host-side proxy for hypervisor sockets.

pub mod address;
#[cfg(all(unix, feature = "cli"))]
mod cat;
#[cfg(all(unix, feature = "cli"))]
#[doc(hidden)]
pub mod cli;
#[cfg(unix)]
mod dial;
pub mod error;
pub mod hyperkit;
#[cfg(unix)]
mod listener;
#[cfg(unix)]
mod mux;
#[cfg(unix)]
pub mod proxy;
mod relay;
#[cfg(all(unix, feature = "cli"))]
mod serve;
#[cfg(unix)]
pub mod simulate;
#[cfg(unix)]
mod stream;
#[cfg(all(unix, feature = "cli"))]
mod stress;
mod sys;
#[cfg(all(unix, feature = "cli"))]
mod syslog;
#[cfg(unix)]
pub mod vsock;

pub use address::{Address, AddressError};
pub use error::{Error, Operation, Result};
#[cfg(unix)]
pub use listener::{DEFAULT_MODE, Listener, Peer};
#[cfg(unix)]
pub use proxy::{Proxy, ProxyConfig, Rule};
#[cfg(unix)]
pub use stream::Stream;
