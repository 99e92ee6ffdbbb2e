//! `hvsock connections` and `close`: list the connections of forwards, and close some.

#[cfg(target_os = "linux")]
use std::collections::HashSet;
#[cfg(target_os = "linux")]
use std::net::SocketAddr;
use std::path::Path;
use std::time::SystemTime;

use clap::Args;
use clap_complete::ArgValueCompleter;
use indicatif::HumanBytes;
use serde_json::Value;

use super::console::{print, print_json, print_text};
use super::control::{AddedForwards, Which};
use super::outcome::{Failure, Outcome};
use super::predecessor::{left_behind, owner};
use super::{complete, table};
#[cfg(target_os = "linux")]
use crate::address::Address;
use crate::app::control::{
    self, ApiProblem, ConnectionInfo, EndedInfo, Unanswered, age, ask, encode_segment, get, read,
};
#[cfg(target_os = "linux")]
use crate::app::tcp_clients::{self, Client};
use crate::app::values::parse_connection;
use crate::proxy::Waiting;

/// Show the connections of an hvsock that runs, and who has made them
#[derive(Args, Debug)]
#[command(
    after_help = "PEER is the client: its address, or, of a Unix socket, the process that connected it; on Linux both, if \
it comes from this machine by TCP. IDLE is the \
time since a byte went through. WAITING are bytes on their way to the server and to the client, as \
far as the system tells.

Examples:
  hvsock connections
  hvsock connections web
  hvsock connections --ended
  hvsock connections --json | jq '.[] | select(.idle_seconds > 3600) | .id'"
)]
pub(super) struct ConnectionsArgs {
    /// Those of one forward alone: its name, where it listens, or its id, as `hvsock status` has
    /// them; or of a range
    #[arg(value_name = "FORWARD", add = ArgValueCompleter::new(complete::forward))]
    forward: Option<String>,
    /// Show the last 100 that have ended instead, and why, the latest last
    #[arg(long)]
    ended: bool,
    /// Print what the control socket says, as it is
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    which: Which,
}

const ENDED_HEADINGS: [&str; 9] = [
    "ID", "FORWARD", "PEER", "TARGET", "ENDED", "LASTED", "SENT", "RECEIVED", "WHY",
];

const HEADINGS: [&str; 10] = [
    "ID", "FORWARD", "PEER", "TARGET", "STATE", "IDLE", "AGE", "SENT", "RECEIVED", "WAITING",
];

impl ConnectionsArgs {
    pub(super) fn run(self) -> Outcome {
        let path = self.which.path();
        if self.ended {
            return self.show_ended(&path);
        }
        let forwards = self.forward.as_ref().map(|name| {
            let forwards: AddedForwards = get(&path, &forward_call(name))?;
            Ok(ids(forwards.list()))
        });
        let forwards: Option<Vec<u64>> = forwards.transpose().map_err(|why: Unanswered| why)?;
        let is_meant = |of: Option<u64>| match &forwards {
            None => true,
            Some(ids) => of.is_some_and(|of| ids.contains(&of)),
        };
        let answer = ask(&path, "GET", "/v1/connections", "")?;
        if self.json {
            let mut all: Vec<Value> = serde_json::from_str(&answer)?;
            all.retain(|it| is_meant(it["forward"].as_u64()));
            return print_json(&serde_json::to_string_pretty(&all)?);
        }
        let mut all: Vec<ConnectionInfo> = read(&answer)?;
        all.retain(|it| is_meant(Some(it.forward)));
        all.sort_by_key(|it| it.id);
        let status: control::Status = get(&path, "/v1/status")?;
        let elsewhere = left_behind(&status);
        if all.is_empty() && !elsewhere.is_empty() {
            return elsewhere.iter().try_for_each(print);
        }
        if all.is_empty() {
            return print(
                "no connections; `hvsock connections --ended` shows the last that have ended",
            );
        }
        #[cfg(target_os = "linux")]
        add_processes(&mut all, &status);
        let rows = all.iter().map(|it| {
            [
                it.id.to_string(),
                status.name_of(it.forward).to_owned(),
                it.peer_in_words(),
                status.target_of(it.forward).to_owned(),
                it.state.to_string(),
                age(it.idle_seconds as u64),
                age(it.age_seconds as u64),
                HumanBytes(it.sent).to_string(),
                HumanBytes(it.received).to_string(),
                it.waiting.map_or_else(String::new, waiting),
            ]
        });
        print_text(table::of(HEADINGS, rows))?;
        elsewhere.iter().try_for_each(print)
    }

