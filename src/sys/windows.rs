//! Windows: AF_HYPERV, named pipes, and what Unix has by another name.

mod acceptor;
mod overlapped;
mod pipe;

#[cfg(feature = "cli")]
use std::fs;
use std::io;
use std::os::windows::io::AsRawSocket;
use std::path::Path;
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};
use uuid::Uuid;
use windows_sys::Win32::Networking::WinSock;
use windows_sys::Win32::System::Hypervisor;
use windows_sys::Win32::System::IO::CancelIoEx;

use super::Wanted;

pub(crate) use acceptor::Acceptor;
pub(crate) use overlapped::*;
pub(crate) use pipe::*;

pub(crate) use std::os::windows::io::{AsSocket, BorrowedSocket, OwnedSocket};

/// Which file a path names. It is asked of the files of hyperkit's VMs only, and those are not on
/// this system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Identity;

impl Identity {
    pub(crate) fn of(_: &Path) -> io::Result<Identity> {
        Err(io::ErrorKind::NotFound.into())
    }
}

/// Returns whether anybody may start a file as a program. No target is one on this system.
#[cfg(feature = "cli")]
pub(crate) fn is_program(_: &fs::Metadata) -> bool {
    true
}

/// Returns whether a file may be a socket. The metadata of one says no more here than that it is no
/// directory.
#[cfg(feature = "cli")]
pub(crate) fn may_be_socket(_: &fs::Metadata) -> bool {
    true
}

/// Returns whether this user may start a program. No target is one on this system.
#[cfg(feature = "cli")]
pub(crate) fn may_start(_: &Path) -> bool {
    true
}

/// Returns whether this user may read a file. No target is one on this system.
#[cfg(feature = "cli")]
pub(crate) fn may_read(_: &Path) -> bool {
    true
}

/// Asks about sockets. Returns what is true of any of them.
#[allow(unsafe_code)]
fn poll(sockets: &[BorrowedSocket<'_>], events: i16, timeout: i32) -> io::Result<i16> {
    let ask = |socket: &BorrowedSocket<'_>| {
        let fd = usize::try_from(socket.as_raw_socket()).map_err(io::Error::other)?;
        let revents = 0;
        Ok(WinSock::WSAPOLLFD {
            fd,
            events,
            revents,
        })
    };
    let mut asked: Vec<_> = sockets.iter().map(ask).collect::<io::Result<_>>()?;
    let count = u32::try_from(asked.len()).map_err(io::Error::other)?;
    // SAFETY: the pointer is valid for as many structures as the count says, and the sockets are
    // open as long as they are borrowed.
    match unsafe { WinSock::WSAPoll(asked.as_mut_ptr(), count, timeout) } {
        WinSock::SOCKET_ERROR => Err(io::Error::last_os_error()),
        _ => Ok(asked.iter().fold(0, |all, it| all | it.revents)),
    }
}

/// Waits until the socket is ready, or has failed; false if `timeout` has passed.
#[cfg(feature = "cli")]
pub(crate) fn wait(
    socket: BorrowedSocket<'_>,
    wanted: Wanted,
    timeout: Duration,
) -> io::Result<bool> {
    wait_for_any_of(&[socket], wanted, timeout)
}

