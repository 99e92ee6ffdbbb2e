//! Connections that are cut off because their grace is over. Each worker cuts off its own; how many
//! of which forwards those were is said in one line, once the last worker has.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use tracing::warn;

use crate::engine::forward::Forward;
use crate::engine::id::ForwardId;
use crate::error::counted;
use crate::lock::lock;

/// How many forwards are named in the line.
const MOST_NAMED: usize = 5;

/// What the workers cut off at the end of one grace.
#[derive(Debug)]
pub(crate) struct Cuts {
    /// How many workers may still cut some off.
    workers: AtomicUsize,
    /// The connections of each forward, with what the forward is called.
    by_forward: Mutex<BTreeMap<ForwardId, (String, u64)>>,
}

impl Cuts {
    /// Makes an account that so many workers are to finish.
    pub(super) fn new(workers: usize) -> Cuts {
        Cuts {
            workers: AtomicUsize::new(workers),
            by_forward: Mutex::default(),
        }
    }

    fn by_forward(&self) -> MutexGuard<'_, BTreeMap<ForwardId, (String, u64)>> {
        lock(&self.by_forward)
    }

    /// Notes that a connection was cut off.
    pub(super) fn count_cut(&self, forward: &Forward) {
        let mut all = self.by_forward();
        let (_, count) = all
            .entry(forward.id)
            .or_insert_with(|| (forward.label(), 0));
        *count += 1;
    }

    /// Notes that a worker cuts off no more, which each does once. Logs the account after the last.
    pub(super) fn finish_worker(&self) {
        if self.workers.fetch_sub(1, Ordering::AcqRel) == 1 {
            let account = self.to_string();
            if !account.is_empty() {
                warn!("{account}");
            }
        }
    }
}

/// Writes how many connections of which forwards were cut off; nothing if none was.
impl fmt::Display for Cuts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.by_forward();
        let count = all.values().map(|(_, count)| *count).sum::<u64>();
        if count == 0 {
            return Ok(());
        }
        let whose = if count == 1 { "its" } else { "their" };
        let cut = counted(count, "connection");
        write!(f, "cut off {cut}, for {whose} grace was over: ")?;
        for (index, (name, count)) in all.values().take(MOST_NAMED).enumerate() {
            let before = if index == 0 { "" } else { ", " };
            write!(f, "{before}{count} of {name}")?;
        }
        match all.len().saturating_sub(MOST_NAMED) {
            0 => Ok(()),
            more => write!(f, ", and of {}", counted(more as u64, "more forward")),
        }
    }
}
