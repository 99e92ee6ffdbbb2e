//! A proxy that carries what a file says, and changes with the file.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tracing::{error, info, warn};

use crate::address::{Address, AnyVm, HyperkitVm};
use crate::app::config::{Config, Missing, Problems, STANDARD_INPUT, WantedState, display_name};
#[cfg(unix)]
use crate::app::control;
use crate::app::guest_control::GuestControl;
#[cfg(unix)]
use crate::app::rule_options::RuleOptions;
#[cfg(unix)]
use crate::error::counted_have;
use crate::hyperkit::Places;
use crate::lock::lock;
#[cfg(unix)]
use crate::proxy::ForwardId;
use crate::proxy::{ForwardStatus, Handle, Proxy, ProxyConfig, Rule, VmLimits, all_are_wanted};
use crate::sys;

#[cfg(unix)]
use super::console::complain;
use super::console::say;
use super::outcome::Failure;
use super::passed::on_passed_sockets;
use super::reconciler::{Occasion, Reconciler, name_of};
use super::summary::{Summary, failures};

/// A running proxy and its file.
#[derive(Debug)]
pub(super) struct Running {
    reconciler: Reconciler,
    file: PathBuf,
    /// Whether connections are logged even if the file doesn't ask for it.
    always_logs_access: bool,
    /// The process from which this one has taken over.
    #[cfg(unix)]
    predecessor: Option<u32>,
    /// The file's content as last read. Never locked for long.
    config: Mutex<Arc<Config>>,
    /// Locked while the file is read and applied, which may take for ever on a hanging disk. Only
    /// the threads that do this may lock it.
    state: Mutex<RunningState>,
}

#[derive(Debug, Default)]
struct RunningState {
    /// The VMs with limits of their own.
    limits: Vec<VmLimits>,
    /// The VMs whose directories are missing.
    missing: Vec<Missing>,
}

/// Why a proxy could not be started.
#[derive(Debug)]
pub(super) enum NotStarted {
    File(Problems),
    Failed(Failure),
}

#[cfg(unix)]
impl NotStarted {
    /// Returns the reasons, the first line being a summary.
    pub(super) fn lines(&self) -> Vec<String> {
        match self {
            NotStarted::File(problems) => {
                let first = std::iter::once(problems.summary());
                first.chain(problems.lines()).collect()
            }
            NotStarted::Failed(Failure::Usage(why) | Failure::Failed(why)) => vec![why.clone()],
            NotStarted::Failed(Failure::Listed(lines)) => lines.clone(),
            NotStarted::Failed(Failure::Program(_) | Failure::Silent) => Vec::new(),
        }
    }
}

impl<E: Into<Failure>> From<E> for NotStarted {
    fn from(error: E) -> NotStarted {
        NotStarted::Failed(error.into())
    }
}

/// The bound sockets of the control interface.
#[cfg(unix)]
pub(super) type ControlSockets = control::Bound;
#[cfg(not(unix))]
#[derive(Debug)]
pub(super) struct ControlSockets;

#[cfg(unix)]
fn control_options(config: &Config) -> control::Options {
    let path = config.control.clone();
    control::Options {
        control: path.map_or(control::ControlPlace::Nowhere, control::ControlPlace::At),
        guest_control: config.guest_control.clone(),
        metrics: config.metrics.clone(),
        unavailable: control::Unavailable::IsTriedAgain,
    }
}

#[cfg(unix)]
fn bind_control_sockets(
    file: &Path,
    config: &Config,
    proxy: &mut ProxyConfig,
) -> crate::Result<ControlSockets> {
    let bound =
        control::bind(&control_options(config)).map_err(|e| match (e.kind(), &config.control) {
            (std::io::ErrorKind::AddrInUse, Some(path)) => e.with_remedy(in_place_of(path, file)),
            _ => e,
        })?;
    Ok(forbid_own_sockets(bound, proxy))
}

