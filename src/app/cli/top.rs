//! `hvsock top`: shows live what a running hvsock is doing.

use std::env;
use std::io::{self, IsTerminal};

use clap::Args;

use super::control::Which;
use super::outcome::{Failure, Outcome};
use crate::app::top;

/// Watch an hvsock that runs, live in the terminal
#[derive(Args, Debug)]
#[command(
    after_help = "Keys: ? tells of all of them. q, Esc or Ctrl-C ends it; the arrows choose a connection, k \
closes it, s sorts, / shows those that have a text in them."
)]
pub(super) struct TopArgs {
    #[command(flatten)]
    which: Which,
}

impl TopArgs {
    pub(super) fn run(self) -> Outcome {
        if env::var_os("TERM").is_some_and(|term| term == "dumb") {
            let why = "top can't draw on this terminal (TERM=dumb): there is `hvsock status`";
            return Err(Failure::Failed(why.to_owned()));
        }
        if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
            let why = "top needs a terminal: elsewhere there is `hvsock status`";
            return Err(Failure::Failed(why.to_owned()));
        }
        Ok(top::run(&self.which.path())?)
    }
}
