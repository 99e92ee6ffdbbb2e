//! One hvsock takes over from another: the real binary, its listeners of all kinds, under load, and
//! whatever goes wrong.
#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::unistd::Pid;
use serde_json::{Value, json};

use command::*;
use common::*;
use hvsock::simulate::{Service, Vm};

/// How many take-overs there are under load; `HVSOCK_TEST_TAKE_OVERS` says another number.
const TAKE_OVERS: usize = 10;

/// A TCP echo server; its port.
fn echo_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || io::copy(&mut &stream, &mut &stream).map(drop));
        }
    });
    port
}

/// A directory with a file for `run`, and those who run it.
struct Scene {
    dir: tempfile::TempDir,
    echo: u16,
}

impl Scene {
    fn new() -> Scene {
        Scene {
            dir: private_dir(),
            echo: echo_server(),
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self) -> PathBuf {
        self.at("hvsock.toml")
    }

    fn write(&self, text: &str) {
        fs::write(self.file(), format!("grace = \"5s\"\nworkers = 2\n{text}")).unwrap();
    }

    /// A forward to the echo server.
    fn forward(&self, name: &str, listen: impl std::fmt::Debug) -> String {
        let echo = self.echo;
        format!("[forward.{name}]\nlisten = {listen:?}\nconnect = {echo}\n")
    }

    fn command(&self, more: &[&str]) -> Command {
        let file = self.file();
        in_runtime(self.dir.path(), &[&["run", text(&file)], more].concat())
    }

    fn run(&self) -> Running {
        let running = Running::spawn(self.command(&[]));
        running.says("controlled at");
        running
    }

    fn take_over(&self) -> Running {
        Running::spawn(self.command(&["--take-over"]))
    }

    fn control(&self) -> PathBuf {
        let home = match cfg!(target_os = "macos") {
            true => format!("hvsock-{}", nix::unistd::geteuid()),
            false => "hvsock".to_owned(),
        };
        self.at(&home).join("control.sock")
    }

    fn call(&self, method: &str, target: &str, body: &str) -> (u16, Value) {
        self.try_call(method, target, body).unwrap()
    }

    fn try_call(&self, method: &str, target: &str, body: &str) -> io::Result<(u16, Value)> {
        let mut client = local_client(&self.control())?;
        let length = body.len();
        let request = format!(
            "{method} {target} HTTP/1.1\r\nHost: hvsock\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        client.write_all(request.as_bytes())?;
        let mut answer = String::new();
        client.read_to_string(&mut answer)?;
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .ok_or(ErrorKind::UnexpectedEof)?;
        let status = head["HTTP/1.1 ".len()..][..3].parse().unwrap();
        Ok((status, serde_json::from_str(body).unwrap_or_default()))
    }

    fn is_read_again(&self) -> bool {
        matches!(self.try_call("POST", "/v1/reload", ""), Ok((200, _)))
    }

    fn status(&self) -> Value {
        self.call("GET", "/v1/status", "").1
    }

    /// The process that answers at the control socket.
    fn pid(&self) -> u32 {
        self.status()["pid"].as_u64().unwrap() as u32
    }

    fn names(&self) -> Vec<String> {
        let status = self.status();
        let forwards = status["forwards"].as_array().unwrap().iter();
        let name = |it: &Value| it["name"].as_str().unwrap_or_default().to_owned();
        forwards.map(name).collect()
    }

    /// The TCP port of a forward.
    fn port(&self, name: &str) -> u16 {
        let status = self.status();
        let mut forwards = status["forwards"].as_array().unwrap().iter();
        let forward = forwards.find(|it| it["name"] == name).unwrap();
        let listen = forward["listen"].as_str().unwrap();
        listen.rsplit_once(':').unwrap().1.parse().unwrap()
    }
}

/// Clients that come all the time, of whom none may be refused and none lose a byte.
struct Crowd {
    is_over: Arc<AtomicBool>,
    served: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<()>>,
}

impl Crowd {
    fn new() -> Crowd {
        Crowd {
            is_over: Arc::default(),
            served: Vec::new(),
            threads: Vec::new(),
        }
    }

    fn come<C: Client>(
        mut self,
        what: &str,
        connect: impl Fn() -> io::Result<C> + Send + 'static,
    ) -> Crowd {
        let served = Arc::<AtomicU64>::default();
        self.served.push(Arc::clone(&served));
        let is_over = Arc::clone(&self.is_over);
        let what = what.to_owned();
        self.threads.push(thread::spawn(move || {
            let mut random = fastrand::Rng::with_seed(what.len() as u64);
            while !is_over.load(Ordering::Relaxed) {
                let bytes = pattern(random.usize(1..20_000));
                let count = served.load(Ordering::Relaxed);
                let client = connect();
                let client = client.unwrap_or_else(|e| panic!("{what} {count} is refused: {e}"));
                let answer = ask(client, &bytes);
                let answer = answer.unwrap_or_else(|e| panic!("{what} {count} is cut off: {e}"));
                assert!(
                    answer == bytes,
                    "{what} {count}: {} of {}",
                    answer.len(),
                    bytes.len()
                );
                served.fetch_add(1, Ordering::Relaxed);
            }
        }));
        self
    }

    fn served(&self) -> Vec<u64> {
        let served = self.served.iter();
        served.map(|it| it.load(Ordering::Relaxed)).collect()
    }

    /// Waits until all have been served some more, or one has failed.
    fn is_served(&self) {
        let before = self.served();
        eventually("all clients are served", || {
            assert!(
                self.threads.iter().all(|it| !it.is_finished()),
                "a client has failed"
            );
            let now = self.served();
            now.iter()
                .zip(&before)
                .all(|(now, before)| *now > before + 2)
        });
    }

    fn leaves(self) {
        self.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().unwrap();
        }
    }
}

fn tcp_client(port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// A client over IPv6, or over IPv4 if the machine hasn't `::1`.
fn v6_client(port: u16) -> io::Result<TcpStream> {
    match TcpListener::bind("[::1]:0") {
        Err(e) if e.kind() != ErrorKind::AddrInUse => {
            println!("skipped in part: this machine has no ::1: {e}");
            tcp_client(port)
        }
        _ => {
            let stream = TcpStream::connect(("::1", port))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(stream)
        }
    }
}

fn local_client(path: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

#[test]
fn no_client_is_refused_and_no_byte_lost_however_often_one_takes_over() {
    let scene = Scene::new();
    let state = scene.at("vm");
    let vm = Vm::builder(&state).guest(7, Service::Echo).start().unwrap();
    let vm = Arc::new(vm);
    let rules = [
        scene.forward("tcp", 0),
        scene.forward("both", "localhost:0"),
        scene.forward("unix", scene.at("front")),
        format!(
            "[forward.guest]\nlisten = 0\nvm = {0:?}\nport = 7\n\
             [forward.dialled]\nvm = {0:?}\nguest-dials = 5000\nconnect = {1}\n",
            state, scene.echo
        ),
    ];
    let metrics = "metrics = \"localhost:0\"\n".to_owned();
    scene.write(&(metrics + &rules.concat()));
    let mut old = scene.run();
    let metrics = old.says("metrics at http://localhost:");
    let metrics = metrics.rsplit_once(':').unwrap().1;
    let metrics: u16 = metrics.strip_suffix("/metrics").unwrap().parse().unwrap();
    let (_, added) = scene.call(
        "POST",
        "/v1/forwards",
        &json!({"name": "by hand", "listen": "tcp://127.0.0.1:0", "wait": 3,
                "connect": format!("tcp://127.0.0.1:{}", scene.echo)})
        .to_string(),
    );
    let (_, added_too) = scene.call(
        "POST",
        "/v1/forwards",
        &json!({"name": "both by hand", "listen": "tcp://*:0", "connect": format!("tcp://127.0.0.1:{}", scene.echo)})
            .to_string(),
    );
    let names = [
        "tcp",
        "both",
        "unix",
        "guest",
        "dialled",
        "by hand",
        "both by hand",
    ];
    assert_eq!(scene.names(), names, "{added} {added_too}");
    let ports = || ["tcp", "guest", "by hand", "both", "both by hand"].map(|name| scene.port(name));
    let before = ports();
    let [tcp_port, guest, by_hand, both, both_by_hand] = before;
    let (front, dialled) = (scene.at("front"), Arc::clone(&vm));
    let control = scene.control();
    let crowd = Crowd::new()
        .come("TCP client", move || tcp_client(tcp_port))
        .come("another TCP client", move || tcp_client(tcp_port))
        .come("Unix client", move || local_client(&front))
        .come("client of the guest", move || tcp_client(guest))
        .come("client of a forward added by hand", move || {
            tcp_client(by_hand)
        })
        .come("client of both families", move || tcp_client(both))
        .come("IPv6 client of both families", move || v6_client(both))
        .come("IPv6 client of all addresses", move || {
            v6_client(both_by_hand)
        })
        .come("guest", move || {
            let stream = dialled.dial(5000)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(stream)
        });
    let is_over = Arc::clone(&crowd.is_over);
    // Nor is one who looks.
    let looks = thread::spawn(move || {
        while !is_over.load(Ordering::Relaxed) {
            let mut client = local_client(&control).unwrap();
            client
                .write_all(b"GET /v1/status HTTP/1.1\r\n\r\n")
                .unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
        }
    });
    let times = std::env::var("HVSOCK_TEST_TAKE_OVERS");
    let times = times.map_or(TAKE_OVERS, |times| times.parse().unwrap());
    for round in 0..times {
        crowd.is_served();
        // One who stays.
        let mut stays = tcp(tcp_port);
        stays.write_all(b"before").unwrap();
        let mut heard = [0; 6];
        stays.read_exact(&mut heard).unwrap();
        let new = scene.take_over();
        new.says("took over from process");
        new.says("controlled at");
        assert_eq!(scene.pid(), new.child.0.id(), "round {round}");
        stays.write_all(b"after!").unwrap();
        stays.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"after!");
        drop(stays);
        assert_eq!(old.exit_code(), Some(0), "round {round}");
        assert_eq!(ports(), before);
        old = new;
    }
    crowd.is_served();
    for mut client in [tcp_client(metrics).unwrap(), v6_client(metrics).unwrap()] {
        client.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
    }
    assert_eq!(scene.names(), names);
    println!("{times} take-overs; clients served: {:?}", crowd.served());
    crowd.leaves();
    looks.join().unwrap();
    // The last one owns the files.
    old.signal("TERM");
    assert_eq!(old.exit_code(), Some(0));
    assert!(!scene.at("front").exists() && !scene.control().exists());
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
    let left = fs::read_dir(scene.control().parent().unwrap()).unwrap();
    assert_eq!(
        left.count(),
        0,
        "something was left beside the control socket"
    );
}

/// A descriptor that was passed, closed at the end.
struct Passed(RawFd);

impl Drop for Passed {
    fn drop(&mut self) {
        nix::unistd::close(self.0).unwrap();
    }
}

/// A successor that does what it must not.
struct Fake {
    wire: UnixStream,
}

impl Fake {
    /// Asks for the sockets.
    fn ask(scene: &Scene) -> Fake {
        let meeting = tempfile::tempdir_in(scene.dir.path()).unwrap();
        let path = meeting.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let body = json!({"protocol": 1, "pid": 1, "socket": format!("unix://{}", text(&path))});
        let (status, answer) = scene.call("POST", "/v1/take-over", &body.to_string());
        assert_eq!(status, 202, "{answer}");
        let (wire, _) = listener.accept().unwrap();
        wire.set_read_timeout(Some(PATIENCE)).unwrap();
        Fake { wire }
    }

    /// Reads so many lines; the descriptors that came with them.
    fn reads(&mut self, lines: usize) -> Vec<Passed> {
        let mut descriptors = Vec::new();
        let mut seen = 0;
        while seen < lines {
            let mut buffer = [0; 4096];
            let mut space = nix::cmsg_space!([i32; 64]);
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let number = self.wire.as_raw_fd();
            let flags = MsgFlags::empty();
            let message = recvmsg::<()>(number, &mut parts, Some(&mut space), flags).unwrap();
            for control in message.cmsgs().unwrap() {
                if let ControlMessageOwned::ScmRights(numbers) = control {
                    descriptors.extend(numbers.into_iter().map(Passed));
                }
            }
            let bytes = message.bytes;
            assert!(bytes > 0, "it ended after {seen} lines");
            seen += buffer[..bytes]
                .iter()
                .filter(|byte| **byte == b'\n')
                .count();
        }
        descriptors
    }
}

#[test]
fn a_successor_that_fails_before_it_has_confirmed_has_changed_nothing() {
    let scene = Scene::new();
    let front = scene.at("front");
    let rules = [scene.forward("tcp", 0), scene.forward("unix", &front)];
    scene.write(&rules.concat());
    let mut old = scene.run();
    let pid = scene.pid();
    let port = scene.port("tcp");
    let path = front.clone();
    let crowd = Crowd::new()
        .come("TCP client", move || tcp_client(port))
        .come("Unix client", move || local_client(&path));
    type Failing = fn(Fake);
    let ways: [(&str, Failing); 8] = [
        ("leaves at once", drop),
        ("leaves after the first line", |mut fake| {
            drop(fake.reads(1))
        }),
        ("leaves with one socket", |mut fake| drop(fake.reads(2))),
        ("leaves with all sockets", |mut fake| drop(fake.reads(4))),
        ("says half a line", |mut fake| {
            let _sockets = fake.reads(4);
            fake.wire.write_all(b"{\"taken\"").unwrap();
        }),
        ("says nonsense", |mut fake| {
            let _sockets = fake.reads(4);
            fake.wire.write_all(b"{}\n").unwrap();
            assert_eq!(fake.wire.read(&mut [0; 8]).unwrap_or(0), 0);
        }),
        ("leaves when they are its own", |mut fake| {
            let _sockets = fake.reads(4);
            fake.wire.write_all(b"{\"taken\": [0, 1, 2]}\n").unwrap();
            fake.reads(1);
        }),
        ("says nothing", |mut fake| {
            let _sockets = fake.reads(4);
            // It isn't waited for longer than a while.
            assert_eq!(fake.wire.read(&mut [0; 8]).unwrap_or(0), 0);
        }),
    ];
    for (what, fail) in ways {
        fail(Fake::ask(&scene));
        let told = old.complains("has not taken over");
        assert!(told.contains("going on"), "{what}: {told}");
        crowd.is_served();
        assert_eq!(scene.pid(), pid, "{what}");
        assert_eq!(scene.names(), ["tcp", "unix"], "{what}");
    }
    // Nor does it keep anybody from changing the forwards later, or from taking over in earnest.
    scene.write(&[&rules.concat()[..], &scene.forward("more", 0)].concat());
    assert_eq!(scene.call("POST", "/v1/reload", "").0, 200);
    let mut new = scene.take_over();
    new.says("took over");
    assert_eq!(old.exit_code(), Some(0));
    crowd.is_served();
    crowd.leaves();
    new.signal("TERM");
    assert_eq!(new.exit_code(), Some(0));
    assert!(!front.exists());
}

/// At any moment. One that was confirmed was the one that ran, and is missed as that.
#[test]
fn a_successor_that_is_killed_leaves_the_old_one_or_nothing() {
    let scene = Scene::new();
    let front = scene.at("front");
    let state = scene.at("vm");
    let vm = Vm::builder(&state).start().unwrap();
    let rules = [
        scene.forward("tcp", 0),
        scene.forward("unix", &front),
        format!(
            "[forward.dialled]\nvm = {state:?}\nguest-dials = 5000\nconnect = {}\n",
            scene.echo
        ),
    ];
    scene.write(&rules.concat());
    let mut random = fastrand::Rng::with_seed(7);
    let mut old = scene.run();
    let (mut stayed, mut given) = (0, 0);
    for round in 0..30 {
        let port = scene.port("tcp");
        let mut new = scene.take_over();
        thread::sleep(Duration::from_micros(random.u64(0..30_000)));
        new.child.0.kill().unwrap();
        new.child.0.wait().unwrap();
        // A file is read again only while nothing is handed over, and not by one that has.
        let mut stays = None;
        eventually("it is clear which one it is", || {
            stays = match old.child.0.try_wait().unwrap() {
                Some(code) => Some(Err(code)),
                None => scene.is_read_again().then_some(Ok(())),
            };
            stays.is_some()
        });
        match stays.unwrap() {
            Ok(()) => {
                stayed += 1;
                assert_eq!(scene.pid(), old.child.0.id(), "round {round}");
                assert_eq!(ask(tcp(port), b"tcp").unwrap(), b"tcp", "round {round}");
                assert_eq!(ask(unix_client(&front), b"unix").unwrap(), b"unix");
                // Nor does the keeper of the one that was killed take any.
                for _ in 0..10 {
                    assert_eq!(ask(vm.dial(5000).unwrap(), b"guest").unwrap(), b"guest");
                }
            }
            Err(code) => {
                given += 1;
                assert_eq!(code.code(), Some(0), "round {round}");
                // Its keeper takes what the guest dials, until there is another one.
                assert_eq!(ask(vm.dial(5000).unwrap(), b"guest").unwrap(), b"");
                old = scene.run();
                assert_eq!(ask(vm.dial(5000).unwrap(), b"guest").unwrap(), b"guest");
            }
        }
    }
    println!("the old one stayed {stayed} times, and had handed over {given} times");
    assert!(stayed > 0);
    old.signal("TERM");
    assert_eq!(old.exit_code(), Some(0));
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

/// A predecessor whose every step the test takes: it has one listener, at `at`.
struct Before {
    wire: UnixStream,
    listener: UnixListener,
}

impl Before {
    /// Has `successor` take over from it, as far as that it has the socket.
    fn meet(scene: &Scene, at: &Path) -> (Before, Running) {
        fs::create_dir(scene.control().parent().unwrap()).unwrap();
        fs::set_permissions(
            scene.control().parent().unwrap(),
            fs::Permissions::from_mode(0o700),
        )
        .unwrap();
        let control = UnixListener::bind(scene.control()).unwrap();
        let listener = UnixListener::bind(at).unwrap();
        let successor = scene.take_over();
        let status = json!({"version": "0", "pid": 1, "uptime_seconds": 0.0, "stopping": false,
                            "live": 0, "log_dropped": 0, "forwards": []});
        answer(&control, 200, &status);
        let asked = answer(&control, 202, &json!({}));
        // The successor binds it as soon as it has been passed the others.
        drop(control);
        let meeting = asked["socket"].as_str().unwrap();
        let mut wire = UnixStream::connect(meeting.strip_prefix("unix://").unwrap()).unwrap();
        wire.set_read_timeout(Some(PATIENCE)).unwrap();
        wire.write_all(b"{\"sockets\": 1}\n").unwrap();
        let metadata = fs::symlink_metadata(at).unwrap();
        let since = metadata.created().unwrap();
        let since = since.duration_since(std::time::UNIX_EPOCH).unwrap();
        let (device, inode) = (metadata.dev(), metadata.ino());
        let (seconds, part) = (since.as_secs(), since.subsec_nanos());
        let identity = format!("{device}:{inode}:{seconds}:{part}");
        let address = format!("unix://{}", text(at));
        let line = json!({
            "use": "forward", "name": "unix", "asked": address, "bound": address,
            "file": {"at": address, "identity": identity},
            "foreign": false, "added": null,
        });
        let line = format!("{line}\n");
        let passed = [listener.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&passed)];
        let part = [IoSlice::new(line.as_bytes())];
        let flags = MsgFlags::empty();
        sendmsg::<()>(wire.as_raw_fd(), &part, &rights, flags, None).unwrap();
        (Before { wire, listener }, successor)
    }

    /// Reads the line by which the successor is ready.
    fn hears(&mut self) -> String {
        let mut line = String::new();
        BufReader::new(&self.wire).read_line(&mut line).unwrap();
        line
    }

    /// Whether a client waits to be accepted.
    fn is_waited_for(&self) -> bool {
        let mut asked = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        poll(&mut asked, PollTimeout::ZERO).unwrap() == 1
    }
}

/// Answers the next request; its body.
fn answer(control: &UnixListener, status: u16, body: &Value) -> Value {
    let (mut client, _) = control.accept().unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte).unwrap();
        request.push(byte[0]);
    }
    let head = String::from_utf8(request).unwrap().to_lowercase();
    let length = head.split("content-length: ").nth(1);
    let length = length.map_or(0, |rest| rest.lines().next().unwrap().parse().unwrap());
    let mut asked = vec![0; length];
    client.read_exact(&mut asked).unwrap();
    let (body, line) = (body.to_string(), "Content-Length");
    let answer = format!(
        "HTTP/1.1 {status} OK\r\n{line}: {}\r\n\r\n{body}",
        body.len()
    );
    client.write_all(answer.as_bytes()).unwrap();
    serde_json::from_slice(&asked).unwrap_or_default()
}

