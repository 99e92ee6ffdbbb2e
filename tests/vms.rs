//! VMs of other families by their names: `--vm vsock://CID`, `--vm vsock-mux:///PATH`.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;
#[path = "common/portable.rs"]
mod portable;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use command::{Mortal, Running, fails, in_runtime, output, run, text};
use common::{PATIENCE, eventually, private_dir, unix_client};
use portable::server;

/// A VMM whose guest echoes at port 80 and refuses all other ports.
fn vmm(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                let mut line = String::new();
                let mut reader = BufReader::with_capacity(1, stream.try_clone().unwrap());
                if reader.read_line(&mut line).is_err() || line != "CONNECT 80\n" {
                    return;
                }
                let _ = stream.write_all(b"OK 1073741824\n");
                let _ = std::io::copy(&mut reader, &mut stream);
                let _ = stream.shutdown(Shutdown::Write);
            });
        }
    });
}

fn ask(mut stream: UnixStream) -> String {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"hello").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_vm_behind_its_vmm_s_socket_is_exposed_both_ways() {
    let dir = private_dir();
    let dir = dir.path();
    let (socket, local) = (dir.join("vm.sock"), dir.join("echo"));
    vmm(&socket);
    let target = server(|mut stream| {
        let mut request = Vec::new();
        stream.read_to_end(&mut request).unwrap();
        stream.write_all(&request).unwrap();
    });
    let vm = format!("vsock-mux://{}?half-close=yes", text(&socket));
    let here = format!("{}:80", text(&local));
    let there = format!("5000:{target}");
    let running = Running::start(&["expose", "--vm", &vm, "-L", &here, "-R", &there]);
    running.says(" -> vsock-mux://:80/");
    running.says("vsock-mux://:5000/");
    assert_eq!(ask(unix_client(&local)), "hello");
    // So the VMM dials for its guest.
    assert_eq!(ask(unix_client(&dir.join("vm.sock_5000"))), "hello");

    let checks = run(&[
        "doctor",
        "--vm",
        &vm,
        "--port",
        "80",
        "--port",
        "81",
        "--host-port",
        "5000",
        "--host-port",
        "5001",
    ]);
    let said = String::from_utf8(checks.stdout).unwrap();
    assert_eq!(checks.status.code(), Some(1), "{said}");
    let verdict = |name: &str| {
        let mut lines = said.lines().map(|line| line.split_whitespace());
        lines.find_map(|mut words| {
            let verdict = words.next()?;
            let rest: Vec<&str> = words.collect();
            rest.join(" ").starts_with(name).then(|| verdict.to_owned())
        })
    };
    for (name, right) in [
        ("socket", "ok"),
        ("port 80", "ok"),
        ("port 81", "FAIL"),
        ("host port 5000", "ok"),
        ("host port 5001", "FAIL"),
    ] {
        assert_eq!(verdict(name).as_deref(), Some(right), "{name}: {said}");
    }
}

#[test]
fn a_file_names_vms_of_every_family() {
    let dir = private_dir();
    let dir = dir.path();
    let file = dir.join("hvsock.toml");
    let write = |more: &str| {
        let text = format!(
            "[vm.fc]\nat = \"vsock-mux://{0}/fc.sock\"\n{more}\n[vm.q]\nat = \"vsock://7\"\n\
            [forward.web]\nvm = \"fc\"\nlisten = \"{0}/web\"\nport = 80\n\
            [forward.agent]\nvm = \"q\"\nlisten = \"{0}/agent\"\nport = 22\n",
            text(dir)
        );
        std::fs::write(&file, text).unwrap();
    };
    write("");
    let checked = run(&["check", text(&file)]);
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(checked.status.success(), "{checked:?}");
    assert!(said.contains("vsock-mux://:80"), "{said}");
    assert!(said.contains("vsock://7:22"), "{said}");
    write("connections = 5");
    assert!(run(&["check", text(&file)]).status.success());
    write("connections = 5\nunanswered = 5");
    let at = format!("{}:4:", text(&file));
    let why = "hyperkit VMs only";
    fails(&["check", text(&file)], 1, &[&at, "[vm.fc]", why]);
    write("at = 3");
    assert!(!run(&["check", text(&file)]).status.success());
}

#[test]
fn what_names_no_vm_is_refused_with_a_right_one() {
    for (vm, part) in [
        ("vsock://2", "no guest's"),
        ("vsock://3:80", "names a port"),
        ("vsock-mux://", "missing"),
    ] {
        for command in [
            &["expose", "--vm", vm, "-L", "0:80"][..],
            &["cat", "--vm", vm, "80"],
            &["doctor", "--vm", vm],
        ] {
            let output = run(command);
            let told = [output.stdout, output.stderr].concat();
            let told = String::from_utf8_lossy(&told);
            let right = if command[0] == "doctor" { 1 } else { 2 };
            assert_eq!(output.status.code(), Some(right), "{command:?}: {told}");
            assert!(
                told.contains(part) && told.contains("write vsock"),
                "{command:?}: {told}"
            );
        }
    }
}

#[test]
fn cat_dials_a_port_of_it() {
    let dir = private_dir();
    let socket = dir.path().join("vm.sock");
    vmm(&socket);
    let vm = format!("vsock-mux://{}?half-close=yes", text(&socket));
    let mut cat = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    cat.args(["cat", "--vm", &vm, "80"]);
    let mut cat = cat
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    cat.stdin.take().unwrap().write_all(b"hello").unwrap();
    let output = cat.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(output.stdout, b"hello");
}

