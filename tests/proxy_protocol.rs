//! The PROXY protocol: who the client is goes to the target first, and is taken from proxies that
//! are trusted.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
#[cfg(target_os = "linux")]
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use command_fds::{CommandFdExt, FdMapping};
use common::*;
use hvsock::address::Address;
use hvsock::proxy::{EndReason, Observer, ProxyProtocol, RefusalReason, What};
use hvsock::simulate::{Service, Vm};
use hvsock::{Proxy, Rule, SocketName};

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

fn read(stream: &mut impl Read, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// The header of version 1, read byte by byte.
fn line(stream: &mut impl Read) -> String {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        line.extend(read(stream, 1));
    }
    String::from_utf8(line).unwrap()
}

fn telling(listen: Address, connect: Address, version: ProxyProtocol) -> Rule {
    let mut rule = Rule::new(listen, connect);
    rule.proxy_protocol = Some(version);
    rule
}

/// A rule that takes headers from loopback.
fn trusting(listen: Address, connect: Address) -> Rule {
    let mut rule = Rule::new(listen, connect);
    rule.accept_proxy = vec!["127.0.0.0/8".parse().unwrap()];
    rule
}

fn start(rules: Vec<Rule>) -> Proxy {
    Proxy::start(config(rules)).unwrap()
}

fn line_of(client: &TcpStream) -> String {
    let [from, to] = [client.local_addr(), client.peer_addr()].map(Result::unwrap);
    format!(
        "PROXY TCP4 {} {} {} {}\r\n",
        from.ip(),
        to.ip(),
        from.port(),
        to.port()
    )
}

/// However much the client sends, and though it half-closes.
#[test]
fn a_target_is_told_first_who_the_client_is() {
    const MUCH: usize = 8 << 20;
    let (server, target) = tcp_server();
    let versions = [ProxyProtocol::V1, ProxyProtocol::V2];
    let proxy = start(
        versions
            .map(|it| telling(any_tcp(), target.clone(), it))
            .into(),
    );
    let sent = pattern(MUCH);
    for (forward, version) in versions.into_iter().enumerate() {
        let client = tcp(port_of(&proxy, forward));
        let right = match version {
            ProxyProtocol::V1 => line_of(&client).into_bytes(),
            ProxyProtocol::V2 => {
                let [from, to] = [client.local_addr(), client.peer_addr()].map(|it| it.unwrap());
                let ports = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
                let head = [SIGNATURE, b"\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01"].concat();
                [head, ports].concat()
            }
        };
        let mut accepted = accept(&server);
        // Before the client has said anything.
        assert_eq!(read(&mut accepted, right.len()), right);
        let bytes = sent.clone();
        let asking = thread::spawn(move || ask(client, &bytes).unwrap());
        let mut got = Vec::new();
        accepted.read_to_end(&mut got).unwrap();
        assert!(got == sent, "{version}");
        accepted.write_all(b"answer").unwrap();
        drop(accepted);
        assert_eq!(asking.join().unwrap(), b"answer");
        eventually("it is over", || proxy.handle().live() == 0);
        // The header is none of the client's bytes.
        let counters = proxy.forwards()[forward].counters;
        assert_eq!((counters.sent, counters.received), (MUCH as u64, 6));
    }
}

/// What the client has sent by then stands behind the header in the same write.
#[cfg(target_os = "linux")]
#[test]
fn the_first_message_is_not_a_packet_later() {
    let (server, target) = tcp_server();
    let dir = private_dir();
    let path = dir.path().join("listen");
    let listener = UnixListener::bind(&path).unwrap();
    // It has said it all before the proxy is there.
    let mut client = unix_client(&path);
    client.write_all(b"hello").unwrap();
    let mut config = config(vec![telling(unix(&path), target, ProxyProtocol::V1)]);
    let listener = hvsock::Listener::try_from(OwnedFd::from(listener)).unwrap();
    config.listeners.push(listener);
    let _proxy = Proxy::start(config).unwrap();
    let mut accepted = accept(&server);
    let mut got = [0; 64];
    let len = accepted.read(&mut got).unwrap();
    assert_eq!(&got[..len], b"PROXY UNKNOWN\r\nhello");
}

