//! A builder for man pages, which those of commands and of the guide share.

use clap_mangen::roff::{Inline, Roff, bold, roman};

/// A man page.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) name: String,
    pub(super) section: u8,
    /// The page in roff, ASCII only.
    pub(super) text: String,
}

/// Returns the full name of the page of a command or of the guide.
pub(super) fn full_name(name: &str) -> String {
    match name {
        "" | "hvsock" => "hvsock".to_owned(),
        "configuration" => "hvsock.toml".to_owned(),
        name => format!("hvsock-{name}"),
    }
}

/// Returns the man section of a guide's page.
pub(super) fn section_of_guide(name: &str) -> u8 {
    match name {
        "configuration" => 5,
        _ => 7,
    }
}

/// Builds a page.
pub(super) struct Builder {
    name: String,
    section: u8,
    /// The text written so far.
    text: String,
    roff: Roff,
    /// Whether a heading was just written, after which roff begins a paragraph by itself.
    after_heading: bool,
}

/// The definition of the string by which clap's part of a page writes apostrophes.
const APOSTROPHE: &str = ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n";

impl Builder {
    /// Begins a page with its NAME section.
    pub(super) fn new(name: String, section: u8, about: &str) -> Builder {
        let version = env!("CARGO_PKG_VERSION");
        // No date: a page changes with the version only.
        let title = format!(".TH {name} {section} \"\" \"hvsock {version}\" \"hvsock\"\n");
        let mut builder = Builder {
            name,
            section,
            text: APOSTROPHE.to_owned() + &title,
            roff: Roff::new(),
            after_heading: false,
        };
        builder.heading("NAME");
        builder.text([roman(format!("{} - {about}", builder.name))]);
        builder
    }

    pub(super) fn heading(&mut self, heading: &str) {
        self.control("SH", [heading]);
        self.after_heading = true;
    }

    pub(super) fn lesser_heading(&mut self, heading: &str) {
        self.control("SS", [heading]);
        self.after_heading = true;
    }

    /// Begins a paragraph.
    pub(super) fn paragraph(&mut self) {
        if !std::mem::take(&mut self.after_heading) {
            self.roff.control("PP", []);
        }
    }

    /// Adds a roff request.
    pub(super) fn control<'a>(&mut self, name: &str, arguments: impl IntoIterator<Item = &'a str>) {
        self.after_heading = false;
        self.roff.control(name, arguments);
    }

    /// Adds a line of text.
    pub(super) fn text(&mut self, line: impl Into<Vec<Inline>>) {
        self.after_heading = false;
        self.roff.text(line);
    }

    /// Adds an entry of a list: its name, and its description.
    pub(super) fn entry(&mut self, name: &str, what: &str) {
        self.control("TP", []);
        self.text([bold(name)]);
        self.text([roman(what)]);
    }

    /// Adds text that is roff already.
    pub(super) fn raw(&mut self, roff: &str) {
        let written = std::mem::take(&mut self.roff).to_roff();
        self.text += &exact(&written);
        self.text += roff;
    }

    /// Adds lines unformatted.
    pub(super) fn verbatim<'a>(&mut self, lines: impl IntoIterator<Item = &'a str>) {
        self.paragraph();
        self.control("RS", ["4"]);
        self.control("nf", []);
        for line in lines {
            match line.is_empty() {
                true => self.control("sp", []),
                false => self.text([roman(line)]),
            }
        }
        self.control("fi", []);
        self.control("RE", []);
    }

    /// Ends the page with its SEE ALSO section.
    pub(super) fn finish(mut self, see_also: &[(String, u8)]) -> Page {
        self.heading("SEE ALSO");
        let mut line = Vec::new();
        for (at, (name, section)) in see_also.iter().enumerate() {
            let end = if at + 1 == see_also.len() { "" } else { ", " };
            line.push(bold(name.as_str()));
            line.push(roman(format!("({section}){end}")));
        }
        self.text(line);
        self.raw("");
        Page {
            text: to_ascii(&self.text),
            name: self.name,
            section: self.section,
        }
    }
}

/// Escapes backslashes and apostrophes, which roff would show as other characters on a terminal.
fn exact(roff: &str) -> String {
    let mut text = String::with_capacity(roff.len());
    for line in roff.lines() {
        match line.starts_with('.') {
            true => text += line,
            false => text += &line.replace(r"\\", r"\e").replace('\'', r"\(aq"),
        }
        text.push('\n');
    }
    text
}

/// Replaces characters beyond ASCII by their roff names: a reader of the page may take it for
/// Latin-1.
fn to_ascii(text: &str) -> String {
    let mut ascii = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_ascii() {
            true => ascii.push(c),
            false => ascii += &format!("\\[u{:04X}]", u32::from(c)),
        }
    }
    ascii
}
