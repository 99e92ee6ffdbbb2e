//! Named pipes: by the proxy, by `cat`, by `stress` and by the library. This one runs under Wine.
#![cfg(windows)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

#[path = "common/portable.rs"]
mod portable;

use hvsock::{Address, Listener, Proxy, ProxyConfig, Rule, Stream};
use mio::windows::NamedPipe;
use mio::{Events, Interest, Poll, Token};
use portable::*;

/// `ERROR_PIPE_NOT_CONNECTED`: what a client reads that was cut off.
const NOT_CONNECTED: i32 = 233;

/// A name that no other test has.
fn name() -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("hvsock-test-{}-{number}", std::process::id())
}

fn pipe(name: &str) -> Address {
    format!("npipe:////./pipe/{name}").parse().unwrap()
}

/// A client that knows nothing of us, as any program of Windows could be.
fn open(name: &str) -> File {
    let end = Instant::now() + PATIENCE;
    loop {
        let path = format!(r"\\.\pipe\{name}");
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => return file,
            // ERROR_PIPE_BUSY.
            Err(e) if e.raw_os_error() == Some(231) && Instant::now() < end => {
                thread::sleep(Duration::from_millis(5));
            }
            Err(e) => panic!("{e}"),
        }
    }
}

fn proxy(listen: Address, connect: Address) -> Proxy {
    let mut config = ProxyConfig::new(vec![Rule::new(listen, connect)]);
    config.workers = Some(2.try_into().unwrap());
    Proxy::start(config).unwrap()
}

fn tcp_port(proxy: &Proxy) -> u16 {
    match &proxy.forwards()[0].listen {
        Address::Tcp(tcp) => tcp.port,
        other => panic!("{other}"),
    }
}

fn any_tcp() -> Address {
    "tcp://127.0.0.1:0".parse().unwrap()
}

fn tcp(port: u16) -> Stream {
    bounded(Stream::connect(&format!("tcp://127.0.0.1:{port}").parse().unwrap()).unwrap())
}

fn bounded(stream: Stream) -> Stream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends, half-closes, and reads to the end meanwhile.
fn exchange(stream: Stream, bytes: &[u8]) -> Vec<u8> {
    let (mut writer, sent) = (stream.try_clone().unwrap(), bytes.to_vec());
    let writing = thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    (&stream).read_to_end(&mut back).unwrap();
    writing.join().unwrap();
    back
}

#[test]
fn the_proxy_carries_every_byte_and_both_ends() {
    for (serve, times) in [(echo as fn(TcpStream), 1), (answer_late, 2)] {
        let name = name();
        let _inward = proxy(pipe(&name), server(serve));
        let outward = proxy(any_tcp(), pipe(&name));
        for len in [0, 1, 100_000, 4 << 20] {
            let bytes = pattern(len);
            let expected = bytes.repeat(times);
            // One pipe, then two in a row.
            let client = bounded(Stream::connect(&pipe(&name)).unwrap());
            assert!(exchange(client, &bytes) == expected, "{len} by a pipe");
            let client = tcp(tcp_port(&outward));
            assert!(exchange(client, &bytes) == expected, "{len} by TCP");
        }
    }
}

#[test]
fn a_message_of_no_bytes_is_a_half_close_both_ways() {
    let name = name();
    let _proxy = proxy(pipe(&name), server(answer_late));
    let mut client = open(&name);
    client.write_all(b"question").unwrap();
    assert_eq!(client.write(b"").unwrap(), 0);
    let mut buffer = [0; 100];
    let mut answer: Vec<u8> = Vec::new();
    loop {
        match client.read(&mut buffer).unwrap() {
            0 => break,
            n => answer.extend(&buffer[..n]),
        }
    }
    assert_eq!(answer, b"questionquestion");
}

