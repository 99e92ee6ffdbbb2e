//! `hvsock forward` in front of vhost-device-vsock 0.3.0, the stock device, flawed as it is: it
//! ends both directions at the host's EOF, doesn't pass the guest's half-close on, stalls for good
//! now and then when its host is slow, and dies of clients that go at the wrong moment. Nothing is
//! lost that it doesn't lose, nothing hangs on it, nothing kills it.

use std::ffi::OsString;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::ops::Deref;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::machine::{Kind, Machine, Parts};
use crate::pattern::{expect_pattern, receive_pattern, send_pattern};
use crate::promptly::within_a_second;
use crate::proxy::Proxy;
use crate::report::{Outcome, ensure, eventually};
use crate::services::{End, Request, crowd_client, echo, echo_client, tell, verdict};
use crate::sockets::{Front, reset, serve_tcp, serve_unix};
use crate::stand::Stand;
use crate::tools::{cat_echo, cat_refused, stress};

const MIB: usize = 1024 * 1024;
const SOON: Duration = Duration::from_secs(30);
const LATER: Duration = Duration::from_secs(90);

/// What the stock device stalls is not worth a long wait.
const STALLED: Duration = Duration::from_secs(10);

/// How often something is tried that the stock device stalls: of a full-duplex echo of 32 MiB one
/// in five, with and without our proxy; and how often something that it has not been seen to stall.
const OFTEN: usize = 6;
const TWICE: usize = 2;

/// The guest's ports, each with a TCP and a Unix front, as in `exact`.
const PORTS: [u32; 5] = [7, 8, 1008, 98, 99];

type Failure = Box<dyn std::error::Error + Send + Sync>;

pub(crate) struct Stock {
    stand: Stand,
    socket: PathBuf,
}

impl Deref for Stock {
    type Target = Stand;

    fn deref(&self) -> &Stand {
        &self.stand
    }
}

impl Stock {
    pub(crate) fn start(parts: &Parts, dir: &Path) -> Result<Arc<Stock>, Failure> {
        let socket = dir.join("vm.sock");
        let telling = dir.join("told.sock");
        serve_unix(tell, &telling)?;
        let mux = |port: u32| OsString::from(format!("vsock-mux://:{port}{}", socket.display()));
        // Short, for some of its connections can only end this way.
        let mut arguments: Vec<OsString> =
            ["forward", "--drain-timeout", "2"].map(Into::into).into();
        for port in PORTS {
            let path = dir.join(format!("{port}.sock"));
            arguments.extend([
                "tcp://127.0.0.1:0".into(),
                mux(port),
                path.into(),
                mux(port),
            ]);
        }
        for (port, target) in [
            (5007, format!("tcp://127.0.0.1:{}", serve_tcp(echo)?)),
            (5008, format!("unix://{}", telling.display())),
            (
                5098,
                format!("unix://{}", dir.join("nobody.sock").display()),
            ),
        ] {
            arguments.extend([mux(port), target.into()]);
        }
        let rules = 2 * PORTS.len() + 3;
        let proxy = Proxy::start(&parts.hvsock, &arguments, rules)?;
        let mut machine = Machine::start(Kind::Stock, parts, dir, &socket)?;
        machine.wait_until_it_serves(LATER)?;
        let stand = Stand::new(parts, dir, machine, proxy, &PORTS)?;
        Ok(Arc::new(Stock { stand, socket }))
    }

    /// The device lives, and the proxy has nothing left of any connection.
    fn is_well(&self) -> Outcome {
        self.proxy_is_idle()?;
        let alive = self.machine().device.is_running();
        ensure!(
            alive,
            "the device has died: {}",
            self.machine().device.err()
        );
        self.line.order("descriptors").map(drop)
    }

