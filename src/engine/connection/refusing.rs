//! The end of a connection that was not made: its client is refused, or has gone before.

use std::io;

use crate::dial;
use crate::engine::admission::Full;
use crate::engine::end_reason::{EndReason, RefusalReason};
use crate::engine::relay::{End, Side};
use crate::error::{Error, Operation};

use super::action::{Action, Context};
use super::closing_end::Closing;
use super::retries::Retries;
use super::socket::ConnectionSocket;
use super::state::{Connection, State};

impl<S: ConnectionSocket> Connection<S> {
    /// Refuses a client whose dial timeout has passed.
    pub(super) fn time_out(&mut self, cx: &mut Context<'_, S>) {
        let target = &self.forward.rule.connect;
        let late = |why: String| io::Error::new(io::ErrorKind::TimedOut, why);
        let full = match &self.state {
            State::Waiting { full, .. } => *full,
            _ => None,
        };
        let last = self.retries.as_mut().and_then(Retries::take_last);
        let (error, reason) = match (&self.state, full, last) {
            (_, Some(full), _) => {
                let reason = match full {
                    Full::Unanswered(_) | Full::Hangs => RefusalReason::DialTimeout,
                    Full::Live { .. } | Full::Reserved(_) => RefusalReason::Full,
                };
                let error = Error::new(Operation::Connect, target, late(full.to_string()));
                (error, reason)
            }
            (State::Proving { .. }, ..) => {
                let cause = late("the guest doesn't answer".to_owned());
                let error = Error::new(Operation::Connect, target, cause);
                let error = error.with_remedy("is it booting, paused or asleep?");
                (error, RefusalReason::DialTimeout)
            }
            (_, None, Some(last)) => last,
            (state, None, None) => {
                let cause = late("no connection within the dial timeout".to_owned());
                let error = match state {
                    State::Connecting { .. } => dial::explain(target, cause),
                    _ => Error::new(Operation::Connect, target, cause),
                };
                self.forward
                    .note_failed_dial(RefusalReason::DialTimeout, &error, cx.now);
                (error, RefusalReason::DialTimeout)
            }
        };
        self.refuse(&error, reason, cx);
    }

    /// Refuses a client whose connection would loop.
    pub(super) fn refuse_loop(&mut self, cx: &mut Context<'_, S>) {
        let why = "it leads back to a forward of this hvsock that its client has come through";
        let error = Error::new(
            Operation::Connect,
            &self.forward.rule.connect,
            io::Error::other(why),
        );
        let error = error.with_remedy("have the forward lead elsewhere");
        self.refuse(&error, RefusalReason::Other, cx);
    }

    /// Refuses a client because the proxy is stopping, its forward was removed, or it was closed.
    pub(super) fn refuse_cut_off(&mut self, cx: &mut Context<'_, S>) {
        let why = match self.why {
            Some(EndReason::ClosedOnRequest) => "it was closed while it was being connected",
            Some(EndReason::Removed) => "its forward was removed",
            _ => "the proxy is stopping",
        };
        let cause = io::Error::new(io::ErrorKind::ConnectionAborted, why);
        let error = Error::new(Operation::Connect, &self.forward.rule.connect, cause);
        self.refuse(&error, RefusalReason::Other, cx);
    }

    /// Ends a connection that could not be made, and reports why.
    pub(super) fn refuse(&mut self, error: &Error, reason: RefusalReason, cx: &mut Context<'_, S>) {
        let Some((mut client, server)) = self.take_unconnected(cx) else {
            return;
        };
        self.end_because(EndReason::Refused(reason));
        self.note_refusal(error, reason, cx.now);
        // Rule 3 of a good neighbour: a guest that can't be served is not closed at once.
        let client = if self.forward.needs_graceful_close(Side::Client) && !client.is_dead() {
            client.shutdown_write();
            Some(Closing::drain(client))
        } else {
            cx.request(Action::Reset(client.socket));
            None
        };
        self.begin_closing([client, server], cx);
    }

    /// Ends the connection after its client has gone while the target was being connected.
    pub(super) fn close_without_client(&mut self, cx: &mut Context<'_, S>) {
        self.end_because(EndReason::ClientGaveUp);
        let Some((client, server)) = self.take_unconnected(cx) else {
            return;
        };
        self.close_socket(Side::Client, client, cx);
        match server {
            Some(server) => self.begin_closing([None, Some(server)], cx),
            None => self.close(cx),
        }
    }

    /// Takes the client of a connection that is not made yet, and the server's end, if it must not
    /// be closed at once; otherwise it is. Returns `None` if the connection is made.
    fn take_unconnected(
        &mut self,
        cx: &mut Context<'_, S>,
    ) -> Option<(End<S>, Option<Closing<S>>)> {
        self.abandon_race(cx);
        match self.take_state() {
            State::Waiting { client, .. } => Some((client, None)),
            State::Connecting {
                client,
                server,
                race,
            } => {
                let dial = race.dial;
                if dial.is_shaking_hands() || self.forward.needs_graceful_close(Side::Server) {
                    return Some((client, Some(Closing::dialled(server, dial))));
                }
                self.close_socket(Side::Server, server, cx);
                Some((client, None))
            }
            State::Proving {
                client,
                server,
                dial,
                ..
            } => Some((client, Some(Closing::dialled(server, dial)))),
            other => {
                self.state = other;
                None
            }
        }
    }
}
