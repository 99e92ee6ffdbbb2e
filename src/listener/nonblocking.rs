//! Listening sockets for an event loop.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use mio::event::Source;
use mio::{Interest, Registry, Token};

use super::defaults::FileAccess;
#[cfg(feature = "cli")]
use super::file::FileState;
use super::file::SocketFile;
use super::local::LocalListener;
use super::tcp::TcpListener;
use crate::address::{Address, VsockAddress};
use crate::error::Result;
#[cfg(unix)]
use crate::keeper::Link;
use crate::name::{SocketName, VsockName};
use crate::stream::nonblocking::Stream;
#[cfg(unix)]
use crate::sys::{self, AsSocket};

/// A listening socket. Dropping it removes the socket's file, if that is still ours.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    Local(LocalListener),
    #[cfg(windows)]
    Hyperv(super::hyperv::HypervListener),
}

impl Listener {
    /// Binds `address` and listens on it. A Unix socket's file gets its owner, group and
    /// permissions before anyone can connect.
    ///
    /// A file in the way is replaced only if it is a socket that no process has.
    ///
    /// # Errors
    /// Returns `AddrInUse` if another socket listens there; `AlreadyExists` if the file in the way
    /// is no socket; what the kernel says otherwise. `Unsupported` for a family that isn't carried.
    pub(crate) fn bind(address: &Address, access: FileAccess) -> Result<Listener> {
        match address {
            Address::Tcp(tcp) => TcpListener::bind(address, tcp).map(Listener::Tcp),
            #[cfg(windows)]
            Address::Hvsock(hvsock) => {
                super::hyperv::HypervListener::bind(address, hvsock).map(Listener::Hyperv)
            }
            other => LocalListener::bind(other, access).map(Listener::Local),
        }
    }

    /// Accepts one connection without waiting, and returns its peer's name. The stream is
    /// non-blocking, where its family has readiness.
    pub(crate) fn accept(&self) -> io::Result<(Stream, SocketName)> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept()?;
                Ok((Stream::Tcp(stream), SocketName::Tcp(peer)))
            }
            Listener::Local(listener) => {
                let (stream, peer) = listener.accept()?;
                let stream = Stream::Local(stream);
                stream.set_options();
                Ok((stream, peer))
            }
            #[cfg(windows)]
            Listener::Hyperv(listener) => {
                let (stream, peer) = listener.accept()?;
                Ok((Stream::Blocking(stream), peer))
            }
        }
    }

    /// Waits until a connection may have come, at most `timeout`.
    pub(super) fn wait(&self, timeout: Duration) -> io::Result<()> {
        match self {
            Listener::Tcp(listener) => listener.wait(timeout),
            #[cfg(unix)]
            Listener::Local(listener) => {
                sys::wait(listener.as_socket(), sys::Wanted::Readable, timeout).map(drop)
            }
            #[cfg(windows)]
            Listener::Local(listener) => listener.wait(timeout),
            #[cfg(windows)]
            Listener::Hyperv(listener) => listener.wait(timeout),
        }
    }

    /// Returns the address that was bound when `asked` was asked for. It has the port that the
    /// kernel chose for TCP port 0 and for vsock's `VMADDR_PORT_ANY`.
    pub(crate) fn bound(&self, asked: &Address) -> Address {
        match (self.local_addr(), asked) {
            (Ok(SocketName::Tcp(bound)), Address::Tcp(tcp)) => Address::Tcp(tcp.bound_at(bound)),
            (Ok(SocketName::Vsock(VsockName { port, .. })), Address::Vsock(vsock)) => {
                Address::Vsock(VsockAddress {
                    port,
                    ..vsock.clone()
                })
            }
            _ => asked.clone(),
        }
    }

    /// Returns what is unusual about its sockets.
    pub(crate) fn note(&self) -> Option<&'static str> {
        match self {
            Listener::Tcp(listener) => listener.note(),
            _ => None,
        }
    }

    /// Returns the name that a Unix socket was bound to, which `getpeername(2)` gives its clients.
    pub(crate) fn bound_name(&self) -> Option<Vec<u8>> {
        match self {
            #[cfg(unix)]
            Listener::Local(listener) => listener.bound_name(),
            _ => None,
        }
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketName> {
        match self {
            Listener::Tcp(listener) => listener.local_addr().map(SocketName::Tcp),
            Listener::Local(listener) => listener.local_addr(),
            #[cfg(windows)]
            Listener::Hyperv(listener) => listener.local_addr(),
        }
    }

    /// Returns the socket's file, if it has one that we made. It is removed when the listener and
    /// all that this has returned are dropped.
    pub(crate) fn file(&self) -> Option<Arc<SocketFile>> {
        match self {
            Listener::Local(listener) => listener.file(),
            _ => None,
        }
    }

    /// Adopts a socket that another hvsock has bound to `address` and hands over with this file, as
    /// if this process had bound it.
    #[cfg(all(unix, feature = "cli"))]
    pub(super) fn adopt(&mut self, address: &Address, file: Option<SocketFile>) {
        match self {
            Listener::Tcp(listener) => listener.adopt(address),
            Listener::Local(listener) => listener.adopt(file),
        }
    }

    /// Returns its sockets: TCP may have one of each family of IP.
    #[cfg(all(unix, any(feature = "cli", feature = "tokio")))]
    pub(crate) fn sockets(&self) -> Vec<sys::BorrowedSocket<'_>> {
        match self {
            Listener::Tcp(listener) => listener.sockets(),
            Listener::Local(listener) => vec![listener.as_socket()],
        }
    }

    /// Has a keeper keep a copy of it, if it is a port of `address` that a hyperkit guest dials.
    #[cfg(unix)]
    pub(crate) fn keep(&mut self, keeper: &Link, address: &Address) {
        if let Listener::Local(listener) = self {
            listener.keep(keeper, address);
        }
    }

    /// Returns whether it was given to a keeper.
    #[cfg(unix)]
    pub(crate) fn is_kept(&self) -> bool {
        matches!(self, Listener::Local(listener) if listener.is_kept())
    }

    /// Has the keeper close its copy, since another process has the socket and its file now.
    #[cfg(all(unix, feature = "cli"))]
    pub(crate) fn forget(&mut self) {
        if let Listener::Local(listener) = self {
            listener.forget();
        }
    }

    /// Leaves the socket's file to the keeper, if that has a copy of it.
    #[cfg(unix)]
    pub(crate) fn leave_file(&self) {
        if let Listener::Local(listener) = self {
            listener.leave_file();
        }
    }

    /// Returns the state of the socket's file.
    #[cfg(feature = "cli")]
    pub(crate) fn file_state(&self) -> FileState {
        self.file().map_or(FileState::Ours, |file| file.state())
    }
}

