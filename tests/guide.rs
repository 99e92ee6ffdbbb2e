//! Runs every command that the README and the guide show, in a network, a `/tmp` and a process
//! table of their own, so that the ports and paths which stand there are free.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What is not run here, and who runs it, or why nobody does: how such commands begin, or what is
/// in them.
const ELSEWHERE: [(&str, &str); 15] = [
    ("scripts/install", "`scripts/package --test` runs it"),
    ("scripts/uninstall", "`scripts/package --test` runs it"),
    ("scripts/package", "is a step of .ci/run"),
    (
        "sudo apt",
        "`scripts/package --test` installs and removes the package with dpkg",
    ),
    ("tar -xf", "`scripts/package --test` runs it"),
    ("systemctl ", "wants a systemd that runs"),
    ("journalctl ", "wants a systemd that runs"),
    ("loginctl ", "wants a systemd that runs"),
    ("launchctl ", "wants a Mac"),
    ("cp ~/.local", "wants a Mac"),
    ("ssh ", "wants an SSH server in a guest"),
    (VSOCK, "wants a guest: `scripts/guest-test` runs such"),
    (
        "hvsock events",
        "goes on until hvsock ends: tests/events.rs runs it",
    ),
    ("hvsock top", "wants a terminal: tests/control.rs runs it"),
    (
        "hvsock close",
        "wants a connection's id: tests/connections.rs runs it",
    ),
];

/// The scheme that is not there outside of a VM.
const VSOCK: &str = " vsock://";

/// Commands that go on until they are ended, and whether they say so when they are ready.
const LASTING: [(&str, bool); 8] = [
    ("hvsock expose", true),
    ("hvsock forward", true),
    ("hvsock run", true),
    ("hvsock demo", true),
    ("hvsock simulate", true),
    ("hvsock syslog", true),
    ("hvsock stress --server", true),
    ("hvsock cat -l", false),
];

/// What the pages take for granted: a VM named docker, a few files, and the functions that run the
/// commands.
const BEGIN: &str = r#"
set -euo pipefail
ip link set lo up
mount -t tmpfs tmpfs "$BASE"
mkdir -p "$BASE/bin" "$BASE/work" "$BASE/h"
touch "$BASE/bin/hvsock" && mount --bind "$HVSOCK" "$BASE/bin/hvsock"
cp scripts/hvsock.toml "$BASE/work"
mount --rbind "$BASE" /tmp
mount -t tmpfs tmpfs /run
mkdir -m 700 -p /run/user/0
export PATH="/tmp/bin:$PATH" HOME=/tmp/h XDG_RUNTIME_DIR=/run/user/0
unset TMPDIR HVSOCK_LOG MINIKUBE_HOME
cd /tmp/work
echo ping >request
pids=() words=()

fail() {
    echo "FAILED: $1"
    tail -n +1 out.* || true
    exit 1
}
# Until a process heeds SIGTERM, and has said something if it does.
ready() {
    local caught tries=0
    until caught=$(sed -n 's/^SigCgt:\t//p' /proc/$1/status) && [ $((0x$caught & 0x4000)) != 0 ] && { [ $2 = false ] || [ -s out.$1 ]; }; do
        [ $((tries += 1)) -lt 1000 ] && [ -n "$caught" ] || fail "$3"
        sleep 0.02
    done
}
start() {
    echo "+ $2 &"
    : >started
    bash -c 'echo $$ >started; case "$1" in [A-Z]*=*) set -- "env $1";; esac; exec 1>out.$$ 2>&1; eval "exec $1"' bash "$2" </dev/null &
    local pid=$! tries=0
    until [ -s started ]; do [ $((tries += 1)) -lt 1000 ] || fail "$2"; sleep 0.01; done
    ready "$pid" "$1" "$2"
    pids+=("$pid") words+=("$2")
}
run() {
    echo "+ $1"
    timeout 60 bash -c "$1" </dev/null >out.last 2>&1 || fail "$1 (exit code $?)"
}
# Ends what was started, in the order of the block.
end() {
    local i code
    for i in "${!pids[@]}"; do
        kill -TERM "${pids[i]}" 2>/dev/null || true
        code=0
        wait "${pids[i]}" || code=$?
        [ "$code" = 0 ] || fail "${words[i]} (exit code $code)"
        rm -f "out.${pids[i]}"
    done
    pids=() words=()
}
docker="$HOME/Library/Containers/com.docker.docker/Data/vms/0"
mkdir -p "$docker" "$HOME/vms"
ln -s "$docker" "$HOME/vms/docker"
hvsock simulate "$docker" --guest 80=http --guest 2375=http --guest 7=echo --guest 22=echo >out.vm 2>&1 &
vm=$!
tries=0
until [ -S "$docker/connect" ]; do [ $((tries += 1)) -lt 1000 ] || fail simulate; sleep 0.02; done
"#;

/// What the VM's end shows: no command has broken one of its rules.
const END: &str = "
kill -TERM $vm
wait $vm || fail 'the VM was hurt'
";

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn pages() -> Vec<(String, String)> {
    let guide = fs::read_dir(repository().join("src/guide")).unwrap();
    let mut files: Vec<PathBuf> = guide.map(|entry| entry.unwrap().path()).collect();
    files.push(repository().join("README.md"));
    files.retain(|file| file.extension().is_some_and(|it| it == "md"));
    files.sort();
    let read = |file: PathBuf| (name(&file), fs::read_to_string(&file).unwrap());
    files.into_iter().map(read).collect()
}

