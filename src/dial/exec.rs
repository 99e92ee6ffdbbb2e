//! Dials a program: starts it, and connects its standard input and output.
//!
//! The connection is a Unix socket, as any other is. A thread is at its other end: it carries the
//! bytes between it and a second socket pair (or a terminal), of which the program has the other
//! end, and reaps the program. So no signal handler is needed, a connection that was cut is told
//! from a program that is done, and the loop has no work with either.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::SockRef;
use tracing::{Span, debug};

use crate::address::ExecAddress;
use crate::error::{Error, Operation, Result};
use crate::lock::lock;
use crate::sys::{self, Leads};

/// How long a program whose connection was cut may take to end after SIGHUP.
pub(crate) const HANG_UP: Duration = Duration::from_secs(5);

/// The first and the longest pause between two looks whether such a program has ended.
const LOOKS: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(100)];

/// How many bytes are carried at once.
const BUFFER: usize = 64 * 1024;

/// The variables by which a service manager tells this process about itself. They are not for the
/// programs that it starts.
const OURS: [&str; 6] = [
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
];

/// The programs that are connected. At the end of a proxy those that were cut off are waited for.
#[derive(Debug, Default)]
pub(crate) struct Programs {
    connected: Mutex<usize>,
    fewer: Condvar,
}

/// The programs that no proxy has started.
static ALONE: LazyLock<Arc<Programs>> = LazyLock::new(Arc::default);

impl Programs {
    /// Returns the programs that no proxy has started.
    pub(crate) fn alone() -> Arc<Programs> {
        Arc::clone(&ALONE)
    }

    fn connected(&self) -> MutexGuard<'_, usize> {
        lock(&self.connected)
    }

    /// Waits until no program is connected: once their connections are closed, that takes them at
    /// most [`HANG_UP`].
    pub(crate) fn wait(&self) {
        let time = HANG_UP + Duration::from_secs(1);
        let some = |connected: &mut usize| *connected > 0;
        drop(self.fewer.wait_timeout_while(self.connected(), time, some));
    }
}

/// A program that is counted as connected.
struct Connected(Arc<Programs>);

impl Connected {
    fn new(programs: Arc<Programs>) -> Connected {
        *programs.connected() += 1;
        Connected(programs)
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        *self.0.connected() -= 1;
        self.0.fewer.notify_all();
    }
}

/// What is told of the end of a program.
#[derive(Debug)]
pub(crate) enum ProgramEnd {
    /// Its connection was cut before it had ended its output: it is ended for that, and how is of
    /// no meaning.
    Cut,
    /// It had ended its output, and has ended itself; the error is that nobody knows how.
    Ended(io::Result<ExitStatus>),
}

/// Starts a program. Returns the connection with its standard input and output. Its end is told
/// once, on a thread of its own, and possibly before this returns.
///
/// # Errors
/// Returns why it can't be started; nothing is told then.
pub(crate) fn start(
    exec: &ExecAddress,
    programs: &Arc<Programs>,
    tell_end: impl FnOnce(ProgramEnd) + Send + 'static,
) -> Result<UnixStream> {
    let fail = |e| explain(exec, e);
    let (near, ours) = UnixStream::pair().map_err(fail)?;
    for end in [&near, &ours] {
        sys::make_room(&SockRef::from(end));
    }
    let (started, is_started) = channel();
    let connected = Connected::new(Arc::clone(programs));
    let (exec, span) = (exec.clone(), Span::current());
    let attend = {
        let exec = exec.clone();
        move || {
            let _span = span.enter();
            attend(&exec, ours, &started, connected, tell_end);
        }
    };
    let thread = thread::Builder::new().name("hvsock-exec".into());
    thread.spawn(attend).map_err(fail)?;
    // If no answer comes, the thread has panicked.
    let answer = is_started.recv();
    answer
        .unwrap_or_else(|_| Err(io::Error::other("its thread has ended")))
        .map_err(|e| explain(&exec, e))?;
    Ok(near)
}

