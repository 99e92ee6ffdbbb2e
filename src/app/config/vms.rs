//! Reads `[vm.NAME]`, and finds the VMs.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::path::PathBuf;

use super::problems::{Line, quote_key};
use super::section::Section;
use crate::address::{AnyVm, HyperkitVm};
use crate::app::values;
use crate::app::vm::VmPlace;
use crate::hyperkit::Places;
use crate::nearest::nearest;
use crate::proxy::{Limits, VmLimits};

/// A VM of the file.
#[derive(Clone, Debug)]
pub(super) struct VmSection {
    pub(super) name: String,
    pub(super) line: Line,
    /// The section that names the VM, and the key if there is one: `[forward.web] vm`.
    place: String,
    /// A state directory, a name or a URI; `None` if the file's value is invalid.
    at: Option<String>,
    /// Whether it has a section.
    pub(super) declared: bool,
    /// The line of its section, or of the key that names it.
    pub(super) section_line: Line,
    connections: Option<usize>,
    unanswered: Option<usize>,
    unanswered_line: Line,
    /// For a VM without a section: the other sections that name it, and their lines.
    also_named: Vec<(String, Line)>,
}

/// A hyperkit VM whose state directory is missing or can't be understood.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Missing {
    /// Its name in the file.
    pub(crate) name: String,
    pub(crate) vm: HyperkitVm,
    /// What is wrong with it.
    pub(crate) why: String,
}

/// The VMs that were found, and where they are.
#[derive(Debug)]
pub(super) struct FoundVms<'a> {
    pub(super) vms: Vec<(&'a VmSection, VmPlace)>,
    pub(super) missing: Vec<Missing>,
    /// The names of VMs with a section that were suggested for unknown names.
    pub(super) offered: Vec<&'a str>,
}

impl VmSection {
    pub(super) fn read(name: String, mut section: Section<'_, '_>) -> VmSection {
        let read =
            |value: &_| values::text(value).and_then(|at| Ok(values::at_home(&at)?.into_owned()));
        let given = section.take("at", read);
        let at = match section.has("at") {
            true => given,
            false => Some(name.clone()),
        };
        // The command line has the same bounds. hyperkit has 1,024 slots, and aborts at 512
        // unanswered dials.
        let connections = section.take("connections", values::count(1..=1000));
        let unanswered = section.take("unanswered", values::count(1..=400));
        let (line, section_line) = (section.line_of("at"), section.line.clone());
        let key = if section.has("at") { " at" } else { "" };
        let unanswered_line = section.line_of("unanswered");
        section.finish();
        VmSection {
            place: format!("[vm.{}]{key}", quote_key(&name)),
            name,
            line,
            at,
            declared: true,
            section_line,
            connections,
            unanswered,
            unanswered_line,
            also_named: Vec::new(),
        }
    }

    /// Makes a VM without a section, which a forward names as `--vm` does.
    pub(super) fn undeclared(name: &str, forward: &str, line: Line) -> VmSection {
        VmSection {
            place: place_of_forward(forward),
            name: name.to_owned(),
            line: line.clone(),
            at: Some(name.to_owned()),
            declared: false,
            unanswered_line: line.clone(),
            section_line: line,
            connections: None,
            unanswered: None,
            also_named: Vec::new(),
        }
    }

    /// Notes another section that names a VM without a section of its own, once.
    pub(super) fn name_again(&mut self, forward: &str, line: Line) {
        let place = place_of_forward(forward);
        let is_noted = self.also_named.iter().any(|(noted, _)| *noted == place);
        if !self.declared && self.place != place && !is_noted {
            self.also_named.push((place, line));
        }
    }

    /// Returns the places that name it, and their lines.
    fn places(&self) -> impl Iterator<Item = (&str, &Line)> {
        let also = self.also_named.iter();
        let also = also.map(|(place, line)| (place.as_str(), line));
        std::iter::once((self.place.as_str(), &self.line)).chain(also)
    }

    /// Returns how many connections the VM may have; `None`: no limit.
    pub(super) fn connections(&self, place: &VmPlace) -> Option<usize> {
        let paced = place.any()?.traits().needs_pacing;
        let default = Some(Limits::default().vm_connections).filter(|_| paced);
        self.connections.or(default)
    }

