//! Clients that connect to the proxy, and servers that it connects to.

use std::io::{self, ErrorKind};
use std::rc::Rc;
use std::time::Duration;

use fastrand::Rng;

use super::judge::{Candour, Role};
use super::kernel::{ListenerKey, Owner, Place, SocketId};
use super::stage::{Actor, Stage};
use super::talk::{Ends, Exit, Manner, Talk};

/// How a service behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Service {
    /// Says what it hears, and ends when the client has.
    Echo,
    /// Hears all, and answers then.
    Answers(u64),
    /// Says so much, and hears what comes.
    Source(u64),
    /// Says much, and never ends.
    Endless(u64),
    /// Hears all, and never ends.
    IgnoresEof,
    /// Resets after so many bytes.
    Resets(u64),
    /// Hears nothing.
    NeverReads,
    /// Closes as soon as it is there.
    Closes,
    /// Says so much, and closes.
    SaysAndCloses(u64),
    /// Says something again and again, whatever comes.
    SendsOn,
}

impl Service {
    /// Whether a orderly client gets its answer from it, whole.
    pub(super) fn serves(self) -> bool {
        matches!(
            self,
            Service::Echo | Service::Answers(_) | Service::Source(_)
        )
    }

    pub(super) fn manner(self, rng: &mut Rng) -> Manner {
        let piece = [40, 64, 1_000, 5_000][rng.usize(..4)];
        let mut manner = Manner::orderly(0, piece);
        manner.ends = Ends::AfterOther;
        if rng.u8(..4) == 0 {
            manner.pause = Duration::from_micros(rng.u64(1..3_000));
        }
        match self {
            Service::Echo => manner.echoes = true,
            Service::Answers(n) => (manner.says, manner.answers) = (n, true),
            Service::Source(n) => (manner.says, manner.ends) = (n, Ends::WhenSaid),
            Service::Endless(n) => (manner.says, manner.ends) = (n, Ends::Never),
            Service::IgnoresEof => (manner.says, manner.ends) = (8, Ends::Never),
            Service::Resets(n) => {
                manner.says = n + 4;
                manner.vanishes = Some((n, Exit::Reset));
            }
            Service::NeverReads => (manner.reads, manner.ends) = (0, Ends::Never),
            Service::Closes => manner.ends = Ends::Closes,
            Service::SaysAndCloses(n) => (manner.says, manner.ends) = (n, Ends::Closes),
            Service::SendsOn => {
                (manner.says, manner.ends, manner.piece) = (u64::MAX, Ends::Never, 16);
                manner.pause = Duration::from_millis([200, 500, 3_000][rng.usize(..3)]);
            }
        }
        // A guest that reboots forgets its connections, and tells nobody.
        let patience = match self {
            _ if self.serves() => 1_000_000,
            Service::SendsOn => [1_000, 8_000, 30_000][rng.usize(..3)],
            _ => [1_000, 20_000, 90_000][rng.usize(..3)],
        };
        manner.patience = Some(Duration::from_millis(patience));
        manner
    }
}

/// A client that is to come.
#[derive(Clone, Debug)]
pub(super) struct ClientPlan {
    pub(super) at: Duration,
    /// The rule at whose listener it connects.
    pub(super) rule: usize,
    pub(super) place: Place,
    pub(super) manner: Manner,
    pub(super) is_orderly: bool,
    pub(super) seed: u64,
}

#[derive(Debug)]
enum ClientStage {
    ToCome,
    Connecting(SocketId),
    Talking(Box<Talk>),
    Gone,
}

#[derive(Debug)]
pub(super) struct Client {
    plan: ClientPlan,
    me: usize,
    step: ClientStage,
    rng: Rng,
}

impl Client {
    pub(super) fn new(plan: ClientPlan, me: usize) -> Client {
        let rng = Rng::with_seed(plan.seed);
        Client {
            plan,
            me,
            step: ClientStage::ToCome,
            rng,
        }
    }

