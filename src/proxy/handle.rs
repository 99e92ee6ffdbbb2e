//! What another thread can do with a proxy that runs: look at it, add and remove forwards, stop it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use crate::error::{Error, Operation, Result};
use crate::name::SocketName;
use crate::relay::CLIENT;
use crate::sys;

use super::VmLimits;
use super::forward::{Forward, Rule};
use super::mio_world::MioWorld;
use super::observer::ConnectionId;
use super::rules::Binder;
use super::status::ForwardStatus;
use super::worker::{Command, Shared, Wanted};

/// Which forward of a proxy is meant. No two of one proxy are the same, also after one was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ForwardId(pub(super) u64);

/// Its number, counted from 0.
impl From<ForwardId> for u64 {
    fn from(id: ForwardId) -> u64 {
        id.0
    }
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectionState {
    /// Its target is being connected to, or waited for.
    Dialling,
    /// Bytes can go both ways.
    Open,
    /// Carried to its end; what is left is to close it as its peers need it.
    Ending,
}

/// A connection that is carried now.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ConnectionStatus {
    /// Which one it is.
    pub id: ConnectionId,
    /// Whose it is.
    pub forward: ForwardId,
    /// Who it is from, as far as the kernel knows.
    pub peer: SocketName,
    /// How far it is.
    pub state: ConnectionState,
    /// Bytes from the accepting to the dialled side.
    pub sent: u64,
    /// Bytes from the dialled to the accepting side.
    pub received: u64,
    /// How long ago it was accepted.
    pub age: Duration,
}

/// A proxy that runs, for whoever is to look at it, change it or stop it from another thread. It doesn't keep it running.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(super) shared: Arc<Shared<MioWorld>>,
    pub(super) binder: Arc<Binder>,
}

/// How long a worker may take to answer: it does at once, unless it has ended.
const ANSWER: Duration = Duration::from_secs(5);

impl Handle {
    /// The forwards, in the order in which they were given.
    pub fn forwards(&self) -> Vec<ForwardStatus> {
        let forwards = self.shared.forwards();
        forwards.iter().map(|forward| forward.status()).collect()
    }

    /// Begins to carry another rule; how it is called.
    ///
    /// # Errors
    /// As those of [`Proxy::start`](super::Proxy::start); `NotConnected` if the proxy is stopping; `TimedOut` if its worker
    /// doesn't answer: then nothing comes of it later either.
    pub fn add(&self, rule: Rule) -> Result<ForwardId> {
        let _change = self.binder.begin_change();
        let forwards = self.shared.forwards().clone();
        let home = self.shared.next_inbox();
        let (listener, forward) = self.binder.bind::<MioWorld>(rule, home, &forwards)?;
        let (id, listen) = (forward.id, forward.rule.listen.clone());
        let fail = |e| Error::new(Operation::Listen, &listen, e);
        if self.shared.is_stopping() {
            return Err(fail(stopping()));
        }
        // Those that are there wait for their next client until there is room for it.
        let listeners = forwards.len() + 1;
        if self.shared.descriptors.room(listeners) == 0 {
            return Err(too_few_descriptors(Operation::Listen, &listen, listeners));
        }
        if forward.is_polite(CLIENT) {
            self.shared.descriptors.keep_some_for_guests();
        }
        self.shared.make_room(listeners);
        let undo = |e| {
            self.shared.make_room(forwards.len());
            fail(e)
        };
        let listen = |wanted, tell| Command::Listen(listener, Arc::clone(&forward), wanted, tell);
        let begun = self.ask(home, listen).and_then(|done| done);
        begun.map_err(undo)?;
        self.shared.keep(&forward);
        self.shared.forwards().push(forward);
        Ok(id)
    }

    /// Gives a forward another rule, which holds for the clients that are accepted from now on. Its listener stays, so that
    /// no client is refused meanwhile; those that are there go on under the rule that they came under.
    ///
    /// # Errors
    /// `InvalidInput` if the rule listens elsewhere than the old one, or can't work; `NotFound` if there is no forward of
    /// that id; what the system says if the file of its socket can't be given the new permissions; `TimedOut` if its
    /// worker doesn't answer. Then the old rule stays.
    pub fn replace(&self, id: ForwardId, rule: Rule) -> Result<()> {
        let _change = self.binder.begin_change();
        let forwards = self.shared.forwards().clone();
        let old = &forwards[index_of(&forwards, id)?];
        let others = forwards.iter().filter(|forward| forward.id != id);
        let forward = self.binder.replace(rule, old, others)?;
        let (home, mode) = (forward.home, forward.rule.mode);
        let set_mode = || match mode == old.rule.mode {
            true => Ok(()),
            false => self
                .ask(home, |wanted, tell| {
                    Command::SetMode(id, mode, wanted, tell)
                })
                .and_then(|done| done),
        };
        let replace = |wanted, tell| Command::Replace(Arc::clone(&forward), wanted, tell);
        if let Err(e) = set_mode().and_then(|()| self.ask(home, replace)) {
            forward.keep_places(None);
            self.binder.restore(old);
            return Err(Error::new(Operation::Listen, &forward.rule.listen, e));
        }
        self.shared.keep(&forward);
        let mut forwards = self.shared.forwards();
        let index = index_of(&forwards, id)?;
        forwards[index] = forward;
        Ok(())
    }

    /// Bounds the use of a VM from now on, in place of what bounded it before. Those who are connected already stay.
    pub fn limit_vm(&self, limits: &VmLimits) {
        self.binder.limit(limits);
    }

