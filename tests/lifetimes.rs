//! What a proxy that runs for months sees: VMs that go and come back, connections on which nothing
//! moves.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use command::*;
use common::*;
use hvsock::address::Address;
use hvsock::proxy::{Counters, VmStatus};
use hvsock::simulate::{Service, Vm};
use hvsock::{Proxy, Rule};

fn echo_vm(directory: &Path) -> Vm {
    let vm = Vm::builder(directory).guest(7, Service::Echo);
    vm.start().unwrap()
}

#[test]
fn of_a_vm_that_goes_and_comes_back_two_lines_are_said() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let proxy = Running::start(&[
        "expose",
        "--vm",
        text(dir.path()),
        "-L",
        "0:7",
        "-L",
        "0:7",
        "-L",
        "0:8",
    ]);
    let ports = [proxy.tcp_port(), proxy.tcp_port(), proxy.tcp_port()];
    assert_eq!(ask(tcp(ports[0]), b"up").unwrap(), b"up");
    drop(vm);
    for port in [ports; 5].concat() {
        assert!(resets_clients(port));
    }
    let gone = proxy.complains("the VM at");
    // It may also have been seen before a client came.
    assert!(
        gone.contains("is gone; ") || gone.contains("is gone: ") && gone.contains("is not running"),
        "{gone}"
    );
    assert!(
        gone.contains("clients are refused until it is back"),
        "{gone}"
    );
    let vm = echo_vm(dir.path());
    // Nobody dials it.
    let back = proxy.err.recv_timeout(PATIENCE).unwrap();
    assert!(back.contains("is back after"), "{back}");
    assert_eq!(ask(tcp(ports[1]), b"again").unwrap(), b"again");
    drop(vm);
    let _vm = echo_vm(dir.path());
    let anew = proxy.err.recv_timeout(PATIENCE).unwrap();
    if anew.contains("is gone") {
        // It was looked at between the two.
        proxy.complains("is back after");
    } else {
        assert!(anew.contains("was started anew"), "{anew}");
    }
    assert_eq!(ask(tcp(ports[1]), b"anew").unwrap(), b"anew");
    // What a guest refuses is told of as ever.
    assert!(resets_clients(ports[2]));
    let refused = proxy.err.recv_timeout(PATIENCE).unwrap();
    assert!(refused.contains("refused a client"), "{refused}");
}

