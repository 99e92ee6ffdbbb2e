//! Runs a proxy until it is told to end, and ends the process whatever hangs.

use std::sync::mpsc::channel;
use std::time::Duration;

use super::console::complain;
use super::manager::Manager;
use super::outcome::Outcome;
use super::signals::{Asked, EndSignals};
use crate::app::lossy_writer::{Patience, set_patience};
use crate::app::output;
use crate::proxy::Proxy;

/// Runs a proxy until one of the [`EndSignals`] or a failure ends it.
pub(super) fn run_proxy(proxy: Proxy, grace: Duration, signals: EndSignals) -> Outcome {
    run_until_told(proxy, signals, move || grace, || {})
}

/// How long the last words may take once the proxy has ended: whoever is to hear them may hang.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Ends the process some time after that grace, if it has not ended by itself: a worker that looks up a socket's path on
/// a disk that hangs never does, nor one that waits for the reader of its report.
pub(super) fn end_without_what_hangs(grace: Duration) {
    /// How long a proxy takes at the end at most: it closes the connections of guests, and removes its files.
    const END: Duration = Duration::from_secs(12);
    std::thread::spawn(move || {
        std::thread::sleep(grace.saturating_add(END));
        set_patience(Patience::Limited);
        complain("something hangs: ending without it");
        output::flush();
        std::process::exit(1);
    });
}

/// Returns what the end has begun with, in words.
fn describe_end(live: usize, grace: Duration) -> String {
    let has = match live {
        0 => return "stopping".to_owned(),
        1 => " has",
        _ => "s have",
    };
    let seconds = grace.as_secs();
    format!("stopping: no new clients; {live} connection{has} {seconds} s to finish")
}

/// Tells the service manager that the control socket was asked for the end.
#[cfg(unix)]
pub(super) fn tell_manager_of_end(live: usize, grace: Duration) {
    Manager::stopping(describe_end(live, grace));
}

/// The same; `grace` is asked for when the end begins, `reload` called when a signal asks for one.
/// Neither may wait for anything: a signal ends the process whatever else goes on.
pub(super) fn run_until_told(
    proxy: Proxy,
    mut signals: EndSignals,
    grace: impl Fn() -> Duration + Send + 'static,
    reload: impl Fn() + Send + 'static,
) -> Outcome {
    let closer = signals.closer();
    let handle = proxy.handle();
    let _manager = Manager::begin(&handle);
    let (speaking, silence) = channel::<()>();
    std::thread::spawn(move || {
        let _speaking = speaking;
        let end = |asked: &Asked| {
            if *asked == Asked::Reload {
                reload();
            }
            *asked == Asked::End
        };
        for (count, _) in signals.asked().filter(end).enumerate() {
            if count == 0 {
                let grace = grace();
                let live = handle.live();
                let mut status = describe_end(live, grace);
                if live > 0 {
                    status += "; once more to cut them off";
                }
                // First what ends it, then what is said of it.
                handle.stop(grace);
                end_without_what_hangs(grace);
                complain(&status);
                Manager::stopping(status);
            } else {
                handle.stop(Duration::ZERO);
                end_without_what_hangs(Duration::ZERO);
                complain("cutting clients off, closing the connections of guests");
            }
        }
    });
    let ended = proxy.wait();
    closer.close();
    // It has nothing to send: this is the thread's end.
    let _ = silence.recv_timeout(LAST_WORDS);
    Ok(ended?)
}