#[test]
fn a_vm_that_runs_here_is_listed_with_what_the_option_takes() {
    let dir = private_dir();
    let socket = dir.path().join("ch.sock");
    // Only its command line is looked at.
    let mut vmm = Command::new("sh");
    vmm.arg0("cloud-hypervisor").args(["-c", "read line"]);
    vmm.args(["--vsock", &format!("cid=3,socket={}", text(&socket))]);
    let vmm = Mortal(vmm.stdin(Stdio::piped()).spawn().unwrap());
    let mut vms = in_runtime(dir.path(), &["vms"]);
    vms.current_dir(dir.path()).env("HOME", dir.path());
    let said = String::from_utf8(output(vms).stdout).unwrap();
    let row = said.lines().find(|line| line.contains(text(&socket)));
    let row = row.unwrap_or_else(|| panic!("{said}"));
    assert!(row.contains(&format!("process {}", vmm.0.id())), "{row}");
    assert!(row.contains("Cloud Hypervisor"), "{row}");
    assert!(row.contains(" running "), "{row}");
    if cfg!(target_os = "linux") {
        vmm.signal("STOP");
        eventually("it is stopped", || {
            let mut vms = in_runtime(dir.path(), &["vms"]);
            vms.current_dir(dir.path()).env("HOME", dir.path());
            let said = String::from_utf8(output(vms).stdout).unwrap();
            let row = said.lines().find(|line| line.contains(text(&socket)));
            row.is_some_and(|row| row.contains(" paused "))
        });
        vmm.signal("CONT");
    }
    assert!(
        row.contains(&format!("vsock-mux://{}", text(&socket))),
        "{row}"
    );
    // Its name is taken as well.
    self::vmm(&socket);
    let name = format!("process {}", vmm.0.id());
    let mut doctor = in_runtime(dir.path(), &["doctor", "--vm", &name, "--port", "80"]);
    doctor.current_dir(dir.path()).env("HOME", dir.path());
    let said = String::from_utf8(output(doctor).stdout).unwrap();
    let is_ok = |name: &str| {
        let mut lines = said.lines().map(|line| line.split_whitespace());
        let right: Vec<&str> = ["ok"].into_iter().chain(name.split(' ')).collect();
        lines.any(|words| words.take(right.len()).eq(right.iter().copied()))
    };
    assert!(is_ok("socket") && is_ok("port 80"), "{said}");
}

#[test]
fn its_limit_and_its_health_are_shown() {
    let dir = private_dir();
    let dir = dir.path();
    let (socket, local, control) = (dir.join("vm.sock"), dir.join("echo"), dir.join("control"));
    vmm(&socket);
    let vm = format!("vsock-mux://{}", text(&socket));
    let control = text(&control);
    let here = format!("{}:80", text(&local));
    let running = Running::start(&[
        "expose",
        &format!("--control={control}"),
        "--vm-connections=5",
        "--vm",
        &vm,
        "-L",
        &here,
    ]);
    running.says(" -> vsock-mux://:80/");
    let told = |arguments: &[&str]| {
        let output = run(&[arguments, &["--control", control]].concat());
        String::from_utf8(output.stdout).unwrap()
    };
    let mut client = unix_client(&local);
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    let status = told(&["status"]);
    assert!(status.contains("1 of 5 slots"), "{status}");
    let checks = told(&["doctor", "--vm", &vm]);
    let health = checks.lines().find(|line| line.contains("health"));
    let health = health.unwrap_or_else(|| panic!("{checks}"));
    assert!(health.contains("up, last heard"), "{checks}");
    // It dies, and a client finds that out.
    std::fs::remove_file(&socket).unwrap();
    eventually("it is gone", || {
        let checks = told(&["doctor", "--vm", &vm]);
        checks
            .lines()
            .any(|line| line.contains("health") && line.contains("gone for"))
    });
}

#[test]
fn a_process_that_has_ended_runs_no_vm_though_nobody_has_waited_for_it() {
    let dir = private_dir();
    let state = dir.path().join("vm");
    std::fs::create_dir(&state).unwrap();
    std::fs::write(state.join("hyperkit.json"), "{}").unwrap();
    let mut hyperkit = Command::new("sh");
    hyperkit.args(["-c", "read line"]).stdin(Stdio::piped());
    let mut hyperkit = Mortal(hyperkit.spawn().unwrap());
    let id = hyperkit.0.id().to_string();
    std::fs::write(state.join("hyperkit.pid"), &id).unwrap();
    let state_of_vm = || {
        let mut vms = in_runtime(dir.path(), &["vms"]);
        vms.current_dir(dir.path()).env("HOME", dir.path());
        let said = String::from_utf8(output(vms).stdout).unwrap();
        let row = said.lines().find(|line| line.starts_with("vm ")).unwrap();
        row.split_whitespace().nth(2).unwrap().to_owned()
    };
    assert_eq!(state_of_vm(), "running");
    if cfg!(target_os = "linux") {
        // What `status` says of it as well.
        hyperkit.signal("STOP");
        eventually("it is stopped", || state_of_vm() == "paused");
        hyperkit.signal("CONT");
        eventually("it goes on", || state_of_vm() == "running");
    }
    // It ends, and this process doesn't wait for it.
    drop(hyperkit.0.stdin.take());
    eventually("it runs no more", || state_of_vm() == "gone");
}
