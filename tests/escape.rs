//! Files and directories with names that would move a terminal or fake a line: whatever is said of
//! them is shown.
#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use command::*;
use common::*;

/// Clears the screen, turns the direction of writing, and begins a line.
const RUDE: &str = "a\u{1b}[2J\u{202e}\nhvsock: faked";

/// Asserts that no terminal would obey it, and that no line was faked; but names of it are shown.
fn is_fit(said: &str) {
    let active = |c: char| c != '\n' && c.is_control() || c == '\u{202e}';
    assert!(!said.contains(active), "{said:?}");
    let faked = said.lines().any(|line| line.starts_with("hvsock: faked"));
    assert!(!faked, "{said}");
    assert!(said.contains("[2J"), "nothing of it was said: {said}");
}

fn both(command: Command) -> String {
    let output = output(command);
    let said = [output.stdout, output.stderr].concat();
    String::from_utf8(said).unwrap()
}

struct Scene {
    _dir: tempfile::TempDir,
    rude: PathBuf,
}

/// A directory of that name, in a private one.
fn scene() -> Scene {
    let dir = private_dir();
    let rude = dir.path().join(RUDE);
    fs::create_dir(&rude).unwrap();
    Scene { _dir: dir, rude }
}

fn hvsock(arguments: &[&str], at: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(arguments).current_dir(at);
    command
}

#[test]
fn commands_that_look_show_names_and_do_not_obey_them() {
    let scene = scene();
    let rude = &scene.rude;
    let state = rude.join("vm");
    fs::create_dir(&state).unwrap();
    fs::write(state.join("hyperkit.json"), "{}").unwrap();
    fs::write(state.join("hyperkit.pid"), "1").unwrap();
    let _vm = hvsock::simulate::Vm::builder(&state).start().unwrap();
    let file = rude.join("hvsock.toml");
    let wrong =
        format!("{RUDE:?} = 1\n\"\\u001b[2J\" = 1\n[vm.a]\nat = \"\\u001b[2J\\nhvsock: faked\"\n");
    fs::write(
        &file,
        wrong
            .replace("\\u{1b}", "\\u001b")
            .replace("\\u{202e}", "\\u202e"),
    )
    .unwrap();
    let right = rude.join("right.toml");
    fs::write(
        &right,
        "[vm.a]\nat = \"./missing\"\n[forward.b]\nlisten = \"./s\"\nvm = \"a\"\nport = 1\n",
    )
    .unwrap();
    for arguments in [
        &["vms"][..],
        &["check", text(&file)],
        &["check", text(&right)],
        &["run", text(&file)],
        &["run", text(&rude.join("none.toml"))],
        &["doctor", "--vm", text(&state)],
        &["doctor", "--vm", text(&rude.join("none"))],
        &["doctor", "--json", "--vm", text(&state)],
        &[
            "expose",
            "--exit-idle=0.1",
            "--vm",
            text(&rude.join("none")),
            "-L",
            "0:1",
        ],
        &["cat", text(&rude.join("none"))],
        &["status", "--control", text(&rude.join("none"))],
    ] {
        let said = both(hvsock(arguments, rude));
        if arguments[0] != "cat" && arguments[0] != "status" {
            is_fit(&said);
        }
    }
}

#[test]
fn commands_that_serve_show_names_and_do_not_obey_them() {
    let scene = scene();
    let rude = &scene.rude;
    let all = |mut running: Running, heard: &[String]| {
        running.signal("TERM");
        assert_eq!(running.exit_code(), Some(0));
        let rest: Vec<String> = running.out.iter().chain(running.err.iter()).collect();
        is_fit(&[heard, &rest].concat().join("\n"));
    };
    let state = rude.join("vm");
    fs::create_dir(&state).unwrap();
    let simulate = hvsock(&["simulate", text(&state)], rude);
    let simulate = Running::spawn(simulate);
    let heard = simulate.says("stand-in");
    all(simulate, &[heard]);

    let log = rude.join("log");
    let syslog = Running::spawn(hvsock(&["syslog", text(&log), "/nowhere"], rude));
    eventually("it listens", || log.exists());
    all(syslog, &[]);

    // Its log, too: the VM is gone.
    let local = scene._dir.path().join("local");
    let listen = format!("{}:7", text(&local));
    let mut expose = hvsock(&["expose", "--vm", text(&state), "-L", &listen], rude);
    expose.env("HVSOCK_LOG", "debug");
    let expose = Running::spawn(expose);
    expose.says("->");
    let _ = unix_client(&local).read(&mut [0]);
    let _ = unix_client(&local).read(&mut [0]);
    let heard = expose.complains("the VM at");
    all(expose, &[heard]);
}
