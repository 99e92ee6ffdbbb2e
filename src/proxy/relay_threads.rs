//! Connections with an end that no poller can wait for: two threads carry one, each a direction, with blocking calls.
//!
//! The rules are the relay's. EOF of one side becomes a half-close of the other after the last byte. An error ends its
//! own direction, and what the other still holds may arrive; once both have ended, each side is owed what
//! [`CloseMode`] says, so that a broken upload is no clean EOF where the family can reset. What is different: a side
//! whose bytes nobody takes any more isn't read on, so that its end is noticed only when the other direction ends; and
//! an idle connection holds two threads and their buffers.
//!
//! A thread that waits is woken by [`Stream::interrupt`], and by nothing else: none looks around now and then.
//!
//! On Windows hosts bytes in flight are reported lost when an AF_HYPERV socket is closed. So such an end is never closed
//! before its peer's EOF was read, unless the drain timeout has passed, a direction has failed, or the proxy cuts off.
//! No more can be done: when the peer has ended first, nothing tells whether it has got the last bytes that it was sent.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use tracing::warn;

use crate::engine::relay::{CloseMode, Side};
use crate::stream::Stream;

use crate::engine::connection::{LINGER, LONGEST_RESET_PAUSE, RESET_PAUSE};

/// Bytes a direction's buffer holds.
const BUFFER: usize = 64 * 1024;

/// A bridge's threads call nothing deep; the buffers are on the heap.
const STACK: usize = 256 * 1024;

/// What a bridge does with its streams and their bytes besides carrying them.
pub(crate) trait Order: Send + Sync + 'static {
    /// Bytes that `side` sent were given to the other.
    fn delivered(&self, side: Side, bytes: u64);
    /// Whether a side's end is to be read to its EOF before it is closed; how long that may take.
    fn drain(&self, side: Side) -> Option<Duration>;
    /// Both streams are closed.
    fn ended(&self, ended: Ended);
}

/// What has become of a bridge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Bytes of each side that the other was given.
    pub(crate) delivered: [u64; 2],
    /// A side didn't end within the time that [`Order::drain`] gave it.
    pub(crate) abandoned: bool,
}

/// How far a bridge is that carries.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    /// Bytes of each side that were given to the other.
    pub(crate) delivered: [u64; 2],
    /// One side has ended.
    pub(crate) half_closed: bool,
}

/// Cuts a bridge off.
#[derive(Debug)]
pub(crate) struct RelayThreads {
    /// Gone when they are closed: a bridge that has ended isn't kept open by this.
    ends: [Weak<End>; 2],
    cut: Arc<AtomicBool>,
}

impl RelayThreads {
    /// Begins to carry between two streams, connected and blocking; [`Order::ended`] tells of the end.
    ///
    /// # Errors
    /// There is no thread to be had: both streams were reset.
    pub(crate) fn start(streams: [Stream; 2], order: impl Order) -> io::Result<RelayThreads> {
        let ends = streams.map(|stream| Arc::new(End::new(stream)));
        let cut = Arc::new(AtomicBool::new(false));
        let bridge = RelayThreads {
            ends: Side::BOTH.map(|side| Arc::downgrade(&ends[side])),
            cut: Arc::clone(&cut),
        };
        let kept = ends.clone();
        let carry = move || {
            let mut telling = Telling {
                order: &order,
                ended: Ended::default(),
            };
            telling.ended = carry(ends, &cut, &order);
        };
        match thread("hvsock-bridge").spawn(carry) {
            Ok(_) => Ok(bridge),
            Err(e) => {
                for end in kept {
                    end.stream.abort();
                }
                Err(e)
            }
        }
    }

    /// How far it is.
    pub(crate) fn progress(&self) -> Progress {
        let ends = self.ends.each_ref().map(Weak::upgrade);
        let delivered = |end: &Arc<End>| end.delivered.load(Ordering::Relaxed);
        let half_closed = |end: &Arc<End>| end.half_closed.load(Ordering::Acquire);
        Progress {
            delivered: ends.each_ref().map(|end| end.as_ref().map_or(0, delivered)),
            half_closed: ends.iter().flatten().any(half_closed),
        }
    }

    /// Breaks both directions off. To be called again until the end is told: what a thread was about to begin is not
    /// ended by the first call.
    pub(crate) fn cut(&self) {
        // Whoever still writes after the first call waits for room, and a half-close comes behind what is waiting there:
        // it doesn't arrive before the reset does. To who is only slow it would be a clean EOF.
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

/// Tells of the end, whatever happens.
struct Telling<'a, O: Order> {
    order: &'a O,
    ended: Ended,
}

impl<O: Order> Drop for Telling<'_, O> {
    fn drop(&mut self) {
        self.order.ended(self.ended);
    }
}

fn thread(name: &str) -> thread::Builder {
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK)
}

#[derive(Debug)]
struct End {
    stream: Stream,
    /// What its reads say any more is our own doing.
    interrupted: AtomicBool,
    /// A thread is in a write to it.
    writing: AtomicBool,
    /// A write has failed, and not only because the peer doesn't take more.
    failed: AtomicBool,
    half_closed: AtomicBool,
    delivered: AtomicU64,
}

impl End {
    fn new(stream: Stream) -> End {
        End {
            stream,
            interrupted: AtomicBool::new(false),
            writing: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            half_closed: AtomicBool::new(false),
            delivered: AtomicU64::new(0),
        }
    }

