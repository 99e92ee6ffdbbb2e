//! The keeper: whatever becomes of the proxy, the VM lives, and its guest finds its ports.
#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use command::{Mortal, Running, text};
use common::{
    PATIENCE, allow_descriptors, ask, config, eventually, hyperkit, private_dir, tells_unread,
    unix, unix_client,
};
use hvsock::keeper::Keeper;
use hvsock::simulate::{FateKind, Rule as Offence, Service, Vm};
use hvsock::{Proxy, Rule};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::Pid;
use serde_json::Value;

/// The ports of the guest, and the one of the host that it dials.
const ECHO: u32 = 7;
const CHARGEN: u32 = 9;
const HOST_PORT: u32 = 5000;

fn vm(dir: &Path) -> Vm {
    // Several tests at a time, each with a VM of its own.
    allow_descriptors(8192);
    let builder = Vm::builder(dir.join("vm"));
    let builder = builder.guest(ECHO, Service::Echo);
    let builder = builder.guest(CHARGEN, Service::Chargen);
    builder.strict(true).start().unwrap()
}

/// A server of this machine that echoes.
fn echo_server() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            thread::spawn(move || {
                let mut reader = client.try_clone().unwrap();
                let _ = std::io::copy(&mut reader, &mut client);
                let _ = client.shutdown(Shutdown::Write);
            });
        }
    });
    port
}

/// An hvsock that exposes the echo and the endless port, and leads the guest's dials to `target`.
fn expose(dir: &Path, target: u16, more: &[&str]) -> Running {
    let state = dir.join("vm");
    let local = |name: &str, port: u32| format!("{}:{port}", text(&dir.join(name)));
    let (echo, endless) = (local("echo", ECHO), local("endless", CHARGEN));
    let remote = format!("{HOST_PORT}:127.0.0.1:{target}");
    let mut arguments = vec!["expose", "--vm", text(&state)];
    arguments.extend(["-L", &echo, "-L", &endless, "-R", &remote]);
    arguments.extend(more);
    let running = Running::start(&arguments);
    running.says("guest, to CID 2");
    running
}

/// The keepers that have a status socket in the VM's directory.
fn keepers(dir: &Path) -> Vec<i32> {
    let pid = |entry: std::io::Result<std::fs::DirEntry>| {
        let name = entry.unwrap().file_name();
        name.to_str()?.strip_prefix("hvsock-keeper.")?.parse().ok()
    };
    let mut pids: Vec<i32> = std::fs::read_dir(dir.join("vm"))
        .unwrap()
        .filter_map(pid)
        .collect();
    pids.sort_unstable();
    pids
}

/// What a keeper answers to a line; `None` if it is not there.
fn tell(dir: &Path, keeper: i32, line: &str) -> Option<Value> {
    let path = dir.join("vm").join(format!("hvsock-keeper.{keeper}"));
    let mut stream = UnixStream::connect(path).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(format!("{line}\n").as_bytes()).ok()?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).ok()?;
    serde_json::from_str(&answer).ok()
}

fn status(dir: &Path, keeper: i32) -> Option<Value> {
    tell(dir, keeper, "status")
}

/// Waits until one keeper of a proxy is there for which `is_right`; its process.
fn keeper_of(dir: &Path, proxy: u32, mut is_right: impl FnMut(&Value) -> bool) -> i32 {
    let mut found = None;
    eventually("its keeper is as it should be", || {
        found = keepers(dir).into_iter().find(|pid| {
            let status = status(dir, *pid);
            status.is_some_and(|it| it["proxy"] == proxy && is_right(&it))
        });
        found.is_some()
    });
    found.unwrap()
}

fn has_port(status: &Value, state: &str) -> bool {
    let ports = status["ports"].as_array().unwrap();
    ports
        .iter()
        .any(|it| it["port"] == HOST_PORT && it["state"] == state)
}

fn is_alive(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None).is_ok()
}

/// Whether a guest's dial is ended as one that nobody serves: gracefully, and without a byte.
fn guest_is_turned_away(vm: &Vm) -> bool {
    !guest_is_served(vm) && vm.fate().is_none()
}

/// Whether the guest's dial arrives at the echo server.
fn guest_is_served(vm: &Vm) -> bool {
    let guest = vm.dial(HOST_PORT);
    let mut guest = guest.unwrap_or_else(|e| panic!("{e}: {:?}", vm.fate()));
    guest.set_read_timeout(Some(PATIENCE)).unwrap();
    // One that is ended by a keeper may have ended before.
    let _ = guest.write_all(b"knock");
    let _ = guest.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = guest.read_to_end(&mut answer);
    answer == b"knock"
}

