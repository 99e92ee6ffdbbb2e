//! Forwarding loops: forwards that lead back to themselves, so that a single client would use up
//! all connections.
//!
//! A loop that shows in the addresses is refused when a rule is bound. The others (by links, names,
//! addresses that change later) are found at run time: see [`routes`](crate::engine::routes).

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
#[cfg(unix)]
use std::path::PathBuf;

use crate::address::{Address, TcpAddress};
use crate::engine::rule::Rule;
use crate::stream::peer_names::reached_by;

use super::forbidden;

/// What an address that is listened on has in common with each target that
/// [reaches] it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum EndpointKey {
    /// A TCP port of one address.
    Tcp(IpAddr, u16),
    /// A TCP port of all addresses.
    AnyTcp(u16),
    /// A path without symbolic links.
    #[cfg(unix)]
    Path(PathBuf),
    /// A file that exists, by its device and its inode.
    #[cfg(unix)]
    File(u64, u64),
    /// An AF_VSOCK port.
    Vsock(u32),
    Other(Address),
}

impl EndpointKey {
    /// Returns the keys of an address that is listened on. Files are looked at.
    fn listened_on(listen: &Address) -> Vec<EndpointKey> {
        if let Some(tcp) = listen.as_tcp() {
            let of = |ip: IpAddr| match ip.is_unspecified() {
                true => EndpointKey::AnyTcp(tcp.port),
                false => EndpointKey::Tcp(ip, tcp.port),
            };
            return addresses(tcp).map(of).collect();
        }
        #[cfg(unix)]
        if let Some(path) = listen.listen_path() {
            return EndpointKey::of_file(&path);
        }
        vec![EndpointKey::of_other(listen)]
    }

    /// Returns the keys to which a connection to `target` may lead. Files are looked at.
    fn led_to(target: &Address) -> Vec<EndpointKey> {
        if let Some(tcp) = target.as_tcp() {
            let addresses = addresses(tcp).map(reached_by);
            let mut keys: Vec<EndpointKey> =
                addresses.map(|ip| EndpointKey::Tcp(ip, tcp.port)).collect();
            if !keys.is_empty() {
                keys.push(EndpointKey::AnyTcp(tcp.port));
            }
            return keys;
        }
        let mut keys = EndpointKey::of_files(target);
        keys.push(EndpointKey::of_other(target));
        keys
    }

    /// Returns the keys of the files that a connect to the target may go through.
    #[cfg(unix)]
    fn of_files(target: &Address) -> Vec<EndpointKey> {
        let paths = target.connect_paths();
        paths
            .iter()
            .flat_map(|path| EndpointKey::of_file(path))
            .collect()
    }

    #[cfg(not(unix))]
    fn of_files(_: &Address) -> Vec<EndpointKey> {
        Vec::new()
    }

    #[cfg(unix)]
    fn of_file(path: &std::path::Path) -> Vec<EndpointKey> {
        let mut keys = vec![EndpointKey::Path(forbidden::resolve_links(path))];
        keys.extend(
            forbidden::file_at(path).map(|(device, inode)| EndpointKey::File(device, inode)),
        );
        keys
    }

    fn of_other(address: &Address) -> EndpointKey {
        match address {
            Address::Vsock(vsock) => EndpointKey::Vsock(vsock.port.0),
            other => EndpointKey::Other(other.clone()),
        }
    }
}

/// A rule as far as [`RuleIndex`] knows it.
#[derive(Debug)]
struct Indexed {
    name: Option<String>,
    listen: Address,
    connect: Address,
    keys: Vec<EndpointKey>,
}

/// The rules that are carried beside each other, by their names and by where they listen, so that
/// one more is compared with those few that it may have to do with.
///
/// Where a file is, is looked up when its rule is inserted. If links change later, a loop is found
/// at run time.
#[derive(Debug, Default)]
pub(crate) struct RuleIndex {
    rules: HashMap<u64, Indexed>,
    names: HashMap<String, u64>,
    listens: HashMap<Address, u64>,
    keys: HashMap<EndpointKey, BTreeSet<u64>>,
}

