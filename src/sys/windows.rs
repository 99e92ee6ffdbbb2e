//! Windows.

#[cfg(feature = "cli")]
use std::fs;
use std::io;
use std::os::windows::io::AsRawSocket;
use std::path::Path;
use std::time::Duration;

use windows_sys::Win32::Networking::WinSock;

use super::Wanted;

pub(crate) use std::os::windows::io::{AsSocket, BorrowedSocket, OwnedSocket};

/// Which file a path names. It is asked of the files of hyperkit's VMs only, and those are not on this system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity;

impl Identity {
    pub(crate) fn of(_: &Path) -> io::Result<Identity> {
        Err(io::ErrorKind::NotFound.into())
    }
}

/// Asks about one socket.
#[allow(unsafe_code)]
fn poll(socket: BorrowedSocket<'_>, events: i16, timeout: i32) -> io::Result<i16> {
    let mut asked = WinSock::WSAPOLLFD {
        fd: usize::try_from(socket.as_raw_socket()).map_err(io::Error::other)?,
        events,
        revents: 0,
    };
    // SAFETY: the pointer is valid for the one structure that the count says, and the socket is open as long as it is
    // borrowed.
    match unsafe { WinSock::WSAPoll(&raw mut asked, 1, timeout) } {
        WinSock::SOCKET_ERROR => Err(io::Error::last_os_error()),
        _ => Ok(asked.revents),
    }
}

/// Waits until the socket is ready, or has failed; false if `timeout` has passed.
pub(crate) fn wait(
    socket: BorrowedSocket<'_>,
    wanted: Wanted,
    timeout: Duration,
) -> io::Result<bool> {
    let events = match wanted {
        Wanted::Readable => WinSock::POLLRDNORM,
        Wanted::Writable => WinSock::POLLWRNORM,
        #[cfg(feature = "cli")]
        Wanted::Either => WinSock::POLLRDNORM | WinSock::POLLWRNORM,
    };
    // Rounded up: a wait of half a millisecond must not become a busy loop.
    let timeout = timeout.saturating_add(Duration::from_micros(999));
    let timeout = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    poll(socket, events, timeout).map(|ready| ready != 0)
}

/// Whether the peer has closed, so that nothing can be sent to it either, as far as the system knows.
#[cfg(feature = "cli")]
pub(crate) fn is_hung_up(socket: BorrowedSocket<'_>) -> bool {
    let gone = WinSock::POLLERR | WinSock::POLLNVAL;
    poll(socket, WinSock::POLLWRNORM, 0).is_ok_and(|now| now & gone != 0)
}

/// Standard input or output, past std's buffer.
#[cfg(feature = "cli")]
pub(crate) fn standard_input() -> io::Result<fs::File> {
    use std::os::windows::io::AsHandle;
    let handle = io::stdin().as_handle().try_clone_to_owned()?;
    Ok(handle.into())
}

/// As [`standard_input`].
#[cfg(feature = "cli")]
pub(crate) fn standard_output() -> io::Result<fs::File> {
    use std::os::windows::io::AsHandle;
    let handle = io::stdout().as_handle().try_clone_to_owned()?;
    Ok(handle.into())
}

/// Whether a socket call says that there is no such CID. There are none here.
pub(crate) fn is_no_such_cid(_: &io::Error) -> bool {
    false
}

/// Whether a socket call says that there is no such address family.
pub(crate) fn is_no_such_family(error: &io::Error) -> bool {
    error.raw_os_error() == Some(WinSock::WSAEAFNOSUPPORT)
}

/// Windows limits sockets by memory alone.
pub(crate) fn descriptor_limit() -> Option<u64> {
    None
}

/// There is no limit to raise.
#[cfg(feature = "cli")]
pub(crate) fn raise_descriptor_limit() -> io::Result<()> {
    Ok(())
}

/// Windows doesn't tell what a peer has not acknowledged yet.
pub(crate) fn unacknowledged(_: &impl AsSocket) -> usize {
    0
}

/// AF_VSOCK is Linux'.
pub(crate) fn local_cid() -> io::Result<u32> {
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        "AF_VSOCK is carried on Linux only",
    ))
}
