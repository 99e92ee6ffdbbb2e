//! The graceful end of connections whose proxy is gone: each is half-closed, read to its EOF, and
//! closed. A close before that can kill the VM.

use std::io::Read;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How much is read at once.
const BUFFER: usize = 64 * 1024;

/// How often one connection is read in a turn, so that the others have theirs.
const READS: usize = 4;

/// A guest that goes on sending for longer than this is read slowly from then on.
const PATIENCE: Duration = Duration::from_secs(10);

/// How much of it is read in a turn.
const SLOWLY: usize = 8 * 1024;

/// The pause between turns in which only such guests have sent something.
pub(super) const PAUSE: Duration = Duration::from_millis(20);

/// A connection that is ended.
#[derive(Debug)]
pub(super) struct Ending {
    stream: UnixStream,
    since: Instant,
    /// Whether it has something to be read, as far as is known.
    pub(super) ready: bool,
}

/// What a turn has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// It is to be closed now.
    Ended,
    Open,
    /// It goes on sending, and there is no hurry to read it.
    Endless,
}

impl Ending {
    /// Half-closes a connection.
    pub(super) fn begin(connection: OwnedFd, now: Instant) -> Ending {
        let stream = UnixStream::from(connection);
        // An accepted one is not yet; and it fails for none that can be read.
        let _ = stream.set_nonblocking(true);
        let _ = stream.shutdown(Shutdown::Write);
        Ending {
            stream,
            since: now,
            ready: true,
        }
    }

    /// Reads and discards some of what has come.
    pub(super) fn take_turn(&mut self, buffer: &mut Vec<u8>, now: Instant) -> Turn {
        buffer.resize(BUFFER, 0);
        let is_endless = now.saturating_duration_since(self.since) > PATIENCE;
        self.ready = false;
        let (reads, most) = match is_endless {
            true => (1, SLOWLY),
            false => (READS, BUFFER),
        };
        for _ in 0..reads {
            match self.stream.read(&mut buffer[..most]) {
                Ok(0) => return Turn::Ended,
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Turn::Open,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                // Nothing more can come of it.
                Err(_) => return Turn::Ended,
            }
        }
        match is_endless {
            true => Turn::Endless,
            false => Turn::Open,
        }
    }

    /// Closes it now, with as little harm as is possible: the VM's next write fails, and nothing
    /// that it has written is unread.
    pub(super) fn break_off(mut self, buffer: &mut Vec<u8>) {
        /// Many times what a socket can hold.
        const TURNS: usize = 64;
        let _ = self.stream.shutdown(Shutdown::Read);
        for _ in 0..TURNS {
            self.since = Instant::now();
            if self.take_turn(buffer, self.since) == Turn::Ended {
                break;
            }
        }
    }
}

impl AsFd for Ending {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
