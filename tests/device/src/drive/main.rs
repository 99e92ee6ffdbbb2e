//! Drives a booted guest through the real binary: `drive ROOT KERNEL INITRAMFS HVSOCK DEVICE PEER [CHECK…]`.
//!
//! It starts QEMU, a vsock device and `hvsock`, checks what goes to and fro, and prints what became of each check, as
//! the guest's own checks do. Nothing that it starts outlives it.

mod exact;
mod machine;
#[path = "../../../guest/src/pattern.rs"]
mod pattern;
mod process;
mod proxy;
#[path = "../../../guest/src/report.rs"]
mod report;
#[path = "../../../guest/src/services.rs"]
mod services;
mod sockets;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs};

use exact::Exact;
use machine::Parts;
use report::{Outcome, check};

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> ExitCode {
    let outcome = run();
    process::kill_all();
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            println!("FAILED to drive: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool, Failure> {
    let arguments: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let [root, kernel, initramfs, hvsock, device, peer, names @ ..] = &arguments[..] else {
        return Err("usage: drive ROOT KERNEL INITRAMFS HVSOCK DEVICE PEER [CHECK…]".into());
    };
    let parts = Parts {
        root: root.clone(),
        kernel: kernel.clone(),
        initramfs: initramfs.clone(),
        hvsock: hvsock.clone(),
        device: device.clone(),
        peer: peer.clone(),
    };
    let dir = tempfile::Builder::new().prefix("hvsock-").tempdir()?;
    process::end_on_signals(dir.path())?;
    // All of them, unless some are named.
    let wanted = |name: &str| names.is_empty() || names.iter().any(|n| n.as_os_str() == name);
    drive_exact(&parts, &dir.path().join("exact"), &wanted)
}

/// Behind hyperkit's face.
fn drive_exact(parts: &Parts, dir: &Path, wanted: &dyn Fn(&str) -> bool) -> Result<bool, Failure> {
    const LIMIT: Duration = Duration::from_secs(180);
    type Check = fn(&Exact) -> Outcome;
    let checks: [(&str, Check); 15] = [
        ("expose_echo_to_guest_tcp", exact::echo_to_guest_tcp),
        ("expose_echo_to_guest_unix", exact::echo_to_guest_unix),
        ("expose_echo_to_host", exact::echo_to_host),
        ("expose_client_ends_first", exact::client_ends_first),
        ("expose_server_ends_first", exact::server_ends_first),
        ("expose_refused_by_guest", exact::refused_by_guest),
        ("expose_refused_by_host", exact::refused_by_host),
        ("expose_parallel_200_to_guest", exact::parallel_200_to_guest),
        ("expose_parallel_200_to_host", exact::parallel_200_to_host),
        ("expose_sequence_300", exact::sequence_300),
        ("expose_slow_reader", exact::slow_reader),
        ("expose_slow_server", exact::slow_server),
        ("expose_rude_clients", exact::rude_clients),
        ("expose_guest_reboots", exact::guest_reboots),
        ("expose_vm_starts_anew", exact::vm_starts_anew),
    ];
    fs::create_dir(dir)?;
    let vm = Exact::start(parts, dir)?;
    let mut passed = true;
    let checks = checks.into_iter();
    for (name, body) in checks.chain([("expose_ends_in_order", exact::ends_in_order as Check)]) {
        if !wanted(name) {
            continue;
        }
        let checked = Arc::clone(&vm);
        if !check(name, LIMIT, move || body(&checked)) {
            passed = false;
            for line in vm
                .said()
                .lines()
                .rev()
                .take(20)
                .collect::<Vec<_>>()
                .iter()
                .rev()
            {
                println!("# {line}");
            }
        }
    }
    Ok(passed)
}
