//! Runs a proxy until it is told to end, and ends the process whatever hangs.

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

/// Runs a proxy until one of the [`EndSignals`] or a failure ends it, or it has been idle for long
/// enough.
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
    /// Returns how long connections may take to finish; it is called when the end begins.
    pub(super) grace: G,
    /// How long there may be no connection before it ends. `None`: for ever.
    pub(super) exit_idle: Option<Duration>,
}

/// How long the last lines of the log may take once the proxy has ended: their reader may hang.
const LAST_DELIVERY: Duration = Duration::from_secs(1);

/// Ends the process some time after that grace, if it has not ended by itself: a worker that looks
/// up a socket's path on a disk that hangs never does, nor one that waits for the reader of its
/// report.
pub(super) fn end_without_what_hangs(grace: Duration) {
    /// How long a proxy takes at the end at most: it closes the connections of guests, and removes
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

/// Returns what the end has begun with, in words.
fn describe_end(live: usize, grace: Duration) -> String {
    if live == 0 {
        return "stopping".to_owned();
    }
    let (have, seconds) = (counted_have(live as u64, "connection"), grace.as_secs());
    format!("stopping: no new clients; {have} {seconds} s to finish")
}

/// Tells the service manager that the control socket was asked for the end.
#[cfg(unix)]
pub(super) fn tell_manager_of_end(live: usize, grace: Duration) {
    Manager::stopping(describe_end(live, grace));
}

/// Begins the end, and says why.
fn begin_to_end(handle: &Handle, grace: Duration, status: String) {
    // The end is begun first, and then announced.
    handle.stop(grace);
    end_without_what_hangs(grace);
    complain(&status);
    Manager::stopping(status);
}

/// Begins the end when there has been no connection for `limit`, unless the proxy is over before:
/// then the sender of `over` is dropped.
///
/// While it has a port that a hyperkit guest dials it goes on: a dialled port that nobody serves
/// may hang the VM, and what the keeper would accept there starts no program.
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
            // This is the earliest time at which the limit can be reached.
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

/// Runs a proxy as [`run_proxy`] does; `reload` is called when a signal asks for it. Neither it nor
/// the grace may wait for anything: a signal ends the process whatever else goes on.
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
    // Nothing is sent: this ends the thread.
    let _ = silence.recv_timeout(LAST_DELIVERY);
    Ok(ended?)
}

/// Logs that the process has started and what it carries, if the log is in a file: the file alone
/// shows where a process begins and ends. It comes before standard output tells of the listeners,
/// so that what their first clients leave in the log follows.
pub(super) fn log_start(proxy: &Proxy) {
    if log::is_in_file() {
        let (version, process) = (env!("CARGO_PKG_VERSION"), std::process::id());
        info!("hvsock {version} has started, process {process}");
        proxy.forwards().iter().for_each(log_forward);
    }
}

/// Logs that a forward is carried, if the log is in a file: standard output says so elsewhere.
pub(super) fn log_forward(forward: &ForwardStatus) {
    if log::is_in_file() {
        info!("carries {} -> {}", forward.listen, forward.rule.connect);
    }
}
