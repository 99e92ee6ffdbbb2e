//! The proxy with sockets that no poller can wait for: each connection has its threads, and all
//! else is as usual.

#![allow(clippy::unwrap_used)]

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, SockRef, Socket, Type};

use super::{ConnectionState, Counters, EndCounts, Proxy, ProxyConfig, Rule, Waiter};
use crate::address::{Address, Host};

const PATIENCE: Duration = Duration::from_secs(20);

struct Blocking {
    proxy: Proxy,
    port: u16,
}

/// Starts a proxy in front of that address, none of whose sockets can be polled.
fn proxy_to(connect: Address, adjust: impl FnOnce(&mut ProxyConfig)) -> Blocking {
    proxy_with(connect, adjust, |_| Waiter::Thread)
}

fn proxy_with(
    connect: Address,
    adjust: impl FnOnce(&mut ProxyConfig),
    waiter: fn(&Address) -> Waiter,
) -> Blocking {
    let rule = Rule::new("tcp://127.0.0.1:0".parse().unwrap(), connect);
    let mut config = ProxyConfig::new(vec![rule]);
    config.workers = Some(2.try_into().unwrap());
    adjust(&mut config);
    let proxy = Proxy::start_with(config, waiter).unwrap();
    let Address::Tcp(listen) = &proxy.forwards()[0].listen else {
        panic!("no TCP address");
    };
    let port = listen.port;
    Blocking { proxy, port }
}

/// Starts such a proxy in front of a listener of this test.
fn proxy(adjust: impl FnOnce(&mut ProxyConfig)) -> (Blocking, TcpListener) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = format!("tcp://{}", listener.local_addr().unwrap());
    (proxy_to(address.parse().unwrap(), adjust), listener)
}