#[test]
fn a_vm_under_traffic_that_is_started_anew_is_told_of_once() {
    let dir = private_dir();
    let mut vm = Some(echo_vm(dir.path()));
    let proxy = Running::start(&["expose", "--vm", text(dir.path()), "-L", "0:7"]);
    let port = proxy.tcp_port();
    for restarts in 1..=3 {
        let mut said: Vec<String> = Vec::new();
        let [up, down] = &[AtomicUsize::new(0), AtomicUsize::new(0)];
        thread::scope(|scope| {
            let clients = (0..4).map(|_| {
                scope.spawn(move || {
                    assert_eq!(ask(tcp(port), b"up").unwrap(), b"up");
                    up.fetch_add(1, Ordering::SeqCst);
                    let mut failed = false;
                    let end = Instant::now() + PATIENCE;
                    // Until the VM is gone for this one, and there again.
                    loop {
                        assert!(Instant::now() < end, "it doesn't come back");
                        // The reset of a refusal may come before the connect is over.
                        let client = TcpStream::connect(("127.0.0.1", port));
                        let answer = client.and_then(|client| {
                            client.set_read_timeout(Some(PATIENCE))?;
                            echoes(client)
                        });
                        let went = answer.is_ok_and(|answer| answer == *b"x");
                        if went && failed {
                            return;
                        }
                        if !went && !failed {
                            failed = true;
                            down.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                })
            });
            let clients: Vec<_> = clients.collect();
            eventually("all have seen it", || up.load(Ordering::SeqCst) == 4);
            drop(vm.take());
            // (For a moment after it has come back nobody is told that it is gone again.)
            eventually("all miss it", || {
                said.extend(proxy.err.try_iter());
                let told = said.iter().any(|line| line.contains("is gone"));
                told && down.load(Ordering::SeqCst) == 4
            });
            vm = Some(echo_vm(dir.path()));
            for client in clients {
                client.join().unwrap();
            }
        });
        eventually("it is back", || {
            said.extend(proxy.err.try_iter());
            said.iter().any(|line| line.contains("is back after"))
        });
        let count = |what: &str| said.iter().filter(|line| line.contains(what)).count();
        let counts = (
            count("is gone"),
            count("is back after"),
            count("started anew"),
        );
        assert_eq!(counts, (1, 1, 0), "{restarts}: {said:#?}");
    }
}

/// One byte there and back, of which the connection may break off at any time.
fn echoes(mut client: TcpStream) -> std::io::Result<[u8; 1]> {
    let mut answer = [0];
    client.write_all(b"x")?;
    client.read_exact(&mut answer)?;
    Ok(answer)
}

fn vm_of(proxy: &Proxy) -> VmStatus {
    proxy.forwards()[0].vm.clone().unwrap()
}

#[test]
fn status_knows_without_traffic_whether_the_vm_is_there() {
    let dir = private_dir();
    let state = dir.path().join("vm");
    let proxy = proxy(any_tcp(), hyperkit(&state, 7));
    eventually("it is not there", || vm_of(&proxy).up == Some(false));
    let mut vm = Running::start(&["simulate", text(&state), "--guest", "7=echo"]);
    eventually("it is there", || vm_of(&proxy).up == Some(true));
    assert_eq!(
        (vm_of(&proxy).gone_since, vm_of(&proxy).restarts),
        (None, 0)
    );
    let before = SystemTime::now();
    // Its sockets stay, and there is nobody to ask: what is gone is its process.
    vm.signal("KILL");
    vm.exit_code();
    drop(vm);
    eventually("it is gone", || vm_of(&proxy).up == Some(false));
    assert!(vm_of(&proxy).gone_since.unwrap() >= before);
    let _vm = Running::start(&["simulate", text(&state), "--guest", "7=echo"]);
    eventually("it is there again", || vm_of(&proxy).up == Some(true));
    assert_eq!(vm_of(&proxy).restarts, 1);
    assert!(proxy.forwards()[0].last_error.is_none());
    assert_eq!(ask(tcp(port_of(&proxy, 0)), b"yes").unwrap(), b"yes");
}

fn rule_to(connect: Address, idle: Option<u64>, half_closed: Option<u64>) -> Rule {
    let mut rule = Rule::new(any_tcp(), connect);
    rule.timeouts.idle = idle.map(Duration::from_millis);
    rule.timeouts.half_closed = half_closed.map(Duration::from_millis);
    rule
}

/// A proxy of one rule, and both ends of a connection through it.
fn pair(idle: Option<u64>, half_closed: Option<u64>) -> (Proxy, TcpStream, TcpStream) {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = format!("tcp://{}", server.local_addr().unwrap());
    let rule = rule_to(target.parse().unwrap(), idle, half_closed);
    let proxy = Proxy::start(config(vec![rule])).unwrap();
    let client = tcp(port_of(&proxy, 0));
    let (server, _) = server.accept().unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    (proxy, client, server)
}

fn counters(proxy: &Proxy) -> Counters {
    proxy.forwards()[0].counters
}

fn carries(from: &mut TcpStream, to: &mut TcpStream) {
    from.write_all(b"x").unwrap();
    to.read_exact(&mut [0]).unwrap();
}

const TIME: u64 = 1_500;

#[test]
fn an_idle_connection_is_broken_off_and_a_busy_one_is_not() {
    let (proxy, mut client, mut server) = pair(Some(TIME), None);
    let begun = Instant::now();
    let mut last = begun;
    while begun.elapsed() < Duration::from_millis(3 * TIME) {
        last = Instant::now();
        carries(&mut server, &mut client);
        thread::sleep(Duration::from_millis(TIME / 12));
    }
    assert_eq!(counters(&proxy).timed_out.idle, 0);
    // Neither is told that all was said.
    assert!(is_reset(client.read(&mut [0])));
    assert!(last.elapsed() >= Duration::from_millis(TIME));
    assert!(is_reset(server.read(&mut [0])));
    eventually("it is closed", || counters(&proxy).live == 0);
    let timed_out = counters(&proxy).timed_out;
    assert_eq!((timed_out.idle, timed_out.half_closed), (1, 0));
}

#[test]
fn a_half_closed_connection_is_broken_off_when_the_other_half_is_silent() {
    let (proxy, mut client, mut server) = pair(None, Some(TIME));
    carries(&mut client, &mut server);
    thread::sleep(Duration::from_millis(2 * TIME));
    carries(&mut client, &mut server);
    client.half_close();
    assert_eq!(server.read_to_end(&mut Vec::new()).unwrap(), 0);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(2 * TIME) {
        carries(&mut server, &mut client);
        thread::sleep(Duration::from_millis(TIME / 12));
    }
    assert!(is_reset(client.read(&mut [0])));
    eventually("it is closed", || counters(&proxy).live == 0);
    assert!(server.write_all(&[0; 1 << 20]).is_err());
    let timed_out = counters(&proxy).timed_out;
    assert_eq!((timed_out.idle, timed_out.half_closed), (0, 1));
}

#[test]
fn guests_are_taken_leave_of_however_long_they_were_silent() {
    let dir = private_dir();
    // It says nothing, and ends when its client has.
    let silent = Service::custom(|mut guest| {
        let mut request = Vec::new();
        guest.read_to_end(&mut request).unwrap();
        thread::sleep(Duration::from_millis(50));
        let _ = guest.write_all(b"too late");
    });
    let vm = Vm::builder(dir.path()).guest(7, silent).start().unwrap();
    let rule = rule_to(hyperkit(dir.path(), 7), Some(100), None);
    let proxy = Proxy::start(config(vec![rule])).unwrap();
    let clients: Vec<_> = (0..50).map(|_| tcp(port_of(&proxy, 0))).collect();
    for mut client in clients {
        assert!(is_reset(client.read(&mut [0])));
    }
    assert!(vm.wait_for(PATIENCE, |counters| counters.live_slots == 0));
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
    eventually("all are closed", || counters(&proxy).live == 0);
    assert_eq!(counters(&proxy).timed_out.idle, 50);
    assert_eq!(counters(&proxy).abandoned, 0);
}
