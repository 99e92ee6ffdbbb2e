//! The register of services in Windows' registry.

use std::io;

use winreg::enums::{DELETE, KEY_READ, KEY_WOW64_64KEY, KEY_WRITE};
use winreg::{HKLM, RegKey};

use crate::address::{ServiceId, parse_guid};

const SERVICES: &str =
    r"SOFTWARE\Microsoft\Windows NT\CurrentVersion\Virtualization\GuestCommunicationServices";

/// The value that has a service's name.
const NAME: &str = "ElementName";

// Hyper-V reads the 64-bit view, which a 32-bit program doesn't see unless it asks for it.
const READ: u32 = KEY_READ | KEY_WOW64_64KEY;
const WRITE: u32 = KEY_READ | KEY_WRITE | KEY_WOW64_64KEY;

fn key_of(id: ServiceId) -> String {
    format!(r"{SERVICES}\{}", id.0)
}

fn name_in(key: &RegKey) -> io::Result<String> {
    match key.get_value(NAME) {
        // It has no name, or one that is no text.
        Err(e) if e.kind() != io::ErrorKind::PermissionDenied => Ok(String::new()),
        name => name,
    }
}

/// Returns the name of a service; `NotFound` if there is no such service.
pub(super) fn name(id: ServiceId) -> io::Result<String> {
    name_in(&HKLM.open_subkey_with_flags(key_of(id), READ)?)
}

/// Registers the service, if it isn't registered, and sets its name.
pub(super) fn write(id: ServiceId, name: &str) -> io::Result<()> {
    let (key, _) = HKLM.create_subkey_with_flags(key_of(id), WRITE)?;
    key.set_value(NAME, &name)
}

pub(super) fn remove(id: ServiceId) -> io::Result<()> {
    // Its subkeys too: a key with subkeys isn't deleted otherwise.
    HKLM.open_subkey_with_flags(SERVICES, WRITE | DELETE)?
        .delete_subkey_all(id.0.to_string())
}

/// Returns the services, each with its name.
pub(super) fn list() -> io::Result<Vec<(ServiceId, String)>> {
    let services = match HKLM.open_subkey_with_flags(SERVICES, READ) {
        // Hyper-V was never installed.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        services => services?,
    };
    let mut found = Vec::new();
    for key in services.enum_keys() {
        let key = key?;
        let plain = parse_guid(&key).filter(|_| !key.starts_with('{'));
        let Some(id) = plain.map(ServiceId) else {
            continue;
        };
        let name = services
            .open_subkey_with_flags(&key, READ)
            .and_then(|key| name_in(&key));
        match name {
            Ok(name) => found.push((id, name)),
            // It has just been removed.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}
