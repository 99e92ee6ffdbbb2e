//! Finds the VM that a user names, in `--vm` and in `at` of `[vm.NAME]`.

use std::io;

use crate::address::{
    self, Address, AnyVm, CID_ANY, CID_LOCAL, HvsockAddress, HyperkitAddress, HyperkitVm, Port,
    VsockAddress, VsockMuxAddress, is_guest_cid,
};
#[cfg(unix)]
use crate::app::{
    processes::{self, RunningProcess},
    vmms,
};
use crate::error::{Error, Operation, Result};
use crate::hyperkit::{self, Places};
use crate::proxy::Source;

/// A VM of any family, and the addresses of its ports.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum VmPlace {
    Hyperkit(HyperkitVm),
    HyperV(address::Vm),
    /// A guest of this Linux host. The port of the address is unused.
    Vsock(VsockAddress),
    /// A VM behind the Unix socket of its VMM. The port of the address is unused.
    VsockMux(VsockMuxAddress),
}

/// The URI schemes of VMs other than hyperkit's, each with a valid example.
const SCHEMES: [(&str, &str); 2] = [
    ("vsock://", "vsock://3"),
    ("vsock-mux://", "vsock-mux:///run/vm.sock"),
];

impl VmPlace {
    /// Finds the VM that a user means: `vsock://CID`, `vsock-mux:///PATH[?half-close=yes]`; else on
    /// Windows a Hyper-V VM's name or id, and elsewhere what [`hyperkit::find`] takes, or the name
    /// of a running VM of another VMM.
    ///
    /// # Errors
    /// Returns `InvalidInput` if the text can mean no VM, and the errors of [`hyperkit::find`].
    pub(crate) fn find(name: &str, places: &Places) -> Result<VmPlace> {
        if let Some(place) = VmPlace::find_other(name, places) {
            return place;
        }
        if cfg!(windows) {
            let vm = address::Vm::parse(name);
            let vm = vm.ok_or_else(|| invalid(name, "it is neither a VM's name nor its id"))?;
            return Ok(VmPlace::HyperV(vm));
        }
        hyperkit::find(name, places).map(VmPlace::Hyperkit)
    }

    /// Finds a VM that is neither hyperkit's nor Hyper-V's, by its URI or its name. Returns `None`
    /// for any other text. A hyperkit VM of the same name takes precedence.
    ///
    /// # Errors
    /// Returns `InvalidInput` if the URI is wrong, or several VMs have the name.
    #[cfg_attr(not(unix), allow(unused_variables))]
    pub(crate) fn find_other(name: &str, places: &Places) -> Option<Result<VmPlace>> {
        if let Some(place) = VmPlace::parse(name) {
            return Some(place);
        }
        #[cfg(unix)]
        if !name.contains('/') {
            return match hyperkit::find(name, places) {
                // Any directory may be that of a hyperkit VM that starts later.
                Ok(vm) if hyperkit::holds_vm(&vm.state_dir) => None,
                _ => find_running(name, &processes::list_all().ok()?),
            };
        }
        None
    }

    /// Parses the URI of a VM other than hyperkit's; `None` for any other text.
    pub(crate) fn parse(name: &str) -> Option<Result<VmPlace>> {
        let (scheme, example) = SCHEMES
            .into_iter()
            .find(|(scheme, _)| name.starts_with(scheme))?;
        let rest = &name[scheme.len()..];
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, rest) = rest.split_at(end);
        let wrong = |why: &str| {
            Some(Err(
                invalid(name, why).with_remedy(format!("write {example}"))
            ))
        };
        if authority.contains(':') {
            return wrong("it names a port, and a VM has all of them");
        }
        // Such an address is the VM and a port.
        let place = match format!("{scheme}{authority}:0{rest}").parse() {
            Ok(Address::Vsock(address)) => VmPlace::Vsock(address),
            Ok(Address::VsockMux(address)) => VmPlace::VsockMux(address),
            Ok(_) => return None,
            Err(e) => return wrong(&format!("{} {}", e.part(), e.reason())),
        };
        match &place {
            VmPlace::Vsock(it) if it.cid != CID_LOCAL && !is_guest_cid(it.cid) => {
                wrong("its CID is no guest's (3 to 4294967294)")
            }
            _ => Some(Ok(place)),
        }
    }

    /// Returns the identity of the VM; `None` if it stands for several.
    pub(crate) fn any(&self) -> Option<AnyVm> {
        self.guest_port(Port(0)).vm()
    }

    /// Returns the address at which a port of the guest is dialled.
    pub(crate) fn guest_port(&self, port: Port) -> Address {
        match self {
            VmPlace::Hyperkit(vm) => HyperkitAddress {
                vm: vm.clone(),
                port,
            }
            .into(),
            VmPlace::HyperV(vm) => HvsockAddress::new(vm.clone(), port).into(),
            VmPlace::Vsock(vm) => VsockAddress { port, ..vm.clone() }.into(),
            VmPlace::VsockMux(vm) => VsockMuxAddress { port, ..vm.clone() }.into(),
        }
    }

    /// Returns the address to listen on for the guest's dials to a port of the host.
    pub(crate) fn host_port(&self, port: Port) -> Address {
        match self {
            VmPlace::Vsock(vm) => VsockAddress {
                cid: CID_ANY,
                port,
                ..vm.clone()
            }
            .into(),
            _ => self.guest_port(port),
        }
    }

    /// Returns the sources to accept at [`host_port`](VmPlace::host_port), if guests of other VMs
    /// can dial it too.
    pub(crate) fn sources(&self) -> Vec<Source> {
        match self {
            VmPlace::Vsock(vm) => vec![Source::cid(vm.cid)],
            _ => Vec::new(),
        }
    }
}

