//! Clients that are held while their target isn't there yet.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use common::*;
use hvsock::address::Address;
use hvsock::proxy::{ConnectionState, Counters, ForwardState};
use hvsock::simulate::{Service, Vm};
use hvsock::{Proxy, Rule};
use socket2::{Domain, SockAddr, SockRef, Socket, Type};

fn vm(directory: &Path, services: &[(u32, Service)]) -> Vm {
    let builder = Vm::builder(directory).strict(true);
    let services = services.iter().cloned();
    let builder = services.fold(builder, |builder, (port, it)| builder.guest(port, it));
    builder.start().unwrap()
}

fn waiting(connect: Address, wait: Duration) -> Proxy {
    let mut rule = Rule::new(any_tcp(), connect);
    rule.wait = Some(wait);
    Proxy::start(config(vec![rule])).unwrap()
}

fn counters(proxy: &Proxy) -> Counters {
    proxy.forwards()[0].counters
}

fn assert_well(vm: &Vm) {
    let none_left = vm.wait_for(PATIENCE, |counters| counters.live_slots == 0);
    assert!(none_left, "{:?}", vm.counters());
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

/// Waits until so many clients were accepted.
fn accepted(proxy: &Proxy, count: u64) {
    eventually("they are accepted", || counters(proxy).accepted == count);
}

#[test]
fn a_client_is_held_until_its_vm_is_up_whatever_it_does_meanwhile() {
    let dir = private_dir();
    let proxy = waiting(hyperkit(dir.path(), 7), PATIENCE);
    let port = port_of(&proxy, 0);
    thread::scope(|scope| {
        let silent = scope.spawn(move || ask(tcp(port), b"").unwrap());
        let bytes = pattern(300_000);
        let talking = scope.spawn(move || (ask(tcp(port), &bytes).unwrap() == bytes, bytes));
        let slow = scope.spawn(move || {
            let mut client = tcp(port);
            let mut hello = [0; 5];
            client.write_all(b"hello").unwrap();
            client.read_exact(&mut hello).unwrap();
            ask(client, b" and goodbye").unwrap()
        });
        accepted(&proxy, 3);
        thread::sleep(Duration::from_secs(1));
        assert_eq!(counters(&proxy).live, 3);
        let vm = vm(dir.path(), &[(7, Service::Echo)]);
        assert_eq!(silent.join().unwrap(), b"");
        assert!(talking.join().unwrap().0);
        assert_eq!(slow.join().unwrap(), b" and goodbye");
        assert_well(&vm);
    });
    let counters = counters(&proxy);
    assert_eq!((counters.accepted, counters.refused), (3, 0));
}

#[test]
fn a_guest_that_refuses_gets_nothing_of_what_is_held() {
    let dir = private_dir();
    let proxy = waiting(hyperkit(dir.path(), 7), PATIENCE);
    let booting = vm(dir.path(), &[(8, Service::Echo)]);
    let mut client = tcp(port_of(&proxy, 0));
    client.write_all(b"precious").unwrap();
    client.half_close();
    assert!(booting.wait_for(PATIENCE, |counters| counters.refused >= 6));
    assert_eq!(booting.counters().bytes_to_guest, 0);
    assert_well(&booting);
    drop(booting);
    let vm = vm(dir.path(), &[(7, Service::Echo)]);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"precious");
    assert_well(&vm);
    assert_eq!(counters(&proxy).refused, 0);
}

#[test]
fn a_service_that_speaks_first_and_one_that_says_nothing_are_no_refusals() {
    let dir = private_dir();
    let greeting = Service::custom(|mut guest| {
        guest.write_all(b"220 hello\r\n").unwrap();
        let mut rest = Vec::new();
        guest.read_to_end(&mut rest).unwrap();
        guest.write_all(&rest).unwrap();
    });
    // It takes the connection, has nothing to say, and ends when it is told to: at once, and nobody
    // could tell it from a refusal.
    let (end, told) = mpsc::channel::<()>();
    let told = Arc::new(Mutex::new(told));
    let mute = Service::custom(move |guest| {
        told.lock().unwrap().recv_timeout(PATIENCE).unwrap();
        drop(guest);
    });
    let vm = vm(dir.path(), &[(25, greeting), (9, mute)]);
    let proxy = waiting(hyperkit(dir.path(), 25), PATIENCE);
    let answer = ask(tcp(port_of(&proxy, 0)), b"QUIT").unwrap();
    assert_eq!(answer, b"220 hello\r\nQUIT");
    let proxy_of_mute = waiting(hyperkit(dir.path(), 9), PATIENCE);
    for _ in 0..20 {
        let mut client = tcp(port_of(&proxy_of_mute, 0));
        eventually("the guest has taken it", || {
            let all = proxy_of_mute.handle().connections();
            all.iter().any(|it| it.state == ConnectionState::Open)
        });
        end.send(()).unwrap();
        assert_eq!(client.read_to_end(&mut Vec::new()).unwrap(), 0);
        drop(client);
        eventually("it is over", || counters(&proxy_of_mute).live == 0);
    }
    assert_eq!(counters(&proxy_of_mute).refused, 0);
    assert_well(&vm);
}

