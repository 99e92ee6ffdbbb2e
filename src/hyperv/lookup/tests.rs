#![allow(clippy::unwrap_used)]

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use uuid::Uuid;

use super::*;
use crate::hyperv::answer::{Why, parse};

const PATIENCE: Duration = Duration::from_secs(20);

/// Names that would do harm to a script, a line or a terminal.
const NASTY: [&str; 9] = [
    "My VM",
    "it's \"quoted\" `too`",
    "$(Remove-Item C:/) ${x}; exit",
    "*",
    "two\nlines\r\nhvsock-done 0",
    "hvsock-vm 00000000-0000-0000-0000-000000000009 Off -",
    "\u{1b}[2J\t\u{202e}",
    "日本語 ÄÖÜ 🙂",
    "",
];

fn id(number: u128) -> VmId {
    VmId(Uuid::from_u128(number))
}

/// As the script says it.
fn hex(text: &str) -> String {
    let digits: String = text.bytes().map(|byte| format!("{byte:02X}")).collect();
    format!("-{digits}")
}

fn machine(number: u128, name: &str) -> Machine {
    Machine {
        name: name.to_owned(),
        id: id(number),
        state: "Running".to_owned(),
    }
}

fn answer(machines: &[Machine], end: &str) -> String {
    let mut text = String::new();
    for vm in machines {
        let line = format!("hvsock-vm {} {} {}{end}", vm.id, vm.state, hex(&vm.name));
        text.push_str(&line);
    }
    text + &format!("hvsock-done {}{end}", machines.len())
}

fn nasty() -> Vec<Machine> {
    let names = NASTY.iter().enumerate();
    names
        .map(|(n, name)| machine(n as u128 + 1, name))
        .collect()
}

#[test]
fn any_name_arrives_as_it_is() {
    for end in ["\n", "\r\n"] {
        assert_eq!(parse(answer(&nasty(), end).as_bytes()), Ok(nasty()));
    }
    assert_eq!(parse(b"hvsock-done 0\r\n"), Ok(Vec::new()));
}

#[test]
fn what_else_is_printed_is_passed_over() {
    let noise = b"WARNING: \xff\xfe hvsock-vm\r\n\r\n".to_vec();
    let text = [noise.clone(), answer(&nasty(), "\r\n").into_bytes(), noise].concat();
    assert_eq!(parse(&text), Ok(nasty()));
}

#[test]
fn an_answer_that_is_not_whole_and_right_is_none() {
    let whole = answer(&nasty(), "\n");
    for end in 0..whole.len() - 1 {
        assert_eq!(parse(&whole.as_bytes()[..end]), Err(None), "{end}");
    }
    let line = format!("hvsock-vm {} Running -41", id(1));
    assert!(parse(format!("{line}\nhvsock-done 1\n").as_bytes()).is_ok());
    for wrong in [
        format!("{line}\nhvsock-done 2\n"),
        format!("{line}\nhvsock-done 01\n"),
        format!("hvsock-done 0\n{line}\n"),
        format!("{line}4\nhvsock-done 1\n"),
        format!("{line} x\nhvsock-done 1\n"),
        line.replace("-41", "41") + "\nhvsock-done 1\n",
        line.replace("-41", "-+4") + "\nhvsock-done 1\n",
        line.replace("-41", "-FF") + "\nhvsock-done 1\n",
        line.replace("Running", "") + "\nhvsock-done 1\n",
        line.replace("Running", "\u{1b}[2J") + "\nhvsock-done 1\n",
        line.replace("00000001", "0000000g") + "\nhvsock-done 1\n",
        line.replace("hvsock-vm", "hvsock-VM") + "\nhvsock-done 1\n",
        String::new(),
    ] {
        assert_eq!(parse(wrong.as_bytes()), Err(None), "{wrong}");
    }
}

