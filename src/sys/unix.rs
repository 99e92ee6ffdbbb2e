//! Linux, macOS and the BSDs.

mod child;
mod place;
mod process;
mod rights;
mod unconnected;

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::Wanted;
#[cfg(feature = "cli")]
pub(crate) use child::set_blocking;
pub(crate) use child::{
    Leads, detach_command, end_of_input, hang_up_group, has_group, is_closed_by_peer, kill_group,
    make_terminal, set_nonblocking,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit};
pub(crate) use place::Place;
pub(crate) use process::Process;
pub(crate) use rights::{MOST_SENT, receive, refuse_descriptors, refuses_descriptors, send};
pub(crate) use unconnected::Unconnected;

/// How many bytes of path fit into `sockaddr_un.sun_path` with the NUL behind them: 108 on Linux
/// (`unix(7)`), 104 on macOS and the BSDs (`sys/un.h`).
pub(crate) const SUN_PATH_LEN: usize = if super::AS_ON_LINUX { 108 } else { 104 };

/// The longest name of a socket that [`with_short_path`] can reach in any directory: `sun_path`
/// less its NUL and less the longest prefix that it puts before the name.
const LONGEST_NAME: usize = SUN_PATH_LEN - 1 - 32;

/// The identity of a file: its device, inode and time of birth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Identity {
    device: u64,
    inode: u64,
    /// Some file systems give a new file the inode of the one just removed. `None` where it isn't
    /// kept.
    born: Option<SystemTime>,
}

impl Identity {
    /// Returns the identity of the file at `path`, not following a symbolic link.
    pub(crate) fn of(path: &Path) -> io::Result<Identity> {
        Ok(Identity::from(&fs::symlink_metadata(path)?))
    }
}

impl Identity {
    /// Returns the inode.
    pub(crate) fn inode(&self) -> u64 {
        self.inode
    }

    /// Returns it as text for another process: `DEVICE:INODE`, and `:SECONDS:NANOSECONDS` of the
    /// time of birth since 1970.
    pub(crate) fn to_text(self) -> String {
        let Identity {
            device,
            inode,
            born,
        } = self;
        match born.and_then(|it| it.duration_since(SystemTime::UNIX_EPOCH).ok()) {
            Some(born) => {
                let (seconds, part) = (born.as_secs(), born.subsec_nanos());
                format!("{device}:{inode}:{seconds}:{part}")
            }
            None => format!("{device}:{inode}"),
        }
    }

    /// Returns what [`to_text`](Identity::to_text) has written; `None` if it has not.
    pub(crate) fn from_text(text: &str) -> Option<Identity> {
        let mut parts = text.split(':').map(|part| part.parse::<u64>().ok());
        let (device, inode) = (parts.next()??, parts.next()??);
        let born = match (parts.next(), parts.next()) {
            (None, None) => None,
            (Some(seconds), Some(part)) => {
                let part = u32::try_from(part?).ok().filter(|it| *it < 1_000_000_000)?;
                Some(SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds?, part))?)
            }
            _ => return None,
        };
        Some(Identity {
            device,
            inode,
            born,
        })
    }
}

#[cfg(all(test, target_os = "linux"))]
impl Identity {
    /// Returns the identity of a file of that number, of a file system that there isn't.
    pub(crate) fn numbered(inode: u64) -> Identity {
        Identity {
            device: 0,
            inode,
            born: None,
        }
    }
}

impl From<&fs::Metadata> for Identity {
    fn from(metadata: &fs::Metadata) -> Identity {
        Identity {
            device: metadata.dev(),
            inode: metadata.ino(),
            born: metadata.created().ok(),
        }
    }
}

/// The same identity as std's metadata give.
#[cfg(not(target_os = "linux"))]
impl From<&nix::sys::stat::FileStat> for Identity {
    #[allow(clippy::unnecessary_cast)]
    fn from(stat: &nix::sys::stat::FileStat) -> Identity {
        #[cfg(any(target_vendor = "apple", target_os = "freebsd"))]
        let born = {
            let seconds = u64::try_from(stat.st_birthtime).ok();
            let part = u32::try_from(stat.st_birthtime_nsec).ok();
            seconds.zip(part).map(|(seconds, part)| {
                SystemTime::UNIX_EPOCH + Duration::new(seconds, part.min(999_999_999))
            })
        };
        #[cfg(not(any(target_vendor = "apple", target_os = "freebsd")))]
        let born = None;
        Identity {
            device: stat.st_dev as u64,
            inode: stat.st_ino as u64,
            born,
        }
    }
}

