//! Rounds, medians, the table.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::contender::{BARE, BEFORE, Backs, Contender, NAMES};
use crate::host::Ticks;
use crate::load::{CHUNK, Load};
use crate::{forwards, idle};

const MIB: u64 = 1 << 20;

/// One way, so many bytes in all: some seconds of work.
const BYTES: u64 = 1024 * MIB;

fn loads() -> Vec<Load> {
    let mut loads = Vec::new();
    for connections in [1, 16, 256] {
        let bytes = BYTES;
        loads.push(Load::Down { bytes, connections });
        loads.push(Load::Up {
            bytes,
            connections,
            write: CHUNK,
        });
    }
    for connections in [1, 16] {
        loads.push(Load::Up {
            bytes: BYTES,
            connections,
            write: 4 << 10,
        });
    }
    for size in [64, 16 << 10] {
        for (connections, count) in [(1, 20_000), (64, 64_000)] {
            loads.push(Load::Trips {
                size,
                count,
                connections,
            });
        }
    }
    loads.push(Load::Connects {
        count: 5_000,
        at_a_time: 64,
    });
    loads
}

/// What one contender did of one load, a number a round.
#[derive(Default)]
struct Cell {
    rates: Vec<f64>,
    cpu: Vec<f64>,
    keeper: Vec<f64>,
    quantiles: [Vec<f64>; 3],
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_unstable_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n => (values[(n - 1) / 2] + values[n / 2]) / 2.0,
    }
}

/// A measurement during which the host took more than this part of the CPU is made again, so many
/// times at most; the one that lost least counts.
const STOLEN: f64 = 0.05;
const TRIES: usize = 4;

/// One measurement.
struct Sample {
    rate: f64,
    cpu: f64,
    keeper: f64,
    quantiles: [Option<Duration>; 3],
    stolen: f64,
}

fn sample(load: Load, contender: &Contender) -> io::Result<Sample> {
    let mut best: Option<Sample> = None;
    for _ in 0..TRIES {
        let (ticks, before) = (Ticks::now(), contender.cpu());
        let measured = load.run(contender.port(load.service()))?;
        let (amount, _) = load.amount();
        let (all, keeper) = contender.cpu();
        let sample = Sample {
            rate: amount / measured.took.as_secs_f64(),
            cpu: (all - before.0) / amount,
            keeper: (keeper - before.1) / amount,
            quantiles: [0.5, 0.99, 0.999].map(|share| measured.quantile(share)),
            stolen: ticks.stolen_since(),
        };
        let is_calm = sample.stolen <= STOLEN;
        if best.as_ref().is_none_or(|best| sample.stolen < best.stolen) {
            best = Some(sample);
        }
        if is_calm {
            break;
        }
    }
    best.ok_or_else(|| io::ErrorKind::NotFound.into())
}

pub(crate) fn main() {
    // cargo bench adds `--bench`.
    let mut words = std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .peekable();
    if words.next_if(|word| word == BARE).is_some() {
        let Err(e) = crate::bare::main(words);
        eprintln!("bench: {BARE}: {e}");
        std::process::exit(1);
    }
    let rounds: usize = match words.next().map(|word| word.parse()) {
        None => 5,
        Some(Ok(rounds)) => rounds,
        Some(Err(_)) => {
            eprintln!("bench: the first word is a number of rounds");
            std::process::exit(2);
        }
    };
    let wanted: Vec<String> = words.collect();
    if let Err(e) = run(rounds, &wanted) {
        eprintln!("bench: {e}");
        std::process::exit(1);
    }
}

/// `HVSOCK_BENCH_ONLY=NAME;NAME…` leaves the other contenders out.
pub(crate) fn takes_part(name: &str) -> bool {
    std::env::var("HVSOCK_BENCH_ONLY").map_or(true, |only| only.split(';').any(|it| it == name))
}

fn is_wanted(wanted: &[String], name: &str) -> bool {
    wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()))
}