#[test]
fn who_was_held_in_vain_is_refused_with_the_last_reason() {
    let dir = private_dir();
    let wait = Duration::from_millis(400);
    let proxy = waiting(hyperkit(dir.path(), 7), wait);
    let refused = |what: &str| {
        let begun = Instant::now();
        assert!(resets_clients(port_of(&proxy, 0)), "{what}");
        assert!(begun.elapsed() >= wait, "{what}: {:?}", begun.elapsed());
        let error = proxy.forwards()[0].last_error.clone().unwrap();
        assert!(error.text.contains(what), "{}", error.text);
    };
    refused("the VM is not running");
    let vm = vm(dir.path(), &[]);
    refused("vsock port 7 (0x7)?");
    vm.pause();
    refused("is it booting, paused or asleep?");
    vm.resume();
    assert_well(&vm);
    let refusals = counters(&proxy).refusals;
    let by_reason = (refusals.absent, refusals.by_target, refusals.dial_timeout);
    assert_eq!(by_reason, (1, 1, 1), "{refusals:?}");
}

#[test]
fn a_guest_that_is_silent_is_not_sent_to_before_it_has_answered() {
    let dir = private_dir();
    let vm = vm(dir.path(), &[(7, Service::Echo)]);
    let proxy = waiting(hyperkit(dir.path(), 7), PATIENCE);
    vm.pause();
    let clients: Vec<_> = (0..20_u8)
        .map(|n| {
            let mut client = tcp(port_of(&proxy, 0));
            client.write_all(&[n; 1000]).unwrap();
            client.half_close();
            client
        })
        .collect();
    // They, and one that asks for all of them.
    assert!(vm.wait_for(PATIENCE, |counters| counters.unanswered >= 21));
    assert_eq!(proxy.forwards()[0].vm.as_ref().unwrap().unanswered, 21);
    let before = vm.counters().bytes_to_guest;
    assert_eq!((before, vm.counters().unanswered), (0, 21));
    vm.resume();
    for (n, mut client) in (0..).zip(clients) {
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, [n; 1000]);
    }
    assert_well(&vm);
}

#[test]
fn who_leaves_while_held_leaves_nothing_behind() {
    let dir = private_dir();
    let proxy = waiting(hyperkit(dir.path(), 7), PATIENCE * 10);
    let leave = |client: std::net::TcpStream| {
        // A reset: what an end alone says may be a half-close.
        let no_time = Some(Duration::ZERO);
        SockRef::from(&client).set_linger(no_time).unwrap();
    };
    let client = tcp(port_of(&proxy, 0));
    accepted(&proxy, 1);
    leave(client);
    eventually("the VM is not there", || counters(&proxy).live == 0);
    let vm = vm(dir.path(), &[(7, Service::Echo)]);
    vm.pause();
    let client = tcp(port_of(&proxy, 0));
    assert!(vm.wait_for(PATIENCE, |counters| counters.unanswered == 2));
    leave(client);
    vm.resume();
    eventually("the guest is silent", || counters(&proxy).live == 0);
    assert_well(&vm);
    assert_eq!(proxy.forwards()[0].vm.as_ref().unwrap().connections, 0);
}

#[test]
fn a_stop_cuts_off_who_is_held() {
    let dir = private_dir();
    let proxy = waiting(hyperkit(dir.path(), 7), PATIENCE * 10);
    let mut absent = tcp(port_of(&proxy, 0));
    accepted(&proxy, 1);
    let vm = vm(&dir.path().join("other"), &[]);
    vm.pause();
    let handle = proxy.handle();
    let mut rule = Rule::new(any_tcp(), hyperkit(vm.directory(), 7));
    rule.wait = Some(PATIENCE * 10);
    handle.add(rule).unwrap();
    let mut silent = tcp(port_of(&proxy, 1));
    assert!(vm.wait_for(PATIENCE, |counters| counters.unanswered == 2));
    proxy.stop(Duration::ZERO);
    assert!(is_reset(absent.read(&mut [0])));
    assert!(is_reset(silent.read(&mut [0])));
    vm.resume();
    proxy.wait().unwrap();
    assert_well(&vm);
}

