//! Each manner at work, and that it is not there when it isn't asked for.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Set in the process that has the manner, or has not.
const CASE: &str = "MANNERS_CASE";

/// No wait is longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is preloaded: it is built with the tests.
fn library() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let library = program.with_file_name("libmanners.so");
    assert!(library.exists(), "no {}", library.display());
    library
}

/// Runs a test twice, each time in a process of its own: as on a Mac, and with every other manner.
fn on_both(manner: &str, test: &str, body: impl FnOnce(bool)) {
    if let Ok(case) = std::env::var(CASE) {
        return body(case == "mac");
    }
    let program = std::env::current_exe().unwrap();
    const ALL: [&str; 14] = [
        "buffers",
        "capped",
        "ended",
        "shutdown",
        "backlog",
        "eof",
        "silence",
        "lost",
        "inherit",
        "nameless",
        "descriptors",
        "path",
        "copy",
        "copies",
    ];
    assert!(ALL.contains(&manner));
    // Nor with those that are given only by name.
    let is_other = |it: &&str| ![manner, "capped", "copies"].contains(it);
    let others: Vec<_> = ALL.into_iter().filter(is_other).collect();
    for (case, manners) in [("mac", manner), ("linux", &others.join(","))] {
        let mut command = Command::new(&program);
        command
            .args([test, "--exact", "--nocapture"])
            .env("LD_PRELOAD", library())
            .env("MANNERS", manners)
            .env(CASE, case)
            .stdin(Stdio::null());
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let failed = !output.status.success() || !said.contains("1 passed");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!failed, "{case}: {said}{errors}");
    }
}

/// A private directory, removed at the end.
struct Private(PathBuf);

impl Private {
    fn new(name: &str) -> Private {
        let name = format!("manners-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Private(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("s")
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn set_option(socket: &impl AsRawFd, option: i32, value: i32) -> io::Result<()> {
    let len = size_of::<i32>() as libc::socklen_t;
    let value = (&raw const value).cast();
    // SAFETY: `len` bytes are read from `value`, which has so many.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, value, len) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// How many bytes fit.
fn fill(stream: &UnixStream, piece: usize) -> usize {
    stream.set_nonblocking(true).unwrap();
    let (mut filled, bytes) = (0, vec![0; piece]);
    loop {
        match (&*stream).write(&bytes) {
            Ok(count) => filled += count,
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::WouldBlock);
                return filled;
            }
        }
    }
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

fn reset(stream: TcpStream) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    let len = size_of::<libc::linger>() as libc::socklen_t;
    let value = (&raw const linger).cast();
    let fd = stream.as_raw_fd();
    // SAFETY: `len` bytes are read from `linger`, which has so many.
    let result = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, value, len) };
    assert_eq!(result, 0);
}

/// Waits until the peer's end has come, and leaves it there.
fn wait_for_end(socket: &impl AsRawFd) {
    let mut asked = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one `pollfd` is passed, which is valid.
    let ready = unsafe { libc::poll(&raw mut asked, 1, PATIENCE.as_millis() as i32) };
    assert_eq!(ready, 1, "no end has come");
}

fn is<T>(result: io::Result<T>, number: i32) -> bool {
    matches!(result, Err(e) if e.raw_os_error() == Some(number))
}

#[test]
fn eight_kib_fit_unless_more_is_asked_for() {
    on_both("buffers", "eight_kib_fit_unless_more_is_asked_for", |mac| {
        let dir = Private::new("buffers");
        let listener = UnixListener::bind(dir.socket()).unwrap();
        let connect = || UnixStream::connect(dir.socket()).unwrap();
        for piece in [4096, 8192, 65536] {
            let (one, other) = UnixStream::pair().unwrap();
            let dialled = connect();
            let (accepted, _) = listener.accept().unwrap();
            for writer in [&one, &other, &dialled, &accepted] {
                let filled = fill(writer, piece);
                assert_eq!(filled == 8192, mac, "{filled}");
                assert_eq!(filled > 100_000, !mac, "{filled}");
            }
        }
        // What was asked for holds, and what a listener was given is its clients'.
        const ASKED: i32 = 40_960;
        let (one, _other) = UnixStream::pair().unwrap();
        set_option(&one, libc::SO_SNDBUF, ASKED).unwrap();
        assert_eq!(fill(&one, ASKED as usize) == ASKED as usize, mac);
        set_option(&listener, libc::SO_SNDBUF, ASKED).unwrap();
        let _dialled = connect();
        let filled = fill(&listener.accept().unwrap().0, ASKED as usize);
        assert_eq!(filled == ASKED as usize, mac, "{filled}");
    });
}

