//! Programs and files as targets: what comes out of them, how they end, what is left of them.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use command::*;
use common::*;
use hvsock::address::{Address, ExecAddress};
use hvsock::{Proxy, Rule};

/// A shell that runs that script.
fn shell(script: &str) -> ExecAddress {
    let mut exec = ExecAddress::new("/bin/sh");
    exec.args = vec!["-c".into(), script.into()];
    exec
}

/// A proxy whose socket is in that directory, and a client of it.
fn started(directory: &Path, target: impl Into<Address>) -> (Proxy, UnixStream) {
    let path = directory.join("s");
    let proxy = proxy(unix(&path), target.into());
    let client = connected(directory);
    (proxy, client)
}

fn connected(directory: &Path) -> UnixStream {
    unix_client(&directory.join("s"))
}

fn rest(mut client: impl Read) -> String {
    let mut all = Vec::new();
    client.read_to_end(&mut all).unwrap();
    String::from_utf8(all).unwrap()
}

fn is_alive(pid: &str) -> bool {
    let looked = Command::new("kill")
        .args(["-s", "0", pid.trim()])
        .stderr(Stdio::null())
        .status();
    looked.unwrap().success()
}

#[test]
fn bytes_and_half_closes_go_both_ways() {
    let dir = private_dir();
    let (proxy, mut client) = started(dir.path(), ExecAddress::new("/bin/cat"));
    let sent: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let mut writer = client.try_clone().unwrap();
    let copy = sent.clone();
    let writing = std::thread::spawn(move || {
        writer.write_all(&copy).unwrap();
        writer.half_close();
    });
    let mut received = Vec::new();
    client.read_to_end(&mut received).unwrap();
    writing.join().unwrap();
    assert!(sent == received);
    eventually("it is counted", || {
        let counters = proxy.forwards()[0].counters;
        counters.live == 0 && counters.sent == 3_000_000 && counters.received == 3_000_000
    });
}

#[test]
fn arguments_are_given_as_they_are_and_the_environment_is_added_to() {
    let dir = private_dir();
    let mut exec = shell("printf '<%s>' \"$0\" \"$@\" \"$A\" \"${PATH:+path}\"");
    exec.args
        .extend(["a b", "$HOME", "", "'\"*"].map(Into::into));
    exec.env = vec![("A".into(), "x=y".into())];
    let (_proxy, client) = started(dir.path(), exec);
    assert_eq!(rest(client), "<a b><$HOME><><'\"*><x=y><path>");
}

#[test]
fn what_a_program_leaves_unread_takes_nothing_from_its_answer() {
    // By then nothing more fits into the buffers on the way to it.
    let script = "read line; sleep 0.3; echo answer to $line";
    // A client of TCP would be reset, and lose what it has not read.
    let proxy = proxy(any_tcp(), shell(script).into());
    let mut client = tcp(port_of(&proxy, 0));
    client.write_all(b"one\n").unwrap();
    let mut writer = client.try_clone().unwrap();
    // However it ends: nobody has read it.
    let writing = std::thread::spawn(move || writer.write_all(&vec![b'.'; 8 << 20]));
    assert_eq!(rest(client), "answer to one\n");
    let _ = writing.join().unwrap();
}

#[test]
fn a_program_has_no_descriptor_but_the_standard_ones() {
    if !cfg!(target_os = "linux") {
        return println!("skipped: there is no /proc/self/fd here");
    }
    let dir = private_dir();
    let file = fs::File::open("/dev/null").unwrap();
    // Without close-on-exec.
    let inherited = nix::unistd::dup(&file).unwrap();
    let mut exec = ExecAddress::new("/bin/ls");
    exec.args = vec!["/proc/self/fd".into()];
    let (_proxy, client) = started(dir.path(), exec);
    // 3 is the directory that it lists.
    assert_eq!(rest(client), "0\n1\n2\n3\n");
    drop(inherited);
}

