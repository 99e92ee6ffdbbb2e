#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::time::Duration;

use super::*;

const HERE: &str = "/nonexistent";

fn places() -> Places {
    Places {
        current_dir: PathBuf::from(HERE),
        ..Places::default()
    }
}

fn right(text: &str) -> (Config, WantedState) {
    Config::parse(text, Path::new(""), &places()).unwrap()
}

/// Returns the problems of a text, each with its line.
fn wrong(text: &str) -> Vec<(usize, String)> {
    let mut list = Config::parse(text, Path::new(""), &places()).unwrap_err();
    list.retain(|it| it.weight == Weight::Mistake);
    list.sort();
    let line = |problem: Problem| (problem.line.unwrap().number, problem.text);
    list.into_iter().map(line).collect()
}

#[test]
fn nothing_is_asked_for_by_nothing() {
    let (config, wanted) = right("[defaults]");
    assert_eq!(config.grace, Duration::from_secs(30));
    assert!(wanted.rules.is_empty() && wanted.missing.is_empty());
    // A file that is cut to nothing, as while it is written, is a mistake.
    assert_eq!(
        wrong(" \n"),
        [(1, "it is empty; write a [forward.NAME]".to_owned())]
    );
}

#[cfg(unix)]
#[test]
fn each_key_has_its_place() {
    let (config, wanted) = right(
        r#"
        grace = 5
        workers = 3
        splice = false
        [defaults]
        mode = 0o640
        dial-timeout = "1m30s"
        idle-timeout = "1h"
        half-closed-timeout = 0.5
        wait = "250ms"
        [vm.one]
        at = "hyperkit://9/vm/one"
        connections = 20
        [forward.to]
        listen = "/run/to.sock"
        vm = "one"
        port = "0x50"
        mode = "600"
        reserved = 19
        [forward.from]
        vm = "/vm/two"
        guest-dials = 0x1388
        connect = "localhost:80"
        idle-timeout = "never"
        drain-timeout = "2s"
        wait = "fail"
        "#,
    );
    assert_eq!(config.grace, Duration::from_secs(5));
    assert_eq!((config.workers.unwrap().get(), config.splice), (3, false));
    let [to, from] = &wanted.rules[..] else {
        panic!("{wanted:?}");
    };
    assert_eq!(to.name.as_deref(), Some("to"));
    assert_eq!(to.listen.to_string(), "unix:///run/to.sock");
    assert_eq!(to.connect.to_string(), "hyperkit://9:80/vm/one");
    assert_eq!((to.mode, to.reserved), (0o600, 19));
    assert_eq!(to.timeouts.dial, Duration::from_secs(90));
    assert_eq!(to.timeouts.idle, Some(Duration::from_secs(3600)));
    assert_eq!(to.timeouts.half_closed, Some(Duration::from_millis(500)));
    assert_eq!(to.wait, Some(Duration::from_millis(250)));
    assert_eq!(from.listen.to_string(), "hyperkit://:5000/vm/two");
    assert_eq!(from.connect.to_string(), "tcp://localhost:80");
    assert_eq!((from.mode, from.reserved, from.wait), (0o640, 0, None));
    assert_eq!(from.timeouts.idle, None);
    assert_eq!(from.timeouts.drain, Duration::from_secs(2));
    let [limits] = &wanted.limits[..] else {
        panic!("{wanted:?}");
    };
    assert_eq!((limits.connections, limits.unanswered), (Some(20), None));
    // Neither directory exists; they may come later.
    let missing: Vec<&str> = wanted.missing.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(missing, ["one", "/vm/two"]);
}

/// Keys that a forward can't have so, and a part of each message.
const WRONG: [(&str, &str); 19] = [
    ("connect = 70000", "larger than 65535"),
    ("connect = \"web.sock\"", "./web.sock"),
    ("connect = true", "it is true or false"),
    ("connect = 0", "port 0"),
    ("connect = \"~root/s\"", "only ~/"),
    ("connect = 9\nport = 80", "connect is there, too"),
    ("port = 80", "of which VM"),
    ("connect = 9\nvm = \"/x\"", "which port?"),
    (
        "connect = 9\nvm = \"/x\"\nport = 80",
        "connect is there, too",
    ),
    (
        "connect = 9\nvm = \"/x\"\nguest-dials = 80",
        "listen is there, too",
    ),
    (
        "vm = \"/x\"\nport = 1\nguest-dials = 80",
        "to the guest (listen, port)",
    ),
    ("vm = \"/x\"\nport = 4294967296", "no vsock port"),
    ("vm = \"/x\"\nport = 0", "port 0 is no vsock port"),
    (
        "vm = \"/x\"\nport = \"0xffffffff\"",
        "those are 1 to 4294967294",
    ),
    ("vm = \"/x\"\nport = \"http\"", "is not a number"),
    ("vm = 3\nport = 1", "a string, in quotes"),
    ("mode = \"600\"", "connect is missing"),
    ("conect = 9", "did you mean connect?"),
    ("colour = 9\nconnect = 9", "known there: vm, port"),
];

