//! Where the metrics are served: at TCP of either family of IP, and at Unix sockets.

#![cfg(all(unix, feature = "cli"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use command::*;
use common::*;

/// The status and the body of an answer.
fn get(mut stream: impl Read + Write, target: &str) -> (u16, String) {
    let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
    (
        head["HTTP/1.1 ".len()..][..3].parse().unwrap(),
        body.to_owned(),
    )
}

fn forward(more: &[&str]) -> Running {
    let arguments = [
        "forward",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:1",
        "--control=off",
    ];
    Running::start(&[&arguments, more].concat())
}

#[test]
fn metrics_are_all_that_a_unix_socket_of_theirs_serves() {
    let dir = private_dir();
    let path = dir.path().join("metrics.sock");
    let hvsock = forward(&["--metrics", text(&path)]);
    hvsock.says("metrics at unix:///");
    assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
    let (status, body) = get(unix_client(&path), "/metrics");
    assert_eq!(status, 200);
    assert!(body.contains("hvsock_"), "{body}");
    for target in ["/v1/status", "/v1/forwards", "/v1/events"] {
        assert_eq!(get(unix_client(&path), target).0, 404, "{target}");
    }
}

#[test]
fn metrics_at_a_name_of_this_machine_are_served_in_both_families() {
    let hvsock = forward(&["--metrics", "localhost:0"]);
    let said = hvsock.says("metrics at http://localhost:");
    let port = said.rsplit_once(':').unwrap().1;
    let port: u16 = port.strip_suffix("/metrics").unwrap().parse().unwrap();
    assert_eq!(get(tcp(port), "/metrics").0, 200);
    match TcpListener::bind("[::1]:0") {
        Ok(_) => {
            let stream = TcpStream::connect(("::1", port)).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            assert_eq!(get(stream, "/metrics").0, 200);
        }
        Err(e) => eprintln!("skipped in part: this machine has no ::1: {e}"),
    }
}

/// Whether guests may look at it, or change it, is the file's to say.
#[test]
fn no_forward_leads_there_and_check_says_so() {
    let dir = private_dir();
    let file = dir.path().join("hvsock.toml");
    let check = |head: &str, forward: &str, parts: &[&str]| {
        let forward = format!("[forward.a]\nlisten = 8080\nconnect = {forward:?}\n");
        std::fs::write(&file, format!("{head}\n{forward}")).unwrap();
        match parts {
            [] => assert!(run(&["check", text(&file)]).status.success(), "{head}"),
            parts => fails(&["check", text(&file)], 1, parts),
        }
    };
    let sock = dir.path().join("m");
    let unix = format!("metrics = {:?}", text(&sock));
    check(&unix, text(&sock), &["own metrics"]);
    check(&unix, text(Path::new("/nowhere/else")), &[]);
    check(
        "metrics = \"localhost:9100\"",
        "tcp6://localhost:9100",
        &["own metrics"],
    );
    check(
        "metrics = \"vsock://:9100\"",
        "vsock://local:9100",
        &["own metrics"],
    );
    check("metrics = \"vsock://:9100\"", "vsock://local:9101", &[]);
    check(
        "metrics = \"exec:/bin/cat\"",
        "/x",
        &["metrics are not served"],
    );
    check(
        "metrics = \"vsock://:9100?framing=yes\"",
        "/x",
        &["metrics are not served"],
    );
    check("control = \"vsock://:9101\"", "/x", &["guest-control"]);
    check(
        "guest-control = \"tcp://*:9101\"",
        "/x",
        &["a vsock address"],
    );
    check("guest-control = \"vsock://:9101\"", "/x", &[]);
    check(
        "guest-control = \"vsock://:9101\"",
        "vsock://local:9101",
        &["own guest-control"],
    );
    let from =
        |cids: &str| format!("guest-control = \"vsock://:9101\"\nguest-control-from = {cids}");
    for cids in ["[3, 16]", "3", "\"0x10\""] {
        check(&from(cids), "/x", &[]);
    }
    for (cids, part) in [
        ("[]", "it names no guest"),
        ("[3, \"10.0.0.0/8\"]", "10.0.0.0/8 is no CID"),
        ("[\"three\"]", "is no address, network or CID"),
        ("[-1]", "is no CID"),
        ("true", "a list"),
    ] {
        check(&from(cids), "/x", &[":2: guest-control-from", part]);
    }
    check(
        "guest-control-from = [3]",
        "/x",
        &[":1: guest-control-from", "is missing"],
    );
}

/// As the file does.
#[test]
fn the_command_line_says_which_guests_may_control_it() {
    let words = |more: &[&'static str]| {
        let pair = ["forward", "unix:/nowhere/l", "unix:/nowhere/t"];
        [&pair[..], more].concat()
    };
    let at = ["--guest-control", "vsock://:9101"];
    for (more, parts) in [
        (
            &["--guest-control", "tcp://*:9101"][..],
            &["not a vsock address"][..],
        ),
        (&["--guest-control-from", "3"], &["--guest-control"]),
        (
            &[at[0], at[1], "--guest-control-from", "3,::1"],
            &["::1", "is no CID"],
        ),
    ] {
        fails(&words(more), 2, parts);
    }
}
