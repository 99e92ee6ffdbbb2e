//! Who uses a forward, in which state each connection is, and how one is ended: by the command.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use command::*;
use common::*;
use hvsock::simulate::{Service, Vm};

/// An hvsock with a control socket.
struct Scene {
    dir: tempfile::TempDir,
    hvsock: Running,
}

fn scene(addresses: impl FnOnce(&Path) -> Vec<String>, more: &[&str]) -> Scene {
    let dir = private_dir();
    let control = format!("--control={}", text(&dir.path().join("c")));
    let addresses = addresses(dir.path());
    let addresses = addresses.iter().map(String::as_str);
    let arguments = ["forward", &control, "--access-log"];
    let arguments: Vec<&str> = arguments.into_iter().chain(addresses).collect();
    let hvsock = Running::start(&[&arguments, more].concat());
    hvsock.says("controlled at");
    Scene { dir, hvsock }
}

/// Where the only forward of a scene listens.
enum At {
    /// On a TCP port.
    Port,
    /// On the Unix socket `listen`.
    Path,
}

/// A scene with one forward, to a server that is there.
fn scene_with_server(listen: At, more: &[&str]) -> (Scene, UnixListener) {
    let mut server = None;
    let addresses = |dir: &Path| {
        server = Some(UnixListener::bind(dir.join("server")).unwrap());
        let listen = match listen {
            At::Port => "tcp://127.0.0.1:0".to_owned(),
            At::Path => at(dir, "listen"),
        };
        vec![listen, at(dir, "server")]
    };
    let scene = scene(addresses, more);
    (scene, server.unwrap())
}

impl Scene {
    fn control(&self) -> PathBuf {
        self.dir.path().join("c")
    }

    fn asked(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let output = run(&[arguments, &["--control", text(&self.control())]].concat());
        let said = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            said(output.stdout),
            said(output.stderr),
        )
    }

    fn connections(&self) -> Vec<Value> {
        let (code, out, err) = self.asked(&["connections", "--json"]);
        assert_eq!(code, Some(0), "{err}");
        serde_json::from_str(&out).unwrap()
    }

    /// The only connection, once it is in that state.
    fn only(&self, state: &str) -> Value {
        let mut found = Value::Null;
        eventually(&format!("one is {state}"), || {
            let all = self.connections();
            found = all.first().cloned().unwrap_or_default();
            all.len() == 1 && found["state"] == state
        });
        found
    }
}

fn at(dir: &Path, name: &str) -> String {
    format!("unix://{}", text(&dir.join(name)))
}