/// The same, of a forward that is otherwise valid.
const WRONG_VALUES: [(&str, &str); 16] = [
    ("dial-timeout = \"soon\"", "write \"30s\""),
    ("dial-timeout = \"5M\"", "M a month"),
    ("dial-timeout = -1", "-1 is no time"),
    ("dial-timeout = 1e30", "no time"),
    ("dial-timeout = nan", "no time"),
    ("dial-timeout = [1]", "it is a list"),
    ("drain-timeout = 0", "can't be 0"),
    ("idle-timeout = \"no\"", "or \"never\""),
    ("idle-timeout = 0", "can't be 0"),
    ("wait = \"never\"", "or \"fail\""),
    ("mode = 600", "\"600\""),
    ("mode = \"rw\"", "octal"),
    ("mode = 0o1777", "octal"),
    ("reserved = -1", "-1 is not a number from 0"),
    ("connections = 0", "0 is not a number from 1"),
    (
        "reserved = 3\nconnections = 2",
        "reserves 3 connections, and may have 2",
    ),
];

#[test]
fn what_is_wrong_with_a_forward_is_told_with_what_is_right() {
    let whole = |(line, part)| (format!("connect = 9\n{line}"), part);
    let alone = |(line, part): (&str, _)| (line.to_owned(), part);
    for (lines, part) in WRONG_VALUES.map(whole).into_iter().chain(WRONG.map(alone)) {
        let told = wrong(&format!("[forward.web]\nlisten = 8080\n{lines}\n"));
        let [(at, text)] = &told[..] else {
            panic!("{lines}: {told:?}");
        };
        assert!(
            text.contains("[forward.web]") && text.contains(part),
            "{lines}: {text}"
        );
        let lacking = text.contains("missing");
        assert_eq!(*at == 1, lacking, "{lines}: {told:?}");
    }
}

#[test]
fn a_table_is_no_value_and_a_value_no_table() {
    for (text, part) in [
        ("forward = 3", "[forward] is a number; write [forward.NAME]"),
        (
            "forward.web = 3",
            "[forward.web] is a number; write [forward.NAME]",
        ),
        (
            "defaults = \"x\"",
            "[defaults] is a string; write [defaults]",
        ),
        ("[forward.\"\"]", "can't be empty"),
        ("[forward.\"a\\nb\"]", "control characters"),
        ("[vm.\" \"]", "blank"),
        ("[grace]", "grace: it is a table"),
    ] {
        let told = wrong(text);
        assert!(
            told.len() == 1 && told[0].1.contains(part),
            "{text}: {told:?}"
        );
    }
}

#[test]
fn what_two_forwards_cannot_both_have_is_told_with_both_lines() {
    let told = wrong(
        "[forward.a]\nlisten = 80\nconnect = 9\n[forward.b]\nlisten = \"tcp://127.0.0.1:80\"\nconnect = 8\n",
    );
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].0, 5);
    assert!(told[0].1.contains("[forward.a] in line 2"), "{told:?}");
    // Ports that the kernel chooses don't conflict.
    right("[forward.a]\nlisten = 0\nconnect = 9\n[forward.b]\nlisten = 0\nconnect = 8\n");
}

