//! What is told of a VM whose guest is silent: when it was last heard from, and no more than is
//! known.
#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::SystemTime;

use command::*;
use common::*;
use hvsock::proxy::VmStatus;
use hvsock::simulate::{Service, Vm};
use hvsock::{Proxy, Rule};

fn vm_of(proxy: &Proxy) -> VmStatus {
    proxy.forwards()[0].vm.clone().unwrap()
}

/// What `n` clients that say nothing are: a guest that waits for them doesn't answer.
fn idle(port: u16, n: usize) -> Vec<TcpStream> {
    (0..n).map(|_| tcp(port)).collect()
}

#[test]
fn what_is_known_of_a_guest_is_when_it_was_last_heard_from() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path())
        .guest(7, Service::Echo)
        .start()
        .unwrap();
    let proxy = proxy(any_tcp(), hyperkit(dir.path(), 7));
    let port = port_of(&proxy, 0);
    assert_eq!(vm_of(&proxy).last_heard, None);
    let begun = SystemTime::now();
    let mut first = tcp(port);
    first.write_all(b"x").unwrap();
    first.read_exact(&mut [0]).unwrap();
    eventually("it is noted", || vm_of(&proxy).last_heard.is_some());
    let heard = vm_of(&proxy).last_heard.unwrap();
    assert!(heard + PATIENCE >= begun && heard <= SystemTime::now());

    // A healthy guest, whose clients have nothing to say.
    let _idle = idle(port, 5);
    eventually("all are dialled", || vm_of(&proxy).unanswered == 5);
    // A connection that was there before tells of life, though not of those dials.
    eventually("it is noted", || {
        first.write_all(b"x").unwrap();
        first.read_exact(&mut [0]).unwrap();
        vm_of(&proxy).last_heard.unwrap() > heard
    });
    assert_eq!(vm_of(&proxy).unanswered, 5);

    vm.pause();
    let heard = vm_of(&proxy).last_heard.unwrap();
    let mut asks = tcp(port);
    asks.write_all(b"x").unwrap();
    eventually("it is dialled", || vm_of(&proxy).unanswered == 6);
    let paused = vm_of(&proxy).last_heard.unwrap();
    let less = paused.duration_since(heard).unwrap_or_default();
    assert!(less.as_millis() < 100, "it is paused, and heard from");
    vm.resume();
    asks.read_exact(&mut [0]).unwrap();
    eventually("it is noted", || vm_of(&proxy).unanswered == 0);
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn a_guest_that_dials_is_heard_from() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path()).start().unwrap();
    let target = std::os::unix::net::UnixListener::bind(dir.path().join("target")).unwrap();
    let proxy = proxy(hyperkit(dir.path(), 5000), unix(dir.path().join("target")));
    assert_eq!(vm_of(&proxy).last_heard, None);
    let mut guest = vm.dial(5000).unwrap();
    let (mut host, _) = target.accept().unwrap();
    eventually("it is noted", || vm_of(&proxy).last_heard.is_some());
    let heard = vm_of(&proxy).last_heard.unwrap();
    eventually("it is noted", || {
        guest.write_all(b"x").unwrap();
        host.read_exact(&mut [0]).unwrap();
        vm_of(&proxy).last_heard.unwrap() > heard
    });
}

#[test]
fn another_vm_in_its_place_is_not_heard_from_yet() {
    let dir = private_dir();
    let start = || {
        Vm::builder(dir.path())
            .guest(7, Service::Echo)
            .start()
            .unwrap()
    };
    let vm = start();
    let rule = Rule::new(any_tcp(), hyperkit(dir.path(), 7));
    let proxy = Proxy::start(config(vec![rule])).unwrap();
    let port = port_of(&proxy, 0);
    assert_eq!(ask(tcp(port), b"x").unwrap(), b"x");
    assert!(vm_of(&proxy).last_heard.is_some());
    vm.stop();
    let _vm = start();
    eventually("it is another one", || vm_of(&proxy).restarts == 1);
    assert_eq!(vm_of(&proxy).last_heard, None);
}

#[test]
fn status_says_what_is_known_and_no_more() {
    let dir = private_dir();
    let _vm = Vm::builder(dir.path())
        .guest(7, Service::Echo)
        .start()
        .unwrap();
    let control = dir.path().join("control");
    let option = format!("--control={}", text(&control));
    let vm = ["expose", "--vm", text(dir.path()), "-L", "0:7", &option];
    let expose = Running::start(&[&vm[..], &["--metrics", "0"]].concat());
    let metrics = expose.says("metrics at");
    let port = expose.tcp_port();
    let status = || {
        let output = run(&["status", "--control", text(&control)]);
        String::from_utf8(output.stdout).unwrap()
    };
    let line = |part: &str| {
        let status = status();
        let line = status.lines().find(|line| line.starts_with("VM "));
        line.is_some_and(|line| line.contains(part))
    };
    eventually("it is up", || {
        line("up, not heard from yet; 0 of 900 slots")
    });
    // Asked each time, since the status may come late.
    eventually("it is heard from", || {
        assert_eq!(ask(tcp(port), b"x").unwrap(), b"x");
        line("up, last heard from 0 s ago; ")
    });
    let _idle = idle(port, 40);
    eventually("they are dialled", || {
        line(" s ago, last 40 dials silent so far; 40 of 900 slots")
    });
    assert!(!status().contains("unanswered"), "{}", status());

    let output = run(&["status", "--json", "--control", text(&control)]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let heard = json["forwards"][0]["vm"]["last_heard"].as_f64().unwrap();
    let metrics = metrics.split("http://127.0.0.1:").nth(1).unwrap();
    let metrics = metrics.split('/').next().unwrap().parse().unwrap();
    let asked = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let text = ask(tcp(metrics), asked).unwrap();
    let text = String::from_utf8(text).unwrap();
    let told = text
        .lines()
        .find(|line| line.starts_with("hvsock_vm_last_heard_timestamp_seconds{"));
    let told: f64 = told.unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    assert!((told - heard).abs() < 1.0, "{told}, not {heard}");
}
