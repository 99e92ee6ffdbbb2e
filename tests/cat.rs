//! `hvsock cat`: standard input and output over any address.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::thread::{self, JoinHandle};

use command::*;
use common::*;
use hvsock::simulate::{Endpoint, Service, Vm};

/// A running `hvsock cat`.
struct Cat {
    child: Mortal,
    input: Option<ChildStdin>,
    out: JoinHandle<Vec<u8>>,
    err: JoinHandle<Vec<u8>>,
}

struct Ended {
    code: Option<i32>,
    out: Vec<u8>,
    err: String,
}

fn collect(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut all = Vec::new();
        pipe.read_to_end(&mut all).unwrap();
        all
    })
}

fn cat(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.arg("cat").args(arguments);
    command.stdin(Stdio::piped());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

impl Cat {
    fn start(arguments: &[&str]) -> Cat {
        let mut child = cat(arguments).spawn().unwrap();
        Cat {
            input: child.stdin.take(),
            out: collect(child.stdout.take().unwrap()),
            err: collect(child.stderr.take().unwrap()),
            child: Mortal(child),
        }
    }

    /// Gives it these bytes and then EOF on standard input.
    fn feed(&mut self, bytes: &[u8]) {
        self.input.take().unwrap().write_all(bytes).unwrap();
    }

    fn signal(&self, signal: &str) {
        self.child.signal(signal);
    }

    /// Waits for its end by itself; standard input is left as it is.
    fn end(mut self) -> Ended {
        Ended {
            code: self.child.exit_code(),
            out: self.out.join().unwrap(),
            err: String::from_utf8(self.err.join().unwrap()).unwrap(),
        }
    }
}

/// A server on a Unix socket in a private directory, and the directory's keeper.
fn server(
    serve: impl FnOnce(UnixStream) + Send + 'static,
) -> (String, tempfile::TempDir, JoinHandle<()>) {
    let dir = private_dir();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = thread::spawn(move || serve(listener.accept().unwrap().0));
    (text(&path).to_owned(), dir, thread)
}

fn wait_for(path: &Path) {
    eventually("it listens", || UnixStream::connect(path).is_ok());
}

fn vm(dir: &Path) -> Vm {
    Vm::builder(dir)
        .guest(7, Service::Echo)
        .guest(19, Service::Chargen)
        .guest(9, Service::Silent)
        .strict(true)
        .start()
        .unwrap()
}

#[test]
fn an_answer_that_waits_for_the_requests_end_is_read_to_its_own() {
    let request = pattern(3 << 20);
    let answer = pattern(5 << 20);
    let (expected, reply) = (request.clone(), answer.clone());
    let (path, _dir, server) = server(move |mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        assert!(all == expected);
        stream.write_all(&reply).unwrap();
    });
    let mut cat = Cat::start(&[&path]);
    cat.feed(&request);
    let ended = cat.end();
    server.join().unwrap();
    assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""));
    assert!(ended.out == answer);
}

#[test]
fn a_peer_that_ends_first_still_gets_everything() {
    let request = pattern(3 << 20);
    let expected = request.clone();
    let (path, _dir, server) = server(move |mut stream| {
        stream.write_all(b"answer").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        assert!(all == expected);
    });
    let mut cat = Cat::start(&[&path]);
    // The peer's end is here before the request begins.
    let mut input = cat.input.take().unwrap();
    input.write_all(&request[..1]).unwrap();
    input.write_all(&request[1..]).unwrap();
    drop(input);
    let ended = cat.end();
    server.join().unwrap();
    assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""));
    assert_eq!(ended.out, b"answer");
}

#[test]
fn a_peer_that_has_closed_is_not_kept_waiting_for() {
    let (path, _dir, server) = server(|mut stream| stream.write_all(b"bye").unwrap());
    let cat = Cat::start(&[&path]);
    server.join().unwrap();
    // Standard input is open all the time.
    let ended = cat.end();
    assert_eq!((ended.code, ended.out.as_slice()), (Some(0), &b"bye"[..]));
}

#[test]
fn ends_with_its_peer_if_told_to() {
    let (tell, ended) = std::sync::mpsc::channel();
    let (path, _dir, server) = server(move |mut stream| {
        stream.write_all(b"bye").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        // It is still read here: without the option there would be no end.
        tell.send(stream.read(&mut [0; 8]).unwrap()).unwrap();
    });
    let cat = Cat::start(&["--end-with-peer", &path]);
    let ended_with = cat.end();
    assert_eq!(
        (ended_with.code, &*ended_with.out, &*ended_with.err),
        (Some(0), &b"bye"[..], "")
    );
    assert_eq!(ended.recv().unwrap(), 0);
    server.join().unwrap();
}

