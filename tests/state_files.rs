//! What the files of a state directory may turn out to be: whatever it is, nothing waits for it,
//! and it is said.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use command::*;
use common::*;
use hvsock::simulate::{Service, Vm};

/// Puts something in the place of a state file from which no read of all ever ends.
fn replace(file: &Path, device: Option<&str>) {
    let _ = fs::remove_file(file);
    match device {
        Some(device) => symlink(device, file).unwrap(),
        None => nix::unistd::mkfifo(file, nix::sys::stat::Mode::S_IRWXU).unwrap(),
    }
}

fn in_directory(directory: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(arguments).current_dir(directory);
    command
        .env("HOME", directory)
        .env_remove("MINIKUBE_HOME")
        .env_remove("XDG_RUNTIME_DIR");
    let output = output(command);
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

#[test]
fn no_command_waits_for_a_state_file_that_is_none() {
    for (device, name) in [
        (None, "it is a FIFO"),
        (Some("/dev/zero"), "it is a device"),
    ] {
        let root = private_dir();
        // As the kernel names the working directory.
        let directory = root.path().canonicalize().unwrap().join("vm");
        let vm = Vm::builder(&directory).guest(7, Service::Echo).start();
        let vm = vm.unwrap();
        let state = text(&directory);
        replace(&directory.join("hyperkit.pid"), device);
        let (code, said) = in_directory(root.path(), &["vms"]);
        assert!(code == Some(0) && said.contains(state), "{said}");
        let (_, said) = in_directory(root.path(), &["doctor", "--vm", state]);
        assert!(said.contains(name), "{said}");
        let config = root.path().join("hvsock.toml");
        fs::write(
            &config,
            format!("[vm.a]\nat = {state:?}\n[forward.a]\nlisten = 0\nvm = \"a\"\nport = 7\n"),
        )
        .unwrap();
        let (_, said) = in_directory(root.path(), &["check", text(&config)]);
        assert!(!said.contains("panicked"), "{said}");

        replace(&directory.join("hyperkit.json"), device);
        for arguments in [
            &["expose", "--vm", state, "-L", "0:7"][..],
            &["doctor", "--vm", state],
            &["vms"],
        ] {
            let (code, said) = in_directory(root.path(), arguments);
            let told = said.contains("hyperkit.json") && said.contains(name);
            assert!(told || arguments == ["vms"], "{arguments:?}: {said}");
            assert_eq!(code == Some(0), arguments == ["vms"], "{said}");
        }
        assert!(vm.fate().is_none());
    }
}

/// The stand-in takes the place of what was there, and doesn't write to it.
#[test]
fn a_stand_in_replaces_the_files_of_an_earlier_vm() {
    let root = private_dir();
    let other = root.path().join("other");
    fs::write(&other, "precious").unwrap();
    let directory = root.path().join("vm");
    fs::create_dir(&directory).unwrap();
    symlink(&other, directory.join("hyperkit.json")).unwrap();
    replace(&directory.join("hyperkit.pid"), None);
    let vm = Vm::builder(&directory).start().unwrap();
    let pid = fs::read_to_string(directory.join("hyperkit.pid")).unwrap();
    assert_eq!(pid, std::process::id().to_string());
    assert_eq!(fs::read_to_string(&other).unwrap(), "precious");
    drop(vm);
}
