//! The inside of a blocking stream on Windows: a socket or a pipe, with the calls of a socket.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::os::windows::io::OwnedHandle;
use std::sync::Arc;
use std::time::Duration;

use socket2::Socket;

use super::blocking_pipe::BlockingPipe;
use crate::name::SocketName;
#[cfg(feature = "cli")]
use crate::sys::Wanted;
use crate::sys::{self, AsSocket, PipeKind};

#[derive(Debug)]
pub(super) enum Inner {
    Socket(Socket),
    Pipe(Arc<BlockingPipe>),
}

impl Inner {
    /// Takes over a pipe, unless an event loop has it.
    pub(super) fn from_pipe(free: Option<(OwnedHandle, PipeKind)>) -> io::Result<Inner> {
        match free {
            Some((pipe, kind)) => Ok(Inner::Pipe(Arc::new(BlockingPipe::new(pipe, kind)?))),
            None => Err(io::Error::other("the pipe is an event loop's")),
        }
    }

    pub(super) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match self {
            Inner::Socket(socket) => socket.shutdown(how),
            Inner::Pipe(pipe) => pipe.shutdown(how),
        }
    }

    pub(super) fn try_clone(&self) -> io::Result<Inner> {
        Ok(match self {
            Inner::Socket(socket) => Inner::Socket(socket.try_clone()?),
            Inner::Pipe(pipe) => Inner::Pipe(Arc::clone(pipe)),
        })
    }

    pub(super) fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        match self {
            Inner::Socket(socket) => socket.set_nonblocking(nonblocking),
            Inner::Pipe(pipe) => {
                pipe.set_nonblocking(nonblocking);
                Ok(())
            }
        }
    }

    pub(super) fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Inner::Socket(socket) => socket.set_read_timeout(timeout),
            Inner::Pipe(pipe) => {
                pipe.set_read_timeout(timeout);
                Ok(())
            }
        }
    }

    pub(super) fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Inner::Socket(socket) => socket.set_write_timeout(timeout),
            Inner::Pipe(pipe) => {
                pipe.set_write_timeout(timeout);
                Ok(())
            }
        }
    }

    /// Peeks. For a pipe the result only tells an EOF from bytes, not which bytes.
    #[cfg(feature = "cli")]
    pub(super) fn peek(&self, buffer: &mut [std::mem::MaybeUninit<u8>]) -> io::Result<usize> {
        match self {
            Inner::Socket(socket) => socket.peek(buffer),
            Inner::Pipe(pipe) => match pipe.has_ended() {
                Some(ended) => Ok(usize::from(!ended)),
                None => Err(io::ErrorKind::WouldBlock.into()),
            },
        }
    }

    /// Sets what a close does with unsent bytes. A pipe knows zero only, which cuts a client off at
    /// once.
    pub(super) fn set_linger(&self, time: Option<Duration>) -> io::Result<()> {
        match self {
            Inner::Socket(socket) => socket.set_linger(time),
            Inner::Pipe(pipe) => {
                if time == Some(Duration::ZERO) {
                    pipe.reset();
                }
                Ok(())
            }
        }
    }

    #[cfg(feature = "cli")]
    pub(super) fn wait(&self, wanted: Wanted, timeout: Duration) -> io::Result<bool> {
        match self {
            Inner::Socket(socket) => sys::wait(socket.as_socket(), wanted, timeout),
            Inner::Pipe(pipe) => pipe.wait(wanted, timeout),
        }
    }

    #[cfg(feature = "cli")]
    pub(super) fn is_hung_up(&self) -> bool {
        match self {
            Inner::Socket(socket) => sys::is_hung_up(socket.as_socket()),
            Inner::Pipe(pipe) => pipe.is_hung_up(),
        }
    }

    #[cfg(feature = "cli")]
    pub(super) fn has_half_close(&self) -> bool {
        match self {
            Inner::Socket(_) => true,
            Inner::Pipe(pipe) => pipe.has_half_close(),
        }
    }
}

impl Inner {
    pub(super) fn local_addr(&self) -> io::Result<SocketName> {
        match self {
            Inner::Socket(socket) => socket.local_addr().map(|name| SocketName::of(&name)),
            Inner::Pipe(_) => Ok(SocketName::Unnamed),
        }
    }

    pub(super) fn peer_addr(&self) -> io::Result<SocketName> {
        match self {
            Inner::Socket(socket) => socket.peer_addr().map(|name| SocketName::of(&name)),
            Inner::Pipe(_) => Ok(SocketName::Unnamed),
        }
    }

    /// Returns the pending error. A pipe has none.
    pub(super) fn take_error(&self) -> io::Result<Option<io::Error>> {
        match self {
            Inner::Socket(socket) => socket.take_error(),
            Inner::Pipe(_) => Ok(None),
        }
    }

    pub(super) fn read_timeout(&self) -> io::Result<Option<Duration>> {
        match self {
            Inner::Socket(socket) => socket.read_timeout(),
            Inner::Pipe(pipe) => Ok(pipe.read_timeout()),
        }
    }

    pub(super) fn write_timeout(&self) -> io::Result<Option<Duration>> {
        match self {
            Inner::Socket(socket) => socket.write_timeout(),
            Inner::Pipe(pipe) => Ok(pipe.write_timeout()),
        }
    }

    /// Ends the calls in which other threads wait, where a shutdown affects only later calls.
    pub(super) fn cancel(&self) {
        if let Inner::Socket(socket) = self {
            sys::cancel(socket.as_socket());
        }
    }
}

impl Read for &Inner {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Inner::Socket(socket) => (&*socket).read(buffer),
            Inner::Pipe(pipe) => pipe.read(buffer),
        }
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match self {
            Inner::Socket(socket) => (&*socket).read_vectored(buffers),
            Inner::Pipe(pipe) => match buffers.iter_mut().find(|buffer| !buffer.is_empty()) {
                Some(buffer) => pipe.read(buffer),
                None => Ok(0),
            },
        }
    }
}

impl Write for &Inner {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Inner::Socket(socket) => (&*socket).write(bytes),
            Inner::Pipe(pipe) => pipe.write(bytes),
        }
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Inner::Socket(socket) => (&*socket).write_vectored(buffers),
            Inner::Pipe(pipe) => match buffers.iter().find(|buffer| !buffer.is_empty()) {
                Some(bytes) => pipe.write(bytes),
                None => Ok(0),
            },
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
