//! Blocking sockets of one family, for programs that use no other: [`vsock`](crate::vsock),
//! [`hyperkit`](crate::hyperkit) and [`hyperv`](crate::hyperv) name them. They are the crate's
//! [`Stream`](crate::Stream) and [`Listener`](crate::Listener), and have their methods, with the
//! family's own address and names. (What is true of each family is a row of the table in
//! `address/transport.rs`.)

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::marker::PhantomData;
use std::ops::Deref;
use std::time::Duration;

use crate::address::{Address, HvsockAddress, HyperkitAddress, VsockAddress};
use crate::error::Result;
use crate::name::{HvsockName, SocketName, VsockName};
use crate::sys::OwnedSocket;

/// The address of a family that has socket types of its own here. Only this crate implements it.
pub trait Family: Clone + fmt::Debug + Into<Address> + sealed::Sealed {
    /// The name of an end of a connection.
    type Name: Copy + fmt::Debug + Eq;

    #[doc(hidden)]
    fn of(address: &Address) -> Option<&Self>;
    #[doc(hidden)]
    fn name(name: SocketName) -> Option<Self::Name>;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::VsockAddress {}
    impl Sealed for super::HvsockAddress {}
    impl Sealed for super::HyperkitAddress {}
}

/// An end of a connection to hyperkit, of which the kernel knows nothing: it is a Unix socket
/// without a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Unnamed;

impl Family for VsockAddress {
    type Name = VsockName;

    fn of(address: &Address) -> Option<&VsockAddress> {
        match address {
            Address::Vsock(vsock) => Some(vsock),
            _ => None,
        }
    }

    fn name(name: SocketName) -> Option<VsockName> {
        match name {
            SocketName::Vsock(name) => Some(name),
            _ => None,
        }
    }
}

impl Family for HvsockAddress {
    type Name = HvsockName;

    fn of(address: &Address) -> Option<&HvsockAddress> {
        match address {
            Address::Hvsock(hvsock) => Some(hvsock),
            _ => None,
        }
    }

    fn name(name: SocketName) -> Option<HvsockName> {
        match name {
            SocketName::Hvsock(name) => Some(name),
            _ => None,
        }
    }
}

impl Family for HyperkitAddress {
    type Name = Unnamed;

    fn of(address: &Address) -> Option<&HyperkitAddress> {
        match address {
            Address::Hyperkit(hyperkit) => Some(hyperkit),
            _ => None,
        }
    }

    fn name(_: SocketName) -> Option<Unnamed> {
        Some(Unnamed)
    }
}

/// Returns the name as one of the family.
fn named<A: Family>(name: SocketName) -> io::Result<A::Name> {
    A::name(name).ok_or_else(|| {
        let why = format!("{name} is of another family");
        io::Error::new(io::ErrorKind::InvalidData, why)
    })
}

/// A connected, blocking stream of one family; see [`crate::Stream`].
pub struct Stream<A>(crate::Stream, PhantomData<fn() -> A>);

impl<A: Family> Stream<A> {
    /// Connects; see [`crate::Stream::connect`].
    ///
    /// # Errors
    /// As there.
    pub fn connect(address: &A) -> Result<Stream<A>> {
        crate::Stream::connect(&address.clone().into()).map(Stream::wrap)
    }

    /// Connects within `timeout`; see [`crate::Stream::connect_timeout`].
    ///
    /// # Errors
    /// As there.
    pub fn connect_timeout(address: &A, timeout: Duration) -> Result<Stream<A>> {
        crate::Stream::connect_timeout(&address.clone().into(), timeout).map(Stream::wrap)
    }

    /// Takes over a connected socket; see [`crate::Stream::from_socket`].
    pub fn from_socket(socket: impl Into<OwnedSocket>, address: A) -> Stream<A> {
        Stream::wrap(crate::Stream::from_socket(socket, address.into()))
    }

    fn wrap(stream: crate::Stream) -> Stream<A> {
        Stream(stream, PhantomData)
    }

    /// Returns the name of this end.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn local_addr(&self) -> io::Result<A::Name> {
        self.0.local_addr().and_then(named::<A>)
    }

    /// Returns the name of the other end.
    ///
    /// # Errors
    /// What the kernel says: that there is no connection any more, for example.
    pub fn peer_addr(&self) -> io::Result<A::Name> {
        self.0.peer_addr().and_then(named::<A>)
    }

    /// Returns another handle of the same connection; see [`crate::Stream::try_clone`].
    ///
    /// # Errors
    /// As there.
    pub fn try_clone(&self) -> io::Result<Stream<A>> {
        self.0.try_clone().map(Stream::wrap)
    }
}

