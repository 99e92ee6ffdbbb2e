//! Linux: AF_VSOCK, and splice.

mod splice;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::time::Duration;

use nix::libc;
use socket2::{Domain, SockAddr, Socket, Type};

pub(crate) use splice::Pipe;

// Socket options of the level AF_VSOCK; numbers, types and units from
// `include/uapi/linux/vm_sockets.h`.
/// Bytes that the peer may send ahead of our reads; `u64`. What exceeds [`BUFFER_MAX_SIZE`] is
/// cut off.
const BUFFER_SIZE: libc::c_int = 0;
/// The most that [`BUFFER_SIZE`] can be set to, 256 KiB unless set; `u64`.
const BUFFER_MAX_SIZE: libc::c_int = 2;
/// How long a connect may take, 2 s unless set; `struct timeval`.
#[cfg(target_pointer_width = "64")]
const CONNECT_TIMEOUT: libc::c_int = 6;
/// What the kernel takes for it on every machine.
#[cfg(target_pointer_width = "64")]
const MOST_PATIENCE: Duration = Duration::from_secs(24 * 60 * 60);

/// `_IO(7, 0xb9)`, of the same file.
const GET_LOCAL_CID: libc::Ioctl = 0x7b9;

/// Begins to connect a non-blocking AF_VSOCK socket. The caller bounds the wait by `patience`: the
/// kernel's own 2 s are too short for a VM that boots.
///
/// The kernel keeps the socket for as long as a connect may take, even if it is connected and
/// closed sooner (`vsock_connect` in `net/vmw_vsock/af_vsock.c`), so that this is no longer than it
/// must be.
pub(crate) fn vsock_connect(
    cid: u32,
    port: u32,
    buffer_size: Option<u64>,
    patience: Duration,
) -> io::Result<Socket> {
    let socket = vsock_socket(buffer_size)?;
    #[cfg(target_pointer_width = "64")]
    {
        // A second more, so that the caller's bound is reached first.
        let patience = patience.min(MOST_PATIENCE) + Duration::from_secs(1);
        let timeout = libc::timeval {
            tv_sec: patience.as_secs().cast_signed(),
            tv_usec: patience.subsec_micros().into(),
        };
        set_option(&socket, CONNECT_TIMEOUT, &timeout)?;
    }
    #[cfg(not(target_pointer_width = "64"))]
    let _ = patience;
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::vsock(cid, port)) {
        Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => Err(e),
        _ => Ok(socket),
    }
}

/// Resets a TCP connection at once, also if another process has a copy of its socket.
///
/// # Errors
///
/// That of connect(2): `EBUSY` of some kernels (6.4 to 6.6), if a thread waits for the socket.
#[allow(unsafe_code)]
pub(crate) fn reset_tcp(socket: &Socket) -> io::Result<()> {
    let unspecified = libc::sockaddr {
        sa_family: libc::AF_UNSPEC as libc::sa_family_t,
        sa_data: [0; 14],
    };
    let size = size_of_val(&unspecified) as libc::socklen_t;
    // SAFETY: the address lives for the call, and its size is its own.
    match unsafe { libc::connect(socket.as_raw_fd(), &unspecified, size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Binds a non-blocking AF_VSOCK socket and listens. What it accepts inherits its options.
pub(crate) fn vsock_listen(
    cid: u32,
    port: u32,
    backlog: i32,
    buffer_size: Option<u64>,
) -> io::Result<Socket> {
    let socket = vsock_socket(buffer_size)?;
    socket.bind(&SockAddr::vsock(cid, port))?;
    socket.listen(backlog)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn vsock_socket(buffer_size: Option<u64>) -> io::Result<Socket> {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    if let Some(size) = buffer_size {
        vsock_set_buffer(&socket, size)?;
    }
    Ok(socket)
}

/// Lets the peers of a socket, or of those that it accepts, send so many bytes ahead of our
/// reading.
pub(crate) fn vsock_set_buffer(socket: &Socket, size: u64) -> io::Result<()> {
    set_option(socket, BUFFER_MAX_SIZE, &size)?;
    set_option(socket, BUFFER_SIZE, &size)
}

#[allow(unsafe_code)]
fn set_option<T>(socket: &Socket, option: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the kernel reads the given number of bytes from the pointer, which are those of
    // `value`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns the CID and the port of an AF_VSOCK address.
pub(crate) fn vsock_of(address: &SockAddr) -> Option<(u32, u32)> {
    address.as_vsock_address()
}

/// Returns the CID that this system has for its host, or for its guests.
#[allow(unsafe_code)]
pub(crate) fn local_cid() -> io::Result<u32> {
    let device = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/vsock")?;
    if !device.metadata()?.file_type().is_char_device() {
        return Err(io::Error::other("/dev/vsock is no device"));
    }
    let mut cid: libc::c_uint = 0;
    // SAFETY: IOCTL_VM_SOCKETS_GET_LOCAL_CID writes one unsigned int, to which the pointer is
    // valid, and nothing else.
    match unsafe { libc::ioctl(device.as_raw_fd(), GET_LOCAL_CID, &raw mut cid) } {
        0 => Ok(cid),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns the time since the system was started, and how many units of it `proc_pid_stat(5)` has
/// in a second.
#[cfg(feature = "cli")]
#[allow(unsafe_code)]
fn uptime() -> Option<(Duration, u64)> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call writes to `time` alone, which may hold any values.
    let done = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    // SAFETY: the call touches no memory of ours.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    let seconds = u64::try_from(time.tv_sec).ok().filter(|_| done == 0)?;
    let nanos = u32::try_from(time.tv_nsec).ok()?;
    let ticks = u64::try_from(ticks).ok().filter(|ticks| *ticks > 0)?;
    Some((Duration::new(seconds, nanos), ticks))
}

/// Returns the time since a process was started.
#[cfg(feature = "cli")]
pub(crate) fn process_age(process: u32) -> Option<Duration> {
    /// Its field, counted from the one behind the name.
    const START: usize = 19;
    let stat = std::fs::read(format!("/proc/{process}/stat")).ok()?;
    // The name stands in parentheses, and may have any byte in it.
    let name_end = stat.iter().rposition(|byte| *byte == b')')?;
    let fields = std::str::from_utf8(&stat[name_end + 1..]).ok()?;
    let start: u64 = fields.split_whitespace().nth(START)?.parse().ok()?;
    let (uptime, ticks) = uptime()?;
    let nanos = start % ticks * 1_000_000_000 / ticks;
    let started = Duration::from_secs(start / ticks) + Duration::from_nanos(nanos);
    uptime.checked_sub(started)
}
