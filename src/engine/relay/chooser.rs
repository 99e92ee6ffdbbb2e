//! The choice of the carrier for flows of one kind, by what a byte costs through each on this
//! machine.

use std::time::{Duration, Instant};

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

/// How many buffers of bytes a sample is, 8 MiB of 128 KiB: some for each of many flows. A process
/// that is interrupted in one spoils that one.
const SAMPLE: u64 = 64;

/// How many buffers of bytes are left out after a change: they meet queues and caches as the other
/// carrier has left them. Sixteen flows hold 7 MiB in Linux' Unix sockets and in pipes.
const SETTLING: u64 = 32;

/// How many samples of each carrier a comparison takes at most. It compares their medians.
const MOST_SAMPLES: usize = 15;

/// How many may be enough: if three quarters of one carrier took less time than three quarters of
/// the other.
const FEWEST_SAMPLES: usize = 4;

/// A comparison for which so many buffers of bytes were not enough is given up, as where no pipe
/// can be had.
const LONGEST: u64 = 3 * (SAMPLE + SETTLING) * MOST_SAMPLES as u64;

/// How many times the bytes of the first comparison pass until the next one, for the first flow may
/// say little about others. So one byte of 40 tries the carrier that is worse.
const FIRST_PAUSE: u64 = 20;

/// The same after many comparisons: the pause doubles with each that chooses as the one before. So
/// one byte of 400 tries the carrier that is worse.
const LAST_PAUSE: u64 = 200;

/// How many buffers of bytes pass between two comparisons at most, 16 GiB: the load changes.
const LONGEST_PAUSE: u64 = 128 << 10;

/// The other carrier is chosen if it needs less than this part of what the chosen one does. Without
/// such a gap two that need the same would take turns.
const GAIN: f64 = 0.97;

/// The time is the same if it differs by less than this part: then the cost decides.
const SAME_PACE: f64 = 0.95;

/// The most that a wait between two turns counts. In a longer one a peer has nothing to send or
/// takes nothing, whatever the carrier.
const LONGEST_WAIT: Duration = Duration::from_millis(1);

/// What a wake-up costs besides the calls that move bytes: an `epoll_wait` that sleeps, on machines
/// of the last ten years one to five microseconds.
const WAKE: Duration = Duration::from_micros(2);

/// Chooses the carrier for flows of one kind.
///
/// Now and then it compares: the flows take one carrier and the other in turn, a few MiB at a
/// time. The faster one is chosen. If both are as fast, since a peer or a network sets the pace, it
/// is the one whose calls cost less. In between it counts bytes, and no time is measured.
///
/// The calls alone don't say which is faster. Where the peers share the processors with the proxy,
/// only the rate shows what it costs to wake them, and what they pay for the bytes that one carrier
/// or the other leaves them.
#[derive(Debug)]
pub(crate) struct Chooser {
    chosen: Through,
    /// The bytes of a buffer.
    unit: u64,
    /// The bytes until the next comparison.
    pause: u64,
    /// The pause after the next comparison, in times of its bytes.
    times: u64,
    comparison: Option<Comparison>,
}

/// When the calls of a turn began, and when they ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) begun: Instant,
    pub(crate) ended: Instant,
}

/// What bytes needed.
#[derive(Clone, Copy, Debug, Default)]
struct Need {
    bytes: u64,
    /// The time in the calls, and the cost of wake-ups.
    cost: Duration,
    /// The time that passed.
    pace: Duration,
}

#[derive(Debug)]
struct Comparison {
    tried: Through,
    /// The bytes that are still to be left out.
    settling: u64,
    /// The bytes after which it is given up.
    left: u64,
    /// When the last turn ended.
    last: Option<Instant>,
    sample: Need,
    /// Those of memory and of a pipe.
    samples: [Vec<Need>; 2],
}

impl Comparison {
    fn new(tried: Through, unit: u64) -> Comparison {
        Comparison {
            tried,
            settling: SETTLING * unit,
            left: LONGEST * unit,
            last: None,
            sample: Need::default(),
            samples: [Vec::new(), Vec::new()],
        }
    }