/// Returns whether an accept error says that the listener is broken: no later accept can succeed,
/// and only binding it again helps.
///
/// A listener that was shut down from outside (`ss -K`, or a `shutdown` by another process that has
/// it) is broken: `EINVAL`, again and again. Linux' `accept(2)` names network errors, `EOPNOTSUPP`
/// among them, that concern one client only. The `InvalidInput` that mio makes of a client that has
/// left (macOS) has no number.
pub(crate) fn is_broken(error: &io::Error) -> bool {
    #[cfg(unix)]
    const BROKEN: [i32; 3] = [nix::libc::EINVAL, nix::libc::EBADF, nix::libc::ENOTSOCK];
    #[cfg(windows)]
    const BROKEN: [i32; 2] = {
        use windows_sys::Win32::Networking::WinSock::{WSAEINVAL, WSAENOTSOCK};
        [WSAEINVAL, WSAENOTSOCK]
    };
    error
        .raw_os_error()
        .is_some_and(|number| BROKEN.contains(&number))
}

/// Returns whether an accept error says that a client has left before it was accepted. The next one
/// may still be there.
///
/// macOS may then give a socket without an address, of which mio makes an `InvalidInput` without a
/// number.
pub(crate) fn has_client_left(error: &io::Error) -> bool {
    match error.kind() {
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset => true,
        io::ErrorKind::InvalidInput => error.raw_os_error().is_none(),
        _ => false,
    }
}

impl Listener {
    /// Has the poller of `registry` report connections under `token`. Where no poller can wait for
    /// the listener, `notify` is called instead.
    pub(crate) fn watch(
        &mut self,
        registry: &Registry,
        token: Token,
        notify: impl Fn() + Send + 'static,
    ) -> io::Result<()> {
        let what = Interest::READABLE;
        // It is not needed where a poller can wait for every listener.
        let _ = &notify;
        match self {
            Listener::Tcp(listener) => listener.register(registry, token, what),
            Listener::Local(listener) => {
                listener.with_source(|source| source.register(registry, token, what))
            }
            #[cfg(windows)]
            Listener::Hyperv(listener) => listener.watch(notify),
        }
    }

    /// Undoes [`watch`](Listener::watch).
    pub(crate) fn unwatch(&mut self, registry: &Registry) -> io::Result<()> {
        match self {
            Listener::Tcp(listener) => listener.deregister(registry),
            Listener::Local(listener) => listener.with_source(|source| source.deregister(registry)),
            // The registration ends with the listener.
            #[cfg(windows)]
            Listener::Hyperv(_) => Ok(()),
        }
    }
}

/// The descriptor of the first socket.
#[cfg(unix)]
impl AsSocket for Listener {
    fn as_socket(&self) -> sys::BorrowedSocket<'_> {
        match self {
            Listener::Tcp(listener) => listener.sockets()[0],
            Listener::Local(listener) => listener.as_socket(),
        }
    }
}
