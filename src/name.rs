//! The names that the kernel has for the ends of a connection.

use std::fmt;
use std::net::SocketAddr;

use socket2::SockAddr;

use crate::address::{Port, ServiceId, VmId};
use crate::sys;

/// What a peer is called of which nothing is known.
pub(crate) const UNNAMED: &str = "a client without a name";

/// The name of an end of a connection, as `getsockname(2)` and `getpeername(2)` return it.
///
/// Some ends have none: a hyperkit guest that dials the host comes over a Unix socket without a
/// name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SocketName {
    /// Of TCP.
    Tcp(SocketAddr),
    /// Of AF_VSOCK.
    Vsock(VsockName),
    /// Of AF_HYPERV.
    Hvsock(HvsockName),
    /// Of a Unix socket, as those of hyperkit and vsock-mux are, or of a named pipe:
    /// [`Address`](crate::Address) says which one.
    Unnamed,
}

impl SocketName {
    /// Returns what a client is called where the same one is to be told of once.
    pub(crate) fn without_port(&self) -> String {
        match self {
            SocketName::Tcp(name) => name.ip().to_canonical().to_string(),
            SocketName::Vsock(name) => format!("CID {}", name.cid),
            other => other.to_string(),
        }
    }
}

/// The process that connected a Unix socket, as the kernel noted it at the connect.
///
/// The socket may have been passed to another process since, and the number may be another
/// process' by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct PeerProcess {
    /// The process' number. `None` where the system doesn't tell: of a process in another PID
    /// namespace (Linux), or of one that closed the socket at once (macOS).
    pub id: Option<u32>,
    /// The number of the user that it ran as.
    pub user: u32,
}

impl PeerProcess {
    /// Returns the name of the program that the process runs now, as far as the system tells: on
    /// Linux its first 15 bytes.
    ///
    /// This may read a file.
    pub fn program(&self) -> Option<String> {
        #[cfg(unix)]
        return sys::program_name(self.id?);
        #[cfg(not(unix))]
        return None;
    }

    /// Returns the name of the program if that is still the process that connected so long ago, and
    /// not a later one of its number. Only Linux tells.
    #[cfg(all(unix, feature = "cli"))]
    pub(crate) fn program_since(&self, time: std::time::Duration) -> Option<String> {
        #[cfg(target_os = "linux")]
        {
            /// What the two clocks may differ by.
            const INEXACT: std::time::Duration = std::time::Duration::from_millis(100);
            let age = sys::process_age(self.id?)?;
            (age + INEXACT >= time).then(|| self.program())?
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = time;
            None
        }
    }
}

/// Writes `pid 123, uid 501`.
impl fmt::Display for PeerProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_with(None, f)
    }
}

impl PeerProcess {
    /// Writes it with the program that it runs, if that is known: `curl (pid 123, uid 501)`.
    pub(crate) fn write_with(
        &self,
        program: Option<&str>,
        f: &mut fmt::Formatter<'_>,
    ) -> fmt::Result {
        let user = self.user;
        match (program, self.id) {
            (Some(program), Some(id)) => write!(f, "{program} (pid {id}, uid {user})"),
            (None, Some(id)) => write!(f, "pid {id}, uid {user}"),
            (_, None) => write!(f, "uid {user}"),
        }
    }
}

/// All that the kernel knows of the peer that was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) name: SocketName,
    pub(crate) process: Option<PeerProcess>,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.name, self.process) {
            (SocketName::Unnamed, Some(process)) => process.fmt(f),
            (name, _) => name.fmt(f),
        }
    }
}

/// An end of an AF_VSOCK connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VsockName {
    /// The CID of its VM, or of the host.
    pub cid: u32,
    /// Its port; of a client mostly one of the kernel's choice.
    pub port: Port,
}

/// An end of an AF_HYPERV connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HvsockName {
    /// The id of its VM, as this partition knows it.
    pub vm: VmId,
    /// Its own service id; of a client mostly one of the system's choice.
    pub service: ServiceId,
}

impl SocketName {
    pub(crate) fn of(address: &SockAddr) -> SocketName {
        if let Some(address) = address.as_socket() {
            return SocketName::Tcp(address);
        }
        #[cfg(unix)]
        if let Some((cid, port)) = sys::vsock_of(address) {
            let port = Port(port);
            return SocketName::Vsock(VsockName { cid, port });
        }
        #[cfg(windows)]
        if let Some((vm, service)) = sys::hv_of(address) {
            return SocketName::Hvsock(HvsockName {
                vm: VmId(vm),
                service: ServiceId(service),
            });
        }
        SocketName::Unnamed
    }
}

impl fmt::Display for SocketName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SocketName::Tcp(address) => write!(f, "tcp://{address}"),
            SocketName::Vsock(name) => name.fmt(f),
            SocketName::Hvsock(name) => name.fmt(f),
            SocketName::Unnamed => f.write_str(UNNAMED),
        }
    }
}

impl fmt::Display for VsockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vsock://{}:{}", self.cid, self.port.0)
    }
}

impl fmt::Display for HvsockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hvsock://{}/{}", self.vm, self.service)
    }
}

#[cfg(all(test, target_os = "linux", feature = "cli"))]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_later_process_is_not_taken_for_the_one_that_connected() {
        let ours = PeerProcess {
            id: Some(std::process::id()),
            user: 0,
        };
        assert_eq!(ours.program_since(Duration::ZERO), ours.program());
        assert!(ours.program().is_some());
        let year = Duration::from_secs(365 * 24 * 60 * 60);
        assert_eq!(ours.program_since(year * 100), None);
    }
}
