//! Makes a running proxy carry the wanted rules. Rules that can't be carried now are shown as
//! pending and retried.

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

/// Makes a running proxy carry the wanted rules. Forwards that were added by hand are left alone.
#[derive(Debug)]
pub(super) struct Reconciler {
    handle: Handle,
    /// The forwards that this reconciler has made. Locked while the proxy is being changed, which
    /// may take long.
    ours: Mutex<HashSet<ForwardId>>,
    /// The rules that can't be carried now, in the order of the wanted ones. Never locked for long.
    pending: Mutex<Vec<PendingForward>>,
}

/// A forward that is wanted and isn't carried.
#[derive(Clone, Debug)]
// On other systems there is no control socket to show it.
#[cfg_attr(not(unix), allow(dead_code))]
pub(super) struct PendingForward {
    rule: Rule,
    /// Whether what it lacks is expected to be missing at times, such as a VM.
    waits: bool,
    /// The error, by which the same error is recognised later.
    error: String,
    /// The error, with what was found out about it.
    why: String,
    since: SystemTime,
    retried: Retried,
}

/// Why the proxy is to be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Occasion {
    /// A user has asked for it.
    Asked,
    /// What was missing may be there now. Only pending forwards are changed.
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

    /// Returns whether a wanted rule can't be carried now.
    pub(super) fn has_pending(&self) -> bool {
        !self.pending().is_empty()
    }

    /// Calls `f` with the forwards that this reconciler has made, while nothing changes them.
    #[cfg(unix)]
    pub(super) fn while_unchanged(&self, f: &mut dyn FnMut(&HashSet<ForwardId>)) {
        f(&lock(&self.ours));
    }

    /// Returns why the first pending forward failed, other than those that wait for a missing VM.
    pub(super) fn failure(&self) -> Option<String> {
        let pending = self.pending();
        let failed = pending.iter().find(|it| !it.waits);
        failed.map(|it| it.why.clone())
    }

    /// Returns the pending forwards other than those that wait for a missing VM, each with the
    /// reason and with what is done about it.
    #[cfg(unix)]
    pub(super) fn failures(&self) -> FailedForwards {
        let mut pending = self.pending().clone();
        pending.retain(|it| !it.waits);
        let failed = failed(&pending).into_iter();
        failed.map(|it| (it.name.clone(), it.reason())).collect()
    }

    /// Returns the names of the pending forwards, and the reasons.
    pub(super) fn failed(&self) -> Vec<Failed> {
        failed(&self.pending())
    }

    /// Returns the pending forwards.
    #[cfg(unix)]
    pub(super) fn shown(&self) -> Vec<crate::app::control::ForwardInfo> {
        let forward = |it: &PendingForward| {
            crate::app::control::ForwardInfo::pending(&it.rule, it.waits, &it.why, it.since)
        };
        self.pending().iter().map(forward).collect()
    }

    /// Retries the pending forwards. Returns what has changed.
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

    /// Makes the proxy carry the wanted rules. Returns what has changed. `waits_for` returns why a
    /// rule can't be carried yet, if that is known.
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
                // A user has removed it.
                (Step::Add(rule), Occasion::Retry) if is_pending(rule).is_none() => {}
                // Closing the group's listeners every 2 s would disturb the clients of those that
                // work.
                (Step::Exchange(group), Occasion::Retry) => {
                    let as_before = group.iter().filter_map(|(_, rule)| is_pending(rule));
                    change.pending.extend(as_before.cloned());
                }
                _ => change.apply_step(step),
            }
        }
        let Change {
            mut summary,
            mut pending,
            ..
        } = change;
        summary.join_moves();
        // The place of the first among equal rules.
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

/// Returns what identifies a rule in successive sets of wanted rules.
fn identity_of_wish(rule: &Rule) -> (&Option<String>, &Address) {
    (&rule.name, &rule.listen)
}

