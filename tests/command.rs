//! The command as a user has it: the real binary, its words, its files, its signals, its exit
//! codes.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use command::*;
use common::*;
use hvsock::simulate::{Service, Vm};

fn echo_vm(dir: &Path) -> Vm {
    Vm::builder(dir)
        .guest(7, Service::Echo)
        .guest(19, Service::Chargen)
        .start()
        .unwrap()
}

#[test]
fn expose_prints_what_it_exposes_and_carries_it() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let target = server.local_addr().unwrap();
    let socket = dir.path().join("echo.sock");
    let mut proxy = Running::start(&[
        "expose",
        "--vm",
        text(dir.path()),
        "-L",
        "0:0x7",
        "-L",
        &format!("{}:7", text(&socket)),
        "-R",
        &format!("5000:{target}"),
    ]);
    let port = proxy.tcp_port();
    assert!(proxy.says("echo.sock").ends_with("-> guest port 7 (0x7)"));
    let line = proxy.says("5000");
    assert!(
        line.contains("port 5000 (0x1388)") && line.contains(&target.to_string()),
        "{line}"
    );
    assert_eq!(ask(tcp(port), b"tcp").unwrap(), b"tcp");
    assert_eq!(ask(unix_client(&socket), b"unix").unwrap(), b"unix");
    let mut guest = vm.dial(5000).unwrap();
    guest.write_all(b"hello").unwrap();
    let mut hello = [0; 5];
    server.accept().unwrap().0.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");
    drop(guest);
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
    // What the guest may dial is there as long as the guest is.
    let dialled = dir.path().join("00000002.00001388");
    assert!(!socket.exists());
    assert!(dialled.exists());
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
    vm.stop();
    eventually("the keeper removes it", || !dialled.exists());
}

#[test]
fn nothing_is_left_open_by_a_thousand_at_once_and_many_in_turn() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let proxy = Running::start(&["expose", "--vm", text(dir.path()), "-L", "0:7"]);
    let port = proxy.tcp_port();
    assert_eq!(ask(tcp(port), b"warm").unwrap(), b"warm");
    eventually("it is closed", || vm.counters().live_slots == 0);
    let before = proxy.descriptors();
    let clients: Vec<_> = (0..1000).map(|_| tcp(port)).collect();
    for client in clients {
        assert_eq!(ask(client, b"at once").unwrap(), b"at once");
    }
    for _ in 0..2000 {
        assert_eq!(ask(tcp(port), b"in turn").unwrap(), b"in turn");
    }
    // The keeper is given sockets ahead, sixteen at a time.
    eventually("no descriptor is left", || {
        proxy.descriptors() <= before + 16
    });
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn out_of_descriptors_it_waits_says_so_once_and_goes_on() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    // A hard limit: the program can't raise it.
    let mut command = Command::new("sh");
    command.args([
        "-c",
        "ulimit -n 100; exec \"$0\" \"$@\"",
        env!("CARGO_BIN_EXE_hvsock"),
    ]);
    command.args(["expose", "--vm", text(dir.path()), "-L", "0:7"]);
    let proxy = Running::spawn(command);
    let port = proxy.tcp_port();
    // More than it has descriptors for, and no more than macOS lets wait.
    let mut clients: Vec<_> = (0..130).map(|_| tcp(port)).collect();
    proxy.complains("not accepting on tcp://");
    for client in &mut clients {
        client.write_all(b"patience").unwrap();
        client.half_close();
    }
    for mut client in clients {
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, b"patience");
    }
    assert!(
        proxy
            .err
            .try_iter()
            .all(|line| !line.contains("not accepting"))
    );
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn a_refusal_and_a_vm_that_is_down_are_told_in_one_line() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let proxy = Running::start(&["expose", "--vm", text(dir.path()), "-L", "0:99"]);
    let port = proxy.tcp_port();
    let refused = || assert!(resets_clients(port));
    for _ in 0..5 {
        refused();
    }
    let line = proxy.complains("refused a client");
    assert!(line.contains("vsock port 99 (0x63)?"), "{line}");
    vm.stop();
    let mut line = String::new();
    eventually("the other reason is told", || {
        refused();
        line = proxy.err.try_iter().collect();
        !line.is_empty()
    });
    assert!(line.contains("the VM is not running"), "{line}");
    for _ in 0..5 {
        refused();
    }
    assert_eq!(proxy.err.try_iter().count(), 0);
}