    /// Tries to carry something by way of our proxy until it succeeds once. If it never does, the
    /// device must be seen to fail without our proxy, too.
    fn carries(
        &self,
        tries: usize,
        through: &dyn Fn() -> Outcome,
        without: &dyn Fn() -> Outcome,
    ) -> Outcome {
        let mut failures = Vec::new();
        for _ in 0..tries {
            match through() {
                Ok(()) => {
                    if !failures.is_empty() {
                        println!("# carried at last, after {failures:?}");
                    }
                    return Ok(());
                }
                Err(e) => failures.push(e.to_string()),
            }
        }
        let carried = (0..tries).filter(|_| without().is_ok()).count();
        println!("# the device itself carries {carried} of {tries}");
        ensure!(
            carried == 0,
            "{failures:?}, and without the proxy {carried} of {tries} succeed"
        );
        Ok(())
    }
}

fn impatient(client: UnixStream) -> Result<UnixStream, Failure> {
    client.set_read_timeout(Some(STALLED))?;
    client.set_write_timeout(Some(STALLED))?;
    Ok(client)
}

pub(crate) fn echo_to_guest(vm: &Stock) -> Outcome {
    for front in vm.fronts(7) {
        let echo = |client| echo_client(&impatient(client)?, 1, 64 * MIB, End::Close);
        vm.carries(OFTEN, &|| echo(front.connect()?), &|| {
            echo(vm.line.dial(7)?)
        })?;
    }
    vm.is_well()
}

/// By AF_VSOCK clients in the guest alone: those behind the guest's own proxy end by a half-close,
/// and that the device passes on to nobody. Without our proxy nobody listens there.
pub(crate) fn echo_to_host(vm: &Stock) -> Outcome {
    let order = format!("echo 5007 {} close", 64 * MIB);
    vm.carries(OFTEN, &|| vm.line.order(&order).map(drop), &|| Ok(()))?;
    vm.is_well()
}

/// A client that half-closes before it is answered: the device alone would drop the answer.
pub(crate) fn half_close_loses_no_answer(vm: &Stock) -> Outcome {
    let request = Request {
        wait: 300,
        up: 0,
        down: MIB,
        seed: 30,
    };
    let ask = |port, client: UnixStream| -> Outcome {
        let client = impatient(client)?;
        request.send(&client)?;
        client.shutdown(Shutdown::Write)?;
        // The guest's proxy ends by a half-close, which the device doesn't pass on; the guest's
        // server by a close.
        match port {
            8 => receive_pattern(&client, 31, MIB),
            _ => expect_pattern(&client, 31, MIB),
        }
    };
    for port in [8, 1008] {
        println!("# without the proxy: {:?}", ask(port, vm.line.dial(port)?));
        for front in vm.fronts(port) {
            let through =
                || ask(port, front.connect()?).map_err(|e| format!("{front:?}: {e}").into());
            vm.carries(TWICE, &through, &|| Ok(()))?;
        }
    }
    vm.is_well()
}

/// A server that half-closes first gets all that its client still sends. (That it has half-closed
/// the client isn't told: the device doesn't pass it on.)
pub(crate) fn server_ends_first(vm: &Stock) -> Outcome {
    let request = Request {
        wait: 0,
        up: MIB,
        down: MIB,
        seed: 34,
    };
    for port in [8, 1008] {
        for front in vm.fronts(port) {
            let client = front.connect()?;
            request.send(&client)?;
            receive_pattern(&client, 35, MIB)?;
            send_pattern(&client, 34, MIB)?;
            drop(client);
            vm.line
                .order("verdict")
                .map_err(|e| format!("{front:?}: {e}"))?;
        }
    }
    // The other way round: the device alone would break the guest's upload off.
    let upload = || -> Outcome {
        let sent = vm.line.order(&format!("upload 5008 {MIB} {MIB}"));
        let arrived = verdict();
        sent?;
        Ok(arrived?)
    };
    vm.carries(TWICE, &upload, &|| Ok(()))?;
    vm.is_well()
}

