//! The reports by which other threads reach a worker's loop.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use mio::Waker;

use crate::lock::lock;

/// A report of another thread to a loop whose events are `E`.
#[derive(Debug)]
pub(super) enum Report<E> {
    /// The addresses of the host of this name.
    Resolved(String, io::Result<Vec<SocketAddr>>),
    Event(E),
}

/// A queue of reports from other threads, which wakes the loop for each.
#[derive(Debug)]
pub(super) struct Notifier<E> {
    reports: Mutex<Vec<Report<E>>>,
    waker: Arc<Waker>,
}

impl<E> Notifier<E> {
    pub(super) fn new(waker: Waker) -> Notifier<E> {
        Notifier {
            reports: Mutex::default(),
            waker: Arc::new(waker),
        }
    }

    /// Returns the waker of the loop.
    pub(super) fn waker(&self) -> &Arc<Waker> {
        &self.waker
    }

    /// Reports something to the loop, and wakes it.
    pub(super) fn report(&self, report: Report<E>) {
        lock(&self.reports).push(report);
        // If the loop can't be woken, it is gone.
        let _ = self.waker.wake();
    }

    /// Reports an event to the loop, and wakes it.
    pub(super) fn notify(&self, event: E) {
        self.report(Report::Event(event));
    }

    /// Returns whether there are reports.
    pub(super) fn has_reports(&self) -> bool {
        !lock(&self.reports).is_empty()
    }

    /// Takes the reports.
    pub(super) fn take_reports(&self) -> Vec<Report<E>> {
        std::mem::take(&mut *lock(&self.reports))
    }
}
