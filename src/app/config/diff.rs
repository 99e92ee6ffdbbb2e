//! Plans the steps by which a running proxy comes to carry what a file says, and touches nothing
//! else.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::path::PathBuf;

use crate::address::Address;
use crate::proxy::Rule;

/// A forward that is carried now.
#[derive(Clone, Debug)]
pub(crate) struct Existing<I> {
    pub(crate) id: I,
    /// The rule as it was requested.
    pub(crate) rule: Rule,
    /// Whether it came from the file. Other forwards are left alone, unless the file now asks for
    /// their address.
    pub(crate) ours: bool,
}

/// A step. In the order of a plan, no step is blocked by a later one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step<I> {
    /// Does nothing: the forward is as the file says.
    Keep(I),
    Remove(I),
    /// Removes the name of a forward, since another one gets it.
    Unname(I),
    /// Gives a new rule to a forward that keeps its listener.
    Replace(I, Rule),
    /// Moves a forward to another address: it can listen there before the old listener is closed.
    Move(I, Rule),
    /// Moves forwards that block each other, or themselves: all are closed before any listens
    /// again.
    Exchange(Vec<(I, Rule)>),
    Add(Rule),
}

/// The existing forward that matches a wanted rule.
#[derive(Clone, Copy)]
enum ExistingMatch<'a, I> {
    Nothing,
    /// The forward that listens at its address.
    Holder(&'a Existing<I>),
    /// The forward with its name that listens elsewhere.
    Namesake(&'a Existing<I>),
}

/// Returns the steps from the existing forwards to the wanted rules.
///
/// A forward is matched by its listen address, or by its name if its port is chosen by the kernel.
/// So a forward that keeps its address keeps its listener. A forward of the file without a match
/// has moved if a rule has its name.
pub(crate) fn plan<I: Copy + PartialEq>(existing: &[Existing<I>], wanted: &[Rule]) -> Vec<Step<I>> {
    let mut holders: HashMap<_, VecDeque<usize>> = HashMap::new();
    let mut namesakes: HashMap<&str, VecDeque<usize>> = HashMap::new();
    for (index, it) in existing.iter().enumerate() {
        holders
            .entry(place_of(&it.rule))
            .or_default()
            .push_back(index);
        if let Some(name) = it.rule.name.as_deref().filter(|_| it.ours) {
            namesakes.entry(name).or_default().push_back(index);
        }
    }
    let mut left = vec![true; existing.len()];
    let mut take = |from: Option<&mut VecDeque<usize>>| {
        let from = from?;
        while let Some(index) = from.pop_front() {
            if std::mem::take(&mut left[index]) {
                return Some(&existing[index]);
            }
        }
        None
    };
    let mut matches: Vec<(&Rule, ExistingMatch<'_, I>)> = Vec::new();
    for rule in wanted {
        let holder = take(holders.get_mut(&place_of(rule)));
        matches.push((
            rule,
            holder.map_or(ExistingMatch::Nothing, ExistingMatch::Holder),
        ));
    }
    for (rule, found) in &mut matches {
        if let (ExistingMatch::Nothing, Some(name)) = (&found, &rule.name)
            && let Some(namesake) = take(namesakes.get_mut(name.as_str()))
        {
            *found = ExistingMatch::Namesake(namesake);
        }
    }
    let names: HashSet<&String> = wanted.iter().filter_map(|it| it.name.as_ref()).collect();
    let mut steps: Vec<Step<I>> = existing
        .iter()
        .zip(left)
        .filter(|(it, is_left)| it.ours && *is_left)
        .map(|(it, _)| Step::Remove(it.id))
        .collect();
    for (held, found) in &matches {
        if let ExistingMatch::Holder(holder) = found
            && let Some(name) = &holder.rule.name
            && held.name.as_ref() != Some(name)
            && names.contains(name)
        {
            steps.push(Step::Unname(holder.id));
        }
    }
    let moves = matches.iter().filter_map(|(rule, found)| match found {
        ExistingMatch::Namesake(it) => Some((*it, *rule)),
        _ => None,
    });
    steps.extend(order(moves.collect()));
    steps.extend(matches.into_iter().filter_map(|(rule, found)| match found {
        ExistingMatch::Holder(it) if it.rule == *rule => Some(Step::Keep(it.id)),
        ExistingMatch::Holder(it) => Some(Step::Replace(it.id, rule.clone())),
        ExistingMatch::Namesake(_) => None,
        ExistingMatch::Nothing => Some(Step::Add(rule.clone())),
    }));
    steps
}

/// Returns what a rule is matched by: its listen address, and its name if the port is chosen by the
/// kernel.
fn place_of(rule: &Rule) -> (&Address, Option<&Option<String>>) {
    let chosen = rule.listen.leaves_port_to_kernel();
    (&rule.listen, chosen.then_some(&rule.name))
}

/// Returns the moves, each after those that free its new address.
fn order<I: Copy + PartialEq>(moves: Vec<(&Existing<I>, &Rule)>) -> Vec<Step<I>> {
    let mut holders: HashMap<WayKey, Vec<usize>> = HashMap::new();
    for (index, (old, _)) in moves.iter().enumerate() {
        for key in way_keys(&old.rule.listen) {
            holders.entry(key).or_default().push(index);
        }
    }
    // For each move, those that block it, and those that it blocks.
    let mut in_the_way = vec![BTreeSet::new(); moves.len()];
    let mut waiting = vec![Vec::new(); moves.len()];
    for (index, (_, rule)) in moves.iter().enumerate() {
        let keys = way_keys(&rule.listen);
        for &other in keys.iter().filter_map(|key| holders.get(key)).flatten() {
            let is_in_the_way = may_collide(&moves[other].0.rule.listen, &rule.listen);
            if is_in_the_way && in_the_way[index].insert(other) {
                waiting[other].push(index);
            }
        }
    }
    let mut steps = Vec::new();
    let mut left: BTreeSet<usize> = (0..moves.len()).collect();
    let is_free = |index: &usize| in_the_way[*index].is_empty();
    let mut free: BTreeSet<usize> = left.iter().copied().filter(is_free).collect();
    while let Some(first) = left.first().copied() {
        let going = match free.pop_first() {
            Some(index) => {
                let (old, rule) = moves[index];
                steps.push(Step::Move(old.id, rule.clone()));
                vec![index]
            }
            None => {
                // Each is blocked by another, so following the blocks leads into a cycle.
                let mut way = vec![first];
                let circle = loop {
                    let last = way.last().copied().unwrap_or(first);
                    let next = in_the_way[last].first().copied().unwrap_or(last);
                    if let Some(begin) = way.iter().position(|it| *it == next) {
                        break way.split_off(begin);
                    }
                    way.push(next);
                };
                let member = |index: &usize| (moves[*index].0.id, moves[*index].1.clone());
                steps.push(Step::Exchange(circle.iter().map(member).collect()));
                circle
            }
        };
        for gone in going {
            left.remove(&gone);
            free.remove(&gone);
            for index in std::mem::take(&mut waiting[gone]) {
                in_the_way[index].remove(&gone);
                if in_the_way[index].is_empty() && left.contains(&index) {
                    free.insert(index);
                }
            }
        }
    }
    steps
}

/// What two addresses share if a listener at one may block the other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum WayKey {
    TcpPort(u16),
    VsockPort(u32),
    File(PathBuf),
    Address(Address),
}

fn way_keys(listen: &Address) -> Vec<WayKey> {
    let key = match listen {
        Address::Tcp(tcp) => WayKey::TcpPort(tcp.port),
        Address::Vsock(vsock) => WayKey::VsockPort(vsock.port.0),
        other => WayKey::Address(other.clone()),
    };
    let file = file_of(listen).map(WayKey::File);
    [Some(key), file].into_iter().flatten().collect()
}

/// Returns whether a listener at one address may block a listener at the other.
fn may_collide(one: &Address, other: &Address) -> bool {
    let files = file_of(one).zip(file_of(other));
    one.may_collide(other) || files.is_some_and(|(one, other)| one == other)
}

/// Returns the socket file of a Unix address, however the path of its directory is spelled.
fn file_of(listen: &Address) -> Option<PathBuf> {
    let path = listen.listen_path()?;
    let path = std::path::absolute(&path).unwrap_or_else(|_| path.into_owned());
    let directory = path.parent().and_then(|it| it.canonicalize().ok());
    match (directory, path.file_name()) {
        (Some(directory), Some(name)) => Some(directory.join(name)),
        _ => Some(path),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn rule(name: &str, listen: &str, connect: &str) -> Rule {
        let mut rule = Rule::new(listen.parse().unwrap(), connect.parse().unwrap());
        rule.name = Some(name.to_owned());
        rule
    }

    fn existing(rules: &[Rule]) -> Vec<Existing<usize>> {
        let all = rules.iter().cloned().enumerate();
        all.map(|(id, rule)| Existing {
            id,
            rule,
            ours: true,
        })
        .collect()
    }

    const TO: &str = "tcp://10.0.0.1:80";

    #[test]
    fn what_is_the_same_is_kept_and_the_rest_goes_before_the_new_comes() {
        let [a, b] = [rule("a", "/a", TO), rule("b", "/b", TO)];
        let c = rule("c", "/c", TO);
        let mut slow = a.clone();
        slow.timeouts.dial = Duration::from_secs(1);
        let now = existing(&[a.clone(), b.clone()]);
        assert_eq!(
            plan(&now, &[a.clone(), b.clone()]),
            [Step::Keep(0), Step::Keep(1)]
        );
        let steps = plan(&now, &[c.clone(), slow.clone()]);
        assert_eq!(
            steps,
            [Step::Remove(1), Step::Add(c), Step::Replace(0, slow)]
        );
        assert_eq!(plan(&now, &[]), [Step::Remove(0), Step::Remove(1)]);
    }

    #[test]
    fn another_name_for_the_same_listener_is_no_other_listener() {
        let [a, b] = [rule("a", "/1", TO), rule("b", "/2", TO)];
        let now = existing(&[a.clone(), b]);
        let renamed = rule("c", "/1", TO);
        let b = rule("b", "/2", TO);
        let steps = plan(&now, &[renamed.clone(), b]);
        assert_eq!(steps, [Step::Replace(0, renamed), Step::Keep(1)]);
        // A name can be used again by another forward.
        let (a, b) = (rule("a", "/2", TO), rule("b", "/1", TO));
        let steps = plan(&now, &[a.clone(), b.clone()]);
        assert_eq!(
            steps,
            [
                Step::Unname(1),
                Step::Unname(0),
                Step::Replace(1, a),
                Step::Replace(0, b)
            ]
        );
        // Also by a new one.
        let (new, renamed) = (rule("a", "/3", TO), rule("c", "/1", TO));
        let steps = plan(&now, &[new.clone(), renamed.clone()]);
        let expected = [
            Step::Remove(1),
            Step::Unname(0),
            Step::Add(new),
            Step::Replace(0, renamed),
        ];
        assert_eq!(steps, expected);
    }

    #[test]
    fn another_place_is_another_listener() {
        let now = existing(&[rule("a", "/1", TO)]);
        let moved = rule("a", "/2", TO);
        assert_eq!(
            plan(&now, std::slice::from_ref(&moved)),
            [Step::Move(0, moved)]
        );
        let other = rule("b", "/2", TO);
        assert_eq!(
            plan(&now, std::slice::from_ref(&other)),
            [Step::Remove(0), Step::Add(other)]
        );
    }

    #[test]
    fn a_forward_moves_after_those_that_free_its_new_address() {
        let at = |name: &str, place: &str| rule(name, &format!("tcp://{place}"), TO);
        let now = existing(&[
            at("a", "10.0.0.1:1"),
            at("b", "10.0.0.1:2"),
            at("c", "10.0.0.1:3"),
        ]);
        // Each blocks the one before it.
        let [a, b, c] = [
            at("a", "0.0.0.0:2"),
            at("b", "0.0.0.0:3"),
            at("c", "0.0.0.0:4"),
        ];
        assert_eq!(
            plan(&now, &[a.clone(), b.clone(), c.clone()]),
            [
                Step::Move(2, c),
                Step::Move(1, b.clone()),
                Step::Move(0, a.clone())
            ]
        );
        // Two of them block each other, and the third is blocked by both.
        let (c, back) = (at("c", "0.0.0.0:2"), at("b", "0.0.0.0:3"));
        let a = at("a", "0.0.0.0:3");
        assert_eq!(
            plan(&now, &[a.clone(), back.clone(), c.clone()]),
            [Step::Exchange(vec![(2, c), (1, back)]), Step::Move(0, a)]
        );
    }

    #[cfg(unix)]
    #[test]
    fn a_forward_that_blocks_itself_is_closed_first() {
        let exchanges = |from: &str, to: &str| {
            let steps = plan(&existing(&[rule("a", from, TO)]), &[rule("a", to, TO)]);
            matches!(&steps[..], [Step::Exchange(_)])
        };
        assert!(exchanges("tcp://127.0.0.1:80", "tcp://0.0.0.0:80"));
        assert!(exchanges("tcp://127.0.0.1:80", "tcp://[::]:80"));
        assert!(exchanges("tcp://127.0.0.1:80", "tcp://localhost:80"));
        assert!(!exchanges("tcp://127.0.0.1:80", "tcp://127.0.0.2:80"));
        assert!(!exchanges("tcp://127.0.0.1:80", "tcp://0.0.0.0:81"));
        assert!(!exchanges("tcp://127.0.0.1:0", "tcp://0.0.0.0:0"));
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().to_str().unwrap();
        assert!(exchanges(
            &format!("{dir}/s"),
            &format!("{dir}/../{}/s", {
                std::path::Path::new(dir)
                    .file_name()
                    .unwrap()
                    .to_str()
                    .unwrap()
            })
        ));
        let hyperkit = format!("hyperkit://:5000{dir}");
        assert!(exchanges(&hyperkit, &format!("{dir}/00000002.00001388")));
        assert!(exchanges("vsock://any:5", "vsock://local:5"));
    }

    #[test]
    fn those_whose_port_was_chosen_are_known_by_their_names() {
        let any = "tcp://127.0.0.1:0";
        let [a, b] = [rule("a", any, TO), rule("b", any, TO)];
        let now = existing(&[a.clone(), b.clone()]);
        assert_eq!(plan(&now, &[b.clone(), a]), [Step::Keep(1), Step::Keep(0)]);
        let c = rule("c", any, TO);
        assert_eq!(
            plan(&now, &[b, c.clone()]),
            [Step::Remove(0), Step::Keep(1), Step::Add(c)]
        );
    }

    #[test]
    fn what_came_from_elsewhere_stays_unless_the_file_wants_its_place() {
        let [by_hand, other] = [rule("hand", "/1", TO), rule("other", "/2", TO)];
        let mut now = existing(&[by_hand, other]);
        now.iter_mut().for_each(|it| it.ours = false);
        assert_eq!(plan(&now, &[]), []);
        let wanted = rule("a", "/1", TO);
        assert_eq!(
            plan(&now, std::slice::from_ref(&wanted)),
            [Step::Replace(0, wanted)]
        );
    }
}
