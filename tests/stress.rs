//! `hvsock stress`: what it counts, and what it must not overlook.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;

use command::*;
use common::*;
use hvsock::simulate::{Service, Vm};

/// A `stress --server` on a Unix socket; the directory goes last.
fn server() -> (Running, String, tempfile::TempDir) {
    let dir = private_dir();
    let path = dir.path().join("s");
    let server = Running::start(&["stress", "--server", text(&path)]);
    server.says("serving on");
    (server, text(&path).to_owned(), dir)
}

/// Runs `hvsock stress` with these words; its exit code, what it printed, what it complained of.
fn stress(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = run(&[&["stress"], arguments].concat());
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// The number of bytes in the report's row of that name.
fn bytes(report: &str, row: &str) -> u64 {
    let line = report.lines().find(|line| line.starts_with(row));
    let words = line.unwrap_or_else(|| panic!("no {row} in {report}"));
    words.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A TCP server whose every client is served by `serve`, for as long as the test runs.
fn tcp_server(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", listener.local_addr().unwrap());
    let serve = std::sync::Arc::new(serve);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let serve = serve.clone();
            thread::spawn(move || serve(stream));
        }
    });
    address
}

/// Echoes, and changes the byte at `wrong`.
fn bad_echo(mut stream: TcpStream, wrong: usize) {
    let (mut buffer, mut total) = ([0; 4096], 0);
    while let Ok(n) = stream.read(&mut buffer) {
        if n == 0 {
            break;
        }
        if (total..total + n).contains(&wrong) {
            buffer[wrong - total] ^= 0x10;
        }
        total += n;
        if stream.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
}

#[test]
fn every_connection_is_whole_and_a_seed_repeats_the_run() {
    let (mut server, path, _dir) = server();
    let arguments = ["-n", "300", "-p", "20", "--seed", "7", &path];
    let (code, first, said) = stress(&arguments);
    assert_eq!((code, said.as_str()), (Some(0), ""), "{first}");
    assert!(first.contains("300 whole, 0 failed"), "{first}");
    assert_eq!(bytes(&first, "sent"), bytes(&first, "received"));
    assert!(first.contains("seed         7"), "{first}");
    let (_, again, _) = stress(&arguments);
    assert_eq!(bytes(&again, "sent"), bytes(&first, "sent"));
    let (_, other, _) = stress(&["-n", "300", "-p", "20", "--seed", "8", &path]);
    assert_ne!(bytes(&other, "sent"), bytes(&first, "sent"));
    server.signal("TERM");
    assert_eq!(server.exit_code(), Some(0));
    assert!(UnixStream::connect(&path).is_err());
}

#[test]
fn sizes_are_what_was_asked_for() {
    let (_server, path, _dir) = server();
    let whole = |arguments: &[&str]| {
        let (code, report, said) = stress(&[arguments, &[path.as_str()]].concat());
        assert_eq!((code, said.as_str()), (Some(0), ""), "{report}");
        (bytes(&report, "sent"), bytes(&report, "received"))
    };
    let big = 64 << 20;
    assert_eq!(whole(&["-n", "1", "--size", "64M"]), (big, big));
    assert_eq!(
        whole(&["--bench", "up", "--size", "16M", "-p", "3"]),
        (3 << 24, 0)
    );
    assert_eq!(
        whole(&["--bench", "down", "--size", "16M", "-p", "3"]),
        (0, 3 << 24)
    );
    let rtt = ["--bench", "rtt", "--round-trips", "50", "--size", "100"];
    assert_eq!(whole(&rtt), (5000, 5000));
    assert_eq!(whole(&["-n", "5", "--size", "0"]), (0, 0));
    let small = ["-n", "3", "--size", "1000", "--buffer", "1-7"];
    assert_eq!(whole(&small), (3000, 3000));
}

#[test]
fn a_changed_byte_is_found() {
    let echo = tcp_server(|stream| bad_echo(stream, 4242));
    let (code, report, said) = stress(&["-n", "2", "--size", "1M", &echo]);
    assert_eq!(code, Some(1));
    assert!(report.contains("2 x MISMATCH: byte 4242 "), "{report}");
    assert!(said.contains("2 of 2 connections failed"), "{said}");

    // And one on the way to the server, by the server.
    let (server, path, _dir) = server();
    let relay = tcp_server(move |mut client| {
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            let mut byte = [0];
            client.read_exact(&mut byte).unwrap();
            line.push(byte[0]);
        }
        let mut upstream = UnixStream::connect(&path).unwrap();
        upstream.write_all(&line).unwrap();
        let mut data = vec![0; 1 << 20];
        client.read_exact(&mut data).unwrap();
        data[777] ^= 1;
        upstream.write_all(&data).unwrap();
        let mut answer = Vec::new();
        upstream.shutdown(Shutdown::Write).unwrap();
        upstream.read_to_end(&mut answer).unwrap();
        let _ = client.write_all(&answer);
    });
    let (code, report, _) = stress(&["--bench", "up", "--size", "1M", &relay]);
    assert_eq!(code, Some(1));
    assert!(
        report.contains("the server says: MISMATCH: byte 777 "),
        "{report}"
    );
    drop(server);
}

