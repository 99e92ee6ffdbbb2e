//! Finds running VMs of QEMU, Firecracker, Cloud Hypervisor and vhost-device-vsock, and stand-ins
//! for them, by the vsock device in the command lines of their processes.

use std::fs;
use std::path::{Path, PathBuf};

use crate::app::processes::RunningProcess;

/// A running VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunningVm {
    /// The name that its VMM gives it, or that of its process.
    pub(crate) name: String,
    /// The program that runs it.
    pub(crate) vmm: &'static str,
    /// The value of `--vm` for it.
    pub(crate) vm: String,
    /// The id of its process.
    pub(crate) process: u32,
}

/// Returns the VMs with a vsock device that these processes run.
pub(crate) fn find(processes: &[RunningProcess]) -> Vec<RunningVm> {
    processes.iter().flat_map(find_of_process).collect()
}

fn find_of_process(process: &RunningProcess) -> Vec<RunningVm> {
    let words: Vec<&str> = process.command.iter().map(String::as_str).collect();
    let Some((program, words)) = words.split_first() else {
        return Vec::new();
    };
    let program = program.rsplit('/').next().unwrap_or_default();
    let found = if program.starts_with("qemu-system-") || program == "qemu-kvm" {
        find_qemu(words)
    } else if program.starts_with("firecracker") {
        find_firecracker(process.id, words)
    } else if program.starts_with("cloud-hypervisor") {
        find_cloud_hypervisor(process.id, words)
    } else if program == "vhost-device-vsock" {
        find_vhost_device(process.id, words)
    } else if program == "hvsock" && words.contains(&"simulate") {
        find_stand_in(process.id, words)
    } else {
        return Vec::new();
    };
    let vm = |(vmm, name, vm): (&'static str, Option<String>, String)| RunningVm {
        name: name.unwrap_or_else(|| format!("process {}", process.id)),
        vmm,
        vm,
        process: process.id,
    };
    found.into_iter().map(vm).collect()
}

type FoundVm = (&'static str, Option<String>, String);

/// Returns the values of an option: the next word, or the text behind `=`. The option may have one
/// dash or two, as QEMU takes them.
fn values<'a>(words: &[&'a str], option: &str) -> Vec<&'a str> {
    let named = |word: &'a str| {
        let name = word.strip_prefix('-')?;
        let rest = name.strip_prefix('-').unwrap_or(name);
        rest.strip_prefix(option)
    };
    let mut found = Vec::new();
    let mut words = words.iter().copied();
    while let Some(word) = words.next() {
        match named(word) {
            Some("") => found.extend(words.next()),
            Some(rest) => found.extend(rest.strip_prefix('=')),
            None => {}
        }
    }
    found
}

/// Returns the value of a key in `a=b,key=value`.
fn key<'a>(list: &'a str, key: &str) -> Option<&'a str> {
    let mut pairs = list.split(',').filter_map(|pair| pair.split_once('='));
    pairs.find(|(name, _)| *name == key).map(|(_, value)| value)
}

/// Finds QEMU's: `-device vhost-vsock-pci,guest-cid=3`, or the same as JSON, which libvirt writes.
fn find_qemu(words: &[&str]) -> Vec<FoundVm> {
    let name = values(words, "name").into_iter().next().map(|it| {
        let plain = it.split(',').next().filter(|it| !it.contains('='));
        key(it, "guest").or(plain).unwrap_or(it).to_owned()
    });
    let cid = |device: &str| -> Option<u64> {
        if device.starts_with('{') {
            let device: serde_json::Value = serde_json::from_str(device).ok()?;
            let is_vsock = device["driver"].as_str()?.starts_with("vhost-vsock");
            return is_vsock.then(|| device["guest-cid"].as_u64())?;
        }
        let is_vsock = device.starts_with("vhost-vsock");
        number(is_vsock.then(|| key(device, "guest-cid"))??)
    };
    let cids = values(words, "device").into_iter().filter_map(cid);
    cids.map(|cid| ("QEMU", name.clone(), format!("vsock://{cid}")))
        .collect()
}

/// Finds Firecracker's: `vsock.uds_path` of the file of `--config-file`. A VM configured by its API
/// is not found.
fn find_firecracker(process: u32, words: &[&str]) -> Vec<FoundVm> {
    let name = values(words, "id").into_iter().next().map(str::to_owned);
    let path = |file: &str| -> Option<String> {
        let text = fs::read_to_string(resolve_path(process, file)).ok()?;
        let config: serde_json::Value = serde_json::from_str(&text).ok()?;
        Some(config["vsock"]["uds_path"].as_str()?.to_owned())
    };
    let paths = values(words, "config-file").into_iter().filter_map(path);
    paths
        .map(|path| ("Firecracker", name.clone(), format_mux_uri(process, &path)))
        .collect()
}

/// Finds Cloud Hypervisor's: `--vsock cid=3,socket=/path`.
fn find_cloud_hypervisor(process: u32, words: &[&str]) -> Vec<FoundVm> {
    let paths = values(words, "vsock")
        .into_iter()
        .filter_map(|it| key(it, "socket"));
    paths
        .map(|path| ("Cloud Hypervisor", None, format_mux_uri(process, path)))
        .collect()
}

/// Parses a number as QEMU does: decimal, or hexadecimal after `0x`.
fn number(word: &str) -> Option<u64> {
    match word.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => word.parse().ok(),
    }
}