#[test]
fn nobody_is_accepted_before_the_other_has_agreed() {
    let scene = Scene::new();
    let front = scene.at("front");
    scene.write(&scene.forward("unix", &front));
    let (mut before, mut new) = Before::meet(&scene, &front);
    let early = unix_client(&front);
    let answered = thread::spawn(move || ask(early, b"early"));
    let taken = before.hears();
    if taken.is_empty() {
        let code = new.exit_code();
        let said: Vec<String> = new.err.try_iter().collect();
        panic!("the successor has ended with {code:?}: {said:?}");
    }
    assert_eq!(taken, "{\"taken\":[0]}\n");
    for _ in 0..20 {
        assert!(before.is_waited_for(), "a client was accepted too early");
        thread::sleep(Duration::from_millis(5));
    }
    before.wire.write_all(b"{\"yours\": true}\n").unwrap();
    assert_eq!(answered.join().unwrap().unwrap(), b"early");
    assert_eq!(before.hears(), "{\"mine\":true,\"hears_of_ended\":true}\n");
    // Its end is as good as its word.
    drop(before);
    assert_eq!(ask(unix_client(&front), b"late").unwrap(), b"late");
    new.says("took over");
    // The file is its own.
    new.signal("TERM");
    assert_eq!(new.exit_code(), Some(0));
    assert!(!front.exists());
}

