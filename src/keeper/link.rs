//! The proxy's link to its keeper: it starts the keeper's process, starts another one when that has
//! ended, and gives it a copy of whatever is to be kept.
//!
//! Each kept socket is noted here with its descriptor, so that a new keeper can be given all of
//! them again. The note of a connection lives as long as the [`Kept`] that the socket owns, which
//! is dropped before the socket is closed: no number is used here that belongs to another file by
//! then. The note of a listening socket has a duplicate, for the keeper goes on accepting there
//! when the proxy does no more.
//!
//! A connection is the keeper's before it is made. So that it takes no message of its own, sockets
//! are made and given to the keeper ahead of their use, some at a time. The VM knows nothing of a
//! socket that is not connected.
//!
//! No call waits: what the keeper can't take now is given to it later, and counts as unguarded
//! until then.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tracing::{debug, error, warn};

use crate::lock::lock;
use crate::sys::{self, Identity, Unconnected, Wanted};

use super::copies::{AHEAD, Copies, CopyProgress, Descriptor, Ends, Entry, MOST_SERVED, When};
use super::protocol::{GuestPort, Order, PROTOCOL, UNKNOWN_PROTOCOL};
use super::status::socket_path;
use super::{Keeper, LinkStatus};

/// A keeper that has lived no longer than this has ended at once, and is not replaced at once.
const AT_ONCE: Duration = Duration::from_secs(1);

/// The pause before a keeper that has ended at once is replaced. It doubles up to the longest.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// How often a keeper that was started is asked whether it is ready.
#[cfg(feature = "cli")]
const LOOK: Duration = Duration::from_millis(2);

/// How many descriptors a link needs.
pub(crate) const DESCRIPTORS: usize = 6 + AHEAD + MOST_SERVED;

/// The link. The keeper takes the end of its last clone for the end of the proxy.
#[derive(Clone, Debug)]
pub(crate) struct Link(Arc<Owner>);

#[derive(Debug)]
struct Owner(Arc<LinkState>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// A view of the link, which doesn't keep the keeper running.
#[derive(Clone, Debug)]
pub(crate) struct View(Arc<LinkState>);

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

    /// Has the keeper make a status socket in the state directory of a VM, and gives it its missing
    /// copies. This reads the directory, and may block as long as that does.
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
            // If it can't take the order now, the next call sends it.
            state.send(&Order::Directory(directory), When::Now);
        }
        if !state.missing.is_empty() {
            inner.catch_up(state);
        } else {
            drop(state);
        }
        inner.forget_served();
    }
}

/// The note that a socket is kept, which the socket owns. Dropping it tells the keeper to close its
/// copy of a connection, or to accept at its copy of a listening socket.
#[derive(Debug)]
pub(crate) struct Kept {
    inner: Arc<LinkState>,
    id: u64,
    is_done: bool,
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
        if self.is_done {
            return;
        }
        let mut state = self.inner.state();
        if state.serve(self.id) {
            self.is_done = true;
            if !state.send_served(self.id) {
                self.inner.catch_up(state);
            }
            return;
        }
        drop(state);
        self.finish(Some(Order::Release(self.id)), When::Now);
    }
}

#[derive(Debug)]
struct LinkState {
    keeper: Keeper,
    state: Mutex<Copies>,
    changed: Condvar,
}

