//! A VM as Hyper-V lists it.

use crate::address::VmId;

/// A VM of Hyper-V.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The name that Hyper-V's manager shows. Several VMs may have the same one, and there may be
    /// any character in it.
    pub name: String,
    /// Its id, by which it is dialled.
    pub id: VmId,
    /// What Hyper-V says of it (`Microsoft.HyperV.PowerShell.VMState`): `Running`, `Off`, `Saved`,
    /// …
    pub state: String,
}
