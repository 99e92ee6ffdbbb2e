//! The output of commands: messages on standard error and results on standard output, each line
//! escaped for a terminal.

use std::fmt;
use std::io;

use tracing::Level;

use super::outcome::{Failure, Outcome};
use crate::app::{escape, log, output};

/// Prints a message on standard error. A command that serves never waits for it to be read.
pub(super) fn complain(what: impl fmt::Display) {
    log::say(Level::WARN, what);
}

/// Prints why the command fails.
pub(super) fn fail(what: impl fmt::Display) {
    log::say(Level::ERROR, what);
}

/// Prints the lines that follow a message.
pub(super) fn list(lines: impl IntoIterator<Item = impl fmt::Display>) {
    for line in lines {
        log::say_more(Level::WARN, line);
    }
}

/// Prints a line on standard output. Forwarding goes on even if that is closed.
pub(super) fn say(line: impl fmt::Display) {
    output::OUT.send(one_line(line).into_bytes());
}

fn one_line(text: impl fmt::Display) -> String {
    format!("{}\n", escape::line(&text.to_string()))
}

/// Prints a line that the user asked for.
pub(super) fn print(line: impl fmt::Display) -> Outcome {
    write_out(one_line(line).as_bytes())
}

/// Prints a result of many lines, which must be escaped already.
pub(super) fn print_text(text: impl fmt::Display) -> Outcome {
    write_out(format!("{}\n", escape::text(&text.to_string())).as_bytes())
}

/// Prints JSON that the user asked for.
pub(super) fn print_json(json: &str) -> Outcome {
    write_out(format!("{}\n", escape::json(json)).as_bytes())
}

/// Writes to standard output. A reader that has closed it, as `head` does, is no error.
pub(super) fn write_out(bytes: &[u8]) -> Outcome {
    match output::print(bytes) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Failure::Failed(format!(
            "cannot write to standard output: {e}"
        ))),
        _ => Ok(()),
    }
}
