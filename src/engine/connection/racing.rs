//! The race between the addresses of a name: see [`Race`].
//!
//! All sockets of a race have the token of the server's side. An event doesn't tell which of them
//! it is about, so each of them is asked.

use std::io;
use std::time::Duration;

use crate::dial::Race;
use crate::engine::relay::{End, Readiness, Side};
use crate::stream::endpoint::Endpoint;
use crate::stream::peer_names::PeerNames;

use super::action::{Action, Context};
use super::dialling::Dialled;
use super::socket::ConnectionSocket;
use super::state::{Connection, State};

/// How often it is asked whether the VM is gone that a dial without an answer has gone to.
const LOOK_PAUSE: Duration = Duration::from_secs(1);

impl<S: ConnectionSocket> Connection<S> {
    /// Returns the latest attempt's socket, and the race that it is in.
    fn race(&mut self) -> Option<(&mut End<S>, &mut Race<S>)> {
        match &mut self.state {
            State::Connecting { server, race, .. } => Some((server, race)),
            _ => None,
        }
    }

    /// Takes the result of beginning to connect to a further address.
    pub(super) fn take_further_connect(
        &mut self,
        connect: io::Result<Dialled<S>>,
        cx: &mut Context<'_, S>,
    ) {
        let Some((server, race)) = self.race() else {
            return;
        };
        match connect {
            Ok(dialled) if dialled.watched.is_ok() => {
                let before = std::mem::replace(server, end_to_check(dialled.socket));
                if let Some(oldest) = race.take_before(before.socket, cx.now) {
                    cx.request(Action::Discard(oldest.socket));
                    self.note_failed(&oldest.endpoint, cx);
                }
                // Whether a TCP connection closes a loop is known only when it is accepted.
                self.note_dial(cx);
            }
            failed => {
                if let Ok(dialled) = failed {
                    cx.request(Action::Discard(dialled.socket));
                }
                if let Some(endpoint) = race.skip_next(cx.now) {
                    self.note_failed(&endpoint, cx);
                }
            }
        }
        self.wait_for_answers(cx);
    }

    /// Finds the earlier attempts that have an answer. The first that has succeeded takes the place
    /// of the latest one.
    pub(super) fn look_at_earlier(&mut self, cx: &mut Context<'_, S>) {
        let Some((server, race)) = self.race() else {
            return;
        };
        let look = race.look_at_earlier(cx.now, |it| it.connected());
        if let Some((winner, later)) = look.winner {
            let latest = std::mem::replace(server, end_to_check(winner));
            // Those that were begun after it have had less time.
            for socket in later.into_iter().chain([latest.socket]) {
                cx.request(Action::Discard(socket));
            }
        }
        for attempt in look.failed {
            cx.request(Action::Discard(attempt.socket));
            self.note_failed(&attempt.endpoint, cx);
        }
    }

    /// Goes on with an earlier attempt, now that the latest one has failed. Returns false if there
    /// is none.
    pub(super) fn return_to_earlier(&mut self, cx: &mut Context<'_, S>) -> bool {
        let Some((server, race)) = self.race() else {
            return false;
        };
        let Some((socket, failed)) = race.return_to_earlier(cx.now) else {
            return false;
        };
        let latest = std::mem::replace(server, end_to_check(socket));
        cx.request(Action::Discard(latest.socket));
        if let Some(endpoint) = failed {
            self.note_failed(&endpoint, cx);
        }
        self.wait_for_answers(cx);
        true
    }

    /// Waits for the answer to an attempt, or until the next one is due.
    pub(super) fn wait_for_answers(&mut self, cx: &mut Context<'_, S>) {
        let Some((_, race)) = self.race() else {
            return;
        };
        let (deadline, next) = (race.dial.deadline(), race.next_attempt());
        let before = self.wake_at.filter(|at| *at > cx.now);
        match next {
            Some(at) if at <= cx.now => {
                self.wake_at = Some(deadline);
                cx.request(Action::Connect);
            }
            next => self.wake_at = Some(next.map_or(deadline, |at| at.min(deadline))),
        }
        if self.forward.resets_when_gone(Side::Server) && self.slots[Side::Server].is_some() {
            // However often its client makes it step meanwhile.
            self.wake_by(before.map_or(cx.now + LOOK_PAUSE, |at| at.min(cx.now + LOOK_PAUSE)));
        }
    }

    /// Ends the race, which the server's socket has won.
    pub(super) fn win_race(&mut self, cx: &mut Context<'_, S>) {
        let State::Connecting { server, race, .. } = &mut self.state else {
            return;
        };
        if let Some(Endpoint::Tcp(address)) = race.dial.endpoint() {
            self.forward.addresses().note_success(*address);
        }
        if !race.dial.has_raced() {
            return;
        }
        for attempt in race.take_earlier() {
            cx.request(Action::Discard(attempt.socket));
            if let Endpoint::Tcp(address) = attempt.endpoint {
                self.forward.addresses().note_failure(address, cx.now);
            }
        }
        // The events that were latched may have been about the other sockets of the race, so all is
        // assumed to be ready.
        server.restart_latch(Readiness {
            readable: true,
            writable: true,
            hidden: true,
            ..Readiness::default()
        });
        if let Some(route) = &mut self.route
            && let Some(endpoint) = race.dial.endpoint()
            && let Some(here) = server.socket.local_name()
            && let Some(ends) = PeerNames::of_dialled(here, endpoint)
        {
            cx.routes.keep_dialled(ends, route);
        }
    }

    /// Closes what is still in a race that nobody has won.
    pub(super) fn abandon_race(&mut self, cx: &mut Context<'_, S>) {
        if let Some((_, race)) = self.race() {
            for attempt in race.take_earlier() {
                cx.request(Action::Discard(attempt.socket));
            }
        }
    }

    /// Remembers that an address has failed.
    pub(super) fn note_failed(&self, endpoint: &Endpoint, cx: &Context<'_, S>) {
        if let Endpoint::Tcp(address) = endpoint {
            self.forward.addresses().note_failure(*address, cx.now);
        }
    }
}

/// Makes an end that counts as writable, so that its socket is asked whether it is connected.
fn end_to_check<S: ConnectionSocket>(socket: S) -> End<S> {
    let mut end = End::new(socket);
    end.latch(Readiness {
        writable: true,
        ..Readiness::default()
    });
    end
}
