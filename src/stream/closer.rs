//! Closing what a peer has passed, where nobody waits for it.
//!
//! A close may take as long as a peer likes: of a TCP socket with `SO_LINGER` and bytes that nobody takes, for example.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// How many closes may be under way.
static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);

/// The most of them, before a connection that brings more is broken off.
const MOST: usize = 64;

/// Closes descriptors that came with bytes, if any did.
///
/// # Errors
/// Too many are being closed already: that connection, and no other, is to take no more of them in.
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

/// Drops it in a thread of its own: what waits for one close isn't to wait for another.
pub(crate) fn close(what: impl Send + 'static) {
    UNDER_WAY.fetch_add(1, Ordering::Relaxed);
    let close = move || {
        drop(what);
        UNDER_WAY.fetch_sub(1, Ordering::Relaxed);
    };
    // Where there is no thread it was dropped here.
    if thread::Builder::new()
        .name("closer".into())
        .spawn(close)
        .is_err()
    {
        UNDER_WAY.fetch_sub(1, Ordering::Relaxed);
    }
}
