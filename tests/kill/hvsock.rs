//! The real binary as `hvsock run FILE`, and its keeper.

use crate::child::{LOOK, Places, Proxy, wait_until};
use crate::command::{output, text};
use crate::guest::{LONG, PORTS};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;

/// Whether a proxy has a keeper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keeping {
    Keeper,
    NoKeeper,
}

/// How a proxy begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begin {
    Afresh,
    /// In the place of the one that runs.
    TakeOver,
}

#[derive(Debug)]
pub(crate) struct Hvsock {
    pub(crate) proxy: Proxy,
    /// Where each guest port is exposed over TCP.
    pub(crate) tcp: HashMap<u32, SocketAddr>,
}

impl Hvsock {
    /// Starts it and waits until all its forwards listen. The TCP ports that are not in `tcp` are
    /// chosen.
    pub(crate) fn start(
        places: &Places,
        tcp: &HashMap<u32, SocketAddr>,
        keeping: Keeping,
        begin: Begin,
    ) -> Result<Hvsock, String> {
        let file = places.root.join("hvsock.toml");
        fs::write(&file, content(places, tcp)).map_err(|e| e.to_string())?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
        command.args(["run", text(&file)]).env("HVSOCK_LOG", "warn");
        if keeping == Keeping::NoKeeper {
            command.arg("--no-keeper");
        }
        if begin == Begin::TakeOver {
            command.arg("--take-over");
        }
        let mut proxy = Proxy::spawn(command, places.root.join("proxy.log"))?;
        let mut stdout = proxy.stdout.take().expect("nobody has taken it");
        // It ends with the proxy, whose pipe must not fill.
        thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
        let mut status = Value::Null;
        let pid = proxy.pid();
        let is_up = |status: &Value| {
            let forwards = status["forwards"].as_array();
            let all = forwards.is_some_and(|all| all.iter().all(|it| it["state"] == "listening"));
            status["pid"] == pid && all
        };
        let mut exited = None;
        let up = wait_until(LONG, || {
            status = ask(places).unwrap_or_default();
            exited = proxy.exited();
            is_up(&status) || exited.is_some()
        });
        if !up || exited.is_some() {
            let log = proxy.log_tail();
            return Err(format!("it isn't up, but {exited:?}: {status}: {log}"));
        }
        let tcp = PORTS.map(|port| (port, tcp_address(&status, port))).into();
        Ok(Hvsock { proxy, tcp })
    }

    /// The keeper of this proxy that has all its ports, once there is one; not `other`.
    pub(crate) fn keeper(&self, places: &Places, other: Option<Pid>) -> Result<Pid, String> {
        let mut found = None;
        let ports = places.remotes.len();
        let is_ours = |keeper: &Value| {
            let all = keeper["ports"].as_array().map(Vec::len) == Some(ports);
            keeper["proxy"] == self.proxy.pid() && all
        };
        wait_until(LONG, || {
            found = keepers(places)
                .into_iter()
                .filter(|pid| Some(*pid) != other)
                .find(|pid| ask_keeper(places, *pid).is_some_and(|it| is_ours(&it)));
            found.is_some()
        });
        found.ok_or_else(|| format!("it has no keeper: {}", self.proxy.log_tail()))
    }
}

fn content(places: &Places, tcp: &HashMap<u32, SocketAddr>) -> String {
    let mut toml = format!(
        "grace = 10\nworkers = 2\ncontrol = {:?}\n[defaults]\ndrain-timeout = 10\n[vm.it]\nat = {:?}\n",
        places.control(),
        places.vm
    );
    for port in PORTS {
        let chosen = tcp.get(&port).map_or(0, SocketAddr::port);
        let path = places.unix(port);
        let guest = format!("vm = \"it\"\nport = {port}");
        let _ = writeln!(toml, "[forward.tcp-{port}]\nlisten = {chosen}\n{guest}");
        let _ = writeln!(toml, "[forward.unix-{port}]\nlisten = {path:?}\n{guest}");
    }
    for (port, target) in &places.remotes {
        let dials = format!("guest-dials = {port}\nconnect = {target:?}");
        let _ = writeln!(toml, "[forward.dial-{port}]\nvm = \"it\"\n{dials}");
    }
    toml
}

/// What `hvsock status` says; `None` while nobody is there to be asked.
fn ask(places: &Places) -> Option<Value> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(["status", "--json", "--control", text(&places.control())]);
    let output = output(command);
    let said = output.status.success().then_some(output.stdout)?;
    serde_json::from_slice(&said).ok()
}

fn tcp_address(status: &Value, port: u32) -> SocketAddr {
    let name = format!("tcp-{port}");
    let forwards = status["forwards"].as_array().expect("forwards");
    let forward = forwards.iter().find(|it| it["name"] == name.as_str());
    let listen = forward.and_then(|it| it["listen"].as_str());
    let address = listen.and_then(|it| it.strip_prefix("tcp://"));
    address.expect("over TCP").parse().expect("an address")
}

/// The keepers that have a status socket in the VM's directory.
fn keepers(places: &Places) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir(&places.vm) else {
        return Vec::new();
    };
    let pid = |entry: fs::DirEntry| {
        let name = entry.file_name();
        let pid = name.to_str()?.strip_prefix("hvsock-keeper.")?.parse();
        pid.ok().map(Pid::from_raw)
    };
    entries.flatten().filter_map(pid).collect()
}

fn ask_keeper(places: &Places, keeper: Pid) -> Option<Value> {
    let mut stream = UnixStream::connect(places.vm.join(format!("hvsock-keeper.{keeper}"))).ok()?;
    stream.set_read_timeout(Some(LONG)).ok()?;
    stream.write_all(b"status\n").ok()?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).ok()?;
    serde_json::from_str(&answer).ok()
}

/// Kills a keeper, and waits until it has gone.
pub(crate) fn kill_keeper(keeper: Pid) -> Result<(), String> {
    kill(keeper, Signal::SIGKILL).map_err(|e| format!("keeper {keeper}: {e}"))?;
    let gone = || kill(keeper, None).is_err();
    match wait_until(LONG, gone) {
        true => Ok(()),
        false => Err(format!("keeper {keeper} is still there after {LOOK:?}")),
    }
}
