//! Plays a plan to its end, and what is to be so then; many of them, and the smallest that fails.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::address::{AnyVm, Waiter};
use crate::engine::observer::{Event, Observer, What};
use crate::engine::relay::Side;
use crate::engine::rule::Rule;
use crate::engine::status::{ForwardState, ForwardStatus, VmStatus};
use crate::proxy::controller::Controller;
use crate::proxy::{ForwardId, ProxyConfig, assemble};

use super::cast::{Client, Server};
use super::driver::{SimDriver, place_of};
use super::judge::{Hazard, Observed, Phase, TRANSITIONS};
use super::kernel::{Kernel, Place};
use super::ledger::Happened;
use super::operator::{Act, Operator, Stopper};
use super::plan::Plan;
use super::stage::{Stage, set_stage, this_stage};
use super::vm::{Kind, Vm, VmAct};
use super::world::Pace;

/// No run takes longer, on its own clock.
const LONGEST: Duration = Duration::from_secs(20_000);

/// What the proxy has at its end beyond the time of those who are there: guests' connections are
/// closed gracefully.
const LAST: Duration = Duration::from_secs(5);

/// How long nobody comes before it is looked whether all listen: files are looked after each
/// second.
const SETTLING: Duration = Duration::from_secs(3);

/// How long the proxy may take to end once nobody is there.
const AT_ONCE: Duration = Duration::from_millis(100);

/// What came of a run.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) steps: u64,
    pub(super) transitions: BTreeMap<(Phase, Phase), u64>,
    pub(super) counts: BTreeMap<&'static str, u64>,
}

/// What is told of a connection of the proxy, by its number.
type Told = Arc<Mutex<BTreeMap<u64, Observed>>>;

fn observer(told: &Told) -> Observer {
    let told = Arc::clone(told);
    Observer::new(move |event| {
        note(event);
        let mut told = told.lock().unwrap();
        let it = told.entry(event.connection.into()).or_default();
        it.forward = event.forward.into();
        match event.what {
            What::Accepted => it.accepted += 1,
            What::Connected => it.connected += 1,
            What::Refused(_) => it.refused += 1,
            What::Closed {
                sent,
                received,
                why,
                ..
            } => {
                it.closed += 1;
                it.why = Some(why);
                (it.sent, it.received) = (sent, received);
            }
        }
    })
}

/// Has what is told of a connection judged.
fn note(event: &Event<'_>) {
    let stage = this_stage();
    let (forward, connection) = (event.forward.into(), event.connection.into());
    let now = stage.now();
    let mut judge = stage.judge();
    match event.what {
        What::Accepted => judge.ledger.accepted(connection, forward, now),
        What::Connected => judge.ledger.connected(connection),
        What::Refused(error) => {
            // Why a dial has failed may be known late.
            let is_slow = judge.audit.is_disturbed() || stage.world.may_hang.get();
            let is_ending = judge.audit.is_ending(forward) || judge.closed.contains(&connection);
            let ends = (is_ending, is_slow);
            let of = (forward, connection);
            judge.ledger.check_refusal(of, error, ends, &stage.kernel());
        }
        What::Closed { why, .. } => {
            let happened = Happened {
                vm_gone: stage.kernel().is_anybody_gone(),
                removed: judge.audit.is_removed(forward),
                stop: judge.audit.is_stopping(),
                closed: judge.closed.contains(&connection),
            };
            judge.ledger.check_end(connection, why, happened);
            judge.ledger.closed(forward);
            judge.count(why.name());
        }
    }
}

/// The stage with all on it.
struct Run {
    stage: Rc<Stage>,
    controller: Controller<SimDriver>,
    told: Told,
}

impl Run {
    /// Returns how many connections and probes there are.
    fn live(&self) -> usize {
        self.controller.shared.live.load(Ordering::Relaxed)
    }
}

