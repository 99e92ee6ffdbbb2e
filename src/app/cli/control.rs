//! `hvsock status`, `add`, `remove`, `reload`, `upgrade`: requests to the control socket of a
//! running hvsock.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::Args;
use clap_complete::ArgValueCompleter;
use indicatif::{HumanBytes, HumanCount, HumanDuration};
use serde_json::{Value, json};

use super::arguments::Addresses;
use super::console::{complain, print, print_json, print_text};
use super::given::GivenOptions;
use super::occupant::Occupants;
use super::outcome::{Failure, Outcome};
use super::predecessor::left_behind;
use super::reconciler::describe_danger;
use super::rules::{refuse_unworkable, refuse_useless_access, rules_of, rules_of_vm};
use super::spec::{Locals, Remotes};
use super::summary::{SummaryReport, tried_again};
use super::{arguments, complete, table};
use crate::address::Address;
use crate::app::answering::find_control_of;
use crate::app::control::{
    self, ApiProblem, Unanswered, ask, encode_segment, read, refusals_by_reason,
};
use crate::app::escape;
use crate::app::needs::ACCESS_KEYS;
use crate::app::ranges::{BarePort, expand, join, name_of};
use crate::app::rule_options::RuleOptions;
use crate::app::values::{local_address, parse_process, parse_time};
use crate::keeper::LinkStatus;
use crate::proxy::{Counters, EndReason, RefusalReason, Rule};

/// Which hvsock is meant.
#[derive(Args, Debug)]
pub(super) struct Which {
    /// The control socket of the hvsock that is meant [default: the one in your runtime directory,
    /// or among the temporary files, or else that of the only hvsock that runs]
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// The process that is meant, as `hvsock ps` has it
    #[arg(long, value_name = "PID", conflicts_with = "control", add = ArgValueCompleter::new(complete::process), value_parser = parse_process)]
    pid: Option<u32>,
}

impl Which {
    pub(super) fn path(&self) -> PathBuf {
        match (&self.control, self.pid) {
            (Some(path), _) => path.clone(),
            (None, Some(process)) => find_control_of(process),
            (None, None) => control::find_path(),
        }
    }
}

/// Show what an hvsock that runs is doing
#[derive(Args, Debug)]
#[command(
    after_help = "`hvsock ps` lists the hvsocks that run. `hvsock top` shows one live.

Examples:
  hvsock status
  hvsock status --json | jq '.forwards[] | select(.state != \"listening\")'"
)]
pub(super) struct StatusArgs {
    /// Print what the control socket says, as it is
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    which: Which,
}

impl StatusArgs {
    pub(super) fn run(self) -> Outcome {
        let answer = ask(&self.which.path(), "GET", "/v1/status", "")?;
        if self.json {
            return print_json(answer.trim_end());
        }
        let status: control::Status = read(&answer)?;
        print_text(format_overview(&status, SystemTime::now()))?;
        left_behind(&status).iter().try_for_each(print)
    }
}

const HEADINGS: [&str; 9] = [
    "NAME", "LISTEN", "CONNECT", "STATE", "LIVE", "TOTAL", "SENT", "RECEIVED", "REFUSED",
];

