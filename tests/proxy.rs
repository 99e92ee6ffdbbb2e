//! The proxy in this process, in front of the stand-in VM with all its frailties on.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use common::*;
use hvsock::simulate::{Service, Vm};
use hvsock::{Listener, Proxy, Rule};

fn echo_vm(directory: &std::path::Path) -> Vm {
    Vm::builder(directory)
        .guest(7, Service::Echo)
        .strict(true)
        .start()
        .unwrap()
}

/// A TCP server, and the address that leads to it.
fn tcp_server() -> (TcpListener, hvsock::Address) {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = format!("tcp://{}", server.local_addr().unwrap());
    (server, target.parse().unwrap())
}

/// The VM lives and its device has no connection left.
fn assert_well(vm: &Vm) {
    assert!(
        vm.wait_for(PATIENCE, |counters| counters.live_slots == 0),
        "{:?}",
        vm.counters()
    );
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn bytes_and_half_closes_arrive_both_ways_over_tcp_and_unix() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let socket = dir.path().join("echo.sock");
    let rules = vec![
        Rule::new(any_tcp(), hyperkit(dir.path(), 7)),
        Rule::new(unix(&socket), hyperkit(dir.path(), 7)),
    ];
    let proxy = Proxy::start(config(rules)).unwrap();
    for len in [0, 1, 17, 65_536, 3_000_000] {
        let bytes = pattern(len);
        let (tcp, unix) = (tcp(port_of(&proxy, 0)), unix_client(&socket));
        let bytes = bytes.as_slice();
        std::thread::scope(|scope| {
            let over_tcp = scope.spawn(move || duplex(tcp, bytes));
            let over_unix = scope.spawn(move || duplex(unix, bytes));
            assert!(over_tcp.join().unwrap().unwrap() == bytes, "{len}, TCP");
            assert!(over_unix.join().unwrap().unwrap() == bytes, "{len}, Unix");
        });
    }
    assert_well(&vm);
}

/// Writes on a thread of its own, half-closes, and reads to EOF meanwhile.
fn duplex<C: Client + TryClone>(mut client: C, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut writer = client.try_clone_client()?;
    std::thread::scope(|scope| {
        let writing = scope.spawn(move || {
            writer.write_all(bytes)?;
            writer.half_close();
            Ok(())
        });
        let mut answer = Vec::new();
        client.read_to_end(&mut answer)?;
        writing.join().unwrap().map(|()| answer)
    })
}

trait TryClone: Sized {
    fn try_clone_client(&self) -> io::Result<Self>;
}

impl TryClone for std::net::TcpStream {
    fn try_clone_client(&self) -> io::Result<Self> {
        self.try_clone()
    }
}

impl TryClone for std::os::unix::net::UnixStream {
    fn try_clone_client(&self) -> io::Result<Self> {
        self.try_clone()
    }
}

#[test]
fn a_guest_that_ends_first_can_still_be_sent_to() {
    let dir = private_dir();
    let (sent, got) = std::sync::mpsc::channel();
    let service = Service::custom(move |mut guest| {
        guest.write_all(b"welcome").unwrap();
        guest.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        guest.read_to_end(&mut rest).unwrap();
        sent.send(rest).unwrap();
    });
    let vm = Vm::builder(dir.path()).guest(1, service).start().unwrap();
    let proxy = proxy(any_tcp(), hyperkit(dir.path(), 1));
    let mut client = tcp(port_of(&proxy, 0));
    let mut welcome = String::new();
    client.read_to_string(&mut welcome).unwrap();
    assert_eq!(welcome, "welcome");
    let bytes = pattern(1_000_000);
    client.write_all(&bytes).unwrap();
    client.half_close();
    assert!(got.recv_timeout(PATIENCE).unwrap() == bytes);
    assert_well(&vm);
}

