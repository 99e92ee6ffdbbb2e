//! Relay threads between streams of every family that this system can make pairs of, under the
//! relay's rules.

#![allow(clippy::unwrap_used)]

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::{RelayThreads, Reporter};
use crate::address::Address;
use crate::engine::connection::ThreadsResult;
use crate::engine::relay::{Ending, Side};
use crate::listener::Listener;
use crate::stream::Stream;

const PATIENCE: Duration = Duration::from_secs(20);

/// More than the buffers of two sockets hold.
const MUCH: usize = 32 << 20;

/// Returns the peer's end and the relay threads' end of one connection.
fn connection(listener: &Listener) -> (Stream, Stream) {
    let near = Stream::connect(listener.address()).unwrap();
    let (far, _) = listener.accept().unwrap();
    far.set_read_timeout(Some(PATIENCE)).unwrap();
    far.set_write_timeout(Some(PATIENCE)).unwrap();
    (far, near)
}

struct Noted {
    delivered: [AtomicU64; 2],
    drain: [Option<Duration>; 2],
    ended: Mutex<Sender<ThreadsResult>>,
}

impl Reporter for Arc<Noted> {
    fn count_delivered(&self, side: Side, bytes: u64) {
        self.delivered[side].fetch_add(bytes, Ordering::Relaxed);
    }

    fn drain_timeout(&self, side: Side) -> Option<Duration> {
        self.drain[side]
    }

    fn report_end(&self, result: ThreadsResult) {
        self.ended.lock().unwrap().send(result).unwrap();
    }
}

struct ThreadsEnded {
    client: Stream,
    server: Stream,
    threads: RelayThreads,
    noted: Arc<Noted>,
    ended: Receiver<ThreadsResult>,
}

impl ThreadsEnded {
    fn ended(&self) -> ThreadsResult {
        self.ended.recv_timeout(PATIENCE).unwrap()
    }

    /// Closes framed peers as they must: each says that it closes, once both directions have ended.
    fn close_framed(&self) {
        let framed = [&self.client, &self.server].map(|end| end.is_framed().then_some(end));
        thread::scope(|scope| {
            for end in framed.into_iter().flatten() {
                scope.spawn(|| end.finish(PATIENCE).unwrap());
            }
        });
    }

    fn delivered(&self, side: Side) -> u64 {
        self.noted.delivered[side].load(Ordering::Relaxed)
    }

    /// Waits until bytes of `side` have been delivered, and no more are.
    fn settle(&self, side: Side) {
        let end = Instant::now() + PATIENCE;
        let mut before = 0;
        while before == 0 || self.delivered(side) != before {
            assert!(Instant::now() < end, "bytes go through for ever, or none");
            before = self.delivered(side);
            thread::sleep(Duration::from_millis(100));
        }
    }
}

fn relay_on(address: &str, drain: [Option<Duration>; 2]) -> ThreadsEnded {
    relay_as(address, drain, |end| end)
}

/// Starts relay threads between two connections, whose four ends `make` converts.
fn relay_as(
    address: &str,
    drain: [Option<Duration>; 2],
    make: fn(Stream) -> Stream,
) -> ThreadsEnded {
    let address: Address = address.parse().unwrap();
    let listener = Listener::bind(&address).unwrap();
    let connection = || {
        let (far, near) = connection(&listener);
        (make(far), make(near))
    };
    let (client, near_client) = connection();
    let (server, near_server) = connection();
    relay_between([client, server], [near_client, near_server], drain)
}

/// Starts relay threads between two ends, whose peers are `far`.
fn relay_between(
    far: [Stream; 2],
    near: [Stream; 2],
    drain: [Option<Duration>; 2],
) -> ThreadsEnded {
    let [client, server] = far;
    let (tell, ended) = mpsc::channel();
    let noted = Arc::new(Noted {
        delivered: Default::default(),
        drain,
        ended: Mutex::new(tell),
    });
    let threads = RelayThreads::start(near, Arc::clone(&noted)).unwrap();
    ThreadsEnded {
        client,
        server,
        threads,
        noted,
        ended,
    }
}