/// What a rule that is checked is to those of an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Candidate {
    New,
    /// It is the rule of this number, or is to take its place.
    InPlaceOf(u64),
}

impl Candidate {
    /// Returns the number of the rule whose place it has.
    pub(crate) fn replaced(self) -> Option<u64> {
        match self {
            Candidate::New => None,
            Candidate::InPlaceOf(id) => Some(id),
        }
    }
}

impl RuleIndex {
    /// Inserts a rule with a number of its own.
    pub(crate) fn insert(&mut self, id: u64, rule: &Rule) {
        self.remove(id);
        let keys = EndpointKey::listened_on(&rule.listen);
        for key in &keys {
            self.keys.entry(key.clone()).or_default().insert(id);
        }
        if let Some(name) = &rule.name {
            self.names.insert(name.clone(), id);
        }
        self.listens.insert(rule.listen.clone(), id);
        let indexed = Indexed {
            name: rule.name.clone(),
            listen: rule.listen.clone(),
            connect: rule.connect.clone(),
            keys,
        };
        self.rules.insert(id, indexed);
    }

    pub(crate) fn remove(&mut self, id: u64) {
        let Some(rule) = self.rules.remove(&id) else {
            return;
        };
        for key in &rule.keys {
            if let Some(there) = self.keys.get_mut(key) {
                there.remove(&id);
                if there.is_empty() {
                    self.keys.remove(key);
                }
            }
        }
        if let Some(name) = &rule.name
            && self.names.get(name) == Some(&id)
        {
            self.names.remove(name);
        }
        if self.listens.get(&rule.listen) == Some(&id) {
            self.listens.remove(&rule.listen);
        }
    }

    pub(crate) fn contains(&self, id: u64) -> bool {
        self.rules.contains_key(&id)
    }

    /// Returns the number of the rule of that name.
    pub(crate) fn named(&self, name: &str) -> Option<u64> {
        self.names.get(name).copied()
    }

    /// Returns the number of the rule that listens on that very address.
    pub(crate) fn listening_on(&self, listen: &Address) -> Option<u64> {
        self.listens.get(listen).copied()
    }

    /// Returns the path by which a client of `rule` certainly comes back to `rule`: the addresses
    /// that the rules listen on, `rule`'s own as the last one.
    pub(crate) fn find_loop(&self, candidate: Candidate, rule: &Rule) -> Option<Vec<Address>> {
        // For each step of the way, the rules that are still to be tried there.
        let mut steps = vec![self.reached_from(&rule.connect)];
        let mut trail: Vec<u64> = Vec::new();
        let mut seen: HashSet<u64> = candidate.replaced().into_iter().collect();
        let mut comes_back = reaches(&rule.connect, &rule.listen);
        while !comes_back {
            let Some(next) = steps.last_mut()?.pop() else {
                steps.pop();
                trail.pop();
                continue;
            };
            if !seen.insert(next) {
                continue;
            }
            let connect = &self.rules.get(&next)?.connect;
            comes_back = reaches(connect, &rule.listen);
            trail.push(next);
            steps.push(self.reached_from(connect));
        }
        let listen = |id: &u64| Some(self.rules.get(id)?.listen.clone());
        let trail = trail.iter().filter_map(listen);
        Some(trail.chain([rule.listen.clone()]).collect())
    }

    /// Returns the rules at which a connection to `target` certainly arrives, the first as the last
    /// one.
    fn reached_from(&self, target: &Address) -> Vec<u64> {
        let keys = EndpointKey::led_to(target);
        let there = keys.iter().filter_map(|key| self.keys.get(key));
        let near: BTreeSet<u64> = there.flatten().copied().collect();
        let is_reached = |id: &u64| {
            let rule = self.rules.get(id);
            rule.is_some_and(|rule| reaches(target, &rule.listen))
        };
        near.into_iter().rev().filter(is_reached).collect()
    }
}

