//! All that is wrong with a file, at once.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::app::escape;
use crate::app::needs::Finding;
pub(crate) use crate::app::needs::Weight;
use crate::error::counted;

/// A line of the file, or of one that it includes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Line {
    /// `None`: the file itself.
    pub(super) included: Option<Arc<Path>>,
    /// From 1.
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

/// Returns a key as a file has it: in quotes where it must be.
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

/// One thing that is wrong, in a line of the file if it is one's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Problem {
    pub(crate) line: Option<Line>,
    pub(crate) text: String,
    pub(crate) weight: Weight,
}

impl Problem {
    /// Makes it of what is wrong with an end of a forward, which stands in that line.
    pub(super) fn of_forward(name: &str, line: &Line, finding: &Finding) -> Problem {
        Problem {
            line: Some(line.clone()),
            text: format!("[forward.{}]: {finding}", quote_key(name)),
            weight: finding.weight,
        }
    }

    /// Returns it as a line, whatever names the file has.
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

/// The path that stands for standard input.
pub(crate) const STANDARD_INPUT: &str = "-";

/// Returns a file's name for people.
pub(crate) fn display_name(file: &Path) -> std::path::Display<'_> {
    match file == Path::new(STANDARD_INPUT) {
        true => Path::new("standard input").display(),
        false => file.display(),
    }
}

/// All that is wrong with a file, or may be. Prints as lines of the form `FILE:LINE: WHAT; REMEDY`,
/// without a newline at the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problems {
    file: PathBuf,
    list: Vec<Problem>,
}

impl Problems {
    /// Makes it of problems, which are put in the order of their lines.
    pub(crate) fn new(file: &Path, mut list: Vec<Problem>) -> Problems {
        list.sort();
        list.dedup();
        Problems {
            file: file.to_owned(),
            list,
        }
    }

    /// Makes it of one problem, of the file as a whole.
    pub(crate) fn of(file: &Path, text: impl Into<String>) -> Problems {
        let problem = Problem {
            line: None,
            text: text.into(),
            weight: Weight::Mistake,
        };
        Problems::new(file, vec![problem])
    }

    /// Returns how many are mistakes.
    fn mistakes(&self) -> usize {
        let mistakes = self.list.iter().filter(|it| it.weight == Weight::Mistake);
        mistakes.count()
    }

    /// Returns a line that says of which file they are, and how many.
    pub(crate) fn summary(&self) -> String {
        let (file, mistakes) = (display_name(&self.file), self.mistakes());
        let is = if mistakes == 1 { "is" } else { "are" };
        format!("{file}: {} {is} wrong", counted(mistakes as u64, "thing"))
    }

    /// Returns each in a line, whatever names the file has.
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
