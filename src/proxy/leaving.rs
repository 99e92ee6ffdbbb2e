//! How a connection ends: each side is closed, reset, or half-closed and read to its end, as it is owed.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use crate::dial;
use crate::relay::{CLIENT, Farewell, Readiness, SERVER};

use super::bridge::Ended;
use super::conn::{Leave, State};
use super::counters::{Reason, add_one};
use super::observer::What;
use super::table::Id;
use super::worker::{Phase, Worker, after};
use super::world::World;

/// How long a client that goes on sending is read from after it got its whole answer.
pub(super) const LINGER: Duration = Duration::from_secs(5);

/// After how long it is looked whether a peer that is to be reset has got what was sent before; doubled each time, up
/// to the longest.
pub(super) const RESET_PAUSE: Duration = Duration::from_millis(2);
pub(super) const LONGEST_RESET_PAUSE: Duration = Duration::from_millis(128);

/// How long guests are taken leave of when the proxy is told to end at once.
pub(super) const LAST_LEAVE: Duration = Duration::from_secs(2);

/// Turns of an end that is emptied before it is closed by force: what a socket can hold, many times over.
const LAST_TURNS: usize = 64;

const NOT_ENDED: &str = "closed connections that the guest did not end within the drain timeout";

/// How long a bridge that was cut off may take to end before it is cut again.
const CUT_PAUSE: Duration = Duration::from_millis(10);

impl<W: World> Worker<W> {
    /// Ends a pair, done or not: closes, resets, or half-closes and goes on reading, as each side is owed.
    pub(super) fn leave(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let State::Relaying { pair, .. } = conn.take_state() else {
            return;
        };
        if pair.refused() {
            let error = dial::refused_in_silence(&conn.forward.rule.connect);
            conn.refused(&error, Reason::ByTarget, now);
        }
        let farewells = [pair.farewell(CLIENT), pair.farewell(SERVER)];
        let sides = pair.into_ends(&mut self.pool).into_iter().zip(farewells);
        let mut leaving = [None, None];
        for (side, (mut end, farewell)) in sides.enumerate() {
            // Rule 2 of a good neighbour: hyperkit reads EOF from us and is read to its EOF, whatever happened.
            let polite = conn.forward.is_polite(side);
            if polite && !end.input_ended() || !polite && farewell == Farewell::Linger {
                end.shutdown_write();
                leaving[side] = Some(Leave::new(end));
            } else if polite || farewell == Farewell::Close {
                self.world.close(end.socket);
            } else {
                let reset = Some(RESET_PAUSE);
                leaving[side] = Some(Leave { end, reset });
            }
        }
        self.begin_leaving(id, leaving, now);
    }

