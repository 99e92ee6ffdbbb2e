//! The command under a service manager: sockets that are passed, and what the manager is told.
#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::process::Command;

use command::*;
use command_fds::{CommandFdExt, FdMapping};
use common::*;
use hvsock::simulate::{Service, Vm};

/// `hvsock ARGUMENTS`, to which these sockets are passed as a service manager does.
fn with_passed(sockets: Vec<(&str, OwnedFd)>, arguments: &[&str]) -> Command {
    // Only the process itself knows its id before it runs.
    let mut command = Command::new("sh");
    command.args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\""]);
    command.arg(env!("CARGO_BIN_EXE_hvsock")).args(arguments);
    let names: Vec<&str> = sockets.iter().map(|(name, _)| *name).collect();
    command.env("LISTEN_FDS", sockets.len().to_string());
    command.env("LISTEN_FDNAMES", names.join(":"));
    let numbered = (3..).zip(sockets);
    let mappings = numbered.map(|(child_fd, (_, parent_fd))| FdMapping {
        parent_fd,
        child_fd,
    });
    command.fd_mappings(mappings.collect()).unwrap();
    command
}

/// Asserts that the command fails, and says all of that.
fn is_refused(command: Command, parts: &[&str]) {
    let mut refused = Running::spawn(command);
    assert_eq!(refused.exit_code(), Some(1), "{parts:?}");
    let said: String = refused.err.iter().collect();
    for part in parts {
        assert!(said.contains(part), "{said:?} lacks {part:?}");
    }
}

fn echo_vm(dir: &Path) -> Vm {
    Vm::builder(dir).guest(7, Service::Echo).start().unwrap()
}

fn unix_socket(path: &Path) -> OwnedFd {
    UnixListener::bind(path).unwrap().into()
}

#[test]
fn passed_sockets_are_listened_on_and_left_as_they_were() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let path = dir.path().join("passed.sock");
    let unix = unix_socket(&path);
    std::os::unix::fs::symlink(dir.path(), dir.path().join("again")).unwrap();
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
    let tcp_socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = tcp_socket.local_addr().unwrap().port();
    // Who comes before the service has begun is served, too.
    let early = [unix_client(&path), unix_client(&path)];
    let command = with_passed(
        vec![("web", tcp_socket.into()), ("other", unix)],
        &[
            "expose",
            "--vm",
            text(dir.path()),
            "-L",
            // However it is spelled.
            &format!("{}/again/passed.sock:7", text(dir.path())),
            "-L",
            &format!("localhost:{port}:7"),
            "-L",
            "0:7",
        ],
    );
    let mut proxy = Running::spawn(command);
    proxy.says("passed.sock");
    proxy.says(&format!("tcp://localhost:{port}"));
    let own = proxy.tcp_port();
    for client in early {
        assert_eq!(ask(client, b"early").unwrap(), b"early");
    }
    assert_eq!(ask(tcp(port), b"tcp").unwrap(), b"tcp");
    assert_eq!(ask(tcp(own), b"own").unwrap(), b"own");
    assert_eq!(ask(unix_client(&path), b"late").unwrap(), b"late");
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
    // It is the service manager's, which may start us again on it.
    assert_eq!(mode(&path), 0o640);
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn what_guests_dial_can_be_passed() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let socket = unix_socket(&dir.path().join("00000002.00001388"));
    let target = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let command = with_passed(
        vec![("", socket)],
        &[
            "expose",
            "--vm",
            text(dir.path()),
            "-R",
            &format!("5000:{}", target.local_addr().unwrap()),
        ],
    );
    let mut proxy = Running::spawn(command);
    proxy.says("port 5000");
    let mut guest = vm.dial(5000).unwrap();
    std::io::Write::write_all(&mut guest, b"hello").unwrap();
    let mut hello = [0; 5];
    target.accept().unwrap().0.read_exact(&mut hello).unwrap();
    drop(guest);
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
    assert!(dir.path().join("00000002.00001388").exists());
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn a_passed_socket_outlives_its_forward() {
    let dir = private_dir();
    let _vm = echo_vm(dir.path());
    let path = dir.path().join("passed.sock");
    let file = dir.path().join("hvsock.toml");
    let forward = |name: &str| {
        let paths = [&path, dir.path()].map(|it| text(it).to_owned());
        let [listen, vm] = paths;
        format!("[forward.{name}]\nlisten = {listen:?}\nconnect = \"hyperkit://:7{vm}\"\n")
    };
    std::fs::write(&file, forward("one")).unwrap();
    let mut command = with_passed(vec![("", unix_socket(&path))], &["run", text(&file)]);
    command.env("XDG_RUNTIME_DIR", dir.path());
    let mut proxy = Running::spawn(command);
    proxy.says("one: ");
    assert_eq!(ask(unix_client(&path), b"one").unwrap(), b"one");
    std::fs::write(&file, "[forward.other]\nlisten = 0\nconnect = 9\n").unwrap();
    proxy.signal("HUP");
    proxy.complains("1 removed");
    // Who comes now waits, as before the start.
    let waits = unix_client(&path);
    std::fs::write(&file, forward("two")).unwrap();
    proxy.signal("HUP");
    proxy.says("two: ");
    assert_eq!(ask(waits, b"waited").unwrap(), b"waited");
    assert_eq!(ask(unix_client(&path), b"two").unwrap(), b"two");
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
    assert!(path.exists());
}

