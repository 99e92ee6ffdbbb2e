//! `hvsock man`: the help texts and the guide as man pages.

mod command;
mod guide;
mod page;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Command, ValueHint};

use super::console::write_out;
use super::outcome::{Failure, Outcome};
use crate::guide::PAGES;
use page::Page;

/// Print a man page, or write them all
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  hvsock man expose | man -l -
  hvsock man hvsock.toml | man -l -
  hvsock man --dir /usr/local/share/man")]
pub(super) struct Man {
    /// The command that the page is of, or the name of another page, such as hvsock.toml or hvsock-control [default:
    /// hvsock itself]
    #[arg(value_name = "COMMAND|PAGE")]
    of: Option<String>,
    /// Write all pages below this directory, into man1, man5 and man7, which are made if they don't exist
    #[arg(long, value_name = "DIR", conflicts_with = "of", value_hint = ValueHint::DirPath)]
    dir: Option<PathBuf>,
}

impl Man {
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
        // A command's page comes first where a page of the guide has the same name.
        let of = self.of.unwrap_or_default();
        let meant = [page::full_name(&of), of.clone()];
        match pages.iter().find(|page| meant.contains(&page.name)) {
            Some(page) => write_out(page.text.as_bytes()),
            None => Err(Failure::Usage(format!(
                "there is no command and no page {of:?}; there are {}",
                names.join(", ")
            ))),
        }
    }
}

/// All pages.
fn pages(hvsock: Command) -> Vec<Page> {
    let mut all = hvsock.disable_help_subcommand(true);
    // It gives the commands their full names.
    all.build();
    let commands: Vec<&Command> = std::iter::once(&all).chain(all.get_subcommands()).collect();
    let commands = commands.into_iter().map(|it| command::page(it, &all));
    let guide = PAGES.iter().map(|(name, text)| guide::page(name, text));
    commands.chain(guide).collect()
}

/// What a page may be asked for by: the names of commands, and of pages of the guide.
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
