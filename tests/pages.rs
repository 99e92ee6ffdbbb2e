//! What the command tells of itself to shells and to `man`.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn hvsock(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
    command.args(arguments).stdin(Stdio::null());
    command.output().unwrap()
}

fn said(arguments: &[&str]) -> String {
    let output = hvsock(arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The commands that the help lists.
fn commands() -> Vec<String> {
    let help = said(&["--help"]);
    let list = help.split_once("Commands:\n").unwrap().1;
    let list = list.split_once("\n\n").unwrap().0;
    let names = list.lines().filter_map(|line| {
        let name = line.strip_prefix("  ")?.split(' ').next()?;
        (!matches!(name, "" | "help")).then(|| name.to_owned())
    });
    let names: Vec<String> = names.collect();
    assert!(names.contains(&"doctor".to_owned()), "{names:?}");
    names
}

#[test]
fn completions_are_for_known_shells() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = said(&["completions", shell]);
        assert!(script.contains("HVSOCK_COMPLETE"), "{shell}: {script}");
    }
    let unknown = hvsock(&["completions", "tcsh"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8(unknown.stderr).unwrap().contains("zsh"));
}

/// The sections of each command's page, in their order.
const SECTIONS: [&str; 8] = [
    "NAME",
    "SYNOPSIS",
    "DESCRIPTION",
    "OPTIONS",
    "EXIT STATUS",
    "ENVIRONMENT",
    "FILES",
    "SEE ALSO",
];

/// All man pages: `man1/hvsock.1` and the like, and their texts.
fn man_pages(dir: &Path) -> BTreeMap<String, String> {
    said(&["man", "--dir", dir.to_str().unwrap()]);
    let mut pages = BTreeMap::new();
    for section in fs::read_dir(dir).unwrap() {
        let section = section.unwrap().path();
        for page in fs::read_dir(section).unwrap() {
            let page = page.unwrap().path();
            let name = page.strip_prefix(dir).unwrap().to_str().unwrap();
            pages.insert(name.replace('\\', "/"), fs::read_to_string(&page).unwrap());
        }
    }
    pages
}

#[test]
fn every_command_has_a_man_page() {
    let dir = tempfile::tempdir().unwrap();
    let pages = man_pages(dir.path());
    let commands = commands();
    let of_commands = pages.keys().filter(|name| name.ends_with(".1"));
    assert_eq!(of_commands.count(), commands.len() + 1);
    let mut names = vec!["man1/hvsock.1".to_owned()];
    names.extend(commands.iter().map(|name| format!("man1/hvsock-{name}.1")));
    for name in names {
        let mut rest = pages[&name].as_str();
        for section in SECTIONS {
            let heading = match section.contains(' ') {
                true => format!("\n.SH \"{section}\"\n"),
                false => format!("\n.SH {section}\n"),
            };
            let found = rest.split_once(&heading);
            rest = found.unwrap_or_else(|| panic!("{name} lacks {section}")).1;
            // None is empty.
            assert!(!rest.starts_with(".SH"), "{name}: {section}");
        }
    }
    // A page alone is the same; examples stand on lines of their own.
    let alone = said(&["man", "--roff", "expose"]);
    assert_eq!(alone, pages["man1/hvsock-expose.1"]);
    assert!(
        alone.contains("\n.nf\nhvsock expose \\-\\-vm docker"),
        "{alone}"
    );
    assert_eq!(hvsock(&["man", "nosuch"]).status.code(), Some(2));
}

// The synopses of a system with all commands and options.
#[cfg(unix)]
#[test]
fn a_synopsis_shows_values_and_what_may_be_repeated() {
    for (command, right) in [
        (
            "expose",
            "hvsock expose --vm VM [-L [ADDR:]PORT:GUESTPORT|/PATH:GUESTPORT]... [-R HOSTPORT:TARGET]...",
        ),
        (
            "remove",
            "hvsock remove [--grace SECONDS] [--control PATH] [--pid PID] NAME...",
        ),
        (
            "run",
            "hvsock run [--take-over] [--no-keeper] [--access-log] [OPTION]... CONFIG",
        ),
        (
            "cat",
            "hvsock cat [--vm VM] [-l] [-k] [--end-with-peer] [--echo]",
        ),
    ] {
        let page = said(&["man", "--roff", command]);
        let synopsis = page.split("\n.SH ").nth(2).unwrap();
        let mut plain = synopsis.replace("\\-", "-").replace('\n', " ");
        for font in ["\\fB", "\\fI", "\\fR"] {
            plain = plain.replace(font, "");
        }
        let plain = plain.split_whitespace().collect::<Vec<_>>().join(" ");
        let begun = plain.strip_prefix("SYNOPSIS ").unwrap();
        assert!(begun.starts_with(right), "{begun}");
    }
}

#[test]
fn the_guide_has_man_pages() {
    let dir = tempfile::tempdir().unwrap();
    let pages = man_pages(dir.path());
    let guide = fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide")).unwrap();
    let files: Vec<PathBuf> = guide.map(|it| it.unwrap().path()).collect();
    let texts = files
        .iter()
        .filter(|it| it.extension().is_some_and(|it| it == "md"));
    for file in texts.clone() {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let page = match name {
            "configuration" => "man5/hvsock.toml.5".to_owned(),
            name => format!("man7/hvsock-{name}.7"),
        };
        let page = &pages[&page];
        for section in ["NAME", "DESCRIPTION", "\"SEE ALSO\""] {
            assert!(
                page.contains(&format!("\n.SH {section}\n")),
                "{name}: {section}"
            );
        }
        // Nothing of it is lost: its words are there, in their order.
        let plain = |text: &str| -> String {
            let text = text
                .replace("\\-", "-")
                .replace("\\(aq", "'")
                .replace("\\e", "\\");
            text.chars().filter(char::is_ascii_alphanumeric).collect()
        };
        let text = fs::read_to_string(file).unwrap();
        let mut rest = plain(page).to_lowercase();
        let lines = text.lines().filter(|line| {
            // Links, fonts and signs beyond ASCII are written in another way.
            !line.contains("](") && !line.contains(['`', '#', '*', '|']) && line.is_ascii()
        });
        for line in lines {
            let line = plain(line).to_lowercase();
            let at = rest
                .find(&line)
                .unwrap_or_else(|| panic!("{name}: {line} is lost"));
            rest = rest[at + line.len()..].to_owned();
        }
    }
    assert_eq!(
        texts.count(),
        pages.keys().filter(|it| !it.ends_with(".1")).count()
    );
    let file = &pages["man5/hvsock.toml.5"];
    for section in ["SYNOPSIS", "FILES"] {
        assert!(file.contains(&format!("\n.SH {section}\n")), "{section}");
    }
}

#[test]
fn man_pages_name_pages_that_are_there() {
    let dir = tempfile::tempdir().unwrap();
    let pages = man_pages(dir.path());
    for (name, page) in &pages {
        let (_, others) = page.split_once(".SH \"SEE ALSO\"\n").unwrap();
        let others = others
            .replace("\\-", "-")
            .replace("\\fB", "")
            .replace("\\fR", "");
        for other in others.trim().split(", ") {
            let (page, section) = other.trim_end_matches(')').split_once('(').unwrap();
            let file = format!("man{section}/{page}.{section}");
            assert!(pages.contains_key(&file), "{name}: {other}");
        }
    }
}

#[cfg(unix)]
#[test]
fn man_takes_the_pages_without_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let pages = man_pages(dir.path());
    let mut taken = 0;
    for (program, arguments) in [
        ("mandoc", &["-T", "lint", "-W", "warning"][..]),
        ("man", &["--warnings=w", "-l"]),
    ] {
        for page in pages.keys() {
            let mut command = Command::new(program);
            command.args(arguments).arg(dir.path().join(page));
            command.env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
            let output = match command.output() {
                Ok(output) => output,
                Err(_) => {
                    println!("skipped in part: there is no {program}; install it");
                    break;
                }
            };
            let warnings = String::from_utf8_lossy(&output.stderr)
                + String::from_utf8_lossy(match program {
                    "mandoc" => &output.stdout,
                    _ => &[],
                });
            // Of the pages' date none is known: they change with the version.
            let mut warnings = warnings.lines().filter(|it| !it.contains("missing date"));
            assert_eq!(warnings.next(), None, "{program} {page}");
            taken += 1;
        }
    }
    println!("{taken} pages were taken");
}

