//! Whatever happens outside the sockets (a log, a file, a name, a clock that jumps, a listener that is shut down), traffic
//! flows.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use command::*;
use common::*;

/// Stops the process, as a laptop's sleep does, for that time, and does something meanwhile.
fn frozen(proxy: &Running, time: Duration, meanwhile: impl FnOnce()) {
    proxy.signal("STOP");
    #[cfg(target_os = "linux")]
    eventually("it stands still", || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", proxy.child.0.id())).unwrap();
        stat.rsplit_once(") ").unwrap().1.starts_with('T')
    });
    meanwhile();
    thread::sleep(time);
    proxy.signal("CONT");
}

#[test]
fn what_came_while_the_process_stood_still_is_read_before_a_timeout_is_believed() {
    let server = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let target = format!("tcp://{}", server.local_addr().unwrap());
    let idle = ["--idle-timeout", "1", "--workers", "1"];
    let proxy = Running::start(&[&["forward", "tcp://127.0.0.1:0", &target], &idle[..]].concat());
    let mut client = tcp(proxy.tcp_port());
    client.write_all(b"a").unwrap();
    let mut server = server.accept().unwrap().0;
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut got = [0; 1];
    server.read_exact(&mut got).unwrap();
    frozen(&proxy, Duration::from_millis(1500), || {
        client.write_all(b"b").unwrap();
    });
    server.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"b");
    // And one on which nothing moves is still cut off.
    assert!(is_reset(client.read(&mut got)));
}
