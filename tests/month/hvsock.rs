//! The real binary as `hvsock run FILE`, its file, and its control socket as the commands use it.

use crate::child::{Places, Proxy, wait_until};
use crate::command::{in_runtime, output, text};
use crate::guest::{DOWNLOAD, ECHO, HTTP, LONG, PORTS};
use crate::host::Host;
use nix::sys::signal::Signal;
use serde_json::Value;
use std::collections::HashMap;
use std::fmt::Write;
use std::fs;
use std::io::BufRead;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread;

/// Connections on which nothing moves are cut off after so many seconds, by the forward that does.
pub(crate) const IDLE: f64 = 1.0;

#[derive(Debug)]
pub(crate) struct Hvsock<'a> {
    pub(crate) proxy: Proxy,
    places: &'a Places,
    host: &'a Host,
}

/// The files that it is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum File {
    /// What there is in all the others, too.
    Usual,
    /// `changed` leads elsewhere, with other times, and the VM may have fewer connections.
    Changed,
    /// There is a forward more.
    More,
    /// Full of mistakes.
    Bad,
}

impl<'a> Hvsock<'a> {
    pub(crate) fn start(places: &'a Places, host: &'a Host) -> Result<Hvsock<'a>, String> {
        let file = places.root.join("hvsock.toml");
        fs::write(&file, content(places, host, File::Usual)).map_err(|e| e.to_string())?;
        let mut command = in_runtime(&places.root, &["run", text(&file)]);
        command.env("HVSOCK_LOG", "info");
        let mut proxy = Proxy::spawn(command, places.root.join("proxy.log"))?;
        while !proxy.line()?.starts_with("idle: ") {}
        let stdout = proxy.stdout.take().expect("nobody has taken it");
        // It ends with the proxy, whose pipe must not fill.
        thread::spawn(move || stdout.lines().map_while(Result::ok).for_each(drop));
        Ok(Hvsock {
            proxy,
            places,
            host,
        })
    }

    /// Has another file read, and waits until it has been.
    pub(crate) fn reload(&self, file: File) -> Result<(), String> {
        let path = self.places.root.join("hvsock.toml");
        let told = match file {
            File::Bad => "all stays as it was",
            _ => "was read again",
        };
        let count = || self.proxy.log().matches(told).count();
        let before = count();
        fs::write(&path, content(self.places, self.host, file)).map_err(|e| e.to_string())?;
        self.proxy.signal(Signal::SIGHUP);
        match wait_until(LONG, || count() > before) {
            true => Ok(()),
            false => Err(format!("{file:?} is not read: {}", self.proxy.log_tail())),
        }
    }

    /// What a command that speaks to it prints.
    pub(crate) fn command(&self, arguments: &[&str]) -> Result<String, String> {
        command(self.places, arguments)
    }

    pub(crate) fn status(&self) -> Result<Status, String> {
        Status::ask(self.places)
    }

    pub(crate) fn add(&self) -> Result<(), String> {
        let (added, target) = (added(self.places), &self.host.unix);
        let arguments = ["add", "--name", "added", text(&added), text(target)];
        self.command(&arguments).map(drop)
    }

    pub(crate) fn remove(&self) -> Result<(), String> {
        self.command(&["remove", "added"]).map(drop)
    }
}

fn command(places: &Places, arguments: &[&str]) -> Result<String, String> {
    let output = output(in_runtime(&places.root, arguments));
    let said = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    match output.status.success() {
        true => Ok(said(output.stdout)),
        false => Err(format!("hvsock {arguments:?}: {}", said(output.stderr))),
    }
}

pub(crate) fn changed(places: &Places) -> PathBuf {
    places.root.join("changed.sock")
}

pub(crate) fn more(places: &Places) -> PathBuf {
    places.root.join("more.sock")
}

pub(crate) fn added(places: &Places) -> PathBuf {
    places.root.join("added.sock")
}

