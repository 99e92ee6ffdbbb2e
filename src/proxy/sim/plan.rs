//! What a run is made of, drawn from its seed: rules, targets, clients, and what befalls them.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use fastrand::Rng;

use crate::address::{
    Address, Host, HyperkitAddress, Port, TcpAddress, UnixAddress, VsockAddress, VsockMuxAddress,
};
use crate::engine::rule::{Limits, Rule, Timeouts};

use super::cast::{ClientPlan, ServerPlan, Service};
use super::driver::place_of;
use super::kernel::{Habits, Place};
use super::ledger::{Bounds, Spot};
use super::operator::Act;
use super::talk::{Ends, Exit, Manner};
use super::vm::{Kind, VmAct, VmPlan};
use super::world::{Name, Pace};

/// A rule of a run.
#[derive(Clone, Debug)]
pub(super) struct RulePlan {
    pub(super) rule: Rule,
    /// It is there from the start.
    pub(super) is_first: bool,
    /// Something may stand in the way of its clients from the start: a short timeout, a target that
    /// isn't there.
    pub(super) is_endangered: bool,
    /// The number of the target that it leads to; none if it leads to another rule.
    pub(super) target: Option<usize>,
}

/// A run.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) workers: usize,
    pub(super) habits: Habits,
    pub(super) limits: Limits,
    pub(super) housekeeper: Pace,
    pub(super) rules: Vec<RulePlan>,
    pub(super) names: Vec<(String, Name)>,
    pub(super) silent: Vec<Place>,
    pub(super) servers: Vec<ServerPlan>,
    pub(super) vms: Vec<VmPlan>,
    pub(super) clients: Vec<ClientPlan>,
    pub(super) acts: Vec<(Duration, Act)>,
    /// When the proxy is told to end, and which time those who are there have.
    pub(super) stops: Vec<(Duration, Duration)>,
    /// The time that they have at the latest end.
    pub(super) grace: Duration,
}

