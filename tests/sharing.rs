//! The places of one VM among its forwards: a noisy one can't lock the others out, and who waits,
//! waits in the backlog.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use common::*;
use hvsock::proxy::{ForwardState, ForwardStatus};
use hvsock::simulate::{Service, Vm};
use hvsock::{Proxy, Rule};

fn echo_vm(directory: &Path) -> Vm {
    let vm = Vm::builder(directory).guest(7, Service::Echo);
    vm.start().unwrap()
}

fn rule(directory: &Path, reserved: usize) -> Rule {
    let mut rule = Rule::new(any_tcp(), hyperkit(directory, 7));
    rule.reserved = reserved;
    rule
}

fn proxy_of(places: usize, rules: Vec<Rule>) -> Proxy {
    let mut config = config(rules);
    config.limits.vm_connections = places;
    Proxy::start(config).unwrap()
}

/// A connection that stays, with its echo heard.
fn held(port: u16) -> TcpStream {
    let mut client = tcp(port);
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    client
}

fn status(proxy: &Proxy, forward: usize) -> ForwardStatus {
    proxy.forwards().swap_remove(forward)
}

fn is_full(proxy: &Proxy, forward: usize) -> bool {
    matches!(status(proxy, forward).state, ForwardState::Full { .. })
}

#[test]
fn a_noisy_forward_can_not_lock_out_one_with_places_of_its_own() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let proxy = proxy_of(10, vec![rule(dir.path(), 0), rule(dir.path(), 2)]);
    let (noisy, docker) = (port_of(&proxy, 0), port_of(&proxy, 1));
    let mut noise: Vec<_> = (0..8).map(|_| held(noisy)).collect();
    let more: Vec<_> = (0..50).map(|_| tcp(noisy)).collect();
    eventually("the noisy one is full", || is_full(&proxy, 0));
    // Those wait where no one has accepted them.
    assert_eq!(status(&proxy, 0).counters.accepted, 8);
    let vm_status = status(&proxy, 0).vm.unwrap();
    let places = (vm_status.connections, vm_status.reserved, vm_status.limit);
    assert_eq!(places, (8, 2, Some(10)));
    let ForwardState::Full { why, .. } = status(&proxy, 0).state else {
        panic!("{:?}", status(&proxy, 0).state);
    };
    assert!(why.contains("reserved for others"), "{why}");
    let one = held(docker);
    assert_eq!(status(&proxy, 1).state, ForwardState::Listening);
    let other = held(docker);
    let third = tcp(docker);
    eventually("all are taken", || is_full(&proxy, 1));
    assert_eq!(vm.counters().peak_slots, 10);
    drop((more, noise.split_off(0), one, other, third));
    eventually("all are gone", || proxy.handle().live() == 0);
    eventually("clients are taken again", || {
        (0..2).all(|forward| status(&proxy, forward).state == ForwardState::Listening)
    });
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn who_waits_in_the_backlog_is_served_as_soon_as_there_is_a_place() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let mut quick = rule(dir.path(), 0);
    // Less than any of them waits: time in the backlog is not counted.
    quick.timeouts.dial = Duration::from_secs(2);
    let proxy = proxy_of(1, vec![quick]);
    let port = port_of(&proxy, 0);
    let first = held(port);
    let begun = Instant::now();
    let mut waiting: Vec<_> = (0..20).map(|_| tcp(port)).collect();
    for client in &mut waiting {
        client.write_all(b"patience").unwrap();
        client.half_close();
    }
    eventually("it is full", || is_full(&proxy, 0));
    while begun.elapsed() < Duration::from_millis(2500) {
        assert_eq!(status(&proxy, 0).counters.accepted, 1);
        std::thread::sleep(Duration::from_millis(10));
    }
    let freed = Instant::now();
    drop(first);
    for client in &mut waiting {
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, b"patience");
    }
    // Twenty looks around, once a second, would take longer.
    assert!(freed.elapsed() < Duration::from_secs(10));
    assert_eq!(status(&proxy, 0).counters.refused, 0);
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn guests_take_places_and_never_wait_for_one() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let target = format!("tcp://{}", server.local_addr().unwrap());
    let from_guest = Rule::new(hyperkit(dir.path(), 1), target.parse().unwrap());
    let proxy = proxy_of(2, vec![rule(dir.path(), 0), from_guest]);
    let guests: Vec<_> = (0..2).map(|_| vm.dial(1).unwrap()).collect();
    let servers: Vec<_> = (0..2).map(|_| server.accept().unwrap()).collect();
    let client = tcp(port_of(&proxy, 0));
    eventually("it is full", || is_full(&proxy, 0));
    assert_eq!(status(&proxy, 1).vm.unwrap().connections, 2);
    // Those beyond are ended at once.
    for _ in 0..2 {
        assert_eq!(vm.dial(1).unwrap().read_to_end(&mut Vec::new()).unwrap(), 0);
    }
    assert_eq!(status(&proxy, 1).state, ForwardState::Listening);
    drop((guests, servers));
    assert_eq!(ask(client, b"now").unwrap(), b"now");
}

#[test]
fn no_more_is_reserved_than_there_is_and_a_removed_forward_gives_it_back() {
    let dir = private_dir();
    let proxy = proxy_of(10, vec![rule(dir.path(), 6)]);
    let handle = proxy.handle();
    let error = handle.add(rule(dir.path(), 5)).unwrap_err().to_string();
    assert!(error.contains("which has 4 left"), "{error}");
    assert_eq!(proxy.forwards().len(), 1);
    handle.add(rule(dir.path(), 4)).unwrap();
    let first = proxy.forwards()[0].id;
    handle.remove(first, Duration::ZERO).unwrap();
    handle.add(rule(dir.path(), 6)).unwrap();
    assert_eq!(status(&proxy, 0).vm.unwrap().reserved, 10);
}