    /// Returns the VM's limits, if the file sets any.
    pub(super) fn limits(&self, place: &VmPlace) -> Option<VmLimits> {
        if self.connections.is_none() && self.unanswered.is_none() {
            return None;
        }
        let mut limits = VmLimits::new(place.any()?);
        limits.connections = self.connections;
        limits.unanswered = self.unanswered;
        Some(limits)
    }
}

/// Returns the key of a forward's section that names its VM.
fn place_of_forward(forward: &str) -> String {
    format!("[forward.{}] vm", quote_key(forward))
}

/// Finds the VMs.
pub(super) fn find<'a>(
    vms: &'a [VmSection],
    places: &Places,
    complain: &mut dyn FnMut(Line, String),
) -> FoundVms<'a> {
    let mut found: Vec<(&VmSection, VmPlace)> = Vec::new();
    let (mut missing, mut offered) = (Vec::new(), Vec::new());
    let mut known: HashMap<AnyVm, &VmSection> = HashMap::new();
    for vm in vms {
        let Some(at) = &vm.at else {
            continue;
        };
        let (place, unreadable) = match locate(at, places) {
            Ok(located) => located,
            Err(why) => {
                let declared = vms
                    .iter()
                    .filter(|vm| vm.declared)
                    .map(|vm| vm.name.as_str());
                let near = nearest(&vm.name, declared).filter(|_| !vm.declared);
                offered.extend(near);
                let hint = near.map(|it| format!("; did you mean {it:?}?"));
                let hint = hint.unwrap_or_default();
                for (place, line) in vm.places() {
                    complain(line.clone(), format!("{place}: {why}{hint}"));
                }
                continue;
            }
        };
        if vm.unanswered.is_some() && !place.any().is_some_and(|it| it.traits().needs_pacing) {
            let what = "unanswered bounds the dials to hyperkit VMs only, which die of too many";
            let line = vm.unanswered_line.clone();
            complain(
                line,
                format!("[vm.{}]: {what}; leave it out", quote_key(&vm.name)),
            );
        }
        match place.any().map(|it| known.entry(it)) {
            None => {}
            Some(Entry::Vacant(free)) => drop(free.insert(vm)),
            Some(Entry::Occupied(other)) => {
                let text = format!(
                    "{:?} is the same VM as {:?}; use one name for it",
                    vm.name,
                    other.get().name
                );
                complain(vm.line.clone(), text);
            }
        }
        if let VmPlace::Hyperkit(hyperkit) = &place {
            let directory = &hyperkit.state_dir;
            let is_missing = !directory.is_dir();
            let why = is_missing.then(|| format!("there is no {}", directory.display()));
            if let Some(why) = unreadable.or(why) {
                missing.push(Missing {
                    name: vm.name.clone(),
                    vm: hyperkit.clone(),
                    why,
                });
            }
        }
        found.push((vm, place));
    }
    FoundVms {
        vms: found,
        missing,
        offered,
    }
}

/// Finds a VM. Also returns why its state can't be understood, if so: the VM may be writing it.
fn locate(at: &str, places: &Places) -> Result<(VmPlace, Option<String>), String> {
    match VmPlace::find(at, places) {
        Ok(vm) => Ok((vm, None)),
        // A VM named by its directory may come later. An error of one VM must not affect the
        // others.
        Err(e) if at.contains('/') && VmPlace::parse(at).is_none() => {
            let place = || VmPlace::Hyperkit(HyperkitVm::new(absolute(at, places)));
            match e.kind() {
                io::ErrorKind::NotFound => Ok((place(), None)),
                io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput
                    if absolute(at, places).is_dir() =>
                {
                    Ok((place(), Some(e.to_string())))
                }
                _ => Err(e.to_string()),
            }
        }
        Err(e) => Err(e.to_string()),
    }
}

fn absolute(at: &str, places: &Places) -> PathBuf {
    let path = places.current_dir.join(at);
    std::path::absolute(&path).unwrap_or(path)
}
