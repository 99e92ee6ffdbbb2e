//! The proxy: the real binary, as a child.

use crate::command::{fill, full_pipe};
use crate::crowd::{HOST_ECHO_TCP, HOST_ECHO_UNIX, HOST_REFUSED};
use crate::guest::{LONG, PORTS};
use crate::host::Host;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, PipeReader};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How often a condition is looked at.
pub(crate) const LOOK: Duration = Duration::from_millis(5);

/// Looks until `reached`, at most for `time`; whether it was.
pub(crate) fn wait_until(time: Duration, mut reached: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + time;
    loop {
        if reached() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(LOOK);
    }
}

/// Where everything of one soak is.
#[derive(Debug)]
pub(crate) struct Places {
    pub(crate) root: PathBuf,
    /// The VM's state directory.
    pub(crate) vm: PathBuf,
    /// What the guest dials, and where it leads.
    pub(crate) remotes: Vec<(u32, String)>,
}

impl Places {
    /// Below `root`, with a guest that dials the host's services.
    pub(crate) fn new(root: &Path, host: &Host) -> Places {
        Places {
            root: root.to_owned(),
            vm: root.join("vm"),
            remotes: vec![
                (HOST_ECHO_TCP, host.tcp.to_string()),
                (HOST_ECHO_UNIX, host.unix.display().to_string()),
                (HOST_REFUSED, host.refusing.to_string()),
            ],
        }
    }

    /// The control socket of a proxy that is disturbed.
    pub(crate) fn control(&self) -> PathBuf {
        self.root.join("control.sock")
    }

    pub(crate) fn unix(&self, port: u32) -> PathBuf {
        self.root.join(format!("{port}.sock"))
    }

    /// Socket files that are the proxy's and still there, but those that the guest dials.
    pub(crate) fn left_over(&self) -> Vec<PathBuf> {
        let locals = PORTS.iter().map(|&port| self.unix(port));
        locals.filter(|path| is_there(path)).collect()
    }

    /// Socket files that the guest dials and that are there.
    pub(crate) fn dialled(&self) -> Vec<PathBuf> {
        let name = |port: u32| self.vm.join(format!("00000002.{port:08x}"));
        let dialled = self.remotes.iter().map(|(port, _)| name(*port));
        dialled.filter(|path| is_there(path)).collect()
    }
}

fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// What becomes of what a proxy says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// What it complains about is kept in a file.
    Kept,
    /// Once it listens nobody reads anything, and not a byte more fits into its pipes.
    Unread,
}

#[derive(Debug)]
pub(crate) struct Proxy {
    child: Child,
    /// Kept open: a proxy that prints to a closed pipe would be another test.
    pub(crate) stdout: Option<BufReader<ChildStdout>>,
    log: PathBuf,
    /// Kept open as well, and full.
    _unread: Option<PipeReader>,
    /// Where each guest port is exposed over TCP.
    pub(crate) tcp: HashMap<u32, SocketAddr>,
}