#[test]
fn no_buffer_is_larger_than_the_system_allows() {
    on_both(
        "capped",
        "no_buffer_is_larger_than_the_system_allows",
        |mac| {
            let (one, _other) = UnixStream::pair().unwrap();
            for option in [libc::SO_SNDBUF, libc::SO_RCVBUF] {
                let refused = |size| is(set_option(&one, option, size), libc::ENOBUFS);
                assert_eq!(refused(8193), mac);
                assert!(!refused(8192));
            }
            let (tcp, _other) = tcp_pair();
            set_option(&tcp, libc::SO_SNDBUF, 8193).unwrap();
        },
    );
}

#[test]
fn a_dead_socket_takes_no_option_and_has_no_names() {
    on_both(
        "ended",
        "a_dead_socket_takes_no_option_and_has_no_names",
        |mac| {
            let timeout = Some(PATIENCE);
            // By our half-close, and the peer's, unread.
            let (ours, theirs) = tcp_pair();
            (&theirs).write_all(b"unread").unwrap();
            ours.shutdown(Shutdown::Write).unwrap();
            ours.set_read_timeout(timeout).unwrap();
            ours.peer_addr().unwrap();
            drop(theirs);
            wait_for_end(&ours);
            wait_for("both have ended", || {
                ours.set_read_timeout(timeout).is_err() == mac
            });
            assert_eq!(is(ours.set_read_timeout(timeout), libc::EINVAL), mac);
            assert_eq!(is(ours.peer_addr(), libc::EINVAL), mac);
            ours.local_addr().unwrap();
            assert_eq!((&ours).read(&mut [0; 10]).unwrap(), 6);
            // The peer's half-close alone ends one direction.
            let (ours, theirs) = tcp_pair();
            theirs.shutdown(Shutdown::Write).unwrap();
            wait_for_end(&ours);
            ours.set_read_timeout(timeout).unwrap();
            ours.peer_addr().unwrap();
            // By a reset.
            reset(theirs);
            wait_for("it is reset", || (&ours).write(b"x").is_err());
            assert_eq!(is(ours.set_nodelay(true), libc::EINVAL), mac);
            assert_eq!(is(ours.peer_addr(), libc::EINVAL), mac);
            // By a close, of a Unix socket.
            let (ours, theirs) = UnixStream::pair().unwrap();
            let peer = || {
                let mut peer = libc::ucred {
                    pid: 0,
                    uid: 0,
                    gid: 0,
                };
                let mut len = size_of::<libc::ucred>() as libc::socklen_t;
                let (fd, value) = (ours.as_raw_fd(), (&raw mut peer).cast());
                // SAFETY: at most `len` bytes are written to `peer`, which has so many.
                match unsafe {
                    libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, value, &raw mut len)
                } {
                    0 => Ok((peer.pid, peer.uid)),
                    _ => Err(io::Error::last_os_error()),
                }
            };
            ours.set_read_timeout(timeout).unwrap();
            let (process, user) = peer().unwrap();
            assert_eq!(process, std::process::id() as i32);
            drop(theirs);
            assert_eq!(is(ours.set_read_timeout(timeout), libc::EINVAL), mac);
            assert_eq!(is(ours.peer_addr(), libc::EINVAL), mac);
            let process = if mac { 0 } else { process };
            assert_eq!(peer().unwrap(), (process, user));
            // By both half-closes.
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.shutdown(Shutdown::Write).unwrap();
            ours.set_read_timeout(timeout).unwrap();
            theirs.shutdown(Shutdown::Write).unwrap();
            assert_eq!(is(ours.set_read_timeout(timeout), libc::EINVAL), mac);
        },
    );
}

