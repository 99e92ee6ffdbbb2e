//! Linux, macOS and the BSDs.

mod access;
mod child;
mod identity;
mod place;
mod process;
mod rights;
mod socket_path;
#[cfg(feature = "cli")]
mod standard;
mod unconnected;

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::Wanted;
pub(crate) use access::is_program;
#[cfg(feature = "cli")]
pub(crate) use access::{may_be_socket, may_read, may_start};
#[cfg(feature = "cli")]
pub(crate) use child::set_blocking;
pub(crate) use child::{
    Leads, detach_command, end_of_input, hang_up_group, has_group, is_closed_by_peer, kill_group,
    make_terminal, set_nonblocking,
};
pub(crate) use identity::Identity;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit};
pub(crate) use place::Place;
pub(crate) use process::{Process, Processes};
pub(crate) use rights::{MOST_SENT, receive, refuse_descriptors, refuses_descriptors, send};
#[cfg(feature = "cli")]
pub(crate) use socket_path::SUN_PATH_LEN;
pub(crate) use socket_path::{
    abstract_address, check_socket_name, is_socket_alive, set_bound_mode, unix_name,
    with_short_path,
};
#[cfg(feature = "cli")]
pub(crate) use standard::{standard_input, standard_output, write_error, write_output};
pub(crate) use unconnected::Unconnected;

pub(crate) use std::os::fd::{BorrowedFd as BorrowedSocket, OwnedFd as OwnedSocket};

/// Borrows the socket, as the trait of that name in Windows' std does.
pub(crate) trait AsSocket {
    fn as_socket(&self) -> BorrowedSocket<'_>;
}

impl<T: AsFd> AsSocket for T {
    fn as_socket(&self) -> BorrowedSocket<'_> {
        self.as_fd()
    }
}

/// Returns whether a socket call failed because there is no such CID.
pub(crate) fn is_no_such_cid(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::ENODEV)
}

/// Returns the error of a socket call that fails because there is no such CID.
pub(crate) fn no_such_cid() -> io::Error {
    io::Error::from_raw_os_error(nix::libc::ENODEV)
}

/// Returns whether a socket call failed because the kernel has no such address family.
pub(crate) fn is_no_such_family(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::EAFNOSUPPORT)
}

/// Returns whether a call failed because the process, or the system, has no descriptor left.
pub(crate) fn is_out_of_descriptors(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(nix::libc::EMFILE | nix::libc::ENFILE)
    )
}

/// Returns whether a connect to a Unix socket failed because that is one of datagrams, or of
/// packets.
pub(crate) fn is_no_stream(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::EPROTOTYPE)
}

/// Waits until the socket is ready, or has failed. Returns false if `timeout` has passed, or a
/// signal came.
pub(crate) fn wait(socket: BorrowedFd<'_>, wanted: Wanted, timeout: Duration) -> io::Result<bool> {
    wait_for_any_of(&[socket], wanted, timeout)
}