#[cfg(target_os = "linux")]
#[test]
fn an_abstract_socket_can_be_passed() {
    use std::os::linux::net::SocketAddrExt;
    let dir = private_dir();
    let _vm = echo_vm(dir.path());
    let name = format!("hvsock-{}", dir.path().display());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    let socket = UnixListener::bind_addr(&address).unwrap();
    let listen = format!("unix:@{}:7", name.replace('/', "%2F"));
    let arguments = ["expose", "--vm", text(dir.path()), "-L", &listen];
    let proxy = Running::spawn(with_passed(vec![("", socket.into())], &arguments));
    proxy.says("unix:@");
    let client = std::os::unix::net::UnixStream::connect_addr(&address).unwrap();
    assert_eq!(ask(client, b"abstract").unwrap(), b"abstract");
}

#[test]
fn a_passed_socket_that_nobody_wants_is_an_error() {
    let dir = private_dir();
    let wanted = dir.path().join("wanted.sock");
    let other = dir.path().join("other.sock");
    let target = text(dir.path()).to_owned() + "/target";
    let arguments = ["forward", text(&wanted), &target];
    let command = with_passed(vec![("web", unix_socket(&other))], &arguments);
    is_refused(command, &[text(&other), "passed", "no rule listens there"]);
    assert!(other.exists() && !wanted.exists());
    let datagrams = UnixDatagram::bind(dir.path().join("datagrams")).unwrap();
    let command = with_passed(vec![("log", datagrams.into())], &arguments);
    is_refused(command, &["descriptor 3", "\"log\"", "ListenStream="]);
    let connected = tcp(TcpListener::bind("127.0.0.1:0").map_or(0, |listener| {
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || listener.accept());
        port
    }));
    let command = with_passed(vec![("", connected.into())], &arguments);
    is_refused(command, &["descriptor 3", "doesn't listen", "Accept=no"]);
    let mut command = with_passed(vec![("", unix_socket(&dir.path().join("one")))], &arguments);
    command.env("LISTEN_FDS", "2");
    is_refused(command, &["LISTEN_FDS=2", "no descriptor 4"]);
    let mut command = with_passed(vec![], &arguments);
    command.env("LISTEN_FDS", "some");
    is_refused(command, &["LISTEN_FDS=\"some\""]);
}

