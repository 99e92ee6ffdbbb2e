//! Reads the file of `hvsock run`, with its VMs and forwards. All mistakes are reported at once. No
//! sockets here.
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
mod include;
mod needs;
mod parsing;
mod problems;
mod section;
mod template;
#[cfg(test)]
mod tests;
mod vms;

use std::collections::{HashMap, HashSet};
use std::io::{self, Read as _};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tracing::Level;

use crate::address::Address;
use crate::app::guest_control::{self, GuestControl};
use crate::app::needs::look_at_given_access;
use crate::app::rule_options::RuleOptions;
use crate::app::slow::tell_if_slow;
use crate::app::vm::VmPlace;
use crate::app::{log, values};
use crate::error::counted;
use crate::hyperkit::Places;
use crate::proxy::{Rule, VmLimits, check_rule};

pub(crate) use diff::{Existing, Step, plan};
use forward::{ForwardSection, Read};
use parsing::parse_table;
use problems::{Line, Weight};
pub(crate) use problems::{Problem, Problems, STANDARD_INPUT, display_name, quote_key};
use section::{ConfigText, Section};
pub(crate) use vms::Missing;
use vms::{FoundVms, VmSection};

/// What a file says. It was checked as far as is possible without carrying it out.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// How long live connections may go on once the end has begun.
    pub(crate) grace: Duration,
    /// After how long without a connection the process ends.
    pub(crate) exit_idle: Option<Duration>,
    pub(crate) workers: Option<NonZeroUsize>,
    /// Whether bytes may go through pipes.
    pub(crate) splice: bool,
    /// Whether each ended connection is logged at level info.
    pub(crate) access_log: bool,
    /// The path of the control socket, if any.
    pub(crate) control: Option<PathBuf>,
    /// The address at which guests may control the process, and which guests may.
    pub(crate) guest_control: Option<GuestControl>,
    /// The address of the metrics.
    pub(crate) metrics: Option<Address>,
    /// The default options of forwards, in the file and on the control socket.
    #[cfg_attr(not(unix), allow(dead_code))]
    pub(crate) defaults: RuleOptions,
    /// Whether forwards to programs may be added on the control socket.
    #[cfg_attr(not(unix), allow(dead_code))]
    pub(crate) allow_exec: bool,
    vms: Vec<VmSection>,
    forwards: Vec<ForwardSection>,
    /// Forwards that could be read in part. Empty if the file has no mistakes.
    parts: Vec<Read>,
}

/// Reads the path of the control socket; `"off"` means none.
fn read_control(value: &Value) -> Result<Option<PathBuf>, String> {
    match values::text(value)?.as_str() {
        "" => Err("it is empty; write a path, or \"off\"".to_owned()),
        "off" => Ok(None),
        text if text.starts_with("vsock:") => Err(format!(
            "it is a path, or \"off\"; guests may change forwards only where guest-control = {text:?} says so"
        )),
        text => Ok(Some(values::at_home(text)?.into_owned().into())),
    }
}

/// Takes the keys of control by guests.
fn take_guest_control(root: &mut Section<'_, '_>) -> Option<GuestControl> {
    const FROM: &str = "guest-control-from";
    let address = root.take("guest-control", guest_control::read_address);
    let from = root.take(FROM, guest_control::read_sources);
    if root.has(FROM) && !root.has("guest-control") {
        let what = "it says which guests may control it, and guest-control, which says where, is missing; write guest-control = \"vsock://:9101\"";
        root.complain(Some(FROM), what);
    }
    Some(GuestControl {
        address: address?,
        from: from.unwrap_or_default(),
    })
}

/// Returns the path of the control socket if the file doesn't set it.
fn usual_control() -> Option<PathBuf> {
    #[cfg(unix)]
    return Some(crate::app::control::default_path());
    #[cfg(not(unix))]
    None
}

/// What is to be carried, with the VMs found.
#[derive(Clone, Debug, Default)]
pub(crate) struct WantedState {
    /// The rules in the order of the file; each has a name.
    pub(crate) rules: Vec<Rule>,
    pub(crate) limits: Vec<VmLimits>,
    /// VMs that may come later.
    pub(crate) missing: Vec<Missing>,
    /// The names of VMs with a section that were suggested for unknown names.
    offered: Vec<String>,
    /// Notes about what may be a mistake.
    pub(crate) notes: Vec<Problem>,
}