/// Calls `f` with a path to the same file that fits into a `sockaddr_un`.
///
/// A path that fits is passed as it is. The directory of a longer one is reached by a detour: on
/// Linux through an open descriptor of it (`/proc/self/fd/N`), elsewhere, or without `/proc`,
/// through a symbolic link in a private directory that is removed again before this returns.
///
/// # Errors
/// `InvalidFilename` if the last component alone is too long; what opening the directory says; what
/// `f` says.
pub(crate) fn with_short_path<T>(
    path: &Path,
    f: impl FnOnce(&Path) -> io::Result<T>,
) -> io::Result<T> {
    if path.as_os_str().len() < SUN_PATH_LEN {
        return f(path);
    }
    check_socket_name(path)?;
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return f(path);
    };
    #[cfg(target_os = "linux")]
    if Path::new("/proc/self/fd").exists() {
        use std::os::fd::AsRawFd;
        use std::os::unix::fs::OpenOptionsExt;
        let directory = fs::OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_PATH | nix::libc::O_DIRECTORY)
            .open(directory)?;
        return f(&Path::new(&format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name));
    }
    through_link(directory, Path::new(name), f)
}

/// Checks that [`with_short_path`] can reach the socket, wherever its directory is. No file is
/// looked at.
///
/// # Errors
/// `InvalidFilename` if the last component of a long path is too long.
pub(crate) fn check_socket_name(path: &Path) -> io::Result<()> {
    let length = path.file_name().map_or(0, |name| name.len());
    if path.as_os_str().len() < SUN_PATH_LEN || length <= LONGEST_NAME {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidFilename,
        format!(
            "the name has {length} bytes, and a socket's name can have {LONGEST_NAME} in a directory with a long path"
        ),
    ))
}

fn through_link<T>(
    directory: &Path,
    name: &Path,
    f: impl FnOnce(&Path) -> io::Result<T>,
) -> io::Result<T> {
    let target = fs::canonicalize(directory)?;
    // Not $TMPDIR: on macOS that is long itself.
    let private = tempfile::Builder::new()
        .prefix("hvsock")
        .tempdir_in("/tmp")?;
    let link = private.path().join("d");
    std::os::unix::fs::symlink(target, &link)?;
    f(&link.join(name))
}

/// Sets the permissions of the file that a bind of this socket will make, less the umask: Linux
/// takes them from the socket. Other systems have no way to set them before.
pub(crate) fn set_bound_mode(socket: &socket2::Socket, mode: u32) {
    #[cfg(target_os = "linux")]
    {
        let mode = nix::sys::stat::Mode::from_bits_truncate(mode);
        // It is checked again once the file exists.
        let _ = nix::sys::stat::fchmod(socket, mode);
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (socket, mode);
    }
}

/// Returns whether a process has bound the stream socket at `path` and still has it. The process
/// doesn't notice.
///
/// A datagram socket can't be connected to a stream socket: the kernel says so (`EPROTOTYPE`) if
/// there is one, whatever its backlog holds, and refuses if only the file is left. A stream connect
/// would be refused by a full backlog, too (macOS), or by a socket that doesn't listen yet.
///
/// # Errors
/// What else the kernel says, such as that there is no file or that it may not be used.
pub(crate) fn is_socket_alive(path: &Path) -> io::Result<bool> {
    let asked = with_short_path(path, |short| {
        let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None)?;
        socket.connect(&socket2::SockAddr::unix(short)?)
    });
    match asked {
        // Connected: it is a datagram socket that a process has.
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(false),
        Err(e) if e.raw_os_error() == Some(nix::libc::EPROTOTYPE) => Ok(true),
        Err(e) => Err(e),
    }
}

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

/// Standard input or output, without std's buffer. It waits though it may have been made
/// non-blocking by another process.
#[cfg(feature = "cli")]
#[derive(Debug)]
pub(crate) struct Standard(fs::File);

#[cfg(feature = "cli")]
pub(crate) fn standard_input() -> io::Result<Standard> {
    let fd = io::stdin().as_fd().try_clone_to_owned()?;
    Ok(Standard(fd.into()))
}

#[cfg(feature = "cli")]
pub(crate) fn standard_output() -> io::Result<Standard> {
    let fd = io::stdout().as_fd().try_clone_to_owned()?;
    Ok(Standard(fd.into()))
}

