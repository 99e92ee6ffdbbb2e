//! The binary under test, `hvsock expose` or `hvsock forward`.

use std::error::Error;
use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::process::Process;
use crate::report::eventually;
use crate::sockets::Front;

type Failure = Box<dyn Error + Send + Sync>;

pub(crate) struct Proxy {
    pub(crate) process: Process,
    /// One a rule, in order; None where the guest is the client.
    fronts: Vec<Option<Front>>,
}

impl Proxy {
    /// Starts it, and waits until it has told where it listens.
    pub(crate) fn start(
        hvsock: &Path,
        arguments: &[OsString],
        rules: usize,
    ) -> Result<Proxy, Failure> {
        let process = Process::start(Command::new(hvsock).args(arguments))?;
        let told = || process.out().matches(" -> ").count() == rules;
        if !eventually(Duration::from_secs(20), told) {
            return Err(format!("hvsock doesn't listen: {}", process.err()).into());
        }
        let fronts = process
            .out()
            .lines()
            .map(|line| Front::parse(line.split(" -> ").next()?))
            .collect();
        Ok(Proxy { process, fronts })
    }

    /// Where the rule of this number, from 0, listens on the host.
    pub(crate) fn front(&self, rule: usize) -> Result<Front, Failure> {
        let front = self.fronts.get(rule).cloned().flatten();
        front.ok_or_else(|| format!("rule {rule} has no front").into())
    }
}
