//! A proxy that does what a file says, and goes on doing so when the file changes.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use crate::address::{Address, HyperkitAddress};
use crate::config::{Config, Control, Existing, Missing, Problems, Step, Wanted, plan};
use crate::error::Error;
use crate::hyperkit::Places;
use crate::proxy::{ForwardId, ForwardStatus, Handle, Proxy, ProxyConfig, Rule, VmLimits};
use crate::sys;

use super::expose::guest_port;
use super::summary::{Summary, failures};
use super::{Failure, complain, say};

/// How often it is tried again to listen where that could not be done.
pub(super) const TRY_AGAIN: Duration = Duration::from_secs(2);

/// A running proxy and its file.
#[derive(Debug)]
pub(super) struct Running {
    handle: Handle,
    file: PathBuf,
    state: Mutex<State>,
    /// What the file asks for and could not be had, by the forward's name. It is never locked for long, as the state is.
    failing: Mutex<Failing>,
}

type Failing = BTreeMap<String, Pending>;

#[derive(Debug)]
struct State {
    config: Config,
    /// The forwards that came from the file.
    ours: HashSet<ForwardId>,
    /// VMs that have limits of their own.
    limits: Vec<VmLimits>,
    /// VMs whose directory is missing.
    missing: Vec<Missing>,
}

/// A forward that is wanted and isn't carried.
#[derive(Clone, Debug)]
#[cfg_attr(not(unix), allow(dead_code))]
struct Pending {
    rule: Rule,
    /// What it waits for is expected to be missing at times. Otherwise it should be there.
    waits: bool,
    why: String,
    since: SystemTime,
}

/// Why a proxy could not be started.
#[derive(Debug)]
pub(super) enum NotStarted {
    File(Problems),
    Failed(Failure),
}

/// The sockets by which it can be looked at and changed.
#[cfg(unix)]
pub(super) type Doors = crate::control::Bound;
#[cfg(not(unix))]
#[derive(Debug)]
pub(super) struct Doors;

#[cfg(unix)]
fn open_doors(config: &Config, proxy: &mut ProxyConfig) -> crate::Result<Doors> {
    let bound = crate::control::bind(&crate::control::Options {
        control: match &config.control {
            Control::Usual => Some(crate::control::default_path()),
            Control::At(path) => Some(path.clone()),
            Control::Off => None,
        },
        metrics: config.metrics.clone(),
    })
    .map_err(|e| match e.kind() {
        std::io::ErrorKind::AddrInUse => {
            e.with_remedy("does another hvsock run? Give this one a path of its own, control = \"PATH\", or none, control = \"off\"")
        }
        _ => e,
    })?;
    proxy.forbidden = bound.addresses();
    Ok(bound)
}

#[cfg(not(unix))]
fn open_doors(config: &Config, _: &mut ProxyConfig) -> crate::Result<Doors> {
    if matches!(config.control, Control::At(_)) || config.metrics.is_some() {
        complain("control and metrics are for Unix systems: they are not served here");
    }
    Ok(Doors)
}

impl Running {
    /// Starts what a file asks for.
    ///
    /// # Errors
    /// All that is wrong with the file, or the first forward that can't be had. But a VM whose directory is missing may
    /// come later.
    pub(super) fn start(file: &Path) -> Result<(Proxy, Running, Doors), NotStarted> {
        let (config, wanted) = Config::read(file, &Places::from_env()).map_err(NotStarted::File)?;
        let mut proxy = ProxyConfig::new(Vec::new());
        proxy.workers = config.workers;
        proxy.splice = config.splice;
        // Without it there are fewer; the proxy knows.
        let _ = sys::raise_descriptor_limit();
        proxy.limits.connections = usize::MAX;
        proxy.vms = wanted.limits.clone();
        let doors = open_doors(&config, &mut proxy)
            .map_err(|e| NotStarted::Failed(Failure::Failed(format!("{}: {e}", file.display()))))?;
        let mut failing = Failing::new();
        for rule in &wanted.rules {
            match waits_for(rule, &wanted) {
                Some(why) => drop(failing.insert(name_of(rule), pending(rule, true, why))),
                None => proxy.rules.push(rule.clone()),
            }
        }
        let proxy = super::on_passed_sockets(proxy).map_err(NotStarted::Failed)?;
        let proxy = Proxy::start(proxy)
            .map_err(|e| NotStarted::Failed(Failure::Failed(tell(file, &config, &wanted, &e))))?;
        let state = State {
            config,
            ours: proxy.forwards().iter().map(|it| it.id).collect(),
            limits: wanted.limits,
            missing: wanted.missing,
        };
        let running = Running {
            handle: proxy.handle(),
            file: file.to_owned(),
            state: Mutex::new(state),
            failing: Mutex::new(failing),
        };
        Ok((proxy, running, doors))
    }

