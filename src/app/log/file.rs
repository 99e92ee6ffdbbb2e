//! The log's file. A separate thread writes it, so that a hanging disk delays nothing else.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::Level;

use crate::app::lossy_writer::LossyWriter;
use crate::app::slow::tell_if_slow;
use crate::file;
use crate::lock::lock;

use super::stderr::ERR;
use super::style::dropped_line;

/// The queue of lines for the file.
pub(crate) static LOG: LossyWriter = LossyWriter::new("hvsock-log", write, dropped_line);

/// The open file. After the start only the writing thread locks it.
static OPEN: Mutex<Option<(PathBuf, File)>> = Mutex::new(None);

/// Whether the file must be opened again before the next write.
static IS_STALE: AtomicBool = AtomicBool::new(false);

/// Opens the log's file. Creates it (mode 0600) if it doesn't exist.
///
/// # Errors
/// Returns why it can't be opened, and the remedy.
pub(super) fn open(path: &Path) -> Result<(), String> {
    let what = format!("opening the log {}", path.display());
    let tell = |what: String| ERR.send(format!("hvsock: {what}\n").into_bytes());
    let file = tell_if_slow(&what, tell, || file::append(path)).map_err(|e| {
        let remedy = match e.kind() {
            io::ErrorKind::NotFound => ": make its directory first",
            io::ErrorKind::PermissionDenied => ": choose a file that you may write",
            io::ErrorKind::ReadOnlyFilesystem => {
                ": its file system can't be written; choose a file on another one"
            }
            io::ErrorKind::IsADirectory => ": it is a directory; name a file in it",
            io::ErrorKind::InvalidInput => ": start its reader first, or name a file",
            _ => "",
        };
        format!("cannot open the log {}: {e}{remedy}", path.display())
    })?;
    *lock(&OPEN) = Some((path.to_owned(), file));
    Ok(())
}

/// Opens the file again before the next line, since it may have been renamed (logrotate).
#[cfg(unix)]
pub(crate) fn reopen() {
    IS_STALE.store(true, Ordering::Release);
}

/// Writes to the file. Standard error says when it begins to fail, and when it ends to.
fn write(bytes: &[u8]) -> io::Result<usize> {
    /// Whether the last write failed.
    static IS_FAILING: AtomicBool = AtomicBool::new(false);
    let written = write_to_file(bytes);
    let fails = match &written {
        Err(e) if e.kind() == io::ErrorKind::Interrupted => return written,
        written => written.is_err(),
    };
    if IS_FAILING.swap(fails, Ordering::Relaxed) != fails {
        let path = lock(&OPEN).as_ref().map(|(path, _)| path.clone());
        let path = path.unwrap_or_default();
        let path = path.display();
        let text = match &written {
            Err(e) => {
                let remedy = match e.kind() {
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                        ": make room on its disk"
                    }
                    _ => "",
                };
                format!("cannot write the log {path}: {e}{remedy}; its lines are lost until it can")
            }
            Ok(_) => format!("the log {path} is written again"),
        };
        ERR.send(format!("hvsock: {text}\n").into_bytes());
    }
    written
}

fn write_to_file(bytes: &[u8]) -> io::Result<usize> {
    let mut open = lock(&OPEN);
    let Some((path, file)) = &mut *open else {
        return Err(io::ErrorKind::NotFound.into());
    };
    if IS_STALE.swap(false, Ordering::AcqRel) {
        match file::append(path) {
            Ok(new) => *file = new,
            Err(e) => {
                let path = path.display();
                let text =
                    format!("cannot open the log {path} again: {e}; going on with the old file");
                ERR.send(format!("hvsock: {text}\n").into_bytes());
                tracing::event!(Level::ERROR, "{text}");
            }
        }
    }
    file.write(bytes)
}
