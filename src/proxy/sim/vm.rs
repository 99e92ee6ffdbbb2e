//! A VM: hyperkit's device with its guest, or one of the VMMs behind a `CONNECT` line.
//!
//! The device is single-threaded. What its clients must not do is judged by the rules of a strict
//! stand-in ([`broken_rule`]); of dials it is known how many may go how fast, and how many may be
//! unanswered, so that is judged as well.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use fastrand::Rng;

use crate::address::{AnyVm, HyperkitVm, PORT_ANY, Port, VsockMuxAddress};
use crate::simulate::judge::{HostEnd, Origin, broken_rule};
use crate::simulate::rules::Strictness;

use super::cast::Service;
use super::judge::{Candour, Hazard, Role};
use super::kernel::{Fate, ListenerKey, Owner, Place, SocketId};
use super::stage::{Actor, Stage};
use super::talk::{Manner, Talk};

/// The bytes of hyperkit's line.
const LINE: usize = 18;

/// The distance that dials keep on the average, and how many may follow each other at once (rule 5
/// of a good neighbour).
const INTERVAL: Duration = Duration::from_micros(150);
const BURST: u32 = 8;

/// Dials that the proxy may lose to a guest that never answers, beyond its limit.
const LOST: u64 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Hyperkit,
    /// A VMM that takes a `CONNECT` line; whether it carries half-closes.
    Mux {
        half_close: bool,
    },
}

/// What happens to a VM.
#[derive(Clone, Debug)]
pub(super) enum VmAct {
    Pause,
    Resume,
    /// The guest forgets all its connections.
    Reboot,
    Die,
    /// It is started anew.
    Return,
    /// A program in the guest dials the port of the host that is that rule's.
    Dial {
        rule: usize,
        port: u32,
        manner: Manner,
        is_orderly: bool,
    },
}

#[derive(Clone, Debug)]
pub(super) struct VmPlan {
    pub(super) kind: Kind,
    /// The state directory; of a VMM its socket.
    pub(super) path: PathBuf,
    /// What listens in the guest: the port, the number of the target, the service.
    pub(super) ports: Vec<(u32, usize, Service)>,
    pub(super) slots: usize,
    /// Another process has begun to listen for it, and is gone.
    pub(super) is_inherited: bool,
    /// The limit of unanswered dials that the proxy has.
    pub(super) unanswered: u64,
    /// That of its connections; none if it changes.
    pub(super) connections: Option<usize>,
    /// How long the guest takes to answer a dial, at most.
    pub(super) slow: Duration,
    pub(super) acts: Vec<(Duration, VmAct)>,
    /// Rules that lead here or come from here.
    pub(super) rules: Vec<usize>,
    pub(super) seed: u64,
}

impl VmPlan {
    fn hyperkit(&self) -> HyperkitVm {
        HyperkitVm::new(&self.path)
    }

    pub(super) fn vm(&self) -> AnyVm {
        match self.kind {
            Kind::Hyperkit => self.hyperkit().into(),
            Kind::Mux { .. } => AnyVm::VsockMux(self.path.clone()),
        }
    }
}

#[derive(Debug)]
enum Guest {
    /// Its line has not come whole.
    Line(Vec<u8>),
    Unanswered(u32),
    Talks(Box<Talk>),
    /// The guest knows nothing of it.
    Forgotten,
    /// Nor will it hear of it: the host had ended it before.
    Lost,
}

#[derive(Debug)]
struct Slot {
    socket: SocketId,
    origin: Origin,
    since: Duration,
    guest: Guest,
    is_judged: bool,
    again: Option<Duration>,
}

#[derive(Debug)]
pub(super) struct Vm {
    plan: VmPlan,
    me: usize,
    acts: VecDeque<(Duration, VmAct)>,
    listener: Option<ListenerKey>,
    is_paused: bool,
    slots: Vec<Slot>,
    /// Dials that the guest has not answered since it answers, closed ones included.
    unanswered: u64,
    /// Sockets that wait for the guest's answer, in order.
    dials: VecDeque<SocketId>,
    answers_at: Duration,
    /// When the next dial would be due if all kept their distance.
    due: Duration,
    /// Dials of the host that its backlog had no room for.
    pending: Vec<(Duration, VmAct)>,
    was_there: bool,
    restarts: u32,
    /// Sockets that it has closed while it lived.
    closed: Vec<SocketId>,
    rng: Rng,
}

