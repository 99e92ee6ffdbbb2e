//! What the command tells of itself to shells and to `man`.

#![allow(clippy::unwrap_used)]

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
fn every_shell_is_told_of_every_command() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = said(&["completions", shell]);
        for command in commands() {
            assert!(script.contains(&command), "{shell}: {command}");
        }
    }
    let unknown = hvsock(&["completions", "tcsh"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8(unknown.stderr).unwrap().contains("zsh"));
}

#[cfg(unix)]
#[test]
fn bash_completes_commands_options_and_values() {
    let asked = |words: &[&str]| {
        let script = "set -eu; source /dev/stdin; last=$(($# - 1)); COMP_WORDS=(\"$@\"); COMP_CWORD=$last
            _hvsock hvsock \"${COMP_WORDS[last]}\" \"${COMP_WORDS[last - 1]}\"; echo \"${COMPREPLY[*]-}\"";
        let mut bash = Command::new("bash");
        bash.args(["-c", script, "bash"]).args(words);
        bash.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut bash = bash.spawn().unwrap();
        let completions = said(&["completions", "bash"]);
        std::io::Write::write_all(&mut bash.stdin.take().unwrap(), completions.as_bytes()).unwrap();
        let output = bash.wait_with_output().unwrap();
        assert!(output.status.success(), "{words:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(asked(&["hvsock", "expo"]), "expose");
    assert_eq!(asked(&["hvsock", "expose", "--dial"]), "--dial-timeout");
    assert_eq!(asked(&["hvsock", "completions", "fi"]), "fish");
}

#[test]
fn every_command_has_a_man_page() {
    let dir = tempfile::tempdir().unwrap();
    let pages = dir.path().join("share/man1");
    said(&["man", "--dir", pages.to_str().unwrap()]);
    let commands = commands();
    assert_eq!(
        std::fs::read_dir(&pages).unwrap().count(),
        commands.len() + 1
    );
    let mut names = vec!["hvsock.1".to_owned()];
    names.extend(commands.iter().map(|name| format!("hvsock-{name}.1")));
    for name in names {
        let page = std::fs::read_to_string(pages.join(&name)).unwrap();
        for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS"] {
            assert!(page.contains(&format!("\n.SH {section}\n")), "{name}");
        }
        let requests = page.lines().filter(|line| line.starts_with(['.', '\'']));
        for request in requests {
            let known = [
                ".TH", ".SH", ".TP", ".PP", ".IP", ".RS", ".RE", ".nf", ".fi", ".br", ".ie", ".el",
            ];
            let word = request.split(' ').next().unwrap();
            assert!(known.contains(&word), "{name}: {request}");
        }
        // What isn't filled must end.
        assert_eq!(
            page.matches("\n.nf").count() - page.matches("\n.fi").count(),
            usize::from(page.rfind("\n.nf") > page.rfind("\n.fi")),
            "{name}"
        );
    }
    // A page alone is the same; examples stand on lines of their own.
    let alone = said(&["man", "expose"]);
    assert_eq!(
        alone,
        std::fs::read_to_string(pages.join("hvsock-expose.1")).unwrap()
    );
    assert!(
        alone.contains("\n.nf\n  hvsock expose \\-\\-vm docker"),
        "{alone}"
    );
    assert_eq!(hvsock(&["man", "nosuch"]).status.code(), Some(2));
}
