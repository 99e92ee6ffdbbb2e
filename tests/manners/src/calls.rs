//! The wrappers.

use std::ffi::c_void;

use libc::{
    c_int, c_uint, iovec, loff_t, msghdr, nfds_t, pollfd, size_t, sockaddr, socklen_t, ssize_t,
};

use crate::ended::{self, Ended};
use crate::{Manner, error, fail, has, kernel, lost, names, next};

/// macOS' `PIPSIZ`.
const SMALL: c_int = 8 << 10;

/// What has so many bytes fit into a Unix stream socket, written in pieces of 8 KiB or more: Linux
/// doubles what it is given, and counts what its buffers take beside the bytes.
fn for_linux(size: c_int) -> c_int {
    size / 2 + 64
}

/// `kern.ipc.somaxconn`. Linux lets one more wait than it is told.
const MOST_WAITING: c_int = 128 - 1;

const DESCRIPTORS: libc::rlim_t = 256;
const OPEN_MAX: libc::rlim_t = 10_240;

/// Set for the processes that this one starts: they have from it what it has made of its limit.
const LIMITED: &std::ffi::CStr = c"MANNERS_LIMITED";

const BUFFERS: [c_int; 2] = [libc::SO_SNDBUF, libc::SO_RCVBUF];

/// Whether it is the size of a Unix stream socket's buffer.
fn is_buffer(fd: c_int, level: c_int, option: c_int) -> bool {
    level == libc::SOL_SOCKET && BUFFERS.contains(&option) && kernel::is_unix(fd)
}

fn set_small(fd: c_int) {
    for option in BUFFERS {
        kernel::set_option(fd, libc::SOL_SOCKET, option, for_linux(SMALL));
    }
}

fn is_unix_stream(domain: c_int, kind: c_int) -> bool {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    domain == libc::AF_UNIX && kind & !flags == libc::SOCK_STREAM
}

/// # Safety
/// As socket(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    // SAFETY: the caller's.
    let fd = unsafe { next::socket(domain, kind, protocol) };
    ended::note_half_close(fd, false);
    if fd >= 0 && is_unix_stream(domain, kind) && has(Manner::Buffers) {
        set_small(fd);
    }
    fd
}

/// # Safety
/// As socketpair(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn socketpair(
    domain: c_int,
    kind: c_int,
    protocol: c_int,
    pair: *mut c_int,
) -> c_int {
    // SAFETY: the caller's.
    let result = unsafe { next::socketpair(domain, kind, protocol, pair) };
    if result == 0 && is_unix_stream(domain, kind) {
        // SAFETY: two descriptors were written there.
        for fd in unsafe { *pair.cast::<[c_int; 2]>() } {
            ended::note_half_close(fd, false);
            if has(Manner::Buffers) {
                set_small(fd);
            }
        }
    }
    result
}

/// # Safety
/// As bind(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn bind(fd: c_int, name: *const sockaddr, len: socklen_t) -> c_int {
    // SAFETY: the caller's.
    if has(Manner::Path) && unsafe { names::is_too_long(name, len) } {
        return fail(libc::EINVAL);
    }
    // SAFETY: the caller's.
    unsafe { next::bind(fd, name, len) }
}

/// # Safety
/// As listen(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn listen(fd: c_int, backlog: c_int) -> c_int {
    let backlog = match has(Manner::Backlog) {
        true => backlog.min(MOST_WAITING),
        false => backlog,
    };
    if has(Manner::Lost) {
        lost::keep_spare();
    }
    // SAFETY: the caller's.
    unsafe { next::listen(fd, backlog) }
}

/// # Safety
/// As connect(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn connect(fd: c_int, name: *const sockaddr, len: socklen_t) -> c_int {
    // SAFETY: the caller's.
    if has(Manner::Path) && unsafe { names::is_too_long(name, len) } {
        return fail(libc::EINVAL);
    }
    if !has(Manner::Backlog) || !kernel::is_unix(fd) {
        // SAFETY: the caller's.
        return unsafe { next::connect(fd, name, len) };
    }
    // Linux would have a blocking one wait for room.
    let blocks = !kernel::is_nonblocking(fd);
    if blocks {
        kernel::set_nonblocking(fd, true);
    }
    // SAFETY: the caller's.
    let result = unsafe { next::connect(fd, name, len) };
    let error = error();
    if blocks {
        kernel::set_nonblocking(fd, false);
    }
    match (result, error) {
        (0, _) => 0,
        (_, libc::EAGAIN) => fail(libc::ECONNREFUSED),
        (_, error) => fail(error),
    }
}

