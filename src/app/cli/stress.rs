//! `hvsock stress`: sends data, compares what comes back, and measures.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use indicatif::{BinaryBytes, ProgressBar, ProgressStyle};

use super::console::{complain, print_text, say};
use super::ending::end_without_what_hangs;
use super::options::{PeerArgs, refuse_impossible};
use super::outcome::{Failure, Outcome};
use super::signals::EndSignals;
use crate::address::Address;
use crate::app::serve::{self, LOOK, Stop};
use crate::app::stress::{self, Load, MOST_PARALLEL, StressPlan, StressProgress, StressReport};
use crate::app::values::{number, parse_mode, parse_some_time, parse_time};
use crate::error::{Operation, counted};
use crate::listener::lasting::LastingListener;
use crate::thread::{start_scoped_thread, start_thread};

/// Send random data through any address to a server that returns it, compare every byte, and
/// measure
#[derive(Args, Debug)]
#[command(
    after_help = "Any echo server will do, but for --bench up and down, which want a `stress --server`. SIZEs have K, M \
    or G behind them, powers of 1024. The exit code is 1 if anything was lost, changed or refused.

Examples:
  hvsock stress --server vsock://:5000
  hvsock stress -n 1000 -p 20 vsock://3:5000
  hvsock stress -n 10 --size 64M hyperkit://:5000/path/to/state
  hvsock stress --bench up -p 4 tcp://127.0.0.1:5000"
)]
pub(super) struct StressArgs {
    #[command(flatten)]
    peer: PeerArgs,
    /// Serve such clients until SIGINT or SIGTERM
    #[arg(short = 's', long, conflicts_with_all = CLIENT_OPTIONS)]
    server: bool,
    /// Connections in all [default: 100; with --bench, as many as in parallel]
    #[arg(short = 'n', long, value_name = "N", value_parser = number(1..=u64::MAX))]
    connections: Option<u64>,
    /// Connections at a time, at most 10000
    #[arg(short = 'p', long, value_name = "N", default_value_t = 1, value_parser = number::<u16>(1..=10_000))]
    parallel: u16,
    /// Bytes that a connection sends; of round trips, in a message [default: 1-64K; up and down:
    /// 256M; rtt: 64]
    #[arg(long, value_name = "SIZE|MIN-MAX", value_parser = parse_sizes)]
    size: Option<Sizes>,
    /// Bytes that are read or written at once, at most 16M
    #[arg(long, value_name = "SIZE|MIN-MAX", default_value = "1-64K", value_parser = parse_buffers)]
    buffer: Sizes,
    /// Repeats a run with the same sizes and bytes [default: a random one, printed]
    #[arg(long, value_name = "N", value_parser = number(0..=u64::MAX))]
    seed: Option<u64>,
    /// Measure: one way up or down, or round trips
    #[arg(long, value_enum, value_name = "LOAD")]
    bench: Option<Bench>,
    /// Round trips of a connection with --bench rtt [default: 10000]
    #[arg(long, value_name = "N", value_parser = number(1..=u64::MAX))]
    round_trips: Option<u64>,
    /// Seconds between a connection and the next one in its place
    #[arg(long, value_name = "SECONDS", default_value = "0", value_parser = parse_time)]
    pause: Duration,
    /// Seconds that connecting may take, and that nothing may move
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = parse_some_time)]
    timeout: Duration,
    /// End with the first failure
    #[arg(short = 'e', long)]
    fail_fast: bool,
    /// A line for each connection
    #[arg(short = 'v', long)]
    verbose: bool,
    /// With --server, permissions of a Unix listening socket, octal
    #[arg(long, value_name = "OCTAL", default_value = "600", value_parser = parse_mode, requires = "server")]
    mode: u32,
}

