//! Who changes the proxy while it runs, and the world around it; and who ends it.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use crate::engine::id::ForwardId;
use crate::engine::rule::{Rule, VmLimits};
use crate::error::{Error, Result};
use crate::proxy::controller::Controller;

use super::driver::{SimDriver, place_of};
use super::judge::Hazard;
use super::kernel::{ListenerKey, Owner, Place};
use super::stage::{Actor, Stage};
use super::vm::VmPlan;
use super::world::Pace;

/// What an operator does, or what happens to the machine. Rules are called by their numbers.
#[derive(Clone, Debug)]
pub(super) enum Act {
    /// Takes a rule out; its connections have that time.
    Remove(usize, Duration),
    /// Adds it (again).
    Add(usize),
    /// Gives it another target: that of another rule.
    Replace(usize, usize),
    /// Gives its socket other permissions.
    ChangeMode(usize, u32),
    /// Takes some out and others in, as a reload does: what listens before first.
    Move(usize, usize),
    /// Looks at the forwards and the connections.
    Look,
    /// Closes one of the connections.
    Close(usize),
    /// Somebody shuts its listener down.
    Break(usize),
    /// Somebody removes the file of its socket.
    RemoveFile(usize),
    /// Another program takes the place of its socket's file.
    TakeFile(usize),
    /// The machine sleeps.
    Sleep(Duration),
    /// A worker stands still for that time, after it has got its events; the others go on.
    Stall(usize, Duration),
    /// The VM of that state directory may have so many connections from now on.
    LimitVm(usize, usize),
    /// What may block is done so from now on.
    Housekeeper(Pace),
    /// The machine has that many descriptors left for the process from now on.
    Descriptors(usize),
    /// The VM of that CID is killed.
    LoseCid(u32),
    /// Whether a poller can watch another listener from now on.
    CanWatch(bool),
}

pub(super) struct Operator {
    controller: Controller<SimDriver>,
    /// The rules of the plan, and the forwards that they are now.
    rules: Vec<(Rule, Option<ForwardId>)>,
    /// The targets that they lead to.
    targets: Vec<Option<usize>>,
    acts: VecDeque<(Duration, Act)>,
    vms: Vec<VmPlan>,
    me: usize,
}

impl Operator {
    pub(super) fn new(
        controller: Controller<SimDriver>,
        rules: Vec<(Rule, Option<ForwardId>)>,
        targets: Vec<Option<usize>>,
        mut acts: Vec<(Duration, Act)>,
        vms: Vec<VmPlan>,
        me: usize,
    ) -> Operator {
        acts.sort_by_key(|(at, _)| *at);
        Operator {
            controller,
            rules,
            targets,
            acts: acts.into(),
            vms,
            me,
        }
    }

    fn endanger(&self, rule: usize, stage: &Rc<Stage>) {
        let now = stage.now();
        stage.judge().hazard(now, Hazard::Rule(rule));
    }

    /// The listener that is at a rule's place now.
    fn listener_of(&self, rule: usize, stage: &Rc<Stage>) -> Option<ListenerKey> {
        stage
            .kernel()
            .listener_at(&place_of(&self.rules[rule].0.listen))
    }

    fn carry_out(&mut self, act: &Act, stage: &Rc<Stage>) {
        stage.log(|| format!("operator: {act:?}"));
        match *act {
            Act::Remove(rule, grace) => self.remove(rule, grace, stage),
            Act::Add(rule) => self.add(rule, stage),
            Act::Replace(rule, other) => self.replace(rule, other, None, stage),
            Act::ChangeMode(rule, mode) => self.replace(rule, rule, Some(mode), stage),
            Act::Move(from, to) => {
                self.add(to, stage);
                self.remove(from, Duration::from_secs(1), stage);
            }
            Act::Look => self.look(stage),
            Act::Close(number) => self.close(number, stage),
            // Those who wait there are cut off: of guests that hurts their device.
            Act::Break(rule) if self.rules[rule].0.listen.transport().needs_graceful_close => {}
            Act::Break(rule) => {
                self.endanger(rule, stage);
                stage.judge().cuts(rule);
                if let Some(key) = self.listener_of(rule, stage) {
                    stage.kernel().break_listener(key);
                }
            }
            Act::RemoveFile(rule) => {
                if let Place::Path(path) = place_of(&self.rules[rule].0.listen) {
                    self.endanger(rule, stage);
                    stage.world.has_lost_files.set(true);
                    stage.kernel().files.remove(&path);
                }
            }
            Act::TakeFile(rule) => {
                if let Place::Path(path) = place_of(&self.rules[rule].0.listen) {
                    self.endanger(rule, stage);
                    stage.world.has_lost_files.set(true);
                    let mut kernel = stage.kernel();
                    kernel.files.remove(&path);
                    let taken = kernel.listen(&Place::Path(path), Owner::Actor(self.me));
                    // It goes again at once, and leaves the file.
                    if let Ok(key) = taken {
                        kernel.close_listener(key);
                    }
                }
            }
            Act::Sleep(time) => {
                let now = stage.now();
                stage.judge().hazard(now, Hazard::All);
                stage.sleep(time);
            }
            Act::Stall(worker, time) => {
                let now = stage.now();
                stage.judge().hazard(now, Hazard::All);
                stage.world.may_hang.set(true);
                stage.stall(worker, now + time);
            }
            Act::LimitVm(vm, connections) => {
                let now = stage.now();
                stage.judge().hazard(now, Hazard::All);
                if let Some(vm) = self.vms.get(vm) {
                    let mut limits = VmLimits::new(vm.vm());
                    limits.connections = Some(connections);
                    limits.unanswered = Some(vm.unanswered as usize);
                    self.controller.limit_vm(&limits);
                }
            }
            Act::Housekeeper(pace) => {
                if matches!(pace, Pace::Hangs(_)) {
                    stage.world.may_hang.set(true);
                    let now = stage.now();
                    stage.judge().hazard(now, Hazard::All);
                }
                stage.world.housekeeper.set(pace);
            }
            Act::Descriptors(most) => {
                let now = stage.now();
                stage.judge().hazard(now, Hazard::All);
                stage.kernel().left = most;
            }
            Act::LoseCid(cid) => stage.kernel().lose_cid(cid),
            Act::CanWatch(can_watch) => stage.kernel().can_watch = can_watch,
        }
    }

