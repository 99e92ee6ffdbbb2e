//! The threads for all calls that may block: on state directories, pid files and socket files. They
//! know no connection.
//!
//! Invariant 8: the loop touches sockets and the clock, and nothing else. A directory that hangs
//! blocks one thread, and further jobs for that same directory. Jobs for other directories are
//! done, traffic flows, and a signal ends the process.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use crate::lock::{lock, recover};

/// The most threads: so many directories may hang before jobs for others have to wait.
const MAX_THREADS: usize = 32;

/// How long an additional thread stays without work.
const IDLE_TIME: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// A queue of jobs, which runs those of one directory one after the other, until it is dropped. It
/// has one thread, and more while some hang.
#[derive(Clone, Debug)]
pub(crate) struct Housekeeper(Arc<LastHandle>);

/// The last handle of the threads, which ends them when it is dropped.
#[derive(Debug)]
struct LastHandle(Arc<SharedQueues>);

#[derive(Default)]
struct SharedQueues {
    state: Mutex<Queues>,
    /// Wakes the threads: one if a job can be begun, all if they are to end.
    jobs: Condvar,
    /// Wakes the thread that waits until all jobs are done.
    done: Condvar,
}

#[derive(Default)]
struct Queues {
    /// The waiting jobs, by directory. A directory in which a job is running has an entry, too.
    waiting: HashMap<PathBuf, VecDeque<Job>>,
    /// The directories with a job that can be begun.
    ready: VecDeque<PathBuf>,
    threads: usize,
    idle: usize,
    is_ending: bool,
}

impl std::fmt::Debug for SharedQueues {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SharedQueues")
    }
}

impl Drop for LastHandle {
    fn drop(&mut self) {
        self.0.state().is_ending = true;
        self.0.jobs.notify_all();
    }
}

impl Housekeeper {
    /// Starts the first thread.
    ///
    /// # Errors
    /// Returns the reason if no thread can be started.
    pub(crate) fn start() -> io::Result<Housekeeper> {
        let shared = Arc::<SharedQueues>::default();
        shared.state().threads = 1;
        spawn(&shared)?;
        Ok(Housekeeper(Arc::new(LastHandle(shared))))
    }

    /// Runs a job that looks at something in `directory`. The caller must bound the number of
    /// waiting jobs.
    pub(crate) fn run(&self, directory: &Path, job: impl FnOnce() + Send + 'static) {
        let shared = &self.0.0;
        let mut state = shared.state();
        match state.waiting.get_mut(directory) {
            Some(waiting) => waiting.push_back(Box::new(job)),
            None => {
                let waiting = VecDeque::from([Box::new(job) as Job]);
                state.waiting.insert(directory.to_owned(), waiting);
                state.ready.push_back(directory.to_owned());
            }
        }
        if state.idle < state.ready.len() && state.threads < MAX_THREADS {
            // If no other thread can be started, the job waits for the existing ones.
            state.threads += usize::from(spawn(shared).is_ok());
        }
        drop(state);
        shared.jobs.notify_one();
    }

    /// Waits until all jobs are done, at most `timeout`.
    pub(crate) fn finish(&self, timeout: Duration) {
        let shared = &self.0.0;
        let is_busy = |state: &mut Queues| !state.waiting.is_empty();
        let waited = shared
            .done
            .wait_timeout_while(shared.state(), timeout, is_busy);
        drop(waited);
    }
}

fn spawn(shared: &Arc<SharedQueues>) -> io::Result<()> {
    let shared = Arc::clone(shared);
    let thread = std::thread::Builder::new().name("hvsock-housekeeper".to_owned());
    thread.spawn(move || shared.run_jobs()).map(drop)
}

impl SharedQueues {
    fn state(&self) -> MutexGuard<'_, Queues> {
        lock(&self.state)
    }

    /// Runs jobs, as one of the threads.
    fn run_jobs(&self) {
        let mut state = self.state();
        loop {
            if let Some(directory) = state.ready.pop_front() {
                let waiting = state.waiting.get_mut(&directory);
                let job = waiting.and_then(VecDeque::pop_front);
                drop(state);
                if let Some(job) = job {
                    // A job that panics must not end the thread; the panic was logged.
                    let _ = catch_unwind(AssertUnwindSafe(job));
                }
                state = self.state();
                match state.waiting.get(&directory) {
                    // This thread begins it, unless another one does before.
                    Some(waiting) if !waiting.is_empty() => state.ready.push_back(directory),
                    _ => drop(state.waiting.remove(&directory)),
                }
                if state.waiting.is_empty() {
                    self.done.notify_all();
                    // Threads that are to end when there is no job left.
                    if state.is_ending {
                        self.jobs.notify_all();
                    }
                }
                continue;
            }
            if state.is_ending && state.waiting.is_empty() {
                state.threads -= 1;
                return;
            }
            state.idle += 1;
            let waited = self.jobs.wait_timeout(state, IDLE_TIME);
            let (after, is_over) = recover(waited);
            state = after;
            state.idle -= 1;
            if is_over.timed_out() && state.threads > 1 && state.ready.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn a_directory_that_hangs_keeps_its_own_jobs_alone() {
        let housekeeper = Housekeeper::start().unwrap();
        let (release, blocked) = channel::<()>();
        let (done, ended) = channel();
        let first = done.clone();
        housekeeper.run(Path::new("/hangs"), move || {
            let _ = blocked.recv();
            first.send("first").unwrap();
        });
        let second = done.clone();
        housekeeper.run(Path::new("/hangs"), move || second.send("second").unwrap());
        for _ in 0..100 {
            let done = done.clone();
            housekeeper.run(Path::new("/other"), move || done.send("other").unwrap());
            assert_eq!(ended.recv_timeout(PATIENCE), Ok("other"));
        }
        assert!(housekeeper.0.0.state().threads <= MAX_THREADS);
        housekeeper.finish(Duration::from_millis(10));
        drop(release);
        assert_eq!(ended.recv_timeout(PATIENCE), Ok("first"));
        assert_eq!(ended.recv_timeout(PATIENCE), Ok("second"));
        housekeeper.run(Path::new("/other"), || panic!("as a test"));
        let done = done.clone();
        housekeeper.run(Path::new("/other"), move || done.send("last").unwrap());
        assert_eq!(ended.recv_timeout(PATIENCE), Ok("last"));
        housekeeper.finish(PATIENCE);
        assert!(housekeeper.0.0.state().waiting.is_empty());
    }
}
