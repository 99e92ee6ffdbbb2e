//! What has ended, and who ended it.

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{c_int, socklen_t};

use crate::{kernel, next};

/// Which directions of a connection have ended: by us, or by the peer, whether its end was read or
/// not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) read: bool,
    pub(crate) write: bool,
}

impl Ended {
    pub(crate) fn of(fd: c_int) -> Ended {
        match kernel::stream(fd) {
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
        let told = kernel::poll_now(fd, libc::POLLRDHUP);
        // One that was never connected is hung up only.
        let read = told & libc::POLLRDHUP != 0;
        let both = read && told & libc::POLLHUP != 0;
        let write = both
            || match is_unix {
                true => cannot_send(fd) && !may_send(fd),
                false => has_sent_fin(fd),
            };
        Ended { read, write }
    }
}

/// To send nothing to a Unix socket does nothing, but is refused after our half-close, and after
/// the peer's `SHUT_RD`, which on macOS doesn't end this direction.
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

/// Beyond macOS' `OPEN_MAX`, and beyond what the tests use.
const MOST: usize = 1 << 16;

/// Whose writing end this process has shut down. Linux doesn't tell that from a peer's `SHUT_RD`.
static HALF_CLOSED: [AtomicBool; MOST] = [const { AtomicBool::new(false) }; MOST];

fn half_closed(fd: c_int) -> Option<&'static AtomicBool> {
    usize::try_from(fd).ok().and_then(|fd| HALF_CLOSED.get(fd))
}

/// Whether we have not ended this direction.
fn may_send(fd: c_int) -> bool {
    half_closed(fd).is_some_and(|it| !it.load(Ordering::Relaxed))
}

/// Notes whether we have ended our writing end; a number comes again with another socket.
pub(crate) fn note_half_close(fd: c_int, ended: bool) {
    if let Some(it) = half_closed(fd) {
        it.store(ended, Ordering::Relaxed);
    }
}

/// Notes that a descriptor is another's twin.
pub(crate) fn note_twin(fd: c_int, of: c_int) {
    note_half_close(fd, !may_send(of));
}

/// Whether a write to a Unix socket has failed because its peer takes nothing more, though it is
/// there.
pub(crate) fn is_unheard(fd: c_int) -> bool {
    let is_gone = || kernel::poll_now(fd, libc::POLLRDHUP) & libc::POLLHUP != 0;
    kernel::is_unix(fd) && may_send(fd) && !is_gone()
}
