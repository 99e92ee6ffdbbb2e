//! `hvsock doctor`, in front of a good VM and of every broken one; none is hurt by it.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use command::*;
use common::*;
use hvsock::simulate::{Service, Vm};
use serde_json::Value;

/// What was found.
#[derive(Debug)]
struct Report {
    code: Option<i32>,
    checks: Vec<Value>,
}

impl Report {
    fn of(mut command: Command) -> Report {
        let output = command.arg("--json").output().unwrap();
        assert!(output.stderr.is_empty(), "{output:?}");
        let said = String::from_utf8(output.stdout).unwrap();
        let all: Value = serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said:?}"));
        let report = Report {
            code: output.status.code(),
            checks: all["checks"].as_array().unwrap().clone(),
        };
        // A report with remedies has one for all that failed, and says so to scripts.
        let failed = |check: &&Value| check["verdict"] == "failed";
        assert_eq!(all["ok"], report.checks.iter().find(failed).is_none());
        assert_eq!(report.code, Some(i32::from(all["ok"] == false)));
        for check in report.checks.iter().filter(failed) {
            assert!(check["remedy"].is_string(), "{check}");
        }
        report
    }

    /// The only check of that name.
    #[track_caller]
    fn check(&self, name: &str) -> &Value {
        match &self.all(name)[..] {
            [check] => check,
            all => panic!("{} of {name} in {self:?}", all.len()),
        }
    }

    fn all(&self, name: &str) -> Vec<&Value> {
        let named = |check: &&Value| check["name"] == name;
        self.checks.iter().filter(named).collect()
    }

    #[track_caller]
    fn says(&self, name: &str, verdict: &str, part: &str) -> &Report {
        let check = self.check(name);
        assert_eq!(check["verdict"], verdict, "{check}");
        let seen = check["seen"].as_str().unwrap();
        assert!(seen.contains(part), "{check} lacks {part:?}");
        self
    }

    /// All but those are ok.
    #[track_caller]
    fn is_ok_but(&self, names: &[&str]) {
        for check in &self.checks {
            let name = check["name"].as_str().unwrap();
            assert_eq!(check["verdict"] != "ok", names.contains(&name), "{check}");
        }
    }
}

fn doctor(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.arg("doctor").args(arguments);
    command
}

/// Of the VM of this directory.
fn examine(dir: &Path, more: &[&str]) -> Report {
    Report::of(doctor(
        &[&["--vm", text(dir), "--timeout", "0.5"], more].concat(),
    ))
}

/// A VM in a process of its own: here that of the test would be taken for no hyperkit.
fn simulate(dir: &Path, limit: Option<u32>) -> Running {
    let mut command = Command::new("sh");
    let limit = limit.map_or(String::new(), |limit| format!("ulimit -n {limit};"));
    command.args(["-c", &format!("{limit} exec \"$0\" simulate \"$@\"")]);
    command.arg(env!("CARGO_BIN_EXE_hvsock")).arg(dir);
    command.args(["--guest", "7=echo", "--guest", "9=silent"]);
    let vm = Running::spawn(command);
    vm.says("port 9");
    vm
}

