//! The beginning of a connection: its client was accepted (`proxy/listeners/accepting.rs`), and is
//! refused or dialled for.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tracing::debug;

use crate::dial::Dial;
use crate::engine::Phase;
use crate::engine::admission::quotas::ReachedLimit;
use crate::engine::admission::{NotServed, Slot};
use crate::engine::end_reason::{EndReason, RefusalReason};
use crate::engine::forward::Forward;
use crate::engine::id::ConnectionId;
use crate::engine::observer::What;
use crate::engine::relay::{End, Readiness, Side};
use crate::engine::routes::Route;
use crate::error::{Error, Operation};
use crate::name::{Peer, SocketName};
use crate::stream::peer_names::PeerNames;
use crate::time::after;

use super::action::Context;
use super::retries::Retries;
use super::socket::ConnectionSocket;
use super::state::{Connection, State};

impl<S: ConnectionSocket> Connection<S> {
    /// Makes a connection of an accepted socket; [`begin`](Connection::begin) must follow. `slots`
    /// are that of a guest's dial, and that which is queued at the target's VM.
    pub(crate) fn for_client(
        name: ConnectionId,
        forward: Arc<Forward>,
        socket: S,
        peer: SocketName,
        slots: [Option<Slot>; 2],
        now: Instant,
    ) -> Connection<S> {
        let mut client = End::new(socket);
        client.latch(Readiness {
            readable: client.socket.is_settled(),
            ..Readiness::default()
        });
        let peer = Peer {
            name: peer,
            process: client.socket.peer_process(),
        };
        let patience = forward
            .rule
            .hold_time()
            .unwrap_or(forward.rule.timeouts.dial);
        let state = State::waiting(client, Dial::new(after(now, patience)));
        let retries = forward.rule.hold_time().map(|_| Retries::new());
        let mut connection = Connection::new(name, forward, peer, state, now);
        if let Some(guest) = &slots[Side::Client] {
            // A guest that dials runs.
            guest.note_answer(now);
        }
        connection.slots = slots;
        connection.retries = retries;
        connection.log_debug(|| debug!("accepted"));
        connection.notify(What::Accepted);
        connection
    }

    /// Begins to dial the target. `watched` says whether the poller could register the client,
    /// `served` whether the client, if it is a guest, has a part in its VM's slots.
    pub(crate) fn begin(
        &mut self,
        watched: io::Result<()>,
        served: Result<(), NotServed>,
        cx: &mut Context<'_, S>,
    ) {
        // Guests find the port bound until the very end, but are not served any more.
        let is_closed = match cx.phase {
            Phase::Running => self.forward.is_cut(),
            Phase::Stopping => self.forward.needs_graceful_close(Side::Client),
            Phase::Cutting => true,
        };
        match watched {
            Err(e) => {
                let error = Error::new(Operation::Accept, &self.forward.rule.listen, e);
                self.refuse(&error, RefusalReason::Other, cx);
            }
            Ok(()) if is_closed => {
                self.end_because(match cx.phase {
                    Phase::Running => EndReason::Removed,
                    Phase::Stopping | Phase::Cutting => EndReason::Stopped,
                });
                self.refuse_cut_off(cx);
            }
            Ok(()) if served.is_err() => self.turn_away(served, cx),
            Ok(()) if !self.forward.rule.admits(&self.peer.name) => self.refuse_stranger(cx),
            Ok(()) if !self.note_client(cx) => self.refuse_loop(cx),
            Ok(()) if self.is_one_too_many() => self.refuse_too_many(cx),
            Ok(()) if self.expects_header() => self.begin_reading_header(cx),
            Ok(()) => self.begin_dial(cx),
        }
    }

    /// Ends a guest's dial that is not served.
    fn turn_away(&mut self, served: Result<(), NotServed>, cx: &mut Context<'_, S>) {
        if let Err(why) = served {
            let cause = io::Error::other(why.to_string());
            let error = Error::new(Operation::Accept, &self.forward.rule.listen, cause);
            self.refuse(&error, RefusalReason::Full, cx);
        }
    }

    /// Notes that the client may be a socket that this process dialled. Returns false if the
    /// connection closes a loop of forwards.
    fn note_client(&mut self, cx: &mut Context<'_, S>) -> bool {
        let State::Waiting { client, .. } = &self.state else {
            return true;
        };
        let (forward, peer) = (self.forward.id, self.peer.name);
        if peer == SocketName::Unnamed {
            let is_ours = || client.socket.is_from_this_process();
            return cx.routes.admit_unnamed_client(forward, is_ours, cx.now);
        }
        let ends = || PeerNames::of_accepted(client.socket.local_name()?, peer);
        let mut route = Route::default();
        let is_acyclic = cx.routes.admit_client(ends, forward, &mut route);
        self.route = route.into_box();
        is_acyclic
    }

    /// Refuses a client that comes from where the rule lets none come from.
    fn refuse_stranger(&mut self, cx: &mut Context<'_, S>) {
        let client = self.peer.name.without_port();
        let cause = io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("{client} may not come: it is not in the rule's `from`"),
        );
        let error = Error::new(Operation::Accept, &self.forward.rule.listen, cause);
        self.refuse(&error, RefusalReason::NotAllowed, cx);
    }

    /// Returns whether the target's connections are limited, and there are as many already: a
    /// client that can't be made to wait in a backlog, such as a guest, is accepted nevertheless.
    fn is_one_too_many(&self) -> bool {
        let rule = &self.forward.rule;
        let is_limited = rule.connect.transport().connections.is_some();
        // This connection is counted in it.
        let live = self.forward.tally.live.load(Ordering::Relaxed);
        let most = rule.most_connections().filter(|_| is_limited);
        most.is_some_and(|most| live > most as u64)
    }

    fn refuse_too_many(&mut self, cx: &mut Context<'_, S>) {
        let rule = &self.forward.rule;
        let most = rule.most_connections().unwrap_or_default();
        let why = io::Error::other(ReachedLimit(most).to_string());
        let error = Error::new(Operation::Connect, &rule.connect, why);
        let error = error.with_remedy("allow it more connections");
        self.refuse(&error, RefusalReason::Full, cx);
    }
}
