//! The connection to the collector.
//!
//! A collector answers nothing, so it isn't known what it has read. That it may not have read all
//! is told by the end of the connection; that it has not, by the kernel, of bytes that were not
//! taken yet. So what was written shortly before the end, or was not taken, goes once more over the
//! next connection: it may come twice, and is not lost. A proxy that accepts for a collector that
//! is away ends the connection at once.

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

/// How long there is no other dial after one that came to nothing, doubled with each. Not too
/// often: a guest that dials where nobody listens hangs hyperkit's device, once in some ten
/// thousand times.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How long the last messages may take when the end is asked for.
const LAST: Duration = Duration::from_secs(2);

/// A collector that has taken nothing for so long is told of.
const STUCK: Duration = Duration::from_secs(5);

/// What was written so long before the end of a connection is seen may be lost with it.
const RECENT: Duration = Duration::from_secs(2);

/// Where messages go.
#[derive(Debug)]
pub(super) struct SyslogLink<'a> {
    target: &'a Address,
    stop: &'a Stop,
    connection: Option<SyslogConnection>,
    /// When the next dial may begin, and how long the pause is if that one fails.
    next: Instant,
    pause: Duration,
    /// Whether it was said that nothing is delivered.
    complained: bool,
    /// When the last messages must have gone.
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

    /// Returns whether there is no more time for what is left.
    pub(super) fn is_over(&self) -> bool {
        if self.stop.is_asked() && self.end.get().is_none() {
            self.end.set(Some(Instant::now() + LAST));
        }
        let is_late = |end| Instant::now() >= end;
        self.stop.is_urgent() || self.end.get().is_some_and(is_late)
    }

    /// Returns how long it is until the next dial may be tried.
    pub(super) fn pause(&self) -> Duration {
        match self.connection {
            Some(_) => Duration::ZERO,
            None => self.next.saturating_duration_since(Instant::now()),
        }
    }

    /// Writes what is there, as long as it can. Even if nothing is, it sees whether the connection
    /// has ended.
    pub(super) fn deliver(&mut self, kept: &SyncQueue) {
        loop {
            if let Some(why) = self.connection.as_mut().and_then(SyslogConnection::end_of) {
                self.take_back_unconfirmed(kept, &why);
            }
            self.tell_recovery();
            if self.is_over() || !self.pause().is_zero() || kept.is_empty() {
                return;
            }
            if let Err(why) = self.connect() {
                if !self.is_over() {
                    self.complain(format_args!("{why}; keeping messages until it can be had"));
                }
                return;
            }
            // Out of `self`, for the wait looks at the rest of it.
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

    /// Sees to it that there is a connection.
    fn connect(&mut self) -> Result<(), String> {
        if self.connection.is_none() {
            let stream = Stream::connect_unless(self.target, DIAL, &|| self.is_over());
            let stream = stream.map_err(|e| e.to_string())?;
            stream.set_nonblocking(true).map_err(|e| e.to_string())?;
            self.connection = Some(SyslogConnection::new(stream));
        }
        Ok(())
    }

    /// Takes back what a lost connection was given.
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

    /// Tells of a dial that came to nothing, once, and has the next one wait.
    fn complain(&mut self, what: std::fmt::Arguments<'_>) {
        self.next = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        if !std::mem::replace(&mut self.complained, true) {
            warn!("{what}");
        }
    }

    /// Notes that a connection is one, once it has shown that.
    fn tell_recovery(&mut self) {
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

    /// Ends the connection, all that was written having arrived; how many messages may not have
    /// been delivered.
    pub(super) fn end(mut self, kept: &SyncQueue) -> u64 {
        if let Some(mut connection) = self.connection.take()
            && (connection.end_of().is_some() || !connection.end())
        {
            kept.lock().put_back(connection.into_sent());
        }
        let queue = kept.lock();
        queue.len() + queue.lost()
    }
}

/// A connection, and what it was given.
#[derive(Debug)]
struct SyslogConnection {
    stream: Stream,
    since: Instant,
    /// Written lately, or not taken yet; and when.
    sent: VecDeque<(Instant, SyslogFrame)>,
    sent_bytes: usize,
    /// When the peer said that it has nothing to say. It may have gone altogether: only a write
    /// tells.
    silent_since: Option<Instant>,
    /// The peer has not gone: a write after that was not answered by a reset.
    is_there: bool,
    /// The last frame was not written to its end.
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

    /// Returns how the peer has ended it, if it has. What else it says is of no interest.
    fn end_of(&mut self) -> Option<String> {
        self.forget();
        loop {
            match completed((&self.stream).read(&mut [0; 512])) {
                Ok(None) => return None,
                Ok(Some(0)) => {
                    self.silent_since.get_or_insert_with(Instant::now);
                    // An empty write fails where the family tells a half-close from a close. TCP
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
    /// What the kernel says; `Interrupted` once it is over.
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
            if let Some(why) = self.end_of() {
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
            // An EOF that was read would end each wait for something to read.
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

    /// Lets go of what needs to be kept no longer.
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

    /// Returns the frames that may be lost with it.
    fn into_sent(self) -> impl DoubleEndedIterator<Item = SyslogFrame> {
        self.sent.into_iter().map(|(_, frame)| frame)
    }

    /// Returns whether the peer may have gone, and what it was given with it.
    fn is_doubted(&self) -> bool {
        self.silent_since.is_some() && !self.is_there
    }

    /// Ends it; whether the collector has, too, and so has read all.
    fn end(&self) -> bool {
        if self.torn && !self.stream.address().transport().needs_graceful_close {
            // Half a frame must not look like all.
            self.stream.abort();
            return false;
        }
        match self.stream.finish(LAST) {
            Ok(()) => self.sent.is_empty() || !self.is_doubted(),
            // A Unix socket tells what was read.
            Err(e) if e.kind() == io::ErrorKind::TimedOut => self.stream.has_been_read(),
            Err(_) => false,
        }
    }
}