#[test]
fn a_proxy_that_stops_leaves_nothing_behind() {
    const LEN: usize = 300_000;
    let name = name();
    let proxy = proxy(
        pipe(&name),
        server(|mut stream| {
            stream.read_to_end(&mut Vec::new()).unwrap();
            let _ = stream.write_all(&pattern(LEN));
        }),
    );
    let mut client = open(&name);
    client.write_all(b"question").unwrap();
    assert_eq!(client.write(b"").unwrap(), 0);
    let mut back: Vec<u8> = Vec::new();
    let mut buffer = [0; 10_000];
    // Until the rest fits into the pipe and the write under way: then the proxy has nothing more to
    // do.
    while proxy.forwards()[0].counters.accepted == 0 || proxy.forwards()[0].counters.live > 0 {
        let n = client.read(&mut buffer).unwrap();
        assert!(n > 0 && back.len() + n < LEN - 10_000, "{}", back.len());
        back.extend(&buffer[..n]);
        thread::sleep(Duration::from_millis(20));
    }
    proxy.stop(PATIENCE);
    let stopping = thread::spawn(move || proxy.wait().unwrap());
    while back.len() < LEN {
        thread::sleep(Duration::from_millis(10));
        assert!(!stopping.is_finished(), "{} of {LEN}", back.len());
        match client.read(&mut buffer).unwrap() {
            0 => break,
            n => back.extend(&buffer[..n]),
        }
    }
    assert!(back == pattern(LEN), "{} of {LEN}", back.len());
    assert_eq!(client.read(&mut buffer).unwrap(), 0);
    stopping.join().unwrap();
}

#[test]
fn many_clients_at_a_time() {
    let name = name();
    let proxy = proxy(pipe(&name), server(echo));
    let clients: Vec<_> = (0..50)
        .map(|n| {
            let address = pipe(&name);
            thread::spawn(move || {
                let client = bounded(Stream::connect(&address).unwrap());
                let bytes = pattern(20_000 + n);
                assert!(exchange(client, &bytes) == bytes);
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    assert_eq!(proxy.forwards()[0].counters.accepted, 50);
}

#[test]
fn a_client_that_spoke_before_it_was_accepted_is_heard() {
    let name = name();
    let mut config = ProxyConfig::new(vec![Rule::new(pipe(&name), server(answer_late))]);
    config.limits.connections = 1;
    let _proxy = Proxy::start(config).unwrap();
    let mut first = open(&name);
    first.write_all(b"1").unwrap();
    thread::sleep(Duration::from_millis(100));
    // It finds an instance, but not its turn.
    let mut second = open(&name);
    second.write_all(b"2").unwrap();
    thread::sleep(Duration::from_millis(100));
    for (client, answer) in [(&mut first, b"11"), (&mut second, b"22")] {
        assert_eq!(client.write(b"").unwrap(), 0);
        let mut buffer = [0; 2];
        client.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, answer);
    }
}

#[test]
fn a_refusal_is_no_empty_answer() {
    // A port that nobody has.
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let name = name();
    let proxy = proxy(
        pipe(&name),
        format!("tcp://127.0.0.1:{port}").parse().unwrap(),
    );
    let mut client = open(&name);
    let error = client.read(&mut [0]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(NOT_CONNECTED), "{error}");
    assert_eq!(proxy.forwards()[0].counters.refused, 1);
}

#[test]
fn a_client_is_told_that_its_server_broke_off() {
    let (front, back) = (name(), name());
    byte_server(&back, |poll, mut pipe| {
        insist(poll, || pipe.read(&mut [0])).unwrap();
        insist(poll, || pipe.write(b"half of")).unwrap();
        insist(poll, || pipe.read(&mut [0])).unwrap();
        pipe.disconnect().unwrap();
    });
    let _proxy = proxy(pipe(&front), pipe(&back));
    let mut client = open(&front);
    client.write_all(b"x").unwrap();
    thread::sleep(Duration::from_millis(200));
    client.write_all(b"y").unwrap();
    // The failure comes, and stays behind what was sent before it.
    thread::sleep(Duration::from_millis(200));
    let mut half = [0; 7];
    client.read_exact(&mut half).unwrap();
    assert_eq!(&half, b"half of");
    let error = client.read(&mut [0]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(NOT_CONNECTED), "{error}");
}

#[test]
fn a_pipe_that_is_not_there_is_told() {
    let name = name();
    let error = Stream::connect(&pipe(&name)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    assert!(
        error.to_string().contains("is the server running?"),
        "{error}"
    );
    let proxy = proxy(any_tcp(), pipe(&name));
    let mut client = tcp(tcp_port(&proxy));
    // Wine takes a reset for an EOF.
    assert!(matches!(client.read(&mut [0]), Ok(0) | Err(_)));
    assert_eq!(proxy.forwards()[0].counters.refused, 1);
}

/// A server of byte type, which serves one client: no half-close reaches it, or comes from it.
fn byte_server(name: &str, serve: impl FnOnce(&mut Poll, NamedPipe) + Send + 'static) {
    let mut pipe = NamedPipe::new(format!(r"\\.\pipe\{name}")).unwrap();
    let mut poll = Poll::new().unwrap();
    let what = Interest::READABLE | Interest::WRITABLE;
    poll.registry().register(&mut pipe, Token(0), what).unwrap();
    let _ = pipe.connect();
    thread::spawn(move || serve(&mut poll, pipe));
}

/// Tries until it would not block.
fn insist<T>(poll: &mut Poll, mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let end = Instant::now() + PATIENCE;
    let mut events = Events::with_capacity(8);
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                poll.poll(&mut events, Some(Duration::from_millis(100)))
                    .unwrap();
            }
            done => return done,
        }
    }
}

#[test]
fn a_half_close_that_cannot_be_sent_loses_no_answer() {
    let name = name();
    byte_server(&name, |poll, mut pipe| {
        let mut question = [0; 8];
        assert_eq!(insist(poll, || pipe.read(&mut question)).unwrap(), 8);
        // The client has half-closed long ago.
        thread::sleep(Duration::from_millis(300));
        assert!(matches!(
            pipe.read(&mut [0]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock
        ));
        let answer = pattern(200_000);
        let mut sent = 0;
        while sent < answer.len() {
            sent += insist(poll, || pipe.write(&answer[sent..])).unwrap();
        }
        // Until it is done: only then may the pipe be closed.
        let mut events = Events::with_capacity(8);
        let end = Instant::now() + PATIENCE;
        while !events.iter().any(|event| event.is_writable()) && Instant::now() < end {
            poll.poll(&mut events, Some(Duration::from_millis(100)))
                .unwrap();
        }
    });
    let proxy = proxy(any_tcp(), pipe(&name));
    let answer = exchange(tcp(tcp_port(&proxy)), b"question");
    assert!(answer == pattern(200_000), "{} bytes", answer.len());
}

#[test]
fn the_library_says_that_a_byte_pipe_has_no_half_close() {
    let name = name();
    byte_server(&name, |poll, mut pipe| {
        let mut byte = [0];
        while insist(poll, || pipe.read(&mut byte)).is_ok_and(|n| n > 0) {
            insist(poll, || pipe.write(&byte)).unwrap();
        }
    });
    let mut stream = bounded(Stream::connect(&pipe(&name)).unwrap());
    let error = stream.shutdown(Shutdown::Write).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    stream.write_all(b"x").unwrap();
    let mut byte = [0];
    stream.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x");
}

#[test]
fn a_blocking_stream_waits_no_longer_than_it_was_told() {
    let name = name();
    let listener = Listener::bind(&pipe(&name)).unwrap();
    assert!(
        listener
            .accept_timeout(Duration::from_millis(20))
            .unwrap()
            .is_none()
    );
    let mut client = Stream::connect(&pipe(&name)).unwrap();
    let (mut stream, _) = listener.accept_timeout(PATIENCE).unwrap().unwrap();
    stream
        .set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    let error = stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    stream.set_nonblocking(true).unwrap();
    let error = stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    // What comes after a read was given up is not lost.
    client.write_all(b"late").unwrap();
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut late = [0; 4];
    stream.read_exact(&mut late).unwrap();
    assert_eq!(&late, b"late");
    // A read that waits is ended from another thread.
    let other = stream.try_clone().unwrap();
    let ending = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        other.shutdown(Shutdown::Both).unwrap();
    });
    assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap(), 0);
    ending.join().unwrap();
    // Nobody reads: a write waits, and gives up.
    let bytes = pattern(1 << 20);
    client
        .set_write_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    let error = client.write_all(&bytes).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    client.shutdown(Shutdown::Both).unwrap();
}