impl Vm {
    pub(super) fn new(plan: VmPlan, me: usize) -> Vm {
        let mut acts = plan.acts.clone();
        acts.sort_by_key(|(at, _)| *at);
        Vm {
            rng: Rng::with_seed(plan.seed),
            acts: acts.into(),
            plan,
            me,
            listener: None,
            is_paused: false,
            slots: Vec::new(),
            unanswered: 0,
            dials: VecDeque::new(),
            answers_at: Duration::ZERO,
            due: Duration::ZERO,
            pending: Vec::new(),
            was_there: false,
            restarts: 0,
            closed: Vec::new(),
        }
    }

    fn is_hyperkit(&self) -> bool {
        self.plan.kind == Kind::Hyperkit
    }

    fn place(&self) -> Place {
        Place::Path(match self.plan.kind {
            Kind::Hyperkit => self.plan.hyperkit().connect_path(),
            Kind::Mux { .. } => self.plan.path.clone(),
        })
    }

    /// Starts it.
    pub(super) fn start(&mut self, stage: &Rc<Stage>) {
        let place = self.place();
        let listener = stage.kernel().listen(&place, Owner::Actor(self.me));
        self.listener = listener.ok();
        if let Some(key) = self.listener.filter(|_| self.plan.is_inherited) {
            stage.kernel().inherit(key);
        }
        if self.is_hyperkit() {
            let vm = self.plan.hyperkit();
            stage.kernel().make_file(&vm.pid_path(), None);
            let process = self.rng.i32(1..10_000);
            stage
                .world
                .processes
                .borrow_mut()
                .insert(vm.state_dir, process);
        }
        stage.kernel().lost.remove(&self.plan.path);
        stage.world.is_ready(&self.plan.path, stage.now());
        (self.is_paused, self.was_there) = (false, true);
        (self.unanswered, self.due) = (0, stage.now());
    }

    fn endanger(&self, stage: &Rc<Stage>) {
        let now = stage.now();
        for rule in &self.plan.rules {
            stage.judge().hazard(now, Hazard::Rule(*rule));
        }
    }

    fn carry_out(&mut self, act: VmAct, stage: &Rc<Stage>) {
        let (vm, now) = (self.me, stage.now());
        if !matches!(act, VmAct::Dial { .. }) {
            stage.log(|| format!("VM {vm}: {act:?}"));
            self.endanger(stage);
        }
        match act {
            VmAct::Pause => {
                self.is_paused = true;
                stage.world.is_ready(&self.plan.path, Duration::MAX);
            }
            VmAct::Resume => {
                self.is_paused = false;
                stage.world.is_ready(&self.plan.path, now);
                self.unanswered = 0;
            }
            VmAct::Reboot => {
                let is_hyperkit = self.is_hyperkit();
                // A later dial's end tells that it has answered those before, which it forgot.
                for rule in &self.plan.rules {
                    stage.judge().cuts(*rule);
                }
                for slot in &mut self.slots {
                    match &slot.guest {
                        Guest::Talks(talk) => {
                            stage.judge().struck(talk.voice);
                            slot.guest = Guest::Forgotten;
                        }
                        Guest::Unanswered(_) if is_hyperkit => {
                            slot.guest = match stage.kernel().has_peer_ended(slot.socket) {
                                true => Guest::Lost,
                                false => Guest::Forgotten,
                            };
                        }
                        _ => {}
                    }
                }
                if is_hyperkit {
                    self.dials.clear();
                    self.unanswered = 0;
                }
                stage.world.is_ready(&self.plan.path, now);
            }
            VmAct::Die => self.die(stage),
            VmAct::Return if self.listener.is_none() => {
                self.restarts += 1;
                self.start(stage);
            }
            VmAct::Return => {}
            VmAct::Dial { .. } if self.listener.is_none() || self.is_paused => {}
            VmAct::Dial {
                rule,
                port,
                manner,
                is_orderly,
            } => self.dial_host(rule, port, manner, is_orderly, stage),
        }
    }

