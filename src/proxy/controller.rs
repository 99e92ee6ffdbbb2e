//! The operations on a running proxy from outside of its workers, with any driver. They reach the
//! workers through their inboxes, and wait for the answers.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use crate::engine::relay::{Side, Through};
use crate::error::{Error, Operation, Result};

use super::cuts::Cuts;
use super::driver::Driver;
use super::driver::StillWanted;
use super::rules::Binder;
use super::shared::{Shared, WorkerCommand};
use crate::engine::ended::EndedConnection;
use crate::engine::forward::Forward;
use crate::engine::id::{ConnectionId, ForwardId};
use crate::engine::rule::{Rule, VmLimits};
use crate::engine::status::{CarriedBytes, ConnectionStatus, ForwardStatus};

/// The implementation of [`Handle`](super::Handle) for any driver. What a method does is said
/// there, at the method of the same name.
#[derive(Debug)]
pub(super) struct Controller<D: Driver> {
    pub(super) shared: Arc<Shared<D>>,
    pub(super) binder: Arc<Binder>,
}

impl<D: Driver> Clone for Controller<D> {
    fn clone(&self) -> Controller<D> {
        Controller {
            shared: Arc::clone(&self.shared),
            binder: Arc::clone(&self.binder),
        }
    }
}

/// How long a worker may take to answer. It answers at once, unless it hangs or has ended.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

impl<D: Driver> Controller<D> {
    pub(super) fn forwards(&self) -> Vec<ForwardStatus> {
        let forwards = self.shared.forwards();
        let now = D::clock();
        forwards.iter().map(|forward| forward.status(now)).collect()
    }

    pub(super) fn add(&self, rule: Rule) -> Result<ForwardId> {
        let _change = self.binder.begin_change();
        let home = self.shared.next_inbox();
        let (listener, forward) = self.binder.bind::<D>(rule, home)?;
        let id = forward.id;
        self.listen(listener, forward)
            .inspect_err(|_| self.binder.forget_rule(id))?;
        Ok(id)
    }

    /// Has the worker of a forward that was bound accept its clients.
    fn listen(&self, listener: D::Listener, forward: Arc<Forward>) -> Result<()> {
        let (home, listen) = (forward.home, forward.rule.listen.clone());
        let others = self.shared.listening_sockets();
        let fail = |e| Error::new(Operation::Listen, &listen, e);
        if self.shared.is_stopping() {
            return Err(fail(stopping_error()));
        }
        // Existing connections stay; the next client waits until there is room for it.
        let listeners = others + listen.listening_sockets();
        let descriptors = &self.shared.descriptors;
        if descriptors.connection_room(listeners) == 0 {
            return Err(descriptors.too_few(Operation::Listen, &listen, listeners));
        }
        if forward.needs_graceful_close(Side::Client) {
            descriptors.keep_some_for_guests();
        }
        self.shared.make_room(listeners);
        // The rule's limit must apply to its first client.
        self.shared.reserve_slots(&forward);
        let undo = |e| {
            self.shared.release(&forward);
            self.shared.make_room(others);
            fail(e)
        };
        let listen =
            |wanted, answer| WorkerCommand::Listen(listener, Arc::clone(&forward), wanted, answer);
        let begun = self.ask_worker(home, listen).and_then(|done| done);
        begun.map_err(undo)?;
        self.shared.forwards().insert(forward);
        Ok(())
    }

    pub(super) fn replace(&self, id: ForwardId, rule: Rule) -> Result<()> {
        let _change = self.binder.begin_change();
        let old = self.shared.forwards().get(id).cloned();
        let old = &old.ok_or_else(no_forward)?;
        let forward = self.binder.replace(rule, old)?;
        let (home, access) = (forward.home, forward.rule.access());
        let set_access = || match access == old.rule.access() {
            true => Ok(()),
            false => self
                .ask_worker(home, |wanted, answer| {
                    WorkerCommand::SetAccess(id, access, wanted, answer)
                })
                .and_then(|done| done),
        };
        let replace = |wanted, answer| WorkerCommand::Replace(Arc::clone(&forward), wanted, answer);
        if let Err(e) = set_access().and_then(|()| self.ask_worker(home, replace)) {
            forward.release_quota();
            self.binder.reserve_slots_again(old);
            return Err(Error::new(Operation::Listen, &forward.rule.listen, e));
        }
        self.shared.reserve_slots(&forward);
        self.shared.forwards().insert(forward);
        Ok(())
    }

    pub(super) fn limit_vm(&self, limits: &VmLimits) {
        self.binder.set_limits(limits);
    }

    pub(super) fn remove(&self, id: ForwardId, grace: Duration) -> Result<()> {
        let _change = self.binder.begin_change();
        let forward = self.shared.forwards().remove(id);
        let forward = forward.ok_or_else(no_forward)?;
        self.binder.forget_rule(id);
        self.shared.release(&forward);
        let cuts = Arc::new(Cuts::new(self.shared.inboxes.len()));
        let answers = self.ask_all(
            |answer| WorkerCommand::Remove(Arc::clone(&forward), grace, Arc::clone(&cuts), answer),
            ANSWER_TIMEOUT,
        );
        self.shared.make_room(self.shared.listening_sockets());
        match answers.len() < self.shared.inboxes.len() && !self.shared.is_stopping() {
            true => Err(Error::new(
                Operation::Listen,
                &forward.rule.listen,
                no_answer("it is removed as soon as it does"),
            )),
            false => Ok(()),
        }
    }

