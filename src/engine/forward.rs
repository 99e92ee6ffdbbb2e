//! One rule of the proxy in the form that its workers share, with its gates, counters and health.
//!
//! It opens no socket: the listener and the connections hold a reference to it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use tracing::warn;

use crate::address::{Address, EofRefusal, HalfClose, Reset, Waiter};
use crate::dial::FailedAddresses;
use crate::engine::relay::Side;
use crate::error::Error;
use crate::lock::lock;
use crate::name::Peer;

use crate::engine::admission::{Full, Gate, Reservation};
use crate::engine::counters::Tally;
use crate::engine::end_reason::RefusalReason;
use crate::engine::ended::Ended;
use crate::engine::health::{self, ForwardsTo, Health, News};
use crate::engine::id::{ConnectionId, ForwardId};
use crate::engine::log_limiter::LogLimiter;
use crate::engine::observer::{Event, Observer, What};
use crate::engine::rule::Rule;
use crate::engine::status::{ForwardStatus, StatusCell};

/// Whether the access log's lines have the level info, not debug. It can be changed at any time.
#[derive(Debug)]
pub(crate) struct AccessLog(AtomicBool);

impl AccessLog {
    pub(crate) fn new(is_on: bool) -> AccessLog {
        AccessLog(is_on.into())
    }

    pub(crate) fn set(&self, is_on: bool) {
        self.0.store(is_on, Ordering::Relaxed);
    }

    pub(crate) fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// To whom the connections of a forward are reported.
#[derive(Clone, Debug)]
pub(crate) struct Reports {
    pub(crate) observer: Option<Observer>,
    pub(crate) access_log: Arc<AccessLog>,
    pub(crate) ended: Arc<Ended>,
}

/// A rule, and all that its connections share.
#[derive(Debug)]
pub(crate) struct Forward {
    pub(crate) id: ForwardId,
    /// The index of the worker that has the listener; 0 unless it is set.
    pub(crate) home: usize,
    /// The rule, with the address that was bound.
    pub(crate) rule: Arc<Rule>,
    /// The address that the rule asked for.
    pub(crate) asked: Address,
    /// The gate of each side's VM, where the side is a VM.
    pub(crate) gates: [Option<Arc<Gate>>; 2],
    /// The kind of waiter that each side's sockets need.
    waiters: [Waiter; 2],
    /// The counters. They, the status cell and the cut stay the same when the rule is replaced.
    pub(crate) tally: Arc<Tally>,
    pub(crate) status_cell: Arc<StatusCell>,
    pub(crate) log_limiter: LogLimiter,
    /// The limiter of the lines about the target's absence, which no other line must keep back:
    /// clients that are refused for it are logged nowhere else.
    absence_limiter: LogLimiter,
    /// The limiter of the lines about clients that were accepted and wait for their VM.
    wait_limiter: LogLimiter,
    /// The health of the target, where no gate keeps it.
    health: Mutex<Health>,
    /// What is known of the addresses of the target's name.
    addresses: Mutex<FailedAddresses>,
    /// The slots of the VM that the forward has reserved, until it is removed.
    pub(crate) quota: Mutex<Option<Reservation>>,
    /// Whether the forward was removed and the time of its connections is over.
    pub(crate) cut: Arc<AtomicBool>,
    /// Whether the forward was removed and its listener is closed.
    pub(crate) closed: Arc<AtomicBool>,
    reports: Reports,
}

impl Forward {
    /// Makes a forward. `waiter` is [`Waiter::of`] or a substitute.
    pub(crate) fn new(
        id: ForwardId,
        rule: Rule,
        asked: Address,
        gates: [Option<Arc<Gate>>; 2],
        quota: Option<Reservation>,
        waiter: fn(&Address) -> Waiter,
        reports: Reports,
    ) -> Forward {
        Forward {
            id,
            home: 0,
            waiters: [waiter(&rule.listen), waiter(&rule.connect)],
            rule: Arc::new(rule),
            asked,
            gates,
            tally: Arc::default(),
            status_cell: Arc::default(),
            log_limiter: LogLimiter::default(),
            absence_limiter: LogLimiter::default(),
            wait_limiter: LogLimiter::default(),
            health: Mutex::default(),
            addresses: Mutex::default(),
            quota: Mutex::new(quota),
            cut: Arc::default(),
            closed: Arc::default(),
            reports,
        }
    }