/// Reads a file. Refuses files whose reading may not end or may block, since the reader may have to
/// handle signals. Standard input is read to its end.
fn read_text(file: &Path) -> io::Result<String> {
    /// Enough for some 100,000 forwards.
    const MOST: u64 = 16 << 20;
    if file != Path::new(STANDARD_INPUT) {
        let reading = format!("reading {}", file.display());
        let tell = |what| log::say(Level::WARN, what);
        return tell_if_slow(&reading, tell, || crate::file::read_text(file, MOST));
    }
    let mut text = String::new();
    io::stdin()
        .lock()
        .take(MOST + 1)
        .read_to_string(&mut text)?;
    match text.len() as u64 > MOST {
        true => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("it has more than {MOST} bytes"),
        )),
        false => Ok(text),
    }
}

/// Describes why a file can't be read.
fn unreadable(error: &io::Error) -> String {
    let remedy = match error.kind() {
        io::ErrorKind::NotFound => "; is the path right?",
        io::ErrorKind::PermissionDenied => "; let the user who runs this read it",
        io::ErrorKind::InvalidData => "; save it as UTF-8",
        io::ErrorKind::IsADirectory => "; name a file in it",
        _ => "",
    };
    format!("cannot be read: {error}{remedy}")
}

/// An included file, and its text.
struct Included {
    source: ConfigText,
    text: String,
}

/// Reads the files that `include` names. Reports mistakes.
fn read_included(
    root: &mut Section<'_, '_>,
    source: &ConfigText,
    directory: &Path,
) -> Vec<Included> {
    let patterns = root.take("include", values::texts).unwrap_or_default();
    let line = root.line_of("include");
    let mut files: Vec<PathBuf> = Vec::new();
    for pattern in patterns {
        let found = values::at_home(&pattern).and_then(|it| include::find(&it, directory));
        match found {
            Ok(found) => files.extend(found),
            Err(why) => source.complain(line.clone(), format!("include: {why}")),
        }
    }
    files.dedup();
    let read = |file: PathBuf| match read_text(&file) {
        Ok(text) => Some(Included {
            source: ConfigText::new(&text, Some(&file)),
            text,
        }),
        Err(e) => {
            let text = format!("include: {} {}", file.display(), unreadable(&e));
            source.complain(line.clone(), text);
            None
        }
    };
    files.into_iter().filter_map(read).collect()
}

impl Config {
    /// Reads a file, and finds what it needs.
    ///
    /// # Errors
    /// Returns all mistakes, and the notes: [`Problems`] with at least one mistake.
    pub(crate) fn read(file: &Path, places: &Places) -> Result<(Config, WantedState), Problems> {
        let text = read_text(file).map_err(|e| Problems::of(file, unreadable(&e)))?;
        let directory = file.parent().unwrap_or(Path::new(""));
        Config::parse(&text, directory, places).map_err(|list| Problems::new(file, list))
    }

    /// Reads the text of a file, and the included files, relative to `directory`.
    fn parse(
        text: &str,
        directory: &Path,
        places: &Places,
    ) -> Result<(Config, WantedState), Vec<Problem>> {
        let source = ConfigText::new(text, None);
        if text.trim().is_empty() {
            // An empty file is mostly one that is being written; it is of no use anyway.
            source.complain(source.line(0..0), "it is empty; write a [forward.NAME]");
            return Err(source.take_problems());
        }
        let parsed = parse_table(&source, text);
        let mut root = Section::root(&source, parsed.table.get_ref());
        let exit_idle_line = root.line_of("exit-idle");
        let included = read_included(&mut root, &source, directory);
        let others = included.iter();
        let others: Vec<_> = others
            .map(|it| (&it.source, parse_table(&it.source, &it.text)))
            .collect();
        let others_parsed = others.iter();
        let roots =
            others_parsed.map(|(source, parsed)| Section::root(source, parsed.table.get_ref()));
        let config = Config::of(root, roots);
        if !parsed.is_toml() || others.iter().any(|(_, parsed)| !parsed.is_toml()) {
            let of_others = included.iter().zip(&others);
            let mut problems: Vec<Problem> = of_others
                .flat_map(|(it, (_, parsed))| parsed.sound(it.source.take_problems()))
                .collect();
            problems.extend(parsed.sound(source.take_problems()));
            return Err(problems);
        }
        let mut wanted = config.wanted(places, &mut |line, text| source.complain(line, text));
        // A VM that was suggested for a mistyped name counts as used.
        let offered = &wanted.offered;
        let unused = config.unused_vms();
        for vm in unused.filter(|vm| !offered.contains(&vm.name)) {
            let text = format!(
                "[vm.{}] is used by no forward; is one's vm another name?",
                quote_key(&vm.name)
            );
            source.note(vm.section_line.clone(), text);
        }
        let dialled = |rule: &&Rule| matches!(rule.listen, Address::Hyperkit(_));
        if let (Some(_), Some(rule)) = (config.exit_idle, wanted.rules.iter().find(dialled)) {
            let name = quote_key(rule.name.as_deref().unwrap_or_default());
            let text = format!(
                "exit-idle has no effect: a guest dials [forward.{name}], which nobody else would serve"
            );
            source.note(exit_idle_line, text);
        }
        let mut problems = source.take_problems();
        problems.extend(included.iter().flat_map(|it| it.source.take_problems()));
        problems.extend(config.needs(&wanted));
        match problems.iter().all(|it| it.weight == Weight::Note) {
            true => {
                wanted.notes = problems;
                Ok((config, wanted))
            }
            false => Err(problems),
        }
    }

