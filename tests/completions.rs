//! Completions, driven in real shells: those that are installed here.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use command::*;
use common::*;

/// A user's own directories, hvsock in the PATH, its scripts, and an hvsock that runs and has a
/// connection.
struct World {
    // It ends before its directory goes.
    _running: Running,
    _client: TcpStream,
    _server: TcpListener,
    connection: String,
    process: String,
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> World {
        let dir = private_dir();
        let path = dir.path();
        for made in [
            "bin",
            "work/sub",
            "functions",
            "machines/.minikube/machines/minikube",
        ] {
            fs::create_dir_all(path.join(made)).unwrap();
        }
        symlink(env!("CARGO_BIN_EXE_hvsock"), path.join("bin/hvsock")).unwrap();
        fs::write(path.join("work/forwards.toml"), "").unwrap();
        fs::write(
            path.join("machines/.minikube/machines/minikube/hyperkit.json"),
            "{}",
        )
        .unwrap();
        for (shell, name) in [
            ("bash", "hvsock.bash"),
            ("fish", "hvsock.fish"),
            ("zsh", "functions/_hvsock"),
        ] {
            let script = run(&["completions", shell]);
            assert!(script.status.success());
            fs::write(path.join(name), script.stdout).unwrap();
        }
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = format!("tcp://{}", server.local_addr().unwrap());
        let forward = ["forward", "tcp://127.0.0.1:0", &target, "--control"];
        let running = Running::spawn(in_runtime(path, &forward));
        running.says("controlled at");
        let client = TcpStream::connect(("127.0.0.1", running.tcp_port())).unwrap();
        let mut connection = None;
        eventually("it has the connection", || {
            let said = output(in_runtime(path, &["connections", "--json"])).stdout;
            let all: serde_json::Value = serde_json::from_slice(&said).unwrap();
            connection = all[0]["id"].as_u64();
            connection.is_some()
        });
        let added = in_runtime(
            path,
            &[
                "add",
                "--name",
                "web-ui",
                "tcp://127.0.0.1:0",
                "tcp://127.0.0.1:9",
            ],
        );
        assert!(output(added).status.success());
        World {
            process: running.child.0.id().to_string(),
            _running: running,
            _client: client,
            _server: server,
            connection: connection.unwrap().to_string(),
            dir,
        }
    }

    /// What is typed, and what must be offered, nothing else.
    fn cases(&self) -> Vec<(String, Vec<&str>)> {
        let cases = CASES.map(|(typed, right)| (typed.to_owned(), vec![right]));
        let close = format!("hvsock close {}", &self.connection[..1]);
        let mut cases = Vec::from(cases);
        cases.push((close, vec![&self.connection]));
        // Its number, of which no other process' is the beginning.
        let pid = self.process.as_str();
        cases.push((format!("hvsock status --pid {pid}"), vec![pid]));
        cases
    }

    /// A shell that knows it; `None` if there is no such shell here.
    fn shell(&self, name: &str) -> Option<Command> {
        let mut there = Command::new(name);
        there.arg("--version").stdout(Stdio::null());
        if there.stderr(Stdio::null()).status().is_err() {
            println!("skipped: there is no {name}; install it");
            return None;
        }
        let path = self.dir.path();
        let mut shell = in_runtime(path, &[]);
        let environment: Vec<_> = shell
            .get_envs()
            .map(|(key, value)| (key.to_owned(), value.map(ToOwned::to_owned)))
            .collect();
        shell = Command::new(name);
        for (key, value) in environment {
            match value {
                Some(value) => shell.env(key, value),
                None => shell.env_remove(key),
            };
        }
        let paths = std::env::var("PATH").unwrap();
        shell.env("PATH", format!("{}:{paths}", text(&path.join("bin"))));
        shell
            .env("HOME", path)
            .env("MINIKUBE_HOME", path.join("machines"));
        shell.env("TERM", "dumb").current_dir(path.join("work"));
        shell.env_remove("HVSOCK_COMPLETE").stdin(Stdio::null());
        Some(shell)
    }
}

/// What of it is known beforehand.
const CASES: [(&str, &str); 11] = [
    ("hvsock expo", "expose"),
    ("hvsock expose --dial", "--dial-timeout"),
    ("hvsock completions fi", "fish"),
    ("hvsock run for", "forwards.toml"),
    ("hvsock run --log for", "forwards.toml"),
    ("hvsock simulate s", "sub/"),
    ("hvsock remove we", "web-ui"),
    ("hvsock expose --vm mini", "minikube"),
    ("hvsock stop mini", "minikube"),
    ("hvsock forward ./for", "./forwards.toml"),
    ("hvsock man hvsock-con", "hvsock-control"),
];