#[test]
fn a_refusal_is_a_reset_with_and_without_data_and_half_close() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let proxy = proxy(any_tcp(), hyperkit(dir.path(), 99));
    let mut tries = 0;
    for sends in [false, true] {
        for half_closes in [false, true] {
            let mut is_refused = || {
                tries += 1;
                let begun = Instant::now();
                // The reset may come before any of these.
                let client = std::net::TcpStream::connect(("127.0.0.1", port_of(&proxy, 0)));
                let end = client.and_then(|mut client| {
                    let _ = client.set_read_timeout(Some(PATIENCE));
                    if sends {
                        client.write_all(b"request")?;
                    }
                    if half_closes {
                        let _ = client.shutdown(std::net::Shutdown::Write);
                    }
                    client.read(&mut [0; 16])
                });
                // Where the machine stalls longer than a half-close is held back, an EOF may be the
                // answer to that.
                let late = half_closes && begun.elapsed() >= Duration::from_millis(10);
                let refused = is_reset(end);
                assert!(
                    refused || late,
                    "sends: {sends}, half-closes: {half_closes}"
                );
                refused
            };
            assert!((0..50).any(|_| is_refused()), "never a reset");
        }
    }
    eventually("each is counted, be it late", || {
        (4..=tries).contains(&proxy.forwards()[0].counters.refused)
    });
    assert_well(&vm);
}

#[test]
fn an_empty_answer_is_no_refusal() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path())
        .guest(9, Service::Discard)
        .start()
        .unwrap();
    let proxy = proxy(any_tcp(), hyperkit(dir.path(), 9));
    for len in [0, 5, 3_000_000] {
        let answer = ask(tcp(port_of(&proxy, 0)), &pattern(len)).unwrap();
        assert_eq!(answer, b"", "{len}");
    }
    assert_eq!(proxy.forwards()[0].counters.refused, 0);
    assert_well(&vm);
}

// Where a Unix socket that is closed with bytes unread shows as an EOF, that can't be told from a
// refusal. (So it is where Linux is given the manners of macOS, which is built with that switch.)
#[cfg(all(target_os = "linux", not(mio_unsupported_force_poll_poll)))]
#[test]
fn a_guest_that_reads_and_closes_at_once_without_a_byte_has_taken_the_connection() {
    let dir = private_dir();
    let reads = Service::custom(|mut stream| {
        let mut request = [0; 100];
        stream.read_exact(&mut request).unwrap();
    });
    let vm = Vm::builder(dir.path()).guest(9, reads);
    let _vm = vm.start().unwrap();
    let proxy = proxy(any_tcp(), hyperkit(dir.path(), 9));
    for _ in 0..50 {
        let answer = ask(tcp(port_of(&proxy, 0)), &[7; 100]);
        assert_eq!(answer.unwrap(), b"");
    }
    assert_eq!(proxy.forwards()[0].counters.refused, 0);
}

#[test]
fn a_vm_that_is_down_refuses_and_comes_back_by_itself() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let proxy = proxy(any_tcp(), hyperkit(dir.path(), 7));
    let port = port_of(&proxy, 0);
    assert_eq!(ask(tcp(port), b"one").unwrap(), b"one");
    for round in 0..3 {
        if round == 2 {
            // As a machine that was made anew: another directory of the same name.
            std::fs::remove_dir_all(dir.path()).unwrap();
            std::fs::create_dir(dir.path()).unwrap();
        } else {
            assert!(vm.fate().is_none());
        }
        let down = Vm::builder(dir.path()).start().unwrap();
        down.stop();
        assert!(resets_clients(port), "round {round}");
        let vm = echo_vm(dir.path());
        assert_eq!(ask(tcp(port), b"again").unwrap(), b"again");
        assert_well(&vm);
    }
}

#[test]
fn guests_reach_the_host_and_its_socket_is_made_again() {
    let dir = private_dir();
    let (server, target) = tcp_server();
    std::thread::spawn(move || {
        for stream in server.incoming() {
            let mut stream = stream.unwrap();
            let mut request = Vec::new();
            stream.read_to_end(&mut request).unwrap();
            stream.write_all(&request).unwrap();
        }
    });
    let vm = Vm::builder(dir.path()).start().unwrap();
    let proxy = proxy(hyperkit(dir.path(), 5000), target);
    let file = dir.path().join("00000002.00001388");
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let ask_host = |vm: &Vm| ask(vm.dial(5000).unwrap(), b"from the guest").unwrap();
    assert_eq!(ask_host(&vm), b"from the guest");
    assert_well(&vm);
    drop(vm);

    std::fs::remove_file(&file).unwrap();
    let vm = Vm::builder(dir.path()).start().unwrap();
    assert!(vm.wait_for_listener(5000, PATIENCE));
    assert_eq!(ask_host(&vm), b"from the guest");
    assert_well(&vm);
    proxy.stop(PATIENCE);
    proxy.wait().unwrap();
    assert!(!file.exists());
}