/// None of the keepers lives, and the directory has no file of ours: also none of a keeper that
/// was started last, which nobody has asked for its process.
fn nothing_is_left(dir: &Path, keepers: &[i32]) {
    let is_ours = |name: &str| name.starts_with("hv") || name.starts_with("00000002");
    eventually("the keepers end with their VM and leave no file", || {
        let mut entries = std::fs::read_dir(dir.join("vm")).unwrap();
        !keepers.iter().any(|pid| is_alive(*pid))
            && !entries.any(|entry| is_ours(entry.unwrap().file_name().to_str().unwrap()))
    });
}

/// Clients of every kind, until they are told to stop.
struct Traffic<'a> {
    dir: &'a Path,
    vm: &'a Vm,
    stop: AtomicBool,
}

impl Traffic<'_> {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed) && self.vm.fate().is_none()
    }

    /// Small echoes, each of which may fail.
    fn echo(&self) {
        while self.goes_on() {
            match UnixStream::connect(self.dir.join("echo")) {
                // A Mac takes no timeout of a socket that has ended.
                Ok(client) if client.set_read_timeout(Some(PATIENCE)).is_err() => {}
                Ok(client) => drop(ask(client, b"hello")),
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Downloads without an end, read for a while.
    fn download(&self) {
        let mut buffer = vec![0; 64 * 1024];
        while self.goes_on() {
            let Ok(mut client) = UnixStream::connect(self.dir.join("endless")) else {
                thread::sleep(Duration::from_millis(1));
                continue;
            };
            let timeout = client.set_read_timeout(Some(Duration::from_millis(100)));
            let mut left = if timeout.is_ok() { 200 } else { 0 };
            while left > 0 && self.goes_on() && matches!(client.read(&mut buffer), Ok(1..)) {
                left -= 1;
            }
        }
    }

    /// What the guest dials.
    fn dial(&self) {
        while self.goes_on() {
            if let Ok(mut guest) = self.vm.dial(HOST_PORT)
                && guest.set_read_timeout(Some(PATIENCE)).is_ok()
            {
                let _ = guest.write_all(b"knock");
                let _ = guest.shutdown(Shutdown::Write);
                let _ = guest.read_to_end(&mut Vec::new());
            }
        }
    }
}

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `during` while clients of every kind come and go.
fn under_traffic(dir: &Path, vm: &Vm, during: impl FnOnce()) {
    let traffic = Traffic {
        dir,
        vm,
        stop: AtomicBool::new(false),
    };
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| traffic.echo());
            scope.spawn(|| traffic.download());
        }
        scope.spawn(|| traffic.dial());
        // However that ends.
        let _stop = Stop(&traffic.stop);
        during();
    });
}

fn all_slots_come_back(vm: &Vm) {
    let are_back = vm.wait_for(PATIENCE, |it| it.live_slots == 0);
    assert!(are_back, "{:?}, {:?}", vm.counters(), vm.fate());
    assert_eq!(vm.fate(), None);
}

#[test]
fn a_vm_outlives_proxies_that_are_killed_under_traffic() {
    let dir = private_dir();
    let (dir, target) = (dir.path(), echo_server());
    let vm = vm(dir);
    let mut seen = Vec::new();
    let mut proxy = expose(dir, target, &[]);
    under_traffic(dir, &vm, || {
        for _ in 0..8 {
            thread::sleep(Duration::from_millis(150));
            seen.push(keeper_of(dir, proxy.child.0.id(), |_| true));
            // A connection of which nobody reads what has come.
            let mut unread = unix_client(&dir.join("endless"));
            unread.read_exact(&mut [0; 1024]).unwrap();
            proxy.signal("KILL");
            assert_eq!(proxy.exit_code(), None);
            // Another one comes at once.
            proxy = expose(dir, target, &[]);
            assert_eq!(vm.fate(), None);
        }
        seen.push(keeper_of(dir, proxy.child.0.id(), |_| true));
    });
    assert_eq!(vm.fate(), None);
    drop(proxy);
    all_slots_come_back(&vm);
    vm.stop();
    nothing_is_left(dir, &seen);
}

/// The first one isn't even waited for.
#[test]
fn a_proxy_that_is_started_as_another_is_killed_has_its_port() {
    let dir = private_dir();
    let (dir, target) = (dir.path(), echo_server());
    let vm = vm(dir);
    let state = dir.join("vm");
    let start = || {
        let remote = format!("{HOST_PORT}:127.0.0.1:{target}");
        let running = Running::start(&["expose", "--vm", text(&state), "-R", &remote]);
        running.says("guest, to CID 2");
        running
    };
    let mut proxy = start();
    let mut seen = Vec::new();
    for _ in 0..10 {
        assert!(guest_is_served(&vm));
        seen.push(keeper_of(dir, proxy.child.0.id(), |it| {
            has_port(it, "held")
        }));
        proxy.signal("KILL");
        proxy = start();
    }
    assert!(guest_is_served(&vm));
    proxy.signal("KILL");
    all_slots_come_back(&vm);
    vm.stop();
    nothing_is_left(dir, &seen);
}

