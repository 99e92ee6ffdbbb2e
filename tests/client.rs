//! The commands that ask a control socket, before a server that is somebody else, never ends, or
//! says rude things.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use command::*;
use common::*;

const MAC: bool = cfg!(target_os = "macos");

/// Where the default control socket is, of an hvsock of user `user` with this runtime directory.
fn home(runtime: &Path, user: u32) -> PathBuf {
    match MAC {
        true => runtime.join(format!("hvsock-{user}")),
        false => runtime.join("hvsock"),
    }
}

fn own() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// A server whose clients are `served` when they have sent something; counts those.
fn server(
    path: &Path,
    served: impl Fn(&mut UnixStream) + Send + Sync + 'static,
) -> Arc<AtomicUsize> {
    let listener = UnixListener::bind(path).unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let served = Arc::new(served);
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let (counted, served) = (Arc::clone(&counted), Arc::clone(&served));
            std::thread::spawn(move || {
                if client.read(&mut [0; 4096]).is_ok_and(|n| n > 0) {
                    counted.fetch_add(1, Ordering::SeqCst);
                    served(&mut client);
                }
            });
        }
    });
    asked
}

fn answer(client: &mut UnixStream, status: &str, body: &str) {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let _ = client.write_all(head.as_bytes());
    let _ = client.write_all(body.as_bytes());
}