/// Those of a file whose forward can't be had yet are kept for it; those that none of its forwards
/// wants are an error.
#[test]
fn a_passed_socket_waits_with_its_forward() {
    let dir = private_dir();
    let path = dir.path().join("passed.sock");
    let other = dir.path().join("other.sock");
    let file = dir.path().join("hvsock.toml");
    let target = dir.path().join("target");
    let server = UnixListener::bind(&target).unwrap();
    let forward = |name: &str, listen: &Path| {
        let [listen, connect] = [listen, &target].map(text);
        format!("[forward.{name}]\nlisten = {listen:?}\nconnect = {connect:?}\n")
    };
    std::fs::write(&file, forward("one", &other)).unwrap();
    let run = |socket: OwnedFd| {
        let mut command = with_passed(vec![("", socket)], &["run", text(&file)]);
        command.env("XDG_RUNTIME_DIR", dir.path());
        command
    };
    is_refused(
        run(unix_socket(&path)),
        &[text(&path), "no rule listens there"],
    );
    std::fs::remove_file(&path).unwrap();
    // Its VM's directory comes later.
    let vm = dir.path().join("vm");
    std::fs::create_dir(&vm).unwrap();
    let passed = vm.join("00000002.00001388");
    let socket = unix_socket(&passed);
    let away = dir.path().join("away");
    std::fs::rename(&vm, &away).unwrap();
    let [at, connect] = [&vm, &target].map(|it| text(it));
    let dialled = format!(
        "[vm.one]\nat = {at:?}\n\
         [forward.dialled]\nvm = \"one\"\nguest-dials = 5000\nconnect = {connect:?}\n"
    );
    std::fs::write(&file, dialled).unwrap();
    let proxy = Running::spawn(run(socket));
    proxy.complains("[forward.dialled]: waits for");
    std::fs::rename(&away, &vm).unwrap();
    proxy.says("dialled: ");
    let mut guest = unix_client(&passed);
    std::io::Write::write_all(&mut guest, b"hello").unwrap();
    let mut hello = [0; 5];
    server.accept().unwrap().0.read_exact(&mut hello).unwrap();
}

#[test]
fn a_passed_socket_that_nearly_fits_is_named() {
    // As systemd makes it of a plain ListenStream=PORT: of IPv6, and IPv4 too where that is the
    // system's default.
    let any = TcpListener::bind("[::]:0").unwrap();
    let port = any.local_addr().unwrap().port();
    let passed = format!("tcp://[::]:{port}");
    for (host, systemd) in [
        ("127.0.0.1", Some("127.0.0.1")),
        ("0.0.0.0", Some("0.0.0.0")),
        ("localhost", None),
    ] {
        let socket = any.try_clone().unwrap().into();
        let listen = format!("tcp://{host}:{port}");
        let command = with_passed(vec![("web", socket)], &["forward", &listen, "/target"]);
        let systemd = systemd.map(|ip| format!("ListenStream={ip}:{port}"));
        let right = format!("have it listen on {passed}");
        let parts = [&passed, &listen, &right, systemd.as_ref().unwrap_or(&right)];
        is_refused(command, &parts.map(String::as_str));
    }
    // Where nothing is in the way, it is one that nobody wants.
    let dir = private_dir();
    let path = dir.path().join("web.sock");
    let other = dir.path().join("run").join("web.sock");
    std::fs::create_dir(dir.path().join("run")).unwrap();
    let command = with_passed(
        vec![("", unix_socket(&path))],
        &["forward", text(&other), "/target"],
    );
    let right = format!("have it listen on unix://{}", text(&path));
    is_refused(command, &[text(&path), text(&other), &right]);
    assert!(!other.exists());
}

#[test]
fn sockets_passed_to_another_process_are_none_of_ours() {
    let dir = private_dir();
    let socket = dir.path().join("own.sock");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(["forward", text(&socket), "/nowhere"]);
    command.env("LISTEN_FDS", "1").env("LISTEN_PID", "1");
    let proxy = Running::spawn(command);
    proxy.says("own.sock");
    assert!(socket.exists());
}

#[cfg(target_os = "linux")]
mod manager {
    use super::*;

    /// The service manager's end of it.
    struct Manager {
        socket: UnixDatagram,
        dir: tempfile::TempDir,
    }

    impl Manager {
        fn new() -> Manager {
            let dir = private_dir();
            let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            Manager { socket, dir }
        }

        /// An echo VM behind `echo.sock`.
        fn command(&self) -> Command {
            let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
            let local = format!("{}/echo.sock:7", text(self.dir.path()));
            command.args(["expose", "--vm", text(self.dir.path()), "-L", &local]);
            command.env("NOTIFY_SOCKET", self.dir.path().join("notify"));
            command
        }

