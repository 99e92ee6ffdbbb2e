//! Descriptors that a peer passes over a Unix socket (`SCM_RIGHTS`), unasked. A receiver owns them
//! and has to close them, and a close may take long: of a TCP socket with `SO_LINGER`, or of a file
//! on a slow or remote disk. A read without room for them closes them before it returns.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::libc;

/// How many descriptors [`send`] passes at most.
pub(crate) const MOST_SENT: usize = 16;

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

/// Sends bytes, and with the first of them descriptors of this process, [`MOST_SENT`] at most,
/// without waiting and without a SIGPIPE. Returns how many bytes were sent; the descriptors were
/// sent if any was.
///
/// # Errors
/// `WouldBlock` if there is no room; `BrokenPipe` if the peer is gone; `InvalidInput` if there are
/// too many descriptors; what the kernel says otherwise, such as that a number is no descriptor.
#[allow(unsafe_code)]
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[RawFd],
) -> io::Result<usize> {
    if descriptors.len() > MOST_SENT {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // Words, for a `cmsghdr` is aligned; and as many as a header and the most descriptors take.
    let mut control = [0_u64; (MOST_SENT * size_of::<RawFd>()).div_ceil(8) + 4];
    let mut part = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: a `msghdr` is plain data, of which all zeros is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if !descriptors.is_empty() {
        let size = size_of_val(descriptors) as libc::c_uint;
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: both only compute a length.
        let (space, len) = unsafe { (libc::CMSG_SPACE(size), libc::CMSG_LEN(size)) };
        message.msg_controllen = space as _;
        // SAFETY: the control buffer has room for a header and `MOST_SENT` descriptors, of which
        // there are no more; it is zeroed and aligned for the header, and outlives the call.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = len as _;
            let data = libc::CMSG_DATA(header).cast::<RawFd>();
            for (index, descriptor) in descriptors.iter().enumerate() {
                data.add(index).write_unaligned(*descriptor);
            }
        }
    }
    #[cfg(not(target_vendor = "apple"))]
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // (There the socket has SO_NOSIGPIPE.)
    #[cfg(target_vendor = "apple")]
    let flags = libc::MSG_DONTWAIT;
    // SAFETY: the message points to one buffer and at most one control buffer, each valid for reads
    // of the length given; both outlive the call, which doesn't write to them. The kernel checks
    // the descriptors' numbers.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Write};
    use std::net::Shutdown;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_descriptor_arrives_with_the_first_byte_behind_which_it_was_sent() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (one, mut other) = UnixStream::pair().unwrap();
        assert_eq!(send(ours.as_fd(), b"before", &[]).unwrap(), 6);
        let sent = send(ours.as_fd(), b"with it", &[one.as_raw_fd()]);
        assert_eq!(sent.unwrap(), 7);
        drop(one);
        let (mut bytes, mut descriptors) = (Vec::new(), Vec::new());
        while bytes.len() < 13 {
            let mut buffer = [0; 64];
            let received = receive(theirs.as_fd(), &mut buffer).unwrap();
            bytes.extend_from_slice(&buffer[..received.bytes]);
            descriptors.extend(received.descriptors);
        }
        assert_eq!(bytes, b"beforewith it");
        assert_eq!(descriptors.len(), 1);
        let mut copy = UnixStream::from(descriptors.remove(0));
        copy.write_all(b"x").unwrap();
        let mut byte = [0];
        other.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"x");
    }

    #[test]
    fn as_many_as_can_be_sent_arrive_in_their_order() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let pairs: Vec<_> = (0..MOST_SENT)
            .map(|_| UnixStream::pair().unwrap())
            .collect();
        let mut numbers: Vec<RawFd> = pairs.iter().map(|(one, _)| one.as_raw_fd()).collect();
        assert_eq!(send(ours.as_fd(), b"x", &numbers).unwrap(), 1);
        let received = receive(theirs.as_fd(), &mut [0; 8]).unwrap();
        assert_eq!(received.descriptors.len(), MOST_SENT);
        for (copy, (_, other)) in received.descriptors.into_iter().zip(&pairs) {
            UnixStream::from(copy).write_all(b"y").unwrap();
            let mut other = other;
            other.read_exact(&mut [0]).unwrap();
        }
        numbers.push(ours.as_raw_fd());
        let error = send(ours.as_fd(), b"x", &numbers).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_number_that_is_no_descriptor_is_refused_and_a_peer_that_is_gone_is_no_signal() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        #[cfg(target_vendor = "apple")]
        socket2::SockRef::from(&ours).set_nosigpipe(true).unwrap();
        let error = send(ours.as_fd(), b"x", &[1 << 20]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        // A child that another test forks may still hold a copy: a close would be no end yet.
        theirs.shutdown(Shutdown::Both).unwrap();
        let error = send(ours.as_fd(), b"x", &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