#[test]
fn a_program_whose_connection_is_cut_hears_of_it_with_its_group() {
    let dir = private_dir();
    let (told, pid) = (dir.path().join("told"), dir.path().join("pid"));
    let script = format!(
        "trap 'echo hung up >{}; exit' HUP; sh -c 'echo $$ >{}; echo begun; exec sleep 1000' & wait",
        told.display(),
        pid.display()
    );
    let (proxy, mut client) = started(dir.path(), shell(&script));
    client.read_exact(&mut [0; 6]).unwrap();
    let pid = fs::read_to_string(&pid).unwrap();
    assert!(is_alive(&pid));
    proxy.stop(Duration::ZERO);
    proxy.wait().unwrap();
    eventually("the group is gone", || !is_alive(&pid));
    // The shell, which nobody waits for, may write it a little later.
    eventually("the shell has heard of it", || {
        fs::read_to_string(&told).is_ok_and(|told| told == "hung up\n")
    });
}

#[test]
fn a_program_that_ignores_its_end_is_ended() {
    let dir = private_dir();
    let path = dir.path().join("pid");
    let script = format!(
        "trap '' HUP TERM PIPE; sh -c 'echo $$ >{}; echo begun; while :; do sleep 1; done' & while :; do sleep 1; done",
        path.display()
    );
    let (proxy, mut client) = started(dir.path(), shell(&script));
    client.read_exact(&mut [0; 6]).unwrap();
    let pid = fs::read_to_string(&path).unwrap();
    // It goes on while its output does, though its input has ended.
    client.half_close();
    std::thread::sleep(Duration::from_millis(300));
    assert!(is_alive(&pid));
    let begun = Instant::now();
    drop(client);
    proxy.stop(Duration::ZERO);
    proxy.wait().unwrap();
    eventually("the group is gone", || !is_alive(&pid));
    // SIGHUP has not done that.
    assert!(begun.elapsed() >= Duration::from_secs(4));
}

/// It would take a part for all.
#[test]
fn an_upload_that_breaks_off_does_not_end_the_input() {
    let dir = private_dir();
    let done = dir.path().join("done");
    let script = format!(
        "trap '' HUP; echo begun; cat >/dev/null; echo all >{}",
        done.display()
    );
    let proxy = proxy(any_tcp(), shell(&script).into());
    let mut client = tcp(port_of(&proxy, 0));
    client.read_exact(&mut [0; 6]).unwrap();
    client.write_all(b"a part").unwrap();
    let options = socket2::SockRef::from(&client);
    options.set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    eventually("the connection has ended", || {
        proxy.forwards()[0].counters.live == 0
    });
    // That waits for the end of the program.
    proxy.stop(Duration::ZERO);
    proxy.wait().unwrap();
    assert!(!done.exists());
}

#[test]
fn a_program_that_has_ended_its_output_is_left_to_finish() {
    let dir = private_dir();
    let done = dir.path().join("done");
    let script = format!(
        "echo bye; exec <&- >&-; sleep 0.5; echo done >{}",
        done.display()
    );
    let (proxy, client) = started(dir.path(), shell(&script));
    assert_eq!(rest(client), "bye\n");
    assert!(!done.exists());
    proxy.stop(Duration::ZERO);
    proxy.wait().unwrap();
    eventually("it has finished", || done.exists());
}

#[test]
fn a_program_on_a_terminal_reads_lines_and_their_end() {
    let dir = private_dir();
    let mut exec = shell(
        "test -t 0 && test -t 1 && test -t 2 && stty size && stty -echo && echo ready && cat && echo end",
    );
    exec.pty = true;
    let (_proxy, mut client) = started(dir.path(), exec);
    let mut said = [0; 14];
    client.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"24 80\r\nready\r\n");
    client.write_all(b"one\ntwo").unwrap();
    client.half_close();
    assert_eq!(rest(client), "one\r\ntwoend\r\n");
}