/// Returns a status as text for people.
fn format_overview(status: &control::Status, now: SystemTime) -> String {
    let stopping = if status.stopping { ", stopping" } else { "" };
    let mut text = format!(
        "hvsock {}, process {}, up {}, {}{stopping}\n",
        status.version,
        status.pid,
        HumanDuration(duration(status.uptime_seconds)),
        table::counted(status.live as u64, "connection"),
    );
    let rows = status.forwards.iter().map(|it| {
        let counters = &it.counters;
        // A forward without a name gets its id only when it is carried.
        let id = it.id.map_or_else(|| "-".to_owned(), |id| id.to_string());
        [
            it.name.clone().unwrap_or(id),
            it.listen.clone(),
            it.connect.clone(),
            it.state.clone(),
            HumanCount(counters.live).to_string(),
            HumanCount(counters.accepted).to_string(),
            HumanBytes(counters.sent).to_string(),
            HumanBytes(counters.received).to_string(),
            describe_refusals(counters),
        ]
    });
    text += &match status.forwards.is_empty() {
        true => "no forwards; `hvsock add` adds some".to_owned(),
        false => table::of(HEADINGS, rows),
    };
    let mut lines = Vec::new();
    for it in &status.unserved {
        let (service, time) = (&it.service, format_passed(it.since, now));
        lines.push(format!("{service} can't be had for {time}: {}", it.why));
    }
    for vm in status.vms() {
        let advice = match vm.status.lost {
            0 => "",
            _ => " (see `hvsock doctor`)",
        };
        lines.push(format!(
            "VM {}: {}; {}{advice}, {}",
            vm.directory,
            vm.health(now),
            vm.slots(),
            table::counted(vm.status.restarts, "restart")
        ));
    }
    lines.extend(status.keeper.as_ref().and_then(describe_keeper));
    for forward in &status.forwards {
        if let (Some(why), Some(since)) = (&forward.why, forward.since) {
            let (name, time) = (forward.name_or_address(), format_passed(since, now));
            lines.push(match &*forward.state {
                "failed" => format!("{name} failed {time} ago: {why}"),
                state => format!("{name} has been {state} for {time}: {why}"),
            });
        }
        if let Some(note) = &forward.note {
            lines.push(format!("{}: {note}", forward.name_or_address()));
        }
        if let Some(error) = &forward.last_error {
            let since = match error.connected_since {
                0 => String::new(),
                n => format!(" ({} since)", table::counted(n, "connection")),
            };
            lines.push(format!(
                "the last error of {}, {} ago{since}: {}",
                forward.name_or_address(),
                format_passed(error.at, now),
                error.text
            ));
        }
        if let Some(ends) = describe_ends(&forward.counters) {
            lines.push(format!("ended at {}: {ends}", forward.name_or_address()));
        }
    }
    for line in lines {
        text += "\n";
        text += &escape::line(&line);
    }
    text
}

/// Describes the keeper. Returns `None` if none was needed yet.
fn describe_keeper(keeper: &LinkStatus) -> Option<String> {
    let mut text = match (keeper.pid, &keeper.trouble) {
        (Some(pid), _) => format!(
            "keeper: process {pid}, with copies of {} and {}",
            table::counted(keeper.connections as u64, "connection"),
            table::counted(keeper.ports as u64, "port")
        ),
        (None, Some(trouble)) => format!("keeper: none: {trouble}"),
        (None, None) => return None,
    };
    if keeper.unguarded > 0 {
        text += &format!(
            "; {} more are unguarded: if hvsock is killed, their VM may end",
            keeper.unguarded
        );
    }
    if keeper.restarts > 0 {
        text += &format!("; {}", table::counted(keeper.restarts, "restart"));
    }
    Some(text)
}

/// Describes how many clients were refused, and why.
fn describe_refusals(counters: &Counters) -> String {
    if counters.refused == 0 {
        return "0".to_owned();
    }
    let why = refusals_by_reason(&counters.refusals);
    let why = why.iter().filter(|(_, count)| *count > 0);
    let why =
        why.map(|(reason, count)| format!("{count} {}", RefusalReason::name_in_words(reason)));
    let why: Vec<String> = why.collect();
    format!("{} ({})", counters.refused, why.join(", "))
}

/// Describes how many connections have ended, and why; `None` if none has.
fn describe_ends(counters: &Counters) -> Option<String> {
    let by_reason = serde_json::to_value(counters.ended).ok()?;
    let counts = by_reason.as_object()?.iter();
    let counts = counts.filter_map(|(reason, count)| Some((reason, count.as_u64()?)));
    let counts = counts.filter(|(_, count)| *count > 0);
    let why: Vec<String> = counts
        .map(|(reason, count)| format!("{count} {}", EndReason::kind_in_words(reason)))
        .collect();
    (!why.is_empty()).then(|| why.join(", "))
}

pub(super) fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

/// Returns how long ago `then` was, in words.
fn format_passed(then: SystemTime, now: SystemTime) -> String {
    let passed = now.duration_since(then).unwrap_or_default();
    HumanDuration(passed).to_string()
}

/// Add forwards to an hvsock that runs
#[derive(Args, Debug)]
#[command(
    after_help = "It is written as for `hvsock forward` and `hvsock expose`. What is there already, exactly so, is left as it is. An option that isn't given is as the hvsock that runs has it.

