//! Which hvsock processes run: those with a control socket and those without, and what is left of
//! those that were killed.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use command::*;
use common::*;

/// Where the user's control sockets are.
fn home(runtime: &Path) -> PathBuf {
    match cfg!(target_os = "macos") {
        true => runtime.join(format!("hvsock-{}", nix::unistd::geteuid())),
        false => runtime.join("hvsock"),
    }
}

fn forward(runtime: &Path, more: &[&str]) -> Running {
    let arguments = ["forward", "tcp://127.0.0.1:0", "/nowhere"];
    let hvsock = Running::spawn(in_runtime(runtime, &[&arguments, more].concat()));
    hvsock.says(" -> unix:///nowhere");
    hvsock
}

fn said(runtime: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = output(in_runtime(runtime, arguments));
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let (out, err) = (text(output.stdout), text(output.stderr));
    (output.status.code(), out, err)
}

/// What is told of one process. Other tests' processes are there, too.
fn told(runtime: &Path, hvsock: &Running) -> Value {
    let (code, out, err) = said(runtime, &["ps", "--json"]);
    assert_eq!(code, Some(0), "{err}");
    let all: Vec<Value> = serde_json::from_str(&out).unwrap();
    let pid = hvsock.child.0.id();
    let its = all.into_iter().find(|it| it["pid"] == pid);
    its.unwrap_or_else(|| panic!("{out}"))
}

fn own_socket(runtime: &Path, hvsock: &Running) -> PathBuf {
    home(runtime).join(format!("{}.sock", hvsock.child.0.id()))
}

#[test]
fn each_is_found_with_what_it_forwards() {
    let dir = private_dir();
    let runtime = dir.path();
    let mut plain = forward(runtime, &[]);
    let own = own_socket(runtime, &plain);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&home(runtime)), mode(&own)), (0o700, 0o600));
    let one = told(runtime, &plain);
    assert_eq!(one["control"], text(&own));
    assert_eq!(one["status"]["forwards"][0]["connect"], "unix:///nowhere");

    let elsewhere = dir.path().join("c");
    let named = forward(runtime, &[&format!("--control={}", text(&elsewhere))]);
    assert_eq!(told(runtime, &named)["control"], text(&elsewhere));
    let usual = forward(runtime, &["--control"]);
    let default = home(runtime).join("control.sock");
    assert_eq!(told(runtime, &usual)["control"], text(&default));
    let off = forward(runtime, &["--control=off"]);
    let one = told(runtime, &off);
    assert_eq!(
        (&one["control"], &one["status"]),
        (&Value::Null, &Value::Null)
    );
    assert_eq!(one["command"][1], "forward");
    for without in [&named, &usual, &off] {
        assert!(!own_socket(runtime, without).exists());
    }

    let (_, table, _) = said(runtime, &["ps"]);
    let row = |hvsock: &Running| {
        let pid = hvsock.child.0.id().to_string();
        let row = table
            .lines()
            .find(|row| row.split_whitespace().next() == Some(&pid));
        row.unwrap_or_else(|| panic!("{table}")).to_owned()
    };
    let port = plain_port(&told(runtime, &plain));
    let forwards = format!("tcp://127.0.0.1:{port} -> unix:///nowhere");
    assert!(row(&plain).contains(&forwards), "{table}");
    assert!(row(&off).contains("--control=off"), "{table}");
    let (_, table, _) = said(runtime, &["ps", "--all"]);
    let its = table.lines().find(|row| row.contains(text(&own)));
    assert!(its.unwrap().contains(&forwards), "{table}");

    // By its number one is found wherever it is controlled.
    for hvsock in [&plain, &named, &usual] {
        let pid = hvsock.child.0.id().to_string();
        let (code, out, err) = said(runtime, &["status", "--pid", &pid]);
        assert_eq!(code, Some(0), "{err}");
        assert!(out.contains(&format!("process {pid}")), "{out}");
    }
    let pid = off.child.0.id().to_string();
    let (code, _, err) = said(runtime, &["status", "--pid", &pid]);
    assert_eq!(code, Some(1));
    let part = format!("the control socket of process {pid} is elsewhere, or off");
    assert!(
        err.contains(&part) && err.contains("--control PATH"),
        "{err}"
    );
    // More than Linux' largest, and no Mac has so many.
    let (code, _, err) = said(runtime, &["status", "--pid", "4194305"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("no hvsock is process 4194305;"), "{err}");
    let (_, _, err) = said(runtime, &["status", "--pid", "1"]);
    assert!(err.contains("process 1 is no hvsock"), "{err}");

    plain.signal("TERM");
    assert_eq!(plain.exit_code(), Some(0));
    assert!(!own.exists());
}

