//! `hvsock://VM/SERVICE`, the addresses of Windows' `AF_HYPERV`.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

use super::port::parse_u32;
use super::uri::{self, Uri};
use super::vsock::FRAMING;
use super::{AddressError, Part, Port};

/// The id of a VM, or one of the well-known ids that stand for several partitions.
///
/// The constants are the `HV_GUID_*` of the Windows SDK's `hvsocket.h`, described in Microsoft's
/// "Make your own integration services".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VmId(pub Uuid);

impl VmId {
    /// Listening: connections from any partition (`HV_GUID_ZERO`, also `HV_GUID_WILDCARD`).
    pub const WILDCARD: VmId = VmId(Uuid::nil());
    /// Every partition (`HV_GUID_BROADCAST`).
    pub const BROADCAST: VmId = VmId(Uuid::max());
    /// Listening: connections from this partition's children (`HV_GUID_CHILDREN`).
    pub const CHILDREN: VmId = VmId(Uuid::from_u128(0x90db8b89_0d35_4f79_8ce9_49ea0ac8b7cd));
    /// This same partition (`HV_GUID_LOOPBACK`).
    pub const LOOPBACK: VmId = VmId(Uuid::from_u128(0xe0e16197_dd56_4a10_9195_5ee7a155a838));
    /// The partition above: a VM's host (`HV_GUID_PARENT`).
    pub const PARENT: VmId = VmId(Uuid::from_u128(0xa42e7cda_d03f_480c_9cc2_a4de20abb878));
    /// The host of this container's silo (`HV_GUID_SILOHOST`).
    pub const SILOHOST: VmId = VmId(Uuid::from_u128(0x36bd0c5c_7276_4223_88ba_7d03b654c568));

    const NAMES: [(&'static str, VmId); 6] = [
        ("", VmId::WILDCARD),
        ("broadcast", VmId::BROADCAST),
        ("children", VmId::CHILDREN),
        ("loopback", VmId::LOOPBACK),
        ("parent", VmId::PARENT),
        ("silohost", VmId::SILOHOST),
    ];

    /// Parses the name of an id (`parent`, …; empty for the wildcard) or a GUID.
    fn parse(text: &str) -> Option<VmId> {
        VmId::NAMES
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(text))
            .map(|(_, id)| *id)
            .or_else(|| parse_guid(text).map(VmId))
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which VM an [`HvsockAddress`] means.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Vm {
    /// By its id, or by a well-known one.
    Id(VmId),
    /// By the name that Hyper-V's manager shows, never empty; its id is looked up when it is
    /// dialled ([`hyperv::find`](crate::hyperv::find)).
    Name(String),
}

impl Vm {
    /// Returns whether it is one VM, and none of the well-known ids that stand for others.
    pub(crate) fn is_single(&self) -> bool {
        match self {
            Vm::Id(id) => VmId::NAMES.iter().all(|(_, known)| known != id),
            Vm::Name(_) => true,
        }
    }
}

#[cfg(feature = "cli")]
impl Vm {
    /// Parses what a person calls a VM: an id, the name of a well-known one, or a VM's name.
    /// Returns `None` if it can't be one.
    pub(crate) fn parse(text: &str) -> Option<Vm> {
        match VmId::parse(text) {
            // The wildcard is for listening only.
            _ if text.is_empty() || text.contains('\0') => None,
            Some(id) => Some(Vm::Id(id)),
            None => Some(Vm::Name(text.to_owned())),
        }
    }
}

impl fmt::Display for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Vm::Id(id) => match VmId::NAMES.iter().find(|(_, known)| known == id) {
                Some((name, _)) => f.write_str(name),
                None => id.fmt(f),
            },
            Vm::Name(name) if VmId::parse(name).is_some() => uri::write_guarded_name(f, name),
            Vm::Name(name) => uri::encode_name(name.as_bytes()).fmt(f),
        }
    }
}

/// The id of a service that a program registers or connects to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ServiceId(pub Uuid);

impl ServiceId {
    /// The ids that stand for vsock ports of a Linux guest, `PPPPPPPP-facb-11e6-bd58-64006a7986d3`
    /// (`HV_GUID_VSOCK_TEMPLATE`; Linux' `net/vmw_vsock/hyperv_transport.c`): here the one of port
    /// 0.
    pub const VSOCK_TEMPLATE: ServiceId =
        ServiceId(Uuid::from_u128(0x00000000_facb_11e6_bd58_64006a7986d3));

    /// Returns the service id of a vsock port: the template with the port as its first 32 bits.
    pub const fn from_port(port: Port) -> ServiceId {
        ServiceId(Uuid::from_u128(
            ServiceId::VSOCK_TEMPLATE.0.as_u128() | (port.0 as u128) << 96,
        ))
    }

