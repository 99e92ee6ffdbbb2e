//! A proxy that is changed while it runs: forwards come and go, connections are told of, and nobody else notices.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use common::*;
use hvsock::address::Address;
use hvsock::proxy::{ConnectionState, ForwardId, Handle, Observer, What};
use hvsock::{Proxy, Rule, SocketName};

const LONG: Duration = Duration::from_secs(3600);

/// An echo server on a Unix socket.
fn echo(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || io::copy(&mut &stream, &mut &stream).map(drop));
        }
    });
}

fn running() -> (Proxy, tempfile::TempDir) {
    let dir = private_dir();
    echo(&dir.path().join("echo"));
    (Proxy::start(config(Vec::new())).unwrap(), dir)
}

fn add(handle: &Handle, dir: &Path) -> (ForwardId, u16) {
    let id = handle
        .add(Rule::new(any_tcp(), unix(dir.join("echo"))))
        .unwrap();
    let forwards = handle.forwards();
    let added = forwards.iter().find(|forward| forward.id == id).unwrap();
    match &added.listen {
        Address::Tcp(tcp) => (id, tcp.port),
        other => panic!("{other}"),
    }
}

fn trip(mut stream: &TcpStream, bytes: &[u8]) {
    stream.write_all(bytes).unwrap();
    let mut back = vec![0; bytes.len()];
    stream.read_exact(&mut back).unwrap();
    assert!(back == bytes);
}

#[test]
fn forwards_come_and_go() {
    let (proxy, dir) = running();
    let handle = proxy.handle();
    assert!(handle.forwards().is_empty());
    let (first, port) = add(&handle, dir.path());
    let (second, other) = add(&handle, dir.path());
    assert!(first < second && port != other);
    let staying = tcp(port);
    trip(&staying, b"before");

    handle.remove(first, LONG).unwrap();
    // Its address is free, and who was there goes on.
    drop(TcpListener::bind(("127.0.0.1", port)).unwrap());
    trip(&staying, b"after");
    assert_eq!(ask(tcp(other), b"beside").unwrap(), b"beside");
    let ids: Vec<ForwardId> = handle.forwards().iter().map(|it| it.id).collect();
    assert_eq!(ids, [second]);

    let gone = handle.remove(first, LONG).unwrap_err();
    assert_eq!(gone.kind(), io::ErrorKind::NotFound);
    staying.shutdown(Shutdown::Write).unwrap();
    assert_eq!((&staying).read(&mut [0]).unwrap(), 0);
}

#[test]
fn who_is_there_when_a_forward_is_removed_has_the_grace_and_no_more() {
    let (proxy, dir) = running();
    let handle = proxy.handle();
    let (id, port) = add(&handle, dir.path());
    let (_, other) = add(&handle, dir.path());
    let clients: Vec<TcpStream> = (0..8).map(|_| tcp(port)).collect();
    let beside = tcp(other);
    for client in clients.iter().chain([&beside]) {
        trip(client, b"x");
    }
    handle.remove(id, Duration::from_secs(2)).unwrap();
    trip(&clients[0], b"still");
    for mut client in clients {
        assert!(is_reset(client.read(&mut [0])));
    }
    trip(&beside, b"not meant");
    eventually("they are closed", || handle.live() == 1);

    // And one that is cut off at once.
    let (id, port) = add(&handle, dir.path());
    let mut client = tcp(port);
    trip(&client, b"x");
    handle.remove(id, Duration::ZERO).unwrap();
    assert!(is_reset(client.read(&mut [0])));
}

#[test]
fn a_removed_socket_leaves_no_file() {
    let (proxy, dir) = running();
    let handle = proxy.handle();
    let path = dir.path().join("front");
    let rule = || Rule::new(unix(&path), unix(dir.path().join("echo")));
    for _ in 0..3 {
        let id = handle.add(rule()).unwrap();
        let taken = handle.add(rule()).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(ask(unix_client(&path), b"there").unwrap(), b"there");
        handle.remove(id, LONG).unwrap();
        assert!(!path.exists());
        assert!(UnixStream::connect(&path).is_err());
    }
}

#[test]
fn connections_are_told_of() {
    let (proxy, dir) = running();
    let handle = proxy.handle();
    let (id, port) = add(&handle, dir.path());
    assert!(handle.connections().is_empty());
    let client = tcp(port);
    trip(&client, &[7; 5000]);
    let told = handle.connections();
    let [one] = &told[..] else {
        panic!("{told:?}");
    };
    assert_eq!((one.forward, one.state), (id, ConnectionState::Open));
    assert_eq!(one.peer, SocketName::Tcp(client.local_addr().unwrap()));
    eventually("all is counted", || {
        let told = handle.connections();
        (told[0].sent, told[0].received) == (5000, 5000)
    });
    assert!(told[0].age < PATIENCE);

    // One whose target doesn't answer.
    let full = dir.path().join("full");
    let listener =
        socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    listener
        .bind(&socket2::SockAddr::unix(&full).unwrap())
        .unwrap();
    listener.listen(0).unwrap();
    let _waiting = UnixStream::connect(&full).unwrap();
    let slow = handle.add(Rule::new(any_tcp(), unix(&full))).unwrap();
    let Address::Tcp(listen) = &handle.forwards()[1].listen else {
        panic!();
    };
    if cfg!(target_os = "linux") {
        let _client = tcp(listen.port);
        eventually("it is dialling", || {
            handle
                .connections()
                .iter()
                .any(|it| it.forward == slow && it.state == ConnectionState::Dialling)
        });
    }
    drop(client);
    eventually("it is gone", || {
        !handle.connections().iter().any(|it| it.forward == id)
    });
}