#[test]
fn a_client_without_an_address_is_told_of_by_its_process() {
    let dir = private_dir();
    let path = dir.path().join("listen");
    let (server, target) = tcp_server();
    let proxy = start(vec![telling(unix(&path), target, ProxyProtocol::V2)]);
    let mut client = unix_client(&path);
    let mut accepted = accept(&server);
    let ids = [nix::unistd::getuid().as_raw(), std::process::id()];
    let right = [SIGNATURE, b"\x20\0\0\x0b\xe1\0\x08"].concat();
    let right = [right, ids.map(u32::to_be_bytes).concat()].concat();
    assert_eq!(read(&mut accepted, right.len()), right);
    client.write_all(b"x").unwrap();
    assert_eq!(read(&mut accepted, 1), b"x");
    drop(proxy);
}

/// Through two proxies: both show the client, and so does the target.
#[test]
fn a_trusted_proxy_says_who_its_client_is() {
    let (server, target) = tcp_server();
    let mut inner = trusting(any_tcp(), target);
    inner.proxy_protocol = Some(ProxyProtocol::V1);
    let (sender, closed) = std::sync::mpsc::channel();
    let mut config = config(vec![inner]);
    config.observer = Some(Observer::new(move |event| {
        if let What::Closed { why, .. } = event.what {
            let _ = sender.send((event.peer, why));
        }
    }));
    let inner = Proxy::start(config).unwrap();
    let middle = format!("tcp://127.0.0.1:{}", port_of(&inner, 0))
        .parse()
        .unwrap();
    let outer = start(vec![telling(any_tcp(), middle, ProxyProtocol::V2)]);
    let mut client = tcp(port_of(&outer, 0));
    let name = SocketName::Tcp(client.local_addr().unwrap());
    let right = line_of(&client);
    client.write_all(b"hello").unwrap();
    let mut accepted = accept(&server);
    assert_eq!(line(&mut accepted), right);
    assert_eq!(read(&mut accepted, 5), b"hello");
    let [connection] = &inner.handle().connections()[..] else {
        panic!("one connection");
    };
    assert_eq!(connection.peer, name);
    accepted.write_all(b"bye").unwrap();
    drop(accepted);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"bye");
    drop(client);
    assert_eq!(
        closed.recv_timeout(PATIENCE).unwrap(),
        (name, EndReason::ServerClosed)
    );
    let counters = inner.forwards()[0].counters;
    assert_eq!((counters.sent, counters.received), (5, 3));
}

#[test]
fn a_header_is_taken_however_it_comes() {
    let (server, target) = tcp_server();
    let mut rule = trusting(any_tcp(), target);
    rule.proxy_protocol = Some(ProxyProtocol::V1);
    let proxy = start(vec![rule]);
    let port = port_of(&proxy, 0);
    let peer = |proxy: &Proxy| proxy.handle().connections()[0].peer;
    let client: SocketAddr = "192.0.2.7:1234".parse().unwrap();
    let v1 = b"PROXY TCP4 192.0.2.7 192.0.2.8 1234 80\r\n".to_vec();
    let v2 = [
        SIGNATURE,
        b"\x21\x11\0\x0c\xc0\0\x02\x07\xc0\0\x02\x08\x04\xd2\0\x50",
    ]
    .concat();
    // More than is read at once stands behind it.
    let much = pattern(300_000);
    for header in [v1, v2] {
        for pace in [1, 7, usize::MAX] {
            let mut stream = tcp(port);
            stream.set_nodelay(true).unwrap();
            for piece in header.chunks(pace.min(header.len())) {
                stream.write_all(piece).unwrap();
            }
            let sent = much.clone();
            let asking = thread::spawn(move || ask(stream, &sent).unwrap());
            let mut accepted = accept(&server);
            assert_eq!(peer(&proxy), SocketName::Tcp(client));
            assert_eq!(
                line(&mut accepted),
                "PROXY TCP4 192.0.2.7 192.0.2.8 1234 80\r\n"
            );
            let mut got = Vec::new();
            accepted.read_to_end(&mut got).unwrap();
            assert!(got == much);
            drop(accepted);
            asking.join().unwrap();
            eventually("it is over", || proxy.handle().live() == 0);
        }
    }
    // Who speaks for itself is the client.
    for local in [
        &b"PROXY UNKNOWN\r\n"[..],
        &[SIGNATURE, b"\x20\0\0\0"].concat(),
    ] {
        let mut stream = tcp(port);
        let right = line_of(&stream);
        stream.write_all(local).unwrap();
        let mut accepted = accept(&server);
        assert_eq!(line(&mut accepted), right);
        drop((stream, accepted));
        eventually("it is over", || proxy.handle().live() == 0);
    }
    assert_eq!(proxy.forwards()[0].counters.refused, 0);
}

