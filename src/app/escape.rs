//! What files, directories and peers have put into a text, made fit for a terminal and for a line.

use std::borrow::Cow;

/// Escapes all that would move a terminal, turn the direction of writing or begin a new line: for
/// names that are to stand in one line.
pub(crate) fn line(text: &str) -> Cow<'_, str> {
    escape(text, |c| c.escape_default().to_string())
}

/// Escapes as [`line()`] does, but newlines and tabs stay: for a text of many lines, in which names
/// were escaped before.
pub(crate) fn text(text: &str) -> Cow<'_, str> {
    escape(text, |c| match c {
        '\n' | '\t' => c.to_string(),
        c => c.escape_default().to_string(),
    })
}

/// Escapes as [`text`] does, in JSON, whose values stay what they are: such characters stand in
/// strings only.
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

/// Returns whether a terminal or an editor would do something instead of showing the character. All
/// are in the basic plane.
fn is_active(c: char) -> bool {
    // Line and paragraph separators; marks, embeddings, overrides and isolates of direction.
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
