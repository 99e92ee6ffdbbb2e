//! Starts the real binary, `/hvsock`.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::report::eventually;

/// A running `hvsock`. Dropping it kills it.
pub(crate) struct Hvsock {
    child: Child,
    out: Arc<Mutex<String>>,
    err: Arc<Mutex<String>>,
}

impl Hvsock {
    /// Starts it with these arguments, separated by spaces, as this user.
    pub(crate) fn start(user: u32, arguments: &str) -> std::io::Result<Hvsock> {
        let mut child = Command::new("/hvsock")
            .args(arguments.split_whitespace())
            .uid(user)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let out = collect(child.stdout.take());
        let err = collect(child.stderr.take());
        Ok(Hvsock { child, out, err })
    }

    /// Starts `hvsock forward` of this pair, waits until it says that it listens, and returns
    /// where.
    pub(crate) fn forward(
        arguments: &str,
    ) -> Result<(Hvsock, String), Box<dyn std::error::Error + Send + Sync>> {
        Hvsock::start_listening(&format!("forward {arguments}"))
    }

    /// Starts it with these arguments, waits until it says that it listens, and returns where its
    /// first forward does.
    pub(crate) fn start_listening(
        arguments: &str,
    ) -> Result<(Hvsock, String), Box<dyn std::error::Error + Send + Sync>> {
        let hvsock = Hvsock::start(0, arguments)?;
        let listening = || text(&hvsock.out).contains(" -> ");
        if !eventually(Duration::from_secs(5), listening) {
            return Err(format!("it doesn't listen: {}", hvsock.said()).into());
        }
        let out = text(&hvsock.out);
        let listen = out.split(" -> ").next().unwrap_or_default().to_owned();
        Ok((hvsock, listen))
    }

    /// Returns what it has written to standard error.
    pub(crate) fn said(&self) -> String {
        text(&self.err)
    }

    /// Returns whether it writes this to standard error in time.
    pub(crate) fn says(&self, what: &str, within: Duration) -> bool {
        eventually(within, || self.said().contains(what))
    }

    pub(crate) fn terminate(&self) -> nix::Result<()> {
        let id = i32::try_from(self.child.id()).map_err(|_| nix::Error::EOVERFLOW)?;
        kill(Pid::from_raw(id), Signal::SIGTERM)
    }

    /// Returns how it ended, if it does in time, and all that it wrote.
    pub(crate) fn end(mut self, within: Duration) -> Result<(ExitStatus, String), String> {
        let mut status = None;
        eventually(within, || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        });
        // Its last lines may still be on their way.
        let closed = || Arc::strong_count(&self.err) == 1;
        eventually(Duration::from_secs(1), closed);
        match status {
            Some(status) => Ok((status, self.said())),
            None => Err(format!("it goes on: {}", self.said())),
        }
    }
}

impl Drop for Hvsock {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(from: &Mutex<String>) -> String {
    from.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

fn collect(from: Option<impl Read + Send + 'static>) -> Arc<Mutex<String>> {
    let text = Arc::new(Mutex::new(String::new()));
    let heard = Arc::clone(&text);
    thread::spawn(move || {
        for line in from.map(BufReader::new).into_iter().flat_map(|r| r.lines()) {
            let Ok(line) = line else { break };
            let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
            heard.push_str(&line);
            heard.push('\n');
        }
    });
    text
}