    pub(super) fn connections(&self) -> Vec<ConnectionStatus> {
        let answers = self.ask_all(WorkerCommand::ListConnections, ANSWER_TIMEOUT);
        answers.into_iter().flatten().collect()
    }

    pub(super) fn set_access_log(&self, is_on: bool) {
        self.binder.set_access_log(is_on);
    }

    pub(super) fn ended(&self) -> Vec<EndedConnection> {
        self.binder.ended()
    }

    pub(super) fn close(&self, id: ConnectionId) -> Result<ConnectionStatus> {
        let answers = self.ask_all(|answer| WorkerCommand::Close(id, answer), ANSWER_TIMEOUT);
        let all_answered = answers.len() >= self.shared.inboxes.len() || self.shared.is_over();
        if let Some(status) = answers.into_iter().flatten().next() {
            return Ok(status);
        }
        let cause = match all_answered {
            true => io::Error::new(io::ErrorKind::NotFound, "there is none of that id"),
            false => no_answer("it is closed as soon as it does, if it has it"),
        };
        let which = format!("connection {}", id.0);
        Err(Error::new(Operation::Find, which, cause))
    }

    pub(super) fn answers_within(&self, patience: Duration) -> bool {
        let answers = self.ask_all(WorkerCommand::Ping, patience).len();
        let ended = self.shared.ended.load(Ordering::Acquire);
        answers + ended >= self.shared.inboxes.len()
    }

    pub(super) fn carried(&self) -> CarriedBytes {
        let sum = |through| {
            let workers = self.shared.inboxes.iter();
            workers.map(|it| it.carried.bytes(through)).sum()
        };
        CarriedBytes {
            copied: sum(Through::Memory),
            spliced: sum(Through::Pipe),
        }
    }

    pub(super) fn live(&self) -> usize {
        self.shared.connections()
    }

    pub(super) fn idle_for(&self) -> Option<Duration> {
        self.shared.idle_for()
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.shared.is_stopping()
    }

    pub(super) fn stop(&self, grace: Duration) {
        self.shared.stop_asked.store(true, Ordering::Release);
        self.binder.close_passed();
        for inbox in &self.shared.inboxes {
            inbox.send(WorkerCommand::Stop(grace));
        }
    }

    /// Sends a command to one worker, and returns its answer.
    ///
    /// # Errors
    /// Returns `NotConnected` if the worker has ended, `TimedOut` if it does not answer. The
    /// command has no effect later either.
    fn ask_worker<T>(
        &self,
        worker: usize,
        command: impl FnOnce(StillWanted, Sender<T>) -> WorkerCommand<D>,
    ) -> io::Result<T> {
        let (answer, answers) = channel();
        let wanted = StillWanted::default();
        self.shared.inboxes[worker].send(command(wanted.clone(), answer));
        let begun = D::clock();
        let elapsed = || D::clock().saturating_duration_since(begun);
        loop {
            match D::receive(&answers, CHECK_INTERVAL) {
                Ok(answer) => return Ok(answer),
                Err(RecvTimeoutError::Disconnected) => return Err(stopping_error()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            let (over, late) = (self.shared.is_over(), elapsed() >= ANSWER_TIMEOUT);
            if (over || late) && wanted.give_up() {
                return Err(match over {
                    true => stopping_error(),
                    false => no_answer("nothing was changed"),
                });
            }
            // A command that was begun ends soon, unless it is about a file on a disk that hangs.
            if elapsed() >= 2 * ANSWER_TIMEOUT {
                return Err(no_answer("it has begun, and has not ended"));
            }
        }
    }

    /// Sends a command to all workers, and returns the answers that come within `patience`. Workers
    /// that have ended give none.
    pub(super) fn ask_all<T>(
        &self,
        command: impl Fn(Sender<T>) -> WorkerCommand<D>,
        patience: Duration,
    ) -> Vec<T> {
        let (answer, answers) = channel();
        for inbox in &self.shared.inboxes {
            inbox.send(command(answer.clone()));
        }
        drop(answer);
        let end = crate::time::after(D::clock(), patience);
        let mut all = Vec::new();
        while all.len() < self.shared.inboxes.len() && !self.shared.is_over() {
            match D::receive(&answers, CHECK_INTERVAL.min(patience)) {
                Ok(answer) => all.push(answer),
                Err(RecvTimeoutError::Timeout) if D::clock() < end => {}
                Err(_) => break,
            }
        }
        // Who has ended may have answered before.
        all.extend(answers.try_iter());
        all
    }
}

/// How often a wait for answers checks whether any worker is left.
const CHECK_INTERVAL: Duration = Duration::from_millis(50);

fn no_forward() -> Error {
    let cause = io::Error::new(io::ErrorKind::NotFound, "there is none of that id");
    Error::new(Operation::Find, "the forward", cause)
}

pub(super) fn no_answer(so: &str) -> io::Error {
    let why = format!("its worker has not answered in time; {so}");
    io::Error::new(io::ErrorKind::TimedOut, why)
}

pub(super) fn stopping_error() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the proxy is stopping")
}