#[test]
fn a_guest_whose_target_is_gone_is_ended_politely() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path()).start().unwrap();
    let proxy = proxy(
        hyperkit(dir.path(), 5000),
        unix(dir.path().join("nobody.sock")),
    );
    for len in [0, 100_000] {
        let mut guest = vm.dial(5000).unwrap();
        guest.set_read_timeout(Some(PATIENCE)).unwrap();
        guest.write_all(&pattern(len)).unwrap();
        assert_eq!(guest.read_to_end(&mut Vec::new()).unwrap(), 0);
    }
    assert_well(&vm);
    assert_eq!(proxy.forwards()[0].counters.refused, 2);
}

#[test]
fn a_client_that_says_nothing_disturbs_nobody() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let proxy = proxy(any_tcp(), hyperkit(dir.path(), 7));
    let silent: Vec<_> = (0..20).map(|_| tcp(port_of(&proxy, 0))).collect();
    for _ in 0..20 {
        assert_eq!(ask(tcp(port_of(&proxy, 0)), b"heard").unwrap(), b"heard");
    }
    for client in silent {
        assert_eq!(ask(client, b"at last").unwrap(), b"at last");
    }
    assert_well(&vm);
}

#[test]
fn a_guest_that_answers_nothing_is_not_dialled_to_death() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let mut config = config(vec![Rule::new(any_tcp(), hyperkit(dir.path(), 7))]);
    config.limits.vm_unanswered = 40;
    let proxy = Proxy::start(config).unwrap();
    vm.pause();
    let clients: Vec<_> = (0..600).map(|_| tcp(port_of(&proxy, 0))).collect();
    // The cap, and the one probe.
    assert!(
        vm.wait_for(PATIENCE, |counters| counters.unanswered == 41),
        "{:?}",
        vm.counters()
    );
    eventually("all are accepted", || {
        proxy.forwards()[0].counters.accepted == 600
    });
    assert_eq!(vm.counters().unanswered, 41);
    vm.resume();
    for client in clients {
        assert_eq!(ask(client, b"awake").unwrap(), b"awake");
    }
    assert_well(&vm);
}

#[test]
fn a_device_that_stands_still_is_no_reason_to_forget_what_the_guest_has_not_answered() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path())
        .guest(7, Service::Echo)
        .backlog(4)
        .start()
        .unwrap();
    let greeter = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = format!("tcp://{}", greeter.local_addr().unwrap());
    std::thread::spawn(move || greeter.accept().unwrap().0.write_all(b"x").unwrap());
    let mut config = config(vec![
        Rule::new(any_tcp(), hyperkit(dir.path(), 7)),
        Rule::new(any_tcp(), at.parse().unwrap()),
    ]);
    config.limits.vm_unanswered = 10;
    config.workers = Some(1.try_into().unwrap());
    let proxy = Proxy::start(config).unwrap();
    vm.pause();
    // As whenever a client is slow with its line. Meanwhile the backlog fills up.
    let silent = unix_client(&dir.path().join("connect"));
    assert!(vm.wait_for(PATIENCE, |counters| counters.stalls > 0));
    let clients: Vec<_> = (0..600).map(|_| tcp(port_of(&proxy, 0))).collect();
    eventually("all are accepted", || {
        proxy.forwards()[0].counters.accepted == 600
    });
    // Time for what must not happen: many rounds of dials that meet the full backlog.
    std::thread::sleep(Duration::from_millis(200));
    // Nor is it one to stand still oneself: the device does so still.
    let mut other = tcp(port_of(&proxy, 1));
    other.read_exact(&mut [0]).unwrap();
    drop(silent);
    assert!(vm.wait_for(PATIENCE, |counters| counters.unanswered >= 10));
    // And time for the dials that must not come.
    std::thread::sleep(Duration::from_millis(500));
    let counters = vm.counters();
    assert!(counters.unanswered <= 11, "{counters:?}");
    vm.resume();
    for client in clients {
        assert_eq!(ask(client, b"awake").unwrap(), b"awake");
    }
    assert_well(&vm);
}