#[test]
fn ends_with_the_reader_of_its_output() {
    let (path, _dir, server) = server(move |mut stream| {
        stream.write_all(b"one").unwrap();
        // It says no more, so that no write can tell. What ends here is a reset, for the answer
        // wasn't read to its end.
        let _ = stream.read(&mut [0; 8]);
    });
    let mut child = Mortal(cat(&[&path]).spawn().unwrap());
    let _input = child.0.stdin.take();
    let mut out = child.0.stdout.take().unwrap();
    out.read_exact(&mut [0; 3]).unwrap();
    drop(out);
    assert_eq!(child.exit_code(), Some(1));
    server.join().unwrap();
}

#[test]
fn what_the_peer_did_not_take_is_told() {
    let (path, _dir, server) = server(|mut stream| stream.read_exact(&mut [0; 10]).unwrap());
    let mut cat = Cat::start(&[&path]);
    let mut input = cat.input.take().unwrap();
    let feeding = thread::spawn(move || while input.write_all(&[0; 65536]).is_ok() {});
    let ended = cat.end();
    server.join().unwrap();
    feeding.join().unwrap();
    assert_eq!(ended.code, Some(1));
    assert!(ended.err.contains(&path), "{}", ended.err);
}

#[test]
fn tcp_needs_no_scheme() {
    for is_bare in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let address = match is_bare {
            false => address.to_string(),
            true => address.port().to_string(),
        };
        let server = thread::spawn(move || listener.accept().unwrap().0.write_all(b"hello"));
        let output = cat(&[&address]).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(output.stdout, b"hello");
        server.join().unwrap().unwrap();
    }
    // What is neither is no address, as ever.
    let output = cat(&["minikube"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("scheme is missing"), "{said}");
}

#[test]
fn a_broken_input_is_no_clean_end() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", listener.local_addr().unwrap());
    let mut command = cat(&[&address]);
    // Reading a directory fails.
    command.stdin(File::open("/").unwrap());
    let output = thread::spawn(move || command.output().unwrap());
    match listener.accept() {
        Ok((mut stream, _)) => {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            assert!(is_reset(stream.read(&mut [0])));
        }
        // One that was reset before it is accepted has no name on a Mac, which std can't read.
        Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::InvalidInput),
    }
    let output = output.join().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("standard input"), "{said}");
}

#[test]
fn what_a_signal_cuts_off_is_no_clean_end() {
    let mut child = cat(&["-l", "tcp://127.0.0.1:0"]).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut err = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut child = Mortal(child);
    let feeding = thread::spawn(move || while input.write_all(&[7; 65536]).is_ok() {});
    let mut line = String::new();
    std::io::BufRead::read_line(&mut err, &mut line).unwrap();
    let address = line.trim().rsplit("tcp://").next().unwrap();
    let mut client = std::net::TcpStream::connect(address).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    // Its own end is there long before.
    client.shutdown(Shutdown::Write).unwrap();
    client.read_exact(&mut [0; 1 << 20]).unwrap();
    child.signal("TERM");
    assert!(client.read_to_end(&mut Vec::new()).is_err());
    assert_eq!(child.exit_code(), Some(1));
    feeding.join().unwrap();
}

#[test]
fn a_client_is_served_once_and_nothing_is_left() {
    let dir = private_dir();
    let path = dir.path().join("s");
    let mut cat = Cat::start(&["-l", text(&path)]);
    cat.feed(b"for the client");
    eventually("it listens", || path.exists());
    let mut answer = Vec::new();
    eventually("it takes us", || {
        let Ok(mut client) = UnixStream::connect(&path) else {
            return false;
        };
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(b"from the client").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        client.read_to_end(&mut answer).unwrap();
        true
    });
    assert_eq!(answer, b"for the client");
    let ended = cat.end();
    assert_eq!(
        (ended.code, ended.out.as_slice()),
        (Some(0), &b"from the client"[..])
    );
    assert!(!path.exists());
}