#[test]
fn a_program_that_can_not_be_started_is_a_refusal_with_its_reason() {
    let dir = private_dir();
    let plain = dir.path().join("plain");
    fs::write(&plain, "echo").unwrap();
    let script = dir.path().join("script");
    fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    for (program, reason, absent) in [
        (
            "/no/such/program",
            "there is no program /no/such/program: is the path right?",
            1,
        ),
        (plain.to_str().unwrap(), "chmod +x /", 0),
        (script.to_str().unwrap(), "interpreter in the first line", 1),
        ("/", "/ is a directory", 0),
    ] {
        let (proxy, client) = started(dir.path(), ExecAddress::new(program));
        assert_eq!(rest(client), "");
        eventually("it is counted", || {
            proxy.forwards()[0].counters.refused == 1
        });
        let forward = &proxy.forwards()[0];
        assert_eq!(forward.counters.refusals.absent, absent, "{program}");
        let why = &forward.last_error.as_ref().unwrap().text;
        assert!(why.contains(reason), "{program}: {why}");
    }
}

#[test]
fn so_many_programs_as_are_allowed_run_at_a_time() {
    let dir = private_dir();
    let target = ExecAddress::new("/bin/cat").into();
    let mut rule = Rule::new(unix(dir.path().join("s")), target);
    rule.connections = Some(2);
    let proxy = Proxy::start(config(vec![rule])).unwrap();
    let mut first = connected(dir.path());
    let second = connected(dir.path());
    let mut third = connected(dir.path());
    eventually("two are accepted", || {
        proxy.forwards()[0].counters.live == 2
    });
    first.write_all(b"1").unwrap();
    first.read_exact(&mut [0]).unwrap();
    third.write_all(b"3").unwrap();
    third
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    assert!(third.read(&mut [0]).is_err());
    drop(second);
    third.set_read_timeout(Some(PATIENCE)).unwrap();
    third.read_exact(&mut [0]).unwrap();
    assert_eq!(proxy.forwards()[0].counters.accepted, 3);
}

/// The bound holds for who can't be made to wait: a guest is refused.
#[test]
fn no_more_are_allowed_than_64_unless_it_is_said() {
    let dir = private_dir();
    let (proxy, first) = started(dir.path(), ExecAddress::new("/bin/cat"));
    let mut clients: Vec<UnixStream> = (0..63).map(|_| connected(dir.path())).collect();
    clients.push(first);
    eventually("all are accepted", || {
        proxy.forwards()[0].counters.live == 64
    });
    let mut one_more = connected(dir.path());
    one_more.write_all(b"x").unwrap();
    one_more
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    assert!(one_more.read(&mut [0]).is_err());
    assert_eq!(proxy.forwards()[0].counters.accepted, 64);
}

/// In a process of its own, whose children and descriptors are counted.
#[test]
fn nothing_is_left_of_a_thousand_programs() {
    let dir = private_dir();
    let path = dir.path().join("s");
    let listen = path.to_str().unwrap();
    let forward = ["forward", listen, "exec:/bin/cat", "--connections", "1000"];
    let mut hvsock = Running::start(&forward);
    hvsock.says("/bin/cat");
    let before = cfg!(target_os = "linux").then(|| hvsock.descriptors());
    let id = hvsock.child.0.id();
    for _ in 0..10 {
        let mut clients: Vec<UnixStream> = (0..100).map(|_| connected(dir.path())).collect();
        for (index, client) in clients.iter_mut().enumerate() {
            client.write_all(b"hello").unwrap();
            client.read_exact(&mut [0; 5]).unwrap();
            if index % 2 == 0 {
                client.half_close();
                assert_eq!(client.read_to_end(&mut Vec::new()).unwrap(), 0);
            }
        }
    }
    if let Some(before) = before {
        eventually("all descriptors are closed", || {
            hvsock.descriptors() <= before
        });
        let children = format!("/proc/{id}/task/{id}/children");
        let threads = format!("/proc/{id}/task");
        eventually("no program is left", || {
            let of_threads = fs::read_dir(&threads).unwrap().flatten();
            let mut left =
                of_threads.filter_map(|it| fs::read_to_string(it.path().join("children")).ok());
            Path::new(&children).exists() && left.all(|it| it.is_empty())
        });
    }
    hvsock.signal("TERM");
    assert_eq!(hvsock.exit_code(), Some(0));
}

