//! The sockets under tokio: hyper on both ends of a VM's ports.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::convert::Infallible;
use std::future::poll_fn;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use common::*;
use http_body_util::{BodyExt, Empty, Full};
use hvsock::simulate::{Service, Vm};
use hvsock::tokio::{Listener, ReuniteError, Stream};
use hvsock::{Address, SocketName};
use hyper::body::Bytes;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

fn vm(dir: &std::path::Path) -> Vm {
    Vm::builder(dir)
        .guest(80, Service::Http)
        .guest(7, Service::Echo)
        .strict(true)
        .start()
        .unwrap()
}

#[tokio::test]
async fn hyper_asks_a_guest() {
    let dir = private_dir();
    let vm = vm(dir.path());
    let stream = Stream::connect(&hyperkit(dir.path(), 80)).await.unwrap();
    let (mut client, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    let connection = tokio::spawn(connection);
    for _ in 0..3 {
        let request = Request::get("/").header("host", "guest");
        let request = request.body(Empty::<Bytes>::new()).unwrap();
        let answer = client.send_request(request).await.unwrap();
        assert!(answer.status().is_success());
        assert!(!answer.collect().await.unwrap().to_bytes().is_empty());
    }
    drop(client);
    connection.await.unwrap().unwrap();
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[tokio::test]
async fn hyper_serves_a_guest() {
    let dir = private_dir();
    let vm = vm(dir.path());
    let listener = Listener::bind(&hyperkit(dir.path(), 5000)).unwrap();
    let serving = tokio::spawn(async move {
        let (stream, name) = listener.accept().await.unwrap();
        assert_eq!(name, SocketName::Unnamed);
        let service = service_fn(|request: Request<hyper::body::Incoming>| async move {
            let path = request.uri().path().to_owned();
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(path))))
        });
        let http = hyper::server::conn::http1::Builder::new();
        http.serve_connection(TokioIo::new(stream), service)
            .await
            .unwrap();
    });
    let asking = tokio::task::spawn_blocking(move || {
        let mut guest = vm.dial(5000).unwrap();
        guest.set_read_timeout(Some(PATIENCE)).unwrap();
        let request = b"GET /from-the-guest HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n";
        guest.write_all(request).unwrap();
        let mut answer = String::new();
        guest.read_to_string(&mut answer).unwrap();
        drop(guest);
        (answer, vm)
    });
    let (answer, vm) = asking.await.unwrap();
    assert!(answer.ends_with("/from-the-guest"), "{answer}");
    serving.await.unwrap();
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[tokio::test]
async fn many_at_a_time_and_each_ends_in_order() {
    let dir = private_dir();
    let vm = vm(dir.path());
    let address = hyperkit(dir.path(), 7);
    let mut clients = tokio::task::JoinSet::new();
    for n in 0..50 {
        let address = address.clone();
        clients.spawn(async move {
            let bytes = pattern(200_000 + n);
            let mut stream = Stream::connect(&address).await.unwrap();
            let (mut read, mut write) = tokio::io::split(&mut stream);
            let (sent, echoed) = tokio::join!(
                async {
                    write.write_all(&bytes).await?;
                    write.shutdown().await
                },
                async {
                    let mut all = Vec::new();
                    read.read_to_end(&mut all).await.map(|_| all)
                }
            );
            sent.unwrap();
            assert!(echoed.unwrap() == bytes);
            stream.finish(PATIENCE).await.unwrap();
        });
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[tokio::test]
async fn a_handshake_is_awaited() {
    let dir = private_dir();
    let path = dir.path().join("mux");
    let server = UnixListener::bind(&path).unwrap();
    let serving = std::thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        let mut line = [0; 11];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"CONNECT 52\n");
        // In pieces.
        for piece in [&b"O"[..], b"K 10", b"73\nhello"] {
            std::thread::sleep(std::time::Duration::from_millis(20));
            stream.write_all(piece).unwrap();
        }
    });
    let address: Address = format!("vsock-mux://:52{}", path.display())
        .parse()
        .unwrap();
    let mut stream = Stream::connect(&address).await.unwrap();
    let mut hello = String::new();
    stream.read_to_string(&mut hello).await.unwrap();
    assert_eq!(hello, "hello");
    serving.join().unwrap();
}

#[tokio::test]
async fn names_are_resolved_and_refusals_are_told() {
    let listener = Listener::bind(&any_tcp()).unwrap();
    let Address::Tcp(bound) = listener.address().clone() else {
        panic!();
    };
    let named: Address = format!("tcp://localhost:{}", bound.port).parse().unwrap();
    let (stream, accepted) = tokio::join!(Stream::connect(&named), listener.accept());
    let (mut stream, (mut served, name)) = (stream.unwrap(), accepted.unwrap());
    assert_eq!(stream.local_addr().unwrap(), name);
    stream.write_all(b"x").await.unwrap();
    assert_eq!(served.read_u8().await.unwrap(), b'x');
    drop((stream, served, listener));
    let refused = Stream::connect(&named).await.unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    let missing = Stream::connect(&unix("/tmp/no/such/socket")).await;
    assert_eq!(missing.unwrap_err().kind(), io::ErrorKind::NotFound);
}

