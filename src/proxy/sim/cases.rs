//! Faults that schedules have found, each as a plan of its own, so that it is found again whatever
//! seeds draw.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::address::Address;
use crate::engine::rule::{Limits, Rule};

use super::cast::{ClientPlan, ServerPlan, Service};
use super::driver::place_of;
use super::kernel::Habits;
use super::operator::Act;
use super::plan::{Plan, RulePlan};
use super::run::{keep_panics, run};
use super::talk::{Ends, Exit, Manner};
use super::vm::{Kind, VmAct, VmPlan};
use super::world::{Name, Pace};

/// So many orders of what happens at one time.
const ORDERS: u64 = 400;

/// None of these plans needs more.
const MOST_STEPS: u64 = 5_000;

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// A proxy with these rules, to which nothing happens.
fn plan(rules: &[(&str, &str)]) -> Plan {
    let rule = |(listen, connect): &(&str, &str)| RulePlan {
        rule: Rule::new(listen.parse().unwrap(), connect.parse().unwrap()),
        target: (!connect.contains("chain")).then_some(0),
        is_first: true,
        is_endangered: false,
    };
    Plan {
        seed: 0,
        workers: 2,
        habits: Habits {
            capacity: 1_000,
            window: 1_000,
            terse: false,
            slow_network: false,
            descriptors: 1_000,
            backlog: 128,
        },
        limits: Limits::default(),
        housekeeper: Pace::Late,
        rules: rules.iter().map(rule).collect(),
        names: Vec::new(),
        silent: Vec::new(),
        servers: Vec::new(),
        vms: Vec::new(),
        clients: Vec::new(),
        acts: Vec::new(),
        stops: Vec::new(),
        grace: Duration::ZERO,
    }
}

fn vm(path: &str, rules: usize) -> VmPlan {
    VmPlan {
        kind: Kind::Hyperkit,
        path: path.into(),
        ports: vec![(20, 0, Service::Echo)],
        slots: 1_000,
        is_inherited: false,
        unanswered: Limits::default().vm_unanswered as u64,
        connections: None,
        slow: Duration::ZERO,
        acts: Vec::new(),
        rules: (0..rules).collect(),
        seed: 1,
    }
}

fn server(address: &str, service: Service) -> ServerPlan {
    let address: Address = address.parse().unwrap();
    ServerPlan {
        target: 0,
        place: place_of(&address),
        service,
        opens: Duration::ZERO,
        shuts: None,
        slow: Duration::ZERO,
        seed: 1,
    }
}

/// A client of the rule of that number, at the beginning.
fn client(plan: &Plan, rule: usize, manner: Manner, is_orderly: bool) -> ClientPlan {
    ClientPlan {
        at: Duration::ZERO,
        rule,
        place: place_of(&plan.rules[rule].rule.listen),
        manner,
        is_orderly,
        seed: 7,
    }
}

fn orderly() -> Manner {
    let mut manner = Manner::orderly(100, 40);
    manner.patience = Some(Duration::from_secs(5_000));
    manner
}

/// Plays a plan in many orders.
fn play(plan: Plan) {
    play_orders(plan, ORDERS, MOST_STEPS);
}

/// Plays a plan in so many orders, each of which has fewer steps than `most`. Returns what
/// happened.
fn play_orders(mut plan: Plan, orders: u64, most: u64) -> BTreeMap<&'static str, u64> {
    keep_panics();
    let mut counts = BTreeMap::new();
    for seed in 0..orders {
        plan.seed = seed;
        match run(&plan) {
            Ok(outcome) => {
                assert!(outcome.steps < most, "order {seed} takes too long");
                for (what, count) in outcome.counts {
                    *counts.entry(what).or_default() += count;
                }
            }
            Err(why) => panic!("order {seed}: {why}"),
        }
    }
    counts
}

