//! `hvsock syslog`: every message arrives, whole and in order, whatever becomes of the collector.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::io::{BufReader, Read};
use std::net::Shutdown;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use command::*;
use common::*;

fn frame(reader: &mut impl Read) -> Vec<u8> {
    let mut length = String::new();
    loop {
        let mut byte = [0];
        reader.read_exact(&mut byte).unwrap();
        match byte[0] {
            b' ' => break,
            digit => length.push(digit.into()),
        }
    }
    let mut message = vec![0; length.parse().unwrap()];
    reader.read_exact(&mut message).unwrap();
    message
}

fn accept(listener: &UnixListener) -> BufReader<UnixStream> {
    listener.set_nonblocking(true).unwrap();
    let mut stream = None;
    eventually("it connects", || {
        stream = listener.accept().ok().map(|(stream, _)| stream);
        stream.is_some()
    });
    let stream = stream.unwrap();
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    BufReader::new(stream)
}

fn start(dir: &Path) -> (Running, UnixDatagram) {
    start_to(dir, text(&dir.join("collector")))
}

fn start_to(dir: &Path, target: &str) -> (Running, UnixDatagram) {
    let log = dir.join("log");
    let running = Running::start(&["syslog", text(&log), target]);
    running.says(" -> ");
    let program = UnixDatagram::unbound().unwrap();
    program.connect(&log).unwrap();
    (running, program)
}

#[test]
fn messages_arrive_framed_and_in_order() {
    let dir = private_dir();
    let listener = UnixListener::bind(dir.path().join("collector")).unwrap();
    let (mut syslog, program) = start(dir.path());
    let messages: Vec<_> = (0..200).map(|n| pattern(n * 37 % 5000)).collect();
    let sending = {
        let messages = messages.clone();
        std::thread::spawn(move || {
            messages
                .iter()
                .for_each(|m| assert_eq!(program.send(m).unwrap(), m.len()))
        })
    };
    let mut collector = accept(&listener);
    for message in &messages {
        assert!(frame(&mut collector) == *message);
    }
    sending.join().unwrap();
    syslog.signal("TERM");
    assert_eq!(syslog.exit_code(), Some(0));
    assert_eq!(collector.read_to_end(&mut Vec::new()).unwrap(), 0);
    assert!(!dir.path().join("log").exists());
}

#[test]
fn a_collector_that_comes_late_and_goes_misses_nothing() {
    let dir = private_dir();
    let (syslog, program) = start(dir.path());
    program.send(b"<13>first").unwrap();
    syslog.complains("keeping messages");
    let path = dir.path().join("collector");
    let listener = UnixListener::bind(&path).unwrap();
    let mut collector = accept(&listener);
    assert_eq!(frame(&mut collector), b"<13>first");
    syslog.complains("connected to");
    // It goes, and another one comes: what lies between is kept.
    collector.get_ref().shutdown(Shutdown::Both).unwrap();
    drop(collector);
    program.send(b"<13>second").unwrap();
    let mut collector = accept(&listener);
    let mut next = frame(&mut collector);
    if next == b"<13>first" {
        next = frame(&mut collector);
    }
    assert_eq!(next, b"<13>second");
}

#[test]
fn a_proxy_that_accepts_for_a_collector_that_is_away_costs_no_message() {
    let dir = private_dir();
    let (front, back) = (dir.path().join("collector"), dir.path().join("back"));
    let proxy = Running::start(&["forward", text(&front), text(&back)]);
    proxy.says(" -> ");
    let (syslog, program) = start(dir.path());
    let mut sent = Vec::new();
    for n in 0..20 {
        let message = format!("<13>message {n}").into_bytes();
        program.send(&message).unwrap();
        sent.push(message);
    }
    syslog.complains("keeping messages");
    program.send(b"<13>last").unwrap();
    sent.push(b"<13>last".to_vec());
    let listener = UnixListener::bind(&back).unwrap();
    let mut collector = accept(&listener);
    for message in &sent {
        assert_eq!(frame(&mut collector), *message);
    }
}

#[test]
fn a_collector_that_has_nothing_to_say_gets_every_message_once() {
    let dir = private_dir();
    for address in [
        "tcp://127.0.0.1:0".to_owned(),
        format!("{}/collector", text(dir.path())),
    ] {
        let mut collector = Running::start(&["cat", "-l", &address]);
        let address = match address.starts_with("tcp") {
            true => collector
                .complains("listening on")
                .split_once("on ")
                .unwrap()
                .1
                .to_owned(),
            false => address,
        };
        eventually("it listens", || {
            address.starts_with("tcp") || Path::new(&address).exists()
        });
        let (mut syslog, program) = start_to(dir.path(), &address);
        let mut expected = String::new();
        // Over longer than anything is kept.
        for n in 0..60 {
            let message = format!("<13>message {n}.");
            program.send(message.as_bytes()).unwrap();
            expected += &format!("{} {message}", message.len());
            std::thread::sleep(Duration::from_millis(50));
        }
        // It has shown by now that it is there: nothing sent lately is in doubt.
        syslog.signal("TERM");
        assert_eq!(collector.exit_code(), Some(0));
        assert_eq!(collector.says("message 59."), expected);
        assert_eq!(syslog.exit_code(), Some(0), "{address}");
    }
}

