//! `hvsock.mode=serve`: a guest with `/hvsock` in vsudd's place, which a driver on the host dials
//! and is dialled by.
//!
//! Each service has two ports: one that `/hvsock` forwards, and one [`NATIVE`] higher on which it
//! listens itself. The driver sends commands to [`CONTROL`], one line a connection, answered by one
//! line.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use hvsock::{Address, Stream};
use nix::sys::reboot::{RebootMode, reboot};

use crate::pattern::{receive_pattern, send_pattern};
use crate::services::{
    End, Outcome, Request, ask, ask_client, crowd_client, echo, echo_client, tell, tell_client,
    verdict,
};
use crate::sockets::{Server, connect_unix, connect_vsock_of};
use crate::tools::{cat_echo, stress};

const HVSOCK: &str = "/hvsock";
const CONTROL: u32 = 1;
const NATIVE: u32 = 1000;
const HOST: u32 = 2;

type Service = fn(UnixStream);
const SERVICES: [(u32, &str, Service); 3] = [
    (7, "/echo.sock", echo),
    (8, "/tell.sock", tell),
    (9, "/ask.sock", ask),
];

/// A port of `/hvsock` at whose target nothing listens.
const NOBODY: u32 = 98;

/// The host's ports that `/hvsock` dials for the guest's clients, at `/host-PORT.sock`.
const HOST_PORTS: [u32; 5] = [5007, 5008, 5009, 5098, 5099];

/// Serves until it is told to reboot.
pub(crate) fn run() -> Outcome {
    let mut pairs = Vec::new();
    for (port, path, service) in SERVICES {
        Server::unix(path)?.serve(service);
        Server::vsock(port + NATIVE)?.serve(service);
        pairs.extend([format!("vsock://:{port}"), format!("unix://{path}")]);
    }
    pairs.extend([
        format!("vsock://:{NOBODY}"),
        "unix:///nobody.sock".to_owned(),
    ]);
    for port in HOST_PORTS {
        pairs.extend([
            format!("unix:///host-{port}.sock"),
            format!("vsock://{HOST}:{port}"),
        ]);
    }
    let mut hvsock = Command::new(HVSOCK)
        .arg("forward")
        .args(pairs)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let listening = hvsock.stdout.take().map(BufReader::new);
    let expected = SERVICES.len() + 1 + HOST_PORTS.len();
    let said = listening.into_iter().flat_map(BufRead::lines);
    if said.take(expected).filter(Result::is_ok).count() < expected {
        return Err("hvsock doesn't listen".into());
    }
    let control = Server::vsock(CONTROL)?;
    println!("serving");
    loop {
        let client = control.accept()?;
        let id = hvsock.id();
        let mut line = String::new();
        // A client that has closed is no reason to end.
        if BufReader::new(&client).read_line(&mut line).is_err() {
            continue;
        }
        if line.trim() == "reboot" {
            return end(&mut hvsock, &client);
        }
        thread::spawn(move || {
            let answer = match obey(id, line.trim()) {
                Ok(answer) => format!("ok {answer}\n"),
                Err(e) => format!("failed {e}\n"),
            };
            let _ = (&client).write_all(answer.as_bytes());
        });
    }
}

/// Ends the machine without closing its connections, as a guest that crashes: on the host they stay
/// connected.
fn end(hvsock: &mut Child, mut client: &UnixStream) -> Outcome {
    client.write_all(b"ok\n")?;
    // Lets the answer be sent first.
    thread::sleep(Duration::from_millis(200));
    println!("rebooting");
    let _ = reboot(RebootMode::RB_AUTOBOOT);
    let _ = hvsock.kill();
    Err("it doesn't reboot".into())
}

/// Carries out a command of the driver, and returns its answer.
fn obey(hvsock: u32, line: &str) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
    let words: Vec<&str> = line.split(' ').collect();
    let done = |outcome: Outcome| outcome.map(|()| String::new());
    let end = |word| match word {
        "half-close" => End::HalfClose,
        _ => End::Close,
    };
    match words[..] {
        ["echo", target, bytes, how] => {
            done(echo_client(&dial(target)?, 50, bytes.parse()?, end(how)))
        }
        ["ask", target, up, down] => done(ask_client(&dial(target)?, request(up, down)?)),
        ["tell", target, up, down] => done(tell_client(&dial(target)?, request(up, down)?)),
        ["upload", target, up, down] => {
            let client = dial(target)?;
            let request = request(up, down)?;
            request.send(&client)?;
            receive_pattern(&client, request.seed + 1, request.down)?;
            done(send_pattern(&client, request.seed, request.up).map_err(Into::into))
        }
        ["verdict"] => done(verdict().map_err(Into::into)),
        ["crowd", target, clients, how] => {
            let target = target.to_owned();
            done(crowd_client(clients.parse()?, end(how), move || {
                dial(&target)
            }))
        }
        ["sequence", target, clients] => {
            let clients: u64 = clients.parse()?;
            for number in 0..clients {
                echo_client(&dial(target)?, number, 1024, End::HalfClose)
                    .map_err(|e| format!("client {number}: {e}"))?;
            }
            Ok(String::new())
        }
        ["refused", target] => refused(target),
        ["cat", port, bytes] => {
            let address = format!("vsock://{HOST}:{port}");
            done(cat_echo(Path::new(HVSOCK), &address, bytes.parse()?))
        }
        ["stress", ..] => done(stress(Path::new(HVSOCK), &line["stress ".len()..])),
        ["deadline", port] => {
            let address = format!("vsock://{HOST}:{port}").parse()?;
            thread::spawn(move || deadline(&address));
            Ok(String::new())
        }
        ["descriptors"] => Ok(fs::read_dir(format!("/proc/{hvsock}/fd"))?
            .count()
            .to_string()),
        _ => Err(format!("what is {line:?}?").into()),
    }
}

fn request(up: &str, down: &str) -> Result<Request, std::num::ParseIntError> {
    Ok(Request {
        wait: 0,
        up: up.parse()?,
        down: down.parse()?,
        seed: 60,
    })
}

/// Dials `address` after a while, when the host has been stopped, and prints the result on the
/// serial line.
fn deadline(address: &Address) {
    thread::sleep(Duration::from_secs(2));
    let start = Instant::now();
    let told = match Stream::connect_timeout(address, Duration::from_secs(3)) {
        Ok(_) => "connected".to_owned(),
        Err(e) => format!("{:?}: {e}", e.kind()),
    };
    println!(
        "deadline: {told} (after {} ms)",
        start.elapsed().as_millis()
    );
}

/// Connects to a port of the host, or to the Unix socket behind which `/hvsock` dials it.
fn dial(target: &str) -> std::io::Result<UnixStream> {
    match target.parse() {
        Ok(port) => connect_vsock_of(HOST, port),
        Err(_) => connect_unix(target),
    }
}

/// Returns how a dial that nothing accepts ends, and after how many milliseconds.
fn refused(target: &str) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
    let start = Instant::now();
    let told = match dial(target) {
        Err(e) => format!("connect: {e}"),
        Ok(mut stream) => match stream.read(&mut [0; 1]) {
            Ok(0) => "EOF".to_owned(),
            Ok(_) => return Err("somebody answered".into()),
            Err(e) => format!("read: {e}"),
        },
    };
    Ok(format!("{} {told}", start.elapsed().as_millis()))
}