const TCP: &str = "tcp://127.0.0.1:0";

fn on_threads() -> ThreadsEnded {
    relay_on(TCP, [None, None])
}

/// Converts an end to a framed one.
fn framed(end: Stream) -> Stream {
    let address = "vsock://3:1?framing=yes".parse().unwrap();
    #[cfg(unix)]
    let socket = std::os::fd::OwnedFd::from(end);
    #[cfg(windows)]
    let socket = std::os::windows::io::OwnedSocket::try_from(end).unwrap();
    Stream::from_socket(socket, address)
}

/// Runs `case` over every family, and in frames.
fn everywhere(case: impl Fn(ThreadsEnded)) {
    case(on_threads());
    case(relay_as(TCP, [None, None], framed));
    #[cfg(unix)]
    {
        let directory = tempfile::tempdir_in("/tmp").unwrap();
        let path = directory.path().join("s");
        case(relay_on(path.to_str().unwrap(), [None, None]));
    }
}

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(|| random.u8(..)).take(len).collect()
}

fn all_of(mut stream: &Stream) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).map(|_| all)
}

/// Reads to the end. Returns whether it was a reset, and how many bytes came before.
fn end_of(mut stream: &Stream) -> (bool, u64) {
    let mut sum = 0;
    let mut buffer = [0; 16 * 1024];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (false, sum),
            Ok(n) => sum += n as u64,
            Err(e) => {
                assert!(!crate::stream::is_timeout(&e), "nothing came");
                return (true, sum);
            }
        }
    }
}

/// Returns whether an error means a reset. A kernel reports a reset once, be it to a write.
fn is_reset(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ConnectionReset
}

/// Checks that the peer read a reset, and not an EOF. Wine turns a reset into an EOF.
fn assert_reset(was_reset: bool) {
    assert!(was_reset || cfg!(windows), "a clean EOF");
}

fn send_much(stream: &Stream) -> thread::JoinHandle<io::Result<()>> {
    let mut stream = stream.try_clone().unwrap();
    thread::spawn(move || stream.write_all(&vec![7; MUCH]))
}

#[test]
fn every_byte_and_both_ends_go_through() {
    everywhere(|it| {
        let sent = [pattern(3 << 20, 1), pattern(5 << 20, 2)];
        thread::scope(|scope| {
            for (mut stream, bytes) in [(&it.client, &sent[0]), (&it.server, &sent[1])] {
                scope.spawn(move || {
                    stream.write_all(bytes).unwrap();
                    stream.shutdown(Shutdown::Write).unwrap();
                });
            }
            let heard = scope.spawn(|| all_of(&it.client).unwrap());
            assert!(all_of(&it.server).unwrap() == sent[0]);
            assert!(heard.join().unwrap() == sent[1]);
        });
        it.close_framed();
        let ended = it.ended();
        assert_eq!(ended.delivered, [3 << 20, 5 << 20]);
        assert!(!ended.abandoned && matches!(ended.first, Some((_, Ending::Whole))));
        assert_eq!(it.delivered(Side::Client), 3 << 20);
    });
}

#[test]
fn a_half_close_of_either_side_leaves_the_answer_its_way() {
    for first in Side::BOTH {
        everywhere(|it| {
            let (mut asking, mut answering) = match first {
                Side::Client => (&it.client, &it.server),
                _ => (&it.server, &it.client),
            };
            asking.write_all(b"question").unwrap();
            asking.shutdown(Shutdown::Write).unwrap();
            assert_eq!(all_of(answering).unwrap(), b"question");
            assert!(it.ended.try_recv().is_err());
            answering.write_all(b"answer").unwrap();
            answering.shutdown(Shutdown::Write).unwrap();
            assert_eq!(all_of(asking).unwrap(), b"answer");
            it.close_framed();
            assert_eq!(it.ended().first, Some((first, Ending::Whole)));
        });
    }
}

