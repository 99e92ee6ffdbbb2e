//! Connections that have ended, in part or on both sides: what can still be read is read, whatever
//! the system says to who sets an option there. And what fits into a Unix socket, and into its
//! address.

#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use common::*;
use hvsock::{Address, Listener, Stream};

/// A stream of ours, and its peer's.
fn pair(address: &Address) -> (Stream, Stream) {
    let listener = Listener::bind(address).unwrap();
    let ours = Stream::connect(listener.address()).unwrap();
    let (theirs, _) = listener.accept_timeout(PATIENCE).unwrap().unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    (ours, theirs)
}

fn each(test: impl Fn(Stream, Stream)) {
    let dir = private_dir();
    for address in [any_tcp(), unix(dir.path().join("s"))] {
        let (ours, theirs) = pair(&address);
        test(ours, theirs);
    }
}

#[test]
fn what_a_peer_that_ended_first_has_said_is_read() {
    each(|ours, theirs| {
        (&theirs).write_all(&[7; 5000]).unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        let mut first = [0; 1000];
        (&ours).read_exact(&mut first).unwrap();
        ours.finish(PATIENCE).unwrap();
        assert_eq!((&theirs).read_to_end(&mut Vec::new()).unwrap(), 0);
        // Nothing was left unread that a close could destroy.
        assert_eq!((&ours).read_to_end(&mut Vec::new()).unwrap(), 0);
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        ours.set_write_timeout(Some(PATIENCE)).unwrap();
    });
}

#[test]
fn both_directions_end_though_one_has_ended_already() {
    each(|ours, theirs| {
        theirs.shutdown(Shutdown::Write).unwrap();
        assert_eq!((&ours).read_to_end(&mut Vec::new()).unwrap(), 0);
        let _ = ours.shutdown(Shutdown::Both);
        assert_eq!((&theirs).read_to_end(&mut Vec::new()).unwrap(), 0);
    });
}

#[test]
fn the_last_frames_of_a_peer_that_has_gone_are_read() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let address = "vsock://2:1?framing=yes".parse().unwrap();
    let ours = Stream::from_socket(OwnedFd::from(ours), address);
    // Two bytes, and that it has closed (src/framing.rs).
    theirs.write_all(&[2, 0, 0, 0, b'o', b'k']).unwrap();
    theirs.write_all(&0xdead_dead_u32.to_le_bytes()).unwrap();
    drop(theirs);
    ours.finish(PATIENCE).unwrap();
}

/// Bytes that can be written before the peer reads any.
fn room(stream: &Stream) -> usize {
    stream.set_nonblocking(true).unwrap();
    let mut filled = 0;
    loop {
        match (&*stream).write(&[0; 32 * 1024]) {
            Ok(count) => filled += count,
            Err(e) => {
                assert_eq!(e.kind(), io::ErrorKind::WouldBlock);
                return filled;
            }
        }
    }
}

/// Where the system's own buffers are small (macOS'), ours are not.
#[test]
fn what_a_relay_writes_at_once_fits_into_a_unix_socket() {
    const LEAST: usize = 96 * 1024;
    let dir = private_dir();
    let (dialled, accepted) = pair(&unix(dir.path().join("s")));
    for stream in [&dialled, &accepted] {
        assert!(room(stream) >= LEAST);
    }
    let path = dir.path().join("passed");
    let passed = OwnedFd::from(UnixListener::bind(&path).unwrap());
    let passed = Listener::try_from(passed).unwrap();
    let _client = UnixStream::connect(&path).unwrap();
    let (accepted, _) = passed.accept_timeout(PATIENCE).unwrap().unwrap();
    assert!(room(&accepted) >= LEAST);
}

/// A path is bound and dialled whether it fits into the system's `sockaddr_un` (104 bytes with a
/// NUL on macOS, 108 on Linux) or not.
#[test]
fn a_path_of_any_length_is_bound_and_dialled() {
    let root = private_dir();
    for len in 101..=110 {
        let pad = len - root.path().as_os_str().len() - "//s".len();
        let deep = root.path().join("d".repeat(pad));
        std::fs::create_dir(&deep).unwrap();
        let path = deep.join("s");
        assert_eq!(path.as_os_str().len(), len);
        let (ours, theirs) = pair(&unix(path));
        (&ours).write_all(b"x").unwrap();
        (&theirs).read_exact(&mut [0]).unwrap();
    }
}
