//! The log of a command: its formats, its file, its filter.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use command::*;
use common::*;
use serde_json::Value;
use socket2::SockRef;

/// A forward to nobody, each of whose clients is a line of the log.
fn forward(options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.arg("forward").args(options);
    command.args(["tcp://127.0.0.1:0", "tcp://127.0.0.1:1"]);
    command
        .env_remove("HVSOCK_LOG")
        .env_remove("JOURNAL_STREAM");
    command
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[test]
fn json_has_an_object_a_line_whatever_is_said() {
    let mut proxy = Running::spawn(forward(&["--log-format", "json"]));
    assert!(resets_clients(proxy.tcp_port()));
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
    let lines: Vec<Value> = proxy
        .err
        .iter()
        .map(|line| serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line}: {e}")))
        .collect();
    let text = |line: &Value, key: &str| line[key].as_str().unwrap().to_owned();
    let refused = lines
        .iter()
        .find(|it| text(it, "message").contains("refused"));
    let refused = refused.expect("the refusal is told");
    assert_eq!(text(refused, "level"), "WARN");
    assert!(text(refused, "timestamp").ends_with('Z'));
    let stopping = |it: &&Value| text(it, "message").contains("stopping");
    assert!(lines.iter().any(|it| stopping(&it)), "{lines:?}");
}

/// An open of a FIFO for writing waits for its reader.
#[test]
fn what_nobody_reads_is_refused_as_a_log_and_what_is_read_is_one() {
    let dir = private_dir();
    let fifo = dir.path().join("fifo");
    let mode = nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR;
    nix::unistd::mkfifo(&fifo, mode).unwrap();
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let paths = [
        (
            &fifo,
            "it is a FIFO that nobody reads: start its reader first",
        ),
        (&socket, "it is a socket"),
    ];
    for (path, part) in paths {
        let mut refused = Running::spawn(forward(&["--log", text(path)]));
        assert_eq!(refused.exit_code(), Some(1));
        let why = refused.complains("cannot open the log");
        assert!(why.contains(text(path)) && why.contains(part), "{why}");
    }
    // Its own end for writing keeps the open of the reader from waiting.
    let both = fs::File::options().read(true).write(true).open(&fifo);
    let heard = lines(both.unwrap());
    let proxy = Running::spawn(forward(&["--log", text(&fifo)]));
    next(&heard, "has started");
    drop(proxy);
}

/// `/dev/full` takes no byte, as a full disk does.
#[cfg(target_os = "linux")]
#[test]
fn a_log_that_can_not_be_written_is_told_once() {
    let mut proxy = Running::spawn(forward(&["--log", "/dev/full"]));
    let why = proxy.complains("cannot write the log /dev/full");
    assert!(why.contains("make room on its disk"), "{why}");
    let port = proxy.tcp_port();
    for _ in 0..3 {
        assert!(resets_clients(port));
    }
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
    let told: Vec<String> = proxy.err.iter().collect();
    assert!(
        !told.iter().any(|line| line.contains("cannot write")),
        "{told:?}"
    );
}

/// Though another client was refused, and that was told, just before.
#[test]
fn the_first_client_of_an_absent_target_is_told() {
    let dir = private_dir();
    let target = dir.path().join("socket");
    let datagrams = std::os::unix::net::UnixDatagram::bind(&target).unwrap();
    let to = format!("unix://{}", text(&target));
    let proxy = Running::start(&["forward", "tcp://127.0.0.1:0", &to]);
    let port = proxy.tcp_port();
    assert!(resets_clients(port));
    fs::remove_file(&target).unwrap();
    drop(datagrams);
    assert!(resets_clients(port));
    proxy.complains("refused a client");
    proxy.complains("Clients are refused until it is");
}

/// It is not back, and what waited for it is carried from then on.
#[cfg(feature = "simulate")]
#[test]
fn a_vm_that_comes_for_the_first_time_is_told_of() {
    let dir = private_dir();
    let [state, log] = ["vm", "log"].map(|name| dir.path().join(name));
    let proxy = Running::start(&[
        "expose",
        "--no-keeper",
        "--log",
        text(&log),
        "--vm",
        text(&state),
        "-L",
        "0:7",
        "-R",
        "5000:tcp://127.0.0.1:1",
    ]);
    let port = proxy.tcp_port();
    assert!(resets_clients(port));
    let vm = hvsock::simulate::Vm::builder(&state);
    let _vm = vm
        .guest(7, hvsock::simulate::Service::Echo)
        .start()
        .unwrap();
    eventually("all is told", || {
        let told = read(&log);
        told.matches("carries ").count() == 2 && told.contains(" is there\n")
    });
    let told = read(&log);
    assert!(told.contains("is not there: "), "{told}");
    assert!(told.contains("Clients are refused until it is\n"), "{told}");
    assert!(!told.contains("is back"), "{told}");
    assert_eq!(ask(tcp(port), b"up").unwrap(), b"up");
}

/// Only hyperkit's device has slots to lose.
#[test]
fn a_guest_that_does_not_end_is_told_of_without_slots_where_there_are_none() {
    let dir = private_dir();
    let path = dir.path().join("vm");
    let vmm = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let to = format!("vsock-mux://:80{}", text(&path));
    let options = ["forward", "--drain-timeout=200ms", "tcp://127.0.0.1:0", &to];
    let proxy = Running::start(&options);
    let client = tcp(proxy.tcp_port());
    let (mut guest, _) = vmm.accept().unwrap();
    guest.read_exact(&mut [0; 11]).unwrap();
    guest.write_all(b"OK 1\n").unwrap();
    (&client).write_all(b"x").unwrap();
    guest.read_exact(&mut [0]).unwrap();
    SockRef::from(&client)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(client);
    let line = proxy.complains("did not end within the drain timeout");
    assert!(!line.contains("slot"), "{line}");
}

/// As systemd has it: standard error is the journal's, and the environment says which that is.
#[test]
#[cfg(target_os = "linux")]
fn the_journal_gets_priorities_and_no_second_time() {
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;
    use std::process::Stdio;

    let dir = private_dir();
    let journal = dir.path().join("journal");
    let stderr = File::create(&journal).unwrap();
    let stat = stderr.metadata().unwrap();
    let mut command = forward(&[]);
    command.env("JOURNAL_STREAM", format!("{}:{}", stat.dev(), stat.ino()));
    command.stdout(Stdio::piped()).stderr(stderr);
    let mut child = command.spawn().unwrap();
    let out = lines(child.stdout.take().unwrap());
    let mut proxy = Mortal(child);
    let line = next(&out, "tcp://127.0.0.1:");
    let port = line
        .split(['/', ':', ' '])
        .find_map(|part| part.parse().ok());
    assert!(resets_clients(port.unwrap()));
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
    let told = read(&journal);
    for part in ["refused a client of", "stopping"] {
        let line = told.lines().find(|line| line.contains(part));
        assert!(line.is_some_and(|line| line.starts_with("<4>")), "{told}");
    }
    assert!(told.lines().all(|line| line.starts_with('<')), "{told}");

    // Another's journal, as after `2>file` in a shell that it started.
    let mut elsewhere = forward(&[]);
    elsewhere.env("JOURNAL_STREAM", "1:1");
    let proxy = Running::spawn(elsewhere);
    assert!(resets_clients(proxy.tcp_port()));
    let line = proxy.complains("refused a client");
    assert!(line.contains("WARN") && !line.starts_with('<'), "{line}");
}

#[test]
fn a_file_is_made_appended_to_and_opened_again_when_it_was_renamed() {
    let dir = private_dir();
    let (log, old) = (dir.path().join("log"), dir.path().join("log.1"));
    fs::write(&log, "before\n").unwrap();
    let options = ["--log", text(&log)];
    let mut proxy = Running::spawn(forward(&options));
    let port = proxy.tcp_port();
    assert!(resets_clients(port));
    eventually("it is in the file", || {
        read(&log).contains("refused a client")
    });
    let told = read(&log);
    assert!(told.starts_with("before\n"), "{told}");
    for begin in [
        format!("has started, process {}", proxy.child.0.id()),
        format!("carries tcp://127.0.0.1:{port} -> "),
    ] {
        assert!(told.contains(&begin), "{told} lacks {begin}");
    }

    fs::rename(&log, &old).unwrap();
    let before = read(&old).len();
    proxy.signal("HUP");
    // It is opened before the next line. The end is one.
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
    assert!(read(&log).contains("stopping"), "{}", read(&log));
    assert!(read(&log).ends_with("has stopped\n"), "{}", read(&log));
    assert_eq!(read(&old).len(), before);
    assert_eq!(
        fs::metadata(&log).unwrap().permissions().mode() & 0o777,
        0o600
    );
    // A person at the terminal is told of the end as well, and of nothing else.
    let told: Vec<String> = proxy.err.iter().collect();
    assert!(
        told.iter().all(|line| line.contains("stopping")),
        "{told:?}"
    );
}

#[test]
fn a_file_that_can_not_be_opened_is_told_with_a_remedy() {
    let dir = private_dir();
    let nowhere = dir.path().join("no/log");
    for (path, remedy) in [
        (&*nowhere, "make its directory first"),
        (dir.path(), "it is a directory"),
    ] {
        let output = forward(&["--log", text(path)]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(text(path)) && said.contains(remedy), "{said}");
    }
}

#[test]
fn one_part_may_say_more_than_the_others() {
    let dir = private_dir();
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let target = format!("tcp://{}", server.local_addr().unwrap());
    let log = dir.path().join("log");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(["forward", "--log", text(&log), "tcp://127.0.0.1:0", &target]);
    command.env("HVSOCK_LOG", "info,access=debug");
    let proxy = Running::spawn(command);
    let client = tcp(proxy.tcp_port());
    drop((server.accept().unwrap(), client));
    eventually("its end is told", || read(&log).contains("closed"));
    assert!(!read(&log).contains("connected"), "{}", read(&log));
}

/// What comes of a reload is an event like any other.
#[test]
fn a_reload_is_told_with_its_time_and_level() {
    let dir = private_dir();
    let file = dir.path().join("hvsock.toml");
    let forward = "control = \"off\"\n[forward.a]\nlisten = 0\nconnect = 1\n";
    fs::write(&file, forward).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(["run", text(&file), "--log-format", "json"]);
    let proxy = Running::spawn(command);
    proxy.tcp_port();
    fs::write(&file, forward.replace("[forward.a]", "[forward.b]")).unwrap();
    proxy.signal("HUP");
    let line: Value = serde_json::from_str(&proxy.complains("was read again")).unwrap();
    assert_eq!(line["level"], "INFO");
    assert!(line["timestamp"].is_string(), "{line}");
    fs::write(&file, "no = TOML = at all").unwrap();
    proxy.signal("HUP");
    let line: Value = serde_json::from_str(&proxy.complains("all stays as it was")).unwrap();
    assert_eq!(line["level"], "ERROR");
}
