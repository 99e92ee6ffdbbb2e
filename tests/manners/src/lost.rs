//! An accept that finds no descriptor: there is one for it, so that it can close what it takes.

use std::sync::{Mutex, PoisonError};

use libc::c_int;

use crate::{kernel, next};

/// A descriptor that is nobody's.
static SPARE: Mutex<Option<c_int>> = Mutex::new(None);

fn open_spare() -> Option<c_int> {
    // SAFETY: no pointer is passed.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    (fd >= 0).then_some(fd)
}

/// Takes a descriptor, once.
pub(crate) fn keep_spare() {
    let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
    *spare = spare.or_else(open_spare);
}

/// Closes the client that waits first; false if none does.
pub(crate) fn lose_client(listener: c_int) -> bool {
    if kernel::poll_now(listener, libc::POLLIN) == 0 {
        return false;
    }
    let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(fd) = spare.take() else {
        return true;
    };
    let none = std::ptr::null_mut();
    // SAFETY: it is ours, and no address is asked for. Where another thread has taken the number
    // meanwhile, the client waits on.
    unsafe {
        libc::close(fd);
        let client = next::accept4(listener, none, none.cast(), libc::SOCK_CLOEXEC);
        if client >= 0 {
            libc::close(client);
        }
    }
    *spare = open_spare();
    true
}
