//! The connections of one worker: accepted ones are taken over, events are passed to them, and the
//! actions that they request are carried out.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::engine::connection::{Action, Connection, Context, Dialled};
use crate::engine::end_reason::EndReason;
use crate::engine::id::{ConnectionId, ForwardId};
use crate::engine::relay::{Carried, Pool, Side};
use crate::engine::status::ConnectionStatus;
use crate::engine::table::{Id, Table};
use crate::engine::timers::Timers;
use crate::error::Error;
use crate::stream::endpoint::Target;
use crate::stream::socket::Socket;

use super::queues::{DialQueue, ProbeQueue};
use crate::proxy::cuts::Cuts;
use crate::proxy::driver::{Driver, DriverEvent};
use crate::proxy::shared::{Accepted, TurnContext};

/// The size of a buffer. A pair in flight borrows at most two.
const BUFFER: usize = 128 * 1024;

/// The buffers that a worker keeps even if they are not needed.
const KEEP: usize = 16;

/// How often unneeded buffers and pipes are dropped.
const TRIM: Duration = Duration::from_secs(1);

/// The connections of one worker.
pub(in crate::proxy) struct Connections<D: Driver> {
    pub(in crate::proxy) table: Table<Connection<D::Stream>>,
    /// The requested actions that are not carried out yet.
    actions: VecDeque<(Id, Action<D::Stream>)>,
    runs_actions: bool,
    /// The connections with work left, in the order of their turns (invariant 5).
    ready: VecDeque<Id>,
    pub(in crate::proxy) timers: Timers<Id>,
    pub(in crate::proxy) pool: Pool<<D::Stream as Socket>::Pipe>,
    /// The time at which unneeded buffers and pipes are dropped.
    trim_at: Option<Instant>,
    pub(super) dials: VecDeque<DialQueue>,
    pub(in crate::proxy) probes: Vec<ProbeQueue>,
}

impl<D: Driver> Connections<D> {
    /// Makes an empty set of connections, whose bytes may pass through so many pipes and are added
    /// to `carried`.
    pub(in crate::proxy) fn new(pipes: usize, carried: Arc<Carried>) -> Connections<D> {
        Connections {
            table: Table::new(),
            actions: VecDeque::new(),
            runs_actions: false,
            ready: VecDeque::new(),
            timers: Timers::default(),
            pool: Pool::new(BUFFER, KEEP, pipes, carried),
            trim_at: None,
            dials: VecDeque::new(),
            probes: Vec::new(),
        }
    }

    /// Takes over an accepted connection and begins to dial its target.
    pub(in crate::proxy) fn adopt(
        &mut self,
        accepted: Accepted<D::Stream>,
        cx: &mut TurnContext<'_, D>,
    ) {
        let Accepted {
            mut stream,
            peer,
            forward,
            slots,
            served,
        } = accepted;
        let id = self.table.next_id();
        let drain = forward.rule.timeouts.drain;
        cx.driver.set_keepalive(&stream, forward.rule.keepalive);
        let adapted = match forward.needs_adapter(Side::Client) {
            true => cx.driver.insert_adapter(Side::Client, &mut stream, drain),
            false => Ok(()),
        };
        let watched = adapted.and_then(|()| cx.driver.watch(&mut stream, id.token(Side::Client)));
        let name = cx.shared.next_connection();
        let connection = Connection::for_client(name, forward, stream, peer, slots, cx.now);
        self.table.insert(connection);
        self.call_connection(id, cx, |connection, to| {
            connection.begin(watched, served, to)
        });
    }

    /// Passes an event to its connection.
    pub(in crate::proxy) fn take_event(
        &mut self,
        event: DriverEvent<D::Stream, D::Listener>,
        cx: &mut TurnContext<'_, D>,
    ) {
        match event {
            DriverEvent::Ready { token, readiness } => {
                let (id, side) = Id::from_token(token);
                if let Some(connection) = self.table.get_mut(id) {
                    connection.latch(side, readiness);
                    self.make_ready(id);
                }
            }
            DriverEvent::Resolved { token, addresses } => {
                let id = Id::from_token(token).0;
                self.call_connection(id, cx, |it, to| it.take_addresses(addresses, to));
            }
            DriverEvent::Dialled { token, stream } => {
                self.take_dialled(Id::from_token(token).0, stream, cx);
            }
            DriverEvent::ProgramEnded {
                token,
                connection,
                forward,
                failure,
            } => {
                let id = Id::from_token(token).0;
                match self.table.get_mut(id) {
                    Some(_) => {
                        self.call_connection(id, cx, |it, to| it.take_program_end(failure, to))
                    }
                    None => {
                        if let Some(failure) = failure {
                            let why = EndReason::ProgramFailed(failure);
                            forward.ended().complete_reason(connection, why);
                        }
                    }
                }
            }
            DriverEvent::ThreadsEnded { token, result } => {
                let id = Id::from_token(token).0;
                self.call_connection(id, cx, |it, to| it.take_threads_end(result, to));
            }
            DriverEvent::Explained { token, error } => {
                let id = Id::from_token(token).0;
                self.call_connection(id, cx, |it, to| it.take_explanation(error, to));
            }
            DriverEvent::VmSeen { .. }
            | DriverEvent::LookFailed { .. }
            | DriverEvent::Listener { .. } => {}
        }
    }

