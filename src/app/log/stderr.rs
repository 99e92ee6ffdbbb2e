//! Standard error, behind a queue: a reader that hangs delays nothing.

use crate::app::lossy_writer::LossyWriter;
use crate::sys;

use super::style::dropped_line;

/// Standard error: the log, and what people should know.
pub(crate) static ERR: LossyWriter =
    LossyWriter::new("hvsock-stderr", sys::write_error, dropped_line);
