//! Listening sockets of one machine, for an event loop: Unix sockets, those that VMMs connect to
//! among them, and AF_VSOCK.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use mio::event::Source;
use mio::unix::SourceFd;
use socket2::{Domain, SockRef, Socket, Type};

use super::defaults::{BACKLOG, FileAccess};
use super::file::{self, SocketFile};
use crate::address::{Address, UnixAddress, VsockAddress};
use crate::dial;
use crate::error::{Error, Operation, Result};
use crate::keeper::{self, Kept, Link, Taken};
use crate::name::SocketName;
use crate::stream::endpoint::not_carried;
use crate::stream::local::{Local, PassedDescriptors};
use crate::sys::{self, AsSocket, BorrowedSocket};

/// Which connections of a Unix listener refuse descriptors that a peer passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DescriptorRefusal {
    /// All: they inherit it from the listener.
    All,
    None,
    /// Those that came after the option was set on the listener: each is asked.
    Some,
}

#[derive(Debug)]
pub(crate) enum LocalListener {
    Unix {
        /// The note that a keeper has a copy of it. It is the first field, and so dropped before
        /// the socket is closed.
        kept: Option<Kept>,
        listener: mio::net::UnixListener,
        file: Option<Arc<SocketFile>>,
        descriptors: DescriptorRefusal,
        /// Whether accepted sockets may have the small buffers that are the system's default.
        small_buffers: bool,
    },
    Vsock(Socket),
}

impl LocalListener {
    pub(super) fn bind(address: &Address, access: FileAccess) -> Result<LocalListener> {
        if let Some(path) = address.listen_path() {
            return bind_path(address, &path, access);
        }
        match address {
            Address::Unix(UnixAddress::Abstract(name)) => bind_abstract(address, name),
            Address::Vsock(vsock) => bind_vsock(address, vsock),
            other => Err(not_carried(Operation::Listen, other)),
        }
    }

