//! The JSON objects of the control socket.

use std::collections::HashMap;
use std::fmt;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::app::ranges::{name_of, pair, parse_addresses};
use crate::app::rule_options::RuleOptions;
use crate::app::values;
use crate::engine::relay::Side;
use crate::error::counted;
use crate::keeper::LinkStatus;
use crate::name::{PeerProcess, SocketName, UNNAMED};
use crate::proxy::{
    CarriedBytes, ConnectionState, ConnectionStatus, Counters, EndReason, EndedConnection,
    ForwardState, ForwardStatus, LastError, ProgramFailure, RefusalReason, Refusals, Rule,
    VmStatus, Waiting, check_name,
};
use crate::time::{unix, unix_option};

use super::problem::ApiProblem;

/// The status of a process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) version: String,
    pub(crate) pid: u32,
    /// The configuration file, if there is one.
    #[serde(default)]
    pub(crate) file: Option<String>,
    /// The process that it has taken over from, and the one that has taken over from it.
    #[serde(default)]
    pub(crate) predecessor: Option<u32>,
    #[serde(default)]
    pub(crate) successor: Option<u32>,
    /// The time since the start.
    pub(crate) uptime_seconds: f64,
    /// Whether the end has begun.
    pub(crate) stopping: bool,
    /// The number of connections that are not closed yet, including those of removed forwards.
    pub(crate) live: usize,
    /// The number of lines of the log and other output that were dropped, since they were not read
    /// in time.
    pub(crate) log_dropped: u64,
    /// The bytes that were delivered, by carrier.
    #[serde(default)]
    pub(crate) carried: CarriedBytes,
    pub(crate) forwards: Vec<ForwardInfo>,
    /// The keeper, which keeps VMs alive when this process is gone; `null` if none is wanted.
    #[serde(default)]
    pub(crate) keeper: Option<LinkStatus>,
    /// The sockets of the control interface that can't be bound now; they are retried.
    #[serde(default)]
    pub(crate) unserved: Vec<Unserved>,
}

/// A socket of the control interface that isn't served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Unserved {
    /// `control`, `guest-control` or `metrics`.
    pub(crate) service: String,
    pub(crate) address: String,
    pub(crate) why: String,
    #[serde(with = "unix")]
    pub(crate) since: SystemTime,
}

/// A forward.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ForwardInfo {
    /// `null` if it isn't carried (yet).
    pub(crate) id: Option<u64>,
    pub(crate) name: Option<String>,
    /// The address on which it listens, with the chosen port if the rule says 0.
    pub(crate) listen: String,
    pub(crate) connect: String,
    /// `listening`, `full` or `paused` (new clients wait), `lost` (its socket's file is gone),
    /// `closed` (the proxy is stopping); if it isn't carried, `waiting` (for its VM's directory) or
    /// `failed` (it is retried).
    pub(crate) state: String,
    /// Why it isn't listening, if so, and since when. Times are seconds since 1970.
    pub(crate) why: Option<String>,
    #[serde(with = "unix_option")]
    pub(crate) since: Option<SystemTime>,
    /// What is unusual about its socket, such as that macOS requires it to listen on all addresses;
    /// in the answer to its addition also what its target lacks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
    /// The hyperkit VM to which it leads, or else the one that dials it.
    pub(crate) vm: Option<VmInfo>,
    /// Why the target of the last refused client could not be reached.
    pub(crate) last_error: Option<LastError>,
    pub(crate) counters: Counters,
    /// The rule, in the form in which it can be added again.
    pub(crate) rule: RuleBody,
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct VmInfo {
    /// The value of `--vm` for it: the state directory of a hyperkit VM, or the URI of another.
    pub(crate) directory: String,
    #[serde(flatten)]
    pub(crate) status: VmStatus,
}