    fn die(&mut self, stage: &Rc<Stage>) {
        let Some(key) = self.listener.take() else {
            return;
        };
        stage.world.is_ready(&self.plan.path, Duration::MAX);
        if self.is_hyperkit() {
            let directory = self.plan.hyperkit().state_dir;
            stage.world.processes.borrow_mut().remove(&directory);
        }
        let now = stage.now();
        stage.kernel().end_listener(key);
        self.dials.clear();
        self.closed.clear();
        for slot in self.slots.drain(..) {
            if let Guest::Talks(talk) = &slot.guest {
                // Of the end of a process that nobody was told of, nobody is told.
                let is_unknown = self.plan.is_inherited && slot.origin == Origin::Line;
                match is_unknown {
                    true => stage.judge().struck(talk.voice),
                    false => stage.judge().killed(talk.voice, now),
                }
            }
            let mut kernel = stage.kernel();
            kernel.gone.insert(slot.socket);
            kernel.close_as(
                slot.socket,
                match self.plan.is_inherited {
                    true => Fate::Ended,
                    false => Fate::Died,
                },
            );
        }
    }

    fn dial_host(
        &mut self,
        rule: usize,
        port: u32,
        manner: Manner,
        is_orderly: bool,
        stage: &Rc<Stage>,
    ) {
        let path = match self.plan.kind {
            Kind::Hyperkit => self.plan.hyperkit().listen_path(Port(port)),
            Kind::Mux { half_close } => {
                let path = self.plan.path.clone();
                let port = Port(port);
                VsockMuxAddress {
                    path,
                    port,
                    half_close,
                }
                .listen_path()
            }
        };
        let owner = Owner::Actor(self.me);
        let connected = stage.kernel().connect(&Place::Path(path), owner);
        let now = stage.now();
        match connected {
            Ok(socket) => {
                let role = Role::Client(rule);
                let voice = stage
                    .judge()
                    .voice(role, Candour::Conceals, is_orderly, now);
                stage.log(|| {
                    format!("VM {}: the guest dials rule {rule} ({socket:?}): voice {voice}, {manner:?}", self.me)
                });
                let talk = Talk::new(socket, voice, manner, self.rng.fork(), now);
                self.slots.push(Slot {
                    socket,
                    origin: Origin::Guest,
                    since: now,
                    guest: Guest::Talks(Box::new(talk)),
                    is_judged: false,
                    again: Some(now),
                });
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                let again = now + Duration::from_millis(self.rng.u64(1..100));
                let act = VmAct::Dial {
                    rule,
                    port,
                    manner,
                    is_orderly,
                };
                self.pending.push((again, act));
            }
            // On hyperkit: its device hangs where somebody has listened and nobody does.
            Err(e) => stage.judge().turned_away(rule, &e, now),
        }
    }

    fn accept(&mut self, stage: &Rc<Stage>) {
        let Some(key) = self.listener else {
            return;
        };
        let accepted = stage.kernel().accept(key);
        let Ok(socket) = accepted else {
            return;
        };
        let now = stage.now();
        if self.slots.len() >= self.plan.slots {
            stage.log(|| format!("VM {}: no slot for {socket:?}", self.me));
            stage.judge().count("clients of a VM without a slot");
            self.endanger(stage);
            stage.kernel().close(socket);
            return;
        }
        if self.is_hyperkit() {
            let dialled = stage.kernel().born(socket);
            self.judge_pace(dialled);
            self.judge_number(stage);
        }
        self.slots.push(Slot {
            socket,
            origin: Origin::Line,
            since: now,
            guest: Guest::Line(Vec::new()),
            is_judged: false,
            again: Some(now),
        });
    }

    /// The proxy has no more connections than it may have, those included whose slots are lost.
    fn judge_number(&self, stage: &Rc<Stage>) {
        let kernel = stage.kernel();
        let is_open = |it: &&Slot| it.origin == Origin::Line && !kernel.has_peer_closed(it.socket);
        let before = self.slots.iter().filter(is_open).count();
        // Which VM a guest's dial is from is known only once its restart was seen.
        let lost = match self.restarts {
            0 => kernel.lost.get(&self.plan.path).map_or(0, Vec::len),
            _ => 0,
        };
        let most = self.plan.connections;
        assert!(
            most.is_none_or(|most| before + lost < most),
            "{before} connections, {lost} slots lost, and one more, of {most:?}"
        );
    }

    /// Dials keep their distance.
    fn judge_pace(&mut self, dialled: Duration) {
        let earliest = self.due.saturating_sub(INTERVAL * (BURST - 1));
        assert!(
            dialled >= earliest,
            "dials of a VM follow each other too fast"
        );
        self.due = self.due.max(dialled) + INTERVAL;
    }

