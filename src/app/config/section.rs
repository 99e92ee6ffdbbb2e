//! Reads tables of the file key by key, and collects their problems instead of stopping at the
//! first.

use std::borrow::Cow;
use std::cell::RefCell;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Number, Value};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problems::{Line, Problem, Weight, quote_key};
use super::template;
use crate::app::rule_options::RuleOptions;
use crate::app::values;
use crate::nearest::nearest;
use crate::proxy::check_name;

/// The keys of the file that stand in no section.
pub(super) const TOP_KEYS: [&str; 10] = [
    "include",
    "grace",
    "exit-idle",
    "workers",
    "splice",
    "access-log",
    "control",
    "guest-control",
    "metrics",
    "allow-exec",
];

/// The text of a file, and its problems so far.
#[derive(Debug)]
pub(super) struct ConfigText {
    /// `None`: the file itself; else an included one.
    file: Option<Arc<Path>>,
    /// The positions at which the lines end.
    ends: Vec<usize>,
    problems: RefCell<Vec<Problem>>,
}

impl ConfigText {
    pub(super) fn new(text: &str, file: Option<&Path>) -> ConfigText {
        ConfigText {
            file: file.map(Arc::from),
            ends: text.match_indices('\n').map(|(at, _)| at).collect(),
            problems: RefCell::default(),
        }
    }

    /// Returns the line of a position.
    pub(super) fn line(&self, span: Range<usize>) -> Line {
        Line {
            included: self.file.clone(),
            number: 1 + self.ends.partition_point(|end| *end < span.start),
        }
    }

    pub(super) fn complain(&self, line: Line, text: impl Into<String>) {
        self.add(line, text.into(), Weight::Mistake);
    }

    /// Adds a note.
    pub(super) fn note(&self, line: Line, text: String) {
        self.add(line, text, Weight::Note);
    }

    fn add(&self, line: Line, text: String, weight: Weight) {
        let line = Some(line);
        self.problems
            .borrow_mut()
            .push(Problem { line, text, weight });
    }

    pub(super) fn count_problems(&self) -> usize {
        self.problems.borrow().len()
    }

    pub(super) fn take_problems(&self) -> Vec<Problem> {
        self.problems.take()
    }
}

/// A table of the file: keys are taken out by name, and the rest is unknown.
#[derive(Debug)]
pub(super) struct Section<'a, 'i> {
    source: &'a ConfigText,
    /// Its title in the file: `[vm.docker]`; empty for the file itself.
    title: String,
    table: &'a DeTable<'i>,
    known: Vec<Cow<'static, str>>,
    /// The options whose values could not be read.
    wrong: Vec<String>,
    pub(super) line: Line,
}

impl<'a, 'i> Section<'a, 'i> {
    pub(super) fn root(source: &'a ConfigText, table: &'a DeTable<'i>) -> Section<'a, 'i> {
        Section {
            source,
            title: String::new(),
            table,
            known: Vec::new(),
            wrong: Vec::new(),
            line: source.line(0..0),
        }
    }

    /// Returns whether a key is there, valid or not.
    pub(super) fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// Returns whether an option is there, and valid.
    pub(super) fn has_read(&self, option: &str) -> bool {
        self.has(option) && !self.wrong.iter().any(|wrong| wrong == option)
    }

    /// Returns whether an unknown key was probably meant to be this one. To be called when all keys
    /// were taken.
    pub(super) fn is_meant(&self, key: &str) -> bool {
        let mut names = self.table.keys().map(|name| name.get_ref().as_ref());
        names.any(|name| self.unknown(name) && self.nearest(name) == Some(key))
    }

    fn unknown(&self, key: &str) -> bool {
        !self.known.iter().any(|known| known == key)
    }

    fn nearest(&self, key: &str) -> Option<&str> {
        nearest(key, self.known.iter().map(Cow::as_ref))
    }

    /// Returns the line of a key, or of the section if the key isn't there.
    pub(super) fn line_of(&self, key: &str) -> Line {
        match self.table.get_key_value(key) {
            Some((key, _)) => self.source.line(key.span()),
            None => self.line.clone(),
        }
    }

