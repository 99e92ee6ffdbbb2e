//! VMs whose process is killed: their clients, the log and the status are told that the VM is gone.

#![cfg(all(unix, feature = "simulate", feature = "cli"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::io::Read;
#[cfg(target_os = "linux")]
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::Duration;

use command::*;
use common::*;
use hvsock::address::Address;
use hvsock::proxy::{
    ConnectionState, ConnectionStatus, Counters, EndReason, RefusalReason, VmStatus,
};
use hvsock::{Proxy, Rule};

const CLIENTS: usize = 20;

fn vm_of(proxy: &Proxy) -> VmStatus {
    proxy.forwards()[0].vm.clone().unwrap()
}

fn counters(proxy: &Proxy) -> Counters {
    proxy.forwards()[0].counters
}

/// Why its connections have ended.
fn reasons(proxy: &Proxy) -> Vec<EndReason> {
    let ended = proxy.handle().ended();
    ended.into_iter().map(|it| it.why).collect()
}

/// A process that stands in for a VMM at `path`: it leads to what listens `behind`.
fn vmm(path: &Path, behind: &Path) -> Running {
    let [at, to] = [path, behind].map(|path| format!("unix://{}", text(path)));
    let vmm = Running::start(&["forward", &at, &to]);
    vmm.says(text(path));
    vmm
}

fn mux(path: &Path) -> Address {
    format!("vsock-mux://:80{}?half-close=yes", text(path))
        .parse()
        .unwrap()
}

/// Clients that have said nothing.
fn clients(port: u16) -> Vec<TcpStream> {
    (0..CLIENTS).map(|_| tcp(port)).collect()
}

fn expect_resets(clients: Vec<TcpStream>) {
    for mut client in clients {
        let read = client.read(&mut [0]);
        assert!(is_reset(read));
    }
}

#[test]
fn clients_without_a_byte_are_told_that_their_vm_is_gone() {
    let dir = private_dir();
    let state = text(dir.path());
    let mut vm = Running::start(&["simulate", state, "--guest", "7=silent"]);
    vm.says("guest port 7");
    let proxy = proxy(any_tcp(), hyperkit(dir.path(), 7));
    let clients = clients(port_of(&proxy, 0));
    eventually("all are connected", || {
        let connections = proxy.handle().connections();
        let is_open = |it: &&ConnectionStatus| it.state == ConnectionState::Open;
        connections.iter().filter(is_open).count() == CLIENTS
    });
    vm.signal("KILL");
    vm.exit_code();
    expect_resets(clients);
    eventually("all are closed", || counters(&proxy).live == 0);
    assert_eq!(counters(&proxy).refused, 0);
    assert_eq!(reasons(&proxy), [EndReason::VmGone; CLIENTS]);
    assert_eq!(vm_of(&proxy).up, Some(false));
    // A guest that lives refuses as ever.
    let _vm = Running::start(&["simulate", state, "--guest", "8=silent"]);
    eventually("it is back", || vm_of(&proxy).up == Some(true));
    assert!(resets_clients(port_of(&proxy, 0)));
    eventually("it is refused", || counters(&proxy).refusals.by_target == 1);
}

#[test]
fn the_log_tells_of_a_killed_vm_and_of_no_refusal() {
    let dir = private_dir();
    let state = text(dir.path());
    let start = || {
        let vm = Running::start(&[
            "simulate", state, "--guest", "7=silent", "--guest", "8=echo",
        ]);
        vm.says("guest port 8");
        vm
    };
    let mut vm = start();
    let proxy = Running::start(&[
        "expose",
        "--no-keeper",
        "--vm",
        state,
        "-L",
        "0:7",
        "-L",
        "0:8",
    ]);
    let (silent, echo) = (proxy.tcp_port(), proxy.tcp_port());
    let clients = clients(silent);
    // The guest answers the dials before this one first.
    assert_eq!(ask(tcp(echo), b"up").unwrap(), b"up");
    vm.signal("KILL");
    vm.exit_code();
    expect_resets(clients);
    let _vm = start();
    let mut said = Vec::new();
    eventually("it is back", || {
        said.extend(proxy.err.try_iter());
        said.iter().any(|line| line.contains("is back after"))
    });
    let count = |what: &str| said.iter().filter(|line| line.contains(what)).count();
    assert_eq!(
        (count("is gone"), count("refused a client")),
        (1, 0),
        "{said:#?}"
    );
}

#[test]
fn clients_of_a_killed_vmm_that_has_not_answered_find_it_absent() {
    let dir = private_dir();
    let [socket, behind] = ["vm", "behind"].map(|name| dir.path().join(name));
    let _silent = UnixListener::bind(&behind).unwrap();
    let mut vmm = vmm(&socket, &behind);
    let proxy = proxy(any_tcp(), mux(&socket));
    let clients = clients(port_of(&proxy, 0));
    eventually("all are dialled", || vm_of(&proxy).connections == CLIENTS);
    vmm.signal("KILL");
    vmm.exit_code();
    expect_resets(clients);
    eventually("all are closed", || counters(&proxy).live == 0);
    let refusals = counters(&proxy).refusals;
    assert_eq!((refusals.absent, refusals.by_target), (CLIENTS as u64, 0));
    assert_eq!(
        reasons(&proxy),
        [EndReason::Refused(RefusalReason::Absent); CLIENTS]
    );
    let why = proxy.forwards()[0].last_error.clone().unwrap().text;
    assert!(why.contains("its VM has ended"), "{why}");
    assert_eq!(vm_of(&proxy).up, Some(false));
}

