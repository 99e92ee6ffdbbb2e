//! The simulated world: the whole proxy, its workers and what they share, under schedules that are
//! drawn from a seed, against simulated sockets and a simulated clock.
//!
//! A run is drawn ([`plan`]), played ([`stage`], in a [`world`]) by clients and servers ([`cast`]),
//! VMs ([`vm`]) and an operator ([`operator`]), and judged ([`judge`]) at each step and at the end.
//! The same seed gives the same run. One that fails is made smaller, and told line by line
//! ([`run`]).
//!
//! What it leaves out: splice, mio and its emulated edges, threads that carry (AF_HYPERV, frames),
//! passed sockets, descriptors that a peer passes, the real file system, and the wall's clock.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod audit;
mod cases;
mod cast;
mod driver;
mod judge;
mod kernel;
mod ledger;
mod operator;
mod plan;
mod run;
mod slots;
mod stage;
mod talk;
mod talking;
mod vm;
mod world;
