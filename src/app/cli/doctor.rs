//! `hvsock doctor`: prints what is wrong, and what to do about it.

use std::io::{self, IsTerminal};

use clap::Args;
use clap_complete::ArgValueCompleter;
use serde_json::json;

use super::complete;
use super::console::{print_json, print_text};
use super::outcome::{Failure, Outcome};
use crate::address::Port;
#[cfg(unix)]
use crate::app::doctor::Asked;
use crate::app::doctor::{Check, DoctorPlan, Verdict, examine};
use crate::app::escape;
use crate::app::values::parse_port;

/// Look at all that can be wrong on the way to a VM, and say what to do about it
#[derive(Args, Debug)]
#[command(
    after_help = "Without --vm it looks at this system, and says what your hvsocks that run know of their VMs; nothing is dialled. The exit code is 1 if anything has failed. With --vm the guest is \
    dialled once, and twice for each --port, to which nothing is sent; host ports are looked at without connecting; the target that an hvsock leads one to is connected to once, if it is TCP.

Examples:
  hvsock doctor --vm docker
  hvsock doctor --vm ./linux-state --port 22 --port 0x50 --host-port 5000
  hvsock doctor --vm docker --json | jq -r '.checks[] | .name + \": \" + .verdict'"
)]
pub(super) struct DoctorArgs {
    /// The VM: its state directory, the name of one that can be found, or hyperkit:///STATE/DIR,
    /// vsock://CID or vsock-mux:///PATH; on Windows a Hyper-V VM's name or id
    #[arg(long, value_name = "VM", add = ArgValueCompleter::new(complete::vm), value_parser = super::arguments::vm())]
    vm: Option<String>,
    /// A vsock port on which a program in the guest should listen
    #[arg(long, value_name = "PORT", requires = "vm", value_parser = parse_port)]
    port: Vec<Port>,
    /// A port that the guest dials, on which something here should listen (on Windows: that should
    /// be registered)
    #[arg(long, value_name = "PORT", requires = "vm", value_parser = parse_port)]
    host_port: Vec<Port>,
    /// Seconds that the guest may take to answer
    #[cfg(unix)]
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = crate::app::values::parse_some_time)]
    timeout: std::time::Duration,
    /// The control socket of the hvsock that is asked what it has of the VM [default: all of yours
    /// that run are asked]
    #[cfg(unix)]
    #[arg(long, value_name = "PATH", requires = "vm")]
    control: Option<std::path::PathBuf>,
    /// The process that is asked, as `hvsock ps` has it
    #[cfg(unix)]
    #[arg(long, value_name = "PID", requires = "vm", conflicts_with = "control", add = ArgValueCompleter::new(complete::process), value_parser = crate::app::values::parse_process)]
    pid: Option<u32>,
    /// Print JSON: {"ok": …, "checks": [{"name", "verdict", "seen", "remedy"}, …]}
    #[arg(long)]
    json: bool,
}

impl DoctorArgs {
    pub(super) fn run(self) -> Outcome {
        let checks = examine(&DoctorPlan {
            vm: self.vm,
            ports: self.port,
            host_ports: self.host_port,
            #[cfg(unix)]
            patience: self.timeout,
            #[cfg(unix)]
            asked: match (self.control, self.pid) {
                (Some(path), _) => Asked::At(path),
                (None, Some(process)) => Asked::Process(process),
                (None, None) => Asked::All,
            },
        });
        let ok = checks.iter().all(|check| check.verdict != Verdict::Failed);
        match self.json {
            true => print_json(&to_json(&checks, ok))?,
            false => {
                let signs = io::stdout().is_terminal() && speaks_utf8();
                print_text(to_text(&checks, signs, width()))?;
            }
        }
        match ok {
            true => Ok(()),
            false => Err(Failure::Silent),
        }
    }
}

