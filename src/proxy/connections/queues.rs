//! The queues of a worker: dials that wait for a slot of their VM, and dials of which it is not
//! known yet whether the guest has taken them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::admission::Gate;
use crate::engine::forward::Forward;
use crate::engine::table::Id;

/// How long a dial waits before it asks again, if a cap of its VM is reached.
pub(super) const FULL_PAUSE: Duration = Duration::from_millis(10);

/// The connections of one forward and this worker that wait for a slot, first come, first served.
#[derive(Debug)]
pub(in crate::proxy) struct DialQueue {
    pub(super) forward: Arc<Forward>,
    pub(super) gate: Arc<Gate>,
    pub(super) waiting: VecDeque<Id>,
    pub(super) next: Instant,
}

/// The connections of this worker to one VM of which it is not known yet whether the guest has
/// taken them.
#[derive(Debug)]
pub(in crate::proxy) struct ProbeQueue {
    pub(super) gate: Arc<Gate>,
    pub(super) waiting: Vec<Id>,
    pub(super) next: Instant,
    /// The time before which no probe is tried, because the last one could not be sent. Giving its
    /// slot back wakes the other workers, whose own probes may fail as well and wake this one.
    pub(super) not_before: Option<Instant>,
}
