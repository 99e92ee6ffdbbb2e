//! What the command says, to readers that read nothing, have gone or refuse: no client notices.
#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use command::*;
use common::*;
use hvsock::simulate::{Service, Vm};

/// A pipe whose reader has gone.
fn dead_pipe() -> PipeWriter {
    std::io::pipe().unwrap().1
}

/// What refuses each write.
fn broken() -> Vec<Stdio> {
    let mut all = vec![dead_pipe().into()];
    // Linux has it, and the BSDs but macOS.
    if let Ok(full) = OpenOptions::new().write(true).open("/dev/full") {
        all.push(full.into());
    }
    all
}

fn hvsock(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Two forwards, by their sockets: one to an echo server, one to nobody, each of whose clients is a
/// line of the log.
struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    fn new() -> Scene {
        let dir = private_dir();
        let echo = UnixListener::bind(dir.path().join("server")).unwrap();
        std::thread::spawn(move || {
            for mut client in echo.incoming().flatten() {
                std::thread::spawn(move || {
                    let mut all = Vec::new();
                    let _ = client.read_to_end(&mut all);
                    let _ = client.write_all(&all);
                });
            }
        });
        Scene { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self) -> Command {
        let of = |name: &str| text(&self.path(name)).to_owned();
        let control = format!("--control={}", of("control"));
        let pairs = [of("echo"), of("server"), of("void"), of("nobody")];
        let mut arguments = vec!["forward", &control];
        arguments.extend(pairs.iter().map(String::as_str));
        let mut command = hvsock(&arguments);
        // A line for each client, not one a second.
        command.env("HVSOCK_LOG", "debug");
        command
    }

    fn start(&self, mut command: Command) -> Mortal {
        let proxy = Mortal(command.spawn().unwrap());
        eventually("it listens", || {
            UnixStream::connect(self.path("void")).is_ok()
        });
        proxy
    }

    /// A client of the forward to nobody.
    fn be_refused(&self) {
        let mut client = unix_client(&self.path("void"));
        let ended = client.read(&mut [0]);
        assert!(!matches!(&ended, Err(e) if e.kind() == ErrorKind::WouldBlock));
    }

    /// Has more said than waits for a reader.
    fn overflow(&self) {
        eventually("lines are dropped", || {
            (0..100).for_each(|_| self.be_refused());
            self.dropped() > 0
        });
    }

    fn is_served(&self) {
        let answer = ask(unix_client(&self.path("echo")), b"hello").unwrap();
        assert_eq!(answer, b"hello");
    }

    fn status(&self) -> serde_json::Value {
        let output = run(&["status", "--json", "--control", text(&self.path("control"))]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn dropped(&self) -> u64 {
        self.status()["log_dropped"].as_u64().unwrap()
    }
}

/// Refuses clients, serves others, counts, and ends as it should.
fn carries_on(scene: &Scene, mut proxy: Mortal) {
    let held = unix_client(&scene.path("echo"));
    for _ in 0..20 {
        scene.be_refused();
        scene.is_served();
    }
    eventually("what was dropped is counted", || scene.dropped() >= 20);
    // A connection that was there before the first line is still there.
    assert_eq!(ask(held, b"held").unwrap(), b"held");
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
}

#[test]
fn a_log_that_cannot_be_written_is_dropped_and_counted() {
    for refuses in broken() {
        let scene = Scene::new();
        let mut command = scene.command();
        command.stdout(Stdio::null()).stderr(refuses);
        let proxy = scene.start(command);
        carries_on(&scene, proxy);
    }
}

#[test]
fn nobody_waits_for_a_reader_that_does_not_read() {
    let scene = Scene::new();
    let (_err, writer, _) = full_pipe();
    let (_out, out, _) = full_pipe();
    let mut command = scene.command();
    command.stdout(out).stderr(writer);
    let proxy = scene.start(command);
    scene.overflow();
    carries_on(&scene, proxy);
}

#[test]
fn a_reader_that_reads_again_is_told_how_much_it_has_missed() {
    let scene = Scene::new();
    let (mut reader, writer, filled) = full_pipe();
    let mut command = scene.command();
    command.stdout(Stdio::null()).stderr(writer);
    let mut proxy = scene.start(command);
    scene.overflow();
    let dropped = scene.dropped();
    let mut filling = vec![0; filled];
    reader.read_exact(&mut filling).unwrap();
    let lines = lines(reader);
    let told = next(&lines, "log line");
    let count = told.split(' ').find_map(|word| word.parse::<u64>().ok());
    assert!(told.starts_with("hvsock: "), "{told}");
    assert!(count.unwrap() >= dropped, "{told}, not {dropped}");
    // From here on nothing is missing.
    let after = scene.dropped();
    scene.be_refused();
    next(&lines, "refused a client");
    assert_eq!(scene.dropped(), after);
    proxy.signal("TERM");
    next(&lines, "stopping");
    assert_eq!(proxy.exit_code(), Some(0));
}

/// A process whose standard output and standard error are full pipes that nobody reads.
struct Unheard {
    process: Mortal,
    _pipes: [PipeReader; 2],
}

impl Unheard {
    fn spawn(mut command: Command) -> Unheard {
        let ((out, to_out, _), (err, to_err, _)) = (full_pipe(), full_pipe());
        command.stdout(to_out).stderr(to_err);
        Unheard {
            process: Mortal(command.spawn().unwrap()),
            _pipes: [out, err],
        }
    }

    fn ends_when_told(mut self, code: i32) {
        self.process.signal("TERM");
        assert_eq!(self.process.exit_code(), Some(code));
    }
}

#[test]
fn a_second_signal_is_heard_by_one_that_nobody_hears() {
    let scene = Scene::new();
    let mut proxy = Unheard::spawn(scene.command());
    eventually("it listens", || {
        UnixStream::connect(scene.path("void")).is_ok()
    });
    let mut held = unix_client(&scene.path("echo"));
    scene.is_served();
    proxy.process.signal("TERM");
    eventually("it is stopping", || {
        scene.status()["stopping"] == serde_json::Value::Bool(true)
    });
    assert!(proxy.process.0.try_wait().unwrap().is_none());
    let begun = Instant::now();
    proxy.process.signal("TERM");
    assert_eq!(proxy.process.exit_code(), Some(0));
    // It did not wait for the grace of 30 s to pass.
    assert!(begun.elapsed() < PATIENCE);
    let _ = held.read(&mut [0]);
}

#[test]
fn whatever_serves_begins_serves_and_ends_unheard() {
    let dir = private_dir();
    let path = |name: &str| text(&dir.path().join(name)).to_owned();
    let state = dir.path().join("vm");
    std::fs::create_dir(&state).unwrap();
    let _vm = Vm::builder(&state).guest(7, Service::Echo).start().unwrap();
    let echoes = |socket: &str| {
        let socket = PathBuf::from(path(socket));
        eventually("it listens", || UnixStream::connect(&socket).is_ok());
        assert_eq!(ask(unix_client(&socket), b"hello").unwrap(), b"hello");
    };

    let local = path("expose.sock:7");
    let expose = hvsock(&["expose", "--vm", text(&state), "-L", &local]);
    let expose = Unheard::spawn(expose);
    echoes("expose.sock");
    expose.ends_when_told(0);

    let file = path("hvsock.toml");
    let [listen, other] = ["run.sock", "void.sock"].map(path);
    let forwards = format!(
        "control = \"off\"\n[vm.a]\nat = {:?}\n[forward.b]\nlisten = {listen:?}\nvm = \"a\"\nport = 7\n",
        text(&state)
    );
    std::fs::write(&file, &forwards).unwrap();
    let run = Unheard::spawn(hvsock(&["run", &file]));
    echoes("run.sock");
    let more = format!("[forward.c]\nlisten = {other:?}\nconnect = \"/nowhere\"\n");
    std::fs::write(&file, forwards + &more).unwrap();
    run.process.signal("HUP");
    eventually("it is read again", || Path::new(&other).exists());
    std::fs::write(&file, "no TOML").unwrap();
    run.process.signal("HUP");
    echoes("run.sock");
    run.ends_when_told(0);

    let simulated = path("simulated");
    std::fs::create_dir(&simulated).unwrap();
    let simulate = Unheard::spawn(hvsock(&["simulate", &simulated, "--guest", "7=echo"]));
    eventually("it listens", || {
        Path::new(&simulated).join("connect").exists()
    });
    simulate.process.signal("USR1");
    simulate.process.signal("USR2");
    simulate.ends_when_told(0);

    let server = path("stress.sock");
    let stress = Unheard::spawn(hvsock(&["stress", "--server", "-v", &server]));
    echoes("stress.sock");
    stress.ends_when_told(0);

    let cat = path("cat.sock");
    let echo = Unheard::spawn(hvsock(&["cat", "-lk", "--echo", &cat]));
    echoes("cat.sock");
    echo.ends_when_told(0);

    let log = path("log.sock");
    let syslog = Unheard::spawn(hvsock(&["syslog", &log, &path("collector")]));
    eventually("it listens", || Path::new(&log).exists());
    let socket = UnixDatagram::unbound().unwrap();
    socket.send_to(b"<13>lost", &log).unwrap();
    syslog.ends_when_told(1);

    // Which port it has chosen is known by its words alone: nobody reads what follows.
    let (_err, to_err, _) = full_pipe();
    let mut demo = hvsock(&["demo"]);
    let mut demo = Mortal(demo.stdout(Stdio::piped()).stderr(to_err).spawn().unwrap());
    let mut out = BufReader::new(demo.0.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("tcp://") {
        line.clear();
        out.read_line(&mut line).unwrap();
    }
    let port = line.split([':', ' ']).find_map(|part| part.parse().ok());
    tcp(port.unwrap());
    demo.signal("TERM");
    assert_eq!(demo.exit_code(), Some(0));
}

#[cfg(target_os = "linux")]
#[test]
fn a_service_manager_that_reads_nothing_holds_up_nobody() {
    let scene = Scene::new();
    let socket = scene.path("notify");
    let _manager = UnixDatagram::bind(&socket).unwrap();
    let full = UnixDatagram::unbound().unwrap();
    full.set_nonblocking(true).unwrap();
    while full.send_to(b"X=1", &socket).is_ok() {}
    let mut command = scene.command();
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.env("NOTIFY_SOCKET", &socket);
    let mut proxy = scene.start(command);
    scene.is_served();
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
}

#[test]
fn what_was_asked_for_waits_for_its_reader_and_says_if_it_cannot_be_written() {
    let scene = Scene::new();
    let mut command = scene.command();
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut proxy = scene.start(command);
    let control = scene.path("control");
    let status = ["status", "--json", "--control", text(&control)];
    // But a reader who has gone has seen enough.
    for refuses in broken().into_iter().skip(1) {
        let mut refused = hvsock(&status);
        let refused = refused.stdout(refuses).output().unwrap();
        assert_eq!(refused.status.code(), Some(1));
        let said = String::from_utf8(refused.stderr).unwrap();
        assert!(said.contains("cannot write to standard output"), "{said}");
    }
    let (mut reader, writer, filled) = full_pipe();
    let mut waits = Mortal(hvsock(&status).stdout(writer).spawn().unwrap());
    reader.read_exact(&mut vec![0; filled]).unwrap();
    let mut all = String::new();
    reader.read_to_string(&mut all).unwrap();
    assert!(serde_json::from_str::<serde_json::Value>(&all).is_ok());
    assert_eq!(waits.exit_code(), Some(0));
    // All that is wrong, however slowly it is read.
    let file = scene.path("wrong.toml");
    let wrong: String = (0..5000).map(|n| format!("key{n} = 1\n")).collect();
    std::fs::write(&file, wrong).unwrap();
    let (reader, writer, _) = full_pipe();
    let check = hvsock(&["check", text(&file)])
        .stdout(Stdio::null())
        .stderr(writer)
        .spawn();
    let mut check = Mortal(check.unwrap());
    // Longer than a process that serves would wait.
    std::thread::sleep(std::time::Duration::from_secs(3));
    let lines = lines(reader);
    for n in 0..5000 {
        next(&lines, &format!("unknown key key{n}"));
    }
    assert_eq!(check.exit_code(), Some(1));
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
}
