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

    /// The kinds, each with its name for programs and in words. Whatever tells of a reason has it
    /// from here.
    const KINDS: [(&'static str, &'static str); EndReason::COUNT] = [
        ("client_closed", "client closed"),
        ("server_closed", "server closed"),
        ("client_reset", "client reset"),
        ("server_reset", "server reset"),
        ("client_gave_up", "client gave up"),
        ("idle_timeout", "idle timeout"),
        ("half_closed_timeout", "half-closed timeout"),
        ("drain_timeout", "drain timeout"),
        ("vm_gone", "VM gone"),
        ("refused", "refused"),
        ("closed_on_request", "closed on request"),
        ("removed", "forward removed"),
        ("stopped", "proxy stopped"),
        ("failed", "no thread to relay it"),
        ("program_failed", "program failed"),
    ];

    /// Returns a kind's name in words: `VM gone` for `vm_gone`. The name of one that only another
    /// version knows is told as it is.
    #[cfg(all(unix, feature = "cli"))]
    pub(crate) fn kind_in_words(name: &str) -> &str {
        let known = EndReason::KINDS.into_iter().find(|kind| kind.0 == name);
        known.map_or(name, |(_, words)| words)
    }

    /// Returns the number of the reason's kind, less than [`COUNT`](EndReason::COUNT).
    pub(crate) fn index(self) -> usize {
        match self {
            EndReason::ClientClosed => 0,
            EndReason::ServerClosed => 1,
            EndReason::ClientReset => 2,
            EndReason::ServerReset => 3,
            EndReason::ClientGaveUp => 4,
            EndReason::IdleTimeout => 5,
            EndReason::HalfClosedTimeout => 6,
            EndReason::DrainTimeout => 7,
            EndReason::VmGone => 8,
            EndReason::Refused(_) => 9,
            EndReason::ClosedOnRequest => 10,
            EndReason::Removed => 11,
            EndReason::Stopped => 12,
            EndReason::Failed => 13,
            EndReason::ProgramFailed(_) => 14,
        }
    }

    /// Returns the name of the reason's kind, as the status and the metrics have it:
    /// `client_closed` for example.
    pub fn name(self) -> &'static str {
        EndReason::KINDS[self.index()].0
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
        f.write_str(EndReason::KINDS[self.index()].1)?;
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

impl RefusalReason {
    /// The reasons, each with its name for programs and in words. Whatever tells of a refusal has
    /// it from here.
    const KINDS: [(&'static str, &'static str); RefusalReason::COUNT] = [
        ("by_target", "by target"),
        ("absent", "absent"),
        ("dial_timeout", "dial timeout"),
        ("full", "full"),
        ("not_allowed", "not allowed"),
        ("no_header", "no header"),
        ("other", "other"),
    ];

    /// Returns the reason's name, as the status and the metrics have it: `by_target` for example.
    #[cfg(all(unix, feature = "cli"))]
    pub(crate) fn name(self) -> &'static str {
        RefusalReason::KINDS[self as usize].0
    }

    /// Returns a reason's name in words, as [`EndReason::kind_in_words`] does.
    #[cfg(all(unix, feature = "cli"))]
    pub(crate) fn name_in_words(name: &str) -> &str {
        let mut known = RefusalReason::KINDS.into_iter();
        let known = known.find(|reason| reason.0 == name);
        known.map_or(name, |(_, words)| words)
    }
}

/// Writes it in words: `by target`, `absent`.
impl fmt::Display for RefusalReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(RefusalReason::KINDS[*self as usize].1)
    }
}

impl RefusalReason {
    /// Returns the reason that the error of a dial stands for.
    pub(crate) fn from_error(target: &Address, error: &Error) -> RefusalReason {
        use io::ErrorKind::{
            BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable,
            InvalidInput, IsADirectory, NetworkUnreachable, NotADirectory, NotFound, TimedOut,
        };
        match error.kind() {
            _ if error.operation() == Operation::Resolve => RefusalReason::Absent,
            NotFound | NotADirectory | HostUnreachable | NetworkUnreachable => {
                RefusalReason::Absent
            }
            // In the file's place there is something else.
            IsADirectory | InvalidInput if matches!(target, Address::File(_)) => {
                RefusalReason::Absent
            }
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

#[cfg(all(test, unix, feature = "cli"))]
mod tests {
    use super::*;

    #[test]
    fn a_reason_has_the_same_words_by_its_name() {
        for why in [
            EndReason::ClientClosed,
            EndReason::VmGone,
            EndReason::ClosedOnRequest,
            EndReason::Removed,
            EndReason::Stopped,
            EndReason::Failed,
        ] {
            assert_eq!(EndReason::kind_in_words(why.name()), why.to_string());
        }
        assert_eq!(EndReason::kind_in_words("slept_in"), "slept_in");
        for why in [RefusalReason::ByTarget, RefusalReason::NoHeader] {
            assert_eq!(RefusalReason::name_in_words(why.name()), why.to_string());
        }
        let refused = EndReason::Refused(RefusalReason::ByTarget);
        assert_eq!(refused.to_string(), "refused (by target)");
    }
}
