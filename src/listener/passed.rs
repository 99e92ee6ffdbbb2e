//! Listening sockets that another process has bound, such as those that a service manager passes to
//! what it starts.

use std::ffi::OsStr;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
#[cfg(feature = "cli")]
use std::path::PathBuf;
#[cfg(feature = "cli")]
use std::sync::Arc;

use nix::sys::socket::{getsockopt, sockopt};
use socket2::{SockRef, Socket, Type};

use super::blocking::Listener;
#[cfg(feature = "cli")]
use super::blocking::Wish;
#[cfg(feature = "cli")]
use super::file::SocketFile;
use super::local::{DescriptorRefusal, LocalListener};
use super::nonblocking;
use super::tcp::TcpListener;
use crate::address::{Address, Host, TcpAddress, UnixAddress, VsockAddress};
use crate::error::{Error, Operation, Result};
use crate::sys;
#[cfg(feature = "cli")]
use crate::sys::Identity;

/// Takes over a socket that listens already. The file of a Unix socket is left as it is: it is
/// never removed, made again or given other permissions.
///
/// # Errors
/// Returns `InvalidInput` if it is no stream socket, doesn't listen, or is of a family that isn't
/// carried.
impl TryFrom<OwnedFd> for Listener {
    type Error = Error;

    fn try_from(socket: OwnedFd) -> Result<Listener> {
        let number = socket.as_raw_fd();
        take(socket.into()).map_err(|e| {
            let subject = format_args!("the socket passed as descriptor {number}");
            Error::new(Operation::Listen, subject, e)
                .with_remedy("pass a listening stream socket (ListenStream=, Accept=no in systemd)")
        })
    }
}

fn take(socket: Socket) -> io::Result<Listener> {
    let invalid = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
    let kind = socket.r#type()?;
    if kind != Type::STREAM || !getsockopt(&socket, sockopt::AcceptConn)? {
        return Err(invalid("it doesn't listen for streams"));
    }
    let name = socket.local_addr()?;
    socket.set_nonblocking(true)?;
    let unix = |address, socket: Socket| {
        // Clients may have connected before the option was set.
        let descriptors = match sys::refuse_descriptors(&socket) {
            true => DescriptorRefusal::Some,
            false => DescriptorRefusal::None,
        };
        let small_buffers = sys::make_room(&SockRef::from(&socket));
        let listener = LocalListener::Unix {
            kept: None,
            listener: mio::net::UnixListener::from_std(socket.into()),
            file: None,
            descriptors,
            small_buffers,
        };
        (
            Address::Unix(address),
            nonblocking::Listener::Local(listener),
        )
    };
    let (address, inner) = if let Some(bound) = name.as_socket() {
        let listener = nonblocking::Listener::Tcp(TcpListener::passed(socket));
        (tcp(bound), listener)
    } else if let Some(path) = name.as_pathname() {
        unix(UnixAddress::Path(path.to_owned()), socket)
    } else if let Some(name) = name.as_abstract_namespace() {
        unix(UnixAddress::Abstract(name.to_owned()), socket)
    } else if let Some((cid, port)) = sys::vsock_of(&name) {
        let address = Address::Vsock(VsockAddress::new(cid, port));
        let listener = LocalListener::Vsock(socket);
        (address, nonblocking::Listener::Local(listener))
    } else {
        return Err(invalid(
            "sockets of its family, or without a name, are not carried",
        ));
    };
    Ok(Listener {
        inner,
        address,
        is_foreign: true,
        wish: None,
    })
}

/// The description of a listening socket that another hvsock hands over.
#[cfg(feature = "cli")]
#[derive(Debug)]
pub(crate) struct Handed {
    pub(crate) wish: Option<Wish>,
    /// The address that was bound.
    pub(crate) address: Address,
    /// The file that it made for the socket.
    pub(crate) file: Option<(PathBuf, Identity)>,
    /// Whether a third process has bound the socket, and may keep it.
    pub(crate) is_foreign: bool,
}