#[test]
fn a_server_that_only_echoes_is_told_for_what_it_is() {
    let echo = tcp_server(|stream| bad_echo(stream, usize::MAX));
    for bench in ["up", "down"] {
        let (code, report, _) = stress(&["--bench", bench, "--size", "1000", &echo]);
        assert_eq!(code, Some(1));
        assert!(report.contains("stress --server"), "{bench}: {report}");
    }
}

#[test]
fn a_lost_byte_and_one_too_many_are_found() {
    let short = tcp_server(|mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        let _ = stream.write_all(&all[..all.len() - 1]);
    });
    let (code, report, _) = stress(&["-n", "1", "--size", "1000", &short]);
    assert_eq!(code, Some(1));
    let what = "the server ended it early (1000 bytes sent, 999 received)";
    assert!(report.contains(what), "{report}");
    let long = tcp_server(|mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all.push(0);
        let _ = stream.write_all(&all);
    });
    let (code, report, _) = stress(&["-n", "1", "--size", "1000", &long]);
    assert_eq!(code, Some(1));
    assert!(report.contains("more came back than was sent"), "{report}");
}

#[test]
fn a_silent_server_and_none_at_all_are_told() {
    let silent = tcp_server(|mut stream| {
        let _ = stream.read_to_end(&mut Vec::new());
        // Open to the end of the test.
        std::mem::forget(stream);
    });
    let words = [
        "-n",
        "2",
        "-p",
        "2",
        "--size",
        "100",
        "--timeout",
        "1",
        &silent,
    ];
    let (code, report, _) = stress(&words);
    assert_eq!(code, Some(1));
    assert!(report.contains("2 x nothing moved for 1 s"), "{report}");
    let (code, report, _) = stress(&["-n", "3", "/tmp/no/such/socket"]);
    assert_eq!(code, Some(1));
    assert!(report.contains("3 x cannot connect to"), "{report}");
    let (code, report, said) = stress(&["-n", "3", "-e", "/tmp/no/such/socket"]);
    assert_eq!(code, Some(1));
    assert!(report.contains("1 x cannot connect to"), "{report}");
    assert!(
        said.contains("1 of 3 connections failed, 2 were not made"),
        "{said}"
    );
}

#[test]
fn a_signal_ends_it_with_a_report() {
    let (_server, path, _dir) = server();
    let words = ["stress", "-n", "1000000", "-v", &path];
    let mut client = Running::start(&words);
    client.complains("connection 3");
    client.signal("INT");
    client.says("whole, 0 failed");
    client.complains("were not made");
    assert_eq!(client.exit_code(), Some(1));
}