/// Without a keeper the same ends the VM, so the test above can fail.
#[test]
fn a_vm_does_not_outlive_a_killed_proxy_without_a_keeper() {
    if !tells_unread() {
        return;
    }
    let dir = private_dir();
    let (dir, target) = (dir.path(), echo_server());
    let vm = vm(dir);
    let proxy = expose(dir, target, &["--no-keeper"]);
    let mut unread = unix_client(&dir.join("endless"));
    unread.read_exact(&mut [0; 1024]).unwrap();
    assert!(keepers(dir).is_empty());
    // Until no more fits in between.
    let mut before = 0;
    eventually("the guest can send no more", || {
        thread::sleep(Duration::from_millis(50));
        let now = vm.counters().bytes_to_host;
        now == std::mem::replace(&mut before, now)
    });
    proxy.signal("KILL");
    let fate = vm.wait_for_fate(PATIENCE).unwrap();
    assert_eq!(
        (fate.kind, fate.rule),
        (FateKind::Died, Offence::CloseUnread)
    );
}

#[test]
fn a_guest_dials_on_through_an_ordinary_stop_and_finds_the_successor() {
    let dir = private_dir();
    let (dir, target) = (dir.path(), echo_server());
    let vm = vm(dir);
    let mut first = expose(dir, target, &[]);
    let proxy = first.child.0.id();
    let mut old = 0;
    under_traffic(dir, &vm, || {
        assert!(guest_is_served(&vm));
        first.signal("TERM");
        assert_eq!(first.exit_code(), Some(0));
        old = keeper_of(dir, proxy, |it| {
            it["proxy_ended"] == true && has_port(it, "serving")
        });
        // Ended gracefully, again and again.
        for _ in 0..50 {
            assert!(!guest_is_served(&vm));
        }
        let second = expose(dir, target, &[]);
        assert!(guest_is_served(&vm));
        eventually("the old keeper ends", || !is_alive(old));
        second.signal("TERM");
        keeper_of(dir, second.child.0.id(), |it| has_port(it, "serving"));
    });
    let new = keepers(dir);
    assert_eq!(new.len(), 1);
    all_slots_come_back(&vm);
    vm.stop();
    nothing_is_left(dir, &new);
}

/// Without a keeper the guest's next dial hangs the VM.
#[test]
fn a_guest_that_dials_on_through_a_stop_hangs_without_a_keeper() {
    let dir = private_dir();
    let dir = dir.path();
    let vm = vm(dir);
    let mut proxy = expose(dir, echo_server(), &["--no-keeper"]);
    assert!(guest_is_served(&vm));
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
    let end = Instant::now() + PATIENCE;
    while vm.fate().is_none() && Instant::now() < end {
        let _ = vm.dial(HOST_PORT);
    }
    let fate = vm.fate().unwrap();
    assert_eq!(
        (fate.kind, fate.rule),
        (FateKind::Hung, Offence::NoListener)
    );
}

/// A proxy of this process with a keeper, which exposes the echo port and leads the guest's dials
/// to `target`.
fn proxy(dir: &Path, target: u16) -> Proxy {
    let state = dir.join("vm");
    let mut config = config(vec![
        Rule::new(unix(dir.join("echo")), hyperkit(&state, ECHO)),
        Rule::new(unix(dir.join("endless")), hyperkit(&state, CHARGEN)),
        guest_rule(dir, target),
    ]);
    config.keeper = Some(Keeper::new(env!("CARGO_BIN_EXE_hvsock")).arg("keeper"));
    Proxy::start(config).unwrap()
}

fn guest_rule(dir: &Path, target: u16) -> Rule {
    let target = format!("tcp://127.0.0.1:{target}").parse().unwrap();
    Rule::new(hyperkit(&dir.join("vm"), HOST_PORT), target)
}

fn own_keeper(dir: &Path) -> i32 {
    keeper_of(dir, std::process::id(), |it| it["proxy_ended"] == false)
}

#[test]
fn a_removed_port_is_served_gracefully_and_one_that_is_added_again_by_its_forward() {
    let dir = private_dir();
    let (dir, target) = (dir.path(), echo_server());
    let vm = vm(dir);
    let proxy = proxy(dir, target);
    let keeper = own_keeper(dir);
    let handle = proxy.handle();
    for _ in 0..5 {
        assert!(guest_is_served(&vm));
        let forward = handle.forwards().pop().unwrap();
        handle.remove(forward.id, PATIENCE).unwrap();
        for _ in 0..20 {
            assert!(!guest_is_served(&vm));
        }
        handle.add(guest_rule(dir, target)).unwrap();
        let link = handle.keeper().unwrap();
        assert_eq!((link.ports, link.trouble), (1, None));
    }
    assert!(guest_is_served(&vm));
    let held = status(dir, keeper).unwrap();
    assert!(has_port(&held, "held"), "{held}");
    assert_eq!(held["ports"].as_array().unwrap().len(), 1);
    all_slots_come_back(&vm);
    drop(proxy);
    vm.stop();
    nothing_is_left(dir, &[keeper]);
}

