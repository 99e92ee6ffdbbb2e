//! The real binary: running it, hearing what it says, ending it.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader, Read};
#[cfg(unix)]
use std::io::{ErrorKind, PipeReader, PipeWriter, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;

use crate::common::{PATIENCE, eventually};

/// A running `hvsock`, heard line by line.
pub(crate) struct Running {
    pub(crate) child: Mortal,
    pub(crate) out: Receiver<String>,
    pub(crate) err: Receiver<String>,
}

impl Running {
    pub(crate) fn start(arguments: &[&str]) -> Running {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
        command.args(arguments);
        Running::spawn(command)
    }

    pub(crate) fn spawn(mut command: Command) -> Running {
        command.stdin(Stdio::null());
        Running::spawn_fed(command)
    }

    /// Starts it with the standard input that it was given.
    pub(crate) fn spawn_fed(mut command: Command) -> Running {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let out = lines(child.stdout.take().unwrap());
        let err = lines(child.stderr.take().unwrap());
        Running {
            child: Mortal(child),
            out,
            err,
        }
    }

    /// The next line of standard output that contains `part`.
    pub(crate) fn says(&self, part: &str) -> String {
        next(&self.out, part)
    }

    /// The next line of standard error that contains `part`.
    pub(crate) fn complains(&self, part: &str) -> String {
        next(&self.err, part)
    }

    /// The port that was chosen for the next TCP forward it prints.
    pub(crate) fn tcp_port(&self) -> u16 {
        let line = self.says("tcp://127.0.0.1:");
        let port = line.split_once("127.0.0.1:").unwrap().1;
        port.split(' ').next().unwrap().parse().unwrap()
    }

    pub(crate) fn signal(&self, signal: &str) {
        self.child.signal(signal);
    }

    pub(crate) fn descriptors(&self) -> usize {
        let path = format!("/proc/{}/fd", self.child.0.id());
        std::fs::read_dir(path).unwrap().count()
    }

    pub(crate) fn exit_code(&mut self) -> Option<i32> {
        self.child.exit_code()
    }
}

/// A process that is killed, if it still runs, at the end.
pub(crate) struct Mortal(pub(crate) Child);

impl Mortal {
    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.0.id().to_string();
        let killed = Command::new("kill").args(["-s", signal, &pid]).status();
        assert!(killed.unwrap().success());
    }

    pub(crate) fn exit_code(&mut self) -> Option<i32> {
        let mut code = None;
        eventually("it exits", || {
            code = self.0.try_wait().unwrap();
            code.is_some()
        });
        code.unwrap().code()
    }
}

impl Drop for Mortal {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn lines(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines() {
            if sender.send(line.unwrap()).is_err() {
                return;
            }
        }
    });
    receiver
}

pub(crate) fn next(lines: &Receiver<String>, part: &str) -> String {
    loop {
        match lines.recv_timeout(PATIENCE) {
            Ok(line) if line.contains(part) => return line,
            Ok(_) => {}
            Err(_) => panic!("no line with {part:?}"),
        }
    }
}

/// Writes until no more fits, to what doesn't block; how many bytes that were.
#[cfg(unix)]
pub(crate) fn fill(writer: &mut impl Write) -> usize {
    let mut filled = 0;
    let refused = loop {
        match writer.write(&[b'.'; 4096]) {
            Ok(n) => filled += n,
            Err(e) => break e,
        }
    };
    assert_eq!(refused.kind(), ErrorKind::WouldBlock);
    filled
}

/// A pipe without room for a single byte, and how many bytes are in it.
#[cfg(unix)]
pub(crate) fn full_pipe() -> (PipeReader, PipeWriter, usize) {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let (reader, mut writer) = std::io::pipe().unwrap();
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let filled = fill(&mut writer);
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    (reader, writer, filled)
}

/// What a command that ends by itself said.
pub(crate) fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(arguments);
    output(command)
}

/// What a command that ends by itself said. It is read meanwhile, for a pipe holds only so much.
pub(crate) fn output(mut command: Command) -> Output {
    command.stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Mortal(command.spawn().unwrap());
    let stdout = read_all(child.0.stdout.take().unwrap());
    let stderr = read_all(child.0.stderr.take().unwrap());
    eventually(&format!("{command:?} ends"), || {
        child.0.try_wait().unwrap().is_some()
    });
    Output {
        status: child.0.wait().unwrap(),
        stdout: stdout.join().unwrap(),
        stderr: stderr.join().unwrap(),
    }
}

fn read_all(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        pipe.read_to_end(&mut all).unwrap();
        all
    })
}

/// Asserts the exit code, and that the one complaint contains all parts.
pub(crate) fn fails(arguments: &[&str], code: i32, parts: &[&str]) {
    let output = run(arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    assert!(output.stdout.is_empty(), "{arguments:?}");
    for part in parts {
        assert!(
            said.contains(part),
            "{arguments:?}: {said:?} lacks {part:?}"
        );
    }
}

/// An hvsock for which `runtime` is the user's own directory.
pub(crate) fn in_runtime(runtime: &Path, arguments: &[&str]) -> Command {
    let mac = cfg!(target_os = "macos");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(arguments).env_remove("XDG_RUNTIME_DIR");
    command.env(if mac { "TMPDIR" } else { "XDG_RUNTIME_DIR" }, runtime);
    command
}

/// Puts the program where another user may run it. As a link if that can be: a file that is written
/// to can't be run, and a process that another test starts meanwhile has it open for a moment.
pub(crate) fn put_program(at: &Path) {
    let program = env!("CARGO_BIN_EXE_hvsock");
    if std::fs::hard_link(program, at).is_err() {
        std::fs::copy(program, at).unwrap();
    }
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
