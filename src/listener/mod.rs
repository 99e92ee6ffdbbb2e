//! Listening sockets of any family that is carried: blocking ones, and those of an event loop.

mod blocking;
mod defaults;
pub(crate) mod file;
#[cfg(windows)]
pub(crate) mod hyperv;
#[cfg(feature = "cli")]
pub(crate) mod lasting;
#[cfg(unix)]
mod local;
#[cfg(windows)]
#[path = "pipe.rs"]
mod local;
pub(crate) mod nonblocking;
#[cfg(unix)]
mod passed;
mod tcp;

pub use blocking::Listener;
#[cfg(all(unix, feature = "cli"))]
pub(crate) use blocking::Wish;
pub use defaults::DEFAULT_MODE;
pub(crate) use defaults::FileAccess;
#[cfg(all(unix, feature = "cli"))]
pub(crate) use passed::Handed;
