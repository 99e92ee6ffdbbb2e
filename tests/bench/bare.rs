//! The least that relaying takes: it knows what its loads do, expects no fault, bounds nothing and
//! counts nothing. What it costs the system costs, and so the rest of a proxy is what that one
//! costs beyond it.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use mio::{Events, Interest, Poll, Token};
use nix::fcntl::{FcntlArg, SpliceFFlags, fcntl, splice};
use socket2::{Domain, Socket, Type};

use crate::server::{Service, spawn};

/// What a pipe and a buffer hold: as hvsock's.
const PIPE: usize = 256 << 10;
const BUFFER: usize = 128 << 10;

/// As many as the others have.
const THREADS: usize = 2;

/// Relays for ever: `[--copy] PORT PATH...`, a port and a path for each service.
pub(crate) fn main(words: impl Iterator<Item = String>) -> io::Result<Infallible> {
    let mut words = words.peekable();
    let pump = match words.next_if(|word| word == "--copy") {
        Some(_) => copy,
        None => pass_on,
    };
    for service in Service::ALL {
        let port = words.next().and_then(|port| port.parse().ok());
        let (Some(port), Some(path)) = (port, words.next()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        match service {
            Service::Echo => {
                for _ in 0..THREADS {
                    let (listener, path) = (listen(port)?, path.clone());
                    spawn(move || messages(listener, path.as_ref()).expect("no fault"));
                }
            }
            Service::Sink | Service::Source => {
                let listener = listen(port)?;
                spawn(move || {
                    for client in listener.incoming().flatten() {
                        let server = UnixStream::connect(&path).expect("the service");
                        bulk(client, server, pump).expect("descriptors");
                    }
                });
            }
        }
    }
    loop {
        thread::park();
    }
}

/// Each thread has a listener of its own.
fn listen(port: u16) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_port(true)?;
    socket.set_tcp_nodelay(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

/// A thread for each direction, which waits in its calls.
fn bulk(
    client: TcpStream,
    server: UnixStream,
    pump: fn(Socket, Socket) -> io::Result<()>,
) -> io::Result<()> {
    let client = Socket::from(client);
    let server = Socket::from(OwnedFd::from(server));
    let [up, down] = [(client.try_clone()?, server.try_clone()?), (server, client)];
    spawn(move || drop(pump(up.0, up.1)));
    spawn(move || drop(pump(down.0, down.1)));
    Ok(())
}

/// Through memory.
fn copy(mut from: Socket, mut to: Socket) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer)? {
            0 => return to.shutdown(Shutdown::Write),
            count => to.write_all(&buffer[..count])?,
        }
    }
}

/// Through a pipe.
fn pass_on(from: Socket, to: Socket) -> io::Result<()> {
    let (tail, head) = nix::unistd::pipe()?;
    fcntl(&head, FcntlArg::F_SETPIPE_SZ(PIPE as i32))?;
    let hand = |from: &dyn AsFd, to: &dyn AsFd, most| {
        splice(
            from.as_fd(),
            None,
            to.as_fd(),
            None,
            most,
            SpliceFFlags::SPLICE_F_MOVE,
        )
    };
    let (tail, head) = (File::from(tail), File::from(head));
    loop {
        let mut held = hand(&from, &head, PIPE)?;
        if held == 0 {
            return to.shutdown(Shutdown::Write);
        }
        while held > 0 {
            held -= hand(&tail, &to, held)?;
        }
    }
}

/// A client and its server, and whose end has been read.
struct Pair {
    client: mio::net::TcpStream,
    server: mio::net::UnixStream,
    ended: [bool; 2],
}

impl Pair {
    /// Carries what is there, which is never more than the other side takes. Whether all is over.
    fn carry(&mut self, side: usize, buffer: &mut [u8], is_last: bool) -> io::Result<bool> {
        loop {
            let read = match side {
                0 => self.client.read(buffer),
                _ => self.server.read(buffer),
            };
            let count = match read {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                read => read?,
            };
            match (side, count) {
                (0, 0) => self.server.shutdown(Shutdown::Write)?,
                (_, 0) => self.client.shutdown(Shutdown::Write)?,
                (0, n) => self.server.write_all(&buffer[..n])?,
                (_, n) => self.client.write_all(&buffer[..n])?,
            }
            if count == 0 {
                self.ended[side] = true;
                return Ok(self.ended == [true; 2]);
            }
            if count < buffer.len() && !is_last {
                return Ok(false);
            }
        }
    }
}

/// A wait, a read and a write for each message.
fn messages(listener: TcpListener, path: &Path) -> io::Result<()> {
    const LISTENER: Token = Token(usize::MAX);
    listener.set_nonblocking(true)?;
    let mut listener = mio::net::TcpListener::from_std(listener);
    let mut poll = Poll::new()?;
    poll.registry()
        .register(&mut listener, LISTENER, Interest::READABLE)?;
    let mut pairs: Vec<Option<Pair>> = Vec::new();
    let mut buffer = vec![0; BUFFER];
    let mut events = Events::with_capacity(1024);
    loop {
        poll.poll(&mut events, None)?;
        for event in &events {
            if event.token() == LISTENER {
                while let Ok((client, _)) = listener.accept() {
                    let index = pairs
                        .iter()
                        .position(Option::is_none)
                        .unwrap_or(pairs.len());
                    if index == pairs.len() {
                        pairs.push(None);
                    }
                    let server = mio::net::UnixStream::connect(path)?;
                    let pair = pairs[index].insert(Pair {
                        client,
                        server,
                        ended: [false; 2],
                    });
                    let (one, other) = (Token(2 * index), Token(2 * index + 1));
                    poll.registry()
                        .register(&mut pair.client, one, Interest::READABLE)?;
                    poll.registry()
                        .register(&mut pair.server, other, Interest::READABLE)?;
                }
                continue;
            }
            let (index, side) = (event.token().0 / 2, event.token().0 % 2);
            if let Some(pair) = &mut pairs[index]
                && !pair.ended[side]
                && pair.carry(side, &mut buffer, event.is_read_closed())?
            {
                pairs[index] = None;
            }
        }
    }
}
