//! Checks of a VM that is named by its CID: its health and limits, and what its guest may ask of an
//! hvsock of the host. The guest is this system, by loopback: both have CID 1.

use std::error::Error;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::command::Hvsock;
use crate::report::{Outcome, ensure, eventually};
use crate::services::echo;
use crate::sockets::{Server, connect_unix, connect_vsock};
use crate::tools::{Tool, cat_echo};

type Failure = Box<dyn Error + Send + Sync>;

const HVSOCK: &str = "/hvsock";
const SOON: Duration = Duration::from_secs(30);

/// Checks a VM that goes down and comes up with the transport to its CID, by `unload` and `load`.
/// Clients that may wait are held until it is up; that it is back is seen without a dial.
///
/// The kernel keeps a transport for as long as a connect over it may take, so that time is short.
pub(crate) fn health(load: fn() -> bool, unload: fn() -> bool) -> Outcome {
    let vm = Vm::run(
        "health",
        "",
        "[defaults]
        dial-timeout = '2s'
        [forward.held]
        listen = '/held.sock'
        vm = 'it'
        port = 8200
        wait = '60s'
        [forward.refused]
        listen = '/refused.sock'
        vm = 'it'
        port = 8200",
    )?;
    Server::vsock(8200)?.serve(echo);
    let mut held = connect_unix("/held.sock")?;
    held.write_all(b"at last")?;
    vm.refuses("/refused.sock")?;
    vm.says("the VM at vsock://1 is not there: ")?;
    vm.shows("\"up\":false")?;
    ensure!(load(), "no transport");
    held.read_exact(&mut [0; 7])?;
    vm.shows("\"up\":true")?;
    vm.says("the VM at vsock://1 is there")?;
    drop(held);
    ensure!(eventually(SOON, unload), "the transport is in use");
    vm.refuses("/refused.sock")?;
    vm.says("the VM at vsock://1 is gone: ")?;
    vm.shows("\"up\":false")?;
    ensure!(load(), "no transport");
    vm.shows("\"up\":true")?;
    vm.says("the VM at vsock://1 is back after ")
}

/// Checks that of the VM's 9 connections its guest may have 8: further ones are closed at once, and
/// a client of the host waits for one. Dials of a listener that all guests may dial count, too.
pub(crate) fn limits() -> Outcome {
    Server::vsock(8210)?.serve(echo);
    Server::unix("/limits-target.sock")?.serve(echo);
    let vm = Vm::run(
        "limits",
        "connections = 9",
        "[forward.to]
        listen = '/limits-to.sock'
        vm = 'it'
        port = 8210
        [forward.from]
        guest-dials = 8211
        vm = 'it'
        connect = '/limits-target.sock'
        [forward.open]
        listen = 'vsock://:8212'
        connect = '/limits-target.sock'",
    )?;
    let mut guests = Vec::new();
    for port in [8212, 8211, 8211, 8211, 8211, 8211, 8211, 8211] {
        guests.push(served(connect_vsock(port)?)?);
    }
    for port in [8211, 8212] {
        let beyond = connect_vsock(port)?.read(&mut [0; 1]);
        ensure!(matches!(beyond, Ok(0)), "one too many read {beyond:?}");
    }
    vm.shows("\"guests\":8,\"guest_limit\":8,\"turned_away\":2,")?;
    let first = served(connect_unix("/limits-to.sock")?)?;
    vm.shows("\"connections\":9,\"limit\":9,")?;
    let mut waiting = connect_unix("/limits-to.sock")?;
    waiting.write_all(b"w")?;
    waiting.set_nonblocking(true)?;
    vm.says("all 9 connections that one VM may have are in use")?;
    let early = waiting.read(&mut [0; 1]).map_err(|e| e.kind());
    ensure!(early == Err(ErrorKind::WouldBlock), "it read {early:?}");
    waiting.set_nonblocking(false)?;
    guests.pop();
    waiting.read_exact(&mut [0; 1])?;
    drop((guests, first, waiting));
    vm.shows("\"connections\":0,\"limit\":9,")?;

    cat_echo(Path::new(HVSOCK), "--vm vsock://1 8210", 1024 * 1024)?;
    let words = "doctor --vm vsock://1 --port 8210 --control /limits.control";
    let (code, said) = Tool::start(Path::new(HVSOCK), words)?.end()?;
    let is_right = code == Some(0) && said.contains("is listened on") && said.contains("0 of 9");
    ensure!(is_right, "{code:?}: {said}");
    Ok(())
}