#[test]
fn one_that_is_not_agreed_with_leaves_everything_as_it_was() {
    let scene = Scene::new();
    let front = scene.at("front");
    let comes = scene.at("comes");
    for (line, part) in [
        ("", "unexpected end of file"),
        ("{\"yours\": false}\n", "it keeps them"),
        ("{\"yours\": ", "unexpected end of file"),
    ] {
        scene.write(&[scene.forward("unix", &front), scene.forward("new", &comes)].concat());
        let (mut before, mut new) = Before::meet(&scene, &front);
        before.hears();
        assert!(comes.exists());
        let client = unix_client(&front);
        before.wire.write_all(line.as_bytes()).unwrap();
        drop(before.wire);
        assert_eq!(new.exit_code(), Some(1));
        let said: String = new.err.iter().collect();
        assert!(said.contains(part) && said.contains("it goes on"), "{said}");
        assert!(front.exists() && !comes.exists());
        // Who came meanwhile waits where it did.
        assert!(before.listener.accept().is_ok());
        drop(client);
        fs::remove_file(&front).unwrap();
        fs::remove_dir_all(scene.control().parent().unwrap()).unwrap();
    }
}

#[test]
fn new_rules_are_bound_and_those_that_are_gone_are_closed() {
    let scene = Scene::new();
    let [stays, goes, comes] = ["stays", "goes", "comes"].map(|name| scene.at(name));
    let metrics = "metrics = \"127.0.0.1:0\"\n";
    let metrics_port = |running: &Running| {
        let place = running.says("metrics at http://127.0.0.1:");
        let port = place.rsplit_once(':').unwrap().1;
        port.strip_suffix("/metrics")
            .unwrap()
            .parse::<u16>()
            .unwrap()
    };
    scene.write(
        &[
            metrics,
            &scene.forward("a", &stays),
            &scene.forward("b", &goes),
        ]
        .concat(),
    );
    let mut old = Running::spawn(scene.command(&[]));
    old.says("controlled at");
    let served = metrics_port(&old);
    let waits = tcp(served);
    let forward = scene
        .forward("a", &stays)
        .replace("connect", "mode = \"660\"\nconnect");
    scene.write(&[metrics, &forward, &scene.forward("c", &comes)].concat());
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&stays), 0o600);
    let mut new = scene.take_over();
    new.says("took over");
    new.says("goes is not in");
    new.says("controlled at");
    assert_eq!(
        metrics_port(&new),
        served,
        "the metrics are where they were"
    );
    assert_eq!(old.exit_code(), Some(0));
    assert_eq!(scene.names(), ["a", "c"]);
    assert_eq!(mode(&stays), 0o660);
    for path in [&stays, &comes] {
        assert_eq!(ask(unix_client(path), b"served").unwrap(), b"served");
    }
    assert!(!goes.exists());
    drop(waits);
    let answer = ask(tcp(served), b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"));
    new.signal("TERM");
    assert_eq!(new.exit_code(), Some(0));
    assert!(!stays.exists() && !comes.exists());
}

