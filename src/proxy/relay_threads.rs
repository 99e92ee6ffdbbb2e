//! Relay threads, for connections with an end that no poller can wait for: two threads relay one
//! connection, each in one direction, with blocking calls. They know neither the loop nor the
//! engine's connection, and report to their [`Reporter`].
//!
//! The rules are the relay's. EOF of one side becomes a half-close of the other after the last
//! byte. An error ends its own direction, and what the other still holds may arrive. Once both have
//! ended, each side is closed as [`CloseMode`] says, so that a broken upload is never a clean EOF
//! where the family can reset. What differs:
//!
//! - A side whose bytes nobody takes any more is not read on, so its end is noticed only when the
//!   other direction ends.
//! - An idle connection holds two threads and their buffers, against invariant 7.
//! - There are no turns and no budget: the system's scheduler shares the time (invariant 5).
//! - Refusals by EOF are not known, and half-closes are not held back. So a rule that leads from or
//!   to a VMM that needs either is refused: see `check_relay_threads` in `rules.rs`. Nor is the end
//!   of a VM told from the end of a connection.
//! - Bytes are counted, but their times are not: the engine looks at the counts now and then, so an
//!   idle timeout may come a quarter late.
//! - A side is drained at full speed for the whole drain timeout, also one that goes on sending.
//! - A reset waits for [`LINGER`] at most until its peer has received what was sent before, however
//!   long the drain timeout is.
//!
//! A waiting thread is woken by [`Stream::interrupt`] and by nothing else: none polls.
//!
//! On Windows hosts, bytes in flight are reported lost when an AF_HYPERV socket is closed. So such
//! an end is never closed before its peer's EOF was read, unless the drain timeout has passed, a
//! direction has failed, or the proxy cuts the connection off. More can't be done: if the peer has
//! ended first, nothing tells whether it has received the last bytes that it was sent.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

use tracing::warn;

use crate::engine::relay::{CloseMode, Ending, Side};
use crate::stream::Stream;
use crate::stream::closing::{CloseOutcome, ResetWait};

use crate::engine::connection::{LINGER, Progress, ThreadsResult};

/// The size of a direction's buffer.
const BUFFER: usize = 64 * 1024;

/// The stack of a relay thread. Its calls are not deep, and the buffers are on the heap.
const STACK: usize = 256 * 1024;

/// What relay threads report to, and what they ask.
pub(crate) trait Reporter: Send + Sync + 'static {
    /// Notes that bytes of `side` were delivered to the other side.
    fn count_delivered(&self, side: Side, bytes: u64);
    /// Returns how long a side may be drained before it is closed, or `None` if it need not be
    /// drained.
    fn drain_timeout(&self, side: Side) -> Option<Duration>;
    /// Notes that both streams are closed.
    fn report_end(&self, result: ThreadsResult);
}

/// A handle of the relay threads of one connection.
#[derive(Debug)]
pub(crate) struct RelayThreads {
    /// The two ends, while they are open: the handle does not keep them open.
    ends: [Weak<SharedEnd>; 2],
    cut: Arc<AtomicBool>,
}

impl RelayThreads {
    /// Starts to relay between two streams, connected and blocking. [`Reporter::report_end`]
    /// reports the end.
    ///
    /// # Errors
    /// Returns the reason if no thread can be started; both streams were reset then.
    pub(crate) fn start(streams: [Stream; 2], reporter: impl Reporter) -> io::Result<RelayThreads> {
        let ends = streams.map(|stream| Arc::new(SharedEnd::new(stream)));
        let cut = Arc::new(AtomicBool::new(false));
        let threads = RelayThreads {
            ends: Side::BOTH.map(|side| Arc::downgrade(&ends[side])),
            cut: Arc::clone(&cut),
        };
        let both = ends.clone();
        let relay = move || {
            let mut report = EndReport {
                reporter: &reporter,
                result: ThreadsResult::default(),
            };
            report.result = relay_both(ends, &cut, &reporter);
        };
        match thread("hvsock-relay").spawn(relay) {
            Ok(_) => Ok(threads),
            Err(e) => {
                for end in both {
                    end.stream.abort();
                }
                Err(e)
            }
        }
    }

    /// Returns the progress.
    pub(crate) fn progress(&self) -> Progress {
        let ends = self.ends.each_ref().map(Weak::upgrade);
        let delivered = |end: &Arc<SharedEnd>| end.delivered.load(Ordering::Relaxed);
        let half_closed = |end: &Arc<SharedEnd>| end.half_closed.load(Ordering::Acquire);
        Progress {
            delivered: ends.each_ref().map(|end| end.as_ref().map_or(0, delivered)),
            // A half-close is passed on to the end of the other side.
            half_closed: Side::BOTH
                .into_iter()
                .find(|side| ends[side.other()].as_ref().is_some_and(half_closed)),
        }
    }

