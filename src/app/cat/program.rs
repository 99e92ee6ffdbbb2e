//! A program in place of standard input and output.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use crate::address::ExecAddress;
use crate::dial::{self, ProgramEnd, Programs};
use crate::error::Result;
use crate::stream::Stream;

/// What a shell adds to the number of a signal that ended a program (POSIX' `$?`).
const BY_SIGNAL: i32 = 128;

/// A running program, for one session.
#[derive(Debug)]
pub(super) struct SessionProgram {
    /// The other end of its standard input and output.
    stream: UnixStream,
    ending: ProgramExit,
}

/// The end of a started program.
#[derive(Debug)]
pub(super) struct ProgramExit {
    told: Receiver<ProgramEnd>,
    ended: OnceLock<io::Result<ExitStatus>>,
}

impl ProgramExit {
    /// Waits at most `time` for the end. Returns the program's exit code; for each signal there is
    /// a code of its own.
    pub(super) fn wait_for_code(&self, time: Duration) -> Option<io::Result<u8>> {
        if self.ended.get().is_none() {
            let ended = match self.told.recv_timeout(time) {
                Ok(ProgramEnd::Ended(ended)) => ended,
                Ok(ProgramEnd::Cut) => Err(io::Error::other("its connection was cut off")),
                Err(RecvTimeoutError::Timeout) => return None,
                Err(RecvTimeoutError::Disconnected) => {
                    Err(io::Error::other("the thread that waited for it has ended"))
                }
            };
            let _ = self.ended.set(ended);
        }
        match self.ended.get()? {
            Ok(status) => Some(Ok(exit_code(*status))),
            Err(e) => Some(Err(io::Error::new(e.kind(), e.to_string()))),
        }
    }
}

impl ProgramExit {
    /// Returns the exit of a program to be started, and the function that reports it.
    fn new() -> (ProgramExit, impl FnOnce(ProgramEnd) + Send + 'static) {
        let (tell, told) = channel();
        let ended = OnceLock::new();
        // After an interrupt there is no receiver any more.
        let tell = move |end| drop(tell.send(end));
        (ProgramExit { told, ended }, tell)
    }
}

/// Starts a program, and connects to it, unless interrupted. Returns the connection and the
/// program's exit.
///
/// # Errors
/// Returns why it can't be started.
pub(super) fn connect(
    exec: &ExecAddress,
    is_interrupted: &dyn Fn() -> bool,
) -> Result<(Stream, ProgramExit)> {
    let (ending, tell) = ProgramExit::new();
    let stream = dial::start_program_unless(exec, is_interrupted, tell)?;
    Ok((stream, ending))
}

impl SessionProgram {
    /// Starts the program.
    ///
    /// # Errors
    /// Returns why it can't be started.
    pub(super) fn start(exec: &ExecAddress) -> Result<SessionProgram> {
        let (ending, tell) = ProgramExit::new();
        let stream = dial::start_program(exec, &Programs::alone(), tell)?;
        Ok(SessionProgram { stream, ending })
    }

    pub(super) fn input(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    pub(super) fn output(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    pub(super) fn end_input(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Cuts the connection. The program is then killed, unless it has closed its output.
    pub(super) fn cut_connection(&self) {
        // Threads of the session hold the socket, too.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended_within(Duration::ZERO).is_some()
    }

    /// Waits for the program's end: see [`ProgramExit::wait_for_code`].
    pub(super) fn ended_within(&self, time: Duration) -> Option<io::Result<u8>> {
        self.ending.wait_for_code(time)
    }
}

fn exit_code(status: ExitStatus) -> u8 {
    let by_signal = || status.signal().map(|signal| BY_SIGNAL + signal);
    let code = status.code().or_else(by_signal).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}