    /// Puts a connection at the end of the ready queue, once.
    pub(super) fn make_ready(&mut self, id: Id) {
        if let Some(connection) = self.table.get_mut(id)
            && !connection.is_queued
        {
            connection.is_queued = true;
            self.ready.push_back(id);
        }
    }

    /// Gives a turn to each connection that has work or whose timer is due.
    pub(in crate::proxy) fn take_turns(&mut self, cx: &mut TurnContext<'_, D>) {
        while let Some(id) = self.timers.pop_due(cx.now) {
            if let Some(connection) = self.table.get_mut(id) {
                connection.wake_at = None;
                self.make_ready(id);
            }
        }
        self.dial_turns(cx);
        // Only connections that are ready now: one that has more work goes to the back of the queue
        // and waits for the next round.
        for _ in 0..self.ready.len() {
            let Some(id) = self.ready.pop_front() else {
                break;
            };
            if let Some(connection) = self.table.get_mut(id) {
                connection.is_queued = false;
                self.call_connection(id, cx, Connection::step);
            }
        }
        self.probe_turns(cx);
        self.trim_pool(cx.now);
    }

    /// Returns the time of the next turn, if no event comes before.
    pub(in crate::proxy) fn next(&self, now: Instant) -> Option<Instant> {
        let ready = (!self.ready.is_empty()).then_some(now);
        let times = [
            ready,
            self.timers.next(),
            self.trim_at,
            self.next_dial(),
            self.next_probe(),
        ];
        times.into_iter().flatten().min()
    }

    /// Returns whether a timer is due.
    pub(in crate::proxy) fn has_due_timer(&self, now: Instant) -> bool {
        self.timers.next().is_some_and(|at| at <= now)
    }

    /// Drops unneeded buffers and pipes. A pipe stays for a second or two before it is closed.
    fn trim_pool(&mut self, now: Instant) {
        if self.trim_at.is_some_and(|at| at <= now) {
            self.pool.trim();
            self.trim_at = None;
        }
        if self.trim_at.is_none() && self.pool.wants_trim() {
            self.trim_at = Some(now + TRIM);
        }
    }

