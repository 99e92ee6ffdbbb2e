//! `hvsock status`, `add`, `remove`, `reload`, `stop`: what is asked of an hvsock that runs, by its control socket.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use indicatif::{HumanBytes, HumanCount, HumanDuration};
use serde_json::{Value, json};

use super::expose::rules_of_vm;
use super::forward::rules_of;
use super::kept::{KeepTrying, Kept};
use super::options::ProxyOptions;
use super::reconciler::danger;
use super::spec::{Locals, Remotes};
use super::summary::{Report, tried_again};
use super::{Failure, Outcome, arguments, complain, print, print_json, print_text, say, table};
use crate::address::{Address, TcpAddress};
use crate::app::control::{
    self, Actions, Bound, Control, Unanswered, Unavailable, ask, read, refusals_by_reason, segment,
};
use crate::app::escape;
use crate::app::values::{parse_time, tcp};
use crate::proxy::{Counters, Proxy, ProxyConfig};

/// How a proxy that runs can be looked at and changed.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Control")]
pub(super) struct ControlOptions {
    /// Let `hvsock status`, `top`, `add` and `remove` at it, by a Unix socket at PATH [default: one in your runtime directory]
    #[arg(long, value_name = "PATH", num_args = 0..=1, require_equals = true, value_parser = parse_path)]
    control: Option<Option<PathBuf>>,
    /// Serve Prometheus' metrics at http://ADDR:PORT/metrics (127.0.0.1 if ADDR is left out), to whoever can connect
    #[arg(long, value_name = "[ADDR:]PORT", value_parser = parse_metrics)]
    metrics: Option<TcpAddress>,
    /// Let forwards to programs (exec:/PROGRAM) be added by --control's socket, too
    #[arg(long, requires = "control")]
    allow_exec: bool,
}

impl ControlOptions {
    /// Returns whether forwards to programs may be added by the control socket.
    pub(super) fn allows_exec(&self) -> bool {
        self.allow_exec
    }

    pub(super) fn options(&self) -> control::Options {
        let path = self.control.clone();
        control::Options {
            control: path.map(|path| path.unwrap_or_else(control::default_path)),
            metrics: self.metrics.clone(),
            unavailable: Unavailable::Fails,
        }
    }
}

/// The path of a control socket. Whoever writes a URI means something else.
fn parse_path(text: &str) -> Result<PathBuf, String> {
    match text {
        "" => Err("it is empty; leave the = out for the usual place".to_owned()),
        text if text.contains("://") || text.starts_with(['@', '-']) => {
            Err("it is a path, as /run/hvsock.sock or ./hvsock.sock".to_owned())
        }
        text => Ok(PathBuf::from(text)),
    }
}

fn parse_metrics(text: &str) -> Result<TcpAddress, String> {
    tcp(&text.into())
}

/// Binds the control socket and the metrics, if they are asked for; no forward of the proxy may lead there.
pub(super) fn open(
    options: &ProxyOptions,
    patience: KeepTrying,
    mut config: ProxyConfig,
) -> crate::Result<(ProxyConfig, Option<Bound>)> {
    let mut wanted = options.control();
    wanted.unavailable = patience.unavailable();
    if wanted.control.is_none() && wanted.metrics.is_none() {
        return Ok((config, None));
    }
    let bound = control::bind(&wanted)?;
    config.forbidden.extend(bound.addresses());
    config.other_descriptors += bound.descriptors();
    Ok((config, Some(bound)))
}

/// Begins to serve there.
pub(super) fn begin(
    options: &ProxyOptions,
    bound: Option<Bound>,
    proxy: &Proxy,
    kept: Option<Arc<Kept>>,
) -> crate::Result<Option<Control>> {
    let (grace, rule) = (options.grace(), options.rule().clone());
    let allows_exec = options.allows_exec();
    let actions = Actions {
        options: Box::new(move || rule.clone()),
        pending: Box::new(move || kept.as_ref().map(|it| it.shown()).unwrap_or_default()),
        reload: None,
        grace: Box::new(move || grace),
        allows_exec: Box::new(move || allows_exec),
    };
    bound.map(|bound| serve(bound, proxy, actions)).transpose()
}

/// Serves on sockets where a proxy lets no forward lead; where they are is told.
pub(super) fn serve(bound: Bound, proxy: &Proxy, actions: Actions) -> crate::Result<Control> {
    let states = bound.states();
    let control = bound.serve(proxy.handle(), actions)?;
    for (address, trouble) in states {
        match (address.as_tcp(), trouble) {
            (_, Some(why)) => complain(tried_again(&why)),
            (Some(TcpAddress { host, port }), None) => {
                say(format_args!("metrics at http://{host}:{port}/metrics"));
            }
            (None, None) => say(format_args!("controlled at {address}")),
        }
    }
    Ok(control)
}