    /// Reads a dial's line: hyperkit's comes whole, with its connection.
    fn read_line(&mut self, index: usize, stage: &Rc<Stage>) {
        let slot = &mut self.slots[index];
        let Guest::Line(line) = &mut slot.guest else {
            return;
        };
        let port = match self.plan.kind {
            Kind::Hyperkit => {
                let mut bytes = [0; LINE];
                let read = stage.kernel().read(slot.socket, &mut bytes);
                match read {
                    Ok(n) => assert_eq!(n, LINE, "hyperkit reads its line at once"),
                    // Its program is gone: nothing to be dialled.
                    Err(_) => return slot.guest = Guest::Forgotten,
                }
                let text = String::from_utf8_lossy(&bytes);
                let port = text.split('.').nth(1).map(str::trim_end);
                port.and_then(|port| u32::from_str_radix(port, 16).ok())
            }
            Kind::Mux { .. } => {
                let mut byte = [0];
                loop {
                    let read = stage.kernel().read(slot.socket, &mut byte);
                    match read {
                        Ok(1) if byte[0] == b'\n' => break,
                        Ok(1) => line.push(byte[0]),
                        Ok(_) => return slot.guest = Guest::Forgotten,
                        Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                        Err(_) => return slot.guest = Guest::Forgotten,
                    }
                }
                let text = String::from_utf8_lossy(line).into_owned();
                let port = text.strip_prefix("CONNECT ");
                port.and_then(|port| port.parse().ok())
            }
        };
        let port = port.expect("a dial's line is right");
        slot.guest = Guest::Unanswered(port);
        self.dials.push_back(slot.socket);
        self.unanswered += 1;
        if self.is_hyperkit() && self.is_paused {
            assert!(
                self.unanswered <= self.plan.unanswered + LOST,
                "{} dials without an answer",
                self.unanswered
            );
        }
        let is_dial =
            |slot: &&Slot| matches!(slot.guest, Guest::Unanswered(port) if port != PORT_ANY.0);
        let dials = self.slots.iter().filter(is_dial).count() as u64;
        // A device without a slot ends what the guest has not heard of as if that had answered.
        let is_crowded = self.slots.len() >= self.plan.slots;
        assert!(
            !self.is_hyperkit() || is_crowded || dials <= self.plan.unanswered,
            "{dials} dials without an answer, of {} that may be",
            self.plan.unanswered
        );
        let pause = self.rng.u64(0..=self.plan.slow.as_micros() as u64);
        self.answers_at = stage.now() + Duration::from_micros(pause);
    }

    /// The guest answers the first dial.
    fn answer(&mut self, stage: &Rc<Stage>) {
        let now = stage.now();
        if self.is_paused || now < self.answers_at {
            return;
        }
        let Some(socket) = self.dials.pop_front() else {
            return;
        };
        self.unanswered = self.dials.len() as u64;
        let Some(index) = self.slots.iter().position(|slot| slot.socket == socket) else {
            return;
        };
        let Guest::Unanswered(port) = self.slots[index].guest else {
            return;
        };
        let Some((_, target, service)) = self.plan.ports.iter().find(|it| it.0 == port) else {
            stage.log(|| format!("VM {}: the guest refuses port {port} ({socket:?})", self.me));
            stage.kernel().close(socket);
            self.slots.swap_remove(index);
            return;
        };
        if !self.is_hyperkit() {
            let written = stage.kernel().write(socket, b"OK 1073741824\n");
            if written.is_err() {
                stage.kernel().close(socket);
                self.slots.swap_remove(index);
                return;
            }
        }
        let role = Role::Service(*target);
        let born = stage.kernel().born(socket);
        let voice = stage.judge().voice(role, Candour::Conceals, false, born);
        stage.log(|| {
            format!(
                "VM {}: the guest takes port {port} ({socket:?}): voice {voice}, {service:?}",
                self.me
            )
        });
        let manner = service.manner(&mut self.rng);
        let talk = Talk::new(socket, voice, manner, self.rng.fork(), now);
        let slot = &mut self.slots[index];
        slot.guest = Guest::Talks(Box::new(talk));
        slot.again = Some(now);
    }

