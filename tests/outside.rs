//! Whatever happens outside the sockets (a log, a file, a name, a clock that jumps, a listener that
//! is shut down), traffic flows.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use command::*;
use common::*;
use hvsock::proxy::{ForwardStatus, Observer, What};
use hvsock::simulate::{Service, Vm};
use hvsock::{Address, Proxy, Rule};

/// A TCP port that was free just now.
fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.local_addr().unwrap().port()
}

/// Stops the process, as a laptop's sleep does, for that time, and does something meanwhile.
fn frozen(proxy: &Running, time: Duration, meanwhile: impl FnOnce()) {
    proxy.signal("STOP");
    #[cfg(target_os = "linux")]
    eventually("it stands still", || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", proxy.child.0.id())).unwrap();
        stat.rsplit_once(") ").unwrap().1.starts_with('T')
    });
    meanwhile();
    thread::sleep(time);
    proxy.signal("CONT");
}

#[test]
fn what_came_while_the_process_stood_still_is_read_before_a_timeout_is_believed() {
    let server = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let target = format!("tcp://{}", server.local_addr().unwrap());
    let idle = ["--idle-timeout", "1", "--workers", "1"];
    let proxy = Running::start(&[&["forward", "tcp://127.0.0.1:0", &target], &idle[..]].concat());
    let mut client = tcp(proxy.tcp_port());
    client.write_all(b"a").unwrap();
    let mut server = server.accept().unwrap().0;
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut got = [0; 1];
    server.read_exact(&mut got).unwrap();
    frozen(&proxy, Duration::from_millis(1500), || {
        client.write_all(b"b").unwrap();
    });
    server.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"b");
    // And one on which nothing moves is still cut off.
    assert!(is_reset(client.read(&mut got)));
}

/// A VM whose files are what `make` puts in their place, and a proxy in front of its echo port.
fn beside_files(make: impl Fn(&Path)) {
    let dir = private_dir();
    let vm = Vm::builder(dir.path()).guest(7, Service::Echo);
    let _vm = vm.start().unwrap();
    for name in ["hyperkit.pid", "hyperkit.json"] {
        let path = dir.path().join(name);
        let _ = fs::remove_file(&path);
        make(&path);
    }
    let target = format!("hyperkit://:7{}", text(dir.path()));
    let mut proxy = Running::start(&["forward", "tcp://127.0.0.1:0", &target]);
    let port = proxy.tcp_port();
    // Longer than it takes until the VM is looked at again.
    let end = Instant::now() + Duration::from_millis(2500);
    while Instant::now() < end {
        assert_eq!(ask(tcp(port), b"flows").unwrap(), b"flows");
        thread::sleep(Duration::from_millis(100));
    }
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
}

#[test]
fn a_fifo_among_the_files_of_a_vm_stops_nothing() {
    beside_files(|path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap());
}

#[test]
fn a_device_without_an_end_among_the_files_of_a_vm_stops_nothing() {
    beside_files(|path| std::os::unix::fs::symlink("/dev/zero", path).unwrap());
}

/// (macOS has no way to shut a listener down.)
#[cfg(target_os = "linux")]
mod shut_down {
    use std::net::TcpStream;
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::os::unix::net::UnixStream;

    use hvsock::Listener;
    use hvsock::proxy::ForwardState;

    use super::*;

