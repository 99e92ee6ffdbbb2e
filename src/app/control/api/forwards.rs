//! The calls about forwards: to list, show, add and remove them, alone and as ranges.

use std::collections::HashSet;
use std::io;
use std::time::Duration;

use tracing::{info, warn};

use crate::address::Address;
use crate::app::needs::{Finding, Weight, look_at_access, look_at_targets};
use crate::app::ranges::{BarePort, TAKEN_IN_RANGE, are_a_range, expand, name_of};
use crate::app::values::parse_local_addresses;
use crate::error::counted;
use crate::proxy::{ForwardId, ForwardStatus, Rule};

use super::super::added::Added;
use super::super::endpoint::describe_own_place;
use super::super::lookup::ForwardLookup;
use super::super::model::{ForwardInfo, RuleBody, read_rules};
use super::super::problem::ApiProblem;
use super::state::{Api, ApiResult, json};

impl Api {
    pub(super) fn forwards(&self) -> Vec<ForwardInfo> {
        // First: one that is carried at last just now has its row. It, and one that can't be
        // changed, have one only.
        let mut pending = (self.actions.pending)();
        let carried = self.handle.forwards();
        let is_carried = |it: &ForwardInfo| {
            let same = |other: &ForwardStatus| {
                other.rule.name == it.name && other.rule.listen.to_string() == it.listen
            };
            carried.iter().any(same)
        };
        pending.retain(|it| !is_carried(it));
        carried
            .iter()
            .map(ForwardInfo::from)
            .chain(pending)
            .collect()
    }

    fn forward(&self, name: &str) -> Result<ForwardInfo, ApiProblem> {
        let pending = self.pending(name);
        let carried = self.find(name).map(|it| ForwardInfo::from(&it));
        carried.or_else(|e| pending.ok_or(e))
    }

    /// Returns a forward, or those of a range that are there.
    pub(super) fn show(&self, name: &str) -> ApiResult {
        let none = match self.forward(name) {
            Ok(found) => return json(200, &found),
            Err(none) => none,
        };
        let forwards = self.handle.forwards();
        let range = self.find_range(&forwards, name, none)?.into_iter();
        json(200, &range.map(ForwardInfo::from).collect::<Vec<_>>())
    }

    /// Returns the forward of that name or address that is wanted and can't be had now.
    fn pending(&self, name: &str) -> Option<ForwardInfo> {
        let mut pending = (self.actions.pending)().into_iter();
        pending.find(|it| it.name.as_deref() == Some(name) || it.listen == name)
    }

    /// Returns the forwards of that range, by its addresses or its name, that are wanted and can't
    /// be had now.
    fn pending_of_range(&self, name: &str) -> Vec<ForwardInfo> {
        let mut pending = (self.actions.pending)();
        match &expand(name, BarePort::Tcp).unwrap_or_default()[..] {
            [_, _, ..] => {
                let addresses = parse_local_addresses(name).unwrap_or_default();
                let addresses: HashSet<String> = addresses.iter().map(Address::to_string).collect();
                pending.retain(|it| addresses.contains(&it.listen));
            }
            _ => pending.retain(|it| {
                let listen = it.listen.parse().ok();
                listen.is_some_and(|listen| it.name == Some(name_of(name, &listen)))
            }),
        }
        pending
    }

    /// Returns the forward of that name, or else that listens there, or else that has this id, or
    /// else the only one that listens on this TCP port.
    fn find(&self, name: &str) -> Result<ForwardStatus, ApiProblem> {
        let forwards = self.handle.forwards();
        ForwardLookup::new(&forwards).find(name).cloned()
    }