fn set(plan: &Plan, logs: bool) -> Run {
    let mut rng = Rng::with_seed(plan.seed ^ 0x5EED);
    let mut kernel = Kernel::new(plan.habits.clone(), plan.workers, rng.fork());
    kernel.silent.extend(plan.silent.iter().cloned());
    kernel.cids.insert(5);
    let is_lost = |(_, act): &(_, Act)| matches!(act, Act::LoseCid(_));
    if plan.acts.iter().any(is_lost) {
        kernel.vsock_timeout = Duration::from_secs(30);
    }
    let stage = Stage::new(kernel, plan.workers, rng.fork(), logs);
    set_stage(Some(Rc::clone(&stage)));
    stage
        .world
        .names
        .borrow_mut()
        .extend(plan.names.iter().cloned());
    stage.world.housekeeper.set(plan.housekeeper);
    stage.world.has_room.set(plan.has_room());
    stage.world.keeps_slots.set(plan.keeps_slots());
    stage.world.proves_within.set(plan.proves_within());
    stage.world.most_in.set(plan.most_in());
    stage.world.vm_connections.set(plan.vm_connections());
    stage.judge().ledger.limits = plan.bounds();
    stage.judge().ledger.spots = plan.spots();
    let told = Told::default();
    let first = plan.rules.iter().filter(|it| it.is_first);
    let mut config = ProxyConfig::new(first.map(|it| it.rule.clone()).collect());
    config.workers = plan.workers.try_into().ok();
    config.splice = false;
    config.limits = plan.limits.clone();
    config.observer = Some(observer(&told));
    let mut worker = 0;
    let make = || {
        let driver = SimDriver {
            world: Rc::clone(&stage.world),
            worker,
        };
        worker += 1;
        Ok((driver, stage.wake_of(worker - 1)))
    };
    let assembled = assemble::<SimDriver>(config, Waiter::of, make);
    let (controller, workers) = match assembled {
        Ok(it) => it,
        Err(e) => panic!("the proxy can't start: {e}"),
    };
    stage.seat(workers);
    for forward in controller.shared.forwards().iter() {
        stage.judge().ledger.bound(forward, None);
    }
    let mut forwards = controller.forwards().into_iter().map(|it| it.id);
    let rules: Vec<(Rule, Option<ForwardId>)> = plan
        .rules
        .iter()
        .map(|it| {
            let id = it.is_first.then(|| forwards.next()).flatten();
            (it.rule.clone(), id)
        })
        .collect();
    stage.log(|| {
        format!(
            "{} workers, {:?}, {:?}",
            plan.workers, plan.limits, plan.habits
        )
    });
    for (number, (_, id)) in rules.iter().enumerate() {
        if let Some(id) = id {
            stage.judge().is_forward(number, id.0);
        }
    }
    for (number, rule) in plan.rules.iter().enumerate() {
        stage.log(|| {
            let Rule {
                listen, connect, ..
            } = &rule.rule;
            format!("rule {number}: {listen} -> {connect}, {:?}", rule)
        });
        stage
            .judge()
            .leads_alone(number, Duration::ZERO, rule.target);
        if rule.is_endangered {
            stage.judge().hazard(Duration::ZERO, Hazard::Rule(number));
        }
    }
    for plan in &plan.vms {
        let me = stage.next_actor();
        let mut vm = Vm::new(plan.clone(), me);
        vm.start(&stage);
        stage.add(Box::new(vm), Duration::ZERO);
    }
    for plan in &plan.servers {
        let me = stage.next_actor();
        let mut server = Server::new(plan.clone(), me);
        server.open(&stage);
        stage.add(Box::new(server), Duration::ZERO);
    }
    stage.judge().has_few_slots = plan.vms.iter().any(|vm| vm.slots < 100);
    for server in &plan.servers {
        match server.place {
            Place::Path(_) => stage.judge().unclear_targets.insert(server.target),
            Place::Vsock { .. } => stage.judge().vsock_targets.insert(server.target),
            Place::Tcp(_) => false,
        };
    }
    for plan in &plan.clients {
        let me = stage.next_actor();
        stage.add(Box::new(Client::new(plan.clone(), me)), plan.at);
    }
    let me = stage.next_actor();
    let targets = plan.rules.iter().map(|it| it.target).collect();
    let vms = plan.vms.iter().filter(|it| it.kind == Kind::Hyperkit);
    let vms = vms.cloned().collect();
    let acts = plan.acts.clone();
    let operator = Operator::new(controller.clone(), rules, targets, acts, vms, me);
    stage.add(Box::new(operator), Duration::ZERO);
    let stopper = Stopper::new(controller.clone(), plan.stops.clone());
    stage.add(Box::new(stopper), Duration::ZERO);
    Run {
        stage,
        controller,
        told,
    }
}

