//! What the real kernel knows of a socket.

use std::ffi::c_void;

use libc::{c_int, socklen_t};

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

/// Which directions of a connection have ended: by us, or by the peer, whether its end was read or
/// not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) read: bool,
    pub(crate) write: bool,
}

impl Ended {
    pub(crate) fn of(fd: c_int) -> Ended {
        match stream(fd) {
            Some(family @ (libc::AF_UNIX | libc::AF_INET | libc::AF_INET6)) => {
                Ended::of_stream(fd, family == libc::AF_UNIX)
            }
            _ => Ended::default(),
        }
    }

    pub(crate) fn both(self) -> bool {
        self.read && self.write
    }

    fn of_stream(fd: c_int, is_unix: bool) -> Ended {
        let mut asked = libc::pollfd {
            fd,
            events: libc::POLLRDHUP,
            revents: 0,
        };
        // SAFETY: one `pollfd` is passed, which is valid; a timeout of 0 doesn't wait.
        unsafe { next::poll(&raw mut asked, 1, 0) };
        // One that was never connected is hung up only.
        let read = asked.revents & libc::POLLRDHUP != 0;
        let both = read && asked.revents & libc::POLLHUP != 0;
        let write = both
            || match is_unix {
                true => cannot_send(fd),
                false => has_sent_fin(fd),
            };
        Ended { read, write }
    }
}

/// To send nothing to a Unix socket does nothing, but is refused after our half-close.
fn cannot_send(fd: c_int) -> bool {
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: no byte is read from the pointer.
    let sent = unsafe { next::send(fd, std::ptr::null(), 0, flags) };
    sent < 0 && crate::error() == libc::EPIPE
}

fn has_sent_fin(fd: c_int) -> bool {
    // `include/net/tcp_states.h`
    const FIN_WAIT_1: u8 = 4;
    const FIN_WAIT_2: u8 = 5;
    const TIME_WAIT: u8 = 6;
    const LAST_ACK: u8 = 9;
    const CLOSING: u8 = 11;
    // The state is the first byte of `struct tcp_info`.
    let mut state: u8 = 0;
    let mut len: socklen_t = 1;
    let value: *mut c_void = (&raw mut state).cast();
    // SAFETY: at most `len` bytes are written to `state`.
    let result =
        unsafe { next::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, value, &raw mut len) };
    result == 0
        && matches!(
            state,
            FIN_WAIT_1 | FIN_WAIT_2 | TIME_WAIT | LAST_ACK | CLOSING
        )
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
