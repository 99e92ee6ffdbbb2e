//! The lines of socat.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::Duration;

use crate::place::{Place, Stream};
use crate::program::{Program, is_installed, run};
use crate::seen::{Late, Pair, both, each, echo, greet, hello, second_waits, serve};
use crate::table::Line;
use crate::vsock;

const WEB: Place = Place::Unix("/run/web.sock");
const FRONT: Place = Place::Tcp(8080);
const BACK: Place = Place::Tcp(9000);

pub(crate) fn tcp_to_unix(line: &Line) {
    both(line, FRONT, WEB, Late::Dropped);
}

pub(crate) fn tcp_to_tcp(line: &Line) {
    both(line, FRONT, BACK, Late::Answered);
}

pub(crate) fn unix_to_tcp(line: &Line) {
    let path = "/tmp/web.sock";
    both(line, Place::Unix(path), BACK, Late::Answered);
    let access = each(line, Place::Unix(path), |_| {
        let file = fs::metadata(path).unwrap();
        (file.mode() & 0o777, file.gid())
    });
    assert_eq!(access.ours.0, 0o660);
    assert_ne!(access.ours.1, 0);
    access.are(&access.ours);
}

pub(crate) fn abstract_to_tcp(line: &Line) {
    both(line, Place::Abstract("web"), BACK, Late::Answered);
}

pub(crate) fn range(line: &Line) {
    both(line, FRONT, BACK, Late::Answered);
    run("ip address add 10.9.8.7/32 dev lo");
    let pair = each(line, FRONT, |_| {
        let listener = BACK.listen();
        // It comes from there, too.
        let stranger = std::net::TcpStream::connect("10.9.8.7:8080").unwrap();
        let seen = Stream::Tcp(stranger).read_to_end_or_reset();
        (seen, listener.has_client())
    });
    pair.are(&(Vec::new(), false));
}

pub(crate) fn one_at_a_time(line: &Line) {
    both(line, FRONT, BACK, Late::Answered);
    each(line, FRONT, |_| second_waits(FRONT, BACK)).are(&true);
}

pub(crate) fn idle(line: &Line) {
    let pair = each(line, FRONT, |_| {
        let _served = serve(BACK, echo);
        let mut client = FRONT.connect();
        client.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
        client.read_to_end_or_reset()
    });
    pair.are(&Vec::new());
}

pub(crate) fn program(line: &Line) {
    let pair = each(line, FRONT, |_| {
        let mut client = FRONT.connect();
        client.write_all(b"aha\nabba\n").unwrap();
        client.half_close();
        client.rest()
    });
    pair.are(&"bha\nbbba\n".to_owned());
}

pub(crate) fn terminal(line: &Line) {
    let pair = each(line, FRONT, |_| {
        let mut client = FRONT.connect();
        let asked = b"test -t 0 && test -t 1 && test -t 2 && echo the $((6*7))nd terminal\nexit\n";
        client.write_all(asked).unwrap();
        client.rest().contains("the 42nd terminal")
    });
    pair.are(&true);
}

pub(crate) fn file(line: &Line) {
    let content = fs::read_to_string("/etc/passwd").unwrap();
    each(line, FRONT, |_| FRONT.connect().rest()).are(&content);
}

pub(crate) fn echoes(line: &Line) {
    let front = Place::Tcp(7007);
    let pair = each(line, front, |_| {
        let mut clients = [front.connect(), front.connect()];
        for client in clients.iter_mut().rev() {
            client.write_all(b"hello").unwrap();
            client.read_exact(&mut [0; 5]).unwrap();
        }
        clients.map(|client| {
            client.half_close();
            client.rest()
        })
    });
    pair.are(&[String::new(), String::new()]);
}

/// Compares what comes out of the two, to which the same goes in.
fn piped(line: &Line, back: Option<Place>, input: &str) -> Pair<(String, bool)> {
    let run = |words: &str| {
        let served = back.map(|back| serve(back, greet));
        let mut program = Program::start(words);
        program.feed(input.as_bytes());
        drop(served);
        program.end()
    };
    Pair {
        theirs: is_installed("socat").then(|| run(&line.theirs)),
        ours: run(&line.ours[0]),
    }
}