/// Returns the numbers of refused connections, each with the name of its reason.
pub(crate) fn refusals_by_reason(refusals: &Refusals) -> [(&'static str, u64); 7] {
    [
        ("by_target", refusals.by_target),
        ("absent", refusals.absent),
        ("dial_timeout", refusals.dial_timeout),
        ("full", refusals.full),
        ("not_allowed", refusals.not_allowed),
        ("no_header", refusals.no_header),
        ("other", refusals.other),
    ]
}

/// A connection that is carried now.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct ConnectionInfo {
    pub(crate) id: u64,
    /// The id of the forward, which may have been removed.
    pub(crate) forward: u64,
    /// The client's address; `null` if it has none, as with Unix sockets.
    pub(crate) peer: Option<String>,
    /// The client's process; `null` if it is not connected by a Unix socket.
    pub(crate) process: Option<ProcessInfo>,
    /// `dialling`, `held`, `open`, `half_closed_by_client`, `half_closed_by_server` or `closing`.
    pub(crate) state: ConnectionState,
    pub(crate) sent: u64,
    pub(crate) received: u64,
    /// The bytes on their way, `to_server` and `to_client`; `null` if that isn't known.
    pub(crate) waiting: Option<Waiting>,
    /// The time since a byte was delivered last.
    #[serde(default)]
    pub(crate) idle_seconds: f64,
    pub(crate) age_seconds: f64,
}

/// A connection that has ended.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct EndedInfo {
    pub(crate) id: u64,
    /// The process that carried it, if that was a predecessor: the ids are those of that process.
    #[serde(default)]
    pub(crate) carried_by: Option<u32>,
    /// The id of the forward, which may have been removed.
    pub(crate) forward: u64,
    /// The forward's name, if it had one, and its addresses.
    pub(crate) name: Option<String>,
    pub(crate) listen: String,
    pub(crate) connect: String,
    /// The client's address; `null` if it had none, as with Unix sockets.
    pub(crate) peer: Option<String>,
    /// The client's process, with its program if it still runs and that is known.
    pub(crate) process: Option<ProcessInfo>,
    pub(crate) sent: u64,
    pub(crate) received: u64,
    /// The time from beginning to end.
    pub(crate) age_seconds: f64,
    /// The time of the end.
    #[serde(with = "unix")]
    pub(crate) at: SystemTime,
    /// The reason, such as `client_closed`.
    pub(crate) why: String,
    /// If it was refused, the reason, such as `by_target`, and a description.
    pub(crate) refusal: Option<String>,
    pub(crate) error: Option<String>,
    #[serde(flatten)]
    pub(crate) program: ProgramFailed,
}

/// How the connection's program has failed, if so: its exit code or the signal.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(default)]
pub(crate) struct ProgramFailed {
    exit_status: Option<i32>,
    signal: Option<i32>,
}

impl ProgramFailed {
    pub(super) fn of(why: EndReason) -> ProgramFailed {
        let EndReason::ProgramFailed(failure) = why else {
            return ProgramFailed::default();
        };
        match failure {
            ProgramFailure::Status(status) => ProgramFailed {
                exit_status: Some(status),
                signal: None,
            },
            ProgramFailure::Signal(signal) => ProgramFailed {
                exit_status: None,
                signal: Some(signal),
            },
        }
    }

    fn failure(self) -> Option<ProgramFailure> {
        let by_signal = self.signal.map(ProgramFailure::Signal);
        self.exit_status.map(ProgramFailure::Status).or(by_signal)
    }
}

impl From<&EndedConnection> for EndedInfo {
    fn from(ended: &EndedConnection) -> EndedInfo {
        EndedInfo {
            id: ended.id.into(),
            carried_by: None,
            forward: ended.forward.into(),
            name: ended.rule.name.clone(),
            listen: ended.rule.listen.to_string(),
            connect: ended.rule.connect.to_string(),
            peer: address_of(ended.peer),
            process: ended.process.map(|process| ProcessInfo {
                pid: process.id,
                program: None,
                user: process.user,
            }),
            sent: ended.sent,
            received: ended.received,
            age_seconds: ended.age.as_secs_f64(),
            at: ended.at,
            why: ended.why.name().to_owned(),
            refusal: refusal_of(ended.why),
            error: ended.error.as_deref().map(str::to_owned),
            program: ProgramFailed::of(ended.why),
        }
    }
}