/// That many clients at once, of whom few can be served at a time.
fn serve_all(proxy: &Proxy, count: usize) {
    let mut clients: Vec<_> = (0..count).map(|_| tcp(port_of(proxy, 0))).collect();
    for client in &mut clients {
        client.write_all(b"in turn").unwrap();
        client.half_close();
    }
    for mut client in clients {
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, b"in turn");
    }
}

#[test]
fn services_that_wait_for_their_client_to_speak_lock_nobody_out() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let mut config = config(vec![Rule::new(any_tcp(), hyperkit(dir.path(), 7))]);
    config.limits.vm_unanswered = 5;
    let proxy = Proxy::start(config).unwrap();
    let silent: Vec<_> = (0..100).map(|_| tcp(port_of(&proxy, 0))).collect();
    assert_eq!(
        ask(tcp(port_of(&proxy, 0)), b"the last").unwrap(),
        b"the last"
    );
    drop(silent);
    assert_well(&vm);
}

#[test]
fn more_clients_than_the_vm_may_have_wait() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let mut config = config(vec![Rule::new(any_tcp(), hyperkit(dir.path(), 7))]);
    config.limits.vm_connections = 10;
    let proxy = Proxy::start(config).unwrap();
    serve_all(&proxy, 100);
    assert!(vm.counters().peak_slots <= 10, "{:?}", vm.counters());
    assert_well(&vm);
}

#[test]
fn a_vm_has_its_limits_once_however_it_is_spelled() {
    let dir = private_dir();
    let (state, link) = (dir.path().join("vm"), dir.path().join("link"));
    let vm = echo_vm(&state);
    std::os::unix::fs::symlink(&state, &link).unwrap();
    let mut config = config(vec![
        Rule::new(any_tcp(), hyperkit(&state, 7)),
        Rule::new(any_tcp(), hyperkit(&link, 7)),
    ]);
    config.limits.vm_connections = 10;
    let proxy = Proxy::start(config).unwrap();
    std::thread::scope(|scope| {
        for i in 0..40 {
            let client = tcp(port_of(&proxy, i % 2));
            scope.spawn(|| assert_eq!(ask(client, b"in turn").unwrap(), b"in turn"));
        }
    });
    assert!(vm.counters().peak_slots <= 10, "{:?}", vm.counters());
    assert_well(&vm);
}

#[test]
fn who_waits_too_long_for_the_vm_is_told() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let mut config = config(vec![Rule::new(any_tcp(), hyperkit(dir.path(), 7))]);
    config.limits.vm_unanswered = 1;
    config.rules[0].timeouts.dial = Duration::from_millis(100);
    let proxy = Proxy::start(config).unwrap();
    vm.pause();
    let mut first = tcp(port_of(&proxy, 0));
    first.write_all(b"x").unwrap();
    // Another worker may accept the second one before it.
    let unanswered = || Some(proxy.forwards()[0].vm.as_ref()?.unanswered);
    eventually("the first one is dialled", || unanswered() == Some(1));
    assert!(resets_clients(port_of(&proxy, 0)));
    let forward = &proxy.forwards()[0];
    assert_eq!(forward.counters.refusals.dial_timeout, 1);
    let told = &forward.last_error.as_ref().unwrap().text;
    assert!(told.contains("has not answered 1 dial ("), "{told}");
    vm.resume();
    first.read_exact(&mut [0]).unwrap();
    drop(first);
    assert_well(&vm);
}

#[test]
fn guest_forward_sockets_serve_where_there_is_no_connect_socket() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path())
        .guest(7, Service::Echo)
        .guest_forwards(&[7])
        .start()
        .unwrap();
    std::fs::remove_file(dir.path().join("connect")).unwrap();
    let proxy = proxy(any_tcp(), hyperkit(dir.path(), 7));
    for _ in 0..50 {
        assert_eq!(
            ask(tcp(port_of(&proxy, 0)), b"forwarded").unwrap(),
            b"forwarded"
        );
    }
    assert_well(&vm);
}