/// Describes a path in words.
pub(crate) fn describe(trail: &[Address]) -> String {
    match trail {
        [_] | [] => "it would lead back to itself".to_owned(),
        [by, ..] => format!("it would lead back to itself, by way of {by}"),
    }
}

/// Returns whether a connection to `target` certainly arrives at a socket that listens on `listen`.
fn reaches(target: &Address, listen: &Address) -> bool {
    #[cfg(test)]
    tests::COMPARED.with(|it| it.set(it.get() + 1));
    if let (Some(target), Some(listen)) = (target.as_tcp(), listen.as_tcp()) {
        return reaches_tcp(target, listen);
    }
    #[cfg(unix)]
    if let Some(listen) = listen.listen_path() {
        let paths = target.connect_paths();
        return paths.iter().any(|path| forbidden::is_same(path, &listen));
    }
    target == listen || target.is_loopback_to(listen)
}

fn reaches_tcp(target: &TcpAddress, listen: &TcpAddress) -> bool {
    let is_reached = |target: IpAddr, at: IpAddr| {
        let target = reached_by(target);
        match at {
            _ if target == at => true,
            // [::] accepts IPv4 as well, unless it is said that it doesn't.
            IpAddr::V6(ip) if ip.is_unspecified() => {
                listen.family.includes(&target) && forbidden::is_this_machine(target)
            }
            IpAddr::V4(ip) if ip.is_unspecified() => {
                target.is_ipv4() && forbidden::is_this_machine(target)
            }
            _ => false,
        }
    };
    target.port != 0
        && target.port == listen.port
        && addresses(target).any(|ip| addresses(listen).any(|at| is_reached(ip, at)))
}

