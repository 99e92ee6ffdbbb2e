//! A VM's slots: how many dials of its guest are served, which drains take the slots that clients
//! wait for, and which slots are lost.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::engine::Phase;
use crate::engine::admission::{Full, Gate};
use crate::engine::connection::State;
use crate::engine::relay::Side;
use crate::proxy::worker::Worker;

use super::driver::{SimDriver, SimWorld};
use super::kernel::SILENT;

/// How long a guest may go on sending to nobody.
const SENDS: Duration = Duration::from_secs(16);

/// For how long a guest sends before its drain is known for one that goes on.
const KNOWN: Duration = Duration::from_millis(1_500);

/// How long drains may be in the way of clients.
const IN_THE_WAY: Duration = Duration::from_secs(2);

/// Returns how many dials of a guest may be served at once, of so many connections.
fn guest_quota(connections: usize) -> usize {
    connections - connections / 9
}

/// What a guest sends to nobody.
#[derive(Clone, Debug)]
struct Sending {
    vm: PathBuf,
    received: u64,
    since: Duration,
    last: Duration,
}

#[derive(Debug, Default)]
pub(super) struct Slots {
    /// How many dials of a VM's guest each worker serves.
    guests: BTreeMap<usize, BTreeMap<PathBuf, usize>>,
    /// Which VMs the clients of each worker wait for, since all slots are taken.
    waited_for: BTreeMap<usize, BTreeSet<PathBuf>>,
    /// The drains, by worker, connection and side.
    drains: BTreeMap<(usize, u64, usize), Sending>,
    /// Since when drains are in the way of a VM's clients.
    in_the_way: BTreeMap<PathBuf, Duration>,
    /// How often drains were in the way.
    pub(super) times_in_the_way: u64,
}

impl Slots {
    /// Notes that some of the process stands still: nobody can be given up meanwhile.
    pub(super) fn stands_still(&mut self) {
        self.drains.clear();
        self.in_the_way.clear();
    }

    /// Looks at a worker after its turn.
    pub(super) fn look_at(&mut self, worker: &mut Worker<SimDriver>, world: &SimWorld) {
        let (now, index) = (world.now(), worker.index);
        let mut guests: BTreeMap<PathBuf, usize> = BTreeMap::new();
        let mut waited_for = BTreeSet::new();
        let mut drains = BTreeMap::new();
        for id in worker.connections.table.ids() {
            let Some(conn) = worker.connections.table.get_mut(id) else {
                continue;
            };
            for side in Side::BOTH {
                let Some(gate) = &conn.forward.gates[side] else {
                    continue;
                };
                let vm = path_of(gate);
                let slot = conn.slots[side].as_ref().filter(|_| !conn.is_remnant);
                if side == Side::Client && slot.is_some_and(|slot| !slot.is_turned_away()) {
                    *guests.entry(vm.clone()).or_default() += 1;
                }
                match &conn.state {
                    State::Waiting {
                        full: Some(Full::Live { .. }),
                        ..
                    } if side == Side::Server => {
                        waited_for.insert(vm.clone());
                    }
                    State::Closing { ends, .. } => {
                        let Some(closing) = &ends[side] else {
                            continue;
                        };
                        // Of other families a drain may last as long as its rule lets it.
                        if !conn.forward.needs_graceful_close(side) {
                            continue;
                        }
                        let key = (index, id.token(Side::Client) as u64, side as usize);
                        let received = closing.end.received();
                        let before = self.drains.get(&key);
                        drains.insert(key, go_on(before, &vm, received, now));
                    }
                    _ => {}
                }
            }
        }
        let full = worker
            .listeners
            .all()
            .iter()
            .filter_map(|it| it.full_gate());
        waited_for.extend(full.map(path_of));
        self.guests.insert(index, guests);
        self.waited_for.insert(index, waited_for);
        self.drains.retain(|(of, ..), _| *of != index);
        self.drains.extend(drains);
        let served = self.guests.values().flatten();
        let served = served.fold(
            BTreeMap::new(),
            |mut sum: BTreeMap<_, usize>, (vm, guests)| {
                *sum.entry(vm).or_default() += guests;
                sum
            },
        );
        let most = world.vm_connections.get();
        for (vm, guests) in served {
            assert!(
                most.is_none_or(|most| guests <= guest_quota(most)),
                "{guests} dials of the guest of {vm:?} are served, of {most:?} connections"
            );
        }
        self.look_for_drains(most, worker.phase, now);
    }

    /// Looks which drains are in the way.
    fn look_for_drains(&mut self, most: Option<usize>, phase: Phase, now: Duration) {
        let Some(most) = most.filter(|_| phase == Phase::Running) else {
            return self.in_the_way.clear();
        };
        let vms: BTreeSet<&PathBuf> = self.waited_for.values().flatten().collect();
        let is_in_the_way = |vm: &PathBuf| {
            let goes_on = |it: &&Sending| {
                it.vm == *vm
                    && now > it.since.saturating_add(KNOWN)
                    && now < it.last + Duration::from_secs(1)
            };
            self.drains.values().filter(goes_on).count() > (most / 10).max(1)
        };
        let vms: BTreeSet<PathBuf> = vms
            .into_iter()
            .filter(|vm| is_in_the_way(vm))
            .cloned()
            .collect();
        self.in_the_way.retain(|vm, _| vms.contains(vm));
        for vm in vms {
            self.in_the_way.entry(vm).or_insert_with(|| {
                self.times_in_the_way += 1;
                now
            });
        }
    }

    /// Looks, before the clock goes on, whether a drain has lasted for too long.
    pub(super) fn check_times(&self, now: Duration) {
        for it in self.drains.values() {
            assert!(
                now < it.since.saturating_add(SENDS) || now > it.last + SILENT,
                "a guest of {:?} sends to nobody since {:?}, and is read on",
                it.vm,
                it.since
            );
        }
        for (vm, since) in &self.in_the_way {
            assert!(
                now < *since + IN_THE_WAY,
                "drains are in the way of clients of {vm:?} since {since:?}"
            );
        }
    }
}

/// Where a gate's VM is.
fn path_of(gate: &Arc<Gate>) -> PathBuf {
    gate.vm().path().map(Path::to_path_buf).unwrap_or_default()
}

fn go_on(before: Option<&Sending>, vm: &Path, received: u64, now: Duration) -> Sending {
    let vm = vm.to_path_buf();
    match before {
        Some(it) if it.received == received => it.clone(),
        Some(it) if now < it.last + SILENT && it.since != Duration::MAX => Sending {
            vm,
            received,
            since: it.since,
            last: now,
        },
        Some(_) => Sending {
            vm,
            received,
            since: now,
            last: now,
        },
        // Nothing was sent to nobody yet.
        None => Sending {
            vm,
            received,
            since: Duration::MAX,
            last: now,
        },
    }
}