/// A guest's dials beyond its quota are ended, and those that a target holds leave a slot for the
/// host.
#[test]
fn a_target_that_hangs_leaves_slots_for_the_host() {
    let mut plan = plan(&[
        ("hyperkit://:1000/sim/vm", "tcp://127.0.0.1:200"),
        ("tcp://127.0.0.1:1001", "hyperkit://:20/sim/vm"),
    ]);
    plan.limits.vm_connections = 9;
    plan.rules[0].is_endangered = true;
    plan.rules[0].target = Some(1);
    plan.servers = vec![ServerPlan {
        target: 1,
        ..server("tcp://127.0.0.1:200", Service::NeverReads)
    }];
    let mut vm = vm("/sim/vm", 2);
    vm.connections = Some(9);
    for _ in 0..12 {
        let mut manner = orderly();
        (manner.ends, manner.patience) = (Ends::Never, Some(ms(20_000)));
        let dial = VmAct::Dial {
            rule: 0,
            port: 1000,
            manner,
            is_orderly: false,
        };
        vm.acts.push((Duration::ZERO, dial));
    }
    plan.vms = vec![vm];
    for _ in 0..4 {
        let mut late = client(&plan, 1, orderly(), true);
        late.at = ms(500);
        plan.clients.push(late);
    }
    let counts = play_orders(plan, 100, 10_000);
    assert!(counts["dials of guests turned away"] >= 400, "{counts:?}");
}

/// Drains of a guest that sends on are given up, sooner if clients wait.
#[test]
fn drains_are_not_in_the_way_of_clients() {
    let mut plan = plan(&[("tcp://127.0.0.1:1000", "hyperkit://:20/sim/vm")]);
    plan.limits.vm_connections = 9;
    plan.rules[0].is_endangered = true;
    let mut vm = vm("/sim/vm", 1);
    vm.connections = Some(9);
    vm.ports = vec![(20, 0, Service::SendsOn)];
    plan.vms = vec![vm];
    for n in 0..24 {
        let mut manner = orderly();
        manner.says = 0;
        manner.ends = Ends::Never;
        manner.vanishes = Some((8, Exit::Reset));
        let mut client = client(&plan, 0, manner, false);
        client.at = ms(100 * n);
        plan.clients.push(client);
    }
    let counts = play_orders(plan, 40, 60_000);
    assert!(counts["connections given up"] > 100, "{counts:?}");
    assert!(
        counts["times that drains were in the way"] > 20,
        "{counts:?}"
    );
}

/// Its address is free when the operator hears that it is removed: nothing binds it later.
#[test]
fn a_forward_is_removed_while_its_listener_is_bound_again() {
    let mut plan = plan(&[("unix:///sim/rule", "unix:///sim/server")]);
    plan.housekeeper = Pace::AtOnce;
    plan.acts = vec![
        (ms(5), Act::Break(0)),
        (ms(5), Act::Remove(0, Duration::ZERO)),
    ];
    play(plan);
}

/// A connection of our own is accepted though all slots are taken: the one that it belongs to has
/// a place, and would wait for ever.
#[test]
fn a_chain_of_forwards_takes_no_more_slots_than_there_are() {
    let mut plan = plan(&[
        ("tcp://127.0.0.1:1000", "tcp://chain:1001"),
        ("tcp://127.0.0.1:1001", "tcp://127.0.0.1:200"),
        ("unix:///sim/one", "unix:///sim/chain"),
        ("unix:///sim/chain", "tcp://127.0.0.1:200"),
    ]);
    plan.limits.connections = 2;
    let to = Name::Found(vec![([127, 0, 0, 1], 1001).into()]);
    plan.names = vec![("chain".to_owned(), to)];
    plan.servers = vec![server("tcp://127.0.0.1:200", Service::Echo)];
    for rule in [0, 0, 0, 2, 2, 2] {
        let client = client(&plan, rule, orderly(), true);
        plan.clients.push(client);
    }
    play(plan);
}

/// Nor does one that needs a place in a VM, of which its guest has taken the last by the chain's
/// first connection.
#[test]
fn a_chain_from_a_vm_to_itself_ends() {
    let mut plan = plan(&[
        ("hyperkit://:1000/sim/vm", "tcp://chain:1001"),
        ("tcp://127.0.0.1:1001", "hyperkit://:20/sim/vm"),
    ]);
    plan.limits.vm_connections = 1;
    plan.rules[1].rule.timeouts.dial = ms(2_000);
    let to = Name::Found(vec![([127, 0, 0, 1], 1001).into()]);
    plan.names = vec![("chain".to_owned(), to)];
    let mut vm = vm("/sim/vm", 2);
    let dial = VmAct::Dial {
        rule: 0,
        port: 1000,
        manner: orderly(),
        is_orderly: false,
    };
    vm.acts.push((Duration::ZERO, dial));
    plan.vms = vec![vm];
    let mut late = client(&plan, 1, orderly(), true);
    late.at = ms(10_000);
    plan.clients.push(late);
    play(plan);
}