/// Only the first keeper was ever told of it.
#[test]
fn a_removed_port_outlives_the_keeper_that_serves_it() {
    let dir = private_dir();
    let (dir, target) = (dir.path(), echo_server());
    let vm = vm(dir);
    let proxy = proxy(dir, target);
    let handle = proxy.handle();
    let mut seen = vec![own_keeper(dir)];
    assert!(guest_is_served(&vm));
    let forward = handle.forwards().pop().unwrap();
    handle.remove(forward.id, PATIENCE).unwrap();
    for _ in 0..3 {
        let keeper = *seen.last().unwrap();
        kill(Pid::from_raw(keeper), Signal::SIGKILL).unwrap();
        eventually("it is gone", || !is_alive(keeper));
        // Who dials meanwhile waits, and hangs nothing.
        assert!(guest_is_turned_away(&vm));
        seen.push(keeper_of(dir, std::process::id(), |it| {
            has_port(it, "serving") && it["pid"] != keeper
        }));
        assert!(guest_is_turned_away(&vm));
        // What it has accepted itself would be closed rudely.
        keeper_of(dir, std::process::id(), |it| it["connections"] == 0);
        let link = handle.keeper().unwrap();
        assert_eq!((link.ports, link.unguarded), (0, 0));
    }
    // One that is added again has its path, and the old socket is forgotten by everybody.
    handle.add(guest_rule(dir, target)).unwrap();
    assert!(guest_is_served(&vm));
    let last = *seen.last().unwrap();
    kill(Pid::from_raw(last), Signal::SIGKILL).unwrap();
    seen.push(keeper_of(dir, std::process::id(), |it| {
        it["pid"] != last && has_port(it, "held") && !has_port(it, "serving")
    }));
    for _ in 0..20 {
        assert!(guest_is_served(&vm));
    }
    drop(proxy);
    vm.stop();
    nothing_is_left(dir, &seen);
}

#[test]
fn a_port_that_a_reload_takes_away_and_brings_back_is_never_without_a_listener() {
    let dir = private_dir();
    let (dir, target) = (dir.path(), echo_server());
    let vm = vm(dir);
    let file = dir.join("hvsock.toml");
    let state = dir.join("vm");
    let without = format!(
        "control = \"off\"\n[vm.a]\nat = {state:?}\n[forward.echo]\nlisten = {:?}\nvm = \"a\"\nport = {ECHO}\n",
        dir.join("echo"),
    );
    let with = format!(
        "{without}[forward.dialled]\nvm = \"a\"\nguest-dials = {HOST_PORT}\nconnect = \"127.0.0.1:{target}\"\n"
    );
    std::fs::write(&file, &with).unwrap();
    let running = Running::start(&["run", text(&file)]);
    running.says("dialled:");
    let keeper = keeper_of(dir, running.child.0.id(), |it| has_port(it, "held"));
    let reload = |text: &str| {
        std::fs::write(&file, text).unwrap();
        running.signal("HUP");
        running.complains("was read again");
    };
    for _ in 0..3 {
        assert!(guest_is_served(&vm));
        reload(&without);
        assert!(has_port(&status(dir, keeper).unwrap(), "serving"));
        assert!(!guest_is_served(&vm));
        reload(&with);
    }
    assert!(guest_is_served(&vm));
    drop(running);
    all_slots_come_back(&vm);
    vm.stop();
    nothing_is_left(dir, &[keeper]);
}

#[test]
fn what_a_guest_does_not_end_in_time_is_left_to_the_keeper() {
    const SILENT: u32 = 11;
    let dir = private_dir();
    let dir = dir.path();
    let vm = Vm::builder(dir.join("vm")).guest(SILENT, Service::Silent);
    let vm = vm.start().unwrap();
    let local = format!("{}:{SILENT}", text(&dir.join("silent")));
    let state = dir.join("vm");
    let mut proxy = Running::start(&["expose", "--vm", text(&state), "-L", &local, "--grace", "0"]);
    proxy.says("silent");
    let pid = proxy.child.0.id();
    let mut client = unix_client(&dir.join("silent"));
    client.write_all(b"hello").unwrap();
    eventually("it arrives", || vm.counters().bytes_to_guest == 5);
    let keeper = keeper_of(dir, pid, |it| it["connections"] == 1);
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
    keeper_of(dir, pid, |it| {
        it["proxy_ended"] == true && it["connections"] == 1
    });
    // The guest's program has been told, and its end is still waited for.
    assert_eq!(vm.counters().live_slots, 1);
    assert_eq!(vm.fate(), None);
    vm.stop();
    nothing_is_left(dir, &[keeper]);
}