/// Plays a plan; panics where something is not as it has to be.
fn play(plan: &Plan, run: &Run) {
    let stage = &run.stage;
    while !stage.is_played() {
        assert!(
            stage.step(None),
            "nothing happens any more, and some wait: {:#?}",
            (stage.kernel().describe(), stage.unfinished())
        );
        assert!(
            stage.now() < LONGEST,
            "some wait for ever: {:#?}",
            (stage.kernel().describe(), stage.unfinished())
        );
    }
    let shared = Arc::clone(&run.controller.shared);
    if !stage.is_over() && !run.controller.is_stopping() {
        check_listeners(plan, run);
        check_additions(plan, run);
    }
    if !stage.is_over() {
        let now = stage.now();
        stage.end_stalls();
        stage.judge().stop_asked(now, plan.grace);
        run.controller.stop(plan.grace);
    }
    let slept = |(_, act): &(Duration, Act)| match act {
        Act::Sleep(time) | Act::Stall(_, time) => *time + LAST,
        _ => Duration::ZERO,
    };
    let slept: Duration = plan.acts.iter().map(slept).sum();
    let mut idle_since = None;
    let ends_by = stage.verdicts().ends_by.unwrap_or_default() + LAST + slept;
    while !stage.is_over() {
        assert!(stage.step(None), "the proxy waits for nothing at its end");
        assert!(
            stage.now() <= ends_by,
            "the proxy was to end at {ends_by:?}, and has {} connections",
            run.live()
        );
        // Who waits for nobody ends at once.
        idle_since = match run.live() {
            0 => idle_since.or_else(|| Some(stage.now())),
            _ => None,
        };
        let idle = idle_since.unwrap_or(stage.now()).max(stage.stalled_until());
        assert!(
            stage.now() <= idle + AT_ONCE,
            "nobody is there since {idle:?}, and the proxy does not end"
        );
    }
    // What the last ones were sent, and the housekeeper's last jobs.
    while stage.step(None) && stage.now() < LONGEST {}
    check_counts(plan, run, &shared);
}

/// After a while in which nobody comes, each forward listens, and says so.
fn check_listeners(plan: &Plan, run: &Run) {
    let stage = &run.stage;
    let spoils = |act: &Act| matches!(act, Act::TakeFile(_) | Act::Descriptors(_));
    let is_spoilt = plan.acts.iter().any(|(_, act)| spoils(act));
    if is_spoilt || stage.world.may_hang.get() || run.live() > 0 || plan.habits.descriptors < 500 {
        return;
    }
    let end = stage.now().max(stage.stalled_until()) + SETTLING;
    while stage.step_until(end) {}
    for forward in run.controller.forwards() {
        if run.live() > 0 {
            return;
        }
        let listens = stage.kernel().listener_at(&place_of(&forward.listen));
        // If all slots of its VM are lost, it waits for another VM. A listener that waits accepts
        // nobody, and does not learn that it was shut down.
        let has_lost = forward.vm.as_ref().is_some_and(|vm| vm.lost > 0);
        assert!(
            listens.is_some() || has_lost,
            "nobody listens on {}",
            forward.listen
        );
        let is_full = matches!(forward.state, ForwardState::Full { .. });
        let is_told = forward.state == ForwardState::Listening || has_lost && is_full;
        assert!(
            is_told,
            "{} is said to be {:?}",
            forward.listen, forward.state
        );
    }
}

/// What was not added, or was removed, listens nowhere once all workers have gone on.
fn check_additions(plan: &Plan, run: &Run) {
    let stage = &run.stage;
    let hangs = |act: &Act| matches!(act, Act::Housekeeper(Pace::Hangs(_)));
    if plan.acts.iter().any(|(_, act)| hangs(act)) {
        return;
    }
    let end = stage.now().max(stage.stalled_until()) + AT_ONCE;
    while stage.step_until(end) {}
    let forwards = run.controller.forwards();
    let known: Vec<Place> = forwards.iter().map(|it| place_of(&it.listen)).collect();
    for place in stage.kernel().listeners_of_proxy() {
        assert!(
            known.contains(place),
            "nobody knows of a listener: {place:?}"
        );
    }
}

