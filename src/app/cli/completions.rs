//! `hvsock completions`: prints the completion script of a shell.

use clap::Args;
use clap_complete::Shell;

use super::complete;
use super::console::write_out;
use super::outcome::{Failure, Outcome};

/// Print what has a shell complete this command line
#[derive(Args, Debug)]
#[command(
    after_help = "The script runs hvsock, which must be in the PATH, at each completion: names of forwards and VMs \
are those of the moment. Print it again after an upgrade.

Examples:
  hvsock completions bash >~/.local/share/bash-completion/completions/hvsock
  hvsock completions zsh >\"${fpath[1]}/_hvsock\"
  hvsock completions fish >~/.config/fish/completions/hvsock.fish
  hvsock completions powershell >>$PROFILE"
)]
pub(super) struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL", value_enum)]
    shell: Shell,
}

impl CompletionsArgs {
    pub(super) fn run(self) -> Outcome {
        let shell = self.shell.to_string();
        let script = complete::script(&shell);
        write_out(&script.ok_or_else(|| Failure::Usage(format!("no completions for {shell}")))?)
    }
}
