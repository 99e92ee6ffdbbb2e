//! Listening sockets for a caller that blocks.

use std::io;
use std::time::{Duration, Instant};

use super::defaults::DEFAULT_MODE;
use super::nonblocking;
use crate::address::{Address, TcpAddress};
use crate::error::{Error, Operation, Result};
use crate::name::SocketName;
use crate::stream::Stream;
use crate::time::after;

/// The wish that a socket was bound for: the name of its rule, and the address that the rule asked
/// for. A port that the kernel chose is known again by it.
#[cfg(unix)]
pub(crate) type Wish = (Option<String>, Address);

/// A listening socket of any family. Dropping it removes the socket's file, if there is one and it
/// is still this listener's.
///
/// ```
/// use hvsock::{Listener, Stream};
///
/// // Or vsock://:1024, unix:///path, …
/// let listener = Listener::bind(&"tcp://127.0.0.1:0".parse()?)?;
/// let client = Stream::connect(listener.address())?;
/// let (stream, peer) = listener.accept()?;
/// assert_eq!(peer, client.local_addr()?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Listener {
    pub(super) inner: nonblocking::Listener,
    pub(super) address: Address,
    /// Whether another process has bound it and may keep it. Closing it here doesn't free its
    /// address then.
    #[cfg(unix)]
    pub(super) is_foreign: bool,
    /// The rule that it was bound for, if another process hands it over.
    #[cfg(unix)]
    pub(super) wish: Option<Wish>,
}

impl Listener {
    /// Listens on `address`: [`bind_with_mode`](Listener::bind_with_mode) with [`DEFAULT_MODE`].
    ///
    /// # Errors
    /// Returns the same errors.
    pub fn bind(address: &Address) -> Result<Listener> {
        Listener::bind_with_mode(address, DEFAULT_MODE)
    }

    /// Listens on `address`; a Unix socket's file has the permissions `mode` before anyone can
    /// connect. A named pipe has none (its address says who may connect), and takes
    /// [`DEFAULT_MODE`] only.
    ///
    /// Listening on a `hyperkit://` or `vsock-mux://` address is taking what the guest dials. A
    /// file in the way is replaced only if it is a socket that no process has.
    ///
    /// # Errors
    /// Returns `AddrInUse` if another socket listens there; `AlreadyExists` if the file in the way
    /// is no socket; `Unsupported` for a family that this system doesn't carry; what the kernel
    /// says otherwise.
    pub fn bind_with_mode(address: &Address, mode: u32) -> Result<Listener> {
        let inner = nonblocking::Listener::bind(address, mode.into())?;
        let address = inner.bound(address);
        Ok(Listener {
            inner,
            address,
            #[cfg(unix)]
            is_foreign: false,
            #[cfg(unix)]
            wish: None,
        })
    }

    /// Returns whether the socket may be meant by another address. No socket is passed here.
    #[cfg(not(unix))]
    pub(crate) fn is_near(&self, _: &Address) -> bool {
        false
    }

    /// Returns another handle of a passed socket. No socket is passed here.
    #[cfg(not(unix))]
    pub(crate) fn share(&self) -> Result<Option<Listener>> {
        Ok(None)
    }

    /// Sets the options that an address asks for. There are none here.
    #[cfg(not(unix))]
    pub(crate) fn prepare(&self, _: &Address) -> Result<()> {
        Ok(())
    }

    /// Returns whether `other` is the socket of the other family of IP for an address that stands
    /// for both.
    pub(crate) fn is_joined_by(&self, address: &Address, other: &Listener) -> bool {
        match (&self.inner, &other.inner) {
            (nonblocking::Listener::Tcp(one), nonblocking::Listener::Tcp(other)) => {
                let is_for_both = |tcp: &TcpAddress| tcp.known_ips().len() > 1;
                address.as_tcp().is_some_and(is_for_both) && one.is_joined_by(other)
            }
            _ => false,
        }
    }

    /// Takes the socket that it [is joined by](Listener::is_joined_by).
    pub(crate) fn join(&mut self, other: Listener) {
        if let (nonblocking::Listener::Tcp(one), nonblocking::Listener::Tcp(other)) =
            (&mut self.inner, other.inner)
        {
            one.join(other);
        }
    }

    /// Returns its sockets: TCP may have one of each family of IP.
    #[cfg(all(unix, any(feature = "tokio", feature = "cli")))]
    pub(crate) fn sockets(&self) -> Vec<crate::sys::BorrowedSocket<'_>> {
        self.inner.sockets()
    }

    /// Returns the event loop's listener in it.
    pub(crate) fn into_nonblocking(self) -> nonblocking::Listener {
        self.inner
    }

    /// Returns the address that it listens on, with the port that the kernel chose if it was to
    /// choose one.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Returns the name of the socket, as far as its family has one, with the port that the kernel
    /// chose.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn local_addr(&self) -> io::Result<SocketName> {
        self.inner.local_addr()
    }

    /// Waits for a connection, for ever.
    ///
    /// # Errors
    /// Returns the kernel's error. That descriptors have run out doesn't end the listener. A
    /// listener that another process has shut down is broken (`InvalidInput`): bind it again.
    pub fn accept(&self) -> Result<(Stream, SocketName)> {
        loop {
            // kevent and poll count in 32 bits.
            if let Some(accepted) = self.accept_timeout(Duration::from_secs(3600))? {
                return Ok(accepted);
            }
        }
    }

    /// Waits for a connection, at most `timeout`; `None` if none has come.
    ///
    /// # Errors
    /// Returns the errors of [`accept`](Listener::accept).
    pub fn accept_timeout(&self, timeout: Duration) -> Result<Option<(Stream, SocketName)>> {
        let deadline = after(Instant::now(), timeout);
        let fail = |e| Error::new(Operation::Accept, &self.address, e);
        loop {
            match self.accept_now() {
                Ok(accepted) => return Ok(Some(accepted)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if nonblocking::has_client_left(&e) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(None);
                    }
                    self.inner.wait(left).map_err(fail)?;
                }
                Err(e) => return Err(fail(e)),
            }
        }
    }

    /// Accepts a connection without waiting; `WouldBlock` if there is none.
    pub(crate) fn accept_now(&self) -> io::Result<(Stream, SocketName)> {
        let (stream, name) = self.inner.accept()?;
        Ok((Stream::from_nonblocking(stream, &self.address)?, name))
    }

    /// Accepts one connection after the other, for ever; [`Stream::peer_addr`] has the names.
    pub fn incoming(&self) -> impl Iterator<Item = Result<Stream>> + '_ {
        std::iter::repeat_with(|| self.accept().map(|(stream, _)| stream))
    }
}

#[cfg(unix)]
impl std::os::fd::AsRawFd for Listener {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(self))
    }
}

/// The descriptor of the first socket, where an address has one of each family of IP (`localhost`,
/// `*`): that of IPv4 if there is one.
#[cfg(unix)]
impl std::os::fd::AsFd for Listener {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        crate::sys::AsSocket::as_socket(&self.inner)
    }
}
