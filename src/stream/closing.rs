//! How an end of a connection is closed gracefully, and how long a reset waits: the decisions, for
//! every kind of socket. No call is made here. Results and the time come in, and what is to be done
//! next comes out.

use std::io;
use std::time::{Duration, Instant};

/// How much is read at the most of what is unread when a peer is given up. It is more than a socket
/// can hold.
const MOST_UNREAD: usize = 64 * 1024 * 1024;

/// The pause before the second check whether a peer that is to be reset has received what was sent
/// before. It doubles with each check, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(128);

/// A graceful close: the half-close is sent, and input is read and discarded to its EOF. If that
/// does not come in time, the input is shut down, and what is unread is read out: a VMM can die of
/// a close with bytes unread.
#[derive(Debug)]
pub(crate) struct GracefulClose {
    state: ClosingState,
    /// The time at which the peer is given up.
    until: Instant,
}

#[derive(Debug)]
enum ClosingState {
    /// The half-close was not sent yet.
    Open,
    Draining,
    /// What is unread is read out: so many more bytes at the most.
    Emptying {
        left: usize,
    },
}

/// What a graceful close needs next.
#[derive(Debug)]
pub(crate) enum CloseStep {
    /// Half-close, within that time. An error says nothing: that of a broken connection comes from
    /// a read as well.
    ShutdownWrite { until: Instant },
    /// Read and discard, and hand in the result; wait for it until then at the most.
    Read { until: Instant },
    /// Shut the input down, so that nothing more comes.
    ShutdownRead,
    /// Read and discard without waiting, and hand in the result.
    ReadUnread,
}

/// How a graceful close has ended. The socket is to be closed now.
#[derive(Debug)]
pub(crate) enum CloseOutcome {
    /// The peer has ended the connection, too.
    PeerEnded,
    /// A read failed: there is no connection any more.
    Broken(io::Error),
    /// The peer has not ended it in time.
    GivenUp,
}