#[test]
fn a_half_close_before_a_byte_is_passed_on() {
    everywhere(|it| {
        it.client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(all_of(&it.server).unwrap(), b"");
        it.server.shutdown(Shutdown::Write).unwrap();
        assert_eq!(all_of(&it.client).unwrap(), b"");
        it.close_framed();
        assert_eq!(it.ended(), ended_without_a_byte(Side::Client));
    });
}

fn ended_without_a_byte(first: Side) -> ThreadsResult {
    ThreadsResult {
        first: Some((first, Ending::Whole)),
        ..ThreadsResult::default()
    }
}

#[test]
fn a_broken_upload_is_no_clean_eof_and_wakes_the_thread_of_a_silent_server() {
    let mut it = on_threads();
    (&it.client).write_all(b"half of a").unwrap();
    let mut heard = [0; 9];
    it.server.read_exact(&mut heard).unwrap();
    it.client.abort();
    drop(it.client);
    assert_reset(end_of(&it.server).0);
    drop(it.server);
    let ended = it.ended.recv_timeout(PATIENCE).unwrap();
    assert_eq!(ended.first, Some((Side::Client, Ending::BrokenOff)));
}

/// In frames nothing is closed before the peer has said that it closes, too.
#[test]
fn a_peer_in_frames_is_waited_for() {
    let it = relay_as(TCP, [None, Some(PATIENCE)], framed);
    it.client.shutdown(Shutdown::Write).unwrap();
    it.server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(all_of(&it.client).unwrap(), b"");
    it.client.finish(PATIENCE).unwrap();
    let waited = it.ended.recv_timeout(Duration::from_millis(200));
    assert!(waited.is_err(), "{waited:?}");
    it.server.finish(PATIENCE).unwrap();
    let ended = it.ended();
    assert!(matches!(ended.first, Some((_, Ending::Whole))), "{ended:?}");
}

/// It may take the whole drain timeout, of which the other side's peer is to know nothing.
#[test]
fn a_peer_that_does_not_end_keeps_the_other_from_nothing() {
    let late = Some(3 * PATIENCE);
    let it = relay_as(TCP, [late, late], framed);
    it.client.shutdown(Shutdown::Write).unwrap();
    it.server.shutdown(Shutdown::Write).unwrap();
    it.server.finish(PATIENCE).unwrap();
    assert!(it.ended.try_recv().is_err());
    it.client.finish(PATIENCE).unwrap();
    assert!(!it.ended().abandoned);
}