/// Gives an accepted socket what it would have from its listener.
///
/// # Safety
/// `name` and `len` were filled by an accept.
unsafe fn accepted(listener: c_int, fd: c_int, name: *mut sockaddr, len: *mut socklen_t) -> c_int {
    if fd < 0 {
        return match error() {
            // Linux looks for a descriptor first.
            libc::EMFILE if has(Manner::Lost) => {
                let had_client = lost::lose_client(listener);
                let would_block = !had_client && kernel::is_nonblocking(listener);
                fail(if would_block {
                    libc::EAGAIN
                } else {
                    libc::EMFILE
                })
            }
            error => fail(error),
        };
    }
    ended::note_half_close(fd, false);
    if has(Manner::Inherit) && kernel::is_nonblocking(listener) {
        kernel::set_nonblocking(fd, true);
    }
    let family = kernel::stream(fd);
    if has(Manner::Buffers) && family == Some(libc::AF_UNIX) {
        for option in BUFFERS {
            if let Some(size) = kernel::option(listener, libc::SOL_SOCKET, option) {
                kernel::set_option(fd, libc::SOL_SOCKET, option, size / 2);
            }
        }
    }
    let is_tcp = matches!(family, Some(libc::AF_INET | libc::AF_INET6));
    if has(Manner::Nameless) && is_tcp && !name.is_null() && Ended::of(fd).both() {
        // SAFETY: an address was written there, and its length.
        unsafe {
            (*name).sa_family = 0;
            *len = 0;
        }
    }
    fd
}

/// # Safety
/// As accept(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn accept(fd: c_int, name: *mut sockaddr, len: *mut socklen_t) -> c_int {
    // SAFETY: the caller's.
    unsafe { accepted(fd, next::accept(fd, name, len), name, len) }
}

/// # Safety
/// As accept4(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn accept4(
    fd: c_int,
    name: *mut sockaddr,
    len: *mut socklen_t,
    flags: c_int,
) -> c_int {
    // SAFETY: the caller's.
    unsafe { accepted(fd, next::accept4(fd, name, len, flags), name, len) }
}

/// # Safety
/// As setsockopt(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn setsockopt(
    fd: c_int,
    level: c_int,
    option: c_int,
    value: *const c_void,
    len: socklen_t,
) -> c_int {
    if has(Manner::Ended) && Ended::of(fd).both() {
        return fail(libc::EINVAL);
    }
    if is_buffer(fd, level, option) && len as usize >= size_of::<c_int>() {
        // SAFETY: an int is there.
        let size = unsafe { value.cast::<c_int>().read_unaligned() };
        if has(Manner::Capped) && size > SMALL {
            return fail(libc::ENOBUFS);
        }
        if has(Manner::Buffers) {
            kernel::set_option(fd, level, option, for_linux(size));
            return 0;
        }
    }
    // SAFETY: the caller's.
    unsafe { next::setsockopt(fd, level, option, value, len) }
}

/// # Safety
/// As getsockopt(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn getsockopt(
    fd: c_int,
    level: c_int,
    option: c_int,
    value: *mut c_void,
    len: *mut socklen_t,
) -> c_int {
    // SAFETY: the caller's.
    let result = unsafe { next::getsockopt(fd, level, option, value, len) };
    if result == 0 && has(Manner::Buffers) && is_buffer(fd, level, option) {
        // SAFETY: an int was written there.
        unsafe { *value.cast::<c_int>() -= 2 * for_linux(0) };
    }
    // macOS tells the user, but not the process (LOCAL_PEERPID).
    let is_peer = level == libc::SOL_SOCKET && option == libc::SO_PEERCRED;
    if is_peer && result == 0 && has(Manner::Ended) && Ended::of(fd).both() {
        // SAFETY: a `ucred` was written there.
        unsafe { (*value.cast::<libc::ucred>()).pid = 0 };
    }
    let is_error = level == libc::SOL_SOCKET && option == libc::SO_ERROR;
    if is_error && result == 0 && has(Manner::Eof) && kernel::is_unix(fd) {
        // SAFETY: an int was written there.
        let noted = unsafe { &mut *value.cast::<c_int>() };
        if *noted == libc::ECONNRESET {
            *noted = 0;
        }
    }
    result
}