impl<A> Deref for Stream<A> {
    type Target = crate::Stream;

    fn deref(&self) -> &crate::Stream {
        &self.0
    }
}

impl<A> fmt::Debug for Stream<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<A> From<Stream<A>> for crate::Stream {
    fn from(stream: Stream<A>) -> crate::Stream {
        stream.0
    }
}

/// A stream of another family is given back.
impl<A: Family> TryFrom<crate::Stream> for Stream<A> {
    type Error = crate::Stream;

    fn try_from(stream: crate::Stream) -> std::result::Result<Stream<A>, crate::Stream> {
        match A::of(stream.address()) {
            Some(_) => Ok(Stream::wrap(stream)),
            None => Err(stream),
        }
    }
}

impl<A> Read for &Stream<A> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(buffer)
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        (&self.0).read_vectored(buffers)
    }
}

impl<A> Write for &Stream<A> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&self.0).write(bytes)
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        (&self.0).write_vectored(buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<A> Read for Stream<A> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.0.read_vectored(buffers)
    }
}

impl<A> Write for Stream<A> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(unix)]
impl<A> std::os::fd::AsRawFd for Stream<A> {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(unix)]
impl<A> std::os::fd::AsFd for Stream<A> {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A listening socket of one family; see [`crate::Listener`].
pub struct Listener<A>(crate::Listener, PhantomData<fn() -> A>);

impl<A: Family> Listener<A> {
    /// Listens; see [`crate::Listener::bind`].
    ///
    /// # Errors
    /// As there.
    pub fn bind(address: &A) -> Result<Listener<A>> {
        crate::Listener::bind(&address.clone().into()).map(Listener::wrap)
    }

    /// Listens, a Unix socket's file with those permissions; see
    /// [`crate::Listener::bind_with_mode`].
    ///
    /// # Errors
    /// As there.
    pub fn bind_with_mode(address: &A, mode: u32) -> Result<Listener<A>> {
        crate::Listener::bind_with_mode(&address.clone().into(), mode).map(Listener::wrap)
    }

    fn wrap(listener: crate::Listener) -> Listener<A> {
        Listener(listener, PhantomData)
    }

    /// Returns the name of the socket; a chosen port is in it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn local_addr(&self) -> io::Result<A::Name> {
        self.0.local_addr().and_then(named::<A>)
    }

    /// Waits for a connection, for ever. Returns it with its peer's name.
    ///
    /// # Errors
    /// As those of [`crate::Listener::accept`].
    pub fn accept(&self) -> Result<(Stream<A>, A::Name)> {
        self.0.accept().and_then(|accepted| self.accepted(accepted))
    }

    /// Waits for a connection, at most `timeout`; `None` if none has come.
    ///
    /// # Errors
    /// As [`accept`](Listener::accept).
    pub fn accept_timeout(&self, timeout: Duration) -> Result<Option<(Stream<A>, A::Name)>> {
        let accepted = self.0.accept_timeout(timeout)?;
        accepted.map(|accepted| self.accepted(accepted)).transpose()
    }

    /// Accepts one connection after the other, for ever; [`Stream::peer_addr`] has the names.
    pub fn incoming(&self) -> impl Iterator<Item = Result<Stream<A>>> + '_ {
        std::iter::repeat_with(|| self.accept().map(|(stream, _)| stream))
    }

    fn accepted(
        &self,
        (stream, name): (crate::Stream, SocketName),
    ) -> Result<(Stream<A>, A::Name)> {
        use crate::error::{Error, Operation};
        let name = named::<A>(name);
        let name = name.map_err(|e| Error::new(Operation::Accept, self.address(), e))?;
        Ok((Stream::wrap(stream), name))
    }
}

impl<A> Deref for Listener<A> {
    type Target = crate::Listener;

    fn deref(&self) -> &crate::Listener {
        &self.0
    }
}

impl<A> fmt::Debug for Listener<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(unix)]
impl<A> std::os::fd::AsRawFd for Listener<A> {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(unix)]
impl<A> std::os::fd::AsFd for Listener<A> {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}