/// What is left when all is over.
fn check_counts(plan: &Plan, run: &Run, shared: &crate::proxy::shared::Shared<SimDriver>) {
    let stage = &run.stage;
    let unfinished = stage.unfinished();
    assert!(
        unfinished.is_empty(),
        "the proxy has ended, and some wait: {unfinished:#?}"
    );
    let kernel = stage.kernel();
    assert_eq!(kernel.open_of_proxy(), 0, "sockets are left");
    assert_eq!(kernel.descriptors, 0, "descriptors are left");
    drop(kernel);
    assert_eq!(run.live(), 0, "connections are counted");
    shared.check_counts();
    let told = run.told.lock().unwrap();
    stage.judge().observed = told.clone();
    drop(told);
    stage.verdicts().check_observed();
    stage.verdicts().check_served();
    stage.verdicts().check_refused(&plan.rules_of_hyperkit());
    let abandoned = stage.verdicts().ledger.abandoned();
    stage.judge().count_some("connections given up", abandoned);
    let in_the_way = stage.verdicts().audit.slots.times_in_the_way;
    stage
        .judge()
        .count_some("times that drains were in the way", in_the_way);
    let may_miss = stage.verdicts().ledger.has_failed_additions;
    assert!(
        // A guest may end one later, which is not closed by force then.
        may_miss || abandoned >= stage.kernel().abandoned,
        "{abandoned} are counted as not ended in time, and {} were",
        stage.kernel().abandoned
    );
    let forwards = run.controller.forwards();
    let reserved: usize = forwards.iter().map(|it| it.rule.reserved).sum();
    for forward in &forwards {
        assert_eq!(forward.counters.live, 0, "{}", forward.listen);
        check_counters(forward, &run.told.lock().unwrap());
        if let Some(vm) = &forward.vm {
            check_lost(plan, vm, &forward.rule, stage);
            stage.judge().count_some("slots lost", vm.lost as u64);
            let turned_away = vm.turned_away;
            stage
                .judge()
                .count_some("dials of guests turned away", turned_away);
            // One is for proofs.
            assert!(vm.reserved <= reserved + 1, "reserved: {}", vm.reserved);
            let taken = vm.connections + vm.probes;
            assert_eq!(taken, 0, "slots in the VM of {}", forward.listen);
        }
    }
}

/// Slots are counted as lost if they are, and none that are not.
fn check_lost(plan: &Plan, vm: &VmStatus, rule: &Rule, stage: &Stage) {
    let of = rule.vm(Side::Server).or_else(|| rule.vm(Side::Client));
    let Some(AnyVm::Hyperkit(it)) = of else {
        return assert_eq!(vm.lost, 0, "only hyperkit loses slots");
    };
    let directory = &it.state_dir;
    let its = plan.vms.iter().find(|it| it.path == *directory);
    let ends = |(_, act): &(Duration, VmAct)| matches!(act, VmAct::Die | VmAct::Return);
    if its.is_none_or(|it| it.acts.iter().any(ends)) {
        return;
    }
    let kernel = stage.kernel();
    let lost = kernel.lost.get(directory).map_or(0, Vec::len);
    assert!(
        (lost..=kernel.abandoned as usize).contains(&vm.lost),
        "{} slots are said to be lost, and {lost} are",
        vm.lost
    );
}

/// What status counts is what the observer was told.
fn check_counters(forward: &ForwardStatus, told: &BTreeMap<u64, Observed>) {
    let id = u64::from(forward.id);
    let its = || told.values().filter(|it| it.forward == id);
    let sum = |of: fn(&Observed) -> u64| its().map(of).sum::<u64>();
    let counters = &forward.counters;
    let counted = [
        counters.accepted,
        counters.refused,
        counters.sent,
        counters.received,
    ];
    let told = [
        sum(|it| it.accepted.into()),
        sum(|it| it.refused.into()),
        sum(|it| it.sent),
        sum(|it| it.received),
    ];
    assert_eq!(counted, told, "counters of {}", forward.listen);
    // Each has ended for one reason; those that are counted are those that were told.
    let mut told = BTreeMap::<&str, u64>::new();
    for why in its().filter_map(|it| it.why) {
        *told.entry(why.name()).or_default() += 1;
    }
    let counted = counters.ended.by_reason();
    let counted: BTreeMap<&str, u64> = counted.filter(|(_, count)| *count > 0).collect();
    assert_eq!(counted, told, "why connections of {} ended", forward.listen);
    assert_eq!(counted.values().sum::<u64>(), counters.accepted);
    let timed_out = [
        counters.ended.idle_timeout,
        counters.ended.half_closed_timeout,
    ];
    let cut_off = [counters.timed_out.idle, counters.timed_out.half_closed];
    assert_eq!(timed_out, cut_off, "timeouts of {}", forward.listen);
}