        fn is_told(&self) -> String {
            let mut buffer = [0; 1024];
            let count = self.socket.recv(&mut buffer).expect("nothing was told");
            String::from_utf8(buffer[..count].to_vec()).unwrap()
        }
    }

    #[test]
    fn it_is_told_of_the_beginning_and_the_end() {
        let manager = Manager::new();
        let _vm = echo_vm(manager.dir.path());
        let mut proxy = Running::spawn(manager.command());
        assert_eq!(manager.is_told(), "READY=1\nSTATUS=carrying 1 forward\n");
        // By then clients can come.
        let client = unix_client(&manager.dir.path().join("echo.sock"));
        assert_eq!(ask(client, b"ready").unwrap(), b"ready");
        proxy.signal("TERM");
        // How many are still there may be in it.
        let end = manager.is_told();
        assert!(end.starts_with("STOPPING=1\nSTATUS=stopping"), "{end}");
        assert_eq!(proxy.exit_code(), Some(0));
    }

    #[test]
    fn one_that_reads_nothing_keeps_nobody() {
        let manager = Manager::new();
        let notify = manager.dir.path().join("notify");
        let full = UnixDatagram::unbound().unwrap();
        full.set_nonblocking(true).unwrap();
        while full.send_to(b"x", &notify).is_ok() {}
        let _vm = echo_vm(manager.dir.path());
        let mut proxy = Running::spawn(manager.command());
        proxy.says("echo.sock");
        let client = unix_client(&manager.dir.path().join("echo.sock"));
        assert_eq!(ask(client, b"on").unwrap(), b"on");
        proxy.signal("TERM");
        assert_eq!(proxy.exit_code(), Some(0));
    }

    #[test]
    fn the_watchdog_is_fed_to_the_very_end() {
        let manager = Manager::new();
        let _vm = echo_vm(manager.dir.path());
        let mut command = manager.command();
        command.env("WATCHDOG_USEC", "100000");
        let mut proxy = Running::spawn(command);
        assert!(manager.is_told().starts_with("READY=1\n"));
        for _ in 0..3 {
            assert_eq!(manager.is_told(), "WATCHDOG=1\n");
        }
        let client = unix_client(&manager.dir.path().join("echo.sock"));
        proxy.signal("TERM");
        // Before it there may be more that it is fed with.
        while !manager.is_told().starts_with("STOPPING=1\n") {}
        // A client that stays keeps it; a watchdog that isn't fed then would kill it.
        for _ in 0..3 {
            assert_eq!(manager.is_told(), "WATCHDOG=1\n");
        }
        assert_eq!(ask(client, b"still").unwrap(), b"still");
        assert_eq!(proxy.exit_code(), Some(0));
    }

    #[test]
    fn it_hears_nothing_of_one_that_has_not_begun() {
        let manager = Manager::new();
        let _taken = UnixListener::bind(manager.dir.path().join("echo.sock")).unwrap();
        let _vm = echo_vm(manager.dir.path());
        is_refused(manager.command(), &["echo.sock", "in use"]);
        manager.socket.set_nonblocking(true).unwrap();
        assert!(manager.socket.recv(&mut [0; 8]).is_err());
    }

    #[test]
    fn without_one_it_carries_all_the_same() {
        let manager = Manager::new();
        let _vm = echo_vm(manager.dir.path());
        let mut command = manager.command();
        // Another's watchdog.
        command.env("WATCHDOG_USEC", "1").env("WATCHDOG_PID", "1");
        command.env("NOTIFY_SOCKET", manager.dir.path().join("nobody"));
        let proxy = Running::spawn(command);
        proxy.complains("NOTIFY_SOCKET");
        let client = unix_client(&manager.dir.path().join("echo.sock"));
        assert_eq!(ask(client, b"untold").unwrap(), b"untold");
        manager.socket.set_nonblocking(true).unwrap();
        assert!(manager.socket.recv(&mut [0; 8]).is_err());
    }
}
