//! The guest: its services, and its programs' sockets.

use super::buffer::{Buffer, PAIR_BUFFER};
use super::chargen::Chargen;
use super::http::{Http, Life};
use crate::sys::unless_ended;
use mio::event::Source;
use mio::net::{TcpStream, UnixStream};
use mio::{Interest, Registry, Token};
use socket2::SockRef;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::PathBuf;
use std::sync::Arc;

/// Where a socket of this machine is: a real server behind a guest port, or a listener whose
/// clients become programs in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A TCP address.
    Tcp(SocketAddr),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Tcp(address) => write!(f, "{address}"),
            Endpoint::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A program in the guest, as a test writes it.
pub type Program = Arc<dyn Fn(StdUnixStream) + Send + Sync>;

/// What listens on a port of the guest.
#[derive(Clone)]
#[non_exhaustive]
pub enum Service {
    /// Sends back what it gets, and closes after EOF (RFC 862).
    Echo,
    /// Reads to EOF, then closes (RFC 863).
    Discard,
    /// Sends a pattern for ever and ignores its input, until EOF (RFC 864).
    Chargen,
    /// A web server whose pages name the VM and the path; `/bytes/N` is a body of N bytes.
    Http,
    /// Accepts, and then never reads, never writes, and ignores EOF.
    Silent,
    /// Sends the pattern for ever and ignores its input and EOF: only a close of the host's end
    /// ends it.
    Endless,
    /// Sends so many bytes of the pattern, ignoring its input and EOF, and closes.
    Heedless(u64),
    /// Answers the first bytes, or EOF, with a piece of the pattern, and resets.
    Reset,
    /// A real server at this address; a connection that it doesn't take is refused.
    Forward(Endpoint),
    /// A function that gets the guest's end of each connection, on a thread of its own. Its last
    /// clone dropped is the guest's close.
    Custom(Program),
}

impl Service {
    /// Makes a [`Service::Custom`] of a function.
    pub fn custom(program: impl Fn(StdUnixStream) + Send + Sync + 'static) -> Service {
        Service::Custom(Arc::new(program))
    }
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Service({self})")
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Service::Echo => "echo",
            Service::Discard => "discard",
            Service::Chargen => "chargen",
            Service::Http => "http",
            Service::Silent => "silent",
            Service::Endless => "endless",
            Service::Heedless(bytes) => return write!(f, "heedless:{bytes}"),
            Service::Reset => "reset",
            Service::Forward(endpoint) => return endpoint.fmt(f),
            Service::Custom(_) => "a program",
        })
    }
}

/// A program that runs inside the device's loop.
#[derive(Debug)]
pub(super) enum Builtin {
    Echo,
    Discard,
    Chargen(Chargen),
    Http(Box<Http>),
    Silent,
    Endless(Chargen),
    Heedless { pattern: Chargen, left: u64 },
    Reset { has_answered: bool },
    Caller(Caller),
}

/// A program that dials the host at a pace: it sends [`TEXT`], half-closes, and reads to EOF.
#[derive(Debug, Default)]
pub(super) struct Caller {
    has_sent: bool,
    answer: Vec<u8>,
}

/// What such a program sends.
const TEXT: &[u8] = b"a program in the guest sends this, and an echo sends it back\r\n";

/// How much [`Service::Reset`] answers.
const ANSWER: u64 = 4096;

impl Caller {
    /// Returns whether the answer is what was sent.
    pub(super) fn is_answered(&self) -> bool {
        self.answer == TEXT
    }

    fn run(&mut self, input: &mut Buffer, eof: bool, output: &mut Buffer) -> Life {
        if !self.has_sent {
            output.push(TEXT);
            self.has_sent = true;
        }
        // Of an answer that is too long it is enough to know that.
        let room = (TEXT.len() + 1).saturating_sub(self.answer.len());
        let bytes = input.bytes();
        self.answer
            .extend_from_slice(&bytes[..room.min(bytes.len())]);
        input.clear();
        match eof {
            true => Life::Closed,
            false => Life::SentAll,
        }
    }
}