/// A guest that has not ended a connection in time, and keeps a slot that counts as lost, delays no
/// stop. The keeper goes on to wait for it.
#[test]
fn a_lost_slot_is_left_to_the_keeper() {
    const HEEDLESS: u32 = 11;
    let dir = private_dir();
    let dir = dir.path();
    let (served, guests) = std::sync::mpsc::channel();
    let served = std::sync::Mutex::new(served);
    let program = move |guest| served.lock().unwrap().send(guest).unwrap();
    let vm = Vm::builder(dir.join("vm")).guest(HEEDLESS, Service::custom(program));
    let vm = vm.start().unwrap();
    let local = format!("{}:{HEEDLESS}", text(&dir.join("heedless")));
    let state = dir.join("vm");
    let times = ["--half-closed-timeout=100ms", "--drain-timeout=200ms"];
    let arguments = ["expose", "--vm", text(&state), "-L", &local];
    let mut proxy = Running::start(&[&arguments[..], &times].concat());
    proxy.says("heedless");
    let pid = proxy.child.0.id();
    let mut client = unix_client(&dir.join("heedless"));
    client.write_all(b"x").unwrap();
    let guest: UnixStream = guests.recv_timeout(PATIENCE).unwrap();
    drop(client);
    proxy.complains("their slots are lost until it ends them");
    let keeper = keeper_of(dir, pid, |it| it["connections"] == 1);
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
    keeper_of(dir, pid, |it| {
        it["proxy_ended"] == true && it["connections"] == 1
    });
    assert_eq!(vm.counters().live_slots, 1);
    drop(guest);
    all_slots_come_back(&vm);
    nothing_is_left(dir, &[keeper]);
}

#[test]
fn two_proxies_have_one_vm_and_no_port_in_common() {
    let dir = private_dir();
    let (dir, target) = (dir.path(), echo_server());
    let vm = vm(dir);
    let first = expose(dir, target, &[]);
    let state = dir.join("vm");
    let remote = format!("{HOST_PORT}:127.0.0.1:{target}");
    let other = format!("{}:127.0.0.1:{target}", HOST_PORT + 1);
    let local = format!("{}:{CHARGEN}", text(&dir.join("other")));
    let second = Running::start(&["expose", "--vm", text(&state), "-L", &local, "-R", &other]);
    second.says("guest, to CID 2");
    let old = keeper_of(dir, first.child.0.id(), |it| has_port(it, "held"));
    let mut rival = Running::start(&["expose", "--vm", text(&state), "-R", &remote]);
    rival.complains("in use");
    assert_eq!(rival.exit_code(), Some(1));
    let mut unread = unix_client(&dir.join("endless"));
    unread.read_exact(&mut [0; 1024]).unwrap();
    let mut reader = unix_client(&dir.join("other"));
    first.signal("KILL");
    keeper_of(dir, first.child.0.id(), |it| has_port(it, "serving"));
    assert!(!guest_is_served(&vm));
    let third = Running::start(&["expose", "--vm", text(&state), "-R", &remote]);
    third.says("guest, to CID 2");
    assert!(guest_is_served(&vm));
    reader.read_exact(&mut [0; 100_000]).unwrap();
    eventually("the first one's keeper ends", || !is_alive(old));
    let left = keepers(dir);
    assert_eq!(left.len(), 2);
    drop((second, third, reader, unread));
    all_slots_come_back(&vm);
    vm.stop();
    nothing_is_left(dir, &left);
}

#[test]
fn a_killed_keeper_is_replaced_by_another_that_has_everything() {
    let dir = private_dir();
    let (dir, target) = (dir.path(), echo_server());
    let vm = vm(dir);
    let proxy = expose(dir, target, &[]);
    let pid = proxy.child.0.id();
    let held: Vec<UnixStream> = (0..20)
        .map(|_| {
            let mut client = unix_client(&dir.join("endless"));
            client.read_exact(&mut [0; 1024]).unwrap();
            client
        })
        .collect();
    let mut seen = Vec::new();
    let has_all = |it: &Value| it["connections"] == 20 && has_port(it, "held");
    for _ in 0..3 {
        let keeper = keeper_of(dir, pid, |it| has_all(it));
        assert!(!seen.contains(&keeper));
        seen.push(keeper);
        kill(Pid::from_raw(keeper), Signal::SIGKILL).unwrap();
    }
    assert_eq!(vm.fate(), None);
    seen.push(keeper_of(dir, pid, |it| has_all(it)));
    proxy.complains("another one is started");
    proxy.signal("KILL");
    all_slots_come_back(&vm);
    assert!(!guest_is_served(&vm));
    drop(held);
    vm.stop();
    nothing_is_left(dir, &seen);
}

