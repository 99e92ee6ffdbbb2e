//! `[forward.NAME]`.

use super::section::Section;
use super::vms::Place;
use crate::address::{Address, Port};
use crate::app::rule::RuleOptions;
use crate::app::values;
use crate::proxy::Rule;

/// One end of a forward.
#[derive(Clone, Debug)]
enum End {
    At(Address),
    /// A port of the forward's VM, or of the host as that VM's guest dials it.
    Vm(Port),
}

/// `[forward.NAME]`.
#[derive(Clone, Debug)]
pub(super) struct Forward {
    pub(super) name: String,
    /// Where it says where to listen, and where to connect to.
    pub(super) listen_line: usize,
    pub(super) connect_line: usize,
    listen: End,
    connect: End,
    /// As the file calls it, and the line in which it does.
    vm: Option<(String, usize)>,
    pub(super) options: RuleOptions,
}

/// A section as far as it could be read.
#[derive(Clone, Debug)]
pub(super) struct Read {
    pub(super) name: String,
    pub(super) listen_line: usize,
    /// Where it listens, if that is an address that could be read.
    pub(super) listen: Option<Address>,
    /// As it calls its VM.
    pub(super) vm: Option<String>,
    /// `None` if it was not whole, which was said then.
    pub(super) forward: Option<Forward>,
}

impl Forward {
    /// Reads a section.
    pub(super) fn read(name: String, mut section: Section<'_, '_>, defaults: &RuleOptions) -> Read {
        let line = section.line;
        let vm = section.take("vm", values::text);
        let vm = vm.map(|vm| (vm, section.line_of("vm")));
        let port = section.take("port", values::port);
        let guest_dials = section.take("guest-dials", values::port);
        let listen = section.take("listen", values::listen_address);
        let connect = section.take("connect", values::address);
        let options = section.take_options(defaults);
        let ends = ends(&section);
        let (listens_at, its_vm) = (listen.clone(), vm.as_ref().map(|(vm, _)| vm.clone()));
        let listen = listen.map(End::At).or(guest_dials.map(End::Vm));
        let connect = connect.map(End::At).or(port.map(End::Vm));
        let line_of = |keys: [&str; 2]| {
            let key = keys.into_iter().find(|key| section.has(key));
            key.map_or(line, |key| section.line_of(key))
        };
        let (listen_line, connect_line) = (
            line_of(["listen", "guest-dials"]),
            line_of(["connect", "port"]),
        );
        section.finish();
        let forward = match (ends, listen, connect) {
            (true, Some(listen), Some(connect)) => Some(Forward {
                name: name.clone(),
                listen_line,
                connect_line,
                listen,
                connect,
                vm,
                options,
            }),
            _ => None,
        };
        Read {
            name,
            listen_line,
            listen: listens_at,
            vm: its_vm,
            forward,
        }
    }

    /// Its VM as the file calls it, and the line in which it does.
    pub(super) fn vm(&self) -> Option<(&str, usize)> {
        self.vm.as_ref().map(|(vm, line)| (vm.as_str(), *line))
    }

    /// Whether it holds its clients while its VM isn't there.
    pub(super) fn waits_for_vm(&self) -> bool {
        matches!(self.connect, End::Vm(_)) && self.options.wait.is_some()
    }

    /// The rule, with the VM where it was found.
    pub(super) fn rule(&self, vm: Option<&Place>) -> Option<Rule> {
        let address = |end: &End| match end {
            End::At(address) => Some(address.clone()),
            End::Vm(port) => vm.map(|vm| vm.address(*port)),
        };
        let rule = Rule::new(address(&self.listen)?, address(&self.connect)?);
        let mut rule = self.options.applied_to(rule);
        rule.name = Some(self.name.clone());
        Some(rule)
    }
}

/// Whether the section has one end to listen on and one to connect to; if not, it is said.
fn ends(section: &Section<'_, '_>) -> bool {
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