#[test]
fn one_client_after_the_other_until_a_signal() {
    let dir = private_dir();
    let path = dir.path().join("s");
    let cat = Cat::start(&["-lk", text(&path)]);
    eventually("it listens", || path.exists());
    for name in ["first ", "second ", "third "] {
        let mut client = None;
        eventually("it takes us", || {
            client = UnixStream::connect(&path).ok();
            client.is_some()
        });
        let mut client = client.unwrap();
        client.write_all(name.as_bytes()).unwrap();
        // Standard input stays open: a client that closes is done with all the same.
    }
    // More than lies in between: when it is written, this one has been taken, and those before it
    // are through.
    let mut last = UnixStream::connect(&path).unwrap();
    last.set_write_timeout(Some(PATIENCE)).unwrap();
    last.write_all(&[b'.'; 2 << 20]).unwrap();
    cat.signal("TERM");
    let ended = cat.end();
    assert_eq!(ended.code, Some(1));
    assert_eq!(ended.err, "");
    assert!(ended.out.starts_with(b"first second third ..."));
    assert!(!path.exists());
}

#[test]
fn what_is_typed_for_the_next_client_is_not_lost_on_the_last() {
    let dir = private_dir();
    let path = dir.path().join("s");
    let mut cat = Cat::start(&["-lk", text(&path)]);
    let mut input = cat.input.take().unwrap();
    eventually("it listens", || path.exists());
    let mut last = None;
    for n in 0..8 {
        drop(last.take());
        let mut client = None;
        eventually("it takes us", || {
            client = UnixStream::connect(&path).ok();
            client.is_some()
        });
        let mut client = client.unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        // More than lies in between: when it is written, the session of the last one is over.
        client.write_all(&[0; 1 << 20]).unwrap();
        input.write_all(&[n; 10]).unwrap();
        let mut typed = [0xff; 10];
        client.read_exact(&mut typed).unwrap();
        assert_eq!(typed, [n; 10]);
        last = Some(client);
    }
    // The last one is still there: the signal cuts it off.
    cat.signal("TERM");
    assert_eq!(cat.end().code, Some(1));
}

#[test]
fn echoes_to_many_at_a_time() {
    let dir = private_dir();
    let path = dir.path().join("s");
    let cat = Cat::start(&["-lk", "--echo", text(&path)]);
    wait_for(&path);
    let clients: Vec<_> = (0..8)
        .map(|n| {
            let (bytes, path) = (pattern((3 << 20) + n), path.clone());
            // It reads only when all is written: more than fits in between.
            thread::spawn(move || assert!(ask(unix_client(&path), &bytes).unwrap() == bytes))
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    cat.signal("TERM");
    let ended = cat.end();
    assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""));
    assert!(!path.exists());
}

#[test]
fn a_socket_that_was_removed_is_made_again() {
    for words in [&["-lk"][..], &["-lk", "--echo"]] {
        let dir = private_dir();
        let path = dir.path().join("s");
        let cat = Cat::start(&[words, &[text(&path)]].concat());
        wait_for(&path);
        std::fs::remove_file(&path).unwrap();
        wait_for(&path);
        cat.signal("TERM");
        let ended = cat.end();
        assert!(
            ended.err.contains("again: its file had been removed"),
            "{}",
            ended.err
        );
        assert!(!path.exists());
    }
}