#[test]
fn a_file_with_a_mistake_takes_nothing_over() {
    let scene = Scene::new();
    scene.write(&scene.forward("tcp", 0));
    let old = scene.run();
    let port = scene.port("tcp");
    scene.write("[forward.tcp]\nlisten = 0\n");
    assert_eq!(scene.take_over().exit_code(), Some(1));
    assert_eq!(ask(tcp(port), b"on").unwrap(), b"on");
    assert_eq!(scene.pid(), old.child.0.id());
}

#[test]
fn what_can_be_taken_over_and_what_not_is_said() {
    let scene = Scene::new();
    let rule = scene.forward("tcp", 0);
    let refused = |command: Command, parts: &[&str]| {
        let mut refused = Running::spawn(command);
        assert_eq!(refused.exit_code(), Some(1), "{parts:?}");
        let said: String = refused.err.iter().collect();
        for part in parts {
            assert!(said.contains(part), "{said:?} lacks {part:?}");
        }
    };
    scene.write(&rule);
    let take_over = || scene.command(&["--take-over"]);
    refused(
        take_over(),
        &["nothing to take over", "leave --take-over out"],
    );
    refused(
        in_runtime(scene.dir.path(), &["upgrade"]),
        &["no hvsock answers"],
    );
    scene.write(&format!("control = \"off\"\n{rule}"));
    refused(take_over(), &["control = \"off\"", "control socket"]);
    scene.write(&rule);
    // One that runs is named, and so is what to do.
    let old = scene.run();
    let pid = format!("process {}", old.child.0.id());
    let file = scene.file();
    let parts = [&pid, text(&file), "--take-over", "control = \"PATH\""];
    refused(scene.command(&[]), &parts);
    assert_eq!(scene.status()["file"], text(&scene.file()));
    // What nobody means, or speaks.
    for (body, status, part) in [
        ("", 400, "who takes over"),
        (
            "{\"protocol\": 2, \"pid\": 1, \"socket\": \"unix:///s\"}",
            409,
            "version 1",
        ),
        (
            "{\"protocol\": 1, \"pid\": 1, \"socket\": \"tcp://127.0.0.1:1\"}",
            400,
            "no path",
        ),
        (
            "{\"protocol\": 1, \"pid\": 1, \"socket\": \"unix:///nowhere\"}",
            400,
            "/nowhere",
        ),
    ] {
        let (got, answer) = scene.call("POST", "/v1/take-over", body);
        assert_eq!(got, status, "{answer}");
        assert!(answer.to_string().contains(part), "{answer}");
    }
    assert_eq!(scene.call("GET", "/v1/upgrade", "").0, 405);
    assert_eq!(scene.pid(), old.child.0.id());
    // One without a file.
    drop(old);
    let control = format!("--control={}", text(&scene.at("c")));
    let to = format!("tcp://127.0.0.1:{}", scene.echo);
    let other = Running::start(&["forward", "tcp://127.0.0.1:0", &to, &control]);
    other.says("controlled at");
    scene.write(&format!("control = {:?}\n{rule}", scene.at("c")));
    refused(take_over(), &["started without a file"]);
    let control = format!("--control={}", text(&scene.at("c")));
    let upgrade = in_runtime(scene.dir.path(), &["upgrade", &control]);
    refused(upgrade, &["started without a file"]);
    assert_eq!(ask(tcp(other.tcp_port()), b"on").unwrap(), b"on");
}