#[cfg(feature = "cli")]
impl Listener {
    /// Takes a socket that another hvsock hands over. Its file is that process' until it is owned:
    /// see [`file`](Listener::file).
    ///
    /// # Errors
    /// Returns the errors of `TryFrom<OwnedFd>`.
    pub(crate) fn handed(socket: OwnedFd, handed: Handed) -> Result<Listener> {
        let mut listener = Listener::try_from(socket)?;
        if !handed.is_foreign {
            let file = handed.file.as_ref();
            let file = file.map(|(path, identity)| SocketFile::handed(path, *identity));
            listener.inner.adopt(&handed.address, file);
        }
        Ok(Listener {
            address: handed.address,
            is_foreign: handed.is_foreign,
            wish: handed.wish,
            ..listener
        })
    }

    /// Returns the socket's file, unless another program made it.
    pub(crate) fn file(&self) -> Option<Arc<SocketFile>> {
        self.inner.file()
    }

    pub(crate) fn is_foreign(&self) -> bool {
        self.is_foreign
    }

    /// Returns what the socket was bound for, if that is known.
    pub(crate) fn wish(&self) -> Option<&Wish> {
        self.wish.as_ref()
    }
}

fn tcp(bound: SocketAddr) -> Address {
    Address::Tcp(TcpAddress::new(Host::Ip(bound.ip()), bound.port()))
}

impl Listener {
    /// Returns whether this socket may be meant by `address`, though it listens elsewhere: at that
    /// port of another IP address (systemd's plain `ListenStream=PORT` is one of `[::]`) or CID, or
    /// at another path of that name.
    pub(crate) fn is_near(&self, address: &Address) -> bool {
        match (&self.address, address) {
            (Address::Tcp(bound), Address::Tcp(asked)) => bound.port == asked.port,
            (Address::Vsock(bound), Address::Vsock(asked)) => bound.port == asked.port,
            (Address::Unix(bound), asked) => {
                let name = |path: &Path| path.file_name().map(|name| name.as_bytes().to_vec());
                let last = |unix: &UnixAddress| match unix {
                    UnixAddress::Path(path) => name(path),
                    UnixAddress::Abstract(bytes) => name(Path::new(OsStr::from_bytes(bytes))),
                };
                let asked = match asked {
                    Address::Unix(asked) => last(asked),
                    asked => asked.listen_path().and_then(|path| name(&path)),
                };
                asked.is_some() && asked == last(bound)
            }
            _ => false,
        }
    }

    /// Binds what `address` has besides, as far as it can be had, unless another program has bound
    /// this one: its sockets are taken as they are.
    pub(crate) fn complete(&mut self, address: &Address) {
        if let (false, nonblocking::Listener::Tcp(listener), Some(tcp)) =
            (self.is_foreign, &mut self.inner, address.as_tcp())
        {
            listener.complete(tcp);
        }
    }

    /// Returns another handle of a socket that another process has bound, for a poller that hasn't
    /// this one; `None` for others, which can be bound again.
    ///
    /// # Errors
    /// Returns an error that says that the process can have no more descriptors.
    pub(crate) fn share(&self) -> Result<Option<Listener>> {
        if !self.is_foreign {
            return Ok(None);
        }
        let socket = self.as_fd().try_clone_to_owned();
        let socket = socket.map_err(|e| Error::new(Operation::Listen, &self.address, e))?;
        Listener::try_from(socket).map(Some)
    }

    /// Sets the options that an address asks for.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub(crate) fn prepare(&self, address: &Address) -> Result<()> {
        let (Address::Vsock(vsock), nonblocking::Listener::Local(LocalListener::Vsock(socket))) =
            (address, &self.inner)
        else {
            return Ok(());
        };
        let size = vsock.buffer_size;
        let set = size.map_or(Ok(()), |size| sys::vsock_set_buffer(socket, size));
        set.map_err(|e| Error::new(Operation::Listen, address, e))
    }
}
