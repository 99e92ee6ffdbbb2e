//! Gives a Linux process the manners of macOS' sockets.
//!
//! Preloaded (`LD_PRELOAD`), it stands before libc's socket calls. `MANNERS` names those manners
//! that are wanted, with commas between them; without it all are given but `capped` and `copies`.
//! They are read in XNU's source (`bsd/kern/uipc_socket.c`, `uipc_usrreq.c`, `uipc_syscalls.c`);
//! see [`Manner`].
//!
//! What isn't given: calls that don't go through libc; to a peer that has shut down both of its
//! directions a write fails as to one that has closed.

mod calls;
mod copies;
mod ended;
mod kernel;
mod lost;
mod names;
mod next;

use std::sync::OnceLock;

/// What macOS does differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// In a Unix stream socket 8 KiB lie unread, unless `SO_SNDBUF` is set; accepted ones take
    /// their listener's.
    Buffers,
    /// `ENOBUFS` to whoever asks for larger ones: `kern.ipc.maxsockbuf`, were it as small.
    Capped,
    /// `EINVAL` to setsockopt(2) and getpeername(2) once both directions have ended; nor is the
    /// process told then that a Unix socket's peer is of.
    Ended,
    /// `ENOTCONN` to shutdown(2) of a direction that has ended. One of both does nothing then.
    Shutdown,
    /// 128 clients wait at most, and `ECONNREFUSED` at once to the next one of a Unix socket.
    Backlog,
    /// The end, and no `ECONNRESET`, where a Unix peer has closed with bytes unread.
    Eof,
    /// What a Unix peer writes after our `SHUT_RD` is discarded, as is what has come before: no
    /// `EPIPE`.
    Silence,
    /// An accept that finds no descriptor closes its connection.
    Lost,
    /// Accepted sockets take `O_NONBLOCK` from their listener.
    Inherit,
    /// A TCP client that has reset its connection before it was accepted has no name.
    Nameless,
    /// 256 descriptors to begin with, and 10,240 at most, but for programs of tests.
    Descriptors,
    /// A Unix socket's path has 103 bytes at most.
    Path,
    /// A pipe's size is neither known nor to be set, so that nobody goes through pipes with
    /// splice(2).
    Copy,
    /// Children that are forked without pause have copies of all descriptors for some milliseconds.
    /// (So they have everywhere, and for less long.)
    Copies,
}

const ALL: [(&str, Manner); 14] = [
    ("buffers", Manner::Buffers),
    ("capped", Manner::Capped),
    ("ended", Manner::Ended),
    ("shutdown", Manner::Shutdown),
    ("backlog", Manner::Backlog),
    ("eof", Manner::Eof),
    ("silence", Manner::Silence),
    ("lost", Manner::Lost),
    ("inherit", Manner::Inherit),
    ("nameless", Manner::Nameless),
    ("descriptors", Manner::Descriptors),
    ("path", Manner::Path),
    ("copy", Manner::Copy),
    ("copies", Manner::Copies),
];

/// Whether a manner is wanted.
fn has(manner: Manner) -> bool {
    static WANTED: OnceLock<Vec<Manner>> = OnceLock::new();
    WANTED
        .get_or_init(|| {
            let named = std::env::var("MANNERS").ok();
            let is_wanted = |(name, manner): &&(&str, Manner)| match &named {
                Some(named) => named.split(',').any(|it| it == *name),
                None => !matches!(manner, Manner::Capped | Manner::Copies),
            };
            let wanted = ALL.iter().filter(is_wanted);
            wanted.map(|(_, manner)| *manner).collect()
        })
        .contains(&manner)
}

/// Says to the caller of a libc call that it has failed.
fn fail(error: libc::c_int) -> libc::c_int {
    // SAFETY: the location is this thread's own, and valid as long as it runs.
    unsafe { *libc::__errno_location() = error };
    -1
}

/// The error of the libc call that has just failed.
fn error() -> libc::c_int {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() }
}
