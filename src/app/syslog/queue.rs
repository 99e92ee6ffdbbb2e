//! A bounded queue of messages.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use tracing::warn;

use crate::lock::lock;

/// The most bytes that are kept; beyond that the oldest messages are dropped. Programs never wait.
pub(super) const MOST_KEPT: usize = 4 * 1024 * 1024;

/// A message as it is sent.
pub(super) type SyslogFrame = Vec<u8>;

/// A queue of frames, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Queue {
    frames: VecDeque<SyslogFrame>,
    bytes: usize,
    /// The number of dropped frames.
    lost: u64,
}

impl Queue {
    pub(super) fn push(&mut self, message: &[u8]) {
        let mut frame = format!("{} ", message.len()).into_bytes();
        frame.extend_from_slice(message);
        self.bytes += frame.len();
        self.frames.push_back(frame);
        self.trim();
    }

    pub(super) fn pop(&mut self) -> Option<SyslogFrame> {
        let frame = self.frames.pop_front()?;
        self.bytes -= frame.len();
        Some(frame)
    }

    /// Puts frames in front of all others, in their order.
    pub(super) fn put_back(
        &mut self,
        frames: impl IntoIterator<Item = SyslogFrame, IntoIter: DoubleEndedIterator>,
    ) {
        for frame in frames.into_iter().rev() {
            self.bytes += frame.len();
            self.frames.push_front(frame);
        }
        self.trim();
    }

    fn trim(&mut self) {
        while self.bytes > MOST_KEPT && self.pop().is_some() {
            if self.lost == 0 {
                let most = MOST_KEPT >> 20;
                warn!("more messages than the {most} MiB that are kept: letting go of the oldest");
            }
            self.lost += 1;
        }
    }

    pub(super) fn len(&self) -> u64 {
        self.frames.len() as u64
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost
    }
}

/// A queue that two threads share.
#[derive(Debug, Default)]
pub(super) struct SyncQueue {
    queue: Mutex<Queue>,
    came: Condvar,
}

impl SyncQueue {
    pub(super) fn lock(&self) -> MutexGuard<'_, Queue> {
        lock(&self.queue)
    }

    pub(super) fn push(&self, message: &[u8]) {
        self.lock().push(message);
        self.came.notify_one();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lock().frames.is_empty()
    }

    /// Waits at most `timeout` for messages.
    pub(super) fn wait(&self, timeout: Duration) {
        let none = |queue: &mut Queue| queue.frames.is_empty();
        drop(self.came.wait_timeout_while(self.lock(), timeout, none));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_are_let_go_of_and_counted() {
        let mut queue = Queue::default();
        for n in 0..5 {
            queue.push(&vec![n; MOST_KEPT / 4]);
        }
        assert_eq!((queue.len(), queue.lost()), (3, 2));
        let frame = queue.pop().unwrap_or_default();
        assert!(frame.starts_with(b"1048576 ") && frame.ends_with(&[2]));
        let before = queue.bytes;
        queue.put_back([frame.clone()]);
        assert_eq!(queue.bytes, before + 1_048_576 + 8);
        // Frames that are put back are older than the others.
        queue.put_back([vec![0; 8], frame]);
        assert_eq!((queue.len(), queue.lost()), (3, 4));
        assert_eq!(queue.pop().map(|frame| frame.ends_with(&[2])), Some(true));
    }
}