/// Forbids the proxy's forwards to lead to the sockets of the control interface.
#[cfg(unix)]
fn forbid_own_sockets(bound: ControlSockets, proxy: &mut ProxyConfig) -> ControlSockets {
    proxy.forbidden = bound.addresses();
    proxy.other_descriptors = bound.descriptors();
    proxy.observer = Some(bound.observer());
    bound
}

/// Returns the remedy for a control socket that another hvsock has.
#[cfg(unix)]
fn in_place_of(path: &Path, file: &Path) -> String {
    let elsewhere =
        "give this one a path of its own, control = \"PATH\", or none, control = \"off\"";
    match control::get::<control::Status>(path, "/v1/status") {
        Ok(status) => {
            let carried = status.file.map(|file| format!(" and carries {file}"));
            let carried = carried.unwrap_or_default();
            let file = file.display();
            format!(
                "hvsock process {} runs there{carried}: take over from it with `hvsock run {file} --take-over`, or {elsewhere}",
                status.pid
            )
        }
        Err(_) => format!("does another hvsock run? {elsewhere}"),
    }
}

/// Returns the failure to take over.
#[cfg(unix)]
fn not_taken_over(why: &control::Unanswered) -> Failure {
    Failure::Failed(match why {
        control::Unanswered::Absent(error) => format!(
            "there is nothing to take over: no hvsock answers at {}: {}; leave --take-over out",
            error.subject(),
            error.cause()
        ),
        other => other.to_string(),
    })
}

#[cfg(not(unix))]
fn bind_control_sockets(
    _: &Path,
    config: &Config,
    _: &mut ProxyConfig,
) -> crate::Result<ControlSockets> {
    if config.control.is_some() || config.metrics.is_some() {
        super::console::complain(
            "control and metrics are for Unix systems: they are not served here",
        );
    }
    Ok(ControlSockets)
}

/// Returns the configuration of a proxy without forwards. They are added as at a reload, so that
/// one that fails keeps no other from starting.
fn empty_proxy(config: &Config) -> ProxyConfig {
    let mut proxy = ProxyConfig::new(Vec::new());
    proxy.workers = config.workers;
    proxy.splice = config.splice;
    // If the limit can't be raised the proxy uses the lower one.
    let _ = sys::raise_descriptor_limit();
    proxy.limits.connections = usize::MAX;
    proxy
}

impl Running {
    /// Starts a proxy for a file. Forwards that can't be had are to be retried. `configure` sets
    /// what the file doesn't.
    ///
    /// # Errors
    /// Returns all mistakes in the file; that another hvsock has the control socket; or that no
    /// proxy can be started.
    pub(super) fn start(
        file: &Path,
        configure: impl FnOnce(&mut ProxyConfig),
    ) -> Result<(Proxy, Running, ControlSockets), NotStarted> {
        let (config, wanted) = Config::read(file, &Places::from_env()).map_err(NotStarted::File)?;
        let mut proxy = empty_proxy(&config);
        configure(&mut proxy);
        let always_logs_access = proxy.access_log;
        proxy.access_log |= config.access_log;
        let sockets = bind_control_sockets(file, &config, &mut proxy)
            .map_err(|e| Failure::Failed(format!("{}: {e}", display_name(file))))?;
        let proxy = on_passed_sockets(proxy)?;
        all_are_wanted(&proxy.listeners, &wanted.rules)?;
        let proxy = Proxy::start(proxy)?;
        let running = Running::new(file, config, &proxy, always_logs_access);
        running.apply(&mut running.state(), wanted, Occasion::Asked);
        Ok((proxy, running, sockets))
    }