    /// Cuts both directions off. It must be called again until the end is reported: a call that a
    /// thread was about to begin is not ended by the first one.
    pub(crate) fn cut(&self) {
        // A thread that still writes after the first call waits for room, and a half-close is
        // queued behind the bytes that wait there, so it does not arrive before the reset does. A
        // peer that is only slow would read it as a clean EOF.
        let again = self.cut.swap(true, Ordering::AcqRel);
        for end in self.ends.iter().filter_map(Weak::upgrade) {
            end.interrupted.store(true, Ordering::Release);
            let how = match again && end.writing.load(Ordering::Acquire) {
                false => Shutdown::Read,
                true => Shutdown::Both,
            };
            end.stream.interrupt(how);
        }
    }
}

/// A guard that reports the end, even after a panic.
struct EndReport<'a, O: Reporter> {
    reporter: &'a O,
    result: ThreadsResult,
}

impl<O: Reporter> Drop for EndReport<'_, O> {
    fn drop(&mut self) {
        self.reporter.report_end(self.result);
    }
}

fn thread(name: &str) -> thread::Builder {
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK)
}

/// One end, as both threads use it.
#[derive(Debug)]
struct SharedEnd {
    stream: Stream,
    /// Whether reads are interrupted from here, so that their results say nothing about the peer.
    interrupted: AtomicBool,
    /// Whether a thread is writing to the stream.
    writing: AtomicBool,
    /// Whether a write has failed for another reason than that the peer takes no more.
    failed: AtomicBool,
    half_closed: AtomicBool,
    delivered: AtomicU64,
}

impl SharedEnd {
    fn new(stream: Stream) -> SharedEnd {
        SharedEnd {
            stream,
            interrupted: AtomicBool::new(false),
            writing: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            half_closed: AtomicBool::new(false),
            delivered: AtomicU64::new(0),
        }
    }

    /// Returns whether an EOF that was read was sent by the peer. A kernel reports an error once:
    /// if a write gets it, a read finds an EOF, perhaps before the write returns.
    fn has_ended(&self) -> bool {
        let has_error = self.failed.load(Ordering::Acquire);
        // After our own half-close there are no writes that could get the error. Otherwise the
        // socket has lost its peer after an error, and has it still after an EOF.
        !has_error && (self.half_closed.load(Ordering::Acquire) || self.stream.has_peer())
    }
}

/// How a direction has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DirectionEnd {
    /// The EOF was passed on.
    Finished,
    /// The source is dead: a read failed.
    Dead,
    /// The sink takes no more.
    Refused,
    /// The direction was interrupted, since there was no use in going on.
    Interrupted,
}

/// Relays both directions to their ends, and closes both sides.
fn relay_both(
    ends: [Arc<SharedEnd>; 2],
    cut: &AtomicBool,
    reporter: &impl Reporter,
) -> ThreadsResult {
    let first = OnceLock::new();
    let relay = |side: Side| relay_direction(&ends, side, reporter, &first);
    let flows = thread::scope(|scope| {
        let answer = thread("hvsock-relay-answer").spawn_scoped(scope, || relay(Side::Server));
        let answer = match answer {
            Ok(answer) => answer,
            Err(e) => {
                warn!("a connection was broken off: no thread to carry it: {e}");
                return [DirectionEnd::Interrupted; 2];
            }
        };
        let request = relay(Side::Client);
        [request, answer.join().unwrap_or(DirectionEnd::Interrupted)]
    });
    let delivered = Side::BOTH.map(|side| ends[side].delivered.load(Ordering::Relaxed));
    let dead = Side::BOTH
        .into_iter()
        .find(|side| flows[*side] == DirectionEnd::Dead);
    let first = match dead {
        Some(side) => Some((side, Ending::BrokenOff)),
        None => first.get().map(|side| (*side, Ending::Whole)),
    };
    // Neither side waits for the other: its peer may take the whole drain timeout.
    let close =
        |side: Side, end: Arc<SharedEnd>| close_side(flows, side, &end.stream, cut, reporter);
    let [client, server] = ends;
    let abandoned = thread::scope(|scope| {
        let mine = Arc::clone(&server);
        let other = thread("hvsock-relay-close").spawn_scoped(scope, || close(Side::Server, mine));
        match other {
            Ok(other) => {
                drop(server);
                close(Side::Client, client) | other.join().unwrap_or(false)
            }
            Err(_) => close(Side::Client, client) | close(Side::Server, server),
        }
    });
    ThreadsResult {
        delivered,
        abandoned,
        first,
    }
}

