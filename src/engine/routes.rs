//! The routes between the forwards of this process, by their live connections. A connection that
//! one forward makes to another's listener is an edge from the one to the other; an edge that would
//! close a loop of forwards is refused.
//!
//! Names of sockets come in; no socket is known here.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::lock::lock;
use crate::stream::endpoint::Endpoint;
use crate::stream::peer_names::{ListenerKind, ListenerName, PeerNames};

use super::id::ForwardId;

/// How long a forward counts as part of a loop after a dial has closed one.
const LOOP_TIME: Duration = Duration::from_secs(1);

/// A connection's entries in [`Routes`], for as long as it lives.
#[derive(Debug, Default)]
pub(crate) struct Route {
    /// The names of the dialled sockets, by which the accepting end may find them: of several while
    /// addresses are raced.
    outgoing: Vec<PeerNames>,
    /// The edges that the connection counts for.
    edges: Vec<(ForwardId, ForwardId)>,
}

impl Route {
    /// Returns the route itself, boxed, unless it is empty.
    pub(crate) fn into_box(self) -> Option<Box<Route>> {
        (!self.outgoing.is_empty() || !self.edges.is_empty()).then(|| Box::new(self))
    }
}

/// The routes between the forwards of this process, by their live connections.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    known: Mutex<RouteTables>,
    /// The number of dialled sockets that may lead to a listener of this process. While it is 0, no
    /// accepted socket needs to be looked up.
    dialled: AtomicUsize,
    has_loops: AtomicBool,
}

/// A number of things of each kind.
#[derive(Debug)]
struct Counts<K>(HashMap<K, usize>);

impl<K> Default for Counts<K> {
    fn default() -> Counts<K> {
        Counts(HashMap::new())
    }
}

impl<K: Eq + Hash> Counts<K> {
    fn of(&self, kind: &K) -> usize {
        self.0.get(kind).copied().unwrap_or(0)
    }

    fn add(&mut self, kind: K) {
        *self.0.entry(kind).or_default() += 1;
    }