/// Nobody has asked for it, so that it goes on; but who looks for it later is to know.
#[test]
fn one_that_can_have_no_control_socket_says_so_and_goes_on() {
    let dir = private_dir();
    fs::write(home(dir.path()), "").unwrap();
    let without = ["forward", "tcp://127.0.0.1:0", "unix:///nowhere"];
    let hvsock = Running::spawn(in_runtime(dir.path(), &without));
    let line = hvsock.complains("without a control socket");
    assert!(
        line.contains("is no directory") && line.contains("--control=off"),
        "{line}"
    );
    assert!(resets_clients(hvsock.tcp_port()));
}

/// What nobody has asked for is no part of why it can't start.
#[test]
fn one_that_fails_tells_of_its_failure_alone() {
    let dir = private_dir();
    fs::write(home(dir.path()), "").unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = format!("tcp://{}", taken.local_addr().unwrap());
    let (code, out, err) = said(dir.path(), &["forward", &listen, "unix:///nowhere"]);
    assert_eq!((code, &*out), (Some(1), ""), "{err}");
    assert!(
        err.contains(&listen) && !err.contains("control socket"),
        "{err}"
    );
    assert_eq!(err.trim_end().lines().count(), 1, "{err}");
}

#[test]
fn one_has_one_line_unless_all_forwards_are_wanted() {
    let dir = private_dir();
    let runtime = dir.path();
    let hvsock = forward(
        runtime,
        &[
            "tcp://127.0.0.1:0",
            "/second",
            "tcp://127.0.0.1:0",
            "/third",
        ],
    );
    let pid = hvsock.child.0.id().to_string();
    let rows = |more: &[&str]| {
        let (_, table, _) = said(runtime, &[&["ps"], more].concat());
        let mut rows = table.lines().map(str::to_owned);
        let its = rows.by_ref().find(|row| row.starts_with(&pid)).unwrap();
        // Those of other processes begin with a number.
        let others = rows.take_while(|row| row.starts_with(' '));
        std::iter::once(its).chain(others).collect::<Vec<_>>()
    };
    let [line] = &rows(&[])[..] else {
        panic!("{:?}", rows(&[]));
    };
    assert!(line.ends_with(" -> unix:///nowhere, and 2 more"), "{line}");
    let all = rows(&["--all"]);
    for (row, end) in all.iter().zip(["/nowhere", "/second", "/third"]) {
        assert!(row.ends_with(end), "{all:?}");
    }
    assert_eq!(all.len(), 3, "{all:?}");
}

fn plain_port(told: &Value) -> String {
    let listen = told["status"]["forwards"][0]["listen"].as_str().unwrap();
    listen.rsplit_once(':').unwrap().1.to_owned()
}

#[test]
fn the_only_one_is_meant_if_none_is_named_and_one_of_several_by_its_number() {
    let dir = private_dir();
    let runtime = dir.path();
    let first = forward(runtime, &[]);
    let (code, out, err) = said(runtime, &["status", "--json"]);
    assert_eq!(code, Some(0), "{err}");
    let status: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(status["pid"], first.child.0.id());

    let second = forward(runtime, &[]);
    let (code, _, err) = said(runtime, &["status"]);
    assert_eq!(code, Some(1));
    assert!(
        err.contains("2 hvsocks run: say which with --pid "),
        "{err}"
    );
    for one in [&first, &second] {
        let pid = one.child.0.id();
        let port = plain_port(&told(runtime, one));
        let named = format!("--pid {pid} (tcp://127.0.0.1:{port})");
        assert!(err.contains(&named), "{err}");
    }
    assert!(!err.contains("start one"), "{err}");
    let pid = second.child.0.id().to_string();
    let (code, out, err) = said(runtime, &["status", "--pid", &pid]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains(&format!("process {pid}")), "{out}");
    let both = said(runtime, &["status", "--pid", &pid, "--control", "/x"]);
    assert_eq!(both.0, Some(2));
}

