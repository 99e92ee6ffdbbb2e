//! Connecting as a state machine: one address after the other, again when a backlog is full, until a deadline.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use crate::address::Address;
use crate::error::{Error, Operation};
use crate::stream::Endpoint;

/// The first pause before another try at a full backlog, doubled with each up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(64);

/// What is to be done after a failed attempt.
#[derive(Debug)]
pub(crate) enum Next {
    /// Try [`Dial::endpoint`], now another one.
    Now,
    /// Try again then.
    At(Instant),
    /// It can't be had.
    GiveUp(io::Error),
}

/// An attempt to connect.
#[derive(Debug)]
pub(crate) struct Dial {
    candidates: VecDeque<Endpoint>,
    deadline: Instant,
    pause: Duration,
}

impl Dial {
    /// A dial that gives up at `deadline`; without an endpoint yet.
    pub(crate) fn new(deadline: Instant) -> Dial {
        Dial {
            candidates: VecDeque::new(),
            deadline,
            pause: FIRST_PAUSE,
        }
    }

    /// Adds endpoints to try, in this order.
    pub(crate) fn add(&mut self, endpoints: impl IntoIterator<Item = Endpoint>) {
        self.candidates.extend(endpoints);
    }

    /// What to connect to now.
    pub(crate) fn endpoint(&self) -> Option<&Endpoint> {
        self.candidates.front()
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Takes the failure of the attempt at [`endpoint`](Dial::endpoint).
    pub(crate) fn failed(&mut self, now: Instant, error: io::Error) -> Next {
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

/// Whether a failed connect to a Unix socket proves that nobody listens there (a full backlog is `WouldBlock`).
pub(crate) fn says_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, NotFound};
    matches!(error.kind(), NotFound | ConnectionRefused)
}

/// The error of a dial to `address`, with what can be done about it.
pub(crate) fn explain(address: &Address, cause: io::Error) -> Error {
    use io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied, TimedOut};
    let remedy = match (address, cause.kind()) {
        (Address::Hyperkit(hyperkit), NotFound) if !hyperkit.vm.state_dir.is_dir() => {
            "there is no such state directory: is the path right?"
        }
        (Address::Hyperkit(_), NotFound) => "the VM is not running: start it",
        (Address::Hyperkit(_), ConnectionRefused) => {
            "the VM is not running (its socket is a leftover): start it"
        }
        (Address::Hyperkit(_), PermissionDenied) => "run as the user who runs the VM",
        (Address::Unix(_), NotFound | ConnectionRefused) => "is the server running?",
        (Address::Unix(_), PermissionDenied) => "you may not use that socket",
        (Address::Tcp(_), ConnectionRefused) => "nothing listens on that port",
        (Address::Tcp(_), TimedOut) => "the host doesn't answer",
        _ => return Error::new(Operation::Connect, address, cause),
    };
    Error::new(Operation::Connect, address, cause).with_remedy(remedy)
}

/// The error of a hyperkit connection that ended before its first byte: all that its device says of a refusal.
pub(crate) fn refused_in_silence(address: &Address) -> Error {
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