    pub(super) fn begin_leaving(
        &mut self,
        id: Id,
        leaving: [Option<Leave<W::Stream>>; 2],
        now: Instant,
    ) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let polite = |side: usize| leaving[side].is_some() && conn.forward.is_polite(side);
        let drain = conn.forward.rule.timeouts.drain;
        let time = match self.phase {
            Phase::Cutting => LAST_LEAVE.min(drain),
            // Nobody who has gone holds up the end: the grace is for those who are there.
            Phase::Stopping => LINGER.min(drain),
            Phase::Running if polite(CLIENT) || polite(SERVER) => drain,
            Phase::Running => LINGER,
        };
        self.timers.set(&mut conn.timer, id, None);
        conn.enter(State::Leaving {
            ends: leaving,
            until: Some(after(now, time)),
        });
        self.go_on_leaving(id, now);
    }

    pub(super) fn go_on_leaving(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let State::Leaving { ends, until } = &mut conn.state else {
            return;
        };
        let mut more = false;
        let mut look_again = None;
        for (side, slot) in ends.iter_mut().enumerate() {
            let Some(Leave { mut end, reset }) = slot.take() else {
                continue;
            };
            let before = (end.received(), end.input_ended());
            more |= end.discard(&mut self.pool);
            if let Some(permit) = conn.permit.as_ref().filter(|_| side == SERVER)
                && (end.received(), end.input_ended()) != before
            {
                permit.heard(now);
            }
            if let Some(pause) = reset {
                if end.takes_nothing() || self.world.unacknowledged(&end.socket) == 0 {
                    self.world.reset(end.socket);
                    continue;
                }
                look_again =
                    Some(look_again.map_or(now + pause, |at: Instant| at.min(now + pause)));
            } else if end.input_ended() {
                self.world.close(end.socket);
                continue;
            }
            let reset = reset.map(|pause| (2 * pause).min(LONGEST_RESET_PAUSE));
            *slot = Some(Leave { end, reset });
        }
        if ends.iter().all(Option::is_none) {
            return self.forget(id, now);
        }
        // Whose socket is closed has no place in its VM any more, though the other side lingers.
        if ends[SERVER].is_none() {
            conn.permit = None;
        }
        if ends[CLIENT].is_none() {
            conn.place = None;
        }
        if self.thawed == Some(now)
            && let Some(until) = until
        {
            // Invariant 9: the peer may have stood still as well, and have had no time to answer.
            let drain = conn.forward.rule.timeouts.drain;
            *until = (*until).max(after(now, LAST_LEAVE.min(drain)));
        }
        let until = *until;
        if until.is_some_and(|until| now >= until) {
            return self.abandon(id, now);
        }
        if let Some(at) = [until, look_again].into_iter().flatten().min() {
            self.set_timer(id, at);
        }
        if more {
            self.make_ready(id);
        }
    }

    /// Closes what did not end in time, with nothing unread in it.
    fn abandon(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let State::Leaving { ends, .. } = &mut conn.state else {
            return;
        };
        let ends = std::mem::take(ends);
        for (side, leave) in ends.into_iter().enumerate() {
            let Some(Leave { mut end, reset }) = leave else {
                continue;
            };
            if reset.is_some() {
                self.world.reset(end.socket);
                continue;
            }
            // First nothing more may come (on Linux the device's next write fails, and it tells the guest), then what
            // has come is taken out: a close with data unread is what kills the VM.
            self.world.shutdown_read(&end.socket);
            end.latch(Readiness {
                readable: true,
                ..Readiness::default()
            });
            for _ in 0..LAST_TURNS {
                if !end.discard(&mut self.pool) {
                    break;
                }
            }
            self.world.close(end.socket);
            if conn.forward.is_polite(side) {
                add_one(&conn.forward.tally.abandoned);
                let text = match self.phase {
                    Phase::Cutting => "closed connections that the guest had not ended yet",
                    _ => NOT_ENDED,
                };
                if conn.forward.complaints.admit(text, now).is_some() {
                    warn!("{}: {text}", conn.forward.rule.connect);
                }
            }
        }
        self.forget(id, now);
    }

    /// Shortens the time of what is being closed, when the proxy begins to stop: nobody is there for it. Probes have none
    /// before.
    pub(super) fn hurry_leaving(&mut self, now: Instant) {
        for id in self.conns.ids() {
            if let Some(conn) = self.conns.get_mut(id)
                && let State::Leaving { until, .. } = &mut conn.state
            {
                let at = match *until {
                    None => now + LAST_LEAVE,
                    Some(until) => until.min(now + LINGER),
                };
                *until = Some(at);
                self.arm(id, at);
            }
        }
    }

    /// Closes all that is still there, as the last thing before the end.
    pub(super) fn abandon_all(&mut self, now: Instant) {
        for id in self.conns.ids() {
            self.cut(id, now);
            self.abandon(id, now);
        }
    }

    /// Cuts a connection off, or shortens its leave.
    pub(super) fn cut(&mut self, id: Id, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        match &mut conn.state {
            State::Waiting { .. } | State::Connecting { .. } | State::Proving { .. } => {
                self.refuse_at_the_end(id, now);
            }
            State::Relaying { .. } => self.leave(id, now),
            State::Bridged => self.cut_bridge(id, now),
            State::Leaving { ends, .. } => {
                let ends = std::mem::take(ends);
                self.begin_leaving(id, ends, now);
            }
            State::Moving => {}
        }
    }

    /// Cuts a bridge off, until it says that it has ended.
    pub(super) fn cut_bridge(&mut self, id: Id, now: Instant) {
        self.world.cut_bridge(id.token(CLIENT));
        self.set_timer(id, now + CUT_PAUSE);
    }

    /// A bridge has ended by itself.
    pub(super) fn bridge_ended(&mut self, id: Id, ended: Ended, now: Instant) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        conn.counted = ended.delivered;
        if ended.abandoned {
            add_one(&conn.forward.tally.abandoned);
            if conn.forward.complaints.admit(NOT_ENDED, now).is_some() {
                warn!("{}: {NOT_ENDED}", conn.forward.rule.connect);
            }
        }
        self.forget(id, now);
    }

    /// Takes a connection out of the books, closing what it still has.
    pub(super) fn forget(&mut self, id: Id, now: Instant) {
        let Some(mut conn) = self.conns.remove(id) else {
            return;
        };
        self.timers.set(&mut conn.timer, id, None);
        #[cfg(all(test, target_os = "linux"))]
        conn.note_phase("closed");
        match conn.take_state() {
            State::Waiting { client, .. } => self.world.close(client.socket),
            State::Connecting { client, server, .. } | State::Proving { client, server, .. } => {
                self.world.close(client.socket);
                self.world.close(server.socket);
            }
            State::Relaying { .. } | State::Bridged | State::Leaving { .. } | State::Moving => {}
        }
        conn.span.in_scope(|| {
            debug!(
                sent = conn.counted[CLIENT],
                received = conn.counted[SERVER],
                "closed"
            )
        });
        conn.tell(What::Closed {
            sent: conn.counted[CLIENT],
            received: conn.counted[SERVER],
            age: now.saturating_duration_since(conn.since),
        });
        if let Some(route) = conn.route {
            self.shared.routes.forget(*route);
        }
        drop((conn.permit, conn.place));
        let load = &self.shared.inboxes[self.index].load;
        if load.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.world.rest();
        }
        self.shared.has_ended(&conn.forward);
    }
}