#[test]
fn builds_of_hyperkit_with_other_names_are_served_both_ways() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path())
        .connect_name("@connect")
        .prefix("@")
        .guest(7, Service::Echo)
        .start()
        .unwrap();
    let state = dir.path().to_str().unwrap();
    let at = |port| format!("hyperkit://:{port}{state}?connect=@connect&prefix=@");
    let rules = vec![
        Rule::new(any_tcp(), at(7).parse().unwrap()),
        Rule::new(
            at(5000).parse().unwrap(),
            unix(dir.path().join("host.sock")),
        ),
    ];
    let host = UnixListener::bind(dir.path().join("host.sock")).unwrap();
    let proxy = Proxy::start(config(rules)).unwrap();
    assert_eq!(ask(tcp(port_of(&proxy, 0)), b"old").unwrap(), b"old");
    let mut guest = vm.dial(5000).unwrap();
    guest.write_all(b"hello").unwrap();
    let mut hello = [0; 5];
    host.accept().unwrap().0.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");
    drop(guest);
    assert_well(&vm);
}

#[test]
fn paths_longer_than_a_socket_address_work_on_every_side() {
    let dir = private_dir();
    let long = dir.path().join("d".repeat(100)).join("e".repeat(100));
    std::fs::create_dir_all(&long).unwrap();
    // hyperkit itself was given a short path to the same directory.
    let short = dir.path().join("vm");
    std::os::unix::fs::symlink(&long, &short).unwrap();
    let vm = echo_vm(&short);
    let rules = vec![
        Rule::new(unix(long.join("echo.sock")), hyperkit(&long, 7)),
        Rule::new(hyperkit(&long, 5000), unix(long.join("echo.sock"))),
    ];
    let proxy = Proxy::start(config(rules)).unwrap();
    assert_eq!(
        ask(unix_client(&short.join("echo.sock")), b"deep").unwrap(),
        b"deep"
    );
    assert_eq!(ask(vm.dial(5000).unwrap(), b"deeper").unwrap(), b"deeper");
    drop(proxy);
    assert!(!long.join("echo.sock").exists());
    let names = Rule::new(unix(long.join("n".repeat(200))), hyperkit(&long, 7));
    let error = Proxy::start(config(vec![names])).unwrap_err().to_string();
    assert!(
        error.contains("200 bytes") && error.contains("shorter name"),
        "{error}"
    );
    assert_well(&vm);
}

#[test]
fn a_unix_socket_is_its_owners_and_only_a_stale_one_is_replaced() {
    let dir = private_dir();
    let server = unix(dir.path().join("server.sock"));
    let path = dir.path().join("listen.sock");
    let start = |mode| {
        let mut rule = Rule::new(unix(&path), server.clone());
        rule.mode = mode;
        Proxy::start(config(vec![rule]))
    };
    // A leftover of somebody who died.
    drop(UnixListener::bind(&path).unwrap());
    let first = start(0o600).unwrap();
    let metadata = path.symlink_metadata().unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);

    let error = start(0o600).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    assert!(error.to_string().contains("listen.sock"), "{error}");
    assert_eq!(path.symlink_metadata().unwrap().ino(), metadata.ino());

    // Somebody else's by now: not ours to remove.
    std::fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    drop(first);
    assert!(path.exists());
    drop(other);

    let open = start(0o666).unwrap();
    assert_eq!(
        path.symlink_metadata().unwrap().permissions().mode() & 0o777,
        0o666
    );
    drop(open);
    assert!(!path.exists());

    std::fs::write(&path, "precious").unwrap();
    let error = start(0o600).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_unix_socket_whose_file_is_removed_is_made_again() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let path = dir.path().join("echo.sock");
    let proxy = proxy(unix(&path), hyperkit(dir.path(), 7));
    std::fs::remove_file(&path).unwrap();
    eventually("it is back", || path.exists());
    assert_eq!(ask(unix_client(&path), b"back").unwrap(), b"back");
    // Touched, it is ours all the same.
    let touched = std::process::Command::new("touch").arg(&path).status();
    assert!(touched.unwrap().success());
    drop(proxy);
    assert!(!path.exists());
    assert_well(&vm);
}

