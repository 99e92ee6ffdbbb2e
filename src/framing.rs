//! Half-close for peers whose sockets have none: the frames of ocaml-hvsock's `flow_shutdown`.
//!
//! Hyper-V sockets of early Windows 10 builds lost data when one direction was shut down, so
//! Docker's programs sent the shutdown inside the stream. Each frame begins with four bytes,
//! little-endian: a length of at most 4096, with so many bytes behind it, or one of three marks.
//! Source of the numbers: `lwt/flow_shutdown.ml` of ocaml-hvsock.

use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use crate::lock::lock;

/// The most bytes of one frame (`maxMsgSize`: newer builds of Windows failed with more).
pub const LARGEST_FRAME: usize = 4096;

/// The sender reads no more.
const SHUTDOWN_READ: u32 = 0xdead_beef;
/// The sender writes no more.
const SHUTDOWN_WRITE: u32 = 0xbeef_dead;
/// The sender has closed.
const CLOSE: u32 = 0xdead_dead;

/// A stream in frames, over any stream that reads and writes through a shared reference, as std's
/// sockets and [`Stream`](crate::Stream) do. It can be used through a shared reference, too: one
/// thread may read while another writes.
///
/// Over a non-blocking stream it is non-blocking: after `WouldBlock`, write the same bytes again.
///
/// ```
/// use std::io::{Read, Write};
/// use std::net::{Shutdown, TcpListener, TcpStream};
///
/// let listener = TcpListener::bind("127.0.0.1:0")?;
/// let client = hvsock::framing::Framed::new(TcpStream::connect(listener.local_addr()?)?);
/// (&client).write_all(b"hi")?;
/// client.shutdown(Shutdown::Write)?;
///
/// let mut wire = [0; 10];
/// listener.accept()?.0.read_exact(&mut wire)?;
/// assert_eq!(wire, [2, 0, 0, 0, b'h', b'i', 0xad, 0xde, 0xef, 0xbe]);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Framed<S> {
    inner: S,
    frames: Frames,
}

/// The state of the frames of one connection. Callers pass the stream below.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    reading: Mutex<FrameReading>,
    writing: Mutex<FrameWriting>,
    /// Nothing can be read any more.
    read_ended: AtomicBool,
    /// Nothing can be written any more: this end has shut down, or the peer reads no more.
    write_ended: AtomicBool,
    peer_closed: AtomicBool,
}

#[derive(Debug, Default)]
struct FrameReading {
    header: [u8; 4],
    /// How much of the header has come.
    have: usize,
    /// How many bytes of the frame are still to come.
    left: usize,
}

#[derive(Debug, Default)]
struct FrameWriting {
    header: [u8; 4],
    /// How much of the header is still to be written.
    header_left: usize,
    /// How many bytes of the frame are still to be written.
    left: usize,
}

impl FrameWriting {
    fn begin(&mut self, header: u32) {
        self.header = header.to_le_bytes();
        self.header_left = self.header.len();
    }

    fn header(&self) -> &[u8] {
        &self.header[self.header.len() - self.header_left..]
    }
}

impl<S> Framed<S> {
    /// Makes a framed stream over `inner`, on which nothing was sent or received yet.
    pub fn new(inner: S) -> Framed<S> {
        Framed {
            inner,
            frames: Frames::default(),
        }
    }

    /// Returns the stream below, to set its timeouts, for example. Bytes read from it or written to
    /// it break the frames.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Returns the stream below as it is.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S> Framed<S>
where
    for<'a> &'a S: Read + Write,
{
    /// Shuts one direction down, or both. After `Shutdown::Write` the peer reads EOF behind the
    /// last byte, and its answer can still be read. A shutdown is sent once.
    ///
    /// # Errors
    /// What the write says; `InvalidInput` if a write said `WouldBlock` and was not repeated, for
    /// its frame is begun.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.frames.shutdown(&mut &self.inner, how)
    }

