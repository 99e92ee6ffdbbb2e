//! What is reported of a connection: log lines, counters, events for the observer, and its status.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use tracing::level_filters::LevelFilter;
use tracing::{Span, debug, error_span, info, warn};

use crate::engine::admission::Slot;
use crate::engine::counters::add_one;
use crate::engine::end_reason::{EndReason, RefusalReason};
use crate::engine::ended::EndedConnection;
use crate::engine::forward::Forward;
use crate::engine::id::ConnectionId;
use crate::engine::observer::What;
use crate::engine::relay::{Pair, Side};
use crate::engine::routes::Routes;
use crate::engine::status::{ConnectionState, ConnectionStatus, Waiting};
use crate::error::Error;
use crate::stream::socket::Socket;

use super::on_threads::Progress;
use super::socket::ConnectionSocket;
use super::state::{Connection, State};

/// The target of the lines of the access log, by which they can be filtered.
const ACCESS: &str = "hvsock::access";

impl<S: Socket> Connection<S> {
    /// Returns the span of the connection's log lines. It is made for each of them, so that a
    /// connection of which nothing is logged costs none.
    pub(super) fn span(&self) -> Span {
        let forward = self.forward.label();
        match self.name {
            Some(ConnectionId(id)) => error_span!("connection", id, %forward, peer = %self.peer),
            None if self.is_remnant => error_span!("remnant", %forward),
            None => error_span!("probe", %forward),
        }
    }

    /// Writes a line at the level debug, in the connection's span.
    pub(super) fn log_debug(&self, write: impl FnOnce()) {
        if LevelFilter::current() >= LevelFilter::DEBUG {
            self.span().in_scope(write);
        }
    }

    /// Notifies the observer.
    pub(super) fn notify(&self, what: What<'_>) {
        if let Some(name) = self.name {
            self.forward.notify_observer(name, self.peer, what);
        }
    }

    /// Counts a refused client, and logs the reason; a repeated one only now and then.
    pub(super) fn note_refusal(&mut self, error: &Error, reason: RefusalReason, now: Instant) {
        let text: Arc<str> = error.to_string().into();
        self.error = Some(Arc::clone(&text));
        let forward = &self.forward;
        forward.tally.count_refusal(reason);
        self.notify(What::Refused(error));
        let connected = forward.tally.connected.load(Ordering::Relaxed);
        forward.status_cell.set_error(Arc::clone(&text), connected);
        let is_turned_away = self.slots[Side::Client]
            .as_ref()
            .is_some_and(Slot::is_turned_away);
        // The absence of a target was logged when it was noticed; the gate has logged that a guest
        // dials too much.
        if reason == RefusalReason::Absent || is_turned_away {
            return self
                .log_debug(|| debug!("refused a client of {}: {text}", forward.rule.listen));
        }
        if let Some(more) = forward.log_limiter.admit(&text, now) {
            self.span().in_scope(|| match more {
                0 => warn!("refused a client of {}: {text}", forward.rule.listen),
                _ => warn!(
                    "refused a client of {}: {text} ({more} more since the last line)",
                    forward.rule.listen
                ),
            });
        }
    }

    /// Counts and logs an end that the peer has not ended in time.
    pub(super) fn note_abandoned(&self, text: &str, now: Instant) {
        if self.is_remnant {
            // It was counted before.
            return;
        }
        let forward = &self.forward;
        add_one(&forward.tally.abandoned);
        if forward.log_limiter.admit(text, now).is_some() {
            self.span()
                .in_scope(|| warn!("{}: {text}", forward.rule.connect));
        }
    }

    /// Returns the state in the words of a status. `half_closed` is the side that has ended.
    pub(super) fn state_word(&self, half_closed: Option<Side>) -> ConnectionState {
        match &self.state {
            State::Waiting { full, .. } => {
                let redials = self
                    .retries
                    .as_ref()
                    .is_some_and(|retries| retries.redial.is_some());
                let slot = self.slots[Side::Server].as_ref();
                let is_queued = slot.is_some_and(|slot| !slot.is_admitted());
                match full.is_some() || redials || is_queued {
                    true => ConnectionState::Held,
                    false => ConnectionState::Dialling,
                }
            }
            State::Connecting { .. } | State::Proving { .. } => ConnectionState::Dialling,
            State::OnThreads if self.is_cut_off => ConnectionState::Closing,
            State::Relaying { .. } | State::OnThreads => match half_closed {
                None => ConnectionState::Open,
                Some(Side::Client) => ConnectionState::HalfClosedByClient,
                Some(Side::Server) => ConnectionState::HalfClosedByServer,
            },
            State::Closing { .. } | State::Closed => ConnectionState::Closing,
        }
    }
}

