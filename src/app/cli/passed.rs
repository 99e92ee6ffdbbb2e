//! Sockets that a service manager has bound for us (systemd's `sd_listen_fds(3)`).

use std::env;
use std::os::fd::RawFd;

use super::Failure;
use crate::listener::Listener;
use crate::sys;

/// The first descriptor that is passed (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;

/// The sockets that were passed. To be called once: they are taken over.
///
/// The variables stay as they are: they name this process, so that no child could take them for its own.
///
/// # Errors
/// That one isn't there, or no listening stream socket; it is called by its name in `LISTEN_FDNAMES`.
pub(super) fn listeners() -> Result<Vec<Listener>, Failure> {
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
