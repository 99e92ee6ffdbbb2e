//! `hvsock man`: the help texts and the guide as man pages.

mod command;
mod guide;
mod page;

use std::fs;
use std::io::{self, IsTerminal, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
#[cfg(unix)]
use std::sync::Arc;

use clap::{Args, Command, ValueHint};

use super::console::write_out;
use super::outcome::{Failure, Outcome};
use crate::guide::PAGES;
use page::Page;

/// Show a man page, or write them all
///
/// It is shown by `man`, as text where it goes into a file or another program.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  hvsock man expose
  hvsock man expose | grep -A 3 PORT
  hvsock man --roff hvsock.toml >hvsock.toml.5
  hvsock man --dir /usr/local/share/man")]
pub(super) struct ManArgs {
    /// The command that the page is of, or the name of another page, such as hvsock.toml or
    /// hvsock-control [default: hvsock itself]
    #[arg(value_name = "COMMAND|PAGE")]
    of: Option<String>,
    /// Print the page's source, as `man` reads it
    #[arg(long, conflicts_with = "dir")]
    roff: bool,
    /// Write all pages below this directory, into man1, man5 and man7, which are made if they don't
    /// exist
    #[arg(long, value_name = "DIR", conflicts_with = "of", value_hint = ValueHint::DirPath)]
    dir: Option<PathBuf>,
}

impl ManArgs {
    pub(super) fn run(self, hvsock: Command) -> Outcome {
        let names = names(&hvsock);
        let pages = pages(hvsock);
        if let Some(dir) = self.dir {
            return write_all(&pages, &dir).map_err(|e| {
                Failure::Failed(format!(
                    "cannot write man pages into {}: {e}",
                    dir.display()
                ))
            });
        }
        // A command's page comes before a page of the guide with the same name.
        let of = self.of.unwrap_or_default();
        let meant = [page::full_name(&of), of.clone()];
        match pages.iter().find(|page| meant.contains(&page.name)) {
            Some(page) if self.roff => write_out(page.text.as_bytes()),
            Some(page) if io::stdout().is_terminal() => show(&page.text),
            Some(page) => write_out(&render(&page.text)?),
            None => Err(Failure::Usage(format!(
                "there is no command and no page {of:?}; there are {}",
                names.join(", ")
            ))),
        }
    }
}

/// Shows a page on the terminal with `man`.
fn show(page: &str) -> Outcome {
    let mut man = std::process::Command::new("man");
    man.args(["-l", "-"]).stdin(Stdio::piped());
    // Ctrl-C is for the pager that `man` starts.
    #[cfg(unix)]
    signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::default())?;
    let shown = man.spawn().and_then(|mut man| {
        if let Some(mut to_man) = man.stdin.take() {
            // If it ends before it has read all, its exit status says why.
            let _ = to_man.write_all(page.as_bytes());
        }
        man.wait()
    });
    match shown {
        Ok(status) if status.success() => Ok(()),
        _ => Err(no_man()),
    }
}

/// Returns a page as text, formatted by `man`.
fn render(page: &str) -> Result<Vec<u8>, Failure> {
    // A file: `man` may write before it has read everything, and a pipe could deadlock.
    let mut source = tempfile::tempfile()?;
    source.write_all(page.as_bytes())?;
    source.rewind()?;
    let mut man = std::process::Command::new("man");
    man.args(["-l", "-"]).stdin(source).stderr(Stdio::inherit());
    match man.output() {
        Ok(output) if output.status.success() => Ok(output.stdout),
        _ => Err(no_man()),
    }
}

fn no_man() -> Failure {
    let why = "there is no `man` here that shows it: --help has most of it, and --roff prints the page's source";
    Failure::Failed(why.to_owned())
}

/// Makes all pages.
fn pages(hvsock: Command) -> Vec<Page> {
    let mut all = hvsock.disable_help_subcommand(true);
    // Gives the commands their full names.
    all.build();
    let commands: Vec<&Command> = std::iter::once(&all).chain(all.get_subcommands()).collect();
    let commands = commands.into_iter().map(|it| command::page(it, &all));
    let guide = PAGES.iter().map(|(name, text)| guide::page(name, text));
    commands.chain(guide).collect()
}

/// Returns the names of all pages: those of commands and those of the guide.
pub(super) fn names(hvsock: &Command) -> Vec<String> {
    let commands = hvsock.get_subcommands().map(|it| it.get_name().to_owned());
    let guide = PAGES.iter().map(|(name, _)| page::full_name(name));
    commands.chain(guide).collect()
}

fn write_all(pages: &[Page], dir: &Path) -> io::Result<()> {
    for page in pages {
        let section = dir.join(format!("man{}", page.section));
        fs::create_dir_all(&section)?;
        fs::write(
            section.join(format!("{}.{}", page.name, page.section)),
            &page.text,
        )?;
    }
    Ok(())
}
