//! Parses the text of a file, and reports what is no TOML.

use std::collections::HashSet;
use std::ops::{Range, RangeInclusive};

use toml::Spanned;
use toml::de::DeTable;

use super::problems::Problem;
use super::section::ConfigText;

/// The parser's message for a key or a section that occurs twice.
const DUPLICATE: &str = "duplicate key";

/// The parts of a file that could be parsed.
#[derive(Debug)]
pub(super) struct Parsed<'t> {
    pub(super) table: Spanned<DeTable<'t>>,
    /// The line numbers at which sections begin. The lines before the first section count as a
    /// section.
    sections: Vec<usize>,
    /// The lines that are no TOML.
    broken: Vec<RangeInclusive<usize>>,
    /// The number of problems about these lines, which come first.
    told: usize,
}

impl Parsed<'_> {
    /// Returns whether all of the file is TOML.
    pub(super) fn is_toml(&self) -> bool {
        self.broken.is_empty()
    }

    /// Returns the problems that are certain although some of the file is no TOML: those about what
    /// is no TOML, and those of whole sections.
    pub(super) fn sound(&self, mut problems: Vec<Problem>) -> Vec<Problem> {
        let section = |line: usize| self.sections.partition_point(|first| *first <= line);
        let is_broken = |at: usize| {
            let mut broken = self.broken.iter();
            broken.any(|it| (section(*it.start())..=section(*it.end())).contains(&at))
        };
        let of_others = problems.split_off(self.told.min(problems.len()));
        let of_sound = of_others.into_iter().filter(|problem| {
            let line = problem.line.as_ref();
            line.is_none_or(|line| !is_broken(section(line.number)))
        });
        problems.extend(of_sound);
        problems
    }
}

/// Parses a file. Reports what is no TOML.
pub(super) fn parse_table<'t>(source: &ConfigText, text: &'t str) -> Parsed<'t> {
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut told = HashSet::new();
    let mut broken = Vec::new();
    let line_at = |at: usize| source.line(at..at).number;
    for error in &errors {
        let span = error.span().unwrap_or(0..0);
        // An error up to the end of the text may be an open string that hides any of it.
        let is_open = text[..span.end.min(text.len())].trim_end() == text.trim_end();
        broken.push(match is_open && error.message() != DUPLICATE {
            true => 0..=usize::MAX,
            false => line_at(span.start)..=line_at(span.end),
        });
        match error.message() {
            DUPLICATE => report_duplicate(source, text, span, &mut told),
            message => source.complain(source.line(span), format!("this is no TOML: {message}")),
        }
    }
    let begins = lines(text).filter(|(_, line)| is_header(line));
    Parsed {
        table,
        sections: begins.map(|(at, _)| line_at(at)).collect(),
        broken,
        told: source.count_problems(),
    }
}

/// Reports a key or section that occurs twice. The keys of such a section occur twice as well,
/// which is not reported: `told` has the positions of the sections.
fn report_duplicate(
    source: &ConfigText,
    text: &str,
    span: Range<usize>,
    told: &mut HashSet<usize>,
) {
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

/// Returns whether a section begins on a line, even if its brackets are not closed. A line of an
/// array differs by characters that unquoted names can't have. If such a line is taken for a
/// header, a section only gets larger.
fn is_header(line: &str) -> bool {
    let line = line.split('#').next().unwrap_or(line).trim();
    line.starts_with('[')
        && line.contains(char::is_alphanumeric)
        && !line.contains([',', '"', '\'', '='])
}

/// Returns the lines of a text, each with its position.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.split_inclusive('\n').scan(0, |next, line| {
        let at = *next;
        *next += line.len();
        Some((at, line))
    })
}

/// Returns the sections' names in brackets, without spaces, each with its position. Arrays of
/// tables, which may occur more than once, are left out.
fn headers(text: &str) -> impl Iterator<Item = (usize, String)> {
    lines(text).filter_map(|(at, line)| {
        let begun = line.trim_start();
        let title = begun.strip_prefix('[').filter(|it| !it.starts_with('['))?;
        let name: String = title.split(']').next()?.split_whitespace().collect();
        Some((at + line.len() - begun.len(), format!("[{name}]")))
    })
}