/// Which hvsock is meant.
#[derive(Args, Debug)]
pub(super) struct Which {
    /// The control socket of the hvsock that is meant [default: the one in your runtime directory]
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

impl Which {
    pub(super) fn path(&self) -> PathBuf {
        self.control.clone().unwrap_or_else(control::default_path)
    }
}

/// Show what an hvsock that runs is doing
#[derive(Args, Debug)]
#[command(
    after_help = "The hvsock that is meant was started with --control, or by `hvsock run`. `hvsock top` shows it live.

Examples:
  hvsock status
  hvsock status --json | jq '.forwards[] | select(.state != \"listening\")'"
)]
pub(super) struct Status {
    /// Print what the control socket says, as it is
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    which: Which,
}

impl Status {
    pub(super) fn run(self) -> Outcome {
        let answer = ask(&self.which.path(), "GET", "/v1/status", "")?;
        if self.json {
            return print_json(answer.trim_end());
        }
        let status: control::Status = read(&answer)?;
        print_text(overview(&status, SystemTime::now()))
    }
}

const HEADINGS: [&str; 9] = [
    "NAME", "LISTEN", "CONNECT", "STATE", "LIVE", "TOTAL", "SENT", "RECEIVED", "REFUSED",
];

/// A status as people read it.
fn overview(status: &control::Status, now: SystemTime) -> String {
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
        [
            it.label(),
            it.listen.clone(),
            it.connect.clone(),
            it.state.clone(),
            HumanCount(counters.live).to_string(),
            HumanCount(counters.accepted).to_string(),
            HumanBytes(counters.sent).to_string(),
            HumanBytes(counters.received).to_string(),
            refusals(counters),
        ]
    });
    text += &match status.forwards.is_empty() {
        true => "no forwards; `hvsock add` adds some".to_owned(),
        false => table::of(HEADINGS, rows),
    };
    let mut lines = Vec::new();
    for it in &status.unserved {
        let (service, since) = (&it.service, ago(it.since, now));
        lines.push(format!("{service} can't be had since {since}: {}", it.why));
    }
    for vm in status.vms() {
        lines.push(format!(
            "VM {}: {}; {} of {} connections, {}",
            vm.directory,
            vm.health(now),
            vm.status.connections,
            vm.status.limit,
            table::counted(vm.status.restarts, "restart")
        ));
    }
    for forward in &status.forwards {
        if let (Some(why), Some(since)) = (&forward.why, forward.since) {
            lines.push(format!(
                "{} is {} since {}: {why}",
                forward.label(),
                forward.state,
                ago(since, now)
            ));
        }
        if let Some(error) = &forward.last_error {
            lines.push(format!(
                "{}, {}: {}",
                forward.label(),
                ago(error.at, now),
                error.text
            ));
        }
    }
    for line in lines {
        text += "\n";
        text += &escape::line(&line);
    }
    text
}

/// How many were refused, and why.
fn refusals(counters: &Counters) -> String {
    if counters.refused == 0 {
        return "0".to_owned();
    }
    let why = refusals_by_reason(&counters.refusals);
    let why = why.iter().filter(|(_, count)| *count > 0);
    let why = why.map(|(reason, count)| format!("{count} {}", reason.replace('_', " ")));
    let why: Vec<String> = why.collect();
    format!("{} ({})", counters.refused, why.join(", "))
}

fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

fn ago(then: SystemTime, now: SystemTime) -> String {
    let passed = now.duration_since(then).unwrap_or_default();
    format!("{} ago", HumanDuration(passed))
}

/// Add forwards to an hvsock that runs
#[derive(Args, Debug)]
#[command(
    after_help = "It is written as for `hvsock forward` and `hvsock expose`. What is there already, exactly so, is left as it is.

Examples:
  hvsock add --name web tcp://127.0.0.1:8080 /run/web.sock
  hvsock add --vm docker -L 8080:80 -L 2222:22
  hvsock add --name agent --vm docker -R 5000:./agent.sock"
)]
pub(super) struct Add {
    /// What the forward is called, by `hvsock remove` for example
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Pairs of an address to listen on and the address that its connections go to
    #[arg(value_name = "LISTEN CONNECT", num_args = 2.., value_parser = arguments::address())]
    addresses: Vec<Address>,
    /// The VM of -L and -R: its state directory, the name of one that can be found, or hyperkit:///STATE/DIR
    #[arg(long, value_name = "VM", value_parser = arguments::vm())]
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
    /// Print what the control socket says, as it is
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    which: Which,
}