    /// A rule of two addresses, with what the file has for all forwards.
    #[cfg(unix)]
    pub(super) fn usual_rule(&self, listen: Address, connect: Address) -> Rule {
        self.state().config.usual_rule(listen, connect)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failing(&self) -> MutexGuard<'_, Failing> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The forwards that the file asks for and that can't be had now.
    #[cfg(unix)]
    pub(super) fn pending(&self) -> Vec<crate::control::Forward> {
        let forward =
            |it: &Pending| crate::control::Forward::pending(&it.rule, it.waits, &it.why, it.since);
        self.failing().values().map(forward).collect()
    }

    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// How long live connections may go on when the end is asked for.
    pub(super) fn grace(&self) -> Duration {
        self.state().config.grace
    }

    /// What could not be had so far, line by line.
    pub(super) fn troubles(&self) -> Vec<String> {
        let state = self.state();
        let mut told: Vec<String> = state.missing.iter().map(absence).collect();
        told.extend(failures(&reasons(&self.failing())));
        told
    }

    /// The forwards of these names, as they are carried now, line by line; all if none is named.
    pub(super) fn describe(&self, names: &[String]) -> Vec<String> {
        let state = self.state();
        let forwards = self.handle.forwards().into_iter();
        let meant = |it: &ForwardStatus| names.is_empty() || names.contains(&name_of(&it.rule));
        let line = |it: ForwardStatus| {
            let name = name_of(&it.rule);
            describe(
                &name,
                &it.listen,
                &it.rule.connect,
                state.config.vm_of(&name),
            )
        };
        forwards.filter(meant).map(line).collect()
    }

    /// Reads the file again, and says what has come of it. What it doesn't change is not touched, and nobody is cut off.
    ///
    /// # Errors
    /// All that is wrong with the file; then all stays as it was.
    pub(super) fn reload(&self) -> Result<Summary, Problems> {
        let file = self.file.display();
        let outcome = self.read_again();
        match &outcome {
            Ok(summary) => {
                say(format_args!("{file} was read again: {summary}"));
                self.tell_of(summary);
            }
            Err(problems) => {
                let summary = problems.summary();
                complain(format_args!("{summary}; all stays as it was\n{problems}"));
            }
        }
        outcome
    }

    fn tell_of(&self, summary: &Summary) {
        let names: Vec<String> = [&summary.added[..], &summary.changed[..]].concat();
        if !names.is_empty() {
            self.describe(&names).iter().for_each(say);
        }
        summary.troubles().iter().for_each(complain);
    }

    fn read_again(&self) -> Result<Summary, Problems> {
        let mut state = self.state();
        if self.handle.is_stopping() {
            return Err(Problems::of(
                &self.file,
                "not read again: the proxy is stopping",
            ));
        }
        let (config, wanted) = Config::read(&self.file, &Places::from_env())?;
        let old = std::mem::replace(&mut state.config, config);
        let mut summary = self.apply(&mut state, wanted);
        let new = &state.config;
        for (key, same) in [
            ("workers", old.workers == new.workers),
            ("splice", old.splice == new.splice),
            ("control", old.control == new.control),
            ("metrics", old.metrics == new.metrics),
        ] {
            if !same {
                summary.restart.push(key);
            }
        }
        Ok(summary)
    }

    /// Tries again what could not be had, and looks again for VMs that were not there; says what has come of it, if
    /// anything.
    pub(super) fn try_again(&self) {
        if let Some(summary) = self.look_again() {
            self.tell_of(&summary);
        }
    }

    fn look_again(&self) -> Option<Summary> {
        let mut state = self.state();
        let before = reasons(&self.failing());
        if self.handle.is_stopping() || before.is_empty() && state.missing.is_empty() {
            return None;
        }
        // What is wrong now was right when the file was read; it may be so again.
        let wanted = state
            .config
            .look_again(&self.file, &Places::from_env())
            .ok()?;
        let mut summary = self.apply(&mut state, wanted);
        summary.failed.retain(|it| !before.contains(it));
        (!summary.is_quiet()).then_some(summary)
    }

    /// Makes the proxy carry what is wanted.
    fn apply(&self, state: &mut State, wanted: Wanted) -> Summary {
        for old in &state.limits {
            if !wanted.limits.iter().any(|new| new.vm == old.vm) {
                self.handle.limit_vm(&VmLimits::new(old.vm.clone()));
            }
        }
        for limits in &wanted.limits {
            self.handle.limit_vm(limits);
        }
        let now = self.handle.forwards();
        let existing: Vec<_> = now
            .iter()
            .map(|it| Existing {
                id: it.id,
                rule: it.rule.clone(),
                ours: state.ours.contains(&it.id),
            })
            .collect();
        let rules: HashMap<ForwardId, &Rule> = now.iter().map(|it| (it.id, &it.rule)).collect();
        let mut summary = Summary::default();
        let mut failing = Failing::new();
        let mut fails = |rule: Rule, waits: bool, why: String| {
            failing.insert(name_of(&rule), pending(&rule, waits, why));
        };
        for step in plan(&existing, &wanted.rules) {
            match step {
                Step::Keep(id) => {
                    state.ours.insert(id);
                    summary.kept.push(name_of(rules[&id]));
                }
                Step::Remove(id) => {
                    state.ours.remove(&id);
                    let rule = rules[&id];
                    // That it is gone already is as good.
                    let _ = self.handle.remove(id, Duration::MAX);
                    summary.removed.push(name_of(rule));
                    summary
                        .warnings
                        .extend(danger(&name_of(rule), &rule.listen));
                }
                Step::Unname(id) => {
                    let mut rule = rules[&id].clone();
                    rule.name = None;
                    // If it can't be, neither can what follows, which says so.
                    let _ = self.handle.replace(id, rule);
                }
                Step::Replace(id, rule) => {
                    state.ours.insert(id);
                    let name = name_of(&rule);
                    match self.handle.replace(id, rule.clone()) {
                        Ok(()) => summary.changed.push(name),
                        Err(e) => fails(rule, false, e.to_string()),
                    }
                }
                Step::Add(rule) => {
                    if let Some(why) = waits_for(&rule, &wanted) {
                        fails(rule, true, why);
                        continue;
                    }
                    match self.handle.add(rule.clone()) {
                        Ok(id) => {
                            state.ours.insert(id);
                            summary.added.push(name_of(&rule));
                        }
                        Err(e) => fails(rule, false, e.to_string()),
                    }
                }
            }
        }
        // Who has moved is neither new nor gone.
        let again = |name: &mut String| summary.added.contains(name);
        let moved: Vec<String> = summary.removed.extract_if(.., again).collect();
        summary.added.retain(|name| !moved.contains(name));
        summary.changed.extend(moved);
        summary.failed = reasons(&failing);
        let mut before = self.failing();
        for (name, it) in &mut failing {
            if let Some(was) = before.get(name) {
                it.since = was.since;
            }
        }
        *before = failing;
        drop(before);
        state.limits = wanted.limits;
        let new = wanted
            .missing
            .iter()
            .filter(|it| !state.missing.contains(it));
        summary.warnings.extend(new.map(absence));
        state.missing = wanted.missing;
        summary
    }
}

fn pending(rule: &Rule, waits: bool, why: String) -> Pending {
    Pending {
        rule: rule.clone(),
        waits,
        why,
        since: SystemTime::now(),
    }
}

/// The names, and why those can't be had.
fn reasons(failing: &Failing) -> Vec<(String, String)> {
    let reason = |(name, it): (&String, &Pending)| (name.clone(), it.why.clone());
    failing.iter().map(reason).collect()
}

/// What is said of a VM that is not there yet.
pub(super) fn absence(missing: &Missing) -> String {
    let (name, directory) = (&missing.name, missing.vm.state_dir.display());
    format!(
        "VM {name:?} is not there yet: there is no {directory}; until then its clients are refused"
    )
}

fn name_of(rule: &Rule) -> String {
    rule.name.clone().unwrap_or_else(|| rule.listen.to_string())
}

/// Why a rule can't listen yet, if it is on a VM whose directory is missing.
fn waits_for(rule: &Rule, wanted: &Wanted) -> Option<String> {
    let Address::Hyperkit(HyperkitAddress { vm, .. }) = &rule.listen else {
        return None;
    };
    let missing = wanted.missing.iter().find(|missing| missing.vm == *vm)?;
    let directory = missing.vm.state_dir.display();
    Some(format!("waits for the VM's state directory, {directory}"))
}

/// What is dangerous about a forward's being removed.
pub(super) fn danger(name: &str, listen: &Address) -> Option<String> {
    let Address::Hyperkit(HyperkitAddress { vm, port }) = listen else {
        return None;
    };
    let directory = vm.state_dir.display();
    Some(format!(
        "{name} is gone: if the guest of {directory} goes on dialling port {port}, on which nobody listens any more, its VM may hang"
    ))
}

/// An error of the start, with the line of the forward that it is about.
fn tell(file: &Path, config: &Config, wanted: &Wanted, error: &Error) -> String {
    let about = |rule: &&Rule| {
        [&rule.listen, &rule.connect]
            .iter()
            .any(|address| address.to_string() == error.subject())
    };
    let name = wanted
        .rules
        .iter()
        .find(about)
        .and_then(|rule| rule.name.as_ref());
    let line = name.and_then(|name| config.line_of(name));
    match (name, line) {
        (Some(name), Some(line)) => format!("{}:{line}: [forward.{name}]: {error}", file.display()),
        _ => error.to_string(),
    }
}

/// A forward, on one line.
pub(super) fn describe(
    name: &str,
    listen: &Address,
    connect: &Address,
    vm: Option<&str>,
) -> String {
    let vm = vm.unwrap_or("guest");
    match (guest_port(listen), guest_port(connect)) {
        (_, Some(port)) => format!("{name}: {listen} -> {vm}, port {port}"),
        (Some(port), _) => format!("{name}: {vm}, to CID 2 port {port} -> {connect}"),
        _ => format!("{name}: {listen} -> {connect}"),
    }
}
