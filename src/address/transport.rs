//! The table of what is true of each family of addresses: one row a family. Code that treats
//! families differently reads it. The methods of [`Address`] beside it return what depends on the
//! options of one address.

use std::borrow::Cow;
#[cfg(all(unix, feature = "cli"))]
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::tcp::{TCP_EXAMPLE, TCP4_EXAMPLE, TCP6_EXAMPLE};
use super::{
    Address, AnyVm, CID_ANY, CID_LOCAL, Host, IpFamily, PORT_ANY, TcpAddress, UnixAddress,
    is_guest_cid,
};
#[cfg(feature = "cli")]
use super::{Port, ServiceId};

/// The kind of socket that carries a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SocketKind {
    /// `AF_INET` and `AF_INET6`.
    Inet,
    /// `AF_UNIX`.
    Unix,
    /// `AF_VSOCK`.
    Vsock,
    /// `AF_HYPERV`.
    Hyperv,
    /// A named pipe of Windows, which is no socket.
    Pipe,
}

/// How a connection is refused if nothing listens at its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The connect, or the handshake behind it, fails.
    Error,
    /// The connect succeeds, and an EOF comes before the first byte.
    Eof(EofRefusal),
}

/// How a refusal by an EOF is distinguished from an empty answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EofRefusal {
    /// How long a refusal may take. A half-close is held back for that time: an EOF that comes
    /// before it is a refusal, one after it is an empty answer.
    pub(crate) wait: Duration,
    /// How many bytes can lie unread on the way to a guest that has not accepted. If more was
    /// delivered, it has accepted.
    pub(crate) unread: u64,
}

impl Refusal {
    /// Returns what is known of a refusal by an EOF, if this is one.
    pub(crate) fn by_eof(self) -> Option<EofRefusal> {
        match self {
            Refusal::Error => None,
            Refusal::Eof(refusal) => Some(refusal),
        }
    }
}

/// What a half-close ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HalfClose {
    /// The direction that it is sent in.
    OneDirection,
    /// Both, since the VMM closes the connection then.
    BothDirections,
    /// One direction, or none: it depends on the connected stream.
    PerStream,
}

/// Which end can close a connection so that the other one reads an error and no EOF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reset {
    EitherEnd,
    /// The end that listened.
    Listener,
    Neither,
}

/// What can wait for a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiter {
    Any,
    /// The poller that had it first.
    Poller,
    /// A thread that blocks.
    Thread,
}

/// How it is known whether a VM runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SeenBy {
    /// By the file of its socket, and by its process where a file names that. The VMM also
    /// completes every connect to the socket at once.
    Files,
    /// By its guest's answers to dials alone.
    Dials,
}

/// What is true of the VMs of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VmTraits {
    /// The VMM crashes on too many connections, on too many dials at once, and on too many that its
    /// guest hasn't answered. Each is bounded, whatever the user configures.
    pub(crate) needs_pacing: bool,
    /// A connection that is closed before its guest has ended it still occupies its slot in the
    /// VMM.
    pub(crate) loses_slots: bool,
    /// A dial of a port on which nothing can listen shows whether the guest has handled all earlier
    /// dials.
    pub(crate) can_be_probed: bool,
    /// A connection that fails may be one of a VM that is gone: Linux resets those, while one that
    /// a guest's program ends brings an EOF.
    pub(crate) resets_when_gone: bool,
    /// Every dial, or the probe that follows it, is answered at once, so dials without an answer
    /// show that the guest or the VMM hangs. Of a VM that is seen by its dials, their timeouts show
    /// it.
    pub(crate) shows_hangs: bool,
    pub(crate) seen_by: SeenBy,
}

/// What is true of every connection of a family.
#[derive(Debug)]
pub(crate) struct Transport {
    /// Its scheme, as it is printed.
    pub(crate) scheme: &'static str,
    /// An example of its addresses.
    pub(crate) example: &'static str,
    pub(crate) socket: SocketKind,
    pub(crate) refusal: Refusal,
    half_close: HalfClose,
    pub(crate) reset: Reset,
    /// The other end is a VMM that can hang or crash when a connection is closed that was not
    /// half-closed and read to its end.
    pub(crate) needs_graceful_close: bool,
    /// What is true of its VMs, if addresses of it lead to VMs.
    pub(crate) vm: VmTraits,
    waiter: Waiter,
    /// The default timeout of a dial; `None`: the one of all families.
    pub(crate) connect_timeout: Option<Duration>,
    /// The default limit of a forward's connections, which also bounds guests; `None`: no limit of
    /// its own.
    pub(crate) connections: Option<usize>,
    /// A connection runs a program. Whoever may add forwards chooses which.
    #[cfg_attr(not(feature = "cli"), allow(dead_code))]
    pub(crate) runs_program: bool,
}

