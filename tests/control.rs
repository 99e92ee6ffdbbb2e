//! The control socket of a real hvsock: every call over raw HTTP, the commands that use it, and who
//! is kept out of it.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::collections::HashSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use command::*;
use common::*;
use hvsock::simulate::{Service, Vm};

/// An echo server on a Unix socket, and an hvsock that leads to it from a TCP port.
struct Scene {
    dir: tempfile::TempDir,
    hvsock: Running,
    port: u16,
    /// That of the metrics, if they are served.
    metrics: Option<u16>,
}

impl Scene {
    fn new() -> Scene {
        Scene::with(&[])
    }

    fn with(more: &[&str]) -> Scene {
        let dir = private_dir();
        let echo = dir.path().join("echo");
        echo_server(&echo);
        let control = format!("--control={}", text(&dir.path().join("c")));
        let arguments = ["forward", "tcp://127.0.0.1:0", text(&echo), &control];
        let hvsock = Running::start(&[&arguments, more].concat());
        hvsock.says("controlled at unix:///");
        let metrics = more.contains(&"--metrics").then(|| {
            let place = hvsock.says("metrics at http://127.0.0.1:");
            let port = place.rsplit_once(':').unwrap().1;
            port.strip_suffix("/metrics").unwrap().parse().unwrap()
        });
        let port = hvsock.tcp_port();
        Scene {
            dir,
            hvsock,
            port,
            metrics,
        }
    }

    fn control(&self) -> PathBuf {
        self.dir.path().join("c")
    }

    fn echo(&self) -> String {
        format!("unix://{}", text(&self.dir.path().join("echo")))
    }

    fn call(&self, method: &str, target: &str, body: &str) -> (u16, Value) {
        call(&self.control(), method, target, body)
    }

    /// Adds a forward to the echo server; its id and its port.
    fn add(&self, name: &str) -> (u16, u64, u16) {
        add(&self.control(), &self.echo(), name)
    }
}

fn add(control: &Path, connect: &str, name: &str) -> (u16, u64, u16) {
    let body = json!({"name": name, "listen": "tcp://127.0.0.1:0", "connect": connect});
    let (status, added) = call(control, "POST", "/v1/forwards", &body.to_string());
    (status, added["id"].as_u64().unwrap(), port_in(&added))
}

fn echo_server(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || std::io::copy(&mut &stream, &mut &stream).map(drop));
        }
    });
}

/// The port on which a forward listens.
fn port_in(forward: &Value) -> u16 {
    let listen = forward["listen"]
        .as_str()
        .unwrap_or_else(|| panic!("{forward}"));
    listen.rsplit_once(':').unwrap().1.parse().unwrap()
}

/// Sends bytes as they are; what comes back until EOF.
fn raw(path: &Path, bytes: &[u8]) -> String {
    let mut client = unix_client(path);
    client.write_all(bytes).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    answer
}

/// An answer's status, headers and body.
fn parse(answer: &str) -> (u16, &str, &str) {
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("{answer:?}"));
    let status = head.strip_prefix("HTTP/1.1 ").unwrap();
    let length = format!("\r\nContent-Length: {}", body.len());
    assert!(
        head.contains(&length) && head.contains("\r\nConnection: close"),
        "{head}"
    );
    (status[..3].parse().unwrap(), head, body)
}

