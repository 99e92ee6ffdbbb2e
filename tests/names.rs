//! Names of files that are no UTF-8, on the command line.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use command::*;
use common::*;
use hvsock::simulate::{Service, Vm};

fn hvsock(arguments: &[OsString]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(arguments);
    command
}

/// A path in the directory with a byte that is no UTF-8.
fn odd(dir: &tempfile::TempDir, name: &str) -> PathBuf {
    let bytes = [dir.path().as_os_str().as_bytes(), b"/\xff", name.as_bytes()].concat();
    OsString::from_vec(bytes).into()
}

#[test]
fn a_socket_may_have_any_name() {
    let dir = private_dir();
    let (content, socket) = (odd(&dir, "f"), odd(&dir, ".sock"));
    std::fs::write(&content, "content").unwrap();
    let target = [b"file:", content.as_os_str().as_bytes()].concat();
    let arguments = [
        "forward".into(),
        socket.clone().into(),
        OsString::from_vec(target),
    ];
    let forward = Running::spawn(hvsock(&arguments));
    let line = forward.says("%FF.sock");
    assert!(line.contains("%FFf"), "{line}");
    let mut all = String::new();
    let mut client = UnixStream::connect(&socket).unwrap();
    client.read_to_string(&mut all).unwrap();
    assert_eq!(all, "content");
    let cat = output(hvsock(&["cat".into(), socket.into()]));
    assert_eq!(cat.stdout, b"content");
}

#[test]
fn a_vm_and_its_sockets_may_have_any_names() {
    let dir = private_dir();
    let (state, socket) = (odd(&dir, "vm"), odd(&dir, ":s"));
    std::fs::create_dir(&state).unwrap();
    let _vm = Vm::builder(&state).guest(7, Service::Echo).start().unwrap();
    let local = [socket.as_os_str().as_bytes(), b":7"].concat();
    let arguments: [OsString; 5] = [
        "expose".into(),
        "--vm".into(),
        state.into(),
        "-L".into(),
        OsString::from_vec(local),
    ];
    let expose = Running::spawn(hvsock(&arguments));
    expose.says("%FF:s -> guest port 7");
    let mut client = UnixStream::connect(&socket).unwrap();
    use std::io::Write;
    client.write_all(b"hello").unwrap();
    client.read_exact(&mut [0; 5]).unwrap();
}