/// The row that the others are based on: each states only its differences.
const ORDINARY: Transport = Transport {
    scheme: "",
    example: "",
    socket: SocketKind::Unix,
    refusal: Refusal::Error,
    half_close: HalfClose::OneDirection,
    reset: Reset::Neither,
    needs_graceful_close: false,
    vm: VmTraits {
        needs_pacing: false,
        loses_slots: false,
        can_be_probed: false,
        resets_when_gone: false,
        shows_hangs: false,
        seen_by: SeenBy::Dials,
    },
    waiter: Waiter::Any,
    connect_timeout: None,
    connections: None,
    runs_program: false,
};

pub(super) const HYPERKIT: Transport = Transport {
    scheme: "hyperkit",
    example: "hyperkit://:80/path/to/state",
    refusal: Refusal::Eof(EofRefusal {
        // hyperkit refuses some 50 µs after the dial.
        wait: Duration::from_millis(10),
        // It requests socket buffers of 256 KiB (`DEFAULT_WRITE_BUF_LENGTH`); kernels double them.
        unread: 1024 * 1024,
    }),
    needs_graceful_close: true,
    vm: VmTraits {
        needs_pacing: true,
        loses_slots: true,
        can_be_probed: true,
        shows_hangs: true,
        seen_by: SeenBy::Files,
        ..ORDINARY.vm
    },
    ..ORDINARY
};

pub(super) const VSOCK: Transport = Transport {
    scheme: "vsock",
    example: "vsock://3:1024",
    socket: SocketKind::Vsock,
    vm: VmTraits {
        resets_when_gone: true,
        ..ORDINARY.vm
    },
    ..ORDINARY
};

pub(super) const HVSOCK: Transport = Transport {
    scheme: "hvsock",
    example: "hvsock://parent/1024",
    socket: SocketKind::Hyperv,
    // Its sockets are reported not to work with `select`.
    waiter: match cfg!(windows) {
        true => Waiter::Thread,
        false => Waiter::Any,
    },
    // A connect may wait for ever though its server listens by now; a VM that is up answers at
    // once.
    connect_timeout: Some(Duration::from_secs(1)),
    ..ORDINARY
};

/// Firecracker, and VMMs with the same protocol. `engine/connection/relaying.rs` decides which
/// half-closes are held back, and until when.
pub(super) const VSOCK_MUX: Transport = Transport {
    scheme: "vsock-mux",
    example: "vsock-mux://:1024/run/vm.sock",
    half_close: HalfClose::BothDirections,
    needs_graceful_close: true,
    vm: VmTraits {
        shows_hangs: true,
        seen_by: SeenBy::Files,
        ..ORDINARY.vm
    },
    ..ORDINARY
};

pub(super) const UNIX: Transport = Transport {
    scheme: "unix",
    example: "unix:///run/service.sock",
    ..ORDINARY
};

const NPIPE: Transport = Transport {
    scheme: "npipe",
    example: "npipe:////./pipe/docker_engine",
    socket: SocketKind::Pipe,
    half_close: HalfClose::PerStream,
    reset: Reset::Listener,
    waiter: Waiter::Poller,
    ..ORDINARY
};

const TCP: Transport = Transport {
    scheme: "tcp",
    example: TCP_EXAMPLE,
    socket: SocketKind::Inet,
    reset: Reset::EitherEnd,
    ..ORDINARY
};

/// TCP over IPv4 alone.
const TCP4: Transport = Transport {
    scheme: "tcp4",
    example: TCP4_EXAMPLE,
    ..TCP
};

/// TCP over IPv6 alone.
const TCP6: Transport = Transport {
    scheme: "tcp6",
    example: TCP6_EXAMPLE,
    ..TCP
};

/// Each connection has a thread (`dial/exec.rs`), reached through a Unix socket.
const EXEC: Transport = Transport {
    scheme: "exec",
    example: "exec:/usr/sbin/sshd?arg=-i",
    connections: Some(64),
    runs_program: true,
    ..ORDINARY
};

/// Each connection has a thread (`dial/content.rs`), reached through a Unix socket.
const FILE: Transport = Transport {
    scheme: "file",
    example: "file:/srv/notice.txt",
    connections: Some(64),
    ..ORDINARY
};