/// How many programs there are under load; `HVSOCK_TEST_EXECS` says another number.
const PROGRAMS: usize = 100;

/// What a connection's program does, where `$0` is a marker, and how its client takes part.
const KINDS: [(&str, LastStep); 5] = [
    ("echo begun; exec cat", LastStep::HalfClose),
    ("echo begun; exec cat", LastStep::Drop),
    // With grandchildren in the background, which have its output.
    (
        "sleep 1000 & sh -c 'sleep 1000 & sleep 1000' \"$0\" & echo begun; wait",
        LastStep::Drop,
    ),
    // Deaf to all but SIGKILL, and so is its child; one goes on writing, the other is silent.
    (
        "trap '' HUP TERM PIPE; echo begun; sh -c 'while :; do sleep 1; done' \"$0\" & while :; do echo on 2>/dev/null; sleep 1; done",
        LastStep::Drop,
    ),
    (
        "trap '' HUP TERM PIPE; echo begun; sh -c 'sleep 1000' \"$0\" & while :; do sleep 1; done",
        LastStep::HalfClose,
    ),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum LastStep {
    HalfClose,
    Drop,
}

/// The processes that have this in their environment, by what they run.
fn marked(mark: &str) -> Vec<String> {
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").unwrap().flatten() {
        // Others come and go, or are not ours to look at.
        let environment = fs::read(process.path().join("environ")).unwrap_or_default();
        if environment
            .split(|byte| *byte == 0)
            .any(|it| it == mark.as_bytes())
        {
            let words = fs::read(process.path().join("cmdline")).unwrap_or_default();
            found.push(String::from_utf8_lossy(&words).replace('\0', " "));
        }
    }
    found
}

/// An hvsock with a forward for each kind of program, in that directory.
fn with_all_kinds(dir: &Path, mark: &str) -> Running {
    let mut words = vec!["forward".to_owned()];
    for (index, (script, _)) in KINDS.iter().enumerate() {
        let mut exec = shell(script);
        exec.args.push(mark.into());
        let (name, value) = mark.split_once('=').unwrap();
        exec.env = vec![(name.into(), value.into())];
        words.push(dir.join(format!("s{index}")).display().to_string());
        words.push(Address::from(exec).to_string());
    }
    words.extend(["--connections=1000", "--half-closed-timeout=2", "--grace=1"].map(String::from));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let hvsock = Running::start(&words);
    for index in 0..KINDS.len() {
        hvsock.says(&format!("/s{index} "));
    }
    hvsock
}

/// The clients of so many programs, all of which have begun.
fn clients(dir: &Path, count: usize) -> Vec<(UnixStream, LastStep)> {
    let connect = |number: usize| {
        let kind = number % KINDS.len();
        let client = unix_client(&dir.join(format!("s{kind}")));
        (client, KINDS[kind].1)
    };
    let mut clients: Vec<_> = (0..count).map(connect).collect();
    for (client, _) in &mut clients {
        client.read_exact(&mut [0; 6]).unwrap();
    }
    clients
}