#[test]
fn the_process_behind_a_unix_socket_is_told_of_everywhere() {
    let (scene, server) = scene_with_server(At::Path, &[]);
    // Another program than this one.
    let listen = scene.dir.path().join("listen");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(["cat", &at(scene.dir.path(), "listen")]);
    command.stdin(std::process::Stdio::piped());
    command.stdout(std::process::Stdio::piped());
    let mut cat = Mortal(command.spawn().unwrap());
    let (accepted, _) = server.accept().unwrap();
    let pid = cat.0.id();
    let user = nix::unistd::geteuid().as_raw();
    let one = scene.only("open");
    let process = json!({"pid": pid, "program": "hvsock", "user": user});
    assert_eq!(one["process"], process, "{one}");
    assert_eq!(one["peer"], Value::Null);
    let (_, table, _) = scene.asked(&["connections"]);
    let peer = format!("hvsock (pid {pid}, uid {user})");
    assert!(table.contains(&peer), "{table}");
    for part in ["ID", "PEER", "IDLE", "open"] {
        assert!(table.contains(part), "{part}: {table}");
    }

    // Both clients are there; which forward is asked for decides.
    let _ours = UnixStream::connect(&listen).unwrap();
    eventually("both are there", || scene.connections().len() == 2);
    let named = scene.asked(&["connections", "--json", "0"]).1;
    assert_eq!(serde_json::from_str::<Vec<Value>>(&named).unwrap().len(), 2);
    let (code, _, err) = scene.asked(&["connections", "nobody"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("there is no forward \"nobody\""), "{err}");

    drop((cat.0.stdin.take(), accepted));
    // In the log and, once the process is gone, in the list of those that have ended it is the
    // same, without the name of the program: that is looked up when somebody asks.
    cat.0.wait().unwrap();
    let line = scene.hvsock.complains("closed id=0");
    let peer = format!("pid {pid}, uid {user}");
    assert!(line.contains(&format!("peer={peer} ")), "{line}");
    let (_, table, _) = scene.asked(&["connections", "--ended"]);
    assert!(table.contains(&format!("  {peer}  ")), "{table}");
}

#[test]
fn states_are_told_in_words() {
    let (scene, server) = scene_with_server(At::Port, &["--wait=20"]);
    let port = scene.hvsock.tcp_port();
    let mut client = tcp(port);
    let (mut accepted, _) = server.accept().unwrap();
    let one = scene.only("open");
    let peer = format!("tcp://{}", client.local_addr().unwrap());
    assert_eq!(
        (&one["peer"], &one["process"]),
        (&json!(peer), &Value::Null)
    );
    if cfg!(target_os = "linux") {
        // Who asks looks for it.
        let program = std::fs::read_to_string("/proc/self/comm").unwrap();
        let program = program.trim();
        let user = nix::unistd::geteuid();
        let pid = std::process::id();
        let (_, table, _) = scene.asked(&["connections"]);
        let peer = format!("  {peer}, {program} (pid {pid}, uid {user})  ");
        assert!(table.contains(&peer), "{table}");
    }
    // It is idle from the last byte on, not from its beginning.
    eventually("it is idle", || {
        scene.only("open")["idle_seconds"].as_f64() > Some(0.2)
    });
    client.write_all(b"x").unwrap();
    accepted.read_exact(&mut [0]).unwrap();
    let one = scene.only("open");
    assert!(
        one["idle_seconds"].as_f64() < one["age_seconds"].as_f64(),
        "{one}"
    );

    client.shutdown(Shutdown::Write).unwrap();
    scene.only("half_closed_by_client");
    let table = scene.asked(&["connections"]).1;
    assert!(table.contains("half-closed by client"), "{table}");
    drop(accepted);
    assert_eq!(client.read_to_end(&mut Vec::new()).unwrap(), 0);
    drop(client);
    eventually("it is gone", || scene.connections().is_empty());

    let client = tcp(port);
    let (accepted, _) = server.accept().unwrap();
    accepted.shutdown(Shutdown::Write).unwrap();
    scene.only("half_closed_by_server");
    drop((client, accepted));
    eventually("it is gone", || scene.connections().is_empty());

    // Its target is away, and it waits.
    std::fs::remove_file(scene.dir.path().join("server")).unwrap();
    let mut client = tcp(port);
    let one = scene.only("held");
    let (code, out, _) = scene.asked(&["close", &one["id"].to_string()]);
    assert_eq!(code, Some(0));
    assert!(out.contains(", held"), "{out}");
    assert!(is_reset(client.read(&mut [0])));
    scene.hvsock.complains("why=closed on request");
}

/// What waits on its way to a server that doesn't read.
#[test]
fn bytes_that_wait_are_told_of() {
    let mut server = None;
    let scene = scene(
        |_| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let target = format!("tcp://{}", listener.local_addr().unwrap());
            server = Some(listener);
            vec!["tcp://127.0.0.1:0".to_owned(), target]
        },
        &[],
    );
    let mut client = tcp(scene.hvsock.tcp_port());
    client
        .set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let _accepted = server.as_ref().unwrap().accept().unwrap();
    while client.write(&[b'.'; 65_536]).is_ok() {}
    let one = scene.only("open");
    let waiting = one["waiting"]["to_server"].as_u64().unwrap();
    assert!(waiting > 65_536, "{one}");
    assert_eq!(one["waiting"]["to_client"], 0);
    let (_, table, _) = scene.asked(&["connections"]);
    assert!(table.contains("B / 0"), "{table}");
}