/// What stays with the old process is told of, and can be looked at and closed there.
#[test]
fn what_stays_with_the_old_process_is_seen_and_can_be_closed() {
    let scene = Scene::new();
    let forward = scene.forward("tcp", 0);
    fs::write(scene.file(), format!("grace = \"90s\"\n{forward}")).unwrap();
    let mut old = scene.run();
    let pid = old.child.0.id().to_string();
    let mut client = tcp(scene.port("tcp"));
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    let says = |arguments: &[&str]| {
        let output = output(in_runtime(scene.dir.path(), arguments));
        let said = String::from_utf8(output.stdout).unwrap();
        let why = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {why}");
        said
    };
    let told = says(&["upgrade"]);
    let _stray = Stray(scene.pid());
    let stays = format!("1 connection stays with process {pid}, for at most 90 s");
    assert!(told.contains(&stays), "{told}");
    let still = format!("process {pid}, which was taken over from, still has 1 connection");
    for command in ["status", "connections"] {
        let told = says(&[command]);
        assert!(told.contains(&still), "{told}");
    }
    let all: Vec<Value> = serde_json::from_str(&says(&["ps", "--json"])).unwrap();
    let its = all
        .iter()
        .find(|it| it["pid"].as_u64().is_some_and(|it| it.to_string() == pid));
    assert_eq!(its.unwrap()["status"]["live"], 1, "{all:?}");
    let left: Vec<Value> =
        serde_json::from_str(&says(&["connections", "--pid", &pid, "--json"])).unwrap();
    assert_eq!(left.len(), 1, "{left:?}");
    // It is the client's still.
    client.write_all(b"y").unwrap();
    client.read_exact(&mut [0]).unwrap();
    let own = scene.control().with_file_name(format!("{pid}.sock"));
    assert!(own.exists());
    let id = left[0]["id"].to_string();
    let told = says(&["close", &id, "--pid", &pid]);
    assert!(
        told.contains(&format!("closed {id}: tcp://127.0.0.1:")),
        "{told}"
    );
    assert!(is_reset(client.read(&mut [0])));
    assert_eq!(old.exit_code(), Some(0));
    assert!(!own.exists());
    for command in ["status", "connections"] {
        let told = says(&[command]);
        assert!(!told.contains("still has"), "{told}");
    }
}

