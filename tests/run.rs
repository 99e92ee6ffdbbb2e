//! `hvsock run` and `check`: the real binary, its file, and what a changed file does to those who
//! are connected.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::fs;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use command::*;
use common::*;
use hvsock::simulate::{Service, Vm};

fn vm(dir: &Path) -> Vm {
    let vm = Vm::builder(dir).guest(7, Service::Echo);
    vm.guest(19, Service::Chargen).start().unwrap()
}

/// A TCP echo server; its port.
fn echo_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || io::copy(&mut &stream, &mut &stream).map(drop));
        }
    });
    port
}

/// A file for `run`.
struct File(PathBuf);

impl File {
    fn new(dir: &Path, text: &str) -> File {
        let file = File(dir.join("hvsock.toml"));
        file.write(text);
        file
    }

    fn write(&self, text: &str) {
        fs::write(&self.0, text).unwrap();
    }

    fn run(&self) -> Running {
        let runtime = self.0.parent().unwrap();
        Running::spawn(in_runtime(runtime, &["run", text(&self.0)]))
    }
}

fn forward_to_port(name: &str, listen: impl std::fmt::Debug, port: u32) -> String {
    format!("[forward.{name}]\nlisten = {listen:?}\nvm = \"one\"\nport = {port}\n")
}

/// Eleven mistakes and two things to note, and what is said of each.
const MISTAKES: &str = r#"grace = "soon"
worker = 2
[defaults]
mode = 600
dial_timeout = "30s"
[vm.docker]
at = "no-such-vm"
[vm.one]
connections = 5000
at = "/nonexistent/one"
[forward.a]
listen = 99999
connect = 80
[forward.b]
lisen = 8080
connect = 80
[forward.c]
vm = "one"
port = 4294967296
listen = "127.0.0.1:8080"
[forward.d]
listen = 8080
connect = 0
"#;

const SAID: [(usize, &str); 13] = [
    (1, "\"soon\" is no time; write \"30s\""),
    (2, "unknown key worker; did you mean workers?"),
    (4, "write permissions as a string: \"600\""),
    (5, "did you mean dial-timeout?"),
    (6, "note: [vm.docker] is used by no forward"),
    (7, "cannot find VM \"no-such-vm\""),
    (9, "5000 is not a number from 1 to 1000"),
    (10, "note: VM \"one\" is not there yet"),
    (12, "TCP port 99999 is larger than 65535"),
    (15, "unknown key lisen in [forward.b]; did you mean listen?"),
    (19, "4294967296 is no vsock port"),
    (22, "[forward.c] in line 20 listens on tcp://127.0.0.1:8080"),
    (23, "port 0 can't be connected to"),
];

#[test]
fn check_says_all_that_is_wrong_at_once() {
    let dir = private_dir();
    let file = File::new(dir.path(), MISTAKES);
    for command in ["check", "run"] {
        let output = run(&[command, text(&file.0)]);
        assert_eq!(output.status.code(), Some(1));
        assert!(output.stdout.is_empty());
        let said = String::from_utf8(output.stderr).unwrap();
        let mut lines: Vec<&str> = said.lines().collect();
        assert!(
            lines.pop().unwrap().contains("11 things are wrong"),
            "{said}"
        );
        assert_eq!(lines.len(), SAID.len(), "{said}");
        for (line, (number, part)) in lines.iter().zip(SAID) {
            let place = format!("{}:{number}: ", text(&file.0));
            assert!(
                line.starts_with(&place) && line.contains(part),
                "{line}: {part}"
            );
        }
    }
    fails(
        &["check", "/nonexistent.toml"],
        1,
        &["/nonexistent.toml", "is the path right?"],
    );
    fails(&["check"], 2, &["CONFIG"]);
}

/// What can't be mended by waiting is refused by both, in the same words; what may come is not.
#[test]
fn run_refuses_what_check_does() {
    let dir = private_dir();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("plain"), "").unwrap();
    fs::create_dir(at("directory")).unwrap();
    let forward = |name: &str, listen: &Path, connect: &str| {
        format!("[forward.{name}]\nlisten = {listen:?}\nconnect = {connect:?}\n")
    };
    let program = format!("exec:{}", text(&at("directory")));
    let text = [
        "control = \"off\"\n".to_owned(),
        forward("file", &at("plain"), "127.0.0.1:9"),
        forward("below", &at("plain/s"), "127.0.0.1:9"),
        forward("program", &at("s"), &program),
        forward("later", &at("t"), command::text(&at("later/s"))),
    ];
    let file = File::new(dir.path(), &text.concat());
    let said = ["check", "run"].map(|command| {
        let output = run(&[command, command::text(&file.0)]);
        assert_eq!(output.status.code(), Some(1));
        assert!(output.stdout.is_empty());
        String::from_utf8(output.stderr).unwrap()
    });
    assert_eq!(said[0], said[1]);
    for part in [
        "a file is there; remove it",
        "plain is no directory; choose another path",
        "it is a directory; name a program in it",
        "there is no directory",
        "3 things are wrong",
    ] {
        assert!(said[0].contains(part), "{part}: {}", said[0]);
    }
    assert!(at("plain").is_file());
}

