//! `hvsock cat` and `hvsock stress` as a user runs them: in the guest and, included there by path,
//! in the driver on the host.

use std::error::Error;
use std::io::Read;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;

use crate::pattern::{expect_pattern, send_pattern};

type Failure = Box<dyn Error + Send + Sync>;

/// A running `hvsock`. Dropping it kills it.
pub(crate) struct Tool(pub(crate) Child);

impl Tool {
    /// Starts it with these words, separated by spaces.
    pub(crate) fn start(hvsock: &Path, words: &str) -> Result<Tool, Failure> {
        let child = Command::new(hvsock)
            .args(words.split_whitespace())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        Ok(Tool(child))
    }

    fn pipes(&mut self) -> Result<(ChildStdin, ChildStdout), Failure> {
        let pipes = self.0.stdin.take().zip(self.0.stdout.take());
        pipes.ok_or_else(|| "its pipes are taken".into())
    }

    /// Sends it the pattern of one seed, and expects that of another from it, each with its EOF,
    /// and exit code 0.
    pub(crate) fn exchange(
        mut self,
        (seed, bytes): (u64, usize),
        (answer, expected): (u64, usize),
    ) -> Result<(), Failure> {
        let (stdin, stdout) = self.pipes()?;
        let feeding = thread::spawn(move || send_pattern(stdin, seed, bytes));
        let outcome = expect_pattern(stdout, answer, expected);
        let fed = feeding.join().map_err(|_| "the feeding thread panicked")?;
        let (code, said) = self.end()?;
        outcome.map_err(|e| format!("{e}; it said: {said}"))?;
        fed.map_err(|e| format!("{e}; it said: {said}"))?;
        match code {
            Some(0) => Ok(()),
            code => Err(format!("exit code {code:?}: {said}").into()),
        }
    }

    /// Returns its exit code, and all that it writes from now on.
    pub(crate) fn end(mut self) -> Result<(Option<i32>, String), Failure> {
        drop(self.0.stdin.take());
        let mut said = String::new();
        if let Some(mut stdout) = self.0.stdout.take() {
            stdout.read_to_string(&mut said)?;
        }
        if let Some(mut stderr) = self.0.stderr.take() {
            stderr.read_to_string(&mut said)?;
        }
        Ok((self.0.wait()?.code(), said))
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Checks that an echo server sends bytes back through `hvsock cat WORDS`.
pub(crate) fn cat_echo(hvsock: &Path, words: &str, bytes: usize) -> Result<(), Failure> {
    Tool::start(hvsock, &format!("cat {words}"))?.exchange((90, bytes), (90, bytes))
}

/// Checks that `hvsock stress WORDS` finds nothing wrong.
pub(crate) fn stress(hvsock: &Path, words: &str) -> Result<(), Failure> {
    let (code, said) = Tool::start(hvsock, &format!("stress {words}"))?.end()?;
    for line in said.lines().filter(|line| !line.starts_with("seed")) {
        println!("# {line}");
    }
    match code {
        Some(0) => Ok(()),
        code => Err(format!("exit code {code:?}: {said}").into()),
    }
}

/// Checks `hvsock cat WORDS` of a port without a listener: exit code 1, and a remedy.
pub(crate) fn cat_refused(hvsock: &Path, words: &str) -> Result<(), Failure> {
    let mut tool = Tool::start(hvsock, &format!("cat {words}"))?;
    // The input stays open, so that only the refusal ends it.
    let stdin = tool.0.stdin.take();
    let (code, said) = tool.end()?;
    drop(stdin);
    if code == Some(1) && said.contains("does a program") {
        return Ok(());
    }
    Err(format!("exit code {code:?}: {said}").into())
}
