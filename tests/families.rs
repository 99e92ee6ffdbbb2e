//! Both families of IP: `localhost` and `*` listen on both, `tcp4://` and `tcp6://` on one.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

#[path = "common/portable.rs"]
mod portable;

use hvsock::address::TcpAddress;
use hvsock::{Address, Listener, Proxy, ProxyConfig, Rule};
use portable::*;

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// Whether the machine has `::1`.
fn has_v6() -> bool {
    let has = TcpListener::bind((V6, 0)).is_ok();
    if !has {
        eprintln!("skipped in part: this machine has no ::1");
    }
    has
}

fn address(text: &str) -> Address {
    text.parse().unwrap()
}

fn port_of(address: &Address) -> u16 {
    match address {
        Address::Tcp(TcpAddress { port, .. }) => *port,
        other => panic!("{other} is no TCP address"),
    }
}

fn try_echo(ip: IpAddr, port: u16) -> io::Result<()> {
    let mut client = patient(TcpStream::connect((ip, port))?);
    client.write_all(b"hello")?;
    let mut back = [0; 5];
    client.read_exact(&mut back)?;
    assert_eq!(&back, b"hello");
    Ok(())
}

fn proxy_of(rule: Rule) -> (Proxy, u16) {
    let proxy = Proxy::start(ProxyConfig::new(vec![rule])).unwrap();
    let port = port_of(&proxy.forwards()[0].listen);
    (proxy, port)
}

#[test]
fn one_forward_listens_on_both_families_and_frees_both() {
    let has_v6 = has_v6();
    for host in ["localhost", "LocalHost", "*"] {
        let rule = Rule::new(address(&format!("tcp://{host}:0")), server(echo));
        let (proxy, port) = proxy_of(rule);
        let forwards = proxy.forwards();
        assert_eq!(forwards.len(), 1);
        assert_eq!(forwards[0].listen, address(&format!("tcp://{host}:{port}")));
        for turn in 0..3 {
            try_echo(V4, port).unwrap_or_else(|e| panic!("{host} {turn}: {e}"));
            if has_v6 {
                try_echo(V6, port).unwrap_or_else(|e| panic!("{host} {turn}: {e}"));
            }
        }
        let accepted = if has_v6 { 6 } else { 3 };
        assert_eq!(proxy.forwards()[0].counters.accepted, accepted);
        proxy.handle().stop(Duration::ZERO);
        proxy.wait().unwrap();
        assert!(try_echo(V4, port).is_err(), "{host}");
        assert!(try_echo(V6, port).is_err(), "{host}");
    }
}

#[test]
fn a_scheme_of_one_family_listens_on_that_alone() {
    let has_v6 = has_v6();
    for host in ["localhost", "*"] {
        let (_proxy, port) = proxy_of(Rule::new(
            address(&format!("tcp4://{host}:0")),
            server(echo),
        ));
        try_echo(V4, port).unwrap();
        assert!(try_echo(V6, port).is_err(), "{host}");
        if has_v6 {
            let (_proxy, port) = proxy_of(Rule::new(
                address(&format!("tcp6://{host}:0")),
                server(echo),
            ));
            try_echo(V6, port).unwrap();
            assert!(try_echo(V4, port).is_err(), "{host}");
        }
    }
}

