//! The keeper as people see it: `status`, the metrics, `vms`, `doctor`, and `stop --keeper`.
#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use command::*;
use common::*;
use hvsock::simulate::{Service, Vm};

/// An hvsock in front of a VM, controlled in its own directory, beside which the VM's is.
struct Scene {
    dir: tempfile::TempDir,
    vm: Vm,
    hvsock: Running,
}

impl Scene {
    fn new() -> Scene {
        let dir = private_dir();
        let state = dir.path().join("vm");
        let vm = Vm::builder(&state).guest(7, Service::Echo).start().unwrap();
        let mut command = in_runtime(dir.path(), &["expose", "--vm", text(&state)]);
        command.args([
            "-L",
            "0:7",
            "-R",
            "5000:127.0.0.1:9",
            "--control",
            "--metrics",
            "0",
        ]);
        let hvsock = Running::spawn(command);
        hvsock.says("controlled at");
        Scene { dir, vm, hvsock }
    }

    fn state(&self) -> String {
        text(&self.dir.path().join("vm")).to_owned()
    }

    /// As keepers are asked, however the temporary directory is spelled.
    fn real_state(&self) -> String {
        let real = self.dir.path().join("vm").canonicalize().unwrap();
        text(&real).to_owned()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = in_runtime(self.dir.path(), arguments);
        // `vms` looks in the current directory, and nowhere else.
        command
            .current_dir(self.dir.path())
            .env("HOME", self.dir.path());
        command
    }

    /// Runs a command; its exit code, and what it said on both streams.
    fn run(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let output = output(self.command(arguments));
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    }

    fn keeper(&self) -> Value {
        let (_, said, _) = self.run(&["status", "--json"]);
        let status: Value = serde_json::from_str(&said).unwrap();
        status["keeper"].clone()
    }

    /// The keeper's process, once it has what there is to keep.
    fn has_keeper(&self) -> u64 {
        let mut keeper = Value::Null;
        eventually("there is a keeper, and it can be asked", || {
            keeper = self.keeper();
            let socket = format!("{}/hvsock-keeper.{}", self.state(), keeper["pid"]);
            keeper["ports"] == 1 && keeper["unguarded"] == 0 && Path::new(&socket).exists()
        });
        keeper["pid"].as_u64().unwrap()
    }

    /// Kills the hvsock; what it leaves behind.
    fn is_killed(&mut self) {
        self.hvsock.child.0.kill().unwrap();
        self.hvsock.child.0.wait().unwrap();
    }
}

/// Asserts that a text has all of that.
fn has(said: &str, parts: &[&str]) {
    for part in parts {
        assert!(said.contains(part), "{said:?} lacks {part:?}");
    }
}

fn is_alive(pid: u64) -> bool {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    // One that nobody waits for is gone all the same.
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    nix::sys::signal::kill(pid, None).is_ok() && !state.contains(") Z ")
}