#[test]
fn names_are_resolved_and_unknown_ones_refused() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let inner = proxy(
        "tcp://localhost:0".parse().unwrap(),
        hyperkit(dir.path(), 7),
    );
    let target = format!("tcp://localhost:{}", port_of(&inner, 0));
    let outer = proxy(any_tcp(), target.parse().unwrap());
    assert_eq!(
        ask(tcp(port_of(&outer, 0)), b"by name").unwrap(),
        b"by name"
    );
    let lost = proxy(any_tcp(), "tcp://no-such-host.invalid:1".parse().unwrap());
    assert!(resets_clients(port_of(&lost, 0)));
    drop(outer);
    drop(inner);
    assert_well(&vm);
}

#[test]
fn a_tcp_target_that_refuses_resets_its_client() {
    let unused = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = format!("tcp://{}", unused.local_addr().unwrap());
    drop(unused);
    let proxy = proxy(any_tcp(), target.parse().unwrap());
    assert!(resets_clients(port_of(&proxy, 0)));
}

#[test]
fn a_server_that_breaks_off_is_no_clean_end() {
    let (server, target) = tcp_server();
    let proxy = proxy(any_tcp(), target);
    let mut client = tcp(port_of(&proxy, 0));
    client.write_all(b"request").unwrap();
    let (mut accepted, _) = server.accept().unwrap();
    accepted.read_exact(&mut [0; 7]).unwrap();
    accepted.write_all(b"half an ans").unwrap();
    client.read_exact(&mut [0; 11]).unwrap();
    socket2::SockRef::from(&accepted)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(accepted);
    assert!(is_reset(client.read(&mut [0; 16])));
}

#[test]
fn a_client_that_breaks_off_is_no_clean_end_for_a_server() {
    let (server, target) = tcp_server();
    let proxy = proxy(any_tcp(), target);
    let mut client = tcp(port_of(&proxy, 0));
    client.write_all(b"half a requ").unwrap();
    let (mut accepted, _) = server.accept().unwrap();
    accepted.set_read_timeout(Some(PATIENCE)).unwrap();
    accepted.read_exact(&mut [0; 11]).unwrap();
    socket2::SockRef::from(&client)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(client);
    assert!(is_reset(accepted.read(&mut [0; 16])));
}

#[test]
fn an_answer_survives_a_server_that_did_not_read_the_request() {
    let dir = private_dir();
    let path = dir.path().join("server.sock");
    let server = UnixListener::bind(&path).unwrap();
    let proxy = proxy(any_tcp(), unix(&path));
    let answer = pattern(2_000_000);
    let expected = answer.clone();
    std::thread::spawn(move || {
        let (mut accepted, _) = server.accept().unwrap();
        accepted.write_all(&answer).unwrap();
        // Closes with the request unread: the proxy's next write fails, what was sent must arrive.
    });
    let mut client = tcp(port_of(&proxy, 0));
    let mut writer = client.try_clone().unwrap();
    let upload = std::thread::spawn(move || {
        let chunk = pattern(10_000);
        // Until it fails, or is enough: the client insists on sending.
        for _ in 0..500 {
            if writer.write_all(&chunk).is_err() {
                return;
            }
        }
    });
    let mut got = Vec::new();
    let mut buffer = vec![0; 65_536];
    // The connection may end by a reset (the upload did break off), but not before the answer.
    while let Ok(n @ 1..) = client.read(&mut buffer) {
        got.extend_from_slice(&buffer[..n]);
    }
    assert!(got == expected, "{} of {} bytes", got.len(), expected.len());
    upload.join().unwrap();
}

#[test]
fn a_stop_lets_live_connections_finish_and_takes_no_new_ones() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let path = dir.path().join("echo.sock");
    let rules = vec![
        Rule::new(any_tcp(), hyperkit(dir.path(), 7)),
        Rule::new(unix(&path), hyperkit(dir.path(), 7)),
    ];
    let proxy = Proxy::start(config(rules)).unwrap();
    let port = port_of(&proxy, 0);
    let mut client = tcp(port);
    client.write_all(b"before").unwrap();
    client.read_exact(&mut [0; 6]).unwrap();
    proxy.stop(PATIENCE);
    eventually("no listener", || {
        std::net::TcpStream::connect(("127.0.0.1", port)).is_err()
    });
    eventually("no socket file", || !path.exists());
    client.write_all(b"after").unwrap();
    let mut after = [0; 5];
    client.read_exact(&mut after).unwrap();
    assert_eq!(&after, b"after");
    drop(client);
    proxy.wait().unwrap();
    assert_well(&vm);
}

