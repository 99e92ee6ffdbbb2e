//! `hvsock.mode=host`: this system as a Linux host whose QEMU has a vhost-vsock device. Its guest
//! is the same kernel, with [`serve`](crate::serve) as its `/init`. The QEMU outside emulates a
//! processor with KVM for this system.

use std::error::Error;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::Hvsock;
use crate::report::{Outcome, ensure, eventually};
use crate::services::{
    End, Request, ask, ask_client, crowd_client, echo, echo_client, tell, tell_client, verdict,
};
use crate::sockets::{Server, connect_unix, connect_vsock_of};
use crate::tools::{Tool, cat_echo, cat_refused};

type Failure = Box<dyn Error + Send + Sync>;

const HVSOCK: &str = "/hvsock";
const CID: u32 = 3;
const CONTROL: u32 = 1;
const MIB: usize = 1024 * 1024;
const SOON: Duration = Duration::from_secs(30);
/// The time that a boot may take: 5 s on a processor of its own, some minutes where eight share it.
const BOOT: Duration = Duration::from_secs(200);

/// The forwards of `expose` to the guest's own services, and to those of this system: no hvsock
/// runs in the guest.
const FORWARDS: &str = "-L 127.0.0.1:2222:1007 -L /echo.sock:1007 -L /ask.sock:1009 -L /tell.sock:1008 \
    -L /nobody.sock:99 \
    -R 5007:unix:///host-echo.sock -R 5008:unix:///host-tell.sock -R 5009:unix:///host-ask.sock";

const MACHINE: &str = "-name build -L /share -accel kvm -cpu host -M pc,kernel-irqchip=split -m 192 -nodefaults \
    -no-user-config -display none -serial stdio";

/// The status of a VM that came after the first.
const UP_AGAIN: [&str; 2] = ["VM vsock://3: up, ", "; 0 connections, 1 restart\n"];

/// An hvsock, and the VM that it leads to.
pub(crate) struct Host {
    hvsock: Hvsock,
    vm: Mutex<Option<Vm>>,
}

/// A running QEMU. Dropping it kills it.
struct Vm {
    qemu: Child,
    boots: Arc<AtomicUsize>,
}

impl Vm {
    fn start() -> Result<Vm, Failure> {
        let mut qemu = Command::new("/bin/qemu-system-x86_64");
        qemu.args(MACHINE.split(' '));
        qemu.args(["-device", &format!("vhost-vsock-pci,guest-cid={CID}")]);
        qemu.args(["-kernel", "/vmlinux", "-initrd", "/initramfs", "-append"]);
        qemu.arg("console=ttyS0 quiet panic=-1 mitigations=off hvsock.mode=serve");
        let mut qemu = qemu.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let boots = Arc::new(AtomicUsize::new(0));
        let (seen, out) = (Arc::clone(&boots), qemu.stdout.take());
        thread::spawn(move || {
            for line in out.into_iter().flat_map(|out| BufReader::new(out).lines()) {
                let Ok(line) = line else { break };
                println!("# guest: {}", line.trim_end());
                seen.fetch_add(usize::from(line.trim_end() == "serving"), Ordering::SeqCst);
            }
        });
        Ok(Vm { qemu, boots })
    }

    fn signal(&self, signal: Signal) -> Outcome {
        let id = i32::try_from(self.qemu.id())?;
        Ok(kill(Pid::from_raw(id), signal)?)
    }

