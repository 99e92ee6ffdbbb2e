//! Runs checks, each bounded in time, and prints what became of them.

use std::error::Error;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// What a check found.
pub(crate) type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

/// Ends a check with a reason unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($why:tt)+) => {
        if !$condition {
            return Err(format!($($why)+).into());
        }
    };
}
pub(crate) use ensure;

/// Runs a check in a thread of its own. A check that hangs is abandoned.
pub(crate) fn check(
    name: &str,
    limit: Duration,
    body: impl FnOnce() -> Outcome + Send + 'static,
) -> bool {
    let start = Instant::now();
    let (told, outcome) = channel();
    thread::spawn(move || told.send(body()));
    let failure = match outcome.recv_timeout(limit) {
        Ok(Ok(())) => None,
        Ok(Err(why)) => Some(why.to_string()),
        Err(RecvTimeoutError::Timeout) => Some(format!("not done after {} s", limit.as_secs())),
        Err(RecvTimeoutError::Disconnected) => Some("it panicked".to_owned()),
    };
    match &failure {
        None => println!("ok {name} ({} ms)", start.elapsed().as_millis()),
        Some(why) => println!("FAILED {name}: {why}"),
    }
    failure.is_none()
}

/// Calls `ask` until it returns true, for `within` at most. Returns whether it did.
pub(crate) fn eventually(within: Duration, mut ask: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + within;
    loop {
        if ask() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
}