impl Builtin {
    /// Lets the program work on what arrived; `eof`: nothing follows `input`.
    pub(super) fn run(&mut self, input: &mut Buffer, eof: bool, output: &mut Buffer) -> Life {
        match self {
            Builtin::Echo => {
                let n = output.push(input.bytes());
                input.consume(n);
            }
            Builtin::Discard => input.clear(),
            Builtin::Chargen(pattern) => {
                input.clear();
                if !eof {
                    pattern.fill(output, u64::MAX);
                }
            }
            Builtin::Http(http) => return http.run(input, eof, output),
            Builtin::Silent => return Life::Running,
            Builtin::Endless(pattern) => {
                input.clear();
                pattern.fill(output, u64::MAX);
                return Life::Running;
            }
            Builtin::Heedless { pattern, left } => {
                input.clear();
                *left -= pattern.fill(output, *left);
                return match *left {
                    0 => Life::Closed,
                    _ => Life::Running,
                };
            }
            Builtin::Reset { has_answered } => {
                if *has_answered && output.is_empty() {
                    return Life::Reset;
                }
                if !*has_answered && (eof || !input.is_empty()) {
                    Chargen::default().fill(output, ANSWER);
                    *has_answered = true;
                }
                input.clear();
                return Life::Running;
            }
            Builtin::Caller(caller) => return caller.run(input, eof, output),
        }
        if eof && input.is_empty() {
            Life::Closed
        } else {
            Life::Running
        }
    }
}

/// A guest program's socket, as the device holds its other end.
#[derive(Debug)]
pub(super) enum GuestSocket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl GuestSocket {
    /// Takes over this end of a socket pair, with a smaller buffer: to a program that reads
    /// nothing, little more is sent than to a guest's kernel.
    pub(super) fn of_pair(ours: StdUnixStream) -> io::Result<GuestSocket> {
        unless_ended(SockRef::from(&ours).set_send_buffer_size(PAIR_BUFFER))?;
        ours.set_nonblocking(true)?;
        Ok(GuestSocket::Unix(UnixStream::from_std(ours)))
    }

    pub(super) fn connect(endpoint: &Endpoint) -> io::Result<GuestSocket> {
        match endpoint {
            Endpoint::Tcp(address) => {
                let stream = TcpStream::connect(*address)?;
                unless_ended(stream.set_nodelay(true))?;
                Ok(GuestSocket::Tcp(stream))
            }
            Endpoint::Unix(path) => UnixStream::connect(path).map(GuestSocket::Unix),
        }
    }

    /// Returns whether a connect in progress is done.
    pub(super) fn connected(&self) -> io::Result<bool> {
        let (error, peer) = match self {
            GuestSocket::Tcp(stream) => (stream.take_error()?, stream.peer_addr().map(drop)),
            GuestSocket::Unix(stream) => (stream.take_error()?, stream.peer_addr().map(drop)),
        };
        match (error, peer) {
            (Some(error), _) => Err(error),
            (None, Ok(())) => Ok(true),
            // macOS, of a peer that has come and gone.
            (None, Err(error)) if error.kind() == io::ErrorKind::InvalidInput => Ok(true),
            (None, Err(error)) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
            (None, Err(error)) => Err(error),
        }
    }

    pub(super) fn shutdown_write(&self) {
        // Fails only where the other side has gone, and that shows by itself.
        let _ = match self {
            GuestSocket::Tcp(stream) => stream.shutdown(Shutdown::Write),
            GuestSocket::Unix(stream) => stream.shutdown(Shutdown::Write),
        };
    }

    pub(super) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        let both = Interest::READABLE | Interest::WRITABLE;
        match self {
            GuestSocket::Tcp(stream) => stream.register(registry, token, both),
            GuestSocket::Unix(stream) => stream.register(registry, token, both),
        }
    }
}

impl Read for GuestSocket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            GuestSocket::Tcp(stream) => stream.read(buffer),
            GuestSocket::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for GuestSocket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            GuestSocket::Tcp(stream) => stream.write(bytes),
            GuestSocket::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
