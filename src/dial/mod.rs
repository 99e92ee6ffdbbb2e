//! Connecting as a state machine: tries one address after the other, again when a backlog is full,
//! until a deadline.

mod addresses;
mod attempts;
mod blocking;
#[cfg(unix)]
mod content;
#[cfg(unix)]
mod exec;
#[cfg(windows)]
mod hyperv;
mod race;

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::address::{Address, UnixAddress};
use crate::error::{Error, Operation};
use crate::stream::endpoint::Endpoint;
use crate::stream::socket::Socket;
use crate::stream::vsock_mux::Handshake;
use crate::sys;

pub(crate) use addresses::FailedAddresses;
pub(crate) use attempts::Attempts;
#[cfg(all(unix, feature = "cli"))]
pub(crate) use blocking::start_program_unless;
pub(crate) use blocking::{check_supported, limit_timeout};
#[cfg(all(unix, feature = "cli"))]
pub(crate) use exec::start as start_program;
#[cfg(unix)]
pub(crate) use exec::{ProgramEnd, Programs};
#[cfg(windows)]
pub(crate) use hyperv::{hv_options, vm_id};
pub(crate) use race::Race;

/// The first pause before another try at a full backlog, doubled with each up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(64);

/// The remedy where a path leads to a file that is no socket.
pub(crate) const NO_SOCKET: &str =
    "there is a file of that name, but it is no socket: is the path right?";

/// How long an address may leave a connect unanswered before the next one is tried as well
/// ("Connection Attempt Delay", RFC 8305, section 5).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// What to do after a failed attempt.
#[derive(Debug)]
pub(crate) enum Next {
    /// Try the new [`Dial::endpoint`] now.
    Now,
    /// Try the same one again at that time.
    At(Instant),
    /// Give up, with this error.
    GiveUp(io::Error),
}

/// How far an attempt is once its socket was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begun {
    Connected,
    /// Connected; [`Dial::shake_hands`] is to follow.
    Handshake,
    /// Connecting: an event tells when it is done.
    InProgress,
}

/// A connect to one address or to several, one after the other.
#[derive(Debug)]
pub(crate) struct Dial {
    candidates: VecDeque<Endpoint>,
    deadline: Instant,
    pause: Duration,
    handshake: Option<Handshake>,
    /// The time at which the attempt under way is given up for the next one.
    attempt_deadline: Instant,
    /// The time at which the next one may be made beside it.
    race_at: Instant,
    has_raced: bool,
}

impl Dial {
    /// Makes a dial that gives up at `deadline`, without an endpoint yet.
    pub(crate) fn new(deadline: Instant) -> Dial {
        Dial {
            candidates: VecDeque::new(),
            deadline,
            pause: FIRST_PAUSE,
            handshake: None,
            attempt_deadline: deadline,
            race_at: deadline,
            has_raced: false,
        }
    }

    /// Adds endpoints to try, in this order.
    pub(crate) fn add(&mut self, endpoints: impl IntoIterator<Item = Endpoint>) {
        self.candidates.extend(endpoints);
    }

    /// Returns the endpoint to connect to now.
    pub(crate) fn endpoint(&self) -> Option<&Endpoint> {
        self.candidates.front()
    }

    /// Notes that the endpoint's socket was made. Returns what to wait for.
    pub(crate) fn begin_attempt(&mut self, now: Instant) -> Begun {
        // An address that doesn't answer leaves time for those after it.
        let left = self.deadline.saturating_duration_since(now);
        let share = u32::try_from(self.candidates.len()).unwrap_or(u32::MAX);
        self.attempt_deadline = now + left / share.max(1);
        self.race_at = now + ATTEMPT_DELAY;
        self.handshake = self.endpoint().and_then(Endpoint::handshake);
        match self.endpoint() {
            Some(endpoint) if !endpoint.connects_at_once() => Begun::InProgress,
            _ if self.handshake.is_some() => Begun::Handshake,
            _ => Begun::Connected,
        }
    }

    /// Returns the endpoint that may be tried beside the one that is tried now.
    pub(crate) fn next_endpoint(&self) -> Option<&Endpoint> {
        self.candidates.get(1)
    }

    /// Returns when [`next_endpoint`](Dial::next_endpoint) is to be tried, if there is one: soon if
    /// there is room for one more attempt, or else when one of them has had its time.
    pub(crate) fn next_attempt(&self, has_room: bool) -> Option<Instant> {
        self.next_endpoint().map(|_| match has_room {
            true => self.race_at,
            false => self.attempt_deadline,
        })
    }

