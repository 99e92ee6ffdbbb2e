//! Listening TCP sockets, for an event loop: one, or one of each family of IP for one address.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use mio::event::Source;
use mio::net::TcpStream;
use mio::{Interest, Registry, Token};
use socket2::{Domain, SockRef, Socket, Type};
use tracing::{debug, info};

use super::defaults::BACKLOG;
use crate::address::{Address, Host, IpFamily, TcpAddress};
use crate::error::{Error, Operation, Result};
use crate::stream::nonblocking::set_tcp_options;
use crate::sys::{self, AsSocket, BorrowedSocket, Wanted};

/// How often another port is chosen for two sockets if one of them can't have the port that the
/// kernel chose for the other.
const MOST_PORTS_TRIED: usize = 32;

/// Which clients a socket has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Admits {
    All,
    /// Those of this machine alone that connect to a loopback address. The socket is bound to all
    /// addresses because only that needs no rights.
    Local,
}

/// The listening sockets of a TCP address.
#[derive(Debug)]
pub(crate) struct TcpListener {
    /// At least one; at most one of each family of IP, that of IPv4 first.
    sockets: Vec<mio::net::TcpListener>,
    /// Counts the accepts, so that the sockets are asked first in turns.
    accepts: AtomicUsize,
    admits: Admits,
    /// What they accept inherits their options. Passed ones may have had clients before they were
    /// set.
    leaves_options: bool,
}

impl TcpListener {
    /// Binds the sockets of an address. Of two it is enough that one can be had, if the other one's
    /// family isn't there.
    pub(super) fn bind(address: &Address, tcp: &TcpAddress) -> Result<TcpListener> {
        let addresses = socket_addresses(tcp)?;
        let mut tries = MOST_PORTS_TRIED;
        loop {
            match bind_all(address, tcp, &addresses) {
                // The chosen port may be free in one family and not in the other.
                Err(e) if tcp.port == 0 && e.kind() == io::ErrorKind::AddrInUse && tries > 1 => {
                    tries -= 1;
                }
                bound => return bound.map_err(|e| explain(address, e)),
            }
        }
    }

    /// Takes over a socket that listens already.
    #[cfg(unix)]
    pub(super) fn passed(socket: Socket) -> TcpListener {
        TcpListener {
            leaves_options: false,
            ..TcpListener::of(vec![mio::net::TcpListener::from_std(socket.into())])
        }
    }

    fn of(sockets: Vec<mio::net::TcpListener>) -> TcpListener {
        TcpListener {
            sockets,
            accepts: AtomicUsize::new(0),
            admits: Admits::All,
            leaves_options: sys::ACCEPTED_INHERIT,
        }
    }

    /// Accepts one connection without waiting. Its options are set.
    ///
    /// # Errors
    /// Returns `WouldBlock` if there is none; `ConnectionAborted` if one was refused; what the
    /// kernel says.
    pub(super) fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let first = self.accepts.fetch_add(1, Ordering::Relaxed);
        for turn in 0..self.sockets.len() {
            let socket = &self.sockets[first.wrapping_add(turn) % self.sockets.len()];
            let (stream, peer) = match socket.accept() {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                accepted => accepted?,
            };
            if self.admits == Admits::Local && !is_local(stream.local_addr()?, peer) {
                debug!("refused {peer}, which is no client of this machine");
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if !self.leaves_options {
                set_tcp_options(SockRef::from(&stream));
            }
            return Ok((stream, peer));
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Waits until a connection may have come, at most `timeout`.
    pub(super) fn wait(&self, timeout: Duration) -> io::Result<()> {
        sys::wait_for_any_of(&self.sockets(), Wanted::Readable, timeout).map(drop)
    }

    /// Returns the name of its first socket. The others have the same port.
    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.sockets[0].local_addr()
    }

    /// Returns what is unusual about its sockets.
    pub(super) fn note(&self) -> Option<&'static str> {
        match self.admits {
            Admits::All => None,
            Admits::Local => Some(ON_WILDCARD),
        }
    }