#[test]
fn expose_starts_before_its_vm() {
    let dir = private_dir();
    let proxy = Running::start(&["expose", "--vm", text(dir.path()), "-L", "0:7"]);
    proxy.complains("the VM is not running");
    let port = proxy.tcp_port();
    let _vm = echo_vm(dir.path());
    assert_eq!(ask(tcp(port), b"late").unwrap(), b"late");
}

#[test]
fn a_signal_in_mid_transfer_lets_it_finish_and_a_second_cuts_it_off() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    for signals in [1, 2] {
        let mut proxy = Running::start(&[
            "expose",
            "--vm",
            text(dir.path()),
            "-L",
            "0:7",
            "-L",
            "0:19",
        ]);
        let (echo, chargen) = (proxy.tcp_port(), proxy.tcp_port());
        let mut client = tcp(echo);
        client.write_all(b"first half, ").unwrap();
        let mut endless = tcp(chargen);
        endless.read_exact(&mut [0; 10_000]).unwrap();
        proxy.signal("TERM");
        proxy.complains("stopping");
        if signals == 2 {
            proxy.signal("INT");
            proxy.complains("cutting");
        } else {
            drop(endless);
            client.write_all(b"second half").unwrap();
            client.half_close();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, "first half, second half");
        }
        assert_eq!(proxy.exit_code(), Some(0));
        assert!(vm.fate().is_none(), "{:?}", vm.fate());
    }
}

#[test]
fn a_hang_up_ends_it_as_a_signal_does_unless_it_is_ignored() {
    let dir = private_dir();
    let socket = dir.path().join("s");
    let arguments = ["forward", text(&socket), "tcp://127.0.0.1:1"];
    // The test itself may run under nohup.
    let mut command = Command::new("env");
    command.args(["--default-signal=HUP", env!("CARGO_BIN_EXE_hvsock")]);
    command.args(arguments);
    let mut plain = Running::spawn(command);
    plain.says("->");
    plain.signal("HUP");
    assert_eq!(plain.exit_code(), Some(0));
    assert!(!socket.exists());

    let mut command = Command::new("sh");
    command.args([
        "-c",
        "trap '' HUP; exec \"$0\" \"$@\"",
        env!("CARGO_BIN_EXE_hvsock"),
    ]);
    command.args(arguments).process_group(0);
    let mut nohup = Running::spawn(command);
    nohup.says("->");
    nohup.signal("HUP");
    // The next signal is handled in order: had the first ended it, there would be two complaints.
    nohup.signal("TERM");
    assert_eq!(nohup.exit_code(), Some(0));
    let stopping = |it: &String| it.contains("stopping");
    assert_eq!(nohup.err.iter().filter(stopping).count(), 1);
}

#[test]
fn forward_takes_pairs_of_any_addresses() {
    let dir = private_dir();
    let vm = echo_vm(dir.path());
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    let guest = format!("hyperkit://:7{}", text(dir.path()));
    let proxy = Running::start(&[
        "forward",
        "--mode",
        "660",
        text(&one),
        &guest,
        text(&two),
        text(&one),
        "tcp://127.0.0.1:0",
        text(&two),
    ]);
    let port = proxy.tcp_port();
    assert_eq!(ask(tcp(port), b"three times").unwrap(), b"three times");
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(one.metadata().unwrap().permissions().mode() & 0o777, 0o660);
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[test]
fn demo_serves_a_page_and_cleans_up() {
    let mut demo = Running::start(&["demo"]);
    let line = demo.says("a stand-in VM in ");
    let state = line
        .split_once("in ")
        .unwrap()
        .1
        .split_once("in ")
        .unwrap()
        .1;
    let state = state.split(',').next().unwrap().to_owned();
    let port = demo.tcp_port();
    demo.says("GET / through TCP:            HTTP/1.1 200 OK");
    demo.says("GET / through the Unix socket: HTTP/1.1 200 OK");
    demo.says("Ctrl-C");
    let request = b"GET /page HTTP/1.0\r\n\r\n";
    let page = String::from_utf8(ask(tcp(port), request).unwrap()).unwrap();
    assert!(
        page.starts_with("HTTP/1.") && page.contains("/page"),
        "{page}"
    );
    demo.signal("INT");
    assert_eq!(demo.exit_code(), Some(0));
    assert!(!Path::new(&state).exists());
}

#[test]
fn simulate_serves_a_directory_and_dies_of_a_rude_client() {
    let dir = private_dir();
    let state = dir.path().join("vm");
    let mut vm = Running::start(&[
        "simulate",
        text(&state),
        "--guest",
        "7=echo",
        "--dial",
        "5000=tcp://127.0.0.1:0",
        "--strict",
    ]);
    vm.says("guest port 7 (0x7)");
    let line = vm.says("CID 2 port 5000");
    let dial = line.split_once("127.0.0.1:").unwrap().1;
    let dial: u16 = dial.split(' ').next().unwrap().parse().unwrap();
    fails(
        &["simulate", text(&state)],
        1,
        &["a VM runs there", "choose another directory"],
    );

    let echo = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let target = echo.local_addr().unwrap().port().to_string();
    let proxy = Running::start(&[
        "expose",
        "--vm",
        text(&state),
        "-L",
        "0:7",
        "-R",
        &format!("5000:{target}"),
    ]);
    let port = proxy.tcp_port();
    proxy.says("5000");
    assert_eq!(ask(tcp(port), b"simulated").unwrap(), b"simulated");
    let mut guest = tcp(dial);
    guest.write_all(b"guest").unwrap();
    let mut heard = [0; 5];
    echo.accept().unwrap().0.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"guest");
    drop(guest);

    // What no client should do: close with data unread.
    if !tells_unread() {
        return;
    }
    let mut rude = unix_client(&state.join("connect"));
    rude.write_all(b"00000003.00000007\n0123456789").unwrap();
    rude.read_exact(&mut [0; 1]).unwrap();
    drop(rude);
    vm.complains("the VM died");
    assert_eq!(vm.exit_code(), Some(1));
}