/// Starts a program, carries its bytes, and reaps it.
fn attend(
    exec: &ExecAddress,
    near: UnixStream,
    started: &Sender<io::Result<()>>,
    connected: Connected,
    tell_end: impl FnOnce(ProgramEnd),
) {
    let begun = near.set_nonblocking(true).and_then(|()| spawn(exec));
    let (mut child, far) = match begun {
        Ok(begun) => begun,
        Err(e) => {
            let _ = started.send(Err(e));
            return;
        }
    };
    let (program, id) = (exec.program.display(), child.id());
    debug!(program = %program.to_string().escape_debug(), process = id, "started");
    // The dial may have been given up meanwhile.
    let _ = started.send(Ok(()));
    let mut carrier = ProgramCarrier::new(near, far);
    let log = |status: &io::Result<ExitStatus>| match status {
        Ok(status) => debug!(process = id, "{}", describe(*status)),
        // Another part of this program reaps all children, this one included.
        Err(e) => debug!(process = id, "ended; its status can't be had: {e}"),
    };
    match carrier.run() {
        CarryingEnd::All => {
            carrier.close();
            drop(connected);
            let status = child.wait();
            log(&status);
            tell_end(ProgramEnd::Ended(status));
        }
        CarryingEnd::Cut => {
            debug!(process = id, "its connection was cut: SIGHUP");
            // Nobody is to wait for what that takes.
            tell_end(ProgramEnd::Cut);
            log(&hang_up(&mut child, carrier.far));
            drop(connected);
        }
    }
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("ended by signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// Starts a program. Returns our end of its standard input and output.
fn spawn(exec: &ExecAddress) -> io::Result<(Child, Far)> {
    // A path without a slash would be searched for in `$PATH`.
    let program = std::path::absolute(&exec.program)?;
    let mut command = Command::new(program);
    command.args(&exec.args).envs(exec.env.iter().cloned());
    for name in OURS {
        if !exec.env.iter().any(|(given, _)| given == name) {
            command.env_remove(name);
        }
    }
    let (far, theirs): (Far, OwnedFd) = match exec.pty {
        true => {
            let (terminal, theirs) = sys::make_terminal().map_err(no_terminal)?;
            sys::set_nonblocking(&terminal)?;
            command.stderr(Stdio::from(theirs.try_clone()?));
            (Far::terminal(terminal), theirs)
        }
        false => {
            let (far, theirs) = UnixStream::pair()?;
            for end in [&far, &theirs] {
                sys::make_room(&SockRef::from(end));
            }
            far.set_nonblocking(true)?;
            (Far::Socket(far), theirs.into())
        }
    };
    command.stdin(Stdio::from(theirs.try_clone()?));
    command.stdout(Stdio::from(theirs));
    sys::detach_command(
        &mut command,
        match exec.pty {
            true => Leads::Session,
            false => Leads::Group,
        },
    );
    // The command has the program's end, too, until it is dropped here.
    Ok((command.spawn()?, far))
}

/// Tells that there is no terminal from that there is no program.
fn no_terminal(cause: io::Error) -> io::Error {
    io::Error::other(format!("it gets no terminal: {cause}"))
}

/// Ends a program whose connection was cut, with its group: SIGHUP, then SIGKILL.
///
/// Its input doesn't end before that: the program must not take what it has received for all.
fn hang_up(child: &mut Child, far: Far) -> io::Result<ExitStatus> {
    let group = child.id();
    sys::hang_up_group(group);
    let far = match far {
        // Processes of its session in other groups get SIGHUP from the terminal.
        Far::Terminal { .. } => None,
        socket @ Far::Socket(_) => Some(socket),
    };
    let (end, [mut pause, longest]) = (Instant::now() + HANG_UP, LOOKS);
    let mut status = None;
    while Instant::now() < end {
        if status.is_none() {
            status = child.try_wait()?;
        }
        // The group's number is not used again as long as one of its processes lives.
        if status.is_some() && !sys::has_group(group) {
            break;
        }
        thread::sleep(pause);
        pause = (pause * 2).min(longest);
    }
    if status.is_none() || sys::has_group(group) {
        debug!(process = group, "it goes on after SIGHUP: SIGKILL");
        sys::kill_group(group);
    }
    drop(far);
    status.map_or_else(|| child.wait(), Ok)
}

/// Our end of a program's standard input and output.
enum Far {
    Socket(UnixStream),
    Terminal {
        terminal: File,
        /// Whether something was written since the last end of a line.
        in_line: bool,
    },
}

impl Far {
    fn terminal(terminal: File) -> Far {
        Far::Terminal {
            terminal,
            in_line: false,
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Far::Socket(socket) => socket.read(buffer),
            Far::Terminal { terminal, .. } => terminal.read(buffer),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Far::Socket(socket) => socket.write(bytes),
            Far::Terminal { terminal, in_line } => {
                let count = terminal.write(bytes)?;
                if let Some(last) = bytes[..count].last() {
                    *in_line = *last != b'\n';
                }
                Ok(count)
            }
        }
    }

    /// Returns what ends its input when it is written; a socket is half-closed instead.
    fn end_of_input(&mut self) -> Vec<u8> {
        match self {
            Far::Socket(socket) => {
                let _ = socket.shutdown(Shutdown::Write);
                Vec::new()
            }
            // The first EOF character in a line only ends the line.
            Far::Terminal { terminal, in_line } => {
                vec![sys::end_of_input(terminal); 1 + usize::from(*in_line)]
            }
        }
    }

    /// Returns whether nothing can be written any more, once nothing can be read.
    fn has_closed(&self) -> bool {
        match self {
            Far::Socket(socket) => sys::is_closed_by_peer(socket),
            Far::Terminal { .. } => true,
        }
    }
}

impl AsFd for Far {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Far::Socket(socket) => socket.as_fd(),
            Far::Terminal { terminal, .. } => terminal.as_fd(),
        }
    }
}

