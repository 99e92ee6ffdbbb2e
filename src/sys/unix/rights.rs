//! Descriptors that a peer passes over a Unix socket (`SCM_RIGHTS`), unasked. A receiver owns them
//! and has to close them, and a close may take long: of a TCP socket with `SO_LINGER`, or of a file
//! on a slow or remote disk. A read without room for them closes them before it returns.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::libc;

/// As many as one message can pass (`SCM_MAX_FD`, Linux' `include/net/scm.h`; elsewhere it is more
/// than is usual).
const MOST: usize = 253;

/// Has the kernel refuse descriptors that a peer passes (Linux 6.16; its `sendmsg` fails). What a
/// listener accepts inherits it. Returns false where the kernel can't.
pub(crate) fn refuse_descriptors(socket: &socket2::Socket) -> bool {
    #[cfg(target_os = "linux")]
    {
        let off: libc::c_int = 0;
        set_pass_rights(socket.as_raw_fd(), off).is_ok()
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = socket;
        false
    }
}

/// Returns whether the kernel refuses descriptors on this Unix socket, and has since a peer could
/// first pass any: an accepted socket inherits it.
pub(crate) fn refuses_descriptors(socket: BorrowedFd<'_>) -> bool {
    #[cfg(target_os = "linux")]
    {
        pass_rights(socket.as_raw_fd()).is_ok_and(|on| on == 0)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = socket;
        false
    }
}

/// `SO_PASSRIGHTS`, of `include/uapi/asm-generic/socket.h` and, of these two,
/// `arch/sparc/include/uapi/asm/socket.h`.
#[cfg(target_os = "linux")]
const PASS_RIGHTS: libc::c_int = match cfg!(any(target_arch = "sparc", target_arch = "sparc64")) {
    true => 0x5c,
    false => 83,
};

#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn set_pass_rights(socket: RawFd, on: libc::c_int) -> io::Result<()> {
    // SAFETY: the kernel reads one int of the given length from the pointer, which is valid.
    let result = unsafe {
        libc::setsockopt(
            socket,
            libc::SOL_SOCKET,
            PASS_RIGHTS,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn pass_rights(socket: RawFd) -> io::Result<libc::c_int> {
    let mut on: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes one int of the given length; both pointers are valid.
    let result = unsafe {
        libc::getsockopt(
            socket,
            libc::SOL_SOCKET,
            PASS_RIGHTS,
            (&raw mut on).cast(),
            &raw mut len,
        )
    };
    match result {
        0 => Ok(on),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What a read of a Unix socket has brought.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) bytes: usize,
    /// The read ended where descriptors were passed, whatever is behind (`unix(7)`).
    pub(crate) stopped: bool,
    /// To be closed where that may take its time.
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// Reads, and takes in the descriptors that came with the bytes.
#[allow(unsafe_code)]
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    // Words, for a `cmsghdr` is aligned; and as many as MOST descriptors and a header take.
    let mut control = [MaybeUninit::<u64>::uninit(); (MOST * size_of::<RawFd>()).div_ceil(8) + 4];
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: a `msghdr` is plain data, of which all zeros is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    #[cfg(not(target_vendor = "apple"))]
    let flags = libc::MSG_CMSG_CLOEXEC;
    // (There a process that is started meanwhile may have them for a moment.)
    #[cfg(target_vendor = "apple")]
    let flags = 0;
    // SAFETY: the message points to one buffer and one control buffer, each valid for writes of the
    // length given, and both outlive the call.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    let bytes = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    let mut descriptors = Vec::new();
    // SAFETY: the kernel has filled the control buffer and set its length; the macros walk through
    // it within that. Each header's data is as long as it says, and of SCM_RIGHTS it is descriptors
    // that this process owns from now on, and that have no other owner here. They may not be
    // aligned.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            let (level, kind) = ((*header).cmsg_level, (*header).cmsg_type);
            if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                let len = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                for index in 0..len / size_of::<RawFd>() {
                    let descriptor = data.add(index).read_unaligned();
                    descriptors.push(OwnedFd::from_raw_fd(descriptor));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Ok(Received {
        bytes,
        // There was no room for all, or no descriptor left.
        stopped: !descriptors.is_empty() || message.msg_flags & libc::MSG_CTRUNC != 0,
        descriptors,
    })
}

/// Writes, and passes a descriptor with the first of the bytes. Returns how many bytes were
/// written. A stream that waits waits; there is no SIGPIPE, which Rust's programs ignore.
#[cfg(feature = "cli")]
#[allow(unsafe_code)]
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptor: BorrowedFd<'_>,
) -> io::Result<usize> {
    // Words, for a `cmsghdr` is aligned; one descriptor and its header take less.
    let mut control = [0_u64; 8];
    let mut part = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: a `msghdr` is plain data, of which all zeros is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: the macros compute with the length given, and walk within the control buffer, which
    // has room for one header and one descriptor. A descriptor may not be aligned there.
    unsafe {
        let length = size_of::<RawFd>() as libc::c_uint;
        message.msg_controllen = libc::CMSG_SPACE(length) as _;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(length) as _;
        let data = libc::CMSG_DATA(header).cast::<RawFd>();
        data.write_unaligned(descriptor.as_raw_fd());
    }
    // SAFETY: the message points to one buffer, which is only read, and to one control buffer, each
    // valid for the length given, and both outlive the call.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, 0) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}
