//! The tables of the guide's page on other programs.

use std::fs;

/// A line: what stands in code in its first two columns.
#[derive(Debug)]
pub(crate) struct Line {
    /// The parts of "before", one a line.
    pub(crate) theirs: String,
    /// The commands of "now".
    pub(crate) ours: Vec<String>,
}

impl Line {
    /// The same line with other words in the place of those that a test can't use.
    pub(crate) fn with(&self, words: &str, others: &str) -> Line {
        Line {
            theirs: self.theirs.replace(words, others),
            ours: self
                .ours
                .iter()
                .map(|it| it.replace(words, others))
                .collect(),
        }
    }
}

/// All lines of all tables.
pub(crate) fn lines() -> Vec<Line> {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/replacing.md");
    let text = fs::read_to_string(page).unwrap();
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    rows.map(line).collect()
}

/// The line whose first column is that, or else the only one that has these words in it.
pub(crate) fn find(key: &str) -> Line {
    let mut lines = lines();
    let is_exact = lines.iter().any(|line| line.theirs == key);
    lines.retain(|line| line.theirs == key || !is_exact && line.theirs.contains(key));
    assert_eq!(lines.len(), 1, "{key:?}: {lines:?}");
    lines.remove(0)
}

fn line(row: &str) -> Line {
    // In a table `\|` is no end of a cell.
    let row = row.replace("\\|", "\0");
    let cells: Vec<&str> = row.split('|').collect();
    let [_, theirs, ours, _, _] = cells[..] else {
        panic!("{row:?} has {} cells", cells.len() - 2);
    };
    let code = |cell: &str| -> Vec<String> {
        let spans = cell.split('`').skip(1).step_by(2);
        spans.map(|it| it.replace('\0', "|")).collect()
    };
    let line = Line {
        theirs: code(theirs).join("\n"),
        ours: code(ours),
    };
    assert!(!line.ours.is_empty(), "{row:?} has no command of ours");
    line
}