fn call(path: &Path, method: &str, target: &str, body: &str) -> (u16, Value) {
    let length = body.len();
    let request = format!(
        "{method} {target} HTTP/1.1\r\nHost: hvsock\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    let answer = raw(path, request.as_bytes());
    let (status, head, body) = parse(&answer);
    assert!(
        head.contains("\r\nContent-Type: application/json\r\n"),
        "{head}"
    );
    (status, serde_json::from_str(body).unwrap())
}

fn said(output: &std::process::Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

#[test]
fn every_call_does_what_it_says() {
    let mut scene = Scene::new();
    let (status, all) = scene.call("GET", "/v1/status", "");
    assert_eq!(status, 200);
    assert_eq!(all["pid"], scene.hvsock.child.0.id());
    assert_eq!(all["stopping"], false);
    assert_eq!(port_in(&all["forwards"][0]), scene.port);

    let (status, id, port) = scene.add("a/b c");
    assert_eq!(status, 201);
    assert_eq!(ask(tcp(port), b"hello").unwrap(), b"hello");
    let count = |scene: &Scene| {
        scene
            .call("GET", "/v1/forwards", "")
            .1
            .as_array()
            .unwrap()
            .len()
    };
    assert_eq!(count(&scene), 2);
    // By its name, by where it listens, as it was asked for or as it is, and by its id.
    let listen = format!("/v1/forwards/tcp%3A%2F%2F127.0.0.1%3A{port}");
    for target in [
        "/v1/forwards/a%2Fb%20c",
        &listen,
        &format!("/v1/forwards/{id}"),
    ] {
        let (status, one) = scene.call("GET", target, "");
        assert_eq!((status, port_in(&one)), (200, port), "{target}");
        assert_eq!(one["rule"]["listen"], "tcp://127.0.0.1:0");
        assert_eq!(one["state"], "listening");
    }

    let mut client = tcp(port);
    client.write_all(b"some bytes").unwrap();
    client.read_exact(&mut [0; 10]).unwrap();
    let peer = format!("tcp://{}", client.local_addr().unwrap());
    eventually("it is told of", || {
        let (status, all) = scene.call("GET", "/v1/connections", "");
        assert_eq!(status, 200);
        let [one] = &all.as_array().unwrap()[..] else {
            return false;
        };
        assert_eq!((&one["forward"], &one["peer"]), (&json!(id), &json!(peer)));
        one["sent"] == 10 && one["received"] == 10 && one["state"] == "open"
    });
    let (_, one) = scene.call("GET", &listen, "");
    assert_eq!(
        (&one["counters"]["live"], &one["counters"]["accepted"]),
        (&json!(1), &json!(2))
    );

    // Drained: no new clients, and who is there goes on.
    let (status, gone) = scene.call("DELETE", "/v1/forwards/a%2Fb%20c", "");
    assert_eq!((status, port_in(&gone)), (200, port));
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
    client.write_all(b"still").unwrap();
    client.read_exact(&mut [0; 5]).unwrap();
    assert_eq!(scene.call("GET", &listen, "").0, 404);
    assert_eq!(count(&scene), 1);
    // Or cut off.
    let (_, _, port) = scene.add("short");
    let mut cut = tcp(port);
    cut.write_all(b"x").unwrap();
    cut.read_exact(&mut [0; 1]).unwrap();
    assert_eq!(
        scene.call("DELETE", "/v1/forwards/short?grace=0", "").0,
        200
    );
    assert!(is_reset(cut.read(&mut [0])));
    let live = || scene.call("GET", "/v1/status", "").1["live"] == json!(1);
    eventually("it is forgotten", live);

    let (status, why) = scene.call("POST", "/v1/reload", "");
    assert_eq!(
        (status, &why["error"]),
        (409, &json!("there is no file to read again"))
    );
    assert!(why["remedy"].as_str().unwrap().contains("hvsock run"));

    // The end waits for who is there, and says so.
    let (status, stop) = scene.call("POST", "/v1/stop?grace=60", "");
    assert_eq!((status, &stop["grace_seconds"]), (202, &json!(60.0)));
    let (status, all) = scene.call("GET", "/v1/status", "");
    assert_eq!(
        (status, &all["stopping"], &all["live"]),
        (200, &json!(true), &json!(1))
    );
    let late = json!({"listen": "tcp://127.0.0.1:0", "connect": scene.echo()}).to_string();
    assert_eq!(scene.call("POST", "/v1/forwards", &late).0, 503);
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.read_to_end(&mut Vec::new()).unwrap(), 0);
    assert_eq!(scene.hvsock.exit_code(), Some(0));
    assert!(!scene.control().exists());
}

#[test]
fn what_makes_no_sense_is_refused_and_said() {
    let scene = Scene::new();
    let rule = |more: &str| format!(r#"{{"listen": "tcp://127.0.0.1:0", "connect": "/x"{more}}}"#);
    let cases = [
        ("GET", "/", String::new(), 404, "there is no \"/\""),
        ("GET", "/v1/forwards/", String::new(), 404, "/v1/forwards/"),
        ("GET", "/v1/forwards/nobody", String::new(), 404, "nobody"),
        (
            "DELETE",
            "/v1/forwards/nobody",
            String::new(),
            404,
            "nobody",
        ),
        ("DELETE", "/v1/forwards", String::new(), 405, "GET, POST"),
        ("POST", "/v1/status", String::new(), 405, "GET"),
        ("GET", "/v1/stop", String::new(), 405, "POST"),
        ("PUT", "/v1/forwards/x", String::new(), 405, "DELETE"),
        ("POST", "/metrics", String::new(), 405, "GET"),
        ("GET", "/v1/status?x=1", String::new(), 400, "\"x\""),
        (
            "DELETE",
            "/v1/forwards/x?grace=soon",
            String::new(),
            400,
            "grace",
        ),
        ("POST", "/v1/stop?grace=-1", String::new(), 400, "grace"),
        ("POST", "/v1/stop?grace=NaN", String::new(), 400, "grace"),
        ("POST", "/v1/forwards", String::new(), 400, "no rule"),
        ("POST", "/v1/forwards", "{".into(), 400, "no rule"),
        (
            "POST",
            "/v1/forwards",
            "[]".into(),
            400,
            "an object with listen and connect",
        ),
        (
            "POST",
            "/v1/forwards",
            rule(r#", "timeouts": null"#),
            400,
            "an object of times in seconds",
        ),
        (
            "POST",
            "/v1/forwards",
            rule(r#", "color": 1"#),
            400,
            "color: there is no `color`; there are `accept_proxy`, `connect`, `connections`, `from`, `group`, `keepalive`, `listen`, `mode`, `name`",
        ),
        (
            "POST",
            "/v1/forwards",
            rule(r#", "timeouts": {"x": 1}"#),
            400,
            "`x`",
        ),
        (
            "POST",
            "/v1/forwards",
            rule(r#", "timeouts": {"dial": -1}"#),
            400,
            "timeouts.dial",
        ),
        (
            "POST",
            "/v1/forwards",
            rule(r#", "timeouts": {"idle": 0}"#),
            400,
            "timeouts.idle",
        ),
        (
            "POST",
            "/v1/forwards",
            rule(r#", "wait": 1e300"#),
            400,
            "wait",
        ),
        (
            "POST",
            "/v1/forwards",
            rule(r#", "connections": 0"#),
            400,
            "0 is not a number from 1",
        ),
        (
            "POST",
            "/v1/forwards",
            rule(r#", "connections": 2, "reserved": 3"#),
            400,
            "reserves 3 connections, and may have 2",
        ),
        (
            "POST",
            "/v1/forwards",
            rule(r#", "mode": "888""#),
            400,
            "octal",
        ),
        ("POST", "/v1/forwards", rule(r#", "name": """#), 400, "name"),
        (
            "POST",
            "/v1/forwards",
            rule(r#", "name": "a ""#),
            400,
            "blank",
        ),
        (
            "POST",
            "/v1/forwards",
            rule(r#", "name": "a\nb""#),
            400,
            "name",
        ),
        (
            "POST",
            "/v1/forwards",
            r#"{"listen": "8080", "connect": "/x"}"#.into(),
            400,
            "tcp://127.0.0.1:8080",
        ),
        (
            "POST",
            "/v1/forwards",
            r#"{"listen": "/nowhere/at/all", "connect": "/x"}"#.into(),
            400,
            "directory",
        ),
    ];
    for (method, target, body, status, part) in cases {
        let (got, answer) = scene.call(method, target, &body);
        assert_eq!(got, status, "{method} {target} {body}: {answer}");
        assert!(
            answer.to_string().contains(&part.replace('"', "\\\"")),
            "{part}: {answer}"
        );
        assert!(answer["error"].is_string(), "{answer}");
    }
    let long = "x".repeat(70_000);
    for (sent, status) in [
        ("nonsense\r\n\r\n".to_owned(), 400),
        (
            "GET /v1/status HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(),
            501,
        ),
        (
            format!("POST /v1/forwards HTTP/1.1\r\nContent-Length: 70000\r\n\r\n{long}"),
            413,
        ),
        (format!("GET /{} HTTP/1.1\r\n", &long[..20_000]), 431),
    ] {
        let answer = raw(&scene.control(), sent.as_bytes());
        assert_eq!(parse(&answer).0, status, "{answer}");
    }
    let answer = raw(&scene.control(), b"PATCH /v1/forwards HTTP/1.1\r\n\r\n");
    assert!(
        parse(&answer).1.contains("\r\nAllow: GET, POST\r\n"),
        "{answer}"
    );
    assert_eq!(ask(tcp(scene.port), b"as before").unwrap(), b"as before");
    assert_eq!(
        scene
            .call("GET", "/v1/forwards", "")
            .1
            .as_array()
            .unwrap()
            .len(),
        1
    );
}

#[test]
fn to_add_what_is_there_changes_nothing() {
    let scene = Scene::with(&["--dial-timeout", "7", "--connections", "200"]);
    let (first, id, port) = scene.add("web");
    assert_eq!((first, scene.add("web")), (201, (200, id, port)));
    // What is told of a forward is a rule again. What was left out is as on the command line.
    let (_, told) = scene.call("GET", "/v1/forwards/web", "");
    assert_eq!(told["rule"]["timeouts"]["dial"], 7.0);
    let rule = told["rule"].to_string();
    assert_eq!(scene.call("POST", "/v1/forwards", &rule).0, 200);
    // Another one of that name, or at that place.
    let other = json!({"name": "web", "listen": "tcp://127.0.0.1:0", "connect": "/nowhere"});
    let (status, why) = scene.call("POST", "/v1/forwards", &other.to_string());
    assert_eq!(status, 409);
    let why = why["error"].as_str().unwrap();
    assert!(
        why.contains("its connect is unix://") && why.contains("not unix:///nowhere"),
        "{why}"
    );
    assert!(!why.contains("its listen"), "{why}");
    let there = format!("tcp://127.0.0.1:{port}");
    let other = json!({"name": "beside", "listen": there, "connect": scene.echo()});
    let (status, why) = scene.call("POST", "/v1/forwards", &other.to_string());
    assert_eq!(status, 409, "{why}");
    assert!(
        why["error"]
            .as_str()
            .unwrap()
            .contains("its name is web, not beside"),
        "{why}"
    );
    let listen = scene.dir.path().join("w");
    let all = json!({"name": "w", "listen": text(&listen), "connect": "/x", "wait": 2.5,
        "timeouts": {"idle": 60}, "mode": "660", "connections": 9, "reserved": 2});
    let (_, added) = scene.call("POST", "/v1/forwards", &all.to_string());
    let rule = &added["rule"];
    assert_eq!(
        (&rule["wait"], &rule["timeouts"]["idle"]),
        (&json!(2.5), &json!(60.0))
    );
    assert_eq!(
        (&rule["mode"], &rule["timeouts"]["half_closed"]),
        (&json!("660"), &Value::Null)
    );
    assert_eq!(
        (&rule["connections"], &rule["reserved"]),
        (&json!(9), &json!(2))
    );
    assert_eq!(told["rule"]["connections"], 200);
    // Somebody else's port, and one of ours.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for port in [taken.local_addr().unwrap().port(), scene.port] {
        let listen = format!("tcp://127.0.0.1:{port}");
        let other = json!({"listen": listen, "connect": "/x"});
        let (status, why) = scene.call("POST", "/v1/forwards", &other.to_string());
        assert_eq!(status, 409, "{why}");
    }
}

#[test]
fn many_who_add_at_a_time_do_not_disturb_each_other() {
    let scene = Scene::new();
    let (control, echo) = (scene.control(), scene.echo());
    let all = |name: fn(usize) -> String| -> Vec<(u16, u64, u16)> {
        thread::scope(|scope| {
            let add = |i| add(&control, &echo, &name(i));
            let threads: Vec<_> = (0..24).map(|i| scope.spawn(move || add(i))).collect();
            threads.into_iter().map(|it| it.join().unwrap()).collect()
        })
    };
    let same = all(|_| "same".to_owned());
    let new = same.iter().filter(|(status, ..)| *status == 201).count();
    let ports: HashSet<u16> = same.iter().map(|(.., port)| *port).collect();
    assert_eq!((new, ports.len()), (1, 1), "{same:?}");
    let each = all(|i| format!("number {i}"));
    let ports: HashSet<u16> = each.iter().map(|(.., port)| *port).collect();
    assert!(
        each.iter().all(|(status, ..)| *status == 201) && ports.len() == 24,
        "{each:?}"
    );
    for (.., port) in each {
        assert_eq!(ask(tcp(port), b"x").unwrap(), b"x");
    }
}

#[test]
fn fifty_forwards_come_and_go_while_traffic_runs_and_no_descriptor_is_left() {
    let scene = Scene::new();
    assert_eq!(ask(tcp(scene.port), b"warm").unwrap(), b"warm");
    scene.add("warm");
    assert_eq!(scene.call("DELETE", "/v1/forwards/warm", "").0, 200);
    eventually("it is idle", || {
        scene.call("GET", "/v1/status", "").1["live"] == 0
    });
    let before = scene.hvsock.descriptors();
    let end = AtomicBool::new(false);
    let bytes = pattern(100_000);
    thread::scope(|scope| {
        let traffic: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let mut rounds = 0;
                    while !end.load(Ordering::Relaxed) {
                        let (mut there, mut back) = (tcp(scene.port), Vec::new());
                        let reading = there.try_clone().unwrap();
                        thread::scope(|scope| {
                            scope.spawn(|| (&reading).read_to_end(&mut back).unwrap());
                            there.write_all(&bytes).unwrap();
                            there.shutdown(Shutdown::Write).unwrap();
                        });
                        assert!(back == bytes);
                        rounds += 1;
                    }
                    rounds
                })
            })
            .collect();
        for i in 0..50 {
            let name = format!("n{i}");
            let (status, _, port) = scene.add(&name);
            assert_eq!(status, 201);
            assert_eq!(ask(tcp(port), b"through it").unwrap(), b"through it");
            // Half of them go while they are being used.
            let kept = (i % 2 == 0).then(|| tcp(port));
            let target = format!("/v1/forwards/{name}?grace=0");
            assert_eq!(scene.call("DELETE", &target, "").0, 200);
            drop(kept);
        }
        end.store(true, Ordering::Relaxed);
        for rounds in traffic {
            assert!(rounds.join().unwrap() > 0);
        }
    });
    assert_eq!(
        scene
            .call("GET", "/v1/forwards", "")
            .1
            .as_array()
            .unwrap()
            .len(),
        1
    );
    eventually("no descriptor is left", || {
        scene.hvsock.descriptors() <= before
    });
}

#[test]
fn slow_silent_and_rude_clients_disturb_nobody_and_do_not_keep_it_from_ending() {
    let mut scene = Scene::new();
    let path = scene.control();
    let silent: Vec<UnixStream> = (0..40).map(|_| unix_client(&path)).collect();
    let slow: Vec<UnixStream> = (0..8)
        .map(|_| {
            let mut client = unix_client(&path);
            client
                .write_all(b"POST /v1/forwards HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
                .unwrap();
            client
        })
        .collect();
    for seed in 0..20 {
        let mut client = unix_client(&path);
        let _ = client.write_all(&pattern(1000 + seed));
        // Gone before there can be an answer.
    }
    let begun = Instant::now();
    assert_eq!(scene.call("GET", "/v1/status", "").0, 200);
    // All 48 would have taken three times the 5 s that each may take.
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    let more: Vec<UnixStream> = (0..10).map(|_| unix_client(&path)).collect();
    assert_eq!(scene.call("POST", "/v1/stop?grace=0", "").0, 202);
    let begun = Instant::now();
    assert_eq!(scene.hvsock.exit_code(), Some(0));
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    assert!(!path.exists());
    drop((silent, slow, more));
}

/// Idle and half-asked clients are put out for those who ask, and are few.
#[test]
fn a_flood_of_idle_clients_keeps_nobody_who_asks() {
    const IDLE: usize = 1000;
    let scene = Scene::with(&["--metrics", "0"]);
    let (path, port) = (scene.control(), scene.metrics.unwrap());
    scene.call("GET", "/v1/status", "");
    let before = scene.hvsock.descriptors();
    let scrape = || {
        let mut client = tcp(port);
        client.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(parse(&answer).0, 200);
    };
    let mut metrics = Vec::new();
    let mut control = Vec::new();
    for i in 0..IDLE {
        let mut client = tcp(port);
        let mut other = unix_client(&path);
        if i % 2 == 0 {
            // It may have been put out already.
            let _ = client.write_all(b"GET /metrics HTTP/1.1\r\nHost: ");
            let _ = other.write_all(b"POST /v1/forwards HTTP/1.1\r\nContent-Length: 9\r\n\r\n{");
        }
        metrics.push(client);
        control.push(other);
    }
    let begun = Instant::now();
    scrape();
    assert_eq!(scene.call("GET", "/v1/status", "").0, 200);
    // None of them is waited for, who have 5 s each.
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    for _ in 0..10 {
        scrape();
        assert_eq!(scene.call("GET", "/v1/status", "").0, 200);
    }
    let more = scene.hvsock.descriptors().saturating_sub(before);
    assert!(more <= 2 * 256 + 16, "{more}");
    drop((metrics, control));
    eventually("they are gone", || scene.hvsock.descriptors() <= before + 8);
    assert_eq!(ask(tcp(scene.port), b"as before").unwrap(), b"as before");
}

const MAC: bool = cfg!(target_os = "macos");

const PLAIN: [&str; 4] = ["forward", "tcp://127.0.0.1:0", "/nowhere", "--control"];

#[test]
fn its_place_is_the_users_alone() {
    let dir = private_dir();
    let runtime = dir.path();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    let home = match MAC {
        true => runtime.join(format!("hvsock-{}", nix::unistd::geteuid())),
        false => runtime.join("hvsock"),
    };
    let socket = home.join("control.sock");
    let mut first = Running::spawn(in_runtime(runtime, &PLAIN));
    first.says("controlled at");
    assert_eq!((mode(&home), mode(&socket)), (0o700, 0o600));
    assert_eq!(call(&socket, "GET", "/v1/status", "").0, 200);

    let second = output(in_runtime(runtime, &PLAIN));
    let (code, _, why) = said(&second);
    assert_eq!(code, Some(1));
    assert!(
        why.contains("another hvsock runs") && why.contains("--control"),
        "{why}"
    );
    assert_eq!(call(&socket, "GET", "/v1/status", "").0, 200);

    // One that died leaves its file; the next takes its place.
    first.child.0.kill().unwrap();
    first.child.0.wait().unwrap();
    assert!(socket.exists());
    let mut third = Running::spawn(in_runtime(runtime, &PLAIN));
    third.says("controlled at");
    assert_eq!(
        call(&socket, "GET", "/v1/status", "").1["pid"],
        third.child.0.id()
    );
    // A file that is removed is made again, and its directory with it.
    fs::remove_file(&socket).unwrap();
    eventually("it is made again", || socket.exists());
    fs::remove_dir_all(&home).unwrap();
    eventually("it is made again", || socket.exists());
    assert_eq!((mode(&home), mode(&socket)), (0o700, 0o600));
    assert_eq!(call(&socket, "GET", "/v1/status", "").0, 200);
    third.signal("TERM");
    assert_eq!(third.exit_code(), Some(0));
    assert!(!socket.exists());

    for (bad, part) in [(0o755, "is open to others"), (0o777, "is open to others")] {
        fs::set_permissions(&home, fs::Permissions::from_mode(bad)).unwrap();
        let (code, _, why) = said(&output(in_runtime(runtime, &PLAIN)));
        assert_eq!(code, Some(1));
        assert!(why.contains(part) && why.contains("chmod 700"), "{why}");
    }
    fs::remove_dir(&home).unwrap();
    let elsewhere = runtime.join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::set_permissions(&elsewhere, fs::Permissions::from_mode(0o700)).unwrap();
    symlink(&elsewhere, &home).unwrap();
    let (code, _, why) = said(&output(in_runtime(runtime, &PLAIN)));
    assert_eq!(code, Some(1));
    assert!(why.contains("is no directory"), "{why}");

    // A place of one's own choice, too, must be one in which no stranger can put another socket.
    let open = runtime.join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    let there = format!("--control={}", text(&open.join("s")));
    fails(
        &["forward", "tcp://127.0.0.1:0", "/nowhere", &there],
        1,
        &["may be written by others", "--control PATH"],
    );
    let long = format!("--control={}/{}", text(runtime), "n".repeat(150));
    fails(
        &["forward", "tcp://127.0.0.1:0", "/nowhere", &long],
        1,
        &["150 bytes", "shorter name"],
    );
}

#[test]
fn a_forward_that_would_lead_to_it_is_refused() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path().join("vm"))
        .guest(7, Service::Echo)
        .start()
        .unwrap();
    let (state, socket) = (dir.path().join("vm"), dir.path().join("c"));
    let control = format!("--control={}", text(&socket));
    symlink("c", dir.path().join("link")).unwrap();
    fs::create_dir(dir.path().join("sub")).unwrap();
    symlink(dir.path(), dir.path().join("sub/up")).unwrap();
    for way in ["c", "link", "./c", "sub/../c", "sub/up/c"] {
        let target = format!("5000:{}/{way}", text(dir.path()));
        let arguments = ["expose", "--vm", text(&state), "-R", &target, &control];
        fails(&arguments, 1, &["no forward may lead there", "controlled"]);
        assert!(!socket.exists());
    }
    let mut relative = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    relative.args(["forward", "tcp://127.0.0.1:0", "./link", "--control=c"]);
    relative.current_dir(dir.path());
    let (code, _, why) = said(&output(relative));
    assert!(
        code == Some(1) && why.contains("no forward may lead there"),
        "{why}"
    );

    let arguments = [
        "expose",
        "--vm",
        text(&state),
        "-L",
        "0:7",
        &control,
        "--metrics",
        "0",
    ];
    let hvsock = Running::start(&arguments);
    let metrics = hvsock.says("metrics at http://127.0.0.1:");
    let port = metrics
        .rsplit_once(':')
        .unwrap()
        .1
        .split('/')
        .next()
        .unwrap();
    let ways = [
        format!("unix://{}/link", text(dir.path())),
        format!("tcp://127.0.0.1:{port}"),
        format!("tcp://localhost:{port}"),
        format!("tcp://0.0.0.0:{port}"),
        format!("tcp://[::]:{port}"),
    ];
    for connect in &ways {
        for listen in [
            "tcp://127.0.0.1:0",
            &format!("hyperkit://:5001{}", text(&state)),
        ] {
            let rule = json!({"listen": listen, "connect": connect}).to_string();
            let (status, why) = call(&socket, "POST", "/v1/forwards", &rule);
            assert_eq!(status, 403, "{why}");
            assert!(
                why["error"]
                    .as_str()
                    .unwrap()
                    .contains("no forward may lead there"),
                "{why}"
            );
        }
    }
    assert_eq!(
        call(&socket, "GET", "/v1/forwards", "")
            .1
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn a_guest_that_is_led_there_all_the_same_is_not_let_in() {
    let dir = private_dir();
    let state = dir.path().join("vm");
    let vm = Vm::builder(&state).guest(7, Service::Echo).start().unwrap();
    let (socket, link) = (dir.path().join("c"), dir.path().join("link"));
    let innocent = dir.path().join("innocent");
    echo_server(&innocent);
    symlink(&innocent, &link).unwrap();
    let arguments = [
        "expose",
        "--vm",
        text(&state),
        "-R",
        &format!("5000:{}", text(&link)),
        &format!("--control={}", text(&socket)),
    ];
    let hvsock = Running::start(&arguments);
    hvsock.says("5000");
    let ask_as_guest = || {
        let mut guest = vm.dial(5000).unwrap();
        let _ = guest.write_all(b"GET /v1/status HTTP/1.1\r\n\r\n");
        let _ = guest.shutdown(Shutdown::Write);
        let mut heard = Vec::new();
        let _ = guest.read_to_end(&mut heard);
        String::from_utf8(heard).unwrap()
    };
    assert!(ask_as_guest().starts_with("GET /v1/status"));
    // Behind its back.
    fs::remove_file(&link).unwrap();
    symlink(&socket, &link).unwrap();
    for _ in 0..3 {
        assert_eq!(ask_as_guest(), "");
    }
    hvsock.complains("refused a client: it came through one of our own forwards");
    assert_eq!(call(&socket, "GET", "/v1/status", "").0, 200);
    let again = hvsock
        .err
        .try_iter()
        .filter(|line| line.contains("refused a client: it came"));
    assert_eq!(again.count(), 0);
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn what_is_added_has_the_options_that_are_given_and_else_those_of_the_process() {
    let scene = Scene::with(&["--dial-timeout", "7", "--idle-timeout", "90"]);
    let path = scene.control();
    let add = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
        command.args(["add", "--json", "--control", text(&path)]);
        command.args(arguments);
        said(&output(command))
    };
    let options = [
        "--from=127.0.0.0/8,::1",
        "--connections=2",
        "--dial-timeout=30", // What it is for a process that isn't told.
        "--proxy-protocol=v2",
        "--name=told",
    ];
    let (code, told, why) = add(&[&options[..], &["tcp://127.0.0.1:0", "/a"]].concat());
    assert_eq!(code, Some(0), "{why}");
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!(told["rule"]["from"], json!(["127.0.0.0/8", "::1"]));
    assert_eq!(told["rule"]["connections"], 2);
    assert_eq!(told["rule"]["proxy_protocol"], "v2");
    assert_eq!(told["rule"]["timeouts"]["dial"], 30.0);
    assert_eq!(told["rule"]["timeouts"]["idle"], 90.0);
    let (_, untold, _) = add(&["tcp://127.0.0.1:0", "/b"]);
    let untold: Value = serde_json::from_str(&untold).unwrap();
    assert_eq!(untold["rule"]["from"], json!([]));
    assert_eq!(untold["rule"]["timeouts"]["dial"], 7.0);
    let (code, _, why) = add(&["--from=everywhere", "tcp://127.0.0.1:0", "/c"]);
    assert!(code == Some(2) && why.contains("everywhere"), "{why}");
}

/// As `hvsock forward` does at its start.
#[test]
fn an_addition_tells_what_its_target_lacks_and_whose_an_address_is() {
    let scene = Scene::with(&["--no-keeper", "--metrics", "0"]);
    let path = scene.control();
    let add = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
        command.args(["add", "--control", text(&path)]);
        command.args(arguments);
        said(&output(command))
    };
    let missing = format!("file:{}/no/such", text(scene.dir.path()));
    let (code, out, err) = add(&["tcp://127.0.0.1:0", &missing]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains(&missing), "{out}");
    assert!(err.contains("there is no directory"), "{err}");

    let metrics = format!("tcp://127.0.0.1:{}", scene.metrics.unwrap());
    let control = format!("unix://{}", text(&path));
    for (own, part) in [(&metrics, "metrics at"), (&control, "controlled at")] {
        let (code, _, err) = add(&[own, "tcp://127.0.0.1:1"]);
        assert_eq!(code, Some(1), "{err}");
        let what = format!("this hvsock itself listens there ({part} {own})");
        assert!(err.contains(&what), "{err}");
    }
}

#[test]
fn the_commands_show_add_remove_and_stop() {
    let mut scene = Scene::with(&["--no-keeper"]);
    let (path, dir) = (scene.control(), scene.dir.path().to_owned());
    let hvsock = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
        command.args(arguments).args(["--control", text(&path)]);
        command.current_dir(&dir);
        said(&output(command))
    };
    // A relative path means what it means to who writes it.
    let add = ["add", "--name", "web", "tcp://127.0.0.1:0", "./echo"];
    let (code, out, err) = hvsock(&add);
    assert_eq!(code, Some(0), "{err}");
    let echo = format!("unix://{}/echo", text(&dir.canonicalize().unwrap()));
    assert!(
        out.starts_with("web: tcp://127.0.0.1:") && out.contains(&echo),
        "{out}"
    );
    assert_eq!(hvsock(&add), (Some(0), out.clone(), String::new()));
    let listen = out.split(' ').nth(1).unwrap().to_owned();
    let port = listen.rsplit_once(':').unwrap().1.parse().unwrap();
    assert_eq!(ask(tcp(port), &[1; 3000]).unwrap(), [1; 3000]);
    let (code, out, _) = hvsock(&[
        "add",
        "tcp://127.0.0.1:0",
        "/nowhere",
        "--name",
        "gone",
        "--json",
    ]);
    assert_eq!(code, Some(0));
    let gone: Value = serde_json::from_str(&out).unwrap();
    assert!(resets_clients(port_in(&gone)));

    eventually("all is counted", || {
        scene.call("GET", "/v1/status", "").1["live"] == 0
    });
    let (code, out, err) = hvsock(&["status"]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    let line = |part: &str| {
        let found = out.lines().find(|line| line.contains(part));
        found.unwrap_or_else(|| panic!("{part}: {out}")).to_owned()
    };
    assert!(line("process").contains(&scene.hvsock.child.0.id().to_string()));
    let web: Vec<String> = line("web")
        .split("  ")
        .filter(|it| !it.is_empty())
        .map(|it| it.trim().to_owned())
        .collect();
    assert_eq!(
        web,
        [
            "web",
            &listen,
            &echo,
            "listening",
            "0",
            "1",
            "2.93 KiB",
            "2.93 KiB",
            "0"
        ]
    );
    assert!(line("gone ").contains("1 (1 absent)"));
    assert!(line("gone, ").contains("No such file"), "{out}");
    let (_, shown, _) = hvsock(&["status", "--json"]);
    let (_, answered) = scene.call("GET", "/v1/status", "");
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["forwards"], answered["forwards"]);

    let (code, out, err) = hvsock(&["remove", "gone", &listen]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert!(
        out.contains("removed gone:") && out.contains("removed web:"),
        "{out}"
    );
    // What is left without a listener, and without a keeper, can hurt a VM.
    let vm = dir.join("vm");
    fs::create_dir(&vm).unwrap();
    let guests = format!("hyperkit://:5000{}", text(&vm));
    assert_eq!(hvsock(&["add", &guests, "./echo"]).0, Some(0));
    let (code, _, err) = hvsock(&["remove", &guests]);
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("goes on dialling port 5000"), "{err}");

    let (code, _, err) = hvsock(&["remove", "web"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("there is no forward \"web\""), "{err}");
    let (code, _, err) = hvsock(&["reload"]);
    assert!(
        code == Some(1) && err.contains("no file to read again"),
        "{err}"
    );
    assert_eq!(hvsock(&["add", "tcp://127.0.0.1:0"]).0, Some(2));
    assert_eq!(hvsock(&["add"]).0, Some(2));

    assert_eq!(
        hvsock(&["stop"]),
        (Some(0), "stopped\n".to_owned(), String::new())
    );
    assert_eq!(scene.hvsock.exit_code(), Some(0));
    for verb in [&["status"][..], &["stop"], &["remove", "x"], &add] {
        let (code, out, err) = hvsock(verb);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{verb:?}");
        for part in ["no hvsock answers at unix:///", "hvsock run", "--control"] {
            assert!(err.contains(part), "{verb:?}: {err}");
        }
    }
    let (code, _, err) = hvsock(&["top"]);
    assert!(code == Some(1) && err.contains("needs a terminal"), "{err}");
}

/// Has Prometheus' own lint read metrics, where it is installed.
fn lint(metrics: &str) {
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped());
    promtool.stdout(Stdio::piped()).stderr(Stdio::piped());
    let Ok(mut child) = promtool.spawn() else {
        println!("skipped: there is no promtool; install the package prometheus, or run .ci/run");
        return;
    };
    let mut input = child.stdin.take().unwrap();
    input.write_all(metrics.as_bytes()).unwrap();
    drop(input);
    let said = child.wait_with_output().unwrap();
    assert!(said.status.success(), "{said:?}: {metrics}");
}

#[test]
fn metrics_keep_to_prometheus_format_and_are_all_that_tcp_serves() {
    let scene = Scene::with(&["--metrics", "0"]);
    let port = scene.metrics.unwrap();
    let (status, _, gone) = scene.add(r#"it's "a" \ name"#);
    assert_eq!(status, 201);
    assert_eq!(ask(tcp(gone), &[7; 5000]).unwrap(), [7; 5000]);
    // One that answers with less than it was sent.
    let brief = scene.dir.path().join("brief");
    let listener = UnixListener::bind(&brief).unwrap();
    let serve = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_to_end(&mut Vec::new()).unwrap();
        stream.write_all(b"ok").unwrap();
    });
    let target = format!("unix://{}", text(&brief));
    let (status, _, short) = add(&scene.control(), &target, "brief");
    assert_eq!(status, 201);
    assert_eq!(ask(tcp(short), &[7; 300]).unwrap(), *b"ok");
    serve.join().unwrap();
    eventually("all is counted", || {
        scene.call("GET", "/v1/status", "").1["live"] == 0
    });
    let tcp_get = |request: &str| {
        let mut client = tcp(port);
        client
            .write_all(format!("{request} HTTP/1.1\r\n\r\n").as_bytes())
            .unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer
    };
    for answer in [
        tcp_get("GET /metrics"),
        raw(&scene.control(), b"GET /metrics HTTP/1.1\r\n\r\n"),
    ] {
        let (status, head, body) = parse(&answer);
        assert_eq!(status, 200);
        assert!(
            head.contains("Content-Type: text/plain; version=0.0.4"),
            "{head}"
        );
        lint(body);
        let samples = exposition(body);
        let of = |name: &str, forward: &str| {
            let mut found = samples.iter().filter(|it| it.name == name);
            let found = found.find(|it| it.label("name") == Some(forward));
            found
                .unwrap_or_else(|| panic!("{name} {forward}: {body}"))
                .value
        };
        let name = r#"it's "a" \ name"#;
        assert_eq!(of("hvsock_forward_accepted_total", name), 1.0);
        assert_eq!(of("hvsock_forward_sent_bytes_total", name), 5000.0);
        assert_eq!(of("hvsock_forward_sent_bytes_total", "brief"), 300.0);
        assert_eq!(of("hvsock_forward_received_bytes_total", "brief"), 2.0);
        assert_eq!(of("hvsock_forward_live", ""), 0.0);
        let sum = |names: &[&str]| -> f64 {
            let found = samples
                .iter()
                .filter(|it| names.contains(&it.name.as_str()));
            found.map(|it| it.value).sum()
        };
        let delivered = [
            "hvsock_forward_sent_bytes_total",
            "hvsock_forward_received_bytes_total",
        ];
        let carried = sum(&["hvsock_carried_bytes_total"]);
        assert_eq!(carried, sum(&delivered), "{body}");
        let status = scene.call("GET", "/v1/status", "").1;
        let ways = ["copied", "spliced"].map(|way| status["carried"][way].as_u64().unwrap());
        assert_eq!(ways.iter().sum::<u64>() as f64, carried);
        let open = samples
            .iter()
            .find(|it| it.name == "process_open_fds")
            .unwrap();
        assert!((5.0..200.0).contains(&open.value), "{}", open.value);
    }
    for request in [
        "GET /v1/status",
        "POST /v1/stop",
        "DELETE /v1/forwards/0",
        "GET /",
    ] {
        assert_eq!(parse(&tcp_get(request)).0, 404, "{request}");
    }
    assert_eq!(parse(&tcp_get("POST /metrics")).0, 405);
    assert_eq!(scene.call("GET", "/v1/status", "").1["stopping"], false);
}

#[derive(Debug)]
struct Sample {
    name: String,
    labels: Vec<(String, String)>,
    value: f64,
}

impl Sample {
    fn label(&self, key: &str) -> Option<&str> {
        let label = self.labels.iter().find(|(it, _)| it == key);
        label.map(|(_, value)| value.as_str())
    }
}

/// Reads Prometheus' text format, strictly: each family has one HELP and one TYPE, and then its
/// samples, together, none twice; names, labels, escapes and numbers are as the format has them.
fn exposition(text: &str) -> Vec<Sample> {
    let is_name = |name: &str| {
        let mut chars = name.chars();
        chars
            .next()
            .is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
            && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    assert!(text.ends_with('\n'));
    let (mut families, mut helped) = (Vec::<String>::new(), None);
    let (mut samples, mut seen) = (Vec::new(), HashSet::new());
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, _) = help.split_once(' ').unwrap();
            assert!(is_name(name) && helped.replace(name).is_none(), "{line}");
            continue;
        }
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert_eq!(helped.take(), Some(name), "{line}");
            assert!(!families.iter().any(|it| it == name), "{line}");
            let is_total = name.ends_with("_total");
            assert!(kind == if is_total { "counter" } else { "gauge" }, "{line}");
            families.push(name.to_owned());
            continue;
        }
        let split = line.find(['{', ' ']).unwrap();
        let (name, mut rest) = line.split_at(split);
        assert!(is_name(name), "{line}");
        assert_eq!(families.last().map(String::as_str), Some(name), "{line}");
        let mut labels = Vec::new();
        if let Some(inner) = rest.strip_prefix('{') {
            rest = inner;
            loop {
                let (key, quoted) = rest.split_once("=\"").unwrap();
                assert!(is_name(key), "{line}");
                let (mut value, mut chars) = (String::new(), quoted.char_indices());
                let end = loop {
                    match chars.next().unwrap() {
                        (at, '"') => break at,
                        (_, '\\') => value.push(match chars.next().unwrap().1 {
                            'n' => '\n',
                            c @ ('\\' | '"') => c,
                            c => panic!("\\{c} in {line}"),
                        }),
                        (_, c) => value.push(c),
                    }
                };
                labels.push((key.to_owned(), value));
                rest = &quoted[end + 1..];
                match rest.strip_prefix(',') {
                    Some(more) => rest = more,
                    None => break,
                }
            }
            rest = rest.strip_prefix('}').unwrap_or_else(|| panic!("{line}"));
        }
        let value = rest.strip_prefix(' ').unwrap().parse().unwrap();
        assert!(seen.insert((name.to_owned(), labels.clone())), "{line}");
        samples.push(Sample {
            name: name.to_owned(),
            labels,
            value,
        });
    }
    samples
}

/// Of the ports that stand for sockets in a directory no other test knows.
#[test]
fn a_range_is_added_as_a_whole_and_removed_at_once() {
    let scene = Scene::new();
    let place = |port: &str, name: &str| {
        let path = scene.dir.path().join(name);
        format!("vsock-mux://:{port}{}", text(&path))
    };
    let body = |listen: &str, connect: &str| {
        json!({"name": "web", "listen": listen, "connect": connect}).to_string()
    };
    let names = |forwards: &Value| -> Vec<String> {
        let all = forwards.as_array().unwrap().iter();
        all.map(|it| it["name"].as_str().unwrap_or_default().to_owned())
            .collect()
    };
    let carried = || names(&scene.call("GET", "/v1/forwards", "").1);
    let range = body(&place("8000-8002", "vm"), &place("80-82", "guest"));
    let (status, added) = scene.call("POST", "/v1/forwards", &range);
    assert_eq!(status, 201, "{added}");
    assert_eq!(names(&added), ["web-8000", "web-8001", "web-8002"]);
    assert_eq!(added[1]["listen"], place("8001", "vm"));
    assert_eq!(added[1]["connect"], place("81", "guest"));
    assert_eq!(scene.call("POST", "/v1/forwards", &range), (200, added));
    assert_eq!(scene.call("DELETE", "/v1/forwards/web-8001", "").0, 200);
    // What is shown by a name is what is removed by it.
    let (status, shown) = scene.call("GET", "/v1/forwards/web", "");
    assert_eq!(status, 200, "{shown}");
    let (status, removed) = scene.call("DELETE", "/v1/forwards/web", "");
    assert_eq!(status, 200, "{removed}");
    assert_eq!(names(&removed), ["web-8000", "web-8002"]);
    assert_eq!(names(&shown), names(&removed));
    for method in ["GET", "DELETE"] {
        assert_eq!(scene.call(method, "/v1/forwards/web", "").0, 404);
    }
    // All or none.
    let before = carried();
    let file = |port: u16| scene.dir.path().join(format!("vm_{port}"));
    let taken = UnixListener::bind(file(8002)).unwrap();
    let (status, why) = scene.call("POST", "/v1/forwards", &range);
    assert_eq!(status, 409, "{why}");
    let error = why["error"].as_str().unwrap();
    assert!(
        error.contains(&place("8002", "vm")) && error.contains("none of the 3 forwards"),
        "{error}"
    );
    assert_eq!(carried(), before);
    assert!(!file(8000).exists() && !file(8001).exists());
    drop(taken);
    for (listen, connect, part) in [
        (
            "tcp://*:80-90",
            "tcp://*:80",
            "11 ports on one side, 1 port on the other",
        ),
        (
            "tcp://*:90-80",
            "tcp://*:80-90",
            "listen: the range 90-80 goes down; write 80-90",
        ),
        ("tcp://*:80-", "tcp://*:80", "has no end; write 80-LAST"),
        ("tcp://*:0-2", "tcp://*:80-82", "begins with port 0"),
        ("vsock://:1-9999", "tcp://*:1-9999", "more than 4096 ports"),
        ("tcp://*:1-2", "tcp://*:65535-65536", "connect: "),
    ] {
        let (status, why) = scene.call("POST", "/v1/forwards", &body(listen, connect));
        let error = why["error"].as_str().unwrap();
        assert!(status == 400 && error.contains(part), "{error}");
    }
}

#[test]
fn a_port_may_be_a_number_as_in_a_file() {
    let scene = Scene::new();
    let rule = json!({"listen": 0, "connect": 80}).to_string();
    let (status, added) = scene.call("POST", "/v1/forwards", &rule);
    assert_eq!(status, 201, "{added}");
    assert_eq!(added["connect"], "tcp://127.0.0.1:80");
    assert_eq!(added["rule"]["listen"], "tcp://127.0.0.1:0");
    for (listen, part) in [
        (json!(99999), "listen: TCP port 99999 is larger than 65535"),
        (json!(true), "listen: it is true or false; write an address"),
    ] {
        let rule = json!({"listen": listen, "connect": 80}).to_string();
        let (status, why) = scene.call("POST", "/v1/forwards", &rule);
        let error = why["error"].as_str().unwrap();
        assert!(status == 400 && error.contains(part), "{error}");
    }
}

/// A name with a port is not a part of a range for that: it may have been given so.
#[test]
fn what_was_added_singly_is_not_removed_as_a_range() {
    let scene = Scene::new();
    let place = |port: &str, name: &str| {
        let path = scene.dir.path().join(name);
        format!("vsock-mux://:{port}{}", text(&path))
    };
    let add = |name: &str, listen: &str, connect: &str| {
        let body = json!({
            "name": name, "listen": place(listen, "vm"), "connect": place(connect, "guest"),
        });
        scene.call("POST", "/v1/forwards", &body.to_string()).0
    };
    assert_eq!(add("app-40", "40", "10"), 201);
    for (listen, connect) in [("43", "13"), ("44", "14"), ("46", "16")] {
        assert_eq!(add(&format!("db-{listen}"), listen, connect), 201);
    }
    for (name, parts) in [
        ("app", &["\"app-40\""][..]),
        ("db", &["\"db-43\"", "\"db-46\""]),
    ] {
        let (status, why) = scene.call("DELETE", &format!("/v1/forwards/{name}"), "");
        assert_eq!(status, 404, "{why}");
        assert_eq!(why["error"], format!("there is no forward {name:?}"));
        let shown = scene.call("GET", &format!("/v1/forwards/{name}"), "");
        assert_eq!(shown, (404, why.clone()));
        let remedy = why["remedy"].as_str().unwrap();
        assert!(parts.iter().all(|part| remedy.contains(part)), "{remedy}");
    }
    // Beside those a range of that name goes alone.
    assert_eq!(add("db", "50-51", "20-21"), 201);
    let (status, removed) = scene.call("DELETE", "/v1/forwards/db", "");
    assert_eq!(status, 200, "{removed}");
    let names = removed.as_array().unwrap().iter().map(|it| &it["name"]);
    assert_eq!(names.collect::<Vec<_>>(), ["db-50", "db-51"]);
    let (_, left) = scene.call("GET", "/v1/forwards", "");
    let left = left.as_array().unwrap().iter();
    let left: Vec<_> = left.filter_map(|it| it["name"].as_str()).collect();
    for name in ["app-40", "db-43", "db-44", "db-46"] {
        assert!(left.contains(&name), "{left:?}");
    }
    // One that is there and asked for as a part of a range is one from then on.
    assert_eq!(add("app", "40-41", "10-11"), 201);
    assert_eq!(add("app-40", "40", "10"), 200);
    let (_, removed) = scene.call("DELETE", "/v1/forwards/app", "");
    assert_eq!(removed.as_array().unwrap().len(), 2, "{removed}");
}

#[test]
fn commands_take_a_range_where_they_take_an_address() {
    let scene = Scene::new();
    let place = |port: &str, name: &str| {
        let path = scene.dir.path().join(name);
        format!("vsock-mux://:{port}{}", text(&path))
    };
    let path = scene.control();
    let hvsock = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
        command.args(arguments).args(["--control", text(&path)]);
        said(&output(command))
    };
    let (listen, connect) = (place("8000-8002", "vm"), place("80-82", "guest"));
    let (code, out, err) = hvsock(&["add", "--name", "web", &listen, &connect]);
    assert_eq!(code, Some(0), "{err}");
    let line = |port: &str, guest: &str| {
        format!(
            "web-{port}: {} -> {}",
            place(port, "vm"),
            place(guest, "guest")
        )
    };
    let lines = [line("8000", "80"), line("8001", "81"), line("8002", "82")];
    assert_eq!(out.lines().collect::<Vec<_>>(), lines);
    // What isn't there is told of by its address.
    assert_eq!(hvsock(&["remove", "web-8001"]).0, Some(0));
    let (code, out, err) = hvsock(&["remove", &listen]);
    assert_eq!((code, out.lines().count()), (Some(1), 2), "{err}");
    let part = format!("there is no forward \"{}\"", place("8001", "vm"));
    assert!(err.contains(&part) && err.lines().count() == 1, "{err}");
    // A VM's own range has a name, too.
    let (vm, range) = (
        place("", "vm").replace("://:", "://"),
        format!("5000-5001:{connect}"),
    );
    let (code, _, err) = hvsock(&["add", "--name", "x", "--vm", &vm, "-R", &range]);
    assert!(
        code == Some(2) && err.contains("2 ports on one side"),
        "{err}"
    );
    let range = range.replace("80-82", "80-81");
    let (code, out, err) = hvsock(&["add", "--name", "x", "--vm", &vm, "-R", &range]);
    assert_eq!(code, Some(0), "{err}");
    assert!(
        out.starts_with("x-5000: ") && out.contains("x-5001: "),
        "{out}"
    );
    let (code, out, _) = hvsock(&["remove", "x"]);
    assert_eq!((code, out.lines().count()), (Some(0), 2), "{out}");
    let two = ["add", "--name", "x", &listen, &connect, "/a", "/b"];
    let (code, _, err) = hvsock(&two);
    assert!(
        code == Some(2) && err.contains("one forward or range"),
        "{err}"
    );
    // Who has the one that can't be had is named.
    let other = ["forward", &place("8001", "vm"), "/nowhere"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(other).env("XDG_RUNTIME_DIR", scene.dir.path());
    let other = Running::spawn(command);
    other.says(&place("8001", "vm"));
    let mut add = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    add.args(["add", &listen, &connect, "--control", text(&path)]);
    let (code, _, err) = said(&output({
        add.env("XDG_RUNTIME_DIR", scene.dir.path());
        add
    }));
    assert_eq!(code, Some(1), "{err}");
    let process = format!("hvsock process {} listens there", other.child.0.id());
    assert!(
        err.contains(&process) && err.contains(&place("8001", "vm")),
        "{err}"
    );
    drop(other);
    // `forward` itself.
    let forward = Running::start(&["forward", &listen, &connect, "--control=off"]);
    for port in ["8000", "8001", "8002"] {
        forward.says(&place(port, "vm"));
    }
    fails(
        &["forward", &listen, &place("80", "guest")],
        2,
        &[&listen, "3 ports on one side, 1 port on the other"],
    );
    fails(
        &["forward", "tcp://127.0.0.1:90-80", "/a"],
        2,
        &["the range 90-80 goes down; write 80-90"],
    );
}