#[test]
fn the_example_is_right_and_so_is_what_it_leaves_out() {
    let dir = private_dir();
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/hvsock.toml");
    let output = run(&["check", text(&example)]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{said}");
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(
        lines,
        [
            "docker-api: unix:///tmp/docker.sock -> docker, port 2375 (0x947)",
            "build-ssh: tcp://127.0.0.1:2222 -> build, port 22 (0x16)",
            "registry: docker, to CID 2 port 5000 (0x1388) -> tcp://127.0.0.1:8080",
            "web: tcp://127.0.0.1:8000 -> unix:///tmp/web.sock",
            "date: unix:///tmp/date.sock -> exec:/bin/date?arg=-u",
            &format!("{} is right: 5 forwards", text(&example)),
        ]
    );
    let commented = fs::read_to_string(&example).unwrap();
    let is_key = |line: &&str| line.starts_with("# ") && line.contains(" = ");
    assert!(commented.lines().any(|line| is_key(&line)));
    let all: Vec<&str> = commented
        .lines()
        .map(|line| {
            line.strip_prefix("# ")
                .filter(|_| is_key(&line))
                .unwrap_or(line)
        })
        .collect();
    let file = File::new(dir.path(), &all.join("\n"));
    let output = run(&["check", text(&file.0)]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{said}");
}

#[test]
fn two_vms_are_carried_and_a_signal_ends_it() {
    let dir = private_dir();
    let vms = ["one", "two"].map(|name| vm(&dir.path().join(name)));
    let server = echo_server();
    let file = File::new(
        dir.path(),
        &format!(
            r#"
            [vm.one]
            at = "{0}/one"
            [forward.tcp]
            listen = 0
            vm = "one"
            port = 7
            [forward.unix]
            listen = "{0}/front"
            mode = "660"
            vm = "{0}/two"
            port = "0x7"
            [forward.dialled]
            vm = "{0}/two"
            guest-dials = 5000
            connect = {server}
            "#,
            text(dir.path())
        ),
    );
    let mut proxy = file.run();
    let port = proxy.tcp_port();
    proxy.says("unix: unix://");
    let line = proxy.says("dialled: ");
    assert!(
        line.contains("two, to CID 2 port 5000 (0x1388) -> tcp://"),
        "{line}"
    );
    let front = dir.path().join("front");
    assert_eq!(
        front.metadata().unwrap().permissions().mode() & 0o777,
        0o660
    );
    assert_eq!(ask(tcp(port), b"one").unwrap(), b"one");
    assert_eq!(ask(unix_client(&front), b"two").unwrap(), b"two");
    assert_eq!(ask(vms[1].dial(5000).unwrap(), b"back").unwrap(), b"back");
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
    assert!(!front.exists());
    assert!(vms.iter().all(|vm| vm.fate().is_none()));
}

#[test]
fn what_cannot_be_had_at_the_start_keeps_nothing_else_and_is_had_later() {
    let dir = private_dir();
    let server = echo_server();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let later = dir.path().join("later");
    let file = File::new(
        dir.path(),
        &format!(
            "[forward.a]\nlisten = {port}\nconnect = {server}\n\
             [forward.b]\nlisten = {:?}\nconnect = {server}\n\
             [forward.c]\nlisten = 0\nconnect = {server}\n",
            text(&later.join("b")),
        ),
    );
    let proxy = file.run();
    let own = proxy.tcp_port();
    for part in [
        "[forward.a]: cannot listen on",
        "[forward.b]: cannot listen on",
    ] {
        let told = proxy.complains(part);
        assert!(told.contains("tried again every 2 s"), "{told}");
    }
    assert_eq!(ask(tcp(own), b"others").unwrap(), b"others");
    let states = || {
        let (_, json) = asked(dir.path(), &["status", "--json"]);
        let status: serde_json::Value = serde_json::from_str(&json).unwrap();
        let state = |name: &str| {
            let mut all = status["forwards"].as_array().unwrap().iter();
            let found = all.find(|it| it["name"] == name).unwrap();
            found["state"].as_str().unwrap().to_owned()
        };
        ["a", "b", "c"].map(state)
    };
    assert_eq!(states(), ["failed", "failed", "listening"]);
    drop(taken);
    proxy.says("a: tcp://");
    assert_eq!(ask(tcp(port), b"at last").unwrap(), b"at last");
    fs::create_dir(&later).unwrap();
    proxy.says("b: unix://");
    let client = unix_client(&later.join("b"));
    assert_eq!(ask(client, b"at last").unwrap(), b"at last");
    assert_eq!(states(), ["listening"; 3]);
}

/// A command that people watch fails at once, unless it is told not to.
#[test]
fn a_command_keeps_trying_if_it_is_told_to() {
    let dir = private_dir();
    let vm = vm(dir.path());
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let listen = format!("tcp://127.0.0.1:{port}");
    let target = format!("hyperkit://:7{}", text(dir.path()));
    let pairs = ["forward", &listen, &target, "tcp://127.0.0.1:0", &target];
    fails(&pairs, 1, &["cannot listen on"]);
    let local = format!("{port}:7");
    let expose = [
        "expose",
        "--vm",
        text(dir.path()),
        "-L",
        &local,
        "-L",
        "0:7",
    ];
    fails(&expose, 1, &["cannot listen on"]);

    let control = dir.path().join("c");
    let control_option = format!("--control={}", text(&control));
    let more = ["--keep-trying", &control_option];
    let forward = Running::start(&[&pairs[..], &more].concat());
    let expose = Running::start(&[&expose[..], &more[..1]].concat());
    for proxy in [&forward, &expose] {
        let own = proxy.tcp_port();
        assert_ne!(own, port);
        assert_eq!(ask(tcp(own), b"others").unwrap(), b"others");
        let told = proxy.complains("cannot listen on");
        assert!(told.contains("tried again every 2 s"), "{told}");
    }
    let at = ["--control", text(&control)];
    let (_, table) = asked(dir.path(), &[&["status"], &at[..]].concat());
    assert!(table.contains(&format!("{listen} failed ")), "{table}");
    let remove = |name: &str| asked(dir.path(), &[&["remove", name], &at[..]].concat());
    let (code, why) = remove(&listen);
    assert_eq!(code, Some(1), "{why}");
    assert!(why.contains("asked for at the start"), "{why}");
    // What is removed by hand stays so, whatever else is tried again.
    assert_eq!(remove("tcp://127.0.0.1:0").0, Some(0));
    expose.signal("TERM");
    drop(expose);
    drop(taken);
    assert_eq!(forward.tcp_port(), port);
    assert_eq!(ask(tcp(port), b"at last").unwrap(), b"at last");
    let (_, json) = asked(dir.path(), &[&["status", "--json"], &at[..]].concat());
    assert_eq!(json.matches("\"id\":").count(), 1, "{json}");
    assert!(vm.fate().is_none());
}

/// Of the ports that stand for sockets in a directory no other test knows.
#[test]
fn a_range_of_which_one_failed_is_removed_by_its_name_and_by_its_addresses() {
    let dir = private_dir();
    let place = |port: &str, name: &str| {
        let path = dir.path().join(name);
        format!("vsock-mux://:{port}{}", text(&path))
    };
    let forward = |name: &str| {
        format!(
            "[forward.{name}]\nlisten = {:?}\nconnect = {:?}\n",
            place("8000-8003", name),
            place("80-83", "guest")
        )
    };
    let taken = |name: &str| {
        let path = dir.path().join(format!("{name}_8001"));
        std::os::unix::net::UnixListener::bind(path).unwrap()
    };
    let _taken = [taken("a"), taken("b")];
    let file = File::new(dir.path(), &(forward("a") + &forward("b")));
    let proxy = file.run();
    proxy.complains("[forward.b-8001]: cannot listen on");
    for (range, failed) in [
        ("a", "a-8001".to_owned()),
        (&*place("8000-8003", "b"), place("8001", "b")),
    ] {
        let output = output(in_runtime(dir.path(), &["remove", range]));
        let (said, why) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        assert_eq!(said.matches("removed ").count(), 3, "{said}{why}");
        assert_eq!(output.status.code(), Some(1), "{said}{why}");
        let reason = format!("{failed:?} isn't carried: cannot listen on");
        assert!(
            why.contains(&reason) && why.contains("take it out there"),
            "{why}"
        );
        assert_eq!(why.lines().count(), 1, "{why}");
        // Nothing else of it is left.
        let (code, why) = asked(dir.path(), &["remove", range]);
        assert_eq!(code, Some(1), "{why}");
        assert!(why.contains("isn't carried: cannot listen on"), "{why}");
    }
}

#[test]
fn expose_says_that_no_vm_can_have_so_long_a_directory() {
    let dir = private_dir();
    let home = dir.path().join("x".repeat(120));
    let words = ["expose", "--vm", text(&home), "-L", "0:7"];
    let proxy = Running::spawn(in_runtime(dir.path(), &words));
    let told = proxy.complains("where hyperkit takes 85");
    let length = format!("{} bytes", home.as_os_str().len());
    assert!(
        told.contains(&length) && told.contains("started by a shorter path to it"),
        "{told}"
    );
}

#[test]
fn expose_waits_for_the_directory_of_its_vm() {
    let dir = private_dir();
    let home = dir.path().join("later/vm");
    let server = format!("5000:{}", echo_server());
    let expose = |listen: &str| {
        let words = ["expose", "--vm", text(&home), "-L", listen, "-R", &server];
        in_runtime(dir.path(), &words)
    };
    let proxy = Running::spawn(expose("0:7"));
    let told = proxy.complains("there is no VM directory");
    let there = format!("(there is {})", text(dir.path()));
    assert!(
        told.contains(text(&home)) && told.contains(&there),
        "{told}"
    );
    let port = proxy.tcp_port();
    assert!(resets_clients(port));
    // What else can't be had fails as ever.
    let failed = output(expose(&format!("{port}:7")));
    let why = String::from_utf8(failed.stderr).unwrap();
    assert_eq!(failed.status.code(), Some(1), "{why}");
    assert!(why.contains("cannot listen on"), "{why}");
    // What it says of itself is known when it is there.
    fs::create_dir(dir.path().join("later")).unwrap();
    let vm = Vm::builder(&home).cid(9).guest(7, Service::Echo);
    let vm = vm.start().unwrap();
    proxy.says("guest, to CID 2 port 5000");
    assert_eq!(ask(tcp(port), b"late").unwrap(), b"late");
    assert_eq!(ask(vm.dial(5000).unwrap(), b"too").unwrap(), b"too");
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
    // Of a name it is known that it is none.
    let mistyped = output(in_runtime(
        dir.path(),
        &["expose", "--vm", "later-vm", "-L", "0:7"],
    ));
    let why = String::from_utf8(mistyped.stderr).unwrap();
    assert_eq!(mistyped.status.code(), Some(1), "{why}");
    assert!(why.contains("no VM has this name"), "{why}");
}

/// A VMM's socket is no state directory, and its user is told how it is written.
#[test]
fn expose_says_how_the_socket_of_a_vmm_is_written() {
    let dir = private_dir();
    let socket = dir.path().join("fc.sock");
    let uri = format!("write vsock-mux://{}", text(&socket));
    let expose = |at: &Path| {
        let words = ["expose", "--vm", text(at), "-L", "0:7"];
        in_runtime(dir.path(), &words)
    };
    // Not there yet: it may be a directory with a strange name.
    let waiting = Running::spawn(expose(&socket));
    let told = waiting.complains("there is no VM directory");
    assert!(told.contains("is waited for"), "{told}");
    assert!(told.contains(&uri["write ".len()..]), "{told}");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let told = waiting.complains("is a socket");
    assert!(told.contains(&uri), "{told}");
    // What is said once is enough, until it is another thing.
    drop(listener);
    fs::remove_file(&socket).unwrap();
    fs::create_dir(&socket).unwrap();
    fs::write(socket.join("hyperkit.json"), "{").unwrap();
    let told = waiting.complains("hyperkit.json");
    assert!(!told.contains("is a socket"), "{told}");
    fs::remove_dir_all(&socket).unwrap();
    drop(waiting);
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let failed = output(expose(&socket));
    let why = String::from_utf8(failed.stderr).unwrap();
    assert_eq!(failed.status.code(), Some(1), "{why}");
    assert!(why.contains(&uri), "{why}");
}

#[test]
fn a_vm_that_is_not_there_yet_is_waited_for() {
    let dir = private_dir();
    let home = dir.path().join("later");
    let server = echo_server();
    let file = File::new(
        dir.path(),
        &format!(
            "[vm.one]\nat = {:?}\n{}[forward.dialled]\nvm = \"one\"\nguest-dials = 5000\nconnect = {server}\n",
            text(&home),
            forward_to_port("to", 0, 7),
        ),
    );
    let proxy = file.run();
    let port = proxy.tcp_port();
    proxy.complains("VM \"one\" is not there yet");
    proxy.complains("[forward.dialled]: waits for");
    assert!(resets_clients(port));
    // Who looks sees it among the others.
    let seen = |state: &str| {
        let (_, json) = asked(dir.path(), &["status", "--json"]);
        let status: serde_json::Value = serde_json::from_str(&json).unwrap();
        let forwards = status["forwards"].as_array().unwrap();
        let named = |it: &&serde_json::Value| it["name"] == "dialled";
        let mut found = forwards.iter().filter(named);
        assert_eq!(found.next().unwrap()["state"], state, "{json}");
        assert!(found.next().is_none(), "{json}");
    };
    seen("waiting");
    let (_, table) = asked(dir.path(), &["status"]);
    assert!(
        table.contains("dialled has been waiting for")
            && table.contains("the VM's state directory"),
        "{table}"
    );
    let (code, said) = asked(dir.path(), &["remove", "dialled"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("isn't carried: waits for") && said.contains("take it out there"),
        "{said}"
    );
    let vm = vm(&home);
    proxy.says("dialled: one, to CID 2 port 5000");
    assert_eq!(ask(tcp(port), b"late").unwrap(), b"late");
    assert_eq!(
        ask(vm.dial(5000).unwrap(), b"late, too").unwrap(),
        b"late, too"
    );
    seen("listening");
}

#[test]
fn a_hang_up_reloads_it_even_under_nohup_and_a_bad_file_changes_nothing() {
    let dir = private_dir();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let server = echo_server();
    let forward = |name: &str, path: &Path| {
        format!(
            "[forward.{name}]\nlisten = {:?}\nconnect = {server}\n",
            text(path)
        )
    };
    let file = File::new(dir.path(), &forward("a", &a));
    let mut command = Command::new("sh");
    command.env("XDG_RUNTIME_DIR", dir.path());
    let ignoring = "trap '' HUP; exec \"$0\" \"$@\"";
    command.args([
        "-c",
        ignoring,
        env!("CARGO_BIN_EXE_hvsock"),
        "run",
        text(&file.0),
    ]);
    let mut proxy = Running::spawn(command);
    proxy.says("a: ");
    let mut staying = unix_client(&a);
    let reload = |with: &str, line: &str| {
        file.write(with);
        proxy.signal("HUP");
        proxy.complains(line)
    };
    reload(&forward("b", &b), "1 added, 0 changed, 1 removed, 0 kept");
    proxy.says("b: unix://");
    // No new clients there, but who was there goes on.
    assert!(!a.exists());
    staying.write_all(b"still").unwrap();
    staying.read_exact(&mut [0; 5]).unwrap();
    assert_eq!(ask(unix_client(&b), b"new").unwrap(), b"new");

    file.write("[forward.c]\nlisten = 0\nconnect = 0\ncolour = 3\n");
    proxy.signal("HUP");
    proxy.complains("2 things are wrong; all stays as it was");
    assert!(proxy.complains(":3: ").contains("port 0"));
    proxy.complains(":4: unknown key colour");
    assert_eq!(ask(unix_client(&b), b"old").unwrap(), b"old");

    // One that can't be had is told, the others are; and it is had as soon as it can be.
    let lock = std::os::unix::net::UnixListener::bind(&a).unwrap();
    let both = forward("a", &a) + &forward("b", &b);
    let with_workers = format!("workers = 7\n{both}");
    reload(&with_workers, "0 added, 0 changed, 0 removed, 1 kept");
    let told = proxy.complains("[forward.a]: cannot listen on");
    assert!(
        told.contains("another program listens there") && told.contains("tried again"),
        "{told}"
    );
    proxy.complains("workers has changed in the file, which takes a restart");
    drop(lock);
    proxy.says("a: unix://");
    assert_eq!(ask(unix_client(&a), b"at last").unwrap(), b"at last");

    // Without the file, too, all stays.
    fs::remove_file(&file.0).unwrap();
    proxy.signal("HUP");
    proxy.complains("all stays as it was");
    proxy.complains("cannot be read");
    assert_eq!(ask(unix_client(&a), b"without").unwrap(), b"without");
    proxy.signal("INT");
    staying.write_all(b"last").unwrap();
    staying.half_close();
    let mut rest = Vec::new();
    staying.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"last");
    assert_eq!(proxy.exit_code(), Some(0));
}

#[test]
fn a_vm_gets_the_limits_that_the_file_has_for_it_now() {
    let dir = private_dir();
    let vm = vm(&dir.path().join("one"));
    let text = |connections: u32| {
        format!(
            "[vm.one]\nat = \"{}/one\"\nconnections = {connections}\n{}",
            text(dir.path()),
            forward_to_port("to", 0, 7)
        )
    };
    let file = File::new(dir.path(), &text(2));
    let proxy = file.run();
    let port = proxy.tcp_port();
    let trip = |mut client: &TcpStream| {
        client.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
    };
    let clients: Vec<TcpStream> = (0..4).map(|_| tcp(port)).collect();
    clients[..2].iter().for_each(trip);
    assert_eq!(vm.counters().live_slots, 2);
    file.write(&text(3));
    proxy.signal("HUP");
    trip(&clients[2]);
    assert_eq!(vm.counters().live_slots, 3);
    file.write(&text(3).replace("connections = 3\n", ""));
    proxy.signal("HUP");
    trip(&clients[3]);
}

/// Sends and gets back until told to stop; how many bytes were the same.
fn echo_until(mut stream: impl Client, stop: &AtomicBool) -> u64 {
    let block = pattern(10_007);
    let mut back = vec![0; block.len()];
    let mut same = 0;
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(&block).unwrap();
        stream.read_exact(&mut back).unwrap();
        assert!(back == block, "other bytes");
        same += block.len() as u64;
    }
    stream.half_close();
    assert_eq!(stream.read_to_end(&mut back).unwrap(), 0);
    same
}

#[test]
fn a_file_that_changes_under_load_loses_no_byte() {
    const ROUNDS: usize = 24;
    let dir = private_dir();
    let vms = ["one", "two"].map(|name| vm(&dir.path().join(name)));
    let server = echo_server();
    let at = |name: &str| dir.path().join(name);
    // What a round has: `kept` and `dialled` always, `changed` always but differently, of three
    // others two.
    let file_of = |round: usize| {
        let mut file = format!(
            r#"
            [vm.one]
            at = "{0}/one"
            [vm.two]
            at = "{0}/two"
            [forward.kept]
            listen = 0
            vm = "one"
            port = 7
            [forward.dialled]
            vm = "two"
            guest-dials = 5000
            connect = {server}
            [forward.changed]
            listen = "{0}/changed"
            vm = "{1}"
            port = 7
            dial-timeout = "{2}s"
            mode = "{3}"
            "#,
            text(dir.path()),
            ["one", "two"][round % 2],
            20 + round,
            ["600", "660"][round / 2 % 2],
        );
        for other in (0..3).filter(|other| other % 3 != round % 3) {
            let path = at(&format!("other-{other}"));
            file += &format!("[forward.other-{other}]\nlisten = {path:?}\nconnect = {server}\n");
        }
        file
    };
    let file = File::new(dir.path(), &file_of(0));
    let mut proxy = file.run();
    let port = proxy.tcp_port();
    proxy.says("other-2");
    let (stop, trips) = (AtomicBool::new(false), AtomicU64::new(0));
    let descriptors = thread::scope(|scope| {
        // Also ends the clients if a check fails.
        struct AtEnd<'a>(&'a AtomicBool);
        impl Drop for AtEnd<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let end = AtEnd(&stop);
        let mut clients = Vec::new();
        for _ in 0..3 {
            clients.push(scope.spawn(|| echo_until(tcp(port), &stop)));
            clients.push(scope.spawn(|| echo_until(unix_client(&at("changed")), &stop)));
        }
        clients.push(scope.spawn(|| {
            let guest = vms[1].dial(5000).unwrap();
            guest.set_read_timeout(Some(PATIENCE)).unwrap();
            echo_until(guest, &stop)
        }));
        // New ones all the time: none is refused where somebody listens before and after.
        for changed in [true, false] {
            let (stop, trips, path) = (&stop, &trips, at("changed"));
            clients.push(scope.spawn(move || {
                let mut same = 0;
                while !stop.load(Ordering::Relaxed) {
                    let bytes = pattern(3000);
                    let back = match changed {
                        true => ask(unix_client(&path), &bytes).unwrap(),
                        false => ask(tcp(port), &bytes).unwrap(),
                    };
                    assert!(back == bytes, "other bytes");
                    same += back.len() as u64;
                    trips.fetch_add(1, Ordering::Relaxed);
                }
                same
            }));
        }
        let mut descriptors = Vec::new();
        for round in 1..=ROUNDS {
            // Who is there when a forward goes stays, too.
            let gone = at(&format!("other-{}", round % 3));
            let staying = unix_client(&gone);
            let before = trips.load(Ordering::Relaxed);
            file.write(&file_of(round));
            proxy.signal("HUP");
            proxy.complains("was read again: 1 added, 1 changed, 1 removed, 3 kept");
            assert!(!gone.exists());
            assert_eq!(ask(staying, b"stayed").unwrap(), b"stayed");
            let new = at(&format!("other-{}", (round + 2) % 3));
            assert_eq!(ask(unix_client(&new), b"came").unwrap(), b"came");
            let mode = at("changed").metadata().unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, [0o600, 0o660][round / 2 % 2]);
            if round % 5 == 0 {
                file.write("[forward.kept]\nlisten = 0\n");
                proxy.signal("HUP");
                proxy.complains("1 thing is wrong; all stays as it was");
            }
            eventually("clients come meanwhile", || {
                trips.load(Ordering::Relaxed) >= before + 4
            });
            descriptors.push(proxy.descriptors());
        }
        drop(end);
        for client in clients {
            assert!(client.join().unwrap() > 30_000);
        }
        descriptors
    });
    // As many as at first, give and take who was just connected.
    let (first, last) = descriptors.split_at(ROUNDS / 2);
    let most = |counts: &[usize]| counts.iter().copied().max().unwrap();
    assert!(most(last) <= most(first) + 8, "{descriptors:?}");
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
    for vm in &vms {
        assert!(vm.fate().is_none(), "{:?}", vm.fate());
    }
}

