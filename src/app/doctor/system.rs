//! Checks this system, independent of any VM.

use super::check::Check;
use crate::error::counted;
use crate::proxy::{Limits, ProcessDescriptors};
use crate::sys;

/// Checks whether a proxy has descriptors for as many connections as one VM can have.
pub(super) fn check_descriptors() -> Check {
    let name = "descriptors";
    // The proxy raises the limit at its start, too.
    #[cfg(unix)]
    let _ = sys::raise_descriptor_limit();
    let Some(limit) = sys::descriptor_limit() else {
        return Check::ok(name, "not limited");
    };
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let room = ProcessDescriptors::new(workers, 0, sys::descriptor_limit).connection_room(1);
    let connections = counted(room as u64, "connection");
    let seen = format!("this process may have {limit}: enough for {connections}");
    match room < Limits::default().vm_connections {
        false => Check::ok(name, seen),
        true => Check::warning(
            name,
            seen,
            "raise the hard limit: `ulimit -Hn`, LimitNOFILE= of systemd, HardResourceLimits of launchd",
        ),
    }
}

/// Checks whether AF_VSOCK can be used here, and shows this system's CID.
#[cfg(target_os = "linux")]
pub(super) fn check_vsock() -> Option<Check> {
    use crate::address::{CID_HOST, is_guest_cid};
    let name = "AF_VSOCK";
    Some(match crate::vsock::local_cid() {
        Ok(CID_HOST) => Check::ok(name, format_args!("CID {CID_HOST}, a host's")),
        Ok(cid) if is_guest_cid(cid) => Check::ok(name, format_args!("CID {cid}, a guest's")),
        Ok(_) => Check::warning(
            name,
            "there, but this system is neither guest nor host: it has no CID",
            "modprobe vmw_vsock_virtio_transport in a guest, vhost_vsock on a host",
        ),
        Err(e) => Check::warning(
            name,
            format_args!("not there: {}", e.cause()),
            e.remedy().unwrap_or("may this user open /dev/vsock?"),
        ),
    })
}

#[cfg(not(target_os = "linux"))]
pub(super) fn check_vsock() -> Option<Check> {
    None
}
