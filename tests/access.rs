//! Why a connection ended: in the access log, in the status and in the metrics of the command.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use socket2::SockRef;

use command::*;
use common::*;

/// An hvsock between a TCP port and a Unix socket, which logs how connections end.
struct Scene {
    dir: tempfile::TempDir,
    server: UnixListener,
    hvsock: Running,
    port: u16,
}

fn scene(more: &[&str]) -> Scene {
    let dir = private_dir();
    let path = dir.path().join("server");
    let server = UnixListener::bind(&path).unwrap();
    let control = format!("--control={}", text(&dir.path().join("c")));
    let arguments = ["forward", "tcp://127.0.0.1:0", text(&path), &control];
    let hvsock = Running::start(&[&arguments, more].concat());
    let port = hvsock.tcp_port();
    Scene {
        dir,
        server,
        hvsock,
        port,
    }
}

impl Scene {
    /// A connection over which a byte has gone each way.
    fn pair(&self) -> (std::net::TcpStream, UnixStream) {
        let mut client = tcp(self.port);
        client.write_all(b"x").unwrap();
        let (mut server, _) = self.server.accept().unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        server.read_exact(&mut [0]).unwrap();
        server.write_all(b"yz").unwrap();
        client.read_exact(&mut [0; 2]).unwrap();
        (client, server)
    }

    fn counters(&self) -> Value {
        counters(&self.dir.path().join("c"))
    }
}

fn counters(control: &Path) -> Value {
    let status = run(&["status", "--json", "--control", text(control)]);
    let status: Value = serde_json::from_slice(&status.stdout).unwrap();
    status["forwards"][0]["counters"].clone()
}

/// The reasons for which connections have ended, each with its count.
fn ended(counters: &Value) -> Vec<(String, u64)> {
    let all = counters["ended"].as_object().unwrap().iter();
    let all = all.map(|(why, count)| (why.clone(), count.as_u64().unwrap()));
    all.filter(|(_, count)| *count > 0).collect()
}

#[test]
fn a_line_tells_of_each_connection_how_it_went_and_why_it_ended() {
    let scene = scene(&["--access-log"]);
    let (client, mut server) = scene.pair();
    let peer = client.local_addr().unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(server.read_to_end(&mut Vec::new()).unwrap(), 0);
    drop((server, client));
    let line = scene.hvsock.complains("closed");
    let connect = text(&scene.dir.path().join("server")).to_owned();
    let forward = format!("forward=tcp://127.0.0.1:{}", scene.port);
    for part in [
        " INFO ",
        "closed id=0",
        &forward,
        &format!("peer=tcp://{peer}"),
        &format!("connect=unix://{connect}"),
        "sent=1 received=2 seconds=0.",
        "why=client closed",
    ] {
        assert!(line.contains(part), "{part:?} is missing: {line}");
    }

    let (mut client, server) = scene.pair();
    drop(server);
    assert_eq!(client.read_to_end(&mut Vec::new()).unwrap(), 0);
    drop(client);
    scene.hvsock.complains("why=server closed");

    let (client, _server) = scene.pair();
    SockRef::from(&client)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(client);
    scene.hvsock.complains("why=client reset");

    let reasons = [
        ("client_closed", 1),
        ("client_reset", 1),
        ("server_closed", 1),
    ];
    let reasons = reasons.map(|(why, count)| (why.to_owned(), count));
    assert_eq!(ended(&scene.counters()), reasons);
}

#[test]
fn timeouts_refusals_and_the_end_of_the_proxy_are_told_apart() {
    let scene = scene(&[
        "--access-log",
        "--idle-timeout=0.3",
        "--half-closed-timeout=0.2",
    ]);
    let open = scene.pair();
    scene.hvsock.complains("id=0");
    drop(open);
    let (client, _server) = scene.pair();
    client.shutdown(Shutdown::Write).unwrap();
    scene.hvsock.complains("why=half-closed timeout");
    std::fs::remove_file(scene.dir.path().join("server")).unwrap();
    assert!(resets_clients(scene.port));
    scene.hvsock.complains("id=2");
    let all = scene.counters();
    let reasons = ["half_closed_timeout", "idle_timeout", "refused"];
    assert_eq!(ended(&all), reasons.map(|why| (why.to_owned(), 1)));
    assert_eq!(all["refusals"]["absent"], 1);

    let scene = self::scene(&["--access-log", "--grace=0"]);
    let _open = scene.pair();
    scene.hvsock.signal("TERM");
    scene.hvsock.complains("why=proxy stopped");
}