/// Programs that end, that have children, and that are deaf to their end, in waves; then the end of
/// the proxy while they run.
#[test]
fn nothing_is_left_of_programs_under_load() {
    if !cfg!(target_os = "linux") {
        return println!("skipped: there is no /proc here");
    }
    let count = std::env::var("HVSOCK_TEST_EXECS").map_or(PROGRAMS, |it| it.parse().unwrap());
    let dir = private_dir();
    let mark = format!("HVSOCK_EXECS={}", dir.path().display());
    let mut hvsock = with_all_kinds(dir.path(), &mark);
    let before = hvsock.descriptors();
    for _ in 0..count.div_ceil(100) {
        let mut clients = clients(dir.path(), 100);
        clients.retain(|(_, last_step)| *last_step == LastStep::HalfClose);
        clients.iter().for_each(|(client, _)| client.half_close());
        for (mut client, _) in clients {
            // That of a deaf one is cut in the end.
            assert_eq!(client.read_to_end(&mut Vec::new()).unwrap(), 0);
        }
    }
    eventually("no process is left", || marked(&mark).is_empty());
    eventually("all descriptors are closed", || {
        hvsock.descriptors() <= before
    });
    let zombies = || {
        let id = hvsock.child.0.id();
        let tasks = fs::read_dir(format!("/proc/{id}/task")).unwrap().flatten();
        let children = tasks.map(|it| fs::read_to_string(it.path().join("children")));
        children.flatten().any(|it| !it.is_empty())
    };
    eventually("no zombie is left", || !zombies());
    let kept = clients(dir.path(), 50);
    assert!(marked(&mark).len() > kept.len());
    hvsock.signal("TERM");
    assert_eq!(hvsock.exit_code(), Some(0));
    let left = marked(&mark);
    assert!(left.is_empty(), "{left:?}");
    drop(kept);
}

#[test]
fn the_control_socket_starts_no_program_unless_it_may() {
    let dir = private_dir();
    let control = dir.path().join("c");
    let option = format!("--control={}", control.display());
    let listen = dir.path().join("s");
    let add = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
        command.args(["add", "--control", control.to_str().unwrap()]);
        command.args([listen.to_str().unwrap(), "exec:/bin/cat"]);
        output(command)
    };
    let other = dir.path().join("o");
    let forward = [
        "forward",
        other.to_str().unwrap(),
        "tcp://127.0.0.1:1",
        &option,
    ];
    let hvsock = Running::start(&forward);
    hvsock.says("controlled");
    let refused = add();
    assert_eq!(refused.status.code(), Some(1));
    let why = String::from_utf8(refused.stderr).unwrap();
    assert!(
        why.contains("--allow-exec") && why.contains("allow-exec = true"),
        "{why}"
    );
    assert!(!listen.exists());
    drop(hvsock);
    let allowed = Running::start(&[&forward[..], &["--allow-exec"]].concat());
    allowed.says("controlled");
    assert_eq!(add().status.code(), Some(0));
    assert!(listen.exists());
    drop(allowed);
    // A file that allows it, and then doesn't.
    let file = dir.path().join("f.toml");
    let text = |exec| {
        let (control, listen) = (control.display(), dir.path().join("t"));
        let listen = listen.display();
        format!(
            "control = \"{control}\"\nallow-exec = {exec}\n[forward.t]\nlisten = \"{listen}\"\nconnect = \"exec:/bin/cat?arg=-u\"\n"
        )
    };
    fs::write(&file, text(true)).unwrap();
    let _ = fs::remove_file(&listen);
    let running = Running::start(&["run", file.to_str().unwrap()]);
    running.says("controlled");
    assert_eq!(add().status.code(), Some(0));
    let remove = [
        "remove",
        "--control",
        control.to_str().unwrap(),
        listen.to_str().unwrap(),
    ];
    assert!(run(&remove).status.success());
    fs::write(&file, text(false)).unwrap();
    assert!(
        run(&["reload", "--control", control.to_str().unwrap()])
            .status
            .success()
    );
    assert_eq!(add().status.code(), Some(1));
    // Its own forward is the file's, and stays.
    let mut client = UnixStream::connect(dir.path().join("t")).unwrap();
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
}

/// What is told of the last connection that has ended.
fn last_ended(control: &str) -> serde_json::Value {
    let output = run(&["connections", "--ended", "--json", "--control", control]);
    let mut all: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    all.pop().unwrap_or_default()
}