impl CloseOutcome {
    /// Converts it to the result of the public streams.
    pub(crate) fn into_result(self) -> io::Result<()> {
        match self {
            CloseOutcome::PeerEnded => Ok(()),
            CloseOutcome::Broken(error) => Err(error),
            CloseOutcome::GivenUp => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl GracefulClose {
    /// Begins the close; the peer is given up at `until`.
    pub(crate) fn new(until: Instant) -> GracefulClose {
        GracefulClose {
            state: ClosingState::Open,
            until,
        }
    }

    /// Returns what is to be done at `now`.
    pub(crate) fn next(&mut self, now: Instant) -> CloseStep {
        let until = self.until;
        match self.state {
            ClosingState::Open => {
                self.state = ClosingState::Draining;
                CloseStep::ShutdownWrite { until }
            }
            ClosingState::Draining if now < until => CloseStep::Read { until },
            ClosingState::Draining => {
                self.state = ClosingState::Emptying { left: MOST_UNREAD };
                CloseStep::ShutdownRead
            }
            ClosingState::Emptying { .. } => CloseStep::ReadUnread,
        }
    }

    /// Takes the result of a read that was asked for: 0 is the peer's EOF, `WouldBlock` says that
    /// nothing has come. Returns the outcome once the socket is to be closed.
    pub(crate) fn take_read(&mut self, read: io::Result<usize>) -> Option<CloseOutcome> {
        match (&mut self.state, read) {
            (_, Err(e)) if e.kind() == io::ErrorKind::Interrupted => None,
            (ClosingState::Emptying { left }, Ok(count @ 1..)) if count < *left => {
                *left -= count;
                None
            }
            (ClosingState::Emptying { .. }, _) => Some(CloseOutcome::GivenUp),
            (_, Ok(0)) => Some(CloseOutcome::PeerEnded),
            (_, Ok(_)) => None,
            (_, Err(e)) if e.kind() == io::ErrorKind::WouldBlock => None,
            (_, Err(e)) => Some(CloseOutcome::Broken(e)),
        }
    }

    /// Sets when the peer is given up: a time that has passed gives it up at the next step.
    #[cfg(any(test, feature = "cli"))]
    pub(crate) fn set_until(&mut self, until: Instant) {
        self.until = until;
    }
}

/// The wait before a reset. A reset overtakes data, so it waits until the peer has received what
/// was sent before.
#[derive(Debug)]
pub(crate) struct ResetWait {
    pause: Duration,
    /// The time of the reset, whatever has been received.
    until: Instant,
}

impl ResetWait {
    /// Begins the wait; the peer is reset at `until` at the latest.
    pub(crate) fn new(until: Instant) -> ResetWait {
        ResetWait {
            pause: FIRST_PAUSE,
            until,
        }
    }

    /// Takes how many sent bytes the peer has not acknowledged at `now`. Returns when to check
    /// again, or `None` to reset now.
    pub(crate) fn check(&mut self, unacknowledged: usize, now: Instant) -> Option<Instant> {
        if unacknowledged == 0 || now >= self.until {
            return None;
        }
        let again = now + self.pause;
        self.pause = (2 * self.pause).min(LONGEST_PAUSE);
        Some(again.min(self.until))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn failure(kind: io::ErrorKind) -> io::Result<usize> {
        Err(kind.into())
    }

    /// Begins to close within a second, with the half-close sent.
    fn begin(now: Instant) -> GracefulClose {
        let mut close = GracefulClose::new(now + SECOND);
        assert!(
            matches!(close.next(now), CloseStep::ShutdownWrite { until } if until == now + SECOND)
        );
        close
    }

    #[test]
    fn input_is_read_to_its_eof() {
        let now = Instant::now();
        let mut close = begin(now);
        let would_block = failure(io::ErrorKind::WouldBlock);
        let interrupted = failure(io::ErrorKind::Interrupted);
        for read in [Ok(5), would_block, interrupted, Ok(1)] {
            assert!(matches!(close.next(now), CloseStep::Read { until } if until == now + SECOND));
            assert!(close.take_read(read).is_none());
        }
        assert!(matches!(
            close.take_read(Ok(0)),
            Some(CloseOutcome::PeerEnded)
        ));
    }

    #[test]
    fn a_broken_connection_is_closed_at_once() {
        let now = Instant::now();
        for kind in [io::ErrorKind::ConnectionReset, io::ErrorKind::TimedOut] {
            let outcome = begin(now).take_read(failure(kind));
            assert!(matches!(outcome, Some(CloseOutcome::Broken(e)) if e.kind() == kind));
        }
    }

    #[test]
    fn what_is_unread_of_a_peer_that_is_given_up_is_read_out() {
        let now = Instant::now();
        let broken = failure(io::ErrorKind::ConnectionReset);
        for last in [failure(io::ErrorKind::WouldBlock), Ok(0), broken] {
            let mut close = begin(now);
            assert!(close.take_read(Ok(7)).is_none());
            let late = now + SECOND;
            assert!(matches!(close.next(late), CloseStep::ShutdownRead));
            for _ in 0..3 {
                assert!(matches!(close.next(late), CloseStep::ReadUnread));
                assert!(close.take_read(Ok(4096)).is_none());
            }
            assert!(matches!(close.take_read(last), Some(CloseOutcome::GivenUp)));
        }
    }

    #[test]
    fn a_peer_that_never_ceases_to_send_is_read_out_within_a_bound() {
        let now = Instant::now();
        let mut close = begin(now);
        close.set_until(now);
        assert!(matches!(close.next(now), CloseStep::ShutdownRead));
        let mut count = 0;
        let outcome = loop {
            assert!(matches!(close.next(now), CloseStep::ReadUnread));
            count += 64 * 1024;
            if let Some(outcome) = close.take_read(Ok(64 * 1024)) {
                break outcome;
            }
            assert!(count < MOST_UNREAD);
        };
        assert!(matches!(outcome, CloseOutcome::GivenUp));
    }

    #[test]
    fn a_peer_that_is_given_up_at_once_is_half_closed_and_read_out_all_the_same() {
        let now = Instant::now();
        let mut close = GracefulClose::new(now);
        assert!(matches!(close.next(now), CloseStep::ShutdownWrite { .. }));
        assert!(matches!(close.next(now), CloseStep::ShutdownRead));
        assert!(matches!(close.next(now), CloseStep::ReadUnread));
    }

    #[test]
    fn a_reset_waits_for_what_was_sent_before_and_not_for_ever() {
        let now = Instant::now();
        let mut wait = ResetWait::new(now + SECOND);
        let mut at = now;
        let mut checks = 0;
        while let Some(again) = wait.check(1, at) {
            assert!(again > at && again <= at + LONGEST_PAUSE);
            at = again;
            checks += 1;
        }
        assert_eq!(at, now + SECOND);
        assert!((8..20).contains(&checks), "{checks}");
        assert_eq!(ResetWait::new(now + SECOND).check(0, now), None);
    }
}