    fn show_ended(&self, path: &Path) -> Outcome {
        let answer = ask(path, "GET", "/v1/connections/ended", "")?;
        let mut told: Vec<Value> = serde_json::from_str(&answer)?;
        let mut all: Vec<EndedInfo> = read(&answer)?;
        if let Some(name) = &self.forward {
            let forwards = match get::<AddedForwards>(path, &forward_call(name)) {
                Ok(forwards) => forwards.list().to_vec(),
                // The forward may have been removed since.
                Err(Unanswered::Refused(_)) if all.iter().any(|it| it.is_of(name)) => Vec::new(),
                Err(why) => return Err(why.into()),
            };
            let ids = ids(&forwards);
            let is_meant = |it: &EndedInfo| match it.carried_by {
                None if !ids.is_empty() => ids.contains(&it.forward),
                // Another process may have given it another id.
                _ => {
                    let mut names = forwards.iter().map(control::ForwardInfo::name_or_address);
                    it.is_of(name) || names.any(|name| it.is_of(name))
                }
            };
            let meant: Vec<bool> = all.iter().map(is_meant).collect();
            let mut of_all = meant.iter();
            all.retain(|_| of_all.next() == Some(&true));
            let mut of_told = meant.iter();
            told.retain(|_| of_told.next() == Some(&true));
        }
        if self.json {
            return print_json(&serde_json::to_string_pretty(&told)?);
        }
        if all.is_empty() {
            return print("no connection has ended yet");
        }
        let now = SystemTime::now();
        let rows = all.iter().map(|it| {
            let ago = now.duration_since(it.at).unwrap_or_default();
            [
                it.id_in_words(),
                it.name_or_address().to_owned(),
                it.peer_in_words(),
                it.connect.clone(),
                format!("{} ago", age(ago.as_secs())),
                age(it.age_seconds as u64),
                HumanBytes(it.sent).to_string(),
                HumanBytes(it.received).to_string(),
                it.why_in_words(),
            ]
        });
        print_text(table::of(ENDED_HEADINGS, rows))
    }
}

/// Adds the processes of TCP clients that run on this machine.
#[cfg(target_os = "linux")]
fn add_processes(all: &mut [ConnectionInfo], status: &control::Status) {
    let client = |it: &ConnectionInfo| -> Option<Client> {
        let peer: SocketAddr = it.peer.as_deref()?.strip_prefix("tcp://")?.parse().ok()?;
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let mut forwards = status.forwards.iter();
        let forward = forwards.find(|forward| forward.id == Some(it.forward))?;
        let listen: Address = forward.listen.parse().ok()?;
        let port = listen.as_tcp()?.port;
        peer.ip().is_loopback().then_some((peer, port))
    };
    let clients: HashSet<Client> = all.iter().filter_map(client).collect();
    let found = tcp_clients::find(status.pid, &clients);
    for it in all {
        let process = client(it).and_then(|client| found.get(&client));
        if let (None, Some(process)) = (&it.process, process) {
            it.process = Some(control::ProcessInfo {
                pid: process.id,
                program: process.program(),
                user: process.user,
            });
        }
    }
}

/// Returns the ids of the forwards that are carried.
fn ids(forwards: &[control::ForwardInfo]) -> Vec<u64> {
    forwards.iter().filter_map(|it| it.id).collect()
}

fn forward_call(name: &str) -> String {
    format!("/v1/forwards/{}", encode_segment(name))
}

/// Returns the number of bytes waiting for the server, and for the client.
fn waiting(bytes: Waiting) -> String {
    let shown = |bytes: Option<u64>| match bytes {
        None => "?".to_owned(),
        Some(0) => "0".to_owned(),
        Some(bytes) => HumanBytes(bytes).to_string(),
    };
    match (bytes.to_server, bytes.to_client) {
        (Some(0), Some(0)) | (None, None) => String::new(),
        (to_server, to_client) => format!("{} / {}", shown(to_server), shown(to_client)),
    }
}

/// Close connections of an hvsock that runs
///
/// They are cut off at once. A VM's side of one is closed gracefully: its guest reads an end, and
/// may answer it.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  hvsock close 17
  hvsock connections web --json | jq '.[].id' | xargs hvsock close")]
pub(super) struct CloseArgs {
    /// The connections' ids, as `hvsock connections` has them
    #[arg(value_name = "ID", required = true, add = ArgValueCompleter::new(complete::connection), value_parser = parse_connection)]
    ids: Vec<u64>,
    #[command(flatten)]
    which: Which,
}

impl CloseArgs {
    pub(super) fn run(self) -> Outcome {
        let path = self.which.path();
        let mut failures = Vec::new();
        for id in self.ids {
            let call = format!("/v1/connections/{id}");
            match ask(&path, "DELETE", &call, "") {
                Ok(answer) => {
                    let it: ConnectionInfo = read(&answer)?;
                    let (peer, state) = (it.peer_in_words(), it.state);
                    print(match time_left(&path, id) {
                        None => format!("closed {id}: {peer}, {state}"),
                        Some(time) => format!(
                            "closing {id}: {peer}, {state}; the other end has up to {time} s to end it"
                        ),
                    })?;
                }
                // Other connections may still be there.
                Err(Unanswered::Refused(why)) => failures.push(not_closed(&path, id, why)),
                Err(why) => return Err(why.into()),
            }
        }
        match failures.is_empty() {
            true => Ok(()),
            false => Err(Failure::Listed(failures)),
        }
    }
}

/// Describes why a connection was not closed: a predecessor may have it.
fn not_closed(path: &Path, id: u64, why: ApiProblem) -> String {
    const NOT_FOUND: u16 = 404;
    let status = get::<control::Status>(path, "/v1/status").ok();
    let status = status.filter(|_| why.status == NOT_FOUND);
    match status.and_then(|status| owner(&status, id)) {
        None => why.to_string(),
        Some(process) => format!(
            "connection {id} has stayed with process {process}, which was taken over from: `hvsock close {id} --pid {process}`"
        ),
    }
}

/// Returns how many seconds the close of a connection may still take. `None` if it is closed.
fn time_left(path: &Path, id: u64) -> Option<f64> {
    let all: Vec<ConnectionInfo> = get(path, "/v1/connections").ok()?;
    let left = all.into_iter().find(|it| it.id == id)?;
    let status: control::Status = get(path, "/v1/status").ok()?;
    let mut forwards = status.forwards.iter();
    let forward = forwards.find(|it| it.id == Some(left.forward))?;
    Some(forward.rule.options.drain_seconds())
}
