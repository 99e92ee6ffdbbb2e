//! What a command writes to its standard output, and the end of all that it writes.

use std::io::{self, Write};

use crate::app::log::{self, dropped_line};
use crate::app::lossy_writer::{LossyWriter, patience};
use crate::sys;

/// Standard output. What was asked for is written by [`print()`] instead.
pub(crate) static OUT: LossyWriter =
    LossyWriter::new("hvsock-stdout", sys::write_output, dropped_line);

/// Returns how many lines were dropped since the start, on both streams and of the log's file.
#[cfg(unix)]
pub(crate) fn dropped() -> u64 {
    [&OUT, &log::ERR, &log::LOG]
        .map(LossyWriter::dropped)
        .iter()
        .sum()
}

/// Waits at the end until what was said is written.
pub(crate) fn flush() {
    let patience = patience();
    // They wait at the same time: the others have had their time when the first has.
    OUT.flush(patience);
    log::ERR.flush(patience);
    log::LOG.flush(patience);
}

/// Writes what was asked for to standard output, behind what was said before, and waits for its
/// reader.
///
/// # Errors
/// That it can't be written.
pub(crate) fn print(bytes: &[u8]) -> io::Result<()> {
    flush();
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush())
}