    fn wait_for_boot(&self, number: usize) -> Outcome {
        let serves = || self.boots.load(Ordering::SeqCst) >= number;
        ensure!(eventually(BOOT, serves), "the guest doesn't serve");
        Ok(())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Sends the guest a command, and returns its answer.
fn order(order: &str) -> Result<String, Failure> {
    let mut client = connect_vsock_of(CID, CONTROL)?;
    client.set_read_timeout(Some(Duration::from_secs(60)))?;
    client.write_all(format!("{order}\n").as_bytes())?;
    let mut answer = String::new();
    BufReader::new(client).read_line(&mut answer)?;
    match answer.trim_end().strip_prefix("ok") {
        Some(answer) => Ok(answer.trim_start().to_owned()),
        None => Err(format!("{order}: the guest says {answer:?}").into()),
    }
}

/// Runs hvsock, and returns its exit code and what it prints.
fn tool(words: &str) -> Result<(Option<i32>, String), Failure> {
    Tool::start(Path::new(HVSOCK), words)?.end()
}

impl Host {
    /// Starts hvsock, with no VM yet.
    pub(crate) fn start() -> Result<Host, Failure> {
        Server::unix("/host-echo.sock")?.serve(echo);
        Server::unix("/host-tell.sock")?.serve(tell);
        Server::unix("/host-ask.sock")?.serve(ask);
        let options = "--control=/control --dial-timeout 4";
        let words = format!("expose --vm vsock://{CID} {options} {FORWARDS}");
        let (hvsock, _) = Hvsock::start_listening(&words)?;
        let vm = Mutex::new(None);
        Ok(Host { hvsock, vm })
    }

    fn with_vm<T>(&self, body: impl FnOnce(&mut Option<Vm>) -> T) -> T {
        body(&mut self.vm.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn signal(&self, signal: Signal) -> Outcome {
        self.with_vm(|vm| vm.as_ref().ok_or("no VM runs")?.signal(signal))
    }

    fn says(&self, what: &str) -> Outcome {
        let said = self.hvsock.says(what, SOON);
        ensure!(said, "not {what:?}, but: {}", self.hvsock.said());
        Ok(())
    }

    /// Waits until `hvsock COMMAND` prints all this.
    fn shows(&self, command: &str, what: &[&str]) -> Outcome {
        let mut last = String::new();
        let shown = eventually(SOON, || {
            last = tool(&format!("{command} --control /control"))
                .map_or_else(|e| e.to_string(), |(_, said)| said);
            what.iter().all(|what| last.contains(what))
        });
        ensure!(shown, "not all of {what:?} is in {last}");
        Ok(())
    }

    /// Checks that clients are refused without a VM, that QEMU is seen when it has started, and its
    /// guest when it answers.
    pub(crate) fn vm_comes(&self) -> Outcome {
        refused("/echo.sock")?;
        self.says("the VM at vsock://3 is not there: ")?;
        self.shows("status", &["VM vsock://3: not there yet"])?;
        let (_, said) = tool("vms")?;
        ensure!(!said.contains("QEMU"), "{said}");
        let vm = Vm::start()?;
        self.says("the VM at vsock://3 is there")?;
        let (_, said) = tool("vms")?;
        let row: Vec<&str> = said
            .lines()
            .filter(|line| line.starts_with("build "))
            .flat_map(str::split_whitespace)
            .collect();
        ensure!(row == ["build", "QEMU", "running", "vsock://3"], "{said}");
        ensure!(said.contains("this system's CID: 2, a host's"), "{said}");
        vm.wait_for_boot(1)?;
        self.with_vm(|it| *it = Some(vm));
        let (code, said) = tool("doctor --vm build --port 1007 --control /control")?;
        let listened = code == Some(0) && said.contains("is listened on");
        ensure!(listened, "{code:?}: {said}");
        // The dial of `doctor` is not one of the proxy's.
        self.shows("status", &["VM vsock://3: up, not heard from yet"])
    }

    /// Checks bytes, ends and refusals from the host to the guest.
    pub(crate) fn to_guest(&self) -> Outcome {
        cat_echo(Path::new(HVSOCK), "tcp://127.0.0.1:2222", MIB)?;
        cat_echo(Path::new(HVSOCK), "--vm build 1007", MIB)?;
        echo_client(&connect_unix("/echo.sock")?, 1, MIB, End::HalfClose)?;
        ask_client(&connect_unix("/ask.sock")?, request())?;
        tell_client(&connect_unix("/tell.sock")?, request())?;
        order("verdict")?;
        crowd_client(64, End::HalfClose, || connect_unix("/echo.sock"))?;
        cat_refused(Path::new(HVSOCK), "--vm vsock://3 99")?;
        refused("/nobody.sock")?;
        self.says("refused a client of unix:///nobody.sock: cannot connect to vsock://3:99: ")?;
        self.is_idle()
    }

    /// Checks the same from the guest to the host.
    pub(crate) fn to_host(&self) -> Outcome {
        order(&format!("echo 5007 {MIB} half-close"))?;
        order(&format!("ask 5009 {MIB} {MIB}"))?;
        order(&format!("tell 5008 {MIB} {MIB}"))?;
        verdict()?;
        order("crowd 5007 64 half-close")?;
        order(&format!("cat 5007 {MIB}"))?;
        let told = order("refused 5099")?;
        ensure!(told.contains("connect: Connection reset"), "{told}");
        self.is_idle()
    }

    /// Checks a VM that is killed: all its connections end at once, without a further dial.
    pub(crate) fn vm_killed(&self) -> Outcome {
        let held = held("/echo.sock")?;
        let server = Server::unix("/host-held.sock")?;
        let pair = "5010:unix:///host-held.sock";
        let (code, said) = tool(&format!("add --control /control --vm vsock://3 -R {pair}"))?;
        ensure!(code == Some(0), "{said}");
        thread::spawn(|| order("echo 5010 1024 close"));
        let mut guest = server.accept()?;
        guest.read_exact(&mut [0; 1024])?;
        self.shows(
            "status",
            &["; 2 connections, 1 of them the guest's, 0 restarts"],
        )?;
        // As kill -9.
        self.with_vm(Option::take).ok_or("no VM runs")?;
        for (mut peer, name) in [(held, "the host's client"), (guest, "the guest's server")] {
            let end = peer.read(&mut [0; 1]);
            ensure!(is_end(&end), "{name} read {end:?}");
        }
        self.says("the VM at vsock://3 is gone")?;
        self.shows("status", &["VM vsock://3: gone for "])?;
        let (_, said) = tool("connections --ended --control /control")?;
        ensure!(said.matches("VM gone").count() == 2, "{said}");
        refused("/echo.sock")?;
        self.is_idle()
    }

    /// Checks another VM with the same CID: it is seen, and the forwards go on.
    pub(crate) fn vm_back(&self) -> Outcome {
        let vm = Vm::start()?;
        self.says("the VM at vsock://3 is back after ")?;
        vm.wait_for_boot(1)?;
        self.with_vm(|it| *it = Some(vm));
        echo_client(&connect_unix("/echo.sock")?, 2, MIB, End::HalfClose)?;
        order(&format!("echo 5007 {MIB} half-close"))?;
        self.shows("status", &UP_AGAIN)
    }

    /// Checks a VM that is stopped: connections wait, dials fail in time, and all goes on when it
    /// does.
    pub(crate) fn vm_stopped(&self) -> Outcome {
        let mut held = held("/echo.sock")?;
        self.signal(Signal::SIGSTOP)?;
        held.write_all(b"later")?;
        refused("/echo.sock")?;
        self.says("cannot connect to vsock://3:1007: no connection within the dial timeout")?;
        self.shows("status", &["VM vsock://3: gone for "])?;
        let (code, said) = tool("doctor --vm build --port 1007 --timeout 1")?;
        let told = said.contains(" is stopped, by SIGSTOP or a debugger\n")
            && said.contains("let it go on: kill -CONT ");
        ensure!(code == Some(1) && told, "{code:?}: {said}");
        self.signal(Signal::SIGCONT)?;
        held.read_exact(&mut [0; 5])?;
        echo_client(&connect_unix("/echo.sock")?, 3, MIB, End::HalfClose)?;
        // The restarts show that the VM is still the same.
        drop(held);
        self.shows("status", &UP_AGAIN)
    }

    /// Checks that no connection of a check is left.
    fn is_idle(&self) -> Outcome {
        self.shows("status", &[", 0 connections\n"])
    }
}

fn request() -> Request {
    Request {
        wait: 0,
        up: MIB,
        down: MIB,
        seed: 60,
    }
}

/// Returns a client of an echo server, once it has its first answer.
fn held(path: &str) -> Result<UnixStream, Failure> {
    let mut client = connect_unix(path)?;
    client.write_all(b"?")?;
    client.read_exact(&mut [0; 1])?;
    Ok(client)
}

/// Checks that a client there is accepted, and then closed.
fn refused(path: &str) -> Outcome {
    let end = connect_unix(path)?.read(&mut [0; 1]);
    ensure!(is_end(&end), "a client of {path} read {end:?}");
    Ok(())
}

fn is_end(read: &std::io::Result<usize>) -> bool {
    match read {
        Ok(n) => *n == 0,
        Err(e) => e.kind() == ErrorKind::ConnectionReset,
    }
}
