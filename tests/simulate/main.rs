//! The stand-in VM, driven through its sockets as a host's programs would.
#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod device;
mod guest;
mod mux;
mod rules;
mod support;
