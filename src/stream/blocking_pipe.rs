//! Named pipes for a caller that blocks: overlapped operations, so that both directions can wait at
//! a time, with a timeout, and be cancelled from another thread.

use std::io;
use std::net::Shutdown;
use std::ops::Range;
use std::os::windows::io::{AsHandle, BorrowedHandle, OwnedHandle};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::lock::lock;
#[cfg(feature = "cli")]
use crate::sys::Wanted;
use crate::sys::{self, Last, LastWord, ManualResetEvent, OverlappedOperation, PipeKind};
use crate::time::after;

const BUFFER: u32 = 64 * 1024;

/// How long a drop waits for a peer to take a write that is under way, which a close would lose.
const LEFT: Duration = Duration::from_secs(30);

/// A connected pipe.
#[derive(Debug)]
pub(super) struct BlockingPipe {
    reading: Mutex<Reading>,
    writing: Mutex<Writing>,
    read_end: PipeEnd,
    write_end: PipeEnd,
    nonblocking: AtomicBool,
    last: Mutex<Option<LastWord>>,
    kind: PipeKind,
    handle: Arc<OwnedHandle>,
}

/// The state of one direction that is known without its lock.
#[derive(Debug)]
struct PipeEnd {
    timeout: Mutex<Option<Duration>>,
    /// Whether the direction was shut down.
    shut: AtomicBool,
    /// The event that is set when it is shut down.
    event: ManualResetEvent,
}

impl PipeEnd {
    fn new() -> io::Result<PipeEnd> {
        Ok(PipeEnd {
            timeout: Mutex::new(None),
            shut: AtomicBool::new(false),
            event: ManualResetEvent::new()?,
        })
    }

    fn is_shut(&self) -> bool {
        self.shut.load(Ordering::Acquire)
    }

    fn shut(&self) {
        self.shut.store(true, Ordering::Release);
        self.event.set();
    }

    fn deadline(&self) -> Option<Instant> {
        lock(&self.timeout).map(|timeout| after(Instant::now(), timeout))
    }

    /// Waits for the operation, or until this end is shut; false if the deadline has passed.
    fn wait(&self, operation: BorrowedHandle<'_>, deadline: Option<Instant>) -> io::Result<bool> {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        sys::wait_for_any(&[operation, self.event.as_handle()], left)
    }
}

#[derive(Debug)]
struct Reading {
    operation: OverlappedOperation,
    state: Input,
}

#[derive(Debug)]
enum Input {
    Idle,
    Pending,
    /// The bytes of the operation that are still to be returned.
    Holds(Range<usize>),
    Ended,
    /// It has failed with this error of the system.
    Failed(Option<i32>),
}

impl Reading {
    /// Goes on as far as it can without waiting. Returns whether there is a result now.
    fn advance(&mut self) -> bool {
        let outcome = match self.state {
            Input::Idle => match self.operation.read(BUFFER) {
                Ok(()) => {
                    self.state = Input::Pending;
                    self.operation.outcome()
                }
                Err(e) => Some(Err(e)),
            },
            Input::Pending => self.operation.outcome(),
            _ => return true,
        };
        self.state = match outcome {
            None => return false,
            // A message of no bytes is a half-close.
            Some(Ok(0)) => Input::Ended,
            Some(Ok(count)) => Input::Holds(0..count),
            Some(Err(e)) if sys::is_pipe_eof(&e) => Input::Ended,
            // The thread that began it has ended.
            Some(Err(e)) if sys::is_cancelled(&e) => {
                self.state = Input::Idle;
                return self.advance();
            }
            Some(Err(e)) => Input::Failed(e.raw_os_error()),
        };
        true
    }

    fn give(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.state {
            Input::Holds(range) => {
                let bytes = &self.operation.bytes()[range.clone()];
                let count = bytes.len().min(buffer.len());
                buffer[..count].copy_from_slice(&bytes[..count]);
                range.start += count;
                if range.start == range.end {
                    self.state = Input::Idle;
                }
                Ok(count)
            }
            Input::Failed(code) => Err(match code {
                Some(code) => io::Error::from_raw_os_error(*code),
                None => io::ErrorKind::Other.into(),
            }),
            _ => Ok(0),
        }
    }
}

#[derive(Debug)]
struct Writing {
    operation: OverlappedOperation,
    pending: bool,
    /// The failure of a write that was taken, for the next one to return.
    failure: Option<io::Error>,
}

impl Writing {
    /// Returns whether the bytes that were taken are written, or have failed.
    fn is_done(&mut self) -> bool {
        if self.pending
            && let Some(outcome) = self.operation.outcome()
        {
            self.pending = false;
            self.failure = outcome.err();
        }
        !self.pending
    }
}

impl BlockingPipe {
    /// Takes over a pipe that no event loop has.
    pub(super) fn new(handle: OwnedHandle, kind: PipeKind) -> io::Result<BlockingPipe> {
        let handle = Arc::new(handle);
        Ok(BlockingPipe {
            reading: Mutex::new(Reading {
                operation: OverlappedOperation::new(Arc::clone(&handle))?,
                state: Input::Idle,
            }),
            writing: Mutex::new(Writing {
                operation: OverlappedOperation::new(Arc::clone(&handle))?,
                pending: false,
                failure: None,
            }),
            read_end: PipeEnd::new()?,
            write_end: PipeEnd::new()?,
            nonblocking: AtomicBool::new(false),
            last: Mutex::new(None),
            kind,
            handle,
        })
    }