/// Somewhere that rules lead to.
struct Target {
    address: Address,
    /// What a client finds there, if anybody is.
    service: Option<Service>,
    /// A half-close ends both directions.
    ends_both: bool,
    vm: Option<usize>,
    is_endangered: bool,
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn tcp(port: u16) -> TcpAddress {
    TcpAddress::new(Host::Ip([127, 0, 0, 1].into()), port)
}

/// A time before `end`, often one that others draw as well.
fn some_time(rng: &mut Rng, end: Duration) -> Duration {
    match rng.u8(..4) {
        0 => Duration::ZERO,
        1 => ms(rng.u64(0..=end.as_millis() as u64 / 100) * 100),
        _ => Duration::from_micros(rng.u64(0..=end.as_micros() as u64)),
    }
}

fn one<T: Copy>(rng: &mut Rng, of: &[T]) -> T {
    of[rng.usize(..of.len())]
}

/// So much that a run has an end, where buffers hold little.
fn some_size(rng: &mut Rng, habits: &Habits) -> u64 {
    let most = 60 * habits.capacity.min(habits.window) as u64;
    one(rng, &[4, 9, 100, 2_000, 30_000]).min(most)
}

fn some_service(rng: &mut Rng, habits: &Habits, is_calm: bool) -> Service {
    let size = some_size(rng, habits);
    let kinds = if is_calm { 3 } else { 9 };
    match rng.usize(..kinds) {
        0 => Service::Echo,
        1 => Service::Answers(size),
        2 => Service::Source(size),
        3 => Service::Endless(some_size(rng, habits)),
        4 => Service::IgnoresEof,
        5 => Service::Resets(size),
        6 => Service::NeverReads,
        7 => Service::SendsOn,
        _ => Service::Closes,
    }
}

/// A client's manner; orderly, if it is to be and its service serves such.
fn some_manner(
    rng: &mut Rng,
    target: &Target,
    habits: &Habits,
    from_mux: bool,
    is_calm: bool,
) -> (Manner, bool) {
    let size = match rng.u8(..6) {
        0 => 0,
        _ => some_size(rng, habits),
    };
    let most = 30_000.min(60 * habits.capacity.min(habits.window));
    let piece = one(rng, &[1, 16, 500, 4_000]).max(most / 150);
    let mut manner = Manner::orderly(size, piece);
    let orderly = match target.service {
        Some(_) if from_mux && target.ends_both => false,
        Some(Service::Source(_)) => {
            if !from_mux && rng.bool() {
                manner.ends = Ends::AfterOther;
            }
            true
        }
        Some(service) => service.serves() && !target.ends_both,
        None => false,
    };
    if rng.u8(..4) == 0 {
        manner.pause = one(rng, &[ms(1), ms(20)]);
    }
    if orderly && (is_calm || rng.u8(..3) > 0) {
        manner.patience = Some(Duration::from_secs(5_000));
        return (manner, true);
    }
    manner.patience = Some(one(rng, &[ms(100), ms(3_000), ms(40_000)]));
    match rng.usize(..9) {
        0 => manner.vanishes = Some((rng.u64(0..=size + 1), Exit::Reset)),
        1 => manner.vanishes = Some((rng.u64(0..=size + 1), Exit::Close)),
        2 => manner.reads = rng.u64(..200),
        3 => manner.ends = Ends::Closes,
        4 => manner.ends = Ends::Never,
        5 => manner.vanishes = Some((0, one(rng, &[Exit::Reset, Exit::Close]))),
        6 => manner.urgent = true,
        7 => manner.ends = Ends::AfterOther,
        _ => {}
    }
    (manner, false)
}

impl Plan {
    pub(super) fn draw(seed: u64) -> Plan {
        let mut rng = Rng::with_seed(seed);
        let rng = &mut rng;
        let is_calm = rng.u8(..3) == 0;
        let workers = one(rng, &[1, 2, 2, 3]);
        let scarce = !is_calm && rng.u8(..8) == 0;
        let habits = Habits {
            // hyperkit's line fits in.
            capacity: one(rng, &[18, 64, 1_000, 8_192]),
            window: one(rng, &[3, 64, 1_000, 8_192]),
            terse: rng.bool(),
            slow_network: rng.u8(..3) == 0,
            descriptors: if scarce { rng.usize(60..110) } else { 1_000 },
            backlog: one(rng, &[1, 4, 128]),
        };
        let mut limits = Limits::default();
        if rng.u8(..3) == 0 {
            limits.connections = one(rng, &[1, 3, 8, 8]);
        }
        let tight = !is_calm && rng.u8(..3) == 0;
        if tight {
            let few = rng.u8(1..4);
            if few & 1 > 0 {
                limits.vm_connections = one(rng, &[1, 2, 6, 9]);
                limits.other_vm_connections = Some(limits.vm_connections);
            }
            if few & 2 > 0 {
                limits.vm_unanswered = one(rng, &[1, 2, 8]);
            }
        }
        let housekeeper = one(rng, &[Pace::AtOnce, Pace::Late]);
        let mut plan = Plan {
            seed,
            workers,
            habits,
            limits,
            housekeeper,
            rules: Vec::new(),
            names: Vec::new(),
            silent: Vec::new(),
            servers: Vec::new(),
            vms: Vec::new(),
            clients: Vec::new(),
            acts: Vec::new(),
            stops: Vec::new(),
            grace: one(rng, &[ms(0), ms(300), ms(10_000)]),
        };
        let targets = plan.draw_targets(rng, is_calm);
        plan.draw_rules(rng, &targets, is_calm, tight);
        plan.draw_clients(rng, &targets, is_calm);
        if !is_calm {
            plan.draw_acts(rng);
            plan.draw_vm_acts(rng);
            if rng.u8(..4) == 0 {
                for _ in 0..rng.usize(1..3) {
                    let at = some_time(rng, ms(4_000));
                    let grace = one(rng, &[ms(0), ms(500), ms(20_000)]);
                    plan.stops.push((at, grace));
                }
            }
        }
        plan
    }

