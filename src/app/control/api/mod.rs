//! The calls of the control interface, and their answers.

mod actions;
mod connections;
mod forwards;
mod process;
mod routes;
mod state;
mod succession;

pub(crate) use actions::{Actions, Started, Succession};
pub(super) use state::{Api, CALLS_AT_A_TIME};
