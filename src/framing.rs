//! Half-close for peers whose sockets have none: the frames of ocaml-hvsock's `flow_shutdown`.
//!
//! Hyper-V sockets of early Windows 10 builds lost data when one direction was shut down, so Docker's programs spoke of
//! it inside the stream. Each frame begins with four bytes, little-endian: a length of at most 4096, with so many bytes
//! behind it, or one of three marks. Source of all numbers: `lwt/flow_shutdown.ml` of ocaml-hvsock.

use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The most bytes of one frame (`maxMsgSize`: newer builds of Windows failed with more).
pub const LARGEST_FRAME: usize = 4096;

/// The sender takes no more.
const SHUTDOWN_READ: u32 = 0xdead_beef;
/// The sender has said all.
const SHUTDOWN_WRITE: u32 = 0xbeef_dead;
/// Both.
const CLOSE: u32 = 0xdead_dead;

/// A stream in frames, over any stream that reads and writes through a shared reference, as std's sockets and
/// [`Stream`](crate::Stream) do. It does so itself: one thread may read while another writes.
///
/// Over a non-blocking stream it is non-blocking: after `WouldBlock` the same bytes are to be offered again.
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
    reading: Mutex<Reading>,
    writing: Mutex<Writing>,
    /// Nothing can be read any more.
    read_ended: AtomicBool,
    /// Nothing can be written any more: we have said all, or the peer takes no more.
    write_ended: AtomicBool,
    peer_closed: AtomicBool,
}

#[derive(Debug, Default)]
struct Reading {
    header: [u8; 4],
    /// How much of the header has come.
    have: usize,
    /// What is still to come of the frame.
    left: usize,
}

#[derive(Debug, Default)]
struct Writing {
    header: [u8; 4],
    /// How much of the header is still to be written.
    header_left: usize,
    /// What the frame begun still wants.
    left: usize,
}

impl Writing {
    fn begin(&mut self, header: u32) {
        self.header = header.to_le_bytes();
        self.header_left = self.header.len();
    }