fn name(file: &Path) -> String {
    file.file_name().unwrap().to_str().unwrap().to_owned()
}

/// The blocks of a page: their language and lines.
fn blocks(text: &str) -> Vec<(&str, Vec<&str>)> {
    let mut blocks = Vec::new();
    let mut inside: Option<(&str, Vec<&str>)> = None;
    for line in text.lines() {
        match (line.strip_prefix("```"), &mut inside) {
            (Some(language), None) => inside = Some((language, Vec::new())),
            (Some(_), Some(_)) => blocks.extend(inside.take()),
            (None, Some((_, lines))) => lines.push(line),
            (None, None) => {}
        }
    }
    assert!(inside.is_none(), "a block has no end");
    blocks
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A page as a script.
fn script(text: &str, used: &mut HashSet<&'static str>) -> String {
    let mut script = BEGIN.to_owned();
    for (language, lines) in blocks(text) {
        match language {
            "toml" => {
                let text = quoted(&lines.join("\n"));
                writeln!(
                    script,
                    "echo {text} >hvsock.toml; run 'hvsock check hvsock.toml'"
                )
                .unwrap();
            }
            "sh" => {
                for line in lines.into_iter().filter(|line| !line.is_empty()) {
                    let command = line.split(" #").next().unwrap().trim();
                    let is_elsewhere = |part: &str| {
                        command.starts_with(part) || part == VSOCK && command.contains(part)
                    };
                    if let Some((part, why)) = ELSEWHERE.iter().find(|(part, _)| is_elsewhere(part))
                    {
                        used.insert(part);
                        println!("not run here: {command}: {why}");
                        continue;
                    }
                    let lasting = LASTING.iter().find(|(begin, _)| command.contains(begin));
                    match lasting {
                        Some((_, says)) => writeln!(script, "start {says} {}", quoted(command)),
                        None => writeln!(script, "run {}", quoted(command)),
                    }
                    .unwrap();
                }
                script += "end\n";
            }
            "text" | "json" | "rust" => {}
            other => panic!("a block of {other:?}"),
        }
    }
    script + END
}

/// Runs a script apart from this system; `None` if that may not be.
fn run_apart(script: &str) -> Option<(bool, String)> {
    let root = nix::unistd::geteuid().is_root();
    let base = tempfile::tempdir().unwrap();
    let apart = |program: &[&str]| {
        let mut unshare = Command::new("unshare");
        unshare.args(if root {
            &[][..]
        } else {
            &["--user", "--map-root-user"]
        });
        unshare.args([
            "--mount",
            "--net",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]);
        unshare
            .args(program)
            .env("HVSOCK", env!("CARGO_BIN_EXE_hvsock"))
            .env("BASE", base.path());
        unshare.stdin(Stdio::null()).output()
    };
    let may = apart(&["true"]);
    if !may.is_ok_and(|output| output.status.success()) {
        return None;
    }
    let output = apart(&["timeout", "120", "bash", "-c", script]).unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    Some((output.status.success(), said.into_owned()))
}

#[test]
fn every_command_is_run() {
    let mut used = HashSet::new();
    let mut broken = Vec::new();
    let shows = |text: &str| {
        blocks(text)
            .iter()
            .any(|(it, _)| matches!(*it, "sh" | "toml"))
    };
    for (page, text) in pages().into_iter().filter(|(_, text)| shows(text)) {
        let script = script(&text, &mut used);
        let Some((sound, said)) = run_apart(&script) else {
            println!("skipped: unshare may not make namespaces here; run as root");
            return;
        };
        println!("{page}:\n{said}");
        if !sound {
            broken.push(page);
        }
    }
    assert!(
        broken.is_empty(),
        "these pages show what doesn't work: {broken:?}"
    );
    for (part, _) in ELSEWHERE {
        assert!(used.contains(part), "no page says {part:?} any longer");
    }
}

#[test]
fn the_two_commands_of_the_readme_are_there() {
    let readme = fs::read_to_string(repository().join("README.md")).unwrap();
    assert!(readme.contains("| `cargo run --release -- demo` |"));
    assert!(readme.contains("| `scripts/check` |"));
    // Who begins reads it to its end.
    let is_word = |part: &&str| part.contains(char::is_alphanumeric);
    assert!(readme.split_whitespace().filter(is_word).count() <= 900);
    let (sound, said) = match run_apart(&format!("{BEGIN} start true 'hvsock demo'; end; {END}")) {
        Some(ran) => ran,
        None => return println!("skipped: unshare may not make namespaces here; run as root"),
    };
    assert!(sound, "{said}");
}

/// A script, a file of the source or a page that is named must be there.
#[test]
fn every_file_that_is_named_is_there() {
    for (page, text) in pages() {
        let spans = text.split('`').skip(1).step_by(2);
        let scripts =
            spans.filter(|span| span.starts_with("scripts/") || span.starts_with("tests/"));
        let links = text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next());
        let links = links.filter(|link| !link.contains("://"));
        for named in scripts.chain(links) {
            let path = named.split(' ').next().unwrap();
            assert!(repository().join(path).exists(), "{page}: {named}");
        }
    }
}
