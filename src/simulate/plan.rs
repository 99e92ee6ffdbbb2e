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
    /// Of a VMM with a socket for all ports, where that is.
    pub(super) directory: PathBuf,
    /// `None` is hyperkit.
    pub(super) mux: Option<Mux>,
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

/// A VMM with a Unix socket for all ports.
#[derive(Clone, Debug)]
pub(super) struct Mux {
    pub(super) path: PathBuf,
    /// Whether one direction goes on when the other has ended.
    pub(super) half_close: bool,
}

impl Mux {
    /// Returns the path of the socket at which the guest dials a port of the host.
    pub(super) fn host_path(&self, port: u32) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        path.into()
    }
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
