//! The relay against a fake kernel: no sockets, no clock, every schedule named by its seed.
#![allow(clippy::unwrap_used)]

mod bench;
mod carriers;
mod cases;
mod choosing;
mod kernel;
mod refusals;
mod schedules;
