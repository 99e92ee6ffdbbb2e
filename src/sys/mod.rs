//! What differs between operating systems, behind functions that exist on all of them.

use std::ffi::OsString;

/// The OS string of these bytes; the bytes back where this system has none for them.
///
/// Unix names are any bytes. Elsewhere they are Unicode, so that only UTF-8 has a meaning there.
pub(crate) fn os_string_from_bytes(bytes: Vec<u8>) -> Result<OsString, Vec<u8>> {
    #[cfg(unix)]
    {
        Ok(std::os::unix::ffi::OsStringExt::from_vec(bytes))
    }
    #[cfg(not(unix))]
    {
        String::from_utf8(bytes)
            .map(OsString::from)
            .map_err(|error| error.into_bytes())
    }
}

/// Whether a process of this id lives, as far as this user can know.
pub(crate) fn process_is_alive(pid: i32) -> bool {
    #[cfg(unix)]
    {
        use nix::errno::Errno;
        use nix::sys::signal::kill;
        use nix::unistd::Pid;
        // Zero and negative ids mean process groups to kill(2). EPERM: it lives, as another user (minikube runs hyperkit as root).
        pid > 0 && matches!(kill(Pid::from_raw(pid), None), Ok(()) | Err(Errno::EPERM))
    }
    #[cfg(not(unix))]
    {
        // hyperkit runs on macOS only: a pid file seen elsewhere was copied from there.
        let _ = pid;
        false
    }
}
