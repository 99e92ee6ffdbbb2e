//! Connected streams for tokio.

use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use ::tokio::io::unix::AsyncFd;
use ::tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use ::tokio::time::timeout_at;
use socket2::Socket;

use super::dial;
use crate::address::Address;
use crate::dial::explain;
use crate::error::Result;
use crate::name::SocketName;
use crate::stream::closer;
use crate::stream::closing::{CloseStep, GracefulClose};
use crate::sys;
use crate::thread::start_thread;
use crate::time::after;

/// How long [`Stream::connect`] tries.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// A connected stream of any family.
///
/// `poll_shutdown` is a half-close. Dropping it closes it; but a VM's device can hang or die when a
/// connection is closed that was not read to its EOF, so that a connection with one (`hyperkit://`,
/// `vsock-mux://`) goes on in a task of the runtime, half-closed, until the peer's EOF or for a
/// minute. A runtime that ends ends such tasks: there [`finish`](Stream::finish) first.
#[derive(Debug)]
pub struct Stream {
    socket: AsyncFd<Socket>,
    address: Address,
    /// Nothing more comes: it can be closed.
    ended: AtomicBool,
    takes_descriptors: TakesDescriptors,
}

/// Whether it is a Unix socket over which a peer may pass descriptors.
#[derive(Clone, Copy, Debug)]
struct TakesDescriptors(bool);

impl TakesDescriptors {
    fn of(socket: &Socket) -> TakesDescriptors {
        let is_unix = socket.local_addr().is_ok_and(|name| name.is_unix());
        TakesDescriptors(is_unix && !sys::refuses_descriptors(socket.as_fd()))
    }

    /// Reads, and closes descriptors that came with the bytes on a thread that nothing waits for.
    fn read(self, mut socket: &Socket, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.0 {
            return socket.read(buffer);
        }
        let received = sys::receive(socket.as_fd(), buffer)?;
        closer::close_passed(received.descriptors)?;
        Ok(received.bytes)
    }
}

/// How long a guest may take to end a connection that was dropped.
const DROP_TIMEOUT: Duration = Duration::from_secs(60);

impl Drop for Stream {
    fn drop(&mut self) {
        if self.ended.load(Ordering::Acquire) || !self.address.transport().needs_graceful_close {
            return;
        }
        let address = self.address.clone();
        // Without a descriptor for it there is no graceful close.
        let Ok(socket) = self.socket.get_ref().try_clone() else {
            return;
        };
        let stream = crate::Stream::from_socket(socket, address);
        match ::tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(async move {
                if let Ok(mut stream) = Stream::try_from(stream) {
                    // However it ends, nothing more can be done.
                    let _ = stream.finish(DROP_TIMEOUT).await;
                }
            })),
            Err(_) => {
                // Without a thread it is dropped, which closes it as a blocking stream is closed.
                let finish = move || stream.finish(DROP_TIMEOUT);
                drop(start_thread("hvsock-finish", "to close a stream", finish));
            }
        }
    }
}

impl Stream {
    /// Connects to `address`, within 30 s. Nothing blocks: names are resolved on tokio's blocking
    /// threads, and the handshake of vsock-mux is awaited.
    ///
    /// # Errors
    /// Returns the errors of [`crate::Stream::connect_timeout`]; `Unsupported` for an address in
    /// frames. Also if it is called outside of a runtime with I/O and time.
    pub async fn connect(address: &Address) -> Result<Stream> {
        Stream::connect_timeout(address, CONNECT_TIMEOUT).await
    }

    /// Connects to `address`, within `timeout`, as [`connect`](Stream::connect) does.
    ///
    /// # Errors
    /// Returns the same errors; `TimedOut` if `timeout` has passed.
    pub async fn connect_timeout(address: &Address, timeout: Duration) -> Result<Stream> {
        let fail = |e| explain(address, e);
        refuse_frames(address.is_framed()).map_err(fail)?;
        let connected = dial::connect(address, after(Instant::now(), timeout)).await?;
        let stream = crate::Stream::from_nonblocking(connected, address).map_err(fail)?;
        Stream::try_from(stream).map_err(fail)
    }

