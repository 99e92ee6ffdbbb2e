//! A connection between standard input and output, or those of a program, and a peer.
//!
//! A thread carries each direction, so that neither waits for the other; the session's own thread
//! waits for their events. Each direction ends by itself: EOF on standard input becomes a
//! half-close, and received bytes are written up to their end.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tracing::info;

use crate::app::serve::{self, LOOK};
use crate::dial;
use crate::lock::lock;
use crate::stream::Stream;
use crate::thread::start_thread;

use super::event::{CatEvent, CatFailure, CatResult, SessionEvent};
use super::near::{BUFFER, Chunks, Near, Output};

/// The longest wait that only an event ends.
const IDLE: Duration = Duration::from_secs(3600);

/// How long the half-close to a silent guest is kept back: hyperkit refuses by EOF, some 50 µs
/// after the dial. After a half-close that would look like an empty answer.
const HOLD: Duration = Duration::from_millis(10);

/// The same if nothing was sent. Nothing waits for an answer then, and a loaded machine may refuse
/// late. If something was sent, a refusal mostly leaves it unread, which a reset shows however late
/// it comes.
const HOLD_WITHOUT_REQUEST: Duration = Duration::from_secs(1);

/// How often it is checked meanwhile whether an answer has begun.
const HOLD_LOOK: Duration = Duration::from_millis(1);

/// A longer wait at the end is reported.
const PATIENCE: Duration = Duration::from_secs(2);

/// A connection, and what it needs.
pub(super) struct Session<'a> {
    pub(super) number: u64,
    pub(super) stream: Arc<Stream>,
    pub(super) connected: Instant,
    pub(super) drain: Duration,
    /// Whether another session may follow.
    pub(super) keeps: bool,
    pub(super) near: Near<'a>,
    /// Whether it is over once the peer has ended.
    pub(super) ends_with_peer: bool,
    pub(super) events: &'a Receiver<CatEvent>,
    pub(super) tell: &'a Sender<CatEvent>,
}

/// What the threads of a session share.
#[derive(Clone, Debug)]
struct SharedSession {
    stream: Arc<Stream>,
    /// Whether the session is over, or is only to be ended.
    over: Arc<AtomicBool>,
    half_closed: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
}

