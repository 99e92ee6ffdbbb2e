//! The sockets for tokio: with the feature `tokio`, on Unix.
//!
//! hyper takes them in `hyper_util::rt::TokioIo`. A guest may half-close behind its request: a
//! hyper server wants `.half_close(true)`, or it gives such a guest no answer.
//!
//! ```
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # #[cfg(feature = "simulate")] {
//! use hvsock::address::HyperkitAddress;
//! use tokio::io::{AsyncReadExt, AsyncWriteExt};
//! # use hvsock::simulate::{Service, Vm};
//! # let dir = tempfile::tempdir()?;
//! # let vm = Vm::builder(dir.path()).guest(80, Service::Http).start()?;
//! # let state_dir = dir.path();
//!
//! let guest = HyperkitAddress::new(state_dir, 80).into();
//! let mut stream = hvsock::tokio::Stream::connect(&guest).await?;
//! stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
//! let mut answer = Vec::new();
//! stream.read_to_end(&mut answer).await?;
//! assert!(answer.starts_with(b"HTTP/1."));
//! # }
//! # Ok(())
//! # }
//! ```

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use ::tokio::io::unix::AsyncFd;
use ::tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use ::tokio::time::{sleep_until, timeout_at};
use socket2::Socket;

use crate::address::Address;
use crate::dial::{Begun, Dial, Next, explain};
use crate::error::{Error, Operation, Result};
use crate::listener::nonblocking::has_client_left;
use crate::name::SocketName;
use crate::stream::closer;
use crate::stream::closing::{GracefulClose, Step};
use crate::stream::endpoint::{Endpoint, Target, not_carried};
use crate::stream::nonblocking::Stream as Nonblocking;
use crate::sys;
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
    ended: bool,
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
        if self.ended || !self.address.transport().needs_graceful_close {
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
            Err(_) => drop(std::thread::spawn(move || stream.finish(DROP_TIMEOUT))),
        }
    }
}

impl Stream {
    /// Connects to `address`, within 30 s. Nothing blocks: names are resolved on tokio's blocking
    /// threads, and the handshake of vsock-mux is awaited.
    ///
    /// # Errors
    /// As those of [`crate::Stream::connect_timeout`]. Also if it is called outside of a runtime
    /// with I/O and time.
    pub async fn connect(address: &Address) -> Result<Stream> {
        refuse_frames(address.is_framed()).map_err(|e| explain(address, e))?;
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let mut dial = Dial::new(deadline);
        match Target::of(address) {
            Target::Endpoint(endpoint) => dial.add([endpoint]),
            Target::Name { host, port } => {
                let found = ::tokio::net::lookup_host((host, port)).await;
                let found = found.map_err(|e| {
                    Error::new(Operation::Resolve, host, e)
                        .with_remedy("is the name right, and does DNS answer?")
                })?;
                dial.add(found.map(Endpoint::Tcp));
            }
            Target::OnThread => {
                let to = address.clone();
                let dial = move || crate::Stream::connect(&to);
                let stream = ::tokio::task::spawn_blocking(dial).await;
                let stream = stream.map_err(|e| explain(address, io::Error::other(e)))??;
                return Stream::try_from(stream).map_err(|e| explain(address, e));
            }
            Target::NotCarried => return Err(not_carried(Operation::Connect, address)),
        }
        let fail = |e| explain(address, e);
        let connected = connect(&mut dial).await.map_err(fail)?;
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
    /// What the kernel says.
    pub fn local_addr(&self) -> io::Result<SocketName> {
        let name = self.socket.get_ref().local_addr()?;
        Ok(SocketName::of(&name))
    }

    /// Returns the name of the other end, as far as its family has one.
    ///
    /// # Errors
    /// What the kernel says: that there is no connection any more, for example.
    pub fn peer_addr(&self) -> io::Result<SocketName> {
        let name = self.socket.get_ref().peer_addr()?;
        Ok(SocketName::of(&name))
    }

    /// Ends the connection so that no VM is hurt: half-closes, then reads and discards until the
    /// peer's EOF. What is left to do is to drop it.
    ///
    /// # Errors
    /// `TimedOut` if the peer hasn't ended within `timeout`: then nothing more is taken from it.
    /// What the kernel says of a connection that was broken already.
    pub async fn finish(&mut self, timeout: Duration) -> io::Result<()> {
        let mut close = GracefulClose::new(after(Instant::now(), timeout));
        let mut rest = [0; 16 * 1024];
        let outcome = loop {
            let outcome = match close.next(Instant::now()) {
                Step::ShutdownWrite { .. } => {
                    let _ = self.socket.get_ref().shutdown(Shutdown::Write);
                    None
                }
                Step::Read { until } => {
                    let read = timeout_at(until.into(), self.discard(&mut rest)).await;
                    close.take_read(read.unwrap_or(Err(io::ErrorKind::WouldBlock.into())))
                }
                Step::ShutdownRead => {
                    let _ = self.socket.get_ref().shutdown(Shutdown::Read);
                    None
                }
                Step::ReadUnread => {
                    let socket = self.socket.get_ref();
                    close.take_read(self.takes_descriptors.read(socket, &mut rest))
                }
            };
            if let Some(outcome) = outcome {
                break outcome;
            }
        };
        self.ended = true;
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

/// Refuses a stream in frames: without them its bytes would be the frames.
fn refuse_frames(framed: bool) -> io::Result<()> {
    match framed {
        true => {
            let why = "frames are for the blocking sockets";
            Err(io::Error::new(io::ErrorKind::Unsupported, why))
        }
        false => Ok(()),
    }
}

/// Takes over a blocking stream.
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
            ended: false,
            takes_descriptors,
        })
    }
}

