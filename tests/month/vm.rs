//! The VM: `hvsock simulate` as a child, which is ended and started anew; what runs in its guest
//! outlives it.

use crate::child::{Places, Proxy};
use crate::crowd::Guests;
use crate::guest::{CHARGEN, DISCARD, ECHO, HTTP, LONG, PROGRAMS, Program};
use nix::sys::signal::Signal;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::thread;

/// Where programs in the guest can be made to dial.
#[derive(Debug)]
pub(crate) struct Doors(pub(crate) PathBuf);

impl Doors {
    fn path(&self, port: u32) -> PathBuf {
        self.0.join(format!("dial-{port}"))
    }

    fn program(&self, port: u32) -> PathBuf {
        self.0.join(format!("guest-{port}"))
    }

    /// Starts the guest's programs, whose threads end with the process.
    pub(crate) fn start(root: PathBuf) -> Doors {
        let doors = Doors(root);
        for (port, program) in PROGRAMS {
            let listener = UnixListener::bind(doors.program(port)).unwrap();
            thread::spawn(move || serve(&listener, program));
        }
        doors
    }
}

fn serve(listener: &UnixListener, program: Program) {
    for stream in listener.incoming().flatten() {
        thread::spawn(move || {
            let _ = stream.set_read_timeout(Some(LONG));
            let _ = stream.set_write_timeout(Some(LONG));
            program(stream)
        });
    }
}

impl Guests for Doors {
    fn dial(&self, port: u32) -> io::Result<UnixStream> {
        UnixStream::connect(self.path(port))
    }
}

#[derive(Debug)]
pub(crate) struct Machine(Proxy);

impl Machine {
    pub(crate) fn start(places: &Places, doors: &Doors) -> Result<Machine, String> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
        command.arg("simulate").arg(&places.vm);
        for (port, service) in [
            (ECHO, "echo"),
            (DISCARD, "discard"),
            (CHARGEN, "chargen"),
            (HTTP, "http"),
        ] {
            command.args(["--guest", &format!("{port}={service}")]);
        }
        for (port, _) in PROGRAMS {
            let path = doors.program(port);
            command.args(["--guest", &format!("{port}=unix://{}", path.display())]);
        }
        for (port, _) in &places.remotes {
            let path = doors.path(*port);
            command.args(["--dial", &format!("{port}=unix://{}", path.display())]);
        }
        let mut machine = Proxy::spawn(command, places.root.join("vm.log"))?;
        machine.line()?;
        Ok(Machine(machine))
    }

    /// What its end has to say, if it ended by itself.
    pub(crate) fn check(&mut self) -> Result<(), String> {
        match self.0.exited() {
            None => Ok(()),
            Some(status) => Err(format!("the VM, {status}: {}", self.0.log_tail())),
        }
    }

    pub(crate) fn end(mut self, signal: Signal) -> Result<(), String> {
        self.check()?;
        self.0.signal(signal);
        self.0.wait(LONG).map(drop)
    }
}