    /// Has the next endpoint tried now, since another one has failed.
    pub(crate) fn hasten_next(&mut self, now: Instant) {
        self.race_at = now;
    }

    /// Drops the next endpoint, which can't be tried, and returns it.
    pub(crate) fn skip_next(&mut self) -> Option<Endpoint> {
        self.candidates.remove(1)
    }

    /// Turns to the next endpoint; [`begin_attempt`](Dial::begin_attempt) must follow. Returns the
    /// one that was tried before: its attempt goes on.
    pub(crate) fn turn_to_next(&mut self) -> Option<Endpoint> {
        self.has_raced = true;
        self.candidates.pop_front()
    }

    /// Returns to an endpoint whose attempt has gone on. Returns the one that was tried last.
    pub(crate) fn return_to(&mut self, endpoint: Endpoint) -> Option<Endpoint> {
        let latest = self.candidates.pop_front();
        self.candidates.push_front(endpoint);
        latest
    }

    /// Returns whether two endpoints have been tried at a time.
    pub(crate) fn has_raced(&self) -> bool {
        self.has_raced
    }

    /// Returns whether the peer has a request that it hasn't answered: some VMMs die if they are
    /// closed now.
    pub(crate) fn is_shaking_hands(&self) -> bool {
        self.handshake.is_some()
    }

    /// Goes on with the handshake of the socket's family. Returns whether it is done.
    ///
    /// # Errors
    /// Returns why the peer can't be connected to.
    pub(crate) fn shake_hands(&mut self, socket: &mut impl Socket) -> io::Result<bool> {
        match &mut self.handshake {
            Some(handshake) => handshake.advance(socket),
            None => Ok(true),
        }
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Notes that the attempt at [`endpoint`](Dial::endpoint) failed. Returns what to do next.
    pub(crate) fn note_failure(&mut self, now: Instant, error: io::Error) -> Next {
        if error.kind() == io::ErrorKind::WouldBlock {
            let at = now + self.pause;
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            if at < self.deadline {
                return Next::At(at);
            }
            return Next::GiveUp(io::Error::new(
                io::ErrorKind::TimedOut,
                "its backlog is full: it listens but doesn't accept",
            ));
        }
        self.candidates.pop_front();
        if self.candidates.is_empty() || now >= self.deadline {
            Next::GiveUp(error)
        } else {
            Next::Now
        }
    }
}

/// Puts the addresses of a name into the order in which they are tried: the families take turns,
/// beginning with that of the first one (RFC 8305, section 4).
fn interleave_families(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first = addresses.first().is_some_and(SocketAddr::is_ipv4);
    let (ours, theirs): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|it| it.is_ipv4() == first);
    let (mut ours, mut theirs) = (ours.into_iter(), theirs.into_iter());
    let mut order = Vec::new();
    loop {
        let turn = [ours.next(), theirs.next()];
        if turn == [None, None] {
            return order;
        }
        order.extend(turn.into_iter().flatten());
    }
}

/// Starts a program or opens a file, which may block. Returns the connection with it. The end of a
/// program is told.
///
/// # Errors
/// Returns why it can't be had; `Unsupported` for an address of another family.
#[cfg(unix)]
pub(crate) fn on_thread(
    address: &Address,
    programs: &std::sync::Arc<Programs>,
    tell_end: impl FnOnce(ProgramEnd) + Send + 'static,
) -> crate::error::Result<crate::stream::nonblocking::Stream> {
    use crate::stream::local::{Local, PassedDescriptors};
    use crate::stream::nonblocking::Stream;
    let connected = match address {
        Address::Exec(exec) => exec::start(exec, programs, tell_end),
        Address::File(file) => content::connect(address, file),
        other => {
            return Err(crate::stream::endpoint::not_carried(
                Operation::Connect,
                other,
            ));
        }
    }?;
    connected
        .set_nonblocking(true)
        .map_err(|e| Error::new(Operation::Connect, address, e))?;
    let connected = mio::net::UnixStream::from_std(connected);
    let stream = Stream::Local(Local::from_unix(connected, PassedDescriptors::Refused));
    stream.set_options();
    Ok(stream)
}

/// Returns whether a later dial may succeed: what failed isn't there yet, or not up yet.
pub(crate) fn is_worth_retrying(error: &Error) -> bool {
    use io::ErrorKind::{
        BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable,
        NetworkUnreachable, NotFound, TimedOut,
    };
    let may_come = matches!(
        error.kind(),
        BrokenPipe
            | ConnectionAborted
            | ConnectionRefused
            | ConnectionReset
            | HostUnreachable
            | NetworkUnreachable
            | NotFound
            | TimedOut
    );
    let no_such_cid = sys::is_no_such_cid(error.cause());
    may_come || no_such_cid || error.operation() == Operation::Resolve
}

