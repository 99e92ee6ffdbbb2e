//! The problems of a file, which are reported all at once.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::app::escape;
use crate::app::needs::Finding;
pub(crate) use crate::app::needs::Weight;
use crate::error::counted;

/// A line of the file or of an included one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Line {
    /// The included file. `None`: the file itself.
    pub(super) included: Option<Arc<Path>>,
    /// The number, from 1.
    pub(super) number: usize,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.included {
            Some(file) => write!(f, "{} of {}", self.number, file.display()),
            None => self.number.fmt(f),
        }
    }
}

/// Returns a key as TOML writes it: in quotes if needed.
pub(crate) fn quote_key(key: &str) -> Cow<'_, str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if !key.is_empty() && key.chars().all(plain) {
        return key.into();
    }
    let mut text = String::from("\"");
    for c in key.chars() {
        match c {
            '"' | '\\' => text.extend(['\\', c]),
            c if c.is_control() => text += &format!("\\u{:04X}", u32::from(c)),
            c => text.push(c),
        }
    }
    text.push('"');
    text.into()
}

/// A problem, with its line if it has one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Problem {
    pub(crate) line: Option<Line>,
    pub(crate) text: String,
    pub(crate) weight: Weight,
}

impl Problem {
    /// Makes a problem of a finding about a forward, on the line of its address.
    pub(super) fn of_forward(name: &str, line: &Line, finding: &Finding) -> Problem {
        Problem {
            line: Some(line.clone()),
            text: format!("[forward.{}]: {finding}", quote_key(name)),
            weight: finding.weight,
        }
    }

    /// Formats the problem as a line. Names from the file are escaped.
    pub(crate) fn line_of(&self, file: &Path) -> String {
        let line = self.line.as_ref();
        let included = line.and_then(|line| line.included.as_deref());
        let file = display_name(included.unwrap_or(file));
        let number = line.map_or(String::new(), |line| format!("{}:", line.number));
        let kind = match self.weight {
            Weight::Mistake => "",
            Weight::Note => "note: ",
        };
        let text = format!("{file}:{number} {kind}{}", self.text);
        escape::line(&text).into_owned()
    }
}

/// The path that means standard input.
pub(crate) const STANDARD_INPUT: &str = "-";

/// Returns a file's name for messages.
pub(crate) fn display_name(file: &Path) -> std::path::Display<'_> {
    match file == Path::new(STANDARD_INPUT) {
        true => Path::new("standard input").display(),
        false => file.display(),
    }
}

/// The mistakes in a file, and the notes. Prints as lines of the form `FILE:LINE: WHAT; REMEDY`,
/// without a newline at the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problems {
    file: PathBuf,
    list: Vec<Problem>,
}

impl Problems {
    /// Makes the problems of a file, sorted by their lines.
    pub(crate) fn new(file: &Path, mut list: Vec<Problem>) -> Problems {
        list.sort();
        list.dedup();
        Problems {
            file: file.to_owned(),
            list,
        }
    }

    /// Makes a single problem of a whole file.
    pub(crate) fn of(file: &Path, text: impl Into<String>) -> Problems {
        let problem = Problem {
            line: None,
            text: text.into(),
            weight: Weight::Mistake,
        };
        Problems::new(file, vec![problem])
    }

    /// Returns the number of mistakes.
    fn mistakes(&self) -> usize {
        let mistakes = self.list.iter().filter(|it| it.weight == Weight::Mistake);
        mistakes.count()
    }

    /// Returns a line with the file and the number of problems.
    pub(crate) fn summary(&self) -> String {
        let (file, mistakes) = (display_name(&self.file), self.mistakes());
        let is = if mistakes == 1 { "is" } else { "are" };
        format!("{file}: {} {is} wrong", counted(mistakes as u64, "thing"))
    }

    /// Formats each problem as a line. Names from the file are escaped.
    pub(crate) fn lines(&self) -> impl Iterator<Item = String> {
        self.list.iter().map(|it| it.line_of(&self.file))
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.lines().collect();
        f.write_str(&lines.join("\n"))
    }
}
