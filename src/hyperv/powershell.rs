//! Running a program for what it prints, within a time and a size.

use std::io::{self, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::thread::start_thread;

/// More than any host's VMs need.
const MOST: u64 = 16 * 1024 * 1024;

/// How much of its standard error is kept.
const MOST_ERRORS: u64 = 64 * 1024;

/// What a program has printed.
#[derive(Debug)]
pub(super) struct Printed {
    pub(super) out: Vec<u8>,
    /// What it has written to its standard error, for people.
    pub(super) errors: String,
}

/// Windows PowerShell, which is part of every Windows, with `script` to run. Not by `PATH`: another
/// program of that name might stand there.
#[cfg(windows)]
pub(super) fn powershell(script: &str) -> Command {
    use std::os::windows::process::CommandExt;
    use std::path::PathBuf;
    /// No console window pops up for it (`CREATE_NO_WINDOW` of the SDK's `WinBase.h`).
    const NO_WINDOW: u32 = 0x0800_0000;
    let root =
        std::env::var_os("SystemRoot").map_or_else(|| PathBuf::from(r"C:\Windows"), PathBuf::from);
    // A 32-bit program is shown another System32 by that name, whose PowerShell has no Hyper-V.
    let native = root.join("Sysnative");
    let system = match cfg!(target_pointer_width = "32") && native.is_dir() {
        true => native,
        false => root.join("System32"),
    };
    let mut command = Command::new(system.join(r"WindowsPowerShell\v1.0\powershell.exe"));
    command.args(["-NoLogo", "-NoProfile", "-NonInteractive"]);
    command.args(["-ExecutionPolicy", "RemoteSigned", "-OutputFormat", "Text"]);
    command.args(["-Command", script]);
    command.creation_flags(NO_WINDOW);
    command
}

/// Runs `command` without input, and ends it at the deadline.
///
/// # Errors
/// `TimedOut`; `InvalidData` if it prints without an end; why it can't be started.
pub(super) fn run(mut command: Command, timeout: Duration) -> io::Result<Printed> {
    let deadline = Instant::now() + timeout;
    command.stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = KilledOnDrop(command.spawn()?);
    let (tell, told) = channel();
    if let (Some(out), Some(err)) = (child.0.stdout.take(), child.0.stderr.take()) {
        let tell_out = tell.clone();
        let purpose = "to read what PowerShell prints";
        start_thread("hvsock-read", purpose, move || {
            tell_out.send((true, read(out, MOST)))
        })?;
        start_thread("hvsock-read", purpose, move || {
            tell.send((false, read(err, MOST_ERRORS)))
        })?;
    }
    let (mut out, mut errors) = (None, None);
    while out.is_none() || errors.is_none() {
        let left = deadline.saturating_duration_since(Instant::now());
        match told.recv_timeout(left) {
            Ok((true, bytes)) => out = Some(bytes?),
            Ok((false, bytes)) => errors = Some(bytes.unwrap_or_default()),
            // It has closed its output, and only a process that it has started still has the other
            // one.
            Err(_) if out.is_some() => break,
            Err(RecvTimeoutError::Timeout) => {
                let why = format!("it hasn't answered within {} s", timeout.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, why));
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    let out = out.unwrap_or_default();
    if out.len() as u64 == MOST {
        let why = format!("it prints more than {MOST} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    let errors = String::from_utf8_lossy(&errors.unwrap_or_default()).into_owned();
    Ok(Printed { out, errors })
}

fn read(from: impl Read, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A process that doesn't outlive its use.
struct KilledOnDrop(Child);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        // It has ended already, mostly.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