    /// Returns the same forward, listening where it did, with another rule for the connections that
    /// are accepted from now on.
    pub(crate) fn with_rule(
        &self,
        rule: Rule,
        gates: [Option<Arc<Gate>>; 2],
        quota: Option<Reservation>,
        waiter: Waiter,
    ) -> Forward {
        Forward {
            id: self.id,
            home: self.home,
            rule: Arc::new(rule),
            asked: self.asked.clone(),
            gates,
            waiters: [self.waiters[Side::Client], waiter],
            tally: Arc::clone(&self.tally),
            status_cell: Arc::clone(&self.status_cell),
            log_limiter: LogLimiter::default(),
            absence_limiter: LogLimiter::default(),
            wait_limiter: LogLimiter::default(),
            health: Mutex::default(),
            addresses: Mutex::default(),
            quota: Mutex::new(quota),
            cut: Arc::clone(&self.cut),
            closed: Arc::clone(&self.closed),
            reports: self.reports.clone(),
        }
    }

    /// Notifies the observer, if there is one.
    pub(crate) fn notify_observer(&self, connection: ConnectionId, peer: Peer, what: What<'_>) {
        if let Some(observer) = &self.reports.observer {
            observer.notify(&Event {
                forward: self.id,
                connection,
                peer: peer.name,
                process: peer.process,
                what,
            });
        }
    }

    /// Returns the list of the connections that have ended.
    pub(crate) fn ended(&self) -> &Ended {
        &self.reports.ended
    }

    pub(crate) fn access_log(&self) -> &AccessLog {
        &self.reports.access_log
    }

    /// Returns what the forward is called in the log: its name, or else the address at which it
    /// listens.
    pub(crate) fn label(&self) -> String {
        match &self.rule.name {
            Some(name) => name.clone(),
            None => self.rule.listen.to_string(),
        }
    }

    /// Returns what is known of the addresses of the target's name. The lock is held for moments.
    pub(crate) fn addresses(&self) -> MutexGuard<'_, FailedAddresses> {
        lock(&self.addresses)
    }

    /// Returns whether the forward was removed and the time of its connections is over.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    /// Returns whether connections of that side must be closed by half-close, drain, close.
    pub(crate) fn needs_graceful_close(&self, side: Side) -> bool {
        self.address(side).transport().needs_graceful_close
    }

    /// Returns whether a failure of a connection of that side may mean that its VM is gone.
    pub(crate) fn resets_when_gone(&self, side: Side) -> bool {
        self.address(side).transport().vm.resets_when_gone
    }

    /// Returns whether connections are relayed by threads.
    pub(crate) fn is_on_threads(&self) -> bool {
        self.waiters.contains(&Waiter::Thread) && !self.waiters.contains(&Waiter::Poller)
    }

    /// Returns whether no poller can wait for the sockets of `side`.
    pub(crate) fn is_blocking(&self, side: Side) -> bool {
        self.waiters[side] == Waiter::Thread
    }

    /// Returns whether no poller can wait for `side` and only a poller can wait for the other side,
    /// so that an adapter is needed between them.
    pub(crate) fn needs_adapter(&self, side: Side) -> bool {
        self.is_blocking(side) && self.waiters[side.other()] == Waiter::Poller
    }

    /// Returns what is known of a refusal of the target, if its family refuses by an EOF.
    pub(crate) fn refusal_by_eof(&self) -> Option<EofRefusal> {
        self.rule.connect.transport().refusal.by_eof()
    }

    /// Returns whether a half-close that `side` reads makes its VMM end the guest's direction as
    /// well.
    pub(crate) fn half_close_ends_both(&self, side: Side) -> bool {
        self.address(side).half_close() == HalfClose::BothDirections
    }

