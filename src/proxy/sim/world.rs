//! The world that a run's sockets are in: the kernel, the clock, what is done by others than the
//! workers, and what is true of the whole run. The workers and who acts beside them are the
//! [stage](super::stage)'s.

use std::cell::{Cell, RefCell, RefMut};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::address::AnyVm;
use crate::engine::health::{ProcessState, VmIdentity, VmLook};
use crate::proxy::driver::DriverEvent;
use crate::sys::Identity;

use super::kernel::{Kernel, Place, SocketId};

/// How fast what may block is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    AtOnce,
    Late,
    /// Not before that time.
    Hangs(Duration),
}

/// What becomes of a name that is asked for.
#[derive(Clone, Debug)]
pub(super) enum Name {
    Found(Vec<SocketAddr>),
    Missing,
    /// Its server never answers.
    Silent,
}

/// What is done later, and what has come of it for a worker.
type Task<S, L> = Box<dyn FnOnce(&Rc<World<S, L>>) -> Option<DriverEvent<S, L>>>;

/// What the housekeeper does, or whoever looks names up.
pub(super) struct Job<S, L> {
    pub(super) at: Duration,
    pub(super) worker: usize,
    pub(super) run: Task<S, L>,
}

/// A world whose sockets are `S` and whose listeners are `L`.
pub(super) struct World<S, L> {
    kernel: RefCell<Kernel>,
    /// What has come for each worker.
    pub(super) mail: RefCell<Vec<Vec<DriverEvent<S, L>>>>,
    pub(super) jobs: RefCell<Vec<Job<S, L>>>,
    rng: RefCell<Rng>,
    pub(super) names: RefCell<HashMap<String, Name>>,
    /// The process of each VM that runs, by its state directory.
    pub(super) processes: RefCell<HashMap<PathBuf, i32>>,
    ready: RefCell<HashMap<PathBuf, Duration>>,
    pub(super) housekeeper: Cell<Pace>,
    /// Something stands still, or has stood.
    pub(super) may_hang: Cell<bool>,
    /// Somebody has removed files of listeners, or has put others in their place.
    pub(super) has_lost_files: Cell<bool>,
    /// No limit and no lack keeps a client from being accepted.
    pub(super) has_room: Cell<bool>,
    /// What is reserved is not taken by guests, nor by what comes from another rule, and not being
    /// changed.
    pub(super) keeps_slots: Cell<bool>,
    /// How many clients of a VM are let in, where that is certain.
    pub(super) most_in: Cell<Option<usize>>,
    /// How many connections a VM may have, where that stays so.
    pub(super) vm_connections: Cell<Option<usize>>,
    /// How soon it is known whether a guest that answers has taken a dial.
    pub(super) proves_within: Cell<Option<Duration>>,
    /// The run is over, and what is left of it is dropped in whatever state it is.
    pub(super) is_cleared: Cell<bool>,
    /// Workers that have heard of the end, and when.
    pub(super) stopped: RefCell<BTreeMap<usize, Duration>>,
    /// From which state to which connections have gone.
    pub(super) transitions: RefCell<BTreeMap<(&'static str, &'static str), u64>>,
    story: RefCell<Option<Vec<String>>>,
}

impl<S, L> std::fmt::Debug for World<S, L> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World").finish_non_exhaustive()
    }
}

/// The clock's zero, the same for all runs of the process.
fn base() -> Instant {
    static BASE: OnceLock<Instant> = OnceLock::new();
    *BASE.get_or_init(Instant::now)
}

/// By what the kernel knows a file.
fn identity(inode: u64) -> Identity {
    Identity::numbered(inode)
}

impl<S, L> World<S, L> {
    pub(super) fn new(kernel: Kernel, workers: usize, rng: Rng, logs: bool) -> World<S, L> {
        World {
            kernel: RefCell::new(kernel),
            mail: RefCell::new((0..workers).map(|_| Vec::new()).collect()),
            jobs: RefCell::default(),
            rng: RefCell::new(rng),
            names: RefCell::default(),
            processes: RefCell::default(),
            ready: RefCell::default(),
            proves_within: Cell::default(),
            most_in: Cell::default(),
            vm_connections: Cell::default(),
            housekeeper: Cell::new(Pace::AtOnce),
            may_hang: Cell::new(false),
            has_lost_files: Cell::new(false),
            has_room: Cell::new(false),
            keeps_slots: Cell::new(false),
            is_cleared: Cell::new(false),
            stopped: RefCell::default(),
            transitions: RefCell::default(),
            story: RefCell::new(logs.then(Vec::new)),
        }
    }