fn patient(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

impl Blocking {
    fn client(&self) -> TcpStream {
        patient(TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).unwrap())
    }

    /// Returns both ends of a connection that carries bytes in both directions.
    fn pair(&self, listener: &TcpListener) -> (TcpStream, TcpStream) {
        let mut client = self.client();
        client.write_all(b"x").unwrap();
        let mut server = patient(listener.accept().unwrap().0);
        server.read_exact(&mut [0]).unwrap();
        server.write_all(b"y").unwrap();
        client.read_exact(&mut [0]).unwrap();
        (client, server)
    }

    /// Sends much that nobody reads, until threads wait for room. Returns whether that fails.
    fn flood(&self, mut server: TcpStream) -> thread::JoinHandle<bool> {
        let flooding = thread::spawn(move || server.write_all(&vec![7; 32 << 20]).is_err());
        let mut before = u64::MAX;
        while self.counters().received != before {
            before = self.counters().received;
            thread::sleep(Duration::from_millis(100));
        }
        flooding
    }

    fn counters(&self) -> Counters {
        self.proxy.forwards()[0].counters
    }

    fn wait_for(&self, is_so: impl Fn(Counters) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !is_so(self.counters()) {
            assert!(Instant::now() < end, "{:?}", self.counters());
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Checks that a reset was read. Wine turns a reset into an EOF.
fn assert_reset(read: io::Result<usize>) {
    let was_reset = matches!(&read, Err(e) if e.kind() == io::ErrorKind::ConnectionReset);
    assert!(
        was_reset || cfg!(windows) && matches!(read, Ok(0)),
        "{read:?}"
    );
}

#[test]
fn clients_that_come_together_are_kept_apart() {
    let (it, listener) = proxy(|_| {});
    thread::scope(|scope| {
        for n in 0..50_u8 {
            let it = &it;
            scope.spawn(move || {
                let mut client = it.client();
                client.write_all(&[n; 1000]).unwrap();
                client.shutdown(Shutdown::Write).unwrap();
                let mut answer = Vec::new();
                client.read_to_end(&mut answer).unwrap();
                assert_eq!(answer, [n; 1000]);
            });
        }
        for server in listener.incoming().take(50) {
            scope.spawn(move || {
                let mut server = patient(server.unwrap());
                let mut request = Vec::new();
                server.read_to_end(&mut request).unwrap();
                server.write_all(&request).unwrap();
            });
        }
    });
    it.wait_for(|counters| counters.live == 0);
    assert_eq!(it.counters().accepted, 50);
}

#[test]
fn bytes_and_half_closes_go_through_and_are_counted() {
    let (it, listener) = proxy(|_| {});
    let bytes: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..))
        .take(1 << 20)
        .collect();
    let mut client = it.client();
    let answer = thread::scope(|scope| {
        scope.spawn(|| {
            (&client).write_all(&bytes).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
        });
        let mut server = patient(listener.accept().unwrap().0);
        let mut all = Vec::new();
        server.read_to_end(&mut all).unwrap();
        assert!(all == bytes);
        server.write_all(b"all").unwrap();
        drop(server);
        let mut answer = Vec::new();
        (&client).read_to_end(&mut answer).unwrap();
        answer
    });
    assert_eq!(answer, b"all");
    it.wait_for(|counters| counters.live == 0);
    let expected = Counters {
        accepted: 1,
        sent: 1 << 20,
        received: 3,
        ended: client_closed(),
        ..Counters::default()
    };
    assert_eq!(it.counters(), expected);
    assert_eq!(client.read_to_end(&mut Vec::new()).unwrap(), 0);
}

/// Returns the counts after one connection whose client has ended first.
fn client_closed() -> EndCounts {
    EndCounts {
        client_closed: 1,
        ..EndCounts::default()
    }
}

/// Returns whether the address names its host: here, that of a target and not that of a listener.
fn is_target(address: &Address) -> bool {
    matches!(address, Address::Tcp(tcp) if matches!(tcp.host, Host::Name(_)))
}

/// Returns a function that gives the waiter of the listener's side and of the target's.
fn waiters(listener: Waiter, target: Waiter) -> fn(&Address) -> Waiter {
    use Waiter::{Any, Poller, Thread};
    match (listener, target) {
        (Thread, Any) => |address| if is_target(address) { Any } else { Thread },
        (Any, Thread) => |address| if is_target(address) { Thread } else { Any },
        (Thread, Poller) => |address| if is_target(address) { Poller } else { Thread },
        (Poller, Thread) => |address| if is_target(address) { Thread } else { Poller },
        other => panic!("{other:?}"),
    }
}

/// Starts a proxy with these waiters for its sides.
fn mixed(listener: Waiter, target: Waiter) -> (Blocking, TcpListener) {
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    let to = format!("tcp://localhost:{port}").parse().unwrap();
    (proxy_with(to, |_| {}, waiters(listener, target)), server)
}

const MIXED: [(Waiter, Waiter); 4] = [
    (Waiter::Thread, Waiter::Any),
    (Waiter::Any, Waiter::Thread),
    (Waiter::Thread, Waiter::Poller),
    (Waiter::Poller, Waiter::Thread),
];

#[test]
fn a_polled_side_and_a_blocking_one_can_be_combined() {
    for waiters in MIXED {
        let (it, listener) = mixed(waiters.0, waiters.1);
        let (mut client, mut server) = it.pair(&listener);
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(server.read_to_end(&mut Vec::new()).unwrap(), 0);
        let much: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7) as u8).collect();
        let answer = thread::scope(|scope| {
            scope.spawn(|| {
                (&server).write_all(&much).unwrap();
                server.shutdown(Shutdown::Write).unwrap();
            });
            let mut answer = Vec::new();
            if let Err(e) = client.read_to_end(&mut answer) {
                let (read, handle) = (answer.len(), it.proxy.handle());
                let known = (handle.connections(), handle.answers_within(PATIENCE));
                panic!("{waiters:?}: {e} after {read} bytes; {known:?}");
            }
            answer
        });
        assert!(answer == much);
        drop(server);
        it.wait_for(|counters| counters.live == 0);
        let expected = Counters {
            accepted: 1,
            sent: 1,
            received: much.len() as u64 + 1,
            ended: client_closed(),
            ..Counters::default()
        };
        assert_eq!(it.counters(), expected);
    }
}