    fn connect(&mut self, stage: &Rc<Stage>) -> Option<Duration> {
        let connected = stage
            .kernel()
            .connect(&self.plan.place, Owner::Actor(self.me));
        match connected {
            Ok(socket) => {
                stage.log(|| {
                    format!(
                        "client {} connects to rule {} ({socket:?}): {:?}",
                        self.me, self.plan.rule, self.plan.manner
                    )
                });
                self.step = ClientStage::Connecting(socket);
                self.go_on(stage)
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock && !self.gives_up(stage) => {
                let pause = self.rng.u64(1..100);
                Some(stage.now() + Duration::from_millis(pause))
            }
            Err(e) => {
                self.turn_away(&e, stage);
                None
            }
        }
    }

    /// Whether it has waited long enough to be accepted: whoever was before it may stay for ever.
    fn gives_up(&self, stage: &Rc<Stage>) -> bool {
        let patience = self.plan.manner.patience;
        patience.is_some_and(|time| stage.now() >= self.plan.at + time)
    }

    /// Notes that nobody has accepted the client. A timeout of a client that is rude says nothing.
    fn turn_away(&mut self, error: &io::Error, stage: &Rc<Stage>) {
        let (me, rule, now) = (self.me, self.plan.rule, stage.now());
        stage.log(|| format!("client {me} can't connect: {error}"));
        let is_late = matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock);
        if self.plan.is_orderly || !is_late {
            stage.judge().turned_away(rule, error, now);
        }
        self.step = ClientStage::Gone;
    }

    fn go_on(&mut self, stage: &Rc<Stage>) -> Option<Duration> {
        let ClientStage::Connecting(socket) = self.step else {
            return None;
        };
        let connected = stage.kernel().connected(socket);
        match connected {
            Ok(true) => {
                let candour = match stage.kernel().is_unix(socket) {
                    true => Candour::Conceals,
                    false => Candour::Tells,
                };
                let now = stage.now();
                let role = Role::Client(self.plan.rule);
                let born = stage.kernel().born(socket);
                let is_orderly = self.plan.is_orderly;
                let voice = stage.judge().voice(role, candour, is_orderly, born);
                stage.log(|| format!("client {} is connected: voice {voice}", self.me));
                let rng = self.rng.fork();
                let talk = Talk::new(socket, voice, self.plan.manner.clone(), rng, now);
                self.step = ClientStage::Talking(Box::new(talk));
                Some(now)
            }
            Ok(false) => {
                if self.gives_up(stage) {
                    stage.kernel().close(socket);
                    self.turn_away(&ErrorKind::TimedOut.into(), stage);
                    return None;
                }
                let patience = self.plan.manner.patience;
                patience.map(|time| self.plan.at + time)
            }
            Err(e) => {
                stage.kernel().close(socket);
                self.turn_away(&e, stage);
                None
            }
        }
    }
}

impl Actor for Client {
    fn describe(&self) -> String {
        format!("client {}: {:?} of {:?}", self.me, self.step, self.plan)
    }

    fn act(&mut self, stage: &Rc<Stage>) -> Option<Duration> {
        if stage.now() < self.plan.at {
            return Some(self.plan.at);
        }
        match &mut self.step {
            ClientStage::ToCome => self.connect(stage),
            ClientStage::Connecting(_) => self.go_on(stage),
            ClientStage::Talking(talk) => {
                let again = talk.act(stage);
                if talk.is_over() {
                    let (voice, finish) = (talk.voice, talk.finish);
                    stage.log(|| format!("client {} (voice {voice}): {finish:?}", self.me));
                    self.step = ClientStage::Gone;
                }
                again
            }
            ClientStage::Gone => None,
        }
    }

    fn is_done(&self) -> bool {
        matches!(self.step, ClientStage::Gone)
    }
}

