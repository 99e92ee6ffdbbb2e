//! What the real kernel knows of a socket.

use std::ffi::c_void;

use libc::{c_int, c_short, socklen_t};

use crate::next;

/// A socket option that is an int.
pub(crate) fn option(fd: c_int, level: c_int, option: c_int) -> Option<c_int> {
    let mut value: c_int = 0;
    let mut len = size_of::<c_int>() as socklen_t;
    // SAFETY: at most `len` bytes are written to `value`, which has so many.
    let result =
        unsafe { next::getsockopt(fd, level, option, (&raw mut value).cast(), &raw mut len) };
    (result == 0).then_some(value)
}

/// Sets a socket option that is an int.
pub(crate) fn set_option(fd: c_int, level: c_int, option: c_int, value: c_int) {
    let len = size_of::<c_int>() as socklen_t;
    let value: *const c_void = (&raw const value).cast();
    // SAFETY: `len` bytes are read from `value`, which has so many.
    unsafe { next::setsockopt(fd, level, option, value, len) };
}

/// The family of a stream socket; none of other descriptors.
pub(crate) fn stream(fd: c_int) -> Option<c_int> {
    let kind = option(fd, libc::SOL_SOCKET, libc::SO_TYPE)?;
    let family = option(fd, libc::SOL_SOCKET, libc::SO_DOMAIN)?;
    (kind == libc::SOCK_STREAM).then_some(family)
}

pub(crate) fn is_unix(fd: c_int) -> bool {
    stream(fd) == Some(libc::AF_UNIX)
}

/// What has come of a connection, without a wait.
pub(crate) fn poll_now(fd: c_int, events: c_short) -> c_short {
    let mut asked = libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    // SAFETY: one `pollfd` is passed, which is valid; a timeout of 0 doesn't wait.
    unsafe { next::poll(&raw mut asked, 1, 0) };
    asked.revents
}

pub(crate) fn is_nonblocking(fd: c_int) -> bool {
    // SAFETY: F_GETFL takes no pointer.
    let flags = unsafe { next::fcntl(fd, libc::F_GETFL, 0) };
    flags >= 0 && flags & libc::O_NONBLOCK != 0
}

pub(crate) fn set_nonblocking(fd: c_int, on: bool) {
    // SAFETY: F_GETFL and F_SETFL take no pointer.
    unsafe {
        let flags = next::fcntl(fd, libc::F_GETFL, 0);
        let flags = match on {
            true => flags | libc::O_NONBLOCK,
            false => flags & !libc::O_NONBLOCK,
        };
        next::fcntl(fd, libc::F_SETFL, flags as usize);
    }
}
