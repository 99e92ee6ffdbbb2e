//! The file of `hvsock run`, typed: many VMs and forwards. What is wrong with it is told all at once. No sockets here.
//!
//! ```toml
//! grace = "30s"
//! [defaults]
//! drain-timeout = "2m"
//! [vm.docker]
//! at = "~/vms/docker"
//! [forward.api]
//! listen = "/tmp/docker.sock"
//! vm = "docker"
//! port = 2375
//! [forward.registry]
//! vm = "docker"
//! guest-dials = 5000
//! connect = "127.0.0.1:8080"
//! ```

mod conflicts;
mod diff;
mod forward;
mod problems;
mod section;
#[cfg(test)]
mod tests;
mod vms;

use std::io;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use toml::de::DeTable;

use crate::address::TcpAddress;
use crate::app::rule::RuleOptions;
use crate::app::values;
use crate::hyperkit::Places;
use crate::proxy::{Rule, VmLimits, check_rule};

pub(crate) use diff::{Existing, Step, plan};
use forward::{Forward, Read};
use problems::Weight;
pub(crate) use problems::{Problem, Problems};
use section::{Section, Source};
pub(crate) use vms::Missing;
use vms::{Found, Vm};

/// What the file says. That it can be carried out, as far as can be known without trying, was found by whoever read it.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// How long live connections may go on when the end is asked for.
    pub(crate) grace: Duration,
    pub(crate) workers: Option<NonZeroUsize>,
    /// Whether bytes may go through pipes.
    pub(crate) splice: bool,
    /// Where it is controlled from, if anywhere.
    pub(crate) control: Option<PathBuf>,
    /// Where it tells of itself.
    pub(crate) metrics: Option<TcpAddress>,
    /// For who adds forwards by the control socket.
    #[cfg(unix)]
    pub(crate) defaults: RuleOptions,
    vms: Vec<Vm>,
    forwards: Vec<Forward>,
    /// Forwards that could be read in part. Of a file without mistakes there are none.
    parts: Vec<Read>,
}

/// Reads the path of the control socket; `"off"` is none.
fn read_control(value: &Value) -> Result<Option<PathBuf>, String> {
    match values::text(value)?.as_str() {
        "" => Err("it is empty; write a path, or \"off\"".to_owned()),
        "off" => Ok(None),
        text => Ok(Some(values::at_home(text)?.into_owned().into())),
    }
}

/// Returns where the control socket is if the file doesn't say.
fn usual_control() -> Option<PathBuf> {
    #[cfg(unix)]
    return Some(crate::app::control::default_path());
    #[cfg(not(unix))]
    None
}

/// What is to be carried, now that it is known where the VMs are.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    /// In the order of the file; each has a name.
    pub(crate) rules: Vec<Rule>,
    pub(crate) limits: Vec<VmLimits>,
    /// VMs that may come later.
    pub(crate) missing: Vec<Missing>,
    /// What may not be what was meant.
    pub(crate) notes: Vec<Problem>,
}

