//! A program that runs: one of the others, or ours.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use command_fds::{CommandFdExt, FdMapping};

use crate::common::{PATIENCE, eventually};
use crate::place::Place;

/// Whether that program is installed. `.ci/run` says by a variable that it has to be.
pub(crate) fn is_installed(program: &str) -> bool {
    let look = format!("command -v {program}");
    let there = Command::new("sh").args(["-c", &look]).output().unwrap();
    if there.status.success() {
        return true;
    }
    let required = std::env::var_os("HVSOCK_TEST_PROGRAMS").is_some();
    assert!(!required, "{program} is not installed");
    println!("skipped in part: there is no {program}; install it");
    false
}

pub(crate) struct Program {
    pub(crate) child: Child,
    pub(crate) is_ours: bool,
    stdin: Option<ChildStdin>,
    stdout: Receiver<Vec<u8>>,
}

impl Program {
    /// Runs the words of a shell, which are one command.
    pub(crate) fn start(words: &str) -> Program {
        let mut command = Command::new("sh");
        command.args(["-c", words]);
        Program::spawn(command)
    }

    /// The same, once it listens there.
    pub(crate) fn listening(words: &str, front: Place) -> Program {
        let program = Program::start(&format!("exec {words}"));
        front.wait_until_somebody_listens();
        program
    }

    /// The same, with a socket as a service manager passes it.
    pub(crate) fn with_passed(words: &str, socket: OwnedFd) -> Program {
        let mut command = Command::new("sh");
        // Only the process itself knows its id.
        command.args(["-c", &format!("LISTEN_PID=$$ LISTEN_FDS=1 exec {words}")]);
        let mapping = FdMapping {
            parent_fd: socket,
            child_fd: 3,
        };
        command.fd_mappings(vec![mapping]).unwrap();
        Program::spawn(command)
    }

    fn spawn(mut command: Command) -> Program {
        let words = command.get_args().last().unwrap().to_owned();
        println!("+ {}", words.display());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (told, stdout) = channel();
        let mut pipe = child.stdout.take().unwrap();
        thread::spawn(move || {
            let mut all = Vec::new();
            let _ = pipe.read_to_end(&mut all);
            told.send(all)
        });
        let stdin = child.stdin.take();
        Program {
            child,
            is_ours: words.to_string_lossy().contains("hvsock "),
            stdin,
            stdout,
        }
    }

    /// Gives it its input, and the end of that.
    pub(crate) fn feed(&mut self, input: &[u8]) {
        // One that has ended doesn't read it.
        let _ = self.stdin.take().unwrap().write_all(input);
    }

    pub(crate) fn exit_code(&mut self) -> Option<i32> {
        let mut code = None;
        eventually("it exits", || {
            code = self.child.try_wait().unwrap();
            code.is_some()
        });
        code.unwrap().code()
    }

    /// Ends it as a service manager does; ours at once.
    pub(crate) fn terminate(mut self) {
        let kill = format!("kill -TERM {}", self.child.id());
        for _ in 0..2 {
            // It may have ended by itself.
            let killed = Command::new("sh").args(["-c", &kill]).output();
            killed.unwrap();
        }
        self.exit_code();
    }

    /// What it has written by its end, and whether it says that all is well.
    pub(crate) fn end(mut self) -> (String, bool) {
        let code = self.exit_code();
        let said = self.stdout.recv_timeout(PATIENCE).unwrap();
        (String::from_utf8(said).unwrap(), code == Some(0))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a command that ends by itself has written; that it succeeds is asserted.
pub(crate) fn run(words: &str) -> String {
    let mut program = Program::start(words);
    program.feed(b"");
    let (said, is_well) = program.end();
    assert!(is_well, "{words}: {said}");
    said
}