pub(crate) fn refused(vm: &Stock) -> Outcome {
    for port in [99, 98] {
        within_a_second(|| {
            let told = vm.fronts(port)[0].connect()?.read(&mut [0; 1]);
            println!("# a TCP client of port {port} reads {told:?}");
            // Behind the guest's proxy the device has said OK: what follows is an answer, if an
            // empty one.
            let is_told = match &told {
                Ok(n) => *n == 0 && port == 98,
                Err(e) => e.kind() == ErrorKind::ConnectionReset,
            };
            ensure!(is_told, "a TCP client of port {port} read {told:?}");
            Ok(None)
        })?;
    }
    // What nobody is bound to the device leaves unanswered.
    println!("# dialled 5099: {}", vm.line.order("refused 5099")?);
    within_a_second(|| {
        let told = vm.line.order("refused 5098")?;
        println!("# dialled 5098: {told}");
        let time = told.split(' ').next().and_then(|ms| ms.parse().ok());
        Ok(time.map(Duration::from_millis))
    })?;
    vm.is_well()
}

/// `hvsock cat` and `hvsock stress` through it.
pub(crate) fn tools(vm: &Stock) -> Outcome {
    let hvsock = &vm.parts.hvsock;
    let mux = |port: u32| format!("vsock-mux://:{port}{}", vm.socket.display());
    // The echo waits for an end that is kept back until nothing has come for a while.
    cat_echo(hvsock, &format!("--drain-timeout 2 {}", mux(7)), MIB)?;
    stress(hvsock, &format!("-n 200 -p 20 {}", mux(7)))?;
    stress(hvsock, &format!("--bench rtt --round-trips 500 {}", mux(7)))?;
    within_a_second(|| cat_refused(hvsock, &mux(99)).map(|()| None))
}

pub(crate) fn parallel_200(vm: &Stock) -> Outcome {
    for front in vm.fronts(7).to_vec() {
        crowd_client(200, End::Close, move || front.connect())?;
        vm.is_well()?;
    }
    vm.line.order("crowd 5007 200 close")?;
    vm.is_well()
}

/// A client that takes a pause gets all, and nobody else waits for it.
pub(crate) fn slow_reader(vm: &Stock) -> Outcome {
    let request = Request {
        wait: 0,
        up: 0,
        down: 16 * MIB,
        seed: 40,
    };
    let other = |client| echo_client(&impatient(client)?, 41, MIB, End::Close);
    let read_late = |client: UnixStream| -> Outcome {
        let client = impatient(client)?;
        request.send(&client)?;
        thread::sleep(Duration::from_secs(2));
        vm.carries(OFTEN, &|| other(vm.fronts(7)[0].connect()?), &|| {
            other(vm.line.dial(7)?)
        })?;
        receive_pattern(&client, 41, 16 * MIB)
    };
    for front in vm.fronts(8) {
        vm.carries(OFTEN, &|| read_late(front.connect()?), &|| {
            read_late(vm.line.dial(8)?)
        })?;
    }
    vm.is_well()
}

/// Clients that break off in every way leave nothing behind, and don't kill the device.
pub(crate) fn rude_clients(vm: &Stock) -> Outcome {
    let order = Request {
        wait: 0,
        up: 0,
        down: 2 * MIB,
        seed: 50,
    };
    for _ in 0..20 {
        for front in vm.fronts(8) {
            let mut client = impatient(front.connect()?)?;
            order.send(&client)?;
            // It may be stalled.
            let _ = client.read(&mut [0; 1000]);
            if matches!(front, Front::Tcp(_)) {
                reset(client)?;
            }
        }
        let client = vm.fronts(8)[0].connect()?;
        order.send(&client)?;
        client.shutdown(Shutdown::Write)?;
        thread::sleep(Duration::from_millis(10));
        drop(client);
        for front in vm.fronts(7) {
            // At once; after a pause; after having sent something.
            drop(front.connect()?);
            let client = front.connect()?;
            thread::sleep(Duration::from_millis(2));
            drop(client);
            let mut client = front.connect()?;
            client.write_all(&[5; 10_000])?;
            if matches!(front, Front::Tcp(_)) {
                reset(client)?;
            }
        }
    }
    vm.is_well()?;
    small_echo_each_way(vm)
}

