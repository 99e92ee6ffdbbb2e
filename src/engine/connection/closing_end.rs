//! An end of a connection that must not be closed at once, and how it is closed.

use std::time::Instant;

use crate::dial::Dial;
use crate::engine::relay::End;
use crate::stream::closing::ResetWait;
use crate::stream::draining::Drain;
use crate::stream::socket::Socket;

/// An end that must not be closed at once.
#[derive(Debug)]
pub(crate) struct Closing<S> {
    pub(crate) end: End<S>,
    pub(super) how: How,
}

#[derive(Debug)]
pub(super) enum How {
    /// It is read to its EOF, then closed.
    Drain(Drain),
    /// It is half-closed once its VMM has answered the dial, then drained.
    ShakeHands(Box<Dial>),
    /// It is reset, once the peer has received what was sent before.
    Reset(ResetWait),
}

impl<S: Socket> Closing<S> {
    /// Makes an end that is read to its EOF.
    pub(super) fn drain(end: End<S>) -> Closing<S> {
        Closing {
            how: How::Drain(Drain::new(end.received())),
            end,
        }
    }

    /// Makes the end of a dial that was given up: it is half-closed, and read to its EOF. What is
    /// sent before a VMM's answer may be lost, so a half-close waits for that.
    pub(super) fn dialled(mut end: End<S>, dial: Dial) -> Closing<S> {
        if dial.is_shaking_hands() {
            let how = How::ShakeHands(Box::new(dial));
            return Closing { end, how };
        }
        end.shutdown_write();
        Closing::drain(end)
    }

    /// Makes an end that is reset once the peer has what was sent before.
    pub(super) fn reset(end: End<S>, until: Instant) -> Closing<S> {
        Closing {
            how: How::Reset(ResetWait::new(until)),
            end,
        }
    }
}