/// Clients that are cut off at the end of the grace leave a trace, though their process is gone.
#[test]
fn what_has_ended_in_the_old_process_is_known_to_the_new_one() {
    let scene = Scene::new();
    let write = |grace: &str| {
        let forward = scene.forward("tcp", 0);
        fs::write(scene.file(), format!("grace = {grace:?}\n{forward}")).unwrap();
    };
    write("1s");
    let mut old = scene.run();
    let port = scene.port("tcp");
    let ended = |process: Option<u32>| {
        let all = scene.call("GET", "/v1/connections/ended", "").1;
        let all = all.as_array().unwrap().iter();
        let its = all.filter(|it| it["carried_by"] == json!(process));
        let why = |it: &Value| {
            (
                it["id"].as_u64().unwrap(),
                it["why"].as_str().unwrap().to_owned(),
            )
        };
        its.map(why).collect::<Vec<_>>()
    };
    assert_eq!(ask(tcp(port), b"before").unwrap(), b"before");
    eventually("it has ended", || ended(None).len() == 1);
    let mut client = tcp(port);
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    let new = scene.take_over();
    new.says("controlled at");
    let process = old.child.0.id();
    old.complains("1 connection has 1 s to finish here");
    let told = old.complains("cut off");
    assert!(
        told.contains("cut off 1 connection, for its grace was over: 1 of tcp"),
        "{told}"
    );
    old.complains("has stopped");
    assert!(is_reset(client.read(&mut [0])));
    assert_eq!(old.exit_code(), Some(0));
    let theirs = [(0, "client_closed".to_owned()), (1, "stopped".to_owned())];
    eventually("both are known", || ended(Some(process)) == theirs);
    // Its own have the same ids.
    assert_eq!(ask(tcp(port), b"after").unwrap(), b"after");
    eventually("its own has ended", || ended(None).len() == 1);
    for forward in [&[][..], &["tcp"]] {
        let words = [&["connections", "--ended"], forward].concat();
        let table = output(in_runtime(scene.dir.path(), &words));
        let table = String::from_utf8(table.stdout).unwrap();
        assert_eq!(table.lines().count(), 4, "{table}");
        let cut = format!("1 of {process} ");
        let line = table.lines().find(|it| it.starts_with(&cut));
        assert!(line.is_some_and(|it| it.contains("stopped")), "{table}");
    }
    // And the next one knows them, too.
    let next = scene.take_over();
    next.says("controlled at");
    eventually("all are handed on", || {
        ended(Some(process)) == theirs && ended(Some(new.child.0.id())).len() == 1
    });
}

/// By its name a range is removed as it was made, whichever process has it by then.
#[test]
fn how_a_forward_was_added_is_known_to_the_new_one() {
    let scene = Scene::new();
    scene.write(&scene.forward("tcp", 0));
    let mut old = scene.run();
    let add = |name: &str, listen: &str| {
        let place = |port: &str, end: &str| format!("vsock-mux://:{port}{}", text(&scene.at(end)));
        let rule =
            json!({"name": name, "listen": place(listen, "vm"), "connect": place(listen, "guest")});
        let (status, answer) = scene.call("POST", "/v1/forwards", &rule.to_string());
        assert_eq!(status, 201, "{answer}");
    };
    // One that is left of a range doesn't look like one; two that were added singly do.
    add("range", "80-81");
    assert_eq!(scene.call("DELETE", "/v1/forwards/range-80", "").0, 200);
    for (name, port) in [("alone-90", "90"), ("alone-91", "91")] {
        add(name, port);
    }
    // The second hears of it from one that has heard of it itself.
    for _ in 0..2 {
        let new = scene.take_over();
        new.says("took over");
        assert_eq!(old.exit_code(), Some(0));
        old = new;
    }
    let (status, why) = scene.call("DELETE", "/v1/forwards/alone", "");
    assert_eq!(status, 404, "{why}");
    let (status, removed) = scene.call("DELETE", "/v1/forwards/range", "");
    assert_eq!(status, 200, "{removed}");
    assert_eq!(removed[0]["name"], "range-81");
    assert_eq!(scene.names(), ["tcp", "alone-90", "alone-91"]);
    old.signal("TERM");
    assert_eq!(old.exit_code(), Some(0));
}

/// A user who isn't the owner is let in by no permission, and believed by nobody, root not either.
#[test]
fn a_process_of_another_user_is_neither_taken_over_nor_given_anything() {
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65_534;
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can start a process of another user");
        return;
    }
    let scene = Scene::new();
    fs::set_permissions(scene.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let theirs = scene.at("theirs");
    fs::create_dir(&theirs).unwrap();
    std::os::unix::fs::chown(&theirs, Some(NOBODY), None).unwrap();
    let program = scene.at("program");
    put_program(&program);
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let text_of = |listen: &str| {
        format!(
            "control = {:?}\n{}",
            theirs.join("c"),
            scene.forward(listen, 0)
        )
    };
    scene.write(&text_of("tcp"));
    fs::set_permissions(scene.file(), fs::Permissions::from_mode(0o644)).unwrap();
    let as_them = |more: &[&str]| {
        let mut command = Command::new(&program);
        command.args(["run", text(&scene.file())]).args(more);
        command.current_dir("/").uid(NOBODY);
        command
    };
    let old = Running::spawn(as_them(&[]));
    old.says("controlled at");
    let port = old.tcp_port();
    let mut ours = scene.take_over();
    assert_eq!(ours.exit_code(), Some(1));
    let said: String = ours.err.iter().collect();
    assert!(said.contains("user 65534"), "{said}");
    assert_eq!(ask(tcp(port), b"on").unwrap(), b"on");
    // And the other way round.
    let home = scene.at("ours");
    fs::create_dir(&home).unwrap();
    scene.write(&format!(
        "control = {:?}\n{}",
        home.join("c"),
        scene.forward("tcp", 0)
    ));
    let ours = scene.run();
    let port = ours.tcp_port();
    let mut theirs = Running::spawn(as_them(&["--take-over"]));
    assert_eq!(theirs.exit_code(), Some(1));
    assert_eq!(ask(tcp(port), b"on").unwrap(), b"on");
}

