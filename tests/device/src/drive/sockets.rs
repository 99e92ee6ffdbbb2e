//! The driver's own sockets. Whatever the family, std's Unix stream carries it; every wait has a
//! limit.

use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use socket2::SockRef;

/// No single read or write may take longer, on the busiest machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn patient(stream: UnixStream) -> io::Result<UnixStream> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

pub(crate) fn unix(path: &Path) -> io::Result<UnixStream> {
    patient(UnixStream::connect(path)?)
}

pub(crate) fn tcp(port: u16) -> io::Result<UnixStream> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_nodelay(true)?;
    patient(OwnedFd::from(stream).into())
}

/// Closes a TCP client with a reset.
pub(crate) fn reset(client: UnixStream) -> io::Result<()> {
    SockRef::from(&client).set_linger(Some(Duration::ZERO))
}

/// Where a proxy listens.
#[derive(Clone, Debug)]
pub(crate) enum Front {
    Tcp(u16),
    Unix(PathBuf),
}

impl Front {
    /// As `hvsock` prints it.
    pub(crate) fn parse(address: &str) -> Option<Front> {
        if let Some(path) = address.strip_prefix("unix://") {
            return Some(Front::Unix(path.into()));
        }
        let port = address.strip_prefix("tcp://127.0.0.1:")?;
        port.parse().ok().map(Front::Tcp)
    }

    pub(crate) fn connect(&self) -> io::Result<UnixStream> {
        match self {
            Front::Tcp(port) => tcp(*port),
            Front::Unix(path) => unix(path),
        }
    }
}

type Service = fn(UnixStream);

/// Serves all clients on a TCP port of its own, each in a thread, for as long as the driver runs.
pub(crate) fn serve_tcp(service: Service) -> io::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    serve(service, move || {
        let (stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        Ok(OwnedFd::from(stream).into())
    });
    Ok(port)
}

/// The same on a Unix socket.
pub(crate) fn serve_unix(service: Service, path: &Path) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    serve(service, move || Ok(listener.accept()?.0));
    Ok(())
}

fn serve(service: Service, accept: impl Fn() -> io::Result<UnixStream> + Send + 'static) {
    thread::spawn(move || {
        while let Ok(client) = accept().and_then(patient) {
            let _ = thread::Builder::new()
                .stack_size(256 * 1024)
                .spawn(move || service(client));
        }
    });
}