/// hyper drops what it is given, with a body unread perhaps, which would kill the VM.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_dropped_takes_leave_of_its_guest() {
    let dir = private_dir();
    let vm = vm(dir.path());
    let listener = Listener::bind(&hyperkit(dir.path(), 5000)).unwrap();
    let mut guest = tokio::task::block_in_place(|| vm.dial(5000)).unwrap();
    guest.write_all(&[7; 100_000]).unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    stream.read_exact(&mut [0; 1000]).await.unwrap();
    stream.write_all(b"answer").await.unwrap();
    drop(stream);
    let (answer, late) = tokio::task::block_in_place(|| {
        let mut answer = String::new();
        guest.read_to_string(&mut answer).unwrap();
        // It still reads.
        let late = guest.write_all(&[7; 1_000_000]);
        drop(guest);
        (answer, late)
    });
    assert_eq!(answer, "answer");
    late.unwrap();
    // Nor may a dial be closed at once.
    drop(Stream::connect(&hyperkit(dir.path(), 7)).await.unwrap());
    let gone = |counters: &hvsock::simulate::Counters| counters.live_slots == 0;
    let ended = tokio::task::block_in_place(|| vm.wait_for(PATIENCE, gone));
    assert!(ended, "{:?}", vm.counters());
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[tokio::test]
async fn the_halves_of_a_stream_serve_two_tasks() {
    let dir = private_dir();
    let vm = vm(dir.path());
    let stream = Stream::connect(&hyperkit(dir.path(), 7)).await.unwrap();
    let (mut read, mut write) = stream.into_split();
    let bytes = pattern(300_000);
    let sent = bytes.clone();
    // The end of the task drops its half, which half-closes.
    let sending = tokio::spawn(async move { write.write_all(&sent).await });
    let mut echo = Vec::new();
    let whole = timeout(PATIENCE, read.read_to_end(&mut echo)).await;
    whole.expect("no half-close has come").unwrap();
    assert!(echo == bytes);
    sending.await.unwrap().unwrap();
    drop(read);
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[tokio::test]
async fn halves_are_put_together_again() {
    let dir = private_dir();
    let vm = vm(dir.path());
    let address = hyperkit(dir.path(), 7);
    let (read, write) = Stream::connect(&address).await.unwrap().into_split();
    let (other, _write) = Stream::connect(&address).await.unwrap().into_split();
    let ReuniteError(other, write) = other.reunite(write).unwrap_err();
    let mut stream = read.reunite(write).unwrap();
    drop(other);
    // It was not half-closed.
    stream.write_all(b"still here").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut echo = String::new();
    stream.read_to_string(&mut echo).await.unwrap();
    assert_eq!(echo, "still here");
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[tokio::test]
async fn a_connect_ends_with_its_timeout() {
    let dir = private_dir();
    let path = dir.path().join("mux");
    // It takes the connection and never answers.
    let _server = UnixListener::bind(&path).unwrap();
    let address: Address = format!("vsock-mux://:52{}", path.display())
        .parse()
        .unwrap();
    let short = Duration::from_millis(50);
    let connect = Stream::connect_timeout(&address, short);
    let error = timeout(PATIENCE, connect).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
}

#[tokio::test]
async fn a_blocking_listener_is_taken_over_and_polled() {
    let listener = Listener::try_from(hvsock::Listener::bind(&any_tcp()).unwrap()).unwrap();
    let accept = || poll_fn(|context| listener.poll_accept(context));
    let nobody = timeout(Duration::from_millis(20), accept()).await;
    assert!(nobody.is_err());
    let client = Stream::connect(listener.address()).await.unwrap();
    let (served, name) = timeout(PATIENCE, accept()).await.unwrap().unwrap();
    assert_eq!(client.local_addr().unwrap(), name);
    assert_eq!(served.local_addr().unwrap(), listener.local_addr().unwrap());
    let raw = served.as_fd().as_raw_fd();
    assert_eq!(raw, served.as_raw_fd());
}

#[tokio::test]
async fn a_program_and_a_file_are_dialled() {
    let mut program = Stream::connect(&"exec:/bin/cat".parse().unwrap())
        .await
        .unwrap();
    program.write_all(b"asked").await.unwrap();
    program.shutdown().await.unwrap();
    let mut answer = Vec::new();
    program.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"asked");
    let dir = private_dir();
    let path = dir.path().join("content");
    let address: Address = format!("file:{}", path.display()).parse().unwrap();
    let error = Stream::connect(&address).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    std::fs::write(&path, "content").unwrap();
    let mut file = Stream::connect(&address).await.unwrap();
    answer.clear();
    file.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"content");
}

#[tokio::test]
async fn a_listener_of_both_families_accepts_from_both() {
    let listener = Listener::bind(&"tcp://localhost:0".parse().unwrap()).unwrap();
    let Address::Tcp(bound) = listener.address().clone() else {
        panic!("no TCP address");
    };
    let mut ips: Vec<std::net::IpAddr> = vec!["127.0.0.1".parse().unwrap()];
    match std::net::TcpListener::bind("[::1]:0") {
        Ok(_) => ips.push("::1".parse().unwrap()),
        Err(e) => eprintln!("skipped in part: this machine has no ::1: {e}"),
    }
    for turn in 0..6 {
        let ip = ips[turn % ips.len()];
        let accepting = async {
            match turn < 3 {
                true => listener.accept().await.unwrap(),
                false => poll_fn(|context| listener.poll_accept(context))
                    .await
                    .unwrap(),
            }
        };
        let client = tokio::net::TcpStream::connect((ip, bound.port));
        let both = async { tokio::join!(accepting, client) };
        let ((_, peer), client) = timeout(PATIENCE, both).await.unwrap();
        let client = SocketName::Tcp(client.unwrap().local_addr().unwrap());
        assert_eq!(peer, client, "{turn}");
    }
}