#[test]
fn a_good_vm_has_nothing_wrong() {
    let dir = private_dir();
    let mut vm = simulate(dir.path(), None);
    for _ in 0..20 {
        let report = examine(dir.path(), &["--port", "7"]);
        report.is_ok_but(&[]);
        assert_eq!(report.code, Some(0));
    }
    let output = run(&["doctor", "--vm", text(dir.path()), "--port", "0x7"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        said.contains("\nok   port 7 (0x7)  is listened on"),
        "{said}"
    );
    // It has taken no harm, which it would have told of by an exit code.
    vm.signal("TERM");
    assert_eq!(vm.exit_code(), Some(0));
}

/// The device ends what it has no slot for: that is no word of the guest's.
#[test]
#[cfg(target_os = "linux")]
fn full_slots_are_no_answer_of_the_guest() {
    let dir = private_dir();
    let state = dir.path().join("vm");
    let vm = Vm::builder(&state).guest(7, Service::Echo).slots(12);
    let vm = vm.start().unwrap();
    let control = dir.path().join("c");
    let guest = format!("hyperkit://:7{}", text(&state));
    let at = format!("--control={}", text(&control));
    let arguments = ["forward", "tcp://127.0.0.1:0", &guest, &at];
    let hvsock = Running::start(&arguments);
    let port = hvsock.tcp_port();
    let mut clients = Vec::new();
    for _ in 0..12 {
        clients.push(tcp(port));
    }
    eventually("all slots are taken", || vm.counters().live_slots == 12);
    assert!(resets_clients(port));
    let line = hvsock.complains("refused a client");
    for part in ["all slots of the VM", "vsock port 7", "hvsock doctor"] {
        assert!(line.contains(part), "{line}");
    }
    let asked = ["--control", text(&control), "--port", "7"];
    // Else it looks like a refusal by the guest.
    if tells_unread() {
        let report = examine(&state, &asked);
        report.says("guest", "failed", "all its slots are taken");
        report.says("guest", "failed", "12 of them");
        report.says("port 7 (0x7)", "skipped", "all slots of the VM are taken");
        // It had as many as it may have; the device has not.
        report.says("slots", "warning", "all slots of the VM are taken");
        report.says("health", "ok", "up");
        let guest = report.check("guest");
        let shows = format!("`hvsock connections --pid {}`", hvsock.child.0.id());
        assert!(
            guest["remedy"].as_str().unwrap().contains(&shows),
            "{guest}"
        );
        // Of one that wasn't asked nothing is said.
        let nobodys = dir.path().join("d");
        let at = format!("--control={}", text(&nobodys));
        let other = Running::start(&["forward", "tcp://127.0.0.1:0", "/nowhere", &at]);
        other.tcp_port();
        let report = examine(&state, &["--control", text(&nobodys)]);
        let guest = report.check("guest");
        let alone = format!("the hvsock of {} was asked alone", text(&nobodys));
        assert!(
            guest["remedy"].as_str().unwrap().contains(&alone),
            "{guest}"
        );
    }
    clients.truncate(4);
    eventually("slots are free", || vm.counters().live_slots == 4);
    let report = examine(&state, &asked);
    report.says("guest", "ok", "answers");
    report.says("port 7 (0x7)", "ok", "is listened on");
    // With so few, it is the guest that refuses.
    let nobody = format!("hyperkit://:81{}", text(&state));
    let add = [
        "add",
        "tcp://127.0.0.1:0",
        &nobody,
        "--control",
        text(&control),
    ];
    let added = String::from_utf8(run(&add).stdout).unwrap();
    let port = added.split(" -> ").next().unwrap().rsplit(':').next();
    assert!(resets_clients(port.unwrap().parse().unwrap()));
    let line = hvsock.complains("refused a client");
    assert!(line.contains("vsock port 81"), "{line}");
    assert!(!line.contains("slots"), "{line}");
}

/// What is lost has no connection left that could be ended here, and a device that is full has no
/// more slots whatever hvsock may take.
#[test]
#[cfg(target_os = "linux")]
fn lost_slots_are_not_taken_for_connections_that_can_be_ended() {
    if !tells_unread() {
        return;
    }
    let dir = private_dir();
    let state = dir.path().join("vm");
    let vm = Vm::builder(&state).guest(9, Service::Silent).slots(3);
    let vm = vm.start().unwrap();
    let times = ["--half-closed-timeout=100ms", "--drain-timeout=200ms"];
    let expose = ["expose", "--vm", text(&state), "-L", "0:9"];
    let expose = [&expose[..], &times].concat();
    let hvsock = Running::spawn(in_runtime(dir.path(), &expose));
    let (port, process) = (hvsock.tcp_port(), hvsock.child.0.id());
    for _ in 0..3 {
        tcp(port).write_all(b"x").unwrap();
    }
    let status = || {
        let asked = ["status", "--pid", &process.to_string()];
        String::from_utf8(output(in_runtime(dir.path(), &asked)).stdout).unwrap()
    };
    eventually("the slots are lost", || status().contains("3 slots lost"));
    assert_eq!(vm.counters().live_slots, 3);
    let arguments = ["doctor", "--vm", text(&state), "--timeout", "0.5"];
    let report = Report::of(in_runtime(dir.path(), &arguments));
    let lost = format!("all its slots are taken; hvsock {process} has lost 3 of them");
    report.says("guest", "failed", &lost);
    report.says("slots", "warning", "3 slots lost");
    for name in ["guest", "slots"] {
        let remedy = report.check(name)["remedy"].as_str().unwrap();
        assert!(remedy.contains("restart the VM"), "{remedy}");
        for part in ["hvsock connections", "--vm-connections"] {
            assert!(!remedy.contains(part), "{part} in {remedy}");
        }
    }
    // It is status that leads here; and why the guest hasn't ended them isn't known.
    assert!(status().contains("see `hvsock doctor`"), "{}", status());
    for said in report.checks.iter().map(Value::to_string).chain([status()]) {
        assert!(!said.contains("programs in the guest that don't"), "{said}");
    }
    let slots = report.check("slots")["seen"].as_str().unwrap();
    assert!(!slots.contains("hvsock doctor"), "{slots}");
}

/// Wherever each is controlled, and however many there are.
#[test]
fn each_hvsock_that_carries_the_vm_is_asked() {
    let dir = private_dir();
    let (runtime, state) = (dir.path(), dir.path().join("vm"));
    let vm = Vm::builder(&state).guest(7, Service::Echo).start().unwrap();
    let expose = |more: &[&str]| {
        let arguments = ["expose", "--vm", text(&state), "-L", "0:7"];
        Running::spawn(in_runtime(runtime, &[&arguments, more].concat()))
    };
    let at = format!("--control={}", text(&dir.path().join("c")));
    let few = expose(&["--vm-connections", "1"]);
    let many = expose(&[at.as_str()]);
    let other = ["forward", "tcp://127.0.0.1:0", "/nowhere"];
    let other = Running::spawn(in_runtime(runtime, &other));
    other.tcp_port();
    let pid = |it: &Running| it.child.0.id().to_string();
    let examine = |more: &[&str]| {
        let arguments = ["doctor", "--vm", text(&state), "--timeout", "0.5"];
        Report::of(in_runtime(runtime, &[&arguments, more].concat()))
    };
    let says = |report: &Report, it: &Running, verdict: &str, part: &str| {
        let seen = format!("hvsock {}{part}", pid(it));
        let all = report.all("slots");
        let mut its = all.iter().filter(|check| check["seen"] == seen);
        let check = its.next().unwrap_or_else(|| panic!("no {seen}: {all:?}"));
        assert_eq!(check["verdict"], verdict, "{check}");
        check["remedy"].as_str().map(str::to_owned)
    };
    let port = few.tcp_port();
    let many_port = many.tcp_port();
    let report = examine(&[]);
    says(&report, &few, "ok", ": 0 of 1 slots");
    says(&report, &many, "ok", ": 0 of 900 slots");
    assert_eq!(report.all("slots").len(), 2, "{report:?}");

    let mut client = tcp(port);
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    let full = ": 1 of 1 slots, all taken (new clients wait or are refused)";
    let remedy = says(&examine(&[]), &few, "warning", full).unwrap();
    let shows = format!("`hvsock connections --pid {}`", pid(&few));
    assert!(remedy.contains(&shows), "{remedy}");
    let status = output(in_runtime(runtime, &["status", "--pid", &pid(&few)]));
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(status.contains(&full[2..]), "{status}");

    // One of them alone, with its keeper alone.
    let mut other_client = tcp(many_port);
    other_client.write_all(b"x").unwrap();
    other_client.read_exact(&mut [0]).unwrap();
    eventually("each has a keeper", || {
        examine(&[]).all("keeper").len() == 2
    });
    let report = examine(&["--pid", &pid(&few)]);
    says(&report, &few, "warning", full);
    assert_eq!(report.all("slots").len(), 1, "{report:?}");
    report.says("keeper", "ok", &format!("of hvsock {} ", pid(&few)));
    let report = examine(&["--pid", &pid(&other)]);
    report.says("slots", "failed", "doesn't lead to the VM");
    report.says("slots", "failed", &pid(&other));
    assert_eq!(report.code, Some(1));
    let remedy = report.check("slots")["remedy"].as_str().unwrap();
    assert!(remedy.contains("`hvsock ps`"), "{remedy}");
    // What can't be asked is not passed over.
    many.signal("STOP");
    let report = examine(&[]);
    many.signal("CONT");
    let silent = " leads to the VM, and doesn't tell how it uses it: it is stopped, or its control socket is elsewhere";
    says(&report, &many, "skipped", silent);
    says(&report, &few, "warning", full);
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

/// A process that is no hvsock, and a control socket that isn't there: what was asked for can't be
/// said.
#[test]
fn an_hvsock_that_is_named_must_answer() {
    let dir = private_dir();
    let (state, nowhere) = (dir.path().join("vm"), dir.path().join("c"));
    let _vm = Vm::builder(&state).guest(7, Service::Echo).start().unwrap();
    let own = std::process::id().to_string();
    let asked = |vm: &str, more: &[&str]| {
        let arguments = [&["doctor", "--vm", vm, "--port", "7"], more].concat();
        Report::of(in_runtime(dir.path(), &arguments))
    };
    let vmm = dir.path().join("vmm");
    let listener = UnixListener::bind(&vmm).unwrap();
    let served = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut [0; "CONNECT 7\n".len()]).unwrap();
            stream.write_all(b"OK 1073741824\n").unwrap();
        }
    });
    let vmm = format!("vsock-mux://{}", text(&vmm));
    let name = "slots";
    for vm in [text(&state), &vmm] {
        for (named, part) in [
            (["--pid", &own], format!("process {own} is no hvsock")),
            (["--control", text(&nowhere)], text(&nowhere).to_owned()),
        ] {
            let report = asked(vm, &named);
            report.says(name, "failed", &part);
            let remedy = report.check(name)["remedy"].as_str().unwrap();
            assert!(remedy.contains("hvsock"), "{remedy}");
            // The rest is looked at all the same.
            report.says("port 7 (0x7)", "ok", "is listened on");
            assert_eq!(report.code, Some(1), "{report:?}");
        }
    }
    served.join().unwrap();
}