impl Proxy {
    /// Starts `expose` and waits until it listens. Without `tcp` the ports are chosen.
    pub(crate) fn start(
        places: &Places,
        tcp: &HashMap<u32, SocketAddr>,
        options: &[&str],
        output: Output,
    ) -> Result<Proxy, String> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
        // Found by a URI, it needs none of its files.
        let vm = format!("hyperkit://{}", places.vm.display());
        command.args(["expose", "--vm", &vm]);
        command.args(["--workers", "2"]).args(options);
        for port in PORTS {
            let chosen = tcp.get(&port).map_or(0, SocketAddr::port);
            command.args(["-L", &format!("{chosen}:{port}")]);
            let path = places.unix(port);
            command.args(["-L", &format!("{}:{port}", path.display())]);
        }
        for (port, target) in &places.remotes {
            command.args(["-R", &format!("{port}:{target}")]);
        }
        let mut lines = 2 * PORTS.len() + places.remotes.len();
        let mut proxy = match output {
            Output::Kept => {
                command.env("HVSOCK_LOG", "warn");
                Proxy::spawn(command, places.root.join("proxy.log"))?
            }
            Output::Unread => {
                let control = places.control();
                command.arg(format!("--control={}", control.display()));
                // Where that is comes first.
                lines += 1;
                command.env("HVSOCK_LOG", "debug");
                Proxy::spawn_unread(command)?
            }
        };
        for _ in 0..lines {
            let line = proxy.line()?;
            if let Some(rest) = line.trim_end().strip_prefix("tcp://")
                && let Some((address, port)) = rest.split_once(" -> guest port ")
            {
                let port = port.split(' ').next().unwrap_or("").parse();
                let known = (port, address.parse());
                let (Ok(port), Ok(address)) = known else {
                    return Err(format!("what is {line:?}?"));
                };
                proxy.tcp.insert(port, address);
            }
        }
        if output == Output::Unread {
            proxy.fill_stdout().map_err(|error| error.to_string())?;
        }
        Ok(proxy)
    }

    /// Starts an hvsock that says on `log` what it has to complain about.
    pub(crate) fn spawn(mut command: Command, log: PathBuf) -> Result<Proxy, String> {
        let append = |path: &Path| File::options().create(true).append(true).open(path);
        command.stderr(append(&log).map_err(|e| e.to_string())?);
        Proxy::run(command, log, None)
    }

    /// Starts an hvsock whose log nobody reads.
    fn spawn_unread(mut command: Command) -> Result<Proxy, String> {
        let (log, to_log, _) = full_pipe();
        command.stderr(to_log);
        Proxy::run(command, PathBuf::new(), Some(log))
    }

    fn run(
        mut command: Command,
        log: PathBuf,
        unread: Option<PipeReader>,
    ) -> Result<Proxy, String> {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(|e| e.to_string())?;
        let stdout = child.stdout.take().map(BufReader::new);
        Ok(Proxy {
            child,
            stdout,
            log,
            _unread: unread,
            tcp: HashMap::new(),
        })
    }

    /// Fills the pipe to which it prints.
    fn fill_stdout(&self) -> io::Result<()> {
        let stdout = self.stdout.as_ref().expect("nobody else reads it");
        // The other end, with a mode of its own: the proxy's may go on blocking.
        let mut writer = File::options()
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(format!("/proc/self/fd/{}", stdout.get_ref().as_raw_fd()))?;
        fill(&mut writer);
        Ok(())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line that it prints. It prints what it should or ends: either ends this.
    pub(crate) fn line(&mut self) -> Result<String, String> {
        let mut line = String::new();
        let stdout = self.stdout.as_mut().expect("nobody else reads it");
        let mut readable = [PollFd::new(stdout.get_ref().as_fd(), PollFlags::POLLIN)];
        let time = PollTimeout::try_from(LONG).expect("it is short enough");
        if stdout.buffer().is_empty() && poll(&mut readable, time) == Ok(0) {
            return Err(format!("the proxy says nothing: {}", self.log_tail()));
        }
        match stdout.read_line(&mut line) {
            Ok(1..) => Ok(line),
            _ => Err(format!("the proxy didn't start: {}", self.log_tail())),
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("a pid");
        kill(Pid::from_raw(pid), signal).expect("the proxy is there to be signalled");
    }

    pub(crate) fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("it is our child")
    }

    /// Waits for its end; how long that took.
    pub(crate) fn wait(&mut self, time: Duration) -> Result<(ExitStatus, Duration), String> {
        let start = Instant::now();
        if wait_until(time, || self.exited().is_some()) {
            return Ok((self.exited().expect("it has exited"), start.elapsed()));
        }
        Err(format!(
            "the proxy didn't end within {time:?}, with {:?} descriptors: {}",
            self.descriptors(),
            self.log_tail()
        ))
    }

    /// How many descriptors it has; `None` where the system doesn't tell.
    pub(crate) fn descriptors(&self) -> Option<usize> {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.child.id())).ok()?;
        Some(entries.count())
    }

    /// The same when it has nothing to do: as long as it changes, it has.
    pub(crate) fn descriptors_at_rest(&self) -> Option<usize> {
        let mut seen = (self.descriptors(), 0);
        let settled = wait_until(LONG, || {
            let now = self.descriptors();
            seen = if now == seen.0 {
                (now, seen.1 + 1)
            } else {
                (now, 0)
            };
            seen.1 >= 20
        });
        assert!(settled, "the proxy's descriptors never settle");
        seen.0
    }

    /// The most memory it ever had, in KiB.
    pub(crate) fn peak_memory(&self) -> Option<u64> {
        self.memory("VmHWM:")
    }

    /// The memory that `/proc` gives this name, in KiB.
    pub(crate) fn memory(&self, name: &str) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse().ok()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // By its handle: never another process.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