#[test]
fn what_a_thread_has_begun_outlives_it() {
    let name = name();
    let listener = Listener::bind(&pipe(&name)).unwrap();
    // The listener's own operations are begun on a thread that ends, too.
    let listener = thread::spawn(move || {
        let none = listener.accept_timeout(Duration::from_millis(1)).unwrap();
        assert!(none.is_none());
        listener
    });
    let listener = listener.join().unwrap();
    let client = Stream::connect(&pipe(&name)).unwrap();
    let (mut server, _) = listener.accept_timeout(PATIENCE).unwrap().unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut other = client.try_clone().unwrap();
    let begun = thread::spawn(move || {
        other.set_nonblocking(true).unwrap();
        assert!(other.read(&mut [0]).is_err());
        let bytes = pattern(1 << 20);
        let mut sent = 0;
        while let Ok(n) = other.write(&bytes[sent..]) {
            sent += n;
        }
        sent
    });
    let sent = begun.join().unwrap();
    let mut back = vec![0; sent];
    server.read_exact(&mut back).unwrap();
    assert!(back == pattern(1 << 20)[..sent]);
    server.write_all(b"x").unwrap();
    let client = bounded(client);
    client.set_nonblocking(false).unwrap();
    let mut byte = [0];
    (&client).read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x");
}