/// And one that says nothing is, after a while.
#[test]
fn a_trusted_proxy_that_says_nothing_of_its_client_is_refused() {
    let (server, target) = tcp_server();
    let (sender, refused) = std::sync::mpsc::channel();
    let mut config = config(vec![trusting(any_tcp(), target)]);
    config.observer = Some(Observer::new(move |event| match event.what {
        What::Refused(error) => drop(sender.send(error.to_string())),
        What::Closed { why, .. } => {
            assert_eq!(why, EndReason::Refused(RefusalReason::NoHeader));
        }
        _ => {}
    }));
    let proxy = Proxy::start(config).unwrap();
    let port = port_of(&proxy, 0);
    let silent = tcp(port);
    let mut slow = tcp(port);
    slow.write_all(b"PROXY TCP4 ").unwrap();
    let expect = |part: &str| {
        let why = refused.recv_timeout(PATIENCE).unwrap();
        assert!(why.contains(part), "{why:?} lacks {part:?}");
    };
    for (said, part) in [
        (
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            "doesn't begin with a header",
        ),
        (b"PROXY TCP4 a b c d\r\n", "line is wrong"),
        (&[SIGNATURE, b"\x21\x11\xff\xff"].concat(), "too long"),
    ] {
        let mut stream = tcp(port);
        stream.write_all(said).unwrap();
        expect(part);
        assert!(is_reset(stream.read(&mut [0])));
    }
    tcp(port).shutdown(Shutdown::Write).unwrap();
    expect("it ended before it");
    for _ in &[silent, slow] {
        expect("has not come in time");
    }
    let counters = proxy.forwards()[0].counters;
    assert_eq!((counters.refused, counters.refusals.no_header), (6, 6));
    server.set_nonblocking(true).unwrap();
    let dialled = server.accept().map(drop).map_err(|e| e.kind());
    assert_eq!(dialled, Err(io::ErrorKind::WouldBlock));
}

#[test]
fn from_elsewhere_a_header_is_the_clients_own_bytes() {
    let (server, target) = tcp_server();
    let mut rule = Rule::new(any_tcp(), target);
    rule.accept_proxy = vec!["10.0.0.0/8".parse().unwrap(), "::1".parse().unwrap()];
    let proxy = start(vec![rule]);
    let mut client = tcp(port_of(&proxy, 0));
    let header = b"PROXY TCP4 192.0.2.7 192.0.2.8 1234 80\r\n";
    client.write_all(header).unwrap();
    assert_eq!(read(&mut accept(&server), header.len()), header);
    let name = SocketName::Tcp(client.local_addr().unwrap());
    assert_eq!(proxy.handle().connections()[0].peer, name);
}

/// hyperkit's own manners stay as they are.
#[test]
fn a_guest_is_told_as_well() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path())
        .guest(7, Service::Echo)
        .start()
        .unwrap();
    let mut rule = telling(any_tcp(), hyperkit(dir.path(), 7), ProxyProtocol::V1);
    let refused = telling(any_tcp(), hyperkit(dir.path(), 8), ProxyProtocol::V1);
    rule.wait = Some(PATIENCE);
    let proxy = start(vec![rule, refused]);
    for _ in 0..20 {
        let client = tcp(port_of(&proxy, 0));
        let right = line_of(&client) + "hello";
        assert_eq!(ask(client, b"hello").unwrap(), right.as_bytes());
        let mut client = tcp(port_of(&proxy, 1));
        assert!(is_reset(client.read(&mut [0])));
    }
    eventually("all is over", || proxy.handle().live() == 0);
    assert_eq!(proxy.forwards()[1].counters.refusals.by_target, 20);
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn who_can_not_come_can_not_be_trusted() {
    let dir = private_dir();
    let path = unix(dir.path().join("listen"));
    let refused = Proxy::start(config(vec![trusting(path, unix("/target"))])).unwrap_err();
    let said = refused.to_string();
    assert!(
        said.contains("no client of a unix address comes from 127.0.0.0/8"),
        "{said}"
    );
}

/// A program that is ended at the end of its test.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether a program is installed; if not, what would bring it is said.
fn is_there(program: &str, package: &str) -> bool {
    let found = Command::new(program).arg("-v").output().is_ok();
    if !found {
        eprintln!("skipped: no {program}; apt-get install {package}");
    }
    found
}

/// Asks an HTTP server for the answer's body.
fn body(mut client: impl Client) -> String {
    client.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect(&answer);
    assert!(head.contains(" 200 "), "{answer}");
    body.trim().to_owned()
}