#[cfg(unix)]
#[test]
fn vms_are_found_or_told_of() {
    let forward = "[forward.a]\nlisten = 0\nport = 80\n";
    let told = wrong(&format!(
        "[vm.docker]\nat = \"/x\"\n{forward}vm = \"dokcer\""
    ));
    assert!(
        told[0].0 == 6 && told[0].1.contains("did you mean \"docker\"?"),
        "{told:?}"
    );
    let told = wrong("\n[vm.docker]\n");
    assert!(
        told[0].0 == 2 && told[0].1.contains("cannot find VM \"docker\""),
        "{told:?}"
    );
    // Whatever other mistakes the forward of that VM has.
    let told = wrong("[forward.a]\nlisten = 0\nvm = \"nosuch\"\nport = \"0xZZ\"\n");
    let [(3, vm), (4, port)] = &told[..] else {
        panic!("{told:?}");
    };
    assert!(vm.contains("cannot find VM \"nosuch\""), "{vm}");
    assert!(port.contains("is not a number"), "{port}");
    let told = wrong("[vm.a]\nat = \"/x\"\n[vm.b]\nat = \"/x\"\n");
    assert!(
        told[0].0 == 4 && told[0].1.contains("is the same VM as \"a\""),
        "{told:?}"
    );
    let told = wrong("[vm.a]\nat = \"hyperkit://:80/x\"\n");
    assert!(
        told[0].0 == 2 && told[0].1.contains("only the VM is named"),
        "{told:?}"
    );
    let two = "listen = 0\nvm = \"a\"\nport = 8\nreserved = 6\n";
    let told = wrong(&format!(
        "[vm.a]\nat = \"/x\"\nconnections = 10\n[forward.a]\n{two}[forward.b]\n{two}"
    ));
    assert!(
        told[0]
            .1
            .contains("reserve 12 connections together, and it has 10"),
        "{told:?}"
    );
    // A client that waits takes a slot for the probe.
    let waiting = two.replace("reserved = 6", "reserved = 10\nwait = 1");
    let told = wrong(&format!(
        "[vm.a]\nat = \"/x\"\nconnections = 10\n[forward.a]\n{waiting}"
    ));
    assert!(told[0].1.contains("and it has 9 for them"), "{told:?}");
}

/// Listed tables are read all the same.
#[test]
#[cfg(unix)]
fn forwards_without_names_are_told_of_with_all_that_is_wrong_with_them() {
    let text = "[[forward]]\nlisten = 70000\nconnect = 9\n\n\
        [[forward]]\nname = \"web\"\nlisten = 1\nport = 0\nvm = \"nosuch\"\n";
    let told = wrong(text);
    let [(1, list), (2, listen), (8, port), (9, vm)] = &told[..] else {
        panic!("{told:?}");
    };
    assert!(list.contains("[forward] is a list; write [forward.NAME]"));
    assert!(listen.starts_with("[[forward]] 1 listen: "), "{listen}");
    assert!(port.starts_with("[[forward]] web port: "), "{port}");
    assert!(vm.contains("cannot find VM \"nosuch\""), "{vm}");
    // TOML puts one table into the other.
    let told = wrong("[[forward]]\nlisten = 1\nconnect = 9\n[forward.b]\nlisten = 70000\n");
    let [(1, _), (4, connect), (5, listen)] = &told[..] else {
        panic!("{told:?}");
    };
    assert!(connect.starts_with("[forward.b]: connect"), "{connect}");
    assert!(listen.starts_with("[forward.b] listen: "), "{listen}");
}

#[test]
#[cfg(unix)]
fn notes_are_told_beside_mistakes() {
    let text = "[vm.unused]\nat = \"/nonexistent/vm\"\n[forward.a]\nlisten = 1\n\
        connect = \"/nonexistent/there/s\"\n[forward.b]\nlisten = 70000\nconnect = 9\n";
    let mut list = Config::parse(text, Path::new(""), &places()).unwrap_err();
    list.sort();
    let told = |weight: Weight| -> Vec<usize> {
        let its = list.iter().filter(|it| it.weight == weight);
        its.map(|it| it.line.as_ref().unwrap().number).collect()
    };
    assert_eq!(told(Weight::Mistake), [7], "{list:?}");
    assert_eq!(told(Weight::Note), [1, 2, 5], "{list:?}");
}

