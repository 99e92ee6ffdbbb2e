//! Connected sockets for a caller that blocks.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[cfg(feature = "cli")]
use crate::address::HalfClose;
#[cfg(all(windows, feature = "cli"))]
use crate::address::Waiter;
use crate::address::{Address, Reset, SocketKind};
use crate::framing::Frames;
use crate::name::SocketName;
#[cfg(feature = "cli")]
use crate::sys::Wanted;
use crate::sys::{self, OwnedSocket};
use crate::time::{NEVER, after};

use super::closing::{CloseOutcome, CloseStep, GracefulClose};
#[cfg(windows)]
use super::inner::Inner;
/// The socket in a stream.
#[cfg(unix)]
use socket2::Socket as Inner;

/// How long a wait sleeps where no event ends it.
#[cfg(all(windows, feature = "cli"))]
const BLIND_PAUSE: Duration = Duration::from_millis(1);

/// A connected, blocking stream of any family.
///
/// [`Stream::connect`] makes one, [`Listener::accept`](crate::Listener::accept) another. It reads
/// and writes as `std::net::TcpStream` does, through a shared reference too, so that two threads
/// can carry its two directions.
///
/// Dropping it closes it. One that leads to a VM over its VMM's Unix socket (`hyperkit://`,
/// `vsock-mux://`) is safe to drop once a read has said EOF, or has failed; in every other case,
/// error paths and `?` included, [`Stream::finish`] it first: hyperkit's device can hang or die
/// when a connection is closed that has not been read to its end. Dropping a named pipe waits, 30 s
/// at most, until the peer has taken what a write with a timeout or a non-blocking write has left
/// under way.
#[derive(Debug)]
pub struct Stream {
    pub(super) socket: Inner,
    address: Address,
    /// The state of its frames, if it speaks in frames; clones share it.
    frames: Option<Arc<Frames>>,
}

impl Stream {
    pub(super) fn new(socket: Inner, address: Address) -> Stream {
        let frames = address.is_framed().then(Arc::default);
        Stream {
            socket,
            address,
            frames,
        }
    }

    /// Takes over a connected, blocking socket.
    #[cfg(windows)]
    pub(crate) fn from_connected(socket: socket2::Socket, address: &Address) -> Stream {
        Stream::new(Inner::Socket(socket), address.clone())
    }

    /// Takes over a connected, blocking socket, such as one of std. `address` gives the stream its
    /// family, and errors name it; neither is checked. (On Windows it is an `OwnedSocket`.)
    pub fn from_socket(socket: impl Into<OwnedSocket>, address: Address) -> Stream {
        let socket = socket2::Socket::from(socket.into());
        #[cfg(windows)]
        let socket = Inner::Socket(socket);
        Stream::new(socket, address)
    }

