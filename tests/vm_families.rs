//! VMs of other families than hyperkit's at work: their limits, and what is known of their health.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use common::*;
use hvsock::address::AnyVm;
use hvsock::proxy::{ForwardState, VmLimits, VmStatus};
use hvsock::{Address, Proxy, Rule};

/// A VMM whose guest echoes at every port, until its socket is shut down.
struct Vmm(UnixListener);

impl Vmm {
    fn start(path: &Path) -> Vmm {
        let listener = UnixListener::bind(path).unwrap();
        let again = listener.try_clone().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else {
                    return;
                };
                thread::spawn(move || {
                    let mut reader = BufReader::with_capacity(1, stream.try_clone().unwrap());
                    let mut line = String::new();
                    if reader.read_line(&mut line).is_ok() && line.starts_with("CONNECT ") {
                        let _ = stream.write_all(b"OK 1073741824\n");
                        let _ = std::io::copy(&mut reader, &mut stream);
                        let _ = stream.shutdown(Shutdown::Write);
                    }
                });
            }
        });
        Vmm(again)
    }

    /// Ends it; its file stays, as that of a VMM that was killed.
    fn kill(self) {
        let ended = socket2::SockRef::from(&self.0).shutdown(Shutdown::Both);
        // Elsewhere a socket that listens can't be.
        assert_eq!(ended.is_ok(), cfg!(target_os = "linux"));
    }
}

fn mux(path: &Path) -> Address {
    format!("vsock-mux://:80{}?half-close=yes", path.to_str().unwrap())
        .parse()
        .unwrap()
}

fn vm_of(proxy: &Proxy) -> VmStatus {
    proxy.forwards()[0].vm.clone().unwrap()
}

/// Sees a byte come back.
fn echoes(mut stream: impl Read + Write) -> bool {
    stream.write_all(b"x").is_ok() && matches!(stream.read(&mut [0]), Ok(1))
}

/// How a VM with a limit of 9 connections, 8 of them for its guest, is to be served, of which
/// `proxy` has a forward to it from TCP, and one from it to `server`. `dial` is a dial of its
/// guest.
fn keeps_its_limit<S: Read + Write>(
    proxy: &Proxy,
    server: &UnixListener,
    mut dial: impl FnMut() -> S,
) {
    assert_eq!(vm_of(proxy).limit, Some(9));
    let guests: Vec<S> = (0..8).map(|_| dial()).collect();
    let accepted: Vec<UnixStream> = (0..8).map(|_| server.accept().unwrap().0).collect();
    assert_eq!(vm_of(proxy).guests, 8);
    // One more is ended at once, and the host's clients have the rest.
    assert!(matches!(dial().read(&mut [0]), Ok(0) | Err(_)));
    eventually("it is counted", || vm_of(proxy).turned_away == 1);
    eventually("it is closed", || vm_of(proxy).connections == 8);
    let port = port_of(proxy, 0);
    let mut client = tcp(port);
    assert!(echoes(&client));
    assert_eq!(vm_of(proxy).connections, 9);
    let mut waiting = tcp(port);
    waiting.write_all(b"x").unwrap();
    let is_full = || matches!(proxy.forwards()[0].state, ForwardState::Full { .. });
    eventually("it is full", is_full);
    assert_eq!(proxy.forwards()[0].counters.accepted, 1);
    client.half_close();
    assert_eq!(client.read_to_end(&mut Vec::new()).unwrap(), 0);
    waiting.read_exact(&mut [0]).unwrap();
    drop((guests, accepted, waiting));
    eventually("all is given back", || vm_of(proxy).connections == 0);
    assert_eq!(vm_of(proxy).lost, 0);
}

#[test]
fn a_vm_behind_its_vmm_s_socket_keeps_its_limit_both_ways() {
    let dir = private_dir();
    let socket = dir.path().join("vm");
    let _vmm = Vmm::start(&socket);
    let server = UnixListener::bind(dir.path().join("server")).unwrap();
    let rules = vec![
        Rule::new(any_tcp(), mux(&socket)),
        Rule::new(mux(&socket), unix(dir.path().join("server"))),
    ];
    let mut config = config(rules);
    // However it is spelled, it is the same.
    let mut limits = VmLimits::new(AnyVm::VsockMux(dir.path().join("./vm")));
    limits.connections = Some(9);
    config.vms = vec![limits];
    let proxy = Proxy::start(config).unwrap();
    keeps_its_limit(&proxy, &server, || unix_client(&dir.path().join("vm_80")));
}