/// What a command says that fails.
fn refused(command: Command) -> String {
    let output = output(command);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn commands() -> [Vec<&'static str>; 5] {
    [
        vec!["status"],
        vec!["add", "/a", "/b"],
        vec!["remove", "a"],
        vec!["reload"],
        vec!["stop"],
    ]
}

#[test]
fn a_place_that_is_open_to_others_is_not_believed() {
    let dir = private_dir();
    let home = home(dir.path(), own());
    let elsewhere = dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let asked = server(&elsewhere.join("control.sock"), |client| {
        answer(client, "200 OK", "{}")
    });
    for arguments in commands() {
        // Somebody was there first.
        symlink(&elsewhere, &home).unwrap();
        let why = refused(in_runtime(dir.path(), &arguments));
        assert!(
            why.contains(text(&home)) && why.contains("is no directory"),
            "{why}"
        );
        fs::remove_file(&home).unwrap();
        fs::rename(&elsewhere, &home).unwrap();
        fs::set_permissions(&home, Permissions::from_mode(0o777)).unwrap();
        let why = refused(in_runtime(dir.path(), &arguments));
        for part in [text(&home), "open to others", "777", "chmod 700"] {
            assert!(why.contains(part), "{why}");
        }
        fs::rename(&home, &elsewhere).unwrap();
    }
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    // Where there is nothing, nobody is suspected.
    let why = refused(in_runtime(dir.path(), &["status"]));
    assert!(why.contains("no hvsock answers"), "{why}");
}

#[test]
fn another_users_socket_is_not_believed() {
    const NOBODY: u32 = 65534;
    if own() != 0 {
        eprintln!("skipped: it takes two users; run the tests as root to see it");
        return;
    }
    let dir = private_dir();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    // Nobody may not get at that of the build.
    let binary = dir.path().join("hvsock-binary");
    put_program(&binary);
    let as_nobody = |arguments: &[&str]| {
        use std::os::unix::process::CommandExt;
        let mut command = Command::new(&binary);
        command.args(arguments).current_dir("/").uid(NOBODY);
        command.env_remove("XDG_RUNTIME_DIR");
        command.env(if MAC { "TMPDIR" } else { "XDG_RUNTIME_DIR" }, dir.path());
        command
    };
    let socket = dir.path().join("control");
    let asked = server(&socket, |client| answer(client, "200 OK", "{}"));
    fs::set_permissions(&socket, Permissions::from_mode(0o666)).unwrap();
    let home = home(dir.path(), NOBODY);
    fs::create_dir(&home).unwrap();
    for mut arguments in commands() {
        let why = refused(as_nobody(&arguments));
        for part in [text(&home), "user 0", "--control PATH"] {
            assert!(why.contains(part), "{why}");
        }
        arguments.extend(["--control", text(&socket)]);
        let why = refused(as_nobody(&arguments));
        for part in [text(&socket), "user 0", "user 65534", "--control PATH"] {
            assert!(why.contains(part), "{why}");
        }
    }
    assert_eq!(asked.load(Ordering::SeqCst), 0);
}

#[test]
fn an_answer_without_an_end_is_given_up() {
    let dir = private_dir();
    let at = |name: &str| dir.path().join(name);
    server(&at("floods"), |client| {
        let head = "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n";
        let _ = client.write_all(head.as_bytes());
        while client.write_all(&[b' '; 64 * 1024]).is_ok() {}
    });
    // It would be read for more than ten days.
    server(&at("drips"), |client| {
        let _ = client.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n");
        while client.write_all(b" ").is_ok() {
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
    });
    for (name, part) in [("floods", "more than 16 MiB"), ("drips", "gives no answer")] {
        let path = at(name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
        command.args(["status", "--control", text(&path)]);
        let why = refused(command);
        assert!(why.contains(part), "{why}");
    }
}

/// Would clear the screen, write backwards, end the line and begin another.
const RUDE: &str = "x\u{1b}[2J\u{9b}2J\u{7f}\u{202e}\r\nhvsock: faked";

/// Asserts that no terminal would obey it, and that no line was faked.
fn is_fit(text: &str) {
    let active = |c: char| c != '\n' && c.is_control() || c == '\u{202e}';
    assert!(!text.contains(active), "{text:?}");
    assert!(
        !text.lines().any(|line| line.starts_with("hvsock: faked")),
        "{text}"
    );
}

#[test]
fn what_an_answer_names_does_not_reach_a_terminal() {
    let dir = private_dir();
    let path = dir.path().join("rude");
    let counters = serde_json::json!({
        "accepted": 0, "live": 0, "refused": 0, "idle": 0, "half_closed": 0, "abandoned": 0, "sent": 0, "received": 0,
        "refusals": {"by_target": 0, "absent": 0, "dial_timeout": 0, "full": 0, "other": 0},
    });
    let forward = serde_json::json!({
        "id": 1, "name": RUDE, "listen": RUDE, "connect": RUDE, "state": RUDE, "why": RUDE, "since": 1.0,
        "vm": null, "last_error": {"text": RUDE, "at": 1.0}, "counters": counters,
        "rule": {"listen": RUDE, "connect": RUDE},
    });
    let status = serde_json::json!({
        "version": RUDE, "pid": 1, "uptime_seconds": 1.0, "stopping": false, "live": 0, "log_dropped": 0,
        "forwards": [forward],
    });
    let whole = status.clone();
    server(&path, move |client| {
        answer(client, "200 OK", &status.to_string());
    });
    let ask = |arguments: &[&str], path: &Path| {
        let output = run(&[arguments, &["--control", text(path)]].concat());
        let out = String::from_utf8(output.stdout).unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        is_fit(&out);
        is_fit(&err);
        (output.status.code(), out, err)
    };
    let (code, out, _) = ask(&["status"], &path);
    assert_eq!(code, Some(0));
    assert!(
        out.contains("x\\u{1b}[2J\\u{9b}2J\\u{7f}\\u{202e}\\r\\nhvsock: faked"),
        "{out}"
    );
    let (code, out, _) = ask(&["status", "--json"], &path);
    assert_eq!(code, Some(0));
    let read: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(read, whole);

    let one = dir.path().join("one");
    server(&one, move |client| {
        answer(client, "200 OK", &forward.to_string())
    });
    for arguments in [&["add", "/a", "/b"][..], &["remove", "a"]] {
        let (code, out, _) = ask(arguments, &one);
        assert_eq!(code, Some(0));
        assert!(out.contains("x\\u{1b}[2J"), "{out}");
    }
    let not = dir.path().join("not");
    let problem = serde_json::json!({"error": RUDE, "remedy": RUDE}).to_string();
    server(&not, move |client| answer(client, "409 Conflict", &problem));
    for arguments in commands() {
        let (code, _, err) = ask(&arguments, &not);
        assert_eq!(code, Some(1));
        assert!(err.contains("x\\u{1b}[2J"), "{err}");
    }
}
