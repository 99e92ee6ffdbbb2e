//! Who may come: where clients may come from, and whose the files of sockets are.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use command::*;
use common::*;
use hvsock::proxy::Source;
use hvsock::{Proxy, Rule};

/// The port of a server that sends an `x` to each client.
fn server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let _ = client.write_all(b"x");
        }
    });
    port
}

fn from(sources: &[&str]) -> Vec<Source> {
    sources.iter().map(|it| it.parse().unwrap()).collect()
}

fn read(mut client: TcpStream) -> std::io::Result<usize> {
    client.read(&mut [0])
}

#[test]
fn a_client_from_elsewhere_is_reset_and_counted() {
    let target = format!("tcp://127.0.0.1:{}", server());
    let mut rule = Rule::new(any_tcp(), target.parse().unwrap());
    rule.from = from(&["10.0.0.0/8", "127.0.0.2"]);
    let proxy = Proxy::start(config(vec![rule])).unwrap();
    let port = port_of(&proxy, 0);
    assert!(read(tcp(port)).is_err());
    assert!(read(tcp(port)).is_err());
    let counters = || proxy.forwards()[0].counters;
    eventually("both are counted", || counters().refusals.not_allowed == 2);
    assert_eq!(counters().refused, 2);
    let error = proxy.forwards()[0].last_error.clone().unwrap();
    assert!(
        error.text.contains("127.0.0.1 may not come"),
        "{}",
        error.text
    );
    // From 127.0.0.2 (which a Mac doesn't have).
    if cfg!(target_os = "linux") {
        use socket2::{Domain, Socket, Type};
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let address = |text: String| text.parse::<std::net::SocketAddr>().unwrap().into();
        socket.bind(&address("127.0.0.2:0".to_owned())).unwrap();
        socket
            .connect(&address(format!("127.0.0.1:{port}")))
            .unwrap();
        assert_eq!(read(socket.into()).unwrap(), 1);
    }
}

/// A client of `[::]` that comes over IPv4 has a name of IPv6.
#[test]
fn both_families_of_ip_are_told_apart() {
    let target = format!("tcp://127.0.0.1:{}", server());
    for (sources, ok) in [(["127.0.0.0/8"], [true, false]), (["::1"], [false, true])] {
        let listen = "tcp://[::]:0".parse().unwrap();
        let mut rule = Rule::new(listen, target.parse().unwrap());
        rule.from = from(&sources);
        let proxy = match Proxy::start(config(vec![rule])) {
            Ok(proxy) => proxy,
            Err(e) => return println!("skipped: this machine has no IPv6: {e}"),
        };
        let port = port_of(&proxy, 0);
        for (host, ok) in ["127.0.0.1", "::1"].into_iter().zip(ok) {
            // Whether `[::]` has IPv4 is the system's choice.
            if let Ok(client) = TcpStream::connect((host, port)) {
                // macOS sets no option of a client that was reset already.
                let _ = client.set_read_timeout(Some(PATIENCE));
                assert_eq!(read(client).is_ok(), ok, "{host} with {sources:?}");
            }
        }
    }
}

#[test]
fn a_rule_says_only_what_its_clients_can_be() {
    for (listen, source, part) in [
        ("/tmp/none.sock", "3", "mode, owner and group"),
        ("tcp://127.0.0.1:0", "3", "comes from 3"),
        ("vsock://:5000", "10.0.0.0/8", "ones CIDs"),
    ] {
        let mut rule = Rule::new(listen.parse().unwrap(), any_tcp());
        rule.connect = "tcp://127.0.0.1:9".parse().unwrap();
        rule.from = from(&[source]);
        let error = Proxy::start(config(vec![rule])).unwrap_err().to_string();
        assert!(error.contains(part), "{listen}: {error}");
    }
}

/// Another group that this user may give a file, if there is one.
fn other_group() -> Option<u32> {
    if nix::unistd::geteuid().is_root() {
        return Some(12_345);
    }
    let own = nix::unistd::getegid();
    let id = std::process::Command::new("id").arg("-G").output().ok()?;
    let text = String::from_utf8(id.stdout).ok()?;
    let mut groups = text.split_whitespace().filter_map(|it| it.parse().ok());
    groups.find(|group| *group != own.as_raw())
}

fn group_and_mode(path: &Path) -> (u32, u32) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.gid(), metadata.permissions().mode() & 0o7777)
}

#[test]
fn a_socket_has_the_group_that_it_was_given_and_is_given_another() {
    let Some(group) = other_group() else {
        return println!("skipped: run it as root, or as a user of two groups");
    };
    let dir = private_dir();
    let path = dir.path().join("s");
    let mut rule = Rule::new(unix(&path), "tcp://127.0.0.1:9".parse().unwrap());
    (rule.group, rule.mode) = (Some(group), 0o660);
    let proxy = Proxy::start(config(vec![rule.clone()])).unwrap();
    assert_eq!(group_and_mode(&path), (group, 0o660));
    // While it listens.
    let own = nix::unistd::getegid().as_raw();
    (rule.group, rule.mode) = (Some(own), 0o640);
    let id = proxy.forwards()[0].id;
    proxy.handle().replace(id, rule).unwrap();
    assert_eq!(group_and_mode(&path), (own, 0o640));
}

#[test]
fn a_file_that_can_not_be_given_away_is_told_with_the_remedy() {
    let dir = private_dir();
    let path = dir.path().join("s");
    let listen = path.to_str().unwrap();
    let target = "tcp://127.0.0.1:9";
    let output = run(&["forward", listen, target, "--group", "no-such-group"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("there is no group"), "{said}");
    if nix::unistd::geteuid().is_root() {
        return println!("skipped in part: root may give everything away");
    }
    let output = run(&["forward", listen, target, "--owner", "0"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("only root gives files away"), "{said}");
    assert!(!path.exists());
}

#[test]
fn the_file_says_it_and_check_tells_what_is_wrong() {
    let dir = private_dir();
    let file = dir.path().join("f.toml");
    let text = |from: &str| {
        format!("[forward.a]\nlisten = 0\nconnect = \"tcp://127.0.0.1:9\"\nfrom = {from}\n")
    };
    for (from, code, part) in [
        ("[\"192.168.7.0/24\", \"::1\"]", 0, "is right"),
        ("\"127.0.0.1\"", 0, "is right"),
        ("[\"192.168.7.1/24\"]", 1, "write 192.168.7.0/24"),
        ("[3]", 1, "comes from 3"),
        ("true", 1, "write a list"),
    ] {
        fs::write(&file, text(from)).unwrap();
        let output = run(&["check", file.to_str().unwrap()]);
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8(said).unwrap();
        assert_eq!(output.status.code(), Some(code), "{from}: {said}");
        assert!(said.contains(part), "{from}: {said}");
    }
}

#[test]
fn the_command_line_takes_several_at_once() {
    let target = format!("tcp://127.0.0.1:{}", server());
    let arguments = [
        "forward",
        "tcp://127.0.0.1:0",
        &target,
        "--from",
        "::1,10.0.0.0/8",
    ];
    let hvsock = Running::start(&arguments);
    assert!(read(tcp(hvsock.tcp_port())).is_err());
    hvsock.complains("127.0.0.1 may not come");
}
