//! One state directory: what hyperkit and its Go package have written there.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{CONNECT_NAME, HyperkitVm, PID_NAME};
use crate::address::is_guest_cid;
use crate::{file, sys};

/// The configuration that hyperkit's Go package writes into the state directory (`go/hyperkit.go`,
/// `jsonFile`).
pub(super) const JSON_NAME: &str = "hyperkit.json";

/// The socket's name in old builds for Docker, whose other sockets have the prefix `@`.
const OLD_CONNECT_NAME: &str = "@connect";

/// What a state directory tells of its VM.
pub(super) struct DirectoryState {
    pub(super) vm: HyperkitVm,
    /// The configuration says that the VM has no vsock device, and there is no socket either.
    pub(super) without_vsock: bool,
}

/// Reads the state directory `dir`, which exists.
pub(super) fn read(dir: &Path) -> io::Result<DirectoryState> {
    if !fs::metadata(dir)?.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    let json = read_json(&dir.join(JSON_NAME))?;
    let mut vm = HyperkitVm::new(vsock_dir(dir, &json));
    if let Some(cid) = json["vsock_guest_cid"].as_u64()
        && let Ok(cid) = u32::try_from(cid)
        && is_guest_cid(cid)
    {
        vm.cid = cid;
    }
    let has = |name: &str| vm.state_dir.join(name).symlink_metadata().is_ok();
    let plain = has(CONNECT_NAME);
    let old = !plain && has(OLD_CONNECT_NAME);
    if old {
        vm.connect = OLD_CONNECT_NAME.to_owned();
        vm.prefix = "@".to_owned();
    }
    Ok(DirectoryState {
        without_vsock: json["vsock"] == Value::Bool(false) && !plain && !old,
        vm,
    })
}

/// Returns the CID that the configuration in `dir` gives the guest, whether or not it is valid.
#[cfg(all(unix, feature = "cli"))]
pub(crate) fn configured_cid(dir: &Path) -> Option<u64> {
    read_json(&dir.join(JSON_NAME)).ok()?["vsock_guest_cid"].as_u64()
}

/// Returns the directory of the sockets: `vsock_dir` of the configuration, or the state directory.
fn vsock_dir(dir: &Path, json: &Value) -> PathBuf {
    match json["vsock_dir"].as_str().map(Path::new) {
        None => dir.to_owned(),
        Some(vsock_dir) if vsock_dir.as_os_str().is_empty() => dir.to_owned(),
        Some(vsock_dir) if vsock_dir.is_absolute() => vsock_dir.to_owned(),
        // It is relative to where hyperkit was started, which only the state directory as given
        // there tells.
        Some(vsock_dir) => match json["state_dir"].as_str().map(Path::new) {
            Some(state_dir) if dir.ends_with(state_dir) => {
                let up = state_dir.components().count();
                let start = dir.ancestors().nth(up).unwrap_or(dir);
                start.join(vsock_dir)
            }
            _ => dir.to_owned(),
        },
    }
}

/// Returns whether a hyperkit VM has left something in `dir`. A directory that may not be read may
/// hold one.
pub(crate) fn holds_vm(dir: &Path) -> bool {
    let may_have = |name: &str| match dir.join(name).symlink_metadata() {
        Ok(_) => true,
        Err(why) => why.kind() == io::ErrorKind::PermissionDenied,
    };
    [JSON_NAME, PID_NAME, CONNECT_NAME, OLD_CONNECT_NAME]
        .into_iter()
        .any(may_have)
        || driver(dir).is_some_and(|driver| driver == "hyperkit")
}

/// Returns whether hyperkit's Go package has written its configuration into `dir`.
pub(super) fn has_json(dir: &Path) -> bool {
    dir.join(JSON_NAME).symlink_metadata().is_ok()
}

/// Returns the driver of a minikube machine, from the `config.json` in its directory, which has
/// docker-machine's format.
pub(super) fn driver(dir: &Path) -> Option<String> {
    let config = read_json(&dir.join("config.json")).ok()?;
    config["DriverName"].as_str().map(str::to_owned)
}

/// Returns the process named by hyperkit.pid, if it lives. One that has ended and that its parent
/// hasn't waited for (a zombie) doesn't. No connection is made: a probe can stop the VM's device.
pub(crate) fn running_pid(dir: &Path) -> Option<i32> {
    let pid = file::read_text(&dir.join(PID_NAME), file::STATE_FILE).ok()?;
    let pid = pid.trim().parse().ok()?;
    let lives = sys::process_is_alive(pid) && !is_ending(pid);
    lives.then_some(pid)
}

#[cfg(unix)]
fn is_ending(pid: i32) -> bool {
    u32::try_from(pid).is_ok_and(|pid| sys::Process::new(pid).is_ending())
}

#[cfg(not(unix))]
fn is_ending(_: i32) -> bool {
    false
}

/// Reads a file's JSON; `Null` if there is no such file.
fn read_json(path: &Path) -> io::Result<Value> {
    let error =
        |kind, why: &dyn std::fmt::Display| io::Error::new(kind, format!("{path:?}: {why}"));
    let text = match file::read(path, file::STATE_FILE) {
        Ok(text) => text,
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(Value::Null),
        Err(why) => return Err(error(why.kind(), &why)),
    };
    serde_json::from_slice(&text).map_err(|why| error(io::ErrorKind::InvalidData, &why))
}
