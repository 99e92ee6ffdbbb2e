//! The sockets in a loop of mio's: an echo server on a port that a guest dials, and a client that
//! shakes hands.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use common::*;
use hvsock::mio::{Listener, Stream};
use hvsock::simulate::Vm;
use hvsock::{Address, SocketName};
use mio::{Events, Interest, Poll, Token};

const BOTH: Interest = Interest::READABLE.add(Interest::WRITABLE);

/// Sends back what can be sent back now; whether the guest has ended and has everything.
fn echo(stream: &mut Stream, waiting: &mut Vec<u8>, eof: &mut bool) -> io::Result<bool> {
    let mut buffer = [0; 4096];
    while !*eof {
        match stream.read(&mut buffer) {
            Ok(0) => *eof = true,
            Ok(n) => waiting.extend_from_slice(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) => return Err(e),
        }
    }
    while !waiting.is_empty() {
        match stream.write(waiting) {
            Ok(n) => drop(waiting.drain(..n)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(e) => return Err(e),
        }
    }
    if *eof {
        stream.shutdown(Shutdown::Write)?;
    }
    Ok(*eof)
}

#[test]
fn guests_are_echoed_to() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path()).start().unwrap();
    let mut listener = Listener::bind(&hyperkit(dir.path(), 5000)).unwrap();
    let mut poll = Poll::new().unwrap();
    let registry = poll.registry().try_clone().unwrap();
    registry
        .register(&mut listener, Token(0), Interest::READABLE)
        .unwrap();
    let guests: Vec<_> = (0..10)
        .map(|n| {
            let guest = vm.dial(5000).unwrap();
            guest.set_read_timeout(Some(PATIENCE)).unwrap();
            std::thread::spawn(move || {
                let bytes = pattern(100_000 + n);
                assert!(ask(guest, &bytes).unwrap() == bytes);
            })
        })
        .collect();
    let mut clients = HashMap::new();
    let mut ended = 0;
    let mut events = Events::with_capacity(64);
    while ended < guests.len() {
        poll.poll(&mut events, Some(PATIENCE)).unwrap();
        assert!(!events.is_empty(), "{ended} of them");
        for event in &events {
            if event.token() == Token(0) {
                while let Ok((mut stream, name)) = listener.accept() {
                    assert_eq!(name, SocketName::Unnamed);
                    let token = Token(1 + clients.len() + ended);
                    registry.register(&mut stream, token, BOTH).unwrap();
                    clients.insert(token, (stream, Vec::new(), false));
                }
            } else if let Some((stream, waiting, eof)) = clients.get_mut(&event.token())
                && echo(stream, waiting, eof).unwrap()
            {
                clients.remove(&event.token());
                ended += 1;
            }
        }
    }
    for guest in guests {
        guest.join().unwrap();
    }
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

/// Waits until it is connected, or isn't going to be.
fn connected(stream: &mut Stream) -> hvsock::Result<()> {
    let mut poll = Poll::new().unwrap();
    poll.registry().register(stream, Token(0), BOTH).unwrap();
    let mut events = Events::with_capacity(8);
    while !stream.is_connected()? {
        poll.poll(&mut events, Some(PATIENCE)).unwrap();
        assert!(!events.is_empty());
    }
    // (mio's poll(2) fallback has forgotten one that has hung up.)
    let _ = poll.registry().deregister(stream);
    Ok(())
}

#[test]
fn nothing_is_said_before_the_handshake() {
    let dir = private_dir();
    let path = dir.path().join("mux");
    let server = UnixListener::bind(&path).unwrap();
    let serving = std::thread::spawn(move || {
        for answer in [&b"OK 1073\nhello"[..], b""] {
            let (mut stream, _) = server.accept().unwrap();
            let mut line = [0; 11];
            stream.read_exact(&mut line).unwrap();
            assert_eq!(&line, b"CONNECT 52\n");
            std::thread::sleep(Duration::from_millis(20));
            stream.write_all(answer).unwrap();
        }
    });
    let address: Address = format!("vsock-mux://:52{}", path.display())
        .parse()
        .unwrap();
    let mut stream = Stream::connect(&address).unwrap();
    let early = stream.write(b"early").unwrap_err();
    assert_eq!(early.kind(), io::ErrorKind::WouldBlock);
    connected(&mut stream).unwrap();
    // (macOS gives none if the server has closed already.)
    let peer = stream.peer_addr();
    assert!(peer.is_err() || peer.unwrap() == SocketName::Unnamed);
    let mut hello = [0; 5];
    stream.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");
    let refused = connected(&mut Stream::connect(&address).unwrap()).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    serving.join().unwrap();
}

#[test]
fn what_can_not_be_had_is_told() {
    let name = Stream::connect(&"tcp://localhost:1".parse().unwrap()).unwrap_err();
    assert_eq!(name.kind(), io::ErrorKind::InvalidInput);
    let missing = Stream::connect(&unix("/tmp/no/such/socket")).unwrap_err();
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    let listener = Listener::bind(&any_tcp()).unwrap();
    let address = listener.address().clone();
    drop(listener);
    let refused = Stream::connect(&address).map(|mut stream| connected(&mut stream));
    let refused = refused.and_then(|connected| connected).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
}
