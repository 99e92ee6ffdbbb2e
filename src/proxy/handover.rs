//! Handing over the listeners of a running proxy to another process, which has duplicates of their
//! sockets. How these get there is the caller's business.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::address::Address;
use crate::listener::Wish;
use crate::sys::Identity;

use super::controller::{ANSWER_TIMEOUT, Controller, no_answer, stopping_error};
use super::driver::Driver;
use super::rules::Binder;
use super::shared::{Accepting, WorkerCommand};
use crate::engine::admission::sharing::{OtherSlots, Remainder};
use crate::engine::id::ForwardId;
use crate::engine::rule::Rule;

/// A listener that is offered to another process.
#[derive(Debug)]
pub(crate) struct Offered {
    /// The forward that listens there, and its rule; `None` for a passed socket that is kept
    /// without.
    pub(crate) forward: Option<(ForwardId, Rule)>,
    /// See [`Listener::wish`](crate::Listener::wish).
    pub(crate) wish: Option<Wish>,
    /// The address that was bound.
    pub(crate) bound: Address,
    /// Its sockets: TCP may have one of each family of IP.
    pub(crate) sockets: Vec<OwnedFd>,
    /// The file that this process made for the socket.
    pub(crate) file: Option<Identity>,
    /// Another program has bound the socket, and may keep it.
    pub(crate) is_foreign: bool,
}

/// The slots of VMs, some of which another process has: the one that this one takes over from, or
/// that takes over from this one. A VM is known by the path of its socket.
pub(crate) struct SharedSlots<'a>(&'a Binder);

impl SharedSlots<'_> {
    /// Keeps what this process may go on to use of each VM's slots. Returns that, which a successor
    /// is to leave out.
    pub(crate) fn keep_remainders(&self, what: Remainder) -> Vec<(PathBuf, OtherSlots)> {
        self.0.keep_remainders(what)
    }

    /// Takes all slots again, for there is no successor after all.
    pub(crate) fn take_whole(&self) {
        self.0.take_whole();
    }

    /// Leaves out the slots that the predecessor still has of a VM.
    pub(crate) fn leave_out(&self, vm: &Path, slots: OtherSlots) {
        self.0.leave_out(vm, slots);
    }

    /// Notes that the predecessor has ended.
    pub(crate) fn forget_predecessor(&self) {
        self.0.forget_other();
    }
}

impl<D: Driver> Controller<D> {
    pub(super) fn shared_slots(&self) -> SharedSlots<'_> {
        SharedSlots(&self.binder)
    }

    /// Offers duplicates of all listeners, and leaves those whose forwards `give` returns to
    /// whoever has the duplicates now. Clients are accepted until then. Nothing else changes the
    /// forwards meanwhile.
    ///
    /// # Errors
    /// Returns `NotConnected` if the proxy is stopping; `TimedOut` if a worker does not answer;
    /// that there is no descriptor left; the error of `give`. In all these cases nothing was
    /// changed.
    pub(super) fn hand_over(
        &self,
        give: impl FnOnce(Vec<Offered>) -> io::Result<Vec<ForwardId>>,
    ) -> io::Result<()> {
        let _change = self.binder.begin_change();
        if self.shared.is_stopping() {
            return Err(stopping_error());
        }
        let offered = self.offer()?;
        let given: Arc<[ForwardId]> = give(offered)?.into();
        self.ask_all(
            |answer| WorkerCommand::Give(Arc::clone(&given), answer),
            ANSWER_TIMEOUT,
        );
        self.binder.give_passed();
        Ok(())
    }

    fn offer(&self) -> io::Result<Vec<Offered>> {
        let answers = self.ask_all(WorkerCommand::Lend, ANSWER_TIMEOUT);
        if answers.len() < self.shared.inboxes.len() {
            return Err(no_answer("nothing was changed"));
        }
        let mut lent: HashMap<_, _> = answers.into_iter().flatten().collect();
        let foreign = self.binder.on_foreign_sockets();
        let mut offered = Vec::new();
        for forward in self.shared.forwards().iter() {
            // A listener that is being bound again has no socket now.
            let Some(lent) = lent.remove(&forward.id) else {
                continue;
            };
            let lent = lent?;
            let rule = Rule {
                listen: forward.asked.clone(),
                ..Rule::clone(&forward.rule)
            };
            offered.push(Offered {
                wish: Some((rule.name.clone(), rule.listen.clone())),
                forward: Some((forward.id, rule)),
                bound: forward.rule.listen.clone(),
                sockets: lent.sockets,
                file: lent.file,
                is_foreign: foreign.contains(&forward.id),
            });
        }
        self.binder.for_each_unused(|kept| {
            offered.push(Offered {
                forward: None,
                wish: kept.wish().cloned(),
                bound: kept.address().clone(),
                sockets: kept
                    .sockets()
                    .into_iter()
                    .map(|it| it.try_clone_to_owned())
                    .collect::<io::Result<_>>()?,
                file: kept.file().map(|file| file.identity()),
                is_foreign: kept.is_foreign(),
            });
            Ok(())
        })?;
        Ok(offered)
    }

    /// Sets whether all listeners, those that are added later included, accept clients.
    pub(super) fn set_accepting(&self, accepting: Accepting) {
        self.ask_all(
            |answer| WorkerCommand::SetAccepting(accepting, answer),
            ANSWER_TIMEOUT,
        );
    }
}
