//! What no schedule may break: who gets which bytes, how a talk ends, and what is left at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::Duration;

use crate::engine::connection::State;
use crate::engine::end_reason::EndReason;
use crate::engine::relay::Side;
use crate::proxy::worker::Worker;

use super::audit::Audit;
use super::driver::{SimDriver, SimWorld};
use super::ledger::Ledger;
use super::talk::{Exit, Finish, Talk, Voice};

/// Where a peer stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// It has connected to the proxy, by the listener of the rule of that number.
    Client(usize),
    /// The proxy has connected to it, where the targets of that number are.
    Service(usize),
}

/// Of a peer: whether the proxy can be told by it, and it by the proxy, that a talk broke off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Candour {
    /// A reset is an error (TCP, AF_VSOCK).
    Tells,
    /// An end is all that it reads (Unix sockets).
    Conceals,
}

/// After what time a connection is open for certain.
const OPENS: Duration = Duration::from_millis(500);

/// What is known of one peer's talk.
#[derive(Clone, Debug)]
pub(super) struct Record {
    pub(super) role: Role,
    pub(super) candour: Candour,
    /// Of a client: it is to get all that its service says, if nothing stands in the way.
    pub(super) is_orderly: bool,
    said: u64,
    heard: u64,
    heard_voice: Option<Voice>,
    /// It has said all that it wanted, and ended what it says in order.
    has_ended_well: bool,
    /// It was ended from outside: its VM has died, or has forgotten it.
    pub(super) was_struck: bool,
    /// So by the death of its VM, of which others are told.
    killed: Option<Duration>,
    /// When its socket was made.
    born: Duration,
    ended: Option<Duration>,
    pub(super) finish: Option<Finish>,
}

/// What may keep a orderly client from its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Hazard {
    /// For the clients of that rule.
    Rule(usize),
    /// For all.
    All,
}

/// A state that a connection is in, or comes from and goes to.
pub(super) type Phase = &'static str;

/// How connections go from state to state. Those that threads carry are not simulated.
pub(super) const TRANSITIONS: [(Phase, Phase); 15] = [
    ("new", "waiting"),
    // A probe, which wants to be refused.
    ("new", "closing"),
    ("waiting", "connecting"),
    ("waiting", "closing"),
    ("waiting", "closed"),
    ("connecting", "waiting"),
    ("connecting", "proving"),
    ("connecting", "relaying"),
    ("connecting", "closing"),
    ("connecting", "closed"),
    ("proving", "waiting"),
    ("proving", "relaying"),
    ("proving", "closing"),
    ("relaying", "closing"),
    // Its time is made shorter.
    ("closing", "closed"),
];

#[derive(Debug, Default)]
pub(super) struct Judge {
    records: Vec<Record>,
    /// Who has heard a voice first.
    heard_by: BTreeMap<Voice, Voice>,
    hazards: Vec<(Duration, Hazard)>,
    /// What connections were in after the last turn of their worker.
    states: BTreeMap<(usize, u64), Phase>,
    /// What was counted, for what a run is worth.
    pub(super) counts: BTreeMap<&'static str, u64>,
    /// When those who are there have had their time.
    pub(super) ends_by: Option<Duration>,
    pub(super) audit: Audit,
    pub(super) ledger: Ledger,
    /// Targets that end a connection in silence though they have not accepted it.
    pub(super) unclear_targets: BTreeSet<usize>,
    /// A VM has few slots: one that is full refuses what its guest has not heard of.
    pub(super) has_few_slots: bool,
    /// Targets behind AF_VSOCK.
    pub(super) vsock_targets: BTreeSet<usize>,
    /// To which targets rules lead, and have led: from when, until when.
    leads: BTreeMap<usize, Vec<(Option<usize>, Duration, Duration)>>,
    /// Connections that the observer was told of.
    pub(super) observed: BTreeMap<u64, Observed>,
    /// Connections that the operator has closed.
    pub(super) closed: BTreeSet<u64>,
    /// Which forwards a rule has been, and whether nobody has cut its clients off.
    forwards: BTreeMap<u64, usize>,
    /// Rules whose clients were cut off before they were accepted, or whose connections were.
    cut: BTreeSet<usize>,
}

