//! The race between the addresses of a name, as RFC 8305 has it: while one has not answered, the
//! next is tried as well, and the first that answers is taken.
//!
//! It keeps the attempts in their order, and says when which is due. It makes no socket and waits
//! for none.

use std::io;
use std::time::Instant;

use super::Dial;
use crate::stream::endpoint::Endpoint;

/// How many addresses are tried at a time: each has a descriptor. Where there are more, the oldest
/// attempt is given up for the next one after its share of the time.
pub(crate) const MOST_ATTEMPTS: usize = 4;

/// An attempt that goes on while a later one is made.
#[derive(Debug)]
pub(crate) struct Attempt<S> {
    pub(crate) socket: S,
    pub(crate) endpoint: Endpoint,
}

/// A dial, and its attempts except for the latest, whose socket the owner of the race has.
#[derive(Debug)]
pub(crate) struct Race<S> {
    pub(crate) dial: Dial,
    /// The earlier attempts, the oldest first.
    earlier: Vec<Attempt<S>>,
}

/// The result of a look at the earlier attempts.
#[derive(Debug)]
pub(crate) struct Look<S> {
    /// The socket that is connected, if one is, and those of the attempts that were made after it.
    /// The dial's endpoint is then that of the first one.
    pub(crate) winner: Option<(S, Vec<S>)>,
    /// The attempts that have failed.
    pub(crate) failed: Vec<Attempt<S>>,
}

impl<S> Race<S> {
    /// Makes the race of a dial whose first attempt was begun.
    pub(crate) fn new(dial: Dial) -> Race<S> {
        let earlier = Vec::new();
        Race { dial, earlier }
    }

    /// Takes the attempt before, now that one at the next endpoint was begun beside it. Returns the
    /// oldest attempt if there is one too many.
    pub(crate) fn take_before(&mut self, before: S, now: Instant) -> Option<Attempt<S>> {
        if let Some(endpoint) = self.dial.turn_to_next() {
            self.earlier.push(Attempt {
                socket: before,
                endpoint,
            });
        }
        self.dial.begin_attempt(now);
        (self.earlier.len() >= MOST_ATTEMPTS).then(|| self.earlier.remove(0))
    }

    /// Drops the next endpoint, at which no attempt can be begun, and returns it.
    pub(crate) fn skip_next(&mut self, now: Instant) -> Option<Endpoint> {
        let skipped = self.dial.skip_next();
        self.dial.hasten_next(now);
        skipped
    }

    /// Finds the earlier attempts that have an answer.
    pub(crate) fn look_at_earlier(
        &mut self,
        now: Instant,
        is_connected: impl Fn(&S) -> io::Result<bool>,
    ) -> Look<S> {
        let mut look = Look {
            winner: None,
            failed: Vec::new(),
        };
        let mut index = 0;
        while let Some(attempt) = self.earlier.get(index) {
            match is_connected(&attempt.socket) {
                Ok(false) => index += 1,
                Ok(true) => {
                    let mut later = self.earlier.split_off(index).into_iter();
                    if let Some(winner) = later.next() {
                        self.dial.return_to(winner.endpoint);
                        let later = later.map(|it| it.socket).collect();
                        look.winner = Some((winner.socket, later));
                    }
                    break;
                }
                Err(_) => look.failed.push(self.earlier.remove(index)),
            }
        }
        if !look.failed.is_empty() {
            self.dial.hasten_next(now);
        }
        look
    }

    /// Turns to the latest of the earlier attempts, since the latest of all has failed. Returns its
    /// socket, and the endpoint that has failed; `None` if there is none.
    pub(crate) fn return_to_earlier(&mut self, now: Instant) -> Option<(S, Option<Endpoint>)> {
        let attempt = self.earlier.pop()?;
        let failed = self.dial.return_to(attempt.endpoint);
        self.dial.hasten_next(now);
        Some((attempt.socket, failed))
    }

    /// Returns when an attempt at the next endpoint is due, if there is one.
    pub(crate) fn next_attempt(&self) -> Option<Instant> {
        let under_way = self.earlier.len() + 1;
        self.dial.next_attempt(under_way < MOST_ATTEMPTS)
    }

    /// Returns the sockets of the earlier attempts.
    pub(crate) fn earlier(&self) -> impl Iterator<Item = &S> {
        self.earlier.iter().map(|it| &it.socket)
    }

    /// Ends the earlier attempts.
    pub(crate) fn take_earlier(&mut self) -> impl Iterator<Item = Attempt<S>> + '_ {
        self.earlier.drain(..)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Duration;

    use super::*;

    fn race(addresses: u8, now: Instant) -> Race<u8> {
        let mut dial = Dial::new(now + Duration::from_secs(30));
        let endpoint = |n: u8| Endpoint::Tcp(SocketAddr::from(([127, 0, 0, n], 1)));
        dial.add((0..addresses).map(endpoint));
        dial.begin_attempt(now);
        Race::new(dial)
    }

    fn ip(endpoint: Option<&Endpoint>) -> Option<u8> {
        match endpoint? {
            Endpoint::Tcp(SocketAddr::V4(it)) => Some(it.ip().octets()[3]),
            _ => None,
        }
    }

    #[test]
    fn the_next_is_tried_after_a_while_or_when_one_has_failed() {
        let start = Instant::now();
        let mut race = race(3, start);
        let due = race.next_attempt().unwrap();
        assert_eq!(due - start, Duration::from_millis(250));
        assert!(race.take_before(0, due).is_none());
        assert_eq!(ip(race.dial.endpoint()), Some(1));
        assert_eq!(
            race.next_attempt().unwrap() - due,
            Duration::from_millis(250)
        );
        let look = race.look_at_earlier(due, |_| Err(io::ErrorKind::ConnectionRefused.into()));
        assert_eq!(look.failed.len(), 1);
        assert!(look.winner.is_none());
        assert_eq!(race.next_attempt(), Some(due));
        assert!(race.return_to_earlier(due).is_none());
    }

    #[test]
    fn whoever_answers_first_wins_and_those_after_it_end() {
        let start = Instant::now();
        let mut race = race(9, start);
        for n in 0..3 {
            assert!(race.take_before(n, start).is_none());
        }
        let oldest = race.take_before(3, start).unwrap();
        assert_eq!((oldest.socket, ip(Some(&oldest.endpoint))), (0, Some(0)));
        assert_eq!(race.earlier().copied().collect::<Vec<_>>(), [1, 2, 3]);
        // There is room for no more until one has had its share of the time.
        assert!(race.next_attempt().unwrap() - start > Duration::from_secs(1));
        let (winner, later) = race.look_at_earlier(start, |n| Ok(*n == 2)).winner.unwrap();
        assert_eq!((winner, &later[..]), (2, &[3][..]));
        assert_eq!(ip(race.dial.endpoint()), Some(2));
        assert!(race.dial.has_raced());
        assert_eq!(
            race.take_earlier().map(|it| it.socket).collect::<Vec<_>>(),
            [1]
        );
    }

    #[test]
    fn when_the_latest_fails_the_one_before_goes_on() {
        let start = Instant::now();
        let mut race = race(2, start);
        assert!(race.take_before(0, start).is_none());
        let (socket, failed) = race.return_to_earlier(start).unwrap();
        assert_eq!((socket, ip(failed.as_ref())), (0, Some(1)));
        assert_eq!(ip(race.dial.endpoint()), Some(0));
        assert_eq!(race.next_attempt(), None);
    }
}
