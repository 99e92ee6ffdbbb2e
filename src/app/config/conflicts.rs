//! Forwards that are in each other's way, or in the way of where the program itself listens.

use std::collections::HashMap;
use std::path::Path;

use super::forward::Forward;
use crate::address::overlap::ListenKey;
use crate::address::{Address, TcpAddress, UnixAddress};
use crate::proxy::{Rule, describe_loop, find_loop, leads_to};

/// Where the program itself listens, and the key that says so.
type Door = (&'static str, Address);

/// Says which rules can't be carried beside each other, and which come out where it is controlled from, or looked at.
pub(super) fn find(
    rules: &[(&Forward, Rule)],
    control: Option<&Path>,
    metrics: Option<&TcpAddress>,
    complain: &mut dyn FnMut(usize, String),
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
            complain(forward.listen_line, text);
        }
        others.push((forward, listen));
        let beside = rules.iter().filter(|(other, _)| other.name != *name);
        if let Some(trail) = find_loop(rule, beside.map(|(_, rule)| rule)) {
            let text = format!(
                "[forward.{name}]: {}; choose another target",
                describe_loop(&trail)
            );
            complain(forward.connect_line, text);
        }
        for (key, door) in &doors {
            if door.collides(listen) {
                let text = format!(
                    "[forward.{name}]: {key} is at {door} already; choose another address for one of them"
                );
                complain(forward.listen_line, text);
            }
            if leads_to(&rule.connect, door) {
                let text = format!(
                    "[forward.{name}]: {} leads to this hvsock's own {key} ({door}), where no forward may lead; choose another target",
                    rule.connect
                );
                complain(forward.connect_line, text);
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