    fn header(&self) -> &[u8] {
        &self.header[self.header.len() - self.header_left..]
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S> Framed<S> {
    /// Frames over `inner`, with which nothing was done yet.
    pub fn new(inner: S) -> Framed<S> {
        Framed {
            inner,
            reading: Mutex::default(),
            writing: Mutex::default(),
            read_ended: AtomicBool::new(false),
            write_ended: AtomicBool::new(false),
            peer_closed: AtomicBool::new(false),
        }
    }

    /// The stream below, to set its timeouts, for example. Bytes read from it or written to it break the frames.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The stream below, as it is.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S> Framed<S>
where
    for<'a> &'a S: Read + Write,
{
    /// Tells the peer that one direction, or both, have ended. After `Shutdown::Write` it reads EOF behind the last
    /// byte, and its answer can still be read. What was told before is not told again.
    ///
    /// # Errors
    /// What writing says; `InvalidInput` if a write said `WouldBlock` and was not repeated, for its frame is begun.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        let mut writing = self.between_frames()?;
        let tells = |ended: &AtomicBool| !ended.swap(true, Ordering::AcqRel);
        if how != Shutdown::Read && tells(&self.write_ended) {
            writing.begin(SHUTDOWN_WRITE);
            self.flush_header(&mut writing)?;
        }
        if how != Shutdown::Write && tells(&self.read_ended) {
            writing.begin(SHUTDOWN_READ);
            self.flush_header(&mut writing)?;
        }
        Ok(())
    }

    /// Ends the connection so that nothing that was written is lost: says so, then reads and discards until the peer has
    /// closed, too. The stream below can be dropped then. A peer that never does is bounded by that stream's timeouts.
    ///
    /// # Errors
    /// What writing or reading says; `InvalidInput` as [`shutdown`](Framed::shutdown).
    pub fn close(self) -> io::Result<S> {
        {
            let mut writing = self.between_frames()?;
            writing.begin(CLOSE);
            self.flush_header(&mut writing)?;
        }
        let mut rest = [0; LARGEST_FRAME];
        while !self.peer_closed.load(Ordering::Acquire) {
            match self.read_frame(&mut rest) {
                // Who only takes no more waits for our close alone.
                Ok(Some(Frame::Mark(SHUTDOWN_READ)) | None) => break,
                Ok(Some(_)) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(self.inner)
    }

    /// Leave to write something else than data.
    fn between_frames(&self) -> io::Result<MutexGuard<'_, Writing>> {
        let mut writing = lock(&self.writing);
        if writing.left > 0 {
            let why = "a frame is begun, and the rest of it wasn't written";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        self.flush_header(&mut writing)?;
        Ok(writing)
    }

    fn flush_header(&self, writing: &mut Writing) -> io::Result<()> {
        while writing.header_left > 0 {
            match (&self.inner).write(writing.header())? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => writing.header_left -= n,
            }
        }
        Ok(())
    }

    /// The next bytes, or mark; `None` at the end of the stream below.
    fn read_frame(&self, buffer: &mut [u8]) -> io::Result<Option<Frame>> {
        let mut reading = lock(&self.reading);
        while reading.left == 0 {
            let have = reading.have;
            match (&self.inner).read(&mut reading.header[have..])? {
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
        let n = (&self.inner).read(&mut buffer[..most])?;
        if n == 0 {
            return Err(broken_off());
        }
        reading.left -= n;
        Ok(Some(Frame::Data(n)))
    }
}

#[derive(Debug)]
enum Frame {
    Data(usize),
    Mark(u32),
}

/// A peer in order says that it ends.
fn broken_off() -> io::Error {
    let why = "the peer went without a word";
    io::Error::new(io::ErrorKind::UnexpectedEof, why)
}

impl<S> Read for &Framed<S>
where
    for<'a> &'a S: Read + Write,
{
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        while !self.read_ended.load(Ordering::Acquire) {
            match self.read_frame(buffer)? {
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
}

impl<S> Write for &Framed<S>
where
    for<'a> &'a S: Read + Write,
{
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
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
            let written = (&self.inner).write_vectored(&slices)?;
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
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let server = listener.accept().unwrap().0;
        for stream in [&client, &server] {
            let patience = Some(std::time::Duration::from_secs(20));
            stream.set_read_timeout(patience).unwrap();
        }
        (client, server)
    }

    /// Takes and gives one byte at a time, and wants to be asked twice for each.
    #[derive(Debug, Default)]
    struct Slow {
        come: Mutex<Vec<u8>>,
        went: Mutex<Vec<u8>>,
        asked: AtomicUsize,
    }

    impl Slow {
        fn not_yet(&self) -> bool {
            self.asked.fetch_add(1, Ordering::Relaxed).is_multiple_of(2)
        }
    }

    impl Read for &Slow {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let mut come = lock(&self.come);
            match come.first() {
                _ if self.not_yet() => Err(io::ErrorKind::WouldBlock.into()),
                Some(_) => {
                    buffer[0] = come.remove(0);
                    Ok(1)
                }
                None => Ok(0),
            }
        }
    }

    impl Write for &Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.not_yet() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            lock(&self.went).push(bytes[0]);
            Ok(1)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Asks until it says something else than that it would block.
    fn insist<T>(mut ask: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        loop {
            match ask() {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
        }
    }

    fn kind<T: std::fmt::Debug>(result: io::Result<T>) -> io::ErrorKind {
        result.unwrap_err().kind()
    }

    #[test]
    fn the_answer_follows_the_half_close() {
        let (client, server) = pair();
        let (client, server) = (Framed::new(client), Framed::new(server));
        let request: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7) as u8).collect();
        thread::scope(|scope| {
            let serving = scope.spawn(|| {
                let mut all = Vec::new();
                (&server).read_to_end(&mut all).unwrap();
                (&server).write_all(&all).unwrap();
                server.shutdown(Shutdown::Write).unwrap();
                all
            });
            (&client).write_all(&request).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!(kind((&client).write(b"more")), io::ErrorKind::BrokenPipe);
            let mut answer = Vec::new();
            (&client).read_to_end(&mut answer).unwrap();
            assert!(answer == request && serving.join().unwrap() == request);
        });
        // Both may close at once.
        thread::scope(|scope| {
            scope.spawn(|| server.close().unwrap());
            client.close().unwrap();
        });
    }

    #[test]
    fn the_wire_is_as_ocaml_hvsock_has_it() {
        let (client, mut server) = pair();
        let framed = Framed::new(client);
        (&framed).write_all(&[7; 4097]).unwrap();
        framed.shutdown(Shutdown::Both).unwrap();
        framed.shutdown(Shutdown::Both).unwrap();
        assert_eq!((&framed).read(&mut [0]).unwrap(), 0);
        drop(framed);
        let mut wire = Vec::new();
        server.read_to_end(&mut wire).unwrap();
        let expected = [
            &[0, 0x10, 0, 0][..],
            &[7; 4096],
            &[1, 0, 0, 0, 7],
            &[0xad, 0xde, 0xef, 0xbe],
            &[0xef, 0xbe, 0xad, 0xde],
        ];
        assert!(wire == expected.concat());

        let (client, mut server) = pair();
        server.write_all(&[0xad, 0xde, 0xad, 0xde]).unwrap();
        let mut framed = Framed::new(client);
        assert_eq!(framed.read(&mut [0]).unwrap(), 0);
        assert_eq!(kind(framed.write(b"late")), io::ErrorKind::BrokenPipe);
        framed.close().unwrap();
        assert_eq!(server.read(&mut wire).unwrap(), 4);
        assert_eq!(wire[..4], [0xad, 0xde, 0xad, 0xde]);
    }

    #[test]
    fn pieces_of_any_size_will_do() {
        let slow = Slow::default();
        let frames = [
            &[3, 0, 0, 0, 1, 2, 3][..],
            &[0, 0, 0, 0],
            &[1, 0, 0, 0, 4],
            &[0xad, 0xde, 0xef, 0xbe],
        ];
        *lock(&slow.come) = frames.concat();
        let framed = Framed::new(slow);
        let mut read = Vec::new();
        loop {
            let mut buffer = [0; 2];
            match insist(|| (&framed).read(&mut buffer)).unwrap() {
                0 => break,
                n => read.extend_from_slice(&buffer[..n]),
            }
        }
        assert_eq!(read, [1, 2, 3, 4]);
        let mut rest = &b"abc"[..];
        while !rest.is_empty() {
            rest = &rest[insist(|| (&framed).write(rest)).unwrap()..];
        }
        insist(|| framed.shutdown(Shutdown::Write)).unwrap();
        let went = lock(&framed.get_ref().went).clone();
        assert_eq!(went, [3, 0, 0, 0, b'a', b'b', b'c', 0xad, 0xde, 0xef, 0xbe]);
    }

    #[test]
    fn what_breaks_off_is_no_clean_end() {
        for wire in [&[][..], &[3, 0], &[3, 0, 0, 0, 1]] {
            let (client, mut server) = pair();
            server.write_all(wire).unwrap();
            drop(server);
            let read = Framed::new(client).read_to_end(&mut Vec::new());
            assert_eq!(kind(read), io::ErrorKind::UnexpectedEof, "{wire:?}");
        }
        let (client, mut server) = pair();
        server.write_all(b"HTTP").unwrap();
        let read = Framed::new(client).read(&mut [0]);
        assert_eq!(kind(read), io::ErrorKind::InvalidData);
    }
}