#[cfg(feature = "cli")]
impl Standard {
    fn waiting<T>(
        &mut self,
        wanted: Wanted,
        mut call: impl FnMut(&mut fs::File) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            match call(&mut self.0) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    wait(self.0.as_fd(), wanted, Duration::from_secs(3600))?;
                }
                done => return done,
            }
        }
    }
}

#[cfg(feature = "cli")]
impl io::Read for Standard {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.waiting(Wanted::Readable, |file| file.read(buffer))
    }
}

#[cfg(feature = "cli")]
impl io::Write for Standard {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.waiting(Wanted::Writable, |file| file.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes to standard output, past std's buffer and past its lock, on which other threads would
/// wait with this one. It waits for the reader, as [`Standard`] does.
#[cfg(feature = "cli")]
pub(crate) fn write_output(bytes: &[u8]) -> io::Result<usize> {
    write_waiting(io::stdout().as_fd(), bytes)
}

/// Writes to standard error as [`write_output`] does to standard output.
#[cfg(feature = "cli")]
pub(crate) fn write_error(bytes: &[u8]) -> io::Result<usize> {
    write_waiting(io::stderr().as_fd(), bytes)
}

#[cfg(feature = "cli")]
fn write_waiting(stream: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match nix::unistd::write(stream, bytes) {
            Err(nix::errno::Errno::EAGAIN) => {
                wait(stream, Wanted::Writable, Duration::from_secs(3600))?;
            }
            done => return Ok(done?),
        }
    }
}

/// Returns whether a socket call failed because there is no such CID.
pub(crate) fn is_no_such_cid(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::ENODEV)
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

/// Returns the name of a bound Unix socket: its path, or, behind a NUL, its abstract name.
pub(crate) fn unix_name(address: &std::os::unix::net::SocketAddr) -> Option<Vec<u8>> {
    use std::os::unix::ffi::OsStrExt;
    #[cfg(target_os = "linux")]
    {
        use std::os::linux::net::SocketAddrExt;
        if let Some(name) = address.as_abstract_name() {
            return Some([b"\0", name].concat());
        }
    }
    address
        .as_pathname()
        .map(|path| path.as_os_str().as_bytes().to_vec())
}

/// Returns the address of an abstract Unix socket.
///
/// # Errors
/// `Unsupported` where there are none: they are Linux'; `InvalidInput` if the name is too long.
pub(crate) fn abstract_address(name: &[u8]) -> io::Result<socket2::SockAddr> {
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::ffi::OsStrExt;
        let name = [b"\0", name].concat();
        socket2::SockAddr::unix(std::ffi::OsStr::from_bytes(&name))
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = name;
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "abstract names are Linux'",
        ))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn a_link_reaches_a_socket_in_a_long_directory_and_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let deep = root.path().join("d".repeat(120));
        fs::create_dir(&deep).unwrap();
        let mut used = PathBuf::new();
        let listener = through_link(&deep, Path::new("s"), |path| {
            used = path.to_path_buf();
            std::os::unix::net::UnixListener::bind(path)
        })
        .unwrap();
        assert!(deep.join("s").exists());
        assert!(!used.parent().unwrap().exists());
        let client = with_short_path(&deep.join("s"), |path| {
            std::os::unix::net::UnixStream::connect(path)
        });
        client.unwrap();
        listener.accept().unwrap();
    }

    #[test]
    fn a_live_socket_is_told_from_a_leftover_without_connecting() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("s");
        let error = is_socket_alive(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        assert!(is_socket_alive(&path).unwrap());
        assert_eq!(
            listener.accept().unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        drop(listener);
        assert!(!is_socket_alive(&path).unwrap());
    }

    #[test]
    fn an_identity_is_the_same_as_text() {
        let root = tempfile::tempdir().unwrap();
        let identity = Identity::of(root.path()).unwrap();
        let text = identity.to_text();
        assert_eq!(Identity::from_text(&text), Some(identity));
        let unborn = Identity {
            born: None,
            ..identity
        };
        assert_eq!(Identity::from_text(&unborn.to_text()), Some(unborn));
        for wrong in ["", "1", "1:x", "1:2:3", "1:2:3:4000000000000"] {
            assert_eq!(Identity::from_text(wrong), None, "{wrong}");
        }
    }

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

    #[test]
    fn a_name_that_fits_nowhere_is_told_so() {
        let path = Path::new("/tmp").join("n".repeat(150));
        let error = with_short_path(&path, |_| Ok(())).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidFilename);
        assert!(error.to_string().contains("150 bytes"), "{error}");
    }
}
