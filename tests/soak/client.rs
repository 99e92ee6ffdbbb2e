//! Clients: a connection over TCP or Unix, and what the polite ones expect of it.

use crate::guest::{self, LONG};
use socket2::SockRef;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

#[derive(Clone, Debug)]
pub(crate) enum Place {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

#[derive(Debug)]
pub(crate) enum Conn {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Conn {
    pub(crate) fn open(place: &Place) -> io::Result<Conn> {
        let conn = match place {
            Place::Tcp(address) => Conn::Tcp(TcpStream::connect(address)?),
            Place::Unix(path) => Conn::Unix(UnixStream::connect(path)?),
        };
        conn.set_timeout(LONG)?;
        Ok(conn)
    }

    /// Whether a connection was made, if only to be reset so soon that its connect says so.
    pub(crate) fn was_made(outcome: &io::Result<Conn>) -> bool {
        match outcome {
            Ok(_) => true,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        }
    }

    pub(crate) fn set_timeout(&self, time: Duration) -> io::Result<()> {
        let socket = match self {
            Conn::Tcp(stream) => SockRef::from(stream),
            Conn::Unix(stream) => SockRef::from(stream),
        };
        socket.set_read_timeout(Some(time))?;
        socket.set_write_timeout(Some(time))
    }

    pub(crate) fn half_close(&self) -> io::Result<()> {
        match self {
            Conn::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Conn::Unix(stream) => stream.shutdown(Shutdown::Write),
        }
    }

    /// Vanishes: over TCP the peer reads a reset.
    pub(crate) fn reset(self) {
        if let Conn::Tcp(stream) = &self {
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
        }
    }

    fn clone(&self) -> io::Result<Conn> {
        Ok(match self {
            Conn::Tcp(stream) => Conn::Tcp(stream.try_clone()?),
            Conn::Unix(stream) => Conn::Unix(stream.try_clone()?),
        })
    }
}

impl Read for Conn {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Conn::Tcp(stream) => stream.read(buffer),
            Conn::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Conn {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Conn::Tcp(stream) => stream.write(bytes),
            Conn::Unix(stream) => stream.write(bytes),
        }
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
    let mut writer = conn.clone()?;
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
        read.and(written)
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