    /// Starts a proxy for a file on the sockets of the hvsock that has the file's control socket.
    /// This process accepts no clients before the other has agreed, and the other accepts none once
    /// this returns.
    ///
    /// # Errors
    /// Returns those of [`start`](Running::start); that no hvsock is there, or that it doesn't hand
    /// over. The other hvsock then goes on as before.
    #[cfg(unix)]
    pub(super) fn take_over(
        file: &Path,
        configure: impl FnOnce(&mut ProxyConfig),
    ) -> Result<(Proxy, Running, ControlSockets), NotStarted> {
        let (config, wanted) = Config::read(file, &Places::from_env()).map_err(NotStarted::File)?;
        let Some(path) = &config.control else {
            let why = "control = \"off\": an hvsock that is to be taken over is asked by its control socket";
            return Err(Failure::Failed(format!("{}: {why}", display_name(file))).into());
        };
        let fail = |why: control::Unanswered| not_taken_over(&why);
        let old: control::Status = control::get(path, "/v1/status").map_err(fail)?;
        // Each socket takes a descriptor.
        let mut proxy = empty_proxy(&config);
        configure(&mut proxy);
        let always_logs_access = proxy.access_log;
        proxy.access_log |= config.access_log;
        let mut predecessor = control::Predecessor::ask(path).map_err(fail)?;
        let sockets = control::take(&control_options(&config), &mut predecessor)
            .map_err(|e| Failure::Failed(format!("{}: {e}", display_name(file))))?;
        let sockets = forbid_own_sockets(sockets, &mut proxy);
        let added = predecessor.added_rules();
        let rules: Vec<Rule> = wanted.rules.iter().chain(&added).cloned().collect();
        proxy.listeners = predecessor.take_listeners(&rules);
        let proxy = Proxy::start(proxy)?;
        let mut running = Running::new(file, config, &proxy, always_logs_access);
        // The other hvsock serves clients until it knows that this one can.
        running.handle().hold_clients();
        running.apply(&mut running.state(), wanted, Occasion::Asked);
        let mut failed = running.reconciler.failures();
        for rule in added {
            let name = name_of(&rule);
            if let Err(e) = running.handle().add(rule) {
                complain(format_args!("{name}, which was added by hand: {e}"));
                failed.insert(name, format!("{e}; it was added by hand"));
            }
        }
        sockets.note_added(&predecessor, running.handle());
        let left = predecessor.untaken_addresses();
        for vm in rules.iter().filter_map(|rule| guest_of(&rule.listen)) {
            running.handle().start_keeper(&vm.state_dir);
        }
        let agreed = predecessor
            .agree_on_sockets(running.handle())
            .map_err(|e| {
                let pid = old.pid;
                Failure::Failed(format!(
                    "process {pid} has not handed over: {e}; it goes on"
                ))
            })?;
        running.handle().admit_clients();
        agreed.finish(running.handle(), old.pid, sockets.inherited(), failed);
        running.predecessor = Some(old.pid);
        let stays = match super::predecessor::find(old.pid).map(|old| old.live) {
            None | Some(0) => String::new(),
            Some(live) => format!(
                "; {} {} s to finish there",
                counted_have(live as u64, "connection"),
                running.grace().as_secs()
            ),
        };
        say(format_args!(
            "took over from process {} (hvsock {}){stays}",
            old.pid, old.version
        ));
        for gone in left {
            say(format_args!(
                "{gone} is not in {} and is closed",
                display_name(file)
            ));
        }
        Ok((proxy, running, sockets))
    }

    fn new(file: &Path, config: Config, proxy: &Proxy, always_logs_access: bool) -> Running {
        Running {
            reconciler: Reconciler::new(proxy.handle()),
            file: file.to_owned(),
            always_logs_access,
            #[cfg(unix)]
            predecessor: None,
            config: Mutex::new(Arc::new(config)),
            state: Mutex::default(),
        }
    }

    /// See [`Reconciler::while_unchanged`].
    #[cfg(unix)]
    pub(super) fn while_unchanged(&self, f: &mut dyn FnMut(&HashSet<ForwardId>)) {
        self.reconciler.while_unchanged(f);
    }

    #[cfg(unix)]
    pub(super) fn predecessor(&self) -> Option<u32> {
        self.predecessor
    }

    #[cfg(unix)]
    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// Returns the file's content as last read.
    fn config(&self) -> Arc<Config> {
        let config = lock(&self.config);
        Arc::clone(&config)
    }

    /// Returns the options that the file sets for all forwards.
    #[cfg(unix)]
    pub(super) fn defaults(&self) -> RuleOptions {
        self.config().defaults.clone()
    }

