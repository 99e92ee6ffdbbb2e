//! One connection as a state machine: events, results and the time go in; [`Action`]s and a
//! deadline come out.
//!
//! | state | what it waits for | then |
//! |---|---|---|
//! | [`Waiting`](State::Waiting) | the client's header, a name, a slot of the VM, the next dial | connecting, closing, closed |
//! | [`Connecting`](State::Connecting) | its target | relaying, proving, waiting, closing, closed |
//! | [`Proving`](State::Proving) | whether the guest took the dial | relaying, waiting, closing |
//! | [`Relaying`](State::Relaying) | bytes, half-closes, timeouts | closing |
//! | [`OnThreads`](State::OnThreads) | the end of the relay threads | closed |
//! | [`Closing`](State::Closing) | each peer's EOF, or the drain timeout | closed |
//!
//! The engine never calls the loop. What the loop has to do is an [`Action`]; actions are carried
//! out in their order, and the result is handed back through the `take_` method that the action's
//! doc names.

mod action;
mod closing;
mod closing_end;
mod dialling;
mod idle;
mod on_threads;
mod proving;
mod proxied;
mod racing;
mod relaying;
mod report;
mod socket;
mod state;
#[cfg(all(test, target_os = "linux"))]
pub(crate) mod transitions;

pub(crate) use action::{Action, Context};
pub(crate) use closing::{LAST_DRAIN, LINGER};
pub(crate) use dialling::Dialled;
pub(crate) use idle::Progress;
pub(crate) use socket::ConnectionSocket;
pub(crate) use state::Connection;
#[cfg(all(test, target_os = "linux"))]
pub(crate) use state::State;
