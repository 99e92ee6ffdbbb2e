//! `hvsock top`: what an hvsock that runs is doing, live.

use std::io::{self, IsTerminal};

use clap::Args;

use super::control::Which;
use super::outcome::{Failure, Outcome};
use crate::app::top;

/// Watch an hvsock that runs, live in the terminal
#[derive(Args, Debug)]
#[command(
    after_help = "Keys: q, Esc or Ctrl-C ends it, s sorts the forwards anew, the arrows scroll them."
)]
pub(super) struct Top {
    #[command(flatten)]
    which: Which,
}

impl Top {
    pub(super) fn run(self) -> Outcome {
        if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
            let why = "top needs a terminal: elsewhere there is `hvsock status`";
            return Err(Failure::Failed(why.to_owned()));
        }
        Ok(top::run(&self.which.path())?)
    }
}