#[test]
fn one_is_closed_and_the_others_go_on() {
    let (scene, server) = scene_with_server(At::Port, &[]);
    let port = scene.hvsock.tcp_port();
    let mut pairs = Vec::new();
    for id in 0..3 {
        let client = tcp(port);
        pairs.push((client, server.accept().unwrap().0));
        eventually("it is there", || scene.connections().len() == id + 1);
    }
    let (code, out, err) = scene.asked(&["close", "1", "77"]);
    assert_eq!(code, Some(1));
    assert!(out.starts_with("closed 1: tcp://127.0.0.1:"), "{out}");
    assert!(err.contains("there is no connection 77"), "{err}");
    assert!(err.contains("hvsock connections"), "{err}");
    assert!(is_reset(pairs[1].0.read(&mut [0])));
    // The two lines come in either order.
    let mut lines = [String::new(), String::new()];
    while lines.iter().any(String::is_empty) {
        let line = scene.hvsock.complains("");
        lines[0] += if line.contains("id=1 ") { &line } else { "" };
        lines[1] += match line.contains("closing connection 1") {
            true => &line,
            false => "",
        };
    }
    let told = &lines[1];
    let whose = format!(" of tcp://127.0.0.1:{port}, from tcp://127.0.0.1:");
    assert!(told.contains(&whose), "{told}");
    assert!(
        told.contains(": process ") && told.ends_with(" asked for it"),
        "{told}"
    );
    for left in [0, 2] {
        let (client, server) = &mut pairs[left];
        client.write_all(b"still").unwrap();
        server.read_exact(&mut [0; 5]).unwrap();
    }
    let ids = scene.connections();
    let mut ids: Vec<_> = ids.iter().map(|it| it["id"].as_u64().unwrap()).collect();
    ids.sort_unstable();
    assert_eq!(ids, [0, 2]);
    let (_, status, _) = scene.asked(&["status", "--json"]);
    let status: Value = serde_json::from_str(&status).unwrap();
    assert_eq!(
        status["forwards"][0]["counters"]["ended"]["closed_on_request"],
        1
    );
    // A forward without a name is called by where it listens.
    let (_, status, _) = scene.asked(&["status"]);
    let ended = format!("ended at tcp://127.0.0.1:{port}: 1 closed on request");
    assert!(status.contains(&ended), "{status}");
    // A word is no id, and a closed one is gone.
    assert_eq!(scene.asked(&["close", "web"]).0, Some(2));
    let (code, _, err) = scene.asked(&["close", "1"]);
    assert_eq!(code, Some(1));
    assert!(
        err.contains("connection 1 has ended") && err.contains("hvsock connections --ended"),
        "{err}"
    );
    let (code, _, err) = scene.asked(&["close", "99"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("there is no connection 99"), "{err}");
}

/// Those that ended, a refused one and one of a removed forward included.
#[test]
fn why_a_connection_ended_is_told() {
    let (scene, server) = scene_with_server(At::Path, &[]);
    let (code, out, _) = scene.asked(&["connections"]);
    assert_eq!(code, Some(0));
    assert!(out.contains("hvsock connections --ended"), "{out}");
    let (code, out, _) = scene.asked(&["connections", "--ended"]);
    assert_eq!(code, Some(0));
    assert!(out.contains("no connection has ended yet"), "{out}");

    let listen = scene.dir.path().join("listen");
    let mut client = UnixStream::connect(&listen).unwrap();
    let (mut accepted, _) = server.accept().unwrap();
    client.write_all(b"twelve bytes").unwrap();
    accepted.read_exact(&mut [0; 12]).unwrap();
    client.shutdown(Shutdown::Both).unwrap();
    let ended = || {
        let (code, out, err) = scene.asked(&["connections", "--ended", "--json"]);
        assert_eq!(code, Some(0), "{err}");
        serde_json::from_str::<Vec<Value>>(&out).unwrap()
    };
    assert_eq!(accepted.read_to_end(&mut Vec::new()).unwrap(), 0);
    drop(accepted);
    eventually("it has ended", || ended().len() == 1);
    let add = ["add", "--name", "nobody", "tcp://127.0.0.1:0"];
    let target = at(scene.dir.path(), "nobody");
    let (code, out, err) = scene.asked(&[&add[..], &[&target]].concat());
    assert_eq!(code, Some(0), "{err}");
    let port = out.split(" -> ").next().unwrap().rsplit(':').next();
    let mut refused = tcp(port.unwrap().parse().unwrap());
    assert!(is_reset(refused.read(&mut [0])));
    eventually("both have ended", || ended().len() == 2);
    assert_eq!(scene.asked(&["remove", "nobody"]).0, Some(0));

    let all = ended();
    let pid = std::process::id();
    // It runs still. Elsewhere nothing tells that it is no later one of that number.
    let program = match cfg!(target_os = "linux") {
        true => json!(std::fs::read_to_string("/proc/self/comm").unwrap().trim()),
        false => Value::Null,
    };
    let process = json!({
        "pid": pid,
        "program": program,
        "user": nix::unistd::geteuid().as_raw(),
    });
    let [first, second] = &all[..] else {
        panic!("{all:?}");
    };
    for (key, value) in [
        ("id", json!(0)),
        ("forward", json!(0)),
        ("connect", json!(at(scene.dir.path(), "server"))),
        ("peer", Value::Null),
        ("process", process),
        ("sent", json!(12)),
        ("received", json!(0)),
        ("why", json!("client_closed")),
        ("refusal", Value::Null),
        ("error", Value::Null),
    ] {
        assert_eq!(first[key], value, "{key}: {first}");
    }
    let peer = format!("tcp://{}", refused.local_addr().unwrap());
    for (key, value) in [
        ("name", json!("nobody")),
        ("peer", json!(peer)),
        ("why", json!("refused")),
        ("refusal", json!("absent")),
    ] {
        assert_eq!(second[key], value, "{key}: {second}");
    }
    assert!(second["at"].as_f64() >= first["at"].as_f64(), "{all:?}");
    // A forward that is there, by its id, and one that is there no more, by its name.
    for (forward, why) in [
        ("0", "client closed"),
        ("nobody", "refused (absent): cannot connect"),
    ] {
        let (code, out, err) = scene.asked(&["connections", "--ended", forward]);
        assert_eq!(code, Some(0), "{err}");
        assert_eq!(out.lines().count(), 2, "{out}");
        assert!(out.contains(why), "{out}");
    }
    if let Some(program) = program.as_str() {
        let (_, out, _) = scene.asked(&["connections", "--ended", "0"]);
        assert!(out.contains(&format!("  {program} (pid {pid}, ")), "{out}");
    }
    let (code, _, err) = scene.asked(&["connections", "--ended", "somebody"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("there is no forward \"somebody\""), "{err}");
}

/// In one line for all workers, at a level that is on.
#[test]
fn how_many_were_cut_off_at_the_end_of_a_grace_is_said_once() {
    let mut server = None;
    let addresses = |dir: &Path| {
        server = Some(UnixListener::bind(dir.join("server")).unwrap());
        let target = at(dir, "server");
        let listen = [at(dir, "one"), at(dir, "two"), at(dir, "three")];
        listen
            .into_iter()
            .flat_map(|it| [it, target.clone()])
            .collect()
    };
    let mut scene = scene(addresses, &["--grace=1"]);
    let server = server.unwrap();
    let mut pairs = Vec::new();
    for (name, count) in [("one", 2), ("two", 3), ("three", 1)] {
        for _ in 0..count {
            let client = UnixStream::connect(scene.dir.path().join(name)).unwrap();
            pairs.push((client, server.accept().unwrap()));
        }
    }
    eventually("all are there", || scene.connections().len() == 6);
    let one = at(scene.dir.path(), "one");
    let (code, _, err) = scene.asked(&["remove", &one, "--grace", "0"]);
    assert_eq!(code, Some(0), "{err}");
    let told = scene.hvsock.complains("cut off");
    let said = format!("cut off 2 connections, for their grace was over: 2 of {one}");
    assert!(told.contains(&said) && told.contains("WARN"), "{told}");
    scene.hvsock.signal("TERM");
    assert_eq!(scene.hvsock.exit_code(), Some(0));
    let rest: Vec<String> = scene.hvsock.err.iter().collect();
    let cut: Vec<_> = rest.iter().filter(|it| it.contains("cut off 4")).collect();
    let two = at(scene.dir.path(), "two");
    let said = format!("for their grace was over: 3 of {two}, 1 of ");
    assert!(cut.len() == 1 && cut[0].contains(&said), "{rest:?}");
    assert!(rest.last().unwrap().ends_with("has stopped"), "{rest:?}");
    assert!(!rest.iter().any(|it| it.contains("cut off 2")), "{rest:?}");
}

/// A guest that doesn't end it keeps the connection for a while.
#[test]
fn a_close_that_is_not_over_yet_says_so() {
    let mut vm = None;
    let scene = scene(
        |dir| {
            let state = dir.join("vm");
            vm = Some(
                Vm::builder(&state)
                    .guest(9, Service::Silent)
                    .start()
                    .unwrap(),
            );
            let guest = format!("hyperkit://:9{}", text(&state));
            vec!["tcp://127.0.0.1:0".to_owned(), guest]
        },
        &["--drain-timeout=50", "--grace=0"],
    );
    let _client = tcp(scene.hvsock.tcp_port());
    scene.only("open");
    let (code, out, _) = scene.asked(&["close", "0"]);
    assert_eq!(code, Some(0));
    assert!(out.starts_with("closing 0: tcp://127.0.0.1:"), "{out}");
    assert!(out.contains("up to 50 s"), "{out}");
    scene.only("closing");
}

/// An error before a success is one of the past.
#[test]
fn a_last_error_that_is_over_is_shown_as_past() {
    let scene = scene(
        |dir| vec!["tcp://127.0.0.1:0".to_owned(), at(dir, "server")],
        &[],
    );
    let port = scene.hvsock.tcp_port();
    assert!(resets_clients(port));
    let (_, status, _) = scene.asked(&["status"]);
    let line = |status: &str| {
        let line = status
            .lines()
            .find(|line| line.starts_with("the last error"));
        line.unwrap_or_else(|| panic!("{status}")).to_owned()
    };
    assert!(!line(&status).contains("since"), "{status}");
    let server = UnixListener::bind(scene.dir.path().join("server")).unwrap();
    for _ in 0..2 {
        let _client = tcp(port);
        server.accept().unwrap();
    }
    let (_, status, _) = scene.asked(&["status"]);
    assert!(
        line(&status).contains("ago (2 connections since): "),
        "{status}"
    );
}

#[test]
fn top_says_a_word_where_it_can_not_draw_and_draws_nothing() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.arg("top").env("TERM", "dumb");
    let said = output(command);
    assert_eq!((said.status.code(), said.stdout.len()), (Some(1), 0));
    let said = String::from_utf8(said.stderr).unwrap();
    assert!(
        said.contains("TERM=dumb") && said.contains("hvsock status"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");
}

/// The guest reads an end, may go on, and is waited for: a close at once would stall its device.
#[test]
fn a_vm_is_left_gracefully() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path()).guest(7, Service::Echo);
    let vm = vm.guest(19, Service::Chargen).start().unwrap();
    let proxy = proxy(any_tcp(), hyperkit(dir.path(), 19));
    let mut client = tcp(port_of(&proxy, 0));
    client.read_exact(&mut [0; 1000]).unwrap();
    let handle = proxy.handle();
    let connections = handle.connections();
    let [one] = &connections[..] else {
        panic!("{connections:?}");
    };
    let closed = handle.close(one.id).unwrap();
    assert_eq!(closed.id, one.id);
    let mut rest = Vec::new();
    assert!(is_reset(client.read_to_end(&mut rest)));
    eventually("it is gone", || handle.connections().is_empty());
    let gone = handle.close(one.id).unwrap_err();
    assert_eq!(gone.kind(), std::io::ErrorKind::NotFound);
    assert!(gone.to_string().contains("connection 0"), "{gone}");
    assert_eq!(proxy.forwards()[0].counters.ended.closed_on_request, 1);
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

/// In the place of the file there is something else, or its directory is none.
#[test]
fn a_file_that_is_none_is_absent() {
    let listens_for = |name: &str| format!("for-{}", name.replace('/', "-"));
    let addresses = |dir: &Path| {
        let target = |name: &str| format!("file:{}", text(&dir.join(name)));
        let pairs = ["directory", "fifo", "file/in"];
        let pairs = pairs.map(|name| [at(dir, &listens_for(name)), target(name)]);
        pairs.into_iter().flatten().collect()
    };
    let scene = scene(addresses, &[]);
    let dir = scene.dir.path();
    // At the start it was only missing.
    std::fs::create_dir(dir.join("directory")).unwrap();
    let mode = nix::sys::stat::Mode::S_IRWXU;
    nix::unistd::mkfifo(&dir.join("fifo"), mode).unwrap();
    std::fs::write(dir.join("file"), "").unwrap();
    for name in ["directory", "fifo", "file/in"] {
        let mut client = UnixStream::connect(dir.join(listens_for(name))).unwrap();
        let _ = client.read(&mut [0]);
    }
    let mut out = String::new();
    eventually("all are refused", || {
        out = scene.asked(&["connections", "--ended"]).1;
        out.lines().count() == 4
    });
    assert_eq!(
        out.matches("  refused (absent): cannot").count(),
        3,
        "{out}"
    );
    for part in ["is a directory", "it is a FIFO", "is the path right?"] {
        assert!(out.contains(part), "{out}");
    }
    let (_, status, _) = scene.asked(&["status"]);
    assert_eq!(status.matches("1 (1 absent)").count(), 3, "{status}");
}

/// By the name of the range, or its addresses.
#[test]
fn those_of_a_range_are_told_of() {
    let (scene, _server) = scene_with_server(At::Port, &[]);
    let place = |ports: &str, name: &str| {
        let path = scene.dir.path().join(name);
        format!("vsock-mux://:{ports}{}", text(&path))
    };
    let range = place("40-41", "vm");
    let add = ["add", "--name", "many", &range, &place("80-81", "guest")];
    let (code, _, err) = scene.asked(&add);
    assert_eq!(code, Some(0), "{err}");
    // Each is refused: there is no such guest.
    for port in ["40", "41", "41"] {
        let path = scene.dir.path().join(format!("vm_{port}"));
        let _ = UnixStream::connect(path).unwrap().read(&mut [0]);
    }
    eventually("all are refused", || {
        let out = scene.asked(&["connections", "--ended"]).1;
        out.lines().count() == 4
    });
    let _other = tcp(scene.hvsock.tcp_port());
    eventually("another is there", || scene.connections().len() == 1);
    for named in ["many", &range] {
        let (code, out, err) = scene.asked(&["connections", "--ended", named]);
        assert_eq!(code, Some(0), "{err}");
        for (name, count) in [("  many-40  ", 1), ("  many-41  ", 2)] {
            assert_eq!(out.matches(name).count(), count, "{named}: {out}");
        }
        let (code, out, err) = scene.asked(&["connections", named]);
        assert_eq!(code, Some(0), "{err}");
        assert!(out.starts_with("no connections;"), "{out}");
    }
    let (code, out, err) = scene.asked(&["connections", "--ended", "many-40"]);
    assert_eq!((code, out.lines().count()), (Some(0), 2), "{out}{err}");
}
