//! The slots of a VM's device: what its guest dials, what drains, and what is lost take no more of
//! them than their part.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use command::*;
use common::*;
use hvsock::proxy::VmStatus;
use hvsock::simulate::{Service, Vm};
use hvsock::{Proxy, Rule};

fn echo_vm(directory: &Path) -> Vm {
    let vm = Vm::builder(directory).guest(7, Service::Echo);
    vm.start().unwrap()
}

fn vm_of(proxy: &Proxy) -> VmStatus {
    proxy.forwards()[0].vm.clone().unwrap()
}

/// A target that takes connections and never reads or ends one, and its address.
fn hanging_target() -> (TcpListener, String) {
    let target = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", target.local_addr().unwrap());
    (target, address)
}

/// Reads to the EOF.
fn read_end(guest: &mut UnixStream) {
    guest.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut rest = Vec::new();
    guest.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
}

#[test]
fn a_target_that_hangs_takes_no_more_than_its_share_of_what_a_guest_dials() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let (target, address) = hanging_target();
    let to_guest = Rule::new(any_tcp(), hyperkit(dir.path(), 7));
    let hanging = Rule::new(hyperkit(dir.path(), 1), address.parse().unwrap());
    let mut config = config(vec![to_guest, hanging]);
    config.limits.vm_connections = 18;
    let proxy = Proxy::start(config).unwrap();
    let mut served = Vec::new();
    let begun = Instant::now();
    // A hundred a second.
    for n in 0..200 {
        let due = begun + n * Duration::from_millis(10);
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let mut guest = vm.dial(1).unwrap();
        if served.len() < 16 {
            served.push(guest);
            let taken = served.len();
            eventually("it is served", || vm_of(&proxy).guests == taken);
        } else {
            // Sooner than by any timeout.
            read_end(&mut guest);
        }
    }
    let status = vm_of(&proxy);
    assert_eq!((status.guests, status.guest_limit), (16, Some(16)));
    assert_eq!(status.turned_away, 184);
    let counters = proxy.forwards()[1].counters;
    assert_eq!((counters.accepted, counters.refusals.full), (200, 184));
    // Those of the host find slots, and the device has had some left all the time.
    let client = tcp(port_of(&proxy, 0));
    assert_eq!(ask(client, b"host to guest").unwrap(), b"host to guest");
    assert!(vm.counters().peak_slots <= 24, "{:?}", vm.counters());
    assert_eq!(vm.counters().guest_dials_failed, 0);
    // The target ends them, and hangs again.
    served.iter().for_each(|_| drop(target.accept().unwrap()));
    served.iter_mut().for_each(read_end);
    drop(served);
    eventually("all have ended", || vm_of(&proxy).connections == 0);
    let _again = vm.dial(1).unwrap();
    eventually("it is served", || vm_of(&proxy).guests == 1);
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

