//! The proxy's link to its keeper: it starts the keeper's process, starts another one when that has
//! ended, and gives it a copy of whatever is to be kept.
//!
//! What is kept is noted here with its descriptor's number, so that a new keeper can be given all
//! of it again. A note lives as long as the [`Kept`] that the socket owns, which is dropped before
//! the socket is closed: no number is used here that belongs to another file by then.
//!
//! No call waits: what the keeper can't take now is given to it later, and counts as unguarded
//! until then.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use socket2::SockRef;
use tracing::{debug, error, warn};

use crate::sys::{self, Wanted};

use super::protocol::{FRAME, Order, Port, UNKNOWN_PROTOCOL};
use super::status::socket_path;
use super::{Keeper, LinkStatus, PROTOCOL};

/// How many descriptors may wait in the socket until the keeper is woken to take them. It needn't
/// take each at once: they arrive even if this process has ended by then.
///
/// But not on a Mac: XNU takes a socket in flight that nobody else holds for garbage, and closes it
/// (`unp_gc` in `bsd/kern/uipc_usrreq.c` doesn't look into the buffers of sockets that are not in
/// flight themselves).
const MOST_WAITING: u32 = if cfg!(target_vendor = "apple") { 1 } else { 64 };

/// The buffers that are asked for: what Linux allows by default (`net.core.wmem_max`), which is room
/// for some 550 descriptors there.
const ROOM: usize = 212_992;

/// How many bytes without a descriptor wait to be sent with the next one.
const MOST_PENDING: usize = 64 * FRAME;

/// How many of those that the keeper could not take before it is given at a time. Others wait for
/// the lock meanwhile.
const BATCH: usize = 8;

/// A keeper that has lived no longer than this has ended at once, and is not replaced at once.
const AT_ONCE: Duration = Duration::from_secs(1);

/// The pause before a keeper that has ended at once is replaced. It doubles up to the longest.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// How often it is looked whether a keeper that was started can be asked.
#[cfg(feature = "cli")]
const LOOK: Duration = Duration::from_millis(2);

/// How many descriptors a link needs.
pub(crate) const DESCRIPTORS: usize = 6;

/// The link. The keeper takes the end of its last clone for the end of the proxy.
#[derive(Clone, Debug)]
pub(crate) struct Link(Arc<Owner>);

