//! `hvsock ps`: which hvsock processes run, and what they forward.

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use clap::Args;
use indicatif::HumanCount;
use serde_json::{Value, json};

use super::console::{print, print_json, print_text};
use super::outcome::Outcome;
use super::table;
use crate::app::control::{self, Status, age, ask_status, read};
use crate::app::processes::{self, Process};

/// List the hvsock processes of this user, and what they forward
#[derive(Args, Debug)]
#[command(
    after_help = "`hvsock status --pid PID` tells more of one. Of a process without a control socket that can be found, its command
line is shown.

Examples:
  hvsock ps
  hvsock ps --json | jq '.[] | select(.status.live > 0) | .pid'"
)]
pub(super) struct Ps {
    /// Print it as JSON: an array of objects with pid, command, control and status
    #[arg(long)]
    json: bool,
}

/// How long a process may take to answer. One that is stopped never does.
const PATIENCE: Duration = Duration::from_secs(2);

/// A process, and what it says of itself.
struct Found {
    process: Process,
    /// Where it is controlled, and its status as JSON.
    answer: Option<(PathBuf, String)>,
}

const HEADINGS: [&str; 5] = ["PID", "UP", "LIVE", "CONTROL", "FORWARDS"];

impl Ps {
    pub(super) fn run(self) -> Outcome {
        let found = find()?;
        if self.json {
            let all: Vec<Value> = found.iter().map(Found::json).collect();
            return print_json(&serde_json::to_string_pretty(&all)?);
        }
        if found.is_empty() {
            return print("no other hvsock of this user runs");
        }
        print_text(table::of(HEADINGS, found.iter().flat_map(Found::rows)))
    }
}

/// Finds the processes, and asks them all at once.
fn find() -> std::io::Result<Vec<Found>> {
    let asking = processes::list()?.into_iter().map(|process| {
        thread::spawn(move || Found {
            answer: ask(&process),
            process,
        })
    });
    // All are begun before the first is waited for.
    let asking: Vec<_> = asking.collect();
    Ok(asking.into_iter().filter_map(|it| it.join().ok()).collect())
}

/// Asks a process at each place where its control socket may be; another's answer is none.
fn ask(process: &Process) -> Option<(PathBuf, String)> {
    let named = process.option("control").filter(|named| *named != "off");
    let named = named.and_then(|named| from_its_directory(process.id, named));
    let usual = control::paths_of(process.id);
    let places = named.into_iter().chain(usual);
    let mut answers = places
        .filter(|path| path.symlink_metadata().is_ok())
        .filter_map(|path| {
            let answer = ask_status(&path, PATIENCE).ok()?;
            let status: Value = serde_json::from_str(&answer).ok()?;
            (status["pid"] == process.id).then_some((path, answer))
        });
    answers.next()
}

/// Returns the path that a process means by `named`, if that can be known.
fn from_its_directory(process: u32, named: &str) -> Option<PathBuf> {
    let path = PathBuf::from(named);
    if path.is_absolute() {
        return Some(path);
    }
    let directory = std::fs::read_link(format!("/proc/{process}/cwd")).ok()?;
    Some(directory.join(path))
}

impl Found {
    fn json(&self) -> Value {
        let control = self.answer.as_ref().map(|(path, _)| path);
        let status = self.answer.as_ref();
        let status = status.and_then(|(_, answer)| serde_json::from_str::<Value>(answer).ok());
        json!({
            "pid": self.process.id,
            "command": self.process.command,
            "control": control,
            "status": status,
        })
    }

    /// Returns a row for each forward; what the process is stands in the first.
    fn rows(&self) -> Vec<[String; 5]> {
        let process = self.process.id.to_string();
        let status = self.answer.as_ref();
        let status = status.and_then(|(path, answer)| Some((path, read::<Status>(answer).ok()?)));
        let Some((path, status)) = status else {
            let command = self.process.command.join(" ");
            return vec![[
                process,
                String::new(),
                String::new(),
                "none".to_owned(),
                command,
            ]];
        };
        let mut forwards = status.forwards.iter().map(|it| {
            let name = it
                .name
                .as_ref()
                .map_or(String::new(), |name| format!("{name}: "));
            format!("{name}{} -> {}", it.listen, it.connect)
        });
        let first = [
            process,
            age(status.uptime_seconds as u64),
            HumanCount(status.live as u64).to_string(),
            path.display().to_string(),
            forwards.next().unwrap_or_else(|| "none".to_owned()),
        ];
        let others = forwards.map(|forward| {
            let [a, b, c, d] = [(); 4].map(|()| String::new());
            [a, b, c, d, forward]
        });
        std::iter::once(first).chain(others).collect()
    }
}