/// Checks that guests can read the metrics at `vsock://`, and nothing else there, and that at
/// `guest-control` those that `from` names change forwards, but neither start programs nor end the
/// process.
pub(crate) fn guests_may_control_it() -> Outcome {
    Server::unix("/controlled-target.sock")?.serve(echo);
    let at = "--metrics vsock://:8220 --guest-control vsock://:8221 --guest-control-from 7,1";
    let pair = "unix:///controlled.sock unix:///controlled-target.sock";
    let (_hvsock, _) = Hvsock::forward(&format!("--control=off {at} {pair}"))?;
    let metrics = request(connect_vsock(8220)?, "GET", "/metrics", "")?;
    expect(&metrics, 200, "\nhvsock_uptime_seconds ")?;
    let other = request(connect_vsock(8220)?, "GET", "/v1/status", "")?;
    expect(&other, 404, "/metrics")?;

    let ask =
        |method: &str, path: &str, body: &str| request(connect_vsock(8221)?, method, path, body);
    expect(&ask("GET", "/v1/status", "")?, 200, "/controlled.sock")?;
    let body = |target: &str| {
        format!("{{\"name\":\"new\",\"listen\":\"/new.sock\",\"connect\":\"{target}\"}}")
    };
    let added = ask("POST", "/v1/forwards", &body("/controlled-target.sock"))?;
    expect(&added, 201, "/new.sock")?;
    drop(served(connect_unix("/new.sock")?)?);
    expect(&ask("DELETE", "/v1/forwards/new?grace=0", "")?, 200, "")?;
    let exec = ask("POST", "/v1/forwards", &body("exec:/hvsock"))?;
    expect(&exec, 403, "allow-exec")?;
    let itself = ask("POST", "/v1/forwards", &body("vsock://local:8221"))?;
    expect(&itself, 403, "lest a guest get at it")?;
    expect(&ask("POST", "/v1/stop", "")?, 403, "guests can't end")?;
    expect(&ask("GET", "/v1/status", "")?, 200, "\"stopping\": false")
}

/// Checks that a guest that `guest-control-from` does not name gets no answer, and that the log
/// names it.
pub(crate) fn others_may_not() -> Outcome {
    let head = "guest-control = 'vsock://:8230'\nguest-control-from = [5, 6]";
    let forward = "[forward.some]\nlisten = '/others.sock'\nvm = 'it'\nport = 8231";
    let vm = Vm::run_with("others", head, "", forward)?;
    let answer = connect_vsock(8230)
        .map_err(Failure::from)
        .and_then(|client| request(client, "GET", "/v1/status", ""));
    if let Ok(answer) = answer {
        ensure!(answer.is_empty(), "it was told: {answer}");
    }
    vm.says("refused a client: CID 1 may not control this hvsock")
}

/// A running `hvsock run` with a VM `it` at `vsock://1`.
struct Vm {
    hvsock: Hvsock,
    control: String,
}

impl Vm {
    fn run(name: &str, limits: &str, forwards: &str) -> Result<Vm, Failure> {
        Vm::run_with(name, "", limits, forwards)
    }

    fn run_with(name: &str, head: &str, limits: &str, forwards: &str) -> Result<Vm, Failure> {
        let (file, control) = (format!("/{name}.toml"), format!("/{name}.control"));
        let vm = format!("[vm.it]\nat = 'vsock://1'\n{limits}");
        fs::write(
            &file,
            format!("control = '{control}'\n{head}\n{vm}\n{forwards}\n"),
        )?;
        let (hvsock, _) = Hvsock::start_listening(&format!("run {file}"))?;
        Ok(Vm { hvsock, control })
    }

    fn refuses(&self, path: &str) -> Outcome {
        let told = connect_unix(path)?.read(&mut [0; 1]);
        match told {
            Ok(0) => Ok(()),
            Err(e) if e.kind() == ErrorKind::ConnectionReset => Ok(()),
            other => Err(format!("a client read {other:?}: {}", self.hvsock.said()).into()),
        }
    }

    fn says(&self, what: &str) -> Outcome {
        let said = self.hvsock.says(what, SOON);
        ensure!(said, "it said: {}", self.hvsock.said());
        Ok(())
    }

    /// Waits until its status contains this, blanks aside.
    fn shows(&self, what: &str) -> Outcome {
        let mut last = String::new();
        let shown = eventually(SOON, || {
            let asked = connect_unix(&self.control).map_err(Failure::from);
            let answer = asked.and_then(|client| request(client, "GET", "/v1/status", ""));
            last = answer.unwrap_or_else(|e| e.to_string());
            last.retain(|c| !c.is_whitespace());
            last.contains(what)
        });
        ensure!(shown, "{what} is not in {last}");
        Ok(())
    }
}

/// Returns a client of an echo server, once it has its first answer.
fn served(mut client: UnixStream) -> Result<UnixStream, Failure> {
    client.write_all(b"?")?;
    client.read_exact(&mut [0; 1])?;
    Ok(client)
}

/// Sends a request, and returns the answer's head and body.
fn request(mut to: UnixStream, method: &str, path: &str, body: &str) -> Result<String, Failure> {
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: hvsock\r\nContent-Length: {length}");
    to.write_all(format!("{head}\r\n\r\n{body}").as_bytes())?;
    let mut answer = String::new();
    to.read_to_string(&mut answer)?;
    Ok(answer)
}

fn expect(answer: &str, status: u16, part: &str) -> Outcome {
    let is_right = answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.contains(part);
    ensure!(is_right, "not {status} with {part:?}: {answer}");
    Ok(())
}