/// What `hvsock` says that is asked about the one that runs in that directory.
fn asked(dir: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let output = output(in_runtime(dir, arguments));
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

#[test]
fn it_is_looked_at_and_changed_by_its_control_socket() {
    let dir = private_dir();
    let server = echo_server();
    let forward = |name: &str| format!("[forward.{name}]\nlisten = 0\nconnect = {server}\n");
    let defaults = "[defaults]\ndial-timeout = \"7s\"\n";
    let file = File::new(dir.path(), &format!("{defaults}{}", forward("a")));
    let mut proxy = file.run();
    proxy.says("controlled at");
    proxy.says("a: ");
    let (code, status) = asked(dir.path(), &["status"]);
    assert_eq!(code, Some(0), "{status}");
    assert!(
        status.contains(&format!("tcp://127.0.0.1:{server}")),
        "{status}"
    );

    // What is added by hand is as the file has it for all, and the file leaves it alone.
    let to = format!("tcp://127.0.0.1:{server}");
    let (code, added) = asked(
        dir.path(),
        &["add", "--name", "mine", "tcp://127.0.0.1:0", &to],
    );
    assert_eq!(code, Some(0), "{added}");
    let (_, json) = asked(dir.path(), &["status", "--json"]);
    assert_eq!(json.matches("\"dial\": 7.0").count(), 2, "{json}");
    file.write(&format!("{defaults}{}", forward("b")));
    let (code, told) = asked(dir.path(), &["reload"]);
    assert_eq!(code, Some(0), "{told}");
    assert_eq!(told, "added: b\nremoved: a\n");
    let (code, told) = asked(dir.path(), &["reload"]);
    assert_eq!((code, told.as_str()), (Some(0), "nothing has changed\n"));
    let (code, told) = asked(dir.path(), &["reload", "--json"]);
    assert_eq!(code, Some(0), "{told}");
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!(told["kept"], serde_json::json!(["b"]));
    let (_, json) = asked(dir.path(), &["status", "--json"]);
    assert!(
        json.contains("\"mine\"") && json.contains("\"b\""),
        "{json}"
    );
    file.write("nonsense");
    let (code, told) = asked(dir.path(), &["reload"]);
    assert_eq!(code, Some(1), "{told}");
    assert!(told.contains("all stays as it was"), "{told}");

    let (code, told) = asked(dir.path(), &["stop"]);
    assert_eq!(code, Some(0), "{told}");
    assert_eq!(proxy.exit_code(), Some(0));
    let (code, told) = asked(dir.path(), &["status"]);
    assert_eq!(code, Some(1), "{told}");
    assert!(told.contains("no hvsock answers"), "{told}");
}

/// Where it is looked at, and controlled from, is tried again, too, but where another hvsock is.
#[test]
fn metrics_and_a_control_directory_that_can_not_be_had_keep_nothing() {
    let dir = private_dir();
    let server = echo_server();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let metrics = taken.local_addr().unwrap().port();
    let forward = |name: &str, to: u16| {
        format!("metrics = {metrics}\n[forward.{name}]\nlisten = 0\nconnect = {to}\n")
    };
    let file = File::new(dir.path(), &forward("a", server));
    let mut proxy = file.run();
    let told = proxy.complains(&format!("cannot listen on tcp://127.0.0.1:{metrics}"));
    assert!(told.contains("tried again every 2 s"), "{told}");
    let port = proxy.tcp_port();
    assert_eq!(ask(tcp(port), b"carried").unwrap(), b"carried");
    let (_, table) = asked(dir.path(), &["status"]);
    assert!(table.contains("metrics can't be had for"), "{table}");
    // No forward leads there, whether they are served yet or not.
    let to = format!("tcp://localhost:{metrics}");
    let (code, why) = asked(dir.path(), &["add", "tcp://127.0.0.1:0", &to]);
    assert_eq!(code, Some(1));
    assert!(why.contains("no forward may lead there"), "{why}");
    drop(taken);
    let scrape = || {
        let mut answer = String::new();
        let mut client = TcpStream::connect(("127.0.0.1", metrics))?;
        client.write_all(b"GET /metrics HTTP/1.1\r\n\r\n")?;
        client.read_to_string(&mut answer)?;
        io::Result::Ok(answer)
    };
    eventually("metrics are served", || {
        scrape().is_ok_and(|answer| answer.contains("hvsock_forward_accepted_total"))
    });
    let (_, json) = asked(dir.path(), &["status", "--json"]);
    assert!(json.contains("\"unserved\": []"), "{json}");

    // Another one that would be controlled from the same place is a mistake, or is to take over.
    let other = File(dir.path().join("other.toml"));
    other.write(&format!("[forward.b]\nlisten = 0\nconnect = {server}\n"));
    let mut second = other.run();
    let told = second.complains(&format!("process {} runs there", proxy.child.0.id()));
    assert!(
        told.contains("--take-over") && told.contains("control = \"PATH\""),
        "{told}"
    );
    assert_eq!(second.exit_code(), Some(1));
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));

    let home = match cfg!(target_os = "macos") {
        true => dir
            .path()
            .join(format!("hvsock-{}", nix::unistd::geteuid())),
        false => dir.path().join("hvsock"),
    };
    fs::set_permissions(&home, fs::Permissions::from_mode(0o777)).unwrap();
    let proxy = other.run();
    let told = proxy.complains("is open to others");
    assert!(told.contains("tried again"), "{told}");
    let port = proxy.tcp_port();
    assert_eq!(ask(tcp(port), b"carried").unwrap(), b"carried");
    assert_eq!(asked(dir.path(), &["status"]).0, Some(1));
    fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).unwrap();
    eventually("it can be looked at", || {
        asked(dir.path(), &["status"]).0 == Some(0)
    });
}