/// It takes the dial, and its guest doesn't answer.
#[test]
fn a_vmm_whose_guest_is_paused_is_told_with_what_helps() {
    let dir = private_dir();
    let socket = dir.path().join("vmm");
    let _vmm = UnixListener::bind(&socket).unwrap();
    let place = format!("vsock-mux://{}", text(&socket));
    let arguments = ["doctor", "--vm", &place, "--port", "7", "--timeout", "0.2"];
    let report = Report::of(in_runtime(dir.path(), &arguments));
    report.says("port 7 (0x7)", "failed", "no answer within 0.2 s: paused");
    let remedy = report.check("port 7 (0x7)")["remedy"].as_str().unwrap();
    assert!(remedy.starts_with("wait, or wake it"), "{remedy}");
}

/// Without a word of a VM, those are looked at that the hvsocks of this user carry.
#[test]
fn the_vms_that_are_carried_are_looked_at() {
    let dir = private_dir();
    let (runtime, state) = (dir.path(), dir.path().join("vm"));
    let vm = Vm::builder(&state).guest(7, Service::Echo).start().unwrap();
    let expose = ["expose", "--vm", text(&state), "-L", "0:7"];
    let expose = [&expose[..], &["--vm-connections", "1"]].concat();
    let expose = Running::spawn(in_runtime(runtime, &expose));
    let port = expose.tcp_port();
    let begin = format!("{}: hvsock {}: ", text(&state), expose.child.0.id());
    // Others run beside this test.
    let said = || {
        let report = Report::of(in_runtime(runtime, &["doctor"]));
        let all = report.all("vm").into_iter();
        let mut its = all.filter(|it| it["seen"].as_str().unwrap().starts_with(&begin));
        let check = its
            .next()
            .unwrap_or_else(|| panic!("no {begin}: {report:?}"));
        assert!(its.next().is_none(), "{report:?}");
        check.clone()
    };
    let more = format!("`hvsock doctor --vm {}` tells more", text(&state));
    let check = said();
    assert_eq!(check["verdict"], "ok", "{check}");
    assert_eq!(check["remedy"], more.as_str());
    // Not by a dial.
    assert_eq!(vm.counters().accepted, 0);
    let mut client = tcp(port);
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    let check = said();
    assert_eq!(check["verdict"], "warning", "{check}");
    let seen = check["seen"].as_str().unwrap();
    assert!(seen.contains("1 of 1 slots, all taken"), "{check}");
    let remedy = check["remedy"].as_str().unwrap();
    assert!(remedy.contains("hvsock connections --pid"), "{check}");
    assert!(remedy.ends_with(&more), "{check}");
    drop(vm);
    eventually("it is told as gone", || {
        let check = said();
        check["seen"].as_str().unwrap().contains("gone for")
            && check["remedy"]
                .as_str()
                .unwrap()
                .starts_with("start the VM")
    });
    // One that doesn't answer is not passed over.
    expose.signal("STOP");
    let report = Report::of(in_runtime(runtime, &["doctor"]));
    expose.signal("CONT");
    let begin = format!("hvsock {} doesn't answer", expose.child.0.id());
    let all = report.all("vm").into_iter();
    let its = all.filter(|it| it["seen"].as_str().unwrap().starts_with(&begin));
    let verdicts: Vec<&Value> = its.map(|it| &it["verdict"]).collect();
    assert_eq!(verdicts, ["skipped"], "{report:?}");
}