    /// Returns the name of this end, as far as its family has one.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn local_addr(&self) -> io::Result<SocketName> {
        #[cfg(unix)]
        return self.socket.local_addr().map(|name| SocketName::of(&name));
        #[cfg(windows)]
        self.socket.local_addr()
    }

    /// Returns the name of the other end, as far as its family has one.
    ///
    /// # Errors
    /// Returns the kernel's error: that there is no connection any more, for example. macOS gives
    /// no name (`InvalidInput`) once both directions have ended; elsewhere that takes a reset.
    pub fn peer_addr(&self) -> io::Result<SocketName> {
        #[cfg(unix)]
        return self.socket.peer_addr().map(|name| SocketName::of(&name));
        #[cfg(windows)]
        self.socket.peer_addr()
    }

    /// Returns an error that the kernel has noted and no call has returned yet, and clears it.
    ///
    /// # Errors
    /// Returns the kernel's error, if it doesn't answer.
    pub fn take_error(&self) -> io::Result<Option<io::Error>> {
        self.socket.take_error()
    }

    /// Returns the address that was dialled, or that of the listener that accepted it.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Shuts one direction down, or both. After `Shutdown::Write`, a half-close, the peer reads EOF
    /// behind the last byte, and its answer can still be read.
    ///
    /// # Errors
    /// Returns the kernel's error; `NotConnected` if the peer has reset the connection, and on
    /// macOS also if that direction has ended or a Unix socket's peer has closed; `Unsupported` for
    /// the half-close of a named pipe that its server made of byte type, not of message type: it
    /// has none. Where the stream speaks in frames, what
    /// [`Framed::shutdown`](crate::framing::Framed::shutdown) says.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match &self.frames {
            Some(frames) => frames.shutdown(&mut &self.socket, how),
            None => end(&self.socket, how),
        }
    }

    /// Half-closes. If the peer has gone, that shows at the next read.
    #[cfg(feature = "cli")]
    pub(crate) fn half_close(&self) -> io::Result<()> {
        match self.shutdown(Shutdown::Write) {
            Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(()),
            done => done,
        }
    }

    /// Returns another handle of the same connection: it ends when the last one is dropped.
    ///
    /// # Errors
    /// Returns the kernel's error; mostly that there is no descriptor left.
    pub fn try_clone(&self) -> io::Result<Stream> {
        Ok(Stream {
            socket: self.socket.try_clone()?,
            address: self.address.clone(),
            frames: self.frames.clone(),
        })
    }

    /// Sets whether reads and writes that would wait fail with `WouldBlock`. Clones share it.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.socket.set_nonblocking(nonblocking)
    }

    /// Sets how long a read waits for the first byte; `None`: for ever. A read that has waited so
    /// long fails with `WouldBlock` (Unix) or `TimedOut` (Windows).
    ///
    /// # Errors
    /// Returns `InvalidInput` if it is zero.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        refuse_zero(timeout)?;
        sys::unless_ended(self.socket.set_read_timeout(kernel_timeout(timeout)))
    }

    /// Returns the timeout of [`set_read_timeout`](Stream::set_read_timeout).
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn read_timeout(&self) -> io::Result<Option<Duration>> {
        self.socket.read_timeout()
    }

    /// Returns the timeout of [`set_write_timeout`](Stream::set_write_timeout).
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn write_timeout(&self) -> io::Result<Option<Duration>> {
        self.socket.write_timeout()
    }

    /// Sets how long a write waits for room; `None`: for ever. It fails as
    /// [`set_read_timeout`](Stream::set_read_timeout) says.
    ///
    /// # Errors
    /// Returns `InvalidInput` if it is zero.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        refuse_zero(timeout)?;
        sys::unless_ended(self.socket.set_write_timeout(kernel_timeout(timeout)))
    }

    /// Closes gracefully, so that no VM is hurt: half-closes, then reads and discards until the
    /// peer's EOF. Drop the stream then.
    ///
    /// # Errors
    /// Returns `TimedOut` if the peer hasn't ended within `timeout`: nothing more is read from it
    /// then. What the kernel says of a connection that was broken already.
    pub fn finish(&self, timeout: Duration) -> io::Result<()> {
        self.close_gracefully(timeout).into_result()
    }

    /// Closes gracefully, as [`finish`](Stream::finish) does. Returns how that has ended.
    pub(crate) fn close_gracefully(&self, timeout: Duration) -> CloseOutcome {
        let until = after(Instant::now(), timeout);
        let mut close = GracefulClose::new(until);
        loop {
            if let Some(outcome) = self.go_on_closing(&mut close, until) {
                return outcome;
            }
        }
    }

    /// Goes on with a graceful close. Returns its outcome, or `None` if it has none at `pause_at`.
    pub(crate) fn go_on_closing(
        &self,
        close: &mut GracefulClose,
        pause_at: Instant,
    ) -> Option<CloseOutcome> {
        let mut rest = [0; 16 * 1024];
        loop {
            let now = Instant::now();
            let outcome = match close.next(now) {
                CloseStep::ShutdownWrite { until } => {
                    self.announce_close(until.saturating_duration_since(now));
                    None
                }
                CloseStep::Read { .. } if now >= pause_at => return None,
                CloseStep::Read { until } => {
                    let time = until.min(pause_at).saturating_duration_since(now);
                    close.take_read(self.discard_within(time, &mut rest))
                }
                CloseStep::ShutdownRead => {
                    let _ = self.socket.shutdown(Shutdown::Read);
                    let _ = self.set_nonblocking(true);
                    None
                }
                CloseStep::ReadUnread => close.take_read((&self.socket).read(&mut rest)),
            };
            if outcome.is_some() {
                return outcome;
            }
        }
    }

    /// Half-closes; in frames, tells the peer that both directions have ended. A peer that reads
    /// nothing may have no room for that: it is tried for `time`.
    fn announce_close(&self, time: Duration) {
        let _ = match &self.frames {
            Some(frames) => {
                let _ = self.set_nonblocking(false);
                let _ = self.set_write_timeout(Some(time.max(SHORTEST)));
                frames.close(&mut &self.socket)
            }
            None => self.shutdown(Shutdown::Write),
        };
    }

    /// Waits for input, at most for that time, and discards some. Returns 0 at the peer's end, and
    /// `WouldBlock` if nothing has come.
    fn discard_within(&self, time: Duration, rest: &mut [u8]) -> io::Result<usize> {
        self.set_nonblocking(false)?;
        self.set_read_timeout(Some(time.max(SHORTEST)))?;
        let read = match &self.frames {
            Some(frames) => frames
                .discard(&mut &self.socket, rest)
                .map(|ended| usize::from(!ended)),
            None => (&self.socket).read(rest),
        };
        match read {
            // Windows returns `TimedOut`.
            Err(e) if is_timeout(&e) => Err(io::ErrorKind::WouldBlock.into()),
            read => read,
        }
    }

    /// Waits until a read or a write would not have to, or the stream has failed; false if
    /// `timeout` has passed.
    #[cfg(feature = "cli")]
    pub(crate) fn wait(&self, wanted: Wanted, timeout: Duration) -> io::Result<bool> {
        #[cfg(unix)]
        return sys::wait(sys::AsSocket::as_socket(&self.socket), wanted, timeout);
        #[cfg(windows)]
        match Waiter::of(&self.address) {
            Waiter::Thread => {
                // No event comes, so the caller tries again.
                std::thread::sleep(timeout.min(BLIND_PAUSE));
                Ok(true)
            }
            _ => self.socket.wait(wanted, timeout),
        }
    }

    /// Returns whether the peer has closed both directions, as far as the system knows.
    #[cfg(feature = "cli")]
    pub(crate) fn is_hung_up(&self) -> bool {
        #[cfg(unix)]
        return sys::is_hung_up(sys::AsSocket::as_socket(&self.socket));
        #[cfg(windows)]
        self.socket.is_hung_up()
    }

    /// Returns whether a half-close is possible.
    #[cfg(feature = "cli")]
    pub(crate) fn has_half_close(&self) -> bool {
        #[cfg(unix)]
        return true;
        #[cfg(windows)]
        self.socket.has_half_close()
    }

    /// Returns whether a half-close of ours would end both directions, or there is none.
    #[cfg(feature = "cli")]
    pub(crate) fn half_close_ends_both(&self) -> bool {
        self.address.half_close() == HalfClose::BothDirections || !self.has_half_close()
    }

    /// Returns whether the next read would be an EOF or an error.
    #[cfg(feature = "cli")]
    pub(crate) fn has_ended(&self) -> bool {
        if self
            .frames
            .as_ref()
            .is_some_and(|frames| frames.has_ended())
        {
            return true;
        }
        match self.socket.peek(&mut [std::mem::MaybeUninit::uninit()]) {
            Ok(count) => count == 0,
            Err(e) => !is_timeout(&e),
        }
    }

    /// Returns the stream's socket.
    #[cfg(all(unix, any(feature = "tokio", feature = "cli")))]
    pub(crate) fn into_socket(self) -> socket2::Socket {
        self.socket
    }

    /// Returns how many written bytes the peer hasn't taken yet, as far as the kernel tells (at
    /// least; Linux counts what they occupy): TCP's peer hasn't acknowledged them, a Unix socket's
    /// hasn't read them.
    #[cfg(unix)]
    pub(crate) fn untaken(&self) -> usize {
        sys::unacknowledged(&self.socket)
    }

    /// Returns whether the peer is known to have read all that was written: of a Unix socket the
    /// kernel tells.
    #[cfg(all(unix, feature = "cli"))]
    pub(crate) fn has_been_read(&self) -> bool {
        matches!(self.address, Address::Unix(_)) && self.untaken() == 0
    }

    /// Has the close reset the connection, where the family can, so that the peer doesn't take what
    /// it has received for all. Ends a read that waits.
    pub(crate) fn abort(&self) {
        self.reset_at_close();
        self.interrupt(Shutdown::Read);
    }

    fn reset_at_close(&self) {
        if self.address.transport().reset != Reset::Neither {
            let _ = self.socket.set_linger(Some(Duration::ZERO));
        }
    }

    /// Returns whether there is a connection, as far as the family tells: a reset leaves none, and
    /// an EOF does unless we have half-closed.
    pub(crate) fn has_peer(&self) -> bool {
        let peer = match self.address.transport().socket {
            SocketKind::Inet => self.socket.peer_addr().map(drop),
            _ => Ok(()),
        };
        !matches!(peer, Err(e) if e.kind() == io::ErrorKind::NotConnected || sys::is_ended_error(&e))
    }

    /// Returns whether it speaks in frames. Its peer is then told of the end, and waited for,
    /// before a close.
    pub(crate) fn is_framed(&self) -> bool {
        self.frames.is_some()
    }

    /// Returns how many written bytes a reset would discard before the peer has them.
    pub(crate) fn unacknowledged(&self) -> usize {
        match self.address.transport().socket {
            #[cfg(unix)]
            SocketKind::Inet => self.untaken(),
            // Windows doesn't tell; in the other families the peer has what was written.
            _ => 0,
        }
    }

    /// Shuts `how` down, and ends the calls of other threads that wait for it; on Windows all
    /// calls. Both directions are reset, where the family can: on Linux at once, so that a peer
    /// that reads on never comes to an EOF, elsewhere by the close, as with
    /// [`abort`](Stream::abort). (macOS takes no such option after a shutdown.)
    pub(crate) fn interrupt(&self, how: Shutdown) {
        #[cfg(unix)]
        if how == Shutdown::Both {
            self.reset_at_close();
        }
        #[cfg(target_os = "linux")]
        if how == Shutdown::Both
            && self.address.transport().socket == SocketKind::Inet
            && sys::reset_tcp(&self.socket).is_ok()
        {
            return;
        }
        let _ = end(&self.socket, how);
        // On Windows a shutdown affects only the calls that follow.
        #[cfg(windows)]
        self.socket.cancel();
    }
}

