//! Tests that the command lines of the README and the guide are valid.

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use super::Arguments;
use crate::guide::PAGES;

const README: &str = include_str!("../../../README.md");

/// The placeholders of the documents, each with a value to test with.
const PLACEHOLDERS: [(&str, &str); 9] = [
    ("COMMAND", "expose"),
    ("ADDRESS", "tcp://127.0.0.1:1"),
    ("CID", "3"),
    ("PORT", "80"),
    ("SERVICE", "5000"),
    ("SHELL", "bash"),
    ("N", "7"),
    ("ID", "7"),
    ("PID", "7"),
];

/// Splits a command as a shell does, up to a pipe, redirection or comment.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for c in line.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, ' ') => words.extend(word.take()),
            // The rest goes to another program or to a file.
            (None, '|' | '<' | '>' | '&' | ';') => break,
            (None, '#') if word.is_none() => break,
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// Returns the commands in a text that begin with `hvsock`, from code blocks and inline code.
fn commands(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut inside: Option<&str> = None;
    for line in text.lines() {
        match (line.strip_prefix("```"), inside) {
            (Some(language), None) => inside = Some(language),
            (Some(_), Some(_)) => inside = None,
            (None, Some("sh" | "text")) => found.push(line),
            (None, Some(_)) => {}
            (None, None) => found.extend(line.split('`').skip(1).step_by(2)),
        }
    }
    let is_command = |text: &&str| text.starts_with("hvsock ") || text.contains("=debug hvsock ");
    let whole = |text: &str| text[text.find("hvsock ").unwrap_or(0)..].to_owned();
    found.into_iter().filter(is_command).map(whole).collect()
}

/// Indented lines are not wrapped by clap; other long lines would be wrapped a second time.
#[test]
fn help_fits_a_terminal_of_80_columns() {
    let all = Arguments::command();
    for command in std::iter::once(&all).chain(all.get_subcommands()) {
        let name = command.get_name();
        let help = command.get_after_help().map(ToString::to_string);
        let help = help.unwrap_or_default();
        let lines: Vec<&str> = help.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let is_prose = |line: &str| !line.is_empty() && !line.starts_with(' ');
            let goes_on = lines.get(at + 1).is_some_and(|next| is_prose(next));
            match is_prose(line) {
                true => assert!(
                    !goes_on || line.ends_with(['.', ':', ')']),
                    "{name}: {line}"
                ),
                false => assert!(line.chars().count() <= 80, "{name}: {line}"),
            }
        }
    }
}

#[test]
fn every_documented_command_line_is_understood() {
    let mut seen = 0;
    let pages = PAGES.iter().copied().chain([("README", README)]);
    for (page, text) in pages {
        for command in commands(text) {
            // Leaves out abbreviated commands, and pictures.
            if command.contains('…')
                || command.contains("  ") && page == "README" && command.contains("in the VM")
            {
                continue;
            }
            let mut words = words(&command);
            for word in &mut words {
                if let Some((_, real)) = PLACEHOLDERS.iter().find(|(name, _)| name == word) {
                    *word = (*real).to_owned();
                }
            }
            seen += 1;
            let kind = Arguments::try_parse_from(&words).map_err(|e| e.kind());
            let known = match kind {
                Ok(_) => true,
                Err(ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => true,
                // A sentence may leave out required arguments.
                Err(ErrorKind::MissingRequiredArgument) => true,
                Err(_) => false,
            };
            assert!(known, "{page}: {command}: {kind:?}, {words:?}");
        }
    }
    assert!(seen > 80, "only {seen} commands were found");
}

#[test]
fn the_guide_shows_every_command() {
    let page = PAGES.iter().find(|(name, _)| *name == "commands");
    let page = page.map_or("", |(_, text)| text);
    let all = Arguments::command();
    for command in all.get_subcommands() {
        let name = command.get_name();
        let is_told =
            page.contains(&format!("`hvsock {name}")) || page.contains(&format!("\nhvsock {name}"));
        assert!(is_told, "{name} is not in the guide");
    }
}

#[test]
fn the_readme_is_short() {
    let (text, _changelog) = README.split_once("## Changelog").unwrap_or((README, ""));
    let words = text.split_whitespace().count();
    assert!(words <= 900, "{words} words");
}

#[test]
fn every_key_of_the_file_is_documented() {
    let page = PAGES.iter().find(|(name, _)| *name == "configuration");
    let page = page.map_or("", |(_, text)| text);
    let example = include_str!("../../../scripts/hvsock.toml");
    let keys = example.lines().filter_map(|line| {
        let (key, _) = line.trim_start_matches("# ").split_once(" =")?;
        (!key.contains(' ')).then_some(key)
    });
    let keys: Vec<&str> = keys.collect();
    assert!(keys.len() > 20, "{keys:?}");
    for key in keys {
        assert!(
            page.contains(&format!("\n| `{key}` |")),
            "{key} is not documented"
        );
    }
}