    pub(super) fn kernel(&self) -> RefMut<'_, Kernel> {
        self.kernel.borrow_mut()
    }

    pub(super) fn now(&self) -> Duration {
        self.kernel.borrow().now
    }

    pub(super) fn instant(&self) -> Instant {
        base() + self.now()
    }

    /// When that was on the run's clock.
    pub(super) fn time_of(&self, at: Instant) -> Duration {
        at.saturating_duration_since(base())
    }

    pub(super) fn rng(&self) -> RefMut<'_, Rng> {
        self.rng.borrow_mut()
    }

    /// Adds a line to the story, if one is told.
    pub(super) fn log(&self, line: impl FnOnce() -> String) {
        if let Ok(mut story) = self.story.try_borrow_mut()
            && let Some(story) = &mut *story
        {
            let now = self.kernel.try_borrow().map_or(Duration::ZERO, |it| it.now);
            story.push(format!("{:>12.3} ms  {}", now.as_secs_f64() * 1e3, line()));
        }
    }

    pub(super) fn take_story(&self) -> Vec<String> {
        self.story.borrow_mut().take().unwrap_or_default()
    }

    pub(super) fn take_mail(&self, worker: usize) -> Vec<DriverEvent<S, L>> {
        std::mem::take(&mut self.mail.borrow_mut()[worker])
    }

    /// Notes that a connection goes from one state to another.
    pub(super) fn note_transition(&self, from: &'static str, to: &'static str) {
        *self.transitions.borrow_mut().entry((from, to)).or_default() += 1;
    }

    /// Returns whether a worker has heard of the end.
    pub(super) fn has_stopped(&self, worker: usize) -> bool {
        self.stopped.borrow().contains_key(&worker)
    }

    /// Has the housekeeper do something; its worker gets what has come of it.
    pub(super) fn ask_housekeeper(
        &self,
        worker: usize,
        run: impl FnOnce(&Rc<World<S, L>>) -> Option<DriverEvent<S, L>> + 'static,
    ) {
        let now = self.now();
        let at = match self.housekeeper.get() {
            Pace::AtOnce => now,
            Pace::Late => now + Duration::from_micros(self.rng().u64(0..20_000)),
            Pace::Hangs(until) => until.max(now),
        };
        let run = Box::new(run);
        self.jobs.borrow_mut().push(Job { at, worker, run });
    }

    /// Asks for the addresses of a name.
    pub(super) fn resolve(&self, worker: usize, token: usize, host: &str, port: u16) {
        let name = self.names.borrow().get(host).cloned();
        let late = Duration::from_micros([0, 100, 5_000, 2_000_000][self.rng().usize(..4)]);
        let at = self.now() + late;
        let addresses = match name {
            Some(Name::Silent) => return,
            Some(Name::Found(addresses)) => Ok(addresses
                .iter()
                .map(|address| SocketAddr::new(address.ip(), port))
                .collect()),
            Some(Name::Missing) | None => Err(io::Error::other("no such name")),
        };
        let host = host.to_owned();
        let run = Box::new(move |world: &Rc<World<S, L>>| {
            if addresses.is_err() {
                let now = world.now();
                world.kernel().missing.push((now, host));
            }
            Some(DriverEvent::Resolved { token, addresses })
        });
        self.jobs.borrow_mut().push(Job { at, worker, run });
    }

    /// By what a VM is known now.
    pub(super) fn identity_of_vm(&self, vm: &AnyVm) -> Option<VmIdentity> {
        let kernel = self.kernel();
        let of = |path: &Path| kernel.files.get(path).map(|file| identity(file.inode));
        match vm {
            AnyVm::Hyperkit(vm) => {
                let socket = of(&vm.connect_path()).map(VmIdentity::Socket);
                socket.or_else(|| of(&vm.pid_path()).map(VmIdentity::PidFile))
            }
            AnyVm::VsockMux(path) => of(path).map(VmIdentity::Socket),
            AnyVm::Vsock(cid) => kernel.cids.contains(cid).then_some(VmIdentity::Cid),
            other => unreachable!("there is no {other}"),
        }
    }

    /// Notes since when a VM's guest answers.
    pub(super) fn is_ready(&self, vm: &Path, since: Duration) {
        self.ready.borrow_mut().insert(vm.to_owned(), since);
    }

    /// Since when a VM's guest answers.
    pub(super) fn ready_since(&self, vm: &Path) -> Duration {
        let ready = self.ready.borrow().get(vm).copied();
        ready.unwrap_or(Duration::MAX)
    }

    /// What a look at a VM finds now: of one whose socket nobody has, nothing.
    pub(super) fn look_at_vm(&self, vm: &AnyVm) -> VmLook {
        let (path, process) = match vm {
            AnyVm::Hyperkit(vm) => {
                let process = self.processes.borrow().get(&vm.state_dir).copied();
                (vm.connect_path(), process)
            }
            AnyVm::VsockMux(path) => (path.clone(), None),
            cid @ AnyVm::Vsock(_) => {
                return VmLook {
                    identity: self.identity_of_vm(cid),
                    ..VmLook::default()
                };
            }
            other => unreachable!("there is no {other}"),
        };
        let is_left = {
            let kernel = self.kernel();
            kernel.files.contains_key(&path) && !kernel.listens_at(&path)
        };
        let identity = self.identity_of_vm(vm).filter(|_| !is_left);
        VmLook {
            identity,
            is_alive: matches!(identity, Some(VmIdentity::Socket(_))),
            process,
            process_state: ProcessState::Runs,
        }
    }

    /// Takes a dial of the proxy.
    pub(super) fn dialled(&self, socket: SocketId, place: &Place) {
        self.log(|| format!("the proxy dials {place:?} ({socket:?})"));
    }
}
