//! The choice of the carrier for flows of one kind, by what a byte costs through each on this
//! machine.

use std::time::Duration;

/// What carries bytes from one socket to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Through {
    /// A buffer, into which they are copied and out of it.
    Memory,
    /// A pipe.
    Pipe,
}

impl Through {
    pub(crate) const ALL: [Through; 2] = [Through::Memory, Through::Pipe];

    fn other(self) -> Through {
        match self {
            Through::Memory => Through::Pipe,
            Through::Pipe => Through::Memory,
        }
    }
}

/// How many buffers of bytes a sample is. A process that is interrupted in one spoils that one.
const SAMPLE: u64 = 8;

/// How many buffers of bytes are left out after a change: they meet queues and caches as the other
/// carrier has left them.
const SETTLING: u64 = 2;

/// How many samples of each carrier a comparison takes. It compares their medians.
const SAMPLES: usize = 7;

/// A comparison for which so many buffers of bytes were not enough is given up, as where no pipe
/// can be had.
const LONGEST: u64 = 8 * (SAMPLE + SETTLING) * SAMPLES as u64;

/// How many buffers of bytes pass between two comparisons. So one byte of 200 tries the carrier
/// that was worse.
const PAUSE: u64 = 200 * (SAMPLE + SETTLING) * SAMPLES as u64;

/// The other carrier is chosen if it costs less than this part of what the chosen one does. Without
/// such a gap two that cost the same would take turns.
const GAIN: f64 = 0.97;

/// What a wake-up costs besides the calls that move bytes: an `epoll_wait` that sleeps, on machines
/// of the last ten years one to five microseconds.
const WAKE: Duration = Duration::from_micros(2);

/// Chooses the carrier for flows of one kind.
///
/// Now and then it compares: the flows take one carrier and the other in turn, a few buffers of
/// bytes at a time, and what a byte has cost through each decides. In between it counts bytes, and
/// no time is measured.
#[derive(Debug)]
pub(crate) struct Chooser {
    chosen: Through,
    /// The bytes of a buffer.
    unit: u64,
    /// The bytes until the next comparison.
    pause: u64,
    comparison: Option<Comparison>,
}

#[derive(Debug)]
struct Comparison {
    tried: Through,
    /// The bytes that are still to be left out.
    settling: u64,
    /// The bytes after which it is given up.
    left: u64,
    time: Duration,
    bytes: u64,
    /// Nanoseconds a byte through memory and through a pipe.
    samples: [Vec<f64>; 2],
}

impl Comparison {
    fn new(tried: Through, unit: u64) -> Comparison {
        Comparison {
            tried,
            settling: SETTLING * unit,
            left: LONGEST * unit,
            time: Duration::ZERO,
            bytes: 0,
            samples: [Vec::new(), Vec::new()],
        }
    }

    fn note(&mut self, through: Option<Through>, bytes: u64, time: Duration, unit: u64) {
        self.left = self.left.saturating_sub(bytes);
        if through != Some(self.tried) {
            return;
        }
        if self.settling > 0 {
            self.settling = self.settling.saturating_sub(bytes);
            return;
        }
        self.time += time;
        self.bytes += bytes;
        if self.bytes >= SAMPLE * unit {
            let cost = self.time.as_nanos() as f64 / self.bytes as f64;
            self.samples[self.tried as usize].push(cost);
            self.tried = self.tried.other();
            self.settling = SETTLING * unit;
            self.time = Duration::ZERO;
            self.bytes = 0;
        }
    }

    fn is_complete(&self) -> bool {
        self.samples.iter().all(|it| it.len() >= SAMPLES)
    }

    fn median_cost(&mut self, through: Through) -> f64 {
        let samples = &mut self.samples[through as usize];
        let middle = samples.len() / 2;
        *samples.select_nth_unstable_by(middle, f64::total_cmp).1
    }
}

impl Chooser {
    /// Makes a chooser that begins with a pipe, and compares at once. `unit` is the bytes of a
    /// buffer.
    pub(crate) fn new(unit: usize) -> Chooser {
        Chooser {
            chosen: Through::Pipe,
            unit: unit as u64,
            pause: 0,
            comparison: None,
        }
    }

    /// Returns what is to carry the next bytes.
    pub(crate) fn choice(&self) -> Through {
        match &self.comparison {
            Some(comparison) => comparison.tried,
            None => self.chosen,
        }
    }

    /// Returns whether the next [`note`](Chooser::note) needs the time.
    pub(crate) fn needs_time(&self) -> bool {
        self.comparison.is_some()
    }

    /// Notes that `bytes` have passed, how long the calls took that moved them, and whether a
    /// wake-up follows. `through` is the carrier, if it was the same for all of them; otherwise
    /// they say nothing about the cost.
    pub(crate) fn note(
        &mut self,
        through: Option<Through>,
        bytes: u64,
        time: Duration,
        rest: Rest,
    ) {
        let Some(comparison) = &mut self.comparison else {
            self.pause = self.pause.saturating_sub(bytes);
            if self.pause == 0 {
                self.comparison = Some(Comparison::new(self.chosen, self.unit));
            }
            return;
        };
        let wake = match rest {
            Rest::Sleeps => WAKE,
            Rest::GoesOn => Duration::ZERO,
        };
        comparison.note(through, bytes, time + wake, self.unit);
        if comparison.is_complete() {
            let other = self.chosen.other();
            if comparison.median_cost(other) < GAIN * comparison.median_cost(self.chosen) {
                self.chosen = other;
            }
        } else if comparison.left > 0 {
            return;
        }
        self.comparison = None;
        self.pause = PAUSE * self.unit;
    }
}

/// What follows the calls of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rest {
    /// It goes on at once: its budget ran out.
    GoesOn,
    /// It waits for an event.
    Sleeps,
}
