//! Has a running proxy carry what is wanted: what can be had is carried, what can't is shown and
//! tried again.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use crate::address::Address;
use crate::app::config::{Existing, Step, plan};
#[cfg(unix)]
use crate::app::control::FailedForwards;
use crate::error::Error;
use crate::lock::lock;
use crate::proxy::{ForwardId, Handle, Rule};

#[cfg(unix)]
use super::occupant::Occupants;
use super::summary::{Failed, Retried, Summary, TRY_AGAIN};

/// What makes a proxy that runs carry what is wanted. Forwards that were added by hand are left
/// alone.
#[derive(Debug)]
pub(super) struct Reconciler {
    handle: Handle,
    /// The forwards that were made here. Locked while the proxy is being changed, which may take
    /// long.
    ours: Mutex<HashSet<ForwardId>>,
    /// What is wanted and could not be had, in the order in which it is wanted. Never locked for
    /// long.
    pending: Mutex<Vec<PendingForward>>,
}

/// A forward that is wanted and isn't carried.
#[derive(Clone, Debug)]
// Elsewhere there is no control socket to show it.
#[cfg_attr(not(unix), allow(dead_code))]
pub(super) struct PendingForward {
    rule: Rule,
    /// What it waits for is expected to be missing at times. Otherwise it should be there.
    waits: bool,
    /// The error, from which the next one is known to be the same.
    error: String,
    /// The same, with what was found out about it.
    why: String,
    since: SystemTime,
    retried: Retried,
}

/// Why the proxy is to be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Occasion {
    /// Somebody wants it as it is said now.
    Asked,
    /// What could not be had may be there now. Nothing else is touched.
    Retry,
}

impl Reconciler {
    pub(super) fn new(handle: Handle) -> Reconciler {
        Reconciler {
            handle,
            ours: Mutex::default(),
            pending: Mutex::default(),
        }
    }

    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }

    fn pending(&self) -> MutexGuard<'_, Vec<PendingForward>> {
        lock(&self.pending)
    }

    /// Whether something that is wanted could not be had.
    pub(super) fn has_pending(&self) -> bool {
        !self.pending().is_empty()
    }

    /// Calls `f` while nothing that is wanted changes, with the forwards that were made here.
    #[cfg(unix)]
    pub(super) fn while_unchanged(&self, f: &mut dyn FnMut(&HashSet<ForwardId>)) {
        f(&lock(&self.ours));
    }

    /// Why the first could not be had that doesn't wait for what is expected to be missing.
    pub(super) fn failure(&self) -> Option<String> {
        let pending = self.pending();
        let failed = pending.iter().find(|it| !it.waits);
        failed.map(|it| it.why.clone())
    }

    /// Returns all that could not be had, but what waits for what is expected to be missing; each
    /// with why, and what is done about it.
    #[cfg(unix)]
    pub(super) fn failures(&self) -> FailedForwards {
        let mut pending = self.pending().clone();
        pending.retain(|it| !it.waits);
        let failed = failed(&pending).into_iter();
        failed.map(|it| (it.name.clone(), it.reason())).collect()
    }

    /// The names of what could not be had, and why.
    pub(super) fn failed(&self) -> Vec<Failed> {
        failed(&self.pending())
    }

    /// The forwards that are wanted and can't be had now.
    #[cfg(unix)]
    pub(super) fn shown(&self) -> Vec<crate::app::control::ForwardInfo> {
        let forward = |it: &PendingForward| {
            crate::app::control::ForwardInfo::pending(&it.rule, it.waits, &it.why, it.since)
        };
        self.pending().iter().map(forward).collect()
    }

    /// Tries again what could not be had; what is new about it.
    pub(super) fn try_again(
        &self,
        wanted: &[Rule],
        waits_for: &dyn Fn(&Rule) -> Option<String>,
    ) -> Summary {
        let before: HashSet<Failed> = self.failed().into_iter().collect();
        let mut summary = self.apply(wanted, waits_for, Occasion::Retry);
        summary.failed.retain(|it| !before.contains(it));
        summary
    }

    /// Makes the proxy carry what is wanted, and says what has come of it. `waits_for` says why a
    /// rule can't be had yet, if that is known.
    pub(super) fn apply(
        &self,
        wanted: &[Rule],
        waits_for: &dyn Fn(&Rule) -> Option<String>,
        occasion: Occasion,
    ) -> Summary {
        let mut ours = lock(&self.ours);
        let before = self.pending().clone();
        let now = self.handle.forwards();
        let existing: Vec<_> = now
            .iter()
            .map(|it| Existing {
                id: it.id,
                rule: it.rule.clone(),
                ours: ours.contains(&it.id),
            })
            .collect();
        let mut change = Change {
            handle: &self.handle,
            ours: &mut ours,
            rules: now.iter().map(|it| (it.id, &it.rule)).collect(),
            waits_for,
            #[cfg(unix)]
            occasion,
            #[cfg(unix)]
            occupants: Occupants::default(),
            summary: Summary::default(),
            pending: Vec::new(),
        };
        let before: HashMap<_, &PendingForward> = before
            .iter()
            .map(|it| (identity_of_wish(&it.rule), it))
            .collect();
        let is_pending = |rule: &Rule| before.get(&identity_of_wish(rule)).copied();
        for step in plan(&existing, wanted) {
            match (&step, occasion) {
                // Somebody has removed it by hand.
                (Step::Add(rule), Occasion::Retry) if is_pending(rule).is_none() => {}
                // It would take what they have from those who are there, again and again.
                (Step::Exchange(group), Occasion::Retry) => {
                    let as_before = group.iter().filter_map(|(_, rule)| is_pending(rule));
                    change.pending.extend(as_before.cloned());
                }
                _ => change.make(step),
            }
        }
        let Change {
            mut summary,
            mut pending,
            ..
        } = change;
        summary.join_moves();
        // The first of those that are the same.
        let places = wanted.iter().enumerate().rev();
        let places: HashMap<_, usize> = places
            .map(|(at, rule)| (identity_of_wish(rule), at))
            .collect();
        pending.sort_by_key(|it| places.get(&identity_of_wish(&it.rule)).copied());
        for it in &mut pending {
            if let Some(was) = is_pending(&it.rule) {
                it.since = was.since;
                if it.error == was.error && occasion == Occasion::Retry {
                    it.why.clone_from(&was.why);
                }
            }
        }
        summary.failed = failed(&pending);
        *self.pending() = pending;
        summary
    }
}