/// # Safety
/// As getpeername(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn getpeername(fd: c_int, name: *mut sockaddr, len: *mut socklen_t) -> c_int {
    if has(Manner::Ended) && Ended::of(fd).both() {
        return fail(libc::EINVAL);
    }
    // SAFETY: the caller's.
    unsafe { next::getpeername(fd, name, len) }
}

/// # Safety
/// As shutdown(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn shutdown(fd: c_int, how: c_int) -> c_int {
    if has(Manner::Shutdown) {
        let ended = Ended::of(fd);
        if how != libc::SHUT_WR && ended.read {
            return fail(libc::ENOTCONN);
        }
        if how != libc::SHUT_RD && ended.write {
            if how == libc::SHUT_RDWR {
                shut_down(fd, libc::SHUT_RD);
            }
            return fail(libc::ENOTCONN);
        }
    }
    shut_down(fd, how)
}

fn shut_down(fd: c_int, how: c_int) -> c_int {
    // SAFETY: no pointer is passed.
    let result = unsafe { next::shutdown(fd, how) };
    if result != 0 {
        return result;
    }
    if how != libc::SHUT_RD {
        ended::note_half_close(fd, true);
    }
    if how != libc::SHUT_WR && has(Manner::Silence) && kernel::is_unix(fd) {
        discard(fd);
    }
    0
}

/// Discards what has come.
fn discard(fd: c_int) {
    let mut bytes = [0_u8; 16 << 10];
    let (start, len) = (bytes.as_mut_ptr().cast(), bytes.len());
    // SAFETY: at most `len` bytes are written to `bytes`, which has so many.
    while unsafe { next::recv(fd, start, len, libc::MSG_DONTWAIT) } > 0 {}
}

/// What a write of so many bytes says: they are discarded in silence where the peer takes nothing
/// more.
fn sent(fd: c_int, result: ssize_t, len: size_t) -> ssize_t {
    if result >= 0 {
        return result;
    }
    match error() {
        libc::EPIPE if has(Manner::Silence) && ended::is_unheard(fd) => len as ssize_t,
        error => fail(error) as ssize_t,
    }
}

/// How many bytes the parts have.
///
/// # Safety
/// `parts` is valid for reads of `count` of them.
unsafe fn total(parts: *const iovec, count: usize) -> size_t {
    // SAFETY: the caller's.
    (0..count)
        .map(|at| unsafe { (*parts.add(at)).iov_len })
        .sum()
}

/// # Safety
/// As send(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn send(fd: c_int, bytes: *const c_void, len: size_t, flags: c_int) -> ssize_t {
    // SAFETY: the caller's.
    sent(fd, unsafe { next::send(fd, bytes, len, flags) }, len)
}

/// # Safety
/// As sendto(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn sendto(
    fd: c_int,
    bytes: *const c_void,
    len: size_t,
    flags: c_int,
    name: *const sockaddr,
    name_len: socklen_t,
) -> ssize_t {
    // SAFETY: the caller's.
    let result = unsafe { next::sendto(fd, bytes, len, flags, name, name_len) };
    sent(fd, result, len)
}

/// # Safety
/// As sendmsg(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn sendmsg(fd: c_int, message: *const msghdr, flags: c_int) -> ssize_t {
    // SAFETY: the caller's.
    let result = unsafe { next::sendmsg(fd, message, flags) };
    // SAFETY: the caller's: the message has so many parts.
    let len = unsafe { total((*message).msg_iov, (*message).msg_iovlen) };
    sent(fd, result, len)
}

/// # Safety
/// As write(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn write(fd: c_int, bytes: *const c_void, len: size_t) -> ssize_t {
    // SAFETY: the caller's.
    sent(fd, unsafe { next::write(fd, bytes, len) }, len)
}

/// # Safety
/// As writev(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn writev(fd: c_int, parts: *const iovec, count: c_int) -> ssize_t {
    // SAFETY: the caller's.
    let result = unsafe { next::writev(fd, parts, count) };
    // SAFETY: the caller's.
    let len = unsafe { total(parts, usize::try_from(count).unwrap_or(0)) };
    sent(fd, result, len)
}

/// What a read says, with the end in place of a Unix socket's reset.
fn received(fd: c_int, count: ssize_t) -> ssize_t {
    if count >= 0 {
        return count;
    }
    match error() {
        libc::ECONNRESET if has(Manner::Eof) && kernel::is_unix(fd) => 0,
        error => fail(error) as ssize_t,
    }
}