#[test]
fn a_stop_cuts_off_after_the_grace_and_hurts_no_vm() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path())
        .guest(19, Service::Chargen)
        .guest(20, Service::Silent)
        .strict(true)
        .start()
        .unwrap();
    let rules = [19, 20].map(|port| Rule::new(any_tcp(), hyperkit(dir.path(), port)));
    let proxy = Proxy::start(config(rules.into())).unwrap();
    let mut clients: Vec<_> = (0..10).map(|i| tcp(port_of(&proxy, i % 2))).collect();
    for client in clients.iter_mut().step_by(2) {
        client.read_exact(&mut [0; 100_000]).unwrap();
    }
    proxy.stop(Duration::ZERO);
    proxy.wait().unwrap();
    for client in &mut clients {
        let mut buffer = vec![0; 65_536];
        let end = loop {
            match client.read(&mut buffer) {
                Ok(0) => break Ok(()),
                Ok(_) => {}
                Err(e) => break Err(e.kind()),
            }
        };
        assert_eq!(end, Err(io::ErrorKind::ConnectionReset));
    }
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn a_guest_that_ignores_the_end_is_given_up_in_time() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path())
        .guest(20, Service::Silent)
        .start()
        .unwrap();
    let mut config = config(vec![Rule::new(any_tcp(), hyperkit(dir.path(), 20))]);
    config.rules[0].timeouts.drain = Duration::from_millis(200);
    let proxy = Proxy::start(config).unwrap();
    let mut client = tcp(port_of(&proxy, 0));
    client.write_all(b"hello?").unwrap();
    assert!(vm.wait_for(PATIENCE, |counters| counters.answered == 1));
    socket2::SockRef::from(&client)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(client);
    eventually("it is closed", || proxy.forwards()[0].counters.live == 0);
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn a_limit_of_connections_makes_clients_wait_and_no_listener_end() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let mut config = config(vec![Rule::new(any_tcp(), hyperkit(dir.path(), 7))]);
    config.limits.connections = 3;
    let proxy = Proxy::start(config).unwrap();
    serve_all(&proxy, 50);
    assert_well(&vm);
}

#[test]
fn a_client_that_is_gone_holds_no_place_at_a_server_that_does_not_read() {
    let (server, target) = tcp_server();
    let mut config = config(vec![Rule::new(any_tcp(), target)]);
    config.rules[0].timeouts.drain = Duration::from_millis(200);
    let proxy = Proxy::start(config).unwrap();
    let mut client = tcp(port_of(&proxy, 0));
    let (_accepted, _) = server.accept().unwrap();
    client.set_nonblocking(true).unwrap();
    let chunk = pattern(1_000_000);
    // Until nothing more fits in between: the proxy holds bytes that it can't deliver.
    let mut full = 0;
    eventually("nothing more fits", || {
        match client.write(&chunk) {
            Ok(_) => full = 0,
            Err(_) => full += 1,
        }
        full == 20
    });
    socket2::SockRef::from(&client)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(client);
    eventually("its place is free", || {
        proxy.forwards()[0].counters.live == 0
    });
}

#[test]
fn a_client_that_half_closed_and_is_gone_is_not_kept_for_as_long_as_a_guest_would_be() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path())
        .guest(
            1,
            Service::custom(|mut stream| {
                let _ = stream.read_to_end(&mut Vec::new());
                let _ = stream.write_all(&pattern(16_000_000));
            }),
        )
        .start()
        .unwrap();
    let proxy = proxy(any_tcp(), hyperkit(dir.path(), 1));
    let mut client = tcp(port_of(&proxy, 0));
    client.half_close();
    client.read_exact(&mut [0; 1000]).unwrap();
    // Data unread: its kernel resets the connection, and the proxy has read its EOF before.
    drop(client);
    eventually("nothing is left of it", || {
        proxy.forwards()[0].counters.live == 0
    });
    assert_well(&vm);
}

