//! Sockets that the proxies connect: Unix and AF_VSOCK, blocking, with a limit to every wait.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

use hvsock::proxy::Counters;
use hvsock::{Proxy, ProxyConfig, Rule};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::report::eventually;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The CID of this system itself.
const LOCAL: u32 = 1;
const ANY: u32 = u32::MAX;

/// The time that a single read or write may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Limits the waits of a stream of either family; std's Unix stream holds both.
pub(crate) fn patient(stream: UnixStream) -> io::Result<UnixStream> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

pub(crate) fn connect_unix(path: &str) -> io::Result<UnixStream> {
    patient(UnixStream::connect(path)?)
}

pub(crate) fn connect_vsock(port: u32) -> io::Result<UnixStream> {
    connect_vsock_of(LOCAL, port)
}

pub(crate) fn connect_vsock_of(cid: u32, port: u32) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    socket.connect(&SockAddr::vsock(cid, port))?;
    patient(OwnedFd::from(socket).into())
}

/// A listener of either family.
pub(crate) struct Server(Socket);

impl Server {
    pub(crate) fn vsock(port: u32) -> io::Result<Server> {
        Server::vsock_with_backlog(port, 1024)
    }

    pub(crate) fn vsock_with_backlog(port: u32, backlog: i32) -> io::Result<Server> {
        let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
        socket.bind(&SockAddr::vsock(ANY, port))?;
        socket.listen(backlog)?;
        Ok(Server(socket))
    }

    pub(crate) fn unix(path: &str) -> io::Result<Server> {
        Ok(Server(OwnedFd::from(UnixListener::bind(path)?).into()))
    }

    pub(crate) fn accept(&self) -> io::Result<UnixStream> {
        let (socket, _) = self.0.accept()?;
        patient(OwnedFd::from(socket).into())
    }

    /// Serves all clients, each in a thread, for as long as the guest lives.
    pub(crate) fn serve(self, serve: impl Fn(UnixStream) + Clone + Send + 'static) {
        thread::spawn(move || {
            while let Ok(client) = self.accept() {
                let serve = serve.clone();
                thread::spawn(move || serve(client));
            }
        });
    }
}

/// A proxy from one Unix socket over AF_VSOCK to another: two proxies in a row.
pub(crate) struct Bridge {
    near: Proxy,
    far: Proxy,
}

impl Bridge {
    /// Starts the proxies `listen` -> vsock port `port` -> `connect`.
    pub(crate) fn start(listen: &str, port: u32, connect: &str) -> Result<Bridge, Failure> {
        Bridge::start_with(listen, port, connect, "")
    }

    /// Starts the same, with options appended to the vsock addresses.
    pub(crate) fn start_with(
        listen: &str,
        port: u32,
        connect: &str,
        query: &str,
    ) -> Result<Bridge, Failure> {
        let connect = format!("unix://{connect}");
        let near = format!("vsock://local:{port}{query}");
        Ok(Bridge {
            far: proxy(&format!("vsock://:{port}{query}"), &connect)?,
            near: proxy(&format!("unix://{listen}"), &near)?,
        })
    }

    /// Returns whether both proxies have no connection left in time, and so have released
    /// everything.
    pub(crate) fn is_idle(&self, within: Duration) -> bool {
        eventually(within, || live(&self.near) + live(&self.far) == 0)
    }

    pub(crate) fn counters(&self) -> [Counters; 2] {
        [&self.near, &self.far].map(|proxy| proxy.forwards()[0].counters)
    }
}

/// Starts a proxy with one rule, which removes a stale file of its Unix socket itself.
pub(crate) fn proxy(listen: &str, connect: &str) -> Result<Proxy, Failure> {
    let rule = Rule::new(listen.parse()?, connect.parse()?);
    Ok(Proxy::start(ProxyConfig::new(vec![rule]))?)
}

pub(crate) fn live(proxy: &Proxy) -> u64 {
    proxy.forwards()[0].counters.live
}
