//! Whether a host program broke a rule: what the device sees of its sockets' ends.

use std::time::Duration;

use super::closed::was_reset;
use super::connection::Guest;
pub(crate) use super::connection::Origin;
use super::device::Device;
use super::rules::{Fate, Rule, Strictness};
use super::slots::{Key, Subject};
use mio::event::Event;

/// What the device has seen of a connection whose host program has closed both directions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostEnd {
    /// It closed with bytes unread.
    pub(crate) reset: bool,
    /// Bytes that were written to it.
    pub(crate) sent: u64,
    /// It was told that the guest sends no more.
    pub(crate) host_shut: bool,
    /// The guest has ended, and bytes for the host are still in the device.
    pub(crate) undelivered: bool,
    /// How long before that the connection was made.
    pub(crate) age: Duration,
}

/// Returns the rule that a host's program has broken by such an end, if one was. `has_input`, which
/// says whether the program has sent anything, is asked only if it matters: looking at a socket may
/// take away what else there is to be seen of it.
pub(crate) fn broken_rule(
    origin: Origin,
    end: HostEnd,
    strictness: Strictness,
    has_input: impl FnOnce() -> bool,
) -> Option<Rule> {
    let strict = strictness == Strictness::Strict;
    let unsent = end.sent == 0 && !end.host_shut;
    match origin {
        _ if end.reset && end.sent > 0 && (strict || end.undelivered) => Some(Rule::CloseUnread),
        // It was never accepted: its listener was closed.
        Origin::Guest if end.reset && end.sent == 0 && strict => Some(Rule::NoListener),
        _ if !unsent => None,
        Origin::Guest if end.age < Strictness::Strict.at_once() => Some(Rule::AcceptAndClose),
        Origin::Guest => None,
        _ if end.age >= strictness.at_once() => None,
        Origin::Forward if !has_input() => Some(Rule::Probe),
        Origin::Forward | Origin::Line => Some(Rule::ImmediateClose),
    }
}

impl Device {
    pub(super) fn host_event(&mut self, key: Key, event: &Event) {
        let Some(connection) = self.slots.get(key) else {
            return;
        };
        connection.host_ready.note(event);
        let was_gone = connection.host_gone;
        if event.is_error() || event.is_write_closed() {
            connection.host_reset |= was_reset(&connection.host);
        }
        // After our own EOF a half-close looks like this too.
        connection.host_gone |= event.is_write_closed() && !connection.host_shut;
        if connection.host_reset || connection.host_gone && !was_gone {
            self.check_host_end(key);
        }
        self.queue(key);
    }

    /// Notes an offence if the host's program has broken a rule by closing both directions.
    pub(super) fn check_host_end(&mut self, key: Key) {
        let Some(connection) = self.slots.get(key) else {
            return;
        };
        let (port, sent) = (connection.port, connection.sent);
        let age = connection.since.elapsed();
        let end = HostEnd {
            reset: std::mem::take(&mut connection.host_reset),
            sent,
            host_shut: connection.host_shut,
            undelivered: connection.has_undelivered(),
            age,
        };
        let strictness = self.plan.strictness;
        let broken = broken_rule(connection.origin, end, strictness, || {
            connection.has_input()
        });
        if let Some(rule) = broken {
            let micros = age.as_micros();
            let detail = format!("port {port}, {micros} µs old, {sent} bytes sent to it");
            self.note_offence(rule, detail);
        }
    }

    /// Frees the slot; the host's program gets EOF.
    pub(super) fn free(&mut self, key: Key) {
        let Some(connection) = self.remove(key) else {
            return;
        };
        if connection.is_answered_caller() {
            self.counters.guest_echoes += 1;
        }
        if matches!(connection.guest, Guest::Forgotten | Guest::Lost) && self.to_lose > 0 {
            self.to_lose -= 1;
            self.counters.lost_slots += 1;
            self.counters.live_slots = self.taken() as u64;
        }
        if connection.sent == 0 || self.plan.strictness == Strictness::Measured {
            return;
        }
        let port = connection.port;
        let reset = if connection.host_gone {
            // Its end and the trace of unread bytes are not set in one step.
            was_reset(&connection.host)
        } else {
            self.closed_count += 1;
            let token = Subject::Closed(self.closed_count).token();
            let (host, half_closed) = (connection.host, connection.host_eof);
            let registry = self.poll.registry();
            self.closed_sockets
                .watch(host, port, half_closed, registry, token)
        };
        if reset {
            let detail = format!("port {port}, as the guest closed");
            self.note_offence(Rule::CloseUnread, detail);
        }
    }

    /// Counts a dial of the guest that came to nothing, by which `rule` may be broken.
    pub(super) fn note_failed_dial(&mut self, rule: Rule, detail: String) {
        self.counters.guest_dials_failed += 1;
        let failed = self.counters.guest_dials_failed;
        if failed >= self.plan.failed_dials {
            self.note_offence(rule, format!("{detail}, the failed dial number {failed}"));
        }
    }

    /// Counts an offence of a client; the first one ends a VM that isn't lenient.
    pub(super) fn note_offence(&mut self, rule: Rule, detail: String) {
        if self.plan.mux.is_some() {
            // The rules are those of hyperkit's device.
            return;
        }
        self.counters.offences[rule.index()] += 1;
        tracing::debug!(%rule, detail, "a rule was broken");
        if !self.plan.lenient && self.fate.is_none() {
            self.fate = Some(Fate {
                kind: rule.consequence(),
                rule,
                detail,
            });
        }
    }
}