/// Its exit status is known some time after the end of its output.
#[test]
fn how_a_program_has_failed_is_told_wherever_it_is_told_why_a_connection_ended() {
    let dir = private_dir();
    let control = dir.path().join("control");
    let control = control.to_str().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let script = |script: &str| Address::from(shell(script)).to_string();
    let cases = [
        ("a", "exit 1", "exit status 1", "1", "null"),
        (
            "b",
            "echo x; exec 2>&-; kill -9 $$",
            "killed by signal 9",
            "null",
            "9",
        ),
        ("c", "cat; exit 3", "exit status 3", "3", "null"),
    ];
    let mut words = vec!["forward".to_owned(), "--access-log".to_owned()];
    words.push(format!("--control={control}"));
    for (name, text, ..) in cases {
        words.extend([at(name), script(text)]);
    }
    words.extend([at("fine"), script("cat; exit 0")]);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let hvsock = Running::start(&words);
    hvsock.says("controlled");
    let events = Running::start(&["events", "--control", control]);
    events.says("\"event\"");
    for (name, _, words, status, signal) in cases {
        let client = UnixStream::connect(at(name)).unwrap();
        client.half_close();
        rest(&client);
        let line = hvsock.complains("closed id=");
        assert!(
            line.contains(&format!("why=program failed ({words})")),
            "{line}"
        );
        let event = events.says("connection_closed");
        let event: serde_json::Value = serde_json::from_str(&event).unwrap();
        for told in [&event, &last_ended(control)] {
            assert_eq!(told["why"], "program_failed", "{told}");
            assert_eq!(told["exit_status"].to_string(), status, "{told}");
            assert_eq!(told["signal"].to_string(), signal, "{told}");
        }
        let table = run(&["connections", "--ended", "--control", control]);
        let table = String::from_utf8(table.stdout).unwrap();
        assert!(
            table.contains(&format!("program failed ({words})")),
            "{table}"
        );
    }
    let client = UnixStream::connect(at("fine")).unwrap();
    client.half_close();
    rest(&client);
    let line = hvsock.complains("closed id=");
    assert!(line.contains("why=client closed"), "{line}");
    let status = run(&["status", "--control", control]);
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(status.contains("1 program failed"), "{status}");
}

/// Nobody waits for a program that goes on behind its last word for long; what becomes of it is
/// told all the same.
#[test]
fn the_failure_of_a_program_that_outlives_its_connection_is_told_later() {
    let dir = private_dir();
    let fifo = dir.path().join("fifo");
    let mode = nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR;
    nix::unistd::mkfifo(&fifo, mode).unwrap();
    let mut gate = fs::File::options()
        .read(true)
        .write(true)
        .open(&fifo)
        .unwrap();
    let script = format!("exec <&- >&-; read x <{}; exit 7", fifo.display());
    let (proxy, client) = started(dir.path(), shell(&script));
    assert_eq!(rest(client), "");
    let handle = proxy.handle();
    eventually("it has ended", || !handle.ended().is_empty());
    let why = || handle.ended()[0].why.name();
    assert_ne!(why(), "program_failed");
    assert!(handle.connections().is_empty());
    gate.write_all(b"go\n").unwrap();
    eventually("its failure is known", || why() == "program_failed");
    let why = handle.ended()[0].why.to_string();
    assert_eq!(why, "program failed (exit status 7)");
}