    /// Closes so that nothing that was written is lost: tells the peer, then reads and discards
    /// until the peer has closed, too. Returns the stream below, to be dropped. Its timeouts bound
    /// the wait.
    ///
    /// # Errors
    /// What the write or the read says; `InvalidInput` as [`shutdown`](Framed::shutdown).
    pub fn close(self) -> io::Result<S> {
        self.frames.close(&mut &self.inner)?;
        let mut rest = [0; LARGEST_FRAME];
        loop {
            match self.frames.discard(&mut &self.inner, &mut rest) {
                Ok(true) => return Ok(self.inner),
                Ok(false) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

impl Frames {
    /// Shuts down as [`Framed::shutdown`] does.
    pub(crate) fn shutdown(&self, inner: &mut impl Write, how: Shutdown) -> io::Result<()> {
        let mut writing = self.between_frames(inner)?;
        let tells = |ended: &AtomicBool| !ended.swap(true, Ordering::AcqRel);
        if how != Shutdown::Read && tells(&self.write_ended) {
            writing.begin(SHUTDOWN_WRITE);
            flush_header(inner, &mut writing)?;
        }
        if how != Shutdown::Write && tells(&self.read_ended) {
            writing.begin(SHUTDOWN_READ);
            flush_header(inner, &mut writing)?;
        }
        Ok(())
    }

    /// Tells the peer that both directions have ended. [`discard`](Frames::discard) until it has
    /// closed.
    pub(crate) fn close(&self, inner: &mut impl Write) -> io::Result<()> {
        let mut writing = self.between_frames(inner)?;
        writing.begin(CLOSE);
        flush_header(inner, &mut writing)
    }

    /// Reads once more and discards. Returns whether the peer has closed, too.
    pub(crate) fn discard(&self, inner: &mut impl Read, rest: &mut [u8]) -> io::Result<bool> {
        if self.peer_closed.load(Ordering::Acquire) {
            return Ok(true);
        }
        // A peer that only reads no more waits for this end's close.
        let ended = matches!(
            self.read_frame(inner, rest)?,
            Some(Frame::Mark(SHUTDOWN_READ)) | None
        );
        Ok(ended || self.peer_closed.load(Ordering::Acquire))
    }

    /// Returns whether the peer has shut its writing side down, and all of it was read.
    #[cfg(feature = "cli")]
    pub(crate) fn has_ended(&self) -> bool {
        self.read_ended.load(Ordering::Acquire)
    }

    /// Locks the writing side between two frames, to write a mark.
    fn between_frames(&self, inner: &mut impl Write) -> io::Result<MutexGuard<'_, FrameWriting>> {
        let mut writing = lock(&self.writing);
        if writing.left > 0 {
            let why = "a frame is begun, and the rest of it wasn't written";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        flush_header(inner, &mut writing)?;
        Ok(writing)
    }

    /// Reads the next bytes or mark; `None` at the EOF of the stream below.
    fn read_frame(&self, inner: &mut impl Read, buffer: &mut [u8]) -> io::Result<Option<Frame>> {
        let mut reading = lock(&self.reading);
        while reading.left == 0 {
            let have = reading.have;
            match inner.read(&mut reading.header[have..])? {
                0 if have == 0 => return Ok(None),
                0 => return Err(broken_off()),
                n => reading.have += n,
            }
            if reading.have < reading.header.len() {
                continue;
            }
            reading.have = 0;
            match u32::from_le_bytes(reading.header) {
                mark @ (SHUTDOWN_READ | SHUTDOWN_WRITE | CLOSE) => {
                    if mark == CLOSE {
                        self.peer_closed.store(true, Ordering::Release);
                    }
                    return Ok(Some(Frame::Mark(mark)));
                }
                len if len as usize <= LARGEST_FRAME => reading.left = len as usize,
                len => {
                    let why = format!(
                        "a frame of {len} bytes where at most {LARGEST_FRAME} are allowed: does the peer speak in frames?"
                    );
                    return Err(io::Error::new(io::ErrorKind::InvalidData, why));
                }
            }
        }
        let most = reading.left.min(buffer.len());
        let n = inner.read(&mut buffer[..most])?;
        if n == 0 {
            return Err(broken_off());
        }
        reading.left -= n;
        Ok(Some(Frame::Data(n)))
    }

    /// Reads as [`Framed`] does.
    pub(crate) fn read(&self, inner: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        while !self.read_ended.load(Ordering::Acquire) {
            match self.read_frame(inner, buffer)? {
                None => return Err(broken_off()),
                Some(Frame::Data(n)) => return Ok(n),
                Some(Frame::Mark(mark)) => {
                    if mark != SHUTDOWN_READ {
                        self.read_ended.store(true, Ordering::Release);
                    }
                    if mark != SHUTDOWN_WRITE {
                        self.write_ended.store(true, Ordering::Release);
                    }
                }
            }
        }
        Ok(0)
    }

    /// Writes as [`Framed`] does.
    pub(crate) fn write(&self, inner: &mut impl Write, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let mut writing = lock(&self.writing);
        if self.write_ended.load(Ordering::Acquire) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if writing.left == 0 {
            writing.left = bytes.len().min(LARGEST_FRAME);
            let len = writing.left as u32;
            writing.begin(len);
        }
        loop {
            let payload = &bytes[..bytes.len().min(writing.left)];
            // In one call: a header alone would be a packet of its own.
            let slices = [IoSlice::new(writing.header()), IoSlice::new(payload)];
            let written = inner.write_vectored(&slices)?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            let header = written.min(writing.header_left);
            writing.header_left -= header;
            writing.left -= written - header;
            if written > header {
                return Ok(written - header);
            }
        }
    }
}

fn flush_header(inner: &mut impl Write, writing: &mut FrameWriting) -> io::Result<()> {
    while writing.header_left > 0 {
        match inner.write(writing.header())? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n => writing.header_left -= n,
        }
    }
    Ok(())
}

#[derive(Debug)]
enum Frame {
    Data(usize),
    Mark(u32),
}

/// Returns the error of a stream that ends without a mark.
fn broken_off() -> io::Error {
    let why = "the peer closed without a shutdown";
    io::Error::new(io::ErrorKind::UnexpectedEof, why)
}

impl<S> Read for &Framed<S>
where
    for<'a> &'a S: Read + Write,
{
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.frames.read(&mut &self.inner, buffer)
    }
}

impl<S> Write for &Framed<S>
where
    for<'a> &'a S: Read + Write,
{
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.frames.write(&mut &self.inner, bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        (&self.inner).flush()
    }
}

impl<S> Read for Framed<S>
where
    for<'a> &'a S: Read + Write,
{
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buffer)
    }
}

impl<S> Write for Framed<S>
where
    for<'a> &'a S: Read + Write,
{
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        (&*self).flush()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
