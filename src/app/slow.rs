//! Says what is waited for when something takes long that seldom does, such as a file system.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

/// How long nothing is said. A disk that spins up takes some seconds.
const PATIENCE: Duration = Duration::from_secs(3);

/// Does `work` on this thread. If that takes long, `tell` is called once: `doing` is what the work is, in words.
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
        // Without a thread nothing is said.
        let _ = thread::Builder::new()
            .name("hvsock-slow".to_owned())
            .spawn_scoped(scope, watch);
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
}