#[derive(Debug)]
struct Owner(Arc<Inner>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// A view of the link, which doesn't keep it.
#[derive(Clone, Debug)]
pub(crate) struct View(Arc<Inner>);

impl View {
    pub(crate) fn status(&self) -> LinkStatus {
        self.0.state().status()
    }

    /// Starts the keeper, if it doesn't run yet, and waits until it can be asked in the state
    /// directory of a VM, at most for `patience`.
    #[cfg(feature = "cli")]
    pub(crate) fn start(&self, directory: &Path, patience: Duration) {
        let end = Instant::now() + patience;
        let is_there = |pid| socket_path(directory, pid).symlink_metadata().is_ok();
        loop {
            self.look_after(directory);
            if self.status().pid.is_some_and(is_there) || Instant::now() >= end {
                return;
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Sees to it that the keeper can be asked in the state directory of a VM, and has what it could
    /// not take before. This reads the directory, and may take as long as that does.
    pub(crate) fn look_after(&self, directory: &Path) {
        let inner = &self.0;
        inner.begin();
        // One directory has one socket, however its path is spelled.
        let Ok(directory) = directory.canonicalize() else {
            return;
        };
        let pid = inner.state().pid;
        let is_there =
            pid.is_some_and(|pid| socket_path(&directory, pid).symlink_metadata().is_ok());
        let mut state = inner.state();
        let is_new = state.directories.insert(directory.clone());
        if is_new || (!is_there && state.pid == pid) {
            // If it can't take that now, this is called again.
            state.send(&Order::Directory(directory), When::Now);
        }
        if !state.missing.is_empty() {
            inner.catch_up(state);
        }
    }
}

/// The note that a socket is kept, which the socket owns. Dropping it tells the keeper to close its
/// copy of a connection, or to accept at its copy of a listening socket.
#[derive(Debug)]
pub(crate) struct Kept {
    inner: Arc<Inner>,
    id: u64,
    is_done: bool,
}

/// When the keeper is to carry out what it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// At once.
    Now,
    /// With what it is told next.
    Later,
}

impl Kept {
    /// Returns whether the keeper has its copy.
    pub(crate) fn is_guarded(&self) -> bool {
        let state = self.inner.state();
        state.kept.get(&self.id).is_some_and(|it| it.is_given)
    }

    /// Has the keeper close its copy of a connection.
    pub(crate) fn release(mut self, when: When) {
        self.finish(Some(Order::Release(self.id)), when);
    }

    /// Leaves a connection to the keeper, which ends it when this process has ended.
    pub(crate) fn leave(mut self) {
        self.finish(None, When::Later);
    }

    /// Has the keeper close its copy of a listening socket, whose file another process has now.
    #[cfg(feature = "cli")]
    pub(crate) fn forget(mut self) {
        self.finish(Some(Order::Forget(self.id)), When::Now);
    }

    fn finish(&mut self, order: Option<Order>, when: When) {
        if std::mem::replace(&mut self.is_done, true) {
            return;
        }
        let mut state = self.inner.state();
        let Some(entry) = state.kept.remove(&self.id) else {
            return;
        };
        if let Some(order) = order.filter(|_| entry.is_given)
            && !state.send(&order, when)
        {
            self.inner.catch_up(state);
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let is_listener = {
            let state = self.inner.state();
            let entry = state.kept.get(&self.id);
            entry.is_some_and(|it| matches!(it.order, Order::Listener(..)))
        };
        let order = match is_listener {
            true => Order::Serve(self.id),
            false => Order::Release(self.id),
        };
        self.finish(Some(order), When::Now);
    }
}

/// What the keeper has or is to have a copy of.
#[derive(Debug)]
struct Entry {
    descriptor: RawFd,
    order: Order,
    is_given: bool,
}

/// The sockets to one keeper.
#[derive(Debug)]
struct Ends {
    notifier: UnixStream,
    orders: UnixStream,
}

impl Ends {
    /// Makes the sockets. Returns the keeper's ends as well: of the notifier, and of the orders.
    fn pair() -> io::Result<(Ends, OwnedFd, OwnedFd)> {
        let (notifier, other_notifier) = UnixStream::pair()?;
        let (orders, other_orders) = UnixStream::pair()?;
        for socket in [&notifier, &orders] {
            socket.set_nonblocking(true)?;
            #[cfg(target_vendor = "apple")]
            SockRef::from(socket).set_nosigpipe(true)?;
        }
        // For as many as come while the keeper isn't scheduled. The system may allow less.
        for socket in [&orders, &other_orders] {
            let socket = SockRef::from(socket);
            let _ = socket.set_send_buffer_size(ROOM);
            let _ = socket.set_recv_buffer_size(ROOM);
        }
        Ok((
            Ends { notifier, orders },
            other_notifier.into(),
            other_orders.into(),
        ))
    }

    fn notify(&self) {
        // A notifier without room is not read yet.
        let _ = sys::send(self.notifier.as_fd(), &[1], None);
    }
}

#[derive(Debug)]
struct Inner {
    keeper: Keeper,
    state: Mutex<State>,
    changed: Condvar,
}

/// What has become of those that the keeper had no copy of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// It has all of them.
    Done,
    /// It has some of them, and can take more.
    Some,
    /// It can take none now.
    Blocked,
}

#[derive(Debug, Default)]
struct State {
    ends: Option<Arc<Ends>>,
    /// Orders without a descriptor that are not sent yet.
    pending: Vec<u8>,
    /// Whether these may begin with the rest of a frame.
    is_torn: bool,
    next: u64,
    kept: HashMap<u64, Entry>,
    /// Those of them that the keeper has no copy of, and some that are kept no more.
    missing: VecDeque<u64>,
    /// The descriptors that the keeper was not woken for yet.
    waiting: u32,
    directories: HashSet<PathBuf>,
    pid: Option<u32>,
    restarts: u64,
    trouble: Option<String>,
    /// Whether the thread was started.
    has_begun: bool,
    has_ended: bool,
    /// Whether it is certain that no keeper can be had.
    is_given_up: bool,
    has_warned: bool,
    /// Whether a thread waits for the keeper to take what it could not take before.
    is_catching_up: bool,
}

impl State {
    fn status(&self) -> LinkStatus {
        let given = || self.kept.values().filter(|it| it.is_given);
        let ports = given().filter(|it| matches!(it.order, Order::Listener(..)));
        let ports = ports.count();
        LinkStatus {
            pid: self.pid,
            connections: given().count() - ports,
            ports,
            unguarded: self.kept.len() - given().count(),
            restarts: self.restarts,
            trouble: self.trouble.clone().filter(|_| self.pid.is_none()),
        }
    }

    /// Tells the keeper something. Returns false if it can't take that now.
    fn send(&mut self, order: &Order, when: When) -> bool {
        if self.ends.is_none() {
            // The next one is told all anew.
            return true;
        }
        order.write(&mut self.pending);
        if when == When::Later && self.pending.len() < MOST_PENDING {
            return true;
        }
        let is_sent = self.flush();
        self.notify();
        is_sent
    }

    fn notify(&mut self) {
        self.waiting = 0;
        if let Some(ends) = &self.ends {
            ends.notify();
        }
    }

    /// Sends what is pending. Returns whether nothing is left.
    fn flush(&mut self) -> bool {
        let Some(ends) = &self.ends else {
            return false;
        };
        while !self.pending.is_empty() {
            match sys::send(ends.orders.as_fd(), &self.pending, None) {
                Ok(n) => {
                    self.is_torn = true;
                    self.pending.drain(..n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        self.is_torn = false;
        true
    }

    /// Gives the keeper its copy of one. Returns false if it can't take it now.
    fn give(&mut self, id: u64) -> bool {
        let has_room = match self.is_torn || self.pending.len() >= MOST_PENDING {
            true => self.flush(),
            false => true,
        };
        let (Some(entry), Some(ends), true) = (self.kept.get_mut(&id), &self.ends, has_room) else {
            return false;
        };
        let mut bytes = Vec::with_capacity(2 * FRAME + self.pending.len());
        entry.order.write(&mut bytes);
        // So that each read of the keeper finds one descriptor at most, this comes first.
        bytes.extend_from_slice(&self.pending);
        let sent = loop {
            match sys::send(ends.orders.as_fd(), &bytes, Some(entry.descriptor)) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                sent => break sent,
            }
        };
        match sent {
            Ok(n) => {
                entry.is_given = true;
                self.is_torn = n < bytes.len();
                self.pending = bytes.split_off(n);
                self.waiting += 1;
                if self.waiting >= MOST_WAITING {
                    self.notify();
                }
                true
            }
            Err(e) => {
                debug!("the keeper can't take a copy now: {e}");
                self.notify();
                false
            }
        }
    }

    /// Gives the keeper some of those that it has no copy of.
    fn give_missing(&mut self) -> Progress {
        for _ in 0..BATCH {
            let Some(id) = self.missing.front().copied() else {
                return Progress::Done;
            };
            let is_kept = self.kept.get(&id).is_some_and(|it| !it.is_given);
            if is_kept && !self.give(id) {
                return Progress::Blocked;
            }
            self.missing.pop_front();
        }
        Progress::Some
    }
}

impl Link {
    /// Makes a link to a keeper that is started when something is to be kept.
    pub(crate) fn new(keeper: Keeper) -> Link {
        let state = Mutex::default();
        let changed = Condvar::new();
        Link(Arc::new(Owner(Arc::new(Inner {
            keeper,
            state,
            changed,
        }))))
    }

    pub(crate) fn view(&self) -> View {
        View(Arc::clone(&self.0.0))
    }

    /// Has the keeper keep a connection, until the result is dropped: before the socket is closed.
    /// `None`: it can't be kept.
    pub(crate) fn keep_connection(&self, connection: BorrowedFd<'_>) -> Option<Kept> {
        self.keep(connection, Order::Connection)
    }

    /// Has the keeper keep a listening socket, as [`keep_connection`](Link::keep_connection) does.
    pub(crate) fn keep_listener(&self, listener: BorrowedFd<'_>, port: Port) -> Option<Kept> {
        let kept = self.keep(listener, |id| Order::Listener(id, port));
        // There are few, and a successor may ask for one at any time.
        self.0.0.state().notify();
        kept
    }

    fn keep(&self, socket: BorrowedFd<'_>, order: impl FnOnce(u64) -> Order) -> Option<Kept> {
        let inner = &self.0.0;
        inner.begin();
        let mut state = inner.state();
        if state.is_given_up {
            return None;
        }
        let id = state.next;
        state.next += 1;
        let entry = Entry {
            descriptor: socket.as_raw_fd(),
            order: order(id),
            is_given: false,
        };
        state.kept.insert(id, entry);
        if state.give_missing() != Progress::Done || !state.give(id) {
            state.missing.push_back(id);
            if state.pid.is_some() && !std::mem::replace(&mut state.has_warned, true) {
                warn!(
                    "the keeper takes no more for now; if this process is killed, the VM may end"
                );
            }
            inner.catch_up(state);
        }
        let inner = Arc::clone(inner);
        Some(Kept {
            inner,
            id,
            is_done: false,
        })
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the thread that starts the keeper, once.
    fn begin(self: &Arc<Inner>) {
        if std::mem::replace(&mut self.state().has_begun, true) {
            return;
        }
        let inner = Arc::clone(self);
        let thread = std::thread::Builder::new().name("hvsock-keeper".to_owned());
        if let Err(e) = thread.spawn(move || inner.run()) {
            let mut state = self.state();
            state.has_begun = false;
            state.trouble = Some(format!("there is no thread to start it: {e}"));
        }
    }

    /// Gives the keeper what it could not take, on a thread of its own, as soon as it can.
    fn catch_up(self: &Arc<Inner>, mut state: MutexGuard<'_, State>) {
        if state.ends.is_none() || std::mem::replace(&mut state.is_catching_up, true) {
            return;
        }
        drop(state);
        let inner = Arc::clone(self);
        let give_all = move || {
            inner.give_all();
            inner.state().is_catching_up = false;
        };
        let thread = std::thread::Builder::new().name("hvsock-keeper".to_owned());
        if thread.spawn(give_all).is_err() {
            // The next one that is kept tries it again.
            self.state().is_catching_up = false;
        }
    }

    /// Tells the keeper that this was all.
    fn end(&self) {
        let mut state = self.state();
        state.flush();
        (state.has_ended, state.ends) = (true, None);
        self.changed.notify_all();
    }

    /// Starts keepers, one after the other, until the end.
    fn run(&self) {
        let mut pause = PAUSE;
        loop {
            let begun = Instant::now();
            match self.start() {
                Ok(None) => return,
                Ok(Some(mut child)) => {
                    let pid = child.id();
                    self.give_all();
                    let ended = child.wait();
                    if self.take_end(pid, &ended, begun.elapsed()) {
                        return;
                    }
                }
                Err(e) => self.take_failure(&e),
            }
            if begun.elapsed() > AT_ONCE {
                pause = PAUSE;
            }
            let wait = |state: &mut State| !state.has_ended;
            let waited = self.changed.wait_timeout_while(self.state(), pause, wait);
            drop(waited);
            pause = LONGEST_PAUSE.min(2 * pause);
        }
    }

    /// Starts a keeper; `None` at the end.
    fn start(&self) -> io::Result<Option<Child>> {
        let (ends, notifier, orders) = Ends::pair()?;
        let mut command = Command::new(&self.keeper.program);
        command
            .args(&self.keeper.arguments)
            .arg(PROTOCOL.to_string());
        command
            .stdin(Stdio::from(notifier))
            .stdout(Stdio::from(orders));
        // It may outlive a terminal, and must not hold open what somebody reads to its end.
        command.stderr(Stdio::null());
        if let Some(name) = &self.keeper.name {
            command.arg0(name);
        }
        if self.state().has_ended {
            return Ok(None);
        }
        let child = command.spawn()?;
        // The keeper's ends are closed here.
        drop(command);
        let mut state = self.state();
        state.pid = Some(child.id());
        (state.pending, state.is_torn, state.waiting) = (Vec::new(), false, 0);
        state.has_warned = false;
        // Even at the end it is told to begin: it has nothing to keep then.
        if !state.has_ended {
            state.ends = Some(Arc::new(ends));
        }
        state.send(&Order::Proxy(std::process::id()), When::Later);
        let directories: Vec<PathBuf> = state.directories.iter().cloned().collect();
        for directory in directories {
            state.send(&Order::Directory(directory), When::Later);
        }
        state.missing = state.kept.keys().copied().collect();
        state.flush();
        state.notify();
        Ok(Some(child))
    }

    /// Gives a new keeper all that is to be kept.
    fn give_all(&self) {
        loop {
            let mut state = self.state();
            let progress = match state.flush() {
                true => state.give_missing(),
                false => Progress::Blocked,
            };
            if progress == Progress::Some {
                continue;
            }
            state.notify();
            let Some(ends) = state.ends.clone().filter(|_| progress != Progress::Done) else {
                return;
            };
            drop(state);
            // It is about to read. If it has ended, this returns at once.
            let waited = sys::wait(ends.orders.as_fd(), Wanted::Writable, AT_ONCE);
            if sys::is_hung_up(ends.notifier.as_fd()) {
                return;
            }
            if !matches!(waited, Ok(true)) {
                let is_known = std::mem::replace(&mut self.state().has_warned, true);
                if !is_known {
                    warn!("the keeper stands still; if this process is killed now, a VM may end");
                }
                // The next one that is kept tries it again.
                return;
            }
        }
    }

    /// Takes the end of a keeper. Returns whether there is to be no other.
    fn take_end(
        &self,
        pid: u32,
        ended: &io::Result<std::process::ExitStatus>,
        lived: Duration,
    ) -> bool {
        let mut state = self.state();
        (state.ends, state.pid) = (None, None);
        for entry in state.kept.values_mut() {
            entry.is_given = false;
        }
        if state.has_ended {
            return true;
        }
        let how = match ended {
            Ok(status) => status.to_string(),
            Err(e) => e.to_string(),
        };
        if let Ok(status) = ended
            && status.code() == Some(UNKNOWN_PROTOCOL)
        {
            let program = self.keeper.program.display();
            let why = format!("{program} knows no version {PROTOCOL} of the keeper's protocol");
            error!(
                "there is no keeper, and if this process is killed, a VM may end: {why}; is it of another version?"
            );
            state.trouble = Some(why);
            state.is_given_up = true;
            return true;
        }
        state.restarts += 1;
        let before = state.trouble.replace(format!("it has ended: {how}"));
        // One that ends at once does so again and again.
        match before.filter(|_| lived <= AT_ONCE) {
            None => warn!("the keeper, process {pid}, has ended ({how}); another one is started"),
            Some(_) => debug!("the keeper, process {pid}, has ended at once again ({how})"),
        }
        false
    }

    fn take_failure(&self, why: &io::Error) {
        let program = self.keeper.program.display();
        let why = format!("cannot start {program}: {why}");
        let mut state = self.state();
        if state.trouble.as_ref() != Some(&why) {
            error!("there is no keeper, and if this process is killed, a VM may end: {why}");
            state.trouble = Some(why);
        }
    }
}