/// Shuts one direction of a socket down, or both. For both it makes two calls: macOS ends neither
/// where one has ended already (`ENOTCONN`).
#[cfg(unix)]
fn end(socket: &Inner, how: Shutdown) -> io::Result<()> {
    if how != Shutdown::Both {
        return socket.shutdown(how);
    }
    let read = socket.shutdown(Shutdown::Read);
    let write = socket.shutdown(Shutdown::Write);
    write.or(read)
}

#[cfg(windows)]
fn end(socket: &Inner, how: Shutdown) -> io::Result<()> {
    socket.shutdown(how)
}

/// The shortest timeout that a kernel can count. It cuts off what is shorter, and takes a zero for
/// "for ever".
const SHORTEST: Duration = match cfg!(windows) {
    true => Duration::from_millis(1),
    false => Duration::from_micros(1),
};

/// Returns a timeout that the kernel can count: `None` for one of more than a century, and none so
/// short that it would last for ever.
fn kernel_timeout(timeout: Option<Duration>) -> Option<Duration> {
    timeout
        .filter(|timeout| *timeout < NEVER)
        .map(|timeout| timeout.max(SHORTEST))
}

/// Refuses a timeout of zero, which the kernel would take for "for ever".
pub(crate) fn refuse_zero(timeout: Option<Duration>) -> io::Result<()> {
    if timeout == Some(Duration::ZERO) {
        let why = "a timeout of zero would never let anything pass";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    Ok(())
}

/// Returns whether a call failed because its timeout has passed.
pub(crate) fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.frames {
            Some(frames) => frames.read(&mut &self.socket, buffer),
            None => (&self.socket).read(buffer),
        }
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        if self.frames.is_none() {
            return (&self.socket).read_vectored(buffers);
        }
        match buffers.iter_mut().find(|buffer| !buffer.is_empty()) {
            Some(buffer) => self.read(buffer),
            None => Ok(0),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &self.frames {
            Some(frames) => frames.write(&mut &self.socket, bytes),
            None => (&self.socket).write(bytes),
        }
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        if self.frames.is_none() {
            return (&self.socket).write_vectored(buffers);
        }
        match buffers.iter().find(|buffer| !buffer.is_empty()) {
            Some(buffer) => self.write(buffer),
            None => Ok(0),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buffer)
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        (&*self).read_vectored(buffers)
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self).write(bytes)
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        (&*self).write_vectored(buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(unix)]
impl From<Stream> for std::os::fd::OwnedFd {
    fn from(stream: Stream) -> std::os::fd::OwnedFd {
        stream.socket.into()
    }
}

#[cfg(unix)]
impl std::os::fd::AsRawFd for Stream {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.socket.as_raw_fd()
    }
}