#[test]
fn a_dropped_stream_has_sent_all() {
    let name = name();
    let listener = Listener::bind(&pipe(&name)).unwrap();
    let client = Stream::connect(&pipe(&name)).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    client.set_nonblocking(true).unwrap();
    let bytes = pattern(1 << 20);
    let mut sent = 0;
    while let Ok(n) = (&client).write(&bytes[sent..]) {
        sent += n;
    }
    assert!(sent > 64 * 1024 && sent < bytes.len(), "{sent}");
    let dropping = thread::spawn(move || drop(client));
    // Nothing is read before it is dropped.
    thread::sleep(Duration::from_millis(100));
    let mut back = Vec::new();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.read_to_end(&mut back).unwrap();
    assert!(back == bytes[..sent], "{} of {sent}", back.len());
    dropping.join().unwrap();
}

#[test]
fn a_name_is_one_listeners() {
    let name = name();
    let path = format!(r"\\.\pipe\{name}");
    let foreign = NamedPipe::new(&path).unwrap();
    if NamedPipe::new(&path).is_ok() {
        return eprintln!(
            "skipped: this system doesn't know FILE_FLAG_FIRST_PIPE_INSTANCE (Wine 8 doesn't)"
        );
    }
    let error = Listener::bind(&pipe(&name)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    assert!(error.to_string().contains("choose another name"), "{error}");
    drop(foreign);
    let _listener = Listener::bind(&pipe(&name)).unwrap();
    assert_eq!(
        Listener::bind(&pipe(&name)).unwrap_err().kind(),
        io::ErrorKind::AddrInUse
    );
}

#[test]
fn who_may_connect_is_said_in_the_address() {
    let error = Listener::bind_with_mode(&pipe(&name()), 0o660).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    assert!(error.to_string().contains("?sddl="), "{error}");
    let bad = format!("npipe:////./pipe/{}?sddl=nonsense", name())
        .parse()
        .unwrap();
    let error = Listener::bind(&bad).unwrap_err();
    assert!(error.to_string().contains("Microsoft's SDDL"), "{error}");
    // Everybody.
    let name = name();
    let open_to_all: Address = format!("npipe:////./pipe/{name}?sddl=D:P(A;;GA;;;WD)")
        .parse()
        .unwrap();
    let listener = Listener::bind(&open_to_all).unwrap();
    assert_eq!(listener.address(), &open_to_all);
    let _client = open(&name);
    listener.accept().unwrap();
    let error = Stream::connect(&open_to_all).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    let rule = Rule::new(any_tcp(), open_to_all);
    assert!(Proxy::start(ProxyConfig::new(vec![rule])).is_err());
}

/// A process that is killed, if it still runs, at the end.
struct Mortal(Child);

impl Drop for Mortal {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(arguments);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn run(arguments: &[&str], input: Vec<u8>) -> Output {
    let mut child = command(arguments).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let feeding = thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    let _ = feeding.join().unwrap();
    output
}

#[test]
fn cat_speaks_to_cat() {
    let name = name();
    let there = format!(r"\\.\pipe\{name}");
    let mut listening = command(&["cat", "-l", &there]).spawn().unwrap();
    let mut stdin = listening.stdin.take().unwrap();
    let answer = pattern(700_000);
    let given = answer.clone();
    let feeding = thread::spawn(move || stdin.write_all(&given));
    let hearing = thread::spawn(|| listening.wait_with_output().unwrap());
    let question = pattern(500_000);
    let client = run(&["cat", "--wait", "20", &there], question.clone());
    let heard = hearing.join().unwrap();
    let _ = feeding.join().unwrap();
    assert!(
        client.status.success(),
        "{}",
        String::from_utf8_lossy(&client.stderr)
    );
    assert!(
        heard.status.success(),
        "{}",
        String::from_utf8_lossy(&heard.stderr)
    );
    assert!(client.stdout == answer, "{} bytes", client.stdout.len());
    assert!(heard.stdout == question, "{} bytes", heard.stdout.len());
}

#[test]
fn stress_finds_nothing_lost() {
    let name = name();
    let there = format!("npipe:////./pipe/{name}");
    let mut server = Mortal(command(&["stress", "--server", &there]).spawn().unwrap());
    let mut lines = BufReader::new(server.0.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().contains(&name));
    let output = run(
        &["stress", "-n", "40", "-p", "8", "--size", "0-200K", &there],
        Vec::new(),
    );
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stdout)
    );
}