    fn draw_targets(&mut self, rng: &mut Rng, is_calm: bool) -> Vec<Target> {
        let mut targets: Vec<Target> = Vec::new();
        for number in 0..rng.usize(1..4) {
            let service = some_service(rng, &self.habits, is_calm);
            let family = rng.usize(..6);
            if family < 3 {
                let port = 200 + number as u16;
                let address = match family {
                    0 => Address::Tcp(tcp(port)),
                    1 => Address::Unix(UnixAddress::Path(format!("/sim/server{number}").into())),
                    _ => Address::Vsock(VsockAddress {
                        cid: 5,
                        port: Port(u32::from(port)),
                        buffer_size: None,
                        framing: false,
                    }),
                };
                let place = place_of(&address);
                let fate = if is_calm { 9 } else { rng.usize(..10) };
                let opens = match fate {
                    0 => some_time(rng, ms(3_000)),
                    _ => Duration::ZERO,
                };
                let shuts = (fate == 1).then(|| some_time(rng, ms(3_000)));
                match fate {
                    // Nobody is there, or nobody answers.
                    2 => {}
                    3 => self.silent.push(place),
                    _ => self.servers.push(ServerPlan {
                        target: number,
                        place,
                        service,
                        opens,
                        shuts,
                        slow: one(rng, &[ms(0), ms(0), ms(30)]),
                        seed: rng.u64(..),
                    }),
                }
                let mut is_named = false;
                let address = match (family, rng.u8(..4)) {
                    (0, 0) => {
                        let name = format!("name{number}");
                        let here = SocketAddr::from(([127, 0, 0, 1], port));
                        let elsewhere = SocketAddr::from(([127, 0, 0, 9], port));
                        let fate = if is_calm { 0 } else { rng.usize(..5) };
                        is_named = matches!(fate, 2 | 3);
                        let found = match fate {
                            0 => Name::Found(vec![here]),
                            1 => Name::Found(vec![elsewhere, here]),
                            2 => Name::Missing,
                            3 => Name::Silent,
                            _ => {
                                // More than are tried at a time.
                                let silent = (10..rng.u8(11..17))
                                    .map(|last| SocketAddr::from(([127, 0, 0, last], port)));
                                let mut found: Vec<SocketAddr> = silent.collect();
                                self.silent.extend(found.iter().copied().map(Place::Tcp));
                                if rng.bool() {
                                    found.insert(rng.usize(..=found.len()), elsewhere);
                                }
                                found.push(here);
                                Name::Found(found)
                            }
                        };
                        self.names.push((name.clone(), found));
                        Address::Tcp(TcpAddress::new(Host::Name(name), port))
                    }
                    _ => address,
                };
                targets.push(Target {
                    address,
                    service: (fate > 3).then_some(service),
                    ends_both: false,
                    vm: None,
                    // A full backlog of AF_VSOCK looks like a refusal.
                    is_endangered: fate < 4 || is_named || family == 2 && self.habits.backlog < 100,
                });
                continue;
            }
            let kind = match family {
                5 => Kind::Mux {
                    half_close: rng.bool(),
                },
                _ => Kind::Hyperkit,
            };
            let known = self.vms.iter().position(|vm| vm.kind == kind);
            let vm = known.unwrap_or_else(|| {
                self.vms.push(VmPlan {
                    kind,
                    path: PathBuf::from(format!("/sim/vm{number}")),
                    ports: Vec::new(),
                    slots: if is_calm || rng.u8(..6) > 0 { 1_000 } else { 3 },
                    // hyperkit listens for itself.
                    is_inherited: kind != Kind::Hyperkit && rng.u8(..4) == 0,
                    unanswered: self.limits.vm_unanswered as u64,
                    // Where that is one, proofs come on top.
                    connections: Some(self.limits.vm_connections).filter(|most| *most > 1),
                    slow: one(rng, &[ms(0), ms(1), ms(40)]),
                    acts: Vec::new(),
                    rules: Vec::new(),
                    seed: rng.u64(..),
                });
                self.vms.len() - 1
            });
            let there = is_calm || rng.u8(..5) > 0;
            let port = 20 + number as u32;
            let plan = &mut self.vms[vm];
            if there {
                plan.ports.push((port, number, service));
            }
            let address = match kind {
                Kind::Hyperkit => Address::Hyperkit(HyperkitAddress::new(&plan.path, port)),
                Kind::Mux { half_close } => Address::VsockMux(VsockMuxAddress {
                    path: plan.path.clone(),
                    port: Port(port),
                    half_close,
                }),
            };
            targets.push(Target {
                address,
                service: there.then_some(service),
                ends_both: kind == Kind::Mux { half_close: false },
                vm: Some(vm),
                is_endangered: !there || plan.slots < 100,
            });
        }
        targets
    }