/// Reads a file, and waits for none that may never end, or never begin: who reads may have signals to heed.
fn read_text(file: &Path) -> io::Result<String> {
    /// Some 100,000 forwards.
    const MOST: u64 = 16 << 20;
    crate::file::read_text(file, MOST)
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub(crate) fn read(file: &Path, places: &Places) -> Result<(Config, Wanted), Problems> {
        let text = read_text(file).map_err(|e| {
            let remedy = match e.kind() {
                io::ErrorKind::NotFound => "; is the path right?",
                io::ErrorKind::PermissionDenied => "; let the user who runs this read it",
                io::ErrorKind::InvalidData => "; save it as UTF-8",
                io::ErrorKind::IsADirectory => "; name a file in it",
                _ => "",
            };
            let text = format!("cannot be read: {e}{remedy}");
            Problems::of(file, text)
        })?;
        Config::parse(&text, places).map_err(|list| Problems::new(file, list))
    }

    fn parse(text: &str, places: &Places) -> Result<(Config, Wanted), Vec<Problem>> {
        let source = Source::new(text);
        if text.trim().is_empty() {
            // One that is being written, most often; to carry nothing is nobody's wish.
            source.complain(1, "it is empty; write a [forward.NAME]".to_owned());
            return Err(source.problems());
        }
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in &errors {
            let line = source.line(error.span().unwrap_or(0..0));
            source.complain(line, format!("this is no TOML: {}", error.message()));
        }
        if !errors.is_empty() {
            // What the rest means can't be known.
            return Err(source.problems());
        }
        let config = Config::of(Section::root(&source, table.get_ref()));
        let mut wanted = config.wanted(places, &mut |line, text| source.complain(line, text));
        for vm in config.unused_vms() {
            let text = format!(
                "[vm.{}] is used by no forward; is one's vm another name?",
                vm.name
            );
            source.note(vm.section_line, text);
        }
        let sound = source.is_sound();
        let problems = source.problems();
        match sound {
            true => {
                wanted.notes = problems;
                Ok((config, wanted))
            }
            false => Err(problems),
        }
    }

    fn of(mut root: Section<'_, '_>) -> Config {
        let grace = root.take("grace", values::time);
        let workers = root.take("workers", values::count(1..=256));
        let splice = root.take("splice", values::yes_or_no);
        let control = root.take("control", read_control);
        let metrics = root.take("metrics", values::tcp);
        let mut defaults = RuleOptions::default();
        if let Some(mut section) = root.table("defaults") {
            defaults = section.take_options(&defaults);
            section.finish();
        }
        let mut vms = Vec::new();
        for (name, section) in root.named("vm") {
            vms.push(Vm::read(name, section));
        }
        let (mut forwards, mut parts) = (Vec::new(), Vec::new());
        for (name, section) in root.named("forward") {
            let mut read = Forward::read(name, section, &defaults);
            match read.forward.take() {
                Some(forward) => forwards.push(forward),
                None => parts.push(read),
            }
        }
        root.finish();
        for forward in &forwards {
            if let Some((vm, line)) = forward.vm()
                && !vms.iter().any(|known| known.name == vm)
            {
                vms.push(Vm::undeclared(vm, line));
            }
        }
        Config {
            grace: grace.unwrap_or(Duration::from_secs(30)),
            workers: workers.and_then(NonZeroUsize::new),
            splice: splice.unwrap_or(true),
            control: control.unwrap_or_else(usual_control),
            metrics,
            #[cfg(unix)]
            defaults,
            vms,
            forwards,
            parts,
        }
    }

    /// The VMs that have a section, and that no forward names.
    fn unused_vms(&self) -> impl Iterator<Item = &Vm> {
        let of_parts = self.parts.iter().filter_map(|it| it.vm.as_deref());
        let of_forwards = self.forwards.iter().filter_map(|it| Some(it.vm()?.0));
        let used: Vec<&str> = of_parts.chain(of_forwards).collect();
        let unused = move |vm: &&Vm| vm.declared && !used.contains(&vm.name.as_str());
        self.vms.iter().filter(unused)
    }

    /// What the file asks for, with its VMs as they can be found now.
    ///
    /// # Errors
    /// As those of [`read`](Config::read), without lines.
    pub(crate) fn look_again(&self, file: &Path, places: &Places) -> Result<Wanted, Problems> {
        let mut problems = Vec::new();
        let wanted = self.wanted(places, &mut |line, text| {
            problems.push(Problem {
                line: Some(line),
                text,
                weight: Weight::Mistake,
            });
        });
        match problems.is_empty() {
            true => Ok(wanted),
            false => Err(Problems::new(file, problems)),
        }
    }

    /// The VM that a forward leads to or from, as the file calls it.
    pub(crate) fn vm_of(&self, name: &str) -> Option<&str> {
        let forward = self.forwards.iter().find(|forward| forward.name == name)?;
        forward.vm().map(|(vm, _)| vm)
    }

    /// Looks for the VMs, and for what can't work.
    fn wanted(&self, places: &Places, complain: &mut dyn FnMut(usize, String)) -> Wanted {
        let Found { vms, missing } = vms::find(&self.vms, places, complain);
        let mut wanted = Wanted {
            limits: vms
                .iter()
                .filter_map(|(vm, place)| vm.limits(place))
                .collect(),
            missing,
            ..Wanted::default()
        };
        let mut seen: Vec<(&Forward, Rule)> = Vec::new();
        for forward in &self.forwards {
            let place = forward.vm().map(|(name, _)| {
                let found = vms.iter().find(|(vm, _)| vm.name == name);
                found.map(|(_, place)| place)
            });
            // Of a VM that couldn't be found enough was said.
            let place = match place {
                Some(None) => continue,
                Some(Some(place)) => Some(place),
                None => None,
            };
            let Some(rule) = forward.rule(place) else {
                continue;
            };
            if let Err(e) = check_rule(&rule) {
                complain(
                    forward.connect_line,
                    format!("[forward.{}]: {e}", forward.name),
                );
            }
            seen.push((forward, rule));
        }
        conflicts::find(
            &seen,
            &self.parts,
            self.control.as_deref(),
            self.metrics.as_ref(),
            complain,
        );
        for (vm, _) in &vms {
            let of = |forward: &&Forward| forward.vm().is_some_and(|(name, _)| name == vm.name);
            let mut its = self.forwards.iter().filter(of);
            let places = its.clone().map(|it| it.options.reserved).sum::<usize>();
            let (reserved, cap) = (places, vm.connections());
            // To know that a guest has taken a client that waits takes a place, too.
            let proof = usize::from(cap > 1 && places > 0 && its.any(Forward::waits_for_vm));
            if reserved + proof > cap {
                let (name, left) = (&vm.name, cap - proof);
                let text = format!(
                    "{name:?}: its forwards reserve {reserved} connections together, and it has {left} for them; reserve fewer, or raise connections in [vm.{name}]"
                );
                complain(vm.line, text);
            }
        }
        wanted.rules = seen.into_iter().map(|(_, rule)| rule).collect();
        wanted
    }
}