#[test]
fn a_vmm_that_ends_and_comes_back_is_noticed() {
    let dir = private_dir();
    let socket = dir.path().join("vm");
    let proxy = proxy(any_tcp(), mux(&socket));
    let port = port_of(&proxy, 0);
    let up = || vm_of(&proxy).up;
    assert_eq!(vm_of(&proxy).limit, None);
    // Without a client.
    eventually("it is not there", || up() == Some(false));
    let vmm = Vmm::start(&socket);
    eventually("it is there", || up() == Some(true));
    assert!(echoes(tcp(port)));
    eventually("it was heard", || vm_of(&proxy).last_heard.is_some());
    // A file on which nobody listens.
    vmm.kill();
    if cfg!(target_os = "linux") {
        // A socket that was shut down is there still, and a client finds out. (Just after its
        // return, a dial may have failed that was begun before.)
        eventually("a client finds it gone", || {
            assert!(resets_clients(port));
            up() == Some(false)
        });
        assert!(vm_of(&proxy).gone_since.is_some());
    }
    std::fs::remove_file(&socket).unwrap();
    eventually("it is gone", || up() == Some(false));
    let _vmm = Vmm::start(&socket);
    eventually("it is back", || up() == Some(true));
    assert!(echoes(tcp(port)));
}

#[cfg(target_os = "linux")]
mod loopback {
    use super::*;
    use hvsock::address::{CID_LOCAL, PORT_ANY, Port, VsockAddress};
    use hvsock::vsock;
    use std::time::Duration;

    /// A guest that echoes, on this system itself; `None` where it has no loopback of AF_VSOCK.
    fn guest() -> Option<u32> {
        let any = VsockAddress::new(CID_LOCAL, PORT_ANY);
        let listener = vsock::Listener::bind(&any).ok()?;
        let Port(port) = listener.local_addr().ok()?.port;
        let own = VsockAddress::new(CID_LOCAL, port);
        vsock::Stream::connect_timeout(&own, Duration::from_secs(2)).ok()?;
        thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                thread::spawn(move || {
                    let mut reader = stream.try_clone().unwrap();
                    let _ = std::io::copy(&mut reader, &mut stream);
                    let _ = stream.shutdown(Shutdown::Write);
                });
            }
        });
        Some(port)
    }

    #[test]
    fn a_cid_keeps_its_limit_both_ways() {
        let Some(port) = guest() else {
            println!("skipped: this needs AF_VSOCK's loopback (`modprobe vsock_loopback`)");
            return;
        };
        let dir = private_dir();
        let server = UnixListener::bind(dir.path().join("server")).unwrap();
        let guest = Address::from(VsockAddress::new(CID_LOCAL, port));
        let here = Address::from(VsockAddress::new(CID_LOCAL, PORT_ANY));
        let mut from_guest = Rule::new(here, unix(dir.path().join("server")));
        from_guest.from = vec![hvsock::proxy::Source::cid(CID_LOCAL)];
        let mut config = config(vec![Rule::new(any_tcp(), guest), from_guest]);
        config.limits.other_vm_connections = Some(9);
        let proxy = Proxy::start(config).unwrap();
        let Address::Vsock(here) = proxy.forwards()[1].listen.clone() else {
            panic!("{:?}", proxy.forwards()[1]);
        };
        assert_eq!(vm_of(&proxy).up, None);
        keeps_its_limit(&proxy, &server, || {
            vsock::Stream::connect_timeout(&here, PATIENCE).unwrap()
        });
        assert_eq!(vm_of(&proxy).up, Some(true));
    }

    #[test]
    fn a_cid_that_there_is_not_is_down_and_one_that_refuses_is_up() {
        if guest().is_none() {
            println!("skipped: this needs AF_VSOCK's loopback (`modprobe vsock_loopback`)");
            return;
        }
        // No program listens there.
        let refused = VsockAddress::new(CID_LOCAL, 0x7fff_0001);
        let absent = VsockAddress::new(0x7fff_fff0, 1);
        for (address, up) in [(refused, true), (absent, false)] {
            let proxy = proxy(any_tcp(), address.into());
            assert!(resets_clients(port_of(&proxy, 0)));
            eventually("it is known", || vm_of(&proxy).up == Some(up));
        }
    }
}
