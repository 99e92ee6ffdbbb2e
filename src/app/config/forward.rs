//! Reads `[forward.NAME]`.

use super::problems::Line;
use super::section::Section;
use crate::address::{Address, Port};
use crate::app::needs::ACCESS_KEYS;
use crate::app::ranges::{name_of, pair};
use crate::app::rule_options::RuleOptions;
use crate::app::values;
use crate::app::vm::VmPlace;
use crate::proxy::Rule;

/// An end of a forward.
#[derive(Clone, Debug)]
enum ForwardEnd {
    At(Address),
    /// A port of the forward's VM, or a port of the host that the VM's guest dials.
    Vm(Port),
}

impl ForwardEnd {
    /// Returns the name of the range's forward that listens here.
    fn name_of(&self, range: &str) -> String {
        match self {
            ForwardEnd::At(address) => name_of(range, address),
            ForwardEnd::Vm(port) => format!("{range}-{}", port.0),
        }
    }
}

/// A forward of the file.
#[derive(Clone, Debug)]
pub(super) struct ForwardSection {
    pub(super) name: String,
    /// The name of its section, if that is a range.
    pub(super) range: Option<String>,
    /// The keys of the section that apply to the listener's socket file, and their lines.
    pub(super) access: Vec<(&'static str, Line)>,
    /// The lines with the two addresses.
    pub(super) listen_line: Line,
    pub(super) connect_line: Line,
    listen: ForwardEnd,
    connect: ForwardEnd,
    /// Its VM's name in the file, and the line with it.
    vm: Option<(String, Line)>,
    pub(super) options: RuleOptions,
}

/// The parts of a section that could be read.
#[derive(Clone, Debug)]
pub(super) struct Read {
    pub(super) name: String,
    pub(super) listen_line: Line,
    /// The listen addresses that could be read.
    pub(super) listen: Vec<Address>,
    /// Its VM's name in the file, and the line with it.
    pub(super) vm: Option<(String, Line)>,
    /// The forward, or those of a range of ports. Empty if the section has mistakes, which are
    /// reported then.
    pub(super) forwards: Vec<ForwardSection>,
}

impl ForwardSection {
    /// Reads a section: a forward, or a forward for each port of a range, named by the section and
    /// its port.
    pub(super) fn read(name: String, mut section: Section<'_, '_>, defaults: &RuleOptions) -> Read {
        let line = section.line.clone();
        let vm = section.take("vm", values::text);
        let vm = vm.map(|vm| (vm, section.line_of("vm")));
        let port = section.take("port", values::ports);
        let guest_dials = section.take("guest-dials", values::ports);
        let listen = section.take("listen", values::listen_addresses);
        let connect = section.take("connect", values::addresses);
        let options = section.take_options(defaults);
        let access = ACCESS_KEYS.into_iter().filter(|key| section.has_read(key));
        let access: Vec<_> = access.map(|key| (key, section.line_of(key))).collect();
        let ends = check_ends(&section);
        let (listens_at, its_vm) = (listen.clone(), vm.clone());
        let at = |all: Vec<Address>| {
            all.into_iter()
                .map(ForwardEnd::At)
                .collect::<Vec<ForwardEnd>>()
        };
        let of_vm = |all: Vec<Port>| all.into_iter().map(ForwardEnd::Vm).collect();
        let listen = listen.map(at).or(guest_dials.map(of_vm));
        let connect = connect.map(at).or(port.map(of_vm));
        let line_of = |keys: [&str; 2]| {
            let key = keys.into_iter().find(|key| section.has(key));
            key.map_or_else(|| line.clone(), |key| section.line_of(key))
        };
        let (listen_line, connect_line) = (
            line_of(["listen", "guest-dials"]),
            line_of(["connect", "port"]),
        );
        let mut read = Read {
            name,
            listen_line,
            listen: listens_at.unwrap_or_default(),
            vm: its_vm,
            forwards: Vec::new(),
        };
        let (true, Some(listen), Some(connect)) = (ends, listen, connect) else {
            section.finish();
            return read;
        };
        let pairs = match pair(listen, connect) {
            Ok(pairs) => pairs,
            Err(why) => {
                section.complain(None, why);
                Vec::new()
            }
        };
        section.finish();
        let is_range = pairs.len() > 1;
        let forwards = pairs.into_iter().map(|(listen, connect)| ForwardSection {
            name: match is_range {
                true => listen.name_of(&read.name),
                false => read.name.clone(),
            },
            range: is_range.then(|| read.name.clone()),
            access: access.clone(),
            listen_line: read.listen_line.clone(),
            connect_line: connect_line.clone(),
            listen,
            connect,
            vm: vm.clone(),
            options: options.clone(),
        });
        read.forwards = forwards.collect();
        read
    }

    /// Returns the name of its section.
    pub(super) fn section(&self) -> &str {
        self.range.as_deref().unwrap_or(&self.name)
    }

    /// Returns its VM's name in the file, and the line with it.
    pub(super) fn vm(&self) -> Option<(&str, &Line)> {
        self.vm.as_ref().map(|(vm, line)| (vm.as_str(), line))
    }

    /// Returns whether it holds its clients while its VM isn't there.
    pub(super) fn waits_for_vm(&self) -> bool {
        matches!(self.connect, ForwardEnd::Vm(_)) && self.options.wait.is_some()
    }

    /// Returns the rule, with its VM's place.
    pub(super) fn rule(&self, vm: Option<&VmPlace>) -> Option<Rule> {
        let listen = match &self.listen {
            ForwardEnd::At(address) => address.clone(),
            ForwardEnd::Vm(port) => vm?.host_port(*port),
        };
        let connect = match &self.connect {
            ForwardEnd::At(address) => address.clone(),
            ForwardEnd::Vm(port) => vm?.guest_port(*port),
        };
        let mut rule = Rule::new(listen, connect).absolute();
        if let ForwardEnd::Vm(_) = &self.listen {
            rule.from = vm?.sources();
        }
        let mut rule = self.options.applied_to(rule);
        rule.name = Some(self.name.clone());
        Some(rule)
    }
}

/// Returns whether the section has an end to listen on and an end to connect to. Reports it if not.
fn check_ends(section: &Section<'_, '_>) -> bool {
    let has = |key| section.has(key);
    let meant = |key| has(key) || section.is_meant(key);
    let mut sound = true;
    let mut complain = |key: Option<&str>, what: &str| {
        section.complain(key, what);
        sound = false;
    };
    if has("port") && has("guest-dials") {
        let what = "port is there, too: does it lead to the guest (listen, port), or from it (guest-dials, connect)?";
        complain(Some("guest-dials"), what);
        return false;
    }
    for (key, other) in [("port", "connect"), ("guest-dials", "listen")] {
        if has(key) && has(other) {
            let what = format!("{other} is there, too; {key} stands in its place");
            complain(Some(key), &what);
        } else if has(key) && !has("vm") {
            complain(Some(key), "of which VM? Write vm = \"NAME\", too");
        }
    }
    if has("vm") && !meant("port") && !meant("guest-dials") {
        let what =
            "which port? Write port = N to lead to the guest, or guest-dials = N to lead from it";
        complain(Some("vm"), what);
        return false;
    }
    if !meant("listen") && !meant("guest-dials") {
        let what = "listen is missing; write listen = 8080, or \"/run/web.sock\", or a URI";
        complain(None, what);
    }
    if !meant("connect") && !meant("port") {
        let what = "connect is missing; write connect = \"127.0.0.1:8080\", or vm and port";
        complain(None, what);
    }
    sound
}
