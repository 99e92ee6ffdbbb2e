//! A host-side proxy for hypervisor sockets.

pub mod error;
pub mod hyperkit;

pub use error::{Error, Operation, Result};
