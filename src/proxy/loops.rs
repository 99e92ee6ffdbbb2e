//! Forwarding loops: forwards that lead back to themselves, so that a single client would use up
//! all connections.
//!
//! A loop that shows in the addresses is refused when a rule is bound. The others (by links, names,
//! addresses that change later) are found at run time: see [`routes`](crate::engine::routes).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::address::{Address, Host, TcpAddress};
use crate::engine::routes::specified;
use crate::engine::rule::Rule;

use super::forbidden;

/// Returns the path by which a client of `rule` certainly comes back to `rule`: the addresses that
/// the rules listen on, `rule`'s own as the last one.
pub(crate) fn find<'a>(
    rule: &'a Rule,
    others: impl Iterator<Item = &'a Rule> + Clone,
) -> Option<Vec<&'a Address>> {
    let mut trail = Vec::new();
    follow(rule, rule, &others, &mut trail).then_some(trail)
}

/// Describes a path in words.
pub(crate) fn describe(trail: &[&Address]) -> String {
    match trail {
        [_] | [] => "it would lead back to itself".to_owned(),
        [by, ..] => format!("it would lead back to itself, by way of {by}"),
    }
}

fn follow<'a>(
    from: &'a Rule,
    rule: &'a Rule,
    others: &(impl Iterator<Item = &'a Rule> + Clone),
    trail: &mut Vec<&'a Address>,
) -> bool {
    if reaches(&from.connect, &rule.listen) {
        trail.push(&rule.listen);
        return true;
    }
    for next in others.clone() {
        let known = trail.contains(&&next.listen);
        if known || !reaches(&from.connect, &next.listen) {
            continue;
        }
        trail.push(&next.listen);
        if follow(next, rule, others, trail) {
            return true;
        }
        trail.pop();
    }
    false
}

/// Returns whether a connection to `target` certainly arrives at a socket that listens on `listen`.
fn reaches(target: &Address, listen: &Address) -> bool {
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
    let any_reaches = |target: IpAddr, listen: IpAddr| {
        let target = specified(target);
        match listen {
            _ if target == listen => true,
            // [::] accepts IPv4 as well.
            IpAddr::V6(ip) if ip.is_unspecified() => forbidden::is_this_machine(target),
            IpAddr::V4(ip) if ip.is_unspecified() => {
                target.is_ipv4() && forbidden::is_this_machine(target)
            }
            _ => false,
        }
    };
    let listens = addresses(&listen.host);
    target.port != 0
        && target.port == listen.port
        && addresses(&target.host)
            .iter()
            .any(|target| listens.iter().any(|listen| any_reaches(*target, *listen)))
}

/// Returns the addresses of a host that are known without resolving it.
fn addresses(host: &Host) -> Vec<IpAddr> {
    match host {
        Host::Ip(ip) => vec![ip.to_canonical()],
        Host::Name(name) if name.eq_ignore_ascii_case("localhost") => {
            vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]
        }
        Host::Name(_) => Vec::new(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn rules(pairs: &[(&str, &str)]) -> Vec<Rule> {
        let rule = |(listen, connect): &(&str, &str)| {
            Rule::new(listen.parse().unwrap(), connect.parse().unwrap())
        };
        pairs.iter().map(rule).collect()
    }

    fn comes_back(pairs: &[(&str, &str)]) -> bool {
        let rules = rules(pairs);
        find(&rules[0], rules[1..].iter()).is_some()
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
        let trail = find(&rules[0], rules[1..].iter()).unwrap();
        assert_eq!(
            trail,
            [&rules[1].listen, &rules[2].listen, &rules[0].listen]
        );
    }
}
