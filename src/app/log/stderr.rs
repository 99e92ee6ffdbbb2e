//! Standard error, behind a queue, so that a hanging reader delays nothing.

use crate::app::lossy_writer::LossyWriter;
use crate::sys;

use super::style::dropped_line;

/// Standard error: log lines, and messages for people.
pub(crate) static ERR: LossyWriter =
    LossyWriter::new("hvsock-stderr", sys::write_error, dropped_line);
