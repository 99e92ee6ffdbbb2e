//! The attempts of a dial at real sockets, for callers that wait for them without the proxy's loop:
//! one that blocks, and one in a runtime.

use std::io;
use std::time::{Duration, Instant};

use super::{Begun, Dial, FailedAddresses, Next, Race};
use crate::stream::endpoint::Endpoint;
use crate::stream::nonblocking::Stream;

/// A dial, and the attempts of it that are under way.
#[derive(Debug)]
pub(crate) struct Attempts {
    race: Race<Stream>,
    latest: Option<Stream>,
}

impl Attempts {
    pub(crate) fn new(dial: Dial) -> Attempts {
        Attempts {
            race: Race::new(dial),
            latest: None,
        }
    }

    /// Begins to connect to the dial's endpoint. Returns what to wait for.
    ///
    /// # Errors
    /// Returns why that can't be; `NotFound` if there is no endpoint.
    pub(crate) fn begin(&mut self) -> io::Result<Begun> {
        let Some(endpoint) = self.race.dial.endpoint() else {
            let why = "the name has no address";
            return Err(io::Error::new(io::ErrorKind::NotFound, why));
        };
        self.latest = Some(Stream::connect(endpoint, self.patience(Instant::now()))?);
        Ok(self.race.dial.begin_attempt(Instant::now()))
    }

    /// Returns how long there is for an attempt.
    fn patience(&self, now: Instant) -> Duration {
        self.race.dial.deadline().saturating_duration_since(now)
    }

    /// Looks at all of them, and begins the next one if it is due. Returns whether one has
    /// succeeded; if none has, this is to be called again as soon as one is writable, or
    /// [then](Attempts::wait_until).
    ///
    /// # Errors
    /// Returns the error of the last one, if none is under way any more; `TimedOut`.
    pub(crate) fn go_on(&mut self, now: Instant) -> io::Result<bool> {
        loop {
            let look = self.race.look_at_earlier(now, Stream::connected);
            for attempt in look.failed {
                note_failure(&attempt.endpoint, now);
            }
            if let Some((winner, _later)) = look.winner {
                self.latest = Some(winner);
                return Ok(self.win(now));
            }
            match self.latest.as_ref().map_or(Ok(false), Stream::connected) {
                Ok(true) => return Ok(self.win(now)),
                Ok(false) if now >= self.race.dial.deadline() => {
                    let why = "it hasn't answered in time";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                }
                Ok(false) => {}
                Err(e) => match self.race.return_to_earlier(now) {
                    Some((socket, failed)) => {
                        self.latest = Some(socket);
                        failed.iter().for_each(|it| note_failure(it, now));
                    }
                    None => {
                        let failed = self.race.dial.endpoint();
                        failed.iter().for_each(|it| note_failure(it, now));
                        return Err(e);
                    }
                },
            }
            if self.race.next_attempt().is_none_or(|at| now < at) {
                return Ok(false);
            }
            match self
                .race
                .dial
                .next_endpoint()
                .map(|it| Stream::connect(it, self.patience(now)))
            {
                Some(Ok(socket)) => {
                    if let Some(before) = self.latest.replace(socket) {
                        let oldest = self.race.take_before(before, now);
                        oldest.iter().for_each(|it| note_failure(&it.endpoint, now));
                    }
                }
                _ => {
                    let skipped = self.race.skip_next(now);
                    skipped.iter().for_each(|it| note_failure(it, now));
                }
            }
        }
    }

    /// Notes that the latest attempt has succeeded.
    fn win(&mut self, now: Instant) -> bool {
        if let Some(Endpoint::Tcp(address)) = self.race.dial.endpoint() {
            FailedAddresses::own().note_success(*address);
        }
        for slower in self.race.take_earlier() {
            note_failure(&slower.endpoint, now);
        }
        true
    }

    /// Returns when to go on at the latest.
    pub(crate) fn wait_until(&self) -> Instant {
        let deadline = self.race.dial.deadline();
        let next = self.race.next_attempt();
        next.map_or(deadline, |next| next.min(deadline))
    }

    /// Goes on with the handshake of the attempt that has succeeded. Returns whether it is done.
    ///
    /// # Errors
    /// Returns why the peer can't be connected to.
    pub(crate) fn shake_hands(&mut self) -> io::Result<bool> {
        match &mut self.latest {
            Some(stream) => self.race.dial.shake_hands(stream),
            None => Ok(true),
        }
    }

    /// Returns the streams of the attempts that are under way.
    pub(crate) fn streams(&self) -> impl Iterator<Item = &Stream> {
        self.race.earlier().chain(&self.latest)
    }

    /// Takes the stream that has succeeded.
    ///
    /// # Errors
    /// Returns `NotConnected` if there is none.
    pub(crate) fn take(&mut self) -> io::Result<Stream> {
        self.latest.take().ok_or(io::ErrorKind::NotConnected.into())
    }

    /// Notes that all attempts have failed. Returns what to do next.
    pub(crate) fn note_failure(&mut self, now: Instant, error: io::Error) -> Next {
        self.latest = None;
        self.race.dial.note_failure(now, error)
    }
}

fn note_failure(endpoint: &Endpoint, now: Instant) {
    if let Endpoint::Tcp(address) = endpoint {
        FailedAddresses::own().note_failure(*address, now);
    }
}