Examples:
  hvsock add --name web tcp://127.0.0.1:8080 /run/web.sock
  hvsock add --vm docker -L 8080:80 -L 2222:22
  hvsock add --name web tcp://127.0.0.1:8000-8010 vsock://3:8000-8010
  hvsock add --name agent --vm docker -R 5000:./agent.sock
  hvsock add --from 192.168.7.0/24 'tcp://*:8081' tcp://127.0.0.1:80"
)]
pub(super) struct AddArgs {
    /// What the forward is called, by `hvsock remove` for example; those of a range are called
    /// NAME-PORT
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Pairs of an address to listen on and the address that its connections go to, as for `hvsock
    /// forward`
    #[arg(value_name = "LISTEN CONNECT", num_args = 2.., add = ArgValueCompleter::new(complete::address), value_parser = arguments::addresses())]
    addresses: Vec<Addresses>,
    /// The VM of -L and -R: its state directory, the name of one that can be found, or
    /// hyperkit:///STATE/DIR, vsock://CID or vsock-mux:///PATH
    #[arg(long, value_name = "VM", add = ArgValueCompleter::new(complete::vm), value_parser = arguments::vm())]
    vm: Option<String>,
    /// Host to guest, as for `hvsock expose`
    #[arg(
        short = 'L',
        value_name = "[ADDR:]PORT:GUESTPORT|/PATH:GUESTPORT",
        requires = "vm",
        value_parser = arguments::locals()
    )]
    local: Vec<Locals>,
    /// Guest to host, as for `hvsock expose`
    #[arg(short = 'R', value_name = "HOSTPORT:TARGET", requires = "vm", value_parser = arguments::remotes())]
    remote: Vec<Remotes>,
    #[command(flatten)]
    options: GivenOptions,
    /// Print what the control socket says, as it is
    #[arg(long, help_heading = None)]
    json: bool,
    #[command(flatten)]
    which: Which,
}

impl AddArgs {
    pub(super) fn run(self) -> Outcome {
        let mut rules = rules_of(&self.addresses)?;
        if let Some(vm) = &self.vm {
            rules.extend(rules_of_vm(vm, &self.local, &self.remote)?);
        }
        if rules.is_empty() {
            return Err(Failure::Usage(
                "nothing to add: give LISTEN and CONNECT, or --vm with -L or -R".into(),
            ));
        }
        if rules.len() != 1 && self.name.is_some() {
            return Err(Failure::Usage(
                "--name is that of one forward or range, and there are more".into(),
            ));
        }
        refuse_useless_access(rules.iter().flatten(), &self.options.access())?;
        for rule in rules.iter().flatten() {
            let rule = self.options.all.applied_to(rule.clone());
            refuse_unworkable(&rule)?;
        }
        let path = self.which.path();
        let has_file = |it: &Rule| it.listen.listen_path().is_some();
        for rules in rules {
            let ([rule, ..], Some(last)) = (&rules[..], rules.last()) else {
                continue;
            };
            let mut body = self.options.given.clone();
            if !has_file(rule) {
                // These keys are for the other rules of the command, which have files.
                body.retain(|key, _| !ACCESS_KEYS.contains(&key.as_str()));
            }
            if !rule.from.is_empty() && !body.contains_key("from") {
                let options = serde_json::to_value(RuleOptions::from(rule)).unwrap_or_default();
                body.insert("from".to_owned(), options["from"].clone());
            }
            body.insert("name".to_owned(), json!(self.name));
            body.insert("listen".to_owned(), json!(join(&rule.listen, &last.listen)));
            let connect = join(&rule.connect, &last.connect);
            body.insert("connect".to_owned(), json!(connect));
            let body = serde_json::Value::from(body);
            let answer = ask(&path, "POST", "/v1/forwards", &body.to_string());
            let answer = answer.map_err(|why| name_occupant(why, &rules))?;
            if self.json {
                print_json(answer.trim_end())?;
                continue;
            }
            for added in read::<AddedForwards>(&answer)?.list() {
                let (name, listen) = (added.label(), &added.listen);
                print(format_args!("{name}: {listen} -> {}", added.connect))?;
                added.note.iter().for_each(complain);
            }
        }
        Ok(())
    }
}

/// The answer to an added rule: its forward, or those of its range.
#[derive(serde::Deserialize)]
#[serde(untagged)]
pub(super) enum AddedForwards {
    Range(Vec<control::ForwardInfo>),
    One(Box<control::ForwardInfo>),
}

impl AddedForwards {
    pub(super) fn list(&self) -> &[control::ForwardInfo] {
        match self {
            AddedForwards::Range(all) => all,
            AddedForwards::One(one) => std::slice::from_ref(one),
        }
    }
}

/// Adds to an error which other hvsock listens on an address of these rules.
fn name_occupant(why: Unanswered, rules: &[Rule]) -> Unanswered {
    match why {
        Unanswered::Refused(problem) if problem.error.contains("in use") => {
            let is_named = |it: &&Rule| problem.error.contains(&format!("{}: ", it.listen));
            let taken = rules.iter().find(is_named);
            let occupant = taken.and_then(|it| Occupants::default().remedy(&it.listen));
            let remedy = occupant.or(problem.remedy);
            Unanswered::Refused(ApiProblem { remedy, ..problem })
        }
        other => other,
    }
}