/// Not by the file, nor by a file that is read later.
#[test]
fn no_forward_of_the_file_leads_to_its_control_socket() {
    let dir = private_dir();
    let control = dir.path().join("control");
    let key = format!("control = {:?}\n", text(&control));
    let bad = format!(
        "{key}[forward.a]\nlisten = 0\nconnect = {:?}\n",
        text(&control)
    );
    let file = File::new(dir.path(), &bad);
    let mut refused = file.run();
    refused.complains("this hvsock's own control");
    assert_eq!(refused.exit_code(), Some(1));
    assert!(!control.exists());
    let server = echo_server();
    file.write(&format!(
        "{key}[forward.a]\nlisten = 0\nconnect = {server}\n"
    ));
    let mut proxy = file.run();
    proxy.says("a: ");
    file.write(&bad);
    proxy.signal("HUP");
    proxy.complains("this hvsock's own control");
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
    assert!(!control.exists());
    file.write(&format!(
        "control = \"off\"\n[forward.a]\nlisten = 0\nconnect = {server}\n"
    ));
    let mut proxy = file.run();
    assert!(proxy.says("").starts_with("a: "));
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
}

/// Signals are heeded whatever the file has become, and what is half written is no wish to carry
/// nothing.
#[test]
fn a_file_that_can_not_be_meant_changes_nothing_and_blocks_nobody() {
    let dir = private_dir();
    let server = echo_server();
    let good = format!("[forward.a]\nlisten = 0\nconnect = {server}\n");
    let file = File::new(dir.path(), &good);
    let mut proxy = file.run();
    proxy.says("a: ");
    file.write("\n");
    proxy.signal("HUP");
    proxy.complains(":1: it is empty");
    fs::remove_file(&file.0).unwrap();
    nix::unistd::mkfifo(&file.0, nix::sys::stat::Mode::S_IRWXU).unwrap();
    proxy.signal("HUP");
    proxy.complains("not a regular file");
    // Whoever has it open for writing says nothing, and is not waited for.
    let writer = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&file.0)
        .unwrap();
    proxy.signal("HUP");
    proxy.complains("not a regular file");
    let (code, told) = asked(dir.path(), &["reload"]);
    assert_eq!(code, Some(1), "{told}");
    drop(writer);
    // Long enough to be another's, and never one's own.
    fs::remove_file(&file.0).unwrap();
    let long = fs::File::create(&file.0).unwrap();
    long.set_len(1 << 40).unwrap();
    proxy.signal("HUP");
    proxy.complains("it has more than");
    let (code, json) = asked(dir.path(), &["status", "--json"]);
    assert_eq!(code, Some(0), "{json}");
    assert!(json.contains("\"a\""), "{json}");
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
}

