//! Clients: a connection over TCP or Unix, and what the polite ones expect of it.

use crate::guest::{self, LONG};
use socket2::SockRef;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn half_close(&self) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Stream::Unix(stream) => stream.shutdown(Shutdown::Write),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Conn {
    stream: Stream,
    place: Place,
    begun: Instant,
    /// Whether a byte has come.
    answered: bool,
}

/// The cause of an error that ended a connection before a byte came: it may never have been
/// accepted.
#[derive(Debug)]
pub(crate) struct Unanswered {
    pub(crate) place: Place,
    /// When its client began to connect.
    pub(crate) begun: Instant,
    error: io::Error,
}

impl fmt::Display for Unanswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Unanswered { place, error, .. } = self;
        write!(f, "{error}, before a byte came from {place:?}")
    }
}

impl std::error::Error for Unanswered {}

/// Connects to a Unix socket. Where a full backlog refuses (macOS), who listens there is asked by a
/// datagram socket, and tried again.
fn connect(path: &Path, begun: Instant) -> io::Result<UnixStream> {
    let listens = || {
        let asked = UnixDatagram::unbound().and_then(|socket| socket.connect(path));
        matches!(asked, Err(error) if error.raw_os_error() == Some(nix::libc::EPROTOTYPE))
    };
    loop {
        match UnixStream::connect(path) {
            Err(error)
                if error.kind() == ErrorKind::ConnectionRefused
                    && listens()
                    && begun.elapsed() < LONG =>
            {
                thread::sleep(Duration::from_millis(1));
            }
            connected => return connected,
        }
    }
}

impl Conn {
    pub(crate) fn open(place: &Place) -> io::Result<Conn> {
        let begun = Instant::now();
        let stream = match place {
            Place::Tcp(address) => TcpStream::connect(address).map(Stream::Tcp),
            Place::Unix(path) => connect(path, begun).map(Stream::Unix),
        };
        let conn = Conn {
            stream: stream.map_err(|error| unanswered(place, begun, error))?,
            place: place.clone(),
            begun,
            answered: false,
        };
        conn.set_timeout(LONG);
        Ok(conn)
    }

    /// Whether a connection was made, if only to be reset so soon that its connect says so.
    pub(crate) fn was_made(outcome: &io::Result<Conn>) -> bool {
        match outcome {
            Ok(_) => true,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        }
    }

    pub(crate) fn set_timeout(&self, time: Duration) {
        let socket = match &self.stream {
            Stream::Tcp(stream) => SockRef::from(stream),
            Stream::Unix(stream) => SockRef::from(stream),
        };
        // (macOS takes none for one that has ended already, where nothing waits.)
        let _ = socket.set_read_timeout(Some(time));
        let _ = socket.set_write_timeout(Some(time));
    }

    pub(crate) fn half_close(&self) -> io::Result<()> {
        self.stream
            .half_close()
            .map_err(|error| self.explain(error))
    }

    /// Vanishes: over TCP the peer reads a reset.
    pub(crate) fn reset(self) {
        if let Stream::Tcp(stream) = &self.stream {
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
        }
    }

    /// A second handle, for what is written while this one reads.
    fn writer(&self) -> io::Result<Stream> {
        Ok(match &self.stream {
            Stream::Tcp(stream) => Stream::Tcp(stream.try_clone()?),
            Stream::Unix(stream) => Stream::Unix(stream.try_clone()?),
        })
    }

    fn explain(&self, error: io::Error) -> io::Error {
        match self.answered {
            true => error,
            false => unanswered(&self.place, self.begun, error),
        }
    }
}

/// An error of the same kind, if it is one that a listener's end gives those who wait there.
fn unanswered(place: &Place, begun: Instant, error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::ConnectionRefused
        | ErrorKind::NotFound
        | ErrorKind::ConnectionReset
        | ErrorKind::BrokenPipe
        | ErrorKind::NotConnected => io::Error::new(
            error.kind(),
            Unanswered {
                place: place.clone(),
                begun,
                error,
            },
        ),
        _ => error,
    }
}