/// Remove forwards from an hvsock that runs
///
/// They take no more clients. Those that are there go on, and are cut off after the grace.
#[derive(Args, Debug)]
#[command(
    after_help = "A range of ports is removed by its addresses, or by its name without a port.

Examples:
  hvsock remove web
  hvsock remove tcp://127.0.0.1:8000-8010
  hvsock remove tcp://127.0.0.1:8080 --grace 0"
)]
pub(super) struct RemoveArgs {
    /// The forwards: their names, where they listen, or their ids, as `hvsock status` has them; all
    /// of a range at once
    #[arg(value_name = "NAME", required = true, add = ArgValueCompleter::new(complete::forward))]
    names: Vec<String>,
    /// Seconds that live connections may take to finish [default: that of the hvsock's own --grace]
    #[arg(long, value_name = "SECONDS", value_parser = parse_time)]
    grace: Option<Duration>,
    #[command(flatten)]
    which: Which,
}

impl RemoveArgs {
    pub(super) fn run(self) -> Outcome {
        let path = self.which.path();
        let mut is_whole = true;
        for name in &self.names {
            let call = format!("/v1/forwards/{}{}", encode_segment(name), query(self.grace));
            let removed: AddedForwards = read(&ask(&path, "DELETE", &call, "")?)?;
            for it in removed.list() {
                tell_removed(it, &path)?;
            }
            let AddedForwards::Range(removed) = &removed else {
                continue;
            };
            let forwards: Vec<control::ForwardInfo> = control::get(&path, "/v1/forwards")?;
            // The forwards of the range that can't be had now.
            let pending = forwards.iter().filter(|it| it.id.is_none());
            let pending: HashMap<&str, &str> = pending
                .map(|it| (it.listen.as_str(), it.name_or_address()))
                .collect();
            for place in find_missing_addresses(name, removed) {
                let listen = local_address(&place).map(|it| it.to_string());
                match listen.ok().filter(|it| pending.contains_key(it.as_str())) {
                    Some(listen) => self.complain_of_pending(&listen, &path)?,
                    None => complain(format_args!("there is no forward {place:?}")),
                }
                is_whole = false;
            }
            for (listen, its_name) in &pending {
                let of_name = listen.parse().ok().map(|it| name_of(name, &it));
                if of_name.as_deref() == Some(its_name) {
                    self.complain_of_pending(its_name, &path)?;
                    is_whole = false;
                }
            }
        }
        match is_whole {
            true => Ok(()),
            // The missing forward was printed above.
            false => Err(Failure::Silent),
        }
    }
}

impl RemoveArgs {
    /// Removes a pending forward of a range, or prints why that can't be done.
    fn complain_of_pending(&self, name: &str, path: &Path) -> Outcome {
        let call = format!("/v1/forwards/{}{}", encode_segment(name), query(self.grace));
        match ask(path, "DELETE", &call, "") {
            // It may be carried by now.
            Ok(removed) => tell_removed(&read(&removed)?, path),
            Err(why) => {
                complain(why);
                Ok(())
            }
        }
    }
}

/// Prints that a forward was removed, with any risk of that.
fn tell_removed(removed: &control::ForwardInfo, path: &Path) -> Outcome {
    let live = match removed.counters.live {
        0 => String::new(),
        n => format!("; {} may finish", table::counted(n, "connection")),
    };
    let (name, listen) = (removed.label(), &removed.listen);
    let connect = &removed.connect;
    print(format_args!("removed {name}: {listen} -> {connect}{live}"))?;
    let listen = listen.parse().ok();
    let danger = listen.and_then(|listen| describe_danger(&name, &listen));
    if let Some(why) = danger.filter(|_| !has_keeper(path)) {
        complain(why);
    }
    Ok(())
}

/// Returns the addresses of a range at which none of these forwards listened.
fn find_missing_addresses(range: &str, forwards: &[control::ForwardInfo]) -> Vec<String> {
    let places = expand(range, BarePort::Tcp).unwrap_or_default();
    if places.len() < 2 {
        // The range was given by its name.
        return Vec::new();
    }
    let addresses = |it: &control::ForwardInfo| {
        let texts = [&it.listen, &it.rule.listen].into_iter();
        texts.filter_map(|it| it.parse().ok()).collect::<Vec<_>>()
    };
    let there: HashSet<Address> = forwards.iter().flat_map(addresses).collect();
    // A number may be a port or an id.
    let ports = there.iter().filter_map(|it| Some(it.as_tcp()?.port.into()));
    let ids = forwards.iter().filter_map(|it| it.id);
    let numbers: HashSet<u64> = ports.chain(ids).collect();
    let is_missing = |place: &String| match place.parse() {
        Ok(number) => !numbers.contains(&number),
        Err(_) => {
            let address = local_address(place).ok();
            !address.is_some_and(|it| there.contains(&it))
        }
    };
    places.into_iter().filter(is_missing).collect()
}

