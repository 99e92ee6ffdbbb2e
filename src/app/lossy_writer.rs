//! A writer to a standard stream, a log's file or the service manager, for a process that serves:
//! it never waits for the reader.
//!
//! It has a queue of limited bytes, and a thread that writes and may block. A message that finds
//! the queue full, or that can't be written, is dropped and counted. When the stream takes lines
//! again, one line reports how many were dropped.
//!
//! tracing-appender's non-blocking writer is no substitute: it doesn't count what the stream
//! refused, reports no drops, limits lines instead of bytes, and at the end may wait 1.1 s and
//! print with `println!`, which panics on a broken standard output and corrupts that of
//! `hvsock cat`.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use crate::lock::{lock, recover};
use crate::thread::start_thread;

/// The most bytes that wait in a queue.
const MOST_BYTES: usize = 256 * 1024;

/// A write at the end of the process that takes longer has a reader that doesn't read.
const STUCK: Duration = Duration::from_millis(500);

/// How long all that is left may take at the end of the process, with a reader that reads.
const LAST: Duration = Duration::from_secs(2);

/// How long a writer waits for its reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// As long as it takes: nothing depends on this process, and any signal still ends it at once.
    Unlimited,
    /// A limited time, and at the end of the process only.
    Limited,
}

static PATIENCE: RwLock<Patience> = RwLock::new(Patience::Limited);

/// Sets the patience with all readers; to be called when the process begins.
pub(crate) fn set_patience(patience: Patience) {
    *recover(PATIENCE.write()) = patience;
}

pub(crate) fn patience() -> Patience {
    *recover(PATIENCE.read())
}

/// A writer with a queue. In a process that serves it never blocks its callers. Keeps the order.
pub(crate) struct LossyWriter {
    name: &'static str,
    write: fn(&[u8]) -> io::Result<usize>,
    /// Returns the line that reports so many dropped messages.
    notice: fn(u64) -> String,
    state: Mutex<WriterState>,
    /// Notified when a message waits to be written, and when all are written.
    changed: Condvar,
    dropped: AtomicU64,
}

struct WriterState {
    waiting: VecDeque<Message>,
    /// The bytes of the waiting messages.
    bytes: usize,
    /// How many messages were dropped after the last waiting one.
    dropped: u64,
    /// When the running write began.
    writing: Option<Instant>,
    /// Whether the thread that writes was started.
    runs: bool,
}

struct Message {
    /// How many messages were dropped before this one.
    dropped: u64,
    /// Empty if only drops are to be reported.
    bytes: Vec<u8>,
}

