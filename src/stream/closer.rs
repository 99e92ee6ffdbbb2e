//! Closing what a peer has passed, where nobody waits for it.
//!
//! A close may take as long as a peer likes: of a TCP socket with `SO_LINGER` and bytes that nobody takes, for example.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// How many closes may be under way.
static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);

/// The most of them, before no more descriptors are taken in.
const MOST: usize = 64;

/// Whether descriptors may be taken in.
///
/// # Errors
/// That too many are being closed already.
pub(crate) fn check_room() -> io::Result<()> {
    match UNDER_WAY.load(Ordering::Relaxed) < MOST {
        true => Ok(()),
        false => Err(io::Error::other(
            "descriptors were passed faster than they can be closed",
        )),
    }
}

/// Closes descriptors that came with bytes, if any did.
pub(crate) fn close_passed(descriptors: Vec<OwnedFd>) {
    if !descriptors.is_empty() {
        close(descriptors);
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