#[test]
fn simulate_serves_a_socket_as_firecracker_does() {
    let dir = private_dir();
    let socket = dir.path().join("vm.sock");
    let vm = |more: &[&str]| {
        let words = [
            "simulate",
            "--vsock-mux",
            text(&socket),
            "--guest",
            "7=echo",
        ];
        let vm = Running::start(&[&words, more].concat());
        vm.says(&format!("a stand-in VM at vsock-mux://{}", text(&socket)));
        vm
    };
    let mut first = vm(&["--guest", "9=heedless:5"]);
    let to = format!("vsock-mux://:9{}", text(&socket));
    let proxy = Running::start(&["forward", "tcp://127.0.0.1:0", &to]);
    assert_eq!(ask(tcp(proxy.tcp_port()), b"").unwrap().len(), 5);
    first.signal("TERM");
    assert_eq!(first.exit_code(), Some(0));
    let _second = vm(&["--half-close"]);
    let to = format!("vsock-mux://:7{}?half-close=yes", text(&socket));
    let proxy = Running::start(&["forward", "tcp://127.0.0.1:0", &to]);
    assert_eq!(ask(tcp(proxy.tcp_port()), b"echo").unwrap(), b"echo");
    fails(&["simulate"], 2, &["<DIR"]);
    let both = ["simulate", "x", "--vsock-mux", "y"];
    fails(&both, 2, &["cannot be used with"]);
    let strict = ["simulate", "--vsock-mux", "y", "--strict"];
    fails(&strict, 2, &["cannot be used with"]);
}

#[test]
fn a_simulated_guest_dials_at_a_pace_and_has_rude_services() {
    let dir = private_dir();
    let mut vm = Running::start(&[
        "simulate",
        text(dir.path()),
        "--guest=1=heedless:100000",
        "--guest=2=reset",
        "--guest=3=endless",
        "--dial=5000=100/s",
        "--failed-dials=2",
    ]);
    vm.says("guest port 3 (0x3): endless");
    vm.says("dials CID 2 port 5000 (0x1388) 100 times a second");
    // The heedless one closes without having read what it is sent, which resets its client.
    for (port, request, length) in [(1, "", 100_000), (2, "?", 4096)] {
        let mut client = unix_client(&dir.path().join("connect"));
        write!(client, "00000003.{port:08x}\n{request}").unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        assert_eq!(answer.len(), length);
    }
    let listener = UnixListener::bind(dir.path().join("00000002.00001388")).unwrap();
    for _ in 0..3 {
        let (mut guest, _) = listener.accept().unwrap();
        let mut heard = String::new();
        guest.read_to_string(&mut heard).unwrap();
        assert!(heard.contains("in the guest"), "{heard}");
    }
    drop(listener);
    vm.complains("the failed dial number 2");
    assert_eq!(vm.exit_code(), Some(1));
    fails(&["simulate", "x", "--dial", "1=0/s"], 2, &["5000=20/s"]);
    fails(
        &["simulate", "x", "--guest", "1=heedless:"],
        2,
        &["heedless:BYTES"],
    );
}

