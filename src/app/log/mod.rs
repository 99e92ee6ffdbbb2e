//! The log of a command: where it goes, its line format, and its filter.

mod file;
mod filter;
mod format;
mod stderr;
mod style;

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use clap::Args;
use tracing::Level;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::debug_fn;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::app::escape;

pub(crate) use file::LOG;
#[cfg(unix)]
pub(crate) use file::reopen;
pub(crate) use stderr::ERR;
pub(crate) use style::dropped_line;
use style::{LogFormat, Style};

/// The environment variable with the filter.
const VARIABLE: &str = "HVSOCK_LOG";

/// Where the log goes, and how its lines look.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Log")]
pub(crate) struct LogOptions {
    /// Append the log to a file instead of standard error; SIGHUP opens it again, and does not end
    /// the process then
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// How a line looks [default: journal under systemd's journal, else text]
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
}

/// Returns whether the log goes to a file.
pub(crate) fn is_in_file() -> bool {
    Style::get().to_file
}

/// Starts the log.
///
/// # Errors
/// Returns what is wrong with the log's file, and the remedy.
pub(crate) fn start(options: &LogOptions) -> Result<(), String> {
    if let Some(path) = &options.log {
        file::open(path)?;
    }
    let format = options.log_format.unwrap_or_else(|| {
        match options.log.is_none() && format::is_read_by_journal() {
            true => LogFormat::Journal,
            false => LogFormat::Text,
        }
    });
    Style {
        format,
        to_file: options.log.is_some(),
    }
    .set();
    let text = std::env::var(VARIABLE).unwrap_or_default();
    let (filter, trouble) = match filter::parse(&text) {
        Ok(filter) => (filter, None),
        Err(why) => (
            filter::default_filter(),
            Some(format!("{VARIABLE}={text:?}: {why}; taking info")),
        ),
    };
    log_panics();
    subscribe(format, filter);
    if let Some(trouble) = trouble {
        say(Level::WARN, trouble);
    }
    Ok(())
}

/// Installs the subscriber that writes this process' events. If the calling program has installed
/// its own, that one stays.
fn subscribe(format: LogFormat, filter: EnvFilter) {
    // Names from peers and files are escaped, so that they stay within the line. The formatter's
    // own colours are kept.
    let fields = debug_fn(|line, field, value| {
        let value = format!("{value:?}");
        let value = escape::line(&value);
        match field.name() {
            "message" => write!(line, "{value}"),
            name => write!(line, "{name}={value}"),
        }
    });
    let layer = tracing_subscriber::fmt::layer()
        .with_target(false)
        .with_writer(LogWriter(format))
        // It would report them with `eprintln!`, which panics.
        .log_internal_errors(false);
    let layer = match format {
        LogFormat::Text => layer
            .fmt_fields(fields.delimited(" "))
            .with_ansi(!is_in_file() && io::stderr().is_terminal())
            .boxed(),
        LogFormat::Json => layer
            .json()
            .with_target(true)
            .flatten_event(true)
            .with_span_list(false)
            .boxed(),
        LogFormat::Journal => layer
            .fmt_fields(fields.delimited(" "))
            .with_ansi(false)
            .event_format(format::Journal::default())
            .boxed(),
    };
    let log = tracing_subscriber::registry().with(filter).with(layer);
    let _ = log.try_init();
}

/// Prints a message for people: as `hvsock: …` if the log is text on standard error, else as a line
/// of the log. It is printed even if the filter leaves out its level.
pub(crate) fn say(level: Level, what: impl fmt::Display) {
    let is_logged = Style::get() != Style::PLAIN && writes_level(level);
    if is_logged {
        match level {
            Level::ERROR => tracing::error!("{what}"),
            Level::WARN => tracing::warn!("{what}"),
            _ => tracing::info!("{what}"),
        }
    }
    // If the log is a file, print to the terminal as well.
    if !is_logged || is_in_file() {
        let line = format!("hvsock: {}\n", escape::line(&what.to_string()));
        ERR.send(line.into_bytes());
    }
}

/// Prints a line that follows a message of [`say`].
pub(crate) fn say_more(level: Level, line: impl fmt::Display) {
    match Style::get() {
        Style {
            format: LogFormat::Text,
            to_file: false,
        } => ERR.send(format!("{}\n", escape::line(&line.to_string())).into_bytes()),
        _ => say(level, line),
    }
}

fn writes_level(level: Level) -> bool {
    match level {
        Level::ERROR => tracing::enabled!(Level::ERROR),
        Level::WARN => tracing::enabled!(Level::WARN),
        _ => tracing::enabled!(Level::INFO),
    }
}

/// The log's destination: a queue that never blocks.
#[derive(Clone, Copy, Debug)]
struct LogWriter(LogFormat);

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let line = match (self.0, std::str::from_utf8(bytes)) {
            // The formatter escapes what JSON requires, but not what controls a terminal.
            (LogFormat::Json, Ok(json)) => escape::json(json).as_bytes().to_vec(),
            _ => bytes.to_vec(),
        };
        match is_in_file() {
            true => LOG.send(line),
            false => ERR.send(line),
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for LogWriter {
    type Writer = LogWriter;

    fn make_writer(&self) -> LogWriter {
        *self
    }
}

/// Writes panics through the queue. std would wait for the reader of standard error, and other
/// threads for the panicking one.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let trace = std::backtrace::Backtrace::capture();
        let mut text = format!("hvsock: {}\n", escape::text(&panic.to_string()));
        if trace.status() == std::backtrace::BacktraceStatus::Captured {
            text += &trace.to_string();
        }
        ERR.send(text.into_bytes());
    }));
}