    pub(super) fn sockets(&self) -> Vec<BorrowedSocket<'_>> {
        self.sockets.iter().map(AsSocket::as_socket).collect()
    }

    /// Sets the options of sockets that another hvsock has bound to `address`, perhaps of a version
    /// with others.
    #[cfg(all(unix, feature = "cli"))]
    pub(super) fn adopt(&mut self, address: &Address) {
        if sys::ACCEPTED_INHERIT {
            for socket in &self.sockets {
                set_tcp_options(SockRef::from(socket));
            }
            self.leaves_options = true;
        }
        let is_for_all = self.local_addr().is_ok_and(|it| it.ip().is_unspecified());
        let known = address.as_tcp().map(TcpAddress::known_ips);
        if is_for_all && known.is_some_and(|ips| ips.iter().any(IpAddr::is_loopback)) {
            self.admits = Admits::Local;
        }
    }

    /// Returns whether `other` is the socket of another family of IP for the same port.
    pub(super) fn is_joined_by(&self, other: &TcpListener) -> bool {
        match (self.local_addr(), other.local_addr()) {
            (Ok(ours), Ok(theirs)) => {
                self.sockets.len() == 1
                    && other.sockets.len() == 1
                    && ours.port() == theirs.port()
                    && ours.is_ipv4() != theirs.is_ipv4()
            }
            _ => false,
        }
    }

    /// Takes the socket of the other family, which it [is joined by](TcpListener::is_joined_by).
    pub(super) fn join(&mut self, other: TcpListener) {
        self.leaves_options &= other.leaves_options;
        if other.admits == Admits::Local {
            self.admits = Admits::Local;
        }
        self.sockets.extend(other.sockets);
        let is_v6 = |it: &mio::net::TcpListener| it.local_addr().is_ok_and(|it| it.is_ipv6());
        self.sockets.sort_by_key(is_v6);
    }

    /// Binds the socket that one of `tcp` has besides this one, if that can be had.
    #[cfg(unix)]
    pub(super) fn complete(&mut self, tcp: &TcpAddress) {
        let Ok(ours) = self.local_addr() else {
            return;
        };
        if self.sockets.len() > 1 {
            return;
        }
        let missing = |ip: &IpAddr| ip.is_ipv4() != ours.is_ipv4();
        for ip in tcp.known_ips().into_iter().filter(missing) {
            match bind_one(SocketAddr::new(ip, ours.port()), OnlyV6::Yes) {
                Ok(socket) => self.join(TcpListener::of(vec![socket])),
                // One socket may serve both families.
                Err(e) => debug!("not listening on {ip} for {tcp} as well: {e}"),
            }
        }
    }
}

impl Source for TcpListener {
    fn register(&mut self, registry: &Registry, token: Token, what: Interest) -> io::Result<()> {
        let mut sockets = self.sockets.iter_mut();
        sockets.try_for_each(|socket| socket.register(registry, token, what))
    }

    fn reregister(&mut self, registry: &Registry, token: Token, what: Interest) -> io::Result<()> {
        let mut sockets = self.sockets.iter_mut();
        sockets.try_for_each(|socket| socket.reregister(registry, token, what))
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        let mut sockets = self.sockets.iter_mut();
        sockets.try_for_each(|socket| socket.deregister(registry))
    }
}

/// Resolves a TCP address to those that are bound: one of each family at most.
///
/// # Errors
/// Returns an error that says that its name can't be resolved.
pub(super) fn socket_addresses(tcp: &TcpAddress) -> Result<Vec<SocketAddr>> {
    let known = tcp.known_ips();
    let Host::Name(name) = &tcp.host else {
        let known = known.into_iter();
        return Ok(known.map(|ip| SocketAddr::new(ip, tcp.port)).collect());
    };
    if !known.is_empty() {
        let known = known.into_iter();
        return Ok(known.map(|ip| SocketAddr::new(ip, tcp.port)).collect());
    }
    let found = (name.as_str(), tcp.port).to_socket_addrs();
    let first = found.and_then(|mut found| {
        let first = found.find(|it| tcp.family.includes(&it.ip()));
        first.ok_or_else(|| io::ErrorKind::NotFound.into())
    });
    first
        .map(|first| vec![first])
        .map_err(|e| Error::new(Operation::Resolve, name, e))
}