    /// Stops to listen for a forward, and forgets it. Its connections go on, and are cut off after `grace`. When this
    /// returns, its address is free again, and no new client is taken; who was connected by then, as far as the kernel is
    /// concerned, is still served.
    ///
    /// Of a hyperkit VM's port this is not without danger: a guest that dials a port on which nobody listens any more
    /// may hang its device.
    ///
    /// # Errors
    /// `NotFound` if there is none of that id; `TimedOut` if its worker doesn't answer: it is removed when the worker does.
    pub fn remove(&self, id: ForwardId, grace: Duration) -> Result<()> {
        let _change = self.binder.begin_change();
        let (forward, left) = {
            let mut forwards = self.shared.forwards();
            let index = index_of(&forwards, id)?;
            (forwards.remove(index), forwards.len())
        };
        self.shared.release(&forward);
        let answers = self.ask_all(
            |tell| Command::Remove(Arc::clone(&forward), grace, tell),
            ANSWER,
        );
        self.shared.make_room(left);
        match answers.len() < self.shared.inboxes.len() && !self.shared.is_stopping() {
            true => Err(Error::new(
                Operation::Listen,
                &forward.rule.listen,
                no_answer("it is removed as soon as it does"),
            )),
            false => Ok(()),
        }
    }

    /// The connections that are carried now, of all forwards, those that were removed included.
    pub fn connections(&self) -> Vec<ConnectionStatus> {
        let answers = self.ask_all(Command::Tell, ANSWER);
        answers.into_iter().flatten().collect()
    }

    /// Whether all workers that haven't ended answer within `patience`: none of them hangs. For a watchdog.
    pub fn answers_within(&self, patience: Duration) -> bool {
        let answers = self.ask_all(Command::Answer, patience).len();
        let ended = self.shared.ended.load(Ordering::Acquire);
        answers + ended >= self.shared.inboxes.len()
    }

    /// How many connections are not closed yet.
    pub fn live(&self) -> usize {
        self.shared.live.load(Ordering::Relaxed)
    }

    /// Whether the end has been asked for.
    pub fn is_stopping(&self) -> bool {
        self.shared.is_stopping()
    }

    /// As [`Proxy::stop`](super::Proxy::stop).
    pub fn stop(&self, grace: Duration) {
        self.shared.stop_asked.store(true, Ordering::Release);
        self.binder.let_passed_go();
        for inbox in &self.shared.inboxes {
            inbox.send(Command::Stop(grace));
        }
    }

    /// Has one worker do something that it says when it is done.
    ///
    /// # Errors
    /// `NotConnected` if it has ended, `TimedOut` if it doesn't answer. Then it doesn't do it later either.
    fn ask<T>(
        &self,
        worker: usize,
        command: impl FnOnce(Wanted, Sender<T>) -> Command<MioWorld>,
    ) -> io::Result<T> {
        let (tell, told) = channel();
        let wanted = Wanted::default();
        self.shared.inboxes[worker].send(command(wanted.clone(), tell));
        let begun = Instant::now();
        loop {
            match told.recv_timeout(LOOK) {
                Ok(answer) => return Ok(answer),
                Err(RecvTimeoutError::Disconnected) => return Err(stopping()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            let (over, late) = (self.shared.is_over(), begun.elapsed() >= ANSWER);
            if (over || late) && wanted.give_up() {
                return Err(match over {
                    true => stopping(),
                    false => no_answer("nothing was changed"),
                });
            }
            // What it has begun it ends soon, unless it is about a file on a disk that hangs.
            if begun.elapsed() >= 2 * ANSWER {
                return Err(no_answer("it has begun, and has not ended"));
            }
        }
    }

    /// Tells all workers something, and waits for their answers, at most `patience`. Those that have ended give none.
    fn ask_all<T>(
        &self,
        command: impl Fn(std::sync::mpsc::Sender<T>) -> Command<MioWorld>,
        patience: Duration,
    ) -> Vec<T> {
        let (tell, told) = channel();
        for inbox in &self.shared.inboxes {
            inbox.send(command(tell.clone()));
        }
        drop(tell);
        let end = crate::time::after(Instant::now(), patience);
        let mut answers = Vec::new();
        while answers.len() < self.shared.inboxes.len() && !self.shared.is_over() {
            match told.recv_timeout(LOOK.min(patience)) {
                Ok(answer) => answers.push(answer),
                Err(RecvTimeoutError::Timeout) if Instant::now() < end => {}
                Err(_) => break,
            }
        }
        answers
    }
}

/// How often it is looked whether there is still somebody to answer.
const LOOK: Duration = Duration::from_millis(50);

fn index_of(forwards: &[Arc<Forward>], id: ForwardId) -> Result<usize> {
    let index = forwards.iter().position(|forward| forward.id == id);
    index.ok_or_else(|| {
        let cause = io::Error::new(io::ErrorKind::NotFound, "there is none of that id");
        Error::new(Operation::Find, "the forward", cause)
    })
}

/// The error for a proxy whose listeners leave no descriptors for connections.
pub(super) fn too_few_descriptors(
    operation: Operation,
    subject: impl std::fmt::Display,
    listeners: usize,
) -> Error {
    let limit = sys::descriptor_limit().unwrap_or(u64::MAX);
    let why = format!(
        "the process may have {limit} descriptors, and {listeners} listeners leave none for a connection"
    );
    Error::new(operation, subject, io::Error::other(why))
        .with_remedy("raise the limit with `ulimit -n`")
}

fn no_answer(so: &str) -> io::Error {
    let why = format!("its worker has not answered in time; {so}");
    io::Error::new(io::ErrorKind::TimedOut, why)
}

fn stopping() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the proxy is stopping")
}