#[test]
fn the_vm_lives() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path())
        .guest(7, Service::Echo)
        .start()
        .unwrap();
    let echo = format!("hyperkit://:7{}", text(dir.path()));
    let (code, report, _) = stress(&["-n", "300", "-p", "50", &echo]);
    assert_eq!(code, Some(0), "{report}");
    let closed = format!("hyperkit://:8{}", text(dir.path()));
    let (code, report, _) = stress(&["-n", "100", "-p", "50", &closed]);
    assert_eq!(code, Some(1));
    assert!(report.contains("100 x cannot connect to"), "{report}");
    assert!(report.contains("vsock port 8"), "{report}");

    // A guest that sleeps is not dialled until the VM dies.
    vm.pause();
    let words = ["-n", "1000", "-p", "100", "--timeout", "1", &echo];
    let (code, report, _) = stress(&words);
    assert_eq!(code, Some(1));
    assert!(report.contains("given up: 64 connections"), "{report}");
    vm.resume();
    let state = text(dir.path());
    let (code, report, _) = stress(&["-n", "10", "--vm", state, "7"]);
    assert_eq!(code, Some(0), "{report}");
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
    fails(&["stress", "-p", "401", &echo], 2, &["could kill it"]);
}

#[test]
fn a_server_that_is_gone_is_given_up() {
    let (code, report, _) = stress(&["-n", "1000000", "-p", "4", "/tmp/no/such/socket"]);
    assert_eq!(code, Some(1));
    assert!(report.contains("given up: 1000 dials in a row"), "{report}");
}

#[test]
fn a_second_signal_cuts_off_what_waits_for_a_guest() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path())
        .guest(7, Service::Echo)
        .start()
        .unwrap();
    vm.pause();
    let words = [
        "stress",
        "-n",
        "5",
        "--timeout",
        "1000",
        "--vm",
        text(dir.path()),
        "7",
    ];
    let mut running = Running::start(&words);
    eventually("it has dialled", || vm.counters().unanswered > 0);
    running.signal("TERM");
    running.complains("once more to cut them off");
    running.signal("TERM");
    assert_eq!(running.exit_code(), Some(1));
    vm.resume();
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[cfg(target_os = "linux")]
#[test]
fn a_report_that_nobody_gets_is_a_failure() {
    let (_server, path, _dir) = server();
    for words in [&["stress", "-n", "1", &path][..], &["--help"], &["vms"]] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_hvsock"));
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
        command.args(words).stdout(full.unwrap());
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{words:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("standard output"), "{said}");
    }
}

#[test]
fn a_server_makes_its_socket_again() {
    let (server, path, _dir) = server();
    std::fs::remove_file(&path).unwrap();
    server.complains("again: its file had been removed");
    let (code, _, said) = stress(&["-n", "2", &path]);
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn bad_words_are_told() {
    let words = |option: &'static str, value: &'static str| ["stress", option, value, "/tmp/s"];
    fails(
        &words("--size", "5-3"),
        2,
        &["the first size is the larger one"],
    );
    fails(&words("--size", "3X"), 2, &["\"3X\" is no size", "64K"]);
    fails(&words("--size", "99999999999G"), 2, &["is no size"]);
    fails(&words("--buffer", "0-1"), 2, &["1 byte to 16M"]);
    fails(&words("-n", "0"), 2, &["1 or more"]);
    fails(
        &["stress", "--pause=-1", "/tmp/s"],
        2,
        &["--pause", "a number of seconds"],
    );
    fails(
        &["stress", "--bench", "rtt", "--size", "0", "/tmp/s"],
        2,
        &["round trip"],
    );
    fails(&["stress", "hyperkit://"], 2, &["hyperkit://"]);
    fails(&["stress", "-s", "-n", "3", "/tmp/s"], 2, &["--server"]);
    fails(&["stress", "--mode", "600", "/tmp/s"], 2, &["--server"]);
    fails(
        &["stress", "--round-trips", "3", "/tmp/s"],
        2,
        &["--bench rtt"],
    );
}