#[test]
fn a_failure_is_told_with_its_kind() {
    let failed = |kind, message| parse(format!("hvsock-failed {kind} {message}\n").as_bytes());
    let no = || hex("Zugriff\r\nverweigert");
    let said = "Zugriff\r\nverweigert".to_owned();
    assert_eq!(
        failed("denied", no()),
        Err(Some((Why::Denied, said.clone())))
    );
    assert_eq!(
        failed("module", no()),
        Err(Some((Why::Module, said.clone())))
    );
    assert_eq!(failed("other", no()), Err(Some((Why::Other, said))));
    assert_eq!(failed("other", "no".to_owned()), Err(None));
}

#[test]
fn a_vm_is_found_by_its_name_and_by_nothing_like_it() {
    let machines = nasty();
    for (number, name) in NASTY.iter().enumerate() {
        assert_eq!(find_in(&machines, name).unwrap(), id(number as u128 + 1));
    }
    assert_eq!(find_in(&machines, "my vm").unwrap(), id(1));
    assert_eq!(find_in(&machines, "日本語 äöü 🙂").unwrap(), id(8));
    for none in ["My*", "?", "My", " My VM", "My VM "] {
        let failed = find_in(&machines, none).unwrap_err();
        assert_eq!(failed.cause.kind(), ErrorKind::NotFound);
        let said = failed.cause.to_string();
        assert!(said.contains("\"My VM\", "), "{said}");
        assert!(!said.contains(char::is_control), "{said}");
    }
    let failed = find_in(&[], "x").unwrap_err();
    assert_eq!(failed.cause.to_string(), "Hyper-V has no VM");
}

#[test]
fn several_of_one_name_are_told_apart_by_their_ids() {
    let machines = [machine(1, "vm"), machine(2, "VM"), machine(3, "vm")];
    let failed = find_in(&machines, "vm").unwrap_err();
    assert_eq!(failed.cause.kind(), ErrorKind::InvalidInput);
    let said = failed.cause.to_string();
    let ids = (
        id(1).0.to_string(),
        id(2).0.to_string(),
        id(3).0.to_string(),
    );
    assert!(said.contains(&ids.0) && said.contains(&ids.2), "{said}");
    assert!(!said.contains(&ids.1), "{said}");
    assert_eq!(find_in(&machines, "VM").unwrap(), id(2));
    let failed = find_in(&machines, "Vm").unwrap_err();
    assert!(failed.cause.to_string().contains(&ids.1));
}

#[test]
fn a_name_that_is_known_is_not_asked_for_again() {
    let known = KnownMachines(Mutex::new(None));
    let nobody = || panic!("it is known");
    let one = || Ok(vec![machine(1, "one")]);
    let both = || Ok(vec![machine(1, "one"), machine(2, "two")]);
    let no = || Err(LookupFailed::new(ErrorKind::Other, "no", ""));
    known.find("one", no).unwrap_err();
    assert_eq!(known.find("one", one).unwrap(), id(1));
    assert_eq!(known.find("ONE", nobody).unwrap(), id(1));
    // One that isn't may have come.
    assert_eq!(known.find("two", both).unwrap(), id(2));
    assert_eq!(known.find("two", nobody).unwrap(), id(2));
    let old = Instant::now().checked_sub(KNOWN_FOR).unwrap();
    known.0.lock().unwrap().as_mut().unwrap().0 = old;
    assert_eq!(known.find("one", no).unwrap_err().cause.to_string(), "no");
}

/// What stands between the quotation marks of a command line.
#[test]
fn the_script_is_one_argument() {
    assert!(!SCRIPT.contains('"') && !SCRIPT.contains("\\'") && SCRIPT.is_ascii());
    assert!(SCRIPT.len() < 8000);
}

const FAKE: &str = "HVSOCK_FAKE_POWERSHELL";

/// This test program again, in the place of PowerShell: prints what it is told to.
fn fake(print: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "hyperv::lookup::tests::stand_in", "--nocapture"]);
    command.env(FAKE, print);
    command
}

