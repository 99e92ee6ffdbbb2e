//! Windows' register of services: what a Hyper-V guest may dial has to be in it once.
//!
//! It is the key `GuestCommunicationServices` in the registry's
//! `HKEY_LOCAL_MACHINE\SOFTWARE\Microsoft\Windows NT\CurrentVersion\Virtualization`. Every service
//! has a key in it, named by its GUID, without braces, with the value `ElementName` (Microsoft's
//! "Make your own integration services"). What is in it outlasts programs and restarts. On systems
//! other than Windows every call fails with `Unsupported`: AF_VSOCK and hyperkit have no such
//! register.

#[cfg(windows)]
mod registry;
#[cfg(not(windows))]
#[path = "no_registry.rs"]
mod registry;

use std::fmt;
use std::io;

use crate::address::{Port, ServiceId};
use crate::error::{Error, Operation, Result};

/// The name of a service that is registered without one.
pub const DEFAULT_NAME: &str = "hvsock";

/// A registered service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its id, by which guests and hosts dial it.
    pub id: ServiceId,
    /// Its name (`ElementName`); empty if it has none.
    pub name: String,
}

/// What [`register`] has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Registration {
    /// The service is registered now, and wasn't before.
    New,
    /// It was registered already, by this other name.
    Renamed(String),
    /// It was registered already, and nothing was written.
    Unchanged,
}

/// Registers a service, so that Hyper-V lets guests dial it, or changes the name of a registered
/// one. Without a name a new service is named [`DEFAULT_NAME`], and a registered one keeps its
/// name. Returns the service as it is registered now, and what was done.
///
/// Only a change needs an Administrator's rights: any user may register what is registered as
/// asked.
///
/// # Errors
/// `PermissionDenied` without these rights; `Unsupported` on systems other than Windows; what the
/// registry says.
pub fn register(id: ServiceId, name: Option<&str>) -> Result<(Service, Registration)> {
    let service = |name: &str| Service {
        id,
        name: name.to_owned(),
    };
    let done = match (registry::name(id), name) {
        (Ok(old), None) => Ok((service(&old), Registration::Unchanged)),
        (Ok(old), Some(name)) if old == name => Ok((service(name), Registration::Unchanged)),
        (Ok(old), Some(name)) => {
            registry::write(id, name).map(|()| (service(name), Registration::Renamed(old)))
        }
        (Err(e), _) if e.kind() == io::ErrorKind::NotFound => {
            let name = name.unwrap_or(DEFAULT_NAME);
            registry::write(id, name).map(|()| (service(name), Registration::New))
        }
        (Err(e), _) => Err(e),
    };
    done.map_err(|e| explain(Operation::Register, id, e))
}

/// Removes a service from the register, so that guests can't dial it any more. Returns it as it
/// was.
///
/// # Errors
/// `NotFound` if it isn't registered; `PermissionDenied` without an Administrator's rights;
/// `Unsupported` on systems other than Windows; what the registry says.
pub fn unregister(id: ServiceId) -> Result<Service> {
    registry::name(id)
        .and_then(|name| registry::remove(id).map(|()| Service { id, name }))
        .map_err(|e| explain(Operation::Unregister, id, e))
}

/// Returns the registered services, by their GUIDs, which sorts those of vsock ports by port. Keys
/// that are no GUID are left out.
///
/// # Errors
/// `Unsupported` on systems other than Windows; what the registry says.
pub fn list() -> Result<Vec<Service>> {
    let found = registry::list()
        .map_err(|e| Error::new(Operation::List, "Hyper-V's registered services", e))?;
    let mut services: Vec<Service> = found
        .into_iter()
        .map(|(id, name)| Service { id, name })
        .collect();
    services.sort_by_key(|service| service.id.0);
    Ok(services)
}

/// Prints a service for people: `service 5000 (0x1388)`, `service 3049197c-…`.
pub(crate) struct Named(pub(crate) ServiceId);

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.port() {
            Some(port) => write!(f, "service {port}"),
            None => write!(f, "service {}", self.0),
        }
    }
}

fn explain(operation: Operation, id: ServiceId, cause: io::Error) -> Error {
    let word = match operation {
        Operation::Unregister => "unregister",
        _ => "register",
    };
    let named = match id.port() {
        Some(Port(port)) => port.to_string(),
        None => id.to_string(),
    };
    let remedy = match (operation, cause.kind()) {
        (_, io::ErrorKind::PermissionDenied) => format!(
            "run `hvsock {word} {named}` once as Administrator; who dials or listens afterwards needs no such rights"
        ),
        (Operation::Unregister, io::ErrorKind::NotFound) => {
            let cause = io::Error::new(io::ErrorKind::NotFound, "it isn't registered");
            return Error::new(operation, Named(id), cause)
                .with_remedy("`hvsock services` shows what is");
        }
        _ => return Error::new(operation, Named(id), cause),
    };
    Error::new(operation, Named(id), cause).with_remedy(remedy)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const GUID: ServiceId = ServiceId(uuid::uuid!("3049197c-9a4e-4fbf-9367-97f792f16994"));

    #[test]
    fn without_rights_the_remedy_is_a_line_to_run_as_administrator() {
        let denied = || io::Error::from(io::ErrorKind::PermissionDenied);
        let port = explain(
            Operation::Register,
            ServiceId::from_port(Port(5000)),
            denied(),
        );
        assert_eq!(port.kind(), io::ErrorKind::PermissionDenied);
        let said = port.to_string();
        assert!(
            said.starts_with("cannot register service 5000 (0x1388): "),
            "{said}"
        );
        assert!(
            said.contains("run `hvsock register 5000` once as Administrator"),
            "{said}"
        );
        let guid = explain(Operation::Unregister, GUID, denied()).to_string();
        assert!(
            guid.contains("`hvsock unregister 3049197c-9a4e-4fbf-9367-97f792f16994`"),
            "{guid}"
        );
    }

    /// `ERROR_ACCESS_DENIED`, as the registry says it.
    #[cfg(windows)]
    #[test]
    fn the_registrys_own_error_is_known_as_one_of_rights() {
        let error = explain(Operation::Register, GUID, io::Error::from_raw_os_error(5));
        assert!(error.remedy().unwrap().contains("as Administrator"));
    }

    #[test]
    fn what_is_not_there_is_told_without_the_systems_own_words() {
        let cause = io::Error::from_raw_os_error(2);
        let error = explain(Operation::Unregister, GUID, cause);
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(
            error.to_string(),
            "cannot unregister service 3049197c-9a4e-4fbf-9367-97f792f16994: it isn't registered; `hvsock services` shows what is"
        );
    }

    #[cfg(not(windows))]
    #[test]
    fn other_systems_have_no_register() {
        let errors = [
            register(GUID, None).unwrap_err(),
            unregister(GUID).unwrap_err(),
            list().unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.kind(), io::ErrorKind::Unsupported);
            assert!(error.to_string().contains("only Windows"), "{error}");
        }
    }
}
