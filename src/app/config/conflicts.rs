//! Forwards that are in each other's way, or in the way of where the program itself listens.

use std::collections::HashMap;
use std::path::Path;

use super::forward::{Forward, Read};
use crate::address::{Address, Host, TcpAddress, UnixAddress};
use crate::proxy::{Rule, describe_loop, find_loop, leads_to};

/// Where the program itself listens, and the key that says so.
type Door = (&'static str, Address);

/// Where a forward listens: its name, the line that says so, and the address.
struct Claim<'a> {
    name: &'a str,
    line: usize,
    listen: &'a Address,
}

/// Says which rules can't be carried beside each other, and which come out where it is controlled from, or looked at. Of
/// forwards that could be read in part it is known where they listen.
pub(super) fn find(
    rules: &[(&Forward, Rule)],
    parts: &[Read],
    control: Option<&Path>,
    metrics: Option<&TcpAddress>,
    complain: &mut dyn FnMut(usize, String),
) {
    let doors = doors(control, metrics);
    let of_rules = rules.iter().map(|(forward, rule)| Claim {
        name: &forward.name,
        line: forward.listen_line,
        listen: &rule.listen,
    });
    let of_parts = parts.iter().filter_map(|it| {
        Some(Claim {
            name: &it.name,
            line: it.listen_line,
            listen: it.listen.as_ref()?,
        })
    });
    let mut claims: Vec<Claim<'_>> = of_rules.chain(of_parts).collect();
    claims.sort_by_key(|claim| claim.line);
    let mut taken: HashMap<Place<'_>, Vec<Claim<'_>>> = HashMap::new();
    for claim in claims {
        let others = taken.entry(Place::of(claim.listen)).or_default();
        if let Some(other) = others.iter().find(|it| collide(it.listen, claim.listen)) {
            let text = format!(
                "[forward.{}]: [forward.{}] in line {} listens on {} already; remove one, or choose another address",
                claim.name, other.name, other.line, other.listen
            );
            complain(claim.line, text);
        }
        others.push(claim);
    }
    for (forward, rule) in rules {
        let name = &forward.name;
        let listen = &rule.listen;
        let beside = rules.iter().filter(|(other, _)| other.name != *name);
        if let Some(trail) = find_loop(rule, beside.map(|(_, rule)| rule)) {
            let text = format!(
                "[forward.{name}]: {}; choose another target",
                describe_loop(&trail)
            );
            complain(forward.connect_line, text);
        }
        for (key, door) in &doors {
            if collide(door, listen) {
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
    let control = control.map(|path| Address::Unix(UnixAddress::Path(path.to_owned())));
    let metrics = metrics.map(|at| Address::Tcp(at.clone()));
    let doors = [("control", control), ("metrics", metrics)].into_iter();
    doors.filter_map(|(key, door)| Some((key, door?))).collect()
}

/// What two addresses have in common that collide.
#[derive(PartialEq, Eq, Hash)]
enum Place<'a> {
    Port(u16),
    Other(&'a Address),
}

impl Place<'_> {
    fn of(address: &Address) -> Place<'_> {
        match address {
            Address::Tcp(tcp) => Place::Port(tcp.port),
            other => Place::Other(other),
        }
    }
}

/// Whether only one of two can be listened on.
fn collide(one: &Address, other: &Address) -> bool {
    if one.leaves_port_to_kernel() || other.leaves_port_to_kernel() {
        return false;
    }
    match (one, other) {
        (Address::Tcp(one), Address::Tcp(other)) => {
            let all = |tcp: &TcpAddress| matches!(&tcp.host, Host::Ip(ip) if ip.is_unspecified());
            // Elsewhere one of all addresses may have another listener.
            let all =
                cfg!(target_os = "linux") && is_one_kind(one, other) && (all(one) || all(other));
            one.port == other.port && (one.host == other.host || all)
        }
        _ => one == other,
    }
}

fn is_one_kind(one: &TcpAddress, other: &TcpAddress) -> bool {
    match (&one.host, &other.host) {
        (Host::Ip(one), Host::Ip(other)) => one.is_ipv4() == other.is_ipv4(),
        _ => false,
    }
}
