//! `hvsock expose` in front of the device with hyperkit's face: nothing is lost, and all is told.

use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::machine::{Kind, Machine, Parts};
use crate::pattern::expect_pattern;
use crate::process::signal;
use crate::promptly::within_a_second;
use crate::proxy::Proxy;
use crate::report::{Outcome, ensure, eventually};
use crate::services::{
    End, Request, ask, ask_client, crowd_client, echo, echo_client, tell, tell_client, verdict,
};
use crate::sockets::{Front, reset, serve_tcp, serve_unix};
use crate::stand::Stand;
use crate::tools::{cat_echo, cat_refused, stress};

const MIB: usize = 1024 * 1024;
const SOON: Duration = Duration::from_secs(20);
const LATER: Duration = Duration::from_secs(90);

/// The guest's ports, each with a TCP and a Unix front: served behind the guest's `/hvsock`, by the
/// guest itself, by nobody behind `/hvsock`, by nobody at all.
const PORTS: [u32; 7] = [7, 8, 9, 1008, 1009, 98, 99];

/// Requests of half-close checks.
const EACH_WAY: Request = Request {
    wait: 100,
    up: MIB,
    down: MIB,
    seed: 30,
};

pub(crate) struct Exact {
    stand: Stand,
    state: PathBuf,
}

impl Deref for Exact {
    type Target = Stand;

    fn deref(&self) -> &Stand {
        &self.stand
    }
}

impl Exact {
    /// Boots a guest, and exposes it, before it is up.
    pub(crate) fn start(
        parts: &Parts,
        dir: &Path,
    ) -> Result<Arc<Exact>, Box<dyn std::error::Error + Send + Sync>> {
        let state = dir.join("state");
        let mut machine = Machine::start(Kind::Exact, parts, dir, &state)?;
        let telling = dir.join("told.sock");
        serve_unix(tell, &telling)?;
        let mut arguments = vec![
            OsString::from("expose"),
            "--vm".into(),
            state.clone().into(),
        ];
        for port in PORTS {
            let path = dir.join(format!("{port}.sock"));
            for listen in ["0", &path.display().to_string()] {
                arguments.extend(["-L".into(), format!("{listen}:{port}").into()]);
            }
        }
        for (port, target) in [
            (5007, format!("127.0.0.1:{}", serve_tcp(echo)?)),
            (5008, telling.display().to_string()),
            (5009, format!("127.0.0.1:{}", serve_tcp(ask)?)),
            (5098, dir.join("nobody.sock").display().to_string()),
        ] {
            arguments.extend(["-R".into(), format!("{port}:{target}").into()]);
        }
        let proxy = Proxy::start(&parts.hvsock, &arguments, 2 * PORTS.len() + 4)?;
        machine.wait_until_it_serves(LATER)?;
        let stand = Stand::new(parts, dir, machine, proxy, &PORTS)?;
        Ok(Arc::new(Exact { stand, state }))
    }

    /// One of the device's counters.
    fn counter(&self, name: &str) -> Result<usize, String> {
        let said = self.machine().device.ask("").unwrap_or_default();
        let mut words = said.split(' ').skip_while(|&word| word != name).skip(1);
        let value = words.next().and_then(|value| value.parse().ok());
        value.ok_or_else(|| format!("the device says {said:?}"))
    }

    /// Nothing is left of any connection: in the device, in the proxy, in the guest's `/hvsock`.
    fn is_idle(&self) -> Outcome {
        let mut live = Ok(0);
        let none = eventually(SOON, || {
            live = self.counter("live");
            live == Ok(0)
        });
        ensure!(none, "{live:?} connections in the device");
        self.proxy_is_idle()?;
        let broken = self.counter("broken")?;
        ensure!(
            broken == 0,
            "{broken} packets of the guest broke the protocol"
        );
        Ok(())
    }

    fn echo_each_way(&self) -> Outcome {
        echo_client(&self.tcp(7).connect()?, 70, 4096, End::HalfClose)?;
        self.line.order("echo 5007 4096 half-close").map(drop)
    }

    /// Traffic comes back by itself: clients try again, and nobody else does anything.
    fn recovers(&self) -> Outcome {
        let mut outcome = Ok(());
        let back = eventually(LATER, || {
            outcome = self.echo_each_way();
            outcome.is_ok()
        });
        if back { Ok(()) } else { outcome }
    }
}

pub(crate) fn echo_to_guest_tcp(vm: &Exact) -> Outcome {
    echo_client(&vm.tcp(7).connect()?, 1, 64 * MIB, End::HalfClose)?;
    vm.is_idle()
}