impl Read for Conn {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = match &mut self.stream {
            Stream::Tcp(stream) => stream.read(buffer),
            Stream::Unix(stream) => stream.read(buffer),
        };
        self.answered |= read.as_ref().is_ok_and(|n| *n > 0);
        read.map_err(|error| self.explain(error))
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.write(bytes),
            Stream::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Write for Conn {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.stream.write(bytes);
        written.map_err(|error| self.explain(error))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(crate) fn wrong(text: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, text.into())
}

/// Reads exactly `expected`, at most `piece` bytes at a time and pausing in between.
pub(crate) fn expect(
    conn: &mut Conn,
    expected: &[u8],
    piece: usize,
    pause: Duration,
) -> io::Result<()> {
    let mut buffer = vec![0; piece];
    let mut at = 0;
    while at < expected.len() {
        let most = piece.min(expected.len() - at);
        match conn.read(&mut buffer[..most])? {
            0 => {
                let text = format!("EOF after {at} of {} bytes", expected.len());
                return Err(io::Error::new(ErrorKind::UnexpectedEof, text));
            }
            n if buffer[..n] != expected[at..at + n] => {
                return Err(wrong(format!("wrong bytes at {at}")));
            }
            n => at += n,
        }
        if !pause.is_zero() {
            thread::sleep(pause);
        }
    }
    Ok(())
}

pub(crate) fn expect_end(conn: &mut Conn) -> io::Result<()> {
    match conn.read(&mut [0; 16])? {
        0 => Ok(()),
        n => Err(wrong(format!("{n} bytes too many"))),
    }
}

fn expect_whole(conn: &mut Conn, expected: &[u8]) -> io::Result<()> {
    expect(conn, expected, 64 * 1024, Duration::ZERO)?;
    expect_end(conn)
}

pub(crate) fn echo(conn: &mut Conn, bytes: &[u8], half_close: bool) -> io::Result<()> {
    // What fits into no buffer must be read while it is written.
    if bytes.len() <= 32 * 1024 {
        conn.write_all(bytes)?;
        if half_close {
            conn.half_close()?;
        }
        return finish_echo(conn, bytes, half_close);
    }
    let mut writer = conn.writer()?;
    thread::scope(|scope| {
        let written = scope.spawn(move || {
            writer.write_all(bytes)?;
            if half_close {
                writer.half_close()
            } else {
                Ok(())
            }
        });
        let read = finish_echo(conn, bytes, half_close);
        let written = written.join().expect("the writer doesn't panic");
        match (read, written) {
            // Only one call is told of a reset: what the other reads then looks like an end.
            (Err(end), Err(reset))
                if end.kind() == ErrorKind::UnexpectedEof
                    && reset.kind() == ErrorKind::ConnectionReset =>
            {
                Err(conn.explain(reset))
            }
            (read, written) => read.and(written),
        }
    })
}

fn finish_echo(conn: &mut Conn, bytes: &[u8], half_close: bool) -> io::Result<()> {
    if half_close {
        expect_whole(conn, bytes)
    } else {
        expect(conn, bytes, 64 * 1024, Duration::ZERO)
    }
}

pub(crate) fn download(
    conn: &mut Conn,
    seed: u64,
    length: usize,
    half_close: bool,
) -> io::Result<()> {
    conn.write_all(&guest::request(seed, length))?;
    if half_close {
        conn.half_close()?;
    }
    expect_whole(conn, &guest::pattern(seed, length))
}

/// A download in small pieces.
pub(crate) fn slow_download(conn: &mut Conn, seed: u64, length: usize) -> io::Result<()> {
    conn.write_all(&guest::request(seed, length))?;
    let expected = guest::pattern(seed, length);
    expect(conn, &expected, 4096, Duration::from_millis(3))?;
    expect_end(conn)
}

pub(crate) fn upload(conn: &mut Conn, bytes: &[u8]) -> io::Result<()> {
    conn.write_all(bytes)?;
    conn.half_close()?;
    expect_whole(conn, &guest::count_answer(bytes))
}

pub(crate) fn discard(conn: &mut Conn, bytes: &[u8]) -> io::Result<()> {
    conn.write_all(bytes)?;
    conn.half_close()?;
    expect_end(conn)
}

pub(crate) fn http(conn: &mut Conn, length: usize) -> io::Result<()> {
    write!(
        conn,
        "GET /bytes/{length} HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    conn.read_to_end(&mut answer)?;
    let head = answer.windows(4).position(|four| four == b"\r\n\r\n");
    let Some(head) = head else {
        let text = format!("EOF after {} bytes of head", answer.len());
        return Err(io::Error::new(ErrorKind::UnexpectedEof, text));
    };
    let (head, body) = answer.split_at(head + 4);
    if !head.starts_with(b"HTTP/1.1 200") {
        return Err(wrong(String::from_utf8_lossy(head)));
    }
    if body.len() < length {
        let text = format!("EOF after {} of {length} bytes of body", body.len());
        return Err(io::Error::new(ErrorKind::UnexpectedEof, text));
    }
    if body != guest::chargen(length) {
        return Err(wrong("another body"));
    }
    Ok(())
}

pub(crate) fn late(conn: &mut Conn, bytes: &[u8]) -> io::Result<()> {
    conn.write_all(bytes)?;
    conn.half_close()?;
    expect_whole(conn, &guest::late_answer())
}

/// How the end of a connection that nobody takes looked to its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Eof,
    Reset,
}

pub(crate) fn refused(conn: &mut Conn, bytes: &[u8], half_close: bool) -> io::Result<End> {
    // A write may find the reset already, and only one call does.
    let end = conn.write_all(bytes).and_then(|()| {
        if half_close {
            // Fails if the reset is there, and leaves it to the read.
            let _ = conn.half_close();
        }
        conn.read(&mut [0; 16])
    });
    match end {
        Ok(0) => Ok(End::Eof),
        Ok(n) => Err(wrong(format!("{n} bytes from a port that refuses"))),
        Err(error) => match error.kind() {
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Ok(End::Reset),
            _ => Err(error),
        },
    }
}
