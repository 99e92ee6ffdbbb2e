//! Listening sockets for tokio.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::task::{Context, Poll};

use ::tokio::io::Interest;
use ::tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use socket2::Socket;

use super::stream::{Stream, refuse_frames};
use crate::address::Address;
use crate::error::{Error, Operation, Result};
use crate::listener::nonblocking::has_client_left;
use crate::name::SocketName;
use crate::sys;

/// A listening socket of any family: see [`crate::Listener`], from which it can be made.
#[derive(Debug)]
pub struct Listener {
    inner: crate::Listener,
    /// The same sockets, as the reactor has them.
    watched: Vec<AsyncFd<Socket>>,
}

impl Listener {
    /// Listens on `address`; a Unix socket is its owner's alone.
    ///
    /// # Errors
    /// Returns the errors of [`crate::Listener::bind_with_mode`]; `Unsupported` for an address in
    /// frames. Also if it is called outside of a runtime with I/O.
    pub fn bind(address: &Address) -> Result<Listener> {
        let fail = |e| Error::new(Operation::Listen, address, e);
        refuse_frames(address.is_framed()).map_err(fail)?;
        Listener::try_from(crate::Listener::bind(address)?).map_err(fail)
    }

    /// Returns the address that it listens on, with the port that the kernel chose if it was to
    /// choose one.
    pub fn address(&self) -> &Address {
        self.inner.address()
    }

    /// Returns the name of the socket, as far as its family has one, with the port that the kernel
    /// chose.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn local_addr(&self) -> io::Result<SocketName> {
        self.inner.local_addr()
    }

    /// Waits for a connection. Nothing is lost if the wait is broken off.
    ///
    /// # Errors
    /// Returns the errors of [`crate::Listener::accept`].
    pub async fn accept(&self) -> Result<(Stream, SocketName)> {
        loop {
            let ready = sys::any_ready(&self.watched, Interest::READABLE).await;
            let mut ready = ready.map_err(|e| self.failed(e))?;
            if let Some(accepted) = self.take(&mut ready) {
                return accepted;
            }
        }
    }

    /// Polls for a connection. Only the task that polled last is woken for the next one.
    ///
    /// # Errors
    /// Returns the errors of [`crate::Listener::accept`].
    pub fn poll_accept(&self, context: &mut Context<'_>) -> Poll<Result<(Stream, SocketName)>> {
        for watched in &self.watched {
            while let Poll::Ready(ready) = watched.poll_read_ready(context) {
                let mut ready = ready.map_err(|e| self.failed(e))?;
                if let Some(accepted) = self.take(&mut ready) {
                    return Poll::Ready(accepted);
                }
            }
        }
        Poll::Pending
    }

    /// Accepts without waiting. Returns `None` if there is no client, or it has left already.
    fn take(
        &self,
        ready: &mut AsyncFdReadyGuard<'_, Socket>,
    ) -> Option<Result<(Stream, SocketName)>> {
        let accepted = match ready.try_io(|_| self.inner.accept_now()) {
            Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted || has_client_left(&e) => {
                return None;
            }
            Ok(accepted) => accepted,
            Err(_would_block) => return None,
        };
        let taken = accepted.and_then(|(stream, name)| Ok((Stream::try_from(stream)?, name)));
        Some(taken.map_err(|e| self.failed(e)))
    }

    fn failed(&self, error: io::Error) -> Error {
        Error::new(Operation::Accept, self.address(), error)
    }
}

/// Takes over a blocking listener, within a runtime with I/O.
impl TryFrom<crate::Listener> for Listener {
    type Error = io::Error;

    fn try_from(inner: crate::Listener) -> io::Result<Listener> {
        refuse_frames(inner.address().is_framed())?;
        let watch = |socket: BorrowedFd<'_>| {
            let socket = Socket::from(socket.try_clone_to_owned()?);
            sys::watch_socket(socket)
        };
        let watched = inner.sockets().into_iter().map(watch);
        Ok(Listener {
            watched: watched.collect::<io::Result<_>>()?,
            inner,
        })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.inner.as_raw_fd()
    }
}