    /// Adds a forward, or those of a range: all of them, or none.
    pub(super) fn add(&self, body: &[u8]) -> ApiResult {
        let usual = (self.actions.options)();
        let rules = read_rules(body, usual.clone())?;
        if let Some(finding) = rules.iter().find_map(|it| look_at_access(it, &usual)) {
            return Err(problem_of_finding(finding));
        }
        let forwards = self.handle.forwards();
        let asked = rules.len();
        let lookup = ForwardLookup::new(&forwards);
        let there = rules.iter().map(|rule| self.find_same(rule, &lookup));
        let there: Vec<Option<ForwardId>> = there.collect::<Result<_, _>>()?;
        let lacking = rules
            .iter()
            .zip(&there)
            .filter(|(_, there)| there.is_none());
        let lacking: Vec<Rule> = lacking.map(|(rule, _)| rule.clone()).collect();
        lacking
            .iter()
            .try_for_each(|it| self.refuse_own_place(it))?;
        let notes = look_at_targets_of(&lacking)?;
        let (mut ids, mut new) = (Vec::new(), Vec::new());
        for (rule, there) in rules.into_iter().zip(there) {
            if let Some(id) = there {
                ids.push(id);
                continue;
            }
            match self.handle.add(rule) {
                Ok(id) => {
                    ids.push(id);
                    new.push(id);
                }
                Err(e) => {
                    for id in new {
                        // That it is gone already is as good.
                        let _ = self.handle.remove(id, Duration::ZERO);
                    }
                    let is_taken = e.kind() == io::ErrorKind::AddrInUse;
                    let mut problem = ApiProblem::from(e);
                    if asked > 1 {
                        if is_taken {
                            problem = problem.with_remedy(TAKEN_IN_RANGE);
                        }
                        let all = counted(asked as u64, "forward");
                        problem.error += &format!(" (so that none of the {all} is added)");
                    }
                    return Err(problem);
                }
            }
        }
        let forwards = self.handle.forwards();
        self.added.note(&ids, &new, &forwards);
        let lookup = ForwardLookup::new(&forwards);
        let are_new: HashSet<ForwardId> = new.iter().copied().collect();
        let added = ids.iter().filter_map(|id| {
            let added = lookup.of_id(*id)?;
            if are_new.contains(id) {
                info!("added {}", describe(added));
            }
            Some(ForwardInfo::from(added))
        });
        let mut added: Vec<ForwardInfo> = added.collect();
        if let Some(first) = added.first_mut() {
            let own = first.note.take().into_iter();
            let notes: Vec<String> = own.chain(notes).collect();
            first.note = (!notes.is_empty()).then(|| notes.join("; "));
        }
        let status = if new.is_empty() { 200 } else { 201 };
        match &added[..] {
            [] => Err(ApiProblem::new(
                409,
                "it was removed at once by somebody else",
            )),
            [one] if asked == 1 => json(status, one),
            all => json(status, &all),
        }
    }

    /// Refuses a rule that listens where this process itself is controlled or looked at.
    fn refuse_own_place(&self, rule: &Rule) -> Result<(), ApiProblem> {
        let mut own = self.endpoints.iter();
        let Some(own) = own.find(|it| it.address.collides(&rule.listen)) else {
            return Ok(());
        };
        let why = describe_own_place(&rule.listen, own.service.phrase(), &own.address);
        Err(ApiProblem::new(409, why).with_remedy("choose another address"))
    }

