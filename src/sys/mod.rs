//! Calls of the operating system that std, mio and socket2 have no name for. All `unsafe` is here.
//!
//! A system that carries Unix sockets supplies:
//!
//! * `with_short_path(path, f)`: runs `f` with a path to the same file that fits into a
//!   `sockaddr_un`, however long `path` is, as long as its last component fits. What it makes for
//!   that is gone when it returns.
//! * `is_socket_alive(path)`: whether a process has the socket of that file, without connecting to
//!   it.
//! * `Identity::of(path)`: tells two files apart that had the same name one after the other,
//!   without following a symbolic link and without touching the file in any way that its owner
//!   could notice.
//! * `refuse_descriptors(socket)`, `refuses_descriptors(socket)`, `receive(socket, buffer)`:
//!   descriptors that a peer passes; `send(socket, bytes, descriptors)`: some passed to a peer.
//! * `Unconnected`: a Unix socket before it is connected.
//! * `detach()`: makes this process independent of the one that has started it.
//! * `Place::of(path)`: a file by its directory and name, to be changed only if it is still the
//!   right one, no link followed.
//! * `set_bound_mode(socket, mode)`: the permissions of the file that a bind of this socket will
//!   make, where they can be set.
//! * `descriptor_limit()`: how many descriptors the process may have.
//! * `raise_descriptor_limit()`: lets the process have as many descriptors as it may have.
//! * `unacknowledged(socket)`: how many bytes a reset now would take away from the peer.
//! * `make_room(socket)`: buffers of a Unix socket that serve a relay, where the system's own are
//!   small.
//! * `take_over(number)`: takes ownership of a descriptor that the process was started with, once.
//! * `vsock_connect`, `vsock_listen`, `vsock_set_buffer`, `vsock_of`, `local_cid`: AF_VSOCK
//!   sockets, or `Unsupported`.
//! * `wait(socket, what, timeout)`, `wait_for_any_of(sockets, what, timeout)`,
//!   `is_hung_up(socket)`: readiness of sockets, for blocking callers.
//! * `wait_until_output_is_unread()`: the end of those that read standard output.
//! * `has_client(listener)`: whether an accept would find a client, without accepting.
//! * `is_shut_down(listener)`: whether a listening socket was shut down from outside.
//! * `user_id()`, `connector(socket)`: the user of this process, and the process at the other end
//!   of a Unix socket.
//! * `program_name(process)`: the name of the program that a process runs; `process_age(process)`,
//!   on Linux, the time since it was started.
//! * `unread(socket)`: how many bytes have come that were not read yet.
//! * `Process`: another process, and whether it is ending; `Processes`: all of them, to be asked
//!   without waiting.
//! * `detach_command(command, leads)`, `make_terminal()`, `hang_up_group(leader)` and its like:
//!   programs that are started, and the ends of their groups.
//! * `is_closed_by_peer(socket)`: whether the other end of a Unix socket is closed, not only
//!   half-closed.
//! * `Pipe`: splice, on Linux; elsewhere there is none.
//! * `is_ignored(signal)`: whether the process was started with that signal ignored (`nohup`).
//!
//! Windows supplies what is left of this without Unix sockets: `wait`, `is_hung_up`, standard input
//! and output. And
//!
//! * `hv_connect`, `hv_listen`, `hv_of`: AF_HYPERV sockets, all of them blocking.
//! * `Acceptor`: accepting where a listener can't be waited for by a poller.
//! * `cancel(socket)`: ends the calls in which other threads wait, which a shutdown alone may not
//!   do there.
//!
//! Nothing here decides anything: policy is for the callers.

use std::ffi::OsString;
use std::io;

#[cfg(target_os = "linux")]
mod linux;
#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

#[cfg(target_os = "linux")]
pub(crate) use linux::*;
#[cfg(unix)]
pub(crate) use unix::*;
#[cfg(windows)]
pub(crate) use windows::*;

/// AF_VSOCK where there is none (macOS has one for guests only): each call says `Unsupported`.
#[cfg(all(unix, not(target_os = "linux")))]
mod no_vsock {
    use std::io;
    use std::time::Duration;

    use socket2::{SockAddr, Socket};

    fn none<T>() -> io::Result<T> {
        let why = "AF_VSOCK is carried on Linux only";
        Err(io::Error::new(io::ErrorKind::Unsupported, why))
    }

    pub(crate) fn vsock_connect(_: u32, _: u32, _: Option<u64>, _: Duration) -> io::Result<Socket> {
        none()
    }

    pub(crate) fn vsock_listen(_: u32, _: u32, _: i32, _: Option<u64>) -> io::Result<Socket> {
        none()
    }

    pub(crate) fn vsock_set_buffer(_: &Socket, _: u64) -> io::Result<()> {
        none()
    }

    pub(crate) fn local_cid() -> io::Result<u32> {
        none()
    }

    pub(crate) fn vsock_of(_address: &SockAddr) -> Option<(u32, u32)> {
        None
    }
}

#[cfg(all(unix, not(target_os = "linux")))]
pub(crate) use no_vsock::*;

/// No pipe: bytes can't go from one socket to another here without being copied.
#[cfg(not(target_os = "linux"))]
#[derive(Debug)]
pub(crate) enum Pipe {}

#[cfg(not(target_os = "linux"))]
impl Pipe {
    /// Returns `None`: there is no such pipe.
    pub(crate) fn new() -> Option<Pipe> {
        None
    }
}