/// However many they are, one line of the log says so.
#[test]
fn that_a_guest_dials_too_much_is_said_once() {
    let dir = private_dir();
    let state = dir.path().join("vm");
    let vm = echo_vm(&state);
    let (_target, address) = hanging_target();
    let remote = format!("1:{}", address.strip_prefix("tcp://").unwrap());
    let arguments = ["expose", "--vm", text(&state), "-R", &remote];
    let limits = ["--vm-connections=9", "--grace=0"];
    let mut hvsock = Running::start(&[&arguments[..], &limits].concat());
    hvsock.says("guest, to CID 2");
    let _served: Vec<_> = (0..8).map(|_| vm.dial(1).unwrap()).collect();
    for _ in 0..20 {
        read_end(&mut vm.dial(1).unwrap());
    }
    hvsock.signal("TERM");
    assert_eq!(hvsock.exit_code(), Some(0));
    let said: Vec<String> = hvsock.err.iter().collect();
    let about = |line: &&String| line.contains("dials more than can be served");
    assert_eq!(said.iter().filter(about).count(), 1, "{said:#?}");
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn a_rule_bounds_what_a_guest_dials() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let (target, address) = hanging_target();
    let mut rule = Rule::new(hyperkit(dir.path(), 1), address.parse().unwrap());
    rule.connections = Some(2);
    let proxy = Proxy::start(config(vec![rule])).unwrap();
    let mut guests: Vec<_> = (0..2).map(|_| vm.dial(1).unwrap()).collect();
    eventually("they are served", || vm_of(&proxy).guests == 2);
    read_end(&mut vm.dial(1).unwrap());
    let error = proxy.forwards()[0].last_error.clone().unwrap().text;
    assert!(
        error.contains("this forward has 2 connections open"),
        "{error}"
    );
    drop(target.accept().unwrap());
    read_end(&mut guests.remove(0));
    eventually("one has ended", || vm_of(&proxy).guests == 1);
    guests.push(vm.dial(1).unwrap());
    eventually("the next is served", || vm_of(&proxy).guests == 2);
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

/// Sends for ever, and takes no notice of an EOF.
fn sends_on(mut guest: UnixStream) {
    while guest.write_all(&[7; 65_536]).is_ok() {}
}

#[test]
fn clients_that_cancel_endless_downloads_leave_slots_to_others() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path())
        .guest(7, Service::Echo)
        .guest(9, Service::custom(sends_on))
        .start()
        .unwrap();
    let rule = |port| Rule::new(any_tcp(), hyperkit(dir.path(), port));
    let mut config = config(vec![rule(7), rule(9)]);
    config.limits.vm_connections = 40;
    let proxy = Proxy::start(config).unwrap();
    let downloads = port_of(&proxy, 1);
    let (stop, cancelled) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
    let rude: Vec<_> = (0..64)
        .map(|_| {
            let (stop, cancelled) = (Arc::clone(&stop), Arc::clone(&cancelled));
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    // Its turn may be long in coming.
                    if tcp(downloads).read_exact(&mut [0; 1000]).is_ok() {
                        cancelled.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })
        })
        .collect();
    eventually("there are as many as there can be", || {
        cancelled.load(Ordering::Relaxed) > 40
    });
    for _ in 0..10 {
        let client = tcp(port_of(&proxy, 0));
        assert_eq!(ask(client, b"polite").unwrap(), b"polite");
    }
    stop.store(true, Ordering::Relaxed);
    for client in rude {
        client.join().unwrap();
    }
    eventually("all are given up", || vm.counters().live_slots == 0);
    eventually("all slots are back", || vm_of(&proxy).connections == 0);
    // They were told, and so none is lost.
    assert_eq!(vm_of(&proxy).lost, 0);
    assert!(proxy.forwards()[1].counters.abandoned > 0);
    assert!(vm.counters().peak_slots <= 40, "{:?}", vm.counters());
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn a_drain_of_a_guest_that_sends_on_costs_little_and_ends_soon() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path())
        .guest(9, Service::custom(sends_on))
        .start()
        .unwrap();
    let proxy = proxy(any_tcp(), hyperkit(dir.path(), 9));
    tcp(port_of(&proxy, 0)).read_exact(&mut [0; 1000]).unwrap();
    eventually("it is drained", || {
        let connections = proxy.handle().connections();
        connections
            .iter()
            .all(|it| it.state == hvsock::proxy::ConnectionState::Closing)
    });
    let begun = Instant::now();
    eventually("it is given up", || vm.counters().live_slots == 0);
    // The drain timeout is a minute.
    assert!(begun.elapsed() < PATIENCE);
    // At full speed this were gigabytes.
    let moved = vm.counters().bytes_to_host;
    assert!(moved < 200_000_000, "{moved} bytes were read in vain");
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