fn haproxy(dir: &Path, config: &str, passed: Option<&TcpListener>) -> Program {
    let file = dir.join("haproxy.cfg");
    let head =
        "defaults\n mode http\n timeout connect 20s\n timeout client 20s\n timeout server 20s\n";
    std::fs::write(&file, format!("{head}{config}")).unwrap();
    let mut command = Command::new("haproxy");
    command.args(["-db", "-f"]).arg(&file).stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    if let Some(socket) = passed {
        let parent_fd = OwnedFd::from(socket.try_clone().unwrap());
        let mapping = FdMapping {
            parent_fd,
            child_fd: 3,
        };
        command.fd_mappings(vec![mapping]).unwrap();
    }
    Program(command.spawn().unwrap())
}

fn listens(path: &Path) {
    eventually("the server listens", || UnixStream::connect(path).is_ok());
}

/// Asks a server behind forwards of both versions, from TCP and from a Unix socket, which says who
/// its client is.
fn assert_tells(dir: &Path, server: &Path) {
    for version in [ProxyProtocol::V1, ProxyProtocol::V2] {
        let path = dir.join(format!("from-{version}"));
        let rules = vec![
            telling(any_tcp(), unix(server), version),
            telling(unix(&path), unix(server), version),
        ];
        let proxy = start(rules);
        let client = tcp(port_of(&proxy, 0));
        let right = client.local_addr().unwrap().to_string();
        assert_eq!(body(client), right, "{version}");
        // It has no address that these servers know of, and is served nevertheless.
        let unknown = body(unix_client(&path));
        assert!(!unknown.contains(&right), "{unknown}");
    }
}

#[test]
fn haproxy_takes_it() {
    if !is_there("haproxy", "haproxy") {
        return;
    }
    let dir = private_dir();
    let server = dir.path().join("haproxy");
    let config = format!(
        "frontend f\n bind unix@{} accept-proxy\n http-request return content-type text/plain lf-string %[src]:%[src_port]\n",
        server.display()
    );
    let _haproxy = haproxy(dir.path(), &config, None);
    listens(&server);
    assert_tells(dir.path(), &server);
}

#[test]
fn nginx_takes_it() {
    if !is_there("nginx", "nginx-light") {
        return;
    }
    let dir = private_dir();
    let (file, server) = (dir.path().join("nginx.conf"), dir.path().join("nginx"));
    let here = dir.path().display();
    let config = format!(
        "daemon off;\nmaster_process off;\npid {here}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{\n access_log off;\n client_body_temp_path {here}/b;\n proxy_temp_path {here}/p;\n fastcgi_temp_path {here}/f;\n uwsgi_temp_path {here}/u;\n scgi_temp_path {here}/s;\n server {{\n listen unix:{here}/nginx proxy_protocol;\n location / {{ return 200 $proxy_protocol_addr:$proxy_protocol_port; }} }} }}\n"
    );
    std::fs::write(&file, config).unwrap();
    let mut command = Command::new("nginx");
    command.arg("-c").arg(&file).arg("-e").arg("stderr");
    command.stdin(Stdio::null()).stderr(Stdio::null());
    let _nginx = Program(command.spawn().unwrap());
    listens(&server);
    assert_tells(dir.path(), &server);
}

/// As `send-proxy` and `send-proxy-v2` have it, with a checksum as well.
#[test]
fn what_haproxy_tells_is_taken() {
    if !is_there("haproxy", "haproxy") {
        return;
    }
    for how in [
        "send-proxy",
        "send-proxy-v2",
        "send-proxy-v2 proxy-v2-options crc32c",
    ] {
        let (server, target) = tcp_server();
        let mut rule = trusting(any_tcp(), target);
        rule.proxy_protocol = Some(ProxyProtocol::V1);
        let proxy = start(vec![rule]);
        let dir = private_dir();
        let front = TcpListener::bind("127.0.0.1:0").unwrap();
        let config = format!(
            "listen l\n mode tcp\n bind fd@3\n server s 127.0.0.1:{} {how}\n",
            port_of(&proxy, 0)
        );
        let _haproxy = haproxy(dir.path(), &config, Some(&front));
        let mut client = tcp(front.local_addr().unwrap().port());
        let right = line_of(&client);
        client.write_all(b"hello").unwrap();
        let mut accepted = accept(&server);
        assert_eq!(line(&mut accepted), right, "{how}");
        assert_eq!(read(&mut accepted, 5), b"hello");
        let name = SocketName::Tcp(client.local_addr().unwrap());
        assert_eq!(proxy.handle().connections()[0].peer, name, "{how}");
    }
}