/// Waits until one of the sockets is ready, or has failed; false if `timeout` has passed.
pub(crate) fn wait_for_any_of(
    sockets: &[BorrowedSocket<'_>],
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
    poll(sockets, events, timeout).map(|ready| ready != 0)
}

/// Returns whether the peer has closed both directions, as far as the system knows.
#[cfg(feature = "cli")]
pub(crate) fn is_hung_up(socket: BorrowedSocket<'_>) -> bool {
    let gone = WinSock::POLLERR | WinSock::POLLNVAL;
    poll(&[socket], WinSock::POLLWRNORM, 0).is_ok_and(|now| now & gone != 0)
}

/// Returns standard input, without std's buffer.
#[cfg(feature = "cli")]
pub(crate) fn standard_input() -> io::Result<fs::File> {
    use std::os::windows::io::AsHandle;
    let handle = io::stdin().as_handle().try_clone_to_owned()?;
    Ok(handle.into())
}

/// Returns standard output, without std's buffer.
#[cfg(feature = "cli")]
pub(crate) fn standard_output() -> io::Result<fs::File> {
    use std::os::windows::io::AsHandle;
    let handle = io::stdout().as_handle().try_clone_to_owned()?;
    Ok(handle.into())
}

/// Returns false: the system can't say that the reader of standard output has gone.
#[cfg(feature = "cli")]
pub(crate) fn wait_until_output_is_unread() -> bool {
    false
}

/// Writes to standard output. By std, which knows what a console needs.
#[cfg(feature = "cli")]
pub(crate) fn write_output(bytes: &[u8]) -> io::Result<usize> {
    let mut output = io::stdout();
    let written = io::Write::write(&mut output, bytes)?;
    io::Write::flush(&mut output)?;
    Ok(written)
}

/// Writes to standard error as [`write_output`] does to standard output.
#[cfg(feature = "cli")]
pub(crate) fn write_error(bytes: &[u8]) -> io::Result<usize> {
    io::Write::write(&mut io::stderr(), bytes)
}

/// Returns whether a socket call failed because there is no such CID. Windows has none.
pub(crate) fn is_no_such_cid(_: &io::Error) -> bool {
    false
}

/// Returns the error of a CID that is gone.
pub(crate) fn no_such_cid() -> io::Error {
    io::ErrorKind::NotFound.into()
}

/// Returns whether a socket call failed because the system has no such address family.
pub(crate) fn is_no_such_family(error: &io::Error) -> bool {
    error.raw_os_error() == Some(WinSock::WSAEAFNOSUPPORT)
}

/// Returns whether a call failed because the process has no descriptor left.
pub(crate) fn is_out_of_descriptors(error: &io::Error) -> bool {
    error.raw_os_error() == Some(WinSock::WSAEMFILE)
}

/// Returns whether a connect to a Unix socket failed because that is one of datagrams. There are
/// none here.
pub(crate) fn is_no_stream(_: &io::Error) -> bool {
    false
}

/// Windows limits sockets by memory alone.
pub(crate) fn descriptor_limit() -> Option<u64> {
    None
}

/// Does nothing: there is no limit to raise.
#[cfg(feature = "cli")]
pub(crate) fn raise_descriptor_limit() -> io::Result<()> {
    Ok(())
}

/// Windows doesn't tell what a peer has not acknowledged yet.
pub(crate) fn unacknowledged(_: &impl AsSocket) -> usize {
    0
}

/// Fails: AF_VSOCK is Linux'.
pub(crate) fn local_cid() -> io::Result<u32> {
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        "AF_VSOCK is carried on Linux only",
    ))
}

/// Protocol and option level of AF_HYPERV (`HV_PROTOCOL_RAW` of the SDK's `hvsocket.h`).
const HV_PROTOCOL_RAW: i32 = Hypervisor::HV_PROTOCOL_RAW.cast_signed();

fn guid(id: Uuid) -> windows_sys::core::GUID {
    let (data1, data2, data3, data4) = id.as_fields();
    windows_sys::core::GUID {
        data1,
        data2,
        data3,
        data4: *data4,
    }
}

/// Returns the address of a service of a Hyper-V partition.
#[allow(unsafe_code)]
fn hv_address(vm: Uuid, service: Uuid) -> io::Result<SockAddr> {
    let address = Hypervisor::SOCKADDR_HV {
        Family: WinSock::AF_HYPERV,
        Reserved: 0,
        VmId: guid(vm),
        ServiceId: guid(service),
    };
    let write = |storage: *mut SockAddrStorage, len: *mut i32| {
        // SAFETY: the storage is larger than any address, aligned for all of them, and both
        // pointers are valid for writes.
        unsafe {
            storage.cast::<Hypervisor::SOCKADDR_HV>().write(address);
            *len = size_of::<Hypervisor::SOCKADDR_HV>() as i32;
        }
        Ok(())
    };
    // SAFETY: `write` has initialized as many bytes as it says.
    let ((), address) = unsafe { SockAddr::try_init(write) }?;
    Ok(address)
}

/// Returns the VM's id and the service id of an AF_HYPERV address.
#[allow(unsafe_code)]
pub(crate) fn hv_of(address: &SockAddr) -> Option<(Uuid, Uuid)> {
    let len = usize::try_from(address.len()).ok()?;
    if address.family() != WinSock::AF_HYPERV || len < size_of::<Hypervisor::SOCKADDR_HV>() {
        return None;
    }
    // SAFETY: that many bytes are initialized, and any bytes are such an address.
    let address = unsafe {
        address
            .as_ptr()
            .cast::<Hypervisor::SOCKADDR_HV>()
            .read_unaligned()
    };
    let uuid =
        |id: windows_sys::core::GUID| Uuid::from_fields(id.data1, id.data2, id.data3, &id.data4);
    Some((uuid(address.VmId), uuid(address.ServiceId)))
}