#[test]
fn a_port_that_one_family_has_not_free_is_in_use() {
    let mut taken = vec![TcpListener::bind((V4, 0)).unwrap()];
    if has_v6() {
        taken.push(TcpListener::bind((V6, 0)).unwrap());
    }
    for taken in taken {
        let port = taken.local_addr().unwrap().port();
        let error = Listener::bind(&address(&format!("tcp://localhost:{port}"))).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{error}");
        assert!(error.to_string().contains("choose another port"), "{error}");
        drop(taken);
        // What was bound of it is free again, once no child of another test has a copy.
        let end = Instant::now() + PATIENCE;
        while let Err(e) = Listener::bind(&address(&format!("tcp://localhost:{port}"))) {
            assert!(Instant::now() < end, "{e}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// What is chosen for one family may be taken in the other.
#[test]
fn many_chosen_ports_are_free_in_both_families() {
    let listeners: Vec<_> = (0..50)
        .map(|_| Listener::bind(&address("tcp://localhost:0")).unwrap())
        .collect();
    let has_v6 = has_v6();
    for listener in &listeners {
        let port = port_of(listener.address());
        let clients: Vec<_> = [V4, V6]
            .iter()
            .filter(|ip| ip.is_ipv4() || has_v6)
            .map(|ip| TcpStream::connect((*ip, port)).unwrap())
            .collect();
        for _ in &clients {
            let (_, peer) = listener
                .accept_timeout(PATIENCE)
                .unwrap()
                .expect("a client");
            assert!(peer.to_string().contains("127.0.0.1") || peer.to_string().contains("::1"));
        }
    }
}

/// An address of a client is that of its family, whichever it came by.
#[test]
fn who_may_come_is_asked_of_both_families() {
    if !has_v6() {
        return;
    }
    for (from, admitted, refused) in [
        ("127.0.0.0/8", V4, V6),
        ("::1", V6, V4),
        ("::/0", V6, V4),
        ("0.0.0.0/0", V4, V6),
    ] {
        for host in ["localhost", "*"] {
            let mut rule = Rule::new(address(&format!("tcp://{host}:0")), server(echo));
            rule.from = vec![from.parse().unwrap()];
            let (_proxy, port) = proxy_of(rule);
            try_echo(admitted, port).unwrap();
            assert!(try_echo(refused, port).is_err(), "{from} {host}");
        }
    }
}

#[test]
fn a_client_by_name_reaches_it_and_a_target_of_one_family_is_found() {
    let (_proxy, port) = proxy_of(Rule::new(address("tcp://localhost:0"), server(echo)));
    let mut chained = vec![
        format!("tcp://localhost:{port}"),
        format!("tcp4://localhost:{port}"),
    ];
    // The name need not have it.
    let names = std::net::ToSocketAddrs::to_socket_addrs(&("localhost", 0)).unwrap();
    if names.into_iter().any(|it| it.is_ipv6()) && has_v6() {
        chained.push(format!("tcp6://localhost:{port}"));
    }
    for target in chained {
        let (_by_name, port) = proxy_of(Rule::new(address("tcp://127.0.0.1:0"), address(&target)));
        try_echo(V4, port).unwrap_or_else(|e| panic!("{target}: {e}"));
        let mut stream = hvsock::Stream::connect(&address(&target)).unwrap();
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    }
    let error = Proxy::start(ProxyConfig::new(vec![Rule::new(
        address("tcp://127.0.0.1:0"),
        address(&format!("tcp://*:{port}")),
    )]));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("name one"), "{error}");
}

/// Two sockets that a service manager has bound are one forward.
#[cfg(unix)]
#[test]
fn two_passed_sockets_are_one_forward() {
    use std::os::fd::OwnedFd;
    if !has_v6() {
        return;
    }
    for remaining in [&[V4, V6][..], &[V6, V4], &[V4], &[V6]] {
        let bind = || {
            let mut port = 0;
            let bind = |ip: &IpAddr| {
                let socket = TcpListener::bind((*ip, port))?;
                port = socket.local_addr()?.port();
                Ok(socket)
            };
            remaining.iter().map(bind).collect::<io::Result<Vec<_>>>()
        };
        // The port need not be free in the other family.
        let both = (0..100).find_map(|_| bind().ok()).expect("a port");
        let port = both[0].local_addr().unwrap().port();
        let rule = Rule::new(address(&format!("tcp://localhost:{port}")), server(echo));
        let mut config = ProxyConfig::new(vec![rule]);
        for socket in both {
            let listener = Listener::try_from(OwnedFd::from(socket)).unwrap();
            config.listeners.push(listener);
        }
        let proxy = Proxy::start(config).unwrap();
        assert_eq!(proxy.forwards().len(), 1);
        for ip in [V4, V6] {
            assert_eq!(try_echo(ip, port).is_ok(), remaining.contains(&ip), "{ip}");
        }
    }
}
