//! The stand-in VM, driven through its sockets as a host's programs would.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use hvsock::hyperkit::{connect_line, socket_name};
use hvsock::simulate::{Builder, Dial, Endpoint, Fate, FateKind, Rule, Service, Vm};
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// No wait is longer: what takes longer is broken.
const LONG: Duration = Duration::from_secs(20);
/// How long something that must not happen is given to happen.
const SHORT: Duration = Duration::from_millis(60);

const ECHO: u32 = 7;
const DISCARD: u32 = 9;
const CHARGEN: u32 = 19;
const HTTP: u32 = 80;
const SILENT: u32 = 99;

fn builder(directory: &TempDir) -> Builder {
    Vm::builder(directory.path())
        .guest(ECHO, Service::Echo)
        .guest(DISCARD, Service::Discard)
        .guest(CHARGEN, Service::Chargen)
        .guest(HTTP, Service::Http)
        .guest(SILENT, Service::Silent)
}

fn vm() -> (TempDir, Vm) {
    let directory = tempfile::tempdir().unwrap();
    let vm = builder(&directory).start().unwrap();
    (directory, vm)
}

fn connect(vm: &Vm) -> UnixStream {
    let stream = UnixStream::connect(vm.directory().join("connect")).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.set_write_timeout(Some(LONG)).unwrap();
    stream
}

fn dial(vm: &Vm, port: u32) -> UnixStream {
    let mut stream = connect(vm);
    stream.write_all(&connect_line(3, port)).unwrap();
    stream
}

fn read_all(stream: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Half-closes, reads to EOF, closes.
fn finish(mut stream: UnixStream) -> Vec<u8> {
    stream.shutdown(Shutdown::Write).unwrap();
    read_all(&mut stream)
}

fn echo(vm: &Vm, text: &[u8]) {
    let mut stream = dial(vm, ECHO);
    stream.write_all(text).unwrap();
    assert_eq!(finish(stream), text);
}

fn assert_quiet(stream: &mut UnixStream) {
    stream.set_read_timeout(Some(SHORT)).unwrap();
    let error = stream.read(&mut [0]).unwrap_err();
    assert!(matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut
    ));
    stream.set_read_timeout(Some(LONG)).unwrap();
}

/// The peer has closed: EOF, or a reset because it hadn't read all.
fn assert_closed(stream: &mut UnixStream) {
    match stream.read(&mut [0]) {
        Ok(0) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => panic!("not closed: {other:?}"),
    }
}

fn assert_alive(vm: &Vm) {
    assert_eq!(vm.fate(), None);
    echo(vm, b"alive");
    assert_eq!(vm.fate(), None);
}

fn fate(vm: &Vm, rule: Rule) -> Fate {
    let fate = vm.wait_for_fate(LONG).expect("nothing became of the VM");
    assert_eq!(fate.rule, rule, "{fate}");
    assert_eq!(fate.kind, rule.consequence());
    assert_eq!(vm.counters().offences(rule), 1);
    if fate.kind == FateKind::Died {
        let deadline = Instant::now() + LONG;
        // The fate is told just before the sockets are closed.
        while let Ok(stream) = UnixStream::connect(vm.directory().join("connect")) {
            drop(stream);
            assert!(Instant::now() < deadline, "a dead VM accepts");
        }
    } else {
        assert_quiet(&mut dial(vm, ECHO));
    }
    fate
}

fn free(vm: &Vm) {
    let all_free = vm.wait_for(LONG, |counters| counters.live_slots == 0);
    assert!(all_free, "{:?}", vm.counters());
}

/// Sends a pattern of `length` bytes that depends on `seed`; its checksum.
fn send_pattern(stream: &mut impl Write, seed: u64, length: usize) -> u64 {
    let (mut state, mut sum, mut left) = (seed, 0, length);
    let mut chunk = vec![0; 50_000];
    while left > 0 {
        for piece in chunk.chunks_mut(8) {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            piece.copy_from_slice(&(state ^ (state >> 29)).to_le_bytes()[..piece.len()]);
        }
        let n = left.min(chunk.len());
        stream.write_all(&chunk[..n]).unwrap();
        sum = checksum(sum, &chunk[..n]);
        left -= n;
    }
    sum
}