#[test]
fn cat_has_the_exit_code_of_the_program_that_it_is_connected_with() {
    for (script, code) in [
        ("exit 0", 0),
        ("exit 1", 1),
        ("cat; exit 3", 3),
        ("echo x; kill -9 $$", 128 + 9),
        // Behind its last word.
        ("exec <&- >&-; sleep 0.2; exit 5", 5),
    ] {
        let address = Address::from(shell(script)).to_string();
        let output = run(&["cat", &address]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{script}: {said}");
    }
    // What it doesn't read is its own choice, and its failure says more.
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(["cat", &Address::from(shell("exit 4")).to_string()]);
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    let mut cat = Mortal(command.spawn().unwrap());
    let mut input = cat.0.stdin.take().unwrap();
    while input.write_all(&[b'x'; 65_536]).is_ok() {}
    assert_eq!(cat.exit_code(), Some(4));
}

#[test]
fn cat_is_connected_with_a_program() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(["cat", "exec:/usr/bin/env?arg=sed&arg=s/a/b/"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"aha\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(output.stdout, b"bha\n");
    // What it is told of a program that isn't there.
    let output = run(&["cat", "exec:/no/such"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("is the path right?")
    );
}

#[test]
fn cat_ends_the_program_when_it_is_ended() {
    let dir = private_dir();
    let pid = dir.path().join("pid");
    let script = format!(
        "exec:/bin/sh?arg=-c&arg=echo%20$$%20>{};echo%20begun;exec%20sleep%201000",
        pid.display()
    );
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(["cat", &script]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = Mortal(command.spawn().unwrap());
    let _input = child.0.stdin.take();
    let out = lines(child.0.stdout.take().unwrap());
    next(&out, "begun");
    let pid = fs::read_to_string(&pid).unwrap();
    child.signal("TERM");
    assert_eq!(child.exit_code(), Some(1));
    eventually("the program is gone", || !is_alive(&pid));
}

/// `cat` with a shell's script in the place of its standard input and output.
fn cat_with(arguments: &[&str], script: &str) -> Mortal {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.arg("cat").args(arguments);
    command.args(["--exec", "/bin/sh", "--", "-c", script]);
    Mortal(command.stdin(Stdio::null()).spawn().unwrap())
}

/// A server, and its address.
fn server(directory: &Path) -> (std::os::unix::net::UnixListener, String) {
    let path = directory.join("server");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    (listener, path.to_str().unwrap().to_owned())
}

#[test]
fn cat_gives_the_connection_to_a_program_and_has_its_exit_code() {
    let dir = private_dir();
    let path = dir.path().join("s");
    let mut cat = cat_with(&["-l", path.to_str().unwrap()], "sort; exit 3");
    eventually("it listens", || path.exists());
    // The file is there before anybody listens.
    let mut client = unix_client(&path);
    client.write_all(b"b\na\n").unwrap();
    client.half_close();
    assert_eq!(rest(client), "a\nb\n");
    assert_eq!(cat.exit_code(), Some(3));
    // By an address, and a signal's number as a shell tells it.
    let (listener, address) = server(dir.path());
    let exec = "exec:/bin/sh?arg=-c&arg=kill%20-9%20$$";
    let mut cat = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    cat.args(["cat", &address, "--exec", exec]);
    let mut cat = Mortal(cat.spawn().unwrap());
    drop(listener.accept().unwrap());
    assert_eq!(cat.exit_code(), Some(128 + 9));
}

#[test]
fn cat_waits_for_its_program_when_the_peer_has_gone() {
    let dir = private_dir();
    let (listener, address) = server(dir.path());
    let (go, done) = (dir.path().join("go"), dir.path().join("done"));
    let script = format!(
        "cat >/dev/null; while ! test -e {}; do sleep 0.05; done; echo >{}; exit 5",
        go.display(),
        done.display()
    );
    let mut cat = cat_with(&[&address], &script);
    let (mut peer, _) = listener.accept().unwrap();
    peer.write_all(b"all of it").unwrap();
    drop(peer);
    // More than once it is looked whether the peer has gone.
    std::thread::sleep(Duration::from_millis(300));
    fs::write(go, "").unwrap();
    assert_eq!(cat.exit_code(), Some(5));
    assert!(done.exists());
}

#[test]
fn the_peer_has_all_that_a_program_has_said_before_it_ended() {
    let dir = private_dir();
    let (listener, address) = server(dir.path());
    // It reads nothing of what comes, and the peer doesn't end.
    let script = "head -c 300000 /dev/zero; exit 7";
    let mut cat = cat_with(&[&address, "--drain-timeout", "60"], script);
    let (mut peer, _) = listener.accept().unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    peer.write_all(b"what nobody reads").unwrap();
    assert_eq!(rest(&peer).len(), 300_000);
    // More than once it is looked whether the program has gone.
    std::thread::sleep(Duration::from_millis(300));
    assert!(cat.0.try_wait().unwrap().is_none(), "the peer has time");
    drop(peer);
    assert_eq!(cat.exit_code(), Some(7));
}

#[test]
fn cat_ends_a_program_whose_connection_breaks() {
    let dir = private_dir();
    let (listener, address) = server(dir.path());
    let pid = dir.path().join("pid");
    let script = format!("echo $$ >{}; echo begun; exec sleep 1000", pid.display());
    let mut cat = cat_with(&[&address], &script);
    let (mut peer, _) = listener.accept().unwrap();
    peer.read_exact(&mut [0; 6]).unwrap();
    let pid = fs::read_to_string(&pid).unwrap();
    cat.signal("TERM");
    assert_eq!(cat.exit_code(), Some(1));
    eventually("the program is gone", || !is_alive(&pid));
}

#[cfg(feature = "simulate")]
#[test]
fn a_guest_is_connected_with_a_program() {
    use hvsock::simulate::{Service, Vm};
    let dir = private_dir();
    let vm = Vm::builder(dir.path()).guest(7, Service::Echo).start();
    let vm = vm.unwrap();
    let address = format!("hyperkit://:7{}", dir.path().display());
    let script = "echo hello; read answer; test $answer = hello && exit 4";
    assert_eq!(cat_with(&[&address], script).exit_code(), Some(4));
    // A program that isn't there hurts no guest either.
    let output = run(&["cat", &address, "--exec", "/no/such"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("is the path right?"), "{said}");
    drop(vm);
}

#[test]
fn a_program_of_cat_is_named_by_its_path() {
    let output = run(&["cat", "/no/such", "--exec", "sort"]);
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("write its path"), "{said}");
}

#[test]
fn a_file_is_sent_to_each_client_from_its_beginning() {
    let dir = private_dir();
    let path = dir.path().join("content");
    let content: String = (0..100_000).map(|n| format!("{n}\n")).collect();
    fs::write(&path, &content).unwrap();
    let target: Address = format!("file:{}", path.display()).parse().unwrap();
    let (proxy, mut client) = started(dir.path(), target.clone());
    // What it sends is discarded.
    client.write_all(&[b'.'; 100_000]).unwrap();
    assert!(rest(&client) == content);
    drop(client);
    assert!(rest(connected(dir.path())) == content);
    fs::remove_file(&path).unwrap();
    assert_eq!(rest(connected(dir.path())), "");
    fs::create_dir(&path).unwrap();
    assert_eq!(rest(connected(dir.path())), "");
    eventually("both are counted", || {
        proxy.forwards()[0].counters.refused == 2
    });
    let forward = &proxy.forwards()[0];
    assert_eq!(
        (
            forward.counters.refusals.absent,
            forward.counters.refusals.other
        ),
        (2, 0)
    );
    let why = &forward.last_error.as_ref().unwrap().text;
    assert!(why.contains("is a directory; name a file in it"), "{why}");
}

#[test]
fn neither_is_listened_on() {
    for (listen, part) in [("exec:/bin/cat", "a program"), ("file:/etc/motd", "a file")] {
        let rule = Rule::new(listen.parse().unwrap(), any_tcp());
        let error = Proxy::start(config(vec![rule])).unwrap_err().to_string();
        assert!(
            error.contains(part) && error.contains("not listened on"),
            "{error}"
        );
    }
    let output = run(&["cat", "-l", "exec:/bin/cat"]);
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("not listened on")
    );
}