/// Nobody is left then who knows of the port. What the keeper was serving is closed; a VM whose
/// guest dials on hangs, unless another hvsock comes before.
#[test]
fn a_keeper_that_is_killed_while_it_serves_leaves_the_port_to_the_next_hvsock() {
    /// A close of what the guest has dialled does no harm after this time (`hyperkit.md`).
    const HARMLESS: Duration = Duration::from_millis(50);
    let dir = private_dir();
    let (dir, target) = (dir.path(), echo_server());
    let vm = vm(dir);
    let kill_both = |proxy: Running| {
        let pid = proxy.child.0.id();
        let keeper = keeper_of(dir, pid, |it| has_port(it, "held"));
        proxy.signal("KILL");
        keeper_of(dir, pid, |it| has_port(it, "serving"));
        let mut guest = vm.dial(HOST_PORT).unwrap();
        guest.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(guest.read(&mut [0]).unwrap(), 0);
        keeper_of(dir, pid, |it| it["connections"] == 1);
        thread::sleep(HARMLESS);
        kill(Pid::from_raw(keeper), Signal::SIGKILL).unwrap();
        eventually("it is gone", || !is_alive(keeper));
        drop(guest);
        all_slots_come_back(&vm);
        keeper
    };
    let dead = kill_both(expose(dir, target, &[]));
    // It could not remove its socket.
    assert_eq!(keepers(dir), [dead]);
    // One dial that finds nobody: three hang the VM.
    assert!(vm.dial(HOST_PORT).is_err());
    let second = expose(dir, target, &[]);
    let keeper = keeper_of(dir, second.child.0.id(), |it| has_port(it, "held"));
    assert!(guest_is_served(&vm));
    assert_eq!(
        keepers(dir),
        [keeper],
        "what is left of the dead one is removed"
    );
    kill_both(second);
    let end = Instant::now() + PATIENCE;
    while vm.fate().is_none() && Instant::now() < end {
        let _ = vm.dial(HOST_PORT);
    }
    let fate = vm.fate().unwrap();
    assert_eq!(
        (fate.kind, fate.rule),
        (FateKind::Hung, Offence::NoListener)
    );
}

#[test]
fn a_keeper_that_stands_still_delays_nothing_and_gets_all_later() {
    /// More than wait in the socket.
    const COUNT: usize = 700;
    let dir = private_dir();
    let dir = dir.path();
    let vm = vm(dir);
    let proxy = proxy(dir, echo_server());
    let handle = proxy.handle();
    let keeper = own_keeper(dir);
    kill(Pid::from_raw(keeper), Signal::SIGSTOP).unwrap();
    // The device sees an end though the keeper has a copy.
    for _ in 0..20 {
        assert_eq!(
            ask(unix_client(&dir.join("echo")), b"hello").unwrap(),
            b"hello"
        );
        all_slots_come_back(&vm);
    }
    // What a guest dials is given to it one by one.
    let mut clients: Vec<UnixStream> = Vec::new();
    for _ in 0..COUNT {
        let mut client = vm.dial(HOST_PORT).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
        clients.push(client);
    }
    let link = handle.keeper().unwrap();
    assert!(link.unguarded > 0, "{link:?}");
    assert_eq!(link.connections + link.unguarded, COUNT);
    kill(Pid::from_raw(keeper), Signal::SIGCONT).unwrap();
    eventually("the keeper has all", || {
        let link = handle.keeper().unwrap();
        (link.connections, link.unguarded, link.restarts) == (COUNT, 0, 0)
    });
    keeper_of(dir, std::process::id(), |it| it["connections"] == COUNT);
    drop(clients);
    all_slots_come_back(&vm);
    drop(proxy);
    vm.stop();
    nothing_is_left(dir, &[keeper]);
}

#[test]
fn no_signal_and_no_end_of_a_session_ends_it() {
    let dir = private_dir();
    let dir = dir.path();
    let vm = vm(dir);
    let proxy = expose(dir, echo_server(), &[]);
    let keeper = keeper_of(dir, proxy.child.0.id(), |it| has_port(it, "held"));
    let process = Pid::from_raw(keeper);
    assert_eq!(nix::unistd::getsid(Some(process)).unwrap(), process);
    for signal in [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGTERM,
    ] {
        kill(process, signal).unwrap();
    }
    proxy.signal("KILL");
    keeper_of(dir, proxy.child.0.id(), |it| has_port(it, "serving"));
    kill(process, Signal::SIGTERM).unwrap();
    assert!(!guest_is_served(&vm));
    all_slots_come_back(&vm);
    // Asked to, it ends, and leaves no file.
    assert_eq!(tell(dir, keeper, "end").unwrap()["done"], true);
    nothing_is_left(dir, &[keeper]);
}

/// Starts the command as a keeper of a protocol, with the proxy's ends of its sockets.
fn keeper_process(protocol: &str) -> (Mortal, UnixStream, UnixStream) {
    let (notifier, other_notifier) = UnixStream::pair().unwrap();
    let (orders, other_orders) = UnixStream::pair().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(["keeper", protocol]);
    command.stdin(Stdio::from(OwnedFd::from(other_notifier)));
    command.stdout(Stdio::from(OwnedFd::from(other_orders)));
    (Mortal(command.spawn().unwrap()), notifier, orders)
}