#[test]
fn where_nothing_can_be_asked_silence_has_to_do() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path())
        .guest(7, Service::Echo)
        .guest_forwards(&[7, 8])
        .start()
        .unwrap();
    std::fs::remove_file(dir.path().join("connect")).unwrap();
    let proxy = waiting(hyperkit(dir.path(), 7), PATIENCE);
    assert_eq!(ask(tcp(port_of(&proxy, 0)), b"there").unwrap(), b"there");
    let refusing = waiting(hyperkit(dir.path(), 8), Duration::from_millis(300));
    assert!(resets_clients(port_of(&refusing, 0)));
    assert!(vm.counters().refused > 1, "{:?}", vm.counters());
    assert_well(&vm);
}

#[test]
fn one_place_is_enough_and_many_clients_share_the_asking() {
    let dir = private_dir();
    let vm = vm(dir.path(), &[(7, Service::Echo)]);
    for places in [1, 8] {
        let mut rule = Rule::new(any_tcp(), hyperkit(dir.path(), 7));
        rule.wait = Some(PATIENCE);
        let mut config = config(vec![rule]);
        config.limits.vm_connections = places;
        let proxy = Proxy::start(config).unwrap();
        thread::scope(|scope| {
            for _ in 0..100 {
                let client = tcp(port_of(&proxy, 0));
                scope.spawn(|| assert_eq!(ask(client, b"in turn").unwrap(), b"in turn"));
            }
        });
        let peak = vm.counters().peak_slots;
        assert!(peak <= places.max(2) as u64, "{:?}", vm.counters());
    }
    assert_well(&vm);
}

#[test]
fn targets_of_other_families_are_waited_for_as_well() {
    let dir = private_dir();
    let serve = |mut stream: std::os::unix::net::UnixStream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&all).unwrap();
    };
    let path = dir.path().join("late.sock");
    let proxy = waiting(unix(&path), PATIENCE);
    let client = tcp(port_of(&proxy, 0));
    accepted(&proxy, 1);
    let asking = thread::spawn(move || ask(client, b"unix").unwrap());
    let listener = UnixListener::bind(&path).unwrap();
    serve(listener.accept().unwrap().0);
    assert_eq!(asking.join().unwrap(), b"unix");

    // Bound, so that the port is ours, and not listening yet.
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    socket.bind(&SockAddr::from(any)).unwrap();
    let target = socket.local_addr().unwrap().as_socket().unwrap();
    let proxy = waiting(format!("tcp://{target}").parse().unwrap(), PATIENCE);
    let client = tcp(port_of(&proxy, 0));
    accepted(&proxy, 1);
    let asking = thread::spawn(move || ask(client, b"tcp").unwrap());
    socket.listen(16).unwrap();
    let (mut server, _) = std::net::TcpListener::from(socket).accept().unwrap();
    let mut all = Vec::new();
    server.read_to_end(&mut all).unwrap();
    server.write_all(&all).unwrap();
    drop(server);
    assert_eq!(asking.join().unwrap(), b"tcp");
    assert_eq!(proxy.forwards()[0].state, ForwardState::Listening);
}

#[test]
fn rude_clients_that_are_held_do_not_hurt_the_vm() {
    let dir = private_dir();
    let vm = vm(dir.path(), &[(7, Service::Echo)]);
    // Nobody listens on port 8.
    let rules = [7, 8].map(|port| {
        let mut rule = Rule::new(any_tcp(), hyperkit(dir.path(), port));
        rule.wait = Some(Duration::from_millis(300));
        rule
    });
    let proxy = Proxy::start(config(rules.to_vec())).unwrap();
    let mut random = fastrand::Rng::with_seed(7);
    for round in 0..10 {
        if round % 3 == 0 {
            vm.pause();
        }
        let mut clients = Vec::new();
        for _ in 0..40 {
            let mut client = tcp(port_of(&proxy, random.usize(..2)));
            // It may have been refused by now.
            if random.bool() {
                let _ = client.write_all(b"something");
            }
            if random.bool() {
                let _ = client.shutdown(std::net::Shutdown::Write);
            }
            if random.bool() {
                let no_time = Some(Duration::ZERO);
                SockRef::from(&client).set_linger(no_time).unwrap();
            }
            if random.bool() {
                clients.push(client);
            }
        }
        random.shuffle(&mut clients);
        vm.resume();
        drop(clients);
    }
    eventually("all have gone", || proxy.handle().live() == 0);
    assert_well(&vm);
    assert_eq!(ask(tcp(port_of(&proxy, 0)), b"well").unwrap(), b"well");
}
