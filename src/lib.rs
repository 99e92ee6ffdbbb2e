//! A host-side proxy for hypervisor sockets.

pub mod address;
pub mod error;
pub mod hyperkit;
mod sys;

pub use address::{Address, AddressError};
pub use error::{Error, Operation, Result};