    /// Calls a method of a connection, and carries out the actions that it requests.
    pub(in crate::proxy) fn call_connection(
        &mut self,
        id: Id,
        cx: &mut TurnContext<'_, D>,
        call: impl FnOnce(&mut Connection<D::Stream>, &mut Context<'_, D::Stream>),
    ) {
        let Some(connection) = self.table.get_mut(id) else {
            return;
        };
        let timer = connection.wake_at;
        let driver = &mut *cx.driver;
        let mut to = Context {
            id,
            now: cx.now,
            phase: cx.phase,
            resumed_at: cx.resumed_at,
            routes: &cx.shared.routes,
            pool: &mut self.pool,
            actions: &mut self.actions,
            has_peer_ended: &mut |socket| driver.has_peer_ended(socket),
            may_hold: &|| cx.shared.may_hold(),
            has_more_work: false,
        };
        call(connection, &mut to);
        let again = to.has_more_work;
        self.timers.change(id, timer, connection.wake_at);
        if again {
            self.make_ready(id);
        }
        self.run_actions(cx);
    }

    /// Carries out the actions that were requested, in their order.
    fn run_actions(&mut self, cx: &mut TurnContext<'_, D>) {
        // Actions that are requested while one is carried out come after the earlier ones.
        if std::mem::replace(&mut self.runs_actions, true) {
            return;
        }
        while let Some((id, action)) = self.actions.pop_front() {
            self.run_action(id, action, cx);
        }
        self.runs_actions = false;
    }

    /// Carries out one action, and hands its result to the connection.
    fn run_action(&mut self, id: Id, action: Action<D::Stream>, cx: &mut TurnContext<'_, D>) {
        let action = match action {
            // These are carried out even if the connection is gone.
            Action::Close(stream, slot) => {
                cx.driver.close(stream);
                return drop(slot);
            }
            Action::Discard(stream) => return cx.driver.close(stream),
            Action::Reset(stream) => return cx.driver.reset(stream),
            Action::Leave(stream) => return cx.driver.leave(stream),
            Action::Drop => return self.drop_connection(id, cx),
            Action::Hold => return self.hold_remnant(id, cx),
            other => other,
        };
        let Some(connection) = self.table.get_mut(id) else {
            return;
        };
        let forward = Arc::clone(&connection.forward);
        let (rule, token) = (&forward.rule, id.token(Side::Server));
        match action {
            Action::Resolve => {
                if let Target::Name { host, port } = Target::of(&rule.connect) {
                    cx.driver.resolve(token, host, port);
                }
            }
            Action::DialOnThread(patience) => {
                cx.driver.dial(token, connection.name, &forward, patience);
            }
            Action::Admit => self.queue_dial(id, &forward, cx),
            Action::Connect => self.connect(id, cx),
            Action::Explain(error) => {
                if let Some(error) = cx.driver.explain(token, &rule.connect, error) {
                    self.call_connection(id, cx, |it, to| it.take_explanation(error, to));
                }
            }
            Action::Prove => self.queue_probe(id, &forward, cx.now),
            Action::StartThreads(streams) => {
                let drain = rule.timeouts.drain;
                let begun =
                    cx.driver
                        .start_threads(id.token(Side::Client), streams, &forward, drain);
                match begun {
                    Ok(()) => self.look_at_threads(id, cx),
                    Err(e) => self.call_connection(id, cx, |it, to| it.take_threads_failure(e, to)),
                }
            }
            Action::LookAtThreads => self.look_at_threads(id, cx),
            Action::CutThreads => cx.driver.cut_threads(id.token(Side::Client)),
            Action::Close(..)
            | Action::Discard(_)
            | Action::Reset(_)
            | Action::Leave(_)
            | Action::Drop
            | Action::Hold => {}
        }
    }

    /// Begins to connect a connection to its endpoint.
    fn connect(&mut self, id: Id, cx: &mut TurnContext<'_, D>) {
        let connection = self.table.get_mut(id);
        let Some(endpoint) = connection.as_ref().and_then(|it| it.endpoint()) else {
            return;
        };
        let keepalive = connection.as_ref().and_then(|it| it.forward.rule.keepalive);
        let needs_check = connection.as_ref().is_some_and(|it| it.doubts_server());
        let patience = connection.as_ref().map(|it| it.patience(cx.now));
        let connected = cx.driver.connect(endpoint, patience.unwrap_or_default());
        let dialled = connected.map(|(mut socket, identity)| {
            // Checked at once: if the process is gone later, the connection broke off.
            let has_listener_ended = needs_check && cx.driver.has_peer_ended(&socket);
            cx.driver.set_keepalive(&socket, keepalive);
            let watched = cx.driver.watch(&mut socket, id.token(Side::Server));
            Dialled {
                socket,
                identity,
                has_listener_ended,
                watched,
            }
        });
        self.call_connection(id, cx, |it, to| it.take_connect(dialled, to));
    }

    /// Takes the result of a dial on a thread.
    fn take_dialled(
        &mut self,
        id: Id,
        dialled: std::result::Result<D::Stream, Error>,
        cx: &mut TurnContext<'_, D>,
    ) {
        let forward = self.table.get_mut(id).map(|it| Arc::clone(&it.forward));
        let dialled = match (dialled, forward) {
            (Ok(stream), None) => return cx.driver.close(stream),
            (Ok(mut stream), Some(forward)) if forward.needs_adapter(Side::Server) => {
                let drain = forward.rule.timeouts.drain;
                let adapted = cx.driver.insert_adapter(Side::Server, &mut stream, drain);
                let watched =
                    adapted.and_then(|()| cx.driver.watch(&mut stream, id.token(Side::Server)));
                Ok((stream, watched))
            }
            (Ok(mut stream), Some(forward)) if !forward.is_blocking(Side::Server) => {
                let watched = cx.driver.watch(&mut stream, id.token(Side::Server));
                Ok((stream, watched))
            }
            (dialled, _) => dialled.map(|stream| (stream, Ok(()))),
        };
        self.call_connection(id, cx, |it, to| it.take_dialled(dialled, to));
    }

    /// Hands the progress of relay threads to their connection.
    fn look_at_threads(&mut self, id: Id, cx: &mut TurnContext<'_, D>) {
        if let Some(progress) = cx.driver.threads_progress(id.token(Side::Client)) {
            self.call_connection(id, cx, |it, to| it.take_progress(progress, to));
        }
    }

    /// Puts what is left of a connection that has ended into its place: its socket is registered
    /// with that token.
    fn hold_remnant(&mut self, id: Id, cx: &mut TurnContext<'_, D>) {
        let Some(connection) = self.table.get_mut(id) else {
            return;
        };
        let remnant = connection.take_remnant(cx.now);
        self.timers.change(id, connection.wake_at, remnant.wake_at);
        cx.shared.note_begin(&remnant.forward, remnant.holder());
        if let Some(connection) = self.table.replace(id, remnant) {
            self.note_end(connection, cx);
        }
    }

    /// Removes a connection that has ended, with all that is counted for it.
    fn drop_connection(&mut self, id: Id, cx: &mut TurnContext<'_, D>) {
        let Some(connection) = self.table.remove(id) else {
            return;
        };
        self.timers.remove(id, connection.wake_at);
        let load = &cx.shared.inboxes[cx.index].load;
        if load.fetch_sub(1, Ordering::Relaxed) == 1 {
            cx.driver.release_unused();
        }
        self.note_end(connection, cx);
    }

    /// Reports and counts the end of a connection.
    fn note_end(&self, connection: Connection<D::Stream>, cx: &mut TurnContext<'_, D>) {
        let holder = connection.holder();
        let at = cx.driver.wall_time();
        let forward = connection.finish(&cx.shared.routes, cx.now, at);
        cx.shared.note_end(&forward, holder, cx.now);
    }

    fn cut_connection(&mut self, id: Id, cuts: &Cuts, why: EndReason, cx: &mut TurnContext<'_, D>) {
        // What was about to end is cut short, but not off; nobody is behind a probe.
        if let Some(connection) = self.table.get_mut(id)
            && connection.name.is_some()
            && !connection.is_ending()
        {
            cuts.count_cut(&connection.forward);
        }
        self.call_connection(id, cx, |it, to| it.cut_off(why, to));
    }

    /// Cuts off all connections, for that reason. What is cut off is noted in `cuts`.
    pub(in crate::proxy) fn cut_all(
        &mut self,
        cuts: &Cuts,
        why: EndReason,
        cx: &mut TurnContext<'_, D>,
    ) {
        for id in self.table.ids() {
            self.cut_connection(id, cuts, why, cx);
        }
    }

    /// Cuts off the connections of these forwards, for that reason. What is cut off is noted.
    pub(in crate::proxy) fn cut_those_of(
        &mut self,
        forwards: &HashMap<ForwardId, Arc<Cuts>>,
        why: EndReason,
        cx: &mut TurnContext<'_, D>,
    ) {
        for id in self.table.ids() {
            let connection = self.table.get_mut(id);
            if let Some(cuts) = connection.and_then(|it| forwards.get(&it.forward.id)) {
                self.cut_connection(id, cuts, why, cx);
            }
        }
    }

    /// Cuts off a connection for the operator, and returns what its status was. Returns `None` if
    /// there is none of that name here.
    pub(in crate::proxy) fn close(
        &mut self,
        name: ConnectionId,
        cx: &mut TurnContext<'_, D>,
    ) -> Option<ConnectionStatus> {
        let mut ids = self.table.ids().into_iter();
        let is_it = |id: &Id| self.table.get_mut(*id).and_then(|it| it.name) == Some(name);
        let id = ids.find(is_it)?;
        let progress = cx.driver.threads_progress(id.token(Side::Client));
        let status = self.table.get_mut(id)?.status(progress, cx.now);
        self.call_connection(id, cx, |it, to| it.cut_off(EndReason::ClosedOnRequest, to));
        status
    }

    /// Shortens the closing of connections, when the proxy begins to stop.
    pub(in crate::proxy) fn begin_to_stop(&mut self, cx: &mut TurnContext<'_, D>) {
        for id in self.table.ids() {
            self.call_connection(id, cx, Connection::shorten_closing);
        }
    }

    /// Closes all that is left by force, as the last thing before the end.
    pub(in crate::proxy) fn abandon_all(&mut self, cx: &mut TurnContext<'_, D>) {
        for id in self.table.ids() {
            self.call_connection(id, cx, |it, to| it.cut_off(EndReason::Stopped, to));
            self.call_connection(id, cx, Connection::close_by_force);
        }
    }

    /// Returns the status of all connections.
    pub(in crate::proxy) fn statuses(
        &mut self,
        cx: &mut TurnContext<'_, D>,
    ) -> Vec<ConnectionStatus> {
        let mut all = Vec::new();
        for id in self.table.ids() {
            let progress = cx.driver.threads_progress(id.token(Side::Client));
            let connection = self.table.get_mut(id);
            all.extend(connection.and_then(|it| it.status(progress, cx.now)));
        }
        all
    }
}