    fn draw_rules(&mut self, rng: &mut Rng, targets: &[Target], is_calm: bool, tight: bool) {
        for number in 0..rng.usize(1..5) {
            let target_number = rng.usize(..targets.len());
            let target = &targets[target_number];
            let vm = match self.vms.is_empty() {
                true => None,
                false => Some(rng.usize(..self.vms.len())),
            };
            let port = 1_000 + number as u16;
            let (listen, from) = match (rng.usize(..5), vm) {
                (0, Some(vm)) => {
                    let plan = &self.vms[vm];
                    let address = match plan.kind {
                        Kind::Hyperkit => {
                            Address::Hyperkit(HyperkitAddress::new(&plan.path, u32::from(port)))
                        }
                        Kind::Mux { half_close } => Address::VsockMux(VsockMuxAddress {
                            path: plan.path.clone(),
                            port: Port(u32::from(port)),
                            half_close,
                        }),
                    };
                    (address, Some(vm))
                }
                (1 | 2, _) => {
                    let path = format!("/sim/rule{number}").into();
                    (Address::Unix(UnixAddress::Path(path)), None)
                }
                _ => (Address::Tcp(tcp(port)), None),
            };
            // Now and then a rule leads to another rule's listener, by a name that hides it.
            let mut connect = target.address.clone();
            let mut is_chained = false;
            // A guest's place may be the one that its own connection waits for.
            let is_tight = tight && from.is_some();
            if !is_calm && !is_tight && rng.u8(..12) == 0 {
                let host = format!("loop{number}");
                let to = SocketAddr::from(([127, 0, 0, 1], 1_000 + rng.u16(..=number as u16)));
                self.names.push((host.clone(), Name::Found(vec![to])));
                connect = Address::Tcp(TcpAddress::new(Host::Name(host), to.port()));
                is_chained = true;
            }
            let mut rule = Rule::new(listen, connect);
            let mut timeouts = Timeouts::default();
            let is_short = !is_calm && rng.u8(..4) == 0;
            if is_short {
                timeouts.dial = one(rng, &[ms(60), ms(1_000)]);
                timeouts.drain = one(rng, &[ms(40), ms(1_000)]);
                timeouts.idle = one(rng, &[None, Some(ms(200)), Some(ms(5_000))]);
                timeouts.half_closed = one(rng, &[None, Some(ms(100)), Some(ms(3_000))]);
            }
            rule.timeouts = timeouts;
            rule.wait = one(rng, &[None, None, Some(ms(500)), Some(ms(20_000))]);
            if !is_calm && rng.u8(..40) == 0 {
                rule.wait = Some(ms(400_000));
            }
            if rng.u8(..5) == 0 {
                rule.connections = Some(one(rng, &[1, 2, 5]));
            }
            let has_room = self.limits.connections >= 8 && self.limits.vm_connections >= 6;
            if has_room && rng.u8(..4) == 0 {
                rule.reserved = 1;
            }
            for vm in [target.vm, from].into_iter().flatten() {
                self.vms[vm].rules.push(number);
            }
            let waits = rule.wait.is_some_and(|wait| wait < ms(3_000));
            // A guest beyond a bound is not served.
            let is_bounded = rule.connections.is_some() && from.is_some();
            let is_endangered = is_short
                || is_chained
                || target.is_endangered
                || tight && (target.vm.is_some() || from.is_some())
                || waits
                || is_bounded
                || self.habits.descriptors < 500;
            self.rules.push(RulePlan {
                rule,
                is_first: is_calm || rng.u8(..6) > 0,
                is_endangered,
                target: (!is_chained).then_some(target_number),
            });
        }
        // What a guest has forgotten may hold a place that others wait for.
        if self.limits.connections < 100 {
            for vm in &mut self.vms {
                vm.rules = (0..self.rules.len()).collect();
            }
        }
        // What is there later can't be connected to before.
        for rule in &mut self.rules {
            rule.is_endangered |= !rule.is_first;
        }
    }