#[test]
fn a_proxy_that_has_ended_takes_nothing_and_answers() {
    let (proxy, dir) = running();
    let handle = proxy.handle();
    let (id, _) = add(&handle, dir.path());
    proxy.stop(Duration::ZERO);
    proxy.wait().unwrap();
    let error = handle
        .add(Rule::new(any_tcp(), unix(dir.path().join("echo"))))
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotConnected);
    assert!(handle.connections().is_empty());
    handle.remove(id, LONG).unwrap();
}

#[test]
fn a_proxy_can_have_the_callers_thread() {
    let dir = private_dir();
    echo(&dir.path().join("echo"));
    let rule = Rule::new(any_tcp(), unix(dir.path().join("echo")));
    let mut config = config(vec![rule]);
    config.workers = Some(1.try_into().unwrap());
    let (tell, told) = std::sync::mpsc::channel();
    let running = thread::spawn(move || Proxy::run(config, |handle| tell.send(handle).unwrap()));
    let handle = told.recv_timeout(PATIENCE).unwrap();
    let Address::Tcp(listen) = handle.forwards()[0].listen.clone() else {
        panic!();
    };
    let client = tcp(listen.port);
    trip(&client, b"carried");
    assert!(!running.is_finished());
    handle.stop(LONG);
    trip(&client, b"still");
    drop(client);
    running.join().unwrap().unwrap();
    // What can't be bound is told before it begins.
    let missing = Rule::new(unix("/tmp/no/such/dir/s"), any_tcp());
    let never = |_| panic!("it has begun");
    let error = Proxy::run(hvsock::ProxyConfig::new(vec![missing]), never).unwrap_err();
    assert!(error.to_string().contains("port 0"), "{error}");
}

/// Of each connection the first and the last are told once, and what it carried.
#[test]
fn an_observer_is_told_of_every_connection() {
    let dir = private_dir();
    echo(&dir.path().join("echo"));
    let (tell, told) = std::sync::mpsc::channel();
    let mut config = config(vec![
        Rule::new(any_tcp(), unix(dir.path().join("echo"))),
        Rule::new(any_tcp(), unix(dir.path().join("nobody"))),
    ]);
    config.observer = Some(Observer::new(move |event| {
        let what = match event.what {
            What::Accepted => "accepted".to_owned(),
            What::Connected => "connected".to_owned(),
            What::Refused(error) => format!("refused: {error}"),
            What::Closed { sent, received, .. } => format!("closed {sent} {received}"),
            _ => unreachable!(),
        };
        let _ = tell.send((event.forward, event.connection, what));
    }));
    let proxy = Proxy::start(config).unwrap();
    let [good, bad] = [0, 1].map(|index| proxy.forwards()[index].id);
    for _ in 0..3 {
        trip(
            &TcpStream::connect(("127.0.0.1", port_of(&proxy, 0))).unwrap(),
            b"seven b",
        );
        let mut refused = TcpStream::connect(("127.0.0.1", port_of(&proxy, 1))).unwrap();
        assert!(refused.read(&mut [0]).is_err());
    }
    proxy.stop(LONG);
    proxy.wait().unwrap();
    let mut connections: HashMap<_, Vec<_>> = HashMap::new();
    for (forward, connection, what) in told {
        connections
            .entry((forward, connection))
            .or_default()
            .push(what);
    }
    assert_eq!(connections.len(), 6);
    for ((forward, _), whats) in connections {
        if forward == good {
            assert_eq!(whats, ["accepted", "connected", "closed 7 7"]);
        } else {
            assert_eq!(forward, bad);
            assert_eq!(whats.len(), 3, "{whats:?}");
            assert_eq!([&whats[0], &whats[2]], ["accepted", "closed 0 0"]);
            assert!(whats[1].contains("nobody"), "{}", whats[1]);
        }
    }
}

#[test]
fn a_worker_that_hangs_is_told_from_those_that_work() {
    let dir = private_dir();
    echo(&dir.path().join("echo"));
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let held = std::sync::Mutex::new(held);
    let rule = Rule::new(any_tcp(), unix(dir.path().join("echo")));
    let mut config = config(vec![rule]);
    config.observer = Some(Observer::new(move |_| {
        // Until the other end is dropped.
        let _ = held.lock().unwrap().recv();
    }));
    let proxy = Proxy::start(config).unwrap();
    assert!(proxy.handle().answers_within(PATIENCE));
    let client = tcp(port_of(&proxy, 0));
    eventually("it hangs", || {
        !proxy.handle().answers_within(Duration::from_millis(50))
    });
    drop(hold);
    assert!(proxy.handle().answers_within(PATIENCE));
    drop(client);
}