/// The device counts the connections of both, while those of the old one finish.
#[test]
fn together_they_have_no_more_of_a_vm_than_it_may_have() {
    const MOST: u64 = 10;
    let scene = Scene::new();
    let state = scene.at("vm");
    let vm = Vm::builder(&state).guest(7, Service::Echo).start().unwrap();
    scene.write(&format!(
        "[vm.a]\nat = {state:?}\nconnections = {MOST}\n\
         [forward.guest]\nlisten = 0\nvm = \"a\"\nport = 7\n"
    ));
    let mut old = scene.run();
    let port = scene.port("guest");
    let come = |count: usize| -> Vec<TcpStream> {
        let asks = |_| {
            let mut client = tcp(port);
            client.write_all(b"x").unwrap();
            client
        };
        (0..count).map(asks).collect()
    };
    let answered = |clients: &[TcpStream]| {
        let is_answered = |client: &&TcpStream| {
            client.set_nonblocking(true).unwrap();
            matches!(client.peek(&mut [0]), Ok(1))
        };
        clients.iter().filter(is_answered).count()
    };
    let early = come(6);
    eventually("they are served", || answered(&early) == 6);
    let new = scene.take_over();
    new.says("took over from process");
    new.says("controlled at");
    // Each tells of its own, and of the whole limit.
    eventually("the new one leaves out what the old one has", || {
        let of_new = &scene.status()["forwards"][0]["vm"];
        let predecessor = of_new["predecessor"].as_u64();
        of_new["connections"] == 0
            && of_new["limit"] == MOST
            && predecessor.is_some_and(|slots| (6..=7).contains(&slots))
    });
    let pid = old.child.0.id().to_string();
    let of_old = output(in_runtime(scene.dir.path(), &["status", "--pid", &pid]));
    let of_old = String::from_utf8(of_old.stdout).unwrap();
    assert!(of_old.contains(&format!("6 of {MOST} slots")), "{of_old}");
    let late = come(MOST as usize);
    eventually("what is left is theirs", || answered(&late) >= 3);
    let of_both = vm.counters();
    assert!(of_both.peak_slots <= MOST, "{of_both:?}");
    assert_eq!(answered(&early), 6);
    // As they get fewer there, there are more here.
    drop(early);
    eventually("all are served", || answered(&late) == MOST as usize);
    assert_eq!(old.exit_code(), Some(0));
    let counters = vm.counters();
    assert!(counters.peak_slots <= MOST, "{counters:?}");
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

/// Kills a process that the test has started by way of another.
struct Stray(u32);

impl Drop for Stray {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0 as i32), Signal::SIGKILL);
    }
}

#[test]
fn an_upgrade_starts_what_is_there_now_and_tells_the_service_manager() {
    let scene = Scene::new();
    let front = scene.at("front");
    scene.write(&[scene.forward("tcp", 0), scene.forward("unix", &front)].concat());
    let notify = scene.at("notify");
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let hears = || {
        let mut buffer = [0; 1024];
        let count = manager.recv(&mut buffer).expect("nothing was told");
        String::from_utf8(buffer[..count].to_vec()).unwrap()
    };
    let program = scene.at("program");
    put_program(&program);
    let start = |program: &Path| {
        let mut command = Command::new(program);
        command.args(["run", text(&scene.file())]);
        command
            .env_remove("XDG_RUNTIME_DIR")
            .env("NOTIFY_SOCKET", &notify);
        let runtime = if cfg!(target_os = "macos") {
            "TMPDIR"
        } else {
            "XDG_RUNTIME_DIR"
        };
        command.env(runtime, scene.dir.path());
        // This one's own: the next is to feed it, too.
        command.env("WATCHDOG_USEC", "3600000000");
        command
    };
    let mut old = Running::spawn(start(&program));
    old.says("controlled at");
    let told = ["READY=1\nSTATUS=carrying 2 forwards\n", "WATCHDOG=1\n"];
    assert_eq!([hears(), hears()], told);
    let port = scene.port("tcp");
    let path = front.clone();
    let crowd = Crowd::new()
        .come("TCP client", move || tcp_client(port))
        .come("Unix client", move || local_client(&path));
    crowd.is_served();
    // Installed anew.
    let fresh = scene.at("fresh");
    put_program(&fresh);
    fs::rename(&fresh, &program).unwrap();
    let output = output(in_runtime(scene.dir.path(), &["upgrade"]));
    let said = String::from_utf8(output.stdout).unwrap();
    let pid = scene.pid();
    let _stray = Stray(pid);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(
        said.contains(&format!("process {pid} ")) && said.contains("2 forwards"),
        "{said}"
    );
    assert_ne!(pid, old.child.0.id());
    #[cfg(target_os = "linux")]
    {
        let now = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        assert_eq!(now, program.canonicalize().unwrap());
    }
    crowd.is_served();
    assert_eq!(old.exit_code(), Some(0));
    let mut told: Vec<String> = (0..3).map(|_| hears()).collect();
    told.sort();
    let main = format!("MAINPID={pid}\n");
    assert_eq!(
        told,
        [
            &main,
            "READY=1\nSTATUS=carrying 2 forwards\n",
            "WATCHDOG=1\n"
        ]
    );
    // A program that doesn't run: the one that does goes on.
    fs::remove_file(&program).unwrap();
    fs::write(&program, "#!/bin/sh\nexit 3\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let refused = command::output(in_runtime(scene.dir.path(), &["upgrade"]));
    let why = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        why.contains("has ended before it took over") && why.contains('3'),
        "{why}"
    );
    assert_eq!(scene.pid(), pid);
    crowd.is_served();
    crowd.leaves();
    kill(Pid::from_raw(pid as i32), Signal::SIGTERM).unwrap();
    assert!(hears().starts_with("STOPPING=1"), "the end was not told");
    let gone = || !front.exists() && !scene.control().exists();
    eventually("it has removed its sockets", gone);
}