    fn draw_clients(&mut self, rng: &mut Rng, targets: &[Target], is_calm: bool) {
        let most = one(rng, &[2, 5, 14]);
        for _ in 0..rng.usize(1..=most) {
            let rule = rng.usize(..self.rules.len());
            let plan = &self.rules[rule].rule;
            let target = targets.iter().find(|it| it.address == plan.connect);
            let nobody = Target {
                address: plan.connect.clone(),
                service: None,
                ends_both: false,
                vm: None,
                is_endangered: true,
            };
            let target = target.unwrap_or(&nobody);
            let mux = match &plan.listen {
                Address::VsockMux(mux) => !mux.half_close,
                _ => false,
            };
            let (manner, is_orderly) = some_manner(rng, target, &self.habits, mux, is_calm);
            let end = one(rng, &[ms(0), ms(5), ms(3_000)]);
            let at = some_time(rng, end);
            let vm = match &plan.listen {
                Address::Hyperkit(it) => self.vms.iter_mut().find(|vm| vm.path == it.vm.state_dir),
                Address::VsockMux(it) => self.vms.iter_mut().find(|vm| vm.path == it.path),
                listen => {
                    self.clients.push(ClientPlan {
                        at,
                        rule,
                        place: place_of(listen),
                        manner,
                        is_orderly,
                        seed: rng.u64(..),
                    });
                    continue;
                }
            };
            if let Some(vm) = vm {
                let port = 1_000 + rule as u32;
                let act = VmAct::Dial {
                    rule,
                    port,
                    manner,
                    is_orderly,
                };
                vm.acts.push((at, act));
            }
        }
    }

    fn draw_acts(&mut self, rng: &mut Rng) {
        let count = one(rng, &[0, 1, 3, 8]);
        for _ in 0..count {
            let at = some_time(rng, ms(4_000));
            let (rule, other) = (rng.usize(..self.rules.len()), rng.usize(..self.rules.len()));
            let act = match rng.usize(..16) {
                14 => Act::Stall(
                    rng.usize(..self.workers),
                    one(rng, &[ms(5), ms(700), ms(7_000), ms(40_000)]),
                ),
                15 => Act::LimitVm(0, one(rng, &[6, 8, 1_000])),
                0 | 1 => Act::Remove(rule, one(rng, &[ms(0), ms(500), ms(30_000)])),
                2 | 3 => Act::Add(rule),
                4 | 5 => Act::Replace(rule, other),
                6 => Act::ChangeMode(rule, 0o660),
                7 => Act::Move(rule, other),
                8 if rng.bool() => Act::Look,
                8 => Act::Close(rng.usize(..8)),
                9 => Act::Break(rule),
                10 => Act::RemoveFile(rule),
                11 if rng.bool() => Act::TakeFile(rule),
                11 => Act::Sleep(one(rng, &[ms(600), ms(5_000), ms(100_000)])),
                12 => Act::Housekeeper(match rng.u8(..3) {
                    0 => Pace::AtOnce,
                    1 => Pace::Late,
                    _ => Pace::Hangs(at + one(rng, &[ms(500), ms(4_000), ms(60_000)])),
                }),
                // A guest that can't be accepted is cut off at the end, which hurts its device.
                _ if self
                    .rules
                    .iter()
                    .any(|it| it.rule.listen.transport().needs_graceful_close) =>
                {
                    Act::Look
                }
                _ => {
                    let later = at + one(rng, &[ms(1), ms(100), ms(3_000)]);
                    self.acts.push((later, Act::Descriptors(1_000)));
                    Act::Descriptors(one(rng, &[0, 60]))
                }
            };
            self.acts.push((at, act));
        }
        if self.workers > 1 && rng.u8(..12) == 0 {
            self.draw_change(rng);
        }
        let limits = |(_, act): &(Duration, Act)| matches!(act, Act::LimitVm(..));
        if self.acts.iter().any(limits) {
            for vm in &mut self.vms {
                vm.connections = None;
            }
        }
        // A socket that is bound again while its worker stands still is closed with its guests, if
        // the worker ends before it has heard of it.
        let stalls = self
            .acts
            .iter()
            .any(|(_, act)| matches!(act, Act::Stall(..)));
        let rules = &self.rules;
        self.acts.retain(|(_, act)| match act {
            Act::RemoveFile(rule) | Act::TakeFile(rule) => {
                !stalls || !rules[*rule].rule.listen.transport().needs_graceful_close
            }
            _ => true,
        });
    }

