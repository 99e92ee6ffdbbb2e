//! A name with several addresses, of which one doesn't answer.
//!
//! The names are those of a hosts file of the test's own, in a mount namespace.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use command::*;
use common::*;
use socket2::{Domain, Socket, Type};

/// A command that runs where `hosts` is the file of hosts; `None` if there can be no such place here.
fn with_hosts(hosts: &Path) -> Option<Command> {
    let command = |program: &str| {
        let mut unshare = Command::new("unshare");
        if !nix::unistd::geteuid().is_root() {
            unshare.args(["--user", "--map-root-user"]);
        }
        let mount = "mount --bind \"$0\" /etc/hosts && exec \"$@\"";
        unshare.args(["--mount", "sh", "-c", mount]);
        unshare.arg(hosts).arg(program);
        unshare
    };
    let may = command("true").stderr(Stdio::null()).status();
    match may.is_ok_and(|status| status.success()) {
        true => Some(command(env!("CARGO_BIN_EXE_hvsock"))),
        false => {
            println!("skipped: unshare may not make namespaces here; run as root");
            None
        }
    }
}

/// A listener that swallows what would connect to it: its backlog is full.
struct Silent {
    _listener: Socket,
    _waiting: Vec<Socket>,
}

impl Silent {
    fn at(address: SocketAddr) -> Silent {
        let socket = || Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let listener = socket();
        listener.set_reuse_address(true).unwrap();
        listener.bind(&address.into()).unwrap();
        listener.listen(0).unwrap();
        let mut waiting = Vec::new();
        // One that isn't connected soon is not connected while nobody accepts.
        for _ in 0..16 {
            let client = socket();
            let connected = client.connect_timeout(&address.into(), Duration::from_millis(300));
            waiting.push(client);
            if connected.is_err() {
                return Silent {
                    _listener: listener,
                    _waiting: waiting,
                };
            }
        }
        panic!("the backlog of {address} isn't full");
    }
}

/// How long it takes until a byte comes back.
fn echo_time(path: &Path) -> Duration {
    let begun = Instant::now();
    let mut client = UnixStream::connect(path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    begun.elapsed()
}

#[test]
fn an_address_that_is_silent_costs_little_and_is_remembered() {
    let dir = private_dir();
    let hosts = dir.path().join("hosts");
    fs::write(&hosts, "127.0.0.2 twice\n127.0.0.3 twice\n").unwrap();
    // Whatever the resolver's order is, the silent one is the first in one of the two.
    let mut first = Vec::new();
    for (index, silent, lively) in [(0, 2, 3), (1, 3, 2)] {
        let Some(mut hvsock) = with_hosts(&hosts) else {
            return;
        };
        let at = |last, port| SocketAddr::from((Ipv4Addr::new(127, 0, 0, last), port));
        let server = TcpListener::bind(at(lively, 0)).unwrap();
        let port = server.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for client in server.incoming().flatten() {
                std::thread::spawn(move || std::io::copy(&mut &client, &mut &client));
            }
        });
        let _silent = Silent::at(at(silent, port));
        let path = dir.path().join(format!("{index}"));
        let target = format!("tcp://twice:{port}");
        // A share of this time would be far too much for the test.
        hvsock.args(["forward", path.to_str().unwrap(), &target]);
        hvsock.args(["--dial-timeout", "3600"]);
        let forward = Running::spawn(hvsock);
        forward.says("twice");
        let raced = echo_time(&path);
        let again = (0..3).map(|_| echo_time(&path)).min().unwrap();
        first.push((raced, again));
    }
    let (raced, again) = first.into_iter().max().unwrap();
    assert!(
        again * 2 < raced,
        "once the silent one is known, {again:?}; before, {raced:?}"
    );
}

#[test]
fn an_address_that_refuses_costs_nothing() {
    let dir = private_dir();
    let hosts = dir.path().join("hosts");
    let many: String = (2..9).map(|n| format!("127.0.0.{n} many\n")).collect();
    fs::write(&hosts, many).unwrap();
    let server = TcpListener::bind("127.0.0.5:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let accepting = std::thread::spawn(move || server.accept().unwrap());
    let Some(mut hvsock) = with_hosts(&hosts) else {
        return;
    };
    let path = dir.path().join("s");
    hvsock.args([
        "forward",
        path.to_str().unwrap(),
        &format!("tcp://many:{port}"),
    ]);
    let forward = Running::spawn(hvsock);
    forward.says("many");
    let mut client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let (mut accepted, _) = accepting.join().unwrap();
    accepted.write_all(b"hello").unwrap();
    client.read_exact(&mut [0; 5]).unwrap();
    // With nobody there the client is refused, and not held for the time of a race.
    drop(accepted);
    let mut client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let refused = client.read(&mut [0; 1]);
    assert!(!matches!(refused, Ok(1..)), "{refused:?}");
}
