//! `hvsock completions`: what a shell has to know to complete our words.

use clap::{Args, Command};
use clap_complete::Shell;

use super::console::write_out;
use super::outcome::Outcome;

/// Print a shell's completions of this command line
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  hvsock completions bash >~/.local/share/bash-completion/completions/hvsock
  hvsock completions zsh >\"${fpath[1]}/_hvsock\"
  hvsock completions fish >~/.config/fish/completions/hvsock.fish
  hvsock completions powershell >>$PROFILE")]
pub(super) struct Completions {
    /// The shell
    #[arg(value_name = "SHELL", value_enum)]
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self, mut hvsock: Command) -> Outcome {
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut hvsock, "hvsock", &mut text);
        write_out(&text)
    }
}