/// A framed peer that closes without a frame has broken off, and so has its answer.
#[test]
fn an_end_without_a_frame_is_no_clean_eof() {
    let it = relay_as(TCP, [None, None], framed);
    (&it.server).write_all(b"half an ans").unwrap();
    drop(it.server);
    assert_eq!(end_of(&it.client), (true, 11));
    drop(it.client);
    it.ended.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn a_broken_answer_arrives_as_far_as_it_went_and_is_no_clean_eof() {
    let it = on_threads();
    (&it.server).write_all(b"half of an").unwrap();
    // A reset would overtake what is not on its way yet.
    it.settle(Side::Server);
    it.server.abort();
    drop(it.server);
    let (was_reset, bytes) = end_of(&it.client);
    assert_reset(was_reset);
    assert!(bytes == 10 || was_reset);
    drop(it.client);
    it.ended.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn a_server_that_closes_with_an_upload_on_its_way_breaks_it_off() {
    let it = on_threads();
    let sending = send_much(&it.client);
    it.settle(Side::Client);
    // With bytes unread, so that the close is a reset.
    drop(it.server);
    let error = sending.join().unwrap().unwrap_err();
    assert_reset(is_reset(&error) || end_of(&it.client).0);
    it.ended.recv_timeout(PATIENCE).unwrap();
}

/// Other systems don't tell what a peer has not acknowledged.
#[cfg(target_os = "linux")]
#[test]
fn what_a_client_was_given_arrives_before_the_reset() {
    let it = on_threads();
    let soon = Some(Duration::from_millis(300));
    it.server.set_write_timeout(soon).unwrap();
    (&it.server).write_all(&vec![7; MUCH]).unwrap_err();
    it.server.abort();
    drop(it.server);
    let mut bytes = 0;
    let mut buffer = [0; 64 * 1024];
    let was_reset = loop {
        // Slowly, so that bytes wait for room to the very end.
        thread::sleep(Duration::from_millis(1));
        match (&it.client).read(&mut buffer) {
            Ok(0) => break false,
            Ok(n) => bytes += n as u64,
            Err(e) => break is_reset(&e),
        }
    };
    assert!(was_reset, "a clean EOF");
    assert_eq!(
        bytes,
        it.noted.delivered[Side::Server].load(Ordering::Relaxed)
    );
}

#[test]
fn a_client_that_goes_on_sending_still_gets_its_whole_answer() {
    let it = on_threads();
    (&it.server).write_all(b"answer").unwrap();
    it.server.shutdown(Shutdown::Write).unwrap();
    it.settle(Side::Server);
    let sending = send_much(&it.client);
    it.settle(Side::Client);
    drop(it.server);
    sending.join().unwrap().unwrap();
    assert_eq!(end_of(&it.client), (false, 6));
    drop(it.client);
    it.ended.recv_timeout(PATIENCE).unwrap();
}

#[cfg(unix)]
#[test]
fn a_server_that_takes_no_more_may_still_answer() {
    let directory = tempfile::tempdir_in("/tmp").unwrap();
    let path = directory.path().join("s");
    let it = relay_on(path.to_str().unwrap(), [None, None]);
    it.server.shutdown(Shutdown::Read).unwrap();
    (&it.client).write_all(b"for nobody").unwrap();
    (&it.server).write_all(b"enough").unwrap();
    it.server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(all_of(&it.client).unwrap(), b"enough");
    it.client.shutdown(Shutdown::Write).unwrap();
    it.ended();
}

#[test]
fn a_client_that_does_not_read_holds_up_nothing_but_its_own_server() {
    everywhere(|it| {
        let sending = send_much(&it.server);
        it.settle(Side::Server);
        assert!(it.delivered(Side::Server) < MUCH as u64);
        (&it.client).write_all(b"still there").unwrap();
        let mut heard = [0; 11];
        (&it.server).read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"still there");
        it.client.shutdown(Shutdown::Write).unwrap();
        let all = thread::scope(|scope| {
            let reading = scope.spawn(|| end_of(&it.client));
            sending.join().unwrap().unwrap();
            it.server.shutdown(Shutdown::Write).unwrap();
            reading.join().unwrap()
        });
        assert_eq!(all, (false, MUCH as u64));
        it.close_framed();
        it.ended();
    });
}

fn cut(it: &ThreadsEnded) -> ThreadsResult {
    let end = Instant::now() + PATIENCE;
    loop {
        it.threads.cut();
        match it.ended.recv_timeout(Duration::from_millis(10)) {
            Ok(ended) => return ended,
            Err(_) => assert!(Instant::now() < end, "it doesn't end"),
        }
    }
}

#[test]
fn a_connection_that_is_cut_off_while_idle_is_reset() {
    everywhere(|it| {
        let tcp = matches!(it.client.address(), Address::Tcp(_));
        (&it.client).write_all(b"x").unwrap();
        (&it.server).read_exact(&mut [0]).unwrap();
        cut(&it);
        for stream in [&it.client, &it.server] {
            let (was_reset, _) = end_of(stream);
            assert!(!tcp || was_reset || cfg!(windows), "a clean EOF");
        }
    });
}

#[test]
fn a_connection_that_is_cut_off_while_nobody_reads_is_reset() {
    everywhere(|it| {
        let tcp = matches!(it.client.address(), Address::Tcp(_));
        let sending = [send_much(&it.client), send_much(&it.server)];
        it.settle(Side::Client);
        it.settle(Side::Server);
        cut(&it);
        for (sending, stream) in sending.into_iter().zip([&it.client, &it.server]) {
            // (macOS silently discards what is written to a Unix socket that was cut off.)
            let sent = sending.join().unwrap();
            let was_reset = sent.is_err_and(|e| is_reset(&e)) || end_of(stream).0;
            assert!(!tcp || was_reset || cfg!(windows), "a clean EOF");
        }
    });
}

#[test]
fn a_side_to_be_drained_is_read_to_its_end() {
    let it = relay_on(TCP, [None, Some(PATIENCE)]);
    it.client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(all_of(&it.server).unwrap(), b"");
    it.client.abort();
    drop(it.client);
    // The answer has no reader, and yet none of it comes back as an error.
    for _ in 0..50 {
        (&it.server).write_all(&[7; 16 * 1024]).unwrap();
        thread::sleep(Duration::from_millis(2));
    }
    assert!(it.ended.try_recv().is_err());
    it.server.shutdown(Shutdown::Write).unwrap();
    let ended = it.ended.recv_timeout(PATIENCE).unwrap();
    assert!(!ended.abandoned);
}

#[test]
fn a_side_that_does_not_end_in_time_is_abandoned() {
    let it = relay_on(TCP, [None, Some(Duration::from_millis(50))]);
    it.client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(all_of(&it.server).unwrap(), b"");
    it.client.abort();
    drop(it.client);
    let end = Instant::now() + PATIENCE;
    let ended = loop {
        // Until the threads have bytes for the client, they don't notice that it has gone.
        let _ = (&it.server).write_all(b"x");
        match it.ended.recv_timeout(Duration::from_millis(1)) {
            Ok(ended) => break ended,
            Err(_) => assert!(Instant::now() < end, "it doesn't end"),
        }
    };
    assert!(ended.abandoned);
}

/// A VMM dies of a close that leaves its bytes unread. The peer of a Unix socket reads such a close
/// as a reset.
#[cfg(target_os = "linux")]
#[test]
fn a_vmm_s_connection_is_never_closed_with_bytes_unread() {
    let break_off: [fn(&mut ThreadsEnded); 3] = [
        |it| assert!(cut(it).abandoned),
        |it| {
            it.client.interrupt(Shutdown::Both);
            it.ended();
        },
        |it| {
            it.client.abort();
            // The last handle of the connection closes it.
            it.client = it.server.try_clone().unwrap();
            it.ended();
        },
    ];
    for (case, break_off) in break_off.into_iter().enumerate() {
        let listener = Listener::bind(&TCP.parse().unwrap()).unwrap();
        let (client, near_client) = connection(&listener);
        let vmm = std::os::unix::net::UnixStream::pair().unwrap();
        let [vmm, near_server] = [vmm.0, vmm.1].map(|socket| {
            let socket = std::os::fd::OwnedFd::from(socket);
            Stream::from_socket(socket, "hyperkit://:80/nowhere".parse().unwrap())
        });
        vmm.set_read_timeout(Some(PATIENCE)).unwrap();
        let drain = [None, Some(Duration::from_millis(50))];
        let mut it = relay_between([client, vmm], [near_client, near_server], drain);
        // It sends for ever, to a client that reads nothing.
        let vmm = it.server.try_clone().unwrap();
        let sending = thread::spawn(move || io::copy(&mut io::repeat(7), &mut &vmm).unwrap_err());
        it.settle(Side::Server);
        break_off(&mut it);
        let error = sending.join().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe, "case {case}");
        assert_eq!(
            (&it.server).read_to_end(&mut Vec::new()).unwrap(),
            0,
            "case {case}"
        );
    }
}