    /// Returns whether a reset can tell a peer of that side that its connection broke off.
    pub(crate) fn can_reset(&self, side: Side) -> bool {
        self.address(side).transport().reset == Reset::EitherEnd
    }

    fn address(&self, side: Side) -> &Address {
        match side {
            Side::Client => &self.rule.listen,
            Side::Server => &self.rule.connect,
        }
    }

    /// Returns the gate that status reports are about: that of the VM dialled, or else that of the
    /// VM that dials.
    pub(crate) fn gate(&self) -> Option<&Arc<Gate>> {
        self.gates[Side::Server]
            .as_ref()
            .or(self.gates[Side::Client].as_ref())
    }

    /// Replaces the reservation of slots.
    pub(crate) fn set_quota(&self, quota: Option<Reservation>) {
        *lock(&self.quota) = quota;
    }

    /// Gives the reserved slots back.
    pub(crate) fn release_quota(&self) {
        self.set_quota(None);
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        lock(&self.health)
    }

    /// Logs that clients begin to wait for their VM.
    pub(crate) fn note_wait(&self, why: &Full, now: Instant) {
        if self.wait_limiter.admit("full", now).is_some() {
            let listen = &self.rule.listen;
            warn!("clients of {listen} wait: {why}");
        }
    }

    /// Marks the target down after a dial that found it absent.
    fn mark_down(&self, error: &Error, now: Instant) {
        if let Some(gate) = &self.gates[Side::Server] {
            return gate.mark_down(error, now);
        }
        // A target that comes and goes all the time is not logged each time.
        let is_reported = self.health().is_up() == Some(false);
        if !is_reported && self.absence_limiter.admit(ABSENT, now).is_some() {
            let news = self.health().mark_down(now);
            self.log_failed_dial(news, error);
        }
    }

    /// Marks the target up after a dial that found it.
    pub(crate) fn mark_up(&self, now: Instant) {
        match &self.gates[Side::Server] {
            Some(gate) if gate.is_seen_by_dials() => gate.mark_up(now),
            Some(_) => {}
            None => {
                let news = self.health().mark_up(now);
                self.log_change(news);
            }
        }
    }

    /// Notes what a dial that failed for that reason says about the target's health.
    pub(crate) fn note_failed_dial(&self, reason: RefusalReason, error: &Error, now: Instant) {
        let gate = self.gates[Side::Server].as_ref();
        match (reason, gate.filter(|gate| gate.is_seen_by_dials())) {
            (RefusalReason::Absent, _) | (RefusalReason::DialTimeout, Some(_)) => {
                self.mark_down(error, now)
            }
            // It was the guest that refused it.
            (RefusalReason::ByTarget, Some(gate)) => gate.mark_up(now),
            _ => {}
        }
    }

    /// Logs a change of the target's health, where no gate does.
    fn log_change(&self, news: Option<News>) {
        self.log_news(news, None);
    }

    /// Logs a change of the target's health that a failed dial has shown, where no gate does.
    fn log_failed_dial(&self, news: Option<News>, error: &Error) {
        self.log_news(news, Some(error));
    }

    fn log_news(&self, news: Option<News>, error: Option<&Error>) {
        if let Some(news) = news {
            let mut forwards = ForwardsTo::default();
            *forwards.count_of(self.rule.while_down()) = 1;
            health::log_change(news, &self.rule.connect, error, forwards);
        }
    }

    /// Returns the forward's status.
    pub(crate) fn status(&self, now: Instant) -> ForwardStatus {
        ForwardStatus {
            id: self.id,
            rule: Rule {
                listen: self.asked.clone(),
                ..Rule::clone(&self.rule)
            },
            listen: self.rule.listen.clone(),
            state: self.status_cell.state(),
            note: self.status_cell.note(),
            vm: self.gate().map(|gate| gate.status(now)),
            last_error: {
                let connected = self.tally.connected.load(Ordering::Relaxed);
                self.status_cell.last_error(connected)
            },
            counters: self.tally.counters(),
        }
    }
}

/// The log limiter's key for absent targets.
const ABSENT: &str = "absent";
