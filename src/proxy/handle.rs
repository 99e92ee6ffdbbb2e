//! The handle with which other threads inspect, change and stop a running proxy. It only gives
//! public names to what the controller does.

use std::time::Duration;

use crate::engine::ended::EndedConnection;
use crate::engine::id::{ConnectionId, ForwardId};
use crate::engine::rule::{Rule, VmLimits};
use crate::engine::status::{CarriedBytes, ConnectionStatus, ForwardStatus};
use crate::error::Result;
#[cfg(unix)]
use crate::keeper::{LinkStatus, View};

use super::controller::Controller;
use super::mio_driver::MioDriver;

/// A handle of a running proxy, with which any thread can inspect, change and stop it. It does not
/// keep the proxy running.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(super) controller: Controller<MioDriver>,
    #[cfg(unix)]
    pub(super) keeper: Option<View>,
}

impl Handle {
    /// Returns the status of all forwards, in the order in which their rules were given.
    pub fn forwards(&self) -> Vec<ForwardStatus> {
        self.controller.forwards()
    }

    /// Adds a rule to the proxy, and returns the identifier of its forward.
    ///
    /// # Errors
    /// Returns the errors of [`Proxy::start`](super::Proxy::start); `NotConnected` if the proxy is
    /// stopping; `TimedOut` if the worker does not answer, in which case the rule is not added
    /// later either.
    pub fn add(&self, rule: Rule) -> Result<ForwardId> {
        self.controller.add(rule)
    }

    /// Replaces the rule of a forward. The new rule applies to clients that are accepted from now
    /// on. The listener stays, so no client is refused meanwhile; existing connections keep the
    /// rule under which they were accepted.
    ///
    /// # Errors
    /// Returns `InvalidInput` if the rule's address to listen at differs from the old one, or the
    /// rule can't work; `NotFound` if there is no such forward; the system's error if the
    /// permissions of the socket's file can't be changed; `TimedOut` if the worker does not answer.
    /// In all these cases the old rule stays.
    pub fn replace(&self, id: ForwardId, rule: Rule) -> Result<()> {
        self.controller.replace(id, rule)
    }

    /// Sets the limits of a VM, in place of the earlier ones. Existing connections beyond them
    /// stay.
    pub fn limit_vm(&self, limits: &VmLimits) {
        self.controller.limit_vm(limits);
    }

    /// Sets whether the access log's lines have the level info, as
    /// [`ProxyConfig::access_log`](super::ProxyConfig::access_log) does at the start. It applies to
    /// all connections that end from now on.
    pub fn set_access_log(&self, is_on: bool) {
        self.controller.set_access_log(is_on);
    }

    /// Removes a forward, and stops listening for it. Its connections go on, and are cut off after
    /// `grace`. When this returns, the address is free again and no new client is accepted; a
    /// client that the kernel had connected by then is still served.
    ///
    /// A port that a hyperkit guest dials is still accepted at by the [`keeper`](crate::keeper),
    /// which ends each connection gracefully until a forward for that port is added again. Without
    /// a keeper this carries a risk: a guest that dials a port on which nobody listens may hang its
    /// device.
    ///
    /// # Errors
    /// Returns `NotFound` if there is no such forward; `TimedOut` if the worker does not answer, in
    /// which case the forward is removed as soon as it does.
    pub fn remove(&self, id: ForwardId, grace: Duration) -> Result<()> {
        self.controller.remove(id, grace)
    }

    /// Hands listeners over to another process: see [`Controller::hand_over`].
    #[cfg(all(unix, feature = "cli"))]
    pub(crate) fn hand_over(
        &self,
        give: impl FnOnce(Vec<super::handover::Offered>) -> std::io::Result<Vec<ForwardId>>,
    ) -> std::io::Result<()> {
        self.controller.hand_over(give)
    }

    /// Shares the slots of VMs with another process, while one of the two lets its connections
    /// finish.
    #[cfg(all(unix, feature = "cli"))]
    pub(crate) fn shared_slots(&self) -> super::handover::SharedSlots<'_> {
        self.controller.shared_slots()
    }

    /// Starts the keeper, if there is to be one, and waits a moment until it can take what the
    /// guests of the VM in that state directory dial.
    #[cfg(all(unix, feature = "cli"))]
    pub(crate) fn start_keeper(&self, directory: &std::path::Path) {
        const PATIENCE: Duration = Duration::from_secs(1);
        if let Some(keeper) = &self.keeper {
            keeper.start(directory, PATIENCE);
        }
    }

    /// Has clients wait at all listeners, those that are added later included, until
    /// [`admit_clients`](Handle::admit_clients).
    #[cfg(all(unix, feature = "cli"))]
    pub(crate) fn hold_clients(&self) {
        self.controller
            .set_accepting(super::shared::Accepting::Suspended);
    }

    /// Accepts clients, those that have waited first. A keeper has what guests dial by then.
    #[cfg(all(unix, feature = "cli"))]
    pub(crate) fn admit_clients(&self) {
        self.controller.set_accepting(super::shared::Accepting::On);
    }

    /// Returns the status of all live connections, including those of removed forwards.
    pub fn connections(&self) -> Vec<ConnectionStatus> {
        self.controller.connections()
    }

    /// Returns the last 100 connections that have ended, those of refused clients and of removed
    /// forwards included, the oldest first.
    pub fn ended(&self) -> Vec<EndedConnection> {
        self.controller.ended()
    }

    /// Closes a connection, and returns its status before that. A client that is waiting for its
    /// target is refused; an open connection is cut off, a VM's side of it gracefully: it is
    /// half-closed, read to its EOF, and closed.
    ///
    /// Returns at once. Until its sockets are closed, the connection is
    /// [`Closing`](crate::proxy::ConnectionState::Closing); one that is so already is left to it.
    ///
    /// # Errors
    /// Returns `NotFound` if there is no such connection (any more); `TimedOut` if a worker does
    /// not answer, in which case the connection is closed as soon as it does.
    pub fn close(&self, id: ConnectionId) -> Result<ConnectionStatus> {
        self.controller.close(id)
    }

    /// Returns whether all workers that have not ended answer within `patience`, so that none of
    /// them hangs. This is meant for a watchdog.
    pub fn answers_within(&self, patience: Duration) -> bool {
        self.controller.answers_within(patience)
    }

    /// Returns the state of the keeper that keeps the VMs of this proxy whole when it is gone;
    /// `None` if it is configured without one.
    #[cfg(unix)]
    pub fn keeper(&self) -> Option<LinkStatus> {
        self.keeper.as_ref().map(View::status)
    }

    /// Returns how many bytes were delivered since the start, by what has carried them.
    pub fn carried(&self) -> CarriedBytes {
        self.controller.carried()
    }

    /// Returns the number of connections that are not closed yet.
    pub fn live(&self) -> usize {
        self.controller.live()
    }

    /// Returns how long there has been no connection, since the last one was closed or the proxy
    /// was started; `None` if there is one.
    pub fn idle_for(&self) -> Option<Duration> {
        self.controller.idle_for()
    }

    /// Returns whether the proxy was told to stop.
    pub fn is_stopping(&self) -> bool {
        self.controller.is_stopping()
    }

    /// Stops the proxy, as [`Proxy::stop`](super::Proxy::stop) does.
    pub fn stop(&self, grace: Duration) {
        self.controller.stop(grace);
    }
}