/// A program in the guest that heeds no EOF, and ends when it is told to.
#[test]
fn a_slot_is_lost_only_until_the_guest_ends_the_connection() {
    let dir = private_dir();
    let (served, guests) = std::sync::mpsc::channel();
    let served = std::sync::Mutex::new(served);
    let vm = Vm::builder(dir.path())
        .guest(
            9,
            Service::custom(move |guest| served.lock().unwrap().send(guest).unwrap()),
        )
        .start()
        .unwrap();
    let (target, address) = hanging_target();
    let mut rules = vec![
        Rule::new(any_tcp(), hyperkit(dir.path(), 9)),
        Rule::new(hyperkit(dir.path(), 1), address.parse().unwrap()),
    ];
    for rule in &mut rules {
        rule.timeouts.half_closed = Some(Duration::from_millis(100));
        rule.timeouts.drain = Duration::from_millis(200);
    }
    let mut config = config(rules);
    config.limits.vm_connections = 10;
    let proxy = Proxy::start(config).unwrap();
    let mut open: Vec<UnixStream> = Vec::new();
    for n in 1..=4 {
        let mut client = tcp(port_of(&proxy, 0));
        client.write_all(b"x").unwrap();
        open.push(guests.recv_timeout(PATIENCE).unwrap());
        drop(client);
        eventually("its slot is lost", || vm_of(&proxy).lost == n);
    }
    // One that the guest has dialled, whose target is gone.
    open.push(vm.dial(1).unwrap());
    drop(target.accept().unwrap());
    eventually("its slot is lost as well", || vm_of(&proxy).lost == 5);
    eventually("the connections have ended", || {
        let forwards = proxy.forwards();
        let live = |it: &hvsock::proxy::ForwardStatus| it.counters.live;
        forwards.iter().all(|it| live(it) == 0) && vm_of(&proxy).connections == 0
    });
    assert_eq!(vm_of(&proxy).guests, 0);
    assert_eq!(proxy.handle().connections().len(), 0);
    assert_eq!(proxy.handle().ended().len(), 5);
    assert_eq!(vm.counters().live_slots, 5);
    // One that sends is told that nobody is there, as soon as it sends again.
    open[0].write_all(b"still here").unwrap();
    eventually("its slot is given up", || vm_of(&proxy).lost == 4);
    eventually("the device has the slot again", || {
        let _ = open[0].write_all(b"and here");
        vm.counters().live_slots == 4
    });
    drop(open.remove(0));
    for left in (0..4usize).rev() {
        drop(open.pop());
        eventually("the device has the slot again", || {
            vm.counters().live_slots == left as u64
        });
        eventually("and so have we", || vm_of(&proxy).lost == left);
    }
    assert_eq!(vm_of(&proxy).connections, 0);
    assert_eq!(proxy.forwards()[0].counters.abandoned, 4);
    assert_eq!(vm.fate(), None);
}

/// What the command line says of them, in each of its ways.
#[test]
fn lost_slots_are_shown_and_come_back_with_another_vm() {
    let dir = private_dir();
    let state = dir.path().join("vm");
    let start = || {
        let vm = Vm::builder(&state).guest(7, Service::Echo);
        vm.guest(9, Service::Silent).start().unwrap()
    };
    let vm = start();
    let control = text(&dir.path().join("c")).to_owned();
    let uri = format!("hyperkit://:9{}", text(&state));
    let hvsock = Running::start(&[
        "forward",
        "tcp://127.0.0.1:0",
        &uri,
        "--half-closed-timeout=100ms",
        "--drain-timeout=200ms",
        "--vm-connections=10",
        &format!("--control={control}"),
        "--metrics=0",
    ]);
    hvsock.says("controlled at unix:///");
    let place = hvsock.says("metrics at http://127.0.0.1:");
    let metrics = place.rsplit_once(':').unwrap().1;
    let metrics: u16 = metrics.strip_suffix("/metrics").unwrap().parse().unwrap();
    let port = hvsock.tcp_port();
    let scraped = || {
        let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        let mut client = tcp(metrics);
        client.write_all(request).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer
    };
    let said = |words: &[&str]| {
        let control = format!("--control={control}");
        let output = run(&[words, &[&control]].concat());
        String::from_utf8(output.stdout).unwrap()
    };
    let lost = |count: usize| {
        scraped().contains(&format!(
            "hvsock_vm_lost_slots{{vm=\"{}\"}} {count}\n",
            text(&state)
        ))
    };
    assert!(lost(0));
    // It is sent something, and never ends.
    for _ in 0..3 {
        let mut client = tcp(port);
        client.write_all(b"x").unwrap();
        drop(client);
    }
    eventually("the slots are lost", || lost(3));
    hvsock.complains("their slots are lost until it ends them or the VM is restarted");
    assert_eq!(vm.counters().live_slots, 3);
    assert!(
        said(&["status"]).contains("3 slots lost"),
        "{}",
        said(&["status"])
    );
    let json: serde_json::Value = serde_json::from_str(&said(&["status", "--json"])).unwrap();
    assert_eq!(json["forwards"][0]["vm"]["lost"], 3);
    let doctor = said(&["doctor", "--vm", text(&state)]);
    assert!(
        doctor.contains("3 slots lost") && doctor.contains("restart the VM"),
        "{doctor}"
    );
    drop(vm);
    let _vm = start();
    eventually("they are back", || lost(0));
    assert!(!said(&["status"]).contains("lost"), "{}", said(&["status"]));
    let doctor = said(&["doctor", "--vm", text(&state)]);
    assert!(doctor.contains("0 of 10 slots"), "{doctor}");
}