/// The reason for which carrying has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CarryingEnd {
    /// The program has ended its output, and all of it was delivered.
    All,
    /// The connection has ended before.
    Cut,
}

/// Carries the bytes between a connection and a program. A buffer is filled only when it is empty.
struct ProgramCarrier {
    near: UnixStream,
    far: Far,
    /// To the program.
    up: ProgramFlow,
    /// From the program.
    down: ProgramFlow,
}

/// One direction.
struct ProgramFlow {
    buffer: Vec<u8>,
    /// The bytes of the buffer that are still to be written.
    left: std::ops::Range<usize>,
    /// Whether the source has ended.
    ended: bool,
    /// Whether the end was passed on, or nothing can be written any more.
    closed: bool,
}

impl ProgramFlow {
    fn new() -> ProgramFlow {
        ProgramFlow {
            buffer: vec![0; BUFFER],
            left: 0..0,
            ended: false,
            closed: false,
        }
    }

    fn wants_to_read(&self) -> bool {
        !self.ended && !self.closed && self.left.is_empty()
    }

    fn wants_to_write(&self) -> bool {
        !self.closed && !self.left.is_empty()
    }

    fn fill(&mut self, read: impl FnOnce(&mut [u8]) -> io::Result<usize>) {
        if !self.wants_to_read() {
            return;
        }
        match read(&mut self.buffer) {
            Ok(0) => self.ended = true,
            Ok(count) => self.left = 0..count,
            Err(e) if would_wait(&e) => {}
            // This comes from a program that has ended without reading all that was sent
            // (ECONNRESET), and from a terminal that nobody has any more (EIO).
            Err(_) => self.ended = true,
        }
    }

    fn empty(&mut self, write: impl FnOnce(&[u8]) -> io::Result<usize>) {
        if !self.wants_to_write() {
            return;
        }
        match write(&self.buffer[self.left.clone()]) {
            Ok(count) => self.left.start += count,
            Err(e) if would_wait(&e) => {}
            Err(_) => self.closed = true,
        }
    }

    /// Returns whether the end is to be passed on now.
    fn is_at_its_end(&self) -> bool {
        self.ended && !self.closed && self.left.is_empty()
    }
}

fn would_wait(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted)
}

impl ProgramCarrier {
    fn new(near: UnixStream, far: Far) -> ProgramCarrier {
        ProgramCarrier {
            near,
            far,
            up: ProgramFlow::new(),
            down: ProgramFlow::new(),
        }
    }

    /// Carries until the program has ended its output, or the connection is cut.
    fn run(&mut self) -> CarryingEnd {
        let mut ends_input = false;
        loop {
            self.up.fill(|buffer| self.near.read(buffer));
            // This is checked first: an EOF of a connection that was cut is not the client's, and
            // must not be passed on.
            if sys::is_closed_by_peer(&self.near) {
                return self.end();
            }
            self.up.empty(|bytes| self.far.write(bytes));
            if self.up.is_at_its_end() {
                let end = match std::mem::replace(&mut ends_input, true) {
                    true => Vec::new(),
                    false => self.far.end_of_input(),
                };
                self.up.buffer[..end.len()].copy_from_slice(&end);
                self.up.left = 0..end.len();
                self.up.closed = end.is_empty();
            }
            if self.up.closed && !self.up.ended {
                // What the client still sends goes nowhere, as with a server that has closed.
                self.up.ended = true;
                let _ = self.near.shutdown(Shutdown::Read);
            }
            self.down.fill(|buffer| self.far.read(buffer));
            self.down.empty(|bytes| self.near.write(bytes));
            if self.down.closed && !self.down.ended {
                return CarryingEnd::Cut;
            }
            if self.down.is_at_its_end() {
                let _ = self.near.shutdown(Shutdown::Write);
                self.down.closed = true;
            }
            let output_has_ended = self.down.closed;
            if output_has_ended && (self.up.closed || self.far.has_closed()) {
                return CarryingEnd::All;
            }
            self.wait();
        }
    }