/// Returns whether a failed connect to a Unix socket proves that no socket listens there. (A full
/// backlog is `WouldBlock`.)
pub(crate) fn proves_no_listener(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, NotFound};
    matches!(error.kind(), NotFound | ConnectionRefused)
}

/// Returns whether [`explain`] reads files for its remedy.
pub(crate) fn explanation_reads_files(address: &Address, cause: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, NotFound};
    matches!(
        (address, cause.kind()),
        (Address::Hyperkit(_), NotFound) | (Address::Unix(UnixAddress::Path(_)), ConnectionRefused)
    )
}

/// Returns the error of a dial to `address`, with what can be done about it.
pub(crate) fn explain(address: &Address, cause: io::Error) -> Error {
    use io::ErrorKind::{ConnectionRefused, ConnectionReset, NotFound, PermissionDenied, TimedOut};
    if is_hung_up(address, &cause) {
        return refused_by_guest_or_device(address);
    }
    match address {
        Address::Vsock(_) => return explain_vsock(Operation::Connect, address, cause),
        Address::Hvsock(_) => return explain_hvsock(Operation::Connect, address, cause),
        _ => {}
    }
    let remedy = match (address, cause.kind()) {
        (Address::Hyperkit(hyperkit), NotFound) if !hyperkit.vm.state_dir.is_dir() => {
            "there is no such state directory: is the path right?"
        }
        (Address::Hyperkit(_), NotFound) => "the VM is not running: start it",
        (Address::Hyperkit(_), ConnectionRefused) => {
            "the VM is not running (its socket is a leftover): start it"
        }
        (Address::Hyperkit(_), PermissionDenied) => "run as the user who runs the VM",
        (Address::VsockMux(mux), ConnectionRefused) if cause.raw_os_error().is_none() => {
            let error = Error::new(Operation::Connect, address, cause);
            return error.with_remedy(format!(
                "does a program in the guest listen on vsock port {}?",
                mux.port
            ));
        }
        (Address::VsockMux(_), ConnectionReset) => "the guest is not up yet",
        (Address::VsockMux(_), NotFound | ConnectionRefused) => "is the VM running?",
        (Address::Unix(UnixAddress::Path(path)), ConnectionRefused) if sys::is_no_socket(path) => {
            NO_SOCKET
        }
        (Address::Unix(_), NotFound | ConnectionRefused) => "is the server running?",
        (Address::Unix(_), _) if sys::is_no_stream(&cause) => {
            "it is a datagram socket, and a stream is wanted; for one of syslog there is `hvsock syslog`"
        }
        (Address::Npipe(_), NotFound) => "is the server running?",
        (Address::Npipe(_), PermissionDenied) => "that pipe's server doesn't let you use it",
        (Address::Unix(_), PermissionDenied) => "you may not use that socket",
        (Address::Tcp(_), ConnectionRefused) => "nothing listens on that port",
        (Address::Tcp(_), TimedOut) => "the host doesn't answer",
        _ => return Error::new(Operation::Connect, address, cause),
    };
    Error::new(Operation::Connect, address, cause).with_remedy(remedy)
}

/// Returns the error of an AF_VSOCK socket, with what can be done about it.
pub(crate) fn explain_vsock(operation: Operation, address: &Address, cause: io::Error) -> Error {
    use io::ErrorKind::{ConnectionReset, PermissionDenied, TimedOut};
    // Linux says "refused" by ECONNRESET, and "no such CID" by ENODEV.
    let remedy = match cause.kind() {
        ConnectionReset => "does a program listen on that vsock port there, and is the VM up?",
        TimedOut => "the VM doesn't answer: is it up?",
        PermissionDenied => "you may not use AF_VSOCK here",
        _ if sys::is_no_such_cid(&cause) => {
            "no VM has that CID, or its transport is missing: in a guest load vmw_vsock_virtio_transport, on a host vhost_vsock, for `local` vsock_loopback"
        }
        _ if sys::is_no_such_family(&cause) => "the kernel has no AF_VSOCK: modprobe vsock",
        _ => return Error::new(operation, address, cause),
    };
    Error::new(operation, address, cause).with_remedy(remedy)
}

/// Returns the error of an AF_HYPERV socket, with what can be done about it.
pub(crate) fn explain_hvsock(operation: Operation, address: &Address, cause: io::Error) -> Error {
    use io::ErrorKind::{ConnectionRefused, TimedOut};
    let remedy = match cause.kind() {
        _ if sys::is_no_such_family(&cause) => {
            "this Windows has no Hyper-V sockets: they came with Windows 10 and Server 2016, and want Hyper-V"
        }
        TimedOut | ConnectionRefused => {
            "is the VM up, does a program in it listen on that service, and is the service registered?"
        }
        _ => return Error::new(operation, address, cause),
    };
    Error::new(operation, address, cause).with_remedy(remedy)
}