/// # Safety
/// As recv(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn recv(fd: c_int, bytes: *mut c_void, len: size_t, flags: c_int) -> ssize_t {
    // SAFETY: the caller's.
    received(fd, unsafe { next::recv(fd, bytes, len, flags) })
}

/// # Safety
/// As recvfrom(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn recvfrom(
    fd: c_int,
    bytes: *mut c_void,
    len: size_t,
    flags: c_int,
    name: *mut sockaddr,
    name_len: *mut socklen_t,
) -> ssize_t {
    // SAFETY: the caller's.
    received(fd, unsafe {
        next::recvfrom(fd, bytes, len, flags, name, name_len)
    })
}

/// # Safety
/// As recvmsg(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn recvmsg(fd: c_int, message: *mut msghdr, flags: c_int) -> ssize_t {
    // SAFETY: the caller's.
    let count = received(fd, unsafe { next::recvmsg(fd, message, flags) });
    if count == 0 {
        // SAFETY: the caller's. Of an end nothing else has come; of an error the kernel has written
        // nothing.
        unsafe { (*message).msg_controllen = 0 };
    }
    count
}

/// # Safety
/// As read(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn read(fd: c_int, bytes: *mut c_void, len: size_t) -> ssize_t {
    // SAFETY: the caller's.
    received(fd, unsafe { next::read(fd, bytes, len) })
}

/// # Safety
/// As readv(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn readv(fd: c_int, parts: *const iovec, count: c_int) -> ssize_t {
    // SAFETY: the caller's.
    received(fd, unsafe { next::readv(fd, parts, count) })
}

/// # Safety
/// As splice(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn splice(
    from: c_int,
    from_at: *mut loff_t,
    to: c_int,
    to_at: *mut loff_t,
    len: size_t,
    flags: c_uint,
) -> ssize_t {
    // SAFETY: the caller's.
    received(from, unsafe {
        next::splice(from, from_at, to, to_at, len, flags)
    })
}

/// The third argument, where there is one, is an int or a pointer: it is passed on in its register,
/// as it was passed here.
///
/// # Safety
/// As fcntl(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn fcntl(fd: c_int, command: c_int, argument: usize) -> c_int {
    if matches!(command, libc::F_SETPIPE_SZ | libc::F_GETPIPE_SZ) && has(Manner::Copy) {
        return fail(libc::EINVAL);
    }
    // SAFETY: the caller's.
    let result = unsafe { next::fcntl(fd, command, argument) };
    if matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) {
        ended::note_twin(result, fd);
    }
    result
}

/// # Safety
/// As poll(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn poll(asked: *mut pollfd, count: nfds_t, timeout: c_int) -> c_int {
    // SAFETY: the caller's.
    let ready = unsafe { next::poll(asked, count, timeout) };
    if ready <= 0 || !has(Manner::Eof) {
        return ready;
    }
    // SAFETY: the caller's: `count` of them are valid for reads and writes.
    let all = unsafe { std::slice::from_raw_parts_mut(asked, count as usize) };
    for one in all {
        if one.revents & libc::POLLERR != 0 && kernel::is_unix(one.fd) {
            // Takes the reset off it. There is an end, of which the poller tells as well.
            kernel::option(one.fd, libc::SOL_SOCKET, libc::SO_ERROR);
            one.revents &= !libc::POLLERR;
        }
    }
    ready
}

/// Whether this process is a program of tests, which are in cargo's `deps`. Some of these have more
/// than a limit allows only if their tests come together, so that they would fail now and then.
fn is_program_of_tests() -> bool {
    let program = std::env::current_exe().unwrap_or_default();
    program.parent().is_some_and(|it| it.ends_with("deps"))
}

/// Runs before the program does.
extern "C" fn begin() {
    if !has(Manner::Descriptors) || is_program_of_tests() {
        return;
    }
    // SAFETY: there is no other thread yet that could change the environment, and the names end
    // with a NUL.
    unsafe {
        if !libc::getenv(LIMITED.as_ptr()).is_null() {
            return;
        }
        libc::setenv(LIMITED.as_ptr(), c"".as_ptr(), 1);
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_max = limit.rlim_max.min(OPEN_MAX);
            limit.rlim_cur = limit.rlim_max.min(DESCRIPTORS);
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

#[used]
#[unsafe(link_section = ".init_array")]
static BEGIN: extern "C" fn() = begin;
