//! What another thread can do with a proxy that runs: look at it, add and remove forwards, stop it.

use std::time::Duration;

use crate::engine::id::ForwardId;
use crate::engine::rule::{Rule, VmLimits};
use crate::engine::status::{ConnectionStatus, ForwardStatus};
use crate::error::Result;

use super::controller::Controller;
use super::mio_driver::MioDriver;

/// A proxy that runs, for whoever is to look at it, change it or stop it from another thread. It doesn't keep it running.
#[derive(Clone, Debug)]
pub struct Handle(pub(super) Controller<MioDriver>);

impl Handle {
    /// The forwards, in the order in which they were given.
    pub fn forwards(&self) -> Vec<ForwardStatus> {
        self.0.forwards()
    }

    /// Begins to carry another rule; how it is called.
    ///
    /// # Errors
    /// As those of [`Proxy::start`](super::Proxy::start); `NotConnected` if the proxy is stopping; `TimedOut` if its worker
    /// doesn't answer: then nothing comes of it later either.
    pub fn add(&self, rule: Rule) -> Result<ForwardId> {
        self.0.add(rule)
    }

    /// Gives a forward another rule, which holds for the clients that are accepted from now on. Its listener stays, so that
    /// no client is refused meanwhile; those that are there go on under the rule that they came under.
    ///
    /// # Errors
    /// `InvalidInput` if the rule listens elsewhere than the old one, or can't work; `NotFound` if there is no forward of
    /// that id; what the system says if the file of its socket can't be given the new permissions; `TimedOut` if its
    /// worker doesn't answer. Then the old rule stays.
    pub fn replace(&self, id: ForwardId, rule: Rule) -> Result<()> {
        self.0.replace(id, rule)
    }

    /// Bounds the use of a VM from now on, in place of what bounded it before. Those who are connected already stay.
    pub fn limit_vm(&self, limits: &VmLimits) {
        self.0.limit_vm(limits);
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
        self.0.remove(id, grace)
    }

    /// The connections that are carried now, of all forwards, those that were removed included.
    pub fn connections(&self) -> Vec<ConnectionStatus> {
        self.0.connections()
    }

    /// Whether all workers that haven't ended answer within `patience`: none of them hangs. For a watchdog.
    pub fn answers_within(&self, patience: Duration) -> bool {
        self.0.answers_within(patience)
    }

    /// How many connections are not closed yet.
    pub fn live(&self) -> usize {
        self.0.live()
    }

    /// Whether the end has been asked for.
    pub fn is_stopping(&self) -> bool {
        self.0.is_stopping()
    }

    /// As [`Proxy::stop`](super::Proxy::stop).
    pub fn stop(&self, grace: Duration) {
        self.0.stop(grace);
    }
}