#[test]
fn a_reset_of_either_kind_of_side_is_a_reset_of_the_other() {
    for (waiter, target) in MIXED {
        let (it, listener) = mixed(waiter, target);
        let (client, server) = it.pair(&listener);
        let (client_2, server_2) = it.pair(&listener);
        for (gone, mut left) in [(client, server), (server_2, client_2)] {
            SockRef::from(&gone)
                .set_linger(Some(Duration::ZERO))
                .unwrap();
            drop(gone);
            assert_reset(left.read(&mut [0]));
        }
        it.wait_for(|counters| counters.live == 0);
        let ended = it.counters().ended;
        let resets = (ended.client_reset, ended.server_reset);
        // Wine turns a reset into an EOF.
        assert!(resets == (1, 1) || cfg!(windows), "{ended:?}");
    }
}

#[test]
fn a_mixed_proxy_ends_with_its_connections() {
    for (waiter, target) in MIXED {
        let (it, listener) = mixed(waiter, target);
        let (mut client, mut server) = it.pair(&listener);
        let started = Instant::now();
        drop(it);
        assert!(started.elapsed() < Duration::from_secs(4));
        assert_reset(client.read(&mut [0]));
        assert_reset(server.read(&mut [0]));
    }
}

/// Returns a listener whose backlog is full, with the connections that fill it: a connect to it
/// waits.
fn full_listener() -> (Socket, Vec<TcpStream>, Address) {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    listener.bind(&any.into()).unwrap();
    listener.listen(1).unwrap();
    let address = listener.local_addr().unwrap().as_socket().unwrap();
    let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(300));
    let waiting = std::iter::repeat_with(connect)
        .map_while(Result::ok)
        .take(16)
        .collect();
    (
        listener,
        waiting,
        format!("tcp://{address}").parse().unwrap(),
    )
}

#[test]
fn a_stop_does_not_wait_for_a_dial() {
    let (_listener, waiting, address) = full_listener();
    assert!(waiting.len() < 16);
    let it = proxy_to(address, |_| {});
    let mut client = it.client();
    it.wait_for(|counters| counters.live == 1);
    let started = Instant::now();
    it.proxy.stop(Duration::ZERO);
    it.proxy.wait().unwrap();
    assert!(started.elapsed() < Duration::from_secs(2));
    assert_reset(client.read(&mut [0]));
}

#[test]
fn a_client_waits_for_a_dial_no_longer_than_it_is_to() {
    let (_listener, _waiting, address) = full_listener();
    let it = proxy_to(address, |config| {
        config.rules[0].timeouts.dial = Duration::from_millis(100);
    });
    assert_reset(it.client().read(&mut [0]));
    it.wait_for(|counters| counters.refused == 1 && counters.live == 0);
}

#[test]
fn a_client_that_leaves_while_its_target_is_dialled_frees_its_slot() {
    let (_listener, _waiting, address) = full_listener();
    let it = proxy_to(address, |_| {});
    let client = it.client();
    it.wait_for(|counters| counters.live == 1);
    SockRef::from(&client)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(client);
    // Wine turns a reset into an EOF, and an EOF is a half-close.
    if cfg!(unix) {
        it.wait_for(|counters| counters.live == 0);
        assert_eq!(it.counters().ended.client_gave_up, 1);
    }
}

#[test]
fn a_client_whose_target_is_not_there_is_refused() {
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let nobody = format!("tcp://{}", free.local_addr().unwrap());
    drop(free);
    let it = proxy_to(nobody.parse().unwrap(), |_| {});
    assert_reset(it.client().read(&mut [0]));
    it.wait_for(|counters| counters.refused == 1 && counters.live == 0);
}