/// Returns whether the hvsock at that control socket has a keeper, which goes on accepting the
/// guests' dials.
fn has_keeper(path: &Path) -> bool {
    let status = control::get::<control::Status>(path, "/v1/status");
    let keeper = status.ok().and_then(|status| status.keeper);
    keeper.is_some_and(|keeper| keeper.pid.is_some())
}

pub(super) fn query(grace: Option<Duration>) -> String {
    grace.map_or(String::new(), |it| format!("?grace={}", it.as_secs_f64()))
}

/// Have an hvsock that runs read its file again, and say what has changed
///
/// A file with a mistake in it changes nothing. The exit code is 1 then, and where a forward can't
/// be had now.
#[derive(Args, Debug)]
pub(super) struct ReloadArgs {
    /// Print what the control socket says, as it is
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    which: Which,
}

impl ReloadArgs {
    pub(super) fn run(self) -> Outcome {
        let answer = ask(&self.which.path(), "POST", "/v1/reload", "").map_err(list_reasons)?;
        let report: SummaryReport = read(&answer)?;
        match self.json {
            true => print_json(answer.trim_end())?,
            false => {
                report.changes().iter().try_for_each(print)?;
                report.troubles().iter().for_each(complain);
            }
        }
        match report.failed.is_empty() {
            true => Ok(()),
            // The failed forwards and their reasons were printed above.
            false => Err(Failure::Silent),
        }
    }
}

/// Returns a failure with one line for each reason: a file may have many mistakes.
fn list_reasons(why: Unanswered) -> Failure {
    let why = why.to_string();
    Failure::Listed(why.lines().map(str::to_owned).collect())
}

/// Have an hvsock that runs replaced by its program as it is now, and refuse no client meanwhile
///
/// It starts the program that is now where its own was, with its own words and --take-over, which
/// takes over all its listening sockets. Its connections go on, and are cut off after its grace. If
/// the new one can't start, the old one goes on as before, and it is said why. The exit code is 1
/// then, and where the new one can't have a forward.
#[derive(Args, Debug)]
#[command(
    after_help = "It is for `hvsock run`. What the file says now is carried from then on.

Example:
  cargo install hvsock && hvsock upgrade"
)]
pub(super) struct UpgradeArgs {
    #[command(flatten)]
    which: Which,
}

impl UpgradeArgs {
    pub(super) fn run(self) -> Outcome {
        let path = self.which.path();
        let before: control::Status = control::get(&path, "/v1/status")?;
        let done = ask(&path, "POST", "/v1/upgrade", "").map_err(list_reasons)?;
        let done: Value = read(&done)?;
        let after: control::Status = control::get(&path, "/v1/status")?;
        let carried = after.forwards.iter().filter(|it| it.id.is_some());
        print(format_args!(
            "process {} (hvsock {}) has taken over from {} (hvsock {}): {}",
            after.pid,
            after.version,
            before.pid,
            before.version,
            table::counted(carried.count() as u64, "forward"),
        ))?;
        if let (Some(live @ 1..), Some(grace)) =
            (done["live"].as_u64(), done["grace_seconds"].as_f64())
        {
            let (stay, pid) = (if live == 1 { "stays" } else { "stay" }, before.pid);
            print(format_args!(
                "{} {stay} with process {pid}, for at most {} s: `hvsock connections --pid {pid}`",
                table::counted(live, "connection"),
                grace.ceil()
            ))?;
        }
        // An earlier version doesn't report these.
        let failed = done["failed"].as_object().into_iter().flatten();
        let mut missing: Vec<String> = failed
            .map(|(name, why)| {
                let why = why.as_str().unwrap_or_default();
                format!("forward {name} failed: {why}")
            })
            .collect();
        missing.extend(after.unserved.iter().map(|it| {
            let why = tried_again(&it.why);
            format!("{} can't be had now: {why}", it.service)
        }));
        missing.iter().for_each(complain);
        match missing.is_empty() {
            true => Ok(()),
            // The failed forwards and their reasons were printed above.
            false => Err(Failure::Silent),
        }
    }
}
