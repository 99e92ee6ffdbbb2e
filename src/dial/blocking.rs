//! Connects a blocking stream: a dial that is driven on the caller's thread.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use std::{io, thread};

use crate::address::Address;
#[cfg(all(unix, feature = "cli"))]
use crate::address::ExecAddress;
use crate::error::{Error, Operation, Result};
use crate::stream::endpoint::{Endpoint, Target, not_carried};
use crate::stream::nonblocking::Stream as Nonblocking;
use crate::stream::{Stream, is_timeout, refuse_zero};
use crate::sys::{self, Wanted};
use crate::time::after;

#[cfg(all(unix, feature = "cli"))]
use super::ProgramEnd;
use super::{Attempts, Begun, Dial, FailedAddresses, Next, explain};

/// How long [`Stream::connect`] tries.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a connect checks whether it was cancelled.
const LOOK: Duration = Duration::from_millis(100);

/// A function that tells whether a connect is cancelled; `None`: it never is.
type IsCancelled<'a> = Option<&'a dyn Fn() -> bool>;

fn check_cancelled(is_cancelled: IsCancelled<'_>) -> io::Result<()> {
    match is_cancelled {
        Some(is_cancelled) if is_cancelled() => Err(io::ErrorKind::Interrupted.into()),
        _ => Ok(()),
    }
}

impl Stream {
    /// Connects to `address`, within 30 s, to a `hvsock://` one within 1 s:
    /// [`connect_timeout`](Stream::connect_timeout).
    ///
    /// ```
    /// # #[cfg(all(unix, feature = "simulate"))] {
    /// use hvsock::address::HyperkitAddress;
    /// use std::io::{Read, Write};
    /// # use hvsock::simulate::{Service, Vm};
    /// # let dir = tempfile::tempdir()?;
    /// # let vm = Vm::builder(dir.path()).guest(1024, Service::Echo).start()?;
    /// # let state_dir = dir.path();
    ///
    /// let guest = HyperkitAddress::new(state_dir, 1024).into();
    /// let mut stream = hvsock::Stream::connect(&guest)?;
    /// stream.write_all(b"hello")?;
    /// let mut echo = [0; 5];
    /// stream.read_exact(&mut echo)?;
    /// assert_eq!(&echo, b"hello");
    /// // A connection with a hyperkit guest is closed gracefully, and never unread.
    /// stream.finish(std::time::Duration::from_secs(5))?;
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Returns the errors of [`connect_timeout`](Stream::connect_timeout).
    pub fn connect(address: &Address) -> Result<Stream> {
        Stream::connect_timeout(address, limit_timeout(address, CONNECT_TIMEOUT))
    }

    /// Connects to `address`, within `timeout`. A name has to be resolved first, which takes what
    /// time it takes; a Hyper-V VM's at most 30 s ([`hyperv::find`](crate::hyperv::find)).
    ///
    /// hyperkit doesn't say whether the guest has accepted. If nothing listens there, an EOF comes
    /// before the first byte; or, if something was written already, `ConnectionReset` or
    /// `BrokenPipe`.
    ///
    /// # Errors
    /// Returns `ConnectionRefused` (AF_VSOCK: `ConnectionReset`) if nothing listens there;
    /// `NotFound` if there is no such socket or name; `TimedOut`; `InvalidInput` if `timeout` is
    /// zero; `Unsupported` for a family that this system doesn't carry; what the kernel says
    /// otherwise.
    pub fn connect_timeout(address: &Address, timeout: Duration) -> Result<Stream> {
        refuse_zero(Some(timeout)).map_err(|e| Error::new(Operation::Connect, address, e))?;
        dial(address, timeout, None)
    }

    /// Connects as [`connect_timeout`](Stream::connect_timeout) does, unless it is cancelled
    /// before.
    ///
    /// # Errors
    /// Returns the same errors; `Interrupted` if it was cancelled.
    #[cfg(feature = "cli")]
    pub(crate) fn connect_unless(
        address: &Address,
        timeout: Duration,
        is_cancelled: &dyn Fn() -> bool,
    ) -> Result<Stream> {
        dial(address, timeout, Some(is_cancelled))
    }
}

fn dial(address: &Address, timeout: Duration, is_cancelled: IsCancelled<'_>) -> Result<Stream> {
    let begun = Instant::now();
    #[cfg(windows)]
    if let Address::Hvsock(_) = address {
        let to = address.clone();
        return call_cancellable(address, is_cancelled, move || {
            super::hyperv::connect(&to, timeout)
        });
    }
    let endpoints = match Target::of(address) {
        Target::Endpoint(endpoint) => vec![endpoint],
        Target::Name { host, port } => {
            let (to, name) = (address.clone(), host.to_owned());
            call_cancellable(address, is_cancelled, move || resolve(&to, &name, port))?
        }
        #[cfg(unix)]
        Target::OnThread => {
            let to = address.clone();
            let dial = move || super::on_thread(&to, &super::Programs::alone(), drop);
            return call_cancellable(address, is_cancelled, dial).and_then(|it| {
                Stream::from_nonblocking(it, address).map_err(|e| explain(address, e))
            });
        }
        Target::NotCarried => return Err(not_carried(Operation::Connect, address)),
    };
    let mut dial = Dial::new(after(begun, timeout));
    dial.add(endpoints);
    connect(dial, is_cancelled)
        .and_then(|stream| Stream::from_nonblocking(stream, address))
        .map_err(|e| explain(address, e))
}

