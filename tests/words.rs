//! The words of messages: how many there are of a thing is said by what knows of one of it, too.

#![cfg(unix)] // The sources are the same everywhere.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::{Path, PathBuf};

/// What is counted in messages, but for units: of bytes and descriptors there are always many.
const NOUNS: [&str; 15] = [
    "client",
    "connection",
    "dial",
    "forward",
    "hvsock",
    "keeper",
    "listener",
    "place",
    "port",
    "process",
    "restart",
    "slot",
    "socket",
    "thing",
    "VM",
];

/// Returns the sources of what people read; the stand-in and the simulated world tell of
/// themselves.
fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let is_left_out = ["tests", "tests.rs", "sim", "simulate", "proptests.rs"].contains(&name);
        if path.is_dir() && !is_left_out {
            sources(&path, found);
        } else if name.ends_with(".rs") && !is_left_out {
            found.push(path);
        }
    }
}

/// Returns the noun that stands in the plural behind a number of which nobody knows that it isn't
/// one. A constant isn't, nor is what follows `of`, `all` or a slash.
fn counted(line: &str) -> Option<&'static str> {
    let line = line.trim_start();
    if line.starts_with("//") {
        return None;
    }
    let mut closed = line.match_indices("} ");
    closed.find_map(|(end, _)| {
        let begin = line[..end].rfind('{')?;
        let (name, before) = (&line[begin + 1..end], &line[..begin]);
        let is_number = !name.starts_with(char::is_uppercase) && !["scheme", "vm"].contains(&name);
        let is_counted = ["of ", "all ", "/"].iter().any(|it| before.ends_with(it));
        if !is_number || is_counted {
            return None;
        }
        let word = line[end + 2..].split(|c: char| !c.is_alphabetic()).next()?;
        let mut nouns = NOUNS.into_iter();
        nouns.find(|noun| matches!(word.strip_prefix(noun), Some("s" | "es")))
    })
}

#[test]
fn one_of_a_thing_is_no_plural() {
    assert_eq!(counted("\"{n} slots are lost\""), Some("slot"));
    assert_eq!(counted("\"{} connections\""), Some("connection"));
    assert_eq!(counted("\"all {cap} connections\""), None);
    assert_eq!(counted("\"{MOST} clients\""), None);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&source, &mut files);
    assert!(files.len() > 100, "the sources are not found");
    let mut told = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let text = text.split("#[cfg(test)]\n#[allow").next().unwrap();
        let lines = (1..).zip(text.lines());
        told.extend(lines.filter_map(|(number, line)| {
            let noun = counted(line)?;
            let place = file.strip_prefix(&source).unwrap().display();
            Some(format!(
                "{place}:{number}: one {noun} would be many: {}",
                line.trim()
            ))
        }));
    }
    let told = told.join("\n");
    assert!(told.is_empty(), "`error::counted` knows of one:\n{told}");
}