#[test]
fn a_stop_serves_who_waits_in_the_backlog() {
    let dir = private_dir();
    let _vm = echo_vm(dir.path());
    let proxy = proxy_of(1, vec![rule(dir.path(), 0)]);
    let first = held(port_of(&proxy, 0));
    let client = tcp(port_of(&proxy, 0));
    eventually("it is full", || is_full(&proxy, 0));
    proxy.stop(PATIENCE);
    eventually("it is closed", || {
        status(&proxy, 0).state == ForwardState::Closed
    });
    drop(first);
    assert_eq!(ask(client, b"last").unwrap(), b"last");
    proxy.wait().unwrap();
}

#[test]
fn held_clients_that_wait_for_a_place_are_in_nobody_elses_way() {
    let dir = private_dir();
    let mut holding = rule(dir.path(), 0);
    holding.wait = Some(PATIENCE);
    // One place is that of the dials that ask whether a dial was taken.
    let proxy = proxy_of(7, vec![holding, rule(dir.path(), 2)]);
    let mut held_back: Vec<_> = (0..6).map(|_| tcp(port_of(&proxy, 0))).collect();
    eventually("they are held", || status(&proxy, 0).counters.live >= 4);
    let vm = Vm::builder(dir.path()).guest(7, Service::Echo);
    let _vm = vm.start().unwrap();
    for client in &mut held_back[..4] {
        client.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
    }
    let (_one, _other) = (held(port_of(&proxy, 1)), held(port_of(&proxy, 1)));
    held_back.drain(..4);
    for client in held_back {
        assert_eq!(ask(client, b"at last").unwrap(), b"at last");
    }
}

#[test]
fn the_limit_of_all_connections_has_reserved_places_too() {
    let dir = private_dir();
    let _vm = echo_vm(dir.path());
    let mut config = config(vec![rule(dir.path(), 0), rule(dir.path(), 1)]);
    config.limits.connections = 4;
    let proxy = Proxy::start(config).unwrap();
    let noise: Vec<_> = (0..3).map(|_| held(port_of(&proxy, 0))).collect();
    let waiting = tcp(port_of(&proxy, 0));
    eventually("the noisy one is full", || is_full(&proxy, 0));
    let one = held(port_of(&proxy, 1));
    assert_eq!(status(&proxy, 0).counters.live, 3);
    drop((noise, one));
    assert_eq!(ask(waiting, b"now").unwrap(), b"now");
}

/// An echo server without a VM.
fn echo_rule() -> Rule {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let target = format!("tcp://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || std::io::copy(&mut &stream, &mut &stream).map(drop));
        }
    });
    Rule::new(any_tcp(), target.parse().unwrap())
}

#[test]
fn a_forward_without_a_vm_has_places_of_its_own_too() {
    let mut docker = echo_rule();
    docker.reserved = 2;
    let mut config = config(vec![echo_rule(), docker]);
    config.limits.connections = 6;
    let proxy = Proxy::start(config).unwrap();
    let noise: Vec<_> = (0..4).map(|_| held(port_of(&proxy, 0))).collect();
    let waiting = tcp(port_of(&proxy, 0));
    eventually("the noisy one is full", || is_full(&proxy, 0));
    let _two = [held(port_of(&proxy, 1)), held(port_of(&proxy, 1))];
    // What it gives up is everybody's.
    let mut rule = status(&proxy, 1).rule;
    rule.reserved = 0;
    proxy.handle().replace(status(&proxy, 1).id, rule).unwrap();
    drop(noise);
    assert_eq!(ask(waiting, b"now").unwrap(), b"now");
}

#[test]
fn a_forward_has_no_more_connections_than_it_may_and_its_clients_wait() {
    let mut noisy = echo_rule();
    noisy.connections = Some(3);
    let proxy = Proxy::start(config(vec![noisy, echo_rule()])).unwrap();
    let port = port_of(&proxy, 0);
    let mut noise: Vec<_> = (0..3).map(|_| held(port)).collect();
    let waiting = tcp(port);
    eventually("it is full", || is_full(&proxy, 0));
    let ForwardState::Full { why, .. } = status(&proxy, 0).state else {
        panic!("{:?}", status(&proxy, 0).state);
    };
    assert!(why.contains("this forward has 3 connections open"), "{why}");
    assert_eq!(status(&proxy, 0).counters.accepted, 3);
    let _others: Vec<_> = (0..10).map(|_| held(port_of(&proxy, 1))).collect();
    drop(noise.pop());
    assert_eq!(ask(waiting, b"now").unwrap(), b"now");
    // It can be given more, and fewer: those who are there stay.
    noise.push(held(port));
    let waiting = tcp(port);
    eventually("it is full", || is_full(&proxy, 0));
    let (handle, id) = (proxy.handle(), status(&proxy, 0).id);
    let bounded = |most| {
        let mut rule = status(&proxy, 0).rule;
        rule.connections = most;
        handle.replace(id, rule)
    };
    bounded(None).unwrap();
    assert_eq!(ask(waiting, b"more").unwrap(), b"more");
    bounded(Some(1)).unwrap();
    let waiting = tcp(port);
    eventually("it is full", || is_full(&proxy, 0));
    drop(noise);
    assert_eq!(ask(waiting, b"last").unwrap(), b"last");
    let error = bounded(Some(0)).unwrap_err().to_string();
    assert!(error.contains("no connection at all"), "{error}");
}