/// Returns the names of pending forwards, and the reasons.
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
    /// The forwards before the change.
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
    fn apply_step(&mut self, step: Step<ForwardId>) {
        match step {
            Step::Keep(id) => {
                self.ours.insert(id);
                self.summary.kept.push(name_of(self.rules[&id]));
            }
            Step::Remove(id) => self.remove(id),
            Step::Unname(id) => {
                let mut rule = self.rules[&id].clone();
                rule.name = None;
                // If it fails, so does the next step, which reports it.
                let _ = self.handle.replace(id, rule);
            }
            Step::Replace(id, rule) => {
                self.ours.insert(id);
                match self.handle.replace(id, rule.clone()) {
                    Ok(()) => self.summary.changed.push(name_of(&rule)),
                    Err(e) => self.note_failure(rule, e),
                }
            }
            Step::Move(id, rule) => self.move_to(id, rule),
            Step::Exchange(group) => self.exchange(group),
            Step::Add(rule) => self.add(rule),
        }
    }

    fn note_failure(&mut self, rule: Rule, error: Error) {
        let text = error.to_string();
        self.add_pending(rule, text);
        // The other hvsocks are not asked again at every retry (2 s).
        #[cfg(unix)]
        if self.occasion == Occasion::Asked
            && let Some(it) = self.pending.last_mut()
        {
            it.why = self.occupants.name_in(error).to_string();
        }
    }

    fn add_pending(&mut self, rule: Rule, why: String) {
        self.pending.push(PendingForward {
            rule,
            waits: false,
            error: why.clone(),
            why,
            since: SystemTime::now(),
            retried: Retried::Soon,
        });
    }

    /// Returns whether a rule has to wait; if so, it is added to the pending ones.
    fn defer_if_waiting(&mut self, rule: &Rule) -> bool {
        let Some(why) = (self.waits_for)(rule) else {
            return false;
        };
        self.add_pending(rule.clone(), why);
        if let Some(it) = self.pending.last_mut() {
            it.waits = true;
        }
        true
    }

    fn add(&mut self, rule: Rule) {
        if self.defer_if_waiting(&rule) {
            return;
        }
        match self.handle.add(rule.clone()) {
            Ok(id) => {
                self.ours.insert(id);
                self.summary.added.push(name_of(&rule));
            }
            Err(e) => self.note_failure(rule, e),
        }
    }

    /// Listens at the new address, then closes the listener at the old one. The old one stays if
    /// the new one can't be bound.
    fn move_to(&mut self, id: ForwardId, rule: Rule) {
        if self.defer_if_waiting(&rule) {
            return;
        }
        // Name and reservation belong to the old forward until it is removed.
        let mut bare = rule.clone();
        bare.name = None;
        bare.reserved = 0;
        match self.handle.add(bare) {
            Err(e) => self.note_failure(rule, e),
            Ok(new) => {
                self.ours.insert(new);
                self.remove(id);
                self.summary.added.push(name_of(&rule));
                if let Err(e) = self.handle.replace(new, rule.clone()) {
                    self.note_failure(rule, e);
                }
            }
        }
    }

    /// Closes all of a group, then listens at their new addresses. Those that fail get their old
    /// ones back.
    fn exchange(&mut self, group: Vec<(ForwardId, Rule)>) {
        let mut group = group;
        group.retain(|(_, rule)| !self.defer_if_waiting(rule));
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
                    self.note_failure(rule, error);
                    if let Some(it) = self.pending.last_mut() {
                        it.retried = Retried::OnReload;
                    }
                }
                Err(back) => {
                    self.note_removed(id);
                    let why = format!("{error}; and it could not be put back: {back}");
                    self.add_pending(rule, why);
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
        // If it is gone already, nothing is to be done.
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

/// Returns whether a keeper will go on accepting what guests dial.
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

/// Describes the danger of removing a forward without a keeper, if there is any.
pub(super) fn describe_danger(name: &str, listen: &Address) -> Option<String> {
    let (vm, port) = (listen.hyperkit_vm()?, listen.guest_port()?);
    let directory = vm.state_dir.display();
    Some(format!(
        "{name} is gone: if the guest of {directory} goes on dialling port {port}, on which nobody listens any more, its VM may hang"
    ))
}

/// A thread that retries pending forwards, and reloads on request. It may hang in either on a disk,
/// so nothing ever waits for it. Once dropped, it ends when it can.
#[derive(Debug)]
pub(super) struct RetryThread {
    reload: SyncSender<()>,
}

impl RetryThread {
    pub(super) fn start(
        mut try_again: impl FnMut() + Send + 'static,
        mut reload: impl FnMut() + Send + 'static,
    ) -> io::Result<RetryThread> {
        // A reload that has not begun yet will read the newest file, so one waiting request is
        // enough.
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

    /// Returns a function that requests a reload, and never blocks.
    pub(super) fn reloader(&self) -> impl Fn() + Send + use<> {
        let reload = self.reload.clone();
        move || {
            // If a request is waiting already, that reload comes late enough.
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
    fn a_hanging_reload_blocks_no_other_request() {
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
        // All requests made meanwhile are one reload.
        drop(goes_on);
        begun.recv().unwrap();
        begun.recv().unwrap_err();
    }
}
