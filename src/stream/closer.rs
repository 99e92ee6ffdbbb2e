//! Closes descriptors that a peer has passed, on threads that nothing waits for.
//!
//! A close may take as long as a peer likes, as that of a TCP socket with `SO_LINGER` and unsent
//! bytes does.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// How many closes are under way.
static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);

/// How many may be: a connection that brings more is broken off.
const MOST: usize = 64;

/// Closes descriptors that came with bytes, if any did.
///
/// # Errors
/// Returns an error if too many are being closed already. Only the connection that brought these is
/// to end.
pub(crate) fn close_passed(descriptors: Vec<OwnedFd>) -> io::Result<()> {
    if descriptors.is_empty() {
        return Ok(());
    }
    let has_room = UNDER_WAY.load(Ordering::Relaxed) < MOST;
    close(descriptors);
    match has_room {
        true => Ok(()),
        false => Err(io::Error::other(
            "descriptors were passed faster than they can be closed",
        )),
    }
}

/// Drops a value on a thread of its own, so that one close doesn't wait for another.
pub(crate) fn close(what: impl Send + 'static) {
    UNDER_WAY.fetch_add(1, Ordering::Relaxed);
    let close = move || {
        drop(what);
        UNDER_WAY.fetch_sub(1, Ordering::Relaxed);
    };
    // If there is no thread, it was dropped here.
    if thread::Builder::new()
        .name("closer".into())
        .spawn(close)
        .is_err()
    {
        UNDER_WAY.fetch_sub(1, Ordering::Relaxed);
    }
}