    /// Returns how carrying has ended, now that the connection is closed.
    fn end(&mut self) -> CarryingEnd {
        // The program may have ended its output at the same time.
        self.down.fill(|buffer| self.far.read(buffer));
        match self.down.ended && self.down.left.is_empty() {
            true => CarryingEnd::All,
            false => CarryingEnd::Cut,
        }
    }

    /// Waits for what may be done next.
    fn wait(&self) {
        let (up, down) = (&self.up, &self.down);
        let events = |reads: bool, writes: bool| {
            let mut events = PollFlags::empty();
            events.set(PollFlags::POLLIN, reads);
            events.set(PollFlags::POLLOUT, writes);
            events
        };
        let near = events(up.wants_to_read(), down.wants_to_write());
        let far = events(down.wants_to_read(), up.wants_to_write());
        // The end of the connection is always of interest.
        let mut asked = vec![PollFd::new(self.near.as_fd(), near)];
        // A descriptor that has ended would be ready all the time.
        if !far.is_empty() {
            asked.push(PollFd::new(self.far.as_fd(), far));
        }
        let answered = poll(&mut asked, PollTimeout::NONE).is_ok();
        let useful = PollFlags::POLLIN | PollFlags::POLLOUT;
        let has_work = asked
            .iter()
            .any(|it| it.revents().is_some_and(|now| now.intersects(useful)));
        if answered && !has_work && !sys::is_closed_by_peer(&self.near) {
            // macOS reports a half-close all the time, as a hang-up.
            thread::sleep(LOOKS[1]);
        }
    }

    /// Ends the connection and reads what nobody has read, so that its close is no reset.
    fn close(&mut self) {
        let _ = self.near.shutdown(Shutdown::Both);
        let mut unread = [0; 4096];
        while matches!(self.near.read(&mut unread), Ok(1..)) {}
    }
}

/// Returns the error of a program that can't be started, with what can be done about it.
fn explain(exec: &ExecAddress, cause: io::Error) -> Error {
    let (program, shown) = (&exec.program, exec.program.display());
    let is_program = |it: std::fs::Metadata| sys::is_program(&it);
    let remedy = match cause.kind() {
        io::ErrorKind::NotFound if program.exists() => format!(
            "the interpreter in the first line (#!) of {shown}, or its loader, is missing: install it"
        ),
        io::ErrorKind::NotFound => format!("there is no program {shown}: is the path right?"),
        io::ErrorKind::PermissionDenied if program.is_dir() => {
            format!("{shown} is a directory: name the program in it")
        }
        io::ErrorKind::PermissionDenied if program.metadata().is_ok_and(is_program) => {
            format!("this user may not start {shown}, or its interpreter: have their modes changed")
        }
        io::ErrorKind::PermissionDenied => format!("make it executable: chmod +x {shown}"),
        _ if cause.raw_os_error() == Some(nix::libc::ENOEXEC) => format!(
            "{shown} is no program of this system; if it is a script, begin it with a line such as #!/bin/sh"
        ),
        _ if cause.raw_os_error() == Some(nix::libc::E2BIG) => {
            "its arguments and its environment are too long: shorten them".to_owned()
        }
        _ => return Error::new(Operation::Connect, exec, cause),
    };
    Error::new(Operation::Connect, exec, cause).with_remedy(remedy)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_can_not_be_started_is_named_with_its_remedy() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a b");
        std::fs::write(&path, "echo").unwrap();
        let exec = ExecAddress::new(&path);
        let say = |error: i32| explain(&exec, io::Error::from_raw_os_error(error)).to_string();
        for (error, part) in [
            (nix::libc::ENOEXEC, "begin it with a line such as #!/bin/sh"),
            (nix::libc::EACCES, "chmod +x"),
            (nix::libc::ENOENT, "interpreter in the first line"),
        ] {
            let told = say(error);
            // As it is written in a shell, and not as in the address.
            let shown = path.display().to_string();
            assert!(told.contains(part) && told.contains(&shown), "{told}");
        }
        assert!(say(nix::libc::E2BIG).contains("too long"));
        std::fs::remove_file(&path).unwrap();
        let told = say(nix::libc::ENOENT);
        let right = format!("there is no program {}", path.display());
        assert!(told.contains(&right), "{told}");
    }
}