    /// Reports a problem with the section, or with one of its keys.
    pub(super) fn complain(&self, key: Option<&str>, what: impl std::fmt::Display) {
        let line = key.map_or_else(|| self.line.clone(), |key| self.line_of(key));
        let text = match (self.title.as_str(), key) {
            ("", Some(key)) => format!("{key}: {what}"),
            (title, Some(key)) => format!("{title} {key}: {what}"),
            (title, None) => format!("{title}: {what}"),
        };
        self.source.complain(line, text);
    }

    /// Takes the value of a key, parsed by `read`. Reports an invalid value.
    pub(super) fn take<T>(
        &mut self,
        key: &'static str,
        read: impl Fn(&Value) -> Result<T, String>,
    ) -> Option<T> {
        self.known.push(key.into());
        match read_value(key, self.table.get(key)?.get_ref(), read) {
            Ok(value) => Some(value),
            Err(why) => {
                self.complain(Some(key), why);
                None
            }
        }
    }

    /// Takes a rule's options; those that are missing are as in `usual`.
    pub(super) fn take_options(&mut self, usual: &RuleOptions) -> RuleOptions {
        let mut options = usual.clone();
        for (key, path) in RuleOptions::keys() {
            if let Some(value) = self.table.get(key.as_str()) {
                let set = |value: &Value| {
                    let mut changed = options.clone();
                    changed.set(&path, value.clone()).map(|()| changed)
                };
                let changed = read_value(&key, value.get_ref(), set);
                if let Err(why) = changed.map(|changed| options = changed) {
                    self.complain(Some(&key), why);
                    self.wrong.push(key.clone());
                }
            }
            self.known.push(key.into());
        }
        options
    }

    /// Takes a table.
    pub(super) fn table(&mut self, key: &'static str) -> Option<Section<'a, 'i>> {
        self.known.push(key.into());
        let (key, value) = self.table.get_key_value(key)?;
        self.section(key, value, format!("[{}]", key.get_ref()), "[KEY]")
    }

    /// Takes a table of named tables, as in `[vm.NAME]`, in the order of the file.
    pub(super) fn named(&mut self, key: &'static str) -> Vec<(String, Section<'a, 'i>)> {
        self.known.push(key.into());
        let Some((key, value)) = self.table.get_key_value(key) else {
            return Vec::new();
        };
        let kind = key.get_ref();
        let right = format!("[{kind}.NAME]");
        if let DeValue::Array(entries) = value.get_ref() {
            return self.refuse_listed_tables(key, entries, &right);
        }
        let Some(all) = self.section(key, value, format!("[{kind}]"), &right) else {
            return Vec::new();
        };
        let mut entries: Vec<_> = all.table.iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        let mut named = Vec::new();
        for (name, value) in entries {
            let title = format!("[{kind}.{}]", quote_key(name.get_ref()));
            if let Err(why) = check_name(name.get_ref()) {
                let line = self.source.line(name.span());
                self.source.complain(line, format!("{title}: {why}"));
            } else if let Some(section) = self.section(name, value, title, &right) {
                named.push((name.get_ref().to_string(), section));
            }
        }
        named
    }