fn run(rounds: usize, wanted: &[String]) -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let dir = tempfile::Builder::new().prefix("hvs-").tempdir_in("/tmp")?;
    let backs = Backs::start(dir.path(), hard);
    let loads: Vec<Load> = loads()
        .into_iter()
        .filter(|load| is_wanted(wanted, &load.name()))
        .collect();
    let mut cells: BTreeMap<(usize, &str), Cell> = BTreeMap::new();
    let mut rng = fastrand::Rng::with_seed(1);
    let (mut samples, mut disturbed) = (0, 0);
    for round in 1..=rounds {
        let mut contenders = Vec::new();
        for name in NAMES.into_iter().filter(|name| takes_part(name)) {
            match Contender::start(name, &backs)? {
                Some(contender) => contenders.push((name, contender)),
                None if round == 1 => eprintln!("bench: {name} is not installed, and left out"),
                None => {}
            }
        }
        for (index, load) in loads.iter().enumerate() {
            // One after the other, for a slow minute is to hit all; and none is always behind the
            // same.
            rng.shuffle(&mut contenders);
            for (name, contender) in &mut contenders {
                let sample = match sample(*load, contender) {
                    Ok(sample) => sample,
                    Err(e) => {
                        let why = format!("{name}, {}: {e}", load.name());
                        if !OTHERS.contains(name) {
                            return Err(io::Error::new(e.kind(), why));
                        }
                        eprintln!("bench: {why}; left out of round {round}");
                        if let Some(again) = Contender::start(name, &backs)? {
                            *contender = again;
                        }
                        continue;
                    }
                };
                let cell = cells.entry((index, *name)).or_default();
                cell.rates.push(sample.rate);
                cell.cpu.push(sample.cpu);
                cell.keeper.push(sample.keeper);
                for (quantiles, time) in cell.quantiles.iter_mut().zip(sample.quantiles) {
                    quantiles.extend(time.map(|time| time.as_secs_f64() * 1e6));
                }
                samples += 1;
                disturbed += usize::from(sample.stolen > STOLEN);
            }
        }
        eprintln!("bench: round {round} of {rounds}");
    }
    println!(
        "The machine's host took more than {:.0} % of the CPU during {disturbed} of {samples} measurements.",
        STOLEN * 100.0
    );
    for (index, load) in loads.iter().enumerate() {
        print_load(index, *load, &cells);
    }
    if is_wanted(wanted, "forwards") {
        forwards::print_table(&backs, hard)?;
    }
    if is_wanted(wanted, "idle") {
        idle::print_tables(&backs.for_a_crowd(), hard)?;
    }
    Ok(())
}

/// The proxies that hvsock is compared with.
const OTHERS: [&str; 4] = ["haproxy", "haproxy 128k", "nginx", "socat"];

/// The carriers of hvsock's own: pipes, if another build is set that takes nothing else for bulk
/// data, and copies.
const OWN: [&str; 2] = [BEFORE, "hvsock --no-splice"];

fn print_load(index: usize, load: Load, cells: &BTreeMap<(usize, &str), Cell>) {
    let (_, unit) = load.amount();
    let of = |name: &str, get: fn(&Cell) -> &[f64]| -> Option<f64> {
        let cell = cells
            .iter()
            .find(|((at, n), _)| *at == index && *n == name)?
            .1;
        Some(median(get(cell)))
    };
    let rate = |name: &str| of(name, |cell| &cell.rates);
    let cpu = |name: &str| of(name, |cell| &cell.cpu);
    let best = OTHERS
        .iter()
        .filter_map(|name| rate(name))
        .fold(f64::NAN, f64::max);
    let least = OTHERS
        .iter()
        .filter_map(|name| cpu(name))
        .fold(f64::NAN, f64::min);
    let direct = rate("no proxy").unwrap_or(f64::NAN);
    let own = OWN
        .iter()
        .filter_map(|name| rate(name))
        .fold(f64::NAN, f64::max);
    println!("\n{}", load.name());
    println!(
        "{:<18} {:>12} {:>7} {:>7} {:>7} {:>14} {:>7} {:>9} {:>9} {:>9} {:>9}",
        "",
        format!("{unit}/s"),
        "x best",
        "x none",
        "x own",
        format!("CPU s/{unit}"),
        "x least",
        "keeper's",
        "p50 us",
        "p99",
        "p99.9"
    );
    for name in NAMES {
        let (Some(rate), Some(cpu)) = (rate(name), cpu(name)) else {
            continue;
        };
        print!(
            "{name:<18} {rate:>12.3} {:>7.2} {:>7.2} {:>7.2} {cpu:>14.3} {:>7.2}",
            rate / best,
            rate / direct,
            rate / own,
            cpu / least
        );
        match of(name, |cell| &cell.keeper) {
            Some(keeper) if keeper > 0.0 => print!(" {keeper:>9.3}"),
            _ => print!(" {:>9}", "-"),
        }
        let quantiles: [fn(&Cell) -> &[f64]; 3] = [
            |c| &c.quantiles[0],
            |c| &c.quantiles[1],
            |c| &c.quantiles[2],
        ];
        for quantile in quantiles {
            match of(name, quantile) {
                Some(us) if !us.is_nan() => print!(" {us:>9.0}"),
                _ => print!(" {:>9}", "-"),
            }
        }
        println!();
    }
}
