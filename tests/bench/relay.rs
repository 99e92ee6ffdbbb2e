//! hvsock beside what one would take in its place, on the same work, in one run: `scripts/bench`.
//!
//! A round runs each load once against each contender; rounds follow each other so that a slow
//! minute hits all. Printed are medians over the rounds: the rate, what share of the best other
//! proxy's that is, the proxy's own CPU seconds for each unit of work, and latencies.
//!
//! Words: `ROUNDS [LOAD…]`, where LOAD is a part of a load's name.

#![allow(clippy::expect_used)]

#[cfg(target_os = "linux")]
mod bare;
#[cfg(target_os = "linux")]
mod contender;
#[cfg(target_os = "linux")]
mod forwards;
#[cfg(target_os = "linux")]
mod host;
#[cfg(target_os = "linux")]
mod idle;
#[cfg(target_os = "linux")]
mod load;
#[cfg(target_os = "linux")]
mod server;
#[cfg(target_os = "linux")]
mod table;

#[cfg(target_os = "linux")]
fn main() {
    table::main();
}

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("bench: it counts by Linux' /proc");
}
