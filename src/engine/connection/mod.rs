//! One connection as a state machine: events, results and the time go in; [`Action`]s and a
//! deadline come out.
//!
//! | [state](state::State) | what it waits for | then |
//! |---|---|---|
//! | `Waiting` | the client's header, a name, a slot, the next dial | connecting, closing, closed |
//! | `Connecting` | its target | relaying, on threads, proving, waiting, closing, closed |
//! | `Proving` | whether the guest took the dial | relaying, waiting, closing |
//! | `Relaying` | bytes, half-closes, idle timeouts; the drain timeout once a peer is gone | closing |
//! | `OnThreads` | the end of the relay threads, even if it is cut off | closed |
//! | `Closing` | each peer's EOF, or the drain timeout | closed |
//!
//! The engine never calls the loop. What the loop has to do is an [`Action`]; actions are carried
//! out in their order, and the result is handed back through the `take_` method that the action's
//! doc names.

mod action;
mod beginning;
mod closing;
mod closing_end;
mod closing_times;
mod dialling;
mod idle;
mod on_threads;
mod program;
mod proving;
mod proxied;
mod racing;
mod refusing;
mod relaying;
mod report;
mod retries;
mod socket;
mod state;
#[cfg(all(test, target_os = "linux"))]
pub(crate) mod transitions;

pub(crate) use action::{Action, Context};
pub(crate) use closing::{LAST_DRAIN, LINGER};
pub(crate) use dialling::Dialled;
pub(crate) use on_threads::{Progress, ThreadsResult};
pub(crate) use socket::ConnectionSocket;
pub(crate) use state::Connection;
#[cfg(all(test, target_os = "linux"))]
pub(crate) use state::State;