/// Sends a frame of the protocol, with a descriptor if it has one.
fn send_frame(orders: &UnixStream, kind: u16, id: u64, tail: &[u8], descriptor: Option<RawFd>) {
    let flags = u32::from(descriptor.is_some());
    let length = u16::try_from(tail.len()).unwrap();
    let frame = [
        &kind.to_le_bytes()[..],
        &length.to_le_bytes(),
        &flags.to_le_bytes(),
        &id.to_le_bytes(),
        tail,
    ]
    .concat();
    let descriptors: Vec<RawFd> = descriptor.into_iter().collect();
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let rights = &rights[..descriptors.len()];
    let part = [IoSlice::new(&frame)];
    let sent = sendmsg::<()>(orders.as_raw_fd(), &part, rights, MsgFlags::empty(), None);
    assert_eq!(sent.unwrap(), frame.len());
}

/// As one of an earlier build is, whose program was replaced: these are the bytes that a proxy of
/// the first version sends. One that says more than the keeper knows is understood as well.
#[test]
fn a_keeper_serves_a_proxy_of_the_first_version_of_their_protocol() {
    let dir = private_dir();
    let dir = dir.path();
    let vm = vm(dir);
    let state = dir.join("vm").canonicalize().unwrap();
    let path = state.join(format!("00000002.{HOST_PORT:08x}"));
    let (mut keeper, notifier, orders) = keeper_process("1");
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let file = path.symlink_metadata().unwrap();
    let born = file.created().ok();
    let born = born.and_then(|it| it.duration_since(std::time::UNIX_EPOCH).ok());
    let born = born.map_or(String::new(), |it| {
        format!(":{}:{}", it.as_secs(), it.subsec_nanos())
    });
    let identity = format!("{}:{}{born}", file.dev(), file.ino());
    let connect = state.join("connect");
    let tail = [text(&path), text(&connect), &identity, "5000", "more"].join("\0");
    let dial = || {
        let mut host = UnixStream::connect(&connect).unwrap();
        host.write_all(format!("00000003.{CHARGEN:08x}\n").as_bytes())
            .unwrap();
        host.read_exact(&mut [0; 1024]).unwrap();
        host
    };
    let (kept, released) = (dial(), dial());
    send_frame(&orders, 1, u64::from(std::process::id()), b"", None);
    send_frame(&orders, 7, 0, text(&state).as_bytes(), None);
    send_frame(&orders, 4, 1, tail.as_bytes(), Some(listener.as_raw_fd()));
    send_frame(&orders, 999, 9, b"later", Some(listener.as_raw_fd()));
    send_frame(&orders, 2, 2, b"", Some(kept.as_raw_fd()));
    send_frame(&orders, 2, 3, b"", Some(released.as_raw_fd()));
    (&notifier).write_all(&[1]).unwrap();
    let pid = keeper_of(dir, std::process::id(), |it| {
        it["connections"] == 2 && has_port(it, "held")
    });
    // The first one is ended as a proxy does it, and released.
    released.shutdown(Shutdown::Write).unwrap();
    std::io::copy(&mut &released, &mut std::io::sink()).unwrap();
    send_frame(&orders, 3, 3, b"", None);
    (&notifier).write_all(&[1]).unwrap();
    drop(released);
    keeper_of(dir, std::process::id(), |it| it["connections"] == 1);
    drop((kept, listener, orders, notifier));
    keeper_of(dir, std::process::id(), |it| {
        it["proxy_ended"] == true && has_port(it, "serving")
    });
    assert!(guest_is_turned_away(&vm));
    all_slots_come_back(&vm);
    vm.stop();
    assert_eq!(keeper.exit_code(), Some(0));
    nothing_is_left(dir, &[pid]);
}

#[test]
fn a_proxy_goes_on_without_a_keeper_that_does_not_know_its_protocol() {
    for protocol in ["0", "3", "99", "x"] {
        let (mut keeper, _bell, _orders) = keeper_process(protocol);
        assert_eq!(keeper.exit_code(), Some(3), "{protocol}");
    }
    for protocol in ["1", "2"] {
        let (mut keeper, notifier, orders) = keeper_process(protocol);
        // Orders that it can't know.
        (&orders).write_all(&[0xff; 12]).unwrap();
        drop((notifier, orders));
        assert_eq!(keeper.exit_code(), Some(0));
    }
    let by_hand = command::run(&["keeper", "1"]);
    assert_eq!(by_hand.status.code(), Some(2));

    let dir = private_dir();
    let dir = dir.path();
    let vm = vm(dir);
    for (script, part) in [("exit 3", "knows no version"), ("exit 7", "has ended")] {
        let rule = Rule::new(unix(dir.join("echo")), hyperkit(&dir.join("vm"), ECHO));
        let mut config = config(vec![rule]);
        config.keeper = Some(Keeper::new("/bin/sh").arg("-c").arg(script));
        let proxy = Proxy::start(config).unwrap();
        let handle = proxy.handle();
        eventually("it says why there is no keeper", || {
            let trouble = handle.keeper().unwrap().trouble;
            trouble.is_some_and(|it| it.contains(part))
        });
        assert_eq!(
            ask(unix_client(&dir.join("echo")), b"hello").unwrap(),
            b"hello"
        );
        assert_eq!(handle.keeper().unwrap().pid, None);
    }
    let rule = Rule::new(unix(dir.join("echo")), hyperkit(&dir.join("vm"), ECHO));
    let mut config = config(vec![rule]);
    config.keeper = Some(Keeper::new("/no/such/program"));
    let proxy = Proxy::start(config).unwrap();
    eventually("it says that there is no such program", || {
        let trouble = proxy.handle().keeper().unwrap().trouble;
        trouble.is_some_and(|it| it.contains("/no/such/program"))
    });
    assert_eq!(
        ask(unix_client(&dir.join("echo")), b"hello").unwrap(),
        b"hello"
    );
    all_slots_come_back(&vm);
}

