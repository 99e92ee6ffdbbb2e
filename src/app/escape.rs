//! Escapes texts with names from files, directories and peers, for terminals and single lines.

use std::borrow::Cow;

/// Escapes what would control a terminal, change the direction of text or begin a new line. For
/// names within a line.
pub(crate) fn line(text: &str) -> Cow<'_, str> {
    escape(text, |c| c.escape_default().to_string())
}

/// Escapes as [`line()`] does, except newlines and tabs. For texts of many lines whose names are
/// escaped already.
pub(crate) fn text(text: &str) -> Cow<'_, str> {
    escape(text, |c| match c {
        '\n' | '\t' => c.to_string(),
        c => c.escape_default().to_string(),
    })
}

/// Escapes as [`text`] does, by JSON's escapes, so that values stay the same: such characters occur
/// only in strings.
pub(crate) fn json(json: &str) -> Cow<'_, str> {
    escape(json, |c| match c {
        '\n' | '\t' => c.to_string(),
        c => format!("\\u{:04x}", u32::from(c)),
    })
}

fn escape(text: &str, escaped: impl Fn(char) -> String) -> Cow<'_, str> {
    if !text.contains(is_active) {
        return text.into();
    }
    let mut shown = String::new();
    for c in text.chars() {
        match is_active(c) {
            true => shown.push_str(&escaped(c)),
            false => shown.push(c),
        }
    }
    shown.into()
}

/// Returns whether a terminal or an editor acts on the character instead of showing it. All such
/// characters are in the basic plane.
fn is_active(c: char) -> bool {
    // Line and paragraph separators, and the marks, embeddings, overrides and isolates of
    // direction.
    let turns = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() || turns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown_instead() {
        let rude = "a\u{1b}[2J\u{7f}\u{9b}K\u{202e}\u{2066}\u{2028}\n\té\\";
        assert_eq!(
            line(rude),
            "a\\u{1b}[2J\\u{7f}\\u{9b}K\\u{202e}\\u{2066}\\u{2028}\\n\\té\\"
        );
        assert_eq!(
            text(rude),
            "a\\u{1b}[2J\\u{7f}\\u{9b}K\\u{202e}\\u{2066}\\u{2028}\n\té\\"
        );
        // What was escaped once stays as it is.
        assert_eq!(line(&line(rude)), line(rude));
        assert!(matches!(line("plain é 日本"), Cow::Borrowed(_)));
    }

    #[test]
    fn escaped_json_says_the_same() {
        let name = "x\u{7f}\u{9b}\u{202e}\"\\\u{1b}\n";
        let given = serde_json::json!({ name: [name] });
        let plain = format!("{given:#}");
        let escaped = json(&plain);
        assert!(!escaped.contains(['\u{7f}', '\u{9b}', '\u{202e}']));
        let read: serde_json::Value = serde_json::from_str(&escaped).unwrap_or_default();
        assert_eq!(read, given);
    }
}
