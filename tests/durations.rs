//! Every call that takes a time takes `Duration::MAX`: "as long as it takes", and the shortest.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use common::{any_tcp, ask, config, port_of, private_dir, tcp, unix_client};
use hvsock::address::HyperkitAddress;
use hvsock::proxy::Timeouts;
use hvsock::simulate::{Service, Vm};
use hvsock::{Listener, Proxy, Rule, Stream, hyperkit};

const EVER: Duration = Duration::MAX;

#[test]
fn blocking_sockets_wait_for_ever() {
    let listener = Listener::bind(&any_tcp()).unwrap();
    let client = Stream::connect_timeout(listener.address(), EVER).unwrap();
    let (server, _) = listener.accept_timeout(EVER).unwrap().unwrap();
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(EVER)).unwrap();
        stream.set_write_timeout(Some(EVER)).unwrap();
        assert_eq!(stream.read_timeout().unwrap(), None);
        assert_eq!(stream.write_timeout().unwrap(), None);
    }
    (&client).write_all(b"x").unwrap();
    (&server).read_exact(&mut [0]).unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    client.finish(EVER).unwrap();
}

/// Kernels count in microseconds, or in milliseconds, and take a zero for "for ever".
#[test]
fn the_shortest_timeouts_end() {
    let listener = Listener::bind(&any_tcp()).unwrap();
    let client = Stream::connect(listener.address()).unwrap();
    let (server, _) = listener.accept_timeout(EVER).unwrap().unwrap();
    for shortest in [1, 999, 1_001].map(Duration::from_nanos) {
        client.set_read_timeout(Some(shortest)).unwrap();
        assert!(client.read_timeout().unwrap().is_some());
        (&client).read(&mut [0]).unwrap_err();
        client.set_write_timeout(Some(shortest)).unwrap();
        assert!(client.write_timeout().unwrap().is_some());
    }
    client.finish(Duration::from_nanos(1)).unwrap_err();
    drop(server);
}

#[test]
fn sockets_of_one_family_wait_for_ever() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path()).guest(7, Service::Echo).start();
    let vm = vm.unwrap();
    let listener = hyperkit::Listener::bind(&HyperkitAddress::new(dir.path(), 5000)).unwrap();
    let guest = vm.dial(5000).unwrap();
    let (from_guest, _) = listener.accept_timeout(EVER).unwrap().unwrap();
    drop(guest);
    from_guest.finish(EVER).unwrap();
    let to_guest = HyperkitAddress::new(dir.path(), 7);
    let to_guest = hyperkit::Stream::connect_timeout(&to_guest, EVER).unwrap();
    to_guest.finish(EVER).unwrap();
}

#[test]
fn a_proxy_waits_for_ever() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path()).guest(7, Service::Echo).start();
    let vm = vm.unwrap();
    let mut timeouts = Timeouts::default();
    timeouts.dial = EVER;
    timeouts.drain = EVER;
    timeouts.idle = Some(EVER);
    timeouts.half_closed = Some(EVER);
    let mut rule = Rule::new(any_tcp(), common::hyperkit(dir.path(), 7));
    rule.timeouts = timeouts;
    rule.wait = Some(EVER);
    let proxy = Proxy::start(config(vec![rule])).unwrap();
    assert_eq!(ask(tcp(port_of(&proxy, 0)), b"hello").unwrap(), b"hello");
    let handle = proxy.handle();
    assert!(handle.answers_within(EVER));
    let id = proxy.forwards()[0].id;
    handle.remove(id, EVER).unwrap();
    handle.stop(EVER);
    proxy.stop(EVER);
    proxy.wait().unwrap();
    assert!(vm.wait_for(EVER, |counters| counters.live_slots == 0));
    assert!(vm.fate().is_none());
}

/// It has one soon: a client that closes at once.
#[test]
fn a_stand_ins_fate_is_waited_for_for_ever() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path()).guest(9, Service::Discard).start();
    let vm = vm.unwrap();
    let mut client = unix_client(&dir.path().join("connect"));
    client
        .write_all(&hvsock::hyperkit::connect_line(3, 9))
        .unwrap();
    drop(client);
    assert!(vm.wait_for_fate(EVER).is_some());
}

#[cfg(feature = "tokio")]
#[test]
fn streams_of_tokio_wait_for_ever() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        let listener = hvsock::tokio::Listener::bind(&any_tcp()).unwrap();
        let mut client = hvsock::tokio::Stream::connect(listener.address())
            .await
            .unwrap();
        drop(listener.accept().await.unwrap());
        client.finish(EVER).await.unwrap();
    });
}