#[test]
fn a_killed_vmm_is_gone_without_a_client() {
    let dir = private_dir();
    let [socket, behind] = ["vm", "behind"].map(|name| dir.path().join(name));
    let listener = UnixListener::bind(&behind).unwrap();
    let mut killed = vmm(&socket, &behind);
    let proxy = proxy(any_tcp(), mux(&socket));
    for restarts in 0..3 {
        eventually("it is there", || vm_of(&proxy).up == Some(true));
        killed.signal("KILL");
        killed.exit_code();
        assert!(socket.exists());
        eventually("it is gone", || vm_of(&proxy).up == Some(false));
        assert!(vm_of(&proxy).gone_since.is_some());
        assert_eq!(vm_of(&proxy).restarts, restarts);
        killed = vmm(&socket, &behind);
    }
    eventually("it is back", || vm_of(&proxy).up == Some(true));
    // It was never connected to.
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err());
    assert_eq!(counters(&proxy).accepted, 0);
}

/// Those that were connected, and those that wait for its guest's answer.
#[test]
fn no_client_takes_the_end_of_a_killed_vm_for_that_of_its_server() {
    let dir = private_dir();
    let state = text(dir.path());
    for round in 0..12 {
        let mut vm = Running::start(&["simulate", state, "--guest", "7=silent"]);
        vm.says("guest port 7");
        let mut rule = Rule::new(any_tcp(), hyperkit(dir.path(), 7));
        rule.wait = Some(Duration::from_millis(300));
        let proxy = Proxy::start(config(vec![rule])).unwrap();
        let clients: Vec<_> = (0..4).map(|_| tcp(port_of(&proxy, 0))).collect();
        thread::sleep(Duration::from_millis(round % 4));
        vm.signal(["TERM", "KILL"][round as usize % 2]);
        vm.exit_code();
        expect_resets(clients);
        eventually("all are closed", || counters(&proxy).live == 0);
        let is_so = |why: &EndReason| {
            matches!(
                why,
                EndReason::VmGone | EndReason::Refused(RefusalReason::Absent)
            )
        };
        let reasons = reasons(&proxy);
        assert!(reasons.iter().all(is_so), "round {round}: {reasons:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn the_log_tells_once_that_a_process_is_stopped_and_that_it_goes_on() {
    let dir = private_dir();
    let socket = dir.path().join("vmm");
    let mux = format!("vsock-mux://{}", text(&socket));
    let state = text(dir.path());
    for (place, vm) in [
        (&[state][..], state),
        (&["--vsock-mux", text(&socket)], &mux),
    ] {
        let simulate = [&["simulate"], place, &["--guest", "7=echo"]].concat();
        let vmm = Running::start(&simulate);
        let expose = [
            "expose",
            "--no-keeper",
            "--vm",
            vm,
            "-L",
            "0:7",
            "-L",
            "0:7",
        ];
        let proxy = Running::start(&expose);
        // By this it learns the process behind a socket.
        let port = proxy.tcp_port();
        let mut client = tcp(port);
        // The VMM may not listen yet.
        eventually("the guest answers", || {
            client = tcp(port);
            client.write_all(b"x").is_ok() && client.read_exact(&mut [0]).is_ok()
        });
        let mut answers = || {
            client.write_all(b"x").unwrap();
            client.read_exact(&mut [0]).unwrap();
        };
        let mut said = Vec::new();
        let mut expect = |paused, resumed| {
            eventually("the log tells it", || {
                said.extend(proxy.err.try_iter());
                let count = |what: &str| said.iter().filter(|line| line.contains(what)).count();
                let counts = (
                    count("paused: its process is stopped"),
                    count("goes on after"),
                );
                assert!(counts <= (paused, resumed), "{said:#?}");
                counts == (paused, resumed)
            });
        };
        vmm.signal("STOP");
        expect(1, 0);
        vmm.signal("CONT");
        expect(1, 1);
        vmm.signal("STOP");
        expect(2, 1);
        vmm.signal("CONT");
        expect(2, 2);
        answers();
    }
}

/// It knows the process by a connection: no file names it.
#[cfg(target_os = "linux")]
#[test]
fn a_vmm_whose_process_is_stopped_is_paused_until_it_goes_on() {
    let dir = private_dir();
    let [socket, behind] = ["vm", "behind"].map(|name| dir.path().join(name));
    let guest = UnixListener::bind(&behind).unwrap();
    let mut vmm = vmm(&socket, &behind);
    let proxy = proxy(any_tcp(), mux(&socket));
    let _client = tcp(port_of(&proxy, 0));
    let mut dial = guest.accept().unwrap().0;
    let mut line = [0; "CONNECT 80\n".len()];
    dial.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"CONNECT 80\n");
    // The VMM's answer is that of a guest.
    dial.write_all(b"OK 1073741824\n").unwrap();
    eventually("it has answered", || vm_of(&proxy).last_heard.is_some());
    assert!(!vm_of(&proxy).paused);
    vmm.signal("STOP");
    eventually("it is stopped", || vm_of(&proxy).paused);
    assert_eq!(vm_of(&proxy).up, Some(true));
    vmm.signal("CONT");
    eventually("it goes on", || !vm_of(&proxy).paused);
    // A process that is gone is not stopped.
    vmm.signal("STOP");
    eventually("it is stopped again", || vm_of(&proxy).paused);
    vmm.signal("KILL");
    vmm.exit_code();
    eventually("it is gone", || {
        let vm = vm_of(&proxy);
        vm.up == Some(false) && !vm.paused
    });
}