/// Closes a side as [`CloseMode`] says. Returns whether its peer was to end it, and did not in
/// time.
fn close_side(
    flows: [DirectionEnd; 2],
    side: Side,
    stream: &Stream,
    cut: &AtomicBool,
    reporter: &impl Reporter,
) -> bool {
    let drain = reporter.drain_timeout(side);
    let was_cut = cut.load(Ordering::Acquire);
    let whole = flows[side.other()] == DirectionEnd::Finished;
    match close_mode(flows, side) {
        CloseMode::Close if !stream.is_framed() || flows[side] == DirectionEnd::Dead => false,
        // Rule 2 of a good neighbour: a VMM's connection is read to its EOF whatever happened, and
        // never closed with bytes unread.
        _ if stream.address().transport().needs_graceful_close => match was_cut {
            true => close_gracefully(stream, Duration::ZERO),
            false => close_gracefully(stream, drain.unwrap_or(LINGER)),
        },
        _ if was_cut => abort(stream),
        CloseMode::Close | CloseMode::Linger => close_gracefully(stream, drain.unwrap_or(LINGER)),
        CloseMode::Reset => match drain.filter(|_| whole) {
            Some(time) => close_gracefully(stream, time),
            // A peer that takes no more will never receive what it has not received yet.
            None if flows[side.other()] == DirectionEnd::Refused => abort(stream),
            None => {
                wait_for_arrival(stream, cut);
                abort(stream)
            }
        },
    }
}

/// Relays what `side` sends. `first` is the side that ended first, if one has.
fn relay_direction(
    ends: &[Arc<SharedEnd>; 2],
    side: Side,
    reporter: &impl Reporter,
    first: &OnceLock<Side>,
) -> DirectionEnd {
    let (source, sink) = (&ends[side], &ends[side.other()]);
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = (&source.stream).read(&mut buffer);
        if source.interrupted.load(Ordering::Acquire) {
            return DirectionEnd::Interrupted;
        }
        let n = match read {
            Ok(0) if source.has_ended() => {
                // The side is noted before the other one can answer its EOF.
                first.get_or_init(|| side);
                sink.half_closed.store(true, Ordering::Release);
                // An error says that the peer has closed already: then nobody needs to be told.
                let _ = sink.stream.shutdown(Shutdown::Write);
                return DirectionEnd::Finished;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Ok(0) | Err(_) => {
                // Nobody is left to take what the other side sends.
                sink.interrupted.store(true, Ordering::Release);
                sink.stream.interrupt(Shutdown::Read);
                source.stream.abort();
                return DirectionEnd::Dead;
            }
            Ok(n) => n,
        };
        let mut rest = &buffer[..n];
        // (Under Wine a write that waits while an EOF arrives takes nothing, and returns 0.)
        while !rest.is_empty() {
            sink.writing.store(true, Ordering::Release);
            let written = (&sink.stream).write(rest);
            sink.writing.store(false, Ordering::Release);
            let taken = *written.as_ref().unwrap_or(&0);
            rest = &rest[taken..];
            source.delivered.fetch_add(taken as u64, Ordering::Relaxed);
            reporter.count_delivered(side, taken as u64);
            if source.interrupted.load(Ordering::Acquire) {
                return DirectionEnd::Interrupted;
            }
            if let Err(e) = written
                && e.kind() != io::ErrorKind::Interrupted
            {
                // EPIPE alone says nothing about the input.
                let is_broken_pipe = e.kind() == io::ErrorKind::BrokenPipe;
                sink.failed.fetch_or(!is_broken_pipe, Ordering::AcqRel);
                first.get_or_init(|| side.other());
                return DirectionEnd::Refused;
            }
        }
    }
}

/// Returns how `side` is to be closed.
fn close_mode(flows: [DirectionEnd; 2], side: Side) -> CloseMode {
    let sent = match flows[side.other()] {
        DirectionEnd::Finished => Ending::Whole,
        _ => Ending::BrokenOff,
    };
    let input = match flows[side] {
        DirectionEnd::Finished => Some(Ending::Whole),
        DirectionEnd::Dead => Some(Ending::BrokenOff),
        DirectionEnd::Refused | DirectionEnd::Interrupted => None,
    };
    CloseMode::choose(side, sent, input)
}

/// Has the close reset the connection. Returns false: no drain was given up.
fn abort(stream: &Stream) -> bool {
    stream.abort();
    false
}

/// Half-closes and reads to the peer's EOF. Returns whether that did not come in time.
fn close_gracefully(stream: &Stream, time: Duration) -> bool {
    matches!(stream.close_gracefully(time), CloseOutcome::GivenUp)
}

/// Waits until the peer has received what it was sent, since a reset overtakes it; for at most
/// [`LINGER`], and only until the connection is cut off.
fn wait_for_arrival(stream: &Stream, cut: &AtomicBool) {
    let mut wait = ResetWait::new(Instant::now() + LINGER);
    loop {
        let now = Instant::now();
        match wait.check(stream.unacknowledged(), now) {
            Some(again) if !cut.load(Ordering::Acquire) => thread::sleep(again - now),
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests;