/// What the observer was told of a connection.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Observed {
    pub(super) forward: u64,
    pub(super) accepted: u32,
    pub(super) connected: u32,
    pub(super) refused: u32,
    pub(super) closed: u32,
    pub(super) sent: u64,
    pub(super) received: u64,
    pub(super) why: Option<EndReason>,
}

impl Judge {
    /// Gives a peer a voice.
    pub(super) fn voice(
        &mut self,
        role: Role,
        candour: Candour,
        is_orderly: bool,
        born: Duration,
    ) -> Voice {
        self.records.push(Record {
            role,
            candour,
            is_orderly,
            said: 0,
            heard: 0,
            heard_voice: None,
            has_ended_well: false,
            was_struck: false,
            killed: None,
            born,
            ended: None,
            finish: None,
        });
        self.records.len() as Voice - 1
    }

    pub(super) fn record(&self, voice: Voice) -> &Record {
        &self.records[voice as usize]
    }

    fn record_mut(&mut self, voice: Voice) -> &mut Record {
        &mut self.records[voice as usize]
    }

    /// Counts something that has happened.
    pub(super) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// Counts something that has happened so often.
    pub(super) fn count_some(&mut self, what: &'static str, count: u64) {
        if count > 0 {
            *self.counts.entry(what).or_default() += count;
        }
    }

    /// Notes what may keep clients from their answers.
    pub(super) fn hazard(&mut self, now: Duration, hazard: Hazard) {
        self.hazards.push((now, hazard));
    }

    fn note(&mut self, talk: &Talk) {
        let record = self.record_mut(talk.voice);
        record.said = talk.said;
        record.heard = talk.ear.heard;
        record.heard_voice = talk.ear.voice();
    }

    /// A peer has heard something: of a voice that nobody else hears.
    pub(super) fn heard(&mut self, talk: &Talk) {
        self.note(talk);
        let Some(voice) = talk.ear.voice() else {
            return;
        };
        let known = usize::try_from(voice).is_ok_and(|index| index < self.records.len());
        assert!(
            known,
            "voice {} has heard {voice}, which is none",
            talk.voice
        );
        if voice == talk.voice {
            return;
        }
        self.check_target(talk.voice, voice);
        let first = *self.heard_by.entry(voice).or_insert(talk.voice);
        assert_eq!(first, talk.voice, "two have heard voice {voice}");
        // Who hears it is heard by it, if by anybody.
        if let Some(back) = self.record(voice).heard_voice {
            assert!(
                back == talk.voice || back == voice,
                "voice {voice} hears {back}, and is heard by {}",
                talk.voice
            );
        }
    }

    /// A peer has read an EOF.
    pub(super) fn heard_end(&mut self, talk: &Talk) {
        self.note(talk);
        self.check_end(talk);
    }

    pub(super) fn half_closed(&mut self, talk: &Talk) {
        self.note(talk);
        self.record_mut(talk.voice).has_ended_well = !talk.is_gagged;
    }

    /// A talk has ended.
    pub(super) fn finished(&mut self, talk: &Talk, now: Duration) {
        self.note(talk);
        let record = self.record_mut(talk.voice);
        record.ended = Some(now);
        record.finish = talk.finish;
        // What is unread at the close is a reset to the other; so it is not for the judge to say
        // what that one is to hear.
        record.has_ended_well |= talk.finish == Some(Finish::Left(Exit::Close));
        let what = match (record.role, talk.finish) {
            (Role::Client(_), Some(Finish::Eof)) => "clients that read EOF",
            (Role::Client(_), Some(Finish::Broken(_))) => "clients that were reset",
            (Role::Client(_), _) => "clients that left",
            (Role::Service(_), Some(Finish::Eof)) => "services that read EOF",
            (Role::Service(_), Some(Finish::Broken(_))) => "services that were reset",
            (Role::Service(_), _) => "services that left",
        };
        self.count(what);
    }

