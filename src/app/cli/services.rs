//! `hvsock register`, `unregister`, `services`: change and list the services in Windows' registry
//! that Hyper-V guests may dial.

use std::io::ErrorKind;

use clap::Args;

use super::console::{print, print_text, say};
use super::outcome::{Failure, Outcome};
use super::table;
use crate::address::{ServiceId, parse_service};
use crate::services::{self, Named, Registration, Service};

/// Let Hyper-V guests dial a service of this host (Windows, once, as Administrator)
#[derive(Args, Debug)]
#[command(
    after_help = "It is entered into the registry, in HKEY_LOCAL_MACHINE\\SOFTWARE\\Microsoft\\Windows NT\\\
    CurrentVersion\\Virtualization\\GuestCommunicationServices, and stays there until `hvsock unregister`. \
    Registering it again is no error; with another --name it is renamed.

Examples:
  hvsock register 5000
  hvsock register 3049197C-9A4E-4FBF-9367-97F792F16994 --name \"My service\""
)]
pub(super) struct RegisterArgs {
    /// The service's GUID, or the vsock port that a Linux guest dials
    #[arg(value_name = "GUID|PORT", value_parser = parse_service)]
    service: ServiceId,
    /// What people are to know it by [default: hvsock]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

/// Let Hyper-V guests dial a service no longer (Windows, as Administrator)
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  hvsock unregister 5000")]
pub(super) struct UnregisterArgs {
    /// The service's GUID, or its vsock port
    #[arg(value_name = "GUID|PORT", value_parser = parse_service)]
    service: ServiceId,
}

/// List the services that Hyper-V guests may dial (Windows)
#[derive(Args, Debug)]
#[command(
    after_help = "Those of Windows itself are among them. PORT is the vsock port that a Linux guest dials.

Example:
  hvsock services"
)]
pub(super) struct ServicesArgs {}

impl RegisterArgs {
    pub(super) fn run(self) -> Outcome {
        say(register(self.service, self.name.as_deref())?);
        Ok(())
    }
}

/// Registers a service. Returns a message.
pub(super) fn register(id: ServiceId, name: Option<&str>) -> Result<String, Failure> {
    let (service, done) = services::register(id, name).map_err(failure)?;
    let (id, name) = (Named(id), service.name);
    Ok(match done {
        Registration::New => format!("registered {id} as {name:?}"),
        Registration::Renamed(old) => format!("renamed {id} from {old:?} to {name:?}"),
        Registration::Unchanged => format!("{id} is registered already, as {name:?}"),
    })
}

impl UnregisterArgs {
    pub(super) fn run(self) -> Outcome {
        let Service { id, name } = services::unregister(self.service).map_err(failure)?;
        say(format_args!("unregistered {}, {name:?}", Named(id)));
        Ok(())
    }
}

impl ServicesArgs {
    pub(super) fn run(self) -> Outcome {
        let services = services::list().map_err(failure)?;
        if services.is_empty() {
            return print("no service is registered; `hvsock register PORT` registers one");
        }
        let rows = services.into_iter().map(|Service { id, name }| {
            let port = id.port().map_or(String::new(), |port| port.to_string());
            [id.0.to_string(), port, name]
        });
        print_text(table::of(["SERVICE", "PORT", "NAME"], rows))
    }
}

/// Returns the failure for an error: of usage where only Windows has such services.
fn failure(error: crate::Error) -> Failure {
    match error.kind() {
        ErrorKind::Unsupported => Failure::Usage(error.to_string()),
        _ => error.into(),
    }
}