pub(crate) fn echo_to_guest_unix(vm: &Exact) -> Outcome {
    echo_client(&vm.unix(7).connect()?, 2, 64 * MIB, End::HalfClose)?;
    vm.is_idle()
}

/// By an AF_VSOCK client in the guest, and by one behind the guest's own proxy.
pub(crate) fn echo_to_host(vm: &Exact) -> Outcome {
    for target in ["5007", "/host-5007.sock"] {
        vm.line
            .order(&format!("echo {target} {} half-close", 64 * MIB))?;
    }
    vm.is_idle()
}

/// The client half-closes first: all of the upload arrives, and after it all of the answer.
pub(crate) fn client_ends_first(vm: &Exact) -> Outcome {
    for port in [9, 1009] {
        for front in vm.fronts(port) {
            ask_client(&front.connect()?, EACH_WAY).map_err(|e| format!("{front:?}: {e}"))?;
        }
    }
    for target in ["5009", "/host-5009.sock"] {
        vm.line.order(&format!("ask {target} {MIB} {MIB}"))?;
    }
    vm.is_idle()
}

/// The server half-closes first, and goes on reading: all of the upload after that arrives, and its
/// EOF.
pub(crate) fn server_ends_first(vm: &Exact) -> Outcome {
    for port in [8, 1008] {
        for front in vm.fronts(port) {
            tell_client(&front.connect()?, EACH_WAY).map_err(|e| format!("{front:?}: {e}"))?;
            vm.line
                .order("verdict")
                .map_err(|e| format!("{front:?}: {e}"))?;
        }
    }
    for target in ["5008", "/host-5008.sock"] {
        vm.line.order(&format!("tell {target} {MIB} {MIB}"))?;
        verdict().map_err(|e| format!("{target}: {e}"))?;
    }
    vm.is_idle()
}

/// A port on which nobody listens, and one behind which nobody does: a TCP client is reset, within
/// a second.
pub(crate) fn refused_by_guest(vm: &Exact) -> Outcome {
    for port in [99, 98] {
        within_a_second(|| {
            let told = vm.tcp(port).connect()?.read(&mut [0; 1]);
            let is_reset = matches!(&told, Err(e) if e.kind() == ErrorKind::ConnectionReset);
            ensure!(is_reset, "a TCP client of port {port} read {told:?}");
            Ok(None)
        })?;
        within_a_second(|| {
            let told = vm.unix(port).connect()?.read(&mut [0; 1]);
            let is_end = match &told {
                Ok(n) => *n == 0,
                Err(e) => e.kind() == ErrorKind::ConnectionReset,
            };
            ensure!(is_end, "a Unix client of port {port} read {told:?}");
            Ok(None)
        })?;
    }
    vm.is_idle()
}

/// The guest dials a port that nothing is bound to, and one whose target isn't there.
pub(crate) fn refused_by_host(vm: &Exact) -> Outcome {
    for target in ["5099", "/host-5099.sock", "5098", "/host-5098.sock"] {
        within_a_second(|| {
            let told = vm.line.order(&format!("refused {target}"))?;
            println!("# dialled {target}: {told}");
            let time = told.split(' ').next().and_then(|ms| ms.parse().ok());
            Ok(time.map(Duration::from_millis))
        })?;
    }
    vm.is_idle()
}

pub(crate) fn parallel_200_to_guest(vm: &Exact) -> Outcome {
    for front in vm.fronts(7).to_vec() {
        crowd_client(200, End::HalfClose, move || front.connect())?;
    }
    vm.is_idle()
}

pub(crate) fn parallel_200_to_host(vm: &Exact) -> Outcome {
    for target in ["5007", "/host-5007.sock"] {
        vm.line.order(&format!("crowd {target} 200 half-close"))?;
    }
    vm.is_idle()
}

/// `hvsock cat` and `hvsock stress` to ports of the guest, behind its `/hvsock` and native.
pub(crate) fn tools_to_guest(vm: &Exact) -> Outcome {
    let hvsock = &vm.parts.hvsock;
    for port in [7, 1007] {
        let address = format!("hyperkit://:{port}{}", vm.state.display());
        cat_echo(hvsock, &address, 64 * MIB).map_err(|e| format!("cat, port {port}: {e}"))?;
        for words in ["-n 400 -p 200", "-n 1 --size 64M"] {
            stress(hvsock, &format!("{words} {address}"))
                .map_err(|e| format!("{words}, port {port}: {e}"))?;
        }
    }
    let nobody = format!("--vm {} 99", vm.state.display());
    within_a_second(|| cat_refused(hvsock, &nobody).map(|()| None))?;
    vm.is_idle()
}