    /// Reports tables in a list that should be named, as in `[[vm]]`, and takes them anyway, so
    /// that their other mistakes are reported. Each is named by its key `name`, or by its number.
    fn refuse_listed_tables(
        &self,
        key: &Spanned<Cow<'i, str>>,
        entries: &'a [Spanned<DeValue<'i>>],
        right: &str,
    ) -> Vec<(String, Section<'a, 'i>)> {
        let kind = key.get_ref();
        let text = format!("[{kind}] is a list; write {right}, and its keys below");
        self.source.complain(self.source.line(key.span()), text);
        let mut sections = Vec::new();
        for (number, entry) in (1..).zip(entries) {
            let DeValue::Table(table) = entry.get_ref() else {
                continue;
            };
            let name = match table.get("name").map(Spanned::get_ref) {
                Some(DeValue::String(name)) => name.to_string(),
                _ => i32::to_string(&number),
            };
            let first = table.keys().map(|key| key.span().start).min();
            let mut known = vec!["name".into()];
            // To TOML a named table after a list is part of the list's last table.
            for (inner, value) in table {
                let name = inner.get_ref();
                if matches!(value.get_ref(), DeValue::Table(_)) {
                    known.push(name.to_string().into());
                    let title = format!("[{kind}.{}]", quote_key(name));
                    let section = self.section(inner, value, title, right);
                    sections.extend(section.map(|it| (name.to_string(), it)));
                }
            }
            let section = Section {
                source: self.source,
                title: format!("[[{kind}]] {}", quote_key(&name)),
                table,
                known,
                wrong: Vec::new(),
                line: self.source.line(first.map_or(entry.span(), |at| at..at)),
            };
            sections.push((name, section));
        }
        sections
    }

    fn section(
        &self,
        key: &Spanned<Cow<'i, str>>,
        value: &'a Spanned<DeValue<'i>>,
        title: String,
        right: &str,
    ) -> Option<Section<'a, 'i>> {
        let line = self.source.line(key.span());
        match value.get_ref() {
            DeValue::Table(table) => Some(Section {
                source: self.source,
                title,
                table,
                known: Vec::new(),
                wrong: Vec::new(),
                line,
            }),
            other => {
                let right = right.replace("KEY", key.get_ref());
                let text = format!(
                    "{title} is {}; write {right}, and its keys below",
                    kind(other)
                );
                self.source.complain(line, text);
                None
            }
        }
    }

    /// Reports unknown keys: those that were not taken.
    pub(super) fn finish(self) {
        for key in self.table.keys() {
            let name = key.get_ref().as_ref();
            if !self.unknown(name) {
                continue;
            }
            let place = match self.title.as_str() {
                "" => String::new(),
                title => format!(" in {title}"),
            };
            let is_inner = !self.title.is_empty();
            let remedy = match self.nearest(name) {
                _ if is_inner && TOP_KEYS.contains(&name) => {
                    "it belongs at the top of the file, before the first section".to_owned()
                }
                Some(near) => format!("did you mean {near}?"),
                None => format!("known there: {}", self.known.join(", ")),
            };
            let line = self.source.line(key.span());
            self.source.complain(
                line,
                format!("unknown key {}{place}; {remedy}", quote_key(name)),
            );
        }
    }
}

/// Returns the name of a value's type.
fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::Datetime(_) => "a date",
        other => to_json("", other).map_or("no value", |value| values::kind(&value)),
    }
}

/// Reads a value. A string with an environment variable may stand for a number or a boolean.
fn read_value<T>(
    key: &str,
    value: &DeValue<'_>,
    read: impl Fn(&Value) -> Result<T, String>,
) -> Result<T, String> {
    let given = to_json(key, value)?;
    let outcome = read(&given);
    let (Err(_), DeValue::String(text), Value::String(filled)) = (&outcome, value, &given) else {
        return outcome;
    };
    match filled.parse::<Value>() {
        Ok(scalar @ (Value::Number(_) | Value::Bool(_))) if template::has_variable(text) => {
            read(&scalar)
        }
        _ => outcome,
    }
}

/// Converts a value to JSON.
fn to_json(key: &str, value: &DeValue<'_>) -> Result<Value, String> {
    Ok(match value {
        DeValue::String(text) => Value::String(template::fill(text)?),
        // TOML's octal numbers are permissions.
        DeValue::Integer(number) if key == "mode" && number.radix() == 8 => number.as_str().into(),
        DeValue::Integer(number) => {
            let read = i128::from_str_radix(number.as_str(), number.radix()).ok();
            let number = read.and_then(Number::from_i128);
            number.ok_or("it is too large a number")?.into()
        }
        DeValue::Float(number) => {
            let read = number.as_str().parse().ok().and_then(Number::from_f64);
            read.map_or_else(|| number.as_str().into(), Value::Number)
        }
        DeValue::Boolean(yes) => Value::Bool(*yes),
        DeValue::Datetime(_) => return Err("it is a date, which no key takes".to_owned()),
        DeValue::Array(values) => {
            let values = values.iter().map(|value| to_json(key, value.get_ref()));
            Value::Array(values.collect::<Result<_, String>>()?)
        }
        DeValue::Table(_) => Value::Object(serde_json::Map::new()),
    })
}