#[test]
fn a_forward_that_is_removed_and_a_vm_that_dies_are_told_apart() {
    let dir = private_dir();
    let (state, control) = (dir.path().join("vm"), dir.path().join("c"));
    let listen = dir.path().join("listen");
    let simulate = || {
        let vm = Running::start(&["simulate", text(&state), "--guest", "7=echo"]);
        vm.says("guest port 7");
        vm
    };
    let mut vm = simulate();
    let guest = format!("hyperkit://:7{}", text(&state));
    let hvsock = Running::start(&[
        "forward",
        text(&listen),
        &guest,
        "--access-log",
        &format!("--control={}", text(&control)),
    ]);
    hvsock.says(" -> hyperkit://");
    let client = || {
        let mut client = unix_client(&listen);
        client.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
        client
    };
    let mut open = client();
    vm.signal("KILL");
    // No reset can tell a client of a Unix socket of it.
    assert_eq!(open.read_to_end(&mut Vec::new()).unwrap(), 0);
    drop(open);
    hvsock.complains("why=VM gone");
    assert_eq!(vm.exit_code(), None);

    let _vm = simulate();
    let mut open = client();
    let removed = run(&["remove", "0", "--grace=0", "--control", text(&control)]);
    assert!(removed.status.success());
    assert_eq!(open.read_to_end(&mut Vec::new()).unwrap(), 0);
    hvsock.complains("why=forward removed");
}

#[test]
fn lines_of_a_connection_bear_its_id_and_the_usual_log_has_no_line_of_its_end() {
    let dir = private_dir();
    let nobody = dir.path().join("nobody");
    let lines = |level: &str, mark: &str| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_hvsock"));
        command.args(["forward", "tcp://127.0.0.1:0", text(&nobody)]);
        command.env("HVSOCK_LOG", level);
        let hvsock = Running::spawn(command);
        let port = hvsock.tcp_port();
        assert!(resets_clients(port));
        assert!(resets_clients(port));
        let line = hvsock.complains(mark);
        hvsock.signal("TERM");
        (line, hvsock.err.iter().collect::<Vec<_>>().join("\n"))
    };
    for mark in ["accepted", "refused a client"] {
        let (line, _) = lines("debug", mark);
        assert!(line.contains("connection{id=0 forward=tcp://"), "{line}");
    }
    let (line, _) = lines("debug", "why=refused (absent)");
    assert!(line.contains("DEBUG"), "{line}");
    let (_, rest) = lines("info", "is not there");
    assert!(!rest.contains("why="), "{rest}");
}

/// What ends while it is off is not in the log.
#[test]
fn a_reload_switches_the_access_log() {
    let dir = private_dir();
    let [path, listen, control] = ["server", "listen", "c"].map(|name| dir.path().join(name));
    let server = UnixListener::bind(&path).unwrap();
    let file = dir.path().join("hvsock.toml");
    let write = |head: &str| {
        let (control, listen, path) = (text(&control), text(&listen), text(&path));
        let text = format!(
            "control = {control:?}\n{head}\n[forward.a]\nlisten = {listen:?}\nconnect = {path:?}\n"
        );
        std::fs::write(&file, text).unwrap();
    };
    write("");
    let hvsock = Running::start(&["run", text(&file)]);
    hvsock.says("a: ");
    let connect = || {
        let client = unix_client(&listen);
        let (mut accepted, _) = server.accept().unwrap();
        client.shutdown(Shutdown::Both).unwrap();
        assert_eq!(accepted.read_to_end(&mut Vec::new()).unwrap(), 0);
    };
    let reload = |head: &str, told: &str| {
        write(head);
        let output = run(&["reload", "--control", text(&control)]);
        let said = String::from_utf8(output.stdout).unwrap();
        assert_eq!(said.trim_end(), told);
        assert_eq!(output.status.code(), Some(0));
    };
    let has_ended = |id: usize| {
        let output = run(&[
            "connections",
            "--ended",
            "--json",
            "--control",
            text(&control),
        ]);
        let ended: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        ended.len() > id
    };
    reload("access-log = true", "now access-log = true");
    connect();
    hvsock.complains("closed id=0");
    reload("access-log = false", "now access-log = false");
    connect();
    eventually("it has ended", || has_ended(1));
    reload("", "nothing has changed");
    reload("access-log = true", "now access-log = true");
    connect();
    loop {
        let line = hvsock.complains("id=");
        assert!(!line.contains("closed id=1"), "{line}");
        if line.contains("closed id=2") {
            break;
        }
    }
}
