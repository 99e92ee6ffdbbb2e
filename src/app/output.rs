//! Standard output of a command, and the flush of all its output at the end.

use std::io::{self, Write};

use crate::app::log::{self, dropped_line};
use crate::app::lossy_writer::{LossyWriter, patience};
use crate::sys;

/// Standard output. Results that the user asked for are written by [`print()`] instead.
pub(crate) static OUT: LossyWriter =
    LossyWriter::new("hvsock-stdout", sys::write_output, dropped_line);

/// Returns how many lines were dropped since the start, on both streams and in the log's file.
#[cfg(unix)]
pub(crate) fn dropped() -> u64 {
    [&OUT, &log::ERR, &log::LOG]
        .map(LossyWriter::dropped)
        .iter()
        .sum()
}

/// Waits at the end of the process until all output is written.
pub(crate) fn flush() {
    let patience = patience();
    // The streams are written at the same time, so their waits don't add up.
    OUT.flush(patience);
    log::ERR.flush(patience);
    log::LOG.flush(patience);
}

/// Writes a result that the user asked for to standard output, after earlier lines. Waits for the
/// reader.
///
/// # Errors
/// Returns the error of the write.
pub(crate) fn print(bytes: &[u8]) -> io::Result<()> {
    flush();
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush())
}