/// The options that have no meaning for a server.
const CLIENT_OPTIONS: [&str; 10] = [
    "connections",
    "parallel",
    "size",
    "buffer",
    "seed",
    "bench",
    "round_trips",
    "pause",
    "timeout",
    "fail_fast",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Bench {
    /// The client sends
    Up,
    /// The server sends
    Down,
    /// A message goes there and back, then the next
    Rtt,
}

/// A range of sizes in bytes, to draw from.
type Sizes = RangeInclusive<u64>;

/// The most bytes that are read or written at once.
const LARGEST_BUFFER: u64 = 16 << 20;

/// The largest message of a round trip in bytes: each has a buffer of its size.
const LARGEST_MESSAGE: u64 = 1 << 30;

/// The default number of round trips of a connection.
const ROUND_TRIPS: u64 = 10_000;

/// How long clients may take to finish when the server is stopped.
const GRACE: Duration = Duration::from_secs(10);

impl StressArgs {
    pub(super) fn run(self) -> Outcome {
        let stop = Stop::default();
        let signals = EndSignals::take()?;
        // If the limit can't be raised there are fewer connections.
        let _ = crate::sys::raise_descriptor_limit();
        let address = self.peer.address(Instant::now())?;
        let operation = match self.server {
            true => Operation::Listen,
            false => Operation::Connect,
        };
        refuse_impossible(operation, &address)?;
        if self.server {
            let mut listener = LastingListener::bind(&address, self.mode)?;
            stop_on_signals(signals, stop.clone(), GRACE)?;
            say(format_args!("serving on {}", listener.address()));
            let plan = serve::ServePlan {
                in_all: None,
                grace: GRACE,
            };
            stress::serve(&mut listener, plan, &stop, self.verbose);
            return Ok(());
        }
        let plan = self.plan(address)?;
        stop_on_signals(signals, stop.clone(), plan.timeout)?;
        let report = watch(&plan, &stop);
        let printed = print_text(&report);
        match report.verdict() {
            None => printed,
            Some(why) => Err(Failure::Failed(why)),
        }
    }

    fn plan(self, address: Address) -> Result<StressPlan, Failure> {
        let parallel = usize::from(self.parallel);
        if address.transport().vm.needs_pacing && parallel > MOST_PARALLEL {
            return Err(Failure::Usage(format!(
                "{} at a time to a {} VM: more than {MOST_PARALLEL} could kill it",
                counted(parallel as u64, "connection"),
                address.scheme()
            )));
        }
        if self.round_trips.is_some() && self.bench != Some(Bench::Rtt) {
            let why = "--round-trips is for --bench rtt";
            return Err(Failure::Usage(why.to_owned()));
        }
        let (load, size) = match self.bench {
            None => (Load::Echo, 1..=64 << 10),
            Some(Bench::Up) => (Load::Up, 256 << 20..=256 << 20),
            Some(Bench::Down) => (Load::Down, 256 << 20..=256 << 20),
            Some(Bench::Rtt) => (
                Load::RoundTrips(self.round_trips.unwrap_or(ROUND_TRIPS)),
                64..=64,
            ),
        };
        let size = self.size.unwrap_or(size);
        if self.bench == Some(Bench::Rtt) && !(1..=LARGEST_MESSAGE).contains(size.start())
            || self.bench == Some(Bench::Rtt) && *size.end() > LARGEST_MESSAGE
        {
            return Err(Failure::Usage(
                "a message of a round trip has 1 byte to 1G".to_owned(),
            ));
        }
        let connections = match self.bench {
            None => 100,
            Some(_) => u64::from(self.parallel),
        };
        Ok(StressPlan {
            address,
            load,
            connections: self.connections.unwrap_or(connections),
            parallel,
            size,
            buffer: self.buffer,
            seed: self.seed.unwrap_or_else(|| fastrand::u64(..)),
            pause: self.pause,
            timeout: self.timeout,
            fail_fast: self.fail_fast,
            verbose: self.verbose,
        })
    }
}

/// Ends the run when a signal comes: gracefully at the first one, at once at the next.
///
/// # Errors
/// Returns an error if the thread that waits for signals can't be started.
fn stop_on_signals(mut signals: EndSignals, stop: Stop, patience: Duration) -> Outcome {
    let wait = move || {
        for (count, ()) in signals.each().enumerate() {
            // The reader of the report may hang.
            end_without_what_hangs(match count {
                0 => patience,
                _ => Duration::ZERO,
            });
            if count == 0 {
                let seconds = patience.as_secs();
                complain(format_args!(
                    "stopping: connections under way have {seconds} s; once more to cut them off"
                ));
            }
            stop.request_end();
        }
    };
    start_thread("hvsock-signals", "to wait for signals", wait)?;
    Ok(())
}

/// Runs the plan, with a progress bar if standard error is a terminal.
fn watch(plan: &StressPlan, stop: &Stop) -> StressReport {
    let progress = StressProgress::default();
    let over = AtomicBool::new(false);
    let bar = match plan.verbose {
        true => ProgressBar::hidden(),
        false => ProgressBar::new(plan.connections),
    };
    let style = "{elapsed} [{bar:30}] {pos}/{len} connections, {msg}";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style.progress_chars("=> "));
    }
    let report = std::thread::scope(|scope| {
        let show = || {
            while !over.load(Ordering::Relaxed) {
                let get = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
                bar.set_position(get(&progress.ended));
                let moved = BinaryBytes(get(&progress.moved));
                bar.set_message(format!("{moved}, {} failed", get(&progress.failed)));
                std::thread::sleep(LOOK);
            }
        };
        // The bar is not needed.
        let _ = start_scoped_thread(scope, "hvsock-bar", "to show the progress", show);
        let report = stress::run(plan, stop, &progress);
        over.store(true, Ordering::Relaxed);
        report
    });
    bar.finish_and_clear();
    report
}

/// Parses `SIZE` or `MIN-MAX`, in bytes.
fn parse_sizes(text: &str) -> Result<Sizes, String> {
    let (least, most) = text.split_once('-').unwrap_or((text, text));
    let (least, most) = (parse_size(least)?, parse_size(most)?);
    if least > most {
        return Err("the first size is the larger one".to_owned());
    }
    Ok(least..=most)
}

fn parse_buffers(text: &str) -> Result<Sizes, String> {
    let sizes = parse_sizes(text)?;
    if *sizes.start() == 0 || *sizes.end() > LARGEST_BUFFER {
        return Err("a buffer has 1 byte to 16M".to_owned());
    }
    Ok(sizes)
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let bytes = digits.parse::<u64>().ok();
    bytes
        .and_then(|n| n.checked_mul(1 << shift))
        // Positions in the data must not overflow.
        .filter(|&n| n <= 1 << 50)
        .ok_or_else(|| format!("{text:?} is no size; right ones: 4096, 64K, 1M-4M"))
}
