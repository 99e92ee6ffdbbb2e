//! All that is wrong with a file, at once.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::app::escape;

/// One thing that is wrong, in a line of the file if it is one's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Problem {
    pub(crate) line: Option<usize>,
    pub(crate) text: String,
    pub(crate) weight: Weight,
}

/// What a problem means for a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Weight {
    /// It can't be carried out.
    Mistake,
    /// It can, and may not be what was meant.
    Note,
}

impl Problem {
    /// Returns it as a line, whatever names the file has.
    pub(crate) fn line_of(&self, file: &Path) -> String {
        let file = file.display();
        let line = self.line.map_or(String::new(), |line| format!("{line}:"));
        let text = format!("{file}:{line} {}", self.text);
        escape::line(&text).into_owned()
    }
}

/// All that is wrong with a file; never empty. Prints as lines of the form `FILE:LINE: WHAT; REMEDY`, without a newline at
/// the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problems {
    file: PathBuf,
    list: Vec<Problem>,
}

impl Problems {
    /// In the order of the lines.
    pub(super) fn new(file: &Path, mut list: Vec<Problem>) -> Problems {
        list.sort();
        list.dedup();
        Problems {
            file: file.to_owned(),
            list,
        }
    }

    /// One, of the file as a whole.
    pub(crate) fn of(file: &Path, text: impl Into<String>) -> Problems {
        let problem = Problem {
            line: None,
            text: text.into(),
            weight: Weight::Mistake,
        };
        Problems::new(file, vec![problem])
    }

    /// Of which file, and how many.
    pub(crate) fn summary(&self) -> String {
        let mistakes = self.list.iter().filter(|it| it.weight == Weight::Mistake);
        match mistakes.count() {
            1 => format!("{}: 1 thing is wrong", self.file.display()),
            n => format!("{}: {n} things are wrong", self.file.display()),
        }
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