/// Not a test, but what [`fake`] runs.
#[test]
fn stand_in() {
    let Some(print) = std::env::var_os(FAKE) else {
        return;
    };
    let print = print.into_string().unwrap();
    if let Some(port) = print.strip_prefix("nothing, for ever ") {
        let _held = TcpStream::connect(("127.0.0.1", port.parse().unwrap())).unwrap();
        loop {
            std::thread::park();
        }
    }
    if print == "without end" {
        let line = [b'x'; 4096];
        while std::io::stdout().write_all(&line).is_ok() {}
    }
    let (out, err) = print.split_once('|').unwrap_or((&print, ""));
    eprint!("{err}");
    println!("\n{out}");
    std::process::exit(0);
}

#[test]
fn a_program_is_asked() {
    let machines = [machine(2, "b\nc"), machine(1, "a")];
    let found = ask_within(fake(&answer(&machines, "\n")), PATIENCE).unwrap();
    let [b, a] = machines;
    assert_eq!(found, [a, b]);
}

#[test]
fn why_there_is_no_list_is_told_apart() {
    let failed = |kind: &str| format!("hvsock-failed {kind} {}", hex("No\nway."));
    for (print, kind, words) in [
        (
            failed("denied"),
            ErrorKind::PermissionDenied,
            ["No way", "Hyper-V Administrators"],
        ),
        (
            failed("module"),
            ErrorKind::Unsupported,
            ["No way", "tools on"],
        ),
        (failed("other"), ErrorKind::Other, ["No way", "Get-VM"]),
        (
            "|At line:1\n bad".to_owned(),
            ErrorKind::InvalidData,
            ["At line:1 bad", "Get-VM"],
        ),
        (
            String::new(),
            ErrorKind::InvalidData,
            ["not run our script", "Get-VM"],
        ),
    ] {
        let error = ask_within(fake(&print), PATIENCE)
            .unwrap_err()
            .into_error(Operation::Find, "VM \"x\"");
        assert_eq!(error.kind(), kind);
        let said = error.to_string();
        for part in ["cannot find VM \"x\": "].into_iter().chain(words) {
            assert!(said.contains(part), "{said}");
        }
        assert!(!said.contains('\n'));
    }
}

#[test]
fn a_program_that_is_not_there_is_not_a_vm_that_is_not_there() {
    let failed = ask_within(Command::new("/no/such/powershell"), PATIENCE).unwrap_err();
    assert_eq!(failed.cause.kind(), ErrorKind::Unsupported);
    assert!(
        failed
            .cause
            .to_string()
            .contains("PowerShell can't be asked")
    );
}

#[test]
fn a_program_that_does_not_end_is_ended() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let print = format!(
        "nothing, for ever {}",
        listener.local_addr().unwrap().port()
    );
    // It may be ended before it has connected.
    let mut timeout = Duration::from_millis(300);
    let mut held = loop {
        let failed = ask_within(fake(&print), timeout).unwrap_err();
        assert_eq!(failed.cause.kind(), ErrorKind::TimedOut);
        if let Ok((held, _)) = listener.accept() {
            break held;
        }
        timeout *= 2;
        assert!(timeout < PATIENCE, "it never starts");
    };
    held.set_nonblocking(false).unwrap();
    held.set_read_timeout(Some(PATIENCE)).unwrap();
    let told = held.read(&mut [0]);
    let died = match &told {
        Ok(count) => *count == 0,
        Err(e) => e.kind() == ErrorKind::ConnectionReset,
    };
    assert!(died, "{told:?}");
}

#[test]
fn a_program_that_prints_without_end_is_ended() {
    let failed = ask_within(fake("without end"), PATIENCE).unwrap_err();
    assert_eq!(failed.cause.kind(), ErrorKind::InvalidData);
}

#[cfg(not(windows))]
#[test]
fn other_systems_have_no_hyper_v() {
    for error in [list().unwrap_err(), find("x").unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
}