    fn remove(&mut self, kind: K) {
        if let Entry::Occupied(mut entry) = self.0.entry(kind) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

#[derive(Debug, Default)]
struct RouteTables {
    listeners: HashMap<ListenerName, ForwardId>,
    names: HashMap<ForwardId, ListenerName>,
    /// How many listeners there are of each kind.
    kinds: Counts<ListenerKind>,
    outgoing: HashMap<PeerNames, ForwardId>,
    /// How many of those lead to listeners of each kind.
    outgoing_to: Counts<ListenerKind>,
    /// How many connections lead from one forward to another.
    edges: HashMap<ForwardId, Counts<ForwardId>>,
    /// How many lead to each.
    edges_to: Counts<ForwardId>,
    /// The forwards through which a loop of Unix sockets went lately, and the time until which they
    /// count as part of it.
    loops: HashMap<ForwardId, Instant>,
}

impl Routes {
    fn known(&self) -> MutexGuard<'_, RouteTables> {
        lock(&self.known)
    }

    /// Checks that no connection is known any more.
    #[cfg(all(test, target_os = "linux"))]
    pub(crate) fn check_counts(&self) {
        let known = self.known();
        assert!(known.outgoing.is_empty(), "{:?}", known.outgoing);
        assert!(known.edges.is_empty(), "{:?}", known.edges);
        assert!(known.edges_to.0.is_empty(), "{:?}", known.edges_to);
        assert!(known.outgoing_to.0.is_empty(), "{:?}", known.outgoing_to);
        assert_eq!(self.dialled.load(Ordering::Relaxed), 0);
    }

    /// Adds the listener of a forward.
    pub(crate) fn add_listener(&self, listener: ListenerName, forward: ForwardId) {
        let mut known = self.known();
        known.remove_listener(forward);
        known.kinds.add(listener.kind());
        known.listeners.insert(listener.clone(), forward);
        known.names.insert(forward, listener);
    }

    /// Removes the listener of a forward.
    pub(crate) fn remove_listener(&self, forward: ForwardId) {
        self.known().remove_listener(forward);
    }

    /// Returns whether a connection to that endpoint may arrive at a listener of this process.
    /// Where it can't, the caller saves all further calls.
    pub(crate) fn may_reach(&self, endpoint: &Endpoint) -> bool {
        self.known().kinds.of(&ListenerKind::of(endpoint)) > 0
    }

    /// Notes a dialled connection of `forward`, so that it is recognized if it arrives at a
    /// listener of this process.
    pub(crate) fn note_dial(&self, forward: ForwardId, ends: PeerNames, route: &mut Route) {
        let mut known = self.known();
        route.outgoing.push(ends);
        if known.outgoing.insert(ends, forward).is_none() {
            known.outgoing_to.add(ends.listener());
        }
        self.dialled.store(known.outgoing.len(), Ordering::Release);
    }

    /// Forgets the dialled sockets of a connection, which are closed.
    pub(crate) fn forget_dialled(&self, route: &mut Route) {
        self.retain_dialled(route, |_| false);
    }

    /// Forgets the dialled sockets of a connection but the one that has these names.
    pub(crate) fn keep_dialled(&self, kept: PeerNames, route: &mut Route) {
        self.retain_dialled(route, |ends| *ends == kept);
    }

    fn retain_dialled(&self, route: &mut Route, is_kept: impl Fn(&PeerNames) -> bool) {
        if route.outgoing.iter().all(&is_kept) {
            return;
        }
        let mut known = self.known();
        route.outgoing.retain(|ends| {
            let stays = is_kept(ends);
            if !stays {
                known.forget_outgoing(ends);
            }
            stays
        });
        self.dialled.store(known.outgoing.len(), Ordering::Release);
    }

    /// Notes that a connection of `forward` has arrived at the Unix listener of that name. Returns
    /// false if that closes a loop. By then the connection waits to be accepted already: see
    /// [`admit_unnamed_client`](Routes::admit_unnamed_client).
    pub(crate) fn note_arrival(
        &self,
        forward: ForwardId,
        name: &ListenerName,
        route: &mut Route,
        now: Instant,
    ) -> bool {
        let mut known = self.known();
        let Some(to) = known.listeners.get(name).copied() else {
            return true;
        };
        let is_acyclic = known.add_edge(forward, to, route);
        if !is_acyclic {
            known.loops.insert(to, now + LOOP_TIME);
            self.has_loops.store(true, Ordering::Release);
        }
        is_acyclic
    }

    /// Takes a client of `forward` that has no name; `is_ours` tells whether this process dialled
    /// it. Returns false if a loop goes through `forward`, so that the client may be the connection
    /// that was refused when it was dialled.
    pub(crate) fn admit_unnamed_client(
        &self,
        forward: ForwardId,
        is_ours: impl FnOnce() -> bool,
        now: Instant,
    ) -> bool {
        if !self.has_loops.load(Ordering::Acquire) {
            return true;
        }
        let mut known = self.known();
        known.loops.retain(|_, until| now < *until);
        let some = !known.loops.is_empty();
        self.has_loops.store(some, Ordering::Release);
        !known.loops.contains_key(&forward) || !is_ours()
    }

    /// Takes a client of `forward`. Returns false if it closes a loop.
    pub(crate) fn admit_client(
        &self,
        ends: impl FnOnce() -> Option<PeerNames>,
        forward: ForwardId,
        route: &mut Route,
    ) -> bool {
        if self.dialled.load(Ordering::Acquire) == 0 {
            return true;
        }
        let Some(ends) = ends() else {
            return true;
        };
        let mut known = self.known();
        match known.outgoing.get(&ends).copied() {
            Some(from) => known.add_edge(from, forward, route),
            None => true,
        }
    }

    /// Returns whether a connection dialled by this process may wait to be accepted at a forward
    /// that has accepted so many that still live. Such a connection must not wait for the end of
    /// the connection that it belongs to.
    pub(crate) fn may_wait_at(&self, forward: ForwardId, accepted: u64) -> bool {
        let known = self.known();
        let edges = known.edges_to.of(&forward);
        let Some(kind) = known.names.get(&forward).map(ListenerName::kind) else {
            return false;
        };
        match kind.names_its_clients() {
            // The edge exists from the accept on.
            true => known.outgoing_to.of(&kind) > edges,
            // The edge exists from the dial on. Accepted connections are counted whether they are
            // edges or not: those that are none end by themselves, and free a slot.
            false => edges as u64 > accepted,
        }
    }

    /// Forgets a connection.
    pub(crate) fn forget_route(&self, route: Route) {
        let mut known = self.known();
        for ends in &route.outgoing {
            known.forget_outgoing(ends);
        }
        self.dialled.store(known.outgoing.len(), Ordering::Release);
        for (from, to) in route.edges {
            known.edges_to.remove(to);
            if let Entry::Occupied(mut entry) = known.edges.entry(from) {
                entry.get_mut().remove(to);
                if entry.get().0.is_empty() {
                    entry.remove();
                }
            }
        }
    }
}

impl RouteTables {
    fn remove_listener(&mut self, forward: ForwardId) {
        let Some(name) = self.names.remove(&forward) else {
            return;
        };
        self.kinds.remove(name.kind());
        if self.listeners.get(&name) == Some(&forward) {
            self.listeners.remove(&name);
        }
    }

