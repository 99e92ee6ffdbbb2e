//! Descriptors that a peer passes over a Unix socket, and that nobody has asked for.
//!
//! Linux 6.16 can refuse them for all who come to a listener. Those who came before it was told to,
//! as may be of one that was passed, are served as on a kernel that can't.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use common::*;
use hvsock::{Address, Listener, Proxy, Rule};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// How long the close of a [`Lingering`] takes unless it is let go: longer than any wait.
const LINGER: Duration = Duration::from_secs(120);

/// A TCP socket whose close waits for bytes to be taken that nobody takes.
struct Lingering {
    socket: TcpStream,
    /// Its drop resets it.
    peer: TcpStream,
}

fn lingering() -> Lingering {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let peer = listener.accept().unwrap().0;
    socket.set_nonblocking(true).unwrap();
    let mut written = 0;
    while socket.write(&[0; 65_536]).is_ok() {
        written += 1;
        assert!(written < 10_000, "it is never full");
    }
    let linger = socket2::SockRef::from(&socket).set_linger(Some(LINGER));
    linger.unwrap();
    Lingering { socket, peer }
}

/// Sends bytes, and a descriptor with the first of them.
fn pass(through: &UnixStream, bytes: &[u8], descriptor: impl AsFd) -> nix::Result<()> {
    let descriptors = [descriptor.as_fd().as_raw_fd()];
    let sent = sendmsg::<()>(
        through.as_raw_fd(),
        &[IoSlice::new(bytes)],
        &[ControlMessage::ScmRights(&descriptors)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    let mut through = through;
    through.write_all(&bytes[sent..]).unwrap();
    Ok(())
}

/// A listener that is to be passed to a proxy, and a client that came before.
fn listener_with_client(path: &Path) -> (UnixListener, UnixStream) {
    let listener = UnixListener::bind(path).unwrap();
    let client = UnixStream::connect(path).unwrap();
    (listener, client)
}

/// A proxy with one worker, which carries what comes to the passed listener, and, as forward 1,
/// what comes to a TCP port.
fn proxy_on(path: &Path, listener: UnixListener, target: Address, other: Address) -> Proxy {
    let rules = vec![Rule::new(unix(path), target), Rule::new(any_tcp(), other)];
    let mut config = config(rules);
    config.workers = Some(1.try_into().unwrap());
    let listener = Listener::try_from(OwnedFd::from(listener)).unwrap();
    config.listeners.push(listener);
    Proxy::start(config).unwrap()
}

fn assert_serves(proxy: &Proxy, server: &TcpListener) {
    let mut client = tcp(port_of(proxy, 1));
    client.write_all(b"hello").unwrap();
    let mut accepted = accept(server);
    let mut got = [0; 5];
    accepted.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
}

/// Whether this kernel has `SO_PASSRIGHTS`.
fn kernel_refuses() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map(|part| part.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap(), numbers.next().unwrap());
    version >= (6, 16)
}

#[test]
fn whoever_comes_to_a_listener_of_ours_can_pass_none_where_the_kernel_refuses() {
    if !kernel_refuses() {
        eprintln!("skipped: SO_PASSRIGHTS is of Linux 6.16");
        return;
    }
    let dir = private_dir();
    let (server, target) = tcp_server();
    let name = format!("hvsock-passing-{}", std::process::id());
    let rules = vec![
        Rule::new(unix(dir.path().join("s")), target.clone()),
        Rule::new(format!("unix:@{name}").parse().unwrap(), target),
    ];
    let _proxy = Proxy::start(config(rules)).unwrap();
    let by_name = {
        use std::os::linux::net::SocketAddrExt;
        std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap()
    };
    let by_path = std::os::unix::net::SocketAddr::from_pathname(dir.path().join("s")).unwrap();
    for address in [by_path, by_name] {
        let mut client = UnixStream::connect_addr(&address).unwrap();
        let refused = pass(&client, b"x", &server).unwrap_err();
        assert_eq!(refused, nix::errno::Errno::EPERM);
        client.write_all(b"y").unwrap();
        let mut got = [0];
        accept(&server).read_exact(&mut got).unwrap();
        assert_eq!(&got, b"y");
    }
}

/// And the servers of ours, too.
#[test]
fn a_server_that_is_dialled_can_pass_none_where_the_kernel_refuses() {
    if !kernel_refuses() {
        eprintln!("skipped: SO_PASSRIGHTS is of Linux 6.16");
        return;
    }
    let dir = private_dir();
    let path = dir.path().join("server");
    let server = UnixListener::bind(&path).unwrap();
    let proxy = proxy(any_tcp(), unix(&path));
    let mut client = tcp(port_of(&proxy, 0));
    client.write_all(b"x").unwrap();
    let mut accepted = server.accept().unwrap().0;
    let refused = pass(&accepted, b"y", &server).unwrap_err();
    assert_eq!(refused, nix::errno::Errno::EPERM);
    accepted.write_all(b"z").unwrap();
    let mut got = [0];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"z");
}