impl EndedInfo {
    /// Adds the programs of those processes that still run.
    pub(super) fn look_up_programs(all: &mut [EndedInfo]) {
        let now = SystemTime::now();
        for it in all {
            let Some(process) = &mut it.process else {
                continue;
            };
            let age = Duration::try_from_secs_f64(it.age_seconds).unwrap_or_default();
            let connected = now.duration_since(it.at).unwrap_or_default() + age;
            process.program = process.identity().program_since(connected);
        }
    }

    /// Returns the forward's name, or the address on which it listened.
    pub(crate) fn name_or_address(&self) -> &str {
        self.name.as_ref().unwrap_or(&self.listen)
    }

    /// Returns the id as text for people.
    pub(crate) fn id_in_words(&self) -> String {
        match self.carried_by {
            None => self.id.to_string(),
            Some(process) => format!("{} of {process}", self.id),
        }
    }

    /// Returns whether its forward had that name or listen address.
    pub(crate) fn is_of(&self, forward: &str) -> bool {
        self.name.as_deref() == Some(forward) || self.listen == forward
    }

    /// Describes the client for people, as far as it was known.
    pub(crate) fn peer_in_words(&self) -> String {
        peer_in_words(self.peer.as_ref(), self.process.as_ref())
    }

    /// Returns the reason of the end for people; if it was refused, the error.
    pub(crate) fn why_in_words(&self) -> String {
        let mut why = EndReason::kind_in_words(&self.why).to_owned();
        if let Some(refusal) = &self.refusal {
            why += &format!(" ({})", RefusalReason::name_in_words(refusal));
        }
        if let Some(failure) = self.program.failure() {
            why += &format!(" ({failure})");
        }
        match &self.error {
            Some(error) => format!("{why}: {error}"),
            None => why,
        }
    }
}

/// Returns the name of the reason for a refusal.
pub(super) fn refusal_of(why: EndReason) -> Option<String> {
    match why {
        EndReason::Refused(reason) => Some(reason.name().to_owned()),
        _ => None,
    }
}

/// Returns the address of a client, if it has one.
pub(super) fn address_of(peer: SocketName) -> Option<String> {
    match peer {
        SocketName::Unnamed => None,
        named => Some(named.to_string()),
    }
}

/// A process that is connected by a Unix socket.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct ProcessInfo {
    pub(crate) pid: Option<u32>,
    /// The program that it runs now.
    pub(crate) program: Option<String>,
    /// The id of its user at the time of the connection.
    pub(crate) user: u32,
}

impl ConnectionInfo {
    /// Makes the objects of connections, each with its process' program. Programs are looked up
    /// here, once for each process, and not by the proxy's workers.
    pub(super) fn all(statuses: &[ConnectionStatus]) -> Vec<ConnectionInfo> {
        let mut programs = HashMap::new();
        let told = statuses.iter().map(|status| ConnectionInfo {
            id: status.id.into(),
            forward: status.forward.into(),
            peer: address_of(status.peer),
            process: status.process.map(|process| ProcessInfo {
                pid: process.id,
                program: programs
                    .entry(process)
                    .or_insert_with(|| process.program())
                    .clone(),
                user: process.user,
            }),
            state: status.state,
            sent: status.sent,
            received: status.received,
            waiting: status.waiting,
            idle_seconds: status.idle.as_secs_f64(),
            age_seconds: status.age.as_secs_f64(),
        });
        told.collect()
    }

    /// Returns a short name of the client: `127.0.0.1:50000`, or `curl[123]`.
    pub(crate) fn peer_in_short(&self) -> String {
        match (&self.peer, &self.process) {
            (Some(peer), _) => peer.strip_prefix("tcp://").unwrap_or(peer).to_owned(),
            (None, Some(process)) => match (&process.program, process.pid) {
                (Some(program), Some(pid)) => format!("{program}[{pid}]"),
                (None, Some(pid)) => format!("pid {pid}"),
                (_, None) => format!("uid {}", process.user),
            },
            (None, None) => format!("number {}", self.id),
        }
    }

    /// Describes the client for people: its address, its process, or both.
    pub(crate) fn peer_in_words(&self) -> String {
        peer_in_words(self.peer.as_ref(), self.process.as_ref())
    }
}