    /// A client could not connect to the listener of a rule.
    pub(super) fn turned_away(&mut self, rule: usize, error: &io::Error, now: Duration) {
        self.count("clients that nobody listened for");
        assert!(
            self.is_endangered(rule, now),
            "a client of rule {rule} is turned away: {error}"
        );
    }

    /// The end of the proxy was asked for; those who are there have that time.
    pub(super) fn stop_asked(&mut self, now: Duration, grace: Duration) {
        let at = now + grace;
        self.audit.stop_asked(now);
        self.ends_by = Some(self.ends_by.map_or(at, |before| before.min(at)));
    }

    /// Notes that all or some of the process stands still until that time.
    pub(super) fn stands_still(&mut self, until: Duration) {
        self.audit.stands_still(until);
        self.ledger.stands_still(until);
    }

    /// Notes that a rule may lead to that target from now on, beside where it led before. (`None`:
    /// anywhere.)
    pub(super) fn leads(&mut self, rule: usize, now: Duration, target: Option<usize>) {
        let leads = self.leads.entry(rule).or_default();
        leads.push((target, now, Duration::MAX));
    }

    /// Notes that a rule leads to that target alone from now on.
    pub(super) fn leads_alone(&mut self, rule: usize, now: Duration, target: Option<usize>) {
        let leads = self.leads.entry(rule).or_default();
        for (_, _, until) in leads.iter_mut() {
            *until = now.min(*until);
        }
        leads.push((target, now, Duration::MAX));
    }

    /// Whether a rule may have led there, of a client that has come then.
    fn may_lead(&self, rule: usize, target: usize, born: Duration) -> bool {
        let leads = self.leads.get(&rule).into_iter().flatten();
        let mut leads = leads.filter(|(_, _, until)| *until >= born);
        leads.any(|(to, _, _)| to.is_none_or(|to| to == target))
    }

    /// Ends a talk, by the death of its VM.
    pub(super) fn killed(&mut self, voice: Voice, now: Duration) {
        self.record_mut(voice).killed = Some(now);
    }

    /// Ends a talk from outside.
    pub(super) fn struck(&mut self, voice: Voice) {
        self.record_mut(voice).was_struck = true;
    }

    /// Takes how much of what a client was sent is lost, as it is reset.
    pub(super) fn check_loss(&self, talk: &Talk, lost: Option<u64>) {
        let Role::Client(rule) = self.record(talk.voice).role else {
            return;
        };
        // Once the end was asked for, nobody has the time to wait for what is on its way.
        let is_clear = !self.audit.is_disturbed() && !self.is_endangered(rule, Duration::MAX);
        assert!(
            !is_clear || lost.is_none_or(|lost| lost == 0),
            "voice {} is reset, and {lost:?} bytes to it are lost",
            talk.voice
        );
    }

    /// What a clean EOF may be: the end of a whole answer, or of a whole question.
    fn check_end(&self, talk: &Talk) {
        let me = self.record(talk.voice);
        let other = match talk.ear.voice() {
            // What it has said came back: from who has heard it.
            Some(voice) if voice == talk.voice => self.heard_by.get(&voice).copied(),
            Some(voice) => Some(voice),
            None => self.heard_by.get(&talk.voice).copied(),
        };
        let Some(other) = other else {
            return self.check_silent_end(me, talk);
        };
        let it = self.record(other);
        // One that was reset may have been so by this very end.
        let unclear = matches!(it.finish, Some(Finish::Broken(_)))
            || matches!(it.finish, Some(Finish::Left(Exit::Close)))
            || talk.is_gagged;
        if unclear || me.candour == Candour::Conceals {
            return;
        }
        let whole = it.has_ended_well && it.said == talk.ear.heard;
        let can_be_told = match it.was_struck {
            // Of what a VM forgets nobody is told.
            true => false,
            // Only over TCP is it passed on, and of one that was open by then.
            false if it.killed.is_some() => {
                let opened = me.born.max(it.born) + OPENS;
                let is_vsock = |target| self.vsock_targets.contains(target);
                it.killed.is_some_and(|at| at > opened)
                    && !self.audit.is_disturbed()
                    && !matches!(&me.role, Role::Service(target) if is_vsock(target))
            }
            false => it.candour == Candour::Tells || it.finish.is_none(),
        };
        assert!(
            whole || !can_be_told,
            "voice {} has read a clean EOF after {} bytes, and voice {other} has said {} and {}",
            talk.voice,
            talk.ear.heard,
            it.said,
            match it.has_ended_well {
                true => "ended",
                false => "not ended",
            }
        );
    }

