//! The clients: a limited number at a time, until all connections were made.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::app::serve::{LOOK, Stop, close_gracefully};
use crate::lock::{lock, recover};
use crate::stream::Stream;
use crate::thread::start_scoped_thread;

use super::data::Data;
use super::exchange::{Exchange, TransferResult};
use super::report::{Latencies, StressReport};
use super::{Load, StressPlan, StressProgress};

/// The least time between two dials of a hyperkit VM (rule 5 of a good neighbour).
const PACE: Duration = Duration::from_micros(150);

/// How many connections to a hyperkit VM may end without a byte from its guest. The device keeps
/// each of them, and the VM dies at 512; with [`MOST_PARALLEL`] under way this leaves room.
const MOST_SILENT: u64 = 64;

/// After so many failed dials in a row the server is taken for gone.
const MOST_FAILED_DIALS: u64 = 1000;

/// The most connections at a time to one hyperkit VM.
pub(crate) const MOST_PARALLEL: usize = 400;

/// How long a guest may take to end a failed connection.
const LEAVE: Duration = Duration::from_secs(5);

/// What the clients share.
struct Run<'a> {
    plan: &'a StressPlan,
    data: Data,
    stop: &'a Stop,
    next: AtomicU64,
    silent: AtomicU64,
    /// The number of dials in a row that failed.
    failed_dials: AtomicU64,
    /// The earliest time of the next dial of the VM.
    pace: Mutex<Instant>,
    report: Mutex<StressReport>,
    progress: &'a StressProgress,
}

/// Makes all connections, and reports on them.
pub(crate) fn run(plan: &StressPlan, stop: &Stop, progress: &StressProgress) -> StressReport {
    let begun = Instant::now();
    let run = Run {
        plan,
        data: Data::new(plan.seed),
        stop,
        next: AtomicU64::new(0),
        silent: AtomicU64::new(0),
        failed_dials: AtomicU64::new(0),
        pace: Mutex::new(begun),
        report: Mutex::new(StressReport::new(plan)),
        progress,
    };
    let lanes = (plan.parallel as u64).min(plan.connections);
    thread::scope(|scope| {
        for _ in 0..lanes {
            let lane = || run.run_lane();
            let lane = start_scoped_thread(scope, "hvsock-lane", "for connections", lane);
            if let Err(e) = lane {
                lock(&run.report).note(e.to_string());
                run.stop.request_end();
                break;
            }
        }
    });
    let mut report = recover(run.report.into_inner());
    report.took = begun.elapsed();
    report
}

impl Run<'_> {
    /// Makes connections one after the other.
    fn run_lane(&self) {
        let mut latencies = Latencies::default();
        while !self.stop.is_asked() {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.plan.connections {
                break;
            }
            let (done, outcome) = self.run_connection(number, &mut latencies);
            lock(&self.report).count(&done, outcome.is_ok());
            if let Err(why) = outcome {
                self.progress.failed.fetch_add(1, Ordering::Relaxed);
                lock(&self.report).fail(&why, &done);
                if self.plan.fail_fast {
                    self.stop.request_end();
                }
            }
            self.progress.ended.fetch_add(1, Ordering::Relaxed);
            self.pause();
        }
        lock(&self.report).latencies.merge(&latencies);
    }

    fn run_connection(
        &self,
        number: u64,
        latencies: &mut Latencies,
    ) -> (TransferResult, Result<(), String>) {
        let plan = self.plan;
        // Independent of the lane, so that the same seed gives the same sizes.
        let mut rng =
            fastrand::Rng::with_seed(plan.seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let start = rng.u64(..1 << 32);
        self.wait_for_leave();
        let dialled = Instant::now();
        let urgent = || self.stop.is_urgent();
        let stream = match Stream::connect_unless(&plan.address, plan.timeout, &urgent) {
            Ok(stream) => stream,
            Err(e) => {
                self.note_failed_dial();
                return (TransferResult::default(), Err(e.to_string()));
            }
        };
        self.failed_dials.store(0, Ordering::Relaxed);
        let mut exchange = Exchange {
            plan,
            stream: &stream,
            data: &self.data,
            stop: self.stop,
            progress: self.progress,
            rng,
            start,
            dialled,
            moved: dialled,
            done: TransferResult::default(),
        };
        let outcome = exchange.run(|trip| latencies.round_trip.record(trip));
        let done = exchange.done;
        if outcome.is_ok() {
            if let (Some(first), true) = (done.first_byte, plan.load == Load::Echo) {
                latencies.first_byte.record(first);
            }
            latencies.connection.record(dialled.elapsed());
        } else if plan.address.transport().needs_graceful_close {
            let ended =
                close_gracefully(&stream, LEAVE.min(plan.timeout), |_| !self.stop.is_urgent());
            if !ended && done.received == 0 {
                self.note_silence();
            }
        }
        if plan.verbose {
            let took = dialled.elapsed().as_secs_f64() * 1e3;
            let TransferResult { sent, received, .. } = done;
            let end = outcome.as_ref().err().map_or("ok", String::as_str);
            tracing::info!(
                "connection {number}: {sent} bytes sent, {received} received in {took:.1} ms: {end}"
            );
        }
        (done, outcome)
    }

    /// Waits until the hyperkit VM may be dialled again.
    fn wait_for_leave(&self) {
        if !self.plan.address.transport().vm.needs_pacing {
            return;
        }
        let mut next = lock(&self.pace);
        let at = (*next).max(Instant::now());
        *next = at + PACE;
        drop(next);
        thread::sleep(at.saturating_duration_since(Instant::now()));
    }

    fn note_failed_dial(&self) {
        let failed = self.failed_dials.fetch_add(1, Ordering::Relaxed) + 1;
        if failed >= MOST_FAILED_DIALS && !self.stop.is_asked() {
            let why = format!("given up: {MOST_FAILED_DIALS} dials in a row came to nothing");
            lock(&self.report).note(why);
            self.stop.request_end();
        }
    }

    fn note_silence(&self) {
        if self.silent.fetch_add(1, Ordering::Relaxed) + 1 >= MOST_SILENT && !self.stop.is_asked() {
            lock(&self.report).note(format!(
                "given up: {MOST_SILENT} connections got no sign of life from the guest, and too many of them would kill the VM"
            ));
            self.stop.request_end();
        }
    }

    fn pause(&self) {
        let end = crate::time::after(Instant::now(), self.plan.pause);
        while !self.stop.is_asked() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            thread::sleep(left.min(LOOK));
        }
    }
}
