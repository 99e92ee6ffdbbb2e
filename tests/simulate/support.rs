//! What the tests share: a VM, and a host's programs.

use hvsock::hyperkit::{connect_line, socket_name};
use hvsock::simulate::{Builder, Fate, FateKind, Rule, Service, Vm};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// No wait is longer: what takes longer is broken.
pub(crate) const LONG: Duration = Duration::from_secs(20);
/// How long something that must not happen is given to happen.
pub(crate) const SHORT: Duration = Duration::from_millis(60);

pub(crate) const ECHO: u32 = 7;
pub(crate) const DISCARD: u32 = 9;
pub(crate) const CHARGEN: u32 = 19;
pub(crate) const HTTP: u32 = 80;
pub(crate) const SILENT: u32 = 99;

pub(crate) fn builder(directory: &TempDir) -> Builder {
    raise_descriptor_limit();
    Vm::builder(directory.path())
        .guest(ECHO, Service::Echo)
        .guest(DISCARD, Service::Discard)
        .guest(CHARGEN, Service::Chargen)
        .guest(HTTP, Service::Http)
        .guest(SILENT, Service::Silent)
}

pub(crate) fn vm() -> (TempDir, Vm) {
    let directory = tempfile::tempdir().unwrap();
    let vm = builder(&directory).start().unwrap();
    (directory, vm)
}

/// One that punishes any close with data unread.
pub(crate) fn strict_vm() -> (TempDir, Vm) {
    let directory = tempfile::tempdir().unwrap();
    let vm = builder(&directory).strict(true).start().unwrap();
    (directory, vm)
}

/// Connects; `None` if the backlog is full, which on macOS is a refusal.
pub(crate) fn try_connect(vm: &Vm) -> Option<UnixStream> {
    let stream = match UnixStream::connect(vm.directory().join("connect")) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => return None,
        connected => connected.unwrap(),
    };
    // (macOS takes none for one that has ended already, where nothing waits.)
    let _ = stream.set_read_timeout(Some(LONG));
    let _ = stream.set_write_timeout(Some(LONG));
    Some(stream)
}

pub(crate) fn connect(vm: &Vm) -> UnixStream {
    let deadline = Instant::now() + LONG;
    loop {
        match try_connect(vm) {
            Some(stream) => return stream,
            None => assert!(Instant::now() < deadline, "the VM accepts nobody"),
        }
        std::thread::yield_now();
    }
}

pub(crate) fn dial(vm: &Vm, port: u32) -> UnixStream {
    let mut stream = connect(vm);
    stream.write_all(&connect_line(3, port)).unwrap();
    stream
}

pub(crate) fn read_all(stream: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Half-closes, reads to EOF, closes.
pub(crate) fn finish(mut stream: UnixStream) -> Vec<u8> {
    // (Refused, on macOS, if the other side has closed.)
    let _ = stream.shutdown(Shutdown::Write);
    read_all(&mut stream)
}

pub(crate) fn echo(vm: &Vm, text: &[u8]) {
    let mut stream = dial(vm, ECHO);
    stream.write_all(text).unwrap();
    assert_eq!(finish(stream), text);
}

pub(crate) fn assert_quiet(stream: &mut UnixStream) {
    stream.set_read_timeout(Some(SHORT)).unwrap();
    let error = stream.read(&mut [0]).unwrap_err();
    assert!(matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut
    ));
    stream.set_read_timeout(Some(LONG)).unwrap();
}

/// The peer has closed: EOF, or a reset because it hadn't read all.
pub(crate) fn assert_closed(stream: &mut UnixStream) {
    match stream.read(&mut [0]) {
        Ok(0) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => panic!("not closed: {other:?}"),
    }
}

pub(crate) fn assert_alive(vm: &Vm) {
    assert_eq!(vm.fate(), None);
    echo(vm, b"alive");
    assert_eq!(vm.fate(), None);
}

pub(crate) fn fate(vm: &Vm, rule: Rule) -> Fate {
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

pub(crate) fn free(vm: &Vm) {
    let all_free = vm.wait_for(LONG, |counters| counters.live_slots == 0);
    assert!(all_free, "{:?}", vm.counters());
}

/// Sends a pattern of `length` bytes that depends on `seed`; its checksum.
pub(crate) fn send_pattern(stream: &mut impl Write, seed: u64, length: usize) -> u64 {
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

pub(crate) fn checksum(sum: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(sum, |sum, &byte| {
        (sum.rotate_left(5) ^ u64::from(byte)).wrapping_mul(0x517c_c1b7_2722_0a95)
    })
}

pub(crate) fn receive(stream: &mut impl Read) -> (usize, u64) {
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

pub(crate) fn host_socket(vm: &Vm, port: u32) -> UnixListener {
    UnixListener::bind(vm.directory().join(socket_name(2, port))).unwrap()
}

pub(crate) fn accept(listener: &UnixListener) -> UnixStream {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

/// Whether a Unix socket tells that its peer closed with bytes unread, which is how a stand-in
/// knows of that. Linux' do; macOS' read an EOF.
pub(crate) fn tells_unread() -> bool {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.write_all(b"unread").unwrap();
    drop(theirs);
    let tells = ours.read(&mut [0]).is_err();
    if !tells {
        println!("skipped: this system doesn't tell of bytes left unread");
    }
    tells
}

/// A thousand connections have over two thousand ends; of a Mac's 256 descriptors there are too few
/// even for some tests side by side.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(8192).max(soft), hard).unwrap();
}
