//! What AF_VSOCK has beside sockets.

use crate::error::{Error, Operation, Result};
use crate::sys;

/// The CID of this system, by which its host and its guests know it (`IOCTL_VM_SOCKETS_GET_LOCAL_CID` of Linux's
/// `include/uapi/linux/vm_sockets.h`): 2 on a host, 3 or more in a guest; [`CID_ANY`](crate::address::CID_ANY) or
/// [`CID_LOCAL`](crate::address::CID_LOCAL) where no transport to another system is loaded.
///
/// # Errors
/// `NotFound` if the kernel's `vsock` module isn't loaded, `Unsupported` on systems other than Linux.
pub fn local_cid() -> Result<u32> {
    sys::local_cid().map_err(|e| {
        let error = Error::new(Operation::Find, "the local CID (/dev/vsock)", e);
        match error.kind() {
            std::io::ErrorKind::NotFound => error.with_remedy("modprobe vsock"),
            _ => error,
        }
    })
}