#[test]
fn guests_that_go_on_dialling_do_not_keep_a_proxy_from_its_end() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path()).lenient(true).start().unwrap();
    let proxy = proxy(hyperkit(dir.path(), 5000), unix(dir.path().join("nobody")));
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut guests = std::collections::VecDeque::new();
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                // They don't read, and so don't end either.
                guests.extend(vm.dial(5000));
                guests.drain(..guests.len().saturating_sub(100));
            }
        });
        eventually("guests dial", || {
            proxy.forwards()[0].counters.accepted > 200
        });
        proxy.stop(Duration::ZERO);
        proxy.wait().unwrap();
        over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn what_follows_urgent_data_is_not_kept_back() {
    let (server, target) = tcp_server();
    let proxy = proxy(any_tcp(), target);
    for _ in 0..20 {
        let mut client = tcp(port_of(&proxy, 0));
        let (mut accepted, _) = server.accept().unwrap();
        accepted.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(b"abc").unwrap();
        socket2::SockRef::from(&client)
            .send_out_of_band(b"!")
            .unwrap();
        client.write_all(b"def").unwrap();
        let mut got = [0; 6];
        accepted.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"abcdef");
    }
}

/// As much as goes through a pipe, where there is one.
#[test]
fn urgent_data_amid_much_else_keeps_nothing_back() {
    const MUCH: usize = 1 << 20;
    let (server, target) = tcp_server();
    let proxy = proxy(any_tcp(), target);
    for _ in 0..5 {
        let mut client = tcp(port_of(&proxy, 0));
        let (mut accepted, _) = server.accept().unwrap();
        accepted.set_read_timeout(Some(PATIENCE)).unwrap();
        let sending = std::thread::spawn(move || {
            for piece in 0..4 {
                client.write_all(&[piece; MUCH]).unwrap();
                // Once: the byte of an older one is as any other when the next has come.
                if piece == 1 {
                    let socket = socket2::SockRef::from(&client);
                    socket.send_out_of_band(b"!").unwrap();
                }
            }
            client
        });
        for piece in 0..4 {
            let mut got = vec![0; MUCH];
            accepted.read_exact(&mut got).unwrap();
            assert!(got.iter().all(|&byte| byte == piece), "{piece}");
        }
        drop(sending.join().unwrap());
    }
}

/// Whether a splice or an event meets the mark first is a matter of luck: of so many both do.
#[test]
fn urgent_data_in_many_uploads_ends_none() {
    const UPLOADS: usize = 600;
    const AT_ONCE: usize = 4;
    const BEFORE: usize = 192 * 1024;
    const BEHIND: usize = 64 * 1024;
    let (server, target) = tcp_server();
    let proxy = proxy(any_tcp(), target);
    let port = port_of(&proxy, 0);
    let upload = || {
        let mut client = tcp(port);
        client.write_all(&[1; BEFORE]).unwrap();
        let socket = socket2::SockRef::from(&client);
        assert_eq!(socket.send_out_of_band(b"!").unwrap(), 1);
        client.write_all(&[2; BEHIND]).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        client.read_to_end(&mut Vec::new()).unwrap();
    };
    let take = || {
        let (mut accepted, _) = server.accept().unwrap();
        accepted.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut got = Vec::new();
        accepted.read_to_end(&mut got).unwrap();
        let count = |byte| got.iter().filter(|&&it| it == byte).count();
        assert_eq!((count(1), count(2)), (BEFORE, BEHIND));
    };
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| (0..UPLOADS / AT_ONCE).for_each(|_| upload()));
            scope.spawn(|| (0..UPLOADS / AT_ONCE).for_each(|_| take()));
        }
    });
}

#[test]
fn all_clients_that_have_waited_at_a_passed_listener_are_served() {
    /// More than a listener accepts in one go.
    const CLIENTS: usize = 100;
    let dir = private_dir();
    let path = dir.path().join("passed.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let clients: Vec<_> = (0..CLIENTS).map(|_| unix_client(&path)).collect();
    let (_server, target) = tcp_server();
    let mut config = config(vec![Rule::new(unix(&path), target)]);
    let listener = Listener::try_from(OwnedFd::from(listener)).unwrap();
    config.listeners.push(listener);
    let proxy = Proxy::start(config).unwrap();
    let handle = proxy.handle();
    eventually("all are accepted", || {
        handle.forwards()[0].counters.accepted == CLIENTS as u64
    });
    drop(clients);
}
