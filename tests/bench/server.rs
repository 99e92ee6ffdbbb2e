//! What stands behind the proxies: servers on TCP, on Unix sockets, and behind hyperkit's
//! `connect`.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

use crate::load::{CHUNK, Check, bytes_at};

/// What a server does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    /// Sends back what comes.
    Echo,
    /// Reads to EOF, compares, and answers with the number of bytes.
    Sink,
    /// Reads a number of bytes to send, eight bytes of it, and sends them.
    Source,
}

impl Service {
    pub(crate) const ALL: [Service; 3] = [Service::Echo, Service::Sink, Service::Source];

    /// Its vsock port behind `connect`.
    pub(crate) fn port(self) -> u32 {
        1024 + self as u32
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Service::Echo => "echo",
            Service::Sink => "sink",
            Service::Source => "source",
        }
    }

    fn serve(self, mut stream: impl Read + Write) -> io::Result<()> {
        match self {
            Service::Echo => {
                let mut buffer = vec![0; 64 << 10];
                loop {
                    match stream.read(&mut buffer)? {
                        0 => return Ok(()),
                        n => stream.write_all(&buffer[..n])?,
                    }
                }
            }
            Service::Sink => {
                let mut check = Check::default();
                let mut buffer = vec![0; CHUNK];
                loop {
                    match stream.read(&mut buffer)? {
                        0 => break,
                        n => check.add(&buffer[..n])?,
                    }
                }
                stream.write_all(&check.bytes.to_le_bytes())
            }
            Service::Source => {
                let mut wanted = [0; 8];
                stream.read_exact(&mut wanted)?;
                let wanted = u64::from_le_bytes(wanted);
                let mut sent = 0;
                while sent < wanted {
                    sent += stream.write(bytes_at(sent, wanted - sent))? as u64;
                }
                Ok(())
            }
        }
    }
}

/// Serves on a thread, a thread a connection; what goes wrong the client finds.
pub(crate) fn spawn(work: impl FnOnce() + Send + 'static) {
    let thread = thread::Builder::new().stack_size(128 << 10);
    thread.spawn(work).expect("a thread");
}

/// Serves on TCP; the port.
pub(crate) fn tcp(service: Service) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    spawn(move || {
        for stream in listener.incoming().flatten() {
            let serve = move |stream: TcpStream| {
                stream.set_nodelay(true)?;
                service.serve(&stream)
            };
            spawn(move || drop(serve(stream)));
        }
    });
    port
}

/// What a server's Unix sockets have room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    /// The system's own.
    Default,
    /// macOS' own: 8 KiB.
    Mac,
    /// What hyperkit sets: 128 KiB.
    Hyperkit,
}

impl Room {
    pub(crate) const ALL: [Room; 3] = [Room::Default, Room::Mac, Room::Hyperkit];

    fn give(self, stream: &UnixStream) -> io::Result<()> {
        let bytes = match self {
            Room::Default => return Ok(()),
            Room::Mac => 8 << 10,
            Room::Hyperkit => 128 << 10,
        };
        // Linux doubles it, and counts what its buffers take beside the bytes.
        socket2::SockRef::from(stream).set_send_buffer_size(bytes / 2 + 64)
    }
}

pub(crate) fn path(service: Service, room: Room, dir: &Path) -> PathBuf {
    dir.join(match room {
        Room::Default => format!("{}.sock", service.name()),
        room => format!("{}-{room:?}.sock", service.name()),
    })
}

pub(crate) fn unix(service: Service, room: Room, dir: &Path) {
    let listener = listen(&path(service, room, dir));
    spawn(move || {
        for stream in listener.incoming().flatten() {
            let serve = move |stream: UnixStream| {
                room.give(&stream)?;
                service.serve(&stream)
            };
            spawn(move || drop(serve(stream)));
        }
    });
}

/// Serves a Unix socket as [`Service::Echo`] on one thread, so that it may have more clients than
/// there may be threads.
pub(crate) fn crowd(path: &Path) {
    use mio::{Events, Interest, Poll, Token};
    let listener = listen(path);
    listener.set_nonblocking(true).expect("a socket");
    spawn(move || {
        let mut listener = mio::net::UnixListener::from_std(listener);
        let mut poll = Poll::new().expect("a poller");
        let registry = poll.registry().try_clone().expect("a poller");
        let readable = Interest::READABLE;
        let done = registry.register(&mut listener, Token(usize::MAX - 1), readable);
        done.expect("a poller");
        let mut clients: Vec<Option<mio::net::UnixStream>> = Vec::new();
        let mut events = Events::with_capacity(1024);
        let mut buffer = vec![0; 64 << 10];
        loop {
            let _ = poll.poll(&mut events, None);
            for event in &events {
                if let Some(client) = clients.get_mut(event.token().0) {
                    // Messages are small: what is sent back fits.
                    while let Some(stream) = client {
                        match stream.read(&mut buffer) {
                            Ok(n @ 1..) if stream.write_all(&buffer[..n]).is_ok() => {}
                            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                            _ => *client = None,
                        }
                    }
                    continue;
                }
                while let Ok((mut client, _)) = listener.accept() {
                    let token = Token(clients.len());
                    let done = registry.register(&mut client, token, readable);
                    done.expect("a poller");
                    clients.push(Some(client));
                }
            }
        }
    });
}

/// Serves a state directory as hyperkit does: a line with the port, then the guest.
pub(crate) fn hyperkit(dir: &Path) {
    let listener = listen(&dir.join("connect"));
    let serve = |mut stream: UnixStream| {
        let mut line = [0; 18];
        stream.read_exact(&mut line)?;
        let text = String::from_utf8_lossy(&line);
        let port = text.split('.').nth(1).map(str::trim_end);
        let port = port.and_then(|port| u32::from_str_radix(port, 16).ok());
        let service = Service::ALL.into_iter().find(|s| Some(s.port()) == port);
        service.ok_or(io::ErrorKind::NotFound)?.serve(&stream)
    };
    spawn(move || {
        for stream in listener.incoming().flatten() {
            spawn(move || drop(serve(stream)));
        }
    });
}

fn listen(path: &Path) -> UnixListener {
    use socket2::{Domain, SockAddr, Socket, Type};
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).expect("a socket");
    let address = SockAddr::unix(path).expect("a short path");
    socket.bind(&address).expect("a free path");
    socket.listen(4096).expect("a listener");
    socket.into()
}
