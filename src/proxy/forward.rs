//! One rule of the proxy as its workers share it, and what they count of it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::address::Address;
use crate::error::Error;
use crate::listener::DEFAULT_MODE;
use crate::name::SocketName;
use crate::relay::{CLIENT, SERVER};
use crate::stream::nonblocking::Waiter;

use super::counters::Tally;
use super::gate::{Gate, Reservation};
use super::handle::ForwardId;
use super::observer::{ConnectionId, Event, Observer, What};
use super::presence::{self, News, Presence};
use super::status::{Board, ForwardStatus};

/// Every connection accepted at `listen` is carried to `connect`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rule {
    /// What people call it. No two of a proxy have the same.
    pub name: Option<String>,
    /// Where to listen. A `hyperkit://` address is the port of the host (CID 2) that the guest dials, whatever its CID.
    pub listen: Address,
    /// Where each connection goes.
    pub connect: Address,
    /// Permissions of the file of a Unix listening socket, as for `chmod`: 0o600 lets only the owner connect. Named
    /// pipes take no other; their address can say who may connect.
    pub mode: u32,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// How long a client is held whose target is not there or refuses, while it is dialled again and again; counted from
    /// the accept, and [`Timeouts::dial`] does not bound it. Nothing of what the client sends is sent before it is known
    /// that the target has taken the connection. `None`: such a client is refused at once.
    pub wait: Option<Duration>,
    /// Places among [`Limits::connections`](super::Limits::connections) that only this rule's connections
    /// may have, and where a side of it is a hyperkit VM as many among
    /// [`Limits::vm_connections`](super::Limits::vm_connections).
    pub reserved: usize,
    /// Connections of this rule at a time; more clients wait in the listener's backlog. Guests that dial
    /// the host are not bound by it. `None`: what bounds all rules bounds it.
    pub connections: Option<usize>,
}

impl Rule {
    /// A rule whose Unix socket, if it has one, only its owner may use.
    pub fn new(listen: Address, connect: Address) -> Rule {
        Rule {
            name: None,
            listen,
            connect,
            mode: DEFAULT_MODE,
            timeouts: Timeouts::default(),
            wait: None,
            reserved: 0,
            connections: None,
        }
    }
}

/// How long the connections of a rule may take for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Timeouts {
    /// How long a client may wait until its target is connected; a `hvsock://` one has a second at most.
    pub dial: Duration,
    /// How long a guest may take to end a connection after the half-close, before it is closed all the same. Guests of
    /// Hyper-V are guests, too.
    pub drain: Duration,
    /// How long an open connection may go on without a byte either way before it is cut off: its client and its target
    /// are told that it broke off, where their family can tell, and guests are taken leave of. `None`: for ever.
    /// A connection with a `hvsock://` side may take a quarter longer.
    pub idle: Option<Duration>,
    /// The same for a connection of which one side has ended: how long no byte may come from the other. `None`: for ever.
    pub half_closed: Option<Duration>,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            dial: Duration::from_secs(30),
            drain: Duration::from_secs(60),
            idle: None,
            half_closed: None,
        }
    }
}

/// A rule, and all that its connections share.
#[derive(Debug)]
pub(crate) struct Forward {
    pub(super) id: ForwardId,
    /// The worker that has its listener; the first unless it is set.
    pub(super) home: usize,
    /// The rule, with the address that was bound.
    pub(crate) rule: Rule,
    /// The address that the rule asked for.
    pub(super) asked: Address,
    /// The gate of the VM on each side that is hyperkit's.
    pub(crate) gates: [Option<Arc<Gate>>; 2],
    /// What can wait for the sockets of each side.
    waiters: [Waiter; 2],
    /// This, the board and the cut stay the same when the rule becomes another.
    pub(super) tally: Arc<Tally>,
    pub(super) board: Arc<Board>,
    pub(crate) complaints: Complaints,
    /// Whether its target is there, where no gate knows it.
    presence: Mutex<Presence>,
    /// The places of its VM that it keeps, until it is removed.
    pub(super) places: Mutex<Option<Reservation>>,
    /// It was removed, and the time of its connections is over.
    pub(super) cut: Arc<AtomicBool>,
    observer: Option<Observer>,
}

impl Forward {
    /// `waiter`: see [`Waiter::of`].
    pub(crate) fn new(
        id: ForwardId,
        rule: Rule,
        asked: Address,
        gates: [Option<Arc<Gate>>; 2],
        places: Option<Reservation>,
        waiter: fn(&Address) -> Waiter,
        observer: Option<Observer>,
    ) -> Forward {
        Forward {
            id,
            home: 0,
            waiters: [waiter(&rule.listen), waiter(&rule.connect)],
            rule,
            asked,
            gates,
            tally: Arc::default(),
            board: Arc::default(),
            complaints: Complaints::default(),
            presence: Mutex::default(),
            places: Mutex::new(places),
            cut: Arc::default(),
            observer,
        }
    }

    /// The same forward, which listens where it did, with another rule for those that come from now on.
    pub(super) fn with_rule(
        &self,
        rule: Rule,
        gates: [Option<Arc<Gate>>; 2],
        places: Option<Reservation>,
        waiter: Waiter,
    ) -> Forward {
        Forward {
            id: self.id,
            home: self.home,
            rule,
            asked: self.asked.clone(),
            gates,
            waiters: [self.waiters[CLIENT], waiter],
            tally: Arc::clone(&self.tally),
            board: Arc::clone(&self.board),
            complaints: Complaints::default(),
            presence: Mutex::default(),
            places: Mutex::new(places),
            cut: Arc::clone(&self.cut),
            observer: self.observer.clone(),
        }
    }

