//! What every system carries: TCP to TCP, by the proxy, by `cat` and by `stress`. This one runs
//! under Wine, too.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

#[path = "common/portable.rs"]
mod portable;

use hvsock::{Address, Listener, Operation, Proxy, ProxyConfig, Rule, Stream};
use portable::*;

fn connect(port: u16) -> TcpStream {
    patient(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap())
}

fn proxy(connect: Address) -> (Proxy, u16) {
    let rule = Rule::new("tcp://127.0.0.1:0".parse().unwrap(), connect);
    let proxy = Proxy::start(ProxyConfig::new(vec![rule])).unwrap();
    let Address::Tcp(listen) = &proxy.forwards()[0].listen else {
        panic!("no TCP address");
    };
    let port = listen.port;
    (proxy, port)
}

fn exchange(mut stream: TcpStream, bytes: &[u8]) -> Vec<u8> {
    let (mut writer, sent) = (stream.try_clone().unwrap(), bytes.to_vec());
    let writing = thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    writing.join().unwrap();
    back
}

fn hvsock(arguments: &[&str], input: &'static [u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_hvsock"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let feeding = thread::spawn(move || stdin.write_all(input));
    let output = child.wait_with_output().unwrap();
    let _ = feeding.join().unwrap();
    output
}

#[test]
fn the_proxy_carries_every_byte_and_both_ends() {
    let (_echo, port) = proxy(server(echo));
    let bytes = pattern(4 << 20);
    assert!(exchange(connect(port), &bytes) == bytes);
    let (_late, port) = proxy(server(answer_late));
    let bytes = pattern(100_000);
    assert!(exchange(connect(port), &bytes) == [&bytes[..], &bytes[..]].concat());
}

