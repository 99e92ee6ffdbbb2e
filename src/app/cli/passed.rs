//! Sockets that a service manager has bound and passed (systemd's `sd_listen_fds(3)`).

use std::collections::HashSet;
#[cfg(unix)]
use std::env;
use std::io;
#[cfg(unix)]
use std::os::fd::RawFd;

#[cfg(unix)]
use super::occupant::Occupants;
use super::outcome::Failure;
use crate::address::{Address, TcpAddress};
use crate::app::ranges::TAKEN_IN_RANGE;
use crate::error::{Error, Operation};
#[cfg(unix)]
use crate::listener::Listener;
use crate::proxy::{Proxy, ProxyConfig};
#[cfg(unix)]
use crate::sys;

/// Starts a proxy. Rules whose address was passed by a service manager get the passed socket.
pub(super) fn start(config: ProxyConfig) -> Result<Proxy, Failure> {
    let config = on_passed_sockets(config)?;
    let listens: HashSet<Address> = config.rules.iter().map(|it| it.listen.clone()).collect();
    let started = Proxy::start(config).map_err(|e| mend_in_range(e, &listens));
    #[cfg(unix)]
    let started = started.map_err(|e| Occupants::default().name_in(e));
    Ok(started?)
}

/// Suggests another range as the remedy of a port in use, if it is a port of a range.
fn mend_in_range(error: Error, listens: &HashSet<Address>) -> Error {
    if error.operation() != Operation::Listen || error.kind() != io::ErrorKind::AddrInUse {
        return error;
    }
    let Ok(Address::Tcp(taken)) = error.subject().parse() else {
        return error;
    };
    let at = |port: u16| {
        Address::Tcp(TcpAddress {
            port,
            ..taken.clone()
        })
    };
    let neighbours = [taken.port.checked_sub(1), taken.port.checked_add(1)];
    let mut neighbours = neighbours.into_iter().flatten();
    match neighbours.any(|port| listens.contains(&at(port))) {
        true => error.with_remedy(TAKEN_IN_RANGE),
        false => error,
    }
}

/// Adds the sockets that a service manager has passed to the configuration. To be called once.
pub(super) fn on_passed_sockets(mut config: ProxyConfig) -> Result<ProxyConfig, Failure> {
    #[cfg(unix)]
    config.listeners.extend(listeners()?);
    // Other systems pass no sockets.
    let _ = &mut config;
    Ok(config)
}

/// The first passed descriptor (`SD_LISTEN_FDS_START`).
#[cfg(unix)]
const FIRST: RawFd = 3;

/// Takes the sockets that were passed to this process. To be called once.
///
/// The environment variables stay: they have this process' id, so no child can take the sockets for
/// its own.
///
/// # Errors
/// Returns a failure if a descriptor is not open, or is no listening stream socket. It is called by
/// its name in `LISTEN_FDNAMES`.
#[cfg(unix)]
fn listeners() -> Result<Vec<Listener>, Failure> {
    let ours = env::var("LISTEN_PID").is_ok_and(|pid| pid == std::process::id().to_string());
    let count = env::var("LISTEN_FDS").unwrap_or_default();
    if !ours || count.is_empty() {
        return Ok(Vec::new());
    }
    let count: u16 = count.parse().map_err(|_| {
        Failure::Failed(format!("LISTEN_FDS={count:?} is no number of descriptors"))
    })?;
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    let numbers = (FIRST..).take(count.into());
    let take = |number| {
        let name = names.next().unwrap_or_default();
        let named = |why: &dyn std::fmt::Display| {
            Failure::Failed(match name {
                "" | "unknown" => why.to_string(),
                name => format!("{why} (named {name:?})"),
            })
        };
        let socket = sys::take_over(number)
            .map_err(|e| named(&format_args!("LISTEN_FDS={count}, but {e}")))?;
        Listener::try_from(socket).map_err(|e| named(&e))
    };
    numbers.map(take).collect()
}
