//! A proxy that does what a file says, and goes on doing so when the file changes.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tracing::{error, info, warn};

use crate::address::Address;
use crate::app::config::{Config, Missing, Problems, STANDARD_INPUT, Wanted, display_name};
#[cfg(unix)]
use crate::app::rule::RuleOptions;
use crate::hyperkit::Places;
use crate::proxy::{ForwardStatus, Handle, Proxy, ProxyConfig, Rule, VmLimits, all_are_wanted};
use crate::sys;

use super::reconciler::{Occasion, Reconciler, name_of};
use super::summary::{Summary, failures};
use super::{Failure, say};

/// A running proxy and its file.
#[derive(Debug)]
pub(super) struct Running {
    reconciler: Reconciler,
    file: PathBuf,
    /// What the file said last. Never locked for long.
    config: Mutex<Arc<Config>>,
    /// Locked while the file is read and what it says is done: that may take for ever, as a disk does. So
    /// it is for those alone who do that.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// VMs that have limits of their own.
    limits: Vec<VmLimits>,
    /// VMs whose directory is missing.
    missing: Vec<Missing>,
}

/// Why a proxy could not be started.
#[derive(Debug)]
pub(super) enum NotStarted {
    File(Problems),
    Failed(Failure),
}

impl<E: Into<Failure>> From<E> for NotStarted {
    fn from(error: E) -> NotStarted {
        NotStarted::Failed(error.into())
    }
}

/// The sockets by which it can be looked at and changed.
#[cfg(unix)]
pub(super) type Doors = crate::app::control::Bound;
#[cfg(not(unix))]
#[derive(Debug)]
pub(super) struct Doors;

#[cfg(unix)]
fn open_doors(config: &Config, proxy: &mut ProxyConfig) -> crate::Result<Doors> {
    let bound = crate::app::control::bind(&crate::app::control::Options {
        control: config.control.clone(),
        metrics: config.metrics.clone(),
        unavailable: crate::app::control::Unavailable::IsTriedAgain,
    })
    .map_err(|e| match e.kind() {
        std::io::ErrorKind::AddrInUse => {
            e.with_remedy("does another hvsock run? Give this one a path of its own, control = \"PATH\", or none, control = \"off\"")
        }
        _ => e,
    })?;
    proxy.forbidden = bound.addresses();
    proxy.other_descriptors = bound.descriptors();
    Ok(bound)
}

#[cfg(not(unix))]
fn open_doors(config: &Config, _: &mut ProxyConfig) -> crate::Result<Doors> {
    if config.control.is_some() || config.metrics.is_some() {
        super::complain("control and metrics are for Unix systems: they are not served here");
    }
    Ok(Doors)
}

impl Running {
    /// Starts what a file asks for; what could not be had is to be tried again.
    ///
    /// # Errors
    /// All that is wrong with the file; that another hvsock is controlled where this one is to be; that
    /// there can be no proxy at all.
    pub(super) fn start(file: &Path) -> Result<(Proxy, Running, Doors), NotStarted> {
        let (config, wanted) = Config::read(file, &Places::from_env()).map_err(NotStarted::File)?;
        // It starts with no forward, and gets them as when the file is read again: one that can't be had keeps
        // no other.
        let mut proxy = ProxyConfig::new(Vec::new());
        proxy.workers = config.workers;
        proxy.splice = config.splice;
        // Without it there are fewer; the proxy knows.
        let _ = sys::raise_descriptor_limit();
        proxy.limits.connections = usize::MAX;
        let doors = open_doors(&config, &mut proxy)
            .map_err(|e| Failure::Failed(format!("{}: {e}", display_name(file))))?;
        let proxy = super::on_passed_sockets(proxy)?;
        all_are_wanted(&proxy.listeners, &wanted.rules)?;
        let proxy = Proxy::start(proxy)?;
        let running = Running {
            reconciler: Reconciler::new(proxy.handle()),
            file: file.to_owned(),
            config: Mutex::new(Arc::new(config)),
            state: Mutex::default(),
        };
        running.apply(&mut running.state(), wanted, Occasion::Asked);
        Ok((proxy, running, doors))
    }