/// Tries one endpoint after the other.
async fn connect(dial: &mut Dial) -> io::Result<Nonblocking> {
    loop {
        let error = match attempt(dial).await {
            Ok(stream) => return Ok(stream),
            Err(e) => e,
        };
        match dial.failed(Instant::now(), error) {
            Next::Now => {}
            Next::At(at) => sleep_until(at.into()).await,
            Next::GiveUp(e) => return Err(e),
        }
    }
}

async fn attempt(dial: &mut Dial) -> io::Result<Nonblocking> {
    let Some(endpoint) = dial.endpoint() else {
        let why = "the name has no address";
        return Err(io::Error::new(io::ErrorKind::NotFound, why));
    };
    let mut stream = Nonblocking::connect(endpoint)?;
    if dial.begun(Instant::now()) == Begun::InProgress {
        while !stream.connected()? {
            wait(&stream, Interest::WRITABLE, dial).await?;
        }
    }
    while !dial.shake_hands(&mut stream)? {
        wait(&stream, Interest::READABLE, dial).await?;
    }
    Ok(stream)
}

/// Waits until the stream is ready, at most until the attempt's deadline.
async fn wait(stream: &Nonblocking, interest: Interest, dial: &Dial) -> io::Result<()> {
    let watched = sys::watch_borrowed(stream.as_fd())?;
    let ready = watched.ready(interest);
    match timeout_at(dial.attempt_deadline().into(), ready).await {
        Ok(ready) => ready.map(drop),
        Err(_) => {
            let why = "it hasn't answered in time";
            Err(io::Error::new(io::ErrorKind::TimedOut, why))
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let mut ready = ready!(this.socket.poll_read_ready(context))?;
            let takes_descriptors = this.takes_descriptors;
            let read = ready.try_io(|socket| {
                takes_descriptors.read(socket.get_ref(), buffer.initialize_unfilled())
            });
            match read {
                Ok(Ok(n)) => {
                    this.ended |= n == 0 && buffer.remaining() > 0;
                    buffer.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(e)) => {
                    this.ended = true;
                    return Poll::Ready(Err(e));
                }
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.socket.poll_write_ready(context))?;
            match ready.try_io(|socket| socket.get_ref().write(bytes)) {
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(written) => return Poll::Ready(written),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.socket.get_ref().shutdown(Shutdown::Write) {
            // A peer that has gone needs none.
            Err(e) if e.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            done => Poll::Ready(done),
        }
    }
}

/// A listening socket of any family: see [`crate::Listener`], from which it is made.
#[derive(Debug)]
pub struct Listener(crate::Listener);

impl Listener {
    /// Listens on `address`.
    ///
    /// # Errors
    /// As those of [`crate::Listener::bind_with_mode`].
    pub fn bind(address: &Address) -> Result<Listener> {
        let fail = |e| Error::new(Operation::Listen, address, e);
        refuse_frames(address.is_framed()).map_err(fail)?;
        crate::Listener::bind(address).map(Listener)
    }

    /// Returns the address that it listens on, with the port that the kernel chose if it was to
    /// choose one.
    pub fn address(&self) -> &Address {
        self.0.address()
    }

    /// Waits for a connection.
    ///
    /// # Errors
    /// As those of [`crate::Listener::accept`].
    pub async fn accept(&self) -> Result<(Stream, SocketName)> {
        let fail = |e| Error::new(Operation::Accept, self.address(), e);
        let watched = sys::watch_borrowed(self.0.as_fd()).map_err(fail)?;
        loop {
            let mut ready = watched.readable().await.map_err(fail)?;
            match ready.try_io(|_| self.0.accept_now()) {
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(accepted) => {
                    let (stream, name) = match accepted {
                        Err(e) if has_client_left(&e) => continue,
                        accepted => accepted.map_err(fail)?,
                    };
                    return Ok((Stream::try_from(stream).map_err(fail)?, name));
                }
                Err(_would_block) => {}
            }
        }
    }
}

impl From<crate::Listener> for Listener {
    fn from(listener: crate::Listener) -> Listener {
        Listener(listener)
    }
}
