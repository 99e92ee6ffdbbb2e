//! Checks the target of a forward on which a guest dials the host.

use std::io;
use std::path::Path;
use std::time::Duration;

use super::carriers::Hvsocks;
use super::check::Check;
use crate::address::{Address, HyperkitVm, Port, UnixAddress};
use crate::app::control::ForwardInfo;
use crate::stream::Stream;
use crate::sys;

/// How long a TCP target may take to be connected.
const PATIENCE: Duration = Duration::from_secs(2);

/// Checks the target of the forward for the guest's dials to `port`. A TCP target is connected to,
/// a Unix socket is inspected, and for others the last refusal is shown. Returns `None` if no asked
/// hvsock has such a forward.
pub(super) fn examine(name: &str, vm: &HyperkitVm, port: Port, hvsocks: &Hvsocks) -> Option<Check> {
    let forward = hvsocks.forward(|it| is_dialled(it, vm, port))?;
    let target = &forward.connect;
    let seen = format!("is listened on, and leads to {target}");
    let remedy = format!("start what should listen on {target}");
    let last_error = forward.last_error.as_ref();
    let last_error = last_error.filter(|it| it.connected_since == 0);
    Some(match (look_at(target), last_error) {
        (Some(Ok(())), _) | (None, None) => Check::ok(name, seen),
        (Some(Err(e)), _) => Check::failed(name, format_args!("{seen}: {e}"), &remedy),
        (None, Some(error)) => Check::warning(
            name,
            format_args!("{seen}; the last one refused: {}", error.text),
            &remedy,
        ),
    })
}

fn is_dialled(forward: &ForwardInfo, vm: &HyperkitVm, port: Port) -> bool {
    let Ok(listen) = forward.listen.parse::<Address>() else {
        return false;
    };
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let is_of_vm = |it: &HyperkitVm| real(&it.state_dir) == real(&vm.state_dir);
    listen.guest_port() == Some(port) && listen.hyperkit_vm().is_some_and(is_of_vm)
}

/// Returns whether a target accepts connections, as far as that can be found out without disturbing
/// it. `None` if it can't.
fn look_at(target: &str) -> Option<io::Result<()>> {
    match target.parse().ok()? {
        address @ Address::Tcp(_) => {
            let connected = Stream::connect_timeout(&address, PATIENCE);
            Some(connected.map(drop).map_err(|e| {
                let cause = e.cause();
                io::Error::new(cause.kind(), cause.to_string())
            }))
        }
        Address::Unix(UnixAddress::Path(path)) if path.is_absolute() => {
            Some(match sys::is_socket_alive(&path) {
                Ok(true) => Ok(()),
                Ok(false) => Err(io::Error::other("nobody listens there")),
                Err(e) => Err(e),
            })
        }
        _ => None,
    }
}