/// If a section can't be read, the others are still checked.
#[test]
fn what_is_no_toml_hides_nothing_of_other_sections() {
    let broken = "[forward.a]\nlisten = \nconnect = 9\ncolour = 3\n";
    let others = "[forward.b]\nlisten = 70000\nconnect = 9\n[forward.c]\nconnect = 9\n";
    let lines = |told: &[(usize, String)]| told.iter().map(|it| it.0).collect::<Vec<_>>();
    let told = wrong(&format!("{broken}{others}"));
    assert_eq!(lines(&told), [2, 6, 8], "{told:?}");
    assert!(told[0].1.starts_with("this is no TOML: "), "{told:?}");
    assert!(told[2].1.contains("listen is missing"), "{told:?}");
    let told = wrong(&format!("grace = true\n{others}{broken}"));
    assert_eq!(lines(&told), [1, 3, 5, 8], "{told:?}");
    // A section that occurs twice.
    let told = wrong(&format!("[[forward]]\nlisten = 1\n{others}"));
    assert!(told.iter().any(|(line, _)| *line == 1), "{told:?}");
    // An open string may contain all that follows.
    let told = wrong(&format!("[forward.a]\nlisten = \"\"\"8080\n{others}"));
    let is_toml = |(_, text): &(usize, String)| !text.starts_with("this is no TOML: ");
    assert!(!told.iter().any(is_toml), "{told:?}");
}

#[test]
fn what_is_no_toml_is_told_all_at_once_and_nothing_else() {
    let told = wrong("a = \ngrace = true\n[x\nb = 1\nb = 2\n");
    let lines: Vec<usize> = told.iter().map(|(line, _)| *line).collect();
    assert!(
        lines.len() >= 2 && lines.contains(&1) && lines.contains(&3),
        "{told:?}"
    );
    assert!(
        told.iter()
            .all(|(_, text)| text.starts_with("this is no TOML: ")),
        "{told:?}"
    );
}

/// The program's own addresses, which forwards can't have or lead to.
#[cfg(unix)]
#[test]
fn where_it_is_controlled_from_and_looked_at_is_no_place_for_forwards() {
    let mut found = wrong(
        r#"control = "/c/sock"
        metrics = "127.0.0.1:9100"
        [forward.a]
        listen = "/c/sock"
        connect = 80
        [forward.b]
        listen = 9100
        connect = "/c/sock"
        [forward.c]
        listen = 1
        connect = "localhost:9100"
        [forward.d]
        listen = 9101
        connect = 81
        "#,
    );
    found.sort();
    let lines: Vec<usize> = found.iter().map(|(line, _)| *line).collect();
    assert_eq!(lines, [4, 7, 8, 11], "{found:?}");
    assert!(
        found[0].1.contains("control is at unix:///c/sock"),
        "{found:?}"
    );
    assert!(found[1].1.contains("metrics is at tcp://127.0.0.1:9100"));
    assert!(found[2].1.contains("own control"));
    assert!(found[3].1.contains("own metrics"));
    right("[forward.a]\nlisten = 1\nconnect = 2");
}

#[cfg(target_os = "linux")]
#[test]
fn a_wildcard_address_takes_each_single_one() {
    let forward =
        |name: &str, listen: &str| format!("[forward.{name}]\nlisten = {listen}\nconnect = 99\n");
    let (one, all) = (forward("one", "8080"), forward("all", "\"0.0.0.0:8080\""));
    for text in [one.clone() + &all, all + &one] {
        let found = wrong(&text);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].0, 5, "{found:?}");
        assert!(found[0].1.contains(":8080 already"), "{found:?}");
    }
    right(&(one + &forward("next", "\"0.0.0.0:8081\"")));
}

#[cfg(unix)]
#[test]
fn a_range_is_a_forward_for_each_port() {
    let (_, wanted) = right(
        r#"
        [forward.web]
        listen = "127.0.0.1:8000-8002"
        vm = "/vm/one"
        port = "90-92"
        [forward.back]
        vm = "/vm/one"
        guest-dials = "5000-5001"
        connect = "localhost:80-81"
        "#,
    );
    let told = wanted.rules.iter().map(|rule| {
        let name = rule.name.as_deref().unwrap();
        format!("{name}: {} -> {}", rule.listen, rule.connect)
    });
    assert_eq!(
        told.collect::<Vec<_>>(),
        [
            "web-8000: tcp://127.0.0.1:8000 -> hyperkit://:90/vm/one",
            "web-8001: tcp://127.0.0.1:8001 -> hyperkit://:91/vm/one",
            "web-8002: tcp://127.0.0.1:8002 -> hyperkit://:92/vm/one",
            "back-5000: hyperkit://:5000/vm/one -> tcp://localhost:80",
            "back-5001: hyperkit://:5001/vm/one -> tcp://localhost:81",
        ]
    );
    for (text, part) in [
        (
            "[forward.a]\nlisten = \"80-90\"\nconnect = 1\n",
            "11 ports on one side, 1 port on the other",
        ),
        (
            "[forward.a]\nlisten = \"90-80\"\nconnect = 1\n",
            "goes down",
        ),
        (
            "[forward.a-80]\nlisten = 79\nconnect = 9\n[forward.a]\nlisten = \"80-81\"\nconnect = \"1-2\"\n",
            "[forward.a-80] of the range [forward.a] is in line 2, too",
        ),
    ] {
        let told = wrong(text);
        assert!(told.iter().any(|(_, why)| why.contains(part)), "{told:?}");
    }
}

