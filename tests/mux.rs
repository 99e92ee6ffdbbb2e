//! `vsock-mux://` against a stand-in for the VMMs that speak it.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use common::*;
use hvsock::proxy::ConnectionState;
use hvsock::{Address, Proxy, Rule};
use socket2::SockRef;

/// A VMM that takes one connection after the other: checks the line, and leaves the rest to
/// `answer`.
fn vmm(path: &Path, answer: impl Fn(UnixStream) + Send + 'static) {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut line = String::new();
            BufReader::with_capacity(1, &stream)
                .read_line(&mut line)
                .unwrap();
            assert_eq!(line, "CONNECT 80\n");
            answer(stream);
        }
    });
}

fn mux(path: &Path, query: &str) -> Address {
    format!("vsock-mux://:80{}{query}", path.to_str().unwrap())
        .parse()
        .unwrap()
}

#[test]
fn what_stands_right_behind_the_ok_is_the_guests() {
    let dir = private_dir();
    let path = dir.path().join("vm");
    vmm(&path, |mut stream| {
        stream.write_all(b"OK 1073741824\nwelcome").unwrap();
        let mut request = [0; 5];
        stream.read_exact(&mut request).unwrap();
        stream.write_all(&request).unwrap();
    });
    let proxy = proxy(any_tcp(), mux(&path, ""));
    for _ in 0..3 {
        let mut client = tcp(port_of(&proxy, 0));
        // Sent before the OK, and not passed on before it.
        client.write_all(b"hello").unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "welcomehello");
    }
}

#[test]
fn an_answer_comes_in_pieces_and_nothing_goes_before_it() {
    let dir = private_dir();
    let path = dir.path().join("vm");
    vmm(&path, |mut stream| {
        stream
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap();
        let early = stream.read(&mut [0; 1]).unwrap_err();
        assert_eq!(early.kind(), io::ErrorKind::WouldBlock);
        for piece in ["O", "K", " 7", "\n"] {
            stream.write_all(piece.as_bytes()).unwrap();
            stream.flush().unwrap();
        }
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut request = [0; 5];
        stream.read_exact(&mut request).unwrap();
        stream.write_all(&request).unwrap();
    });
    let proxy = proxy(any_tcp(), mux(&path, ""));
    let mut client = tcp(port_of(&proxy, 0));
    client.write_all(b"hello").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "hello");
}

#[test]
fn refused_not_up_and_nonsense_reset_the_client() {
    let dir = private_dir();
    type Answer = fn(UnixStream);
    let answers: [(&str, Answer); 4] = [
        ("EOF without OK", |stream| drop(stream)),
        ("half-closed without OK", |stream| {
            stream.shutdown(Shutdown::Write).unwrap();
            let _ = (&stream).read(&mut [0; 1]);
        }),
        ("nonsense", |mut stream| stream.write_all(b"NO\n").unwrap()),
        ("endless", |mut stream| {
            let _ = stream.write_all(&[b'x'; 1000]);
        }),
    ];
    for (name, answer) in answers {
        let path = dir.path().join(name);
        vmm(&path, answer);
        let proxy = proxy(any_tcp(), mux(&path, ""));
        assert!(resets_clients(port_of(&proxy, 0)), "{name}");
        assert_eq!(proxy.forwards()[0].counters.refused, 1, "{name}");
    }
    let proxy = proxy(any_tcp(), mux(&dir.path().join("nobody"), ""));
    assert!(resets_clients(port_of(&proxy, 0)));
}

#[test]
fn a_vmm_that_does_not_answer_is_not_waited_for_without_end() {
    let dir = private_dir();
    let path = dir.path().join("vm");
    let (ended, end) = std::sync::mpsc::channel();
    vmm(&path, move |mut stream| {
        // Who answers late must not find the connection closed under it.
        std::thread::sleep(Duration::from_millis(300));
        ended.send(stream.write_all(b"OK 1\n").is_ok()).unwrap();
    });
    let mut config = config(vec![Rule::new(any_tcp(), mux(&path, ""))]);
    config.rules[0].timeouts.dial = Duration::from_millis(100);
    let proxy = Proxy::start(config).unwrap();
    assert!(resets_clients(port_of(&proxy, 0)));
    assert!(end.recv_timeout(PATIENCE).unwrap());
    eventually("it is closed", || proxy.forwards()[0].counters.live == 0);
}

/// Its service may wait for the client to speak.
#[test]
fn a_guest_that_accepts_after_its_client_has_left_is_told() {
    let dir = private_dir();
    let path = dir.path().join("vm");
    let (line, has_come) = std::sync::mpsc::channel();
    let (leave, has_left) = std::sync::mpsc::channel::<()>();
    let (heard, end) = std::sync::mpsc::channel();
    let has_left = std::sync::Mutex::new(has_left);
    vmm(&path, move |mut stream| {
        line.send(()).unwrap();
        has_left.lock().unwrap().recv().unwrap();
        stream.write_all(b"OK 1\n").unwrap();
        heard.send(stream.read_to_end(&mut Vec::new())).unwrap();
    });
    // It leaves by itself, or its time is over.
    for is_refused in [false, true] {
        let mut config = config(vec![Rule::new(any_tcp(), mux(&path, ""))]);
        if is_refused {
            config.rules[0].timeouts.dial = Duration::from_millis(100);
        }
        let proxy = Proxy::start(config).unwrap();
        let counters = || proxy.forwards()[0].counters;
        let client = tcp(port_of(&proxy, 0));
        has_come.recv_timeout(PATIENCE).unwrap();
        match is_refused {
            false => {
                let linger = Some(Duration::ZERO);
                SockRef::from(&client).set_linger(linger).unwrap();
                drop(client);
                let state = || proxy.handle().connections()[0].state;
                eventually("it has left", || state() == ConnectionState::Closing);
            }
            true => assert!(is_reset((&client).read(&mut [0]))),
        }
        leave.send(()).unwrap();
        assert_eq!(end.recv_timeout(PATIENCE).unwrap().unwrap(), 0);
        eventually("it is closed", || counters().live == 0);
        assert_eq!(counters().abandoned, 0);
    }
}