/// Whether a socket of `[::]` is for IPv6 alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnlyV6 {
    Yes,
    /// The system's default.
    Unsaid,
}

fn bind_all(
    address: &Address,
    tcp: &TcpAddress,
    addresses: &[SocketAddr],
) -> io::Result<TcpListener> {
    let only_v6 = match addresses.len() > 1 || tcp.family == IpFamily::V6 {
        true => OnlyV6::Yes,
        false => OnlyV6::Unsaid,
    };
    let mut sockets: Vec<mio::net::TcpListener> = Vec::new();
    let mut admits = Admits::All;
    let mut missing = None;
    for wanted in addresses {
        let mut wanted = *wanted;
        if let Some(first) = sockets.first() {
            wanted.set_port(first.local_addr()?.port());
        }
        let bound = bind_one(wanted, only_v6).or_else(|e| match wildcard_instead(wanted, &e) {
            Some(wildcard) if cfg!(target_os = "macos") => {
                admits = Admits::Local;
                bind_one(wildcard, OnlyV6::Yes)
            }
            _ => Err(e),
        });
        match bound {
            Ok(socket) => sockets.push(socket),
            Err(e) if addresses.len() > 1 && is_family_missing(&e) => missing = Some((wanted, e)),
            Err(e) => return Err(e),
        }
    }
    match (sockets.is_empty(), missing) {
        (true, Some((_, e))) => return Err(e),
        (true, None) => return Err(io::ErrorKind::AddrNotAvailable.into()),
        (false, Some((missing, e))) => {
            static HAS_SAID: AtomicBool = AtomicBool::new(false);
            if !HAS_SAID.swap(true, Ordering::Relaxed) {
                let ip = missing.ip();
                info!("{address} is listened on without {ip}, which this machine hasn't: {e}");
            }
        }
        (false, None) => {}
    }
    if admits == Admits::Local {
        info!("{address}: {}", ON_WILDCARD);
    }
    Ok(TcpListener {
        admits,
        ..TcpListener::of(sockets)
    })
}

/// The note of a socket that macOS lets nobody but root bind to a single address.
const ON_WILDCARD: &str = "its port is below 1024, so that it is bound on all addresses; clients of other machines are refused";

fn bind_one(address: SocketAddr, only_v6: OnlyV6) -> io::Result<mio::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    // Without this option a port stays unusable for a minute after a restart. On Windows it means
    // something else.
    #[cfg(unix)]
    socket.set_reuse_address(true)?;
    if address.is_ipv6() && only_v6 == OnlyV6::Yes {
        socket.set_only_v6(true)?;
    }
    if sys::ACCEPTED_INHERIT {
        set_tcp_options(SockRef::from(&socket));
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(mio::net::TcpListener::from_std(socket.into()))
}

/// Returns whether an address can't be bound because the machine has none of that family.
fn is_family_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable || sys::is_no_such_family(error)
}