    /// Shuts down the listener of this process on that port, as `ss -K` does.
    fn shut_down_listener(port: u16) {
        let sockets = fs::read_to_string("/proc/self/net/tcp").unwrap();
        let listener = sockets.lines().find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let listens = fields[3] == "0A" && fields[1].ends_with(&format!(":{port:04X}"));
            listens.then(|| format!("socket:[{}]", fields[9]))
        });
        let listener = listener.unwrap();
        let is_it = |fd: &fs::DirEntry| {
            fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == listener.as_str())
        };
        let mut fds = fs::read_dir("/proc/self/fd").unwrap().flatten();
        let fd = fds.find(is_it).unwrap().file_name();
        let fd = fd.to_str().unwrap().parse().unwrap();
        nix::sys::socket::shutdown(fd, nix::sys::socket::Shutdown::Both).unwrap();
    }

    /// A client that comes until it is served.
    fn served(port: u16, bytes: &[u8]) {
        eventually("a client is served", || {
            let client = TcpStream::connect(("127.0.0.1", port));
            client
                .and_then(|client| ask(client, bytes))
                .is_ok_and(|answer| answer == bytes)
        });
    }

    #[test]
    fn a_listener_that_is_shut_down_from_outside_is_bound_again() {
        let dir = private_dir();
        let vm = Vm::builder(dir.path()).guest(7, Service::Echo);
        let _vm = vm.start().unwrap();
        let proxy = proxy(any_tcp(), hyperkit(dir.path(), 7));
        let port = port_of(&proxy, 0);
        let mut stays = tcp(port);
        stays.write_all(b"a").unwrap();
        stays.read_exact(&mut [0]).unwrap();
        for _ in 0..20 {
            shut_down_listener(port);
            served(port, b"again");
            eventually("status knows", || {
                proxy.forwards()[0].state == ForwardState::Listening
            });
        }
        stays.write_all(b"b").unwrap();
        stays.read_exact(&mut [0]).unwrap();
    }

    #[test]
    fn a_passed_socket_that_its_owner_shuts_down_is_told_of_and_never_spins() {
        let dir = private_dir();
        let path = dir.path().join("s");
        let owned = UnixListener::bind(&path).unwrap();
        let mut config = config(vec![Rule::new(unix(&path), unix(dir.path().join("t")))]);
        let passed = OwnedFd::from(owned.try_clone().unwrap());
        config.listeners = vec![Listener::try_from(passed).unwrap()];
        let proxy = Proxy::start(config).unwrap();
        assert_eq!(proxy.forwards()[0].state, ForwardState::Listening);
        nix::sys::socket::shutdown(owned.as_raw_fd(), nix::sys::socket::Shutdown::Both).unwrap();
        let is_lost = || matches!(proxy.forwards()[0].state, ForwardState::Lost { .. });
        eventually("status knows", is_lost);
        // Its address is free when the owner has gone.
        drop(owned);
        fs::remove_file(&path).unwrap();
        let listens = || proxy.forwards()[0].state == ForwardState::Listening;
        eventually("it is bound again", listens);
        UnixStream::connect(&path).unwrap();
    }
}

#[test]
fn what_is_given_up_because_a_worker_hangs_does_not_happen_later() {
    let (enter, entered) = channel();
    let (leave, left) = channel::<()>();
    let left = Mutex::new(left);
    let mut config = config(vec![Rule::new(any_tcp(), any_target())]);
    config.workers = Some(1.try_into().unwrap());
    config.observer = Some(Observer::new(move |event| {
        if matches!(event.what, What::Accepted) {
            enter.send(()).unwrap();
            let _ = left.lock().unwrap().recv_timeout(PATIENCE);
        }
    }));
    let proxy = Proxy::start(config).unwrap();
    let handle = proxy.handle();
    let _client = tcp(port_of(&proxy, 0));
    entered.recv_timeout(PATIENCE).unwrap();
    let free = ("127.0.0.1", free_port());
    let adding = thread::spawn({
        let handle = handle.clone();
        let listen = format!("tcp://{}:{}", free.0, free.1).parse().unwrap();
        move || handle.add(Rule::new(listen, any_target()))
    });
    // Who looks meanwhile waits for nobody.
    let begun = Instant::now();
    while !adding.is_finished() {
        assert_eq!(handle.forwards().len(), 1);
        assert!(begun.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(10));
    }
    let error = adding.join().unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut, "{error}");
    leave.send(()).unwrap();
    assert!(handle.answers_within(PATIENCE));
    assert_eq!(handle.forwards().len(), 1);
    eventually("the address is free", || TcpListener::bind(free).is_ok());
}

#[test]
fn clients_of_a_vm_that_stands_still_who_were_refused_do_not_hold_up_the_end() {
    let dir = private_dir();
    let path = dir.path().join("vsock");
    // Its VMM is stopped: who connects waits for ever.
    let _vmm = UnixListener::bind(&path).unwrap();
    let target = format!("vsock-mux://:80{}", text(&path));
    let mut proxy = Running::start(&[
        "forward",
        "tcp://127.0.0.1:0",
        &target,
        "--dial-timeout",
        "0.2",
        "--grace",
        "1000",
    ]);
    let port = proxy.tcp_port();
    let clients: Vec<_> = (0..20)
        .map(|_| thread::spawn(move || resets_clients(port)))
        .collect();
    assert!(clients.into_iter().all(|client| client.join().unwrap()));
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
}

/// A VM as a process of its own, whose guest sends without an end on port 19 and dials port 5000.
fn vm_process(dir: &Path) -> Running {
    let dial = "5000=tcp://127.0.0.1:0";
    let words = [
        "simulate",
        text(dir),
        "--guest",
        "19=chargen",
        "--dial",
        dial,
    ];
    Running::start(&words)
}