impl Session<'_> {
    /// Carries until both directions have ended or one has failed, then ends the connection in the
    /// way that the peer needs.
    pub(super) fn run(self) -> CatResult {
        let shared = SharedSession {
            stream: Arc::clone(&self.stream),
            over: Arc::default(),
            half_closed: Arc::default(),
            received: Arc::default(),
        };
        let mut peer_ended = false;
        let begun = self.start_threads(&shared);
        let outcome = begun.and_then(|()| self.wait(&shared, &mut peer_ended));
        shared.over.store(true, Ordering::Release);
        let is_graceful = self.stream.address().transport().needs_graceful_close;
        if outcome.is_ok() && !peer_ended && self.near.has_gone() {
            // The local side needs no more bytes, but the peer must receive all that was sent.
            self.close_gracefully();
        } else if !peer_ended || outcome.is_err() && !is_graceful {
            // The peer may have ended its direction and still wait for the rest of ours.
            self.break_off();
        } else {
            self.half_close(&shared);
        }
        outcome
    }

    /// Starts the threads for both directions.
    fn start_threads(&self, shared: &SharedSession) -> CatResult {
        let output = self.near.output();
        self.spawn(shared, "hvsock-receive", |shared, tell| {
            carry_to_output(shared, output, tell)
        })?;
        // Without another session, no thread has to give the input back.
        let chunks = self.near.chunks(if self.keeps { LOOK } else { IDLE });
        let connected = self.connected;
        self.spawn(shared, "hvsock-send", move |shared, tell| {
            carry_from_input(shared, &chunks, connected, tell)
        })
    }

    fn half_close(&self, shared: &SharedSession) {
        if !shared.half_closed.swap(true, Ordering::Relaxed) {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    fn spawn(
        &self,
        shared: &SharedSession,
        name: &str,
        work: impl FnOnce(&SharedSession, &dyn Fn(SessionEvent)) + Send + 'static,
    ) -> CatResult {
        let (number, shared, tell) = (self.number, shared.clone(), self.tell.clone());
        let work = move || {
            work(&shared, &|event| {
                // A session that is over has no receiver.
                let _ = tell.send(CatEvent::Session(number, event));
            });
        };
        let purpose = format!("to carry a connection of {}", self.stream.address());
        start_thread(name, &purpose, work)?;
        Ok(())
    }

    /// Waits for the end of the session.
    fn wait(&self, shared: &SharedSession, peer_ended: &mut bool) -> CatResult {
        let address = self.stream.address();
        let mut sent = None;
        let mut moved = (0, Instant::now());
        loop {
            match &sent {
                Some(Ok(())) if *peer_ended => return Ok(()),
                Some(Err(e)) if *peer_ended => {
                    return Err(CatFailure::Failed(format!(
                        "cannot send all of standard input to {address}: {e}"
                    )));
                }
                _ => {}
            }
            // Checks are needed only at the end: an idle connection causes no wake-ups.
            let wait = match *peer_ended || sent.is_some() {
                true => LOOK,
                false => IDLE,
            };
            let event = match self.events.recv_timeout(wait) {
                Ok(CatEvent::Session(number, event)) if number == self.number => event,
                Ok(CatEvent::Session(..)) => continue,
                Ok(CatEvent::Interrupt) => return Err(CatFailure::Interrupted),
                // All that came is written already.
                Ok(CatEvent::OutputClosed) if *peer_ended => continue,
                Ok(CatEvent::OutputClosed) => return Err(CatFailure::OutputClosed),
                // Last: a failure under way comes first.
                Err(RecvTimeoutError::Timeout)
                    if *peer_ended && self.near.is_idle(|| self.stream.is_hung_up()) =>
                {
                    return Ok(());
                }
                Err(RecvTimeoutError::Timeout) => {
                    if sent.is_some() && self.near.has_gone() {
                        return Ok(());
                    }
                    let received = shared.received.load(Ordering::Relaxed);
                    if received != moved.0 || sent.is_none() {
                        moved = (received, Instant::now());
                    } else if moved.1.elapsed() >= self.drain {
                        // The peer may wait for the half-close that was kept back. Without
                        // half-closes, its silence is the end.
                        if !self.stream.has_half_close() {
                            return Ok(());
                        }
                        self.half_close(shared);
                    }
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return Err(CatFailure::Interrupted),
            };
            match event {
                SessionEvent::InputEnded => sent = Some(Ok(())),
                SessionEvent::SendFailed(e) => sent = Some(Err(e)),
                SessionEvent::PeerEnded(count) => {
                    *peer_ended = true;
                    let half_closed = shared.half_closed.load(Ordering::Relaxed);
                    if count == 0 && address.transport().refusal.by_eof().is_some() && !half_closed
                    {
                        return Err(dial::refused_by_eof(address).into());
                    }
                    self.near.end_output();
                    if self.ends_with_peer {
                        return Ok(());
                    }
                }
                SessionEvent::ReceiveFailed(0, _)
                    if address.transport().refusal.by_eof().is_some() =>
                {
                    *peer_ended = true;
                    return Err(dial::refused_by_eof(address).into());
                }
                SessionEvent::ReceiveFailed(_, e) => {
                    *peer_ended = true;
                    let why = format!("the connection to {address} broke: {e}");
                    return Err(CatFailure::Failed(why));
                }
                SessionEvent::InputFailed(e) => {
                    let why = format!("cannot read standard input: {e}");
                    return Err(CatFailure::Failed(why));
                }
                SessionEvent::OutputFailed(_) if self.near.may_leave_unread() => {}
                SessionEvent::OutputFailed(e) if e.kind() == io::ErrorKind::BrokenPipe => {
                    return Err(CatFailure::OutputClosed);
                }
                SessionEvent::OutputFailed(e) => {
                    let why = format!("cannot write to standard output: {e}");
                    return Err(CatFailure::Failed(why));
                }
            }
        }
    }

    /// Breaks a connection off: what was sent must not look complete, if the family can show that.
    fn break_off(&self) {
        if !self.stream.address().transport().needs_graceful_close {
            self.stream.abort();
            if self.stream.address().transport().runs_program {
                // A thread that reads standard input may hold the socket open.
                let _ = self.stream.shutdown(Shutdown::Both);
            }
            return;
        }
        self.close_gracefully();
    }

    /// Gives the peer time to end the connection.
    fn close_gracefully(&self) {
        let mut told = false;
        // Not in the receiving thread, which standard output may block.
        serve::close_gracefully(&self.stream, self.drain, |passed| {
            if passed >= PATIENCE && !std::mem::replace(&mut told, true) {
                let (address, seconds) = (self.stream.address(), self.drain.as_secs());
                info!(
                    "giving {address} {seconds} s to end the connection; a signal cuts that short"
                );
            }
            let interrupted = |event| matches!(event, CatEvent::Interrupt);
            !self.events.try_iter().any(interrupted)
        });
    }
}

/// Writes received bytes to standard output. If that fails, discards them until the session is
/// over.
fn carry_to_output(shared: &SharedSession, output: Output, tell: &dyn Fn(SessionEvent)) {
    let mut stream = &*shared.stream;
    let mut output = match output {
        Ok(output) => Some(output),
        Err(e) => {
            tell(SessionEvent::OutputFailed(e));
            None
        }
    };
    let mut buffer = vec![0; BUFFER];
    let mut total = 0;
    loop {
        let n = match stream.read(&mut buffer) {
            Ok(0) => return tell(SessionEvent::PeerEnded(total)),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return tell(SessionEvent::ReceiveFailed(total, e)),
        };
        total += n as u64;
        shared.received.store(total, Ordering::Relaxed);
        if shared.over.load(Ordering::Relaxed) {
            output = None;
        }
        if let Some(to) = &mut output
            && let Err(e) = to.write_all(&buffer[..n])
        {
            tell(SessionEvent::OutputFailed(e));
            output = None;
        }
    }
}

/// Sends standard input to the peer, and half-closes at its end.
fn carry_from_input(
    shared: &SharedSession,
    chunks: &Mutex<Chunks>,
    connected: Instant,
    tell: &dyn Fn(SessionEvent),
) {
    let mut stream = &*shared.stream;
    let mut hold = HOLD_WITHOUT_REQUEST;
    loop {
        let next = lock(chunks).next(|| shared.over.load(Ordering::Acquire));
        let chunk = match next {
            Some(chunk) => chunk,
            None if shared.over.load(Ordering::Acquire) => return,
            None => continue,
        };
        match chunk {
            Ok(chunk) if chunk.is_empty() => break,
            Ok(chunk) => {
                hold = HOLD;
                if let Err(e) = stream.write_all(&chunk) {
                    return tell(SessionEvent::SendFailed(e));
                }
            }
            Err(e) => return tell(SessionEvent::InputFailed(e)),
        }
    }
    let address = stream.address();
    if address.transport().refusal.by_eof().is_some() {
        let is_answered = || shared.received.load(Ordering::Relaxed) > 0;
        let is_over = || shared.over.load(Ordering::Acquire);
        while connected.elapsed() < hold && !is_answered() && !is_over() {
            thread::sleep(HOLD_LOOK);
        }
    }
    // An end before the half-close is no answer to it, even if it is noticed only later.
    if !stream.half_close_ends_both() && !stream.is_hung_up() {
        shared.half_closed.store(true, Ordering::Relaxed);
        // A peer that has ended needs no half-close.
        let _ = stream.shutdown(Shutdown::Write);
    }
    tell(SessionEvent::InputEnded);
}
