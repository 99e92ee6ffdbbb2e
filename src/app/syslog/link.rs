//! The connection to the collector.
//!
//! A collector sends no answer, so it isn't known what it has read. The end of the connection shows
//! that it may not have read all; the kernel shows which bytes were not taken yet. So what was
//! written shortly before the end, or was not taken, is sent again over the next connection: it may
//! arrive twice, and is not lost. A proxy that accepts connections for an absent collector ends
//! them at once.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::queue::{MOST_KEPT, SyncQueue, SyslogFrame};
use crate::address::Address;
use crate::app::serve::{LOOK, Stop, completed};
use crate::stream::Stream;
use crate::sys::Wanted;

/// How long a dial may take.
const DIAL: Duration = Duration::from_secs(5);

/// The pause after a failed dial, doubled with each. Not too short: hyperkit's device hangs once in
/// some ten thousand dials to a port on which nothing listens.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How long the last messages may take once the end is requested.
const LAST: Duration = Duration::from_secs(2);

/// After so long without progress a warning is logged.
const STUCK: Duration = Duration::from_secs(5);

/// What was written within this time before the end of a connection may be lost.
const RECENT: Duration = Duration::from_secs(2);

/// The target of messages.
#[derive(Debug)]
pub(super) struct SyslogLink<'a> {
    target: &'a Address,
    stop: &'a Stop,
    connection: Option<SyslogConnection>,
    /// When the next dial may begin, and the pause if that one fails.
    next: Instant,
    pause: Duration,
    /// Whether it was logged that nothing is delivered.
    complained: bool,
    /// When the last messages must be delivered.
    end: Cell<Option<Instant>>,
}

impl<'a> SyslogLink<'a> {
    pub(super) fn new(target: &'a Address, stop: &'a Stop) -> SyslogLink<'a> {
        SyslogLink {
            target,
            stop,
            connection: None,
            next: Instant::now(),
            pause: FIRST_PAUSE,
            complained: false,
            end: Cell::new(None),
        }
    }

    /// Returns whether the time for the last messages is over.
    pub(super) fn is_over(&self) -> bool {
        if self.stop.is_asked() && self.end.get().is_none() {
            self.end.set(Some(Instant::now() + LAST));
        }
        let is_late = |end| Instant::now() >= end;
        self.stop.is_urgent() || self.end.get().is_some_and(is_late)
    }

    /// Returns the time until the next dial.
    pub(super) fn pause(&self) -> Duration {
        match self.connection {
            Some(_) => Duration::ZERO,
            None => self.next.saturating_duration_since(Instant::now()),
        }
    }

    /// Writes messages while it can. Even without messages it checks whether the connection has
    /// ended.
    pub(super) fn deliver(&mut self, kept: &SyncQueue) {
        loop {
            if let Some(why) = self
                .connection
                .as_mut()
                .and_then(SyslogConnection::detect_end)
            {
                self.take_back_unconfirmed(kept, &why);
            }
            self.log_recovery();
            if self.is_over() || !self.pause().is_zero() || kept.is_empty() {
                return;
            }
            if let Err(why) = self.connect() {
                if !self.is_over() {
                    self.complain(format_args!("{why}; keeping messages until it can be had"));
                }
                return;
            }
            // Taken out of `self`, since the wait looks at the rest of it.
            let (Some(mut connection), Some(frame)) = (self.connection.take(), kept.lock().pop())
            else {
                return;
            };
            let written = connection.write(&frame, &|| self.is_over());
            match &written {
                Ok(()) => connection.remember(frame),
                Err(_) => kept.lock().put_back([frame]),
            }
            self.connection = Some(connection);
            match written {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => return,
                Err(e) => self.take_back_unconfirmed(kept, &e.to_string()),
            }
        }
    }

    /// Connects if there is no connection.
    fn connect(&mut self) -> Result<(), String> {
        if self.connection.is_none() {
            let stream = Stream::connect_unless(self.target, DIAL, &|| self.is_over());
            let stream = stream.map_err(|e| e.to_string())?;
            stream.set_nonblocking(true).map_err(|e| e.to_string())?;
            self.connection = Some(SyslogConnection::new(stream));
        }
        Ok(())
    }

    /// Puts the messages of a lost connection back into the queue.
    fn take_back_unconfirmed(&mut self, kept: &SyncQueue, why: &str) {
        let Some(connection) = self.connection.take() else {
            return;
        };
        if connection.is_young() {
            let (target, ms) = (self.target, connection.since.elapsed().as_millis());
            self.complain(format_args!(
                "the connection to {target} lasted {ms} ms ({why}): is there no collector behind it? keeping messages"
            ));
        }
        kept.lock().put_back(connection.into_sent());
    }

    /// Logs a failed dial, once, and sets the pause before the next one.
    fn complain(&mut self, what: std::fmt::Arguments<'_>) {
        self.next = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        if !std::mem::replace(&mut self.complained, true) {
            warn!("{what}");
        }
    }

    /// Logs that the connection works, once it has shown that.
    fn log_recovery(&mut self) {
        if self
            .connection
            .as_ref()
            .is_none_or(SyslogConnection::is_young)
        {
            return;
        }
        self.pause = FIRST_PAUSE;
        if std::mem::take(&mut self.complained) {
            info!("connected to {}", self.target);
        }
    }

    /// Ends the connection once all that was written has arrived. Returns how many messages may not
    /// have been delivered.
    pub(super) fn end(mut self, kept: &SyncQueue) -> u64 {
        if let Some(mut connection) = self.connection.take()
            && (connection.detect_end().is_some() || !connection.end())
        {
            kept.lock().put_back(connection.into_sent());
        }
        let queue = kept.lock();
        queue.len() + queue.lost()
    }
}

