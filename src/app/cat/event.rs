//! The events of a session, and how a connection ends.

use std::io;

/// Why a connection failed.
#[derive(Debug)]
pub(crate) enum CatFailure {
    Failed(String),
    /// The reader of standard output has closed it, and knows why.
    OutputClosed,
    /// The program has ended with this exit code, which isn't 0.
    #[cfg(unix)]
    Program(u8),
    Interrupted,
}

impl From<crate::Error> for CatFailure {
    fn from(error: crate::Error) -> CatFailure {
        CatFailure::Failed(error.to_string())
    }
}

pub(crate) type CatResult = Result<(), CatFailure>;

/// An event for a session.
#[derive(Debug)]
pub(super) enum CatEvent {
    /// A signal asks for the end.
    Interrupt,
    /// The reader of standard output has closed it.
    OutputClosed,
    /// An event from a thread of the session of that number.
    Session(u64, SessionEvent),
}

/// An event from a session's thread.
#[derive(Debug)]
pub(super) enum SessionEvent {
    /// All of standard input was sent, and the half-close if the peer supports one.
    InputEnded,
    /// Standard input can't be read.
    InputFailed(io::Error),
    /// The peer accepts no more bytes.
    SendFailed(io::Error),
    /// The peer's EOF, after so many bytes.
    PeerEnded(u64),
    /// A read failed, after so many bytes.
    ReceiveFailed(u64, io::Error),
    OutputFailed(io::Error),
}