/// The same in the guest, to the host.
pub(crate) fn tools_to_host(vm: &Exact) -> Outcome {
    vm.line.order(&format!("cat 5007 {}", 64 * MIB))?;
    vm.line.order("stress -n 400 -p 200 vsock://host:5007")?;
    vm.line.order("stress -n 1 --size 64M vsock://host:5007")?;
    vm.is_idle()
}

/// A guest that dials a host which says nothing is told so at its own deadline.
pub(crate) fn connect_deadline(vm: &Exact) -> Outcome {
    // More than one try: the guest dials after a while, and if the machine is busy the device may
    // still run then.
    for _ in 0..3 {
        let device = vm.machine().device.id();
        vm.line.order("deadline 5007")?;
        signal(device, Signal::SIGSTOP)?;
        let told = |vm: &Exact| vm.machine().qemu.out().matches("deadline: ").count();
        let before = told(vm);
        let is_told = eventually(SOON, || told(vm) > before);
        signal(device, Signal::SIGCONT)?;
        ensure!(is_told, "the guest still waits");
        let out = vm.machine().qemu.out();
        let line = out.lines().rfind(|line| line.starts_with("deadline: "));
        let line = line.unwrap_or_default();
        println!("# {line}");
        if line.contains("TimedOut") {
            return vm.is_idle();
        }
        ensure!(line.contains("connected"), "{line}");
    }
    Err("the device answered each time".into())
}

/// One after the other, both ways.
pub(crate) fn sequence_300(vm: &Exact) -> Outcome {
    for number in 0..300 {
        let client = vm.tcp(7).connect()?;
        echo_client(&client, number, 1024, End::HalfClose)
            .map_err(|e| format!("client {number}: {e}"))?;
    }
    vm.line.order("sequence 5007 300")?;
    vm.is_idle()
}

/// A client that doesn't read is waited for, in bounded memory, and others are not; then it gets
/// all.
pub(crate) fn slow_reader(vm: &Exact) -> Outcome {
    const BYTES: usize = 32 * MIB;
    let client = vm.tcp(8).connect()?;
    let request = Request {
        wait: 0,
        up: 0,
        down: BYTES,
        seed: 40,
    };
    request.send(&client)?;
    let mut buffered = 0;
    let mut memory = 0;
    for _ in 0..20 {
        thread::sleep(Duration::from_millis(100));
        buffered = buffered.max(vm.counter("buffered")?);
        memory = memory.max(vm.proxy().process.memory().unwrap_or(usize::MAX));
    }
    println!(
        "# a client that doesn't read: {buffered} bytes in the device, {memory} are the proxy's"
    );
    ensure!(buffered <= 320 * 1024, "the device holds {buffered} bytes");
    ensure!(memory < 64 * MIB, "the proxy has {memory} bytes");
    echo_client(&vm.tcp(7).connect()?, 41, MIB, End::HalfClose)?;
    expect_pattern(&client, 41, BYTES)?;
    client.shutdown(Shutdown::Write)?;
    drop(client);
    vm.is_idle()
}

/// A server that takes two seconds before it reads, on either side.
pub(crate) fn slow_server(vm: &Exact) -> Outcome {
    let request = Request {
        wait: 2000,
        up: 16 * MIB,
        down: MIB,
        seed: 44,
    };
    let client = vm.tcp(9).connect()?;
    let asking = thread::spawn(move || ask_client(&client, request));
    let mut buffered = 0;
    for _ in 0..10 {
        thread::sleep(Duration::from_millis(100));
        buffered = buffered.max(vm.counter("buffered")?);
    }
    println!("# a server that doesn't read: {buffered} bytes in the device");
    ensure!(buffered <= 64 * 1024, "the device holds {buffered} bytes");
    asking.join().map_err(|_| "the client panicked")??;
    vm.is_idle()
}

/// Clients that break off in every way leave nothing behind, and don't harm one that behaves.
pub(crate) fn rude_clients(vm: &Exact) -> Outcome {
    let order = Request {
        wait: 0,
        up: 0,
        down: 8 * MIB,
        seed: 50,
    };
    let descriptors = vm.line.order("descriptors")?;
    let polite = vm.unix(7).connect()?;
    let polite = thread::spawn(move || echo_client(&polite, 51, 8 * MIB, End::HalfClose));
    for _ in 0..20 {
        // In the middle of a download, by a reset and by a close.
        for front in vm.fronts(8) {
            let mut client = front.connect()?;
            order.send(&client)?;
            client.read_exact(&mut [0; 1000])?;
            if matches!(front, Front::Tcp(_)) {
                reset(client)?;
            }
        }
        // Half-closed, then closed without having read.
        let client = vm.tcp(8).connect()?;
        order.send(&client)?;
        client.shutdown(Shutdown::Write)?;
        thread::sleep(Duration::from_millis(10));
        drop(client);
        // Closed at once; closed and reset after sending.
        drop(vm.tcp(7).connect()?);
        for front in vm.fronts(7) {
            let mut client = front.connect()?;
            client.write_all(&[5; 10_000])?;
            if matches!(front, Front::Tcp(_)) {
                reset(client)?;
            }
        }
    }
    polite.join().map_err(|_| "the polite one panicked")??;
    vm.is_idle()?;
    let mut now = String::new();
    let same = eventually(SOON, || {
        now = vm.line.order("descriptors").unwrap_or_default();
        now == descriptors
    });
    ensure!(
        same,
        "{descriptors} descriptors in the guest's hvsock before, {now} after"
    );
    Ok(())
}