fn checksum(sum: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(sum, |sum, &byte| {
        (sum.rotate_left(5) ^ u64::from(byte)).wrapping_mul(0x517c_c1b7_2722_0a95)
    })
}

fn receive(stream: &mut impl Read) -> (usize, u64) {
    let (mut length, mut sum) = (0, 0);
    let mut chunk = vec![0; 65_536];
    loop {
        match stream.read(&mut chunk).unwrap() {
            0 => return (length, sum),
            n => {
                length += n;
                sum = checksum(sum, &chunk[..n]);
            }
        }
    }
}

#[test]
fn the_directory_is_hyperkits() {
    let directory = tempfile::tempdir().unwrap();
    let vm = builder(&directory)
        .guest_forwards(&[80, 7])
        .start()
        .unwrap();
    let pid = fs::read_to_string(directory.path().join("hyperkit.pid")).unwrap();
    assert_eq!(pid, std::process::id().to_string());
    let json = fs::read(directory.path().join("hyperkit.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["vsock_ports"], serde_json::json!([80, 7]));
    assert_eq!(json["vsock_guest_cid"], 3);
    assert_eq!(json["state_dir"], directory.path().to_str().unwrap());
    let link = fs::read_link(directory.path().join("guest.00000050")).unwrap();
    assert_eq!(link.to_str(), Some("00000003.00000050"));

    let mut stream = UnixStream::connect(directory.path().join("guest.00000007")).unwrap();
    stream.write_all(b"no line here").unwrap();
    assert_eq!(finish(stream), b"no line here");
    echo(&vm, b"with a line");
    vm.stop();
    assert!(directory.path().join("connect").exists());
    let error = UnixStream::connect(directory.path().join("connect")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_new_vm_replaces_the_old_ones_files() {
    let directory = tempfile::tempdir().unwrap();
    let inode = || {
        fs::metadata(directory.path().join("connect"))
            .unwrap()
            .ino()
    };
    let first = builder(&directory).guest_forwards(&[7]).start().unwrap();
    let old = inode();
    let mut stream = dial(&first, SILENT);
    drop(first);
    assert_closed(&mut stream);
    let second = builder(&directory).guest_forwards(&[7]).start().unwrap();
    // Both may have got the same number; what counts is that it works.
    let _ = (old, inode());
    assert_alive(&second);
}

#[test]
fn other_names_and_limits() {
    let directory = tempfile::tempdir().unwrap();
    let vm = builder(&directory)
        .cid(5)
        .connect_name("@connect")
        .prefix("@");
    let vm = vm.guest_forwards(&[7]).start().unwrap();
    let mut stream = UnixStream::connect(directory.path().join("@connect")).unwrap();
    stream.write_all(&connect_line(5, ECHO)).unwrap();
    stream.write_all(b"x").unwrap();
    assert_eq!(finish(stream), b"x");
    let link = fs::read_link(directory.path().join("guest.00000007")).unwrap();
    assert_eq!(link.to_str(), Some("@00000005.00000007"));
    drop(vm);

    let name = "x".repeat(85 - directory.path().as_os_str().len() - 1);
    let fits = directory.path().join(&name);
    assert!(Vm::builder(&fits).start().is_ok());
    let error = Vm::builder(directory.path().join(name + "y")).start();
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("86 bytes") && error.contains("85"),
        "{error}"
    );
    let error = Vm::builder(directory.path())
        .guest_forwards(&[1, 2, 3, 4, 5])
        .start();
    assert!(error.unwrap_err().to_string().contains("at most 4"));
}

#[test]
fn lines_that_are_no_lines_are_closed_in_silence() {
    let (_directory, vm) = vm();
    let lines: [&[u8]; 5] = [
        b"00000003.00000007",
        b"\n",
        b"00000003.00000007 ",
        b"00000004.00000007\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ];
    for line in lines {
        let mut stream = connect(&vm);
        stream.write_all(line).unwrap();
        assert_closed(&mut stream);
    }
    let mut probe = connect(&vm);
    probe.shutdown(Shutdown::Write).unwrap();
    assert_closed(&mut probe);
    drop(connect(&vm));
    assert!(vm.wait_for(LONG, |counters| counters.silent_closes == 7));
    assert_eq!(vm.counters().dials, 0);
    assert_alive(&vm);
}

#[test]
fn a_client_that_says_nothing_stalls_the_device() {
    let (_directory, vm) = vm();
    let mut other = dial(&vm, ECHO);
    other.write_all(b"1").unwrap();
    other.read_exact(&mut [0]).unwrap();
    let before = vm.counters().stalls;
    let mut silent = connect(&vm);
    assert!(vm.wait_for(LONG, |counters| counters.stalls > before));
    other.write_all(b"2").unwrap();
    assert_quiet(&mut other);
    silent.write_all(&connect_line(3, ECHO)).unwrap();
    other.read_exact(&mut [0]).unwrap();
    assert!(vm.counters().longest_stall >= SHORT);
    finish(silent);
    finish(other);
    assert_alive(&vm);
}

#[test]
fn a_port_without_a_service_is_refused() {
    let (_directory, vm) = vm();
    let mut stream = dial(&vm, 1234);
    assert_eq!(read_all(&mut stream), b"");
    let mut stream = connect(&vm);
    let payload = [&connect_line(3, 1234)[..], b"payload"].concat();
    stream.write_all(&payload).unwrap();
    assert_closed(&mut stream);
    assert!(vm.wait_for(LONG, |counters| counters.refused == 2));
    free(&vm);
    assert_alive(&vm);
}

#[test]
fn half_close_works_both_ways() {
    const LENGTH: usize = 8 << 20;
    let directory = tempfile::tempdir().unwrap();
    let (sums, received) = std::sync::mpsc::channel();
    let sums = std::sync::Mutex::new(sums);
    let vm = builder(&directory)
        // Answers only after EOF.
        .guest(
            1,
            Service::custom(|mut stream| {
                let got = receive(&mut stream);
                stream.write_all(format!("{got:?}").as_bytes()).unwrap();
            }),
        )
        // Ends its own direction first, and then reads.
        .guest(
            2,
            Service::custom(move |mut stream| {
                send_pattern(&mut stream, 2, LENGTH);
                stream.shutdown(Shutdown::Write).unwrap();
                sums.lock().unwrap().send(receive(&mut stream)).unwrap();
            }),
        )
        .start()
        .unwrap();

    let mut stream = dial(&vm, 1);
    let sum = send_pattern(&mut stream, 1, LENGTH);
    let answer = String::from_utf8(finish(stream)).unwrap();
    assert_eq!(answer, format!("{:?}", (LENGTH, sum)));

    let mut stream = dial(&vm, 2);
    assert_eq!(
        receive(&mut stream),
        (LENGTH, send_pattern(&mut io::sink(), 2, LENGTH))
    );
    let sum = send_pattern(&mut stream, 3, LENGTH);
    assert_eq!(finish(stream), b"");
    assert_eq!(received.recv_timeout(LONG).unwrap(), (LENGTH, sum));

    let mut stream = dial(&vm, ECHO);
    let mut reader = stream.try_clone().unwrap();
    let writer = thread::spawn(move || {
        let sum = send_pattern(&mut stream, 4, LENGTH);
        stream.shutdown(Shutdown::Write).unwrap();
        sum
    });
    let got = receive(&mut reader);
    assert_eq!(got, (LENGTH, writer.join().unwrap()));
    drop(reader);
    free(&vm);
    assert_alive(&vm);
}

#[test]
fn a_guest_that_reads_nothing_lets_a_bounded_amount_in() {
    let directory = tempfile::tempdir().unwrap();
    let deaf = Service::custom(|stream| {
        thread::park_timeout(LONG);
        drop(stream);
    });
    let vm = builder(&directory).guest(1, deaf).start().unwrap();
    for port in [SILENT, 1] {
        let mut stream = dial(&vm, port);
        stream.set_write_timeout(Some(SHORT)).unwrap();
        let mut total = 0;
        let chunk = [0; 65_536];
        while let Ok(n) = stream.write(&chunk) {
            total += n;
            assert!(total < 1 << 20, "no backpressure on port {port}");
        }
        assert!((250_000..420_000).contains(&total), "port {port}: {total}");
    }
    assert_alive(&vm);
}

#[test]
fn a_guest_that_ignores_eof_keeps_its_slot() {
    let directory = tempfile::tempdir().unwrap();
    let (go, wait) = std::sync::mpsc::channel::<&[u8]>();
    let wait = std::sync::Mutex::new(wait);
    let program = Service::custom(move |mut stream| {
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        let bytes = wait.lock().unwrap().recv_timeout(LONG).unwrap();
        stream.write_all(bytes).unwrap();
        if !bytes.is_empty() {
            // It keeps its end open; only the reset ends it.
            assert_eq!(
                stream.write(bytes).map(|_| stream.read(&mut [0]).ok()).ok(),
                None
            );
        }
    });
    let vm = builder(&directory).guest(1, program).start().unwrap();
    for bytes in [&b""[..], b"more"] {
        let mut stream = dial(&vm, 1);
        assert_quiet(&mut stream);
        drop(stream);
        assert!(!vm.wait_for(SHORT, |counters| counters.live_slots == 0));
        go.send(bytes).unwrap();
        free(&vm);
    }
    assert_alive(&vm);
}

#[test]
fn a_paused_guest_answers_later() {
    let (_directory, vm) = vm();
    let mut old = dial(&vm, ECHO);
    old.write_all(b"1").unwrap();
    old.read_exact(&mut [0]).unwrap();
    vm.pause();
    let mut new = dial(&vm, ECHO);
    new.write_all(b"new").unwrap();
    old.write_all(b"2").unwrap();
    let mut refused = dial(&vm, 1234);
    assert!(vm.wait_for(LONG, |counters| counters.unanswered == 2));
    assert_quiet(&mut old);
    assert_quiet(&mut new);
    assert_quiet(&mut refused);
    vm.resume();
    assert_eq!(finish(old), b"2");
    assert_eq!(finish(new), b"new");
    assert_closed(&mut refused);
    free(&vm);
    assert_alive(&vm);
}

#[test]
fn a_rebooted_guest_has_forgotten_its_connections() {
    let (_directory, vm) = vm();
    let mut streams = [dial(&vm, ECHO), dial(&vm, ECHO), dial(&vm, ECHO)];
    for stream in &mut streams {
        stream.write_all(b"1").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    }
    vm.reboot_guest();
    let [mut sends, ends, mut waits] = streams;
    assert_quiet(&mut sends);
    sends.write_all(b"2").unwrap();
    assert_closed(&mut sends);
    assert_eq!(finish(ends), b"");
    assert_quiet(&mut waits);
    assert_eq!(vm.counters().live_slots, 1);
    assert_eq!(finish(waits), b"");
    free(&vm);
    assert_alive(&vm);
}

#[test]
fn slots_are_limited() {
    let directory = tempfile::tempdir().unwrap();
    let (_, hard) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let vm = builder(&directory).start().unwrap();
    let mut streams = Vec::new();
    for i in 0..1013 {
        streams.push(dial(&vm, ECHO));
        if i % 100 == 99 {
            assert!(
                vm.wait_for(LONG, |counters| counters.answered == i + 1),
                "{:?} {:?}",
                vm.fate(),
                vm.counters()
            );
        }
    }
    let mut excess = connect(&vm);
    let _ = excess.write(&connect_line(3, ECHO));
    assert_closed(&mut excess);
    for stream in &mut streams {
        stream.write_all(b"x").unwrap();
    }
    for mut stream in streams {
        stream.read_exact(&mut [0]).unwrap();
        finish(stream);
    }
    free(&vm);
    let counters = vm.counters();
    assert_eq!((counters.peak_slots, counters.turned_away), (1013, 1));
    assert_alive(&vm);
}

#[test]
fn without_descriptors_the_rest_hangs() {
    let directory = tempfile::tempdir().unwrap();
    let vm = builder(&directory).descriptor_limit(256).start().unwrap();
    let mut streams: Vec<_> = (0..245).map(|_| dial(&vm, ECHO)).collect();
    assert!(vm.wait_for(LONG, |counters| counters.answered == 245));
    let mut hangs = dial(&vm, ECHO);
    hangs.write_all(b"x").unwrap();
    assert_quiet(&mut hangs);
    assert_eq!(vm.counters().accepted, 245);
    finish(streams.pop().unwrap());
    assert_eq!(finish(hangs), b"x");
    for stream in streams {
        finish(stream);
    }
    assert_alive(&vm);
}

#[test]
fn the_guest_serves_the_web() {
    let directory = tempfile::tempdir().unwrap();
    let vm = builder(&directory).name("nova").start().unwrap();
    let mut stream = dial(&vm, HTTP);
    stream.write_all(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\nGET /bytes/300000 HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    let text = String::from_utf8(read_all(&mut stream)).unwrap();
    assert!(text.contains("nova (cid 3), port 80\n/a\n"), "{text:.300}");
    assert!(text.len() > 300_000);
    // The server waits for the client's EOF before it closes.
    finish(stream);
    free(&vm);
    assert_alive(&vm);
}

#[test]
fn a_real_server_can_be_behind_a_guest_port() {
    let directory = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let closed = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let got = receive(&mut stream);
        stream.write_all(format!("{got:?}").as_bytes()).unwrap();
    });
    let vm = builder(&directory)
        .guest(1, Service::Forward(Endpoint::Tcp(address)))
        .guest(2, Service::Forward(Endpoint::Tcp(closed)))
        .guest(3, Service::Forward(Endpoint::Unix("/nonexistent".into())))
        .start()
        .unwrap();
    let mut stream = dial(&vm, 1);
    let sum = send_pattern(&mut stream, 9, 3 << 20);
    let answer = String::from_utf8(finish(stream)).unwrap();
    assert_eq!(answer, format!("{:?}", (3 << 20, sum)));
    server.join().unwrap();
    assert_closed(&mut dial(&vm, 2));
    assert_closed(&mut dial(&vm, 3));
    free(&vm);
    assert_alive(&vm);
}

fn host_socket(vm: &Vm, port: u32) -> UnixListener {
    UnixListener::bind(vm.directory().join(socket_name(2, port))).unwrap()
}

fn accept(listener: &UnixListener) -> UnixStream {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

#[test]
fn the_guest_dials_the_host() {
    let directory = tempfile::tempdir().unwrap();
    let any = Endpoint::Tcp(([127, 0, 0, 1], 0).into());
    let door = directory.path().join("door");
    let vm = builder(&directory)
        .dial(5000, Dial::Listen(any))
        .dial(5000, Dial::Listen(Endpoint::Unix(door.clone())))
        .start()
        .unwrap();
    thread::scope(|scope| {
        // Nobody has listened yet: the guest waits.
        let program = scope.spawn(|| vm.dial(5000).unwrap());
        assert!(!vm.wait_for(SHORT, |counters| counters.guest_dials > 0));
        let listener = host_socket(&vm, 5000);
        let (mut host, mut guest) = (accept(&listener), program.join().unwrap());
        guest.set_read_timeout(Some(LONG)).unwrap();
        let sum = send_pattern(&mut guest, 1, 100_000);
        guest.shutdown(Shutdown::Write).unwrap();
        assert_eq!(receive(&mut host), (100_000, sum));
        let writer = scope.spawn(move || receive(&mut guest));
        let sum = send_pattern(&mut host, 2, 1 << 20);
        host.shutdown(Shutdown::Write).unwrap();
        assert_eq!(writer.join().unwrap(), (1 << 20, sum));
        drop(host);

        let mut program = UnixStream::connect(&door).unwrap();
        program.write_all(b"from the guest").unwrap();
        program.shutdown(Shutdown::Write).unwrap();
        let mut host = accept(&listener);
        assert_eq!(read_all(&mut host), b"from the guest");
        host.write_all(b"to it").unwrap();
        assert_eq!(finish(host), b"");
        assert_eq!(read_all(&mut program), b"to it");
    });
    free(&vm);
    assert_eq!(vm.counters().guest_dials, 2);
    assert_alive(&vm);
}

#[test]
fn the_chosen_address_of_a_dial_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let any = Endpoint::Tcp(([127, 0, 0, 1], 0).into());
    let vm = builder(&directory)
        .dial(8, Dial::Listen(any))
        .start()
        .unwrap();
    let Some(Endpoint::Tcp(address)) = vm.dial_addr(8) else {
        panic!("no address");
    };
    let listener = host_socket(&vm, 8);
    let mut program = TcpStream::connect(address).unwrap();
    program.write_all(b"x").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    assert_eq!(finish(accept(&listener)), b"x");
    assert_eq!(vm.dial_addr(9), None);
    assert_eq!(read_all(&mut program), b"");
    assert_alive(&vm);
}

#[test]
#[cfg(target_os = "linux")]
fn dies_of_a_close_with_data_unread() {
    let (_directory, mid_download) = vm();
    let mut stream = dial(&mid_download, CHARGEN);
    stream.read_exact(&mut [0; 100]).unwrap();
    drop(stream);
    fate(&mid_download, Rule::CloseUnread);

    // The guest has closed, and the device is done with the connection.
    let (_directory, after) = vm();
    let mut stream = dial(&after, ECHO);
    stream.write_all(b"never read").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert!(after.wait_for(LONG, |counters| counters.bytes_to_host == 10
        && counters.live_slots == 0));
    assert_eq!(after.fate(), None);
    drop(stream);
    fate(&after, Rule::CloseUnread);

    // A host program that the guest dialled.
    let (_directory, dialled) = vm();
    let listener = host_socket(&dialled, 5000);
    let mut guest = dialled.dial(5000).unwrap();
    guest.write_all(b"never read").unwrap();
    let host = accept(&listener);
    assert!(dialled.wait_for(LONG, |counters| counters.bytes_to_host == 10));
    drop(host);
    fate(&dialled, Rule::CloseUnread);
}

#[test]
fn dies_of_512_dials_without_an_answer() {
    let directory = tempfile::tempdir().unwrap();
    let vm = builder(&directory).start().unwrap();
    vm.pause();
    let mut streams: Vec<_> = (0..511).map(|_| dial(&vm, ECHO)).collect();
    assert!(vm.wait_for(LONG, |counters| counters.unanswered == 511));
    assert_eq!(vm.fate(), None);
    vm.resume();
    for stream in streams.drain(..) {
        finish(stream);
    }
    vm.pause();
    // In total: the old ones are forgotten, those given up are not.
    for i in 0..512 {
        let stream = dial(&vm, ECHO);
        if i < 511 {
            streams.push(stream);
        }
    }
    fate(&vm, Rule::Unanswered);
}

#[test]
fn dies_of_a_burst() {
    // Behind a stall, a thousand dials reach the device at once. A machine that stalls the stand-in itself may hide the burst (see the rule), so it has some tries.
    for _ in 0..8 {
        let (_directory, vm) = vm();
        let mut stall = connect(&vm);
        assert!(vm.wait_for(LONG, |counters| counters.stalls > 0));
        let streams: Vec<_> = (0..1010).map(|_| dial(&vm, ECHO)).collect();
        assert!(vm.wait_for(LONG, |counters| counters.longest_stall
            > Duration::from_millis(25)));
        let _ = stall.write_all(&connect_line(3, ECHO));
        let accepted = vm.wait_for(LONG, |counters| {
            counters.accepted == 1011 || counters.offences(Rule::Burst) > 0
        });
        assert!(accepted);
        if vm.fate().is_some() {
            drop(streams);
            fate(&vm, Rule::Burst);
            return;
        }
        streams.into_iter().for_each(|stream| drop(finish(stream)));
    }
    panic!("it survived every burst");
}

#[test]
fn hangs_of_an_immediate_close() {
    let (_directory, vm) = vm();
    drop(dial(&vm, ECHO));
    fate(&vm, Rule::ImmediateClose);
}

#[test]
fn hangs_of_a_probe() {
    let directory = tempfile::tempdir().unwrap();
    let vm = builder(&directory).guest_forwards(&[ECHO]).start().unwrap();
    let path = directory.path().join(socket_name(3, ECHO));
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"no probe").unwrap();
    assert_eq!(finish(stream), b"no probe");
    assert_eq!(vm.fate(), None);
    drop(UnixStream::connect(&path).unwrap());
    fate(&vm, Rule::Probe);
}

#[test]
fn hangs_when_nobody_listens_any_more() {
    let (_directory, vm) = vm();
    let listener = host_socket(&vm, 5000);
    let guest = vm.dial(5000).unwrap();
    let host = accept(&listener);
    drop(guest);
    finish(host);
    drop(listener);
    let error = vm.dial(5000).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    fate(&vm, Rule::NoListener);
}

#[test]
fn hangs_when_the_guest_is_accepted_and_closed_at_once() {
    let (_directory, vm) = vm();
    let listener = host_socket(&vm, 5000);
    let guest = vm.dial(5000).unwrap();
    drop(accept(&listener));
    fate(&vm, Rule::AcceptAndClose);
    drop(guest);
}

#[test]
fn a_lenient_vm_only_counts() {
    let directory = tempfile::tempdir().unwrap();
    let vm = builder(&directory).lenient(true).start().unwrap();
    for _ in 0..3 {
        drop(dial(&vm, ECHO));
    }
    let mut stream = dial(&vm, CHARGEN);
    stream.read_exact(&mut [0; 100]).unwrap();
    drop(stream);
    assert!(vm.wait_for(LONG, |counters| {
        counters.offences(Rule::ImmediateClose) == 3
            && (cfg!(not(target_os = "linux")) || counters.offences(Rule::CloseUnread) == 1)
    }));
    free(&vm);
    assert_alive(&vm);
}

#[test]
fn polite_clients_in_numbers_do_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    let vm = Arc::new(builder(&directory).guest_forwards(&[ECHO]).start().unwrap());
    let threads: Vec<_> = (0..8)
        .map(|number| {
            let vm = Arc::clone(&vm);
            thread::spawn(move || {
                for i in 0..600usize {
                    let text = vec![i as u8; i * 7];
                    match (number + i) % 6 {
                        0 => echo(&vm, &text),
                        1 => drop(finish(dial(&vm, 4321))),
                        2 => drop(finish(dial(&vm, CHARGEN))),
                        3 => {
                            let mut stream = dial(&vm, DISCARD);
                            stream.write_all(&text).unwrap();
                            assert_eq!(finish(stream), b"");
                        }
                        4 => {
                            let mut stream = dial(&vm, HTTP);
                            stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
                            assert!(finish(stream).starts_with(b"HTTP/1.1 200"));
                        }
                        _ => {
                            let path = vm.directory().join(socket_name(3, ECHO));
                            let mut stream = UnixStream::connect(path).unwrap();
                            stream.write_all(&text).unwrap();
                            assert_eq!(finish(stream), text);
                        }
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        assert!(thread.join().is_ok(), "{:?} {:?}", vm.fate(), vm.counters());
    }
    free(&vm);
    let counters = vm.counters();
    assert_eq!(counters.dials, 4800, "{counters:?}");
    assert_eq!(counters.refused, 800);
    assert_eq!(counters.all_offences(), 0, "{counters:?}");
    assert_alive(&vm);
}