/// The keepalive timers of this process' sockets with that port at one end, in hundredths of a
/// second.
#[cfg(target_os = "linux")]
fn keepalive_timers(port: u16) -> Vec<Option<u64>> {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let rows = table.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let port_in = |field: &str| u16::from_str_radix(field.rsplit(':').next()?, 16).ok();
        let is_open = fields[3] == "01";
        let ports = [port_in(fields[1])?, port_in(fields[2])?];
        let (kind, when) = fields[5].split_once(':')?;
        let timer = (kind == "02").then(|| u64::from_str_radix(when, 16).unwrap());
        (is_open && ports.contains(&port)).then_some(timer)
    });
    rows.collect()
}

#[cfg(target_os = "linux")]
#[test]
fn clients_and_targets_are_asked_whether_they_are_still_there() {
    let target = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", target.local_addr().unwrap());
    for (keepalive, most) in [
        (Some(Duration::from_secs(60)), 6_000),
        (Some(Duration::from_secs(7_000)), 700_000),
        (None, 0),
    ] {
        let mut rule = Rule::new(any_tcp(), address.parse().unwrap());
        assert_eq!(rule.keepalive, Some(Duration::from_secs(60)));
        rule.keepalive = keepalive;
        let proxy = Proxy::start(config(vec![rule])).unwrap();
        let mut client = tcp(port_of(&proxy, 0));
        client.write_all(b"x").unwrap();
        let mut server = target.accept().unwrap().0;
        server.read_exact(&mut [0]).unwrap();
        for port in [port_of(&proxy, 0), target.local_addr().unwrap().port()] {
            // One is the proxy's, of the two ends.
            let timers = || -> Vec<u64> { keepalive_timers(port).into_iter().flatten().collect() };
            let is_so = || match (timers().as_slice(), keepalive) {
                (timers, None) => timers.is_empty(),
                ([timer], Some(_)) => (most * 9 / 10..=most).contains(timer),
                _ => false,
            };
            eventually("the timer is as the rule says", is_so);
        }
        drop((client, server, proxy));
    }
}

/// A device without a slot ends a dial at once. A program that doesn't listen looks the same, or
/// nearly, and nobody is told that it was that.
#[test]
#[cfg(target_os = "linux")]
fn clients_that_find_no_slot_are_told_the_same_whether_they_speak_or_not() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path()).guest(7, Service::Echo).slots(3);
    let vm = vm.start().unwrap();
    let local = dir.path().join("local");
    let proxy = proxy(unix(&local), hyperkit(dir.path(), 7));
    let _held: Vec<_> = (0..3).map(|_| unix_client(&local)).collect();
    eventually("all slots are taken", || vm.counters().live_slots == 3);
    for n in 0..40 {
        let mut client = unix_client(&local);
        let kind = n % 4;
        // The proxy may have ended it already.
        let _ = match kind {
            0 => Ok(()),
            1 => client.shutdown(std::net::Shutdown::Write),
            2 => client.write_all(b"a request"),
            _ => client.write_all(&[b'x'; 100_000]),
        };
        let _ = client.read(&mut [0; 1]);
        eventually("it has ended", || proxy.handle().ended().len() == n + 1);
        let ended = proxy.handle().ended().pop().unwrap();
        let why = ended.error.as_deref().unwrap_or_default();
        let is_right = why.contains("are all slots of the VM taken");
        assert!(is_right, "client {n}, of kind {kind}: {why:?}");
        let last = proxy.forwards()[0].last_error.clone().unwrap().text;
        assert_eq!(*last, *why);
    }
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}