#[test]
fn told_to_end_between_two_clients_it_has_done_its_work() {
    for (words, code) in [(&["-lk"][..], 0), (&["-lk", "--echo"], 0), (&["-l"], 1)] {
        let dir = private_dir();
        let path = dir.path().join("s");
        let cat = Cat::start(&[words, &[text(&path)]].concat());
        eventually("it listens", || path.exists());
        cat.signal("TERM");
        let ended = cat.end();
        assert_eq!(ended.code, Some(code), "{words:?}: {}", ended.err);
        assert!(!path.exists());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn idle_clients_cost_nothing() {
    let dir = private_dir();
    let path = dir.path().join("s");
    let cat = Cat::start(&["-lk", "--echo", text(&path)]);
    wait_for(&path);
    let mut clients: Vec<_> = (0..50).map(|_| unix_client(&path)).collect();
    for client in &mut clients {
        client.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
    }
    // How often its threads have slept, but for the one that takes clients and the one that takes
    // signals.
    let naps = || -> u64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", cat.child.0.id())).unwrap();
        let naps = |task: std::io::Result<std::fs::DirEntry>| -> u64 {
            // One that has ended since the directory was read naps no more.
            let status = std::fs::read_to_string(task.unwrap().path().join("status"));
            let Ok(status) = status else { return 0 };
            let line = status
                .lines()
                .find(|l| l.starts_with("voluntary_ctxt"))
                .unwrap();
            line.split_whitespace().last().unwrap().parse().unwrap()
        };
        tasks.map(naps).sum()
    };
    let before = naps();
    thread::sleep(std::time::Duration::from_secs(1));
    // One a client would be 50.
    let slept = naps() - before;
    assert!(slept < 40, "{slept}");
    // They still echo.
    for client in &mut clients {
        client.write_all(b"y").unwrap();
        client.read_exact(&mut [0]).unwrap();
    }
    cat.signal("TERM");
    drop(clients);
    assert_eq!(cat.end().code, Some(0));
}

#[cfg(target_os = "linux")]
#[test]
fn a_signal_need_not_wait_for_a_connect() {
    use socket2::{Domain, SockAddr, Socket, Type};
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let any: std::net::SocketAddr = ([127, 0, 0, 1], 0).into();
    listener.bind(&SockAddr::from(any)).unwrap();
    listener.listen(1).unwrap();
    let address = listener.local_addr().unwrap().as_socket().unwrap();
    // More than its backlog holds: further ones get no answer.
    let mut clients = Vec::new();
    eventually("the backlog is full", || {
        let client = std::net::TcpStream::connect_timeout(&address, PATIENCE / 40);
        client.map(|client| clients.push(client)).is_err()
    });
    let cat = Cat::start(&[&format!("tcp://{address}")]);
    // A second thread is there when signals are taken.
    let threads = format!("/proc/{}/task", cat.child.0.id());
    eventually("it takes signals", || {
        std::fs::read_dir(&threads).is_ok_and(|all| all.count() > 1)
    });
    cat.signal("TERM");
    assert_eq!(cat.end().code, Some(1));
}

#[test]
fn waits_for_a_server_that_comes_later() {
    let dir = private_dir();
    let path = dir.path().join("s");
    let mut cat = Cat::start(&["--wait", "20", text(&path)]);
    cat.feed(b"hello");
    // It has failed once by now, or will find it at once: both are right.
    let listener = UnixListener::bind(&path).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"hello");
    drop(stream);
    assert_eq!(cat.end().code, Some(0));
}