/// Waits until one of the sockets is ready, or has failed; false if `timeout` has passed.
pub(crate) fn wait_for_any_of(
    sockets: &[BorrowedFd<'_>],
    wanted: Wanted,
    timeout: Duration,
) -> io::Result<bool> {
    let flags = match wanted {
        Wanted::Readable => PollFlags::POLLIN,
        Wanted::Writable => PollFlags::POLLOUT,
        #[cfg(feature = "cli")]
        Wanted::Either => PollFlags::POLLIN | PollFlags::POLLOUT,
    };
    // Rounded up: a wait of half a millisecond must not become a busy loop.
    let timeout = timeout.saturating_add(Duration::from_micros(999));
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    let asked = sockets.iter().map(|socket| PollFd::new(*socket, flags));
    match poll(&mut asked.collect::<Vec<_>>(), timeout) {
        Ok(ready) => Ok(ready > 0),
        Err(nix::errno::Errno::EINTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Returns whether the peer has closed both directions, as far as the kernel knows: with TCP it
/// doesn't until something was sent.
pub(crate) fn is_hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut asked = [PollFd::new(socket, PollFlags::empty())];
    let answered = poll(&mut asked, PollTimeout::ZERO).is_ok();
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
    answered && asked[0].revents().is_some_and(|now| now.intersects(gone))
}

/// Waits until nothing that is written to standard output can be read any more: its reader has
/// closed it, or its terminal has gone. Returns false if the system can't say so of such a file.
#[cfg(feature = "cli")]
pub(crate) fn wait_until_output_is_unread() -> bool {
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
    let output = io::stdout();
    let mut asked = [PollFd::new(output.as_fd(), PollFlags::empty())];
    loop {
        match poll(&mut asked, PollTimeout::NONE) {
            Ok(_) => return asked[0].revents().is_some_and(|now| now.intersects(gone)),
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}

/// Returns whether an accept would find a client now, or an error.
pub(crate) fn has_client(listener: BorrowedFd<'_>) -> io::Result<bool> {
    loop {
        match poll(
            &mut [PollFd::new(listener, PollFlags::POLLIN)],
            PollTimeout::ZERO,
        ) {
            Ok(ready) => return Ok(ready > 0),
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Returns whether a listening socket was shut down, so that no client can connect to it any more.
///
/// A Unix listener that is non-blocking doesn't say so when it accepts: Linux goes on to say
/// `EAGAIN`.
#[allow(unsafe_code)]
pub(crate) fn is_shut_down(listener: BorrowedFd<'_>) -> bool {
    use nix::libc;
    use std::os::fd::AsRawFd;
    // (nix has no POLLRDHUP, without which Linux reports a shutdown of both directions only.)
    #[cfg(target_os = "linux")]
    const READ_HUNG_UP: libc::c_short = libc::POLLRDHUP;
    #[cfg(not(target_os = "linux"))]
    const READ_HUNG_UP: libc::c_short = 0;
    let mut asked = libc::pollfd {
        fd: listener.as_raw_fd(),
        events: READ_HUNG_UP,
        revents: 0,
    };
    // SAFETY: one `pollfd` is passed, which is valid for reads and writes; a timeout of 0 doesn't
    // wait.
    let answered = unsafe { libc::poll(&raw mut asked, 1, 0) };
    answered > 0 && asked.revents & (libc::POLLHUP | READ_HUNG_UP) != 0
}

/// Returns how many descriptors the process may have at a time (`RLIMIT_NOFILE`); `None` if that
/// can't be asked.
pub(crate) fn descriptor_limit() -> Option<u64> {
    getrlimit(Resource::RLIMIT_NOFILE)
        .ok()
        .map(|(soft, _)| soft)
}

/// Raises the limit of descriptors as far as the process may.
pub(crate) fn raise_descriptor_limit() -> io::Result<()> {
    use nix::sys::resource::setrlimit;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    // macOS says "unlimited" and then takes no more than OPEN_MAX (`sys/syslimits.h`: 10240).
    let wanted = if cfg!(target_os = "macos") {
        hard.min(10_240)
    } else {
        hard
    };
    if wanted > soft {
        setrlimit(Resource::RLIMIT_NOFILE, wanted, hard)?;
    }
    Ok(())
}

/// Registers a socket with tokio's reactor, for as long as it is borrowed.
#[cfg(any(feature = "tokio", feature = "cli"))]
#[allow(unsafe_code)]
pub(crate) fn watch_borrowed(
    socket: BorrowedFd<'_>,
) -> io::Result<tokio::io::unix::AsyncFd<BorrowedFd<'_>>> {
    // SAFETY: a borrowed descriptor is open, and the same, until the borrow ends.
    let watched = unsafe { tokio::io::unix::AsyncFd::register(socket) };
    watched.map_err(io::Error::from)
}

/// Registers a socket with tokio's reactor.
#[cfg(feature = "tokio")]
#[allow(unsafe_code)]
pub(crate) fn watch_socket(
    socket: socket2::Socket,
) -> io::Result<tokio::io::unix::AsyncFd<socket2::Socket>> {
    // SAFETY: it owns its descriptor, which stays the same until it is dropped.
    let watched = unsafe { tokio::io::unix::AsyncFd::register(socket) };
    watched.map_err(io::Error::from)
}

/// Waits until one of these is ready.
#[cfg(any(feature = "tokio", feature = "cli"))]
pub(crate) async fn any_ready<T: std::os::fd::AsRawFd>(
    watched: &[tokio::io::unix::AsyncFd<T>],
    interest: tokio::io::Interest,
) -> io::Result<tokio::io::unix::AsyncFdReadyGuard<'_, T>> {
    if let [one] = watched {
        return one.ready(interest).await;
    }
    let waits = watched.iter().map(|it| Box::pin(it.ready(interest)));
    let mut waits: Vec<_> = waits.collect();
    std::future::poll_fn(|context| {
        let mut polled = waits.iter_mut().map(|it| it.as_mut().poll(context));
        polled
            .find(std::task::Poll::is_ready)
            .unwrap_or(std::task::Poll::Pending)
    })
    .await
}

/// Returns the effective user of this process.
#[cfg(feature = "cli")]
pub(crate) fn user_id() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// The peer that connected a Unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Connector {
    pub(crate) user: u32,
    /// `None` where the system doesn't tell.
    pub(crate) process: Option<u32>,
}

/// Returns the peer of a connected Unix socket, as the kernel noted it at the connect.
pub(crate) fn connector(socket: BorrowedFd<'_>) -> io::Result<Connector> {
    #[cfg(target_os = "linux")]
    {
        use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
        let peer = getsockopt(&socket, PeerCredentials)?;
        Ok(Connector {
            user: peer.uid(),
            process: u32::try_from(peer.pid()).ok(),
        })
    }
    #[cfg(not(target_os = "linux"))]
    {
        let (user, _) = nix::unistd::getpeereid(socket)?;
        #[cfg(target_vendor = "apple")]
        let process = {
            use nix::sys::socket::{getsockopt, sockopt::LocalPeerPid};
            // macOS doesn't tell it of a peer that has closed.
            getsockopt(&socket, LocalPeerPid)
                .ok()
                .and_then(|process| u32::try_from(process).ok())
        };
        #[cfg(not(target_vendor = "apple"))]
        let process = None;
        Ok(Connector {
            user: user.as_raw(),
            process,
        })
    }
}

/// Returns the name of the program that a process runs, if there is such a process.
pub(crate) fn program_name(process: u32) -> Option<String> {
    #[cfg(target_os = "linux")]
    {
        // `proc_pid_comm(5)`; it need not be UTF-8.
        let name = std::fs::read(format!("/proc/{process}/comm")).ok()?;
        Some(String::from_utf8_lossy(name.trim_ascii_end()).into_owned())
    }
    #[cfg(target_vendor = "apple")]
    {
        process::program_name(process)
    }
    #[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
    {
        let _ = process;
        None
    }
}

/// Returns how many bytes have come for a socket that were not read yet, as far as the system
/// tells.
#[allow(unsafe_code)]
pub(crate) fn unread(socket: &impl std::os::fd::AsRawFd) -> Option<u64> {
    let mut bytes: nix::libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, to which the pointer is valid, and nothing else.
    let result =
        unsafe { nix::libc::ioctl(socket.as_raw_fd(), nix::libc::FIONREAD, &raw mut bytes) };
    u64::try_from(bytes).ok().filter(|_| result == 0)
}

/// Returns whether `signal` was ignored when the process started, as `nohup` does with SIGHUP.
#[cfg(any(feature = "cli", target_os = "linux"))]
#[allow(unsafe_code)]
pub(crate) fn is_ignored(signal: i32) -> bool {
    let mut old = std::mem::MaybeUninit::<nix::libc::sigaction>::zeroed();
    // SAFETY: with a null `act` the call only writes the present action to `old`, which is zeroed,
    // valid for writes and of the right type.
    unsafe {
        nix::libc::sigaction(signal, std::ptr::null(), old.as_mut_ptr()) == 0
            && old.assume_init().sa_sigaction == nix::libc::SIG_IGN
    }
}

/// Makes this process one that no terminal, session or signal of its parent ends: it gets a session
/// of its own and `/` as its directory, ignores SIGHUP, SIGINT, SIGQUIT, SIGTERM and SIGPIPE, and
/// closes all descriptors but the standard ones, so that nobody waits for them to be closed. It is
/// called before anything else is opened.
#[allow(unsafe_code)]
pub(crate) fn detach() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // It fails for the leader of a process group only, which keeps its terminal.
    let _ = nix::unistd::setsid();
    let _ = std::env::set_current_dir("/");
    for number in [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGTERM,
        Signal::SIGPIPE,
    ] {
        // SAFETY: no handler is installed that could run, and no old one is used.
        let _ = unsafe { signal(number, SigHandler::SigIgn) };
    }
    let open = fs::read_dir("/dev/fd").map(|entries| {
        let number =
            |entry: io::Result<fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
        entries.filter_map(number).collect::<Vec<i32>>()
    });
    for descriptor in open.unwrap_or_default() {
        if descriptor > 2 {
            // SAFETY: they were open before the program began and have no owner here. (The one by
            // which they were listed is closed already.)
            unsafe { nix::libc::close(descriptor) };
        }
    }
}

/// Takes over a descriptor that the process was started with.
///
/// Only a descriptor that came through exec(2) has no close-on-exec: std, mio and all that is
/// opened here set it. This sets it as well, so that no descriptor is taken over twice.
///
/// # Errors
/// `NotFound` if there is none of that number, or one that this process has opened itself.
#[cfg(feature = "cli")]
#[allow(unsafe_code)]
pub(crate) fn take_over(number: std::os::fd::RawFd) -> io::Result<std::os::fd::OwnedFd> {
    use nix::libc::{F_GETFD, F_SETFD, FD_CLOEXEC, fcntl};
    use std::os::fd::FromRawFd;
    // SAFETY: F_GETFD takes no pointer, and says so if there is no such descriptor.
    let flags = unsafe { fcntl(number, F_GETFD) };
    if flags < 0 || flags & FD_CLOEXEC != 0 {
        let why = format!("there is no descriptor {number} to take over");
        return Err(io::Error::new(io::ErrorKind::NotFound, why));
    }
    // SAFETY: F_SETFD takes no pointer.
    if unsafe { fcntl(number, F_SETFD, flags | FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open and has no owner: it was open before the program began, and this is the
    // first call to take it.
    Ok(unsafe { std::os::fd::OwnedFd::from_raw_fd(number) })
}

/// Returns how many bytes were written to a TCP socket that its peer hasn't acknowledged; 0 where
/// the system doesn't tell.
#[allow(unsafe_code)]
pub(crate) fn unacknowledged(socket: &impl std::os::fd::AsRawFd) -> usize {
    let mut bytes: nix::libc::c_int = 0;
    // SAFETY: TIOCOUTQ (SIOCOUTQ, `tcp(7)`) writes one int, to which the pointer is valid, and
    // nothing else.
    #[cfg(target_os = "linux")]
    let result =
        unsafe { nix::libc::ioctl(socket.as_raw_fd(), nix::libc::TIOCOUTQ, &raw mut bytes) };
    #[cfg(target_vendor = "apple")]
    let result = {
        let mut len = size_of::<nix::libc::c_int>() as nix::libc::socklen_t;
        // SAFETY: SO_NWRITE (`sys/socket.h`) writes one int of the given length; both pointers are
        // valid.
        unsafe {
            nix::libc::getsockopt(
                socket.as_raw_fd(),
                nix::libc::SOL_SOCKET,
                nix::libc::SO_NWRITE,
                (&raw mut bytes).cast(),
                &raw mut len,
            )
        }
    };
    #[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
    let result = {
        let _ = (socket, &mut bytes);
        -1
    };
    if result == 0 {
        usize::try_from(bytes).unwrap_or(0)
    } else {
        0
    }
}

/// How many unread bytes fit into a Unix socket made here: as many as a relay writes at once.
const ROOM: usize = 128 * 1024;

/// Gives a Unix socket larger buffers where the system's own are small. Returns whether they were.
/// macOS has 8 KiB (`net.local.stream.sendspace`), of which the writer's count, and accepted
/// sockets inherit the listener's; Linux has 208 KiB (`net.core.wmem_default`).
pub(crate) fn make_room(socket: &socket2::SockRef<'_>) -> bool {
    let is_small = |size: io::Result<usize>| size.is_ok_and(|size| size < ROOM);
    let small = is_small(socket.send_buffer_size());
    // It fails where that is more than the limit, or the peer has gone: the socket keeps its
    // buffer.
    if small {
        let _ = socket.set_send_buffer_size(ROOM);
    }
    if is_small(socket.recv_buffer_size()) {
        let _ = socket.set_recv_buffer_size(ROOM);
    }
    small
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_small_buffer_is_made_larger_and_a_large_one_is_left() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let socket = socket2::SockRef::from(&one);
        socket.set_send_buffer_size(8192).unwrap();
        socket.set_recv_buffer_size(1 << 20).unwrap();
        let large = socket.recv_buffer_size().unwrap();
        assert!(make_room(&socket));
        assert!(socket.send_buffer_size().unwrap() >= ROOM);
        assert!(!make_room(&socket));
        assert_eq!(socket.recv_buffer_size().unwrap(), large);
    }
}