    /// Who hear each other are a client and one of those that its rule leads to.
    fn check_target(&self, one: Voice, other: Voice) {
        let (one, other) = (self.record(one), self.record(other));
        let (rule, target, born) = match (one.role, other.role) {
            (Role::Client(rule), Role::Service(target)) => (rule, target, one.born),
            (Role::Service(target), Role::Client(rule)) => (rule, target, other.born),
            _ => return,
        };
        assert!(
            self.may_lead(rule, target, born),
            "a client of rule {rule}, come at {born:?}, was led to target {target}"
        );
    }

    /// A clean EOF before the first byte is that of a service which has ended, not a refusal.
    fn check_silent_end(&self, me: &Record, talk: &Talk) {
        let Role::Client(rule) = me.role else {
            return;
        };
        // After its half-close, a guest's refusal can't be told from an empty answer.
        let is_unclear =
            self.has_few_slots || talk.is_gagged || talk.half_closed || talk.ear.heard > 0;
        let mut targets = self.unclear_targets.iter();
        let is_unclear = is_unclear || targets.any(|it| self.may_lead(rule, *it, me.born));
        if me.candour == Candour::Conceals || is_unclear {
            return;
        }
        let ended = |it: &&Record| {
            let Role::Service(target) = it.role else {
                return false;
            };
            let has_ended = it.has_ended_well || it.was_struck || it.finish.is_some();
            has_ended && it.born >= me.born && self.may_lead(rule, target, me.born)
        };
        assert!(
            self.records.iter().any(|it| ended(&it)),
            "voice {} of rule {rule} has read a clean EOF, and was not served",
            talk.voice
        );
    }

    /// Whether something stood in the way of a rule's clients up to that time.
    fn is_endangered(&self, rule: usize, until: Duration) -> bool {
        let stands =
            |hazard: &Hazard| matches!(hazard, Hazard::All) || *hazard == Hazard::Rule(rule);
        let mut hazards = self.hazards.iter();
        hazards.any(|(at, hazard)| *at <= until && stands(hazard))
    }

    /// What orderly clients may expect, if nothing stood in their way: a whole answer, and that all
    /// they said was heard.
    pub(super) fn check_served(&self) {
        for (voice, record) in (0..).zip(&self.records) {
            let Role::Client(rule) = record.role else {
                continue;
            };
            let ended = record.ended.unwrap_or(Duration::MAX);
            if !record.is_orderly || self.is_endangered(rule, ended) {
                continue;
            }
            assert_eq!(
                record.finish,
                Some(Finish::Eof),
                "voice {voice} had nothing in its way, and was not served: {record:?}"
            );
            // What has gone wrong later may have kept what it said from its service.
            if record.said == 0 || self.is_endangered(rule, Duration::MAX) {
                continue;
            }
            let Some(other) = self.heard_by.get(&voice) else {
                panic!("nobody has heard voice {voice}, which had nothing in its way");
            };
            assert_eq!(self.record(*other).heard, record.said, "of voice {voice}");
        }
    }

    /// Notes that a rule is that forward from now on.
    pub(super) fn is_forward(&mut self, rule: usize, forward: u64) {
        self.forwards.insert(forward, rule);
    }

