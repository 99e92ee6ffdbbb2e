//! `--exit-idle`: the process ends when it has had no connection for so long.
#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use command::*;
use command_fds::{CommandFdExt, FdMapping};
use common::*;
use hvsock::simulate::{Service, Vm};

/// So that many of it pass within a test.
const LIMIT: &str = "200ms";
const SEVERAL_LIMITS: Duration = Duration::from_millis(600);

fn echo_vm(dir: &Path) -> Vm {
    Vm::builder(dir).guest(7, Service::Echo).start().unwrap()
}

/// `hvsock ARGUMENTS`, to which this socket is passed as a service manager does.
fn with_passed(socket: &UnixListener, arguments: &[&str]) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\""]);
    command.arg(env!("CARGO_BIN_EXE_hvsock")).args(arguments);
    command.env("LISTEN_FDS", "1");
    let parent_fd = OwnedFd::from(socket.try_clone().unwrap());
    let mapping = FdMapping {
        parent_fd,
        child_fd: 3,
    };
    command.fd_mappings(vec![mapping]).unwrap();
    command
}

fn ends_idle(mut proxy: Running) {
    proxy.complains("stopping: no connection for 0.2 s");
    assert_eq!(proxy.exit_code(), Some(0));
}

#[test]
fn an_idle_one_ends_and_the_next_client_finds_the_socket() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let path = dir.path().join("passed.sock");
    let socket = UnixListener::bind(&path).unwrap();
    let local = format!("{}:7", text(&path));
    let arguments = ["expose", "--vm", text(dir.path()), "-L", &local];
    let arguments = [&arguments[..], &["--exit-idle", LIMIT]].concat();
    // The client that it was started for keeps it as long as it is there.
    let client = unix_client(&path);
    let proxy = Running::spawn(with_passed(&socket, &arguments));
    proxy.says("passed.sock");
    std::thread::sleep(SEVERAL_LIMITS);
    // One that ends serves nobody else.
    assert_eq!(ask(unix_client(&path), b"too").unwrap(), b"too");
    assert_eq!(ask(client, b"first").unwrap(), b"first");
    ends_idle(proxy);
    assert!(path.exists());
    let client = unix_client(&path);
    let proxy = Running::spawn(with_passed(&socket, &arguments));
    assert_eq!(ask(client, b"second").unwrap(), b"second");
    ends_idle(proxy);
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn a_file_says_it_as_well_and_no_client_ever_came() {
    let dir = private_dir();
    let file = dir.path().join("hvsock.toml");
    let listen = dir.path().join("listen.sock");
    let said = format!(
        "exit-idle = \"{LIMIT}\"\ncontrol = \"off\"\n[forward.a]\nlisten = {:?}\nconnect = 1\n",
        text(&listen)
    );
    std::fs::write(&file, said).unwrap();
    ends_idle(Running::start(&["run", text(&file)]));
    assert!(!listen.exists());
}

/// Nobody would serve the port, and that can hang the VM.
#[test]
fn a_port_that_guests_dial_keeps_it() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let file = dir.path().join("hvsock.toml");
    let said = format!(
        "exit-idle = \"{LIMIT}\"\ncontrol = \"off\"\n[vm.a]\nat = {:?}\n[forward.b]\nvm = \"a\"\nguest-dials = 5000\nconnect = 1\n",
        text(dir.path())
    );
    std::fs::write(&file, said).unwrap();
    let check = Running::start(&["check", text(&file)]);
    check.complains("hvsock.toml:1: note: exit-idle has no effect: a guest dials [forward.b]");
    let mut proxy = Running::start(&["run", "--no-keeper", text(&file)]);
    proxy.complains("idle, and not ending for that: a guest may dial hyperkit://");
    std::thread::sleep(SEVERAL_LIMITS);
    assert!(dir.path().join("00000002.00001388").exists());
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}