#[test]
fn an_answer_that_breaks_off_because_the_vm_was_killed_is_reset() {
    for _ in 0..5 {
        let dir = private_dir();
        let mut vm = vm_process(dir.path());
        eventually("the VM is up", || dir.path().join("connect").exists());
        let proxy = proxy(any_tcp(), hyperkit(dir.path(), 19));
        let mut clients: Vec<_> = (0..5).map(|_| tcp(port_of(&proxy, 0))).collect();
        for client in &mut clients {
            client.read_exact(&mut [0; 1000]).unwrap();
        }
        vm.child.0.kill().unwrap();
        for mut client in clients {
            let read = std::io::copy(&mut client, &mut std::io::sink());
            assert!(is_reset(read.map(|_| 0)));
        }
        vm.exit_code();
    }
}

#[test]
fn a_request_of_a_guest_that_breaks_off_because_the_vm_was_killed_is_reset() {
    let dir = private_dir();
    let mut vm = vm_process(dir.path());
    let inside = vm.says("127.0.0.1:");
    let inside = inside.split_once("127.0.0.1:").unwrap().1;
    let inside: u16 = inside.split(' ').next().unwrap().parse().unwrap();
    let server = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let target = format!("tcp://{}", server.local_addr().unwrap());
    let _proxy = proxy(hyperkit(dir.path(), 5000), target.parse().unwrap());
    let mut guest = tcp(inside);
    guest.write_all(b"half of it").unwrap();
    let mut served = server.accept().unwrap().0;
    served.set_read_timeout(Some(PATIENCE)).unwrap();
    served.read_exact(&mut [0; 10]).unwrap();
    vm.child.0.kill().unwrap();
    assert!(is_reset(served.read(&mut [0; 1])));
    vm.exit_code();
}

#[test]
fn many_listeners_leave_descriptors_for_every_client_that_is_accepted() {
    allow_descriptors(4096);
    let server = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let target = format!("tcp://{}", server.local_addr().unwrap());
    thread::spawn(move || {
        for mut stream in server.incoming().flatten() {
            thread::spawn(move || std::io::copy(&mut stream.try_clone().unwrap(), &mut stream));
        }
    });
    let limited = "ulimit -n 256; exec \"$0\" forward --workers 1 \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", limited, env!("CARGO_BIN_EXE_hvsock")]);
    for _ in 0..90 {
        command.args(["tcp://127.0.0.1:0", &target]);
    }
    let proxy = Running::spawn(command);
    let port = proxy.tcp_port();
    let mut clients: Vec<_> = (0..150).map(|_| tcp(port)).collect();
    for client in &mut clients {
        client.write_all(b"x").unwrap();
    }
    // Whoever finds no room waits, and is served when another has gone.
    for mut client in clients {
        client.read_exact(&mut [0]).unwrap();
    }
    let mut command = Command::new("sh");
    let limited = "ulimit -n 64; exec \"$0\" forward --workers 1 \"$@\"";
    command.args(["-c", limited, env!("CARGO_BIN_EXE_hvsock")]);
    for _ in 0..60 {
        command.args(["tcp://127.0.0.1:0", &target]);
    }
    let told = output(command);
    let told = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(told.contains("ulimit -n"), "{told}");
}

#[test]
fn a_vm_whose_state_can_not_be_read_takes_nothing_from_the_others() {
    let dir = private_dir();
    let state = dir.path().join("vm");
    fs::create_dir(&state).unwrap();
    let json = state.join("hyperkit.json");
    fs::write(&json, "{\"vsock_guest_cid\": ").unwrap();
    let echo = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let target = echo.local_addr().unwrap();
    let file = dir.path().join("hvsock.toml");
    let port = free_port();
    let text_of_file = format!(
        "control = \"off\"\n[vm.one]\nat = \"{}\"\n\
         [forward.guest]\nlisten = \"127.0.0.1:0\"\nvm = \"one\"\nport = 7\n\
         [forward.host]\nlisten = {port}\nconnect = \"{target}\"\n",
        state.display()
    );
    fs::write(&file, text_of_file).unwrap();
    let proxy = Running::start(&["run", text(&file)]);
    let told = proxy.complains("is not there yet");
    assert!(told.contains("hyperkit.json"), "{told}");
    let _client = tcp(port);
    echo.accept().unwrap();
}