#[test]
fn what_a_killed_one_leaves_disturbs_nobody_and_goes_with_the_next() {
    let dir = private_dir();
    let runtime = dir.path();
    let mut killed = forward(runtime, &[]);
    let stale = own_socket(runtime, &killed);
    let lives = forward(runtime, &[]);
    killed.signal("KILL");
    assert_eq!(killed.exit_code(), None);
    assert!(stale.exists());
    // The other is the only one that runs.
    let (code, out, err) = said(runtime, &["status"]);
    assert_eq!(code, Some(0), "{err}");
    let pid = lives.child.0.id();
    assert!(out.contains(&format!("process {pid}")), "{out}");
    let next = forward(runtime, &[]);
    assert!(!stale.exists());
    for there in [&lives, &next] {
        assert!(own_socket(runtime, there).exists());
    }
    // What is no socket of a process' is left alone.
    let mine = home(runtime).join("mine.sock");
    fs::write(&mine, "").unwrap();
    let _third = forward(runtime, &[]);
    assert!(mine.exists());
}

/// Nobody has asked for it: where it can't be, the forwards are carried all the same.
#[test]
fn without_a_directory_for_its_socket_it_forwards_nevertheless() {
    let dir = private_dir();
    let runtime = dir.path().join("none");
    fs::create_dir(&runtime).unwrap();
    let open = home(&runtime);
    fs::write(&open, "a file is in the way").unwrap();
    let hvsock = forward(&runtime, &[]);
    let one = told(&runtime, &hvsock);
    assert_eq!(one["control"], Value::Null);
    fs::remove_file(&open).unwrap();
    // One that others can write to is not trusted.
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    let arguments = ["forward", "tcp://127.0.0.1:0", "/nowhere"];
    let mut command = in_runtime(&runtime, &arguments);
    command.env("HVSOCK_LOG", "debug");
    let hvsock = Running::spawn(command);
    hvsock.complains("without a control socket: ");
    assert!(!own_socket(&runtime, &hvsock).exists());
}

#[test]
fn who_listens_where_another_can_not_is_named() {
    let dir = private_dir();
    let runtime = dir.path();
    let first = forward(runtime, &[]);
    let id = first.child.0.id();
    let listen = format!("tcp://127.0.0.1:{}", plain_port(&told(runtime, &first)));
    let named = format!("hvsock process {id} listens there (forward {listen})");
    let (code, _, err) = said(runtime, &["forward", &listen, "/elsewhere"]);
    assert_eq!(code, Some(1));
    assert!(err.contains(&named), "{err}");
    let second = forward(runtime, &[]);
    let pid = second.child.0.id().to_string();
    let (code, _, err) = said(runtime, &["add", "--pid", &pid, &listen, "/elsewhere"]);
    assert_eq!(code, Some(1));
    assert!(err.contains(&named), "{err}");
    // Of several forwards it is said as well, and by their names.
    let file = runtime.join("hvsock.toml");
    let web = |listen: &str| format!("[forward.web]\nlisten = {listen:?}\nconnect = \"/x\"\n");
    fs::write(&file, format!("control = \"off\"\n{}", web(&listen))).unwrap();
    let run = Running::spawn(in_runtime(runtime, &["run", text(&file)]));
    run.complains(&named);
    let socket = runtime.join("web.sock");
    fs::write(&file, web(text(&socket))).unwrap();
    let run = Running::spawn(in_runtime(runtime, &["run", text(&file)]));
    run.says("web: ");
    let (_, _, err) = said(runtime, &["forward", text(&socket), "/elsewhere"]);
    let id = run.child.0.id();
    let named = format!("hvsock process {id} listens there (forward web)");
    assert!(err.contains(&named), "{err}");
}