/// Returns the address that may be bound instead of one whose port is below 1024, where the system
/// wants rights for one address and none for all of them: macOS 10.14 and later.
fn wildcard_instead(wanted: SocketAddr, error: &io::Error) -> Option<SocketAddr> {
    let is_privileged = (1..1024).contains(&wanted.port());
    if error.kind() != io::ErrorKind::PermissionDenied || !is_privileged {
        return None;
    }
    let all = match wanted.ip() {
        IpAddr::V4(ip) if ip.is_loopback() => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(ip) if ip.is_loopback() => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    Some(SocketAddr::new(all, wanted.port()))
}

/// Returns whether a connection with these ends has come from this machine to a loopback address.
fn is_local(here: SocketAddr, peer: SocketAddr) -> bool {
    [here, peer]
        .iter()
        .all(|end| end.ip().to_canonical().is_loopback())
}

fn explain(address: &Address, cause: io::Error) -> Error {
    let remedy = match cause.kind() {
        io::ErrorKind::AddrInUse => {
            Some("another program listens there: choose another port, or 0 for a free one")
        }
        io::ErrorKind::PermissionDenied => {
            Some("ports below 1024 need rights: choose a higher one")
        }
        io::ErrorKind::AddrNotAvailable => Some("no interface of this machine has that address"),
        _ => None,
    };
    let error = Error::new(Operation::Listen, address, cause);
    match remedy {
        Some(remedy) => error.with_remedy(remedy),
        None => error,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Read;
    use std::net::UdpSocket;
    use std::time::Instant;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    #[test]
    fn only_a_refused_privileged_port_of_loopback_is_bound_on_all_addresses() {
        let denied = || io::Error::from(io::ErrorKind::PermissionDenied);
        let instead = |text: &str, error: &io::Error| {
            let instead = wildcard_instead(text.parse().unwrap(), error);
            instead.map(|it| it.to_string())
        };
        for (wanted, bound) in [
            ("127.0.0.1:80", Some("0.0.0.0:80")),
            ("127.0.0.1:1023", Some("0.0.0.0:1023")),
            ("[::1]:443", Some("[::]:443")),
            ("127.0.0.1:1024", None),
            ("127.0.0.1:0", None),
            ("192.0.2.1:80", None),
            ("0.0.0.0:80", None),
            ("[fe80::1]:80", None),
        ] {
            assert_eq!(instead(wanted, &denied()).as_deref(), bound, "{wanted}");
            let taken = io::ErrorKind::AddrInUse.into();
            assert_eq!(instead(wanted, &taken), None, "{wanted}");
        }
    }

    #[test]
    fn both_ends_of_a_local_connection_are_loopback_addresses() {
        for (here, peer, local) in [
            ("127.0.0.1:80", "127.0.0.1:5", true),
            ("127.0.0.1:80", "127.0.0.9:5", true),
            ("[::1]:80", "[::1]:5", true),
            ("[::ffff:127.0.0.1]:80", "[::ffff:127.0.0.1]:5", true),
            ("192.0.2.1:80", "192.0.2.1:5", false),
            ("192.0.2.1:80", "127.0.0.1:5", false),
            ("127.0.0.1:80", "192.0.2.7:5", false),
            ("[fe80::1]:80", "[fe80::2]:5", false),
        ] {
            let is_local = is_local(here.parse().unwrap(), peer.parse().unwrap());
            assert_eq!(is_local, local, "{here} {peer}");
        }
    }

    /// Accepts, once a client has come.
    fn accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
        let end = Instant::now() + PATIENCE;
        loop {
            match listener.accept() {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                    listener.wait(Duration::from_millis(100)).unwrap();
                }
                accepted => return accepted,
            }
        }
    }

    #[test]
    fn a_socket_of_all_addresses_that_stands_for_loopback_refuses_others() {
        let socket = bind_one("0.0.0.0:0".parse().unwrap(), OnlyV6::Yes).unwrap();
        let port = socket.local_addr().unwrap().port();
        let listener = TcpListener {
            admits: Admits::Local,
            ..TcpListener::of(vec![socket])
        };
        assert!(listener.note().is_some());
        let client = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        assert_eq!(accept(&listener).unwrap().1, client.local_addr().unwrap());
        // Which address of this machine others know is looked up; nothing is sent.
        let outside = UdpSocket::bind("0.0.0.0:0").unwrap();
        let own = outside
            .connect("192.0.2.1:9")
            .and_then(|()| outside.local_addr());
        let Some(own) = own.ok().filter(|own| !own.ip().is_loopback()) else {
            println!("skipped in part: this machine has no address but loopback's");
            return;
        };
        let mut stranger = std::net::TcpStream::connect((own.ip(), port)).unwrap();
        let refused = accept(&listener).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionAborted);
        stranger.set_read_timeout(Some(PATIENCE)).unwrap();
        assert!(!matches!(stranger.read(&mut [0]), Ok(1..)));
    }
}
