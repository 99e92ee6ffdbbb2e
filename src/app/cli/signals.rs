//! Receives the signals that end the process, as values.

use std::io;

#[cfg(unix)]
use crate::app::log;
use crate::error::{Error, Operation, Result};
use crate::thread::start_thread;

/// Receives the signals that end the process: SIGINT, SIGTERM and, except under `nohup`, SIGHUP,
/// since a closing terminal must not leave sockets and guests behind. On Windows: Ctrl-C,
/// Ctrl-Break, and the close of the console.
///
/// To be made before anything that must be removed at the end.
#[derive(Debug)]
pub(super) struct EndSignals {
    system: System,
    /// Whether SIGHUP asks for a reload instead of the end.
    #[cfg(unix)]
    reload: bool,
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SignalRequest {
    End,
    // Windows has no signal for it.
    #[cfg_attr(windows, allow(dead_code))]
    Reload,
}

#[cfg(unix)]
type System = signal_hook::iterator::Signals;

/// Ends the wait for signals.
#[derive(Clone, Debug)]
pub(super) struct Closer(SystemCloser);

#[cfg(unix)]
type SystemCloser = signal_hook::iterator::Handle;

#[cfg(unix)]
impl EndSignals {
    /// Receives SIGINT and SIGTERM, and SIGHUP as a request to reload and to open the log's file
    /// again, even under `nohup`: see [`asked`](EndSignals::asked).
    pub(super) fn take_with_reload() -> Result<EndSignals> {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
        Ok(EndSignals {
            system: System::new([SIGINT, SIGTERM, SIGHUP]).map_err(fail)?,
            reload: true,
        })
    }

    pub(super) fn take() -> Result<EndSignals> {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
        if log::is_in_file() {
            return EndSignals::take_with_reload();
        }
        let mut wanted = vec![SIGINT, SIGTERM];
        if !crate::sys::is_ignored(SIGHUP) {
            wanted.push(SIGHUP);
        }
        Ok(EndSignals {
            system: System::new(wanted).map_err(fail)?,
            reload: false,
        })
    }

    /// Returns an item for each signal that ends the process, until closed.
    pub(super) fn each(&mut self) -> impl Iterator<Item = ()> + '_ {
        self.asked()
            .filter(|asked| *asked == SignalRequest::End)
            .map(drop)
    }

    /// Returns what each signal asks for, until closed.
    pub(super) fn asked(&mut self) -> impl Iterator<Item = SignalRequest> + '_ {
        let reload = self.reload;
        let asked = move |signal| match reload && signal == signal_hook::consts::SIGHUP {
            true => {
                log::reopen();
                SignalRequest::Reload
            }
            false => SignalRequest::End,
        };
        self.system.forever().map(asked)
    }

    pub(super) fn closer(&self) -> Closer {
        Closer(self.system.handle())
    }

    /// Adds a signal, and returns the iterator of all.
    pub(super) fn into_system(self) -> System {
        self.system
    }
}

fn fail(cause: io::Error) -> Error {
    Error::new(Operation::Run, "the wait for signals", cause)
}

impl EndSignals {
    /// Calls `heed` on its own thread, for each signal that ends the process.
    ///
    /// # Errors
    /// Returns the system's error if there can be no thread.
    pub(super) fn call_at_each(mut self, heed: impl Fn() + Send + 'static) -> Result<()> {
        let wait = move || self.each().for_each(|()| heed());
        start_thread("hvsock-signals", "to wait for signals", wait).map(drop)
    }
}

#[cfg(unix)]
impl Closer {
    pub(super) fn close(&self) {
        self.0.close();
    }
}

#[cfg(windows)]
type System = (
    std::sync::mpsc::Sender<Said>,
    std::sync::mpsc::Receiver<Said>,
);

#[cfg(windows)]
type SystemCloser = std::sync::mpsc::Sender<Said>;

/// What an [`EndSignals`] receives.
#[cfg(windows)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    End,
    Closed,
}

#[cfg(windows)]
impl EndSignals {
    pub(super) fn take() -> Result<EndSignals> {
        let (say, heard) = std::sync::mpsc::channel();
        let handler = say.clone();
        let tell = move || {
            // It may have ended already.
            let _ = handler.send(Said::End);
        };
        ctrlc::set_handler(tell).map_err(|e| fail(io::Error::other(e)))?;
        Ok(EndSignals {
            system: (say, heard),
        })
    }

    pub(super) fn each(&mut self) -> impl Iterator<Item = ()> + '_ {
        let heard = self.system.1.iter();
        heard.take_while(|said| *said == Said::End).map(drop)
    }

    pub(super) fn take_with_reload() -> Result<EndSignals> {
        EndSignals::take()
    }

    pub(super) fn asked(&mut self) -> impl Iterator<Item = SignalRequest> + '_ {
        self.each().map(|()| SignalRequest::End)
    }

    pub(super) fn closer(&self) -> Closer {
        Closer(self.system.0.clone())
    }
}

#[cfg(windows)]
impl Closer {
    pub(super) fn close(&self) {
        let _ = self.0.send(Said::Closed);
    }
}