    /// Whether an EOF that was read is one that the peer has sent. A kernel tells of an error once: where a write is told
    /// of it, a read finds an EOF, and may do so before the write returns.
    fn has_ended(&self) -> bool {
        let told = self.failed.load(Ordering::Acquire);
        // Behind our own half-close there are no writes, and an EOF leaves no connection.
        !told && (self.half_closed.load(Ordering::Acquire) || self.stream.has_peer())
    }
}

/// How a direction has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    /// EOF was passed on.
    Finished,
    /// The source is dead: a read failed.
    Dead,
    /// The sink takes nothing more.
    Refused,
    /// By us: there was nobody left for whom to go on.
    Interrupted,
}

/// Carries both directions to their ends, and takes leave of both sides.
fn carry(ends: [Arc<End>; 2], cut: &AtomicBool, order: &impl Order) -> Ended {
    let flows = thread::scope(|scope| {
        let answer =
            thread("hvsock-bridge-answer").spawn_scoped(scope, || flow(&ends, Side::Server, order));
        let answer = match answer {
            Ok(answer) => answer,
            Err(e) => {
                warn!("a connection was broken off: no thread to carry it: {e}");
                return [Flow::Interrupted; 2];
            }
        };
        let request = flow(&ends, Side::Client, order);
        [request, answer.join().unwrap_or(Flow::Interrupted)]
    });
    let delivered = Side::BOTH.map(|side| ends[side].delivered.load(Ordering::Relaxed));
    let mut abandoned = false;
    for (side, end) in Side::BOTH.into_iter().zip(ends) {
        let whole = flows[side.other()] == Flow::Finished;
        abandoned |= match close_mode(flows, side) {
            CloseMode::Close if !end.stream.is_framed() || flows[side] == Flow::Dead => false,
            _ if cut.load(Ordering::Acquire) => abort(&end.stream),
            CloseMode::Close | CloseMode::Linger => {
                drain(&end.stream, order.drain(side).unwrap_or(LINGER))
            }
            CloseMode::Reset => match order.drain(side).filter(|_| whole) {
                Some(time) => drain(&end.stream, time),
                // What a peer has not got that takes nothing, it will never get.
                None if flows[side.other()] == Flow::Refused => abort(&end.stream),
                None => {
                    arrive(&end.stream, cut);
                    abort(&end.stream)
                }
            },
        };
    }
    Ended {
        delivered,
        abandoned,
    }
}

/// Carries what `side` sends.
fn flow(ends: &[Arc<End>; 2], side: Side, order: &impl Order) -> Flow {
    let (source, sink) = (&ends[side], &ends[side.other()]);
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = (&source.stream).read(&mut buffer);
        if source.interrupted.load(Ordering::Acquire) {
            return Flow::Interrupted;
        }
        let n = match read {
            Ok(0) if source.has_ended() => {
                sink.half_closed.store(true, Ordering::Release);
                // An error says that the peer has closed already: then there is nobody to tell.
                let _ = sink.stream.shutdown(Shutdown::Write);
                return Flow::Finished;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Ok(0) | Err(_) => {
                // Nobody is left to take what the other side sends.
                sink.interrupted.store(true, Ordering::Release);
                sink.stream.interrupt(Shutdown::Read);
                source.stream.abort();
                return Flow::Dead;
            }
            Ok(n) => n,
        };
        let mut rest = &buffer[..n];
        // (Under Wine a write that waits while an EOF comes takes nothing, and says so.)
        while !rest.is_empty() {
            sink.writing.store(true, Ordering::Release);
            let written = (&sink.stream).write(rest);
            sink.writing.store(false, Ordering::Release);
            let taken = *written.as_ref().unwrap_or(&0);
            rest = &rest[taken..];
            source.delivered.fetch_add(taken as u64, Ordering::Relaxed);
            order.delivered(side, taken as u64);
            if source.interrupted.load(Ordering::Acquire) {
                return Flow::Interrupted;
            }
            if let Err(e) = written
                && e.kind() != io::ErrorKind::Interrupted
            {
                // EPIPE alone says nothing of what comes from there.
                let deaf = e.kind() == io::ErrorKind::BrokenPipe;
                sink.failed.fetch_or(!deaf, Ordering::AcqRel);
                return Flow::Refused;
            }
        }
    }
}

/// What `side` is owed: see [`Pair::close_mode`](crate::engine::relay::Pair::close_mode), of which this is the same.
fn close_mode(flows: [Flow; 2], side: Side) -> CloseMode {
    let dead = flows[side] == Flow::Dead;
    match flows[side.other()] {
        Flow::Finished if dead || flows[side] == Flow::Finished => CloseMode::Close,
        Flow::Finished if side == Side::Client => CloseMode::Linger,
        _ if dead => CloseMode::Close,
        _ => CloseMode::Reset,
    }
}

/// Has the close be a reset; nobody is abandoned by it.
fn abort(stream: &Stream) -> bool {
    stream.abort();
    false
}

/// Reads to the peer's EOF; whether it didn't come in time.
fn drain(stream: &Stream, time: Duration) -> bool {
    let drained = stream.drain(time);
    drained.is_err_and(|e| e.kind() == io::ErrorKind::TimedOut)
}

/// Waits until the peer has what it was sent, for a reset overtakes; not for ever, and not when it is cut off.
fn arrive(stream: &Stream, cut: &AtomicBool) {
    let end = Instant::now() + LINGER;
    let mut pause = RESET_PAUSE;
    while stream.unacknowledged() > 0 && Instant::now() < end && !cut.load(Ordering::Acquire) {
        thread::sleep(pause);
        pause = (2 * pause).min(LONGEST_RESET_PAUSE);
    }
}

#[cfg(test)]
mod tests;