/// One that waits at a Unix socket can't be told from other clients there as long as so many are
/// served. It is accepted when those have ended, though another client has got their slot.
#[test]
fn a_chain_goes_on_when_the_clients_before_it_have_ended() {
    let mut plan = plan(&[
        ("unix:///sim/one", "unix:///sim/chain"),
        ("unix:///sim/chain", "hyperkit://:20/sim/vm"),
        ("tcp://127.0.0.1:1000", "hyperkit://:21/sim/vm"),
    ]);
    plan.limits.vm_connections = 1;
    for rule in &mut plan.rules {
        rule.is_endangered = true;
    }
    let mut vm = vm("/sim/vm", 3);
    (vm.connections, vm.slow) = (Some(1), ms(40));
    let first = (20, 0, Service::SaysAndCloses(8));
    vm.ports = vec![first, (21, 1, Service::Echo)];
    plan.vms = vec![vm];
    plan.rules[2].target = Some(1);
    // The guest closes while the first client sends: its slot is free before its connection ends.
    let mut sends_on = orderly();
    (sends_on.says, sends_on.piece, sends_on.pause) = (100_000, 16, ms(10));
    (sends_on.ends, sends_on.patience) = (Ends::Never, Some(ms(500)));
    let mut stays = orderly();
    (stays.ends, stays.patience) = (Ends::Never, Some(ms(5_000)));
    for (at, rule, manner) in [(0, 1, &sends_on), (1, 0, &stays), (1, 2, &stays)] {
        let mut client = client(&plan, rule, manner.clone(), false);
        client.at = ms(at);
        plan.clients.push(client);
    }
    play_orders(plan, 100, 20_000);
}

/// A guest that waits at a socket which was bound again is not cut off when its forward is removed,
/// nor at the end.
#[test]
fn a_guest_waits_at_a_socket_that_was_bound_again() {
    let listen = "hyperkit://:1000/sim/vm";
    // The file is looked for once a second.
    for stops in [vec![], vec![(ms(1_000), ms(100))]] {
        let mut plan = plan(&[(listen, "tcp://127.0.0.1:200")]);
        plan.servers = vec![server("tcp://127.0.0.1:200", Service::Echo)];
        let mut vm = vm("/sim/vm", 1);
        for _ in 0..6 {
            let dial = VmAct::Dial {
                rule: 0,
                port: 1000,
                manner: orderly(),
                is_orderly: false,
            };
            vm.acts.push((ms(1_000), dial));
        }
        plan.vms = vec![vm];
        plan.housekeeper = Pace::AtOnce;
        plan.acts = vec![(ms(990), Act::RemoveFile(0))];
        if stops.is_empty() {
            plan.acts.push((ms(1_000), Act::Remove(0, Duration::ZERO)));
        }
        plan.stops = stops;
        play(plan);
    }
}

/// After a sleep of the machine its guests have had no more time than the proxy.
#[test]
fn a_guest_has_slept_as_long_as_the_proxy() {
    let mut plan = plan(&[("tcp://127.0.0.1:1000", "hyperkit://:20/sim/vm")]);
    plan.rules[0].rule.timeouts.drain = ms(40);
    plan.vms = vec![vm("/sim/vm", 1)];
    for exit in [Exit::Close, Exit::Reset, Exit::Reset, Exit::Reset] {
        let mut manner = orderly();
        manner.vanishes = Some((0, exit));
        let client = client(&plan, 0, manner, false);
        plan.clients.push(client);
    }
    plan.acts = vec![(Duration::ZERO, Act::Sleep(ms(5_000)))];
    play(plan);
}

