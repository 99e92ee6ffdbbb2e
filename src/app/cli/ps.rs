//! `hvsock ps`: lists the hvsock processes that run, and what they forward.

use clap::Args;
use indicatif::HumanCount;
use serde_json::{Value, json};

use super::console::{print, print_json, print_text};
use super::outcome::Outcome;
use super::{keepers, table};
use crate::app::answering::{Hvsock, find};
use crate::app::control::{Status, age};

/// List the hvsock processes of this user, and what they forward
#[derive(Args, Debug)]
#[command(
    after_help = "`hvsock status --pid PID` tells more of one. Of a process without a control socket that can be found, its command \
line is shown.

Examples:
  hvsock ps
  hvsock ps --all
  hvsock ps --json | jq '.[] | select(.status.live > 0) | .pid'"
)]
pub(super) struct PsArgs {
    /// Show all forwards of each, and where it is controlled
    #[arg(long, conflicts_with = "json")]
    all: bool,
    /// Print it as JSON: an array of objects with pid, command, control and status
    #[arg(long)]
    json: bool,
}

/// A process as text.
struct Shown {
    process: String,
    up: String,
    live: String,
    control: String,
    /// What it forwards; if it doesn't answer, its command.
    lines: Vec<String>,
}

impl PsArgs {
    pub(super) fn run(self) -> Outcome {
        let found = find()?;
        if self.json {
            let all: Vec<Value> = found.iter().map(to_json).collect();
            return print_json(&serde_json::to_string_pretty(&all)?);
        }
        if found.is_empty() {
            return print("no other hvsock of this user runs");
        }
        let shown = show(&found).into_iter();
        print_text(match self.all {
            true => {
                let headings = ["PID", "UP", "LIVE", "CONTROL", "FORWARDS"];
                table::of(headings, shown.flat_map(Shown::into_rows))
            }
            false => {
                let headings = ["PID", "UP", "LIVE", "FORWARDS"];
                table::of(headings, shown.map(Shown::into_row))
            }
        })
    }
}

/// Describes each process.
fn show(found: &[Hvsock]) -> Vec<Shown> {
    let statuses: Vec<Option<Status>> = found.iter().map(Hvsock::status).collect();
    let known = keepers::find(&Vec::from_iter(statuses.iter().flatten()));
    let show = |(it, status): (&Hvsock, &Option<Status>)| {
        let process = it.process.id.to_string();
        let control = it
            .answer
            .as_ref()
            .map(|(path, _)| path.display().to_string());
        let control = control.unwrap_or_else(|| "none".to_owned());
        let Some(status) = status else {
            let line = match it.process.is_keeper() {
                true => keepers::describe(it.process.id, &known),
                false => it.process.command.join(" "),
            };
            return Shown {
                process,
                up: String::new(),
                live: String::new(),
                control,
                lines: vec![line],
            };
        };
        let forwards = status.forwards.iter().map(|it| {
            let name = it.name.as_ref().map(|name| format!("{name}: "));
            let name = name.unwrap_or_default();
            format!("{name}{} -> {}", it.listen, it.connect)
        });
        let mut lines: Vec<String> = forwards.collect();
        if lines.is_empty() {
            lines.push("none".to_owned());
        }
        Shown {
            process,
            up: age(status.uptime_seconds as u64),
            live: HumanCount(status.live as u64).to_string(),
            control,
            lines,
        }
    };
    found.iter().zip(&statuses).map(show).collect()
}

fn to_json(hvsock: &Hvsock) -> Value {
    let control = hvsock.answer.as_ref().map(|(path, _)| path);
    let status = hvsock.answer.as_ref();
    let status = status.and_then(|(_, answer)| serde_json::from_str::<Value>(answer).ok());
    json!({
        "pid": hvsock.process.id,
        "command": hvsock.process.command,
        "control": control,
        "status": status,
    })
}

impl Shown {
    /// Returns one row, with the first of its lines.
    fn into_row(mut self) -> [String; 4] {
        let more = match self.lines.len() {
            0 | 1 => String::new(),
            n => format!(", and {} more", n - 1),
        };
        let line = format!("{}{more}", self.lines.swap_remove(0));
        [self.process, self.up, self.live, line]
    }

    /// Returns a row for each of its lines; the process is described in the first.
    fn into_rows(self) -> Vec<[String; 5]> {
        let mut columns = Some([self.process, self.up, self.live, self.control]);
        let rows = self.lines.into_iter().map(|line| {
            let [process, up, live, control] = columns.take().unwrap_or_default();
            [process, up, live, control, line]
        });
        rows.collect()
    }
}
