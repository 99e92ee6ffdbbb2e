//! Connecting a blocking stream: a dial that is driven on the caller's thread.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

use crate::address::Address;
use crate::error::{Error, Operation, Result};
use crate::listener::nonblocking::not_carried;
use crate::stream::nonblocking::{Endpoint, Stream as Nonblocking, Target};
use crate::stream::{Stream, is_timeout};
use crate::sys::{self, AsSocket, Wanted};

use super::{Begun, Dial, Next, explain};

/// How long [`Stream::connect`] tries.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long it tries AF_HYPERV: a connect may wait for ever though its server listens by now, and there a VM that is up
/// answers at once.
pub(super) const HVSOCK_TIMEOUT: Duration = Duration::from_secs(1);

impl Stream {
    /// Connects to `address`, within 30 s, to a `hvsock://` one within 1 s:
    /// [`connect_timeout`](Stream::connect_timeout).
    ///
    /// ```no_run
    /// use std::io::Write;
    ///
    /// let mut stream = hvsock::Stream::connect(&"hyperkit://:1024/path/to/state".parse()?)?;
    /// stream.write_all(b"hello")?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As there.
    pub fn connect(address: &Address) -> Result<Stream> {
        Stream::connect_timeout(address, patience(address, CONNECT_TIMEOUT))
    }

    /// Connects to `address`, within `timeout`. A name has to be resolved first, which takes what time it takes.
    ///
    /// hyperkit doesn't say whether the guest has accepted: of a port on which nobody listens, the first read says EOF.
    ///
    /// # Errors
    /// `ConnectionRefused` (AF_VSOCK: `ConnectionReset`) if nobody listens there; `NotFound` if there is no such socket
    /// or name; `TimedOut`; `Unsupported` for a family that this system doesn't carry; what the kernel says otherwise.
    pub fn connect_timeout(address: &Address, timeout: Duration) -> Result<Stream> {
        #[cfg(windows)]
        if let Address::Hvsock(hvsock) = address {
            return super::hyperv::connect(address, hvsock, timeout);
        }
        let endpoints = endpoints(address)?;
        let mut dial = Dial::new(Instant::now() + timeout);
        dial.add(endpoints);
        connect(&mut dial)
            .and_then(|stream| Stream::from_nonblocking(stream, address))
            .map_err(|e| explain(address, e))
    }
}

/// How much of `timeout` a dial to `address` is given when nobody asked for that very time.
pub(crate) fn patience(address: &Address, timeout: Duration) -> Duration {
    match address {
        Address::Hvsock(_) => timeout.min(HVSOCK_TIMEOUT),
        _ => timeout,
    }
}

/// Whether this system has such sockets at all, for those to which connecting blocks.
///
/// # Errors
/// Why it hasn't.
pub(crate) fn check(address: &Address) -> Result<()> {
    match address {
        #[cfg(windows)]
        Address::Hvsock(hvsock) => super::hyperv::check(address, hvsock),
        _ => Ok(()),
    }
}

fn endpoints(address: &Address) -> Result<Vec<Endpoint>> {
    match Target::of(address) {
        Target::Endpoint(endpoint) => Ok(vec![endpoint]),
        Target::Name { host, port } => (host, port)
            .to_socket_addrs()
            .map(|found: std::vec::IntoIter<SocketAddr>| found.map(Endpoint::Tcp).collect())
            .map_err(|e| {
                Error::new(Operation::Resolve, host, e)
                    .with_remedy("is the name right, and does DNS answer?")
            }),
        Target::NotCarried => Err(not_carried(Operation::Connect, address)),
    }
}

/// Tries one endpoint after the other.
fn connect(dial: &mut Dial) -> io::Result<Nonblocking> {
    loop {
        let error = match attempt(dial) {
            Ok(stream) => return Ok(stream),
            Err(e) => e,
        };
        match dial.failed(Instant::now(), error) {
            Next::Now => {}
            Next::At(at) => std::thread::sleep(at.saturating_duration_since(Instant::now())),
            Next::GiveUp(e) => return Err(e),
        }
    }
}

fn attempt(dial: &mut Dial) -> io::Result<Nonblocking> {
    let Some(endpoint) = dial.endpoint() else {
        let why = "the name has no address";
        return Err(io::Error::new(io::ErrorKind::NotFound, why));
    };
    let mut stream = Nonblocking::connect(endpoint)?;
    let begun = dial.begun(Instant::now());
    if begun == Begun::InProgress {
        while !stream.connected()? {
            wait(&stream, Wanted::Writable, dial.attempt_deadline())?;
        }
    }
    while !dial.shake_hands(&mut stream)? {
        wait(&stream, Wanted::Readable, dial.attempt_deadline())?;
    }
    Ok(stream)
}

fn wait(stream: &Nonblocking, wanted: Wanted, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    match sys::wait(stream.as_socket(), wanted, left) {
        Ok(true) => Ok(()),
        Ok(false) if left.is_zero() => {
            let why = "it hasn't answered in time";
            Err(io::Error::new(io::ErrorKind::TimedOut, why))
        }
        Ok(false) => Ok(()),
        Err(e) if is_timeout(&e) => Ok(()),
        Err(e) => Err(e),
    }
}