/// The guest reboots; QEMU, the device and the proxy stay. A connection from before ends as soon as
/// it is used.
pub(crate) fn guest_reboots(vm: &Exact) -> Outcome {
    let mut old = vm.tcp(7).connect()?;
    old.write_all(b"before")?;
    old.read_exact(&mut [0; 6])?;
    vm.machine().reboot()?;
    // Those that try while there is no guest may wait or be refused, but are not kept waiting for
    // good.
    let waiting = vm.tcp(7).connect()?;
    vm.machine().wait_until_it_serves(LATER)?;
    vm.recovers()?;
    let boots = vm.counter("boots")?;
    ensure!(boots == 2, "the device saw {boots} boots");
    old.write_all(b"after")?;
    let told = old.read(&mut [0; 6]);
    println!("# a connection from before the reboot: {told:?}");
    let ended = match &told {
        Ok(n) => *n == 0,
        Err(e) => e.kind() == ErrorKind::ConnectionReset,
    };
    ensure!(ended, "a connection from before the reboot reads {told:?}");
    drop((old, waiting));
    vm.is_idle()
}

/// QEMU and the device are killed, and others start in their place.
pub(crate) fn vm_starts_anew(vm: &Exact) -> Outcome {
    let mut old = vm.tcp(7).connect()?;
    old.write_all(b"before")?;
    old.read_exact(&mut [0; 6])?;
    {
        let mut machine = vm.machine();
        machine.stop();
        let told = old.read(&mut [0; 6]);
        println!("# a connection of a VM that is killed: {told:?}");
        ensure!(!matches!(told, Ok(1..)), "it read {told:?}");
        let told = vm.tcp(7).connect()?.read(&mut [0; 6]);
        let is_reset = matches!(&told, Err(e) if e.kind() == ErrorKind::ConnectionReset);
        ensure!(is_reset, "a client without a VM read {told:?}");
        *machine = Machine::start(Kind::Exact, &vm.parts, &vm.dir, &vm.state)?;
        machine.wait_until_it_serves(LATER)?;
    }
    vm.recovers()?;
    drop(old);
    vm.is_idle()
}

/// SIGTERM ends the proxy in order. What the guest dials is its keeper's until the VM has ended,
/// and nothing is left then.
pub(crate) fn ends_in_order(vm: &Exact) -> Outcome {
    let mut proxy = vm.proxy();
    proxy.process.terminate()?;
    let status = proxy.process.end(SOON);
    let ended = status.is_some_and(|status| status.code() == Some(0));
    ensure!(ended, "it ended with {status:?}: {}", proxy.process.err());
    let left = |is_left: fn(&str) -> bool| -> io::Result<Vec<String>> {
        let mut left = Vec::new();
        for dir in [&vm.dir, &vm.state] {
            for entry in fs::read_dir(dir)? {
                left.push(entry?.file_name().to_string_lossy().into_owned());
            }
        }
        left.retain(|name| is_left(name));
        left.sort();
        Ok(left)
    };
    let fronts = left(|name| PORTS.iter().any(|port| *name == format!("{port}.sock")))?;
    ensure!(fronts.is_empty(), "it leaves {fronts:?}");
    let dialled = left(|name| name.starts_with("00000002."))?;
    let kept = [5007, 5008, 5009, 5098].map(|port: u32| format!("00000002.{port:08x}"));
    ensure!(dialled == kept, "of {kept:?} it leaves {dialled:?}");
    let is_keepers = |name: &str| name.starts_with("hvsock-keeper.");
    let keepers = left(is_keepers)?;
    ensure!(keepers.len() == 1, "the keepers are {keepers:?}");
    vm.machine().stop();
    let is_ours = |name: &str| name.starts_with("00000002.") || name.starts_with("hvsock");
    let mut ours = Ok(Vec::new());
    let none = eventually(SOON, || {
        ours = left(is_ours);
        ours.as_ref().is_ok_and(Vec::is_empty)
    });
    ensure!(none, "without a VM there is {ours:?}");
    Ok(())
}