#[test]
fn what_only_accepts_and_closes_costs_no_message() {
    let dir = private_dir();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", listener.local_addr().unwrap());
    let (_syslog, program) = start_to(dir.path(), &address);
    program.send(b"<13>0").unwrap();
    // A clean close each time: TCP tells of it only when more is written.
    for n in 1..3 {
        drop(listener.accept().unwrap());
        program.send(format!("<13>{n}").as_bytes()).unwrap();
    }
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut collector = BufReader::new(stream);
    for n in 0..3 {
        assert_eq!(frame(&mut collector), format!("<13>{n}").as_bytes());
    }
}

#[test]
fn a_collector_that_comes_and_goes_is_not_told_everything_again() {
    let dir = private_dir();
    let listener = UnixListener::bind(dir.path().join("collector")).unwrap();
    let (syslog, program) = start(dir.path());
    for n in 0..20 {
        program.send(format!("<13>{n}").as_bytes()).unwrap();
    }
    let mut collector = accept(&listener);
    for n in 0..20 {
        assert_eq!(frame(&mut collector), format!("<13>{n}").as_bytes());
    }
    // Longer than what was read is kept.
    std::thread::sleep(Duration::from_millis(2500));
    drop(collector);
    program.send(b"<13>next").unwrap();
    assert_eq!(frame(&mut accept(&listener)), b"<13>next");
    drop(syslog);
}

#[cfg(target_os = "linux")]
#[test]
fn a_reset_after_our_end_is_told() {
    let dir = private_dir();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", listener.local_addr().unwrap());
    let (mut syslog, program) = start_to(dir.path(), &address);
    program.send(b"<13>lost").unwrap();
    let (mut collector, _) = listener.accept().unwrap();
    collector.read_exact(&mut [0]).unwrap();
    syslog.signal("TERM");
    // Unread, it is a reset.
    eventually("our half-close", || {
        let mut end = [0; 64];
        let n = collector.peek(&mut end).unwrap();
        n > 0 && syslog_has_half_closed(&collector)
    });
    drop(collector);
    assert_eq!(syslog.exit_code(), Some(1));
    syslog.complains("1 message may not have been delivered");
}

/// Whether a half-close lies behind what has come.
#[cfg(target_os = "linux")]
fn syslog_has_half_closed(stream: &std::net::TcpStream) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let mut polled = [PollFd::new(
        stream.as_fd(),
        PollFlags::from_bits_retain(nix::libc::POLLRDHUP),
    )];
    poll(&mut polled, PollTimeout::ZERO).unwrap();
    // nix has no name for it, and says so by `None`.
    polled[0].any() != Some(false)
}

#[test]
fn a_collector_that_reads_nothing_is_told_of_and_holds_nobody_up() {
    let dir = private_dir();
    let listener = UnixListener::bind(dir.path().join("collector")).unwrap();
    let (mut syslog, program) = start(dir.path());
    // More than the sockets between hold.
    for _ in 0..300 {
        program.send(&pattern(10_000)).unwrap();
    }
    let collector = accept(&listener);
    let told = syslog.complains("has taken nothing for");
    assert!(told.contains("collector"), "{told}");
    syslog.signal("TERM");
    syslog.signal("TERM");
    assert_eq!(syslog.exit_code(), Some(1));
    syslog.complains("may not have been delivered");
    // One connection, and nothing came twice.
    drop(listener);
    let mut collector = collector;
    for _ in 0..10 {
        assert!(frame(&mut collector) == pattern(10_000));
    }
}

#[test]
fn what_nobody_took_is_counted_at_the_end() {
    let dir = private_dir();
    let (mut syslog, program) = start(dir.path());
    for n in 0..3 {
        program.send(format!("<13>{n}").as_bytes()).unwrap();
    }
    syslog.complains("keeping messages");
    syslog.signal("TERM");
    assert_eq!(syslog.exit_code(), Some(1));
    syslog.complains("3 messages may not have been delivered");
}

#[test]
fn a_socket_that_was_removed_is_made_again() {
    let dir = private_dir();
    let listener = UnixListener::bind(dir.path().join("collector")).unwrap();
    let (syslog, _old) = start(dir.path());
    let log = dir.path().join("log");
    std::fs::remove_file(&log).unwrap();
    syslog.complains("again: its file had been removed");
    let program = UnixDatagram::unbound().unwrap();
    program.connect(&log).unwrap();
    program.send(b"<13>here").unwrap();
    assert_eq!(frame(&mut accept(&listener)), b"<13>here");
}

#[test]
fn what_is_in_the_way_is_told() {
    let dir = private_dir();
    let (_syslog, _program) = start(dir.path());
    let log = dir.path().join("log");
    fails(
        &["syslog", text(&log), "/tmp/x"],
        1,
        &[text(&log), "in use"],
    );
    fails(
        &["syslog", "/etc/passwd", "/tmp/x"],
        1,
        &["/etc/passwd", "no socket"],
    );
    fails(
        &["syslog", "/tmp/no/such/log", "/tmp/x"],
        1,
        &["make it first"],
    );
    fails(&["syslog", text(&log)], 2, &["ADDRESS"]);
}
