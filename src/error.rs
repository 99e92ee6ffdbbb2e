//! What went wrong: the operation, the thing it was done to, the cause, and the remedy where a
//! person can mend it.

use std::fmt;
use std::io;

use crate::sys;

/// Returns what makes a noun one of so many: `s`, unless there is one.
pub(crate) fn plural(count: u64) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// Returns so many of what a noun means: `1 slot`, `2 slots`.
pub(crate) fn counted(count: u64, noun: &str) -> String {
    format!("{count} {noun}{}", plural(count))
}

/// The result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// What was being done when an [`Error`] came up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Finding a VM's state directory.
    Find,
    /// Turning a host name into addresses.
    Resolve,
    /// Connecting to an address.
    Connect,
    /// Binding an address and listening on it.
    Listen,
    /// Accepting a connection on a listener.
    Accept,
    /// Starting or running an event loop or one of its threads.
    Run,
    /// Entering a service in Windows' registry.
    Register,
    /// Taking a service out of Windows' registry.
    Unregister,
    /// Listing what there is.
    List,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Find => "cannot find",
            Operation::Resolve => "cannot resolve",
            Operation::Connect => "cannot connect to",
            Operation::Listen => "cannot listen on",
            Operation::Accept => "cannot accept on",
            Operation::Run => "cannot run",
            Operation::Register => "cannot register",
            Operation::Unregister => "cannot unregister",
            Operation::List => "cannot list",
        })
    }
}

/// An operation on an address that failed.
///
/// Prints as one line, `OPERATION SUBJECT: CAUSE; REMEDY`, without a final full stop.
#[derive(Debug)]
pub struct Error {
    operation: Operation,
    subject: String,
    cause: io::Error,
    remedy: Option<String>,
}

impl Error {
    /// Makes an error of `operation` on `subject` (an address, a path or a name as the user knows
    /// it).
    pub fn new(operation: Operation, subject: impl fmt::Display, cause: io::Error) -> Error {
        let is_out = sys::is_out_of_descriptors(&cause);
        Error {
            operation,
            subject: subject.to_string(),
            cause,
            remedy: is_out.then(|| "raise the limit with `ulimit -n`".to_owned()),
        }
    }

    /// Adds what a person can do about it. Where the process, or the system, is out of descriptors,
    /// there is one remedy, whatever was being done: it stays.
    #[must_use]
    pub fn with_remedy(mut self, remedy: impl Into<String>) -> Error {
        if !sys::is_out_of_descriptors(&self.cause) {
            self.remedy = Some(remedy.into());
        }
        self
    }

    /// Returns what was being done.
    pub fn operation(&self) -> Operation {
        self.operation
    }

    /// Returns what it was done to: an address, a path or a name.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// Returns why it failed.
    pub fn cause(&self) -> &io::Error {
        &self.cause
    }

    /// Returns what a person can do about it, where that is known.
    pub fn remedy(&self) -> Option<&str> {
        self.remedy.as_deref()
    }

    /// Returns the cause's kind, for `match`.
    pub fn kind(&self) -> io::ErrorKind {
        self.cause.kind()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.operation, self.subject, self.cause)?;
        match &self.remedy {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.cause)
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        io::Error::new(error.kind(), error)
    }
}
