//! Rewords clap's errors about arguments that are not accepted.

use clap::Error;
use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Options of other programs, the commands at which they are expected, and what does the same here.
const FOREIGN: [(&str, &[&str], &str); 11] = [
    ("-p", SERVE, "docker's -p is -L here: -L 8080:80"),
    (
        "-D",
        SERVE,
        "there is no SOCKS proxy: -L leads to one port of the guest, as in -L 8080:80",
    ),
    ("-f", SERVE, BACKGROUND),
    ("-N", SERVE, BACKGROUND),
    ("-d", SERVE, BACKGROUND),
    ("--detach", SERVE, BACKGROUND),
    (
        "-z",
        &["cat"],
        "whether a program of a guest listens is told by `hvsock doctor --vm VM --port PORT`",
    ),
    (
        "-U",
        &["cat"],
        "a Unix socket is written as ./PATH or /PATH",
    ),
    (
        "--control",
        &["run"],
        "the file says it: control = \"off\", or a path",
    ),
    ("-v", ANY, VERBOSE),
    ("--verbose", ANY, VERBOSE),
];

/// The commands that serve until they are ended.
const SERVE: &[&str] = &["expose", "forward", "run"];

/// All commands.
const ANY: &[&str] = &[];

const BACKGROUND: &str = "it stays in the foreground: for one in the background, have a service manager run it (see `hvsock man \
hvsock-services`)";

const VERBOSE: &str = "the variable HVSOCK_LOG=debug has it say more";

/// Replaces clap's guess in an error (that the word was a value, or a misspelt command) by what
/// should be written.
pub(super) fn reword_error(mut error: Error, words: &[String]) -> Error {
    let tip = match error.kind() {
        ErrorKind::UnknownArgument => {
            let word = text(&error, ContextKind::InvalidArg);
            // "to pass '-z' as a value, use '-- -z'"
            error.remove(ContextKind::Suggested);
            word.and_then(|word| tip(&word, words.get(1)))
        }
        ErrorKind::InvalidSubcommand => {
            let word = text(&error, ContextKind::InvalidSubcommand);
            let tip = match word.as_deref() {
                Some("log" | "logs") => Some(
                    "the log is what an hvsock writes to standard error, or to the file of --log; `hvsock events` shows what happens",
                ),
                Some("version") => Some("`hvsock --version` prints it"),
                _ => None,
            };
            if tip.is_some() {
                error.remove(ContextKind::SuggestedSubcommand);
            }
            tip
        }
        _ => None,
    };
    let tip = tip
        .map(str::to_owned)
        .or_else(|| tip_for_value(&error, words));
    if let Some(tip) = tip {
        let tip = ContextValue::StyledStrs(vec![tip.into()]);
        error.insert(ContextKind::Suggested, tip);
    }
    error
}

/// Returns a tip on how to write the value of `--control`, if it was written as a separate word and
/// so taken for another argument.
fn tip_for_value(error: &Error, words: &[String]) -> Option<String> {
    if text(error, ContextKind::InvalidArg).is_some_and(|word| word == "--control") {
        return None;
    }
    let at = words.iter().position(|word| word == "--control")?;
    let value = words.get(at + 1)?;
    let refused = [ContextKind::InvalidArg, ContextKind::InvalidValue];
    let is_refused = refused
        .into_iter()
        .any(|kind| text(error, kind).as_ref() == Some(value));
    (is_refused || value == "off")
        .then(|| format!("a value of --control follows a '=': --control={value}"))
}

fn text(error: &Error, kind: ContextKind) -> Option<String> {
    match error.get(kind)? {
        ContextValue::String(text) => Some(text.clone()),
        _ => None,
    }
}

fn tip(word: &str, command: Option<&String>) -> Option<&'static str> {
    let digits = word.strip_prefix('-').unwrap_or_default();
    if digits.starts_with(|c: char| c.is_ascii_digit()) {
        return Some("no number here is below zero");
    }
    let is_at = |commands: &[&str]| {
        let command = command.map(String::as_str).unwrap_or_default();
        commands.is_empty() || commands.contains(&command)
    };
    let mut known = FOREIGN.into_iter();
    let known = known.find(|(foreign, commands, _)| *foreign == word && is_at(commands));
    known.map(|(_, _, tip)| tip)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::{Arg, Command, CommandFactory};

    use super::super::Arguments;

    /// Returns the error for a value that no argument accepts.
    fn said_of(command: &Command, argument: &Arg) -> Option<String> {
        const WORD: &str = "-no value:";
        let word = match (argument.get_long(), argument.is_positional()) {
            (Some(name), _) => format!("--{name}={WORD}"),
            (None, true) => WORD.trim_start_matches('-').to_owned(),
            (None, false) => format!("-{}{WORD}", argument.get_short()?),
        };
        let mut command = command.clone();
        let words = [command.get_name().to_owned(), word];
        let parsed = command.try_get_matches_from_mut(words);
        Some(parsed.err()?.to_string())
    }

    /// Errors about values are in our words and show a right value; they are not those of a parser.
    #[test]
    fn no_value_is_refused_in_the_words_of_a_parser() {
        let mut refused = 0;
        for command in Arguments::command().get_subcommands() {
            for argument in command.get_arguments() {
                let Some(said) = said_of(command, argument) else {
                    continue;
                };
                refused += usize::from(said.contains("invalid value"));
                for raw in [
                    "found in string",
                    "invalid digit",
                    " is not in ",
                    "is none;",
                ] {
                    assert!(!said.contains(raw), "{}: {said}", command.get_name());
                }
            }
        }
        // Windows has fewer commands.
        assert!(refused > 50, "{refused} values were refused");
    }
}
