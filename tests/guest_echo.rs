//! A host's port that a guest dials: an echo server of mio's, written against the docs alone.
#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used)]
use hvsock::{address::HyperkitAddress, mio as hv, simulate::Vm};
use mio::{Events, Interest, Poll, Token};
use std::io::{ErrorKind::WouldBlock, Read, Result, Write};
use std::{net::Shutdown, thread, time::Duration};
const PATIENCE: Option<Duration> = Some(Duration::from_secs(20));

/// Done when the guest's EOF has been passed back behind its last byte.
fn echo(stream: &mut hv::Stream, held: &mut Vec<u8>) -> Result<()> {
    let mut buffer = [0; 16 * 1024];
    loop {
        while !held.is_empty() {
            held.drain(..stream.write(held)?);
        }
        match stream.read(&mut buffer)? {
            0 => return stream.shutdown(Shutdown::Write),
            read => held.extend_from_slice(&buffer[..read]),
        }
    }
}

fn serve(mut listener: hv::Listener) -> Result<()> {
    let (mut poll, mut events, mut guest) = (Poll::new()?, Events::with_capacity(9), None);
    let all = Interest::READABLE | Interest::WRITABLE;
    poll.registry().register(&mut listener, Token(0), all)?;
    loop {
        poll.poll(&mut events, PATIENCE)?;
        assert!(!events.is_empty(), "nothing moves");
        if let Some((stream, held)) = &mut guest {
            match echo(stream, held) {
                Err(e) if e.kind() == WouldBlock => {}
                done => return done,
            }
        } else if let Ok((mut stream, _)) = listener.accept() {
            poll.registry().register(&mut stream, Token(1), all)?;
            guest = Some((stream, Vec::new()));
        }
    }
}

#[test]
fn a_guest_gets_back_what_it_sends() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Vm::builder(dir.path()).start().unwrap();
    let listener = hv::Listener::bind(&HyperkitAddress::new(dir.path(), 7).into()).unwrap();
    let sent: Vec<u8> = (0..400_000_u32).map(|i| (i ^ (i >> 8)) as u8).collect();
    let (guest, mut back) = (vm.dial(7).unwrap(), Vec::new());
    guest.set_read_timeout(PATIENCE).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| serve(listener).unwrap());
        scope.spawn(|| {
            (&guest).write_all(&sent).unwrap();
            guest.shutdown(Shutdown::Write).unwrap();
        });
        (&guest).read_to_end(&mut back).unwrap();
    });
    assert!(back == sent && vm.fate().is_none(), "{:?}", vm.fate());
}