#[cfg(unix)]
#[test]
fn variables_stand_for_texts_and_numbers() {
    let (config, wanted) = right(
        r#"
        workers = "${HVSOCK_UNSET:-4}"
        [forward.a]
        listen = "${HVSOCK_UNSET:-/run/a.sock}"
        connect = "/run/${HVSOCK_UNSET:-s}$$"
        mode = "${HVSOCK_UNSET:-640}"
        drain-timeout = "${HVSOCK_UNSET:-2s}"
        "#,
    );
    assert_eq!(config.workers.unwrap().get(), 4);
    let [rule] = &wanted.rules[..] else {
        panic!("{wanted:?}");
    };
    assert_eq!(rule.listen.to_string(), "unix:///run/a.sock");
    assert_eq!(rule.connect.to_string(), "unix:///run/s$");
    assert_eq!(rule.mode, 0o640);
    assert_eq!(rule.timeouts.drain, Duration::from_secs(2));
    let told = wrong("[forward.a]\nlisten = 1\nconnect = \"${HVSOCK_UNSET}\"\n");
    assert_eq!(told[0].0, 3);
    assert!(told[0].1.contains("${HVSOCK_UNSET} is not set"), "{told:?}");
}

#[test]
fn included_files_have_vms_and_forwards_and_lines_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let main = dir.path().join("hvsock.toml");
    std::fs::create_dir(dir.path().join("more.d")).unwrap();
    let more = |name: &str, text: &str| {
        std::fs::write(dir.path().join("more.d").join(name), text).unwrap();
    };
    let read = || Config::read(&main, &places());
    let text = "include = [\"more.d/*.toml\"]\n[defaults]\nmode = \"660\"\n[forward.a]\nlisten = 1\nconnect = 2\n";
    std::fs::write(&main, text).unwrap();
    more("2.toml", "[forward.c]\nlisten = 5\nconnect = 6\n");
    more("1.toml", "[forward.b]\nlisten = 3\nconnect = 4\n");
    more("other.txt", "no TOML");
    let (_, wanted) = read().unwrap();
    let names: Vec<_> = wanted
        .rules
        .iter()
        .map(|it| it.name.clone().unwrap())
        .collect();
    assert_eq!(names, ["a", "b", "c"]);
    assert!(wanted.rules.iter().all(|it| it.mode == 0o660));

    more("1.toml", "\n[forward.a]\nlisten = 3\nconnect = 4\n");
    more("2.toml", "grace = 3\n[forward.c]\nlisten = 1\n");
    let told = read().unwrap_err().to_string();
    for part in [
        "1.toml:3: [forward.a] is in line 5, too",
        "2.toml:1: unknown key grace",
        "2.toml:2: [forward.c]: connect is missing",
    ] {
        assert!(told.contains(part), "{told}");
    }
    more("2.toml", "[forward.c]\nlisten = 1\nconnect = 9\n");
    more("1.toml", "");
    let told = read().unwrap_err().to_string();
    assert!(
        told.contains("listens on tcp://127.0.0.1:1 already"),
        "{told}"
    );
    more("1.toml", "= no TOML");
    let told = read().unwrap_err().to_string();
    assert!(told.contains("1.toml:1: this is no TOML"), "{told}");

    std::fs::write(
        &main,
        "include = [\"none.toml\", \"none.d/*\"]\n[forward.a]\nlisten = 1\nconnect = 2\n",
    )
    .unwrap();
    let told = read().unwrap_err().to_string();
    assert!(
        told.contains("hvsock.toml:1: include: ") && told.contains("none.toml cannot be read"),
        "{told}"
    );
    assert!(!told.contains("none.d"), "{told}");
}