/// Finds those of vhost-device-vsock: `--vm guest-cid=3,socket=…,uds-path=/path`, or
/// `--uds-path=/path`.
fn find_vhost_device(process: u32, words: &[&str]) -> Vec<FoundVm> {
    let of_vms = values(words, "vm")
        .into_iter()
        .filter_map(|it| key(it, "uds-path"));
    let paths = of_vms.chain(values(words, "uds-path"));
    paths
        .map(|path| ("vhost-device-vsock", None, format_mux_uri(process, path)))
        .collect()
}

/// Finds the stand-in's: `hvsock simulate --vsock-mux /path`.
fn find_stand_in(process: u32, words: &[&str]) -> Vec<FoundVm> {
    let paths = values(words, "vsock-mux").into_iter();
    paths
        .map(|path| ("hvsock simulate", None, format_mux_uri(process, path)))
        .collect()
}

/// Returns the URI of a VM behind a VMM's socket.
fn format_mux_uri(process: u32, path: &str) -> String {
    let path = resolve_path(process, path);
    crate::address::VsockMuxAddress {
        path,
        port: crate::address::Port(0),
        half_close: false,
    }
    .to_string()
    .replacen(":0", "", 1)
}

/// Returns a path absolute, relative to the process' current directory.
fn resolve_path(process: u32, path: &str) -> PathBuf {
    if Path::new(path).is_absolute() {
        return PathBuf::from(path);
    }
    let directory = fs::read_link(format!("/proc/{process}/cwd"));
    directory.map_or_else(|_| PathBuf::from(path), |it| it.join(path))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn found(command: &[&str]) -> Vec<(String, &'static str, String)> {
        let command = command.iter().map(|it| (*it).to_owned()).collect();
        let process = RunningProcess { id: 7, command };
        let all = find(&[process]).into_iter();
        all.map(|it| (it.name, it.vmm, it.vm)).collect()
    }

    #[test]
    fn vms_are_known_by_their_vmms_command_lines() {
        let qemu = [
            "/usr/bin/qemu-system-x86_64",
            "-name",
            "guest=build,debug-threads=on",
            "-device",
            "virtio-net-pci,netdev=n",
            "-device",
            "vhost-vsock-pci,id=vsock0,guest-cid=0x3",
        ];
        let right = [("build".to_owned(), "QEMU", "vsock://3".to_owned())];
        assert_eq!(found(&qemu), right);
        let libvirt = r#"{"driver":"vhost-vsock-pci","id":"v","guest-cid":4294967,"vhostfd":"30"}"#;
        let libvirt = ["qemu-kvm", "--name", "web", "-device", libvirt];
        let right = [("web".to_owned(), "QEMU", "vsock://4294967".to_owned())];
        assert_eq!(found(&libvirt), right);
        let cloud = [
            "cloud-hypervisor",
            "--cpus",
            "boot=2",
            "--vsock",
            "cid=3,socket=/run/ch vsock",
        ];
        let right = [(
            "process 7".to_owned(),
            "Cloud Hypervisor",
            "vsock-mux:///run/ch%20vsock".to_owned(),
        )];
        assert_eq!(found(&cloud), right);
        let device = [
            "vhost-device-vsock",
            "--vm",
            "guest-cid=3,socket=/tmp/v.sock,uds-path=/tmp/3.vsock",
            "--vm=guest-cid=4,socket=/tmp/w.sock,uds-path=/tmp/4.vsock",
        ];
        let vms: Vec<String> = found(&device).into_iter().map(|(_, _, vm)| vm).collect();
        assert_eq!(
            vms,
            ["vsock-mux:///tmp/3.vsock", "vsock-mux:///tmp/4.vsock"]
        );
    }

    #[test]
    fn a_stand_in_is_known_by_its_command_line() {
        let right = [(
            "process 7".to_owned(),
            "hvsock simulate",
            "vsock-mux:///tmp/vm.sock".to_owned(),
        )];
        for path in [
            &["--vsock-mux", "/tmp/vm.sock"][..],
            &["--vsock-mux=/tmp/vm.sock"],
        ] {
            let command = [
                &["/usr/bin/hvsock", "simulate"],
                path,
                &["--guest", "80=http"],
            ];
            assert_eq!(found(&command.concat()), right);
        }
    }

    #[test]
    fn firecracker_s_socket_is_read_from_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vm.json");
        fs::write(
            &file,
            r#"{"vsock": {"guest_cid": 3, "uds_path": "/run/fc.vsock"}}"#,
        )
        .unwrap();
        let command = [
            "/srv/firecracker-v1.7",
            "--id",
            "one",
            "--config-file",
            file.to_str().unwrap(),
        ];
        let right = [(
            "one".to_owned(),
            "Firecracker",
            "vsock-mux:///run/fc.vsock".to_owned(),
        )];
        assert_eq!(found(&command), right);
    }

    #[test]
    fn what_has_no_vsock_device_is_left_out() {
        for command in [
            &["qemu-system-x86_64", "-device", "virtio-net-pci"][..],
            &[
                "qemu-system-x86_64",
                "-device",
                "vhost-vsock-pci,guest-cid=",
            ],
            &["qemu-system-x86_64", "-device"],
            &["firecracker", "--api-sock", "/run/fc.api"],
            &["firecracker", "--config-file", "/nowhere/vm.json"],
            &["vi", "--vsock", "cid=3,socket=/x"],
            &["hvsock", "simulate", "/tmp/vm", "--guest", "80=http"],
            &[""],
            &[],
        ] {
            assert_eq!(found(command), [], "{command:?}");
        }
    }
}