/// The readiness that is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    Readable,
    Writable,
    #[cfg(feature = "cli")]
    Either,
}

/// Whether poll edges come from the kernel (epoll, kqueue) and not from mio's emulation, which arms
/// a socket again only after a call on it has failed with `WouldBlock`.
pub(crate) const KERNEL_EDGES: bool = cfg!(all(
    unix,
    not(mio_unsupported_force_poll_poll),
    not(target_os = "solaris")
));

/// Whether an accepted TCP socket inherits its listener's options, so that they are set once
/// (Linux' `inet_csk_clone_lock`).
pub(crate) const ACCEPTED_INHERIT: bool = cfg!(target_os = "linux");

/// Whether this is Linux, and not with the manners of macOS that `scripts/check-manners` gives it:
/// what that runs is built with mio's poll(2) fallback.
#[cfg(unix)]
pub(crate) const AS_ON_LINUX: bool = cfg!(all(
    target_os = "linux",
    not(mio_unsupported_force_poll_poll)
));

/// Whether a Unix listener whose backlog is full refuses, as if nothing listened (macOS, BSD).
/// Linux says `EAGAIN`.
#[cfg(unix)]
pub(crate) const FULL_BACKLOG_REFUSES: bool = !AS_ON_LINUX;

/// Makes an OS string of bytes; returns the bytes where this system has none for them.
///
/// Unix names are any bytes. Elsewhere they are Unicode, so that only UTF-8 has a meaning there.
pub(crate) fn os_string_from_bytes(bytes: Vec<u8>) -> Result<OsString, Vec<u8>> {
    #[cfg(unix)]
    {
        Ok(std::os::unix::ffi::OsStringExt::from_vec(bytes))
    }
    #[cfg(not(unix))]
    {
        String::from_utf8(bytes)
            .map(OsString::from)
            .map_err(|error| error.into_bytes())
    }
}

/// Returns whether the file at `path` exists and is no socket. Linux refuses to connect to one as
/// if nothing listened.
pub(crate) fn is_no_socket(path: &std::path::Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        std::fs::metadata(path).is_ok_and(|metadata| !metadata.file_type().is_socket())
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        false
    }
}

/// Returns whether a process of this id lives, as far as this user can know.
pub(crate) fn process_is_alive(pid: i32) -> bool {
    #[cfg(unix)]
    {
        use nix::errno::Errno;
        use nix::sys::signal::kill;
        use nix::unistd::Pid;
        // Zero and negative ids mean process groups to kill(2). EPERM: it lives, as another user
        // (minikube runs hyperkit as root).
        pid > 0 && matches!(kill(Pid::from_raw(pid), None), Ok(()) | Err(Errno::EPERM))
    }
    #[cfg(not(unix))]
    {
        // hyperkit runs on macOS only: a pid file seen elsewhere was copied from there.
        let _ = pid;
        false
    }
}

/// Returns whether a process is stopped, by a signal or a debugger. Only Linux tells.
pub(crate) fn process_is_stopped(process: i32) -> bool {
    #[cfg(target_os = "linux")]
    {
        // `proc_pid_stat(5)`: the number, the name in parentheses, which may have any byte in it,
        // and the state.
        let stat = std::fs::read(format!("/proc/{process}/stat")).unwrap_or_default();
        let name_end = stat.iter().rposition(|byte| *byte == b')');
        let state = name_end.and_then(|at| stat.get(at + 2));
        matches!(state, Some(b'T' | b't'))
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = process;
        false
    }
}

/// Returns the id of a user. The name may be looked up over the network.
///
/// # Errors
/// That it can't be looked up; `Unsupported` where users have no numbers.
#[cfg(feature = "cli")]
pub(crate) fn user_by_name(name: &str) -> io::Result<Option<u32>> {
    #[cfg(unix)]
    return Ok(nix::unistd::User::from_name(name)?.map(|user| user.uid.as_raw()));
    #[cfg(not(unix))]
    no_numbers(name)
}

/// Returns the id of a group, as [`user_by_name`] does that of a user.
///
/// # Errors
/// As there.
#[cfg(feature = "cli")]
pub(crate) fn group_by_name(name: &str) -> io::Result<Option<u32>> {
    #[cfg(unix)]
    return Ok(nix::unistd::Group::from_name(name)?.map(|group| group.gid.as_raw()));
    #[cfg(not(unix))]
    no_numbers(name)
}

#[cfg(all(not(unix), feature = "cli"))]
fn no_numbers(_: &str) -> io::Result<Option<u32>> {
    let why = "users and groups of files are Unix'";
    Err(io::Error::new(io::ErrorKind::Unsupported, why))
}

/// Returns whether a socket call failed because both directions have ended: macOS says `EINVAL`
/// then when an option is set or the peer's name is asked for.
pub(crate) fn is_ended_error(error: &io::Error) -> bool {
    #[cfg(unix)]
    return error.raw_os_error() == Some(nix::libc::EINVAL);
    #[cfg(windows)]
    {
        let _ = error;
        false
    }
}

/// Returns the result of setting an option, unless it failed because both directions have ended: it
/// isn't needed then. Nothing waits any more, and what has come can be read.
pub(crate) fn unless_ended(set: io::Result<()>) -> io::Result<()> {
    match set {
        Err(e) if is_ended_error(&e) => Ok(()),
        set => set,
    }
}
