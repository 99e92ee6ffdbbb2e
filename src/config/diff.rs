//! What there is to do so that a running proxy carries what a file says, and nothing else is touched.

use crate::proxy::{Rule, is_chosen};

/// A forward that is carried now.
#[derive(Clone, Debug)]
pub(crate) struct Existing<I> {
    pub(crate) id: I,
    /// As it was asked for.
    pub(crate) rule: Rule,
    /// It came from the file. Others are left alone, unless the file now asks for where they listen.
    pub(crate) ours: bool,
}

/// One thing to do. In the order in which they are told, none is in another's way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step<I> {
    /// Nothing: it is as the file says.
    Keep(I),
    Remove(I),
    /// Takes a forward's name away, for another gets it.
    Unname(I),
    /// Another rule for who listens there already.
    Replace(I, Rule),
    Add(Rule),
}

/// How the existing forwards become the wanted ones.
///
/// A forward is known again by where it listens, by its name only among those that have their port chosen: who keeps the
/// address keeps the listener.
pub(crate) fn plan<I: Copy + PartialEq>(existing: &[Existing<I>], wanted: &[Rule]) -> Vec<Step<I>> {
    let mut left: Vec<&Existing<I>> = existing.iter().collect();
    let mut take = |fits: &dyn Fn(&Rule) -> bool| {
        let index = left.iter().position(|it| fits(&it.rule))?;
        Some(left.remove(index))
    };
    let matches: Vec<(&Rule, Option<&Existing<I>>)> = wanted
        .iter()
        .map(|rule| {
            let chosen = is_chosen(&rule.listen);
            let fits = |it: &Rule| it.listen == rule.listen && (!chosen || it.name == rule.name);
            (rule, take(&fits))
        })
        .collect();
    let mut steps: Vec<Step<I>> = left
        .iter()
        .filter(|it| it.ours)
        .map(|it| Step::Remove(it.id))
        .collect();
    for (_, holder) in &matches {
        if let Some(holder) = holder
            && let Some(name) = &holder.rule.name
            && matches.iter().any(|(rule, it)| {
                rule.name.as_ref() == Some(name) && it.is_none_or(|it| it.id != holder.id)
            })
        {
            steps.push(Step::Unname(holder.id));
        }
    }
    steps.extend(matches.into_iter().map(|(rule, it)| match it {
        Some(it) if it.rule == *rule => Step::Keep(it.id),
        Some(it) => Step::Replace(it.id, rule.clone()),
        None => Step::Add(rule.clone()),
    }));
    steps
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
        // A name that goes to another is free by then.
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
        // Also to one that is new.
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
            [Step::Remove(0), Step::Add(moved)]
        );
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