#[test]
fn a_paused_guest_answers_when_it_goes_on() {
    let dir = private_dir();
    let vm = Running::start(&["simulate", text(dir.path()), "--guest", "7=echo"]);
    vm.says("guest port 7");
    let proxy = Running::start(&["expose", "--vm", text(dir.path()), "-L", "0:7"]);
    let port = proxy.tcp_port();
    vm.signal("USR1");
    vm.complains("paused");
    let mut client = tcp(port);
    client.write_all(b"patience").unwrap();
    client.half_close();
    client
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    // A stopped and continued test is interrupted here: the kernel restarts no read that has a
    // timeout.
    let silence = loop {
        match client.read(&mut [0; 8]) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            read => break read,
        }
    };
    assert_eq!(silence.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    vm.signal("USR2");
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "patience");
}

#[test]
fn errors_say_what_why_and_how_to_mend_it() {
    let dir = private_dir();
    let vm = text(dir.path());
    let _vm = echo_vm(dir.path());
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().port();
    fails(
        &["cat", "--vm", "/no/such/vm", "7"],
        1,
        &[
            "hvsock: cannot find VM",
            "/no/such/vm",
            "see that the path is right",
        ],
    );
    fails(
        &["expose", "--vm", "no-such-vm", "-L", "0:7"],
        1,
        &["no VM has this name", "a state directory"],
    );
    fails(
        &["expose", "--vm", vm],
        2,
        &["nothing to expose", "-L or -R"],
    );
    let control = "a value of --control follows a '=': --control=off";
    fails(
        &["expose", "--control", "off", "--vm", vm, "-L", "0:7"],
        2,
        &[control],
    );
    fails(
        &[
            "forward",
            "--control",
            "off",
            "tcp://127.0.0.1:0",
            "tcp://127.0.0.1:7",
        ],
        2,
        &[control],
    );
    fails(
        &["run", "--control", "off", "hvsock.toml"],
        2,
        &["the file says it"],
    );
    fails(
        &["expose", "--vm", vm, "-L", "7"],
        2,
        &["guest's port is missing", "0:7 for a free port"],
    );
    fails(
        &["expose", "--vm", vm, "-L", "0:0x1ffffffff"],
        2,
        &["4294967295"],
    );
    fails(
        &["expose", "--vm", vm, "-L", &format!("{taken}:7")],
        1,
        &[
            &format!("tcp://127.0.0.1:{taken}"),
            "another program listens there",
        ],
    );
    fails(
        &["expose", "--vm", vm, "-L", &format!("{}:7", text(&file))],
        1,
        &["no socket", "another path"],
    );
    fails(
        &["expose", "--vm", vm, "-L", "/no/such/dir/s:7"],
        1,
        &["unix:///no/such/dir/s", "make it first"],
    );
    fails(
        &[
            "expose",
            "--vm",
            vm,
            "-L",
            &format!("{vm}/{}:7", "n".repeat(120)),
        ],
        2,
        &["its name has 120 bytes", "is the limit", "shorter name"],
    );
    fails(
        &["expose", "--vm", vm, "-L", "0:7", "--mode", "rw"],
        2,
        &["octal"],
    );
    fails(
        &["forward", "8080", "tcp:127.0.0.1:80"],
        2,
        &["a URI has two slashes: tcp://…:80"],
    );
    fails(&["version"], 2, &["`hvsock --version` prints it"]);
    fails(
        &["forward", "21000-99999", "/tmp/s"],
        2,
        &["the range 21000-99999 ends above 65535"],
    );
    fails(&["forward", "tcp://127.0.0.1:0"], 2, &["2 values"]);
    fails(
        &["forward", "tcp://127.0.0.1:0", "/a", "/b"],
        2,
        &["come in pairs"],
    );
    fails(
        &["forward", "tpc://127.0.0.1:0", "/a"],
        2,
        &["scheme", "tcp://"],
    );
    fails(
        &["simulate", &format!("/tmp/{}", "d".repeat(90))],
        1,
        &["95 bytes", "85", "shorter"],
    );
    fails(&["simulate", vm, "--guest", "80"], 2, &["80=http"]);
}

#[test]
fn a_forward_where_hvsock_itself_listens_is_refused_as_such() {
    let dir = private_dir();
    let place = dir.path().join("own");
    for option in ["control", "metrics"] {
        let own = format!("--{option}={}", text(&place));
        fails(
            &["forward", text(&place), "80", &own],
            2,
            &[
                "this hvsock itself listens there",
                "choose another address for one of them",
            ],
        );
    }
}