/// Every family's row.
pub(super) const ALL: [&Transport; 11] = [
    &HYPERKIT, &VSOCK, &HVSOCK, &VSOCK_MUX, &UNIX, &NPIPE, &TCP, &TCP4, &TCP6, &EXEC, &FILE,
];

impl Waiter {
    /// Returns what can wait for the sockets of that address. With frames it is a thread: a socket
    /// that is readable may not have a byte of data.
    pub(crate) fn of(address: &Address) -> Waiter {
        match address.is_framed() {
            true => Waiter::Thread,
            false => address.transport().waiter,
        }
    }
}

impl Address {
    /// Returns the row of its family.
    pub(crate) fn transport(&self) -> &'static Transport {
        match self {
            Address::Hyperkit(_) => &HYPERKIT,
            Address::Vsock(_) => &VSOCK,
            Address::Hvsock(_) => &HVSOCK,
            Address::VsockMux(_) => &VSOCK_MUX,
            Address::Unix(_) => &UNIX,
            Address::Npipe(_) => &NPIPE,
            Address::Tcp(tcp) => match tcp.family {
                IpFamily::Either => &TCP,
                IpFamily::V4 => &TCP4,
                IpFamily::V6 => &TCP6,
            },
            Address::Exec(_) => &EXEC,
            Address::File(_) => &FILE,
        }
    }

    /// Returns what a half-close ends there. In some families that is an option of the address.
    pub(crate) fn half_close(&self) -> HalfClose {
        match self {
            Address::VsockMux(mux) if mux.half_close => HalfClose::OneDirection,
            _ => self.transport().half_close,
        }
    }

    /// Returns whether the connection uses frames.
    pub(crate) fn is_framed(&self) -> bool {
        match self {
            Address::Vsock(vsock) => vsock.framing,
            Address::Hvsock(hvsock) => hvsock.framing,
            _ => false,
        }
    }

    /// Returns the file of the Unix socket that is made to listen on it; `None` if there is none.
    pub(crate) fn listen_path(&self) -> Option<Cow<'_, Path>> {
        match self {
            Address::Unix(UnixAddress::Path(path)) => Some(path.into()),
            Address::Hyperkit(hyperkit) => Some(hyperkit.vm.listen_path(hyperkit.port).into()),
            Address::VsockMux(mux) => Some(mux.listen_path().into()),
            _ => None,
        }
    }

    /// Returns the files of the Unix sockets that a connection to it may go to.
    pub(crate) fn connect_paths(&self) -> Vec<PathBuf> {
        match self {
            Address::Unix(UnixAddress::Path(path)) => vec![path.clone()],
            Address::Hyperkit(to) => vec![to.vm.connect_path(), to.vm.forward_path(to.port)],
            Address::VsockMux(to) => vec![to.path.clone()],
            _ => Vec::new(),
        }
    }

    /// Returns whether the kernel is to choose the port to listen on.
    pub(crate) fn leaves_port_to_kernel(&self) -> bool {
        match self {
            Address::Tcp(tcp) => tcp.port == 0,
            Address::Vsock(vsock) => vsock.port == PORT_ANY,
            _ => false,
        }
    }

    /// Returns why nothing can ever be connected to there, and what can be done about it; `None` if
    /// something can.
    pub(crate) fn why_no_target(&self) -> Option<(&'static str, Option<&'static str>)> {
        match self {
            Address::Tcp(tcp) if tcp.port == 0 => Some(("port 0 can't be connected to", None)),
            Address::Tcp(tcp) if tcp.host == Host::Any => Some((
                "* stands for all addresses of this machine, to listen on",
                Some("name one: localhost, an IP address, or another host"),
            )),
            Address::Vsock(vsock) if vsock.cid == CID_ANY => Some((
                "there is no CID to connect to",
                Some("name one, as in vsock://3:1024"),
            )),
            Address::Npipe(pipe) if pipe.sddl.is_some() => Some((
                "sddl says who may connect: it belongs to the address that is listened on",
                None,
            )),
            _ => None,
        }
    }

    /// Returns why nothing can ever listen there, and what can be done about it; `None` if
    /// something can.
    pub(crate) fn why_no_listener(&self) -> Option<(&'static str, &'static str)> {
        let why = match self {
            Address::Exec(_) => "a program is connected to, not listened on",
            Address::File(_) => "a file is connected to, not listened on",
            _ => return None,
        };
        let remedy = "write it behind the address that is listened on";
        Some((why, remedy))
    }

    /// Returns the VM that it leads to, if it is an address of one.
    pub(crate) fn vm(&self) -> Option<AnyVm> {
        match self {
            Address::Hyperkit(to) => Some(AnyVm::Hyperkit(to.vm.clone())),
            Address::VsockMux(to) => Some(AnyVm::VsockMux(to.path.clone())),
            Address::Vsock(to) if to.cid == CID_LOCAL || is_guest_cid(to.cid) => {
                Some(AnyVm::Vsock(to.cid))
            }
            Address::Hvsock(to) if to.vm.is_single() => Some(AnyVm::Hvsock(to.vm.clone())),
            _ => None,
        }
    }

    /// Returns the VM whose guest dials it, if all clients come from one VM. Every guest of a host
    /// dials the same vsock ports; `cid` is the only CID that clients may come from, if there is
    /// one.
    pub(crate) fn dialling_vm(&self, cid: Option<u32>) -> Option<AnyVm> {
        match self {
            Address::Vsock(_) => cid.map(AnyVm::Vsock),
            other => other.vm(),
        }
    }

    /// Returns the hyperkit VM that it leads to, or that dials it.
    #[cfg(feature = "cli")]
    pub(crate) fn hyperkit_vm(&self) -> Option<&super::HyperkitVm> {
        match self {
            Address::Hyperkit(hyperkit) => Some(&hyperkit.vm),
            _ => None,
        }
    }

    /// Returns how many sockets may be needed to listen on it.
    pub(crate) fn listening_sockets(&self) -> usize {
        let ips = self.as_tcp().map(|tcp| tcp.known_ips().len());
        ips.map_or(1, |count| count.max(1))
    }

    /// Returns the TCP address, if it is one.
    pub(crate) fn as_tcp(&self) -> Option<&TcpAddress> {
        match self {
            Address::Tcp(tcp) => Some(tcp),
            _ => None,
        }
    }

    /// Returns whether the kernel connects it to `listen`, a vsock port of this system.
    pub(crate) fn is_loopback_to(&self, listen: &Address) -> bool {
        match (self, listen) {
            (Address::Vsock(target), Address::Vsock(listen)) => {
                target.cid == CID_LOCAL && target.port == listen.port
            }
            _ => false,
        }
    }

    /// Returns the service that has to be in the registry before guests can dial it.
    #[cfg(feature = "cli")]
    pub(crate) fn registered_service(&self) -> Option<ServiceId> {
        match self {
            Address::Hvsock(hvsock) => Some(hvsock.service),
            _ => None,
        }
    }

    /// Returns the file of its Unix socket, unless that is a VMM's.
    #[cfg(all(unix, feature = "cli"))]
    pub(crate) fn unix_path(&self) -> Option<&Path> {
        match self {
            Address::Unix(UnixAddress::Path(path)) => Some(path),
            _ => None,
        }
    }

    /// Returns the address with absolute paths, for a process in another directory.
    ///
    /// # Errors
    /// Returns the system's error if it can't tell the current directory.
    #[cfg(all(unix, feature = "cli"))]
    pub(crate) fn absolute(mut self) -> io::Result<Address> {
        let path = match &mut self {
            Address::Unix(UnixAddress::Path(path)) => path,
            Address::Hyperkit(to) => &mut to.vm.state_dir,
            Address::VsockMux(to) => &mut to.path,
            Address::Exec(to) => &mut to.program,
            Address::File(to) => &mut to.path,
            _ => return Ok(self),
        };
        *path = std::path::absolute(&*path)?;
        Ok(self)
    }

    /// Returns the vsock port, if it is one of a VM.
    #[cfg(feature = "cli")]
    pub(crate) fn guest_port(&self) -> Option<Port> {
        match self {
            Address::Hyperkit(hyperkit) => Some(hyperkit.port),
            Address::Hvsock(hvsock) => hvsock.service.port(),
            _ => None,
        }
    }
}

impl AnyVm {
    /// Returns the row of its family.
    fn transport(&self) -> &'static Transport {
        match self {
            AnyVm::Hyperkit(_) => &HYPERKIT,
            AnyVm::Vsock(_) => &VSOCK,
            AnyVm::VsockMux(_) => &VSOCK_MUX,
            AnyVm::Hvsock(_) => &HVSOCK,
        }
    }

    /// Returns what is true of the VMs of its family.
    pub(crate) fn traits(&self) -> &'static VmTraits {
        &self.transport().vm
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn each_example_is_of_its_family() {
        for row in ALL {
            let address: Address = row.example.parse().unwrap();
            assert_eq!(address.transport().scheme, row.scheme);
            assert_eq!(address.to_string(), row.example);
        }
    }
}
