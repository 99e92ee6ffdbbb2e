//! The benchmark of idle connections (`tests/bench/idle.rs`), with as many as it asks for: the
//! limit of descriptors may be raised here.

use std::fs;
use std::io;
use std::process::Command;

use nix::sys::resource::{Resource, setrlimit};

/// Both ends of 50,000 connections, and of the proxy's ends of them.
const DESCRIPTORS: u64 = 300_000;

/// Its server has a thread for each connection, and a thread has two mappings.
const SETTINGS: [(&str, &str); 3] = [
    ("/proc/sys/kernel/pid_max", "400000"),
    ("/proc/sys/kernel/threads-max", "400000"),
    ("/proc/sys/vm/max_map_count", "2000000"),
];

/// Runs `/bench`, and prints how it has ended if that is not well.
pub(crate) fn run() {
    match measure() {
        Ok(true) => {}
        Ok(false) => println!("FAILED the benchmark"),
        Err(e) => println!("FAILED to measure: {e}"),
    }
}

fn measure() -> io::Result<bool> {
    for (path, value) in SETTINGS {
        fs::write(path, value)?;
    }
    setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS)?;
    let mut bench = Command::new("/bench");
    bench.args(["1", "idle"]).env("HVSOCK_BENCH_ONLY", "hvsock");
    Ok(bench.status()?.success())
}
