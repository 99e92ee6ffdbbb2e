//! The budget of the process' descriptors. It counts, and opens nothing.
//!
//! Invariant 10: descriptors are budgeted for all that has one. A connection is accepted only if
//! there are descriptors for both its sockets. With one alone, a client is accepted and then reset;
//! on macOS a client that can't be given a descriptor is lost. So everything else that has a
//! descriptor is counted first: listeners, including those added later, pollers, pipes, and what
//! the program has besides the proxy.
//!
//! A listener waits while the budget is used up, and also if the system has no descriptor after
//! all: see `pause_listener` in `listeners/accepting.rs`.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Operation};

/// The descriptors kept in reserve: for standard streams, the log, names that are being resolved,
/// listeners that are being replaced, and what tells whether the processes of VMs live.
const SPARE: u64 = 64;

/// The descriptors for connections of guests, which can't be made to wait: hyperkit has 1,024
/// slots.
const FOR_GUESTS: u64 = 2 * 1024;

/// A poller, its waker, and the copy of its registry.
const PER_WORKER: u64 = 3;

/// What uses descriptors besides connections.
#[derive(Debug)]
pub(crate) struct Descriptors {
    workers: u64,
    others: u64,
    guests: AtomicBool,
    limit: fn() -> Option<u64>,
}

impl Descriptors {
    /// Makes the budget of a proxy with so many workers, in a program that needs `others` for other
    /// purposes. `limit` returns the process' limit whenever it is called.
    pub(crate) fn new(workers: usize, others: usize, limit: fn() -> Option<u64>) -> Descriptors {
        Descriptors {
            workers: workers as u64,
            others: others as u64,
            guests: AtomicBool::new(false),
            limit,
        }
    }

    /// Keeps some descriptors for guests, which can't be made to wait, from now on.
    pub(super) fn keep_some_for_guests(&self) {
        self.guests.store(true, Ordering::Release);
    }

    /// Returns how many connections there are descriptors for besides so many listeners.
    pub(crate) fn connection_room(&self, listeners: usize) -> usize {
        match (self.limit)() {
            Some(limit) => self.room_within(limit, listeners as u64),
            None => usize::MAX,
        }
    }

    /// Returns the error for so many listeners that they leave no descriptors for connections.
    pub(super) fn too_few(
        &self,
        operation: Operation,
        subject: impl std::fmt::Display,
        listeners: usize,
    ) -> Error {
        let limit = (self.limit)().unwrap_or(u64::MAX);
        let why = format!(
            "the process may have {limit} descriptors, and {listeners} listener{} none for a connection",
            if listeners == 1 { " leaves" } else { "s leave" }
        );
        Error::new(operation, subject, io::Error::other(why))
            .with_remedy("raise the limit with `ulimit -n`")
    }

    /// Returns how many pipes one worker may have. All workers get the same number.
    pub(super) fn pipes_of_a_worker(&self) -> usize {
        (pipes((self.limit)()) / self.workers.max(1)) as usize
    }

    fn room_within(&self, limit: u64, listeners: u64) -> usize {
        let taken = self.others + PER_WORKER * self.workers + listeners + 2 * pipes(Some(limit));
        let spare = reserve_of(limit);
        let left = limit.saturating_sub(taken + spare);
        let left = match self.guests.load(Ordering::Acquire) {
            true => left - FOR_GUESTS.min(left / 2),
            false => left,
        };
        usize::try_from(left / 2).unwrap_or(usize::MAX)
    }
}

/// Returns the reserve, which is smaller where the limit is low.
fn reserve_of(limit: u64) -> u64 {
    const LEAST: u64 = 16;
    (limit / 8).clamp(LEAST, SPARE)
}

/// Returns how many pipes all workers may have together, where bytes can pass through pipes. They
/// use at most an eighth of the descriptors, and none where the limit is low.
fn pipes(descriptors: Option<u64>) -> u64 {
    const MOST: u64 = 256;
    match cfg!(target_os = "linux") {
        true => match descriptors {
            Some(..512) => 0,
            Some(limit) => (limit / 16).min(MOST),
            None => MOST,
        },
        false => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_has_a_descriptor_is_counted_before_connections() {
        let alone = Descriptors::new(2, 0, || None);
        for limit in [256, 1024, 4096] {
            let pipes = 2 * pipes(Some(limit));
            let spare = reserve_of(limit);
            let room = alone.room_within(limit, 100) as u64;
            assert!(
                2 * room + 100 + pipes + 6 + spare <= limit,
                "{limit}: {room}"
            );
            assert!(
                room + 1 >= (limit - 100 - pipes - 6 - spare) / 2,
                "{limit}: {room}"
            );
            let beside = Descriptors::new(2, 40, || None);
            assert_eq!(beside.room_within(limit, 100) as u64, room - 20);
        }
        assert_eq!(alone.room_within(256, 400), 0);
        let guests = Descriptors::new(2, 0, || None);
        guests.keep_some_for_guests();
        assert!(guests.room_within(1024, 1) <= alone.room_within(1024, 1) / 2 + 1);
    }
}