    fn forget_outgoing(&mut self, ends: &PeerNames) {
        if self.outgoing.remove(ends).is_some() {
            self.outgoing_to.remove(ends.listener());
        }
    }

    /// Adds an edge, unless a path leads from its end back to its beginning.
    fn add_edge(&mut self, from: ForwardId, to: ForwardId, route: &mut Route) -> bool {
        let mut seen = HashSet::from([to]);
        let mut left = vec![to];
        while let Some(at) = left.pop() {
            if at == from {
                return false;
            }
            if let Some(there) = self.edges.get(&at) {
                left.extend(there.0.keys().filter(|next| seen.insert(**next)));
            }
        }
        self.edges.entry(from).or_default().add(to);
        self.edges_to.add(to);
        route.edges.push((from, to));
        true
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use super::*;
    use crate::name::SocketName;

    #[test]
    fn an_edge_that_closes_a_loop_is_refused_until_the_others_are_gone() {
        let routes = Routes::default();
        let [a, b, c] = [0, 1, 2].map(ForwardId);
        let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let to = |listening| Endpoint::Tcp(SocketAddr::from((Ipv4Addr::UNSPECIFIED, listening)));
        let socket = |port, listening| {
            PeerNames::of_dialled(SocketName::Tcp(local(port)), &to(listening)).unwrap()
        };
        // The names as a listener on [::] sees them.
        let seen = |port, listening| {
            let ip = Ipv4Addr::LOCALHOST.to_ipv6_mapped();
            let name = move |port| SocketName::Tcp(SocketAddr::from((ip, port)));
            move || PeerNames::of_accepted(name(listening), name(port))
        };
        let name = |name: &str| ListenerName::Unix(name.into());
        routes.add_listener(name("b"), b);
        let mut first = Route::default();
        let now = Instant::now();
        assert!(routes.note_arrival(a, &name("b"), &mut first, now));
        assert!(routes.note_arrival(a, &name("other"), &mut first, now));
        let mut second = Route::default();
        routes.note_dial(b, socket(1, 80), &mut second);
        assert!(routes.admit_client(seen(2, 80), c, &mut second));
        assert!(routes.admit_client(seen(1, 80), c, &mut second));
        let mut third = Route::default();
        routes.note_dial(c, socket(3, 81), &mut third);
        assert!(!routes.admit_client(seen(3, 81), a, &mut Route::default()));
        assert!(!routes.admit_client(seen(3, 81), c, &mut Route::default()));
        // Another program's socket may have the same port on its way to another listener.
        assert!(routes.admit_client(seen(3, 82), c, &mut Route::default()));
        // A connection that was dialled before waits there to be accepted.
        assert!(routes.admit_unnamed_client(b, || true, now));
        assert!(!routes.note_arrival(c, &name("b"), &mut Route::default(), now));
        assert!(!routes.admit_unnamed_client(b, || true, now));
        assert!(routes.admit_unnamed_client(b, || false, now));
        assert!(routes.admit_unnamed_client(c, || true, now));
        assert!(routes.admit_unnamed_client(b, || true, now + LOOP_TIME));
        routes.forget_route(first);
        assert!(routes.admit_client(seen(3, 81), a, &mut third));
        routes.forget_route(second);
        routes.forget_route(third);
        let known = routes.known();
        assert!(known.edges.is_empty() && known.outgoing.is_empty());
        assert_eq!(routes.dialled.load(Ordering::Acquire), 0);
    }
}