    fn remove(&mut self, rule: usize, grace: Duration, stage: &Rc<Stage>) {
        self.endanger(rule, stage);
        let Some(id) = self.rules[rule].1 else {
            return;
        };
        stage.judge().audit.removed(id.0, Duration::MAX);
        stage.judge().ledger.unbound(id.0);
        stage.judge().cuts(rule);
        let keeps = stage.world.keeps_slots.replace(false);
        let removed = self.controller.remove(id, grace);
        stage.world.keeps_slots.set(keeps);
        stage.log(|| format!("operator: rule {rule} is removed: {removed:?}"));
        self.rules[rule].1 = None;
        check_answered(&removed, stage);
        // A worker that gave no answer begins to count when it goes on.
        let is_late = |e: &Error| e.kind() == std::io::ErrorKind::TimedOut;
        if !matches!(stage.world.housekeeper.get(), Pace::Hangs(_)) {
            let now = stage.now();
            let mut judge = stage.judge();
            match &removed {
                Ok(()) => judge.audit.removed(id.0, now + grace),
                Err(e) if is_late(e) => judge.audit.removed_late(id.0, grace),
                Err(_) => {}
            }
        }
        if removed.is_ok() && !self.controller.is_stopping() {
            let left = self.listener_of(rule, stage);
            assert!(left.is_none(), "rule {rule} is removed, and still listens");
            stage.judge().count("rules removed");
        }
    }

    fn add(&mut self, rule: usize, stage: &Rc<Stage>) {
        if self.rules[rule].1.is_some() {
            return;
        }
        let keeps = stage.world.keeps_slots.replace(false);
        let added = self.controller.add(self.rules[rule].0.clone());
        stage.world.keeps_slots.set(keeps);
        check_answered(&added, stage);
        stage.log(|| format!("operator: rule {rule} is added: {added:?}"));
        match added {
            Ok(id) => {
                self.rules[rule].1 = Some(id);
                stage.judge().is_forward(rule, id.0);
                self.is_bounded(id, stage);
                stage.judge().count("rules added");
            }
            Err(_) => {
                // What was not added does not happen: nobody listens there, or it was there before.
                let known = |id| {
                    self.controller
                        .forwards()
                        .iter()
                        .any(|it| Some(it.id) == id)
                };
                assert!(!known(self.rules[rule].1));
                self.endanger(rule, stage);
                stage.judge().cuts(rule);
                stage.judge().ledger.has_failed_additions = true;
            }
        }
    }

    /// Its bound holds for those who come from now on.
    fn is_bounded(&self, id: ForwardId, stage: &Rc<Stage>) {
        let forwards = self.controller.shared.forwards();
        if let Some(forward) = forwards.iter().find(|it| it.id == id) {
            let since = stage.now().max(stage.stalled_until());
            stage.judge().ledger.bound(forward, Some(since));
        }
    }