#[test]
fn bash_completes() {
    let world = World::new();
    for (typed, right) in world.cases() {
        let Some(mut bash) = world.shell("bash") else {
            return;
        };
        // As bash itself does it, but for the breaking of words at colons, of which there are none.
        let script = r#"set -u; source "$HOME/hvsock.bash"
            complete -p hvsock >/dev/null || exit 3
            read -ra COMP_WORDS <<<"$1"; COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMP_TYPE=9
            _clap_complete_hvsock hvsock "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}" 2>/dev/null
            printf '%s\n' "${COMPREPLY[@]-}""#;
        bash.args(["--norc", "-c", script, "bash", &typed]);
        let output = output(bash);
        let said = String::from_utf8(output.stdout).unwrap();
        let offered: Vec<&str> = said.lines().map(str::trim).collect();
        assert_eq!(
            offered,
            right,
            "{typed}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[test]
fn fish_completes() {
    let world = World::new();
    for (typed, right) in world.cases() {
        let Some(mut fish) = world.shell("fish") else {
            return;
        };
        fish.args([
            "--no-config",
            "-c",
            "source $HOME/hvsock.fish; complete -C $argv[1]",
            &typed,
        ]);
        let output = output(fish);
        let said = String::from_utf8(output.stdout).unwrap();
        // Each with its help behind a tab.
        let offered: Vec<&str> = said
            .lines()
            .filter_map(|line| line.split('\t').next())
            .collect();
        assert_eq!(
            offered,
            right,
            "{typed}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    // A forward says where it leads, and a connection whose it is.
    if let Some(mut fish) = world.shell("fish") {
        let script = "source $HOME/hvsock.fish; complete -C 'hvsock close '";
        fish.args(["--no-config", "-c", script]);
        let said = String::from_utf8(output(fish).stdout).unwrap();
        let line = said.lines().find(|line| !line.starts_with('-')).unwrap();
        assert!(line.contains(", from 127.0.0.1:"), "{said}");
    }
    // A process says what it forwards. Others may run.
    if let Some(mut fish) = world.shell("fish") {
        let script = "source $HOME/hvsock.fish; complete -C 'hvsock status --pid '";
        fish.args(["--no-config", "-c", script]);
        let said = String::from_utf8(output(fish).stdout).unwrap();
        let begin = format!("{}\ttcp://127.0.0.1:", world.process);
        let line = said.lines().find(|line| line.starts_with(&begin));
        assert!(line.unwrap().ends_with(", and 1 more"), "{said}");
    }
    if let Some(mut fish) = world.shell("fish") {
        fish.args([
            "--no-config",
            "-c",
            "source $HOME/hvsock.fish; complete -C 'hvsock remove '",
        ]);
        let said = String::from_utf8(output(fish).stdout).unwrap();
        let mut lines = said.lines().filter(|line| !line.starts_with('-'));
        assert!(
            lines.next().unwrap().starts_with("0\ttcp://127.0.0.1:"),
            "{said}"
        );
        assert!(
            lines.next().unwrap().ends_with(" -> tcp://127.0.0.1:9"),
            "{said}"
        );
        assert_eq!(lines.next(), None, "{said}");
    }
}

/// Types into an interactive zsh on a terminal of its own, which has found the script in its fpath,
/// presses the tab key, and has the line printed that stands there then.
const ZSH: &str = r#"
zmodload zsh/zpty || exit 3
zpty -b z zsh -f -i
wait_for() {
    local got= all=
    repeat 1000; do
        zpty -rt z got && all+=$got
        [[ $all == *$1* ]] && { print -r -- "$all"; return; }
        sleep 0.02
    done
    print -ru2 -- "in vain: $1: $all"; exit 1
}
zpty -w z 'PS1=; unset zle_bracketed_paste; fpath=($HOME/functions $fpath); autoload -U compinit; compinit -u -D; print REA""DY'
wait_for READY >/dev/null
zpty -w z 'show() { print -r -- "LINE<$BUFFER>E""ND"; BUFFER=; }; zle -N show; bindkey "^X" show; print BOU""ND'
wait_for BOUND >/dev/null
zpty -w -n z "$1"$'\t\C-x'
wait_for END
zpty -d z
"#;

#[test]
fn zsh_completes() {
    let world = World::new();
    for (typed, right) in world.cases() {
        let Some(mut zsh) = world.shell("zsh") else {
            return;
        };
        zsh.args(["-f", "-c", ZSH, "zsh", &typed]);
        let output = output(zsh);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let why = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{typed}: {said}{why}");
        let (_, line) = said.split_once("LINE<").unwrap();
        let (line, _) = line.split_once(">END").unwrap();
        let before = typed.rsplit_once(' ').unwrap().0;
        assert_eq!(
            line.trim_end(),
            format!("{before} {}", right[0]),
            "{typed}: {said}"
        );
    }
}
