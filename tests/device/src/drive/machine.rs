//! A VM: QEMU with its guest, and the process that is its vsock device.

use std::error::Error;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::process::Process;
use crate::report::eventually;
use crate::sockets::unix;

type Failure = Box<dyn Error + Send + Sync>;

/// Where the parts are.
#[derive(Clone)]
pub(crate) struct Parts {
    /// The folder into which QEMU's packages are unpacked.
    pub(crate) root: PathBuf,
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    pub(crate) hvsock: PathBuf,
    pub(crate) device: PathBuf,
    /// vhost-device-vsock.
    pub(crate) peer: PathBuf,
}

/// Which device stands behind the host's sockets.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Ours, with hyperkit's face.
    Exact,
    /// The stock one.
    Stock,
}

/// The guest's CID: hyperkit's, and one for the other.
fn cid(kind: Kind) -> u32 {
    match kind {
        Kind::Exact => 3,
        Kind::Stock => 42,
    }
}

/// The port on which the guest takes orders.
const CONTROL: u32 = 1;

pub(crate) struct Machine {
    kind: Kind,
    /// What the host's programs know of it: a state directory, or the path of the stock device's
    /// socket.
    place: PathBuf,
    pub(crate) device: Process,
    pub(crate) qemu: Process,
    boots: usize,
}

impl Machine {
    /// Starts it, and returns at once.
    pub(crate) fn start(
        kind: Kind,
        parts: &Parts,
        dir: &Path,
        place: &Path,
    ) -> Result<Machine, Failure> {
        let vhost = dir.join("vhost.sock");
        let _ = fs::remove_file(&vhost);
        let mut command = match kind {
            Kind::Exact => {
                let mut command = Command::new(&parts.device);
                command.arg(&vhost).arg(place).arg(cid(kind).to_string());
                command
            }
            Kind::Stock => {
                // It replaces no file that an earlier one left.
                let _ = fs::remove_file(place);
                let mut command = Command::new(&parts.peer);
                command.arg("--guest-cid").arg(cid(kind).to_string());
                command.arg("--socket").arg(&vhost);
                command.arg("--uds-path").arg(place);
                command
            }
        };
        let device = Process::start(&mut command)?;
        let listens = eventually(Duration::from_secs(20), || vhost.exists());
        if !listens {
            return Err(format!("the device doesn't listen: {}", device.err()).into());
        }
        let qemu = Process::start(&mut qemu(parts, &vhost))?;
        Ok(Machine {
            kind,
            place: place.to_owned(),
            device,
            qemu,
            boots: 1,
        })
    }

    /// Waits until the guest serves; fails if it doesn't in time.
    pub(crate) fn wait_until_it_serves(&mut self, within: Duration) -> Result<(), Failure> {
        let serves = eventually(within, || {
            self.qemu.out().matches("serving").count() >= self.boots || !self.qemu.is_running()
        });
        if serves && self.qemu.is_running() {
            return Ok(());
        }
        Err(format!(
            "the guest doesn't serve: {}{}{}",
            self.qemu.out(),
            self.qemu.err(),
            self.device.err()
        )
        .into())
    }

    /// Tells the guest to reboot; QEMU and the device run on.
    pub(crate) fn reboot(&mut self) -> Result<(), Failure> {
        self.order("reboot")?;
        self.boots += 1;
        Ok(())
    }

    /// Kills it. Our device ends by itself then, as hyperkit is one process with its VM.
    pub(crate) fn stop(&mut self) {
        self.qemu.kill();
        if self.kind == Kind::Exact {
            self.device.end(Duration::from_secs(10));
        }
        self.device.kill();
    }

    pub(crate) fn line(&self) -> Line {
        Line {
            kind: self.kind,
            place: self.place.clone(),
        }
    }

    pub(crate) fn order(&self, order: &str) -> Result<String, Failure> {
        self.line().order(order)
    }
}

/// The direct line to the guest, past our proxy.
#[derive(Clone)]
pub(crate) struct Line {
    kind: Kind,
    place: PathBuf,
}

impl Line {
    /// A stream to a port of the guest.
    pub(crate) fn dial(&self, port: u32) -> io::Result<UnixStream> {
        match self.kind {
            Kind::Exact => {
                let mut stream = unix(&self.place.join("connect"))?;
                stream.write_all(format!("{:08x}.{port:08x}\n", cid(self.kind)).as_bytes())?;
                Ok(stream)
            }
            Kind::Stock => {
                let mut stream = unix(&self.place)?;
                stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
                // What it is sent before it has answered is lost.
                let mut answer = String::new();
                BufReader::with_capacity(1, &stream).read_line(&mut answer)?;
                if answer.starts_with("OK ") {
                    Ok(stream)
                } else {
                    Err(io::Error::new(io::ErrorKind::ConnectionRefused, answer))
                }
            }
        }
    }

    /// Has the guest do something, and waits for what it says about it.
    pub(crate) fn order(&self, order: &str) -> Result<String, Failure> {
        let mut stream = self.dial(CONTROL)?;
        stream.set_read_timeout(Some(Duration::from_secs(240)))?;
        writeln!(stream, "{order}")?;
        let mut answer = String::new();
        BufReader::new(&stream).read_line(&mut answer)?;
        match answer.trim().split_once(' ').unwrap_or((answer.trim(), "")) {
            ("ok", answer) => Ok(answer.to_owned()),
            ("failed", why) => Err(format!("in the guest: {why}").into()),
            _ => Err(format!("the guest answers {answer:?} to {order:?}").into()),
        }
    }
}

/// QEMU finds its own data relative to itself. Without erms, fsrm, smap and smep copying is four
/// times as fast here.
fn qemu(parts: &Parts, vhost: &Path) -> Command {
    let root = |path: &str| parts.root.join(path);
    let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
    let libraries = libraries
        .map(|path| root(path).display().to_string())
        .join(":");
    let mut command = Command::new(root("usr/bin/qemu-system-x86_64"));
    command
        .env("LD_LIBRARY_PATH", libraries)
        .arg("-L")
        .arg(root("usr/share/seabios"))
        .arg("-L")
        .arg(root("usr/share/qemu"))
        .args("-accel tcg -cpu max,-erms,-fsrm,-smap,-smep".split(' '))
        .args("-M q35,memory-backend=mem0 -m 256 -smp 2".split(' '))
        .args("-object memory-backend-memfd,id=mem0,size=256M,share=on".split(' '))
        .args("-nodefaults -no-user-config -display none -serial stdio".split(' '))
        .arg("-chardev")
        .arg(format!("socket,id=vs,path={},reconnect=0", vhost.display()))
        .args(["-device", "vhost-user-vsock-pci,chardev=vs"])
        .arg("-kernel")
        .arg(&parts.kernel)
        .arg("-initrd")
        .arg(&parts.initramfs)
        .args([
            "-append",
            "console=ttyS0 quiet panic=-1 mitigations=off hvsock.mode=serve",
        ]);
    command
}
