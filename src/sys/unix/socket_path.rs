//! The paths and names of Unix sockets: long ones, abstract ones, and whether a process has one.

use std::fs;
use std::io;
use std::path::Path;

/// How many bytes of path fit into `sockaddr_un.sun_path` with the NUL behind them: 108 on Linux
/// (`unix(7)`), 104 on macOS and the BSDs (`sys/un.h`).
pub(crate) const SUN_PATH_LEN: usize = if crate::sys::AS_ON_LINUX { 108 } else { 104 };

/// The longest name of a socket that [`with_short_path`] can reach in any directory: `sun_path`
/// less its NUL and less the longest prefix that it puts before the name.
const LONGEST_NAME: usize = SUN_PATH_LEN - 1 - 32;

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
            "its name has {length} bytes, and {LONGEST_NAME} is the limit where the whole path has more than {}, as this one has with {}",
            SUN_PATH_LEN - 1,
            path.as_os_str().len()
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
    use std::time::{Duration, Instant};

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
        // A child that another test forks has a copy for a moment.
        let end = Instant::now() + Duration::from_secs(20);
        while is_socket_alive(&path).unwrap() {
            assert!(Instant::now() < end, "it is listened on still");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_name_that_fits_nowhere_is_told_so() {
        let path = Path::new("/tmp").join("n".repeat(150));
        let error = with_short_path(&path, |_| Ok(())).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidFilename);
        assert!(error.to_string().contains("150 bytes"), "{error}");
    }
}