/// `man` itself may not be there: what stands for it notes what it was given.
#[cfg(target_os = "linux")]
#[test]
fn a_page_is_shown_by_man_on_a_terminal_and_elsewhere() {
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    let dir = tempfile::tempdir().unwrap();
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let controller = openpt(flags).unwrap();
    grantpt(&controller).unwrap();
    unlockpt(&controller).unwrap();
    let terminal = ioctl_tiocgptpeer(&controller, flags).unwrap();
    let show = |to: Stdio| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
        command.args(["man", "expose"]).env("PATH", dir.path());
        command.stdin(Stdio::null()).stdout(to);
        command.stderr(Stdio::piped()).output().unwrap()
    };
    let to_terminal = || Stdio::from(terminal.try_clone().unwrap());
    for to in [to_terminal(), Stdio::piped()] {
        let without = show(to);
        let why = String::from_utf8(without.stderr).unwrap();
        assert_eq!(without.status.code(), Some(1), "{why}");
        assert!(why.contains("no `man`") && why.contains("--roff"), "{why}");
    }
    let man = dir.path().join("man");
    let script =
        "#!/bin/sh\necho \"$@\" >\"${0%/*}/words\"\n/bin/cat >\"${0%/*}/page\"\necho shown\n";
    // A file that was just written to can't be run while another test's child has it open.
    let mut made = Command::new("/bin/sh");
    made.args(["-c", "printf %s \"$1\" >\"$2\" && chmod 755 \"$2\"", "sh"]);
    let made = made.arg(script).arg(&man).status().unwrap();
    assert!(made.success());
    for (to, printed) in [(to_terminal(), ""), (Stdio::piped(), "shown\n")] {
        let shown = show(to);
        assert!(shown.status.success(), "{shown:?}");
        assert_eq!(String::from_utf8(shown.stdout).unwrap(), printed);
        let noted = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(noted("words"), "-l -\n");
        assert_eq!(noted("page"), said(&["man", "--roff", "expose"]));
    }
}