    /// A rule is removed or replaced while the worker that accepts its clients stands still, and
    /// some wait there.
    fn draw_change(&mut self, rng: &mut Rng) {
        let rule = rng.usize(..self.rules.len());
        let place = place_of(&self.rules[rule].rule.listen);
        if self.rules[rule]
            .rule
            .listen
            .transport()
            .needs_graceful_close
        {
            return;
        }
        let at = some_time(rng, ms(2_000)) + ms(10);
        let (act, time, later) = match rng.bool() {
            true => {
                let time = one(rng, &[ms(700), ms(4_000), ms(7_000)]);
                (Act::Remove(rule, one(rng, &[ms(0), ms(300)])), time, ms(5))
            }
            // Whoever asks has given up by then.
            false => {
                let other = rng.usize(..self.rules.len());
                (Act::Replace(rule, other), ms(7_000), ms(6_000))
            }
        };
        self.acts.push((at, Act::Stall(rule % self.workers, time)));
        self.acts.push((at + ms(1), act));
        for n in 0..6 {
            // Some before it, so that another worker has fewer.
            let at = if n < 3 { at - ms(10) } else { at + later };
            let mut manner = Manner::orderly(some_size(rng, &self.habits), 500);
            (manner.ends, manner.patience) = (Ends::Never, Some(ms(40_000)));
            let seed = rng.u64(..);
            self.clients.push(ClientPlan {
                at,
                rule,
                place: place.clone(),
                manner,
                is_orderly: false,
                seed,
            });
        }
    }

    fn draw_vm_acts(&mut self, rng: &mut Rng) {
        for vm in &mut self.vms {
            for _ in 0..one(rng, &[0, 0, 1, 3]) {
                let at = some_time(rng, ms(3_000));
                let later = at + one(rng, &[ms(1), ms(300), ms(5_000), ms(40_000)]);
                match rng.usize(..3) {
                    0 => {
                        vm.acts.push((at, VmAct::Pause));
                        vm.acts.push((later, VmAct::Resume));
                    }
                    1 => vm.acts.push((at, VmAct::Reboot)),
                    _ => {
                        vm.acts.push((at, VmAct::Die));
                        vm.acts.push((later, VmAct::Return));
                    }
                }
            }
        }
    }

    /// Whether no limit and no lack of descriptors keeps a client from being accepted.
    pub(super) fn has_room(&self) -> bool {
        let bound = |it: &RulePlan| it.rule.connections.is_some();
        let has_slots = self.limits.connections >= 100 && !self.rules.iter().any(bound);
        has_slots && self.habits.descriptors >= 500
    }

    /// Whether what is reserved is there for whom it is reserved for.
    pub(super) fn keeps_slots(&self) -> bool {
        let is_free =
            |it: &RulePlan| !it.rule.listen.transport().needs_graceful_close && it.target.is_some();
        let takes =
            |(_, act): &(Duration, Act)| matches!(act, Act::Descriptors(_) | Act::LimitVm(..));
        self.rules.iter().any(|it| it.rule.reserved > 0)
            && self.rules.iter().all(is_free)
            && self.habits.descriptors >= 500
            && !self.acts.iter().any(takes)
    }

    /// How soon it is known whether a guest that answers has taken a dial, where that is certain.
    pub(super) fn proves_within(&self) -> Option<Duration> {
        let stands = |act: &Act| {
            matches!(
                act,
                Act::Descriptors(_) | Act::Housekeeper(Pace::Hangs(_)) | Act::LimitVm(..)
            )
        };
        let is_free =
            |it: &RulePlan| !it.rule.listen.transport().needs_graceful_close && it.target.is_some();
        let has_room = self.habits.descriptors >= 500 && self.vms.iter().all(|vm| vm.slots >= 100);
        if !has_room
            || self.acts.iter().any(|(_, act)| stands(act))
            || !self.rules.iter().all(is_free)
        {
            return None;
        }
        let loses = |(_, act): &(Duration, VmAct)| {
            matches!(act, VmAct::Reboot | VmAct::Die | VmAct::Return)
        };
        let is_lost = self.vms.iter().any(|vm| vm.acts.iter().any(loses));
        match is_lost {
            false => Some(ms(2_000)),
            // What a guest has forgotten keeps its place.
            true if self.limits.vm_connections >= 100 => Some(ms(200_000)),
            true => None,
        }
    }

    /// How many connections a VM may have, where that stays so.
    pub(super) fn vm_connections(&self) -> Option<usize> {
        let limits = |(_, act): &(Duration, Act)| matches!(act, Act::LimitVm(..));
        let is_certain = !self.acts.iter().any(limits) && !self.restarts();
        is_certain.then_some(self.limits.vm_connections)
    }

