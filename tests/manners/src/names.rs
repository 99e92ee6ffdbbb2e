//! Socket addresses as they are passed to the kernel.

use libc::{c_char, sockaddr, sockaddr_un, socklen_t};

/// `sun_path` of macOS (`bsd/sys/un.h`).
const SUN_PATH_LEN: usize = 104;

/// Whether it is the path of a Unix socket that macOS' `sockaddr_un` has no room for.
///
/// # Safety
/// `name` is valid for reads of `len` bytes.
pub(crate) unsafe fn is_too_long(name: *const sockaddr, len: socklen_t) -> bool {
    let before = std::mem::offset_of!(sockaddr_un, sun_path);
    let Some(path_len) = (len as usize).checked_sub(before).filter(|len| *len > 0) else {
        return false;
    };
    // SAFETY: the caller's; a family is at the start of every address.
    if unsafe { (*name).sa_family } != libc::AF_UNIX as libc::sa_family_t {
        return false;
    }
    // SAFETY: the path is what is left of the `len` bytes.
    let path = unsafe {
        let start = name.cast::<u8>().add(before).cast::<c_char>();
        std::slice::from_raw_parts(start, path_len)
    };
    let end = path.iter().position(|byte| *byte == 0).unwrap_or(path_len);
    end >= SUN_PATH_LEN
}
