//! What an event costs, and a start, does not grow with the forwards that there are. Alone in its
//! process, for it counts the CPU time of its threads.

// poll(2) itself costs more for each descriptor.
#![cfg(all(target_os = "linux", not(mio_unsupported_force_poll_poll)))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use common::*;
use hvsock::{Proxy, Rule};

/// The nanoseconds for which a thread of this process has run.
fn cpu(thread: &Path) -> u64 {
    let text = fs::read_to_string(thread.join("schedstat")).unwrap();
    text.split_whitespace().next().unwrap().parse().unwrap()
}

/// What a proxy with so many forwards has cost: its start for each forward, and a round trip.
struct Cost {
    start: u64,
    round_trip: u64,
}

fn cost(forwards: u64, echo: &Path) -> Cost {
    const ROUND_TRIPS: u64 = 1000;
    let me = Path::new("/proc/thread-self");
    let dir = private_dir();
    let at = |i: u64| dir.path().join(format!("s{i}"));
    // Half of them have files that are looked at.
    let rules = (0..forwards).map(|i| match i % 2 {
        0 => Rule::new(unix(at(i)), unix(echo)),
        _ => Rule::new(any_tcp(), unix(echo)),
    });
    let mut config = config(rules.collect());
    config.workers = NonZeroUsize::new(1);
    let begun = cpu(me);
    let proxy = Proxy::start(config).unwrap();
    let start = (cpu(me) - begun) / forwards;
    let mut client = UnixStream::connect(at(0)).unwrap();
    let mut round_trip = || {
        client.write_all(b"ping").unwrap();
        client.read_exact(&mut [0; 4]).unwrap();
    };
    // Once all have been looked at for the first time.
    (0..ROUND_TRIPS).for_each(|_| round_trip());
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    // Other threads come and go.
    let name = |task: &Path| fs::read_to_string(task.join("comm")).unwrap_or_default();
    let mut tasks = tasks.map(|it| it.path());
    let worker = tasks.find(|it| name(it) == "hvsock-0\n").unwrap();
    let begun = cpu(&worker);
    (0..ROUND_TRIPS).for_each(|_| round_trip());
    let round_trip = (cpu(&worker) - begun) / ROUND_TRIPS;
    drop(proxy);
    Cost { start, round_trip }
}

#[test]
fn neither_a_start_nor_a_round_trip_costs_more_beside_many_forwards() {
    allow_descriptors(8192);
    let dir = private_dir();
    let echo = dir.path().join("echo");
    let listener = UnixListener::bind(&echo).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || io::copy(&mut &stream, &mut &stream).map(drop));
        }
    });
    let few = cost(100, &echo);
    let many = cost(3000, &echo);
    println!("start: {} and {} ns a forward", few.start, many.start);
    println!("round trip: {} and {} ns", few.round_trip, many.round_trip);
    assert!(many.start < 4 * few.start, "a start is not linear");
    assert!(many.round_trip < 4 * few.round_trip, "a round trip grows");
}
