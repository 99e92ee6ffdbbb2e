//! `hvsock man`: the help texts as man pages.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Command, CommandFactory};
use clap_mangen::Man as Page;
use clap_mangen::roff::{Roff, roman};

use super::{Arguments, Failure, Outcome, write_out};

/// Print a man page, or write them all
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  hvsock man expose | man -l -
  hvsock man --dir /usr/local/share/man/man1")]
pub(super) struct Man {
    /// The command that the page is of [default: hvsock itself]
    #[arg(value_name = "COMMAND")]
    command: Option<String>,
    /// Write the pages of all commands into this directory, which is made if it doesn't exist
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    dir: Option<PathBuf>,
}

impl Man {
    pub(super) fn run(self) -> Outcome {
        let mut all = Arguments::command().disable_help_subcommand(true);
        // It gives the commands their full names.
        all.build();
        if let Some(dir) = self.dir {
            return write_all(&all, &dir).map_err(|e| {
                Failure::Failed(format!(
                    "cannot write man pages into {}: {e}",
                    dir.display()
                ))
            });
        }
        let command = match &self.command {
            None => &all,
            Some(name) => all.find_subcommand(name).ok_or_else(|| {
                Failure::Usage(format!("there is no command {name:?} to have a page"))
            })?,
        };
        write_out(&page(command)?)
    }
}

fn write_all(all: &Command, dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    for command in std::iter::once(all).chain(all.get_subcommands()) {
        let name = Page::new(command.clone()).get_filename();
        fs::write(dir.join(name), page(command)?)?;
    }
    Ok(())
}

/// A command's page. What follows the options in its help is laid out here: lines that begin with a blank are examples
/// and tables, which must not be filled.
fn page(command: &Command) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let page = Page::new(command.clone()).source(concat!("hvsock ", env!("CARGO_PKG_VERSION")));
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    if command.has_subcommands() {
        page.render_subcommands_section(&mut text)?;
    }
    let Some(notes) = command.get_after_help() else {
        return Ok(text);
    };
    let mut roff = Roff::new();
    roff.control("SH", ["NOTES"]);
    let mut filled = true;
    for line in notes.to_string().lines() {
        let fills = !line.starts_with(' ');
        if fills != filled {
            roff.control(if fills { "fi" } else { "nf" }, []);
            filled = fills;
        } else if fills {
            roff.control("PP", []);
        }
        if !line.is_empty() {
            roff.text([roman(line)]);
        }
    }
    roff.to_writer(&mut text)?;
    Ok(text)
}