    /// Notes that clients of a rule are cut off.
    pub(super) fn cuts(&mut self, rule: usize) {
        self.cut.insert(rule);
    }

    /// Who was cut off though nobody has served it was refused, and counted so: where rules lead to
    /// hyperkit, and its guest lets nobody in.
    pub(super) fn check_refused(&self, rules: &BTreeSet<usize>) {
        let serves = |it: &Record| matches!(it.role, Role::Service(_));
        if !self.audit.still().is_zero() || self.has_few_slots {
            return;
        }
        for rule in rules.iter().filter(|rule| !self.cut.contains(rule)) {
            let leads = |target| self.may_lead(*rule, target, Duration::ZERO);
            let is_served = self.records.iter().filter(|it| serves(it)).any(|it| {
                let Role::Service(target) = it.role else {
                    return false;
                };
                leads(target)
            });
            if is_served {
                continue;
            }
            let its = |it: &&Record| {
                let is_its = it.role == Role::Client(*rule) && it.candour == Candour::Tells;
                let broken = matches!(it.finish, Some(Finish::Broken(_)));
                let is_early = it.ended.is_some_and(|at| self.audit.is_before_stop(at));
                is_its && broken && is_early && it.heard == 0 && !it.has_ended_well
            };
            let broken = self.records.iter().filter(its).count() as u64;
            let forwards = self.forwards.iter().filter(|(_, it)| *it == rule);
            let refused: u64 = forwards.map(|(id, _)| self.ledger.refused_of(*id)).sum();
            assert!(
                broken <= refused,
                "{broken} clients of rule {rule} were cut off, and {refused} refused"
            );
        }
    }

    /// Looks at a worker's connections after its turn.
    pub(super) fn look_at(
        &mut self,
        index: usize,
        worker: &mut Worker<SimDriver>,
        world: &SimWorld,
    ) {
        self.audit.look_at(worker, world);
        let mut seen = BTreeSet::new();
        for id in worker.connections.table.ids() {
            let Some(conn) = worker.connections.table.get_mut(id) else {
                continue;
            };
            let state = match &conn.state {
                State::Waiting { .. }
                    if conn.retries.as_ref().is_some_and(|it| it.redial.is_some()) =>
                {
                    "held"
                }
                State::Waiting { .. } => "waiting",
                State::Connecting { .. } => "connecting",
                State::Proving { .. } => "proving",
                State::Relaying { pair, .. } if pair.is_half_closed() => "half closed",
                State::Relaying { .. } => "relaying",
                State::OnThreads => "on threads",
                State::Closing { .. } if conn.name.is_none() => "probing",
                State::Closing { .. } => "closing",
                State::Closed => panic!("a connection is left between two states"),
            };
            let key = (index, id.token(Side::Client) as u64);
            seen.insert(key);
            let before = self.states.insert(key, state).unwrap_or("new");
            if let ("new", Some(name)) = (before, conn.name) {
                self.ledger.comes_under(name.into(), &conn.forward);
            }
            if before != state {
                world.log(|| {
                    let name = conn.name.map_or("probe".into(), |name| {
                        format!("connection {}", u64::from(name))
                    });
                    format!("worker {index}: {name}: {before} -> {state}")
                });
            }
        }
        let gone: Vec<_> = self
            .states
            .range((index, 0)..=(index, u64::MAX))
            .map(|(key, _)| *key)
            .filter(|key| !seen.contains(key))
            .collect();
        for key in gone {
            self.states.remove(&key);
        }
    }

    /// What the observer was told, at the end: each connection accepted once, refused once at most,
    /// closed once.
    pub(super) fn check_observed(&self) {
        for (connection, it) in &self.observed {
            assert!(
                it.accepted == 1
                    && it.closed == 1
                    && it.why.is_some()
                    && it.connected <= 1
                    && it.refused <= 1,
                "connection {connection}: {it:?}"
            );
        }
    }
}