    /// Returns whether a sample ended.
    fn note(
        &mut self,
        through: Option<Through>,
        bytes: u64,
        span: Option<Span>,
        rest: Rest,
        unit: u64,
    ) -> bool {
        self.left = self.left.saturating_sub(bytes);
        let Some(span) = span else {
            return false;
        };
        let last = self.last.replace(span.ended);
        if through != Some(self.tried) {
            return false;
        }
        if self.settling > 0 {
            self.settling = self.settling.saturating_sub(bytes);
            return false;
        }
        let calls = span.ended.saturating_duration_since(span.begun);
        let wait = last.map_or(Duration::ZERO, |last| {
            span.begun.saturating_duration_since(last)
        });
        let wake = match rest {
            Rest::Sleeps => WAKE,
            Rest::GoesOn => Duration::ZERO,
        };
        self.sample.bytes += bytes;
        self.sample.cost += calls + wake;
        self.sample.pace += calls + wait.min(LONGEST_WAIT);
        let has_ended = self.sample.bytes >= SAMPLE * unit;
        if has_ended {
            self.samples[self.tried as usize].push(std::mem::take(&mut self.sample));
            self.tried = self.tried.other();
            self.settling = SETTLING * unit;
        }
        has_ended
    }

    /// Returns nanoseconds a byte of each sample, in order.
    fn needs(&self, through: Through, time: fn(&Need) -> Duration) -> Vec<f64> {
        let samples = self.samples[through as usize].iter();
        let needs = samples.map(|need| time(need).as_nanos() as f64 / need.bytes as f64);
        let mut needs: Vec<f64> = needs.collect();
        needs.sort_unstable_by(f64::total_cmp);
        needs
    }

    fn is_complete(&self) -> bool {
        let fewest = self.samples.iter().map(Vec::len).min().unwrap_or(0);
        if !(FEWEST_SAMPLES..MOST_SAMPLES).contains(&fewest) {
            return fewest >= MOST_SAMPLES;
        }
        let [memory, pipe] = Through::ALL.map(|it| self.needs(it, |need| need.pace));
        // The greatest of the lower three quarters, and the least of the upper ones.
        let greatest = |needs: &[f64]| needs[needs.len() * 3 / 4];
        let least = |needs: &[f64]| needs[needs.len() - 1 - needs.len() * 3 / 4];
        greatest(&memory) < least(&pipe) || greatest(&pipe) < least(&memory)
    }

    /// Returns whether the other carrier than the chosen one is the better.
    fn is_better(&self, other: Through) -> bool {
        let median = |through, time| {
            let needs = self.needs(through, time);
            needs.get(needs.len() / 2).copied().unwrap_or(f64::MAX)
        };
        let ratio = |time| median(other, time) / median(other.other(), time);
        match ratio(|need| need.pace) {
            pace if pace < SAME_PACE => true,
            pace if pace > 1.0 / SAME_PACE => false,
            _ => ratio(|need| need.cost) < GAIN,
        }
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
            times: FIRST_PAUSE,
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

    /// Notes that `bytes` have passed, when the calls were made that moved them, and whether a
    /// wake-up follows. `through` is the carrier, if it was the same for all of them; otherwise
    /// they say nothing about the cost.
    pub(crate) fn note(
        &mut self,
        through: Option<Through>,
        bytes: u64,
        span: Option<Span>,
        rest: Rest,
    ) {
        let Some(comparison) = &mut self.comparison else {
            self.pause = self.pause.saturating_sub(bytes);
            if self.pause == 0 {
                self.comparison = Some(Comparison::new(self.chosen, self.unit));
            }
            return;
        };
        let has_sample = comparison.note(through, bytes, span, rest, self.unit);
        if has_sample && comparison.is_complete() {
            let other = self.chosen.other();
            self.times = match comparison.is_better(other) {
                true => {
                    self.chosen = other;
                    FIRST_PAUSE
                }
                false => (2 * self.times).min(LAST_PAUSE),
            };
        } else if comparison.left > 0 {
            return;
        }
        let taken = LONGEST * self.unit - comparison.left;
        self.pause = (self.times * taken).min(LONGEST_PAUSE * self.unit);
        self.comparison = None;
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