#[test]
fn a_vmm_with_no_slot_left_is_not_well() {
    let dir = private_dir();
    let (runtime, socket) = (dir.path(), dir.path().join("vmm"));
    let vmm = UnixListener::bind(&socket).unwrap();
    let served = std::thread::spawn(move || {
        let (mut stream, _) = vmm.accept().unwrap();
        stream.read_exact(&mut [0; "CONNECT 7\n".len()]).unwrap();
        stream.write_all(b"OK 1073741824\nx").unwrap();
        (stream, vmm)
    });
    let place = format!("vsock-mux://{}", text(&socket));
    let expose = [
        "expose",
        "--vm",
        &place,
        "-L",
        "0:7",
        "--vm-connections",
        "1",
    ];
    let expose = Running::spawn(in_runtime(runtime, &expose));
    let mut client = tcp(expose.tcp_port());
    client.read_exact(&mut [0]).unwrap();
    let report = Report::of(in_runtime(runtime, &["doctor", "--vm", &place]));
    report.says("slots", "warning", "1 of 1 slots, all taken");
    report.says("health", "ok", "up");
    drop(served.join().unwrap());
}

#[cfg(target_os = "linux")] // Elsewhere nothing tells which process has its socket.
#[test]
fn a_vmm_that_is_stopped_is_not_well() {
    let dir = private_dir();
    let (runtime, socket) = (dir.path(), dir.path().join("vmm"));
    let vmm = Running::start(&[
        "simulate",
        "--vsock-mux",
        text(&socket),
        "--guest",
        "7=echo",
    ]);
    let place = format!("vsock-mux://{}", text(&socket));
    let expose = ["expose", "--vm", &place, "-L", "0:7"];
    let expose = Running::spawn(in_runtime(runtime, &expose));
    let port = expose.tcp_port();
    let mut client = None;
    // The stand-in may not listen yet.
    eventually("a client is served", || {
        let client = client.insert(tcp(port));
        client.write_all(b"x").is_ok() && client.read_exact(&mut [0]).is_ok()
    });
    let health = || {
        Report::of(in_runtime(
            runtime,
            &["doctor", "--vm", &place, "--port", "7"],
        ))
    };
    let process = vmm.child.0.id();
    health()
        .says("health", "ok", "up")
        .says(
            "process",
            "ok",
            &format!("{process} runs, of hvsock simulate"),
        )
        .says("port 7 (0x7)", "ok", "is listened on");
    vmm.signal("STOP");
    eventually("it is told as stopped", || {
        let report = health();
        let is_stopped = report.check("process")["verdict"] == "failed";
        // The hvsock looks twice a second, and may not have seen it yet.
        let check = report.check("health");
        let is_warned = check["verdict"] == "warning";
        assert!(is_warned || !is_stopped, "{report:?}");
        check["seen"].as_str().unwrap().contains("paused")
    });
    let report = health();
    report.says("health", "warning", "paused");
    assert_eq!(
        report.check("health")["remedy"],
        "send its process a SIGCONT"
    );
    report
        .says("process", "failed", "stopped")
        .says("slots", "ok", "1 connection")
        .says("port 7 (0x7)", "skipped", "its process is stopped");
    let remedy = format!("let it go on: kill -CONT {process}");
    assert_eq!(report.check("process")["remedy"], remedy.as_str());
    vmm.signal("CONT");
    eventually("it is well", || health().check("health")["verdict"] == "ok");
}