thread_local! {
    /// Where a panic was, for the story.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Has panics of runs kept instead of printed.
pub(super) fn keep_panics() {
    static KEPT: Once = Once::new();
    KEPT.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let is_run = PANIC.with(|it| it.borrow().is_some());
            match is_run {
                true => PANIC.with(|it| *it.borrow_mut() = Some(panic.to_string())),
                false => before(panic),
            }
        }));
    });
}

/// Plays a plan; what came of it, and its story if that is to be told.
fn play_through(plan: &Plan, logs: bool) -> (Result<Outcome, String>, Vec<String>) {
    PANIC.with(|it| *it.borrow_mut() = Some(String::new()));
    let mut there = None;
    let played = catch_unwind(AssertUnwindSafe(|| {
        let run = set(plan, logs);
        let run = there.insert(run);
        play(plan, run);
    }));
    let why = PANIC.with(|it| it.borrow_mut().take()).unwrap_or_default();
    let stage = there.as_ref().map(|run| Rc::clone(&run.stage));
    let mut outcome = Outcome::default();
    let mut story = Vec::new();
    if let Some(stage) = &stage {
        story = stage.world.take_story();
        outcome.steps = stage.steps();
        outcome.transitions = stage.world.transitions.take();
        outcome.counts = std::mem::take(&mut stage.judge().counts);
        // What is taken off may be in any state.
        stage.world.is_cleared.set(true);
        let _ = catch_unwind(AssertUnwindSafe(|| {
            drop(there);
            stage.clear();
        }));
    }
    set_stage(None);
    (played.map(|()| outcome).map_err(|_| why), story)
}

/// Plays a plan; what came of it, or why it has failed.
pub(super) fn run(plan: &Plan) -> Result<Outcome, String> {
    play_through(plan, false).0
}

fn run_and_log(plan: &Plan) -> (Result<Outcome, String>, Vec<String>) {
    play_through(plan, true)
}

/// Where a run has failed.
fn place_of_failure(plan: &Plan) -> Option<String> {
    let why = run(plan).err()?;
    why.lines().next().map(str::to_owned)
}

/// The smallest plan found that fails at the same place.
fn shrink(plan: &Plan) -> Plan {
    let mut least = plan.clone();
    let place = place_of_failure(plan);
    let fails = |plan: &Plan| place_of_failure(plan) == place;
    loop {
        let mut smaller = Vec::new();
        for index in 0..least.clients.len() {
            let mut plan = least.clone();
            plan.clients.remove(index);
            smaller.push(plan);
        }
        for index in 0..least.acts.len() {
            let mut plan = least.clone();
            plan.acts.remove(index);
            smaller.push(plan);
        }
        for index in 0..least.stops.len() {
            let mut plan = least.clone();
            plan.stops.remove(index);
            smaller.push(plan);
        }
        for vm in 0..least.vms.len() {
            for index in 0..least.vms[vm].acts.len() {
                let mut plan = least.clone();
                plan.vms[vm].acts.remove(index);
                smaller.push(plan);
            }
        }
        // What is scarce for a while is not to stay so.
        smaller.retain(|plan| plan.has_descriptors_again());
        if least.workers > 1 {
            let mut plan = least.clone();
            plan.workers -= 1;
            smaller.push(plan);
        }
        if least.habits.slow_network {
            let mut plan = least.clone();
            plan.habits.slow_network = false;
            smaller.push(plan);
        }
        match smaller.into_iter().find(fails) {
            Some(plan) => least = plan,
            None => return least,
        }
    }
}

/// What many runs came to.
#[derive(Debug, Default)]
struct Sum {
    steps: u64,
    transitions: BTreeMap<(Phase, Phase), u64>,
    counts: BTreeMap<&'static str, u64>,
}