/// A client that is led round in a circle is refused, and leaves nothing behind.
fn refuses_a_circle(proxy: &Proxy, refused: impl Fn() -> bool) {
    assert!(refused());
    let live = || proxy.handle().live();
    eventually("all of it is unwound", || live() == 0);
    let accepted: u64 = proxy.forwards().iter().map(|it| it.counters.accepted).sum();
    assert!(accepted < 50, "{accepted} connections");
    let told = |it: &ForwardStatus| {
        it.last_error
            .clone()
            .is_some_and(|e| e.text.contains("leads back"))
    };
    assert!(proxy.forwards().iter().any(told));
}

#[test]
fn a_forward_that_leads_to_itself_is_refused_where_that_can_be_seen() {
    for listen in ["0.0.0.0", "127.0.0.1", "[::]"] {
        let port = free_port();
        for to in ["127.0.0.1", "localhost"] {
            let listen = format!("tcp://{listen}:{port}");
            let connect = format!("tcp://{to}:{port}");
            fails(&["forward", &listen, &connect], 2, &["to itself"]);
        }
    }
    let dir = private_dir();
    let file = dir.path().join("hvsock.toml");
    let rules = [
        "[forward.one]\nlisten = \"0.0.0.0:7101\"\nconnect = \"127.0.0.1:7102\"\n",
        "[forward.two]\nlisten = 7102\nconnect = \"localhost:7101\"\n",
    ];
    fs::write(&file, rules.concat()).unwrap();
    let by_way_of = "lead back to itself, by way of tcp://127.0.0.1:7102";
    fails(&["check", text(&file)], 1, &[by_way_of]);
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    std::os::unix::fs::symlink(&one, &two).unwrap();
    let rule = Rule::new(unix(&one), unix(&two));
    let error = Proxy::start(config(vec![rule])).unwrap_err();
    assert!(error.to_string().contains("lead back to itself"), "{error}");
}

#[test]
fn a_circle_of_links_between_unix_sockets_is_refused_at_its_first_client() {
    // One worker has closed what it dialled before it accepts it, two may have.
    for workers in [1, 2] {
        let dir = private_dir();
        let at = |name: &str| dir.path().join(name);
        // Each alone leads elsewhere.
        let mut config = config(vec![
            Rule::new(unix(at("a")), unix(at("to-b"))),
            Rule::new(unix(at("b")), unix(at("to-a"))),
        ]);
        config.workers = Some(workers.try_into().unwrap());
        let proxy = Proxy::start(config).unwrap();
        std::os::unix::fs::symlink(at("b"), at("to-b")).unwrap();
        assert_eq!(proxy.forwards()[0].counters.refused, 0);
        std::os::unix::fs::symlink(at("a"), at("to-a")).unwrap();
        refuses_a_circle(&proxy, || {
            ask(unix_client(&at("a")), b"").is_ok_and(|answer| answer.is_empty())
        });
    }
}

#[test]
fn a_circle_through_a_name_is_refused_at_its_first_client() {
    // The machine's own name, which nothing but the resolver knows.
    let name = nix::sys::utsname::uname().unwrap();
    let name = name.nodename().to_str().unwrap().to_owned();
    let port = free_port();
    let connect = format!("tcp://{name}:{port}");
    if connect.parse::<Address>().is_err() {
        return eprintln!("skipped: {name:?} is no host's name; give this machine one");
    }
    if std::net::ToSocketAddrs::to_socket_addrs(&(name.as_str(), port)).is_err() {
        return eprintln!("skipped: {name} is not resolved; name it in /etc/hosts");
    }
    let proxy = Running::start(&["forward", &format!("tcp://0.0.0.0:{port}"), &connect]);
    proxy.says("tcp://");
    #[cfg(target_os = "linux")]
    let before = proxy.descriptors();
    assert!(resets_clients(port));
    proxy.complains("leads back");
    #[cfg(target_os = "linux")]
    eventually("all of it is unwound", || proxy.descriptors() <= before);
}

#[test]
fn a_chain_of_forwards_is_no_circle() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path()).guest(7, Service::Echo);
    let _vm = vm.start().unwrap();
    let between = unix(dir.path().join("between"));
    let rules = vec![
        Rule::new(any_tcp(), between.clone()),
        Rule::new(between, hyperkit(dir.path(), 7)),
    ];
    let proxy = Proxy::start(config(rules)).unwrap();
    for _ in 0..10 {
        assert_eq!(
            ask(tcp(port_of(&proxy, 0)), b"through").unwrap(),
            b"through"
        );
    }
}

/// A TCP address at which nobody listens.
fn any_target() -> Address {
    "tcp://127.0.0.1:9".parse().unwrap()
}