#[test]
fn ports_are_told_apart() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path())
        .guest(7, Service::Echo)
        .guest(9, Service::Silent)
        .guest(19, Service::Chargen)
        .guest(80, Service::Http)
        .start()
        .unwrap();
    let ports = [7, 9, 19, 80, 81].map(|port: u32| port.to_string());
    let arguments = ports.iter().flat_map(|port| ["--port", port]);
    let arguments: Vec<&str> = arguments.collect();
    let report = examine(dir.path(), &arguments);
    for name in [
        "port 7 (0x7)",
        "port 9 (0x9)",
        "port 19 (0x13)",
        "port 80 (0x50)",
    ] {
        report.says(name, "ok", "is listened on");
    }
    report.says("port 81 (0x51)", "failed", "nobody listens");
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
    // The guest, and each port with one behind it.
    assert_eq!(vm.counters().dials, 1 + 2 * 5);
    assert_eq!(vm.counters().all_offences(), 0);
}

#[test]
fn what_is_missing_is_named_and_the_rest_is_skipped() {
    let dir = private_dir();
    let at = |name: &str| dir.path().join(name);
    let report = examine(&at("nowhere"), &["--port", "7", "--host-port", "5000"]);
    report.says("directory", "failed", "No such file");
    for name in ["path", "cid", "process", "limits", "socket", "guest"] {
        report.says(name, "skipped", "no state directory");
    }
    report.says("port 7 (0x7)", "skipped", "");
    report.says("host port 5000 (0x1388)", "skipped", "");
    let by_uri = format!("hyperkit://{}/nowhere", text(dir.path()));
    Report::of(doctor(&["--vm", &by_uri])).says("directory", "failed", "No such file");
    fs::write(at("file"), "").unwrap();
    examine(&at("file"), &[]).says("directory", "failed", "not a directory");
    fs::create_dir(at("empty")).unwrap();
    examine(&at("empty"), &["--port", "7"])
        .says("socket", "failed", "there is no")
        .says("process", "skipped", "hyperkit.pid")
        .says("guest", "skipped", "no socket")
        .says("port 7 (0x7)", "skipped", "no socket");
    fs::write(at("empty/connect"), "").unwrap();
    examine(&at("empty"), &[]).says("socket", "failed", "is no socket");
    fs::remove_file(at("empty/connect")).unwrap();
    drop(UnixListener::bind(at("empty/connect")).unwrap());
    examine(&at("empty"), &[]).says("socket", "failed", "nobody listens");
    fs::write(at("empty/hyperkit.json"), "{").unwrap();
    examine(&at("empty"), &[])
        .says("directory", "failed", "hyperkit.json")
        .says("guest", "skipped", "the state directory can't be read");
}