fn peer_in_words(peer: Option<&String>, process: Option<&ProcessInfo>) -> String {
    match (peer, process) {
        (Some(peer), Some(process)) => format!("{peer}, {process}"),
        (Some(peer), None) => peer.clone(),
        (None, Some(process)) => process.to_string(),
        (None, None) => UNNAMED.to_owned(),
    }
}

impl ProcessInfo {
    fn identity(&self) -> PeerProcess {
        PeerProcess {
            id: self.pid,
            user: self.user,
        }
    }
}

/// Writes `curl (pid 123, uid 501)`.
impl fmt::Display for ProcessInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.identity().write_with(self.program.as_deref(), f)
    }
}

/// A rule in JSON, in the form in which it can be added again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RuleBody {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    pub(crate) listen: String,
    pub(crate) connect: String,
    #[serde(flatten)]
    pub(crate) options: RuleOptions,
}

impl From<&Rule> for RuleBody {
    fn from(rule: &Rule) -> RuleBody {
        RuleBody {
            name: rule.name.clone(),
            listen: rule.listen.to_string(),
            connect: rule.connect.to_string(),
            options: rule.into(),
        }
    }
}

/// Parses the rule of a forward. Missing options are as in `usual`.
pub(super) fn read_rule(body: &[u8], usual: RuleOptions) -> Result<Rule, ApiProblem> {
    let mut rules = read_rules(body, usual)?;
    match (rules.pop(), rules.is_empty()) {
        (Some(rule), true) => Ok(rule),
        _ => Err(ApiProblem::new(400, "that is the rule of a range")),
    }
}

/// Parses a rule, or the rules of a range of ports. Missing options are as in `usual`.
pub(super) fn read_rules(body: &[u8], usual: RuleOptions) -> Result<Vec<Rule>, ApiProblem> {
    let no_rule = |why: &dyn fmt::Display| {
        let problem = ApiProblem::new(400, format!("that is no rule: {why}"));
        problem.with_remedy(
            r#"one is {"name": "web", "listen": "tcp://127.0.0.1:8080", "connect": "unix:///run/web.sock"}"#,
        )
    };
    let wrong = |key: &str, why: String| ApiProblem::new(400, format!("{key}: {why}"));
    let mut asked = match serde_json::from_slice(body).map_err(|e| no_rule(&e))? {
        Value::Object(asked) => asked,
        _ => return Err(no_rule(&"it is not an object with listen and connect")),
    };
    let mut addresses = |key| {
        let asked = asked.remove(key);
        let asked = asked.ok_or_else(|| no_rule(&format_args!("{key} is missing")))?;
        let found = match &asked {
            Value::String(text) => parse_addresses(text),
            // A port, as in the file.
            other => values::address(other).map(|it| vec![it]),
        };
        found.map_err(|why| wrong(key, why))
    };
    let pairs = pair(addresses("listen")?, addresses("connect")?);
    let pairs = pairs.map_err(|why| wrong("listen and connect", why))?;
    let name = asked.remove("name").filter(|name| !name.is_null());
    let name = name.map(|name| values::text(&name)).transpose();
    let name = name.map_err(|why| wrong("name", why))?;
    let is_range = pairs.len() > 1;
    let mut rules = Vec::new();
    for (listen, connect) in pairs {
        let mut rule = Rule::new(listen, connect);
        rule.name = match is_range {
            true => name.as_deref().map(|name| name_of(name, &rule.listen)),
            false => name.clone(),
        };
        if let Some(name) = &rule.name {
            check_name(name).map_err(|why| wrong("name", why.to_owned()))?;
        }
        rules.push(rule);
    }
    let mut options = usual;
    let mut set = |path: &[String], value| {
        let set = options.set(path, value);
        set.map_err(|why| wrong(&path.join("."), why))
    };
    let keys = RuleOptions::keys();
    let is_group = |key: &String| {
        keys.iter()
            .any(|(_, path)| path.len() > 1 && path[0] == *key)
    };
    let mut known: Vec<&str> = keys.iter().map(|(_, path)| path[0].as_str()).collect();
    known.extend(["connect", "listen", "name"]);
    known.sort_unstable();
    known.dedup();
    for (key, value) in asked {
        if !known.contains(&key.as_str()) {
            let known = known.join("`, `");
            return Err(wrong(
                &key,
                format!("there is no `{key}`; there are `{known}`"),
            ));
        }
        match value {
            Value::Object(parts) if is_group(&key) => {
                for (part, value) in parts {
                    set(&[key.clone(), part], value)?;
                }
            }
            value => set(&[key], value)?,
        }
    }
    let rules = rules.into_iter();
    Ok(rules.map(|rule| options.applied_to(rule)).collect())
}