/// What is the same of rules that are the same wish.
fn identity_of_wish(rule: &Rule) -> (&Option<String>, &Address) {
    (&rule.name, &rule.listen)
}

/// The names, and why those can't be had.
fn failed(pending: &[PendingForward]) -> Vec<Failed> {
    let failed = |it: &PendingForward| Failed {
        name: name_of(&it.rule),
        why: it.why.clone(),
        waits: it.waits,
        retried: it.retried,
    };
    pending.iter().map(failed).collect()
}

pub(super) fn name_of(rule: &Rule) -> String {
    rule.name.clone().unwrap_or_else(|| rule.listen.to_string())
}

/// A change that is being made.
struct Change<'a> {
    handle: &'a Handle,
    ours: &'a mut HashSet<ForwardId>,
    /// Those that there were before.
    rules: HashMap<ForwardId, &'a Rule>,
    waits_for: &'a dyn Fn(&Rule) -> Option<String>,
    #[cfg(unix)]
    occasion: Occasion,
    #[cfg(unix)]
    occupants: Occupants,
    summary: Summary,
    pending: Vec<PendingForward>,
}

impl Change<'_> {
    fn make(&mut self, step: Step<ForwardId>) {
        match step {
            Step::Keep(id) => {
                self.ours.insert(id);
                self.summary.kept.push(name_of(self.rules[&id]));
            }
            Step::Remove(id) => self.remove(id),
            Step::Unname(id) => {
                let mut rule = self.rules[&id].clone();
                rule.name = None;
                // If it can't be, neither can what follows, which says so.
                let _ = self.handle.replace(id, rule);
            }
            Step::Replace(id, rule) => {
                self.ours.insert(id);
                match self.handle.replace(id, rule.clone()) {
                    Ok(()) => self.summary.changed.push(name_of(&rule)),
                    Err(e) => self.fails(rule, e),
                }
            }
            Step::Move(id, rule) => self.move_to(id, rule),
            Step::Exchange(group) => self.exchange(group),
            Step::Add(rule) => self.add(rule),
        }
    }

    fn fails(&mut self, rule: Rule, error: Error) {
        let text = error.to_string();
        self.is_pending(rule, text);
        // Every 2 s the others would be asked too often.
        #[cfg(unix)]
        if self.occasion == Occasion::Asked
            && let Some(it) = self.pending.last_mut()
        {
            it.why = self.occupants.name_in(error).to_string();
        }
    }

    fn is_pending(&mut self, rule: Rule, why: String) {
        self.pending.push(PendingForward {
            rule,
            waits: false,
            error: why.clone(),
            why,
            since: SystemTime::now(),
            retried: Retried::Soon,
        });
    }

    /// Whether a rule has to wait, which is noted then.
    fn has_to_wait(&mut self, rule: &Rule) -> bool {
        let Some(why) = (self.waits_for)(rule) else {
            return false;
        };
        self.is_pending(rule.clone(), why);
        if let Some(it) = self.pending.last_mut() {
            it.waits = true;
        }
        true
    }

    fn add(&mut self, rule: Rule) {
        if self.has_to_wait(&rule) {
            return;
        }
        match self.handle.add(rule.clone()) {
            Ok(id) => {
                self.ours.insert(id);
                self.summary.added.push(name_of(&rule));
            }
            Err(e) => self.fails(rule, e),
        }
    }

    /// Listens at the new place, and then no more at the old one, which stays if the new one can't
    /// be had.
    fn move_to(&mut self, id: ForwardId, rule: Rule) {
        if self.has_to_wait(&rule) {
            return;
        }
        // Its name and its reservation are the old one's until that is gone.
        let mut bare = rule.clone();
        bare.name = None;
        bare.reserved = 0;
        match self.handle.add(bare) {
            Err(e) => self.fails(rule, e),
            Ok(new) => {
                self.ours.insert(new);
                self.remove(id);
                self.summary.added.push(name_of(&rule));
                if let Err(e) = self.handle.replace(new, rule.clone()) {
                    self.fails(rule, e);
                }
            }
        }
    }

    /// Closes all, and listens at their new places; who can't is put back.
    fn exchange(&mut self, group: Vec<(ForwardId, Rule)>) {
        let mut group = group;
        group.retain(|(_, rule)| !self.has_to_wait(rule));
        for (id, _) in &group {
            self.close(*id);
        }
        let mut left = Vec::new();
        for (id, rule) in group {
            match self.handle.add(rule.clone()) {
                Ok(new) => {
                    self.ours.insert(new);
                    self.summary.added.push(name_of(&rule));
                    self.note_removed(id);
                }
                Err(e) => left.push((id, rule, e)),
            }
        }
        for (id, rule, error) in left {
            match self.handle.add(self.rules[&id].clone()) {
                Ok(old) => {
                    self.ours.insert(old);
                    self.fails(rule, error);
                    if let Some(it) = self.pending.last_mut() {
                        it.retried = Retried::OnReload;
                    }
                }
                Err(back) => {
                    self.note_removed(id);
                    let why = format!("{error}; and it could not be put back: {back}");
                    self.is_pending(rule, why);
                }
            }
        }
    }

    fn remove(&mut self, id: ForwardId) {
        self.close(id);
        self.note_removed(id);
    }

    fn close(&mut self, id: ForwardId) {
        self.ours.remove(&id);
        // That it is gone already is as good.
        let _ = self.handle.remove(id, Duration::MAX);
    }

    fn note_removed(&mut self, id: ForwardId) {
        let rule = self.rules[&id];
        let name = name_of(rule);
        let danger = describe_danger(&name, &rule.listen);
        let danger = danger.filter(|_| !has_keeper(self.handle));
        self.summary.warnings.extend(danger);
        self.summary.removed.push(name);
    }
}