fn small_echo_each_way(vm: &Stock) -> Outcome {
    let client = impatient(vm.fronts(7)[0].connect()?)?;
    echo_client(&client, 70, 4096, End::Close)?;
    vm.line.order("echo 5007 4096 close").map(drop)
}

/// Traffic comes back by itself.
fn recovers(vm: &Stock) -> Outcome {
    let mut outcome = Ok(());
    let back = eventually(LATER, || {
        outcome = small_echo_each_way(vm);
        outcome.is_ok()
    });
    if back { Ok(()) } else { outcome }
}

/// The guest reboots while the proxy runs. Where the device doesn't survive it, another takes its
/// place.
pub(crate) fn guest_reboots(vm: &Stock) -> Outcome {
    let mut old = vm.fronts(7)[0].connect()?;
    old.write_all(b"before")?;
    old.read_exact(&mut [0; 6])?;
    vm.machine().reboot()?;
    vm.machine().wait_until_it_serves(LATER)?;
    let answers = eventually(STALLED, || impatient_dial(vm).is_ok());
    if !answers {
        println!("# without the proxy: the device answers nobody after the reboot");
        restart(vm)?;
    }
    recovers(vm)?;
    drop(old);
    vm.is_well()
}

/// A dial of the guest without our proxy, and soon given up.
fn impatient_dial(vm: &Stock) -> Outcome {
    let mut client = UnixStream::connect(&vm.socket)?;
    client.set_read_timeout(Some(Duration::from_secs(3)))?;
    client.write_all(b"CONNECT 1007\n")?;
    let mut answer = [0; 3];
    client.read_exact(&mut answer)?;
    ensure!(&answer == b"OK ", "it answers {answer:?}");
    Ok(())
}

fn restart(vm: &Stock) -> Outcome {
    let mut machine = vm.machine();
    machine.stop();
    *machine = Machine::start(Kind::Stock, &vm.parts, &vm.dir, &vm.socket)?;
    machine.wait_until_it_serves(LATER)
}

/// The device dies, as it may of clients that go right after their line, and another VM starts in
/// its place.
pub(crate) fn vm_starts_anew(vm: &Stock) -> Outcome {
    let mut rude = 0;
    while rude < 300 && vm.machine().device.is_running() {
        if let Ok(mut client) = UnixStream::connect(&vm.socket) {
            let _ = client.write_all(b"CONNECT 7\n");
        }
        thread::sleep(Duration::from_millis(2));
        rude += 1;
    }
    let lives = vm.machine().device.is_running();
    println!("# without the proxy: {rude} clients that go at once, and it lives: {lives}");
    let before = vm.proxy().process.err().len();
    vm.machine().stop();
    let front = &vm.fronts(1008)[0];
    let told = front.connect()?.read(&mut [0; 1]);
    let is_reset = matches!(&told, Err(e) if e.kind() == ErrorKind::ConnectionReset);
    ensure!(is_reset, "a client without a VM read {told:?}");
    // That is something else than a guest that refuses.
    let mut said = String::new();
    let told = eventually(SOON, || {
        said = vm.proxy().process.err().split_off(before);
        said.contains("vm.sock is gone") && !said.contains("without an OK")
    });
    ensure!(told, "the proxy says {said}");
    restart(vm)?;
    recovers(vm)?;
    vm.is_well()
}

pub(crate) fn ends_in_order(vm: &Stock) -> Outcome {
    let mut proxy = vm.proxy();
    proxy.process.terminate()?;
    let status = proxy.process.end(SOON);
    let ended = status.is_some_and(|status| status.code() == Some(0));
    ensure!(ended, "it ended with {status:?}: {}", proxy.process.err());
    for port in PORTS {
        let path = vm.dir.join(format!("{port}.sock"));
        ensure!(!path.exists(), "it leaves {path:?}");
    }
    for port in [5007, 5008, 5098] {
        let path = vm.dir.join(format!("vm.sock_{port}"));
        ensure!(!path.exists(), "it leaves {path:?}");
    }
    Ok(())
}
