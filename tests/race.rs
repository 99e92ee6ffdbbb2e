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

/// The binary, where `hosts` is the file of hosts; `None` if there can be no such place here.
fn with_hosts(hosts: &Path) -> Option<Command> {
    program_with_hosts(hosts, Path::new(env!("CARGO_BIN_EXE_hvsock")))
}

/// A program there.
fn program_with_hosts(hosts: &Path, program: &Path) -> Option<Command> {
    let command = |program: &Path| {
        let mut unshare = Command::new("unshare");
        if !nix::unistd::geteuid().is_root() {
            unshare.args(["--user", "--map-root-user"]);
        }
        let mount = "mount --bind \"$0\" /etc/hosts && exec \"$@\"";
        unshare.args(["--mount", "sh", "-c", mount]);
        unshare.arg(hosts).arg(program);
        unshare
    };
    let may = command(Path::new("true")).stderr(Stdio::null()).status();
    match may.is_ok_and(|status| status.success()) {
        true => Some(command(program)),
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

/// A name with four addresses of which one has an echo server and the others are silent, and the
/// command that runs where it is known.
struct Quartet {
    port: u16,
    _silent: Vec<Silent>,
}

impl Quartet {
    /// Makes one whose server is at the address of this number.
    fn new(lively: u8) -> Quartet {
        let at = |last, port| SocketAddr::from((Ipv4Addr::new(127, 0, 1, last), port));
        let server = TcpListener::bind(at(lively, 0)).unwrap();
        let port = server.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for client in server.incoming().flatten() {
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut &client, &mut &client);
                    let _ = client.shutdown(std::net::Shutdown::Write);
                });
            }
        });
        let silent = (1..=4).filter(|it| *it != lively);
        let _silent = silent.map(|it| Silent::at(at(it, port))).collect();
        Quartet { port, _silent }
    }

    fn hosts(at: &Path) {
        let lines: String = (1..=4).map(|n| format!("127.0.1.{n} four\n")).collect();
        fs::write(at, lines).unwrap();
    }
}

/// Each address has a quarter of half a minute if they are tried one after the other, which is too
/// long for at least one of these.
#[test]
fn cat_waits_for_no_address_that_is_silent() {
    let dir = private_dir();
    let hosts = dir.path().join("hosts");
    Quartet::hosts(&hosts);
    for lively in 1..=4 {
        let Some(mut cat) = with_hosts(&hosts) else {
            return;
        };
        let quartet = Quartet::new(lively);
        cat.args(["cat", &format!("tcp://four:{}", quartet.port)]);
        let cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut cat = Mortal(cat.spawn().unwrap());
        cat.0.stdin.take().unwrap().write_all(b"hello").unwrap();
        eventually("cat has ended", || cat.0.try_wait().unwrap().is_some());
        let mut answer = Vec::new();
        let mut output = cat.0.stdout.take().unwrap();
        output.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, b"hello", "{lively}");
    }
}

/// The port of the [`Quartet`] at which [`the_library_dials`] dials.
const PORT: &str = "HVSOCK_TEST_QUARTET";

#[test]
fn the_library_waits_for_no_address_that_is_silent_and_remembers() {
    let dir = private_dir();
    let hosts = dir.path().join("hosts");
    Quartet::hosts(&hosts);
    let this = std::env::current_exe().unwrap();
    let mut slowest = None;
    for lively in 1..=4 {
        let Some(mut library) = program_with_hosts(&hosts, &this) else {
            return;
        };
        let quartet = Quartet::new(lively);
        library.args(["--exact", "the_library_dials", "--nocapture"]);
        library.env(PORT, quartet.port.to_string());
        let mut library = Mortal(library.stdout(Stdio::piped()).spawn().unwrap());
        eventually("the library has dialled", || {
            library.0.try_wait().unwrap().is_some()
        });
        let mut told = String::new();
        let mut output = library.0.stdout.take().unwrap();
        output.read_to_string(&mut told).unwrap();
        assert!(library.0.wait().unwrap().success(), "{told}");
        let times = told.lines().find_map(|line| line.split_once("times: "));
        let times = times.unwrap_or_else(|| panic!("{told}")).1;
        let mut times = times.split(' ').map(|time| time.parse::<u128>().unwrap());
        slowest = slowest.max(Some((times.next().unwrap(), times.next().unwrap())));
    }
    let (raced, again) = slowest.unwrap();
    assert!(
        again * 2 < raced,
        "once the silent ones are known, {again} µs; before, {raced} µs"
    );
}

/// Dials where the name is known, each time as long as it takes: in a process of its own.
#[test]
fn the_library_dials() {
    let Ok(port) = std::env::var(PORT) else {
        return;
    };
    let target: hvsock::Address = format!("tcp://four:{port}").parse().unwrap();
    // A share of this time would be far too much for the test.
    let patience = Duration::from_secs(3600);
    let dial = || {
        let begun = Instant::now();
        let mut stream = hvsock::Stream::connect_timeout(&target, patience).unwrap();
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        begun.elapsed()
    };
    let (raced, again) = (dial(), (0..3).map(|_| dial()).min().unwrap());
    println!("times: {} {}", raced.as_micros(), again.as_micros());
    #[cfg(feature = "tokio")]
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let all = (0..3).map(|_| hvsock::tokio::Stream::connect_timeout(&target, patience));
        for dialled in all {
            let mut stream = dialled.await.unwrap();
            stream.write_all(b"x").await.unwrap();
            stream.read_exact(&mut [0]).await.unwrap();
        }
    });
}