#[test]
fn a_process_that_is_gone_is_told_from_another_program() {
    let dir = private_dir();
    let mut vm = simulate(dir.path(), None);
    examine(dir.path(), &[]).says("process", "ok", &vm.child.0.id().to_string());
    vm.signal("KILL");
    assert_eq!(vm.exit_code(), None);
    let report = examine(dir.path(), &[]);
    report.says("process", "failed", "is gone");
    report.says("limits", "skipped", "hyperkit's process is gone");
    report.says("socket", "failed", "nobody listens");
    let pid = dir.path().join("hyperkit.pid");
    fs::write(&pid, std::process::id().to_string()).unwrap();
    examine(dir.path(), &[]).says("process", "warning", "not hyperkit");
    fs::write(&pid, "many").unwrap();
    examine(dir.path(), &[]).says("process", "warning", "\"many\"");
}

#[test]
fn who_may_not_is_told_so() {
    let dir = private_dir();
    let _vm = simulate(dir.path(), None);
    fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let socket = dir.path().join("connect");
    let hidden = dir.path().join("hidden");
    fs::create_dir(&hidden).unwrap();
    // Whoever root is may do all: it becomes nobody.
    let is_root = nobody("true").status().is_ok_and(|status| status.success());
    let binary = dir.path().join("hvsock");
    put_program(&binary);
    let examine = |vm: &Path| {
        let mut command = match is_root {
            true => nobody(text(&binary)),
            false => Command::new(&binary),
        };
        command.args(["doctor", "--vm", text(vm), "--timeout", "1"]);
        Report::of(command)
    };
    let forbid = |path: &Path| fs::set_permissions(path, PermissionsExt::from_mode(0o000)).unwrap();
    forbid(&socket);
    let report = examine(dir.path());
    report.says("socket", "failed", "may not connect");
    report.says("guest", "skipped", "no socket");
    forbid(&hidden);
    examine(&hidden).says("directory", "failed", "ermission denied");
    // Its files can't be reached whatever they are.
    let by_uri = format!("hyperkit://{}", text(&hidden));
    let report = examine(Path::new(&by_uri));
    report.says("directory", "failed", "may not search it");
    fs::set_permissions(&hidden, PermissionsExt::from_mode(0o700)).unwrap();
}

/// A command as a user without rights.
fn nobody(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", program]);
    command
}

#[test]
fn long_paths_are_told_of_and_got_round() {
    let dir = private_dir();
    let _vm = simulate(dir.path(), None);
    let deep = dir.path().join("d".repeat(100));
    symlink(dir.path(), &deep).unwrap();
    let report = examine(&deep, &[]);
    report.says("path", "warning", "takes 85; this system reaches");
    report.is_ok_but(&["path"]);
    assert_eq!(report.code, Some(0));
    let name = "n".repeat(150);
    let uri = format!("hyperkit://{}?connect={name}", text(&deep));
    Report::of(doctor(&["--vm", &uri])).says("path", "failed", "150 bytes");
}

