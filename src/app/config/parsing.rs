//! Parses the text of a file, and says what is no TOML in it.

use std::collections::HashSet;
use std::ops::Range;

use toml::Spanned;
use toml::de::DeTable;

use super::section::Source;

/// What the parser says of a key, or of a section's name, that is there already.
const DUPLICATE: &str = "duplicate key";

/// Parses a file; what is no TOML in it is said.
pub(super) fn parse_table<'t>(source: &Source, text: &'t str) -> Option<Spanned<DeTable<'t>>> {
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut told = HashSet::new();
    for error in &errors {
        let span = error.span().unwrap_or(0..0);
        match error.message() {
            DUPLICATE => say_duplicate(source, text, span, &mut told),
            message => source.complain(source.line(span), format!("this is no TOML: {message}")),
        }
    }
    // What the rest means can't be known.
    errors.is_empty().then_some(table)
}

/// Says of what is there already where it is. Of a section that is, the keys are as well, which is not
/// said: it is in `told`, by where it begins.
fn say_duplicate(source: &Source, text: &str, span: Range<usize>, told: &mut HashSet<usize>) {
    let section = headers(text).take_while(|(at, _)| *at <= span.start).last();
    if let Some((begin, title)) = &section
        && let Some((first, _)) = headers(text).find(|(_, other)| other == title)
        && first < *begin
    {
        if told.insert(*begin) {
            let (line, first) = (source.line(*begin..*begin), source.line(first..first));
            let what = format!("{title} is there already, in line {first}");
            source.complain(
                line,
                format!("{what}; join the two, or choose another name"),
            );
        }
        return;
    }
    let key = text.get(span.clone()).unwrap_or_default().trim();
    let begin = section.map_or(0, |(at, _)| at);
    let before = lines(text).filter(|(at, _)| (begin..span.start).contains(at));
    let mut same = before.filter(|(_, line)| {
        let rest = line.trim_start().strip_prefix(key);
        rest.is_some_and(|rest| rest.trim_start().starts_with(['=', '.']))
    });
    let place = same
        .next()
        .filter(|(at, line)| at + line.len() <= span.start);
    let place = place.map(|(at, _)| format!(", in line {}", source.line(at..at)));
    let what = format!("{key} is there already{}", place.unwrap_or_default());
    source.complain(source.line(span), format!("{what}; remove one"));
}

/// Returns the lines of a text, each with where it begins.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.split_inclusive('\n').scan(0, |next, line| {
        let at = *next;
        *next += line.len();
        Some((at, line))
    })
}

/// Returns the sections' names in brackets, without blanks, each with where it begins. Those of arrays
/// of tables, which may be there more than once, are left out.
fn headers(text: &str) -> impl Iterator<Item = (usize, String)> {
    lines(text).filter_map(|(at, line)| {
        let begun = line.trim_start();
        let title = begun.strip_prefix('[').filter(|it| !it.starts_with('['))?;
        let name: String = title.split(']').next()?.split_whitespace().collect();
        Some((at + line.len() - begun.len(), format!("[{name}]")))
    })
}
