//! The file of a listening Unix socket.

#[cfg(windows)]
mod none;
mod state;
#[cfg(unix)]
mod unix;

#[cfg(windows)]
pub(crate) use none::SocketFile;
pub(crate) use state::FileState;
#[cfg(unix)]
pub(crate) use unix::{SocketFile, bind};