#[test]
fn many_clients_at_a_time() {
    let (proxy, port) = proxy(server(echo));
    let clients: Vec<_> = (0..50)
        .map(|n| {
            thread::spawn(move || {
                let bytes = pattern(20_000 + n);
                assert!(exchange(connect(port), &bytes) == bytes);
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    let end = Instant::now() + PATIENCE;
    while proxy.forwards()[0].counters.live > 0 {
        assert!(Instant::now() < end, "connections are left");
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(proxy.forwards()[0].counters.accepted, 50);
}

#[test]
fn a_server_that_is_not_there_is_no_clean_end() {
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let nobody = format!("tcp://{}", free.local_addr().unwrap());
    drop(free);
    let (proxy, port) = proxy(nobody.parse().unwrap());
    let told = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
        .and_then(|stream| patient(stream).read(&mut [0]));
    // Wine shows a reset as an end.
    let is_reset = matches!(&told, Err(e) if e.kind() == io::ErrorKind::ConnectionReset);
    assert!(
        is_reset || cfg!(windows) && matches!(told, Ok(0)),
        "{told:?}"
    );
    assert_eq!(proxy.forwards()[0].counters.refused, 1);
}

#[test]
fn a_proxy_ends_when_it_is_told_to() {
    let (proxy, port) = proxy(server(echo));
    proxy.handle().stop(Duration::ZERO);
    proxy.wait().unwrap();
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err());
}

#[test]
fn blocking_sockets_carry_both_ways() {
    let listener = Listener::bind(&"tcp://127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.address().clone();
    let client = thread::spawn(move || {
        let mut stream = Stream::connect(&address).unwrap();
        stream.write_all(b"request").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    let (mut stream, _) = listener.accept().unwrap();
    let mut request = String::new();
    stream.read_to_string(&mut request).unwrap();
    stream.write_all(b"answer").unwrap();
    drop(stream);
    assert_eq!((&*request, &*client.join().unwrap()), ("request", "answer"));
    let none = listener.accept_timeout(Duration::from_millis(30)).unwrap();
    assert!(none.is_none());
}

#[test]
fn what_this_system_does_not_carry_is_told() {
    let elsewhere = match cfg!(windows) {
        true => ["unix:///tmp/s", "vsock://3:80", "hyperkit://:80/tmp/vm"],
        false => ["hvsock://parent/80"; 3],
    };
    for address in elsewhere {
        let address: Address = address.parse().unwrap();
        let error = Stream::connect(&address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
        assert_eq!(error.operation(), Operation::Connect);
        let error = Listener::bind(&address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
        let rule = Rule::new("tcp://127.0.0.1:0".parse().unwrap(), address);
        let error = Proxy::start(ProxyConfig::new(vec![rule])).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    }
}

/// Wine has no AF_HYPERV, and a Windows without Hyper-V neither.
#[cfg(windows)]
#[test]
fn hyper_v_that_is_not_there_is_told() {
    let output = hvsock(&["cat", "hvsock://parent/80"], b"");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("hvsock://parent/80: "), "{said}");
    assert!(said.contains("; "), "no remedy: {said}");
    assert_eq!(output.status.code(), Some(1));
    let output = hvsock(&["cat", "hvsock://My VM/80"], b"");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("cannot find VM \"My VM\": "), "{said}");
    let listen = hvsock(&["cat", "-l", "hvsock:///80"], b"");
    let from_guest = hvsock(
        &["forward", "hvsock://children/80", "tcp://127.0.0.1:1"],
        b"",
    );
    let to_guest = hvsock(
        &["forward", "tcp://127.0.0.1:0", "hvsock://loopback/80"],
        b"",
    );
    let exposed = hvsock(&["expose", "--vm", "loopback", "-L", "0:80"], b"");
    for (output, what) in [
        (exposed, "cannot connect to hvsock://loopback/80: "),
        (listen, "cannot listen on hvsock:///80: "),
        (from_guest, "cannot listen on hvsock://children/80: "),
        (to_guest, "cannot connect to hvsock://loopback/80: "),
    ] {
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(what), "{said}");
        assert!(
            said.contains("; this Windows has no Hyper-V sockets"),
            "{said}"
        );
        assert_eq!(output.status.code(), Some(1), "{said}");
    }
}

#[test]
fn cat_sends_its_input_and_prints_the_answer() {
    let late = server(answer_late).to_string();
    let output = hvsock(&["cat", &late], b"once ");
    assert_eq!(output.stdout, b"once once ");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let output = hvsock(&["cat", "nowhere"], b"");
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn stress_finds_nothing_wrong_with_an_echo() {
    let echo = server(echo).to_string();
    let output = hvsock(&["stress", "-n", "40", "-p", "8", &echo], b"");
    let report = String::from_utf8(output.stdout).unwrap();
    assert!(report.contains("40 whole, 0 failed"), "{report}");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_stream_has_what_stds_has() {
    use hvsock::SocketName;
    let listener = Listener::bind(&"tcp://127.0.0.1:0".parse().unwrap()).unwrap();
    let Ok(SocketName::Tcp(bound)) = listener.local_addr() else {
        panic!("{:?}", listener.local_addr());
    };
    let stream = Stream::connect(listener.address()).unwrap();
    let (served, peer) = listener.accept().unwrap();
    assert_eq!(stream.peer_addr().unwrap(), SocketName::Tcp(bound));
    assert_eq!(served.local_addr().unwrap(), SocketName::Tcp(bound));
    assert_eq!(stream.local_addr().unwrap(), peer);
    assert_eq!(served.peer_addr().unwrap(), peer);
    assert!(stream.take_error().unwrap().is_none());

    let moment = Some(Duration::from_millis(50));
    assert_eq!(stream.read_timeout().unwrap(), None);
    stream.set_read_timeout(moment).unwrap();
    stream.set_write_timeout(moment).unwrap();
    // The kernel may round up.
    assert!(stream.read_timeout().unwrap() >= moment);
    assert!(stream.write_timeout().unwrap() >= moment);
    assert!((&stream).read(&mut [0]).is_err());
    let zero = stream.set_read_timeout(Some(Duration::ZERO)).unwrap_err();
    assert_eq!(zero.kind(), io::ErrorKind::InvalidInput);

    // There and back through std.
    let address = stream.address().clone();
    let std = std::net::TcpStream::connect(bound).unwrap();
    let mut taken = Stream::from_socket(std, address);
    let (mut other, _) = listener.accept().unwrap();
    taken.write_all(b"taken").unwrap();
    taken.shutdown(Shutdown::Write).unwrap();
    let mut all = String::new();
    other.read_to_string(&mut all).unwrap();
    assert_eq!(all, "taken");
    #[cfg(unix)]
    let socket = std::os::fd::OwnedFd::from(taken);
    #[cfg(windows)]
    let socket = std::os::windows::io::OwnedSocket::try_from(taken).unwrap();
    let mut std = std::net::TcpStream::from(socket);
    other.write_all(b"given").unwrap();
    let mut given = [0; 5];
    std.read_exact(&mut given).unwrap();
    assert_eq!(&given, b"given");
}

/// No end of ours keeps a small message back to send it with the next, nor waits for ever for a
/// peer that is no more.
#[cfg(unix)]
#[test]
fn both_ends_send_small_messages_at_once_and_look_after_their_peers() {
    use std::os::fd::OwnedFd;
    let check = |ends: [Stream; 2]| {
        for end in &ends {
            let socket = socket2::SockRef::from(end);
            assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        }
    };
    let any = "tcp://127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind(&any).unwrap();
    let client = Stream::connect(listener.address()).unwrap();
    check([client, listener.accept().unwrap().0]);
    // One that another has bound, where a client waits already.
    let passed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", passed.local_addr().unwrap());
    let client = Stream::connect(&address.parse().unwrap()).unwrap();
    let listener = Listener::try_from(OwnedFd::from(passed)).unwrap();
    check([client, listener.accept().unwrap().0]);
}
