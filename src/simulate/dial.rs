//! Dials by the guest to a host port: `STATE/00000002.PORT`.

use super::directory::Made;
use super::guest::{Endpoint, GuestSocket};
use crate::error::{Error, Operation, Result};
use crate::sys::unless_ended;
use mio::net::{TcpListener, UnixListener};
use mio::{Interest, Registry, Token};
use std::io;
use std::num::NonZeroU32;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

/// How often a guest that is to dial at a pace looks whether somebody listens by now.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// What makes the guest dial a host port.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Dial {
    /// The stand-in listens here; each connection that it accepts is a program in the guest that
    /// dials the host. For TCP port 0 the kernel chooses one; a Unix socket's file is replaced.
    Listen(Endpoint),
    /// A program in the guest dials so many times a second, from the first listener on the port on
    /// until [`Vm::stop_dialling`](super::Vm::stop_dialling). On each connection it sends some
    /// bytes and EOF, and reads to EOF ([`Counters::guest_echoes`](super::Counters::guest_echoes)).
    Paced(NonZeroU32),
}

/// A program in the guest that dials the host at a pace.
#[derive(Debug)]
pub(super) struct Paced {
    pub(super) port: u32,
    interval: Duration,
    /// When it dials, or looks whether somebody listens.
    due: Instant,
    has_begun: bool,
}

impl Paced {
    pub(super) fn new(port: u32, per_second: NonZeroU32) -> Paced {
        Paced {
            port,
            interval: Duration::from_secs(1) / per_second.get(),
            due: Instant::now(),
            has_begun: false,
        }
    }

    /// Returns when [`is_due`](Paced::is_due) is to be asked next.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Returns whether it dials at `now`. `listens` says whether somebody listens.
    pub(super) fn is_due(&mut self, now: Instant, listens: impl FnOnce() -> bool) -> bool {
        if now < self.due {
            return false;
        }
        if !self.has_begun && !listens() {
            self.due = now + LOOK_AGAIN;
            return false;
        }
        self.has_begun = true;
        // What could not be dialled in time, as while the guest was paused, is left out.
        self.due = (self.due + self.interval).max(now);
        true
    }
}

/// A guest program that dials the host, and isn't connected yet.
#[derive(Debug)]
pub(super) struct Dialling {
    pub(super) port: u32,
    pub(super) socket: GuestSocket,
    pub(super) reply: Option<Sender<io::Result<()>>>,
}

impl Dialling {
    pub(super) fn new(
        port: u32,
        socket: GuestSocket,
        reply: Option<Sender<io::Result<()>>>,
    ) -> Dialling {
        Dialling {
            port,
            socket,
            reply,
        }
    }

    /// Sends the program the result. Drop what is returned if that is an error.
    pub(super) fn answer(self, outcome: io::Result<()>) -> GuestSocket {
        if let Some(reply) = &self.reply {
            // A program that doesn't wait any more has hung up.
            let _ = reply.send(outcome);
        }
        self.socket
    }
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A listener whose clients are programs in the guest.
#[derive(Debug)]
pub(super) struct DialListener {
    socket: Socket,
    pub(super) port: u32,
    pub(super) ready: bool,
    /// Where it listens, with the port that was chosen.
    pub(super) endpoint: Endpoint,
}

impl DialListener {
    pub(super) fn open(port: u32, endpoint: &Endpoint, made: &mut Made) -> Result<DialListener> {
        let mut open = || {
            Ok(match endpoint {
                Endpoint::Tcp(address) => {
                    let socket = TcpListener::bind(*address)?;
                    let endpoint = Endpoint::Tcp(socket.local_addr()?);
                    (Socket::Tcp(socket), endpoint)
                }
                Endpoint::Unix(path) => {
                    match std::fs::remove_file(path) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                        _ => {}
                    }
                    let socket = UnixListener::bind(path)?;
                    made.add(path);
                    (Socket::Unix(socket), endpoint.clone())
                }
            })
        };
        let (socket, endpoint) =
            open().map_err(|cause| Error::new(Operation::Listen, endpoint, cause))?;
        Ok(DialListener {
            socket,
            port,
            ready: false,
            endpoint,
        })
    }

    pub(super) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        match &mut self.socket {
            Socket::Tcp(socket) => registry.register(socket, token, Interest::READABLE),
            Socket::Unix(socket) => registry.register(socket, token, Interest::READABLE),
        }
    }

    pub(super) fn accept(&self) -> io::Result<GuestSocket> {
        match &self.socket {
            Socket::Tcp(socket) => {
                let (stream, _) = socket.accept()?;
                unless_ended(stream.set_nodelay(true))?;
                Ok(GuestSocket::Tcp(stream))
            }
            Socket::Unix(socket) => Ok(GuestSocket::Unix(socket.accept()?.0)),
        }
    }
}
