//! The results of a run: counts, rates, latencies, reasons of failures.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;
use indicatif::BinaryBytes;

use super::exchange::TransferResult;
use super::{Load, StressPlan};
use crate::app::escape;
use crate::error::counted;

/// The results of a run.
#[derive(Debug)]
pub(crate) struct StressReport {
    load: Load,
    seed: u64,
    wanted: u64,
    pub(super) took: Duration,
    whole: u64,
    failed: u64,
    sent: u64,
    received: u64,
    reasons: Reasons,
    notes: Vec<String>,
    pub(super) latencies: Latencies,
}

impl StressReport {
    pub(super) fn new(plan: &StressPlan) -> StressReport {
        StressReport {
            load: plan.load,
            seed: plan.seed,
            wanted: plan.connections,
            took: Duration::ZERO,
            whole: 0,
            failed: 0,
            sent: 0,
            received: 0,
            reasons: Reasons::default(),
            notes: Vec::new(),
            latencies: Latencies::default(),
        }
    }

    /// Counts an ended connection.
    pub(super) fn count(&mut self, done: &TransferResult, whole: bool) {
        self.sent += done.sent;
        self.received += done.received;
        match whole {
            true => self.whole += 1,
            false => self.failed += 1,
        }
    }

    /// Counts a failed connection by its reason.
    pub(super) fn fail(&mut self, why: &str, done: &TransferResult) {
        self.reasons.add(&escape::line(why), done);
    }

    /// Adds a problem with more than one connection.
    pub(super) fn note(&mut self, what: String) {
        self.notes.push(escape::line(&what).into_owned());
    }

    /// Returns whether all connections were made, and none failed.
    pub(crate) fn is_whole(&self) -> bool {
        self.whole == self.wanted && self.notes.is_empty()
    }

    /// Returns a line that says what is wrong, if anything is.
    pub(crate) fn verdict(&self) -> Option<String> {
        let missing = self.wanted - self.whole - self.failed;
        match (self.failed, missing) {
            _ if self.is_whole() => None,
            (0, 1) => Some("1 connection was not made".to_owned()),
            (0, missing) => Some(format!("{} were not made", counted(missing, "connection"))),
            (failed, missing) => {
                let wanted = counted(self.wanted, "connection");
                let missing = match missing {
                    0 => String::new(),
                    1 => ", 1 was not made".to_owned(),
                    more => format!(", {more} were not made"),
                };
                Some(format!("{failed} of {wanted} failed{missing}"))
            }
        }
    }
}

impl fmt::Display for StressReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.took.as_secs_f64().max(1e-9);
        let ended = self.whole + self.failed;
        writeln!(
            f,
            "connections  {} whole, {} failed, in {seconds:.2} s: {:.0} a second",
            self.whole,
            self.failed,
            ended as f64 / seconds
        )?;
        for (name, bytes) in [("sent", self.sent), ("received", self.received)] {
            let rate = bytes as f64 / seconds / f64::from(1 << 20);
            let amount = BinaryBytes(bytes);
            writeln!(f, "{name:<12} {bytes} bytes ({amount}): {rate:.1} MiB/s")?;
        }
        if let Load::RoundTrips(_) = self.load {
            let trips = self.latencies.round_trip.0.len();
            let rate = trips as f64 / seconds;
            writeln!(f, "round trips  {trips}: {rate:.0} a second")?;
        }
        self.latencies.fmt(f)?;
        self.reasons.fmt(f)?;
        for note in &self.notes {
            writeln!(f, "note         {note}")?;
        }
        write!(f, "seed         {}", self.seed)
    }
}

/// The latencies of a run.
#[derive(Debug, Default)]
pub(super) struct Latencies {
    /// From a dial to the first received byte.
    pub(super) first_byte: Times,
    pub(super) round_trip: Times,
    /// From a dial to the server's EOF.
    pub(super) connection: Times,
}

impl Latencies {
    pub(super) fn merge(&mut self, other: &Latencies) {
        self.first_byte.merge(&other.first_byte);
        self.round_trip.merge(&other.round_trip);
        self.connection.merge(&other.connection);
    }
}

impl fmt::Display for Latencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = [
            ("first byte", &self.first_byte),
            ("round trip", &self.round_trip),
            ("connection", &self.connection),
        ];
        if rows.iter().all(|(_, times)| times.0.is_empty()) {
            return Ok(());
        }
        let columns = ["p50", "p90", "p99", "p99.9", "max"];
        write!(f, "{:<12}", "latency")?;
        for column in columns {
            write!(f, " {column:>9}")?;
        }
        writeln!(f, "  ms")?;
        for (name, times) in rows.iter().filter(|(_, times)| !times.0.is_empty()) {
            write!(f, "{name:<12}")?;
            for quantile in [0.5, 0.9, 0.99, 0.999, 1.0] {
                let ms = times.0.value_at_quantile(quantile) as f64 / 1e6;
                write!(f, " {ms:>9.3}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

/// A histogram of durations, in nanoseconds with three significant digits.
#[derive(Debug)]
pub(super) struct Times(Histogram<u64>);

/// The longest duration in nanoseconds; longer ones are counted as this.
const LONGEST: u64 = 3_600_000_000_000;

impl Default for Times {
    #[allow(clippy::expect_used)]
    fn default() -> Times {
        Times(Histogram::new_with_max(LONGEST, 3).expect("the bounds are right"))
    }
}

impl Times {
    pub(super) fn record(&mut self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(LONGEST);
        self.0.saturating_record(nanoseconds);
    }

    fn merge(&mut self, other: &Times) {
        // It fails only if the histograms' bounds differ, which they never do.
        let _ = self.0.add(&other.0);
    }
}

/// The reasons of failures, and how often each occurred.
#[derive(Debug, Default)]
struct Reasons(BTreeMap<String, Reason>);

#[derive(Debug)]
struct Reason {
    count: u64,
    /// The transfer of the first connection that failed so.
    first: TransferResult,
}

/// The most reasons that are listed separately.
const MOST_REASONS: usize = 20;

impl Reasons {
    fn add(&mut self, why: &str, done: &TransferResult) {
        let known = self.0.contains_key(why) || self.0.len() < MOST_REASONS;
        let why = if known { why } else { "other reasons" };
        let reason = self.0.entry(why.to_owned()).or_insert(Reason {
            count: 0,
            first: *done,
        });
        reason.count += 1;
    }
}

impl fmt::Display for Reasons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (why, Reason { count, first }) in &self.0 {
            let TransferResult { sent, received, .. } = first;
            let at = match (sent, received, count) {
                (0, 0, _) => String::new(),
                (_, _, 1) => format!(" ({sent} bytes sent, {received} received)"),
                _ => format!(" (the first one: {sent} bytes sent, {received} received)"),
            };
            writeln!(f, "failed       {count} x {why}{at}")?;
        }
        Ok(())
    }
}
