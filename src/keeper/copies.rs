//! The copies of sockets that the keeper has or is to have, and the sockets over which it gets
//! them.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use socket2::SockRef;
use tracing::debug;

use crate::sys::{self, Unconnected};

use super::LinkStatus;
use super::protocol::{FRAME, GuestPort, Order};

/// How many descriptors may wait in the socket until the keeper is woken to take them. It needn't
/// take each at once: they arrive even if this process has ended by then.
///
/// But not on a Mac: XNU takes a socket in flight that nobody else holds for garbage, and closes it
/// (`unp_gc` in `bsd/kern/uipc_usrreq.c` doesn't look into the buffers of sockets that are not in
/// flight themselves).
const MOST_WAITING: usize = if cfg!(target_vendor = "apple") { 1 } else { 64 };

/// The buffers that are asked for: what Linux allows by default (`net.core.wmem_max`), which is
/// room for some 550 descriptors there.
const ROOM: usize = 212_992;

/// How many bytes of orders without a descriptor may wait to be sent with the next order.
const MOST_PENDING: usize = 64 * FRAME;

/// How many sockets are made ahead.
pub(super) const AHEAD: usize = sys::MOST_SENT;

/// How many ports at which the proxy listens no more are remembered, each with a descriptor, for
/// the case that the keeper is killed. Beyond that the oldest ones are the keeper's alone.
pub(super) const MOST_SERVED: usize = 32;

/// How many of the missing copies the keeper is given while the lock is held. Other threads wait
/// for it meanwhile.
const BATCH: usize = 8;

/// When the keeper is to carry out what it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// At once.
    Now,
    /// With the next order.
    Later,
}

/// A socket of which the keeper has or is to have a copy.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) descriptor: Descriptor,
    pub(super) order: Order,
    pub(super) is_given: bool,
}

impl Entry {
    /// Returns the port of a listening socket.
    pub(super) fn port(&self) -> Option<&GuestPort> {
        match &self.order {
            Order::Listener(_, port) => Some(port),
            _ => None,
        }
    }
}

#[derive(Debug)]
pub(super) enum Descriptor {
    /// The descriptor of a connection.
    Borrowed(RawFd),
    /// A duplicate of a listening socket.
    Duplicate(OwnedFd),
}

impl Descriptor {
    pub(super) fn number(&self) -> RawFd {
        match self {
            Descriptor::Borrowed(number) => *number,
            Descriptor::Duplicate(socket) => socket.as_raw_fd(),
        }
    }
}

/// The sockets to one keeper.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) notifier: UnixStream,
    pub(super) orders: UnixStream,
}

impl Ends {
    /// Makes the sockets. Returns the keeper's ends as well: of the notifier, and of the orders.
    pub(super) fn pair() -> io::Result<(Ends, OwnedFd, OwnedFd)> {
        let (notifier, other_notifier) = UnixStream::pair()?;
        let (orders, other_orders) = UnixStream::pair()?;
        for socket in [&notifier, &orders] {
            socket.set_nonblocking(true)?;
            #[cfg(target_vendor = "apple")]
            SockRef::from(socket).set_nosigpipe(true)?;
        }
        // The buffers hold the orders that come while the keeper isn't scheduled. The system may
        // allow less.
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

    pub(super) fn notify(&self) {
        // A notifier without room is not read yet.
        let _ = sys::send(self.notifier.as_fd(), &[1], &[]);
    }
}

/// How far the keeper is with its missing copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CopyProgress {
    /// It has all copies.
    Done,
    /// It has some more, and can take others.
    Some,
    /// It can take none now.
    Blocked,
}

/// The copies, and the keeper that has them.
#[derive(Debug, Default)]
pub(super) struct Copies {
    pub(super) ends: Option<Arc<Ends>>,
    /// Orders without a descriptor that are not sent yet.
    pub(super) pending: Vec<u8>,
    /// Whether the pending orders may begin with the rest of a frame.
    pub(super) is_torn: bool,
    pub(super) next: u64,
    pub(super) kept: HashMap<u64, Entry>,
    /// The sockets of which the keeper has no copy yet, and some that are kept no more.
    pub(super) missing: VecDeque<u64>,
    /// The listening sockets at which the proxy listens no more, the oldest first.
    pub(super) served: VecDeque<u64>,
    /// The sockets that are made ahead, of which the keeper has copies, by their numbers.
    pub(super) ahead: Vec<(u64, Unconnected)>,
    /// The descriptors that the keeper was not woken for yet.
    pub(super) waiting: usize,
    pub(super) directories: HashSet<PathBuf>,
    pub(super) pid: Option<u32>,
    pub(super) restarts: u64,
    pub(super) trouble: Option<String>,
    /// Whether the thread was started.
    pub(super) has_begun: bool,
    pub(super) has_ended: bool,
    /// Whether no keeper is started any more, since none can run.
    pub(super) is_given_up: bool,
    pub(super) has_warned: bool,
    /// Whether a thread waits for the keeper to take what it could not take before.
    pub(super) is_catching_up: bool,
}