fn to_json(checks: &[Check], ok: bool) -> String {
    let checks = checks.iter().map(|check| {
        json!({
            "name": check.name,
            "verdict": check.verdict.name(),
            "seen": check.seen,
            "remedy": check.remedy,
        })
    });
    let checks: Vec<_> = checks.collect();
    format!("{:#}", json!({ "ok": ok, "checks": checks }))
}

/// Returns the width of lines: that of the terminal. Windows' terminal wraps lines itself.
fn width() -> usize {
    #[cfg(not(unix))]
    return usize::MAX;
    #[cfg(unix)]
    terminal_width().unwrap_or(usize::MAX)
}

#[cfg(unix)]
fn terminal_width() -> Option<usize> {
    let is_terminal = io::stdout().is_terminal();
    let size = is_terminal.then(ratatui::crossterm::terminal::size);
    let columns = size.and_then(Result::ok).map(|(columns, _)| columns.into());
    columns.filter(|it| *it > 0)
}

/// Wraps a text at spaces into lines of at most `columns` characters. A longer word stays whole.
fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines: Vec<String> = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.pop().unwrap_or_default();
        let fits = line.is_empty() || line.chars().count() + 1 + word.chars().count() <= columns;
        match (line.is_empty(), fits) {
            (true, _) => lines.push(word.to_owned()),
            (false, true) => lines.push(format!("{line} {word}")),
            (false, false) => lines.extend([line, word.to_owned()]),
        }
    }
    lines
}

/// Returns what each check has seen, with its remedy below, in lines of at most `columns`.
fn to_text(checks: &[Check], signs: bool, columns: usize) -> String {
    let width = checks
        .iter()
        .map(|check| check.name.len())
        .max()
        .unwrap_or(0);
    let mut lines = Vec::new();
    for check in checks {
        let sign = match (check.verdict, signs) {
            (Verdict::Ok, true) => "✓",
            (Verdict::Warning, true) => "!",
            (Verdict::Failed, true) => "✗",
            (Verdict::Skipped, true) => "-",
            (Verdict::Ok, false) => "ok  ",
            (Verdict::Warning, false) => "warn",
            (Verdict::Failed, false) => "FAIL",
            (Verdict::Skipped, false) => "skip",
        };
        let (name, seen) = (escape::line(&check.name), escape::line(&check.seen));
        let indent = sign.chars().count() + 1 + width + 2;
        // On a very narrow terminal lines are longer than it is wide.
        let room = columns.saturating_sub(indent).max(20);
        let mut head = format!("{sign} {name:width$}  ");
        let remedy = check.remedy.as_deref().map(escape::line);
        let remedy = remedy.iter().flat_map(|remedy| wrap(remedy, room));
        for line in wrap(&seen, room).into_iter().chain(remedy) {
            lines.push(head + &line);
            head = " ".repeat(indent);
        }
    }
    lines.join("\n")
}

/// Returns whether the locale says that the terminal takes UTF-8. On Windows std always writes
/// UTF-8 to consoles.
fn speaks_utf8() -> bool {
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].map(|name| std::env::var(name).unwrap_or_default());
    let locale = locale.into_iter().find(|value| !value.is_empty());
    let locale = locale.unwrap_or_default().to_lowercase();
    cfg!(windows) || locale.contains("utf-8") || locale.contains("utf8")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_stay_in_their_column() {
        let check = Check {
            name: "port".to_owned(),
            verdict: Verdict::Failed,
            seen: "nobody listens on it in the guest, as it seems".to_owned(),
            remedy: Some("start what should listen".to_owned()),
        };
        let wide = to_text(std::slice::from_ref(&check), false, usize::MAX);
        assert_eq!(
            wide,
            "FAIL port  nobody listens on it in the guest, as it seems\n           start what should listen"
        );
        let narrow = to_text(&[check], false, 33);
        assert_eq!(
            narrow,
            "FAIL port  nobody listens on it\n           in the guest, as it\n           seems\n           \
             start what should\n           listen"
        );
    }
}
