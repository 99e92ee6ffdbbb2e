//! The destination and line format of the log, as decided at its start.

use std::sync::OnceLock;

use clap::ValueEnum;
use tracing::Level;

use super::format::priority;

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Time, level and text, for people.
    Text,
    /// One JSON object a line.
    Json,
    /// The priority as sd-daemon(3) has it (`<4>`), and no time: the journal has its own.
    Journal,
}

/// The decisions made when the log was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Style {
    pub(super) format: LogFormat,
    pub(super) to_file: bool,
}

static STYLE: OnceLock<Style> = OnceLock::new();

impl Style {
    /// Text on standard error, before the log is started.
    pub(super) const PLAIN: Style = Style {
        format: LogFormat::Text,
        to_file: false,
    };

    /// Returns the style of this process.
    pub(super) fn get() -> Style {
        STYLE.get().copied().unwrap_or(Style::PLAIN)
    }

    /// Sets the style of this process, once.
    pub(super) fn set(self) {
        let _ = STYLE.set(self);
    }
}

/// Returns the line that reports so many dropped lines.
pub(crate) fn dropped_line(count: u64) -> String {
    let lines = match count {
        1 => "line was",
        _ => "lines were",
    };
    let text = format!("{count} log {lines} dropped here");
    match Style::get().format {
        LogFormat::Text => format!("hvsock: {text}\n"),
        LogFormat::Json => format!("{{\"level\":\"WARN\",\"message\":\"{text}\"}}\n"),
        LogFormat::Journal => format!("{}{text}\n", priority(Level::WARN)),
    }
}