/// Whether a keeper goes on to accept what guests dial.
fn has_keeper(handle: &Handle) -> bool {
    #[cfg(unix)]
    {
        handle.keeper().is_some_and(|keeper| keeper.pid.is_some())
    }
    #[cfg(not(unix))]
    {
        let _ = handle;
        false
    }
}

/// What is dangerous about a forward's being removed, if there is no keeper.
pub(super) fn describe_danger(name: &str, listen: &Address) -> Option<String> {
    let (vm, port) = (listen.hyperkit_vm()?, listen.guest_port()?);
    let directory = vm.state_dir.display();
    Some(format!(
        "{name} is gone: if the guest of {directory} goes on dialling port {port}, on which nobody listens any more, its VM may hang"
    ))
}

/// A thread that tries again what could not be had, and reloads when it is told to. It may hang in
/// either, as a disk does: nobody ever waits for it. Dropped, it ends when it can.
#[derive(Debug)]
pub(super) struct RetryThread {
    reload: SyncSender<()>,
}

impl RetryThread {
    pub(super) fn start(
        mut try_again: impl FnMut() + Send + 'static,
        mut reload: impl FnMut() + Send + 'static,
    ) -> io::Result<RetryThread> {
        // One that is to come reads what is there then: more need not be asked for.
        let (sender, asked) = sync_channel(1);
        let run = move || {
            loop {
                match asked.recv_timeout(TRY_AGAIN) {
                    Ok(()) => reload(),
                    Err(RecvTimeoutError::Timeout) => try_again(),
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        };
        let thread = std::thread::Builder::new().name("hvsock-retry".to_owned());
        thread.spawn(run)?;
        Ok(RetryThread { reload: sender })
    }

    /// What asks it to reload, without waiting for anything.
    pub(super) fn reloader(&self) -> impl Fn() + Send + use<> {
        let reload = self.reload.clone();
        move || {
            // If one is asked for already, it comes late enough.
            let _ = reload.try_send(());
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_reload_that_hangs_keeps_nobody_who_asks_for_another() {
        let (begins, begun) = channel();
        let (goes_on, hangs) = channel::<()>();
        let reload = move || {
            begins.send(()).unwrap();
            let _ = hangs.recv();
        };
        let thread = RetryThread::start(|| (), reload).unwrap();
        let ask = thread.reloader();
        ask();
        begun.recv().unwrap();
        for _ in 0..100 {
            ask();
        }
        drop((ask, thread));
        // All that were asked for meanwhile are one.
        drop(goes_on);
        begun.recv().unwrap();
        begun.recv().unwrap_err();
    }
}
