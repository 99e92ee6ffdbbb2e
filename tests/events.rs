//! `hvsock events`: what happens in an hvsock that runs, as lines of JSON.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::thread;

use command::*;
use common::*;
use hvsock::simulate::{Service, Vm};
use serde_json::{Value, json};

/// An echo server.
fn echo() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || io::copy(&mut &stream, &mut &stream).map(drop));
        }
    });
    address
}

/// An hvsock, and what tells of its events.
struct Scene {
    proxy: Running,
    events: Running,
    control: String,
    _dir: tempfile::TempDir,
}

impl Scene {
    fn new(words: &[&str]) -> Scene {
        let dir = private_dir();
        let control = format!("--control={}/control.sock", text(dir.path()));
        let proxy = Running::start(&[words, &[&control]].concat());
        proxy.says("controlled at");
        let events = Running::start(&["events", &control]);
        let scene = Scene {
            proxy,
            events,
            control,
            _dir: dir,
        };
        let watching = scene.next("watching");
        assert_eq!(watching["pid"], scene.proxy.child.0.id());
        scene
    }

    /// Returns the next event of that name.
    fn next(&self, event: &str) -> Value {
        let line = self.events.says(&format!("\"event\":\"{event}\""));
        let told: Value = serde_json::from_str(&line).unwrap();
        assert!(told["time"].as_f64().unwrap() > 1e9, "{told}");
        told
    }

    fn run(&self, words: &[&str]) {
        let output = run(&[words, &[&self.control]].concat());
        assert!(output.status.success(), "{words:?}");
    }
}

/// Returns the TCP port on which a forward listens.
fn port_in(up: &Value) -> u16 {
    let listen = up["listen"].as_str().unwrap();
    listen.rsplit_once(':').unwrap().1.parse().unwrap()
}

#[test]
fn connections_and_forwards_come_and_go() {
    let scene = Scene::new(&["forward", "tcp://127.0.0.1:0", &echo()]);
    let up = scene.next("forward_up");
    let client = tcp(port_in(&up));
    let name = format!("tcp://{}", client.local_addr().unwrap());
    assert_eq!(ask(client, b"hello").unwrap(), b"hello");
    let accepted = scene.next("connection_accepted");
    assert_eq!(
        (&accepted["peer"], &accepted["forward"]),
        (&json!(name), &up["forward"])
    );
    let id = &accepted["connection"];
    assert_eq!(&scene.next("connection_connected")["connection"], id);
    let closed = scene.next("connection_closed");
    assert_eq!(&closed["connection"], id);
    let right = json!([5, 5, "client_closed", null]);
    assert_eq!(
        json!([
            closed["sent"],
            closed["received"],
            closed["why"],
            closed["refusal"]
        ]),
        right
    );
    // One that can't be carried.
    scene.run(&[
        "add",
        "--name",
        "nobody",
        "tcp://127.0.0.1:0",
        "/nobody/there",
    ]);
    let added = scene.next("forward_up");
    assert_eq!(
        (&added["name"], &added["connect"]),
        (&json!("nobody"), &json!("unix:///nobody/there"))
    );
    assert!(resets_clients(port_in(&added)));
    let refused = scene.next("connection_refused");
    assert!(
        refused["error"].as_str().unwrap().contains("/nobody/there"),
        "{refused}"
    );
    let closed = scene.next("connection_closed");
    assert_eq!(
        (&closed["why"], &closed["refusal"]),
        (&json!("refused"), &json!("absent"))
    );
    scene.run(&["remove", "nobody"]);
    let removed = scene.next("forward_down");
    assert_eq!(
        (&removed["name"], &removed["why"]),
        (&json!("nobody"), &json!("removed"))
    );
    // And the end of it all ends this.
    scene.run(&["stop"]);
    assert_eq!(scene.next("forward_down")["why"], "closed");
    let Scene {
        mut proxy,
        mut events,
        ..
    } = scene;
    assert_eq!(proxy.exit_code(), Some(0));
    assert_eq!(events.exit_code(), Some(0));
}

#[test]
fn a_vm_is_gone_and_back() {
    let dir = private_dir();
    let start = |dir: &Path| Vm::builder(dir).guest(7, Service::Echo).start().unwrap();
    let vm = start(dir.path());
    let words = [
        "expose",
        "--no-keeper",
        "--vm",
        text(dir.path()),
        "-L",
        "0:7",
    ];
    let scene = Scene::new(&words);
    let port = port_in(&scene.next("forward_up"));
    assert_eq!(scene.next("vm_up")["vm"], text(dir.path()));
    drop(vm);
    // Its files are still there: a client finds out.
    assert!(resets_clients(port));
    scene.next("vm_gone");
    let _vm = start(dir.path());
    scene.next("vm_up");
}

/// It drops and counts; the proxy never waits for it.
#[test]
fn a_reader_that_does_not_read_holds_nobody_up() {
    const CLIENTS: u64 = 3000;
    let scene = Scene::new(&["forward", "tcp://127.0.0.1:0", &echo()]);
    let up = scene.next("forward_up");
    let port = port_in(&up);
    scene.events.signal("STOP");
    for _ in 0..CLIENTS {
        let mut client = tcp(port);
        client.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
    }
    scene.events.signal("CONT");
    let (mut told, mut dropped) = (0, 0);
    // Of each connection there are three.
    while told + dropped < 3 * CLIENTS {
        let line: Value = serde_json::from_str(&scene.events.says("")).unwrap();
        match line["event"].as_str().unwrap() {
            "dropped" => dropped += line["count"].as_u64().unwrap(),
            event => told += u64::from(event.starts_with("connection_")),
        }
    }
    assert_eq!(told + dropped, 3 * CLIENTS);
    assert!(told > 4000 && dropped > 0, "{told} told, {dropped} dropped");
}

/// Else the process' descriptors would go to readers that nobody has.
#[cfg(target_os = "linux")]
#[test]
fn a_reader_that_has_gone_leaves_nothing() {
    let scene = Scene::new(&["forward", "tcp://127.0.0.1:0", &echo()]);
    let before = scene.proxy.descriptors();
    for _ in 0..3 {
        let another = Running::start(&["events", &scene.control]);
        another.says("forward_up");
    }
    eventually("they are closed", || scene.proxy.descriptors() <= before);
}
