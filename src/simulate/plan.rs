//! What a VM is to be, and what its device tells of it.

use super::counters::Counters;
use super::guest::Service;
use super::rules::{Fate, Strictness};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard};

use crate::lock::lock;

/// What a VM is to be.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) directory: PathBuf,
    pub(super) name: String,
    pub(super) cid: u32,
    pub(super) connect_name: String,
    pub(super) prefix: String,
    pub(super) forwards: Vec<u32>,
    pub(super) services: HashMap<u32, Service>,
    pub(super) slots: usize,
    pub(super) descriptors: Option<usize>,
    pub(super) loses_clients: bool,
    pub(super) backlog: i32,
    pub(super) lenient: bool,
    pub(super) strictness: Strictness,
    /// So many failed dials of the guest hang it.
    pub(super) failed_dials: u64,
    /// Slots that a reboot of the guest takes for good.
    pub(super) lost_at_reboot: usize,
}

/// What the device tells its [`Vm`](super::Vm).
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) state: Mutex<(Counters, Option<Fate>)>,
    pub(super) changed: Condvar,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, (Counters, Option<Fate>)> {
        lock(&self.state)
    }
}