#[test]
fn a_guest_that_does_not_answer_is_told_from_a_device_that_does_not() {
    let dir = private_dir();
    let mut vm = simulate(dir.path(), None);
    vm.signal("USR1");
    vm.complains("paused");
    let report = examine(dir.path(), &["--port", "7"]);
    report.says("guest", "failed", "within 0.5 s: paused");
    report.says("port 7 (0x7)", "skipped", "doesn't answer");
    vm.signal("USR2");
    vm.complains("goes on");
    examine(dir.path(), &["--port", "7"]).is_ok_but(&[]);
    vm.signal("STOP");
    let is_stopped = || {
        let mut ps = Command::new("ps");
        ps.args(["-o", "state=", "-p", &vm.child.0.id().to_string()]);
        ps.output().unwrap().stdout.starts_with(b"T")
    };
    eventually("it is stopped", is_stopped);
    let report = examine(dir.path(), &[]);
    report.says("process", "failed", "is stopped");
    report.says("guest", "skipped", "hyperkit is stopped");
    vm.signal("CONT");
    eventually("it goes on", || !is_stopped());
    examine(dir.path(), &[]).is_ok_but(&[]);
    vm.signal("TERM");
    assert_eq!(vm.exit_code(), Some(0));
    // One that accepts nothing.
    let dir = private_dir();
    let _device = UnixListener::bind(dir.path().join("connect")).unwrap();
    let report = examine(dir.path(), &[]);
    report.says("socket", "ok", "is listened on");
    #[cfg(target_os = "linux")]
    report.says("guest", "failed", "has taken no connection");
    #[cfg(not(target_os = "linux"))]
    report.says("guest", "failed", "0.5 s");
}

/// What the hvsock has seen of dials agrees with what came of ours.
#[test]
fn silent_dials_are_well_only_while_the_guest_answers() {
    let dir = private_dir();
    let state = dir.path().join("vm");
    let vm = Vm::builder(&state).guest(7, Service::Echo).start().unwrap();
    let expose = ["expose", "--vm", text(&state), "-L", "0:7"];
    let hvsock = Running::spawn(in_runtime(dir.path(), &expose));
    let port = hvsock.tcp_port();
    let report = || {
        let arguments = ["doctor", "--vm", text(&state), "--timeout", "0.5"];
        Report::of(in_runtime(dir.path(), &arguments))
    };
    // They say nothing, and so does the guest.
    let _clients = [tcp(port), tcp(port)];
    eventually("they are dialled", || vm.counters().dials >= 2);
    let silent = || report().check("health")["seen"].to_string();
    eventually("it is known", || silent().contains("last 2 dials silent"));
    let well = report();
    well.says("health", "ok", "last 2 dials silent so far");
    well.says("guest", "ok", "answers");
    vm.pause();
    let ill = report();
    ill.says("health", "warning", "last 2 dials silent so far");
    ill.says("guest", "failed", "no answer");
    let remedy = ill.check("health")["remedy"].as_str().unwrap();
    assert!(remedy.contains("console"), "{remedy}");
}

/// hyperkit minds clients that go at once: one that gives a guest up half-closes, and still reads.
#[test]
fn leave_is_taken_of_a_guest_that_does_not_answer() {
    let dir = private_dir();
    let device = UnixListener::bind(dir.path().join("connect")).unwrap();
    let served = std::thread::spawn(move || {
        let mut stream = device.accept().unwrap().0;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut line = Vec::new();
        stream.read_to_end(&mut line).unwrap();
        (line, stream.write_all(b"late").is_ok())
    });
    let report = examine(dir.path(), &[]);
    report.says("guest", "failed", "no answer within 0.5 s");
    let (line, is_read) = served.join().unwrap();
    assert_eq!(line, b"00000003.ffffffff\n");
    assert!(is_read, "it had gone");
}

