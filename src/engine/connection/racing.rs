//! The race between the addresses of a name, as RFC 8305 has it: while one has not answered, the next
//! is tried as well, and the first that answers is taken.
//!
//! All sockets of a race have the token of the server's side. An event doesn't tell which of them it
//! is about, so each of them is asked.

use std::io;

use crate::engine::relay::{End, Readiness};
use crate::engine::routes::PeerNames;
use crate::stream::endpoint::Endpoint;

use super::action::{Action, Context};
use super::dialling::Dialled;
use super::socket::ConnectionSocket;
use super::state::{Attempt, Connection, State};

/// How many addresses are tried at a time: each has a descriptor. Where there are more, the oldest
/// attempt is given up for the next one after its share of the time.
pub(super) const MOST_ATTEMPTS: usize = 4;

impl<S: ConnectionSocket> Connection<S> {
    /// Takes the result of beginning to connect to a further address.
    pub(super) fn take_further_connect(
        &mut self,
        connect: io::Result<Dialled<S>>,
        cx: &mut Context<'_, S>,
    ) {
        let State::Connecting {
            server,
            dial,
            earlier,
            ..
        } = &mut self.state
        else {
            return;
        };
        let socket = match connect {
            Ok(dialled) if dialled.watched.is_ok() => dialled.socket,
            failed => {
                if let Ok(dialled) = failed {
                    cx.request(Action::Close(dialled.socket, None));
                }
                let skipped = dial.skip_next();
                dial.hasten_next(cx.now);
                if let Some(endpoint) = skipped {
                    self.note_failed(&endpoint, cx);
                }
                return self.wait_for_answers(cx);
            }
        };
        let before = std::mem::replace(server, checked(socket));
        if let Some(endpoint) = dial.turn_to_next() {
            earlier.push(Attempt {
                socket: before.socket,
                endpoint,
            });
        }
        dial.begun(cx.now);
        if earlier.len() >= MOST_ATTEMPTS {
            let oldest = earlier.remove(0);
            cx.request(Action::Close(oldest.socket, None));
            self.note_failed(&oldest.endpoint, cx);
        }
        // Of TCP it is known only by the accept whether it closes a loop.
        self.note_dial(cx);
        self.wait_for_answers(cx);
    }

    /// Looks which of the earlier attempts have an answer. The first that has succeeded takes the
    /// place of the latest one.
    pub(super) fn look_at_earlier(&mut self, cx: &mut Context<'_, S>) {
        let State::Connecting {
            server,
            dial,
            earlier,
            ..
        } = &mut self.state
        else {
            return;
        };
        let mut failed = Vec::new();
        let mut index = 0;
        while index < earlier.len() {
            match earlier[index].socket.connected() {
                Ok(false) => index += 1,
                Ok(true) => {
                    let attempt = earlier.remove(index);
                    let latest = std::mem::replace(server, checked(attempt.socket));
                    // Those that stand behind it have had less time than it.
                    let later = earlier.drain(index..).map(|it| it.socket);
                    for socket in later.chain([latest.socket]) {
                        cx.request(Action::Close(socket, None));
                    }
                    dial.return_to(attempt.endpoint);
                    break;
                }
                Err(_) => {
                    let attempt = earlier.remove(index);
                    cx.request(Action::Close(attempt.socket, None));
                    failed.push(attempt.endpoint);
                }
            }
        }
        if !failed.is_empty() {
            dial.hasten_next(cx.now);
        }
        for endpoint in &failed {
            self.note_failed(endpoint, cx);
        }
    }

    /// Goes on with an earlier attempt, now that the latest one has failed. Returns false if there is
    /// none.
    pub(super) fn return_to_earlier(&mut self, cx: &mut Context<'_, S>) -> bool {
        let State::Connecting {
            server,
            dial,
            earlier,
            ..
        } = &mut self.state
        else {
            return false;
        };
        let Some(attempt) = earlier.pop() else {
            return false;
        };
        let latest = std::mem::replace(server, checked(attempt.socket));
        cx.request(Action::Close(latest.socket, None));
        let failed = dial.return_to(attempt.endpoint);
        dial.hasten_next(cx.now);
        if let Some(endpoint) = failed {
            self.note_failed(&endpoint, cx);
        }
        self.wait_for_answers(cx);
        true
    }

    /// Waits for the answer to an attempt, or until the next one is due.
    pub(super) fn wait_for_answers(&mut self, cx: &mut Context<'_, S>) {
        let State::Connecting { dial, earlier, .. } = &self.state else {
            return;
        };
        let under_way = earlier.len() + 1;
        let deadline = dial.deadline();
        match dial.next_attempt(under_way < MOST_ATTEMPTS) {
            Some(at) if at <= cx.now => {
                self.wake_at = Some(deadline);
                cx.request(Action::Connect);
            }
            next => self.wake_at = Some(next.map_or(deadline, |at| at.min(deadline))),
        }
    }

    /// Ends the race, which the server's socket has won.
    pub(super) fn win_race(&mut self, cx: &mut Context<'_, S>) {
        let State::Connecting {
            server,
            dial,
            earlier,
            ..
        } = &mut self.state
        else {
            return;
        };
        if let Some(Endpoint::Tcp(address)) = dial.endpoint() {
            self.forward.addresses().note_success(*address);
        }
        if !dial.has_raced() {
            return;
        }
        for attempt in earlier.drain(..) {
            cx.request(Action::Close(attempt.socket, None));
            if let Endpoint::Tcp(address) = attempt.endpoint {
                self.forward.addresses().note_failure(address, cx.now);
            }
        }
        // What the events of others have latched is not true of it, and what was latched for it may
        // be lost: it is looked what there is.
        server.restart_latch(Readiness {
            readable: true,
            writable: true,
            hidden: true,
            ..Readiness::default()
        });
        if let Some(route) = &mut self.route
            && let Some(endpoint) = dial.endpoint()
            && let Some(here) = server.socket.local_name()
            && let Some(ends) = PeerNames::dialled(here, endpoint)
        {
            cx.routes.keep_dialled(ends, route);
        }
    }

    /// Closes what is still in a race that nobody has won.
    pub(super) fn abandon_race(&mut self, cx: &mut Context<'_, S>) {
        if let State::Connecting { earlier, .. } = &mut self.state {
            for attempt in earlier.drain(..) {
                cx.request(Action::Close(attempt.socket, None));
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

/// Makes an end of a socket that is asked, whatever the events say, whether it is connected.
fn checked<S: ConnectionSocket>(socket: S) -> End<S> {
    let mut end = End::new(socket);
    end.latch(Readiness {
        writable: true,
        ..Readiness::default()
    });
    end
}
