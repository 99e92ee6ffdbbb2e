//! The connection to the collector.
//!
//! A collector never says anything, so that nothing tells what it has read. What tells that it has not is the end of the
//! connection: then what was written last goes once more over the next one. It may come twice so; it is not lost.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::queue::{Frame, Kept, MOST_KEPT};
use crate::address::Address;
use crate::serve::{LOOK, Stop, again};
use crate::stream::Stream;
use crate::sys::{self, AsSocket, Wanted};

/// How long a dial may take, and how long there is no other after one that failed.
const DIAL: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_secs(1);

/// How long the last messages may take when the end is asked for.
const LAST: Duration = Duration::from_secs(2);

/// A collector that has taken nothing for so long is told of.
const STUCK: Duration = Duration::from_secs(5);

/// A connection that ends within this time may never have had a collector: something in between has accepted, and
/// dialled in vain for as long as 30 s (a proxy) or two minutes (a kernel behind it). All that it was given is sent again.
const TRIAL: Duration = Duration::from_secs(150);

/// Of an older connection, what was written so long before its end is seen is sent again.
const RECENT: Duration = Duration::from_secs(1);

/// Why nothing is delivered, once it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// Nobody could be connected to.
    Away,
    /// Connections end soon.
    EndedSoon,
}

/// Where messages go.
#[derive(Debug)]
pub(super) struct Link<'a> {
    target: &'a Address,
    stop: &'a Stop,
    connection: Option<Connection>,
    /// No dial before.
    next: Instant,
    trouble: Option<Trouble>,
    /// When the last messages must have gone.
    end: Cell<Option<Instant>>,
}

impl<'a> Link<'a> {
    pub(super) fn new(target: &'a Address, stop: &'a Stop) -> Link<'a> {
        Link {
            target,
            stop,
            connection: None,
            next: Instant::now(),
            trouble: None,
            end: Cell::new(None),
        }
    }

    /// Whether there is no more time for what is left.
    pub(super) fn is_over(&self) -> bool {
        if self.stop.is_asked() && self.end.get().is_none() {
            self.end.set(Some(Instant::now() + LAST));
        }
        let is_late = |end| Instant::now() >= end;
        self.stop.is_urgent() || self.end.get().is_some_and(is_late)
    }

    /// How long until it may be tried again.
    pub(super) fn pause(&self) -> Duration {
        match self.connection {
            Some(_) => Duration::ZERO,
            None => self.next.saturating_duration_since(Instant::now()),
        }
    }

    /// Writes what is there, as long as it can. Even if nothing is, it sees whether the connection has ended.
    pub(super) fn deliver(&mut self, kept: &Kept) {
        loop {
            let ended = self.connection.as_mut().is_some_and(Connection::has_ended);
            if ended {
                self.lose(kept, "it was ended");
            }
            if self.is_over() || !self.pause().is_zero() || kept.is_empty() {
                return;
            }
            if let Err(why) = self.connect() {
                self.next = Instant::now() + PAUSE;
                if self.trouble.is_none() && !self.is_over() {
                    self.trouble = Some(Trouble::Away);
                    warn!("{why}; keeping messages until it can be had");
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
                Ok(()) => self.tell_recovery(kept),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => return,
                Err(e) => self.lose(kept, &e.to_string()),
            }
        }
    }

    /// Sees to it that there is a connection.
    fn connect(&mut self) -> Result<(), String> {
        if self.connection.is_none() {
            let stream = Stream::connect_unless(self.target, DIAL, &|| self.is_over());
            let stream = stream.map_err(|e| e.to_string())?;
            stream.set_nonblocking(true).map_err(|e| e.to_string())?;
            self.connection = Some(Connection::new(stream));
        }
        Ok(())
    }

    /// Takes back what a lost connection was given.
    fn lose(&mut self, kept: &Kept, why: &str) {
        let Some(connection) = self.connection.take() else {
            return;
        };
        if connection.is_on_trial() {
            self.next = Instant::now() + PAUSE;
            if self.trouble.replace(Trouble::EndedSoon) != Some(Trouble::EndedSoon) {
                warn!(
                    "the connection to {} lasted {:.1} s ({why}): is there no collector behind it? keeping messages, and sending them again",
                    self.target,
                    connection.since.elapsed().as_secs_f64()
                );
            }
        }
        let sent = connection.sent.into_iter().map(|(_, frame)| frame);
        kept.lock().put_back(sent);
    }

    /// Tells that trouble is over, once it is.
    fn tell_recovery(&mut self, kept: &Kept) {
        let on_trial = |connection: &Connection| connection.is_on_trial();
        match self.trouble {
            None => return,
            Some(Trouble::EndedSoon) if self.connection.as_ref().is_none_or(on_trial) => return,
            Some(_) => self.trouble = None,
        }
        info!("connected to {}", self.target);
        let lost = kept.lock().take_lost();
        if lost > 0 {
            warn!("{lost} messages were let go of: more came than are kept");
        }
    }

    /// Ends the connection, all that was written having arrived; how many messages were not delivered.
    pub(super) fn end(mut self, kept: &Kept) -> u64 {
        if self.connection.as_mut().is_some_and(Connection::has_ended) {
            self.lose(kept, "it was ended");
        }
        if let Some(connection) = &self.connection {
            connection.end();
        }
        let mut queue = kept.lock();
        queue.len() + queue.take_lost()
    }
}

