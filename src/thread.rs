//! Starts threads. `std::thread::spawn` panics where the system has none left to give.

use std::io;
use std::thread::{Builder, JoinHandle};
#[cfg(feature = "cli")]
use std::thread::{Scope, ScopedJoinHandle};

use crate::error::{Error, Operation, Result};

/// Starts a thread. `name` is what the system calls it (Linux takes 15 bytes), and `purpose` what
/// it is for in an error: "to read standard input".
///
/// # Errors
/// Returns the system's error if it gives no thread.
pub(crate) fn start_thread<T: Send + 'static>(
    name: &str,
    purpose: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    let started = Builder::new().name(name.to_owned()).spawn(work);
    started.map_err(|e| explain(purpose, e))
}

/// Starts a thread that ends before `scope` does, as [`start_thread`] does otherwise.
///
/// # Errors
/// Returns the system's error if it gives no thread.
#[cfg(feature = "cli")]
pub(crate) fn start_scoped_thread<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    purpose: &str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>> {
    let started = Builder::new().name(name.to_owned());
    let started = started.spawn_scoped(scope, work);
    started.map_err(|e| explain(purpose, e))
}

fn explain(purpose: &str, cause: io::Error) -> Error {
    let is_limit = cause.kind() == io::ErrorKind::WouldBlock;
    let error = Error::new(Operation::Run, format_args!("a thread {purpose}"), cause);
    match is_limit {
        true => error.with_remedy(
            "allow more: `ulimit -u`, TasksMax= of the systemd unit, or the container's pids limit",
        ),
        false => error,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_told_with_its_remedy() {
        let limit = io::Error::from(io::ErrorKind::WouldBlock);
        let told = explain("to read standard input", limit).to_string();
        for part in [
            "cannot run a thread to read standard input: ",
            "`ulimit -u`",
            "TasksMax=",
        ] {
            assert!(told.contains(part), "{told}");
        }
        let other = io::Error::from(io::ErrorKind::OutOfMemory);
        let told = explain("to read standard input", other).to_string();
        assert!(!told.contains("ulimit"), "{told}");
        let thread = start_thread("hvsock-test", "to count", || 7).unwrap();
        assert_eq!(thread.join().unwrap(), 7);
    }
}