    /// Returns the address that was dialled, or that of the listener that accepted it.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Returns the name of this end, as far as its family has one.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn local_addr(&self) -> io::Result<SocketName> {
        let name = self.socket.get_ref().local_addr()?;
        Ok(SocketName::of(&name))
    }

    /// Returns the name of the other end, as far as its family has one.
    ///
    /// # Errors
    /// Returns the kernel's error: that there is no connection any more, for example.
    pub fn peer_addr(&self) -> io::Result<SocketName> {
        let name = self.socket.get_ref().peer_addr()?;
        Ok(SocketName::of(&name))
    }

    /// Ends the connection so that no VM is hurt: half-closes, then reads and discards until the
    /// peer's EOF. What is left to do is to drop it.
    ///
    /// # Errors
    /// Returns `TimedOut` if the peer hasn't ended within `timeout`: then nothing more is taken
    /// from it. What the kernel says of a connection that was broken already.
    pub async fn finish(&mut self, timeout: Duration) -> io::Result<()> {
        let mut close = GracefulClose::new(after(Instant::now(), timeout));
        let mut rest = [0; 16 * 1024];
        let outcome = loop {
            let outcome = match close.next(Instant::now()) {
                CloseStep::ShutdownWrite { .. } => {
                    let _ = self.socket.get_ref().shutdown(Shutdown::Write);
                    None
                }
                CloseStep::Read { until } => {
                    let read = timeout_at(until.into(), self.discard(&mut rest)).await;
                    close.take_read(read.unwrap_or(Err(io::ErrorKind::WouldBlock.into())))
                }
                CloseStep::ShutdownRead => {
                    let _ = self.socket.get_ref().shutdown(Shutdown::Read);
                    None
                }
                CloseStep::ReadUnread => {
                    let socket = self.socket.get_ref();
                    close.take_read(self.takes_descriptors.read(socket, &mut rest))
                }
            };
            if let Some(outcome) = outcome {
                break outcome;
            }
        };
        self.ended.store(true, Ordering::Release);
        outcome.into_result()
    }

    /// Waits for input, and discards some. Returns 0 at the peer's EOF.
    async fn discard(&self, rest: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.socket.readable().await?;
            let takes_descriptors = self.takes_descriptors;
            if let Ok(read) = ready.try_io(|socket| takes_descriptors.read(socket.get_ref(), rest))
            {
                return read;
            }
        }
    }
}

/// Takes over a blocking stream, within a runtime with I/O.
impl TryFrom<crate::Stream> for Stream {
    type Error = io::Error;

    fn try_from(stream: crate::Stream) -> io::Result<Stream> {
        refuse_frames(stream.is_framed())?;
        stream.set_nonblocking(true)?;
        let address = stream.address().clone();
        let socket = stream.into_socket();
        let takes_descriptors = TakesDescriptors::of(&socket);
        let socket = sys::watch_socket(socket)?;
        Ok(Stream {
            socket,
            address,
            ended: AtomicBool::new(false),
            takes_descriptors,
        })
    }
}

/// What the halves of a stream share.
impl Stream {
    pub(super) fn poll_read_shared(
        &self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.socket.poll_read_ready(context))?;
            let takes_descriptors = self.takes_descriptors;
            let read = ready.try_io(|socket| {
                takes_descriptors.read(socket.get_ref(), buffer.initialize_unfilled())
            });
            match read {
                Ok(Ok(n)) => {
                    if n == 0 && buffer.remaining() > 0 {
                        self.ended.store(true, Ordering::Release);
                    }
                    buffer.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(e)) => {
                    self.ended.store(true, Ordering::Release);
                    return Poll::Ready(Err(e));
                }
                Err(_would_block) => {}
            }
        }
    }

    pub(super) fn poll_write_shared(
        &self,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.socket.poll_write_ready(context))?;
            match ready.try_io(|socket| socket.get_ref().write_vectored(slices)) {
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(written) => return Poll::Ready(written),
                Err(_would_block) => {}
            }
        }
    }

    /// Half-closes. A peer that has gone needs none.
    pub(super) fn half_close(&self) -> io::Result<()> {
        match self.socket.get_ref().shutdown(Shutdown::Write) {
            Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(()),
            done => done,
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_read_shared(context, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_shared(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_shared(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.half_close())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// Refuses what is in frames: without them its bytes would be the frames.
pub(super) fn refuse_frames(framed: bool) -> io::Result<()> {
    match framed {
        true => {
            let why = "frames are for the blocking sockets";
            Err(io::Error::new(io::ErrorKind::Unsupported, why))
        }
        false => Ok(()),
    }
}