/// A connection, and what it was given.
#[derive(Debug)]
struct Connection {
    stream: Stream,
    since: Instant,
    /// Written on trial, or lately; and when.
    sent: VecDeque<(Instant, Frame)>,
    sent_bytes: usize,
    /// The last frame was not written to its end.
    torn: bool,
}

impl Connection {
    fn new(stream: Stream) -> Connection {
        Connection {
            stream,
            since: Instant::now(),
            sent: VecDeque::new(),
            sent_bytes: 0,
            torn: false,
        }
    }

    fn is_on_trial(&self) -> bool {
        self.since.elapsed() < TRIAL
    }

    /// Whether the peer has ended it. What else it says is of no interest.
    fn has_ended(&mut self) -> bool {
        self.forget();
        loop {
            match again((&self.stream).read(&mut [0; 512])) {
                Ok(None) => return false,
                Ok(Some(0)) | Err(_) => return true,
                Ok(Some(_)) => {}
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
            if let Some(n) = again((&self.stream).write(rest))? {
                rest = &rest[n..];
                moved = Instant::now();
                continue;
            }
            if self.has_ended() {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            if is_over() {
                self.torn = rest.len() < frame.len();
                return Err(io::ErrorKind::Interrupted.into());
            }
            if moved.elapsed() >= STUCK && !std::mem::replace(&mut stuck, true) {
                let (address, seconds) = (self.stream.address(), STUCK.as_secs());
                warn!("{address} has taken nothing for {seconds} s; keeping messages");
            }
            sys::wait(self.stream.as_socket(), Wanted::Either, LOOK)?;
        }
        if stuck {
            info!("{} takes messages again", self.stream.address());
        }
        Ok(())
    }

    /// Keeps a frame that was written.
    fn remember(&mut self, frame: Frame) {
        self.sent_bytes += frame.len();
        self.sent.push_back((Instant::now(), frame));
        self.forget();
    }

    /// Lets go of what needs to be kept no longer.
    fn forget(&mut self) {
        let on_trial = self.is_on_trial();
        while let Some((when, frame)) = self.sent.front() {
            let recent = on_trial || when.elapsed() < RECENT;
            if recent && self.sent_bytes <= MOST_KEPT {
                break;
            }
            self.sent_bytes -= frame.len();
            self.sent.pop_front();
        }
    }

    fn end(&self) {
        if self.torn && !self.stream.address().is_delicate() {
            // Half a frame must not look like all.
            self.stream.abort();
        } else {
            // A collector that goes on reading after that is its own affair.
            let _ = self.stream.finish(LAST);
        }
    }
}