#[test]
fn tcp_needs_no_scheme_where_rules_are_written() {
    let dir = private_dir();
    let control = dir.path().join("control");
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let to = server.local_addr().unwrap().to_string();
    let proxy = Running::start(&[
        "forward",
        "0",
        &to,
        &format!("--control={}", text(&control)),
    ]);
    let line = proxy.says("tcp://127.0.0.1:");
    assert!(line.ends_with(&format!(" -> tcp://{to}")), "{line}");
    eventually("it is controlled", || control.exists());
    let ask = |words: &[&str]| {
        let output = run(&[words, &["--control", text(&control)]].concat());
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let added = ask(&["add", "--name", "b", "127.0.0.1:0", &to]);
    let (listen, target) = added.trim().split_once(" -> ").unwrap();
    assert_eq!(target, format!("tcp://{to}"));
    let listen = listen.split_once("tcp://").unwrap().1;
    let removed = ask(&["remove", listen]);
    assert!(removed.starts_with("removed b: "), "{removed}");
}

#[test]
fn rules_that_can_not_work_are_refused_at_start() {
    let dir = private_dir();
    let vm = text(dir.path());
    let socket = dir.path().join("s");
    let socket = text(&socket);
    fails(
        &["forward", socket, socket],
        2,
        &["it would connect to itself"],
    );
    assert!(!Path::new(socket).exists());
    fails(
        &["forward", "tcp://127.0.0.1:0", "tcp://127.0.0.1:0"],
        2,
        &["port 0 can't be connected to"],
    );
    fails(
        &["forward", "exec:/bin/cat", "tcp://127.0.0.1:1"],
        2,
        &["a program is connected to, not listened on"],
    );
    fails(
        &["forward", "--from", "3", "tcp://127.0.0.1:0", socket],
        2,
        &["no client of a tcp address comes from 3"],
    );
    fails(
        &[
            "forward",
            "--keep-trying",
            "7101",
            "localhost:7102",
            "*:7102",
            "7101",
        ],
        2,
        &["it would lead back to itself, by way of tcp://"],
    );
    // What is said before an hvsock is asked.
    fails(
        &["add", "--name", "a", socket, socket],
        2,
        &["it would connect to itself"],
    );
    for words in [
        &["cat", "tcp://127.0.0.1:0"][..],
        &["stress", "tcp://127.0.0.1:0"],
    ] {
        fails(words, 2, &["port 0 can't be connected to"]);
    }
    for words in [
        &["cat", "-l", "exec:/bin/cat"][..],
        &["stress", "--server", "exec:/bin/cat"],
    ] {
        fails(words, 2, &["not listened on"]);
    }
    fails(
        &["forward", socket, "tcp://127.0.0.1:1", socket, "/x"],
        2,
        &["it is given twice"],
    );
    fails(
        &["expose", "--vm", vm, "-L", "8:7", "-L", "8:9"],
        2,
        &["it is given twice"],
    );
    fails(
        &["expose", "--vm", vm, "-R", "8:7", "-R", "8:9"],
        2,
        &["it is given twice"],
    );
    fails(&["expose", "--vm", "", "-L", "0:7"], 2, &["--help"]);
    fails(
        &["expose", "--vm", "tcp://x:1", "-L", "0:7"],
        2,
        &["tcp://x:1", "hyperkit"],
    );
    fails(
        &["expose", "--vm", vm, "-L", "18088:localhost:80"],
        2,
        &["no host on the vsock side"],
    );
    fails(
        &["expose", "--vm", vm, "-L", "s.sock:80"],
        2,
        &["./web.sock"],
    );
    let mut command = Command::new("sh");
    let program = env!("CARGO_BIN_EXE_hvsock");
    command.args(["-c", "ulimit -n 12; exec \"$0\" \"$@\"", program]);
    command.args(["forward", "tcp://127.0.0.1:0", "tcp://127.0.0.1:1"]);
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("12 descriptors") && said.contains("ulimit -n"),
        "{said}"
    );
}

#[test]
fn a_log_level_that_is_none_is_told_and_the_usual_kept() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.env("HVSOCK_LOG", "debgu");
    command.args(["forward", "tcp://127.0.0.1:0", "tcp://127.0.0.1:1"]);
    let proxy = Running::spawn(command);
    proxy.complains("HVSOCK_LOG=\"debgu\": \"debgu\" is no level");
    assert!(resets_clients(proxy.tcp_port()));
    proxy.complains("refused a client");
}