/// Idle clients of one forward, when descriptors are few, are in nobody's way who keeps some, or if
/// it has few.
#[test]
fn a_hundred_idle_clients_of_one_forward_starve_no_other() {
    let dir = private_dir();
    let server = echo_server();
    let forward = |name: &str, more: &str| {
        format!("[forward.{name}]\nlisten = 0\nconnect = {server}\n{more}")
    };
    for (noisy, quiet) in [("", "reserved = 4\n"), ("connections = 10\n", "")] {
        let text_of = forward("noisy", noisy) + &forward("quiet", quiet);
        let file = File::new(dir.path(), &text_of);
        let mut command = Command::new("sh");
        command.env("XDG_RUNTIME_DIR", dir.path());
        let few = "ulimit -n 160; exec \"$0\" \"$@\"";
        let hvsock = env!("CARGO_BIN_EXE_hvsock");
        command.args(["-c", few, hvsock, "run", text(&file.0)]);
        let mut proxy = Running::spawn(command);
        let (noisy, quiet) = (proxy.tcp_port(), proxy.tcp_port());
        let idle: Vec<TcpStream> = (0..100).map(|_| tcp(noisy)).collect();
        eventually("it is full", || {
            let rows = rows(dir.path());
            rows.iter()
                .any(|(name, state, _)| name == "noisy" && state == "full")
        });
        for _ in 0..10 {
            assert_eq!(ask(tcp(quiet), b"served").unwrap(), b"served");
        }
        drop(idle);
        assert_eq!(ask(tcp(noisy), b"again").unwrap(), b"again");
        proxy.signal("TERM");
        assert_eq!(proxy.exit_code(), Some(0));
    }
}