impl Link {
    /// Makes a link to a keeper that is started when something is to be kept.
    pub(crate) fn new(keeper: Keeper) -> Link {
        let state = Mutex::default();
        let changed = Condvar::new();
        Link(Arc::new(Owner(Arc::new(LinkState {
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
        let descriptor = Descriptor::Borrowed(connection.as_raw_fd());
        self.keep(descriptor, Order::Connection)
    }

    /// Makes a socket and has the keeper keep it, as [`keep_connection`](Link::keep_connection)
    /// does.
    ///
    /// # Errors
    /// Returns why there can be no socket.
    pub(crate) fn keep_unconnected(&self) -> io::Result<(Unconnected, Option<Kept>)> {
        let inner = &self.0.0;
        inner.begin();
        let mut state = inner.state();
        if state.ahead.is_empty()
            && let Some(alone) = state.go_ahead(Unconnected::new()?)
        {
            drop(state);
            let kept = self.keep_connection(alone.as_fd());
            return Ok((alone, kept));
        }
        let Some((id, socket)) = state.ahead.pop() else {
            return Err(io::ErrorKind::Other.into());
        };
        let entry = Entry {
            descriptor: Descriptor::Borrowed(socket.socket.as_raw_fd()),
            order: Order::Connection(id),
            is_given: true,
        };
        state.kept.insert(id, entry);
        drop(state);
        let kept = Kept {
            inner: Arc::clone(inner),
            id,
            is_done: false,
        };
        Ok((socket, Some(kept)))
    }

    /// Has the keeper keep a listening socket, as [`keep_connection`](Link::keep_connection) does.
    pub(crate) fn keep_listener(&self, listener: BorrowedFd<'_>, port: GuestPort) -> Option<Kept> {
        let duplicate = listener.try_clone_to_owned().ok()?;
        let descriptor = Descriptor::Duplicate(duplicate);
        let kept = self.keep(descriptor, |id| Order::Listener(id, port));
        // Listening sockets are few, and a successor may ask for one at any time.
        self.0.0.state().notify();
        kept
    }

    fn keep(&self, descriptor: Descriptor, order: impl FnOnce(u64) -> Order) -> Option<Kept> {
        let inner = &self.0.0;
        inner.begin();
        let mut state = inner.state();
        if state.is_given_up {
            return None;
        }
        let id = state.next;
        state.next += 1;
        let entry = Entry {
            descriptor,
            order: order(id),
            is_given: false,
        };
        state.kept.insert(id, entry);
        if state.give_missing() != CopyProgress::Done || !state.give(id) {
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

impl LinkState {
    fn state(&self) -> MutexGuard<'_, Copies> {
        lock(&self.state)
    }

    /// Starts the thread that starts the keeper, once.
    fn begin(self: &Arc<LinkState>) {
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
    fn catch_up(self: &Arc<LinkState>, mut state: MutexGuard<'_, Copies>) {
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
            // The next socket that is kept tries again.
            self.state().is_catching_up = false;
        }
    }

    /// Ends the link: the keeper gets nothing more.
    fn end(&self) {
        let mut state = self.state();
        state.flush();
        (state.has_ended, state.ends) = (true, None);
        state.ahead.clear();
        // A caller that looks at the status may keep this alive for long.
        while let Some(id) = state.served.pop_front() {
            state.kept.remove(&id);
        }
        self.changed.notify_all();
    }

    /// Forgets the ports that the keeper alone serves and that nobody can reach any more: another
    /// socket has their path, or none. The keeper sees that itself. This reads files.
    fn forget_served(&self) {
        let served: Vec<(u64, PathBuf, Identity)> = {
            let state = self.state();
            let port = |id: &u64| {
                let port = state.kept.get(id)?.port()?;
                Some((*id, port.path.clone(), port.identity))
            };
            state.served.iter().filter_map(port).collect()
        };
        for (id, path, identity) in served {
            let is_gone = match Identity::of(&path) {
                Ok(now) => now != identity,
                Err(e) => e.kind() == io::ErrorKind::NotFound,
            };
            if is_gone {
                let mut state = self.state();
                state.served.retain(|it| *it != id);
                state.kept.remove(&id);
            }
        }
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
                    self.remove_sockets_of(pid);
                    if self.take_end(pid, &ended, begun.elapsed()) {
                        return;
                    }
                }
                Err(e) => self.take_failure(&e),
            }
            if begun.elapsed() > AT_ONCE {
                pause = PAUSE;
            }
            let wait = |state: &mut Copies| !state.has_ended;
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
        state.ahead.clear();
        state.has_warned = false;
        // A keeper that was started at the end is begun as well: it then has nothing to keep, and
        // ends.
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

    /// Gives a new keeper copies of all kept sockets.
    fn give_all(&self) {
        loop {
            let mut state = self.state();
            let progress = match state.flush() {
                true => state.give_missing(),
                false => CopyProgress::Blocked,
            };
            if progress == CopyProgress::Some {
                continue;
            }
            state.notify();
            let Some(ends) = state
                .ends
                .clone()
                .filter(|_| progress != CopyProgress::Done)
            else {
                return;
            };
            drop(state);
            // The keeper is about to read. If it has ended, this returns at once.
            let waited = sys::wait(ends.orders.as_fd(), Wanted::Writable, AT_ONCE);
            if sys::is_hung_up(ends.notifier.as_fd()) {
                return;
            }
            if !matches!(waited, Ok(true)) {
                let is_known = std::mem::replace(&mut self.state().has_warned, true);
                if !is_known {
                    warn!("the keeper stands still; if this process is killed now, a VM may end");
                }
                // The next socket that is kept tries again.
                return;
            }
        }
    }

    /// Notes that a keeper has ended. Returns whether no other one is started.
    fn take_end(
        &self,
        pid: u32,
        ended: &io::Result<std::process::ExitStatus>,
        lived: Duration,
    ) -> bool {
        let mut state = self.state();
        (state.ends, state.pid) = (None, None);
        state.ahead.clear();
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
        // A keeper that ends at once would do so again and again.
        match before.filter(|_| lived <= AT_ONCE) {
            None => warn!("the keeper, process {pid}, has ended ({how}); another one is started"),
            Some(_) => debug!("the keeper, process {pid}, has ended at once again ({how})"),
        }
        false
    }

    /// Removes the status sockets of a keeper that has ended, and was killed if it has left any.
    fn remove_sockets_of(&self, pid: u32) {
        let directories = self.state().directories.clone();
        for directory in directories {
            let _ = std::fs::remove_file(socket_path(&directory, pid));
        }
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