    /// Whether a VM is restarted: which one a guest's dial is from is not known at once.
    fn restarts(&self) -> bool {
        let dies = |(_, act): &(Duration, VmAct)| matches!(act, VmAct::Die | VmAct::Return);
        self.vms.iter().any(|vm| vm.acts.iter().any(dies))
    }

    /// How many clients of a VM are let in: those that there are slots for, where one rule leads
    /// there (clients are queued per rule) and none is made to, unless some come before or are
    /// held, or what had slots is gone.
    pub(super) fn most_in(&self) -> Option<usize> {
        let is_free = |it: &RulePlan| {
            let is_held = it.rule.wait.is_some();
            !is_held && !it.rule.listen.transport().needs_graceful_close && it.target.is_some()
        };
        let is_calm = |(_, act): &(Duration, Act)| {
            matches!(act, Act::Look | Act::ChangeMode(..) | Act::Sleep(_))
        };
        let dies = |(_, act): &(Duration, VmAct)| matches!(act, VmAct::Die | VmAct::Return);
        let leads = |it: &&RulePlan| it.rule.connect.vm().is_some();
        let is_certain = self.workers == 1
            && self.rules.iter().filter(leads).count() == 1
            && self.rules.iter().all(is_free)
            && self.acts.iter().all(is_calm)
            && !self.vms.iter().any(|vm| vm.acts.iter().any(dies));
        is_certain.then_some(self.limits.vm_connections)
    }

    pub(super) fn bounds(&self) -> Bounds {
        let limits = self.acts.iter().filter_map(|(_, act)| match act {
            Act::LimitVm(_, most) => Some(*most),
            _ => None,
        });
        let least = limits.min().unwrap_or(usize::MAX);
        Bounds {
            vm_connections: self.limits.vm_connections.min(least),
            vm_unanswered: self.limits.vm_unanswered,
            has_chains: self.rules.iter().any(|it| it.target.is_none()),
        }
    }

    /// What the rules lead to.
    pub(super) fn spots(&self) -> Vec<Spot> {
        let spot = |it: &RulePlan| {
            let connect = &it.rule.connect;
            let host = match connect {
                Address::Tcp(TcpAddress {
                    host: Host::Name(name),
                    ..
                }) => Some(name.clone()),
                _ => None,
            };
            let name = host.as_ref().and_then(|host| {
                let its = |(known, _): &&(String, Name)| known == host;
                self.names.iter().find(its).map(|(_, name)| name)
            });
            let places = match (connect, name) {
                (Address::Hyperkit(it), _) => vec![Place::Path(it.vm.connect_path())],
                (Address::VsockMux(it), _) => vec![Place::Path(it.path.clone())],
                (Address::Tcp(tcp), Some(Name::Found(found))) => {
                    let at = |it: &SocketAddr| SocketAddr::new(it.ip(), tcp.port);
                    found.iter().map(at).map(Place::Tcp).collect()
                }
                _ if host.is_some() => Vec::new(),
                (connect, _) => vec![place_of(connect)],
            };
            Spot {
                text: connect.to_string(),
                places,
                host,
            }
        };
        self.rules.iter().map(spot).collect()
    }

    /// Rules that lead to hyperkit and to nothing else.
    pub(super) fn rules_of_hyperkit(&self) -> BTreeSet<usize> {
        let is_moved = |rule: usize| {
            let moves =
                |(_, act): &(Duration, Act)| matches!(act, Act::Replace(it, _) if *it == rule);
            self.acts.iter().any(moves)
        };
        let is_its = |(rule, it): &(usize, &RulePlan)| {
            matches!(it.rule.connect, Address::Hyperkit(_)) && !is_moved(*rule)
        };
        let rules = self.rules.iter().enumerate();
        rules.filter(is_its).map(|(rule, _)| rule).collect()
    }

    /// Whether the process has descriptors in the end.
    pub(super) fn has_descriptors_again(&self) -> bool {
        let limits = self.acts.iter().filter_map(|(at, act)| match act {
            Act::Descriptors(most) => Some((*at, *most)),
            _ => None,
        });
        limits.max().is_none_or(|(_, most)| most > 100)
    }

    /// How much there is in it.
    pub(super) fn size(&self) -> usize {
        let vms = self.vms.iter().map(|vm| vm.acts.len()).sum::<usize>();
        self.clients.len() + self.acts.len() + self.stops.len() + vms
    }
}
