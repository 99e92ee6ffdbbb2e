//! Finds forwards that conflict with each other, or with the program's own sockets.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::forward::{ForwardSection, Read};
use super::problems::{Line, quote_key};
use super::vms::VmSection;
use crate::address::overlap::ListenKey;
use crate::address::{Address, UnixAddress};
use crate::proxy::{Candidate, Rule, RuleIndex, describe_loop, leads_to};

/// The address of a socket of the program itself, and the key that sets it.
pub(super) type OwnAddress = (&'static str, Address);

/// The address on which a forward listens, with its name and the line.
struct Claim<'a> {
    name: &'a str,
    line: &'a Line,
    listen: &'a Address,
}

/// Reports VMs and forwards with the same name: in an included file, or by a port of a range.
pub(super) fn find_namesakes(
    vms: &[VmSection],
    forwards: &[ForwardSection],
    complain: &mut dyn FnMut(Line, String),
) {
    let vms = vms.iter().map(|vm| ("vm", &vm.name, &vm.line, None));
    let forwards = forwards.iter();
    let forwards = forwards.map(|it| ("forward", &it.name, &it.listen_line, it.range.as_ref()));
    let mut seen: HashMap<(&str, &String), (&Line, Option<&String>)> = HashMap::new();
    for (kind, name, line, range) in vms.chain(forwards) {
        match seen.entry((kind, name)) {
            Entry::Vacant(free) => drop(free.insert((line, range))),
            Entry::Occupied(other) => {
                let (other, other_range) = other.get();
                let made = match range {
                    Some(range) => format!(" of the range [{kind}.{}]", quote_key(range)),
                    None => String::new(),
                };
                let is_there = match other_range {
                    Some(range) => {
                        let range = quote_key(range);
                        format!("is made by the range [{kind}.{range}] in line {other}, too")
                    }
                    None => format!("is in line {other}, too"),
                };
                let name = quote_key(name);
                let text = format!("[{kind}.{name}]{made} {is_there}; choose another name");
                complain(line.clone(), text);
            }
        }
    }
}

/// Reports rules that can't be carried together, and rules that lead to the control socket or the
/// metrics. Of forwards that could be read only in part, the listen addresses are known.
pub(super) fn find(
    rules: &[(&ForwardSection, Rule)],
    parts: &[Read],
    own_addresses: &[OwnAddress],
    complain: &mut dyn FnMut(Line, String),
) {
    let of_rules = rules.iter().map(|(forward, rule)| Claim {
        name: &forward.name,
        line: &forward.listen_line,
        listen: &rule.listen,
    });
    let of_parts = parts.iter().flat_map(|it| {
        it.listen.iter().map(|listen| Claim {
            name: &it.name,
            line: &it.listen_line,
            listen,
        })
    });
    let mut claims: Vec<Claim<'_>> = of_rules.chain(of_parts).collect();
    claims.sort_by_key(|claim| claim.line);
    let mut taken: HashMap<ListenKey<'_>, &Claim<'_>> = HashMap::new();
    for claim in &claims {
        let near = claim.listen.colliding_keys().into_iter();
        let others = near.filter_map(|key| taken.get(&key));
        let colliding = others.filter(|it| it.listen.collides(claim.listen));
        if let Some(other) = colliding.min_by_key(|it| it.line) {
            let text = format!(
                "[forward.{}]: [forward.{}] in line {} listens on {} already; remove one, or choose another address",
                quote_key(claim.name),
                quote_key(other.name),
                other.line,
                other.listen
            );
            complain(claim.line.clone(), text);
        }
        for key in claim.listen.listen_keys() {
            taken.entry(key).or_insert(claim);
        }
    }
    for (forward, rule) in rules {
        let name = quote_key(&forward.name);
        let listen = &rule.listen;
        for (key, own) in own_addresses {
            if own.collides(listen) {
                let text = format!(
                    "[forward.{name}]: {key} is at {own} already; choose another address for one of them"
                );
                complain(forward.listen_line.clone(), text);
            }
            if leads_to(&rule.connect, own) {
                let text = format!(
                    "[forward.{name}]: {} leads to this hvsock's own {key} ({own}), where no forward may lead; choose another target",
                    rule.connect
                );
                complain(forward.connect_line.clone(), text);
            }
        }
    }
}

/// Reports rules that certainly lead back to themselves, each loop once.
pub(super) fn find_loops(
    rules: &[&(&ForwardSection, Rule)],
    complain: &mut dyn FnMut(Line, String),
) {
    let mut index = RuleIndex::default();
    for (id, (_, rule)) in (0..).zip(rules) {
        index.insert(id, rule);
    }
    let mut told: HashSet<Address> = HashSet::new();
    for (id, (forward, rule)) in (0..).zip(rules) {
        let Some(trail) = index.find_loop(Candidate::InPlaceOf(id), rule) else {
            continue;
        };
        if trail.iter().all(|it| !told.contains(it)) {
            let name = quote_key(&forward.name);
            let loops = describe_loop(&trail);
            let text = format!("[forward.{name}]: {loops}; choose another target");
            complain(forward.connect_line.clone(), text);
        }
        told.extend(trail);
    }
}

/// Returns the addresses on which the program itself listens.
pub(super) fn own_addresses(
    control: Option<&Path>,
    guest_control: Option<&Address>,
    metrics: Option<&Address>,
) -> Vec<OwnAddress> {
    let control = control.map(|path| UnixAddress::Path(path.to_owned()).into());
    let own_addresses = [
        ("control", control),
        ("guest-control", guest_control.cloned()),
        ("metrics", metrics.cloned()),
    ];
    let own_addresses = own_addresses.into_iter();
    own_addresses
        .filter_map(|(key, own)| Some((key, own?)))
        .collect()
}
