//! What a session has to know of, and how it ends.

use std::io;

/// Why a connection didn't do all that it was to do.
#[derive(Debug)]
pub(crate) enum CatFailure {
    Failed(String),
    /// Standard output's reader has gone: it knows best why.
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

/// Something that a session has to know of.
#[derive(Debug)]
pub(super) enum CatEvent {
    /// A signal asks for the end.
    Interrupt,
    /// Standard output has lost its reader.
    OutputClosed,
    /// From the threads of a session, by its number.
    Session(u64, SessionEvent),
}

/// What a thread of a session has to tell.
#[derive(Debug)]
pub(super) enum SessionEvent {
    /// All of standard input was sent, and the half-close if the peer can bear it.
    InputEnded,
    /// Standard input can't be read.
    InputFailed(io::Error),
    /// The peer takes no more.
    SendFailed(io::Error),
    /// The peer's EOF, after so many bytes.
    PeerEnded(u64),
    /// Nothing more can be read, after so many bytes.
    ReceiveFailed(u64, io::Error),
    OutputFailed(io::Error),
}