/// Finds a VM by its name among those that these processes run.
#[cfg(unix)]
fn find_running(name: &str, processes: &[RunningProcess]) -> Option<Result<VmPlace>> {
    let mut uris: Vec<String> = vmms::find(processes)
        .into_iter()
        .filter(|it| it.name == name)
        .map(|it| it.vm)
        .collect();
    uris.sort();
    uris.dedup();
    match &uris[..] {
        [] => None,
        [uri] => VmPlace::parse(uri),
        several => {
            let why = format!("{} have this name", several.join(" and "));
            Some(Err(
                invalid(name, &why).with_remedy("give one of these instead of the name")
            ))
        }
    }
}

fn invalid(name: &str, why: &str) -> Error {
    let cause = io::Error::new(io::ErrorKind::InvalidInput, why.to_owned());
    Error::new(Operation::Find, format_args!("VM {name:?}"), cause)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_of_any_family_has_its_ports() {
        for (vm, guest_port, host_port) in [
            ("vsock://3", "vsock://3:80", "vsock://:80"),
            (
                "vsock://3?framing=yes",
                "vsock://3:80?framing=yes",
                "vsock://:80?framing=yes",
            ),
            (
                "vsock-mux:///run/fc.sock",
                "vsock-mux://:80/run/fc.sock",
                "vsock-mux://:80/run/fc.sock",
            ),
            (
                "vsock-mux:///a%20b?half-close=yes",
                "vsock-mux://:80/a%20b?half-close=yes",
                "vsock-mux://:80/a%20b?half-close=yes",
            ),
        ] {
            let place = VmPlace::parse(vm).unwrap().unwrap();
            assert_eq!(place.guest_port(Port(80)).to_string(), guest_port, "{vm}");
            assert_eq!(place.host_port(Port(80)).to_string(), host_port, "{vm}");
            // All guests of a host dial the same ports of it.
            let only = vm.starts_with("vsock://").then_some(Source::cid(3));
            assert_eq!(place.sources(), Vec::from_iter(only), "{vm}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_vm_that_runs_here_is_found_by_its_name() {
        let qemu = |id, name: &str, cid: u32| {
            let device = format!("vhost-vsock-pci,guest-cid={cid}");
            let command = ["qemu-system-x86_64", "-name", name, "-device", &device];
            RunningProcess {
                id,
                command: command.map(str::to_owned).to_vec(),
            }
        };
        let running = [qemu(7, "build", 3), qemu(8, "two", 4), qemu(9, "two", 5)];
        let find = |name| find_running(name, &running);
        let found = find("build").unwrap().unwrap();
        assert_eq!(found.any(), Some(AnyVm::Vsock(3)));
        assert!(find("bui").is_none());
        let error = find("two").unwrap().unwrap_err();
        let both = "vsock://4 and vsock://5 have this name";
        assert!(error.to_string().contains(both), "{error}");
        // A VM that is listed twice is no conflict.
        let twice = [qemu(7, "build", 3), qemu(8, "build", 3)];
        assert!(find_running("build", &twice).unwrap().is_ok());
    }

    #[test]
    fn what_is_no_vm_is_told_with_a_right_one() {
        for (vm, part) in [
            ("vsock://3:80", "names a port"),
            ("vsock://2", "no guest's"),
            ("vsock://", "no guest's"),
            ("vsock://x", "neither a number"),
            ("vsock://3/path", "path"),
            ("vsock-mux://", "missing"),
            ("vsock-mux://:80/run/fc.sock", "names a port"),
            ("vsock-mux://3/run/fc.sock", "one VM's"),
            ("vsock-mux:///run/fc.sock?half=yes", "unknown"),
        ] {
            let error = VmPlace::parse(vm).unwrap().unwrap_err();
            assert!(error.to_string().contains(part), "{vm}: {error}");
            assert!(error.remedy().unwrap().starts_with("write vsock"), "{vm}");
        }
        for other in ["docker", "hyperkit:///x", "./vsock", "tcp://x:1"] {
            assert!(VmPlace::parse(other).is_none(), "{other}");
        }
    }
}