#[test]
fn the_keeper_of_an_hvsock_is_shown_and_ends_with_it_if_that_is_wanted() {
    let mut scene = Scene::new();
    let place = scene.hvsock.child.0.id();
    let pid = scene.has_keeper();
    let process = format!("process {pid}");
    let (_, said, _) = scene.run(&["status"]);
    has(&said, &["keeper: ", &process, "0 connections and 1 port"]);
    let (_, said, _) = scene.run(&["vms"]);
    let line = format!("keeper {pid} of hvsock process {place} has copies of 0 connections");
    has(&said, &["vm: ", &line, "of port 5000 (0x1388)"]);
    let carries = format!("vm: hvsock process {place} carries it: up, ");
    has(&said, &[&carries, "; 0 of 900 slots"]);
    let (_, said, _) = scene.run(&["doctor", "--vm", &scene.state(), "--json"]);
    let checks: Value = serde_json::from_str(&said).unwrap();
    let checks = checks["checks"].as_array().unwrap();
    let check = checks.iter().find(|it| it["name"] == "keeper").unwrap();
    assert_eq!(check["verdict"], "ok", "{check}");
    has(
        check["seen"].as_str().unwrap(),
        &[&process, "port 5000 (0x1388)"],
    );

    let (_, said, _) = scene.run(&["ps"]);
    let line = format!("keeper of {place} (VM {})", scene.real_state());
    has(&said, &[&line]);

    let control = scene.dir.path().join("hvsock/control.sock");
    let metrics = ask(unix_client(&control), b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let metrics = String::from_utf8(metrics).unwrap();
    for sample in [
        &format!("hvsock_keeper_pid {pid}\n"),
        "hvsock_keeper_connections 0\n",
        "hvsock_keeper_ports 1\n",
        "hvsock_keeper_unguarded 0\n",
        "hvsock_keeper_restarts_total 0\n",
    ] {
        has(&metrics, &[sample]);
    }

    // It is not ended in passing.
    let (code, said, why) = scene.run(&["stop", &scene.state(), "--keeper"]);
    assert_eq!((code, said.as_str()), (Some(1), ""));
    has(
        &why,
        &[
            &format!("keeper {pid} stays"),
            &format!("process {place}, runs"),
        ],
    );
    let (code, _, why) = scene.run(&["stop", &scene.state()]);
    assert_eq!(code, Some(2), "{why}");
    assert!(is_alive(pid) && scene.keeper()["pid"] == pid);

    let (code, said, why) = scene.run(&["stop", "--keeper", "--grace", "0"]);
    assert_eq!(code, Some(0), "{why}");
    has(&said, &["stopped", &format!("ended keeper {pid}")]);
    has(
        &why,
        &[
            "nobody listens on port 5000 (0x1388)",
            &scene.state(),
            "may hang",
        ],
    );
    assert_eq!(scene.hvsock.exit_code(), Some(0));
    eventually("the keeper has ended", || !is_alive(pid));
    // None is left to be shown.
    let (code, _, why) = scene.run(&["stop", &scene.state(), "--keeper"]);
    assert_eq!(code, Some(1));
    has(&why, &["there is no keeper"]);
    assert!(scene.vm.fate().is_none(), "{:?}", scene.vm.fate());
}

#[test]
fn connections_that_are_over_are_counted_by_nobody() {
    let scene = Scene::new();
    scene.has_keeper();
    let (_, said, _) = scene.run(&["status", "--json"]);
    let status: Value = serde_json::from_str(&said).unwrap();
    let listen = status["forwards"][0]["listen"].as_str().unwrap();
    let address = listen.strip_prefix("tcp://").unwrap();
    let connect = || {
        let client = std::net::TcpStream::connect(address).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client
    };
    let mut live = connect();
    std::io::Write::write_all(&mut live, b"x").unwrap();
    std::io::Read::read_exact(&mut live, &mut [0]).unwrap();
    for _ in 0..3 {
        assert_eq!(ask(connect(), b"hello").unwrap(), b"hello");
    }
    for command in [&["vms"][..], &["doctor", "--vm", &scene.state()]] {
        eventually("one is left", || {
            let (_, said, _) = scene.run(command);
            said.contains("has copies of 1 connection and")
        });
    }
}

#[test]
fn a_keeper_whose_hvsock_has_ended_is_shown_and_can_be_ended() {
    let mut scene = Scene::new();
    let place = scene.hvsock.child.0.id();
    let pid = scene.has_keeper();
    scene.is_killed();
    let line = format!("keeper {pid}, whose hvsock process {place} has ended");
    eventually("the keeper serves", || {
        scene.run(&["vms"]).1.contains(&line)
    });
    let (_, said, _) = scene.run(&["vms"]);
    has(&said, &["accepts on port 5000 (0x1388)"]);
    let (_, said, _) = scene.run(&["ps"]);
    let line = format!(
        "keeper of {place}, which has ended: waits for a successor (VM {})",
        scene.real_state()
    );
    has(&said, &[&line]);
    let (code, said, _) = scene.run(&["doctor", "--vm", &scene.state()]);
    // It is nothing that has failed.
    assert_eq!(code, Some(0), "{said}");
    has(
        &said,
        &[
            "warn",
            &format!("hvsock {place} has ended"),
            "start hvsock again",
        ],
    );
    let (code, _, why) = scene.run(&["stop", "--keeper"]);
    assert_eq!(code, Some(1));
    has(&why, &["no hvsock answers", "hvsock stop VM --keeper"]);
    assert!(is_alive(pid));
    let (code, said, why) = scene.run(&["stop", &scene.state(), "--keeper"]);
    assert_eq!(code, Some(0), "{why}");
    has(&said, &[&format!("ended keeper {pid}")]);
    has(&why, &["port 5000 (0x1388)", "may hang"]);
    eventually("the keeper has ended", || !is_alive(pid));
}

#[test]
fn a_port_that_is_removed_is_no_danger_where_a_keeper_accepts() {
    let scene = Scene::new();
    let pid = scene.has_keeper();
    let port = format!("hyperkit://:5000{}", scene.state());
    let (code, said, why) = scene.run(&["remove", &port]);
    assert_eq!((code, why.as_str()), (Some(0), ""), "{said}");
    let accepts = format!("keeper {pid} of hvsock process");
    eventually("the keeper accepts there", || {
        let (_, said, _) = scene.run(&["vms"]);
        said.contains(&accepts) && said.contains("accepts on port 5000")
    });
    assert_eq!(ask(scene.vm.dial(5000).unwrap(), b"guest").unwrap(), b"");
    assert!(scene.vm.fate().is_none(), "{:?}", scene.vm.fate());
}

#[test]
fn an_hvsock_without_a_keeper_says_so() {
    let dir = private_dir();
    let mut command = in_runtime(
        dir.path(),
        &["forward", "tcp://127.0.0.1:0", "tcp://127.0.0.1:9"],
    );
    command.arg("--control");
    let hvsock = Running::spawn(command);
    hvsock.says("controlled at");
    let status = |more: &[&str]| {
        let output = output(in_runtime(dir.path(), &[&["status"], more].concat()));
        String::from_utf8(output.stdout).unwrap()
    };
    // No rule needs one.
    assert!(!status(&[]).contains("keeper"));
    let json: Value = serde_json::from_str(&status(&["--json"])).unwrap();
    assert_eq!(json["keeper"]["pid"], Value::Null);
    drop(hvsock);
    let mut command = in_runtime(
        dir.path(),
        &["forward", "tcp://127.0.0.1:0", "tcp://127.0.0.1:9"],
    );
    command.args(["--control", "--no-keeper"]);
    let hvsock = Running::spawn(command);
    hvsock.says("controlled at");
    let json: Value = serde_json::from_str(&status(&["--json"])).unwrap();
    assert_eq!(json["keeper"], Value::Null);
}