    /// Returns whether the file allows forwards to programs to be added by the control socket.
    #[cfg(unix)]
    pub(super) fn allows_exec(&self) -> bool {
        self.config().allow_exec
    }

    fn state(&self) -> MutexGuard<'_, RunningState> {
        lock(&self.state)
    }

    /// Returns the forwards that the file asks for and that can't be had now.
    #[cfg(unix)]
    pub(super) fn pending(&self) -> Vec<crate::app::control::ForwardInfo> {
        self.reconciler.shown()
    }

    pub(super) fn handle(&self) -> &Handle {
        self.reconciler.handle()
    }

    /// Returns how long live connections may go on once the end has begun.
    pub(super) fn grace(&self) -> Duration {
        self.config().grace
    }

    /// Returns the idle time after which the process ends, as the file said at the start.
    pub(super) fn exit_idle(&self) -> Option<Duration> {
        self.config().exit_idle
    }

    /// Returns what can't be had now, line by line.
    pub(super) fn troubles(&self) -> Vec<String> {
        let mut told: Vec<String> = self.state().missing.iter().map(describe_missing).collect();
        told.extend(failures(&self.reconciler.failed()));
        told
    }

    /// Returns lines that describe the forwards of these names; all forwards if `names` is empty.
    pub(super) fn describe(&self, names: &[String]) -> Vec<String> {
        let config = self.config();
        let vms = config.vms_of_forwards();
        let names: HashSet<&String> = names.iter().collect();
        let forwards = self.handle().forwards().into_iter();
        let meant = |it: &ForwardStatus| names.is_empty() || names.contains(&name_of(&it.rule));
        let line = |it: ForwardStatus| {
            let name = name_of(&it.rule);
            describe(
                &name,
                &it.listen,
                &it.rule.connect,
                vms.get(name.as_str()).copied(),
            )
        };
        forwards.filter(meant).map(line).collect()
    }

    /// Reads the file again and applies its changes. Unchanged forwards are not touched, and no
    /// connection is cut off. Returns what has changed.
    ///
    /// # Errors
    /// Returns all mistakes in the file; nothing is changed then.
    pub(super) fn reload(&self) -> Result<Summary, Problems> {
        let file = display_name(&self.file);
        let outcome = self.read_again();
        match &outcome {
            Ok(summary) => {
                info!("{file} was read again: {summary}");
                self.log_summary(summary);
            }
            Err(problems) => {
                let summary = problems.summary();
                error!("{summary}; all stays as it was");
                problems.lines().for_each(|line| error!("{line}"));
            }
        }
        outcome
    }

    fn log_summary(&self, summary: &Summary) {
        let names: Vec<String> = [&summary.added[..], &summary.changed[..]].concat();
        if !names.is_empty() {
            self.describe(&names).iter().for_each(say);
        }
        summary.settings.iter().for_each(|it| info!("{it} now"));
        summary.troubles().iter().for_each(|line| warn!("{line}"));
    }

    fn read_again(&self) -> Result<Summary, Problems> {
        let mut state = self.state();
        let stopping = || Problems::of(&self.file, "not read again: the proxy is stopping");
        if self.handle().is_stopping() {
            return Err(stopping());
        }
        if self.file == Path::new(STANDARD_INPUT) {
            let why = "it came from there, and can't be read again";
            return Err(Problems::of(&self.file, why));
        }
        let (config, wanted) = Config::read(&self.file, &Places::from_env())?;
        let new = Arc::new(config);
        let old = {
            let mut config = lock(&self.config);
            std::mem::replace(&mut *config, Arc::clone(&new))
        };
        let mut summary = self.apply(&mut state, wanted, Occasion::Asked);
        if old.access_log != new.access_log && !self.always_logs_access {
            self.handle().set_access_log(new.access_log);
            summary
                .settings
                .push(format!("access-log = {}", new.access_log));
        }
        let address_of = |it: &Option<GuestControl>| it.as_ref().map(|it| it.address.clone());
        let sources_of = |it: &Option<GuestControl>| it.as_ref().map(|it| it.from.clone());
        // The calls above wait for a hand-over, after which another process carries the forwards.
        if self.handle().is_stopping() {
            return Err(stopping());
        }
        for (key, same) in [
            ("workers", old.workers == new.workers),
            ("splice", old.splice == new.splice),
            ("exit-idle", old.exit_idle == new.exit_idle),
            ("control", old.control == new.control),
            (
                "guest-control",
                address_of(&old.guest_control) == address_of(&new.guest_control),
            ),
            (
                "guest-control-from",
                sources_of(&old.guest_control) == sources_of(&new.guest_control),
            ),
            ("metrics", old.metrics == new.metrics),
        ] {
            if !same {
                summary.restart.push(key);
            }
        }
        Ok(summary)
    }

    /// Retries pending forwards, and looks again for missing VMs. Logs what has changed.
    pub(super) fn try_again(&self) {
        if let Some(summary) = self.look_again() {
            self.log_summary(&summary);
        }
    }

    fn look_again(&self) -> Option<Summary> {
        let mut state = self.state();
        let idle = !self.reconciler.has_pending() && state.missing.is_empty();
        if idle || self.handle().is_stopping() {
            return None;
        }
        // A problem found now was none when the file was read, and may pass.
        let wanted = self
            .config()
            .look_again(&self.file, &Places::from_env())
            .ok()?;
        let summary = self.apply(&mut state, wanted, Occasion::Retry);
        (!summary.is_empty()).then_some(summary)
    }

    /// Makes the proxy carry the wanted rules.
    fn apply(&self, state: &mut RunningState, wanted: WantedState, occasion: Occasion) -> Summary {
        let limited: HashSet<&AnyVm> = wanted.limits.iter().map(|it| &it.vm).collect();
        for old in &state.limits {
            if !limited.contains(&old.vm) {
                self.handle().limit_vm(&VmLimits::new(old.vm.clone()));
            }
        }
        for limits in &wanted.limits {
            self.handle().limit_vm(limits);
        }
        let missing: HashSet<&HyperkitVm> = wanted.missing.iter().map(|it| &it.vm).collect();
        let waits_for = |rule: &Rule| waits_for(rule, &missing);
        let mut summary = match occasion {
            Occasion::Asked => self.reconciler.apply(&wanted.rules, &waits_for, occasion),
            Occasion::Retry => self.reconciler.try_again(&wanted.rules, &waits_for),
        };
        state.limits = wanted.limits;
        let known: HashSet<&Missing> = state.missing.iter().collect();
        let new = wanted.missing.iter().filter(|it| !known.contains(it));
        summary.warnings.extend(new.map(describe_missing));
        state.missing = wanted.missing;
        summary
    }
}

