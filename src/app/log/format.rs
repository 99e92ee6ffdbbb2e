//! The line format for systemd's journal.

use std::fmt;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{Format, FormatEvent, FormatFields, Full, Writer};
use tracing_subscriber::registry::LookupSpan;

/// Returns the line prefix for a level, as sd-daemon(3) defines it.
pub(super) fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        _ => "<7>",
    }
}

/// Formats an event as the stock formatter does, with a priority instead of time and level.
pub(super) struct Journal(Format<Full, ()>);

impl Default for Journal {
    fn default() -> Journal {
        let format = Format::default().without_time();
        Journal(format.with_level(false).with_target(false).with_ansi(false))
    }
}

impl<S, N> FormatEvent<S, N> for Journal
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        cx: &FmtContext<'_, S, N>,
        mut line: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        line.write_str(priority(*event.metadata().level()))?;
        self.0.format_event(cx, line, event)
    }
}

/// Returns whether standard error is connected to systemd's journal: `JOURNAL_STREAM` then has its
/// device and inode (systemd.exec(5)).
pub(super) fn is_read_by_journal() -> bool {
    #[cfg(target_os = "linux")]
    {
        let Ok(stat) = nix::sys::stat::fstat(std::io::stderr()) else {
            return false;
        };
        let journal = std::env::var("JOURNAL_STREAM");
        journal.is_ok_and(|it| it == format!("{}:{}", stat.st_dev, stat.st_ino))
    }
    #[cfg(not(target_os = "linux"))]
    false
}