impl LossyWriter {
    pub(crate) const fn new(
        name: &'static str,
        write: fn(&[u8]) -> io::Result<usize>,
        notice: fn(u64) -> String,
    ) -> LossyWriter {
        LossyWriter {
            name,
            write,
            notice,
            state: Mutex::new(WriterState {
                waiting: VecDeque::new(),
                bytes: 0,
                dropped: 0,
                writing: None,
                runs: false,
            }),
            changed: Condvar::new(),
            dropped: AtomicU64::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, WriterState> {
        lock(&self.state)
    }

    #[cfg(any(unix, test))]
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Queues a message, or drops it. A process with unlimited patience drops only what can't be
    /// written.
    ///
    /// If the thread can't be started, a process with unlimited patience writes here. Any other
    /// keeps the message for the next call that can start the thread, or for
    /// [`flush`](LossyWriter::flush).
    pub(crate) fn send(&'static self, bytes: Vec<u8>) {
        let mut state = self.state();
        if !state.runs {
            let write = || self.run();
            state.runs = start_thread(self.name, "to write lines", write).is_ok();
        }
        let is_full = |it: &WriterState| {
            // After a drop, wait for room for several lines: one gap is better than many.
            let most = match it.dropped {
                0 => MOST_BYTES,
                _ => MOST_BYTES / 2,
            };
            it.bytes > 0 && it.bytes + bytes.len() > most
        };
        while state.runs && is_full(&state) && patience() == Patience::Unlimited {
            let woken = self.changed.wait(state);
            state = recover(woken);
        }
        if is_full(&state) {
            state.dropped += 1;
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let dropped = std::mem::take(&mut state.dropped);
        state.bytes += bytes.len();
        state.waiting.push_back(Message { dropped, bytes });
        let runs = state.runs;
        drop(state);
        self.changed.notify_all();
        if !runs && patience() == Patience::Unlimited {
            self.write_waiting();
        }
    }

    /// Writes the waiting messages on this thread.
    fn write_waiting(&self) {
        loop {
            let mut state = self.state();
            let Some(message) = state.waiting.pop_front() else {
                return;
            };
            state.bytes -= message.bytes.len();
            drop(state);
            if self.write_all(&message.bytes).1.is_err() {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Writes messages as they come, for ever.
    fn run(&self) {
        let mut lost = 0;
        // Whether the last line was cut short.
        let mut cut = false;
        loop {
            let message = self.next();
            lost += message.dropped;
            let mut text = Vec::new();
            if cut {
                text.push(b'\n');
            }
            if lost > 0 {
                text.extend((self.notice)(lost).into_bytes());
            }
            let told = text.len();
            text.extend(&message.bytes);
            let (written, outcome) = self.write_all(&text);
            if written >= told {
                lost = 0;
            }
            if outcome.is_err() && !message.bytes.is_empty() {
                lost += 1;
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
            if written > 0 {
                cut = outcome.is_err();
            }
        }
    }

    /// Waits for the next message, and removes it from the queue.
    fn next(&self) -> Message {
        let mut state = self.state();
        state.writing = None;
        self.changed.notify_all();
        loop {
            let message = match state.waiting.pop_front() {
                Some(message) => message,
                None if state.dropped > 0 => Message {
                    dropped: std::mem::take(&mut state.dropped),
                    bytes: Vec::new(),
                },
                None => {
                    let woken = self.changed.wait(state);
                    state = recover(woken);
                    continue;
                }
            };
            state.bytes -= message.bytes.len();
            state.writing = Some(Instant::now());
            return message;
        }
    }

    /// Writes as much as the stream takes. Returns the number of bytes written, and the error that
    /// ended the write, if any.
    fn write_all(&self, bytes: &[u8]) -> (usize, io::Result<()>) {
        let mut written = 0;
        while written < bytes.len() {
            match (self.write)(&bytes[written..]) {
                Ok(0) => return (written, Err(io::ErrorKind::WriteZero.into())),
                Ok(n) => written += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return (written, Err(e)),
            }
        }
        (written, Ok(()))
    }

    /// Waits until all messages queued so far are written.
    pub(crate) fn flush(&self, patience: Patience) {
        const LOOK: Duration = Duration::from_millis(50);
        let end = Instant::now() + LAST;
        let mut state = self.state();
        if !state.runs {
            drop(state);
            return self.write_waiting();
        }
        let is_busy =
            |it: &WriterState| it.writing.is_some() || !it.waiting.is_empty() || it.dropped > 0;
        while is_busy(&state) {
            let stuck = state.writing.is_some_and(|since| since.elapsed() >= STUCK);
            if patience == Patience::Limited && (stuck || Instant::now() >= end) {
                return;
            }
            let woken = self.changed.wait_timeout(state, LOOK);
            state = recover(woken).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::sync::mpsc::{Receiver, sync_channel};
    use std::thread;

    fn notice(dropped: u64) -> String {
        format!("{dropped} dropped\n")
    }

    /// How a stream takes the next writes: so many bytes of a write, or an error.
    static TAKES: Mutex<VecDeque<Option<usize>>> = Mutex::new(VecDeque::new());
    static TAKEN: Mutex<Vec<u8>> = Mutex::new(Vec::new());

    fn write(bytes: &[u8]) -> io::Result<usize> {
        let mut takes = lock(&TAKES);
        let n = match takes.pop_front() {
            Some(None) => return Err(io::ErrorKind::StorageFull.into()),
            Some(Some(n)) => n.min(bytes.len()),
            None => bytes.len(),
        };
        let mut taken = lock(&TAKEN);
        taken.extend(&bytes[..n]);
        Ok(n)
    }

    #[test]
    fn what_is_lost_is_told_where_it_is_missing() {
        static WRITER: LossyWriter = LossyWriter::new("test", write, notice);
        // The second line is cut short, the third refused; the fourth is written in pieces.
        let takes = [Some(9), Some(2), None, None, Some(3)];
        lock(&TAKES).extend(takes);
        for line in ["1\n", "second\n", "3\n", "4\n"] {
            WRITER.send(line.into());
            WRITER.flush(Patience::Unlimited);
        }
        let taken = lock(&TAKEN);
        let right = format!("1\nse\n{}4\n", notice(2));
        assert_eq!(String::from_utf8_lossy(&taken), right);
        assert_eq!(WRITER.dropped(), 2);
    }

    static GATE: Mutex<Option<Receiver<()>>> = Mutex::new(None);
    static LINES: Mutex<Vec<u8>> = Mutex::new(Vec::new());

    fn wait_and_write(bytes: &[u8]) -> io::Result<usize> {
        let gate = lock(&GATE).take();
        // A stopped reader goes on when the other end of the gate is dropped.
        if let Some(gate) = gate {
            let _ = gate.recv();
        }
        let mut lines = lock(&LINES);
        lines.extend(bytes);
        Ok(bytes.len())
    }

    #[test]
    fn a_stuck_reader_bounds_memory_and_time_and_gets_the_rest_in_order() {
        static WRITER: LossyWriter = LossyWriter::new("test", wait_and_write, notice);
        let (reads, gate) = sync_channel::<()>(0);
        *lock(&GATE) = Some(gate);
        let line = |n: usize| format!("{n:063}\n");
        let most = MOST_BYTES / 64;
        // Wait until the first line has left the queue.
        WRITER.send(line(0).into());
        while WRITER.state().writing.is_none() {
            thread::yield_now();
        }
        for n in 1..=most + 7 {
            WRITER.send(line(n).into());
        }
        assert_eq!(WRITER.dropped(), 7);
        let begun = Instant::now();
        WRITER.flush(Patience::Limited);
        assert!(begun.elapsed() < 10 * LAST);
        drop(reads);
        WRITER.flush(Patience::Unlimited);
        WRITER.send("last\n".into());
        WRITER.flush(Patience::Unlimited);
        let kept: String = (0..=most).map(line).collect();
        let right = format!("{kept}{}last\n", notice(7));
        let lines = lock(&LINES);
        assert_eq!(String::from_utf8_lossy(&lines), right);
    }
}