#[test]
fn waits_for_a_guest_that_refuses_at_first() {
    let dir = private_dir();
    let vm_dir = dir.path().join("vm");
    let address = format!("hyperkit://:7{}", text(&vm_dir));
    let mut cat = Cat::start(&["--wait", "20", &address]);
    cat.feed(b"hello");
    // The service begins in the guest when it has been asked for once.
    let path = dir.path().join("service");
    let service = Service::Forward(Endpoint::Unix(path.clone()));
    let vm = Vm::builder(&vm_dir).guest(7, service).start().unwrap();
    eventually("it was refused", || vm.counters().refused > 0);
    let listener = UnixListener::bind(&path).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    stream.write_all(&all).unwrap();
    drop(stream);
    let ended = cat.end();
    assert_eq!(ended.err, "");
    assert_eq!((ended.code, ended.out.as_slice()), (Some(0), &b"hello"[..]));
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn waits_for_a_vm_that_is_not_there_yet() {
    let dir = private_dir();
    let state = dir.path().join("state");
    let mut cat = Cat::start(&["--wait", "19.5", "--vm", text(&state), "7"]);
    cat.feed(b"early");
    // It looks again now and then.
    thread::sleep(std::time::Duration::from_millis(300));
    std::fs::create_dir(&state).unwrap();
    let vm = vm(&state);
    let ended = cat.end();
    assert_eq!(
        (ended.code, ended.out.as_slice()),
        (Some(0), &b"early"[..]),
        "{}",
        ended.err
    );
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn waits_for_a_guest_that_sleeps_and_loses_nothing_when_it_refuses() {
    let dir = private_dir();
    let vm = vm(dir.path());
    vm.pause();
    let state = text(dir.path());
    // It refuses port 8 when it wakes, and takes port 7.
    let mut refused = Cat::start(&["--wait", "3", "--vm", state, "8"]);
    refused.feed(b"request");
    let mut taken = Cat::start(&["--wait", "20", "--vm", state, "7"]);
    taken.feed(b"request");
    eventually("both have dialled", || vm.counters().unanswered >= 4);
    vm.resume();
    let ended = taken.end();
    assert_eq!(
        (ended.code, ended.out.as_slice()),
        (Some(0), &b"request"[..])
    );
    let ended = refused.end();
    assert_eq!(ended.code, Some(1));
    assert!(ended.err.contains("vsock port 8"), "{}", ended.err);

    vm.pause();
    let ended = Cat::start(&["--wait", "1", "--vm", state, "7"]).end();
    assert_eq!(ended.code, Some(1));
    assert_eq!(ended.err.matches("asleep").count(), 1, "{}", ended.err);
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn a_refusal_is_told_as_one() {
    let dir = private_dir();
    let vm = vm(dir.path());
    for input in [&b""[..], b"a request"] {
        let mut cat = Cat::start(&["--vm", text(dir.path()), "0x50"]);
        if !input.is_empty() {
            cat.feed(input);
        }
        let ended = cat.end();
        assert_eq!(ended.code, Some(1));
        assert!(ended.err.contains("vsock port 80 (0x50)"), "{}", ended.err);
    }
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

type Device = fn(&mut UnixStream);

/// Has a listener in the place of a device answer late to what is sent. Without an answer it is a
/// refusal.
fn meet_late(input: &[u8], device: Device, answer: Option<&[u8]>) {
    let dir = private_dir();
    let listener = UnixListener::bind(dir.path().join("connect")).unwrap();
    let mut cat = Cat::start(&["--vm", text(dir.path()), "80"]);
    let (mut dial, _) = listener.accept().unwrap();
    let mut line = [0; "00000003.00000050\n".len()];
    dial.read_exact(&mut line).unwrap();
    cat.feed(input);
    // Longer than a device takes that has nothing else to do.
    thread::sleep(std::time::Duration::from_millis(60));
    device(&mut dial);
    drop(dial);
    let ended = cat.end();
    let err = &ended.err;
    match answer {
        Some(answer) => assert_eq!((ended.code, &*ended.out), (Some(0), answer), "{err}"),
        None => {
            assert_eq!(ended.code, Some(1), "{err}");
            assert!(err.contains("vsock port 80 (0x50)"), "{err}");
        }
    }
}

#[test]
fn a_late_refusal_is_told_as_one_and_a_late_answer_is_none() {
    meet_late(b"", |_| (), None);
    let says = |dial: &mut UnixStream| dial.write_all(b"late").unwrap();
    meet_late(b"", says, Some(b"late"));
    // An empty answer to all that was sent.
    let reads = |dial: &mut UnixStream| {
        dial.read_to_end(&mut Vec::new()).unwrap();
    };
    meet_late(b"a request", reads, Some(b""));
}

/// (Linux resets a Unix socket whose peer closes with bytes unread; a Mac tells nothing.)
#[test]
fn a_refusal_that_leaves_a_request_unread_is_told_however_late() {
    meet_late(b"a request", |_| (), None);
}

#[test]
fn no_end_of_ours_hurts_the_vm() {
    let dir = private_dir();
    let vm = vm(dir.path());
    let state = text(dir.path());

    // Standard output's reader goes.
    let mut child = cat(&["--vm", state, "19"]).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0; 1000]).unwrap();
    drop(out);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stderr.is_empty(), "{output:?}");

    // A signal in the middle of a download, standard input open.
    let download = Cat::start(&["--vm", state, "19"]);
    eventually("it runs", || vm.counters().live_slots > 0);
    download.signal("TERM");
    assert_eq!(download.end().code, Some(1));

    // The same while nobody reads standard output.
    let mut stuck = Mortal(cat(&["--vm", state, "19"]).spawn().unwrap());
    eventually("it is stuck", || {
        let before = vm.counters().bytes_to_host;
        thread::sleep(std::time::Duration::from_millis(100));
        before > 0 && vm.counters().bytes_to_host == before
    });
    stuck.signal("TERM");
    assert_eq!(stuck.exit_code(), Some(1));

    // A signal while the guest takes nothing, and never ends: given up after a while.
    let silent = Cat::start(&["--vm", state, "--drain-timeout", "1", "9"]);
    eventually("it runs", || vm.counters().live_slots > 0);
    silent.signal("INT");
    assert_eq!(silent.end().code, Some(1));

    let mut echo = Cat::start(&["--vm", state, "7"]);
    echo.feed(&pattern(1 << 20));
    let ended = echo.end();
    assert_eq!(ended.code, Some(0));
    assert!(ended.out == pattern(1 << 20));
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn a_guest_that_dials_is_served() {
    let dir = private_dir();
    let vm = vm(dir.path());
    let address = format!("hyperkit://:0x1388{}", text(dir.path()));
    let mut cat = Cat::start(&["-l", &address]);
    cat.feed(b"for the guest");
    assert!(vm.wait_for_listener(5000, PATIENCE));
    let mut guest = vm.dial(5000).unwrap();
    guest.write_all(b"from the guest").unwrap();
    guest.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    guest.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"for the guest");
    let ended = cat.end();
    assert_eq!(
        (ended.code, ended.out.as_slice()),
        (Some(0), &b"from the guest"[..])
    );
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn a_guest_that_never_ends_is_left_unharmed() {
    let dir = private_dir();
    let vm = vm(dir.path());
    let address = format!("hyperkit://:5000{}", text(dir.path()));
    for (words, code) in [(&["-lk", "--echo"][..], 0), (&["-l"], 1)] {
        let words = [words, &["--drain-timeout", "1", &address]].concat();
        let cat = Cat::start(&words);
        assert!(vm.wait_for_listener(5000, PATIENCE));
        // A guest that sends all the time, reads nothing and heeds no end.
        let guest = vm.dial(5000).unwrap();
        guest.set_write_timeout(Some(PATIENCE)).unwrap();
        let before = vm.counters().bytes_to_host;
        let mut writer = guest.try_clone().unwrap();
        let sending = thread::spawn(move || while writer.write_all(&[1; 4096]).is_ok() {});
        let moved = || vm.counters().bytes_to_host - before;
        eventually("bytes move", || moved() > 100_000);
        cat.signal("TERM");
        let ended = cat.end();
        assert_eq!((ended.code, ended.err.as_str()), (Some(code), ""));
        drop(guest);
        sending.join().unwrap();
    }
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn a_vmm_that_takes_a_half_close_for_the_end_gets_none_before_its_answer() {
    let (path, _dir, server) = server(|mut stream| {
        let mut line = [0; 10];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"CONNECT 5\n");
        stream.write_all(b"OK 1073\n").unwrap();
        let mut request = [0; 7];
        stream.read_exact(&mut request).unwrap();
        // Time for what must not come.
        let moment = Some(std::time::Duration::from_millis(300));
        stream.set_read_timeout(moment).unwrap();
        assert!(stream.read(&mut [0]).is_err(), "a half-close");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"answer").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap(), 0);
    });
    let mut cat = Cat::start(&[&format!("vsock-mux://:5{path}")]);
    cat.feed(b"request");
    let ended = cat.end();
    server.join().unwrap();
    assert_eq!(
        (ended.code, ended.out.as_slice()),
        (Some(0), &b"answer"[..])
    );
}