/// Returns the addresses of a host that are known without resolving it.
fn addresses(tcp: &TcpAddress) -> impl Iterator<Item = IpAddr> {
    tcp.known_ips().into_iter().map(|ip| ip.to_canonical())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        /// How often two addresses were compared.
        pub(super) static COMPARED: Cell<u64> = const { Cell::new(0) };
    }

    fn find(rules: &[Rule]) -> Option<Vec<Address>> {
        let mut index = RuleIndex::default();
        for (id, rule) in (1..).zip(&rules[1..]) {
            index.insert(id, rule);
        }
        index.find_loop(Candidate::New, &rules[0])
    }

    fn rules(pairs: &[(&str, &str)]) -> Vec<Rule> {
        let rule = |(listen, connect): &(&str, &str)| {
            Rule::new(listen.parse().unwrap(), connect.parse().unwrap())
        };
        pairs.iter().map(rule).collect()
    }

    fn comes_back(pairs: &[(&str, &str)]) -> bool {
        find(&rules(pairs)).is_some()
    }

    #[test]
    fn a_loop_is_seen_in_the_addresses_however_they_are_spelled() {
        for (listen, connect) in [
            ("tcp://0.0.0.0:80", "tcp://127.0.0.1:80"),
            ("tcp://127.0.0.1:80", "tcp://localhost:80"),
            ("tcp://localhost:80", "tcp://127.0.0.1:80"),
            ("tcp://[::]:80", "tcp://127.0.0.1:80"),
            ("tcp://[::]:80", "tcp://[::ffff:127.0.0.1]:80"),
            ("tcp://[::1]:80", "tcp://[::]:80"),
            ("tcp://0.0.0.0:80", "tcp://0.0.0.0:80"),
            ("tcp://localhost:80", "tcp://[::1]:80"),
            ("tcp://*:80", "tcp://127.0.0.1:80"),
            ("tcp://*:80", "tcp6://localhost:80"),
            ("tcp4://*:80", "tcp://localhost:80"),
            ("vsock://:80", "vsock://local:80"),
            ("unix:@name", "unix:@name"),
        ] {
            assert!(comes_back(&[(listen, connect)]), "{listen} -> {connect}");
        }
        for (listen, connect) in [
            ("tcp://127.0.0.1:80", "tcp://127.0.0.2:80"),
            ("tcp://127.0.0.1:80", "tcp://127.0.0.1:81"),
            ("tcp://127.0.0.1:80", "tcp://[::1]:80"),
            ("tcp://0.0.0.0:80", "tcp://[::1]:80"),
            ("tcp4://localhost:80", "tcp6://localhost:80"),
            ("tcp6://*:80", "tcp4://localhost:80"),
            ("tcp4://*:80", "tcp://[::1]:80"),
            ("tcp://127.0.0.1:80", "tcp://some.example:80"),
            ("vsock://:80", "vsock://3:80"),
            ("unix:@name", "unix:@other"),
        ] {
            assert!(!comes_back(&[(listen, connect)]), "{listen} -> {connect}");
        }
    }

    #[test]
    fn a_loop_is_seen_through_other_rules_and_a_chain_is_none() {
        let one = ("tcp://127.0.0.1:1", "tcp://127.0.0.1:2");
        let two = ("tcp://127.0.0.1:2", "unix:@three");
        assert!(comes_back(&[
            one,
            two,
            ("unix:@three", "tcp://127.0.0.1:1")
        ]));
        assert!(!comes_back(&[
            one,
            two,
            ("unix:@three", "tcp://127.0.0.1:4")
        ]));
        // A loop of other rules is not this rule's.
        let other_loop = ("unix:@three", "tcp://127.0.0.1:2");
        assert!(!comes_back(&[one, two, other_loop]));
        let rules = rules(&[one, two, ("unix:@three", "tcp://127.0.0.1:1")]);
        let trail = find(&rules).unwrap();
        assert_eq!(
            trail,
            [&rules[1].listen, &rules[2].listen, &rules[0].listen].map(Clone::clone)
        );
    }

    /// Inserts `n` rules one after the other, each of which is compared with those before. Returns
    /// the number of comparisons for one.
    fn compared(n: u64, rule: impl Fn(u64) -> (String, String)) -> u64 {
        let before = COMPARED.get();
        let mut index = RuleIndex::default();
        for id in 0..n {
            let (listen, connect) = rule(id);
            let rule = Rule::new(listen.parse().unwrap(), connect.parse().unwrap());
            assert_eq!(index.find_loop(Candidate::New, &rule), None, "{rule:?}");
            assert_eq!(index.listening_on(&rule.listen), None);
            index.insert(id, &rule);
        }
        (COMPARED.get() - before) / n
    }

    #[test]
    fn one_more_rule_is_compared_with_few_however_many_there_are() {
        let tcp = |id: u64| {
            let (high, low) = (id / 250, 1 + id % 250);
            (
                format!("tcp://127.1.{high}.{low}:80"),
                format!("tcp://127.2.{high}.{low}:80"),
            )
        };
        let unix = |id: u64| {
            (
                format!("unix:///nowhere/{id}"),
                "unix:///nowhere/s".to_owned(),
            )
        };
        let vms = |id: u64| {
            (
                format!("tcp://127.0.0.1:{}", 10_000 + id),
                format!("hyperkit://:80/nowhere/vm{id}"),
            )
        };
        for n in [100, 2000] {
            for rule in [&tcp as &dyn Fn(u64) -> _, &unix, &vms] {
                assert!(compared(n, rule) <= 4, "{n}: {:?}", rule(0));
            }
        }
    }

    #[test]
    fn a_rule_that_was_removed_is_in_nobodys_way() {
        let rules = rules(&[
            ("tcp://127.0.0.1:1", "tcp://127.0.0.1:2"),
            ("tcp://127.0.0.1:2", "tcp://127.0.0.1:1"),
        ]);
        let mut index = RuleIndex::default();
        index.insert(7, &rules[1]);
        assert!(index.find_loop(Candidate::New, &rules[0]).is_some());
        // What is replaced is not what a rule is compared with.
        assert!(
            index
                .find_loop(Candidate::InPlaceOf(7), &rules[0])
                .is_none()
        );
        index.remove(7);
        assert!(index.find_loop(Candidate::New, &rules[0]).is_none());
        assert_eq!(index.listening_on(&rules[1].listen), None);
        assert!(index.keys.is_empty() && index.rules.is_empty());
    }
}