/// A read of a Unix socket ends where descriptors were passed, and no event tells of what stands
/// behind them.
#[test]
fn descriptors_passed_amid_much_else_keep_nothing_back() {
    const MUCH: usize = 1 << 18;
    for size in [3, MUCH] {
        let dir = private_dir();
        let path = dir.path().join("listen");
        let (listener, client) = listener_with_client(&path);
        let ((server, target), (_, other)) = (tcp_server(), tcp_server());
        let _proxy = proxy_on(&path, listener, target, other);
        let mut accepted = accept(&server);
        let sending = std::thread::spawn(move || {
            for piece in 0..8 {
                pass(&client, &vec![piece; size], &client).unwrap();
            }
            client
        });
        for piece in 0..8 {
            let mut got = vec![0; size];
            accepted.read_exact(&mut got).unwrap();
            assert!(got.iter().all(|&byte| byte == piece), "{piece}");
        }
        drop(sending.join().unwrap());
    }
}

#[test]
fn a_passed_descriptor_whose_close_takes_its_time_holds_nobody_up() {
    let dir = private_dir();
    let path = dir.path().join("listen");
    let (listener, mut client) = listener_with_client(&path);
    let Lingering { socket, peer } = lingering();
    pass(&client, b"before", &socket).unwrap();
    // It is the last that has it from now on.
    drop(socket);
    client.write_all(b"behind").unwrap();
    let ((server, target), (other_server, other)) = (tcp_server(), tcp_server());
    let proxy = proxy_on(&path, listener, target, other);
    let mut accepted = accept(&server);
    let mut got = [0; 12];
    accepted.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"beforebehind");
    assert_serves(&proxy, &other_server);
    drop(peer);
    drop(client);
    assert_eq!(accepted.read(&mut got).unwrap(), 0);
}

/// What a client has sent is closed with it.
#[test]
fn a_descriptor_that_is_never_read_holds_nobody_up_either() {
    let dir = private_dir();
    let path = dir.path().join("listen");
    let (listener, mut client) = listener_with_client(&path);
    let Lingering { socket, peer } = lingering();
    pass(&client, b"x", &socket).unwrap();
    drop(socket);
    let (other_server, other) = tcp_server();
    let nobody = unix(dir.path().join("nobody"));
    let proxy = proxy_on(&path, listener, nobody, other);
    eventually("the client is refused", || {
        proxy.forwards()[0].counters.refused > 0
    });
    assert_serves(&proxy, &other_server);
    drop(peer);
    let _ = client.set_read_timeout(Some(PATIENCE));
    match client.read(&mut [0]) {
        Ok(n) => assert_eq!(n, 0),
        Err(e) => assert_eq!(e.kind(), ErrorKind::ConnectionReset),
    }
}