/// A server that the proxy's rules lead to.
#[derive(Clone, Debug)]
pub(super) struct ServerPlan {
    /// The number of the target that it is.
    pub(super) target: usize,
    pub(super) place: Place,
    pub(super) service: Service,
    /// When it begins to listen.
    pub(super) opens: Duration,
    /// When it stops to, if it does.
    pub(super) shuts: Option<Duration>,
    /// How long it takes to accept a client, at most.
    pub(super) slow: Duration,
    pub(super) seed: u64,
}

#[derive(Debug)]
pub(super) struct Server {
    plan: ServerPlan,
    me: usize,
    listener: Option<ListenerKey>,
    has_shut: bool,
    accepts_at: Duration,
    talks: Vec<(Talk, Option<Duration>)>,
    rng: Rng,
}

impl Server {
    pub(super) fn new(plan: ServerPlan, me: usize) -> Server {
        let rng = Rng::with_seed(plan.seed);
        Server {
            accepts_at: plan.opens,
            plan,
            me,
            listener: None,
            has_shut: false,
            talks: Vec::new(),
            rng,
        }
    }

    /// Listens, if it is time to.
    pub(super) fn open(&mut self, stage: &Rc<Stage>) {
        if self.listener.is_none() && !self.has_shut && stage.now() >= self.plan.opens {
            let owner = Owner::Actor(self.me);
            let listener = stage.kernel().listen(&self.plan.place, owner);
            self.listener = listener.ok();
            self.has_shut = self.listener.is_none();
        }
    }

    fn accept(&mut self, stage: &Rc<Stage>) {
        let Some(key) = self.listener else {
            return;
        };
        let now = stage.now();
        if now < self.accepts_at {
            return;
        }
        let accepted = stage.kernel().accept(key);
        let Ok(socket) = accepted else {
            return;
        };
        if !self.plan.slow.is_zero() {
            let pause = self.rng.u64(0..=self.plan.slow.as_micros() as u64);
            self.accepts_at = now + Duration::from_micros(pause);
        }
        let candour = match stage.kernel().is_unix(socket) {
            true => Candour::Conceals,
            false => Candour::Tells,
        };
        let role = Role::Service(self.plan.target);
        let born = stage.kernel().born(socket);
        let voice = stage.judge().voice(role, candour, false, born);
        stage.log(|| {
            let (target, service) = (self.plan.target, self.plan.service);
            format!("target {target} ({service:?}) accepts {socket:?}: voice {voice}")
        });
        let manner = self.plan.service.manner(&mut self.rng);
        let talk = Talk::new(socket, voice, manner, self.rng.fork(), now);
        self.talks.push((talk, Some(now)));
    }
}

impl Actor for Server {
    fn describe(&self) -> String {
        format!("server {}: {:?} of {:?}", self.me, self.talks, self.plan)
    }

    fn act(&mut self, stage: &Rc<Stage>) -> Option<Duration> {
        let now = stage.now();
        self.open(stage);
        if let (Some(at), Some(key)) = (self.plan.shuts, self.listener)
            && now >= at
        {
            stage.log(|| format!("target {} shuts", self.plan.target));
            stage.kernel().close_listener(key);
            (self.listener, self.has_shut) = (None, true);
        }
        self.accept(stage);
        for (talk, again) in &mut self.talks {
            *again = talk.act(stage);
            if let Some(finish) = talk.finish {
                stage.log(|| format!("voice {} of a service: {finish:?}", talk.voice));
            }
        }
        self.talks.retain(|(talk, _)| !talk.is_over());
        let waits = |key| stage.kernel().waiting(key) > 0;
        let accept = self.listener.filter(|key| waits(*key));
        let opens = (self.listener.is_none() && !self.has_shut).then_some(self.plan.opens);
        let shuts = self.plan.shuts.filter(|_| !self.has_shut);
        let talks = self.talks.iter().filter_map(|(_, again)| *again).min();
        [
            accept.map(|_| self.accepts_at.max(now)),
            opens,
            shuts,
            talks,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn is_done(&self) -> bool {
        self.talks.is_empty()
    }
}