/// A proof that can't be sent is not tried again at once by those whom its end wakes.
#[test]
fn a_proof_that_no_descriptor_is_left_for_is_tried_again_later() {
    let mut plan = plan(&[
        ("unix:///sim/rule", "hyperkit://:20/sim/vm"),
        ("tcp://127.0.0.1:1000", "hyperkit://:20/sim/vm"),
    ]);
    plan.limits.vm_connections = 2;
    plan.limits.vm_unanswered = 1;
    // The proof doesn't fit in behind its dial; later there is no descriptor for it.
    plan.habits.backlog = 1;
    for rule in &mut plan.rules {
        (rule.rule.wait, rule.is_endangered) = (Some(ms(500)), true);
    }
    let mut vm = vm("/sim/vm", 2);
    (vm.unanswered, vm.slow) = (1, ms(40));
    plan.vms = vec![vm];
    for rule in [0, 1, 1, 1, 1] {
        let client = client(&plan, rule, orderly(), false);
        plan.clients.push(client);
    }
    plan.acts = vec![
        (Duration::ZERO, Act::Descriptors(0)),
        (ms(300), Act::Descriptors(1_000)),
    ];
    play(plan);
}

/// A VM that has died before its connection was carried has broken it off. One whose listener was
/// another process', which is gone, serves all the same.
#[test]
fn a_vm_dies_before_its_connection_is_carried() {
    for is_inherited in [false, true] {
        let mut plan = plan(&[(
            "tcp://127.0.0.1:1000",
            "vsock-mux://:20/sim/vm?half-close=yes",
        )]);
        plan.workers = 1;
        let mut vm = vm("/sim/vm", 1);
        vm.kind = Kind::Mux { half_close: true };
        (vm.is_inherited, vm.slow) = (is_inherited, ms(40));
        if !is_inherited {
            vm.acts = vec![(ms(1_000), VmAct::Die)];
            plan.acts = vec![(ms(1), Act::Stall(0, ms(2_000)))];
        }
        plan.vms = vec![vm];
        let mut manner = orderly();
        // More than is taken before it is carried.
        manner.says = 5_000;
        let client = client(&plan, 0, manner, is_inherited);
        plan.clients.push(client);
        play(plan);
    }
}

/// A proof that is lost, as its guest reboots, takes none of the connections of its rule.
#[test]
fn a_lost_proof_keeps_no_client_out() {
    let mut plan = plan(&[("tcp://127.0.0.1:1000", "hyperkit://:20/sim/vm")]);
    (plan.rules[0].rule.wait, plan.rules[0].rule.connections) = (Some(ms(20_000)), Some(1));
    let mut vm = vm("/sim/vm", 0);
    vm.slow = ms(40);
    vm.acts = vec![
        (Duration::ZERO, VmAct::Pause),
        (ms(1_000), VmAct::Reboot),
        (ms(1_000), VmAct::Resume),
    ];
    plan.vms = vec![vm];
    let mut first = client(&plan, 0, orderly(), false);
    first.manner.patience = Some(ms(2_000));
    let mut second = client(&plan, 0, orderly(), true);
    second.at = ms(40_000);
    plan.clients = vec![first, second];
    // Nor is it counted as one of them.
    plan.acts = vec![(ms(500), Act::Look), (ms(5_000), Act::Look)];
    play(plan);
}

/// Who was accepted late for a rule that was removed, as its worker stood still, has no more time
/// than the others, though another rule was removed meanwhile.
#[test]
fn a_client_of_a_removed_rule_that_is_accepted_late_is_cut_off() {
    let mut plan = plan(&[
        ("unix:///sim/rule", "tcp://127.0.0.1:200"),
        ("unix:///sim/other", "tcp://127.0.0.1:200"),
    ]);
    plan.servers = vec![server("tcp://127.0.0.1:200", Service::NeverReads)];
    let mut manner = orderly();
    (manner.ends, manner.patience) = (Ends::Never, Some(ms(60_000)));
    for _ in 0..4 {
        let mut late = client(&plan, 0, manner.clone(), false);
        late.at = ms(20);
        plan.clients.push(late);
    }
    plan.acts = vec![
        (ms(10), Act::Stall(0, ms(7_000))),
        (ms(11), Act::Remove(0, ms(10_000))),
        (ms(12), Act::Remove(1, Duration::ZERO)),
    ];
    play(plan);
}

