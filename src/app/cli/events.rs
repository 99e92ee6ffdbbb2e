//! `hvsock events`: prints the events of a running hvsock, line by line.

use std::io;

use clap::Args;

use super::control::Which;
use super::outcome::{Failure, Outcome};
use crate::app::{control, escape, output};

/// Follow what happens in an hvsock that runs: connections, forwards and VMs that come and go
///
/// Each event is a line of JSON, with its name in `event` and its time in `time`. What is there is
/// told at the beginning. Whoever reads too slowly misses events of connections, and is told how
/// many.
#[derive(Args, Debug)]
#[command(after_help = "It ends when that hvsock does.

Examples:
  hvsock events
  hvsock events | jq -c 'select(.event == \"connection_closed\")'")]
pub(super) struct EventsArgs {
    #[command(flatten)]
    which: Which,
}

impl EventsArgs {
    pub(super) fn run(self) -> Outcome {
        let mut failure = None;
        let print = |line: &str| {
            let printed = output::print(format!("{}\n", escape::json(line)).as_bytes());
            printed.map_err(|e| failure = Some(e)).is_ok()
        };
        control::follow_events(&self.which.path(), "/v1/events", print)?;
        match failure {
            // A reader such as `head` may close it at any time.
            Some(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Failure::Failed(format!(
                "cannot write to standard output: {e}"
            ))),
            _ => Ok(()),
        }
    }
}
