//! The local side of a connection: standard input and output, or those of a program.

use std::io::{self, IsTerminal, Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use crate::sys;
use crate::thread::start_thread;

#[cfg(unix)]
use super::program::SessionProgram;

pub(super) const BUFFER: usize = 128 * 1024;

/// Bytes that were read locally; empty at EOF.
pub(super) type Chunk = io::Result<Vec<u8>>;

/// The local output.
pub(super) type Output = io::Result<Box<dyn Write + Send>>;

/// The local side of a connection.
#[derive(Clone, Copy)]
pub(super) enum Near<'a> {
    /// Standard input and output.
    Standard(&'a StandardInput),
    /// A program's standard output and input.
    #[cfg(unix)]
    Program(&'a SessionProgram),
}

impl Near<'_> {
    /// Returns the local input. While it waits, a session checks every `wait` whether it is over.
    pub(super) fn chunks(&self, wait: Duration) -> Arc<Mutex<Chunks>> {
        match self {
            Near::Standard(input) => input.chunks(wait),
            #[cfg(unix)]
            Near::Program(program) => Chunks::start_reading(program.output(), wait),
        }
    }

    pub(super) fn output(&self) -> Output {
        match self {
            Near::Standard(_) => sys::standard_output().map(|it| Box::new(it) as _),
            #[cfg(unix)]
            Near::Program(program) => program.input().map(|it| Box::new(it) as _),
        }
    }

    /// Notes that the peer's EOF has come.
    pub(super) fn end_output(&self) {
        match self {
            // Standard output ends with this process; another session may follow.
            Near::Standard(_) => {}
            #[cfg(unix)]
            Near::Program(program) => program.end_input(),
        }
    }

    /// Returns whether this side may leave received bytes unread without that being a failure: a
    /// program may.
    pub(super) fn may_leave_unread(&self) -> bool {
        !matches!(self, Near::Standard(_))
    }

    /// Returns whether a session may end before the local input, once the peer has ended. At a
    /// terminal the user waits for this process. `is_hung_up` returns whether the peer accepts
    /// nothing more.
    pub(super) fn is_idle(&self, is_hung_up: impl FnOnce() -> bool) -> bool {
        match self {
            Near::Standard(_) => io::stdin().is_terminal() || is_hung_up(),
            // It may still work on what has come.
            #[cfg(unix)]
            Near::Program(_) => false,
        }
    }

    /// Returns whether this side has ended.
    pub(super) fn has_gone(&self) -> bool {
        match self {
            Near::Standard(_) => false,
            #[cfg(unix)]
            Near::Program(program) => program.has_ended(),
        }
    }
}

/// Standard input, read by a thread that outlives sessions, since a blocking read can't be
/// cancelled.
#[derive(Debug, Default)]
pub(super) struct StandardInput(OnceLock<Arc<Mutex<Chunks>>>);

impl StandardInput {
    fn chunks(&self, wait: Duration) -> Arc<Mutex<Chunks>> {
        let start = || Chunks::start_reading(sys::standard_input(), wait);
        Arc::clone(self.0.get_or_init(start))
    }
}

/// Input that was read and not yet sent by a session.
#[derive(Debug)]
pub(super) struct Chunks {
    come: Receiver<Chunk>,
    /// A chunk taken for a session that had ended by then.
    kept: Option<Chunk>,
    /// How often a waiting session checks whether it is over.
    wait: Duration,
}

impl Chunks {
    /// Starts the thread that reads.
    fn start_reading(
        input: io::Result<impl Read + Send + 'static>,
        wait: Duration,
    ) -> Arc<Mutex<Chunks>> {
        let (put, come) = sync_channel(1);
        let failing = put.clone();
        let read = move || read_input(input, &put);
        if let Err(e) = start_thread("hvsock-input", "to read the input", read) {
            // The channel has room for one.
            let _ = failing.try_send(Err(e.into()));
        }
        Arc::new(Mutex::new(Chunks {
            come,
            kept: None,
            wait,
        }))
    }

    /// Waits for the next chunk, or until the session is over.
    pub(super) fn next(&mut self, is_over: impl FnOnce() -> bool) -> Option<Chunk> {
        let chunk = match self.kept.take() {
            Some(chunk) => chunk,
            None => match self.come.recv_timeout(self.wait) {
                Ok(chunk) => chunk,
                Err(RecvTimeoutError::Timeout) => return None,
                // An earlier session has got the EOF.
                Err(RecvTimeoutError::Disconnected) => Ok(Vec::new()),
            },
        };
        if is_over() {
            self.kept = Some(chunk);
            return None;
        }
        Some(chunk)
    }
}

fn read_input(input: io::Result<impl Read>, put: &SyncSender<Chunk>) {
    let mut input = match input {
        Ok(input) => input,
        Err(e) => return drop(put.send(Err(e))),
    };
    loop {
        let mut chunk = vec![0; BUFFER];
        let read = input.read(&mut chunk);
        let ended = match read {
            Ok(n) => {
                chunk.truncate(n);
                put.send(Ok(chunk)).is_err() || n == 0
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => false,
            Err(e) => {
                let _ = put.send(Err(e));
                true
            }
        };
        if ended {
            return;
        }
    }
}