#[test]
fn a_half_close_that_is_waited_for_is_not_kept_back_for_ever() {
    let (path, _dir, server) = server(|mut stream| {
        stream.read_exact(&mut [0; 10]).unwrap();
        stream.write_all(b"OK 1073\n").unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"request");
    });
    let mut cat = Cat::start(&["--drain-timeout", "1", &format!("vsock-mux://:5{path}")]);
    cat.feed(b"request");
    let ended = cat.end();
    server.join().unwrap();
    assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""));
}

#[test]
fn bad_words_are_told() {
    fails(&["cat", "nowhere"], 2, &["\"nowhere\"", "tcp://127.0.0.1"]);
    fails(&["cat", "--vm", "/tmp", "port"], 2, &["\"port\" with --vm"]);
    fails(&["cat", "-k", "/tmp/s"], 2, &["--listen"]);
    fails(&["cat", "--echo", "/tmp/s"], 2, &["--listen"]);
    fails(&["cat", "--mode", "600", "/tmp/s"], 2, &["--listen"]);
    fails(&["cat", "-l", "--wait", "3", "/tmp/s"], 2, &["--wait"]);
    fails(&["cat", "--wait", "soon", "/tmp/s"], 2, &["seconds"]);
    fails(&["cat", "some.sock"], 2, &["./some.sock"]);
    fails(&["cat", "/etc/passwd"], 1, &["/etc/passwd", "no socket"]);
    fails(&["cat", "/etc"], 1, &["/etc", "no socket"]);
    fails(&["cat", "-l", "--register", "/tmp/s"], 2, &["Windows"]);
    fails(
        &["cat", "/tmp/no/such/socket"],
        1,
        &["No such file", "server running?"],
    );
    fails(&["cat", "--vm", "no-such-vm", "7"], 1, &["no-such-vm"]);
    fails(
        &["cat", "-l", "/etc/passwd"],
        1,
        &["/etc/passwd", "no socket"],
    );
}