    /// Returns the vsock port that this id stands for, if it is of the template.
    pub fn port(self) -> Option<Port> {
        let port = Port(self.0.as_fields().0);
        (ServiceId::from_port(port) == self).then_some(port)
    }
}

impl From<Port> for ServiceId {
    fn from(port: Port) -> ServiceId {
        ServiceId::from_port(port)
    }
}

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port() {
            Some(Port(port)) => port.fmt(f),
            None => self.0.fmt(f),
        }
    }
}

/// An address of Windows' `AF_HYPERV`: `hvsock://VM/SERVICE`.
///
/// The VM is a GUID, nothing for the wildcard, `parent`, `children`, `loopback`, `broadcast`,
/// `silohost`, or a VM's name, percent-encoded where it could be taken for one of these. The
/// service is a GUID, or a vsock port for [`ServiceId::from_port`].
///
/// `?connected-suspend=yes` and `?container-passthru=yes` set options of the socket: those that are
/// dialled, those that listen, and those that are accepted. `?framing=yes` speaks in the frames of
/// [`framing`](crate::framing).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HvsockAddress {
    /// Which VM, or which partitions.
    pub vm: Vm,
    /// Which service there.
    pub service: ServiceId,
    /// The connection outlives a pause of its VM (`HVSOCKET_CONNECTED_SUSPEND`); otherwise it ends
    /// with it.
    pub connected_suspend: bool,
    /// A VM's id means the container in that VM (`HVSOCKET_CONTAINER_PASSTHRU`), as for Hyper-V
    /// isolated containers.
    pub container_passthru: bool,
    /// The peer speaks in frames ([`framing`](crate::framing)).
    pub framing: bool,
}

impl HvsockAddress {
    /// Makes the address of a service, or of the vsock port that stands for it, with no option set.
    pub fn new(vm: Vm, service: impl Into<ServiceId>) -> HvsockAddress {
        HvsockAddress {
            vm,
            service: service.into(),
            connected_suspend: false,
            container_passthru: false,
            framing: false,
        }
    }
}

const CONNECTED_SUSPEND: &str = "connected-suspend";
const CONTAINER_PASSTHRU: &str = "container-passthru";

impl fmt::Display for HvsockAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hvsock://{}/{}", self.vm, self.service)?;
        let options = [
            (CONNECTED_SUSPEND, self.connected_suspend.then_some("yes")),
            (CONTAINER_PASSTHRU, self.container_passthru.then_some("yes")),
            (FRAMING, self.framing.then_some("yes")),
        ];
        uri::write_query(f, &options)
    }
}

impl FromStr for HvsockAddress {
    type Err = AddressError;

    fn from_str(input: &str) -> Result<HvsockAddress, AddressError> {
        let uri = Uri::parse(input, "hvsock", "hvsock://parent/1024")?;
        let vm = match VmId::parse(uri.authority) {
            Some(id) => Vm::Id(id),
            None => Vm::Name(uri.name(Part::Vm, uri.authority)?),
        };
        let service = uri.path.strip_prefix('/').unwrap_or("");
        let service = service.strip_suffix('/').unwrap_or(service);
        let id = parse_service(service);
        let id = id.map_err(|reason| uri.error(Part::Service, service, reason))?;
        let mut address = HvsockAddress::new(vm, id);
        for (key, value) in uri.query(&[CONNECTED_SUSPEND, CONTAINER_PASSTHRU, FRAMING])? {
            let value = uri.yes_or_no(key, &value)?;
            match key {
                CONNECTED_SUSPEND => address.connected_suspend = value,
                CONTAINER_PASSTHRU => address.container_passthru = value,
                _ => address.framing = value,
            }
        }
        Ok(address)
    }
}

/// Parses a service: a GUID, or a vsock port. Returns why it is neither.
pub(crate) fn parse_service(text: &str) -> Result<ServiceId, String> {
    if let Some(id) = parse_guid(text) {
        return Ok(ServiceId(id));
    }
    parse_u32(text)
        .map(|port| ServiceId::from_port(Port(port)))
        .map_err(|reason| {
            if reason.starts_with("is not a number") {
                "is neither a GUID nor a port".to_owned()
            } else {
                reason
            }
        })
}

/// Parses a GUID as Windows prints it, with or without braces. Other notations of UUIDs could be a
/// VM's name.
pub(crate) fn parse_guid(text: &str) -> Option<Uuid> {
    let braced = text
        .strip_prefix('{')
        .and_then(|text| text.strip_suffix('}'));
    let text = braced.unwrap_or(text);
    (text.len() == uuid::fmt::Hyphenated::LENGTH)
        .then(|| Uuid::try_parse(text).ok())
        .flatten()
}