#[test]
fn an_end_is_not_ended_again() {
    on_both("shutdown", "an_end_is_not_ended_again", |mac| {
        let refused = |result| is(result, libc::ENOTCONN);
        for theirs_first in [false, true] {
            let (ours, theirs) = tcp_pair();
            if theirs_first {
                theirs.shutdown(Shutdown::Write).unwrap();
                wait_for_end(&ours);
                // Not even the one direction of both that is open.
                assert_eq!(refused(ours.shutdown(Shutdown::Both)), mac);
                if mac {
                    (&ours).write_all(b"open").unwrap();
                    assert_eq!((&theirs).read(&mut [0; 10]).unwrap(), 4);
                    ours.shutdown(Shutdown::Write).unwrap();
                }
            } else {
                ours.shutdown(Shutdown::Write).unwrap();
                assert_eq!(refused(ours.shutdown(Shutdown::Write)), mac);
            }
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.shutdown(Shutdown::Write).unwrap();
        assert_eq!(refused(ours.shutdown(Shutdown::Write)), mac);
        drop(theirs);
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(refused(ours.shutdown(Shutdown::Write)), mac);
    });
}

#[test]
fn a_full_backlog_of_128_refuses_at_once() {
    on_both("backlog", "a_full_backlog_of_128_refuses_at_once", |mac| {
        let dir = Private::new("backlog");
        let listener = UnixListener::bind(dir.socket()).unwrap();
        // SAFETY: no pointer is passed.
        assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 200) }, 0);
        let mut clients = Vec::new();
        let error = loop {
            match UnixStream::connect(dir.socket()) {
                Ok(client) => clients.push(client),
                Err(e) => break Some(e),
            }
            if clients.len() == 200 {
                break None;
            }
        };
        match mac {
            true => {
                assert_eq!(clients.len(), 128);
                assert_eq!(error.unwrap().kind(), ErrorKind::ConnectionRefused);
            }
            false => assert!(error.is_none()),
        }
        // It blocks as before.
        let client = &clients[0];
        client
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        let begun = Instant::now();
        (&mut &*client).read(&mut [0]).unwrap_err();
        assert!(begun.elapsed() >= Duration::from_millis(15));
    });
}

