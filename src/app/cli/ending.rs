//! Runs a proxy until it is told to end, and ends the process even if something hangs.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use tracing::info;

use super::console::complain;
use super::manager::Manager;
use super::options::ProxyOptions;
use super::outcome::Outcome;
use super::signals::{EndSignals, SignalRequest};
use crate::address::Address;
use crate::app::log;
use crate::app::lossy_writer::{Patience, set_patience};
use crate::app::output;
use crate::error::counted_have;
use crate::proxy::{ForwardStatus, Handle, Proxy};
use crate::thread::start_thread;

/// Runs a proxy until one of the [`EndSignals`], a failure or its idle timeout ends it.
pub(super) fn run_proxy(proxy: Proxy, options: &ProxyOptions, signals: EndSignals) -> Outcome {
    let grace = options.grace();
    let end = ProcessEnd {
        grace: move || grace,
        exit_idle: options.exit_idle(),
    };
    run_until_told(proxy, signals, end, || {})
}

/// The conditions under which a process ends.
pub(super) struct ProcessEnd<G> {
    /// Returns how long connections may take to finish; called when the end begins.
    pub(super) grace: G,
    /// How long the process may be without a connection before it ends. `None`: for ever.
    pub(super) exit_idle: Option<Duration>,
}

/// How long the last log lines may take once the proxy has ended: their reader may hang.
const LAST_DELIVERY: Duration = Duration::from_secs(1);

/// Ends the process some time after that grace, if it has not ended by itself. A worker that looks
/// up a socket's path on a hanging disk never ends, nor does a stress run that waits for its
/// report's reader.
pub(super) fn end_without_what_hangs(grace: Duration) {
    /// The longest time that a proxy takes at its end, to close guests' connections and to remove
    /// its files.
    const END: Duration = Duration::from_secs(12);
    let end = move || {
        std::thread::sleep(grace.saturating_add(END));
        set_patience(Patience::Limited);
        complain("something hangs: ending without it");
        output::flush();
        std::process::exit(1);
    };
    if let Err(e) = start_thread("hvsock-end", "to end without what hangs", end) {
        let process = std::process::id();
        complain(format_args!(
            "{e}. If it hangs now, end it: kill -KILL {process}"
        ));
    }
}

/// Returns a status line for the end of `live` connections.
fn describe_end(live: usize, grace: Duration) -> String {
    if live == 0 {
        return "stopping".to_owned();
    }
    let (have, seconds) = (counted_have(live as u64, "connection"), grace.as_secs());
    format!("stopping: no new clients; {have} {seconds} s to finish")
}

/// Tells the service manager that the control socket was asked to end the process.
#[cfg(unix)]
pub(super) fn tell_manager_of_end(live: usize, grace: Duration) {
    Manager::stopping(describe_end(live, grace));
}

/// Begins the end, and reports why.
fn begin_to_end(handle: &Handle, grace: Duration, status: String) {
    // Report only after it has begun.
    handle.stop(grace);
    end_without_what_hangs(grace);
    complain(&status);
    Manager::stopping(status);
}

/// Begins the end when there has been no connection for `limit`. Returns earlier if the proxy has
/// ended, which drops the sender of `over`.
///
/// It never ends a proxy that serves a port which a hyperkit guest dials: an unserved port may hang
/// the VM, and the keeper that would accept there starts no program.
fn end_when_idle(
    handle: &Handle,
    limit: Duration,
    grace: impl Fn() -> Duration,
    over: &Receiver<()>,
) {
    let mut complained = false;
    let mut left = limit;
    while over.recv_timeout(left) == Err(RecvTimeoutError::Timeout) && !handle.is_stopping() {
        left = match handle.idle_for() {
            // The limit can't be reached earlier.
            None => limit,
            Some(idle) => limit.saturating_sub(idle),
        };
        if !left.is_zero() {
            continue;
        }
        let forwards = handle.forwards();
        let dialled = |listen: &&Address| matches!(listen, Address::Hyperkit(_));
        let Some(port) = forwards.iter().map(|it| &it.listen).find(dialled) else {
            let seconds = limit.as_secs_f64();
            let status = format!("stopping: no connection for {seconds} s");
            return begin_to_end(handle, grace(), status);
        };
        if !std::mem::replace(&mut complained, true) {
            complain(format_args!(
                "idle, and not ending for that: a guest may dial {port}, which nobody else serves"
            ));
        }
        left = limit;
    }
}

/// Runs a proxy as [`run_proxy`] does, and calls `reload` when a signal asks for it. Neither
/// `reload` nor the grace may block, so that a signal always ends the process.
pub(super) fn run_until_told(
    proxy: Proxy,
    mut signals: EndSignals,
    end: ProcessEnd<impl Fn() -> Duration + Clone + Send + 'static>,
    reload: impl Fn() + Send + 'static,
) -> Outcome {
    let closer = signals.closer();
    let handle = proxy.handle();
    let _manager = Manager::begin(&handle);
    let (_running, over) = channel::<()>();
    if let Some(limit) = end.exit_idle {
        let (handle, grace) = (handle.clone(), end.grace.clone());
        start_thread("hvsock-idle", "to end when idle", move || {
            end_when_idle(&handle, limit, grace, &over);
        })?;
    }
    let (speaking, silence) = channel::<()>();
    let grace = end.grace;
    let hear = move || {
        let _speaking = speaking;
        let end = |asked: &SignalRequest| {
            if *asked == SignalRequest::Reload {
                reload();
            }
            *asked == SignalRequest::End
        };
        for (count, _) in signals.asked().filter(end).enumerate() {
            if count == 0 {
                let grace = grace();
                let live = handle.live();
                let mut status = describe_end(live, grace);
                if live > 0 {
                    status += "; once more to cut them off";
                }
                begin_to_end(&handle, grace, status);
            } else {
                handle.stop(Duration::ZERO);
                end_without_what_hangs(Duration::ZERO);
                complain("cutting clients off, closing the connections of guests");
            }
        }
    };
    start_thread("hvsock-signals", "to wait for signals", hear)?;
    let ended = proxy.wait();
    info!("has stopped");
    closer.close();
    // Nothing is ever sent; the wait ends with the thread.
    let _ = silence.recv_timeout(LAST_DELIVERY);
    Ok(ended?)
}

/// Logs that the process has started, and what it carries, if the log is in a file: there is no
/// other record in it of where a process begins. To be called before listeners are announced on
/// standard output, so that it precedes the log lines of the first clients.
pub(super) fn log_start(proxy: &Proxy) {
    if log::is_in_file() {
        let (version, process) = (env!("CARGO_PKG_VERSION"), std::process::id());
        info!("hvsock {version} has started, process {process}");
        proxy.forwards().iter().for_each(log_forward);
    }
}

/// Logs that a forward is carried, if the log is in a file. Otherwise standard output says it.
pub(super) fn log_forward(forward: &ForwardStatus) {
    if log::is_in_file() {
        info!("carries {} -> {}", forward.listen, forward.rule.connect);
    }
}