impl<S: ConnectionSocket> Connection<S> {
    /// Returns the connection's status. `on_threads` is how far its threads are.
    pub(crate) fn status(
        &mut self,
        on_threads: Option<Progress>,
        now: Instant,
    ) -> Option<ConnectionStatus> {
        if let Some(progress) = on_threads {
            self.note_progress(progress, now);
        }
        let (mut moved, mut half_closed, mut waiting) = (self.counted, None, None);
        if let State::Relaying { pair, .. } = &self.state {
            moved = Side::BOTH.map(|side| pair.delivered(side));
            half_closed = pair.half_closed_by();
            waiting = Some(Waiting {
                to_server: bytes_on_their_way(pair, Side::Client),
                to_client: bytes_on_their_way(pair, Side::Server),
            });
        } else if let Some(progress) = on_threads {
            (moved, half_closed) = (progress.delivered, progress.half_closed);
        }
        Some(ConnectionStatus {
            id: self.name?,
            forward: self.forward.id,
            peer: self.peer.name,
            process: self.peer.process,
            state: self.state_word(half_closed),
            sent: moved[Side::Client],
            received: moved[Side::Server],
            waiting,
            idle: self.idle.time(now),
            age: now.saturating_duration_since(self.since),
        })
    }

    /// Reports the end of a connection that is [`Closed`](State::Closed), after its sockets were
    /// closed. `at` is what the wall clock shows.
    pub(crate) fn finish(mut self, routes: &Routes, now: Instant, at: SystemTime) -> Arc<Forward> {
        if self.name.is_some() {
            self.report_end(now, at);
        }
        if let Some(route) = self.route.take() {
            routes.forget_route(*route);
        }
        self.forward
    }

    /// Counts the end, and reports it to the log and to the observer.
    fn report_end(&self, now: Instant, at: SystemTime) {
        let why = self.why.unwrap_or(EndReason::Failed);
        let [sent, received] = self.counted;
        let age = now.saturating_duration_since(self.since);
        self.forward.tally.count_end(why);
        self.log_access(why, age);
        self.notify(What::Closed {
            sent,
            received,
            age,
            why,
        });
        if let Some(id) = self.name {
            self.forward.ended().add_connection(EndedConnection {
                id,
                forward: self.forward.id,
                rule: Arc::clone(&self.forward.rule),
                peer: self.peer.name,
                process: self.peer.process,
                sent,
                received,
                age,
                at,
                why,
                error: self.error.clone(),
            });
        }
    }

    /// Writes the line of the access log. It has all in it, and stands in no span, so that it can
    /// be filtered by its target alone.
    fn log_access(&self, why: EndReason, age: Duration) {
        let (forward, peer) = (self.forward.label(), self.peer);
        // Not called target: that is what tracing calls the part of the program.
        let connect = &self.forward.rule.connect;
        let id = self.name.map(u64::from);
        let [sent, received] = self.counted;
        let seconds = age.as_secs_f64();
        // The level of a line is a part of its place in the source.
        macro_rules! log {
            ($level:ident) => {
                $level!(
                    target: ACCESS, id, %forward, %peer, %connect, sent, received, seconds, %why,
                    "closed"
                )
            };
        }
        match self.forward.access_log().is_on() {
            true => log!(info),
            false => log!(debug),
        }
    }
}

/// Returns how many bytes of what `side` sends are on their way to the other side: not read yet,
/// held by the relay, or not taken yet where the system tells so.
fn bytes_on_their_way<S: ConnectionSocket>(pair: &Pair<S>, side: Side) -> Option<u64> {
    let unread = pair.ends[side].socket.unread()?;
    let sent = pair.ends[side.other()].socket.unacknowledged();
    Some(unread + (pair.in_flight(side) + sent) as u64)
}
