//! A host-side proxy for hypervisor sockets.

pub mod address;
#[cfg(feature = "cli")]
mod cat;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
mod dial;
pub mod error;
pub mod framing;
pub mod hyperkit;
pub mod hyperv;
mod listener;
mod mux;
pub mod proxy;
mod relay;
#[cfg(feature = "cli")]
mod serve;
pub mod services;
#[cfg(unix)]
pub mod simulate;
mod stream;
#[cfg(feature = "cli")]
mod stress;
mod sys;
#[cfg(all(unix, feature = "cli"))]
mod syslog;
pub mod vsock;

pub use address::{Address, AddressError};
pub use error::{Error, Operation, Result};
pub use listener::{DEFAULT_MODE, Listener, Peer};
pub use proxy::{Proxy, ProxyConfig, Rule};
pub use stream::Stream;