    /// Looks whether a host's program has closed against a rule.
    fn judge(&mut self, index: usize, stage: &Rc<Stage>) {
        let slot = &mut self.slots[index];
        let has_closed = stage.kernel().has_peer_closed(slot.socket);
        if !self.plan.kind.eq(&Kind::Hyperkit) || slot.is_judged || !has_closed {
            return;
        }
        slot.is_judged = true;
        let kernel = stage.kernel();
        let end = HostEnd {
            reset: kernel.error_of(slot.socket) == Some(nix::libc::ECONNRESET),
            sent: kernel.moved(slot.socket)[0],
            host_shut: kernel.has_half_closed(slot.socket),
            // A strict device doesn't ask.
            undelivered: false,
            age: kernel.now - slot.since,
        };
        let has_input = || kernel.unread(slot.socket) > 0;
        let broken = broken_rule(slot.origin, end, Strictness::Strict, has_input);
        assert!(
            broken.is_none(),
            "hyperkit's device is hurt: {} ({:?}, {end:?})",
            broken.map(|rule| rule.to_string()).unwrap_or_default(),
            slot.origin
        );
    }

    /// Lets the guest's program go on; a VMM ends both directions when the host has ended one.
    fn go_on(&mut self, index: usize, stage: &Rc<Stage>) {
        let is_mux = !self.is_hyperkit();
        let slot = &mut self.slots[index];
        match &mut slot.guest {
            Guest::Talks(talk) if !self.is_paused => {
                slot.again = talk.act(stage);
                let ends_both = self.plan.kind == Kind::Mux { half_close: false };
                let over = talk.is_over();
                if over {
                    let (voice, finish) = (talk.voice, talk.finish);
                    stage.log(|| format!("voice {voice} in a guest: {finish:?}"));
                }
                if ends_both && !over && talk.heard_end {
                    // What the guest has not said by now is lost.
                    stage.judge().struck(talk.voice);
                    stage.kernel().close(slot.socket);
                    slot.guest = Guest::Forgotten;
                }
            }
            // Who sends or half-closes on one that the guest has forgotten gets an end.
            Guest::Lost => {
                let mut kernel = stage.kernel();
                if kernel.has_peer_closed(slot.socket) {
                    kernel.close(slot.socket);
                }
                slot.again = None;
            }
            Guest::Forgotten if !self.is_paused => {
                let mut kernel = stage.kernel();
                if kernel.has_peer_ended(slot.socket) || kernel.unread(slot.socket) > 0 || is_mux {
                    kernel.close(slot.socket);
                }
                slot.again = None;
            }
            _ => slot.again = None,
        }
    }
}

impl Actor for Vm {
    fn describe(&self) -> String {
        format!("VM {}: {:?} of {:?}", self.me, self.slots, self.plan)
    }

    fn act(&mut self, stage: &Rc<Stage>) -> Option<Duration> {
        let now = stage.now();
        if !self.was_there {
            self.start(stage);
        }
        while self.acts.front().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, act)) = self.acts.pop_front() {
                self.carry_out(act, stage);
            }
        }
        let due = self.pending.extract_if(.., |(at, _)| *at <= now);
        for (_, act) in due.collect::<Vec<_>>() {
            self.carry_out(act, stage);
        }
        self.accept(stage);
        for index in 0..self.slots.len() {
            self.judge(index, stage);
            self.read_line(index, stage);
            self.go_on(index, stage);
        }
        if self.is_hyperkit() {
            let kernel = stage.kernel();
            let hurt = |socket: &&SocketId| kernel.closed_unread.contains(socket);
            let hurt = self.closed.iter().find(hurt);
            assert!(
                hurt.is_none(),
                "{hurt:?} was closed with bytes of the guest unread"
            );
        }
        self.answer(stage);
        let is_over = |slot: &mut Slot| match &slot.guest {
            Guest::Talks(talk) => talk.is_over(),
            Guest::Forgotten | Guest::Lost => stage.kernel().is_closed(slot.socket),
            _ => false,
        };
        let over: Vec<_> = self.slots.extract_if(.., is_over).collect();
        for slot in over {
            self.closed.push(slot.socket);
        }
        let waits = |key| stage.kernel().waiting(key) > 0;
        let answers = !self.is_paused && !self.dials.is_empty();
        [
            self.acts.front().map(|(at, _)| *at),
            self.pending.iter().map(|(at, _)| *at).min(),
            self.listener.filter(|key| waits(*key)).map(|_| now),
            answers.then_some(self.answers_at.max(now)),
            self.slots.iter().filter_map(|slot| slot.again).min(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn is_done(&self) -> bool {
        let talks = |slot: &Slot| matches!(slot.guest, Guest::Talks(_));
        self.acts.is_empty() && self.pending.is_empty() && !self.slots.iter().any(talks)
    }
}