    /// Returns the forwards of a range, which is written as an address or by its name. For forwards
    /// that weren't added by the control socket it is not known whether they were a range; they
    /// count as one if they look like one.
    ///
    /// # Errors
    /// Why the range is none; that none of it is there: `none`.
    fn find_range<'a>(
        &self,
        forwards: &'a [ForwardStatus],
        name: &str,
        none: ApiProblem,
    ) -> Result<Vec<&'a ForwardStatus>, ApiProblem> {
        let addresses = expand(name, BarePort::Tcp).map_err(|why| ApiProblem::new(400, why))?;
        if addresses.len() > 1 {
            let lookup = ForwardLookup::new(forwards);
            let found = addresses.iter().filter_map(|it| lookup.find(it).ok());
            let found: Vec<_> = found.collect();
            return if found.is_empty() {
                Err(none)
            } else {
                Ok(found)
            };
        }
        let is_named =
            |it: &&ForwardStatus| it.rule.name.as_ref() == Some(&name_of(name, &it.listen));
        let alike: Vec<_> = forwards.iter().filter(is_named).collect();
        let is_unknown = |it: &ForwardStatus| self.added.of(it.id).is_none();
        let is_of_range = |it: &ForwardStatus| self.added.of(it.id) == Some(Added::InRange);
        let unknown = alike.iter().filter(|it| is_unknown(it));
        let unknown: Vec<_> = unknown.map(|it| (&it.listen, &it.rule.connect)).collect();
        // One that can't be had now leaves a gap.
        let pending = self.pending_of_range(name).into_iter();
        let ends = |it: ForwardInfo| Some((it.listen.parse().ok()?, it.connect.parse().ok()?));
        let pending: Vec<(Address, Address)> = pending.filter_map(ends).collect();
        let pending = pending.iter().map(|(listen, connect)| (listen, connect));
        let unknown_are_meant = are_a_range(&unknown)
            || are_a_range(&[&unknown[..], &pending.collect::<Vec<_>>()].concat());
        let is_meant = |it: &&ForwardStatus| is_of_range(it) || unknown_are_meant && is_unknown(it);
        let (meant, others): (Vec<_>, Vec<_>) = alike.into_iter().partition(is_meant);
        match (&meant[..], &others[..]) {
            ([], []) => Err(none),
            ([], [one]) => {
                let remedy = format!("{} is no part of a range: give this name", label(one));
                Err(none.with_remedy(remedy))
            }
            ([], [first, .., last]) => Err(none.with_remedy(format!(
                "{} to {} are no range: give each by its own name",
                label(first),
                label(last)
            ))),
            _ => Ok(meant),
        }
    }

    /// Returns the forward that does what a rule asks for, if one does.
    ///
    /// # Errors
    /// That the rule can't be carried beside the forwards that are there, or may not be.
    fn find_same(
        &self,
        rule: &Rule,
        forwards: &ForwardLookup<'_>,
    ) -> Result<Option<ForwardId>, ApiProblem> {
        let named = rule.name.as_deref().and_then(|name| forwards.named(name));
        if let Some(there) = named.or_else(|| forwards.listening_on(&rule.listen)) {
            if there.rule == *rule {
                return Ok(Some(there.id));
            }
            let name = label(there);
            let differs = RuleBody::from(&there.rule).difference(&RuleBody::from(rule));
            let problem =
                ApiProblem::new(409, format!("another forward is there, {name}: {differs}"));
            return Err(problem
                .with_remedy("remove that one first, or take another name and another address"));
        }
        if rule.connect.transport().runs_program && !(self.actions.allows_exec)() {
            let why = format!(
                "{}: no program may be started by who asks here",
                rule.connect
            );
            let remedy = "write allow-exec = true in the file of `hvsock run`, or start it with --allow-exec";
            return Err(ApiProblem::new(403, why).with_remedy(remedy));
        }
        Ok(None)
    }

    /// Removes a forward, or those of a range that are there.
    pub(super) fn remove(&self, name: &str, grace: Duration) -> ApiResult {
        let pending = self.pending(name);
        let forwards = self.handle.forwards();
        let none = match ForwardLookup::new(&forwards).find(name) {
            Ok(found) => {
                self.handle.remove(found.id, grace)?;
                info!("removed {}", describe(found));
                return json(200, &ForwardInfo::from(found));
            }
            Err(none) => none,
        };
        if let Some(it) = pending {
            return Err(self.not_carried(name, it));
        }
        let range = self.find_range(&forwards, name, none);
        let range = range.map_err(|none| {
            let first = self.pending_of_range(name).into_iter().next();
            first.map_or(none, |it| self.not_carried(name, it))
        })?;
        for found in &range {
            self.handle.remove(found.id, grace)?;
            info!("removed {}", describe(found));
        }
        let removed: Vec<ForwardInfo> = range.into_iter().map(ForwardInfo::from).collect();
        json(200, &removed)
    }

    /// Returns why a forward that is wanted and can't be had now is not removed.
    fn not_carried(&self, name: &str, it: ForwardInfo) -> ApiProblem {
        let why = it.why.unwrap_or(it.state);
        let problem = ApiProblem::new(409, format!("{name:?} isn't carried: {why}"));
        problem.with_remedy(match self.actions.reload {
            Some(_) => "the file asks for it: take it out there, and reload",
            None => "it was asked for at the start, and is tried again",
        })
    }
}

/// Logs and returns what the targets of rules lack now. Refuses a target that can never work.
fn look_at_targets_of(rules: &[Rule]) -> Result<Vec<String>, ApiProblem> {
    let findings = look_at_targets(rules).unwrap_or_else(|why| {
        warn!("the targets were not looked at: {why}");
        Vec::new()
    });
    let mut notes = Vec::new();
    for finding in findings {
        match finding.weight {
            Weight::Mistake => return Err(problem_of_finding(finding)),
            Weight::Note => {
                warn!("{finding}");
                notes.push(finding.to_string());
            }
        }
    }
    Ok(notes)
}

fn problem_of_finding(finding: Finding) -> ApiProblem {
    ApiProblem::new(400, finding.what).with_remedy(finding.remedy)
}

/// Describes a forward on one line: its name, if it has one, and both its addresses.
fn describe(forward: &ForwardStatus) -> String {
    let name = forward.rule.name.as_ref();
    let name = name.map_or(String::new(), |name| format!("{name:?}: "));
    format!("{name}{} -> {}", forward.listen, forward.rule.connect)
}

/// Returns what a forward is called.
fn label(forward: &ForwardStatus) -> String {
    match &forward.rule.name {
        Some(name) => format!("{name:?}"),
        None => forward.listen.to_string(),
    }
}
