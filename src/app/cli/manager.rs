//! Notifies the service manager by systemd's `sd_notify(3)`. Does nothing without a manager, and on
//! systems without systemd.

use std::sync::mpsc::Sender;

use crate::error::counted;
use crate::proxy::Handle;

/// Notifies the service manager of the process' state, and feeds its watchdog until dropped.
#[derive(Debug)]
pub(super) struct Manager {
    /// Dropping it ends the watchdog's thread.
    _watchdog: Option<Sender<()>>,
}

impl Manager {
    /// Reports that the process is ready. From then on the manager's watchdog, if there is one, is
    /// fed as long as all workers answer.
    pub(super) fn begin(handle: &Handle) -> Manager {
        Manager::ready(handle);
        Manager {
            _watchdog: system::watch(handle),
        }
    }

    /// Reports that all listeners that can be had are bound.
    pub(super) fn ready(handle: &Handle) {
        let forwards = counted(handle.forwards().len() as u64, "forward");
        system::ready(format!("carrying {forwards}"));
    }

    /// Reports that the file is being read again; [`ready`](Manager::ready) must follow.
    pub(super) fn reloading() {
        system::reloading();
    }

    /// Reports that the end has begun, with a status line.
    pub(super) fn stopping(status: String) {
        system::stopping(status);
    }

    /// Reports that another process has taken over, and is the main process from now on. The end of
    /// this one is then not reported.
    #[cfg(unix)]
    pub(super) fn handed_over(process: u32) {
        system::handed_over(process);
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        system::flush();
    }
}

#[cfg(target_os = "linux")]
mod system {
    use std::io;
    use std::sync::Once;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
    use std::time::Duration;

    use sd_notify::NotifyState;

    use super::Handle;
    use crate::app::lossy_writer::{LossyWriter, Patience};
    use crate::thread::start_thread;

    /// Reports that the process is ready. The status is one line; systemd cuts it off itself.
    pub(super) fn ready(status: String) {
        notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
    }

    pub(super) fn reloading() {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => notify(&[NotifyState::Reloading, now]),
            Err(e) => tracing::warn!("cannot tell the service manager that the file is read: {e}"),
        }
    }

    pub(super) fn stopping(status: String) {
        notify(&[NotifyState::Stopping, NotifyState::Status(&status)]);
    }

    /// Whether another process is the service now: this one then reports nothing more.
    static HANDED_OVER: AtomicBool = AtomicBool::new(false);

    pub(super) fn handed_over(process: u32) {
        notify(&[NotifyState::MainPid(process)]);
        HANDED_OVER.store(true, Ordering::Release);
    }

    /// Writes to the manager without waiting: a manager that reads nothing would block the sender,
    /// which may have to handle signals.
    static MANAGER: LossyWriter =
        LossyWriter::new("hvsock-manager", send, |_dropped| String::new());

    fn notify(what: &[NotifyState<'_>]) {
        if std::env::var_os("NOTIFY_SOCKET").is_none() || HANDED_OVER.load(Ordering::Acquire) {
            return;
        }
        let lines: Vec<String> = what.iter().map(NotifyState::to_string).collect();
        MANAGER.send(lines.join("\n").into_bytes());
    }

    /// Sends a notification. Logs a failure, the first time only.
    fn send(message: &[u8]) -> io::Result<usize> {
        static WARNED: Once = Once::new();
        let text = String::from_utf8_lossy(message);
        let sent = sd_notify::notify(&[NotifyState::Custom(&text)]);
        if let Err(e) = &sent {
            WARNED.call_once(|| {
                tracing::warn!("cannot tell the service manager ($NOTIFY_SOCKET): {e}");
            });
        }
        sent.map(|()| message.len())
    }

    pub(super) fn flush() {
        MANAGER.flush(Patience::Limited);
    }

    /// Feeds the watchdog, if there is one, until the returned sender is dropped.
    pub(super) fn watch(handle: &Handle) -> Option<Sender<()>> {
        let patience = sd_notify::watchdog_enabled().filter(|patience| !patience.is_zero())?;
        // Twice in each interval, as sd_watchdog_enabled(3) advises.
        let every = (patience / 2).max(Duration::from_millis(1));
        let handle = handle.clone();
        let (end, ended) = channel();
        let feed = move || {
            loop {
                match handle.answers_within(every) {
                    true => notify(&[NotifyState::Watchdog]),
                    false => tracing::error!(
                        "a worker hasn't answered for {} ms; the watchdog isn't told that all is well",
                        every.as_millis()
                    ),
                }
                if ended.recv_timeout(every) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        };
        match start_thread("hvsock-watchdog", "to feed the watchdog", feed) {
            Ok(_) => Some(end),
            Err(e) => {
                tracing::error!("{e}");
                None
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use super::{Handle, Sender};

    pub(super) fn ready(_: String) {}

    pub(super) fn reloading() {}

    pub(super) fn stopping(_: String) {}

    #[cfg(unix)]
    pub(super) fn handed_over(_: u32) {}

    pub(super) fn flush() {}

    pub(super) fn watch(_: &Handle) -> Option<Sender<()>> {
        None
    }
}