/// Returns the error of a connection that ended before its first byte, which is how hyperkit
/// refuses.
pub(crate) fn refused_by_eof(address: &Address) -> Error {
    let why = "the guest ended it without a byte";
    let cause = io::Error::new(io::ErrorKind::ConnectionRefused, why);
    let error = Error::new(Operation::Connect, address, cause);
    match address {
        Address::Hyperkit(hyperkit) => error.with_remedy(format!(
            "does a program in the guest listen on vsock port {}?",
            hyperkit.port
        )),
        _ => error,
    }
}

/// Returns why a dial fails whose VM, which has a CID, is gone.
pub(crate) fn vm_is_gone() -> io::Error {
    sys::no_such_cid()
}

/// Returns the error of a dial whose VM has ended before its guest has answered.
pub(crate) fn vm_has_ended(address: &Address) -> Error {
    let cause = io::Error::new(io::ErrorKind::ConnectionReset, "its VM has ended");
    Error::new(Operation::Connect, address, cause).with_remedy("start it again")
}

/// Returns whether a connect was ended before the line that says where it leads: a hyperkit device
/// that has no slot left does that.
pub(crate) fn is_hung_up(address: &Address, cause: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset};
    matches!(
        (address, cause.kind()),
        (Address::Hyperkit(_), BrokenPipe | ConnectionReset)
    )
}

/// Returns the same error where it can't be told from that of a VM whose slots are all taken:
/// hyperkit ends such a dial as well.
pub(crate) fn refused_by_guest_or_device(address: &Address) -> Error {
    let why = "it was ended without a byte";
    let cause = io::Error::new(io::ErrorKind::ConnectionRefused, why);
    let error = Error::new(Operation::Connect, address, cause);
    match address {
        Address::Hyperkit(hyperkit) => error.with_remedy(format!(
            "are all slots of the VM taken (`hvsock connections`, `hvsock doctor`), or does no program in the guest listen on vsock port {}?",
            hyperkit.port
        )),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_families_take_turns() {
        let [a, b, c] = [1, 2, 3].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let [x, y] = [1, 2].map(|port| SocketAddr::from(([0; 16], port)));
        assert_eq!(interleave_families(vec![x, y, a, b, c]), [x, a, y, b, c]);
        assert_eq!(interleave_families(vec![a, b, x]), [a, x, b]);
        assert_eq!(interleave_families(Vec::new()), []);
    }

    #[test]
    fn an_address_that_is_silent_leaves_time_for_the_next() {
        let now = Instant::now();
        let end = now + Duration::from_secs(30);
        let mut dial = Dial::new(end);
        let addresses = [[127, 0, 0, 1], [127, 0, 0, 2], [127, 0, 0, 3]];
        dial.add(addresses.map(|ip| Endpoint::Tcp(SocketAddr::from((ip, 1)))));
        assert_eq!(dial.begin_attempt(now), Begun::InProgress);
        let first = dial.attempt_deadline;
        assert_eq!(first, now + Duration::from_secs(10));
        let timed_out = || io::ErrorKind::TimedOut.into();
        assert!(matches!(dial.note_failure(first, timed_out()), Next::Now));
        dial.begin_attempt(first);
        assert!(matches!(dial.note_failure(first, timed_out()), Next::Now));
        dial.begin_attempt(first);
        assert_eq!(dial.attempt_deadline, end);
        assert!(matches!(
            dial.note_failure(end, timed_out()),
            Next::GiveUp(_)
        ));
    }

    #[test]
    fn a_full_backlog_is_tried_again_until_the_deadline() {
        let start = Instant::now();
        let mut dial = Dial::new(start + Duration::from_secs(1));
        dial.add([Endpoint::Tcp(SocketAddr::from(([127, 0, 0, 1], 1)))]);
        let (mut now, mut tries) = (start, 0);
        loop {
            match dial.note_failure(now, io::ErrorKind::WouldBlock.into()) {
                Next::At(at) => {
                    assert!(at > now && at - now <= LONGEST_PAUSE);
                    now = at;
                    tries += 1;
                }
                Next::GiveUp(e) => break assert_eq!(e.kind(), io::ErrorKind::TimedOut),
                Next::Now => panic!("no pause"),
            }
        }
        assert!((10..100).contains(&tries), "{tries}");
    }
}