pub(crate) fn cat(line: &Line) {
    let world = ("world\n".to_owned(), true);
    piped(line, Some(WEB), "hello\n").are(&world);
    // Nobody is there.
    fs::remove_file("/run/web.sock").unwrap();
    piped(line, None, "hello\n").are(&(String::new(), false));
    let late = |mut client: Stream| {
        let mut all = String::new();
        client.read_to_string(&mut all).unwrap();
        thread::sleep(Duration::from_secs(1));
        client.write_all(all.as_bytes()).unwrap();
    };
    let served = serve(WEB, late);
    let mut ours = Program::start(&line.ours[0]);
    ours.feed(b"hello\n");
    assert_eq!(ours.end(), ("hello\n".to_owned(), true));
    drop(served);
}

pub(crate) fn waits(line: &Line) {
    let run = |words: &str| {
        let mut program = Program::start(words);
        program.feed(b"hello\n");
        // By then it has found nobody.
        thread::sleep(Duration::from_millis(700));
        let _served = serve(BACK, greet);
        program.end()
    };
    let pair = Pair {
        theirs: is_installed("socat").then(|| run(&line.theirs)),
        ours: run(&line.ours[0]),
    };
    pair.are(&("world\n".to_owned(), true));
}

pub(crate) fn takes_one(line: &Line) {
    let run = |words: &str| {
        let mut program = Program::listening(words, FRONT);
        program.feed(b"");
        let mut client = FRONT.connect();
        client.write_all(b"an upload").unwrap();
        client.half_close();
        assert_eq!(client.read_to_end_or_reset(), b"");
        program.end()
    };
    let pair = Pair {
        theirs: is_installed("socat").then(|| run(&line.theirs)),
        ours: run(&line.ours[0]),
    };
    pair.are(&("an upload".to_owned(), true));
}

pub(crate) fn sort(line: &Line) {
    let sorted = ("a\nb\nc\n".to_owned(), true);
    piped(line, None, "c\na\nb\n").are(&sorted);
}

pub(crate) fn firecracker(line: &Line) {
    let run = |words: &str| {
        let served = serve(Place::Unix("/run/vm.sock"), |mut client| {
            let mut asked = [0; 11];
            client.read_exact(&mut asked).unwrap();
            assert_eq!(&asked, b"CONNECT 80\n");
            client.write_all(b"OK 1073741824\n").unwrap();
            greet(client);
        });
        let mut program = Program::start(words);
        program.feed(b"hello\n");
        drop(served);
        program.end()
    };
    let world = |before: &str| (format!("{before}world\n"), true);
    if is_installed("socat") {
        assert_eq!(run(&line.theirs), world("OK 1073741824\n"));
    }
    assert_eq!(run(&line.ours[0]), world(""));
}

pub(crate) fn from_vsock(line: &Line) {
    let docker = Place::Unix("/run/docker.sock");
    let Some(port) = vsock::port() else { return };
    let line = line.with(":2375", &format!(":{port}"));
    match vsock::has_loopback() {
        true => both(&line, Place::Vsock(port), docker, Late::Dropped),
        false => vsock::is_bound(&line.ours[0], port),
    }
}

pub(crate) fn to_vsock(line: &Line) {
    // A forward that listens there, for a VM that there isn't.
    let ours = Program::listening(&line.ours[0], Place::Tcp(2222));
    drop(ours);
    let (Some(port), true) = (vsock::port(), vsock::has_loopback()) else {
        return;
    };
    let line = line.with("3:22", &format!("1:{port}"));
    let _there = vsock::server(port);
    let pair = each(&line, Place::Tcp(2222), |_| {
        hello(Place::Tcp(2222).connect())
    });
    pair.are(&"world\n".to_owned());
}

pub(crate) fn cat_vsock(line: &Line) {
    let (Some(port), true) = (vsock::port(), vsock::has_loopback()) else {
        return;
    };
    let line = line.with(":2:1024", &format!(":1:{port}"));
    let line = line.with("//host:1024", &format!("//1:{port}"));
    let _there = vsock::server(port);
    piped(&line, None, "hello\n").are(&("world\n".to_owned(), true));
}