    pub(super) fn accept(&self) -> io::Result<(Local, SocketName)> {
        match self {
            LocalListener::Unix {
                listener,
                descriptors,
                small_buffers,
                ..
            } => {
                let accepted = listener.accept().map_err(|e| match e.kind() {
                    // Linux returns this for ever for a listener that was shut down.
                    io::ErrorKind::WouldBlock if sys::is_shut_down(listener.as_socket()) => {
                        shut_down()
                    }
                    _ => e,
                });
                let (stream, _) = accepted?;
                if *small_buffers {
                    sys::make_room(&SockRef::from(&stream));
                }
                let refused = match descriptors {
                    DescriptorRefusal::All => true,
                    DescriptorRefusal::None => false,
                    DescriptorRefusal::Some => sys::refuses_descriptors(stream.as_socket()),
                };
                let stream = Local::from_unix(stream, PassedDescriptors::refused(refused));
                Ok((stream, SocketName::Unnamed))
            }
            LocalListener::Vsock(listener) => {
                // On Linux 6.1 an accept that finds no client sleeps until the next tick, though
                // non-blocking.
                if !sys::has_client(listener.as_socket())? {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                let (socket, address) = listener.accept()?;
                socket.set_nonblocking(true)?;
                let peer = SocketName::of(&address);
                Ok((Local::from_vsock(socket), peer))
            }
        }
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketName> {
        match self {
            LocalListener::Vsock(listener) => {
                listener.local_addr().map(|name| SocketName::of(&name))
            }
            LocalListener::Unix { .. } => Ok(SocketName::Unnamed),
        }
    }

    pub(super) fn bound_name(&self) -> Option<Vec<u8>> {
        match self {
            LocalListener::Unix { listener, .. } => sys::unix_name(&listener.local_addr().ok()?),
            LocalListener::Vsock(_) => None,
        }
    }

    /// Does what [`Listener::adopt`](super::nonblocking::Listener::adopt) says.
    #[cfg(feature = "cli")]
    pub(super) fn adopt(&mut self, adopted: Option<SocketFile>) {
        if let LocalListener::Unix {
            file, descriptors, ..
        } = self
        {
            *file = adopted.map(Arc::new);
            // The option was set before it was bound.
            if *descriptors == DescriptorRefusal::Some {
                *descriptors = DescriptorRefusal::All;
            }
        }
    }

    pub(super) fn file(&self) -> Option<Arc<SocketFile>> {
        match self {
            LocalListener::Unix { file, .. } => file.clone(),
            LocalListener::Vsock(_) => None,
        }
    }

    /// Has a keeper keep a copy of the socket of `address`, whose file is ours.
    pub(super) fn keep(&mut self, keeper: &Link, address: &Address) {
        let (
            Address::Hyperkit(hyperkit),
            LocalListener::Unix {
                kept,
                listener,
                file,
                ..
            },
        ) = (address, self)
        else {
            return;
        };
        // The process that has passed the socket has it still, and keeps the port.
        let Some(file) = file.as_ref().filter(|file| !file.is_left()) else {
            return;
        };
        let absolute = |path: &Path| std::path::absolute(path);
        if let (Ok(path), Ok(connect)) =
            (absolute(file.path()), absolute(&hyperkit.vm.connect_path()))
        {
            let port = keeper::GuestPort {
                port: hyperkit.port.0,
                path,
                identity: file.identity(),
                connect,
            };
            *kept = keeper.keep_listener(listener.as_socket(), port);
        }
    }

    /// Returns whether it was given to a keeper.
    pub(super) fn is_kept(&self) -> bool {
        matches!(self, LocalListener::Unix { kept: Some(_), .. })
    }

    /// Has the keeper close its copy, since another process has the socket and its file now.
    #[cfg(feature = "cli")]
    pub(super) fn forget(&mut self) {
        if let LocalListener::Unix { kept, .. } = self
            && let Some(kept) = kept.take()
        {
            kept.forget();
        }
    }

    /// Leaves the socket's file to the keeper, if that has a copy of the socket: it accepts there
    /// once this listener is dropped, and removes the file in the end.
    pub(super) fn leave_file(&self) {
        if let LocalListener::Unix {
            kept: Some(kept),
            file: Some(file),
            ..
        } = self
            && kept.is_guarded()
        {
            file.leave();
        }
    }

    /// Calls `f` with the source that mio registers.
    pub(super) fn with_source<T>(&mut self, f: impl FnOnce(&mut dyn Source) -> T) -> T {
        match self {
            LocalListener::Unix { listener, .. } => f(listener),
            LocalListener::Vsock(socket) => f(&mut SourceFd(&socket.as_raw_fd())),
        }
    }
}

impl AsSocket for LocalListener {
    fn as_socket(&self) -> BorrowedSocket<'_> {
        match self {
            LocalListener::Unix { listener, .. } => listener.as_socket(),
            LocalListener::Vsock(socket) => socket.as_socket(),
        }
    }
}

/// Returns the error that an accept of TCP gives for a listener that was shut down.
fn shut_down() -> io::Error {
    io::Error::from_raw_os_error(nix::libc::EINVAL)
}

fn bind_vsock(address: &Address, vsock: &VsockAddress) -> Result<LocalListener> {
    let listener = sys::vsock_listen(vsock.cid, vsock.port.0, BACKLOG, vsock.buffer_size);
    listener.map(LocalListener::Vsock).map_err(|e| {
        let remedy = match e.kind() {
            io::ErrorKind::AddrInUse => "another program listens there: choose another port",
            io::ErrorKind::PermissionDenied => "ports below 1024 need rights: choose a higher one",
            io::ErrorKind::AddrNotAvailable => {
                let remedy = match sys::local_cid() {
                    Ok(cid) => format!("this system has CID {cid}: leave the CID out"),
                    Err(_) => "that CID is not this system's: leave it out".to_owned(),
                };
                return Error::new(Operation::Listen, address, e).with_remedy(remedy);
            }
            _ => return dial::explain_vsock(Operation::Listen, address, e),
        };
        Error::new(Operation::Listen, address, e).with_remedy(remedy)
    })
}

fn bind_path(address: &Address, path: &Path, access: FileAccess) -> Result<LocalListener> {
    match file::bind(address, path, Type::STREAM, access) {
        Ok((socket, file)) => {
            let listener = listen(socket, || Ok(Some(file)));
            listener.map_err(|e| Error::new(Operation::Listen, address, e))
        }
        // A keeper may serve the path, for a proxy that has ended.
        Err(e) if e.kind() == io::ErrorKind::AddrInUse && is_guest_port(address) => {
            match Taken::take(path) {
                Some(taken) => succeed(address, path, access, taken),
                None => Err(e),
            }
        }
        Err(e) => Err(e),
    }
}

/// Returns whether it is a port of the host that a hyperkit guest dials.
fn is_guest_port(address: &Address) -> bool {
    matches!(address, Address::Hyperkit(_))
}

/// Binds a path at which a keeper serves. The new socket listens before it gets that name, so that
/// no guest ever finds a port on which nobody listens.
fn succeed(
    address: &Address,
    path: &Path,
    access: FileAccess,
    taken: Taken,
) -> Result<LocalListener> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let private = path.with_file_name(format!("hvs.{}.{number}", std::process::id()));
    let (socket, file) = file::bind(address, &private, Type::STREAM, access)?;
    let listener = listen(socket, || file.rename(path).map(Some));
    let listener = listener.map_err(|e| Error::new(Operation::Listen, address, e))?;
    taken.release();
    Ok(listener)
}

fn bind_abstract(address: &Address, name: &[u8]) -> Result<LocalListener> {
    let bind = || {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        sys::refuse_descriptors(&socket);
        socket.bind(&sys::abstract_address(name)?)?;
        listen(socket, || Ok(None))
    };
    bind().map_err(|e| Error::new(Operation::Listen, address, e))
}

/// Begins to listen. `file` is called once clients can connect, and returns the socket's file.
fn listen(
    socket: Socket,
    file: impl FnOnce() -> io::Result<Option<SocketFile>>,
) -> io::Result<LocalListener> {
    let small_buffers = sys::make_room(&SockRef::from(&socket));
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    let file = file()?;
    let descriptors = match sys::refuses_descriptors(socket.as_socket()) {
        true => DescriptorRefusal::All,
        false => DescriptorRefusal::None,
    };
    Ok(LocalListener::Unix {
        kept: None,
        listener: mio::net::UnixListener::from_std(socket.into()),
        file: file.map(Arc::new),
        descriptors,
        small_buffers,
    })
}