/// Whoever has asked is told why, and so is whoever reads the log of the one that goes on.
#[test]
fn an_upgrade_that_fails_is_told_of_with_its_reason_by_both() {
    let scene = Scene::new();
    scene.write(&scene.forward("tcp", 0));
    let program = scene.at("program");
    put_program(&program);
    let old = scene.command(&[]);
    let mut command = Command::new(&program);
    command.args(old.get_args());
    for (name, value) in old.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let old = Running::spawn(command);
    old.says("controlled at");
    let pid = scene.pid();
    let fails = |parts: &[&str]| {
        let refused = output(in_runtime(scene.dir.path(), &["upgrade"]));
        let why = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(1), "{why}");
        assert!(why.contains("this one goes on as before"), "{why}");
        let logged = old.complains("the upgrade has failed");
        for part in parts {
            assert!(why.contains(part), "{why:?} lacks {part:?}");
        }
        assert!(logged.contains(parts[0]), "{logged:?} lacks {:?}", parts[0]);
        assert_eq!(scene.pid(), pid);
        why
    };
    let real = program.canonicalize().unwrap();
    fs::remove_file(&program).unwrap();
    let why = fails(&["can't be started", text(&real), "install it there"]);
    assert!(!why.contains("the new one"), "it never was: {why}");
    for (script, parts) in [
        (
            "exit 3",
            ["has ended before it took over", "status: 3", "has said"],
        ),
        (
            "kill -9 $$",
            ["has ended before it took over", "signal: 9", "killed"],
        ),
    ] {
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        fails(&parts);
    }
}

/// The others are carried.
#[test]
fn an_upgrade_after_which_a_forward_is_missing_fails_and_says_which() {
    let scene = Scene::new();
    let (first, second) = (scene.at("a"), scene.at("b"));
    scene.write(&scene.forward("a", &first));
    let mut old = scene.run();
    let echo = format!("tcp://127.0.0.1:{}", scene.echo);
    let other = ["forward", text(&second), &echo];
    let other = Running::spawn(in_runtime(scene.dir.path(), &other));
    other.says(text(&second));
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let metrics = format!("metrics = {port}\n");
    let forwards = [scene.forward("a", &first), scene.forward("b", &second)].concat();
    scene.write(&(metrics + &forwards));
    let upgraded = output(in_runtime(scene.dir.path(), &["upgrade"]));
    let pid = scene.pid();
    let _stray = Stray(pid);
    let said = String::from_utf8(upgraded.stdout).unwrap();
    let why = String::from_utf8(upgraded.stderr).unwrap();
    assert_eq!(upgraded.status.code(), Some(1), "{said}{why}");
    assert!(
        said.contains(&format!("process {pid} ")),
        "{said:?}, {why:?}"
    );
    let has_it = format!("hvsock process {} listens there", other.child.0.id());
    let metrics = "metrics can't be had now";
    for part in ["forward b failed", text(&second), &has_it, metrics] {
        assert!(why.contains(part), "{why:?} lacks {part:?}");
    }
    let logged = old.complains(&format!("process {pid} can't have forward b now"));
    assert!(logged.contains(&has_it), "{logged}");
    assert_eq!(old.exit_code(), Some(0));
    assert_eq!(scene.names(), ["a", "b"]);
    assert_eq!(ask(unix_client(&first), b"on").unwrap(), b"on");
    drop(other);
    let is_had = || scene.status()["forwards"][1]["state"] == "listening";
    eventually("it is had", is_had);
}

#[test]
fn an_upgrade_says_what_is_wrong_with_the_file() {
    let scene = Scene::new();
    scene.write(&scene.forward("tcp", 0));
    let old = scene.run();
    let pid = scene.pid();
    scene.write("[forward.tcp]\nlisten = 0\nport = \"x\"\n");
    let refused = output(in_runtime(scene.dir.path(), &["upgrade"]));
    let why = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1), "{why}");
    for part in [
        "has not taken over",
        "this one goes on as before",
        "hvsock.toml:5: ",
    ] {
        assert!(why.contains(part), "{why:?} lacks {part:?}");
    }
    old.complains("the upgrade has failed");
    old.complains("hvsock.toml:5: ");
    // What the new one finds out later.
    scene.write(&format!("control = \"off\"\n{}", scene.forward("tcp", 0)));
    let refused = output(in_runtime(scene.dir.path(), &["upgrade"]));
    let why = String::from_utf8(refused.stderr).unwrap();
    assert!(why.contains("asked by its control socket"), "{why}");
    assert_eq!(scene.pid(), pid);
}

#[test]
fn what_came_from_standard_input_is_replaced_from_there_alone() {
    let scene = Scene::new();
    let begin = |more: &[&str]| {
        scene.write(&scene.forward("a", scene.at("a")));
        let mut command = in_runtime(scene.dir.path(), &[&["run", "-"], more].concat());
        command.stdin(fs::File::open(scene.file()).unwrap());
        Running::spawn_fed(command)
    };
    let mut old = begin(&[]);
    old.says("controlled at");
    let refused = output(in_runtime(scene.dir.path(), &["upgrade"]));
    let why = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1), "{why}");
    for part in [
        "came from standard input",
        "hvsock run - --take-over <CONFIG",
    ] {
        assert!(why.contains(part), "{why:?} lacks {part:?}");
    }
    assert_eq!(scene.pid(), old.child.0.id());
    let new = begin(&["--take-over"]);
    new.says("took over");
    assert_eq!(old.exit_code(), Some(0));
    assert_eq!(scene.names(), ["a"]);
}