/// A named pipe is no socket: it is given back.
#[cfg(windows)]
impl TryFrom<Stream> for std::os::windows::io::OwnedSocket {
    type Error = Stream;

    fn try_from(stream: Stream) -> std::result::Result<Self, Stream> {
        match stream.socket {
            Inner::Socket(socket) => Ok(socket.into()),
            Inner::Pipe(_) => Err(stream),
        }
    }
}

#[cfg(unix)]
impl std::os::fd::AsFd for Stream {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_connection_that_is_broken_off_amid_its_bytes_is_reset() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let ours = Stream::from_socket(client, "tcp://127.0.0.1:1".parse().unwrap());
        let mut theirs = listener.accept().unwrap().0;
        theirs
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        ours.set_nonblocking(true).unwrap();
        while (&ours).write(&[7; 64 * 1024]).is_ok() {}
        ours.interrupt(Shutdown::Both);
        ours.abort();
        drop(ours);
        let error = io::copy(&mut theirs, &mut io::sink()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn a_reset_leaves_no_peer_and_an_end_does() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let ours = Stream::from_socket(client, "tcp://127.0.0.1:1".parse().unwrap());
        ours.set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let theirs = listener.accept().unwrap().0;
        theirs.shutdown(Shutdown::Write).unwrap();
        assert_eq!((&ours).read_to_end(&mut Vec::new()).unwrap(), 0);
        assert!(ours.has_peer());
        let theirs = socket2::Socket::from(theirs);
        theirs.set_linger(Some(Duration::ZERO)).unwrap();
        drop((theirs, listener));
        // Until it has come.
        let end = Instant::now() + Duration::from_secs(20);
        while (&ours).write(b"x").is_ok() {
            assert!(Instant::now() < end, "no reset came");
        }
        assert!(!ours.has_peer());
    }
}