    /// Gives a forward the target of another rule and its bounds, or its own again.
    fn replace(&mut self, rule: usize, other: usize, mode: Option<u32>, stage: &Rc<Stage>) {
        let Some(id) = self.rules[rule].1 else {
            return;
        };
        if other != rule {
            self.endanger(rule, stage);
        }
        let mut new = self.rules[rule].0.clone();
        let like = self.rules[other].0.clone();
        (new.connect, new.timeouts) = (like.connect, like.timeouts);
        (new.connections, new.reserved) = (like.connections, like.reserved);
        new.mode = mode.unwrap_or(new.mode);
        let target = self.targets[other];
        let before = stage.now();
        stage.judge().leads(rule, before, target);
        stage.judge().ledger.unbound(id.0);
        let keeps = stage.world.keeps_slots.replace(false);
        let replaced = self.controller.replace(id, new.clone());
        stage.judge().audit.unsettles(id.0);
        stage.world.keeps_slots.set(keeps);
        if let Err(e) = &replaced
            && !e.to_string().contains("it has begun")
        {
            let now = stage.now();
            stage.judge().leads_alone(rule, now, self.targets[rule]);
        }
        check_answered(&replaced, stage);
        stage.log(|| format!("operator: rule {rule} is replaced: {replaced:?}"));
        if replaced.is_ok() {
            let now = stage.now();
            stage.judge().leads_alone(rule, now, target);
            self.is_bounded(id, stage);
            let forwards = self.controller.forwards();
            let told = forwards.iter().find(|it| it.id == id);
            assert_eq!(told.map(|it| &it.rule.connect), Some(&new.connect));
            self.rules[rule].0 = new;
            self.targets[rule] = target;
            stage.judge().count("rules replaced");
        }
    }

    /// Closes one of the connections that there are; once more, it may be gone.
    fn close(&self, number: usize, stage: &Rc<Stage>) {
        let now = stage.now();
        stage.judge().hazard(now, Hazard::All);
        for rule in 0..self.rules.len() {
            stage.judge().cuts(rule);
        }
        let connections = self.controller.connections();
        let Some(it) = connections.get(number % connections.len().max(1)) else {
            return;
        };
        stage.judge().closed.insert(it.id.into());
        let closed = self.controller.close(it.id);
        stage.log(|| format!("operator: {:?} is closed: {closed:?}", it.id));
        check_answered(&closed, stage);
        if let Ok(status) = closed {
            assert_eq!(status.id, it.id);
            stage.judge().count("connections closed");
        }
    }

    /// What status says is so: it has the forwards that there are, and their counters add up.
    fn look(&self, stage: &Rc<Stage>) {
        let forwards = self.controller.forwards();
        for (rule, (_, id)) in self.rules.iter().enumerate() {
            let Some(id) = id else { continue };
            let told = forwards.iter().filter(|it| it.id == *id).count();
            assert_eq!(told, 1, "rule {rule} is told of {told} times");
        }
        for forward in &forwards {
            let counters = forward.counters;
            assert!(counters.live <= counters.accepted, "{counters:?}");
        }
        let connections = self.controller.connections();
        stage.log(|| format!("operator: sees {} connections", connections.len()));
    }
}

/// Who asks gets an answer in time, unless something stands still.
fn check_answered<T>(answer: &Result<T>, stage: &Stage) {
    if let Err(e) = answer {
        let is_late = e.kind() == std::io::ErrorKind::TimedOut;
        assert!(
            !is_late || stage.world.may_hang.get(),
            "a worker gave no answer: {e}"
        );
    }
}

impl Actor for Operator {
    fn describe(&self) -> String {
        format!("operator {}: {:?}", self.me, self.acts)
    }

    fn act(&mut self, stage: &Rc<Stage>) -> Option<Duration> {
        let now = stage.now();
        if self.acts.front().is_some_and(|(at, _)| *at <= now)
            && let Some((_, act)) = self.acts.pop_front()
            && !self.controller.is_stopping()
        {
            self.carry_out(&act, stage);
        }
        self.acts.front().map(|(at, _)| *at)
    }

    fn is_done(&self) -> bool {
        self.acts.is_empty()
    }
}

/// Who ends the proxy, at any step; again, sooner, if told to.
pub(super) struct Stopper {
    controller: Controller<SimDriver>,
    /// When, and which time is left to those who are there.
    stops: VecDeque<(Duration, Duration)>,
}

impl Stopper {
    pub(super) fn new(
        controller: Controller<SimDriver>,
        mut stops: Vec<(Duration, Duration)>,
    ) -> Stopper {
        stops.sort();
        let stops = stops.into();
        Stopper { controller, stops }
    }
}

impl Actor for Stopper {
    fn describe(&self) -> String {
        format!("stopper: {:?}", self.stops)
    }

    fn act(&mut self, stage: &Rc<Stage>) -> Option<Duration> {
        let now = stage.now();
        if self.stops.front().is_some_and(|(at, _)| *at <= now)
            && let Some((_, grace)) = self.stops.pop_front()
        {
            stage.log(|| format!("the proxy is told to stop within {grace:?}"));
            stage.judge().hazard(now, Hazard::All);
            // What is handed to a worker that has ended meanwhile is left.
            stage.end_stalls();
            stage.judge().stop_asked(now, grace);
            self.controller.stop(grace);
        }
        self.stops.front().map(|(at, _)| *at)
    }

    fn is_done(&self) -> bool {
        self.stops.is_empty()
    }
}