    /// Tells the observer, if there is one.
    pub(super) fn tell(&self, connection: ConnectionId, peer: SocketName, what: What<'_>) {
        if let Some(observer) = &self.observer {
            observer.tell(&Event {
                forward: self.id,
                connection,
                peer,
                what,
            });
        }
    }

    pub(super) fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    /// Whether connections of that side are ended by half-close, drain, close.
    pub(crate) fn is_polite(&self, side: usize) -> bool {
        self.address(side).is_delicate()
    }

    /// Whether its connections are carried by threads of their own.
    pub(crate) fn is_bridged(&self) -> bool {
        self.waiters.contains(&Waiter::Thread) && !self.waiters.contains(&Waiter::Poller)
    }

    /// Whether no poller can wait for the end of `side`.
    pub(crate) fn is_blocking(&self, side: usize) -> bool {
        self.waiters[side] == Waiter::Thread
    }

    /// Whether no poller can wait for the end of `side`, and nothing but a poller for the other: a crossing lies between.
    pub(crate) fn is_crossed(&self, side: usize) -> bool {
        self.is_blocking(side) && self.waiters[1 - side] == Waiter::Poller
    }

    /// Whether a half-close that `side` reads makes its VMM end the guest's direction as well.
    pub(crate) fn takes_half_close_for_the_end(&self, side: usize) -> bool {
        self.address(side).takes_half_close_for_the_end()
    }

    /// Whether a peer of that side can be told, by a reset, that its connection broke off.
    pub(super) fn can_reset(&self, side: usize) -> bool {
        matches!(self.address(side), Address::Tcp(_))
    }

    fn address(&self, side: usize) -> &Address {
        match side {
            CLIENT => &self.rule.listen,
            _ => &self.rule.connect,
        }
    }

    /// The gate of the VM that is spoken of where one is meant: the one that it leads to, or else the one that dials it.
    pub(super) fn gate(&self) -> Option<&Arc<Gate>> {
        self.gates[SERVER].as_ref().or(self.gates[CLIENT].as_ref())
    }

    /// How long its clients are held while the target isn't there.
    pub(super) fn wait(&self) -> Option<Duration> {
        self.rule.wait.filter(|wait| !wait.is_zero())
    }

    /// Keeps these places, and no others.
    pub(super) fn keep_places(&self, places: Option<Reservation>) {
        *self.places.lock().unwrap_or_else(PoisonError::into_inner) = places;
    }

    fn presence(&self) -> MutexGuard<'_, Presence> {
        self.presence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A dial has found nobody.
    pub(super) fn found_nobody(&self, error: &Error, now: Instant) {
        if let Some(gate) = &self.gates[SERVER] {
            return gate.found_nobody(error, now);
        }
        // What comes and goes all the time isn't told of each time.
        let told = self.presence().is_up() == Some(false);
        if !told && self.complaints.admit(ABSENT, now).is_some() {
            let news = self.presence().failed(now);
            self.tell_news(news, Some(error));
        }
    }

    /// A dial has found somebody.
    pub(super) fn found(&self, now: Instant) {
        if self.gates[SERVER].is_none() {
            let news = self.presence().connected(now);
            self.tell_news(news, None);
        }
    }

    fn tell_news(&self, news: Option<News>, error: Option<&Error>) {
        if let Some(news) = news {
            let clients = match self.wait() {
                None => [1, 0],
                Some(_) => [0, 1],
            };
            presence::tell(news, &self.rule.connect, error, clients);
        }
    }

    pub(super) fn status(&self, now: Instant) -> ForwardStatus {
        ForwardStatus {
            id: self.id,
            rule: Rule {
                listen: self.asked.clone(),
                ..self.rule.clone()
            },
            listen: self.rule.listen.clone(),
            state: self.board.state(),
            vm: self.gate().map(|gate| gate.status(now)),
            last_error: self.board.last_error(),
            counters: self.tally.counters(),
        }
    }
}

/// The key of complaints about targets that are not there.
const ABSENT: &str = "absent";

/// Lets one complaint through now and then: what a peer can cause again and again must not fill the log.
#[derive(Debug, Default)]
pub(crate) struct Complaints(Mutex<Option<Heard>>);

#[derive(Debug)]
struct Heard {
    text: String,
    at: Instant,
    more: u64,
}

/// At most one complaint in this time, unless its text is a new one.
const QUIET: Duration = Duration::from_secs(60);
/// At most one complaint in this time at all.
const SILENT: Duration = Duration::from_secs(1);

impl Complaints {
    /// How many complaints were swallowed since the last one, if this one may be said.
    pub(crate) fn admit(&self, text: &str, now: Instant) -> Option<u64> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(heard) = &mut *last {
            let quiet = if heard.text == text { QUIET } else { SILENT };
            if now.saturating_duration_since(heard.at) < quiet {
                heard.more += 1;
                return None;
            }
        }
        let more = last.take().map_or(0, |heard| heard.more);
        *last = Some(Heard {
            text: text.to_owned(),
            at: now,
            more: 0,
        });
        Some(more)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_repeats_is_said_once_and_counted() {
        let complaints = Complaints::default();
        let start = Instant::now();
        assert_eq!(complaints.admit("down", start), Some(0));
        for i in 1..10 {
            assert_eq!(
                complaints.admit("down", start + Duration::from_secs(i)),
                None
            );
        }
        assert_eq!(
            complaints.admit("refused", start + Duration::from_secs(10)),
            Some(9)
        );
        assert_eq!(
            complaints.admit("down", start + Duration::from_millis(10_500)),
            None
        );
        assert_eq!(
            complaints.admit("down", start + Duration::from_secs(12)),
            Some(1)
        );
    }
}
