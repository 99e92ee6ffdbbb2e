//! The lines of haproxy and of systemd's socket proxy.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;

use crate::place::{Place, Stream};
use crate::program::{Program, is_installed};
use crate::seen::{Late, Pair, Seen, both, each, echo, hello, is_sound, look, second_waits, serve};
use crate::table::Line;

const WEB: Place = Place::Unix("/run/web.sock");
const FRONT: Place = Place::Tcp(8080);
const BACK: Place = Place::Tcp(9000);

/// The line, with the words of haproxy's file in a file.
fn haproxy(line: &Line) -> Line {
    let words = line.theirs.replace('\n', "\n    ");
    let config = format!(
        "defaults\n    mode tcp\n    retries 0\n    timeout connect 10s\n    timeout client 1h\n    timeout server 1h\nlisten web\n    {words}\n"
    );
    fs::write("/tmp/haproxy.cfg", config).unwrap();
    Line {
        theirs: "haproxy -db -q -f /tmp/haproxy.cfg".to_owned(),
        ours: line.ours.clone(),
    }
}

pub(crate) fn haproxy_alone(line: &Line) {
    both(&haproxy(line), FRONT, WEB, Late::Answered);
}

pub(crate) fn haproxy_sends(line: &Line) {
    let pair = each(&haproxy(line), FRONT, |_| {
        let served = serve(WEB, |mut client| {
            // Signature, version and command, family, length; two IPv4 addresses, two ports.
            let mut header = [0; 28];
            client.read_exact(&mut header).unwrap();
            client.read_exact(&mut [0; 6]).unwrap();
            client.write_all(b"world\n").unwrap();
            // The client's port is another each time.
            header[24..26].fill(0);
            header
        });
        let said = hello(FRONT.connect());
        (said, served.recv().unwrap())
    });
    assert_eq!(pair.ours.0, "world\n");
    assert_eq!(&pair.ours.1[..12], b"\r\n\r\n\0\r\nQUIT\n");
    assert_eq!(
        &pair.ours.1[12..],
        b"\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01\0\0\x1f\x90"
    );
    pair.are(&pair.ours);
}

pub(crate) fn haproxy_accepts(line: &Line) {
    let pair = each(&haproxy(line), FRONT, |_| {
        let served = serve(WEB, |mut client| {
            let mut all = String::new();
            client.read_to_string(&mut all).unwrap();
            client.write_all(b"world\n").unwrap();
            all
        });
        let mut client = FRONT.connect();
        let sent = b"PROXY TCP4 192.0.2.1 127.0.0.1 1000 8080\r\nhello\n";
        client.write_all(sent).unwrap();
        client.half_close();
        let said = (client.rest(), served.recv().unwrap());
        // One who doesn't say it.
        let listener = WEB.listen();
        let mut client = FRONT.connect();
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let refused = client.read_to_end_or_reset();
        (said, refused, listener.has_client())
    });
    let said = ("world\n".to_owned(), "hello\n".to_owned());
    pair.are(&(said, Vec::new(), false));
}

pub(crate) fn haproxy_one(line: &Line) {
    each(&haproxy(line), FRONT, |_| second_waits(FRONT, WEB)).are(&true);
}

/// Starts each with a socket at `FRONT`.
fn passed<T>(line: &Line, mut then: impl FnMut(&mut Program) -> T) -> Pair<T> {
    let mut run = |words: &str| {
        let socket = TcpListener::bind(("127.0.0.1", 8080)).unwrap();
        let mut program = Program::with_passed(words, socket.into());
        let seen = then(&mut program);
        program.terminate();
        FRONT.wait_until_nobody_listens();
        seen
    };
    let theirs = line.theirs.split(' ').next().unwrap();
    Pair {
        theirs: is_installed(theirs).then(|| run(&line.theirs)),
        ours: run(&line.ours[0]),
    }
}

fn systemd(line: &Line, back: Place) {
    let pair = passed(line, |_| look(FRONT, back, Late::Dropped));
    pair.are(&Seen::expected(Late::Dropped));
    let socket = TcpListener::bind(("127.0.0.1", 8080)).unwrap();
    let _ours = Program::with_passed(&line.ours[0], socket.into());
    is_sound(FRONT, back);
}

pub(crate) fn systemd_to_tcp(line: &Line) {
    systemd(line, BACK);
}

pub(crate) fn systemd_to_unix(line: &Line) {
    systemd(line, WEB);
}

pub(crate) fn systemd_exits(line: &Line) {
    let pair = passed(line, |program| {
        let served = serve(BACK, echo);
        let client: Stream = FRONT.connect();
        client.half_close();
        let seen = client.rest();
        served.recv().unwrap();
        (seen, program.exit_code())
    });
    pair.are(&(String::new(), Some(0)));
}

pub(crate) fn systemd_one(line: &Line) {
    // systemd 252 allows one more than it is told.
    let theirs_refuses = || {
        let _served = BACK.listen();
        let _there = [FRONT.connect(), FRONT.connect()];
        FRONT.connect().read_to_end_or_reset().is_empty()
    };
    let pair = passed(line, |program| match program.is_ours {
        true => second_waits(FRONT, BACK),
        false => theirs_refuses(),
    });
    pair.are(&true);
}
