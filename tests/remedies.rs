//! What the command says to someone whose words, files or system are not as they should be: the
//! right remedy, and nothing left behind.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use command::*;
use common::*;

/// What is said of a file by `check`.
fn checked(dir: &Path, file: &str) -> (Option<i32>, String) {
    let path = dir.join("hvsock.toml");
    fs::write(&path, file).unwrap();
    let output = run(&["check", text(&path)]);
    (
        output.status.code(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

/// Asserts that a remedy is there, and none that was there once.
fn says(said: &str, right: &str, wrong: &str) {
    assert!(said.contains(right), "{said:?} lacks {right:?}");
    assert!(!said.contains(wrong), "{said:?} has {wrong:?}");
}

#[test]
fn two_ports_in_one_word_get_the_remedy_of_where_they_stand() {
    let dir = private_dir();
    let (code, said) = checked(
        dir.path(),
        "[forward.a]\nlisten = \"8080:80\"\nconnect = 80\n",
    );
    assert_eq!(code, Some(1));
    says(
        &said,
        "listen = 8080, port = 80 and vm = \"NAME\"",
        "127.0.0.1:8080:80",
    );
    let (_, said) = checked(
        dir.path(),
        "[forward.a]\nlisten = 81\nconnect = \"19:8080\"\n",
    );
    says(&said, "write 8080 or 127.0.0.1:8080", "vsock side");
    let output = run(&["expose", "--vm", "x", "-R", "8080:19:8080"]);
    let said = String::from_utf8(output.stderr).unwrap();
    says(
        &said,
        "write 8080:8080 or 8080:127.0.0.1:8080",
        "127.0.0.1:8080:80",
    );
    // Where it was right.
    let output = run(&["expose", "--vm", "x", "-L", "8080:19:80"]);
    let said = String::from_utf8(output.stderr).unwrap();
    says(&said, "no host on the vsock side", "write 8080 or");
}

#[test]
fn a_home_that_no_shell_has_filled_in_is_known_or_told() {
    let dir = private_dir();
    let with_home = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
        command.args(arguments).env("HOME", dir.path());
        String::from_utf8(output(command).stderr).unwrap()
    };
    // Where a shell can't do it, within a word, it is done here.
    fs::create_dir(dir.path().join("vm")).unwrap();
    let vm = dir.path().join("vm");
    let mut proxy = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    proxy.args(["expose", "--vm", text(&vm), "-L", "~/x.sock:80"]);
    proxy
        .args(["-R", "5000:~/agent.sock"])
        .env("HOME", dir.path());
    let mut proxy = Running::spawn(proxy);
    proxy.says(text(&dir.path().join("x.sock")));
    proxy.says(text(&dir.path().join("agent.sock")));
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
    // Elsewhere a shell does it, unless the word is in quotes.
    for arguments in [
        &["cat", "~/x.sock"][..],
        &["forward", "~/x.sock", "tcp://127.0.0.1:1"],
        &["expose", "--vm", "~/vms/x", "-L", "0:80"],
    ] {
        let said = with_home(arguments);
        says(&said, "~ is filled in by the shell", "unix:./~");
    }
}

#[test]
fn what_is_in_the_way_of_a_socket_is_called_what_it_is() {
    let dir = private_dir();
    let path = dir.path().join("x.sock");
    symlink("elsewhere.sock", &path).unwrap();
    let forward = |at: &Path| run(&["forward", text(at), "tcp://127.0.0.1:1"]);
    let said = String::from_utf8(forward(&path).stderr).unwrap();
    says(
        &said,
        "a symbolic link to elsewhere.sock is in the way",
        "no socket",
    );
    assert!(fs::symlink_metadata(&path).unwrap().is_symlink());
    let other = dir.path().join("dir.sock");
    fs::create_dir(&other).unwrap();
    let said = String::from_utf8(forward(&other).stderr).unwrap();
    says(&said, "a directory is in the way", "no socket");
}

#[test]
fn a_directory_that_takes_no_sockets_is_not_said_to_be_missing() {
    let output = run(&["forward", "/proc/hvsock-test.sock", "tcp://127.0.0.1:1"]);
    let said = String::from_utf8(output.stderr).unwrap();
    if Path::new("/proc/self").exists() {
        assert_eq!(output.status.code(), Some(1), "{said}");
        says(
            &said,
            "no socket can be made in its directory",
            "doesn't exist",
        );
    }
}

#[test]
fn a_taken_port_of_a_range_calls_for_another_range() {
    // Two neighbours, so that it is known who listens on each.
    let pair = (0..100).find_map(|_| {
        let one = std::net::TcpListener::bind("127.0.0.1:0").ok()?;
        let port = one.local_addr().ok()?.port();
        let other = std::net::TcpListener::bind(("127.0.0.1", port.checked_add(1)?)).ok()?;
        Some((port, one, other))
    });
    let (port, _one, _other) = pair.unwrap();
    let listen = format!("{port}-{}", port + 1);
    let output = run(&["forward", &listen, "tcp://127.0.0.1:1-2"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    says(&said, "choose another range", "or 0 for a free one");
    let output = run(&["forward", &port.to_string(), "tcp://127.0.0.1:1"]);
    let said = String::from_utf8(output.stderr).unwrap();
    says(&said, "or 0 for a free one", "another range");
}

#[test]
fn a_question_about_a_target_ends_its_sentence() {
    let dir = private_dir();
    let program = format!("exec:{}/none", text(dir.path()));
    let proxy = Running::start(&["forward", "tcp://127.0.0.1:0", &program]);
    assert!(resets_clients(proxy.tcp_port()));
    let told = proxy.complains("Clients are refused until it is");
    assert!(!told.contains("?;"), "{told}");
}

#[test]
fn a_name_in_quotes_is_told_as_the_file_must_have_it() {
    let dir = private_dir();
    let file = concat!(
        "[forward.\"e f\"]\nlisten = 7201\nconnect = 1\n",
        "[forward.'say \"hi\"']\nlisten = 7201\nconnect = 1\n",
    );
    let (code, said) = checked(dir.path(), file);
    assert_eq!(code, Some(1), "{said}");
    let right = r#"[forward."say \"hi\""]: [forward."e f"] in line 2 listens on"#;
    assert!(said.contains(right), "{said}");
    let file = "[forward.\"e f\"]\nlisten = 7201\nconnect = 7201\n";
    let (_, said) = checked(dir.path(), file);
    assert!(
        said.contains(r#":3: [forward."e f"]: cannot connect"#),
        "{said}"
    );
}

#[test]
fn a_name_that_is_too_long_is_found_before_it_is_listened_on() {
    let dir = private_dir();
    let name = text(dir.path()).to_owned() + "/" + &"n".repeat(150);
    let file = format!("[forward.a]\nlisten = {name:?}\nconnect = 80\n");
    let (code, said) = checked(dir.path(), &file);
    assert_eq!(code, Some(1), "{said}");
    says(&said, "its name has 150 bytes", "is right");
    let whole = format!("as this one has with {}", name.len());
    says(&said, &whole, "a long path");
    says(&said, "choose a shorter name", "directory doesn't exist");
    // A long directory is got round.
    let deep = dir.path().join("d".repeat(150));
    fs::create_dir(&deep).unwrap();
    let file = format!(
        "[forward.a]\nlisten = \"{}/s\"\nconnect = 80\n",
        text(&deep)
    );
    let (code, said) = checked(dir.path(), &file);
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn a_datagram_socket_is_told_from_a_stream() {
    let dir = private_dir();
    let path = dir.path().join("x.sock");
    let _socket = UnixDatagram::bind(&path).unwrap();
    fails(
        &["cat", text(&path)],
        1,
        &["it is a datagram socket", "`hvsock syslog`"],
    );
}

#[test]
fn without_descriptors_that_is_the_remedy() {
    let dir = private_dir();
    let limited = |arguments: &str| {
        let mut shell = Command::new("sh");
        let script = format!("ulimit -n 5; exec \"$0\" {arguments}");
        shell.args(["-c", &script, env!("CARGO_BIN_EXE_hvsock")]);
        shell
            .env("XDG_RUNTIME_DIR", dir.path())
            .env("TMPDIR", dir.path());
        String::from_utf8(output(shell).stderr).unwrap()
    };
    let directory = dir.path().join("hvsock");
    fs::create_dir(&directory).unwrap();
    let mut permissions = fs::metadata(&directory).unwrap().permissions();
    permissions.set_mode(0o700);
    fs::set_permissions(&directory, permissions).unwrap();
    let _listener = UnixListener::bind(directory.join("control.sock")).unwrap();
    for arguments in ["cat tcp://127.0.0.1:1", "cat -l tcp://127.0.0.1:0"] {
        says(
            &limited(arguments),
            "raise the limit with `ulimit -n`",
            "nothing listens",
        );
    }
}

#[test]
fn one_is_one() {
    let dir = private_dir();
    let mut shell = Command::new("sh");
    shell.args([
        "-c",
        "ulimit -n 20; exec \"$0\" forward tcp://127.0.0.1:0 tcp://127.0.0.1:1",
    ]);
    shell.arg(env!("CARGO_BIN_EXE_hvsock"));
    let said = String::from_utf8(output(shell).stderr).unwrap();
    says(&said, "1 listener leaves none", "1 listeners");
    // A client that stays, while the end is asked for.
    let server = UnixListener::bind(dir.path().join("server.sock")).unwrap();
    let mut proxy = Running::start(&[
        "forward",
        "tcp://127.0.0.1:0",
        text(&dir.path().join("server.sock")),
    ]);
    let client = tcp(proxy.tcp_port());
    let held = server.accept().unwrap();
    proxy.signal("TERM");
    proxy.complains("1 connection has 30 s to finish");
    drop((client, held));
    assert_eq!(proxy.exit_code(), Some(0));
}

#[test]
fn a_misspelled_vm_is_asked_about_first() {
    let dir = private_dir();
    let vm = dir.path().join("docker");
    fs::create_dir(&vm).unwrap();
    fs::write(vm.join("hyperkit.json"), "{}").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(["expose", "--vm", "dokcer", "-L", "0:80"]);
    command.current_dir(dir.path()).env("HOME", dir.path());
    let said = String::from_utf8(output(command).stderr).unwrap();
    assert!(
        said.starts_with("hvsock: cannot find VM \"dokcer\": did you mean docker? no VM has this name; looked in "),
        "{said}"
    );
}

#[test]
fn check_finds_all_though_another_key_is_wrong() {
    let dir = private_dir();
    let file = "[vm.one]\nat = \"/tmp/one\"\n[vm.two]\nat = \"/tmp/two\"\n[forward.a]\nlisten = 8080\nconnect = 99999\n\
        [forward.b]\nlisten = 8080\nvm = \"one\"\nport = \"x\"\n";
    let (code, said) = checked(dir.path(), file);
    assert_eq!(code, Some(1));
    says(
        &said,
        "hvsock.toml:9: [forward.b]: [forward.a] in line 6 listens on tcp://127.0.0.1:8080 already",
        "[vm.one]",
    );
    says(
        &said,
        "hvsock.toml:3: note: [vm.two] is used by no forward",
        "[vm.one]",
    );
    assert!(said.contains("3 things are wrong"), "{said}");
    // That alone is no mistake: forwards may be added while it runs.
    let (code, said) = checked(
        dir.path(),
        "[vm.two]\nat = \"/tmp/two\"\n[forward.a]\nlisten = 0\nconnect = 99\n",
    );
    assert_eq!(code, Some(0), "{said}");
    says(
        &said,
        "hvsock.toml:1: note: [vm.two] is used by no forward",
        "wrong",
    );
}

#[test]
fn check_names_each_forward_of_a_vm_that_is_not_there() {
    let dir = private_dir();
    let file = "[vm.docker]\nat = \"/tmp/docker\"\n\
        [forward.web]\nlisten = 0\nvm = \"dockr\"\nport = 80\n\
        [forward.range]\nlisten = \"20000-20001\"\nvm = \"dockr\"\nport = \"80-81\"\n\
        [forward.back]\nguest-dials = \"0xZZ\"\nvm = \"dockr\"\nconnect = 80\n";
    let (code, said) = checked(dir.path(), file);
    assert_eq!(code, Some(1));
    for of in [
        "hvsock.toml:5: [forward.web] vm: cannot find VM \"dockr\"",
        "hvsock.toml:9: [forward.range] vm: cannot find VM \"dockr\"",
        "hvsock.toml:13: [forward.back] vm: cannot find VM \"dockr\"",
    ] {
        let line = said.lines().find(|line| line.contains(of));
        let line = line.unwrap_or_else(|| panic!("{of}: {said}"));
        assert!(line.ends_with("did you mean \"docker\"?"), "{line}");
    }
    // That it is used by none follows from that.
    assert!(!said.contains("is used by no forward"), "{said}");
    assert!(said.contains("4 things are wrong"), "{said}");
}

#[test]
fn a_reader_who_has_seen_enough_is_no_error() {
    let gone = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Stdio::from(writer)
    };
    let dir = private_dir();
    let mut proxy = Running::spawn(in_runtime(
        dir.path(),
        &[
            "forward",
            "tcp://127.0.0.1:0",
            "tcp://127.0.0.1:9",
            "--control",
        ],
    ));
    proxy.says("controlled at");
    for arguments in [
        &["status"][..],
        &["status", "--json"],
        &["vms"],
        &["--help"],
        &["completions", "bash"],
        &["man", "--roff"],
        &["doctor", "--json"],
    ] {
        let mut command = in_runtime(dir.path(), arguments);
        command
            .stdin(Stdio::null())
            .stdout(gone())
            .stderr(Stdio::piped());
        let output = command.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            (output.status.code(), said.as_str()),
            (Some(0), ""),
            "{arguments:?}"
        );
    }
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
}

/// An hvsock whose runtime directory and temporary directory are these.
fn between(runtime: &Path, temporary: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(arguments);
    command
        .env("XDG_RUNTIME_DIR", runtime)
        .env("TMPDIR", temporary);
    command
}

#[test]
fn a_runtime_directory_that_is_not_there_is_survived() {
    let dir = private_dir();
    let missing = dir.path().join("missing");
    let forward = [
        "forward",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:9",
        "--control",
    ];
    let mut proxy = Running::spawn(between(&missing, dir.path(), &forward));
    let at = proxy.says("controlled at");
    assert!(
        at.contains(text(dir.path())) && !at.contains("missing"),
        "{at}"
    );
    // Who has another environment, such as a terminal where a service runs, finds it, too.
    let runtime = dir.path().join("runtime");
    fs::create_dir(&runtime).unwrap();
    for runtime in [&missing, &runtime] {
        let status = output(between(runtime, dir.path(), &["status"]));
        assert!(status.status.success(), "{status:?}");
    }
    proxy.signal("TERM");
    assert_eq!(proxy.exit_code(), Some(0));
}

#[test]
fn status_names_the_places_where_it_has_looked() {
    let dir = private_dir();
    let (runtime, temporary) = (dir.path().join("runtime"), dir.path().join("temporary"));
    for made in [&runtime, &temporary] {
        fs::create_dir(made).unwrap();
    }
    for command in ["status", "reload", "stop"] {
        let output = output(between(&runtime, &temporary, &[command]));
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1));
        if cfg!(not(target_os = "macos")) {
            assert!(
                said.contains(text(&runtime.join("hvsock/control.sock"))),
                "{said}"
            );
        }
        assert!(
            said.contains(text(&temporary)) && said.contains("/tmp/hvsock-"),
            "{said}"
        );
    }
}

#[test]
fn the_demo_is_where_temporary_files_are() {
    let dir = private_dir();
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.arg("demo").env("TMPDIR", dir.path());
    let mut demo = Running::spawn(command);
    let line = demo.says("a stand-in VM in ");
    assert!(line.contains(text(dir.path())), "{line}");
    demo.says("Ctrl-C ends it.");
    demo.signal("TERM");
    assert_eq!(demo.exit_code(), Some(0));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    // Where its path would be too long for a state directory, it is in /tmp.
    let long = dir.path().join("x".repeat(80));
    fs::create_dir(&long).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.arg("demo").env("TMPDIR", &long);
    let mut demo = Running::spawn(command);
    demo.says("a stand-in VM in /tmp/");
    demo.says("Ctrl-C ends it.");
    demo.signal("TERM");
    assert_eq!(demo.exit_code(), Some(0));
}

/// What is in a directory.
fn names_in(dir: &Path) -> Vec<PathBuf> {
    let mut names: Vec<PathBuf> = fs::read_dir(dir)
        .unwrap()
        .map(|it| it.unwrap().path())
        .collect();
    names.sort();
    names
}

#[test]
fn a_stand_in_that_cannot_start_leaves_nothing_behind() {
    let dir = private_dir();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = format!("5001=tcp://{}", taken.local_addr().unwrap());
    let (vm, socket) = (dir.path().join("new"), dir.path().join("dial.sock"));
    let dial = format!("5000={}", text(&socket));
    fails(
        &["simulate", text(&vm), "--dial", &dial, "--dial", &taken],
        1,
        &["cannot listen on"],
    );
    assert_eq!(names_in(dir.path()), Vec::<PathBuf>::new());
    // Nor is one made of a path that was mistyped.
    let deep = dir.path().join("mistyped/vm");
    fails(
        &["simulate", text(&deep)],
        1,
        &["no directory", "mistyped:"],
    );
    assert_eq!(names_in(dir.path()), Vec::<PathBuf>::new());
    // What was there stays, and is what is in the way here.
    let link = dir.path().join("guest.00000050");
    fs::create_dir(&link).unwrap();
    fails(
        &[
            "simulate",
            text(dir.path()),
            "--guest-forward",
            "80",
            "--dial",
            &dial,
        ],
        1,
        &["cannot run a VM in", "cannot make", "guest.00000050"],
    );
    assert_eq!(names_in(dir.path()), [link]);
}

#[test]
fn what_a_file_needs_and_is_not_there_is_told_with_its_line() {
    let dir = private_dir();
    let here = text(dir.path());
    let file = format!(
        "[forward.a]\nlisten = \"{here}/none/s\"\nconnect = \"{here}/none/t\"\n\
        [forward.b]\nlisten = 0\nconnect = \"file:{here}/none/f\"\n\
        [forward.c]\nlisten = \"192.0.2.1:7\"\nconnect = \"exec:{here}/none\"\n\
        [vm.late]\nat = \"{here}/vms/late\"\n\
        [forward.d]\nvm = \"late\"\nlisten = \"{here}/d\"\nport = 7\n"
    );
    let (code, said) = checked(dir.path(), &file);
    assert_eq!(code, Some(0), "{said}");
    let none = format!("there is no directory {here}/none yet (there is {here})");
    for (line, part) in [
        (2, none.as_str()),
        (3, &none),
        (6, &none),
        (8, "192.0.2.1 is no address of this host"),
        (9, "it is not there; its clients are refused until it is"),
        (11, "VM \"late\" is not there yet"),
    ] {
        let line = format!("hvsock.toml:{line}: ");
        let told = said.lines().find(|told| told.contains(&line));
        assert!(told.unwrap_or_default().contains(part), "{line}: {said}");
    }
    assert_eq!(said.lines().count(), 6, "{said}");
    // It is there, and nothing is said.
    for made in ["none", "vms/late"] {
        fs::create_dir_all(dir.path().join(made)).unwrap();
    }
    let program = dir.path().join("none/f");
    fs::write(&program, "").unwrap();
    fs::set_permissions(&program, PermissionsExt::from_mode(0o700)).unwrap();
    let file = file
        .replace("192.0.2.1:7", "0")
        .replace("/none\"", "/none/f\"");
    let (code, said) = checked(dir.path(), &file);
    assert_eq!((code, said.as_str()), (Some(0), ""));
    // What can never be.
    for (wrong, part) in [
        (
            "listen = \"HERE/none/f/s\"\nconnect = 1",
            "none/f is no directory",
        ),
        ("listen = \"HERE/none/f\"\nconnect = 1", "a file is there"),
        (
            "listen = 0\nconnect = \"file:HERE/none\"",
            "it is a directory",
        ),
    ] {
        let file = format!("[forward.a]\n{}\n", wrong.replace("HERE", here));
        let (code, said) = checked(dir.path(), &file);
        assert_eq!(code, Some(1), "{said}");
        assert!(
            said.contains(part) && said.contains("1 thing is wrong"),
            "{said}"
        );
    }
}

/// Makes what a target may name by mistake, and returns each with what is said of it, and whether
/// it can never work.
fn wrong_targets(dir: &Path) -> Vec<(String, String, bool)> {
    let at = |name: &str| dir.join(name);
    fs::create_dir(at("directory")).unwrap();
    fs::write(at("plain"), "echo").unwrap();
    let fifo = nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR;
    nix::unistd::mkfifo(&at("fifo"), fifo).unwrap();
    let here = text(dir);
    let targets = [
        (
            "exec:HERE/directory",
            "it is a directory; name a program in it",
            true,
        ),
        ("exec:HERE/fifo", "it is a FIFO, and no program", true),
        (
            "exec:HERE/plain",
            "it is not executable; make it a program: chmod +x HERE/plain",
            true,
        ),
        (
            "exec:HERE/none",
            "it is not there; its clients are refused until it is",
            false,
        ),
        (
            "exec:HERE/none/p",
            "there is no directory HERE/none yet",
            false,
        ),
        (
            "file:HERE/directory",
            "it is a directory; name a file in it",
            true,
        ),
        ("file:HERE/fifo", "it is a FIFO, not a regular file", true),
        (
            "file:HERE/none",
            "it is not there; its clients are refused until it is",
            false,
        ),
        (
            "unix:HERE/directory",
            "it is a directory; name a socket in it",
            true,
        ),
        (
            "unix:HERE/plain",
            "it is a regular file, and no socket",
            true,
        ),
        (
            "unix:HERE/none/s",
            "there is no directory HERE/none yet",
            false,
        ),
    ];
    let targets = targets.map(|(target, said, never)| {
        let [target, said] = [target, said].map(|it| it.replace("HERE", here));
        (target, said, never)
    });
    targets.to_vec()
}

/// The file, the command line and the control socket look at the same, and say the same.
#[test]
fn a_target_that_can_not_work_is_told_by_all_that_take_one() {
    let dir = private_dir();
    let (control, listen) = (dir.path().join("c"), dir.path().join("s"));
    let at = format!("--control={}", text(&control));
    let start = [
        "forward",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:1",
        &at,
        "--allow-exec",
    ];
    let hvsock = Running::start(&start);
    hvsock.says("controlled");
    for (target, said, never) in wrong_targets(dir.path()) {
        let file = format!("[forward.a]\nlisten = 0\nconnect = \"{target}\"\n");
        let (code, told) = checked(dir.path(), &file);
        assert!(
            told.contains(&said) && told.contains("hvsock.toml:3: "),
            "{target}: {told}"
        );
        assert_eq!(code, Some(i32::from(never)), "{target}");
        assert_eq!(told.contains("note: "), !never, "{told}");

        let forward = ["forward", text(&listen), &target];
        match never {
            true => fails(&forward, 1, &[&said]),
            false => {
                let running = Running::start(&forward);
                running.complains(&said);
                running.says(&target[..5]);
            }
        }
        // What is killed leaves it.
        assert_eq!(listen.exists(), !never, "{target}");
        let _ = fs::remove_file(&listen);

        let add = ["add", text(&listen), &target, "--control", text(&control)];
        match never {
            true => fails(&add, 1, &[&said]),
            false => {
                let output = run(&add);
                assert_eq!(output.status.code(), Some(0), "{output:?}");
                hvsock.complains(&said);
                let name = text(&listen);
                let output = run(&["remove", name, "--control", text(&control), "--grace", "0"]);
                assert_eq!(output.status.code(), Some(0), "{output:?}");
            }
        }
    }
}

/// Who may do all can't be told so.
#[test]
fn a_target_that_this_user_may_not_use_is_told_of() {
    let dir = private_dir();
    let allow = |name: &str, mode| {
        let path = dir.path().join(name);
        fs::write(&path, "#!/bin/sh\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    };
    let (secret, others) = (allow("secret", 0o000), allow("others", 0o001));
    if fs::read(&secret).is_ok() {
        return println!("skipped: this user may read all; run it as another one");
    }
    for (target, said) in [
        (
            format!("file:{}", text(&secret)),
            "this user may not read it",
        ),
        (
            format!("exec:{}", text(&others)),
            "this user may not start it",
        ),
    ] {
        let file = format!("[forward.a]\nlisten = 0\nconnect = \"{target}\"\n");
        let (code, told) = checked(dir.path(), &file);
        assert_eq!(code, Some(0), "{told}");
        assert!(told.contains(said) && told.contains("note: "), "{told}");
    }
}

/// A user's limit of threads is told of, with its remedy, and nothing panics.
#[test]
fn without_threads_that_is_the_remedy() {
    let dir = private_dir();
    fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
    let program = dir.path().join("hvsock");
    put_program(&program);
    // One that no other process has: root is not bound, and of another there may be any number.
    let user = format!("{}", 1_000_000 + std::process::id());
    let limited = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &user, "--regid", &user, "--clear-groups"]);
        command
            .args(["prlimit", "--nproc=1", text(&program)])
            .args(arguments);
        command
            .env("HOME", dir.path())
            .env_remove("XDG_RUNTIME_DIR");
        command
    };
    let mut probe = limited(&["--version"]);
    let probe = probe.stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !probe.is_ok_and(|it| it.success()) {
        return println!("skipped: needs root, and setpriv and prlimit of util-linux");
    }
    let file = dir.path().join("hvsock.toml");
    fs::write(&file, "[forward.a]\nlisten = 0\nconnect = 1\n").unwrap();
    let log = dir.path().join("log");
    for (words, code) in [
        (&["cat", "exec:/bin/cat"][..], 1),
        (&["cat", "-l", "--echo", "tcp://127.0.0.1:0"], 1),
        (&["stress", "--server", "tcp://127.0.0.1:0"], 1),
        (&["syslog", text(&log), "tcp://127.0.0.1:9"], 1),
        (&["forward", "tcp://127.0.0.1:0", "tcp://127.0.0.1:9"], 1),
        // What can be done without is done without.
        (&["check", text(&file)], 0),
        (&["ps"], 0),
    ] {
        let output = output(limited(words));
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{words:?}: {said}");
        assert!(!said.contains("panicked"), "{words:?}: {said}");
        let is_told = said.contains("Resource temporarily unavailable");
        assert!(is_told || words == ["ps"], "{words:?}: {said:?}");
        if !["ps", "forward"].contains(&words[0]) {
            assert!(said.contains("`ulimit -u`"), "{words:?}: {said}");
        }
        assert!(!log.exists());
    }
}

#[test]
fn permissions_are_for_listeners_that_have_a_file() {
    let dir = private_dir();
    let (control, socket) = (dir.path().join("c"), dir.path().join("s"));
    for listen in ["tcp://127.0.0.1:0", "vsock://:7"] {
        let wrong = format!("{listen}: mode and group are for the file of a Unix socket");
        let mode = format!("{listen}: mode is for the file of a Unix socket");
        let end = "`from` says which clients may come";
        let file =
            format!("[forward.a]\nlisten = \"{listen}\"\nmode = \"660\"\ngroup = 0\nconnect = 1\n");
        let (code, told) = checked(dir.path(), &file);
        assert_eq!(code, Some(1), "{told}");
        let of_mode = format!("hvsock.toml:3: [forward.a]: {mode}");
        let of_group = format!("hvsock.toml:4: [forward.a]: {listen}: group is for the file");
        for part in [&of_mode, &of_group, end] {
            assert!(told.contains(part), "{told} lacks {part}");
        }
        // What is given counts, be it the default or not.
        let file = format!("[forward.a]\nlisten = \"{listen}\"\nconnect = 1\nmode = \"0600\"\n");
        let (code, told) = checked(dir.path(), &file);
        assert_eq!(code, Some(1), "{told}");
        let given = format!("hvsock.toml:4: [forward.a]: {mode}");
        assert!(told.contains(&given), "{told}");
        let pair = [listen, "tcp://127.0.0.1:1", "--mode", "600"];
        fails(&[&["forward"], &pair[..]].concat(), 2, &[&mode, end]);
        fails(&[&["add"], &pair[..]].concat(), 2, &[&mode, end]);
        // Of all forwards it may be said: it is meant for those that have one.
        let file = format!(
            "[defaults]\nmode = \"660\"\n[forward.a]\nlisten = \"{listen}\"\nconnect = 1\n"
        );
        let (code, told) = checked(dir.path(), &file);
        assert_eq!(code, Some(0), "{told}");
        let forward = [
            "forward",
            listen,
            "tcp://127.0.0.1:1",
            "--mode",
            "660",
            "--group",
            "0",
        ];
        fails(&forward, 2, &[&wrong, end]);
    }
    let at = format!("--control={}", text(&control));
    let pairs = [
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:1",
        text(&socket),
        "tcp://127.0.0.1:1",
    ];
    let hvsock = Running::start(&[&["forward"], &pairs[..], &["--mode", "660", &at]].concat());
    hvsock.says("controlled");
    let control = ["--control", text(&control)];
    fn add<'a>(words: &[&'a str], control: &[&'a str]) -> Vec<&'a str> {
        [&["add"], words, control].concat()
    }
    // What it has by itself is no mistake, and neither is what is meant for another.
    assert!(run(&add(&pairs[..2], &control)).status.success());
    for mode in ["660", "666"] {
        fails(
            &add(&[&pairs[..2], &["--mode", mode]].concat(), &control),
            2,
            &["mode is for the file of a Unix socket", "leave it out"],
        );
    }
    let other = dir.path().join("t");
    let both = [
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:1",
        text(&other),
        "tcp://127.0.0.1:1",
    ];
    assert!(
        run(&add(&[&both[..], &["--mode", "666"]].concat(), &control))
            .status
            .success()
    );
    assert_eq!(
        other.metadata().unwrap().permissions().mode() & 0o777,
        0o666
    );
}

#[test]
fn words_of_other_programs_get_what_stands_for_them_here() {
    for (words, right) in [
        (&["expose", "--vm", "x", "-p", "8080:80"][..], "-L 8080:80"),
        (&["expose", "--vm", "x", "-D", "1080"], "no SOCKS proxy"),
        (
            &["expose", "-fN", "--vm", "x"],
            "hvsock man hvsock-services",
        ),
        (&["expose", "-d", "--vm", "x"], "hvsock man hvsock-services"),
        (&["expose", "--vm", "x", "-L", "80"], "0:80 for a free port"),
        (
            &["expose", "--vm", "x", "-L", "53:53/udp"],
            "there is no UDP",
        ),
        (&["forward", "-v"], "HVSOCK_LOG=debug"),
        (&["cat", "-z"], "hvsock doctor --vm VM --port PORT"),
        (&["logs"], "--log"),
        // Of these nothing is known.
        (&["cat", "-w"], "unexpected argument '-w'"),
        (&["stat"], "'status'"),
    ] {
        let output = run(words);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
        says(&said, right, "as a value");
        assert!(!said.contains("'close'"), "{said}");
    }
}

#[test]
fn a_relative_path_is_shown_as_it_is_anywhere() {
    let dir = private_dir();
    let real = dir.path().canonicalize().unwrap();
    let absolute = format!("unix://{}/s -> unix://{0}/t", text(&real));
    let in_directory = |words: &[&str]| {
        let mut command = in_runtime(dir.path(), words);
        command.current_dir(&real);
        command
    };
    let forward = Running::spawn(in_directory(&["forward", "./s", "./t"]));
    forward.says(&absolute);
    drop(forward);
    fs::write(
        real.join("f.toml"),
        "[forward.a]\nlisten = \"./s\"\nconnect = \"./t\"\n",
    )
    .unwrap();
    let checked = output(in_directory(&["check", "f.toml"]));
    let said = String::from_utf8(checked.stdout).unwrap();
    assert!(said.contains(&absolute), "{said}");
}

/// One port in two spellings is no other program's.
#[test]
fn what_is_in_its_own_way_is_not_called_another_program() {
    let (listener, _) = tcp_server();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let [one, other] = ["127.0.0.1", "localhost"].map(|host| format!("tcp://{host}:{port}"));
    let why = format!("cannot listen on {other}: {one} is given, too");
    fails(&["forward", &one, "/a", &other, "/b"], 2, &[&why]);
    fails(&["forward", &one, "/a", &one, "/b"], 2, &["given twice"]);
}

#[test]
fn a_forward_is_meant_by_its_port_and_one_that_waits_has_no_name_yet() {
    let dir = private_dir();
    let runtime = dir.path();
    let said = |arguments: &[&str]| {
        let output = output(in_runtime(runtime, arguments));
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout) + &text(output.stderr),
        )
    };
    let missing = dir.path().join("vm");
    let words = [
        "expose",
        "--control",
        "--vm",
        text(&missing),
        "-L",
        "0:80",
        "-R",
        "5000:9",
    ];
    let expose = Running::spawn(in_runtime(runtime, &words));
    let port = expose.tcp_port();
    let (code, told) = said(&["connections", &port.to_string()]);
    assert_eq!(code, Some(0), "{told}");
    assert!(told.contains("no connections"), "{told}");
    let (code, told) = said(&["connections", "1"]);
    assert_eq!(code, Some(1), "{told}");
    assert!(told.contains("there is no forward \"1\""), "{told}");
    let (_, told) = said(&["status"]);
    let names = told
        .lines()
        .filter(|line| line.contains(" hyperkit://:5000"));
    let names: Vec<_> = names.map(|line| line.split_whitespace().next()).collect();
    assert_eq!(names, [Some("-")], "{told}");
}