/// Plays so many runs from that seed on, on so many threads; the seed of the first that fails.
fn play_all(schedules: u64, seed: u64, threads: usize) -> (Sum, Option<u64>) {
    let next = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let first = Mutex::new(None);
    let sum = Mutex::new(Sum::default());
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut mine = Sum::default();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= schedules || failed.load(Ordering::Relaxed) {
                        break;
                    }
                    let seed = seed.wrapping_add(number);
                    match run(&Plan::draw(seed)) {
                        Ok(outcome) => {
                            mine.steps += outcome.steps;
                            for (key, n) in outcome.transitions {
                                *mine.transitions.entry(key).or_default() += n;
                            }
                            for (key, n) in outcome.counts {
                                *mine.counts.entry(key).or_default() += n;
                            }
                        }
                        Err(_) => {
                            failed.store(true, Ordering::Relaxed);
                            let mut first = first.lock().unwrap();
                            *first = Some(first.map_or(seed, |it: u64| it.min(seed)));
                        }
                    }
                    if number > 0 && number.is_multiple_of(50_000) {
                        let rate = number as f64 / begun.elapsed().as_secs_f64();
                        eprintln!("{number} of {schedules} schedules, {rate:.0}/s");
                    }
                }
                let mut sum = sum.lock().unwrap();
                sum.steps += mine.steps;
                for (key, n) in mine.transitions {
                    *sum.transitions.entry(key).or_default() += n;
                }
                for (key, n) in mine.counts {
                    *sum.counts.entry(key).or_default() += n;
                }
            });
        }
    });
    (sum.into_inner().unwrap(), first.into_inner().unwrap())
}

/// Describes a run that fails, made as small as it can be; with `HVSOCK_SIM_SHRINK=no` only why it
/// does.
fn describe_failure(seed: u64) -> String {
    let plan = Plan::draw(seed);
    if std::env::var("HVSOCK_SIM_SHRINK").is_ok_and(|it| it == "no") {
        let why = run(&plan).err().unwrap_or_default();
        return format!("seed {seed} fails: {why}");
    }
    let before = plan.size();
    let least = shrink(&plan);
    let (outcome, story) = run_and_log(&least);
    let why = outcome.err().unwrap_or_default();
    format!(
        "seed {seed} fails; of {before} clients and acts {} are left:\n{}\n{}",
        least.size(),
        story.join("\n"),
        why
    )
}

fn number(name: &str, otherwise: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name}={text:?} is no number")),
        Err(_) => otherwise,
    }
}

/// Says what was reached, and holds that it is all there is.
fn report(sum: &Sum, schedules: u64, seed: u64, took: Duration) {
    let (rate, steps) = (
        schedules as f64 / took.as_secs_f64(),
        sum.steps as f64 / schedules as f64,
    );
    println!("{schedules} schedules from seed {seed}: {rate:.0}/s, {steps:.0} steps each");
    for (what, count) in &sum.counts {
        println!("{count:>12}  {what}");
    }
    for ((from, to), count) in &sum.transitions {
        println!("{count:>12}  {from} -> {to}");
    }
    let reached = |it: &&(Phase, Phase)| sum.transitions.contains_key(*it);
    let reached = TRANSITIONS.iter().filter(reached).count();
    let all = TRANSITIONS.len();
    println!("{reached} of {all} transitions of a connection were reached");
    let mut known = sum
        .transitions
        .keys()
        .filter(|it| !TRANSITIONS.contains(it));
    assert_eq!(known.next(), None, "a transition that is not known");
    assert!(reached == all || schedules < ENOUGH, "not all were reached");
}

/// So many schedules reach all transitions.
const ENOUGH: u64 = 1_000;

#[test]
fn schedules() {
    keep_panics();
    let schedules = number("HVSOCK_SIM_SCHEDULES", ENOUGH);
    let seed = number("HVSOCK_SIM_SEED", 1);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let begun = Instant::now();
    let (sum, failed) = play_all(schedules, seed, threads);
    if let Some(seed) = failed {
        panic!("{}", describe_failure(seed));
    }
    report(&sum, schedules, seed, begun.elapsed());
}

/// The same seed gives the same run, step by step.
#[test]
fn a_seed_replays_its_run() {
    keep_panics();
    for seed in 0..20 {
        let plan = Plan::draw(seed);
        let stories = [(); 2].map(|()| {
            let (outcome, story) = run_and_log(&plan);
            outcome.unwrap_or_else(|why| panic!("seed {seed}: {why}"));
            story
        });
        assert_eq!(stories[0], stories[1], "seed {seed}");
    }
}