#[test]
fn what_is_there_twice_is_told_once_and_where() {
    let text = "[forward.a]\nlisten = 1\nconnect = 2\n\n[ forward . a ] # again\nlisten = 3\n\
        connect = 4\nconnect = 5\n[forward.b]\nlisten = 6\nconnect = 7\nconnect = 8\n\
        include = [\n  [\"x\"],\n]\n";
    let section = "[forward.a] is there already, in line 1; join the two, or choose another name";
    let key = "connect is there already, in line 11; remove one";
    let right = [(5, section.to_owned()), (12, key.to_owned())];
    assert_eq!(wrong(text), right);
    // On one line it isn't located, but reported all the same.
    let inline = wrong("a = { b = 1, b = 2 }");
    assert_eq!(inline, [(1, "b is there already; remove one".to_owned())]);
    let broken = wrong("[forward.a\n");
    assert!(broken[0].1.starts_with("this is no TOML: "), "{broken:?}");
}

#[test]
fn a_loop_is_told_once() {
    let forward = |name: &str, listen: u16, connect: u16| {
        format!("[forward.{name}]\nlisten = {listen}\nconnect = {connect}\n")
    };
    let text = [
        forward("a", 1, 1),
        forward("b", 2, 3),
        forward("c", 3, 2),
        forward("d", 4, 2),
    ];
    let told = wrong(&text.concat());
    let [(3, one), (6, other)] = &told[..] else {
        panic!("{told:?}");
    };
    assert!(one.contains("would connect to itself"), "{one}");
    assert!(other.contains("[forward.b]: it would lead back"), "{other}");
}

#[test]
fn a_key_of_the_file_in_a_section_is_told_where_it_belongs() {
    for key in super::section::TOP_KEYS {
        let told = wrong(&format!("[defaults]\n{key} = 1\n"));
        let text = format!(
            "unknown key {key} in [defaults]; it belongs at the top of the file, before the first section"
        );
        assert_eq!(told, [(2, text)]);
        // At the top of the file it is known.
        let told = Config::parse(&format!("{key} = 1\n"), Path::new(""), &places());
        let told = told.map_or_else(|list| format!("{list:?}"), |_| String::new());
        assert!(!told.contains("unknown key"), "{told}");
    }
}

#[test]
fn a_forward_that_a_range_makes_is_told_as_such() {
    let told = wrong(
        "[forward.w]\nlisten = \"21003-21004\"\nconnect = \"tcp://127.0.0.1:80-81\"\n[forward.w-21004]\nlisten = 1\nconnect = 2\n",
    );
    let text =
        "[forward.w-21004] is made by the range [forward.w] in line 2, too; choose another name";
    assert_eq!(told, [(5, text.to_owned())]);
}

#[cfg(unix)] // On Windows PowerShell is asked, and what it says is told.
#[test]
fn a_vm_that_is_not_found_is_told_with_its_key() {
    let told = wrong("[forward.c]\nlisten = 1\nvm = \"nosuchvm\"\nport = 7\n");
    let [(3, text)] = &told[..] else {
        panic!("{told:?}");
    };
    let begin = "[forward.c] vm: cannot find VM \"nosuchvm\"";
    assert!(text.starts_with(begin), "{text}");
}

#[cfg(unix)]
#[test]
fn a_state_directory_that_is_too_deep_for_hyperkit_is_noted() {
    let root = tempfile::tempdir().unwrap();
    let deep = root.path().join("d".repeat(90));
    std::fs::create_dir(&deep).unwrap();
    let file = |vm: &Path| {
        format!(
            "[vm.a]\nat = {:?}\n[forward.a]\nlisten = 8080\nvm = \"a\"\nport = 7\n[forward.b]\nlisten = 8081\nvm = \"a\"\nport = 8\n",
            vm.to_str().unwrap()
        )
    };
    let (_, wanted) = right(&file(&deep));
    let of_path = |it: &&Problem| {
        it.text
            .contains("where hyperkit takes 85; let hyperkit be started")
    };
    let notes: Vec<&Problem> = wanted.notes.iter().filter(of_path).collect();
    let [note] = &notes[..] else {
        panic!("{:?}", wanted.notes);
    };
    assert_eq!(note.line.as_ref().unwrap().number, 2);
}