#[test]
fn another_cid_is_told_of() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path()).cid(5).guest_forwards(&[7]);
    let vm = vm.guest(7, Service::Echo).start().unwrap();
    examine(dir.path(), &[]).says("cid", "ok", "5, as hyperkit.json says");
    let uri = format!("hyperkit://{}", text(dir.path()));
    let by_uri = || Report::of(doctor(&["--vm", &uri]));
    by_uri().says("cid", "failed", "says 5, and 3 is asked for");
    let json = dir.path().join("hyperkit.json");
    fs::remove_file(&json).unwrap();
    by_uri().says("cid", "failed", "00000005.00000007, of CID 5");
    fs::write(&json, "{\"vsock_guest_cid\": 2}").unwrap();
    by_uri().says("cid", "failed", "2, which is no guest's");
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[cfg(target_os = "linux")]
#[test]
fn few_descriptors_are_told_of() {
    let dir = private_dir();
    let _vm = simulate(dir.path(), Some(256));
    let report = examine(dir.path(), &[]);
    report.says("limits", "warning", "256 descriptors: it hangs beyond 245");
    report.is_ok_but(&["limits"]);
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 100; exec \"$0\" doctor \"$@\""]);
    command.arg(env!("CARGO_BIN_EXE_hvsock"));
    Report::of(command).says("descriptors", "warning", "may have 100: enough for ");
}

#[test]
fn ports_of_the_host_are_looked_at_and_not_touched() {
    let dir = private_dir();
    let _vm = simulate(dir.path(), None);
    let socket = |port: u32| dir.path().join(format!("00000002.{port:08x}"));
    let live = UnixListener::bind(socket(5000)).unwrap();
    live.set_nonblocking(true).unwrap();
    drop(UnixListener::bind(socket(5001)).unwrap());
    drop(UnixListener::bind(socket(5002)).unwrap());
    let asked = [
        "--host-port",
        "5000",
        "--host-port",
        "5001",
        "--host-port",
        "0x1",
    ];
    let report = examine(dir.path(), &asked);
    report.says("host port 5000 (0x1388)", "ok", "is listened on");
    report.says("host port 5001 (0x1389)", "failed", "nobody listens");
    report.says("host port 1 (0x1)", "failed", "there is no");
    report.says("host ports", "warning", "port 5002 (0x138a)");
    let accepted = live.accept();
    assert_eq!(accepted.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    assert!(socket(5002).exists());
}

#[test]
fn a_port_of_the_host_is_followed_to_its_target() {
    let dir = private_dir();
    let state = dir.path().join("vm");
    let _vm = simulate(&state, None);
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = format!("tcp://{}", server.local_addr().unwrap());
    let path = dir.path().join("s");
    let unix = UnixListener::bind(&path).unwrap();
    let mut expose = in_runtime(dir.path(), &["expose", "--vm", text(&state)]);
    expose.args(["-R", &format!("5000:{tcp}")]);
    expose.args(["-R", &format!("5001:{}", text(&path))]);
    let expose = Running::spawn(expose);
    expose.says("port 5001");
    let examine = || {
        let mut doctor = in_runtime(dir.path(), &["doctor", "--vm", text(&state)]);
        doctor.args(["--host-port", "5000", "--host-port", "5001"]);
        Report::of(doctor)
    };
    let (one, other) = ("host port 5000 (0x1388)", "host port 5001 (0x1389)");
    let leads = format!("is listened on, and leads to {tcp}");
    let report = examine();
    report
        .says(one, "ok", &leads)
        .says(other, "ok", text(&path));
    drop((server, unix));
    // Other tests' children may hold a copy for a moment.
    eventually("the targets are gone", || examine().code == Some(1));
    eventually("both are gone", || {
        let failed = |it: &&Value| it["verdict"] == "failed";
        examine().checks.iter().filter(failed).count() == 2
    });
    let report = examine();
    report.says(one, "failed", &leads);
    report.says(other, "failed", "nobody listens there");
}

#[test]
fn people_are_told_on_a_line_and_what_to_do_below() {
    let dir = private_dir();
    let output = doctor(&["--vm", text(dir.path())]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = said.lines().collect();
    let at = lines
        .iter()
        .position(|line| line.starts_with("FAIL socket "));
    let remedy = lines[at.unwrap() + 1];
    assert_eq!(remedy.trim(), "start the VM");
    let column = lines[at.unwrap()].find("there is no").unwrap();
    assert_eq!(remedy.find("start"), Some(column));
    assert!(said.is_ascii(), "{said}");
    assert_eq!(run(&["doctor", "--port", "7"]).status.code(), Some(2));
    // Without a VM none is dialled.
    let report = Report::of(doctor(&[]));
    assert_eq!(report.code, Some(0));
    assert!(report.checks.iter().all(|check| check["name"] != "guest"));
}
