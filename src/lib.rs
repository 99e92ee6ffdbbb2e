//! A host-side proxy for hypervisor sockets.

pub mod error;
pub mod hyperkit;
#[cfg(unix)]
pub mod simulate;

pub use error::{Error, Operation, Result};