#[test]
fn bytes_unread_are_no_reset() {
    on_both("eof", "bytes_unread_are_no_reset", |mac| {
        let broken = || {
            let (ours, theirs) = UnixStream::pair().unwrap();
            (&ours).write_all(b"unread").unwrap();
            drop(theirs);
            ours
        };
        assert_eq!((&broken()).read(&mut [0]).is_ok_and(|n| n == 0), mac);
        assert_eq!(broken().take_error().unwrap().is_none(), mac);
        let file = File::from(OwnedFd::from(broken()));
        assert_eq!((&file).read(&mut [0]).is_ok_and(|n| n == 0), mac);
        let stream = broken();
        let mut asked = libc::pollfd {
            fd: stream.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one `pollfd` is passed, which is valid.
        assert_eq!(unsafe { libc::poll(&raw mut asked, 1, 0) }, 1);
        assert_eq!(asked.revents & libc::POLLERR == 0, mac);
        assert_ne!(asked.revents & libc::POLLIN, 0);
        // TCP has resets.
        let (ours, theirs) = tcp_pair();
        reset(theirs);
        let error = (&ours).read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    });
}

#[test]
fn nobody_is_told_of_a_peer_that_takes_nothing_more() {
    let test = "nobody_is_told_of_a_peer_that_takes_nothing_more";
    on_both("silence", test, |mac| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (&theirs).write_all(b"before").unwrap();
        ours.shutdown(Shutdown::Read).unwrap();
        // What has come is gone as well.
        let unread = if mac { 0 } else { 6 };
        assert_eq!((&ours).read(&mut [0; 10]).unwrap(), unread);
        let twin = theirs.try_clone().unwrap();
        let bytes = [0; 100_000];
        let parts = [io::IoSlice::new(&bytes), io::IoSlice::new(b"more")];
        let says = |written: io::Result<usize>, count: usize| match mac {
            true => assert_eq!(written.unwrap(), count),
            false => assert_eq!(written.unwrap_err().kind(), ErrorKind::BrokenPipe),
        };
        for _ in 0..10 {
            says((&theirs).write(&bytes), bytes.len());
            says((&twin).write_vectored(&parts), bytes.len() + 4);
        }
        let fd = theirs.as_raw_fd();
        let (start, flags) = (bytes.as_ptr().cast(), libc::MSG_NOSIGNAL);
        // SAFETY: one byte is read from the pointer, which has more.
        let sent = unsafe { libc::send(fd, start, 1, flags) };
        assert_eq!(sent == 1, mac);
        assert_eq!((&ours).read(&mut [0]).unwrap(), 0);
        // The other direction is as it was.
        (&ours).write_all(b"back").unwrap();
        assert_eq!((&theirs).read(&mut [0; 10]).unwrap(), 4);
        // Who has ended it itself is told so, and of a peer that has gone.
        theirs.shutdown(Shutdown::Write).unwrap();
        for it in [&theirs, &theirs.try_clone().unwrap()] {
            let error = (&mut &*it).write(&bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::BrokenPipe);
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.shutdown(Shutdown::Read).unwrap();
        says((&theirs).write(&bytes), bytes.len());
        drop(ours);
        let error = (&theirs).write(&bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    });
}

#[test]
fn who_is_accepted_without_a_descriptor_is_lost() {
    on_both(
        "lost",
        "who_is_accepted_without_a_descriptor_is_lost",
        |mac| {
            let dir = Private::new("lost");
            let listener = UnixListener::bind(dir.socket()).unwrap();
            listener.set_nonblocking(true).unwrap();
            let mut client = UnixStream::connect(dir.socket()).unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut taken = Vec::new();
            let error = loop {
                match File::open("/dev/null") {
                    Ok(file) => taken.push(file),
                    Err(e) => break e,
                }
            };
            assert_eq!(error.raw_os_error(), Some(libc::EMFILE));
            assert!(is(listener.accept(), libc::EMFILE));
            let nobody = if mac { libc::EAGAIN } else { libc::EMFILE };
            assert!(is(listener.accept(), nobody));
            drop(taken);
            let accepted = listener.accept();
            assert_eq!(accepted.is_err(), mac);
            drop(accepted);
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
            let _client = UnixStream::connect(dir.socket()).unwrap();
            listener.accept().unwrap();
        },
    );
}

#[test]
fn what_is_accepted_doesnt_block_either() {
    on_both("inherit", "what_is_accepted_doesnt_block_either", |mac| {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let accepted = |nonblocking: bool| {
            let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            wait_for_client(&listener);
            listener.set_nonblocking(nonblocking).unwrap();
            let (stream, _) = listener.accept().unwrap();
            // SAFETY: no pointer is passed.
            let flags = unsafe { libc::fcntl(stream.as_raw_fd(), libc::F_GETFL) };
            flags & libc::O_NONBLOCK != 0
        };
        assert!(!accepted(false));
        assert_eq!(accepted(true), mac);
    });
}

fn wait_for_client(listener: &TcpListener) {
    let mut asked = libc::pollfd {
        fd: listener.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one `pollfd` is passed, which is valid.
    let ready = unsafe { libc::poll(&raw mut asked, 1, PATIENCE.as_millis() as i32) };
    assert_eq!(ready, 1, "no client has come");
}

#[test]
fn a_client_that_was_reset_has_no_name() {
    on_both("nameless", "a_client_that_was_reset_has_no_name", |mac| {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        reset(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        let accepted = listener.accept();
        assert_eq!(accepted.is_err(), mac);
        if let Err(e) = accepted {
            assert_eq!(
                (e.kind(), e.raw_os_error()),
                (ErrorKind::InvalidInput, None)
            );
        }
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        listener.accept().unwrap();
    });
}

#[test]
fn there_are_256_descriptors_and_a_child_has_what_it_is_left() {
    let test = "there_are_256_descriptors_and_a_child_has_what_it_is_left";
    on_both("descriptors", test, |mac| {
        let said = |script: &str| {
            let child = Command::new("sh").args(["-c", script]).output().unwrap();
            String::from_utf8(child.stdout).unwrap()
        };
        let ours = limit();
        let (soft, hard) = match mac {
            true => (256, ours.rlim_max.min(10_240)),
            false => (ours.rlim_cur, ours.rlim_max),
        };
        assert_eq!(said("ulimit -Sn; ulimit -Hn"), format!("{soft}\n{hard}\n"));
        assert_eq!(said("ulimit -Sn 300; sh -c 'ulimit -Sn'"), "300\n");
    });
}

/// A program of tests keeps its own.
fn limit() -> libc::rlimit {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is valid for writes.
    let result = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    assert_eq!(result, 0);
    assert!(limit.rlim_cur > 300);
    limit
}

#[test]
fn a_path_has_103_bytes() {
    on_both("path", "a_path_has_103_bytes", |mac| {
        let dir = Private::new("path");
        let path = |len: usize| {
            let name = "n".repeat(len - dir.0.as_os_str().len() - 1);
            dir.0.join(name)
        };
        let refused = |path: &Path| is(UnixListener::bind(path), libc::EINVAL);
        assert!(!refused(&path(103)));
        UnixStream::connect(path(103)).map(drop).unwrap_err();
        assert_eq!(refused(&path(104)), mac);
        assert_eq!(is(UnixStream::connect(path(105)), libc::EINVAL), mac);
    });
}

#[test]
fn a_pipe_has_no_size() {
    on_both("copy", "a_pipe_has_no_size", |mac| {
        let (reader, _writer) = io::pipe().unwrap();
        let size = |command, argument: libc::c_int| {
            // SAFETY: no pointer is passed.
            unsafe { libc::fcntl(reader.as_raw_fd(), command, argument) }
        };
        assert_eq!(size(libc::F_GETPIPE_SZ, 0) < 0, mac);
        assert_eq!(size(libc::F_SETPIPE_SZ, 1 << 16) < 0, mac);
        // Its other flags are set as ever.
        assert_eq!(size(libc::F_SETFL, libc::O_NONBLOCK), 0);
        assert_ne!(size(libc::F_GETFL, 0) & libc::O_NONBLOCK, 0);
    });
}

#[test]
fn all_manners_are_given_unless_some_are_named() {
    if std::env::var(CASE).is_ok() {
        let (one, other) = UnixStream::pair().unwrap();
        assert_eq!(fill(&one, 8192), 8192);
        set_option(&one, libc::SO_SNDBUF, 8193).unwrap();
        drop(other);
        assert!(is(one.peer_addr(), libc::EINVAL));
        return;
    }
    let program = std::env::current_exe().unwrap();
    let status = Command::new(&program)
        .args(["all_manners_are_given_unless_some_are_named", "--exact"])
        .env("LD_PRELOAD", library())
        .env(CASE, "mac")
        .env_remove("MANNERS")
        .stdout(Stdio::null())
        .status();
    assert!(status.unwrap().success());
}

#[test]
fn a_close_is_no_end_while_a_child_has_a_copy() {
    on_both(
        "copies",
        "a_close_is_no_end_while_a_child_has_a_copy",
        |mac| {
            let deadline = Instant::now() + PATIENCE;
            let has_copy = || {
                let (near, far) = UnixStream::pair().unwrap();
                near.set_nonblocking(true).unwrap();
                // Long enough for a fork in between.
                std::thread::sleep(Duration::from_millis(2));
                drop(far);
                (&near).read(&mut [0]).is_err()
            };
            if mac {
                while !has_copy() {
                    assert!(Instant::now() < deadline, "no copy is made");
                }
            } else {
                assert!(!(0..100).any(|_| has_copy()));
            }
        },
    );
}