    /// Reads the tables of a file and of the included ones.
    fn of<'a, 'i: 'a>(
        mut root: Section<'a, 'i>,
        included: impl Iterator<Item = Section<'a, 'i>>,
    ) -> Config {
        let grace = root.take("grace", values::time);
        let exit_idle = root.take("exit-idle", |value| values::time_or("never", value));
        let workers = root.take("workers", values::count(1..=256));
        let splice = root.take("splice", values::yes_or_no);
        let access_log = root.take("access-log", values::yes_or_no);
        let control = root.take("control", read_control);
        let guest_control = take_guest_control(&mut root);
        let metrics = root.take("metrics", values::metrics);
        let allow_exec = root.take("allow-exec", values::yes_or_no);
        let mut defaults = RuleOptions::default();
        if let Some(mut section) = root.table("defaults") {
            defaults = section.take_options(&defaults);
            section.finish();
        }
        let mut vms = Vec::new();
        for (name, section) in root.named("vm") {
            vms.push(VmSection::read(name, section));
        }
        let mut read = Vec::new();
        for (name, section) in root.named("forward") {
            read.push(ForwardSection::read(name, section, &defaults));
        }
        root.finish();
        for mut other in included {
            for (name, section) in other.named("vm") {
                vms.push(VmSection::read(name, section));
            }
            for (name, section) in other.named("forward") {
                read.push(ForwardSection::read(name, section, &defaults));
            }
            other.finish();
        }
        let (mut forwards, mut parts) = (Vec::new(), Vec::new());
        for mut read in read {
            match read.forwards.is_empty() {
                true => parts.push(read),
                false => forwards.append(&mut read.forwards),
            }
        }
        let known = vms.iter().enumerate();
        let mut known: HashMap<String, usize> =
            known.map(|(at, vm)| (vm.name.clone(), at)).collect();
        let named = forwards.iter();
        let named = named.filter_map(|it| Some((it.section(), it.vm()?)));
        let named_in_parts = parts.iter().filter_map(|it| {
            let (vm, line) = it.vm.as_ref()?;
            Some((it.name.as_str(), (vm.as_str(), line)))
        });
        for (section, (vm, line)) in named.chain(named_in_parts) {
            match known.get(vm) {
                Some(at) => vms[*at].name_again(section, line.clone()),
                None => {
                    known.insert(vm.to_owned(), vms.len());
                    vms.push(VmSection::undeclared(vm, section, line.clone()));
                }
            }
        }
        Config {
            grace: grace.unwrap_or(Duration::from_secs(30)),
            exit_idle: exit_idle.flatten(),
            workers: workers.and_then(NonZeroUsize::new),
            splice: splice.unwrap_or(true),
            access_log: access_log.unwrap_or(false),
            control: control.unwrap_or_else(usual_control),
            guest_control,
            metrics,
            defaults,
            allow_exec: allow_exec.unwrap_or(false),
            vms,
            forwards,
            parts,
        }
    }

    /// Returns the VMs with a section that no forward names.
    fn unused_vms(&self) -> impl Iterator<Item = &VmSection> {
        let of_parts = self.parts.iter();
        let of_parts = of_parts.filter_map(|it| Some(it.vm.as_ref()?.0.as_str()));
        let of_forwards = self.forwards.iter().filter_map(|it| Some(it.vm()?.0));
        let used: HashSet<&str> = of_parts.chain(of_forwards).collect();
        let unused = move |vm: &&VmSection| vm.declared && !used.contains(vm.name.as_str());
        self.vms.iter().filter(unused)
    }

    /// Returns what the file asks for, with the VMs found now.
    ///
    /// # Errors
    /// Returns the problems that [`read`](Config::read) would, without lines.
    pub(crate) fn look_again(&self, file: &Path, places: &Places) -> Result<WantedState, Problems> {
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

    /// Returns the names of the forwards' VMs in the file, by the names of the forwards.
    pub(crate) fn vms_of_forwards(&self) -> HashMap<&str, &str> {
        let forwards = self.forwards.iter();
        forwards
            .filter_map(|it| Some((it.name.as_str(), it.vm()?.0)))
            .collect()
    }

    /// Finds the VMs, and reports what can't work.
    fn wanted(&self, places: &Places, complain: &mut dyn FnMut(Line, String)) -> WantedState {
        conflicts::find_namesakes(&self.vms, &self.forwards, complain);
        let found = vms::find(&self.vms, places, complain);
        let FoundVms {
            vms,
            missing,
            offered,
        } = found;
        let mut wanted = WantedState {
            limits: vms
                .iter()
                .filter_map(|(vm, place)| vm.limits(place))
                .collect(),
            missing,
            offered: offered.into_iter().map(str::to_owned).collect(),
            ..WantedState::default()
        };
        // The first VM of a name counts.
        let mut places: HashMap<&str, &VmPlace> = HashMap::new();
        for (vm, place) in &vms {
            places.entry(&vm.name).or_insert(place);
        }
        let mut of_vm: HashMap<&str, Vec<&ForwardSection>> = HashMap::new();
        let mut seen: Vec<(&ForwardSection, Rule)> = Vec::new();
        let mut refused: HashSet<&str> = HashSet::new();
        for forward in &self.forwards {
            let place = forward.vm().map(|(name, _)| {
                of_vm.entry(name).or_default().push(forward);
                places.get(name).copied()
            });
            // A VM that couldn't be found was reported already.
            let place = match place {
                Some(None) => continue,
                Some(Some(place)) => Some(place),
                None => None,
            };
            let Some(rule) = forward.rule(place) else {
                continue;
            };
            for (key, line) in &forward.access {
                if let Some(finding) = look_at_given_access(&rule.listen, &[key]) {
                    let problem = Problem::of_forward(&forward.name, line, &finding);
                    complain(line.clone(), problem.text);
                }
            }
            if let Err(e) = check_rule(&rule) {
                refused.insert(&forward.name);
                complain(
                    forward.connect_line.clone(),
                    format!("[forward.{}]: {e}", quote_key(&forward.name)),
                );
            }
            seen.push((forward, rule));
        }
        conflicts::find(
            &seen,
            &self.parts,
            &conflicts::own_addresses(
                self.control.as_deref(),
                self.guest_control.as_ref().map(|it| &it.address),
                self.metrics.as_ref(),
            ),
            complain,
        );
        // A forward that leads to itself was reported already.
        let sound = seen.iter();
        let sound = sound.filter(|(forward, _)| !refused.contains(forward.name.as_str()));
        conflicts::find_loops(&Vec::from_iter(sound), complain);
        for (vm, place) in &vms {
            let its = of_vm.get(vm.name.as_str()).map_or(&[][..], Vec::as_slice);
            let reserved = its.iter().map(|it| it.options.reserved).sum::<usize>();
            let Some(cap) = vm.connections(place) else {
                continue;
            };
            let mut waiting = its.iter().filter(|it| it.waits_for_vm());
            // A probe that shows whether a waiting client was accepted takes a slot, too.
            let is_probed = place.any().is_some_and(|it| it.traits().can_be_probed);
            let has_proof = is_probed && cap > 1 && reserved > 0 && waiting.next().is_some();
            let proof = usize::from(has_proof);
            if reserved + proof > cap {
                let (name, left) = (&vm.name, cap - proof);
                let reserved = counted(reserved as u64, "connection");
                let text = format!(
                    "{name:?}: its forwards reserve {reserved} together, and it has {left} for them; reserve fewer, or raise connections in [vm.{}]",
                    quote_key(name)
                );
                complain(vm.line.clone(), text);
            }
        }
        wanted.rules = seen.into_iter().map(|(_, rule)| rule).collect();
        wanted
    }
}