/// Describes a VM that is not there yet.
pub(super) fn describe_missing(missing: &Missing) -> String {
    let Missing { name, why, .. } = missing;
    format!("VM {name:?} is not there yet: {why}; until then its clients are refused")
}

/// Returns the hyperkit VM whose guest dials an address.
#[cfg(unix)]
fn guest_of(listen: &Address) -> Option<&HyperkitVm> {
    listen.hyperkit_vm()
}

/// Returns why a rule can't listen yet, if the directory of its VM is missing.
fn waits_for(rule: &Rule, missing: &HashSet<&HyperkitVm>) -> Option<String> {
    let vm = missing.get(rule.listen.hyperkit_vm()?)?;
    let directory = vm.state_dir.display();
    Some(format!("waits for the VM's state directory, {directory}"))
}

/// Describes a forward on one line.
pub(super) fn describe(
    name: &str,
    listen: &Address,
    connect: &Address,
    vm: Option<&str>,
) -> String {
    let vm = vm.unwrap_or("guest");
    match (listen.guest_port(), connect.guest_port()) {
        (_, Some(port)) => format!("{name}: {listen} -> {vm}, port {port}"),
        (Some(port), _) => format!("{name}: {vm}, to CID 2 port {port} -> {connect}"),
        _ => format!("{name}: {listen} -> {connect}"),
    }
}
