//! The attempts of a dial at real sockets, for callers that wait for them without the proxy's loop:
//! one that blocks, and one in a runtime.

use std::io;
use std::time::Instant;

use super::{Addresses, Dial, Race};
use crate::stream::endpoint::Endpoint;
use crate::stream::nonblocking::Stream;

/// The attempts that are under way.
#[derive(Debug)]
pub(crate) struct Attempts {
    latest: Stream,
    race: Race<Stream>,
}

impl Attempts {
    /// Makes those of a dial whose first one was begun with this socket.
    pub(super) fn new(dial: Dial, first: Stream) -> Attempts {
        let race = Race::new(dial);
        Attempts {
            latest: first,
            race,
        }
    }

    /// Looks at all of them, and begins the next one if it is due. Returns whether one has succeeded;
    /// if none has, this is to be called again as soon as one is writable, or
    /// [then](Attempts::wait_until).
    ///
    /// # Errors
    /// The error of the last one, if none is under way any more; `TimedOut`.
    pub(crate) fn go_on(&mut self, now: Instant) -> io::Result<bool> {
        loop {
            let look = self.race.look_at_earlier(now, Stream::connected);
            for attempt in look.failed {
                note_failure(&attempt.endpoint, now);
            }
            if let Some((winner, _later)) = look.winner {
                self.latest = winner;
                return Ok(self.win(now));
            }
            match self.latest.connected() {
                Ok(true) => return Ok(self.win(now)),
                Ok(false) if now >= self.race.dial.deadline() => {
                    let why = "it hasn't answered in time";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                }
                Ok(false) => {}
                Err(e) => match self.race.return_to_earlier(now) {
                    Some((socket, failed)) => {
                        self.latest = socket;
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
            match self.race.dial.next_endpoint().map(Stream::connect) {
                Some(Ok(socket)) => {
                    let before = std::mem::replace(&mut self.latest, socket);
                    let oldest = self.race.take_before(before, now);
                    oldest.iter().for_each(|it| note_failure(&it.endpoint, now));
                }
                _ => {
                    let skipped = self.race.skip_next(now);
                    skipped.iter().for_each(|it| note_failure(it, now));
                }
            }
        }
    }

    /// Notes that the latest has succeeded.
    fn win(&mut self, now: Instant) -> bool {
        if let Some(Endpoint::Tcp(address)) = self.race.dial.endpoint() {
            Addresses::own().note_success(*address);
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

    /// Returns those that are under way.
    pub(crate) fn streams(&self) -> impl Iterator<Item = &Stream> {
        self.race.earlier().chain([&self.latest])
    }

    /// Returns the dial, and the latest attempt, which is the one that has succeeded if one has.
    pub(crate) fn into_parts(self) -> (Dial, Stream) {
        (self.race.dial, self.latest)
    }
}

fn note_failure(endpoint: &Endpoint, now: Instant) {
    if let Endpoint::Tcp(address) = endpoint {
        Addresses::own().note_failure(*address, now);
    }
}

impl Dial {
    /// Begins to connect to its endpoint. Returns its attempts.
    ///
    /// # Errors
    /// The dial, and why that can't be; `NotFound` if it has no endpoint.
    pub(crate) fn begin(mut self) -> Result<(Attempts, super::Begun), (Dial, io::Error)> {
        let Some(endpoint) = self.endpoint() else {
            let why = "the name has no address";
            return Err((self, io::Error::new(io::ErrorKind::NotFound, why)));
        };
        match Stream::connect(endpoint) {
            Ok(stream) => {
                let begun = self.begun(Instant::now());
                Ok((Attempts::new(self, stream), begun))
            }
            Err(e) => Err((self, e)),
        }
    }
}
