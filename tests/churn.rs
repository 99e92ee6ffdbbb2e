//! Forwards that come and go under traffic: alone in its process, for it counts descriptors.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::*;
use hvsock::address::Address;
use hvsock::{Proxy, Rule};

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

#[test]
fn traffic_notices_nothing_and_nothing_is_left() {
    let dir = private_dir();
    let path = dir.path().join("echo");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || io::copy(&mut &stream, &mut &stream).map(drop));
        }
    });
    let proxy = Proxy::start(config(Vec::new())).unwrap();
    let handle = proxy.handle();
    let add = || {
        let id = handle.add(Rule::new(any_tcp(), unix(&path))).unwrap();
        let forwards = handle.forwards();
        match &forwards.iter().find(|it| it.id == id).unwrap().listen {
            Address::Tcp(tcp) => (id, tcp.port),
            other => panic!("{other}"),
        }
    };
    let (_, port) = add();
    let over = Arc::new(AtomicBool::new(false));
    let traffic: Vec<_> = (0..4)
        .map(|n| {
            let over = Arc::clone(&over);
            thread::spawn(move || {
                let mut trips = 0;
                while !over.load(Ordering::Relaxed) {
                    let bytes = pattern(10_000 + n);
                    assert!(ask(tcp(port), &bytes).unwrap() == bytes);
                    trips += 1;
                }
                trips
            })
        })
        .collect();
    let mut before = None;
    for round in 0..50 {
        let (id, port) = add();
        let bytes = pattern(1000);
        assert!(ask(tcp(port), &bytes).unwrap() == bytes);
        let mut idle = tcp(port);
        idle.write_all(b"x").unwrap();
        idle.read_exact(&mut [0]).unwrap();
        handle.remove(id, Duration::ZERO).unwrap();
        drop(idle);
        if round == 5 {
            before = Some(descriptors());
        }
    }
    over.store(true, Ordering::Relaxed);
    for thread in traffic {
        assert!(thread.join().unwrap() > 0);
    }
    eventually("all is closed", || handle.live() == 0);
    // The traffic had some of them then.
    eventually("descriptors are given back", || {
        descriptors() <= before.unwrap()
    });
}