#[test]
fn relay_threads_count_as_a_connection_until_they_end() {
    let (it, listener) = proxy(|config| config.limits.connections = 1);
    let (first, server) = it.pair(&listener);
    let mut second = it.client();
    second.write_all(b"x").unwrap();
    thread::sleep(Duration::from_millis(100));
    assert_eq!(it.counters().accepted, 1);
    drop(first);
    drop(server);
    let mut server = patient(listener.accept().unwrap().0);
    server.read_exact(&mut [0]).unwrap();
    assert_eq!(it.counters().accepted, 2);
}

#[test]
fn a_stop_waits_for_relay_threads_and_a_second_one_cuts_them_off() {
    let (it, listener) = proxy(|_| {});
    let (mut client, mut server) = it.pair(&listener);
    let idle = it.pair(&listener);
    it.proxy.stop(Duration::from_secs(3600));
    it.wait_for(|_| TcpStream::connect((Ipv4Addr::LOCALHOST, it.port)).is_err());
    client.write_all(b"still").unwrap();
    server.read_exact(&mut [0; 5]).unwrap();
    // Connections that only checked whether the proxy still listens wait for the server's accept.
    it.wait_for(|counters| counters.live == counters.accepted);
    it.proxy.stop(Duration::ZERO);
    assert_reset(client.read(&mut [0]));
    assert_reset(server.read(&mut [0]));
    let started = Instant::now();
    it.proxy.wait().unwrap();
    assert!(started.elapsed() < Duration::from_secs(2));
    drop(idle);
}

#[test]
fn a_stop_ends_with_the_last_relay_threads() {
    let (it, listener) = proxy(|_| {});
    let (client, server) = it.pair(&listener);
    it.proxy.stop(Duration::from_secs(3600));
    drop((client, server));
    it.proxy.wait().unwrap();
}

#[test]
fn a_proxy_that_is_dropped_ends_its_relay_threads() {
    let (it, listener) = proxy(|_| {});
    let (mut client, server) = it.pair(&listener);
    let flooding = it.flood(server);
    let started = Instant::now();
    drop(it);
    assert!(started.elapsed() < Duration::from_secs(2));
    assert!(flooding.join().unwrap());
    let mut rest = [0; 64 * 1024];
    let end =
        std::iter::repeat_with(|| client.read(&mut rest)).find(|read| !matches!(read, Ok(1..)));
    assert_reset(end.unwrap());
}

#[test]
fn relay_threads_that_wait_for_room_are_closed_by_the_operator() {
    let (it, listener) = proxy(|_| {});
    let (mut client, server) = it.pair(&listener);
    let flooding = it.flood(server);
    let handle = it.proxy.handle();
    let id = handle.connections()[0].id;
    handle.close(id).unwrap();
    let is_closing = |state| state == ConnectionState::Closing;
    assert!(handle.connections().iter().all(|it| is_closing(it.state)));
    it.wait_for(|counters| counters.live == 0);
    assert_eq!(it.counters().ended.closed_on_request, 1);
    assert!(flooding.join().unwrap());
    let mut rest = [0; 64 * 1024];
    let end =
        std::iter::repeat_with(|| client.read(&mut rest)).find(|read| !matches!(read, Ok(1..)));
    assert_reset(end.unwrap());
}

#[test]
fn a_client_that_leaves_at_once_is_an_empty_connection() {
    let (it, listener) = proxy(|_| {});
    let client = it.client();
    client.shutdown(Shutdown::Write).unwrap();
    drop(client);
    let mut server = patient(listener.accept().unwrap().0);
    assert_eq!(server.read_to_end(&mut Vec::new()).unwrap(), 0);
    drop(server);
    it.wait_for(|counters| counters.accepted == 1 && counters.live == 0);
}

#[cfg(windows)]
mod guests;
mod idle;
