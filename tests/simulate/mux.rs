//! The stand-in behind a VMM's socket, as Firecracker's.

use crate::support::{ECHO, LONG, assert_closed, assert_quiet, read_all};
use hvsock::simulate::{Builder, Service, Vm};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn builder(directory: &TempDir) -> (Builder, PathBuf) {
    let path = directory.path().join("vm.sock");
    let builder = Vm::behind_socket(&path).guest(ECHO, Service::Echo);
    (builder, path)
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

/// Reads a line, byte by byte: what follows is the guest's.
fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        line.extend(byte);
    }
    String::from_utf8(line).unwrap()
}

#[test]
fn a_line_dials_the_guest_and_is_confirmed() {
    let directory = tempfile::tempdir().unwrap();
    let (builder, path) = builder(&directory);
    let vm = builder.start().unwrap();
    // It comes in pieces, and another client is served meanwhile.
    let mut slow = connect(&path);
    slow.write_all(b"CONN").unwrap();
    let mut client = connect(&path);
    client.write_all(b"CONNECT 7\nhello").unwrap();
    assert!(line(&mut client).starts_with("OK "));
    let mut echo = [0; 5];
    client.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"hello");
    assert_quiet(&mut slow);
    slow.write_all(b"ECT 7\n").unwrap();
    assert!(line(&mut slow).starts_with("OK "));
    // The guest refuses; and what is no such line.
    for text in [
        "CONNECT 8\n",
        "GET / HTTP/1.1\r\n\r\n",
        "CONNECT 7 and no end of the line to be seen",
    ] {
        let mut refused = connect(&path);
        refused.write_all(text.as_bytes()).unwrap();
        assert_closed(&mut refused);
    }
    assert!(vm.fate().is_none());
}

#[test]
fn a_half_close_ends_both_directions_unless_it_is_passed_on() {
    for half_close in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let (builder, path) = builder(&directory);
        // It answers when it has heard the end.
        let answers = Service::custom(|mut stream| {
            let mut request = Vec::new();
            let _ = stream.read_to_end(&mut request);
            let _ = stream.write_all(&request);
        });
        let _vm = builder
            .guest(1, answers)
            .half_close(half_close)
            .start()
            .unwrap();
        let mut client = connect(&path);
        client.write_all(b"CONNECT 1\n").unwrap();
        line(&mut client);
        client.write_all(b"request").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let answer: &[u8] = if half_close { b"request" } else { b"" };
        assert_eq!(read_all(&mut client), answer, "{half_close}");
    }
}

#[test]
fn the_guest_dials_the_socket_of_the_port() {
    let directory = tempfile::tempdir().unwrap();
    let (builder, path) = builder(&directory);
    let vm = builder.start().unwrap();
    // Nobody is there, as often as it likes.
    for _ in 0..10 {
        assert!(vm.dial(5000).is_err());
    }
    let listener = UnixListener::bind(directory.path().join("vm.sock_5000")).unwrap();
    assert!(vm.wait_for_listener(5000, LONG));
    let mut program = vm.dial(5000).unwrap();
    let (mut host, _) = listener.accept().unwrap();
    host.set_read_timeout(Some(LONG)).unwrap();
    program.write_all(b"up").unwrap();
    let mut bytes = [0; 2];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"up");
    host.write_all(b"on").unwrap();
    program.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"on");
    // The guest's half-close is kept from the host, and its close is not.
    program.shutdown(Shutdown::Write).unwrap();
    assert_quiet(&mut host);
    drop(program);
    assert_closed(&mut host);
    assert!(vm.fate().is_none());
    // One that runs has its socket.
    assert!(Vm::behind_socket(&path).start().is_err());
}
