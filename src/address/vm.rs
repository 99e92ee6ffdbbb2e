//! A VM of any family: what its addresses have in common.

use std::fmt;
use std::path::{Path, PathBuf};

use super::{Address, HyperkitVm, PORT_ANY, VsockMuxAddress, uri};

/// A VM of any family, by what tells it from others. No port and no option of an address is part of
/// it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AnyVm {
    /// A hyperkit VM, by its state directory; its CID does not matter.
    Hyperkit(HyperkitVm),
    /// A guest of this Linux host, by its CID; or the host itself by
    /// [`CID_LOCAL`](super::CID_LOCAL).
    Vsock(u32),
    /// A VM behind the Unix socket of its VMM, by the socket's path.
    VsockMux(PathBuf),
    /// A Hyper-V VM, by its id or its name.
    Hvsock(super::Vm),
}

impl AnyVm {
    /// Returns the directory of the files that tell of it; an empty path if there are none.
    pub(crate) fn directory(&self) -> &Path {
        match self {
            AnyVm::Hyperkit(vm) => &vm.state_dir,
            AnyVm::VsockMux(path) => path.parent().unwrap_or(Path::new("")),
            AnyVm::Vsock(_) | AnyVm::Hvsock(_) => Path::new(""),
        }
    }

    /// Returns the file or directory that it is known by; `None` if there is none.
    #[cfg(all(test, target_os = "linux"))]
    pub(crate) fn path(&self) -> Option<&Path> {
        match self {
            AnyVm::Hyperkit(vm) => Some(&vm.state_dir),
            AnyVm::VsockMux(path) => Some(path),
            AnyVm::Vsock(_) | AnyVm::Hvsock(_) => None,
        }
    }

    /// Returns the address of a port of which the guest's kernel refuses every dial, since nothing
    /// can listen there; `None` if no such dial is made in its family.
    pub(crate) fn probe_address(&self) -> Option<Address> {
        match self {
            AnyVm::Hyperkit(vm) => Some(vm.probe_address().into()),
            AnyVm::VsockMux(path) => Some(Address::VsockMux(VsockMuxAddress {
                path: path.clone(),
                port: PORT_ANY,
                half_close: false,
            })),
            AnyVm::Vsock(_) | AnyVm::Hvsock(_) => None,
        }
    }
}

impl From<HyperkitVm> for AnyVm {
    fn from(vm: HyperkitVm) -> AnyVm {
        AnyVm::Hyperkit(vm)
    }
}

impl From<VsockMuxAddress> for AnyVm {
    fn from(address: VsockMuxAddress) -> AnyVm {
        AnyVm::VsockMux(address.path)
    }
}

/// Writes it as `--vm` takes it: a state directory, `vsock://3`, `vsock-mux:///run/vm.sock`, the id
/// or name of a Hyper-V VM.
impl fmt::Display for AnyVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AnyVm::Hyperkit(vm) => vm.state_dir.display().fmt(f),
            AnyVm::Vsock(cid) => write!(f, "vsock://{cid}"),
            AnyVm::VsockMux(path) => {
                f.write_str("vsock-mux://")?;
                uri::write_file(f, path)
            }
            AnyVm::Hvsock(vm) => vm.fmt(f),
        }
    }
}
