//! The calls behind the wrappers: libc's own.

use std::ffi::c_void;
use std::sync::atomic::{AtomicPtr, Ordering};

/// A libc function, looked up once.
pub(crate) struct Symbol {
    /// Ends with a NUL.
    name: &'static str,
    found: AtomicPtr<c_void>,
}

impl Symbol {
    pub(crate) const fn new(name: &'static str) -> Symbol {
        Symbol {
            name,
            found: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    /// Its address.
    pub(crate) fn get(&self) -> *mut c_void {
        let found = self.found.load(Ordering::Relaxed);
        if !found.is_null() {
            return found;
        }
        // SAFETY: the name ends with a NUL, and RTLD_NEXT finds the library behind this one.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr().cast()) };
        if found.is_null() {
            // Nobody to tell it to.
            std::process::abort();
        }
        self.found.store(found, Ordering::Relaxed);
        found
    }
}

/// Declares functions that call libc's of the same name.
macro_rules! libc_calls {
    ($($name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {$(
        /// # Safety
        /// As that of the call in libc.
        pub(crate) unsafe fn $name($($argument: $type),*) -> $result {
            static SYMBOL: Symbol = Symbol::new(concat!(stringify!($name), "\0"));
            type Call = unsafe extern "C" fn($($type),*) -> $result;
            // SAFETY: it is the function of that name, which has this type.
            let call: Call = unsafe { std::mem::transmute(SYMBOL.get()) };
            // SAFETY: the caller's.
            unsafe { call($($argument),*) }
        }
    )*};
}

use libc::{
    c_int, c_uint, iovec, loff_t, msghdr, nfds_t, pollfd, size_t, sockaddr, socklen_t, ssize_t,
};

libc_calls! {
    socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    socketpair(domain: c_int, kind: c_int, protocol: c_int, pair: *mut c_int) -> c_int;
    bind(fd: c_int, name: *const sockaddr, len: socklen_t) -> c_int;
    listen(fd: c_int, backlog: c_int) -> c_int;
    connect(fd: c_int, name: *const sockaddr, len: socklen_t) -> c_int;
    accept(fd: c_int, name: *mut sockaddr, len: *mut socklen_t) -> c_int;
    accept4(fd: c_int, name: *mut sockaddr, len: *mut socklen_t, flags: c_int) -> c_int;
    setsockopt(
        fd: c_int,
        level: c_int,
        option: c_int,
        value: *const c_void,
        len: socklen_t
    ) -> c_int;
    getsockopt(
        fd: c_int,
        level: c_int,
        option: c_int,
        value: *mut c_void,
        len: *mut socklen_t
    ) -> c_int;
    getpeername(fd: c_int, name: *mut sockaddr, len: *mut socklen_t) -> c_int;
    shutdown(fd: c_int, how: c_int) -> c_int;
    send(fd: c_int, bytes: *const c_void, len: size_t, flags: c_int) -> ssize_t;
    sendto(
        fd: c_int,
        bytes: *const c_void,
        len: size_t,
        flags: c_int,
        name: *const sockaddr,
        name_len: socklen_t
    ) -> ssize_t;
    sendmsg(fd: c_int, message: *const msghdr, flags: c_int) -> ssize_t;
    write(fd: c_int, bytes: *const c_void, len: size_t) -> ssize_t;
    writev(fd: c_int, parts: *const iovec, count: c_int) -> ssize_t;
    recv(fd: c_int, bytes: *mut c_void, len: size_t, flags: c_int) -> ssize_t;
    recvfrom(
        fd: c_int,
        bytes: *mut c_void,
        len: size_t,
        flags: c_int,
        name: *mut sockaddr,
        name_len: *mut socklen_t
    ) -> ssize_t;
    recvmsg(fd: c_int, message: *mut msghdr, flags: c_int) -> ssize_t;
    read(fd: c_int, bytes: *mut c_void, len: size_t) -> ssize_t;
    readv(fd: c_int, parts: *const iovec, count: c_int) -> ssize_t;
    splice(
        from: c_int,
        from_at: *mut loff_t,
        to: c_int,
        to_at: *mut loff_t,
        len: size_t,
        flags: c_uint
    ) -> ssize_t;
    fcntl(fd: c_int, command: c_int, argument: usize) -> c_int;
    poll(asked: *mut pollfd, count: nfds_t, timeout: c_int) -> c_int;
}
