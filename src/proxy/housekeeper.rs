//! One thread for all that may block: state directories, pid files and the files of sockets.
//!
//! Invariant 8: a worker touches sockets and the clock, and nothing else. A file system that hangs stops this thread, and
//! so what it is asked for; traffic flows, and a signal ends the process.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

type Job = Box<dyn FnOnce() + Send>;

/// Runs jobs one after the other, in the order in which they were given, until it is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Housekeeper {
    jobs: Sender<Job>,
}

impl Housekeeper {
    /// Starts the thread.
    ///
    /// # Errors
    /// There is none to be had.
    pub(crate) fn start() -> io::Result<Housekeeper> {
        let (jobs, given) = channel::<Job>();
        // One that panics takes nothing from those behind it; the panic was told.
        let run = move || {
            for job in given {
                let _ = catch_unwind(AssertUnwindSafe(job));
            }
        };
        let thread = std::thread::Builder::new().name("hvsock-housekeeper".to_owned());
        thread.spawn(run)?;
        Ok(Housekeeper { jobs })
    }

    /// Has a job done. It is the caller's part that no more wait than there are things to look after.
    pub(crate) fn run(&self, job: impl FnOnce() + Send + 'static) {
        // It ends after the last handle: somebody takes it.
        let _ = self.jobs.send(Box::new(job));
    }

    /// Waits until what was asked for so far is done, at most `timeout`.
    pub(crate) fn finish(&self, timeout: Duration) {
        let (done, is_done) = channel();
        self.run(move || {
            let _ = done.send(());
        });
        let _ = is_done.recv_timeout(timeout);
    }
}