impl Add {
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
                "--name is that of one forward, and there are more".into(),
            ));
        }
        let path = self.which.path();
        for rule in rules {
            let (listen, connect) = (rule.listen.absolute()?, rule.connect.absolute()?);
            let (listen, connect) = (listen.to_string(), connect.to_string());
            let rule = json!({"name": self.name, "listen": listen, "connect": connect});
            let answer = ask(&path, "POST", "/v1/forwards", &rule.to_string())?;
            if self.json {
                print_json(answer.trim_end())?;
                continue;
            }
            let added: control::Forward = read(&answer)?;
            print(format_args!(
                "{}: {} -> {}",
                added.label(),
                added.listen,
                added.connect
            ))?;
        }
        Ok(())
    }
}

/// Remove forwards from an hvsock that runs
///
/// They take no more clients. Those that are there go on, and are cut off after the grace.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  hvsock remove web
  hvsock remove tcp://127.0.0.1:8080 --grace 0")]
pub(super) struct Remove {
    /// The forwards: their names, where they listen, or their ids, as `hvsock status` has them
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
    /// Seconds that live connections may take to finish [default: that of the hvsock's own --grace]
    #[arg(long, value_name = "SECONDS", value_parser = parse_time)]
    grace: Option<Duration>,
    #[command(flatten)]
    which: Which,
}

impl Remove {
    pub(super) fn run(self) -> Outcome {
        let path = self.which.path();
        for name in &self.names {
            let call = format!("/v1/forwards/{}{}", segment(name), query(self.grace));
            let removed: control::Forward = read(&ask(&path, "DELETE", &call, "")?)?;
            let live = match removed.counters.live {
                0 => String::new(),
                n => format!("; {} may finish", table::counted(n, "connection")),
            };
            let (name, listen) = (removed.label(), &removed.listen);
            print(format_args!(
                "removed {name}: {listen} -> {}{live}",
                removed.connect
            ))?;
            let listen = listen.parse().ok();
            if let Some(why) = listen.and_then(|listen| danger(&name, &listen)) {
                complain(why);
            }
        }
        Ok(())
    }
}

fn query(grace: Option<Duration>) -> String {
    grace.map_or(String::new(), |it| format!("?grace={}", it.as_secs_f64()))
}

/// Have an hvsock that runs read its file again, and say what has changed
///
/// A file with a mistake in it changes nothing. The exit code is 1 then, and where a forward can't be had now.
#[derive(Args, Debug)]
pub(super) struct Reload {
    /// Print what the control socket says, as it is
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    which: Which,
}

impl Reload {
    pub(super) fn run(self) -> Outcome {
        // What is wrong with the file has many lines.
        let listed = |why: Unanswered| {
            let why = why.to_string();
            Failure::Listed(why.lines().map(str::to_owned).collect())
        };
        let answer = ask(&self.which.path(), "POST", "/v1/reload", "").map_err(listed)?;
        let report: Report = read(&answer)?;
        match self.json {
            true => print_json(answer.trim_end())?,
            false => {
                report.changes().iter().try_for_each(print)?;
                report.troubles().iter().for_each(complain);
            }
        }
        match report.failed.is_empty() {
            true => Ok(()),
            // It was said which, and why.
            false => Err(Failure::Silent),
        }
    }
}

/// Stop an hvsock that runs, and wait for its end
#[derive(Args, Debug)]
pub(super) struct Stop {
    /// Seconds that live connections may take to finish [default: that of the hvsock's own --grace]
    #[arg(long, value_name = "SECONDS", value_parser = parse_time)]
    grace: Option<Duration>,
    #[command(flatten)]
    which: Which,
}

/// How often it is looked whether it has ended.
const LOOK: Duration = Duration::from_millis(100);

/// How much longer than its grace an hvsock may take: the connections of guests are closed gracefully.
const LEAVE: Duration = Duration::from_secs(10);

impl Stop {
    pub(super) fn run(self) -> Outcome {
        let path = self.which.path();
        let call = format!("/v1/stop{}", query(self.grace));
        let answer: Value = read(&ask(&path, "POST", &call, "")?)?;
        let grace = duration(answer["grace_seconds"].as_f64().unwrap_or(0.0));
        let end = crate::time::after(Instant::now(), grace.saturating_add(LEAVE));
        while Instant::now() < end {
            match control::get::<control::Status>(&path, "/v1/status") {
                Err(Unanswered::Absent(_)) => return print("stopped"),
                _ => thread::sleep(LOOK),
            }
        }
        Err(Failure::Failed(format!(
            "it has not ended within {} and {} more",
            HumanDuration(grace),
            HumanDuration(LEAVE)
        )))
    }
}