#[test]
fn a_half_close_is_not_kept_back_without_end() {
    let dir = private_dir();
    let path = dir.path().join("vm");
    let (ended, end) = std::sync::mpsc::channel();
    vmm(&path, move |mut stream| {
        stream.write_all(b"OK 1\n").unwrap();
        // Its guest waits for the EOF that it is not told of.
        let mut request = Vec::new();
        ended.send(stream.read_to_end(&mut request)).unwrap();
    });
    let mut config = config(vec![Rule::new(any_tcp(), mux(&path, ""))]);
    config.rules[0].timeouts.drain = Duration::from_millis(200);
    let proxy = Proxy::start(config).unwrap();
    let mut client = tcp(port_of(&proxy, 0));
    client.write_all(b"request").unwrap();
    client.half_close();
    assert!(is_reset(client.read(&mut [0; 1])));
    assert_eq!(end.recv_timeout(PATIENCE).unwrap().unwrap(), 7);
    eventually("it is closed", || proxy.forwards()[0].counters.live == 0);
}

#[test]
fn a_half_close_is_kept_back_for_as_long_as_the_guest_goes_on_speaking() {
    let dir = private_dir();
    let path = dir.path().join("vm");
    vmm(&path, |mut stream| {
        stream.write_all(b"OK 1\n").unwrap();
        for _ in 0..6 {
            std::thread::sleep(Duration::from_millis(500));
            stream.write_all(b"tick").unwrap();
        }
    });
    let mut config = config(vec![Rule::new(any_tcp(), mux(&path, ""))]);
    config.rules[0].timeouts.drain = Duration::from_secs(2);
    let proxy = Proxy::start(config).unwrap();
    let answer = ask(tcp(port_of(&proxy, 0)), b"").unwrap();
    assert_eq!(answer, b"tick".repeat(6));
}

#[test]
fn a_half_close_is_kept_back_until_the_guest_has_finished() {
    let dir = private_dir();
    let path = dir.path().join("vm");
    let answer = pattern(500_000);
    let expected = answer.clone();
    vmm(&path, move |mut stream| {
        stream.write_all(b"OK 1\n").unwrap();
        let mut request = [0; 7];
        stream.read_exact(&mut request).unwrap();
        // As Firecracker does, which ends both directions at an EOF.
        stream.set_nonblocking(true).unwrap();
        for chunk in answer.chunks(50_000) {
            let read = stream.read(&mut [0; 1]);
            if matches!(read, Ok(0)) {
                return;
            }
            stream.set_nonblocking(false).unwrap();
            stream.write_all(chunk).unwrap();
            stream.set_nonblocking(true).unwrap();
        }
    });
    let proxy = proxy(any_tcp(), mux(&path, ""));
    assert!(ask(tcp(port_of(&proxy, 0)), b"request").unwrap() == expected);
    eventually("it is closed", || proxy.forwards()[0].counters.live == 0);
}

#[test]
fn a_vmm_that_is_known_to_do_better_gets_the_half_close_at_once() {
    let dir = private_dir();
    let path = dir.path().join("vm");
    vmm(&path, |mut stream| {
        stream.write_all(b"OK 1\n").unwrap();
        let mut request = Vec::new();
        stream.read_to_end(&mut request).unwrap();
        stream.write_all(&request).unwrap();
    });
    let proxy = proxy(any_tcp(), mux(&path, "?half-close=yes"));
    let request = pattern(100_000);
    assert!(ask(tcp(port_of(&proxy, 0)), &request).unwrap() == request);
}

#[test]
fn guests_dial_the_socket_of_their_port() {
    let dir = private_dir();
    let (path, server) = (dir.path().join("vm"), dir.path().join("server"));
    let listener = UnixListener::bind(&server).unwrap();
    let proxy = proxy(mux(&path, ""), unix(&server));
    let file = dir.path().join("vm_80");
    let guest = unix_client(&file);
    let (accepted, _) = listener.accept().unwrap();
    accepted.set_read_timeout(Some(PATIENCE)).unwrap();
    // The host's half-close is kept back until the guest has finished: it would take the guest's
    // direction with it.
    (&accepted).write_all(b"answer").unwrap();
    accepted.shutdown(Shutdown::Write).unwrap();
    let mut answer = [0; 6];
    (&guest).read_exact(&mut answer).unwrap();
    guest
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    let held = (&guest).read(&mut [0; 1]).unwrap_err();
    assert_eq!(held.kind(), io::ErrorKind::WouldBlock);
    (&guest).write_all(b"the rest").unwrap();
    guest.shutdown(Shutdown::Write).unwrap();
    let mut rest = String::new();
    (&accepted).read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "the rest");
    // (macOS takes none when both directions have ended.)
    let _ = guest.set_read_timeout(Some(PATIENCE));
    assert_eq!((&guest).read_to_end(&mut Vec::new()).unwrap(), 0);
    drop(proxy);
    assert!(!file.exists());
}