    /// What the file said last.
    fn config(&self) -> Arc<Config> {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&config)
    }

    /// Returns the options that the file has for all forwards.
    #[cfg(unix)]
    pub(super) fn defaults(&self) -> RuleOptions {
        self.config().defaults.clone()
    }

    /// Returns whether the file lets forwards to programs be added by the control socket.
    #[cfg(unix)]
    pub(super) fn allows_exec(&self) -> bool {
        self.config().allow_exec
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The forwards that the file asks for and that can't be had now.
    #[cfg(unix)]
    pub(super) fn pending(&self) -> Vec<crate::app::control::Forward> {
        self.reconciler.shown()
    }

    pub(super) fn handle(&self) -> &Handle {
        self.reconciler.handle()
    }

    /// How long live connections may go on when the end is asked for.
    pub(super) fn grace(&self) -> Duration {
        self.config().grace
    }

    /// What could not be had so far, line by line.
    pub(super) fn troubles(&self) -> Vec<String> {
        let mut told: Vec<String> = self.state().missing.iter().map(absence).collect();
        told.extend(failures(&self.reconciler.failed()));
        told
    }

    /// The forwards of these names, as they are carried now, line by line; all if none is named.
    pub(super) fn describe(&self, names: &[String]) -> Vec<String> {
        let config = self.config();
        let forwards = self.handle().forwards().into_iter();
        let meant = |it: &ForwardStatus| names.is_empty() || names.contains(&name_of(&it.rule));
        let line = |it: ForwardStatus| {
            let name = name_of(&it.rule);
            describe(&name, &it.listen, &it.rule.connect, config.vm_of(&name))
        };
        forwards.filter(meant).map(line).collect()
    }

    /// Reads the file again, and says what has come of it. What it doesn't change is not touched, and nobody is cut off.
    ///
    /// # Errors
    /// All that is wrong with the file; then all stays as it was.
    pub(super) fn reload(&self) -> Result<Summary, Problems> {
        let file = display_name(&self.file);
        let outcome = self.read_again();
        match &outcome {
            Ok(summary) => {
                info!("{file} was read again: {summary}");
                self.tell_of(summary);
            }
            Err(problems) => {
                let summary = problems.summary();
                error!("{summary}; all stays as it was");
                problems.lines().for_each(|line| error!("{line}"));
            }
        }
        outcome
    }

    fn tell_of(&self, summary: &Summary) {
        let names: Vec<String> = [&summary.added[..], &summary.changed[..]].concat();
        if !names.is_empty() {
            self.describe(&names).iter().for_each(say);
        }
        summary.troubles().iter().for_each(|line| warn!("{line}"));
    }

    fn read_again(&self) -> Result<Summary, Problems> {
        let mut state = self.state();
        if self.handle().is_stopping() {
            return Err(Problems::of(
                &self.file,
                "not read again: the proxy is stopping",
            ));
        }
        if self.file == Path::new(STANDARD_INPUT) {
            let why = "it came from there, and can't be read again";
            return Err(Problems::of(&self.file, why));
        }
        let (config, wanted) = Config::read(&self.file, &Places::from_env())?;
        let new = Arc::new(config);
        let old = {
            let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *config, Arc::clone(&new))
        };
        let mut summary = self.apply(&mut state, wanted, Occasion::Asked);
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
        let idle = !self.reconciler.has_pending() && state.missing.is_empty();
        if idle || self.handle().is_stopping() {
            return None;
        }
        // What is wrong now was right when the file was read; it may be so again.
        let wanted = self
            .config()
            .look_again(&self.file, &Places::from_env())
            .ok()?;
        let summary = self.apply(&mut state, wanted, Occasion::Retry);
        (!summary.is_quiet()).then_some(summary)
    }

    /// Makes the proxy carry what is wanted.
    fn apply(&self, state: &mut State, wanted: Wanted, occasion: Occasion) -> Summary {
        for old in &state.limits {
            if !wanted.limits.iter().any(|new| new.vm == old.vm) {
                self.handle().limit_vm(&VmLimits::new(old.vm.clone()));
            }
        }
        for limits in &wanted.limits {
            self.handle().limit_vm(limits);
        }
        let waits_for = |rule: &Rule| waits_for(rule, &wanted.missing);
        let mut summary = match occasion {
            Occasion::Asked => self.reconciler.apply(&wanted.rules, &waits_for, occasion),
            Occasion::Retry => self.reconciler.try_again(&wanted.rules, &waits_for),
        };
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

/// What is said of a VM that is not there yet.
pub(super) fn absence(missing: &Missing) -> String {
    let Missing { name, why, .. } = missing;
    format!("VM {name:?} is not there yet: {why}; until then its clients are refused")
}

/// Why a rule can't listen yet, if it is on a VM whose directory is missing.
fn waits_for(rule: &Rule, missing: &[Missing]) -> Option<String> {
    let vm = rule.listen.hyperkit_vm()?;
    let missing = missing.iter().find(|missing| missing.vm == *vm)?;
    let directory = missing.vm.state_dir.display();
    Some(format!("waits for the VM's state directory, {directory}"))
}

/// A forward, on one line.
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
