//! The retries for a client that is held while its target is absent.

use std::time::{Duration, Instant};

use crate::engine::end_reason::RefusalReason;
use crate::error::Error;

/// The pause before the target of a held client is dialled again. It doubles with each dial, up to
/// [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The retries for a client that is held while its target is absent.
#[derive(Debug)]
pub(crate) struct Retries {
    /// The pause after the next dial.
    pause: Duration,
    /// The time of the next dial, if none is in progress.
    pub(crate) redial: Option<Instant>,
    /// The error of the last dial.
    last: Option<(Error, RefusalReason)>,
}

impl Retries {
    pub(super) fn new() -> Retries {
        Retries {
            pause: FIRST_PAUSE,
            redial: None,
            last: None,
        }
    }

    /// Takes the error of a dial, and returns the time of the next one: after a pause, and at
    /// `deadline` at the latest.
    pub(super) fn take_failure(
        &mut self,
        error: Error,
        reason: RefusalReason,
        deadline: Instant,
        now: Instant,
    ) -> Instant {
        let redial = (now + self.pause).min(deadline);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        self.redial = Some(redial);
        self.last = Some((error, reason));
        redial
    }

    /// Notes that the next dial has begun.
    pub(super) fn note_dial(&mut self) {
        self.redial = None;
    }

    /// Takes the error of the last dial, for which the client is refused.
    pub(super) fn take_last(&mut self) -> Option<(Error, RefusalReason)> {
        self.last.take()
    }
}