/// Plays a plan once, and returns what is logged.
#[cfg(feature = "cli")]
fn log_of(plan: Plan) -> String {
    use std::io;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, || play_orders(plan, 1, MOST_STEPS));
    let log = log.0.lock().unwrap().clone();
    String::from_utf8(log).unwrap()
}

/// What can't be had is tried again each second, and logged once.
#[cfg(feature = "cli")]
#[test]
fn a_listener_that_can_not_be_watched_is_logged_once() {
    let mut plan = plan(&[("unix:///sim/rule", "unix:///sim/server")]);
    plan.rules[0].is_endangered = true;
    plan.acts = vec![
        (ms(5), Act::CanWatch(false)),
        (ms(5), Act::Break(0)),
        (ms(20_000), Act::CanWatch(true)),
        (ms(25_000), Act::Look),
    ];
    let log = log_of(plan);
    let count = |part: &str| log.matches(part).count();
    let lines = ["ERROR", "listening on unix:///sim/rule again"].map(count);
    assert_eq!(lines, [1, 1], "{log}");
}

/// A guest that hangs is told of once, and so is its return; one whose service is silent is not.
#[cfg(feature = "cli")]
#[test]
fn a_guest_that_falls_silent_is_logged_once() {
    let silent_client = |plan: &Plan| {
        let mut client = client(plan, 0, orderly(), false);
        (client.manner.ends, client.manner.patience) = (Ends::Never, Some(ms(100_000)));
        client.at = ms(2_000);
        client
    };
    let lines = |log: &str| {
        let parts = ["has answered none of 3 dials for 30 s", "answers again"];
        parts.map(|part| log.matches(part).count())
    };
    let mux = Kind::Mux { half_close: false };
    for (kind, target) in [
        (Kind::Hyperkit, "hyperkit://:20/sim/vm"),
        (mux, "vsock-mux://:20/sim/vm"),
    ] {
        let vm = || VmPlan {
            kind,
            ..vm("/sim/vm", 0)
        };
        let mut plan = plan(&[("tcp://127.0.0.1:1000", target)]);
        plan.clients = (0..3).map(|_| silent_client(&plan)).collect();
        plan.acts = vec![(ms(170_000), Act::Look)];
        let mut idle = plan.clone();

        // Twice: while the VMM may still answer the dials themselves, and when they are long
        // closed.
        for resumes in [80_000, 150_000] {
            let mut plan = plan.clone();
            let mut vm = vm();
            vm.acts = vec![(ms(1_000), VmAct::Pause), (ms(resumes), VmAct::Resume)];
            plan.vms = vec![vm];
            let log = log_of(plan);
            assert_eq!(lines(&log), [1, 1], "{kind:?}, {resumes}: {log}");
        }

        let mut vm = vm();
        vm.ports = vec![(20, 0, Service::NeverReads)];
        idle.vms = vec![vm];
        let log = log_of(idle);
        assert_eq!(lines(&log), [0, 0], "{kind:?}: {log}");
    }
}

/// The kernel resets no connect that its guest has not answered, and waits for its whole timeout.
#[test]
fn a_dial_whose_vm_is_killed_ends_soon() {
    let target = "vsock://5:80";
    let mut plan = plan(&[("tcp://127.0.0.1:1000", target)]);
    plan.silent = vec![place_of(&target.parse().unwrap())];
    plan.acts = vec![(ms(5_000), Act::LoseCid(5))];
    for _ in 0..3 {
        let mut client = client(&plan, 0, orderly(), false);
        // They are told while they wait.
        (client.manner.ends, client.manner.patience) = (Ends::Never, Some(ms(9_000)));
        plan.clients.push(client);
    }
    let refused = |plan| play_orders(plan, ORDERS, MOST_STEPS).remove("refused");
    assert_eq!(refused(plan.clone()), Some(3 * ORDERS));
    // One whose VM lives waits.
    plan.acts = vec![(ms(5_000), Act::LoseCid(6))];
    assert_eq!(refused(plan), None);
}