/// Starts a program as a dial of it does, unless that is cancelled before. Its end is told.
///
/// # Errors
/// Returns why it can't be started; `Interrupted` if that was cancelled.
#[cfg(all(unix, feature = "cli"))]
pub(crate) fn start_program_unless(
    exec: &ExecAddress,
    is_cancelled: &dyn Fn() -> bool,
    tell_end: impl FnOnce(ProgramEnd) + Send + 'static,
) -> Result<Stream> {
    let (address, to) = (Address::Exec(exec.clone()), exec.clone());
    let start = move || super::start_program(&to, &super::Programs::alone(), tell_end);
    let socket = call_cancellable(&address, Some(is_cancelled), start)?;
    let socket = std::os::fd::OwnedFd::from(socket);
    Ok(Stream::from_socket(socket, address))
}

/// Calls what blocks; on another thread if it can be cancelled.
fn call_cancellable<T: Send + 'static>(
    address: &Address,
    is_cancelled: IsCancelled<'_>,
    call: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    if is_cancelled.is_none() {
        return call();
    }
    let fail = |cause| Error::new(Operation::Connect, address, cause);
    let (sender, receiver) = channel();
    // If there is no receiver any more, it was cancelled.
    let call = move || drop(sender.send(call()));
    thread::Builder::new().spawn(call).map_err(fail)?;
    loop {
        match receiver.recv_timeout(LOOK) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Timeout) => check_cancelled(is_cancelled).map_err(fail)?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(fail(io::ErrorKind::Interrupted.into()));
            }
        }
    }
}

/// Returns how much of `timeout` a dial to `address` has, unless a caller asked for that very time.
pub(crate) fn limit_timeout(address: &Address, timeout: Duration) -> Duration {
    let longest = address.transport().connect_timeout;
    longest.map_or(timeout, |longest| timeout.min(longest))
}

/// Checks that this system has sockets of the family, where a connect blocks.
///
/// # Errors
/// Returns why it hasn't.
pub(crate) fn check_supported(address: &Address) -> Result<()> {
    match address {
        #[cfg(windows)]
        Address::Hvsock(hvsock) => super::hyperv::check_supported(address, hvsock),
        _ if matches!(Target::of(address), Target::NotCarried) => {
            Err(not_carried(Operation::Connect, address))
        }
        _ => Ok(()),
    }
}

fn resolve(address: &Address, host: &str, port: u16) -> Result<Vec<Endpoint>> {
    (host, port)
        .to_socket_addrs()
        .map(|found: std::vec::IntoIter<SocketAddr>| {
            let order = FailedAddresses::own().order(address, found.collect(), Instant::now());
            order.into_iter().map(Endpoint::Tcp).collect()
        })
        .map_err(|e| {
            Error::new(Operation::Resolve, host, e)
                .with_remedy("is the name right, and does DNS answer?")
        })
}

/// Tries one endpoint after the other, and more than one at a time if the first doesn't answer.
fn connect(dial: Dial, is_cancelled: IsCancelled<'_>) -> io::Result<Nonblocking> {
    let mut attempts = Attempts::new(dial);
    loop {
        let error = match attempt(&mut attempts, is_cancelled) {
            Ok(stream) => return Ok(stream),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Err(e),
            Err(e) => e,
        };
        match attempts.note_failure(Instant::now(), error) {
            Next::Now => {}
            Next::At(at) => {
                thread::sleep(at.saturating_duration_since(Instant::now()));
                check_cancelled(is_cancelled)?;
            }
            Next::GiveUp(e) => return Err(e),
        }
    }
}

fn attempt(attempts: &mut Attempts, is_cancelled: IsCancelled<'_>) -> io::Result<Nonblocking> {
    if attempts.begin()? == Begun::InProgress {
        while !attempts.go_on(Instant::now())? {
            wait(attempts, Wanted::Writable, is_cancelled)?;
        }
    }
    while !attempts.shake_hands()? {
        if Instant::now() >= attempts.wait_until() {
            let why = "it hasn't answered in time";
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        wait(attempts, Wanted::Readable, is_cancelled)?;
    }
    attempts.take()
}

/// Waits until an attempt may have gone on, or for a while.
fn wait(attempts: &Attempts, wanted: Wanted, is_cancelled: IsCancelled<'_>) -> io::Result<()> {
    check_cancelled(is_cancelled)?;
    let left = time_left(attempts.wait_until(), is_cancelled);
    let sockets: Vec<_> = attempts.streams().filter_map(Nonblocking::socket).collect();
    match sys::wait_for_any_of(&sockets, wanted, left) {
        Err(e) if !is_timeout(&e) => Err(e),
        _ => Ok(()),
    }
}

/// Returns how long to wait at a time, until `end` at most.
fn time_left(end: Instant, is_cancelled: IsCancelled<'_>) -> Duration {
    let left = end.saturating_duration_since(Instant::now());
    is_cancelled.map_or(left, |_| left.min(LOOK))
}
