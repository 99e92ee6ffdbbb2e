//! The reasons for which connections end.

use std::{fmt, io};

use crate::address::{Address, SocketKind};
use crate::error::{Error, Operation};
use crate::sys;

/// Why a connection has ended: what began its end, or what ended it by force.
///
/// What merely follows from it, such as the close of the other side, changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EndReason {
    /// The client ended first, in order: with an EOF, or by closing its socket.
    ClientClosed,
    /// The server ended first, in order.
    ServerClosed,
    /// The client's connection broke off, with a reset for example.
    ClientReset,
    /// The server's connection broke off, with a reset for example.
    ServerReset,
    /// The client left before its target was connected.
    ClientGaveUp,
    /// No byte moved for [`Timeouts::idle`](super::rule::Timeouts::idle).
    IdleTimeout,
    /// One side had ended, and no byte moved for
    /// [`Timeouts::half_closed`](super::rule::Timeouts::half_closed).
    HalfClosedTimeout,
    /// A peer was gone or a half-close was held back, and the rest did not end within
    /// [`Timeouts::drain`](super::rule::Timeouts::drain).
    DrainTimeout,
    /// The process of the hyperkit VM has ended.
    VmGone,
    /// The target could not be connected.
    Refused(RefusalReason),
    /// It was closed by [`Handle::close`](crate::proxy::Handle::close).
    ClosedOnRequest,
    /// Its forward was removed, and its time was over.
    Removed,
    /// The proxy was stopped, and its time was over.
    Stopped,
    /// This system had no thread to relay it.
    Failed,
    /// The program that it led to (`exec:`) ended its output, and had failed.
    ProgramFailed(ProgramFailure),
}

/// How a program has failed that was started for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProgramFailure {
    /// It has ended with this exit status, which isn't 0.
    Status(i32),
    /// This signal has ended it.
    Signal(i32),
}

/// Writes it in words: `exit status 1`, `killed by signal 9`.
impl fmt::Display for ProgramFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProgramFailure::Status(status) => write!(f, "exit status {status}"),
            ProgramFailure::Signal(signal) => write!(f, "killed by signal {signal}"),
        }
    }
}

impl EndReason {
    /// How many kinds of reasons there are. All refusals are one, and so are all failures of
    /// programs.
    pub(crate) const COUNT: usize = 15;

    /// Returns the number of the kind, and its name for programs and for people.
    fn description(self) -> (usize, &'static str, &'static str) {
        match self {
            EndReason::ClientClosed => (0, "client_closed", "client closed"),
            EndReason::ServerClosed => (1, "server_closed", "server closed"),
            EndReason::ClientReset => (2, "client_reset", "client reset"),
            EndReason::ServerReset => (3, "server_reset", "server reset"),
            EndReason::ClientGaveUp => (4, "client_gave_up", "client gave up"),
            EndReason::IdleTimeout => (5, "idle_timeout", "idle timeout"),
            EndReason::HalfClosedTimeout => (6, "half_closed_timeout", "half-closed timeout"),
            EndReason::DrainTimeout => (7, "drain_timeout", "drain timeout"),
            EndReason::VmGone => (8, "vm_gone", "VM gone"),
            EndReason::Refused(_) => (9, "refused", "refused"),
            EndReason::ClosedOnRequest => (10, "closed_on_request", "closed on request"),
            EndReason::Removed => (11, "removed", "forward removed"),
            EndReason::Stopped => (12, "stopped", "proxy stopped"),
            EndReason::Failed => (13, "failed", "no thread to relay it"),
            EndReason::ProgramFailed(_) => (14, "program_failed", "program failed"),
        }
    }

    /// Returns the number of the reason's kind, less than [`COUNT`](EndReason::COUNT).
    pub(crate) fn index(self) -> usize {
        self.description().0
    }

    /// Returns the name of the reason's kind, as the status and the metrics have it:
    /// `client_closed` for example.
    pub fn name(self) -> &'static str {
        self.description().1
    }

    /// Returns how much the reason says. One that says more replaces one that says less: that a
    /// side has ended in order, that a connection broke off, that it was ended by force.
    fn weight(self) -> u8 {
        match self {
            EndReason::ClientClosed | EndReason::ServerClosed | EndReason::Failed => 0,
            EndReason::ClientReset
            | EndReason::ServerReset
            | EndReason::DrainTimeout
            | EndReason::VmGone => 1,
            _ => 2,
        }
    }

    /// Notes the reason in place of an earlier one. What begins the end of a connection counts,
    /// unless something follows that says more.
    pub(crate) fn note_in(self, noted: &mut Option<EndReason>) {
        if noted.is_none_or(|earlier| self.weight() > earlier.weight()) {
            *noted = Some(self);
        }
    }
}

/// Writes it in words: `client closed`, `refused (absent)`, `program failed (exit status 1)`.
impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.description().2)?;
        match self {
            EndReason::Refused(why) => write!(f, " ({why})"),
            EndReason::ProgramFailed(how) => write!(f, " ({how})"),
            _ => Ok(()),
        }
    }
}

/// The reason why a connection could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RefusalReason {
    /// See [`Refusals::by_target`](super::counters::Refusals::by_target).
    ByTarget,
    /// See [`Refusals::absent`](super::counters::Refusals::absent).
    Absent,
    /// See [`Refusals::dial_timeout`](super::counters::Refusals::dial_timeout).
    DialTimeout,
    /// See [`Refusals::full`](super::counters::Refusals::full).
    Full,
    /// See [`Refusals::not_allowed`](super::counters::Refusals::not_allowed).
    NotAllowed,
    /// See [`Refusals::no_header`](super::counters::Refusals::no_header).
    NoHeader,
    /// See [`Refusals::other`](super::counters::Refusals::other).
    Other,
}

impl RefusalReason {
    /// How many reasons there are; the last one is [`Other`](RefusalReason::Other).
    pub(crate) const COUNT: usize = RefusalReason::Other as usize + 1;
}

/// Writes it in words: `by target`, `absent`.
impl fmt::Display for RefusalReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RefusalReason::ByTarget => "by target",
            RefusalReason::Absent => "absent",
            RefusalReason::DialTimeout => "dial timeout",
            RefusalReason::Full => "full",
            RefusalReason::NotAllowed => "not allowed",
            RefusalReason::NoHeader => "no header",
            RefusalReason::Other => "other",
        })
    }
}

impl RefusalReason {
    /// Returns the reason that the error of a dial stands for.
    pub(crate) fn from_error(target: &Address, error: &Error) -> RefusalReason {
        use io::ErrorKind::{
            BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable,
            NetworkUnreachable, NotFound, TimedOut,
        };
        match error.kind() {
            _ if error.operation() == Operation::Resolve => RefusalReason::Absent,
            NotFound | HostUnreachable | NetworkUnreachable => RefusalReason::Absent,
            // A socket file on which nobody listens any more.
            ConnectionRefused
                if error.cause().raw_os_error().is_some()
                    && target.transport().socket == SocketKind::Unix =>
            {
                RefusalReason::Absent
            }
            _ if sys::is_no_such_cid(error.cause()) => RefusalReason::Absent,
            ConnectionRefused | ConnectionReset | ConnectionAborted | BrokenPipe => {
                RefusalReason::ByTarget
            }
            TimedOut => RefusalReason::DialTimeout,
            _ => RefusalReason::Other,
        }
    }
}
