//! The man page of a page of the guide, made from its Markdown.

use clap_mangen::roff::{Inline, bold, italic, roman};
use pulldown_cmark::{CodeBlockKind, Event, HeadingLevel, Options, Parser, Tag, TagEnd};

use super::page::{Builder, Page, full_name, section_of_guide};
use crate::guide::PAGES;

/// Makes a page of the guide.
pub(super) fn page(name: &str, text: &str) -> Page {
    let title = text.lines().next().unwrap_or_default();
    let title = title
        .trim_start_matches("# ")
        .trim_end_matches('?')
        .replace('`', "");
    let section = section_of_guide(name);
    let mut builder = Builder::new(full_name(name), section, &title);
    if name == "configuration" {
        builder.heading("SYNOPSIS");
        builder.text([bold("hvsock run"), roman(" "), italic("FILE")]);
    }
    let mut writer = Writer::new(builder);
    for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
        writer.take(event);
    }
    let mut builder = writer.builder;
    if name == "configuration" {
        builder.heading("FILES");
        builder.entry(
            "~/.config/hvsock.toml",
            "The file that hvsock-run.service takes.",
        );
        builder.entry(
            "share/doc/hvsock/hvsock.toml",
            "A file with every key, where scripts/install has put it.",
        );
    }
    let mut see_also = vec![("hvsock".to_owned(), 1)];
    if name == "configuration" {
        see_also.extend(["run", "check"].map(|it| (full_name(it), 1)));
    }
    let others = PAGES.iter().filter(|(other, _)| *other != name);
    let mut others: Vec<_> = others
        .map(|(it, _)| (full_name(it), section_of_guide(it)))
        .collect();
    others.sort_by_key(|(_, section)| *section);
    see_also.extend(others);
    builder.finish(&see_also)
}

/// Writes the parser's events as roff.
struct Writer {
    builder: Builder,
    /// The text of the open paragraph, heading or cell.
    line: Vec<Inline>,
    style: fn(String) -> Inline,
    /// The target of the open link.
    link: Option<String>,
    /// The lines of the open code block.
    code: Option<String>,
    in_item: bool,
    /// The headings of the open table, and the cells of its row.
    headings: Vec<String>,
    cells: Vec<Vec<Inline>>,
    /// Whether the page's section has a text already.
    begun: bool,
}

impl Writer {
    fn new(builder: Builder) -> Writer {
        Writer {
            builder,
            line: Vec::new(),
            style: roman,
            link: None,
            code: None,
            in_item: false,
            headings: Vec::new(),
            cells: Vec::new(),
            begun: false,
        }
    }

    fn take(&mut self, event: Event<'_>) {
        match event {
            Event::Start(tag) => self.open(tag),
            Event::End(tag) => self.close(tag),
            Event::Text(text) => match &mut self.code {
                Some(code) => code.push_str(&text),
                None => self.line.push((self.style)(text.into_string())),
            },
            Event::Code(text) => self.line.push(bold(text.into_string())),
            Event::SoftBreak | Event::HardBreak => self.line.push(roman(" ")),
            _ => {}
        }
    }

    fn open(&mut self, tag: Tag<'_>) {
        match tag {
            Tag::Emphasis => self.style = italic,
            Tag::Strong => self.style = bold,
            Tag::Link { dest_url, .. } => self.link = Some(dest_url.into_string()),
            Tag::CodeBlock(CodeBlockKind::Fenced(_) | CodeBlockKind::Indented) => {
                self.code = Some(String::new())
            }
            Tag::Item => {
                self.begin();
                self.builder.control("IP", ["\\(bu", "2"]);
                self.in_item = true;
            }
            _ => {}
        }
    }

    fn close(&mut self, tag: TagEnd) {
        match tag {
            TagEnd::Heading(level) => self.heading(level),
            TagEnd::Paragraph => {
                self.begin();
                if !self.in_item {
                    self.builder.paragraph();
                }
                self.flush();
            }
            TagEnd::Item => {
                self.flush();
                self.in_item = false;
            }
            TagEnd::Emphasis | TagEnd::Strong => self.style = roman,
            TagEnd::Link => {
                let to = self.link.take().unwrap_or_default();
                if to.contains("://") {
                    self.line.push(roman(format!(" <{to}>")));
                }
            }
            TagEnd::CodeBlock => {
                self.begin();
                let code = self.code.take().unwrap_or_default();
                // rustdoc hides these lines.
                let lines = code.lines().filter(|line| !line.starts_with("# "));
                self.builder.verbatim(lines);
            }
            TagEnd::TableCell => {
                let cell = std::mem::take(&mut self.line);
                self.cells.push(cell);
            }
            TagEnd::TableHead => {
                let cells = std::mem::take(&mut self.cells);
                self.headings = cells.into_iter().map(|cell| plain(&cell)).collect();
            }
            TagEnd::TableRow => self.row(),
            _ => {}
        }
    }

    /// Begins a section if text comes before the first heading.
    fn begin(&mut self) {
        if !self.begun {
            self.builder.heading("DESCRIPTION");
            self.begun = true;
        }
    }

    fn heading(&mut self, level: HeadingLevel) {
        let line = std::mem::take(&mut self.line);
        let text = plain(&line);
        match level {
            // The title is in the page's NAME section.
            HeadingLevel::H1 => {}
            HeadingLevel::H2 => {
                self.begin();
                self.builder.heading(&text.to_uppercase());
            }
            _ => self.builder.lesser_heading(&text),
        }
    }

    fn flush(&mut self) {
        let line = std::mem::take(&mut self.line);
        if !line.is_empty() {
            self.builder.text(line);
        }
    }

    /// Writes a table row as an entry named by its first cell. With more than two columns each cell
    /// is preceded by its heading.
    fn row(&mut self) {
        self.begin();
        let mut cells = std::mem::take(&mut self.cells).into_iter();
        let Some(name) = cells.next() else {
            return;
        };
        self.builder.control("TP", []);
        self.builder.text(name);
        let many = self.headings.len() > 2;
        let mut first = true;
        for (heading, cell) in self.headings.iter().skip(1).zip(cells) {
            if !std::mem::take(&mut first) {
                self.builder.control("br", []);
            }
            let mut line = Vec::new();
            if many && !heading.is_empty() {
                line.push(roman(format!("{heading}: ")));
            }
            line.extend(cell);
            self.builder.text(line);
        }
    }
}

/// Returns the text of a line without fonts.
fn plain(line: &[Inline]) -> String {
    let text = line.iter().map(|part| match part {
        Inline::Roman(text) | Inline::Bold(text) | Inline::Italic(text) => text.as_str(),
        _ => " ",
    });
    text.collect()
}