impl RuleBody {
    /// Returns the differences between two rules for people: `its KEY is X, not Y`.
    pub(super) fn difference(&self, asked: &RuleBody) -> String {
        let of = |body: &RuleBody| serde_json::to_value(body).unwrap_or_default();
        let (is, asked) = (of(self), of(asked));
        let mut keys: Vec<&String> = is
            .as_object()
            .into_iter()
            .flat_map(|it| it.keys())
            .collect();
        keys.extend(asked.as_object().into_iter().flat_map(|it| it.keys()));
        keys.sort();
        keys.dedup();
        let differs = keys.into_iter().filter(|key| is.get(key) != asked.get(key));
        let said = |value: Option<&serde_json::Value>| match value {
            Some(serde_json::Value::String(text)) => text.clone(),
            Some(value) => value.to_string(),
            None => "none".to_owned(),
        };
        let said = differs.map(|key| {
            format!(
                "its {key} is {}, not {}",
                said(is.get(key)),
                said(asked.get(key))
            )
        });
        said.collect::<Vec<_>>().join("; ")
    }
}

impl Status {
    /// Returns the VMs, each once.
    pub(crate) fn vms(&self) -> Vec<&VmInfo> {
        let mut vms: Vec<&VmInfo> = Vec::new();
        for vm in self.forwards.iter().filter_map(|it| it.vm.as_ref()) {
            if vms.iter().all(|it| it.directory != vm.directory) {
                vms.push(vm);
            }
        }
        vms
    }
}

impl Status {
    /// Returns the name of the forward with that id, or the address on which it listens.
    pub(crate) fn name_of(&self, id: u64) -> &str {
        let forward = self.forwards.iter().find(|it| it.id == Some(id));
        forward.map_or("(removed)", ForwardInfo::name_or_address)
    }

    /// Returns the address that the connections of a forward go to, or that it was removed.
    pub(crate) fn target_of(&self, id: u64) -> &str {
        let forward = self.forwards.iter().find(|it| it.id == Some(id));
        forward.map_or("(removed)", |it| &it.connect)
    }
}

impl ForwardInfo {
    /// Returns its name, or the address on which it listens.
    pub(crate) fn name_or_address(&self) -> &str {
        self.name.as_ref().unwrap_or(&self.listen)
    }

    /// Returns its name, or else its id, or else its listen address.
    pub(crate) fn label(&self) -> String {
        match (&self.name, self.id) {
            (Some(name), _) => name.clone(),
            (None, Some(id)) => id.to_string(),
            (None, None) => self.listen.clone(),
        }
    }
}

/// Formats a time in its largest unit.
pub(crate) fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

impl From<&ForwardStatus> for ForwardInfo {
    fn from(status: &ForwardStatus) -> ForwardInfo {
        let (state, trouble) = match &status.state {
            ForwardState::Listening => ("listening", None),
            ForwardState::Full { why, since } => ("full", Some((why, since))),
            ForwardState::Paused { why, since } => ("paused", Some((why, since))),
            ForwardState::Lost { why, since } => ("lost", Some((why, since))),
            ForwardState::Closed => ("closed", None),
        };
        ForwardInfo {
            state: state.to_owned(),
            note: status.note.map(str::to_owned),
            why: trouble.map(|(why, _)| why.clone()),
            since: trouble.map(|(_, since)| *since),
            vm: status.vm.as_ref().map(|vm| VmInfo::of(&status.rule, vm)),
            last_error: status.last_error.clone(),
            id: Some(status.id.into()),
            name: status.rule.name.clone(),
            listen: status.listen.to_string(),
            connect: status.rule.connect.to_string(),
            counters: status.counters,
            rule: (&status.rule).into(),
        }
    }
}

