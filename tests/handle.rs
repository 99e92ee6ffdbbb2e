//! A proxy that is changed while it runs: forwards come and go, connections are told of, and nobody
//! else notices.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use common::*;
use hvsock::address::{Address, HyperkitVm};
use hvsock::proxy::{ConnectionState, ForwardId, Handle, Observer, VmLimits, What};
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
    assert_eq!((&staying).read_to_end(&mut Vec::new()).unwrap(), 0);
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

/// A server that answers each client with one byte, again and again.
fn answering(path: &Path, byte: u8) {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut asked = [0];
                while stream.read_exact(&mut asked).is_ok() && stream.write_all(&[byte]).is_ok() {}
            });
        }
    });
}

fn who_answers(mut client: impl Read + Write) -> u8 {
    client.write_all(b"?").unwrap();
    let mut byte = [0];
    client.read_exact(&mut byte).unwrap();
    byte[0]
}

#[test]
fn another_rule_holds_for_those_who_come_after_it_and_none_is_refused() {
    let (proxy, dir) = running();
    let handle = proxy.handle();
    let front = dir.path().join("front");
    for byte in [1, 2] {
        answering(&dir.path().join(byte.to_string()), byte);
    }
    let rule = |byte: u8, mode| {
        let mut rule = Rule::new(unix(&front), unix(dir.path().join(byte.to_string())));
        rule.name = Some(format!("to {byte}"));
        rule.mode = mode;
        rule
    };
    let mode = || front.metadata().unwrap().permissions().mode() & 0o777;
    let id = handle.add(rule(1, 0o600)).unwrap();
    let old = unix_client(&front);
    assert_eq!(who_answers(&old), 1);
    thread::scope(|scope| {
        let clients = scope.spawn(|| {
            for _ in 0..2000 {
                assert!([1, 2].contains(&who_answers(unix_client(&front))));
            }
        });
        for round in 0.. {
            let byte = [2, 1][round % 2];
            handle.replace(id, rule(byte, 0o600)).unwrap();
            assert_eq!(who_answers(unix_client(&front)), byte);
            if clients.is_finished() {
                break;
            }
        }
        clients.join().unwrap();
    });
    handle.replace(id, rule(2, 0o660)).unwrap();
    assert_eq!(mode(), 0o660);
    let new = unix_client(&front);
    assert_eq!((who_answers(&old), who_answers(&new)), (1, 2));
    let [forward] = &handle.forwards()[..] else {
        panic!();
    };
    assert_eq!((forward.id, &forward.rule), (id, &rule(2, 0o660)));
    assert!(forward.counters.accepted > 2000);

    // What can't be leaves the rule as it was.
    let elsewhere = Rule::new(any_tcp(), unix(dir.path().join("1")));
    let nowhere = Rule::new(unix(&front), any_tcp());
    let itself = Rule::new(unix(&front), unix(&front));
    for (rule, part) in [
        (elsewhere, "this forward listens on"),
        (nowhere, "port 0"),
        (itself, "itself"),
    ] {
        let error = handle.replace(id, rule).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(error.to_string().contains(part), "{error}");
    }
    assert_eq!(who_answers(unix_client(&front)), 2);

    // Removed, it takes all of its clients with it, whichever rule they came under.
    handle.remove(id, Duration::ZERO).unwrap();
    for mut client in [&old, &new] {
        assert_eq!(client.read(&mut [0]).unwrap_or(0), 0);
    }
    let gone = handle.replace(id, rule(1, 0o600)).unwrap_err();
    assert_eq!(gone.kind(), io::ErrorKind::NotFound);
}

#[test]
fn places_of_a_vm_are_kept_as_the_rule_and_the_limits_say_now() {
    let dir = private_dir();
    let guest = hyperkit(dir.path(), 7);
    let mut config = config(Vec::new());
    let mut limits = VmLimits::new(HyperkitVm::new(dir.path()));
    limits.connections = Some(20);
    config.vms = vec![limits.clone()];
    let proxy = Proxy::start(config).unwrap();
    let handle = proxy.handle();
    let rule = |reserved| {
        let mut rule = Rule::new(unix(dir.path().join("front")), guest.clone());
        rule.reserved = reserved;
        rule
    };
    let kept = || {
        let vm = handle.forwards()[0].vm.clone().unwrap();
        (vm.reserved, vm.limit.unwrap())
    };
    let id = handle.add(rule(15)).unwrap();
    handle.replace(id, rule(18)).unwrap();
    assert_eq!(kept(), (18, 20));
    let error = handle.replace(id, rule(21)).unwrap_err();
    assert!(error.to_string().contains("which has 20 left"), "{error}");
    assert_eq!(kept(), (18, 20));
    let mut other = Rule::new(any_tcp(), guest.clone());
    other.reserved = 3;
    let error = handle.add(other.clone()).unwrap_err();
    assert!(error.to_string().contains("which has 2 left"), "{error}");
    limits.connections = Some(21);
    handle.limit_vm(&limits);
    let other = handle.add(other).unwrap();
    assert_eq!(kept(), (21, 21));
    // To another target it keeps none.
    let elsewhere = unix(dir.path().join("elsewhere"));
    let away = Rule::new(rule(0).listen, elsewhere);
    handle.replace(id, away).unwrap();
    handle.remove(other, LONG).unwrap();
    handle.replace(id, rule(0)).unwrap();
    assert_eq!(kept(), (0, 21));
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