fn content(places: &Places, host: &Host, file: File) -> String {
    let mut toml = format!(
        "grace = 10\nworkers = 2\n[defaults]\ndrain-timeout = 2\n[vm.it]\nat = {:?}\nconnections = {}\n",
        places.vm,
        if file == File::Changed { 300 } else { 400 },
    );
    let mut forward = |name: &str, listen: &str, rest: &str| {
        let _ = writeln!(toml, "[forward.{name}]\nlisten = {listen}\n{rest}");
    };
    let quoted = |path: &PathBuf| format!("{path:?}");
    let guest = |port: u32| format!("vm = \"it\"\nport = {port}");
    let plain = format!("connect = {:?}", host.unix);
    for port in PORTS {
        let kept = if port == HTTP { "\nreserved = 8" } else { "" };
        forward(&format!("tcp-{port}"), "0", &(guest(port) + kept));
        let path = places.unix(port);
        forward(&format!("unix-{port}"), &quoted(&path), &guest(port));
    }
    let (elsewhere, time) = match file {
        File::Changed => (plain.clone(), 20),
        _ => (guest(ECHO), 25),
    };
    let elsewhere = format!("{elsewhere}\ndial-timeout = {time}");
    forward("changed", &quoted(&changed(places)), &elsewhere);
    if file == File::More {
        forward("more", &quoted(&more(places)), &plain);
    }
    if file == File::Bad {
        forward("bad", "0", "conect = 80\nport = -1");
    }
    forward("plain", "0", &plain);
    forward("waiting", "0", &(guest(DOWNLOAD) + "\nwait = \"15s\""));
    for (port, target) in &places.remotes {
        let _ = writeln!(
            toml,
            "[forward.dial-{port}]\nvm = \"it\"\nguest-dials = {port}\nconnect = {target:?}"
        );
    }
    let idle = format!("{}\nidle-timeout = {IDLE}", guest(ECHO));
    let _ = writeln!(toml, "[forward.idle]\nlisten = 0\n{idle}");
    toml
}

/// What `hvsock status` says.
#[derive(Debug)]
pub(crate) struct Status(Value);

impl Status {
    pub(crate) fn ask(places: &Places) -> Result<Status, String> {
        let said = command(places, &["status", "--json"])?;
        let value = serde_json::from_str(&said).map_err(|e| format!("{said}: {e}"))?;
        Ok(Status(value))
    }

    fn forwards(&self) -> impl Iterator<Item = &Value> {
        self.0["forwards"].as_array().into_iter().flatten()
    }

    fn forward(&self, name: &str) -> &Value {
        let found = self.forwards().find(|it| it["name"] == name);
        found.unwrap_or_else(|| panic!("no forward {name} in {}", self.0))
    }

    pub(crate) fn count(&self, name: &str, counter: &str) -> u64 {
        let count = &self.forward(name)["counters"][counter];
        count.as_u64().unwrap_or_else(|| panic!("no {counter}"))
    }

    pub(crate) fn live(&self) -> u64 {
        self.0["live"].as_u64().expect("live")
    }

    /// Where a forward over TCP listens.
    pub(crate) fn tcp(&self, name: &str) -> SocketAddr {
        let listen = self.forward(name)["listen"].as_str().expect("listen");
        let address = listen.strip_prefix("tcp://").map(str::parse);
        address.expect("over TCP").expect("an address")
    }

    /// What it knows of the VM.
    pub(crate) fn vm(&self) -> &Value {
        &self.forward("idle")["vm"]
    }

    /// Says what can't be, after `before`: of each forward's counters, by its id.
    pub(crate) fn check(&self, before: &mut HashMap<u64, Value>) -> Result<(), String> {
        for forward in self.forwards() {
            let counters = &forward["counters"];
            let id = forward["id"].as_u64().expect("an id");
            let number = |counter: &Value| counter.as_u64().expect("a number");
            let reasons = counters["refusals"].as_object().expect("reasons");
            let sum: u64 = reasons.values().map(number).sum();
            let old = before.insert(id, counters.clone());
            let falls = ["accepted", "refused", "sent", "received", "abandoned"]
                .into_iter()
                .find(|key| {
                    old.as_ref()
                        .is_some_and(|old| number(&old[key]) > number(&counters[key]))
                });
            if let Some(key) = falls {
                return Err(format!("{key} falls: {old:?}, then {forward}"));
            }
            if sum != number(&counters["refused"]) {
                return Err(format!("refusals are not what they sum up to: {forward}"));
            }
            if !matches!(forward["state"].as_str(), Some("listening" | "full")) {
                return Err(format!("it isn't listening: {forward}"));
            }
        }
        Ok(())
    }
}