impl Copies {
    pub(super) fn status(&self) -> LinkStatus {
        let given = || self.kept.values().filter(|it| it.is_given);
        let ports = given().filter(|it| it.port().is_some()).count();
        let served = |id: &&u64| self.kept.get(id).is_some_and(|it| it.is_given);
        LinkStatus {
            pid: self.pid,
            connections: given().count() - ports,
            ports: ports - self.served.iter().filter(served).count(),
            unguarded: self.kept.len() - given().count(),
            restarts: self.restarts,
            trouble: self.trouble.clone().filter(|_| self.pid.is_none()),
        }
    }

    /// Sends the keeper an order without descriptors. Returns false if it can't take it now.
    pub(super) fn send(&mut self, order: &Order, when: When) -> bool {
        if self.ends.is_none() {
            // The next keeper gets all anew.
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

    pub(super) fn notify(&mut self) {
        self.waiting = 0;
        if let Some(ends) = &self.ends {
            ends.notify();
        }
    }

    /// Sends what is pending. Returns whether nothing is left.
    pub(super) fn flush(&mut self) -> bool {
        let Some(ends) = &self.ends else {
            return false;
        };
        while !self.pending.is_empty() {
            match sys::send(ends.orders.as_fd(), &self.pending, &[]) {
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

    /// Has the keeper accept at a listening socket from now on. The note of the socket stays until
    /// it is known that nobody can reach it any more. Returns false if it is no listening socket.
    pub(super) fn serve(&mut self, id: u64) -> bool {
        let is_listener = self.kept.get(&id).is_some_and(|it| it.port().is_some());
        if !is_listener {
            return false;
        }
        if self.has_ended {
            self.kept.remove(&id);
            return true;
        }
        self.served.push_back(id);
        if self.served.len() > MOST_SERVED
            && let Some(oldest) = self.served.pop_front()
        {
            self.kept.remove(&oldest);
        }
        true
    }

    /// Has the keeper serve a listening socket, if it has its copy. Returns false if it can't take
    /// the order now.
    pub(super) fn send_served(&mut self, id: u64) -> bool {
        match self.kept.get(&id).is_some_and(|it| it.is_given) {
            true => self.send(&Order::Serve(id), When::Now),
            // It gets the order as soon as it has the copy.
            false => self.ends.is_none(),
        }
    }

    /// Gives the keeper its copy of a socket. Returns false if it can't take it now.
    pub(super) fn give(&mut self, id: u64) -> bool {
        let Some(entry) = self.kept.get(&id) else {
            return false;
        };
        let (order, descriptor) = (entry.order.clone(), entry.descriptor.number());
        if !self.give_copies(&order, &[descriptor]) {
            return false;
        }
        if let Some(entry) = self.kept.get_mut(&id) {
            entry.is_given = true;
        }
        if self.served.contains(&id) {
            // If it can't take this now, it takes it with the next order.
            self.send(&Order::Serve(id), When::Now);
        }
        true
    }

    /// Sends an order with the descriptors that belong to it. Returns false if the keeper can't
    /// take them now.
    pub(super) fn give_copies(&mut self, order: &Order, descriptors: &[RawFd]) -> bool {
        let has_room = match self.is_torn || self.pending.len() >= MOST_PENDING {
            true => self.flush(),
            false => true,
        };
        let (Some(ends), true) = (&self.ends, has_room) else {
            return false;
        };
        let mut bytes = Vec::with_capacity(2 * FRAME + self.pending.len());
        order.write(&mut bytes);
        // The order is the first, so that each read of the keeper finds the descriptors of one.
        bytes.extend_from_slice(&self.pending);
        let sent = loop {
            match sys::send(ends.orders.as_fd(), &bytes, descriptors) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                sent => break sent,
            }
        };
        match sent {
            Ok(n) => {
                self.is_torn = n < bytes.len();
                self.pending = bytes.split_off(n);
                self.waiting += descriptors.len();
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

    /// Makes sockets ahead and gives the keeper its copies, if it can take them now. `first` is a
    /// socket that was made already; it is returned if the keeper has no copy of it.
    pub(super) fn go_ahead(&mut self, first: Unconnected) -> Option<Unconnected> {
        if self.ends.is_none() || !self.missing.is_empty() {
            return Some(first);
        }
        let mut made = vec![first];
        while made.len() < AHEAD
            && let Ok(next) = Unconnected::new()
        {
            made.push(next);
        }
        let numbers: Vec<RawFd> = made.iter().map(|it| it.socket.as_raw_fd()).collect();
        let order = Order::Connections(self.next, made.len() as u16);
        if !self.give_copies(&order, &numbers) {
            return Some(made.swap_remove(0));
        }
        for socket in made {
            self.ahead.push((self.next, socket));
            self.next += 1;
        }
        None
    }

    /// Gives the keeper some of its missing copies.
    pub(super) fn give_missing(&mut self) -> CopyProgress {
        for _ in 0..BATCH {
            let Some(id) = self.missing.front().copied() else {
                return CopyProgress::Done;
            };
            let is_kept = self.kept.get(&id).is_some_and(|it| !it.is_given);
            if is_kept && !self.give(id) {
                return CopyProgress::Blocked;
            }
            self.missing.pop_front();
        }
        CopyProgress::Some
    }
}