/// A server that says its name to each client; its port.
fn named_server(name: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write_all(name.as_bytes());
        }
    });
    port
}

/// A port that was free just now.
fn free_port() -> u16 {
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// The name and the state of each row that status has, and where it is.
fn rows(dir: &Path) -> Vec<(String, String, String)> {
    let (_, json) = asked(dir, &["status", "--json"]);
    let status: serde_json::Value = serde_json::from_str(&json).unwrap();
    let forwards = status["forwards"].as_array().unwrap().iter();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let row = |it: &serde_json::Value| {
        let place = text(&it["listen"]);
        let place = place.trim_start_matches("tcp://").to_owned();
        (text(&it["name"]), text(&it["state"]), place)
    };
    forwards.map(row).collect()
}

/// A forward that moves keeps its old place until it has the new one.
#[test]
fn a_forward_stays_where_it_is_until_its_new_place_can_be_had() {
    let dir = private_dir();
    let server = echo_server();
    let forward = |listen: &str| format!("[forward.a]\nlisten = {listen:?}\nconnect = {server}\n");
    let file = File::new(dir.path(), &forward("127.0.0.1:0"));
    let proxy = file.run();
    let old = proxy.tcp_port();
    let place = format!("127.0.0.1:{old}");
    let mut staying = tcp(old);
    staying.write_all(b"x").unwrap();
    staying.read_exact(&mut [0]).unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let new = taken.local_addr().unwrap().port();
    let new_place = format!("127.0.0.1:{new}");
    file.write(&forward(&new_place));
    proxy.signal("HUP");
    proxy.complains("[forward.a]: cannot listen on");
    assert_eq!(ask(tcp(old), b"as before").unwrap(), b"as before");
    let row = |state: &str, place: &str| ("a".to_owned(), state.to_owned(), place.to_owned());
    let both = [row("listening", &place), row("failed", &new_place)];
    assert_eq!(rows(dir.path()), both);
    drop(taken);
    assert_eq!(proxy.tcp_port(), new);
    assert_eq!(ask(tcp(new), b"moved").unwrap(), b"moved");
    assert!(TcpStream::connect(("127.0.0.1", old)).is_err());
    assert_eq!(rows(dir.path()), [row("listening", &new_place)]);
    assert_eq!(ask(staying, b"still").unwrap(), b"still");

    // In its own way it has to go first, and comes back if it must.
    let Ok(beside) = TcpListener::bind(("127.0.0.2", new)) else {
        eprintln!("skipped: this system has no 127.0.0.2");
        return;
    };
    let wide = format!("0.0.0.0:{new}");
    file.write(&forward(&wide));
    proxy.signal("HUP");
    if cfg!(target_os = "linux") {
        proxy.complains("it listens where it did");
        assert_eq!(ask(tcp(new), b"back").unwrap(), b"back");
        let both = [row("listening", &new_place), row("failed", &wide)];
        assert_eq!(rows(dir.path()), both);
        drop(beside);
        proxy.signal("HUP");
    }
    proxy.says("a: tcp://0.0.0.0");
    assert_eq!(ask(tcp(new), b"wide").unwrap(), b"wide");
    assert_eq!(rows(dir.path()), [row("listening", &wide)]);
}

#[test]
fn forwards_that_take_each_others_places_are_both_carried() {
    let dir = private_dir();
    let (one, two) = (named_server("one"), named_server("two"));
    let ports = [free_port(), free_port()];
    let forwards = |ip: &str, [a, b]: [u16; 2]| {
        format!(
            "[forward.a]\nlisten = \"{ip}:{a}\"\nconnect = {one}\n\
             [forward.b]\nlisten = \"{ip}:{b}\"\nconnect = {two}\n"
        )
    };
    let [p, q] = ports;
    let file = File::new(dir.path(), &forwards("127.0.0.1", [p, q]));
    let proxy = file.run();
    proxy.says("b: ");
    let hears = |port| {
        let mut answer = String::new();
        tcp(port).read_to_string(&mut answer).unwrap();
        answer
    };
    assert_eq!((hears(p).as_str(), hears(q).as_str()), ("one", "two"));
    // The listeners stay, and so no client is refused; with another address neither can.
    for (ip, [a, b]) in [
        ("127.0.0.1", [q, p]),
        ("0.0.0.0", [p, q]),
        ("0.0.0.0", [q, p]),
    ] {
        file.write(&forwards(ip, [a, b]));
        proxy.signal("HUP");
        proxy.complains("0 added, 2 changed, 0 removed, 0 kept");
        assert_eq!((hears(a).as_str(), hears(b).as_str()), ("one", "two"));
    }
    file.write(&forwards("127.0.0.1", [p, q]));
    proxy.signal("HUP");
    proxy.complains("0 added, 2 changed, 0 removed, 0 kept");
    assert_eq!((hears(p).as_str(), hears(q).as_str()), ("one", "two"));
}

/// Whatever a reload waits for, here for a reader of what it prints.
#[test]
fn a_signal_ends_it_while_a_reload_hangs() {
    const MANY: usize = 40;
    let dir = private_dir();
    let server = echo_server();
    let forwards = |count: usize| {
        let forward = |i| format!("[forward.n{i}]\nlisten = 0\nconnect = {server}\n");
        (0..count).map(forward).collect::<String>()
    };
    let file = File::new(dir.path(), &forwards(1));
    let (out, unread) = std::os::unix::net::UnixStream::pair().unwrap();
    socket2::SockRef::from(&out)
        .set_send_buffer_size(1)
        .unwrap();
    let mut command = in_runtime(dir.path(), &["run", text(&file.0)]);
    command.stdin(std::process::Stdio::null());
    command.stdout(std::os::fd::OwnedFd::from(out));
    command.stderr(std::process::Stdio::null());
    let mut proxy = Mortal(command.spawn().unwrap());
    drop(command);
    let carried = || {
        let (_, json) = asked(dir.path(), &["status", "--json"]);
        json.matches("\"id\":").count()
    };
    eventually("it runs", || carried() == 1);
    file.write(&forwards(MANY));
    proxy.signal("HUP");
    eventually("it was read", || carried() == MANY);
    let port = {
        let (_, json) = asked(dir.path(), &["status", "--json"]);
        let status: serde_json::Value = serde_json::from_str(&json).unwrap();
        let listen = status["forwards"][0]["listen"].as_str().unwrap().to_owned();
        listen.rsplit_once(':').unwrap().1.parse().unwrap()
    };
    // Another one is asked for behind it, and keeps nobody either.
    proxy.signal("HUP");
    let mut client = tcp(port);
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    // The first lets who is there finish, the second doesn't.
    proxy.signal("TERM");
    eventually("it stops", || {
        asked(dir.path(), &["status"]).1.contains(", stopping")
    });
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
    drop(unread);
}

/// Who calls it from a script is told.
#[test]
fn a_reload_with_a_forward_that_can_not_be_had_fails() {
    let dir = private_dir();
    let (server, taken) = (echo_server(), echo_server());
    let forward = |name: &str, listen: u16| {
        format!("[forward.{name}]\nlisten = {listen}\nconnect = {server}\n")
    };
    let file = File::new(dir.path(), &forward("a", 0));
    let proxy = file.run();
    proxy.says("a: ");
    file.write(&(forward("a", 0) + &forward("b", taken)));
    let (code, told) = asked(dir.path(), &["reload"]);
    assert_eq!(code, Some(1), "{told}");
    assert!(told.contains("[forward.b]: cannot listen on"), "{told}");
    proxy.complains("1 kept, 1 failed");
    let (_, json) = asked(dir.path(), &["status", "--json"]);
    let status: serde_json::Value = serde_json::from_str(&json).unwrap();
    let b = &status["forwards"][1];
    assert_eq!((&b["name"], &b["state"]), (&"b".into(), &"failed".into()));
    assert!(b["id"].is_null() && b["why"].as_str().unwrap().contains("in use"));
}

/// As in `envsubst <template | hvsock run -`.
#[test]
fn a_file_may_come_from_standard_input_and_have_ranges_and_variables() {
    let dir = private_dir();
    let server = echo_server();
    let content = format!(
        "control = \"off\"\n[forward.a]\nlisten = \"${{NOWHERE:-{}/s}}\"\nconnect = \"${{SERVER}}\"\n",
        dir.path().display()
    );
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(["run", "-"]).env("SERVER", server.to_string());
    command.stdin(Stdio::piped());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(content.as_bytes())
        .unwrap();
    let out = lines(child.stdout.take().unwrap());
    let err = lines(child.stderr.take().unwrap());
    let mut proxy = Mortal(child);
    next(&out, "a: unix://");
    let socket = dir.path().join("s");
    assert_eq!(ask(unix_client(&socket), b"hello").unwrap(), b"hello");
    proxy.signal("HUP");
    next(&err, "standard input: it came from there");
    assert_eq!(ask(unix_client(&socket), b"hello").unwrap(), b"hello");
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));

    let output = output({
        let mut check = Command::new(env!("CARGO_BIN_EXE_hvsock"));
        let file = File::new(dir.path(), &content);
        check.args(["check", text(&file.0)]).env_remove("SERVER");
        check
    });
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains(":4: ") && said.contains("${SERVER} is not set"),
        "{said}"
    );
}