/// Options of AF_HYPERV sockets, set before they are bound or connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HvOptions {
    /// `HVSOCKET_CONNECTED_SUSPEND`.
    pub(crate) connected_suspend: bool,
    /// `HVSOCKET_CONTAINER_PASSTHRU`.
    pub(crate) container_passthru: bool,
}

/// `HVSOCKET_CONTAINER_PASSTHRU` of the SDK's `hvsocket.h`, which windows-sys leaves out.
const HVSOCKET_CONTAINER_PASSTHRU: u32 = 2;

/// Makes an AF_HYPERV socket that is neither bound nor connected.
pub(crate) fn hv_socket(options: HvOptions) -> io::Result<Socket> {
    let family = Domain::from(i32::from(WinSock::AF_HYPERV));
    let protocol = Protocol::from(HV_PROTOCOL_RAW);
    let socket = Socket::new(family, Type::STREAM, Some(protocol))?;
    for (option, wanted) in [
        (
            Hypervisor::HVSOCKET_CONNECTED_SUSPEND,
            options.connected_suspend,
        ),
        (HVSOCKET_CONTAINER_PASSTHRU, options.container_passthru),
    ] {
        if wanted {
            hv_set(&socket, option, 1)?;
        }
    }
    Ok(socket)
}

#[allow(unsafe_code)]
fn hv_set(socket: &Socket, option: u32, value: u32) -> io::Result<()> {
    // SAFETY: the kernel reads the given number of bytes from the pointer, which are those of
    // `value`.
    let set = unsafe {
        WinSock::setsockopt(
            usize::try_from(socket.as_raw_socket()).map_err(io::Error::other)?,
            HV_PROTOCOL_RAW,
            option.cast_signed(),
            std::ptr::from_ref(&value).cast(),
            size_of::<u32>() as i32,
        )
    };
    match set {
        WinSock::SOCKET_ERROR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Connects an AF_HYPERV socket, within `timeout` (at most 300 s, `HVSOCKET_CONNECT_TIMEOUT_MAX`):
/// without one, a connect that comes before its server's listen may wait for ever.
pub(crate) fn hv_connect(
    vm: Uuid,
    service: Uuid,
    timeout: Duration,
    options: HvOptions,
) -> io::Result<Socket> {
    let socket = hv_socket(options)?;
    let timeout = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
    let timeout = timeout.clamp(1, Hypervisor::HVSOCKET_CONNECT_TIMEOUT_MAX);
    hv_set(&socket, Hypervisor::HVSOCKET_CONNECT_TIMEOUT, timeout)?;
    socket.connect(&hv_address(vm, service)?)?;
    Ok(socket)
}

/// Listens on a service, for connections from the partitions that `vm` means.
pub(crate) fn hv_listen(
    vm: Uuid,
    service: Uuid,
    backlog: i32,
    options: HvOptions,
) -> io::Result<Acceptor> {
    let socket = hv_socket(options)?;
    socket.bind(&hv_address(vm, service)?)?;
    socket.listen(backlog)?;
    Acceptor::new(socket, move || hv_socket(options))
}

/// Ends what other threads wait for on a socket, a connect, read or write; calls that begin later
/// wait as ever.
#[allow(unsafe_code)]
pub(crate) fn cancel(socket: BorrowedSocket<'_>) {
    // SAFETY: the socket is open as long as it is borrowed. That nothing waits is its only error.
    unsafe { CancelIoEx(socket.as_raw_socket() as _, std::ptr::null()) };
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    #[allow(unsafe_code)]
    fn an_address_has_the_36_bytes_of_the_sdk() {
        let vm = Uuid::from_u128(0x00112233_4455_6677_8899_aabbccddeeff);
        let service = Uuid::from_u128(0x00000050_facb_11e6_bd58_64006a7986d3);
        let address = hv_address(vm, service).unwrap();
        assert_eq!(address.len(), 36);
        // SAFETY: that many bytes are initialized.
        let bytes: [u8; 36] = unsafe { address.as_ptr().cast::<[u8; 36]>().read() };
        let expected = [
            &[34, 0, 0, 0][..],
            // A GUID's first three fields are little-endian.
            &[0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66],
            &[0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff],
            &[0x50, 0, 0, 0, 0xcb, 0xfa, 0xe6, 0x11],
            &[0xbd, 0x58, 0x64, 0x00, 0x6a, 0x79, 0x86, 0xd3],
        ];
        assert_eq!(bytes[..], expected.concat());
        assert_eq!(hv_of(&address), Some((vm, service)));
        let tcp = std::net::SocketAddr::from(([127, 0, 0, 1], 80));
        assert_eq!(hv_of(&tcp.into()), None);
    }
}
