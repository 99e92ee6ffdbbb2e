//! This side of a connection: standard input and output, or those of a program.

use std::io::{self, IsTerminal, Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use crate::sys;
use crate::thread::start_thread;

#[cfg(unix)]
use super::program::SessionProgram;

pub(super) const BUFFER: usize = 128 * 1024;

/// What is read on this side: bytes, or none at its end.
pub(super) type Chunk = io::Result<Vec<u8>>;

/// What is written on this side.
pub(super) type Output = io::Result<Box<dyn Write + Send>>;

/// What a connection is carried from and to.
#[derive(Clone, Copy)]
pub(super) enum Near<'a> {
    /// Standard input and output.
    Standard(&'a StandardInput),
    /// A program's standard output and input.
    #[cfg(unix)]
    Program(&'a SessionProgram),
}

impl Near<'_> {
    /// Returns what is read; a session looks each `wait` whether it is over.
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

    /// Notes that all has come from the peer.
    pub(super) fn end_output(&self) {
        match self {
            // It ends with this process; another session may follow.
            Near::Standard(_) => {}
            #[cfg(unix)]
            Near::Program(program) => program.end_input(),
        }
    }

    /// Returns whether it is no failure if this side leaves some of what has come unread: what a
    /// program reads is its own choice.
    pub(super) fn may_leave_unread(&self) -> bool {
        !matches!(self, Near::Standard(_))
    }

    /// Returns whether a session may end before what is read here has ended, once the peer has: at
    /// a terminal the user waits for this process. `is_hung_up` tells whether the peer takes
    /// nothing more.
    pub(super) fn is_idle(&self, is_hung_up: impl FnOnce() -> bool) -> bool {
        match self {
            Near::Standard(_) => io::stdin().is_terminal() || is_hung_up(),
            // It works on what has come.
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

/// Standard input, read by a thread that outlives sessions: what it waits for can't be taken back.
#[derive(Debug, Default)]
pub(super) struct StandardInput(OnceLock<Arc<Mutex<Chunks>>>);

impl StandardInput {
    fn chunks(&self, wait: Duration) -> Arc<Mutex<Chunks>> {
        let start = || Chunks::start_reading(sys::standard_input(), wait);
        Arc::clone(self.0.get_or_init(start))
    }
}

/// What was read and no session has sent yet.
#[derive(Debug)]
pub(super) struct Chunks {
    come: Receiver<Chunk>,
    /// Taken for a session that was over by then.
    kept: Option<Chunk>,
    /// How long a session waits before it looks whether it is over.
    wait: Duration,
}

impl Chunks {
    /// Starts to read.
    fn start_reading(
        input: io::Result<impl Read + Send + 'static>,
        wait: Duration,
    ) -> Arc<Mutex<Chunks>> {
        let (put, come) = sync_channel(1);
        let failing = put.clone();
        let read = move || read_input(input, &put);
        if let Err(e) = start_thread("hvsock-input", "to read the input", read) {
            // There is room for one.
            let _ = failing.try_send(Err(e.into()));
        }
        Arc::new(Mutex::new(Chunks {
            come,
            kept: None,
            wait,
        }))
    }

    /// Waits a while for the next one.
    pub(super) fn next(&mut self, is_over: impl FnOnce() -> bool) -> Option<Chunk> {
        let chunk = match self.kept.take() {
            Some(chunk) => chunk,
            None => match self.come.recv_timeout(self.wait) {
                Ok(chunk) => chunk,
                Err(RecvTimeoutError::Timeout) => return None,
                // Its end was told to an earlier session.
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