#[cfg(target_os = "linux")]
fn descriptors_of(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count()
}

/// How often a process has waited.
#[cfg(target_os = "linux")]
fn waits_of(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.unwrap().trim().parse().unwrap()
}

/// How many descriptors are registered with the pollers of a process.
#[cfg(target_os = "linux")]
fn registrations_of(pid: u32) -> usize {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let count = |entry: std::io::Result<std::fs::DirEntry>| {
        // It may have been closed since.
        let info = std::fs::read_to_string(entry.ok()?.path()).ok()?;
        Some(info.lines().filter(|it| it.starts_with("tfd:")).count())
    };
    entries.filter_map(count).sum()
}

/// Has that many clients of the echo server come, one after the other.
#[cfg(target_os = "linux")]
fn come_and_go(count: usize, dir: &Path, vm: &Vm) {
    for _ in 0..count {
        let answer = ask(unix_client(&dir.join("echo")), b"hello").unwrap();
        assert_eq!(answer, b"hello");
    }
    all_slots_come_back(vm);
}

/// A registration with epoll outlives the close of a socket as long as the keeper has a copy.
#[cfg(target_os = "linux")]
#[test]
fn nothing_that_is_closed_stays_registered_while_the_keeper_has_a_copy() {
    const COUNT: usize = 20;
    const SLACK: usize = 5;
    let dir = private_dir();
    let dir = dir.path();
    let vm = vm(dir);
    let proxy = expose(dir, echo_server(), &[]);
    let pid = proxy.child.0.id();
    let keeper = keeper_of(dir, pid, |it| has_port(it, "held"));
    let round = || come_and_go(COUNT, dir, &vm);
    round();
    let before = registrations_of(pid);
    kill(Pid::from_raw(keeper), Signal::SIGSTOP).unwrap();
    round();
    let end = Instant::now() + PATIENCE;
    let mut after = registrations_of(pid);
    while after > before + SLACK && Instant::now() < end {
        thread::sleep(Duration::from_millis(10));
        after = registrations_of(pid);
    }
    kill(Pid::from_raw(keeper), Signal::SIGCONT).unwrap();
    assert!(after <= before + SLACK, "{after}, after {before}");
    drop(proxy);
    vm.stop();
    nothing_is_left(dir, &[keeper]);
}

/// The memory that a process alone has, in KiB. Its program's code is the proxy's, too.
#[cfg(target_os = "linux")]
fn memory_of(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
    number.unwrap().parse().unwrap()
}

/// (Elsewhere nothing tells how often a process wakes, nor its descriptors; and a Mac's keeper is
/// woken for each connection.)
#[cfg(target_os = "linux")]
#[test]
fn a_keeper_sleeps_while_a_thousand_connections_come_and_go_and_holds_none() {
    const COUNT: usize = 1000;
    /// Those that it is not woken for, those that were made ahead, and some slack.
    const SLACK: usize = 64 + 16 + 20;
    let dir = private_dir();
    let dir = dir.path();
    let vm = vm(dir);
    let proxy = expose(dir, echo_server(), &[]);
    let pid = proxy.child.0.id();
    let keeper = keeper_of(dir, pid, |it| has_port(it, "held"));
    let round = || come_and_go(COUNT, dir, &vm);
    round();
    let before = (proxy.descriptors(), descriptors_of(keeper.cast_unsigned()));
    let waits = waits_of(keeper);
    round();
    let waited = waits_of(keeper) - waits;
    assert!(
        waited <= COUNT as u64 / 64 + 5,
        "it was woken {waited} times"
    );
    round();
    let after = (proxy.descriptors(), descriptors_of(keeper.cast_unsigned()));
    assert!(after.0 <= before.0 + 16 + 10, "{before:?}, {after:?}");
    assert!(after.1 <= SLACK, "{before:?}, {after:?}");
    let own = memory_of(keeper);
    assert!(own <= 2048, "it has {own} KiB of its own");
    drop(proxy);
    vm.stop();
    nothing_is_left(dir, &[keeper]);
}