    pub(super) fn has_half_close(&self) -> bool {
        self.kind.has_half_close
    }

    pub(super) fn set_nonblocking(&self, nonblocking: bool) {
        self.nonblocking.store(nonblocking, Ordering::Relaxed);
    }

    pub(super) fn read_timeout(&self) -> Option<Duration> {
        *lock(&self.read_end.timeout)
    }

    pub(super) fn write_timeout(&self) -> Option<Duration> {
        *lock(&self.write_end.timeout)
    }

    pub(super) fn set_read_timeout(&self, timeout: Option<Duration>) {
        *lock(&self.read_end.timeout) = timeout;
    }

    pub(super) fn set_write_timeout(&self, timeout: Option<Duration>) {
        *lock(&self.write_end.timeout) = timeout;
    }

    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut reading = lock(&self.reading);
        let deadline = self.read_end.deadline();
        loop {
            if self.read_end.is_shut() || buffer.is_empty() {
                return Ok(0);
            }
            if reading.advance() {
                return reading.give(buffer);
            }
            self.pause(&self.read_end, reading.operation.event(), deadline)?;
        }
    }

    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut writing = lock(&self.writing);
        let deadline = self.write_end.deadline();
        loop {
            if self.write_end.is_shut() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            if writing.is_done() {
                break;
            }
            self.pause(&self.write_end, writing.operation.event(), deadline)?;
        }
        if let Some(e) = writing.failure.take() {
            return Err(e);
        }
        // A message of no bytes would be a half-close.
        if bytes.is_empty() {
            return Ok(0);
        }
        let count = bytes.len().min(BUFFER as usize);
        // An operation that may be left under way must not end with this thread.
        match deadline.is_some() || self.nonblocking.load(Ordering::Relaxed) {
            true => writing.operation.write_lastingly(&bytes[..count])?,
            false => writing.operation.write(&bytes[..count])?,
        }
        writing.pending = true;
        // What was taken can't be given back, however long the peer takes.
        while !writing.is_done() && !self.nonblocking.load(Ordering::Relaxed) {
            let event = writing.operation.event();
            if self.write_end.is_shut() || !self.write_end.wait(event, deadline)? {
                break;
            }
        }
        match writing.failure.take() {
            Some(e) => Err(e),
            None => Ok(count),
        }
    }

    fn pause(
        &self,
        end: &PipeEnd,
        operation: BorrowedHandle<'_>,
        deadline: Option<Instant>,
    ) -> io::Result<()> {
        if self.nonblocking.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        match end.wait(operation, deadline)? {
            true => Ok(()),
            false => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Waits until a call would not have to; false if `timeout` has passed.
    #[cfg(feature = "cli")]
    pub(super) fn wait(&self, wanted: Wanted, timeout: Duration) -> io::Result<bool> {
        let mut reading = (wanted != Wanted::Writable).then(|| lock(&self.reading));
        let mut writing = (wanted != Wanted::Readable).then(|| lock(&self.writing));
        let mut events = Vec::new();
        if let Some(reading) = &mut reading {
            if reading.advance() {
                return Ok(true);
            }
            events.extend([reading.operation.event(), self.read_end.event.as_handle()]);
        }
        if let Some(writing) = &mut writing {
            if writing.is_done() {
                return Ok(true);
            }
            events.extend([writing.operation.event(), self.write_end.event.as_handle()]);
        }
        sys::wait_for_any(&events, Some(timeout))
    }

    /// Returns whether an EOF or an error comes next; `None` if nothing has come.
    #[cfg(feature = "cli")]
    pub(super) fn has_ended(&self) -> Option<bool> {
        let mut reading = lock(&self.reading);
        let known = reading.advance();
        known.then(|| matches!(reading.state, Input::Ended | Input::Failed(_)))
    }

    #[cfg(feature = "cli")]
    pub(super) fn is_hung_up(&self) -> bool {
        sys::is_pipe_hung_up(&self.handle)
    }

    pub(super) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        if how != Shutdown::Write {
            self.read_end.shut();
        }
        if how == Shutdown::Read {
            return Ok(());
        }
        if !self.has_half_close() && how == Shutdown::Write {
            let why = "the server made this pipe of a type that has no half-close";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        self.write_end.shut();
        let mut last = lock(&self.last);
        if self.has_half_close() && last.is_none() {
            *last = Some(LastWord::begin(self.handle.try_clone()?, Last::HalfClose));
        }
        Ok(())
    }

    /// Cuts a client off, and ends the calls that wait here. A server reads EOF when this is
    /// dropped.
    pub(super) fn reset(&self) {
        self.read_end.shut();
        self.write_end.shut();
        if self.kind.is_server {
            sys::disconnect_pipe(&self.handle);
        }
    }
}

impl Drop for BlockingPipe {
    fn drop(&mut self) {
        // With both directions shut down, nothing is to be waited for.
        if self.read_end.is_shut() && self.write_end.is_shut() {
            return;
        }
        let mut writing = lock(&self.writing);
        let end = Instant::now() + LEFT;
        while !writing.is_done() {
            let left = end.saturating_duration_since(Instant::now());
            let waited = sys::wait_for_any(&[writing.operation.event()], Some(left));
            if !matches!(waited, Ok(true)) {
                break;
            }
        }
    }
}
