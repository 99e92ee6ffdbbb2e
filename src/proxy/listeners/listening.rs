//! One listener of a worker, with what is known of it.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use crate::engine::admission::Full;
#[cfg(all(test, target_os = "linux"))]
use crate::engine::admission::Gate;
use crate::engine::forward::Forward;
use crate::engine::log_limiter::LogLimiter;
#[cfg(all(test, target_os = "linux"))]
use crate::engine::relay::Side;
use crate::engine::status::Obstacle;

/// A listener in a worker's loop.
#[derive(Debug)]
pub(in crate::proxy) struct Listening<L> {
    /// The socket. `None`: it was closed, or is being bound again.
    pub(super) listener: Option<L>,
    pub(super) forward: Arc<Forward>,
    /// Whether a client may wait to be accepted.
    is_ready: bool,
    /// Why its VM has no slot for the next client. The gate wakes the worker when that may have
    /// changed.
    full: Option<Full>,
    log_limiter: LogLimiter,
    pub(super) pending: PendingChecks,
    /// Whether it was logged that the file or the address is lost.
    is_loss_logged: bool,
    /// The obstacle that status reports.
    obstacle: Option<Obstacle>,
    pub(super) tenure: Tenure,
}

/// Whose a listener is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tenure {
    /// The forward's, which is served.
    Served,
    /// The forward was removed; the entry may be used for another listener.
    Removed,
    /// Another process has the listener now.
    Given,
}

impl<L> Listening<L> {
    /// Makes the entry of a listener at which clients may wait.
    pub(super) fn new(listener: L, forward: Arc<Forward>) -> Listening<L> {
        Listening {
            listener: Some(listener),
            forward,
            is_ready: true,
            full: None,
            log_limiter: LogLimiter::default(),
            pending: PendingChecks::default(),
            is_loss_logged: false,
            obstacle: None,
            tenure: Tenure::Served,
        }
    }

    /// Latches that a client may wait to be accepted.
    pub(super) fn latch(&mut self) {
        self.is_ready = true;
    }

    /// Notes that no client waits.
    pub(super) fn clear_readiness(&mut self) {
        self.is_ready = false;
    }

    /// Returns whether a client may wait to be accepted.
    pub(super) fn is_ready(&self) -> bool {
        self.is_ready
    }

    /// Notes why the VM has no slot for the next client. Returns whether that is news.
    pub(super) fn note_full_vm(&mut self, full: Full) -> bool {
        self.full.replace(full) != Some(full)
    }

    /// Notes that the VM may have a slot.
    pub(super) fn end_wait_for_slot(&mut self) {
        self.full = None;
    }

    /// Returns whether the next client waits for a slot of the VM.
    pub(super) fn waits_for_slot(&self) -> bool {
        self.full.is_some()
    }

    /// Returns whether a client may wait and, as far as is known, can be accepted.
    pub(super) fn can_accept(&self) -> bool {
        self.listener.is_some() && self.is_ready && self.full.is_none()
    }

    /// Returns whether something of the listener is to be checked regularly: its file, its VMs, or
    /// whether its address can be bound again.
    pub(super) fn needs_checks(&self) -> bool {
        let has_file = || self.forward.rule.listen.listen_path().is_some();
        self.tenure == Tenure::Served
            && (self.listener.is_none() || has_file() || self.forward.gate().is_some())
    }

    /// Returns whether a warning of this kind is to be logged now.
    pub(super) fn admit_warning(&mut self, kind: &'static str, now: Instant) -> bool {
        self.log_limiter.admit(kind, now).is_some()
    }

    /// Notes what keeps clients from being accepted.
    pub(super) fn set_obstacle(&mut self, obstacle: Obstacle, why: &dyn Display) {
        self.obstacle = Some(obstacle);
        let cell = &self.forward.status_cell;
        cell.set_obstacle(obstacle, why.to_string());
    }

    /// Notes that the listener was closed for good.
    pub(super) fn note_closed(&mut self) {
        self.set_obstacle(Obstacle::Closed, &"");
    }

    /// Notes that clients don't reach the listener. Returns whether that is to be logged.
    pub(super) fn note_loss(&mut self, why: &dyn Display) -> bool {
        self.set_obstacle(Obstacle::Lost, why);
        !std::mem::replace(&mut self.is_loss_logged, true)
    }

    /// Notes that clients reach the listener. Returns whether their loss was logged.
    pub(super) fn end_loss(&mut self) -> bool {
        self.clear_obstacle();
        std::mem::take(&mut self.is_loss_logged)
    }

    /// Returns whether clients don't reach the listener.
    pub(super) fn is_lost(&self) -> bool {
        self.obstacle == Some(Obstacle::Lost)
    }

    /// Notes that a client was accepted, or that none waits.
    pub(super) fn unblock(&mut self) {
        // A client that arrives at a lost file's socket connected before the file was lost.
        if !self.is_lost() {
            self.clear_obstacle();
        }
    }

    fn clear_obstacle(&mut self) {
        if self.obstacle.take().is_some() {
            self.forward.status_cell.clear_obstacle();
        }
    }

    /// Returns whether the listener waits to be woken although its clients would be admitted.
    #[cfg(all(test, target_os = "linux"))]
    pub(in crate::proxy) fn sleeps_in_vain(&self) -> bool {
        let is_asleep = self.listener.is_some() && self.is_ready && self.full.is_some();
        let gate = self.forward.gates[Side::Server].as_ref();
        is_asleep && gate.is_none_or(|gate| gate.would_queue(self.forward.id))
    }

    /// Returns the gate whose VM has no slot for the listener's clients.
    #[cfg(all(test, target_os = "linux"))]
    pub(in crate::proxy) fn full_gate(&self) -> Option<&Arc<Gate>> {
        self.full_forward()?.gates[Side::Server].as_ref()
    }

    /// Returns the forward, if its clients wait for a slot of the VM that it leads to.
    #[cfg(all(test, target_os = "linux"))]
    pub(in crate::proxy) fn full_forward(&self) -> Option<&Arc<Forward>> {
        let is_full = self.listener.is_some() && self.is_ready && self.full.is_some();
        is_full.then_some(&self.forward)
    }

    /// Returns whether the listener's forward is served: it was neither removed nor handed over.
    #[cfg(all(test, target_os = "linux"))]
    pub(in crate::proxy) fn is_served(&self) -> bool {
        self.tenure == Tenure::Served
    }
}

/// The checks of a listener's file, and the requests to bind its address again, that are not
/// answered yet.
#[derive(Debug, Default)]
pub(super) struct PendingChecks {
    count: u32,
    /// The sender that is to be notified when the address is free. It waits for these checks.
    on_closed: Option<Sender<()>>,
}

impl PendingChecks {
    /// Returns whether all are answered.
    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Notes that another one was asked for.
    pub(super) fn add_check(&mut self) {
        self.count += 1;
    }

    /// Keeps the sender that is to be notified when the address is free.
    pub(super) fn hold_notice(&mut self, on_closed: Sender<()>) {
        self.on_closed = Some(on_closed);
    }

    /// Notes that one was answered. After the last one it returns the sender that waits for it.
    pub(super) fn end_check(&mut self) -> Option<Sender<()>> {
        self.count -= 1;
        match self.count {
            0 => self.on_closed.take(),
            _ => None,
        }
    }
}
