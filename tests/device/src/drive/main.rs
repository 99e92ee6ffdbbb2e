//! Drives a booted guest through the real binary: `drive ROOT KERNEL INITRAMFS HVSOCK DEVICE PEER
//! [CHECK…]`.
//!
//! It starts QEMU, a vsock device and `hvsock`, checks what goes to and fro, and prints what became
//! of each check, as the guest's own checks do. Nothing that it starts outlives it.

mod exact;
mod machine;
#[path = "../../../guest/src/pattern.rs"]
mod pattern;
mod process;
#[path = "../../../guest/src/promptly.rs"]
mod promptly;
mod proxy;
#[path = "../../../guest/src/report.rs"]
mod report;
#[path = "../../../guest/src/services.rs"]
mod services;
mod sockets;
mod stand;
mod stock;
#[path = "../../../guest/src/tools.rs"]
mod tools;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs};

use exact::Exact;
use machine::Parts;
use report::{Outcome, check};
use stock::Stock;

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
    let run = Run { names };
    let exact = run.drive(
        "expose",
        &dir.path().join("exact"),
        &EXACT,
        |vm| vm.said(),
        |dir| Exact::start(&parts, dir),
    )?;
    let stock = run.drive(
        "mux",
        &dir.path().join("stock"),
        &STOCK,
        |vm| vm.said(),
        |dir| Stock::start(&parts, dir),
    )?;
    Ok(exact && stock)
}

/// No check may take longer.
const LIMIT: Duration = Duration::from_secs(240);

type Check<T> = (&'static str, fn(&T) -> Outcome);

/// Behind hyperkit's face.
const EXACT: [Check<Exact>; 19] = [
    ("echo_to_guest_tcp", exact::echo_to_guest_tcp),
    ("echo_to_guest_unix", exact::echo_to_guest_unix),
    ("echo_to_host", exact::echo_to_host),
    ("client_ends_first", exact::client_ends_first),
    ("server_ends_first", exact::server_ends_first),
    ("refused_by_guest", exact::refused_by_guest),
    ("refused_by_host", exact::refused_by_host),
    ("parallel_200_to_guest", exact::parallel_200_to_guest),
    ("parallel_200_to_host", exact::parallel_200_to_host),
    ("tools_to_guest", exact::tools_to_guest),
    ("tools_to_host", exact::tools_to_host),
    ("connect_deadline", exact::connect_deadline),
    ("sequence_300", exact::sequence_300),
    ("slow_reader", exact::slow_reader),
    ("slow_server", exact::slow_server),
    ("rude_clients", exact::rude_clients),
    ("guest_reboots", exact::guest_reboots),
    ("vm_starts_anew", exact::vm_starts_anew),
    ("ends_in_order", exact::ends_in_order),
];

/// Behind vhost-device-vsock.
const STOCK: [Check<Stock>; 12] = [
    ("echo_to_guest", stock::echo_to_guest),
    ("echo_to_host", stock::echo_to_host),
    (
        "half_close_loses_no_answer",
        stock::half_close_loses_no_answer,
    ),
    ("server_ends_first", stock::server_ends_first),
    ("refused", stock::refused),
    ("tools", stock::tools),
    ("parallel_200", stock::parallel_200),
    ("slow_reader", stock::slow_reader),
    ("rude_clients", stock::rude_clients),
    ("guest_reboots", stock::guest_reboots),
    ("vm_starts_anew", stock::vm_starts_anew),
    ("ends_in_order", stock::ends_in_order),
];

/// The checks that are wanted: all of them, unless some are named.
struct Run<'a> {
    names: &'a [PathBuf],
}

impl Run<'_> {
    /// Starts a VM in `dir`, and checks what is to be checked there; whether all went well.
    fn drive<T: Send + Sync + 'static>(
        &self,
        kind: &str,
        dir: &Path,
        checks: &[Check<T>],
        said: impl Fn(&T) -> String,
        start: impl FnOnce(&Path) -> Result<Arc<T>, Failure>,
    ) -> Result<bool, Failure> {
        let wanted: Vec<_> = checks
            .iter()
            .map(|(name, body)| (format!("{kind}_{name}"), *body))
            .filter(|(name, _)| self.names.is_empty() || self.names.contains(&name.into()))
            .collect();
        if wanted.is_empty() {
            return Ok(true);
        }
        fs::create_dir(dir)?;
        let vm = start(dir)?;
        let mut passed = true;
        for (name, body) in wanted {
            let checked = Arc::clone(&vm);
            if !check(&name, LIMIT, move || body(&checked)) {
                passed = false;
                let said = said(&vm);
                let lines: Vec<_> = said.lines().collect();
                for line in &lines[lines.len().saturating_sub(20)..] {
                    println!("# {line}");
                }
            }
        }
        Ok(passed)
    }
}
