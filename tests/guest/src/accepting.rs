//! Checks of accepting on AF_VSOCK, which an event loop does until no client waits.

use std::error::Error;
use std::fs;
use std::io::ErrorKind;
use std::time::Duration;

use crate::report::{Outcome, ensure, eventually};
use crate::sockets::connect_vsock;

/// Checks that accepting never sleeps. Linux 6.1's accept sleeps until the next tick if no client
/// waits, non-blocking or not, so the listener doesn't call it then. Sleeps are counted and not
/// timed, since the emulated machine may be slow.
pub(crate) fn finds_nobody_without_sleeping() -> Outcome {
    const TRIES: u64 = 200;
    let listener = hvsock::mio::Listener::bind(&"vsock://:7020".parse()?)?;
    let before = sleeps()?;
    for _ in 0..TRIES {
        let found = listener.accept().map_err(|e| e.kind());
        ensure!(
            matches!(found, Err(ErrorKind::WouldBlock)),
            "it found {found:?}"
        );
    }
    let slept = sleeps()? - before;
    ensure!(slept < TRIES / 10, "{TRIES} accepts slept {slept} times");
    let _client = connect_vsock(7020)?;
    let accepted = eventually(Duration::from_secs(5), || listener.accept().is_ok());
    ensure!(accepted, "it doesn't find who is there");
    Ok(())
}

/// Returns how often this thread has given up the processor to wait.
fn sleeps() -> Result<u64, Box<dyn Error + Send + Sync>> {
    let status = fs::read_to_string("/proc/thread-self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    Ok(line.ok_or("the kernel doesn't tell")?.trim().parse()?)
}