#[test]
fn a_state_directory_that_may_not_be_read_is_told_apart_from_none() {
    let dir = private_dir();
    let hidden = dir.path().join("hidden");
    let state = hidden.join("vm");
    std::fs::create_dir_all(&state).unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(0o000)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(["expose", "--vm", text(&state), "-L", "0:7"]);
    if nobody_is_needed() {
        // Root may read everything. The user nobody may run the binary only where it can be
        // reached.
        let binary = dir.path().join("hvsock");
        put_program(&binary);
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        command = Command::new(binary);
        command.args(["expose", "--vm", text(&state), "-L", "0:7"]);
        command.uid(65_534);
    }
    let output = command.output().unwrap();
    std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(0o700)).unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("ermission denied") && said.contains("user"),
        "{said}"
    );
}

fn nobody_is_needed() -> bool {
    let id = Command::new("id").arg("-u").output().unwrap();
    id.stdout == b"0\n"
}

#[test]
fn vms_lists_what_is_found_or_says_where_it_looked() {
    let dir = private_dir();
    let list = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
        command.arg("vms").current_dir(dir.path());
        command.env("HOME", dir.path()).env_remove("MINIKUBE_HOME");
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let said = list();
    let minikube = dir.path().join(".minikube/machines");
    let looked = format!("looked in {minikube:?} (not there)");
    assert!(
        said.contains("no hyperkit VM found; ") && said.contains(&looked),
        "{said}"
    );
    if cfg!(target_os = "linux") {
        assert!(said.contains("\nthis system's CID: "), "{said}");
    }
    let (one, other) = (dir.path().join("one-state"), minikube.join("oth\ner"));
    for state in [&one, &other] {
        std::fs::create_dir_all(state).unwrap();
        std::fs::write(state.join("hyperkit.json"), "{}").unwrap();
    }
    std::fs::write(one.join("hyperkit.pid"), std::process::id().to_string()).unwrap();
    let said = list();
    let rows: Vec<Vec<&str>> = said
        .lines()
        .map(|row| row.split_whitespace().collect())
        .collect();
    assert_eq!(rows[0], ["NAME", "KEPT", "BY", "STATE", "WHERE"]);
    let escaped = text(&other).replace('\n', "\\n");
    assert_eq!(rows[1], ["oth\\ner", "minikube", "gone", &escaped]);
    // The kernel names the working directory, however it was spelled.
    let one = one.canonicalize().unwrap();
    assert_eq!(rows[2], ["one", "linuxkit", "running", text(&one)]);
    assert!(!said.contains("looked in"), "{said}");
}

#[test]
fn help_and_version_are_printed() {
    for arguments in [
        &["--help"][..],
        &["expose", "--help"],
        &["forward", "--help"],
        &["simulate", "--help"],
        &["--version"],
    ] {
        let output = run(arguments);
        assert!(output.status.success());
        assert!(
            String::from_utf8(output.stdout).unwrap().contains("hvsock"),
            "{arguments:?}"
        );
    }
    assert_eq!(run(&[]).status.code(), Some(2));
}

/// How bytes are carried that come in great numbers, as far as can be seen from outside.
#[cfg(target_os = "linux")]
#[test]
fn bulk_goes_through_a_pipe_unless_it_is_to_be_copied() {
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let target = format!("tcp://{}", server.local_addr().unwrap());
    std::thread::spawn(move || {
        // Until its client leaves, and then for the next.
        for client in server.incoming() {
            let mut client = client.unwrap();
            while client.write_all(&[7; 1 << 20]).is_ok() {}
        }
    });
    for options in [&[][..], &["--no-splice"]] {
        let arguments = ["forward", "tcp://127.0.0.1:0", &target];
        let proxy = Running::start(&[&arguments, options].concat());
        let pipes = || {
            let all = std::fs::read_dir(format!("/proc/{}/fd", proxy.child.0.id())).unwrap();
            let names = all.filter_map(|it| std::fs::read_link(it.unwrap().path()).ok());
            names
                .filter(|it| it.to_string_lossy().starts_with("pipe:"))
                .count()
        };
        let before = pipes();
        let mut client = tcp(proxy.tcp_port());
        let mut buffer = vec![0; 1 << 20];
        let mut spliced = || {
            client.read_exact(&mut buffer).unwrap();
            pipes() > before
        };
        // How soon depends on how much is there whenever the proxy has its turn.
        match options.is_empty() {
            true => eventually("it is spliced", spliced),
            false => assert!(!(0..64).any(|_| spliced())),
        }
    }
}
