//! A writer for a process that serves: to a standard stream, a log's file or the service manager,
//! without ever waiting for the reader.
//!
//! It has a queue of a bounded number of bytes, and a thread of its own that writes, and
//! that may wait as long as it likes. What finds the queue full, or can't be written, is dropped
//! and counted, and once the stream takes lines again a line says how many those were.
//!
//! tracing-appender's non-blocking writer does half of that: it doesn't count what the stream has
//! refused, says nothing of what it dropped, bounds lines instead of bytes, and at the end may wait
//! 1.1 s and print with `println!`, which panics on a broken standard output and spoils that of
//! `hvsock cat`.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use crate::lock::{lock, recover};
use crate::thread::start_thread;

/// How many bytes may wait for their stream.
const MOST_BYTES: usize = 256 * 1024;

/// A stream whose write takes longer at the end of the process has a reader that doesn't read.
const STUCK: Duration = Duration::from_millis(500);

/// How long a reader that does read may take for all that is left at the end.
const LAST: Duration = Duration::from_secs(2);

/// How long a reader may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// As long as it likes: nothing depends on this process, and any signal still ends it at once.
    Unlimited,
    /// No longer than a reader that is alive needs, and at the end only.
    Limited,
}

static PATIENCE: RwLock<Patience> = RwLock::new(Patience::Limited);

/// Sets how long readers may take; to be called when the process begins.
pub(crate) fn set_patience(patience: Patience) {
    *recover(PATIENCE.write()) = patience;
}

pub(crate) fn patience() -> Patience {
    *recover(PATIENCE.read())
}

/// A writer that never waits. Its lines keep their order.
pub(crate) struct LossyWriter {
    name: &'static str,
    write: fn(&[u8]) -> io::Result<usize>,
    /// What is said of so many that were dropped.
    notice: fn(u64) -> String,
    state: Mutex<WriterState>,
    /// Something waits to be written, or nothing does any longer.
    changed: Condvar,
    dropped: AtomicU64,
}

struct WriterState {
    waiting: VecDeque<Message>,
    /// The bytes of those.
    bytes: usize,
    /// How many were dropped behind the last that waits.
    dropped: u64,
    /// Since when something is being written.
    writing: Option<Instant>,
    /// There is a thread that writes.
    runs: bool,
}

struct Message {
    /// How many were dropped before it.
    dropped: u64,
    /// Empty if there is nothing else to say.
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

    /// Has a message written, or drops it. Of a process with unlimited patience nothing is dropped
    /// that can be written.
    ///
    /// Where the system gives no thread, it is written here by a process with unlimited patience.
    /// Any other keeps it for the next call that finds a thread, or for
    /// [`flush`](LossyWriter::flush).
    pub(crate) fn send(&'static self, bytes: Vec<u8>) {
        let mut state = self.state();
        if !state.runs {
            let write = || self.run();
            state.runs = start_thread(self.name, "to write lines", write).is_ok();
        }
        let is_full = |it: &WriterState| {
            // One gap is better than many: after it there is to be room for more than a line.
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

    /// Writes on this thread what waits.
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

    /// Writes what comes, for ever.
    fn run(&self) {
        let mut lost = 0;
        // The last line was cut short.
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

    /// Waits for the next message, and takes it out of the queue.
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

    /// Writes as much as the stream takes; returns how many bytes those were, and what ended it.
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

    /// Waits until all is written that was sent so far.
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

    /// How a stream takes the next writes: so many bytes of one, or an error.
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
        // The second line is cut short, the third refused; the fourth goes in pieces.
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
        // A reader that has stopped reads again when the other end is dropped.
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
        // The first is taken out of the queue to be written.
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