/// A connection, and the messages that were written to it.
#[derive(Debug)]
struct SyslogConnection {
    stream: Stream,
    since: Instant,
    /// The frames that were written lately or not taken yet, with their times.
    sent: VecDeque<(Instant, SyslogFrame)>,
    sent_bytes: usize,
    /// When the peer half-closed or closed; only a write shows which.
    silent_since: Option<Instant>,
    /// Whether the peer is known to be there: a write after its EOF was not answered by a reset.
    is_there: bool,
    /// Whether the last frame was written only in part.
    torn: bool,
}

impl SyslogConnection {
    fn new(stream: Stream) -> SyslogConnection {
        SyslogConnection {
            stream,
            since: Instant::now(),
            sent: VecDeque::new(),
            sent_bytes: 0,
            silent_since: None,
            is_there: false,
            torn: false,
        }
    }

    fn is_young(&self) -> bool {
        self.since.elapsed() < RECENT
    }

    /// Returns how the peer has ended it, if so. Other bytes from the peer are ignored.
    fn detect_end(&mut self) -> Option<String> {
        self.forget();
        loop {
            match completed((&self.stream).read(&mut [0; 512])) {
                Ok(None) => return None,
                Ok(Some(0)) => {
                    self.silent_since.get_or_insert_with(Instant::now);
                    // An empty write fails if the family tells a half-close from a close. TCP
                    // doesn't.
                    let gone =
                        self.stream.is_hung_up() || completed((&self.stream).write(&[])).is_err();
                    return gone.then(|| "it was ended".to_owned());
                }
                Ok(Some(_)) => {}
                Err(e) => return Some(e.to_string()),
            }
        }
    }

    /// Writes all of a frame.
    ///
    /// # Errors
    /// Returns the error of the write; `Interrupted` once `is_over` returns true.
    fn write(&mut self, frame: &[u8], is_over: &dyn Fn() -> bool) -> io::Result<()> {
        let mut rest = frame;
        let mut moved = Instant::now();
        let mut stuck = false;
        while !rest.is_empty() {
            if let Some(n) = completed((&self.stream).write(rest))? {
                rest = &rest[n..];
                moved = Instant::now();
                continue;
            }
            if let Some(why) = self.detect_end() {
                return Err(io::Error::new(io::ErrorKind::ConnectionReset, why));
            }
            if is_over() {
                self.torn = rest.len() < frame.len();
                return Err(io::ErrorKind::Interrupted.into());
            }
            if moved.elapsed() >= STUCK && !std::mem::replace(&mut stuck, true) {
                let (address, seconds) = (self.stream.address(), STUCK.as_secs());
                warn!("{address} has taken nothing for {seconds} s; keeping messages");
            }
            // After the peer's EOF, a wait for readability would return at once.
            let wanted = match self.silent_since {
                None => Wanted::Either,
                Some(_) => Wanted::Writable,
            };
            self.stream.wait(wanted, LOOK)?;
        }
        if stuck {
            info!("{} takes messages again", self.stream.address());
        }
        Ok(())
    }

    /// Keeps a frame that was written.
    fn remember(&mut self, frame: SyslogFrame) {
        self.sent_bytes += frame.len();
        self.sent.push_back((Instant::now(), frame));
        self.forget();
    }

    /// Drops frames that can't be lost any more.
    fn forget(&mut self) {
        let is_old = |when: &Instant| when.elapsed() >= RECENT;
        if let Some(since) = self.silent_since {
            let after = self.sent.partition_point(|(when, _)| *when <= since);
            let first = self.sent.get(after);
            self.is_there |= first.is_some_and(|(when, _)| is_old(when));
        }
        let doubted = self.is_doubted();
        let mut untaken = None;
        while let Some((when, frame)) = self.sent.front() {
            if self.sent_bytes <= MOST_KEPT {
                if doubted || !is_old(when) {
                    break;
                }
                let untaken = *untaken.get_or_insert_with(|| self.stream.untaken());
                if self.sent_bytes - frame.len() < untaken {
                    break;
                }
            }
            self.sent_bytes -= frame.len();
            self.sent.pop_front();
        }
    }

    /// Returns the frames that may be lost.
    fn into_sent(self) -> impl DoubleEndedIterator<Item = SyslogFrame> {
        self.sent.into_iter().map(|(_, frame)| frame)
    }

    /// Returns whether the peer may have closed, and so lost what was written.
    fn is_doubted(&self) -> bool {
        self.silent_since.is_some() && !self.is_there
    }

    /// Ends the connection. Returns whether the collector has ended it, too, and so has read all.
    fn end(&self) -> bool {
        if self.torn && !self.stream.address().transport().needs_graceful_close {
            // A partial frame must not look complete.
            self.stream.abort();
            return false;
        }
        match self.stream.finish(LAST) {
            Ok(()) => self.sent.is_empty() || !self.is_doubted(),
            // A Unix socket shows what was read.
            Err(e) if e.kind() == io::ErrorKind::TimedOut => self.stream.has_been_read(),
            Err(_) => false,
        }
    }
}
