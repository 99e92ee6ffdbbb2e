//! Linux's AF_VSOCK: its sockets alone, and this system's CID.
//!
//! ```no_run
//! use hvsock::address::{CID_ANY, VsockAddress};
//! use hvsock::vsock::{Listener, Stream};
//! use std::io::Write;
//!
//! let listener = Listener::bind(&VsockAddress::new(CID_ANY, 1024))?;
//! let (mut stream, peer) = listener.accept()?;
//! println!("port {} of CID {}", peer.port, peer.cid);
//! stream.write_all(b"hello")?;
//!
//! let guest = Stream::connect(&VsockAddress::new(3, 1024))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use crate::address::VsockAddress;
use crate::error::{Error, Operation, Result};
use crate::family;
use crate::sys;

/// A connected AF_VSOCK stream.
pub type Stream = family::Stream<VsockAddress>;
/// A listening AF_VSOCK socket.
pub type Listener = family::Listener<VsockAddress>;

/// Returns the CID of this system, by which its host and its guests know it
/// (`IOCTL_VM_SOCKETS_GET_LOCAL_CID` of Linux's `include/uapi/linux/vm_sockets.h`): 2 on a host, 3
/// or more in a guest; [`CID_ANY`](crate::address::CID_ANY) or
/// [`CID_LOCAL`](crate::address::CID_LOCAL) where no transport to another system is loaded.
///
/// # Errors
/// `NotFound` if the kernel's `vsock` module isn't loaded, `Unsupported` on systems other than
/// Linux.
pub fn local_cid() -> Result<u32> {
    sys::local_cid().map_err(|e| {
        let error = Error::new(Operation::Find, "the local CID (/dev/vsock)", e);
        match error.kind() {
            std::io::ErrorKind::NotFound => error.with_remedy("modprobe vsock"),
            _ => error,
        }
    })
}
