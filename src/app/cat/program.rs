//! A program in the place of standard input and output.

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

/// What a shell adds to the number of the signal that has ended a program (POSIX' `$?`).
const BY_SIGNAL: i32 = 128;

/// A program that runs, for one session.
#[derive(Debug)]
pub(super) struct SessionProgram {
    /// The other end of its standard input and output.
    stream: UnixStream,
    ending: ProgramExit,
}

/// The end of a program that was started.
#[derive(Debug)]
pub(super) struct ProgramExit {
    told: Receiver<ProgramEnd>,
    ended: OnceLock<io::Result<ExitStatus>>,
}

impl ProgramExit {
    /// Waits for it, at most `time`. Returns the program's exit code, and one of its own for each
    /// signal.
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
    /// Returns the end of a program that is to be started, and by what it is told.
    fn new() -> (ProgramExit, impl FnOnce(ProgramEnd) + Send + 'static) {
        let (tell, told) = channel();
        let ended = OnceLock::new();
        // After an interrupt there is no receiver any more.
        let tell = move |end| drop(tell.send(end));
        (ProgramExit { told, ended }, tell)
    }
}

/// Connects to a program, which is started for that, unless it is interrupted. Returns its end,
/// too.
///
/// # Errors
/// Why it can't be started.
pub(super) fn connect(
    exec: &ExecAddress,
    is_interrupted: &dyn Fn() -> bool,
) -> Result<(Stream, ProgramExit)> {
    let (ending, tell) = ProgramExit::new();
    let stream = dial::start_program_unless(exec, is_interrupted, tell)?;
    Ok((stream, ending))
}

impl SessionProgram {
    /// Starts it.
    ///
    /// # Errors
    /// Why it can't be started.
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

    /// Cuts its connection: it is ended, unless it has ended its output.
    pub(super) fn cut_connection(&self) {
        // Threads of the session have it, too.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended_within(Duration::ZERO).is_some()
    }

    /// Waits for its end: see [`ProgramExit::wait_for_code`].
    pub(super) fn ended_within(&self, time: Duration) -> Option<io::Result<u8>> {
        self.ending.wait_for_code(time)
    }
}

fn exit_code(status: ExitStatus) -> u8 {
    let by_signal = || status.signal().map(|signal| BY_SIGNAL + signal);
    let code = status.code().or_else(by_signal).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}
