//! The processes that the driver starts. All of them end with it, whatever ends it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fs, process, thread};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::report::eventually;

/// Those that run. Locked while one starts or is reaped, so that no id in it is another's.
static RUNNING: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// A running program. Dropping it kills it.
pub(crate) struct Process {
    child: Child,
    id: Pid,
    stdin: Option<ChildStdin>,
    out: Arc<Mutex<String>>,
    err: Arc<Mutex<String>>,
}

impl Process {
    pub(crate) fn start(command: &mut Command) -> io::Result<Process> {
        let mut running = lock(&RUNNING);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| io::Error::other(format!("{:?}: {e}", command.get_program())))?;
        let id = Pid::from_raw(child.id().cast_signed());
        running.push(id);
        drop(running);
        let stdin = child.stdin.take();
        let out = collect(child.stdout.take());
        let err = collect(child.stderr.take());
        Ok(Process {
            child,
            id,
            stdin,
            out,
            err,
        })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has said on standard output, so far.
    pub(crate) fn out(&self) -> String {
        lock(&self.out).clone()
    }

    /// And on standard error.
    pub(crate) fn err(&self) -> String {
        lock(&self.err).clone()
    }

    /// What it answers on standard output to a line.
    pub(crate) fn ask(&mut self, line: &str) -> Option<String> {
        let before = self.out().lines().count();
        writeln!(self.stdin.as_mut()?, "{line}").ok()?;
        let mut answer = None;
        eventually(Duration::from_secs(10), || {
            answer = self.out().lines().nth(before).map(str::to_owned);
            answer.is_some()
        });
        answer
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.status().is_none()
    }

    pub(crate) fn kill(&mut self) {
        let mut running = lock(&RUNNING);
        let _ = self.child.kill();
        let _ = self.child.wait();
        running.retain(|&id| id != self.id);
    }

    /// How it has ended, if it has.
    fn status(&mut self) -> Option<ExitStatus> {
        let mut running = lock(&RUNNING);
        let status = self.child.try_wait().ok().flatten()?;
        running.retain(|&id| id != self.id);
        Some(status)
    }

    pub(crate) fn terminate(&self) -> nix::Result<()> {
        kill(self.id, Signal::SIGTERM)
    }

    /// How it ends, if it does in time.
    pub(crate) fn end(&mut self, within: Duration) -> Option<ExitStatus> {
        let mut status = None;
        eventually(within, || {
            status = self.status();
            status.is_some()
        });
        status
    }

    /// How many descriptors it has open.
    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.id())).map_or(0, Iterator::count)
    }

    /// How many bytes of memory it has in use.
    pub(crate) fn memory(&self) -> Option<usize> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).ok()?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
        let kib: usize = line.trim().strip_suffix(" kB")?.parse().ok()?;
        Some(kib * 1024)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Signals one of ours.
pub(crate) fn signal(id: u32, signal: Signal) -> nix::Result<()> {
    kill(Pid::from_raw(id.cast_signed()), signal)
}

/// Kills all that runs, for good: nothing can be started any more.
pub(crate) fn kill_all() {
    let running = lock(&RUNNING);
    for &id in running.iter() {
        let _ = kill(id, Signal::SIGKILL);
    }
    std::mem::forget(running);
}

/// On SIGTERM and its like kills all that runs, removes `directory`, and ends.
pub(crate) fn end_on_signals(directory: &Path) -> io::Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    let directory = directory.to_owned();
    thread::spawn(move || {
        if signals.forever().next().is_some() {
            kill_all();
            let _ = fs::remove_dir_all(directory);
            process::exit(1);
        }
    });
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn collect(from: Option<impl Read + Send + 'static>) -> Arc<Mutex<String>> {
    let text = Arc::new(Mutex::new(String::new()));
    let heard = Arc::clone(&text);
    thread::spawn(move || {
        for line in from.map(BufReader::new).into_iter().flat_map(|r| r.lines()) {
            let Ok(line) = line else { break };
            let mut heard = lock(&heard);
            heard.push_str(&line);
            heard.push('\n');
        }
    });
    text
}
