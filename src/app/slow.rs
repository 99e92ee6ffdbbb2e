//! Runs work that may hang on a file system, and reports or gives up what takes long.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use crate::thread::{start_scoped_thread, start_thread};

/// How long the work may take before that. A disk that spins up needs some seconds.
const PATIENCE: Duration = Duration::from_secs(3);

/// Runs `work` on its own thread, and gives up if it takes long.
///
/// # Errors
/// Returns a description of why there is no result.
pub(crate) fn give_up_if_slow<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    give_up_after(PATIENCE, work)
}

fn give_up_after<T: Send + 'static>(
    patience: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    let (working, worked) = channel();
    let work = move || {
        // The caller may have given up.
        let _ = working.send(work());
    };
    start_thread("hvsock-look", "to look at files", work).map_err(|e| e.to_string())?;
    let result = worked.recv_timeout(patience);
    result.map_err(|_| "a file system takes long: does it hang?".to_owned())
}

/// Runs `work` on this thread. If it takes long, calls `tell` once. `doing` describes the work.
pub(crate) fn tell_if_slow<T>(
    doing: &str,
    tell: impl FnOnce(String) + Send,
    work: impl FnOnce() -> T,
) -> T {
    tell_after(PATIENCE, tell, doing, work)
}

fn tell_after<T>(
    patience: Duration,
    tell: impl FnOnce(String) + Send,
    doing: &str,
    work: impl FnOnce() -> T,
) -> T {
    let (working, worked) = channel::<()>();
    thread::scope(|scope| {
        let watch = move || {
            if worked.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                tell(format!("{doing} takes long: does its file system hang?"));
            }
        };
        // Without a thread nothing is reported.
        let _ = start_scoped_thread(scope, "hvsock-slow", "to tell of slow files", watch);
        let done = work();
        drop(working);
        done
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_what_takes_long_is_told_of_and_while_it_does() {
        let (tell, told) = channel();
        let hour = Duration::from_secs(3600);
        let quick = tell_after(hour, |what| tell.send(what).unwrap(), "reading a", || 1);
        assert_eq!(quick, 1);
        assert!(told.try_recv().is_err());
        let (tell, told) = channel();
        let soon = Duration::from_millis(1);
        let slow = || told.recv_timeout(Duration::from_secs(30)).unwrap();
        let said = tell_after(
            soon,
            move |what| tell.send(what).unwrap(),
            "reading b",
            slow,
        );
        assert_eq!(said, "reading b takes long: does its file system hang?");
    }

    #[test]
    fn what_takes_long_is_given_up() {
        assert_eq!(give_up_after(Duration::from_secs(3600), || 1), Ok(1));
        let (release, held) = channel::<()>();
        let work = move || held.recv_timeout(Duration::from_secs(30)).is_ok();
        let why = give_up_after(Duration::from_millis(1), work).unwrap_err();
        assert!(why.contains("takes long"), "{why}");
        drop(release);
    }
}
