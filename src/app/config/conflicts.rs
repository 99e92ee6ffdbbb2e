//! Forwards that are in each other's way, or in the way of where the program itself listens.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;

use super::forward::Forward;
use super::problems::Line;
use super::vms::Vm;
use crate::address::overlap::ListenKey;
use crate::address::{Address, TcpAddress, UnixAddress};
use crate::proxy::{Rule, describe_loop, find_loop, leads_to};

/// Where the program itself listens, and the key that says so.
type Door = (&'static str, Address);

/// Says which VMs and forwards have a name that another has: in an included file, or as one port of
/// a range.
pub(super) fn find_namesakes(
    vms: &[Vm],
    forwards: &[Forward],
    complain: &mut dyn FnMut(Line, String),
) {
    let vms = vms.iter().map(|vm| ("vm", &vm.name, &vm.line));
    let forwards = forwards.iter();
    let forwards = forwards.map(|it| ("forward", &it.name, &it.listen_line));
    let mut seen: HashMap<(&str, &String), &Line> = HashMap::new();
    for (kind, name, line) in vms.chain(forwards) {
        match seen.entry((kind, name)) {
            Entry::Vacant(free) => drop(free.insert(line)),
            Entry::Occupied(other) => {
                let other = other.get();
                let text = format!("[{kind}.{name}] is in line {other}, too; choose another name");
                complain(line.clone(), text);
            }
        }
    }
}

/// Says which rules can't be carried beside each other, and which come out where it is controlled from, or looked at.
pub(super) fn find(
    rules: &[(&Forward, Rule)],
    control: Option<&Path>,
    metrics: Option<&TcpAddress>,
    complain: &mut dyn FnMut(Line, String),
) {
    let doors = doors(control, metrics);
    let mut taken: HashMap<ListenKey<'_>, Vec<(&Forward, &Address)>> = HashMap::new();
    for (forward, rule) in rules {
        let name = &forward.name;
        let listen = &rule.listen;
        let others = taken.entry(listen.listen_key()).or_default();
        if let Some((other, there)) = others.iter().find(|(_, it)| it.collides(listen)) {
            let text = format!(
                "[forward.{name}]: [forward.{}] in line {} listens on {there} already; remove one, or choose another address",
                other.name, other.listen_line
            );
            complain(forward.listen_line.clone(), text);
        }
        others.push((forward, listen));
        let beside = rules.iter().filter(|(other, _)| other.name != *name);
        if let Some(trail) = find_loop(rule, beside.map(|(_, rule)| rule)) {
            let text = format!(
                "[forward.{name}]: {}; choose another target",
                describe_loop(&trail)
            );
            complain(forward.connect_line.clone(), text);
        }
        for (key, door) in &doors {
            if door.collides(listen) {
                let text = format!(
                    "[forward.{name}]: {key} is at {door} already; choose another address for one of them"
                );
                complain(forward.listen_line.clone(), text);
            }
            if leads_to(&rule.connect, door) {
                let text = format!(
                    "[forward.{name}]: {} leads to this hvsock's own {key} ({door}), where no forward may lead; choose another target",
                    rule.connect
                );
                complain(forward.connect_line.clone(), text);
            }
        }
    }
}

fn doors(control: Option<&Path>, metrics: Option<&TcpAddress>) -> Vec<Door> {
    let control = control.map(|path| UnixAddress::Path(path.to_owned()).into());
    let metrics = metrics.map(|at| at.clone().into());
    let doors = [("control", control), ("metrics", metrics)].into_iter();
    doors.filter_map(|(key, door)| Some((key, door?))).collect()
}
