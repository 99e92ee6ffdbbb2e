//! What an event costs, and a start, does not grow with the forwards that there are. Alone in its
//! process, for it counts the CPU time of its threads.

// poll(2) itself costs more for each descriptor.
#![cfg(all(target_os = "linux", not(mio_unsupported_force_poll_poll)))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use command::*;
use common::*;
use hvsock::{Listener, Proxy, Rule};

/// The tests are one after the other: a worker is found by its name.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

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
    let _alone = alone();
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

/// What it costs to start on so many sockets of a service manager, for each.
fn cost_of_passed(sockets: u64) -> u64 {
    let me = Path::new("/proc/thread-self");
    let dir = private_dir();
    let mut passed: Vec<(OwnedFd, hvsock::Address)> = Vec::new();
    for i in 0..sockets {
        let path = dir.path().join(format!("s{i}"));
        passed.push(match i % 2 {
            0 => (UnixListener::bind(&path).unwrap().into(), unix(&path)),
            _ => {
                let socket = TcpListener::bind("127.0.0.1:0").unwrap();
                let address = format!("tcp://{}", socket.local_addr().unwrap());
                (socket.into(), address.parse().unwrap())
            }
        });
    }
    let target = dir.path().join("none");
    let rules = passed
        .iter()
        .map(|(_, at)| Rule::new(at.clone(), unix(&target)));
    let mut config = config(rules.collect());
    // The last one is wanted first.
    config.rules.reverse();
    let sockets_of = passed
        .into_iter()
        .map(|(socket, _)| Listener::try_from(socket).unwrap());
    config.listeners = sockets_of.collect();
    let begun = cpu(me);
    let proxy = Proxy::start(config).unwrap();
    let cost = (cpu(me) - begun) / sockets;
    assert_eq!(proxy.forwards().len() as u64, sockets);
    cost
}

#[test]
fn a_start_on_many_passed_sockets_is_linear() {
    let _alone = alone();
    allow_descriptors(16384);
    let few = cost_of_passed(100);
    let many = cost_of_passed(3000);
    println!("{few} and {many} ns a socket");
    assert!(many < 4 * few, "it isn't linear");
}

/// The nanoseconds for which a process has run.
fn cpu_of(pid: u32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    tasks.map(|it| cpu(&it.path())).sum()
}

/// What a take-over of so many sockets costs both, for each.
fn cost_of_take_over(sockets: u64) -> u64 {
    let dir = private_dir();
    let file = dir.path().join("f.toml");
    let target = dir.path().join("target");
    let _server = UnixListener::bind(&target).unwrap();
    let toml = format!(
        "grace = \"20s\"\nworkers = 1\ncontrol = {:?}\n",
        dir.path().join("c")
    );
    let forward = |i: u64| {
        // Each finds its own again, that of a port that was chosen too.
        let listen = match i % 2 {
            0 => dir.path().join(format!("s{i}")).display().to_string(),
            _ => "tcp://127.0.0.1:0".to_owned(),
        };
        format!("[forward.f{i}]\nlisten = {listen:?}\nconnect = {target:?}\n")
    };
    let mut forwards: Vec<String> = (0..sockets).map(forward).collect();
    fs::write(&file, toml.clone() + &forwards.concat()).unwrap();
    let first = Running::start(&["run", text(&file)]);
    first.says("controlled at");
    // It stays until then.
    let _client = UnixStream::connect(dir.path().join("s0")).unwrap();
    // The last one is wanted first.
    forwards.reverse();
    fs::write(&file, toml + &forwards.concat()).unwrap();
    let begun = cpu_of(first.child.0.id());
    let second = Running::start(&["run", text(&file), "--take-over"]);
    second.says("controlled at");
    let cost = cpu_of(first.child.0.id()) - begun + cpu_of(second.child.0.id());
    cost / sockets
}

#[test]
fn a_take_over_of_many_sockets_is_linear() {
    let _alone = alone();
    let few = cost_of_take_over(100);
    let many = cost_of_take_over(1500);
    println!("{few} and {many} ns a socket");
    assert!(many < 4 * few, "it isn't linear");
}