impl ForwardInfo {
    /// Makes a forward that is wanted but not carried. `waits` is whether what it lacks is expected
    /// to be missing at times.
    pub(crate) fn pending(rule: &Rule, waits: bool, why: &str, since: SystemTime) -> ForwardInfo {
        ForwardInfo {
            id: None,
            name: rule.name.clone(),
            listen: rule.listen.to_string(),
            connect: rule.connect.to_string(),
            state: match waits {
                true => "waiting",
                false => "failed",
            }
            .to_owned(),
            why: Some(why.to_owned()),
            since: Some(since),
            note: None,
            vm: None,
            last_error: None,
            counters: Counters::default(),
            rule: rule.into(),
        }
    }
}

impl VmInfo {
    /// Describes its health: `up, last heard from 12 s ago, last 40 dials silent so far`.
    pub(crate) fn health(&self, now: SystemTime) -> String {
        let ago = |then| age(now.duration_since(then).unwrap_or_default().as_secs());
        let VmStatus { up, gone_since, .. } = self.status;
        let is_paused = self.status.paused;
        let silent = self.status.silent_since;
        let silent = silent.map(|since| format!("up, silent for {}", ago(since)));
        let up = match (up, gone_since) {
            (Some(false), Some(since)) => return format!("gone for {}", ago(since)),
            (Some(false), None) => return "not there yet".to_owned(),
            _ if is_paused => "paused (its process is stopped)",
            (Some(true), _) => silent.as_deref().unwrap_or("up"),
            (None, _) => "not known yet",
        };
        let heard = self.status.last_heard.map_or_else(
            || "not heard from yet".to_owned(),
            |at| format!("last heard from {} ago", ago(at)),
        );
        let silent = match self.status.unanswered {
            0 => String::new(),
            1 => ", last dial silent so far".to_owned(),
            more => format!(", last {} silent so far", counted(more, "dial")),
        };
        format!("{up}, {heard}{silent}")
    }

    /// Returns whether it has as many connections as it may have.
    pub(crate) fn is_full(&self) -> bool {
        let VmStatus {
            connections,
            lost,
            predecessor,
            probes,
            limit,
            ..
        } = self.status;
        limit.is_some_and(|most| connections + lost + predecessor + probes >= most)
    }

    /// Describes the use of its slots: `12 of 900 slots, 3 lost`, with the remedy.
    pub(crate) fn slots(&self) -> String {
        let VmStatus {
            connections,
            limit,
            lost,
            guests,
            guest_limit,
            turned_away,
            predecessor,
            probes,
            ..
        } = self.status;
        let of = |limit: Option<usize>| limit.map_or_else(String::new, |most| format!("of {most}"));
        let mut text = match limit {
            Some(most) => format!("{connections} of {most} slots"),
            // A VM without a limit has no slots.
            None => counted(connections as u64, "connection"),
        };
        if self.is_full() {
            text += ", all taken (new clients wait or are refused)";
        }
        if guests > 0 || turned_away > 0 {
            text += &format!(", {guests} of them the guest's");
            if guest_limit.is_some() {
                text += &format!(" ({})", of(guest_limit));
            }
        }
        if turned_away > 0 {
            let dials = counted(turned_away, "dial");
            text += &format!(", {dials} of the guest ended at once");
        }
        if probes > 0 {
            let probes = counted(probes as u64, "probe");
            text += &format!(", {probes} (does the guest answer?)");
        }
        if predecessor > 0 {
            let slots = counted(predecessor as u64, "slot");
            text += &format!(", {slots} left to the process that was taken over from");
        }
        if lost > 0 {
            let slots = counted(lost as u64, "slot");
            text += &format!(", {slots} lost (until the guest ends them)");
        }
        text
    }

    fn of(rule: &Rule, vm: &VmStatus) -> VmInfo {
        let it = rule.vm(Side::Server).or_else(|| rule.vm(Side::Client));
        VmInfo {
            directory: it.map(|it| it.to_string()).unwrap_or_default(),
            status: vm.clone(),
        }
    }
}
