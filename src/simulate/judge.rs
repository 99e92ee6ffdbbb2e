//! Whether a host program broke a rule: what the device sees of its sockets' ends.

use super::afterlife::was_reset;
use super::connection::Origin;
use super::device::Device;
use super::rules::{AT_ONCE, Fate, Rule};
use super::slots::{Key, Subject};
use mio::event::Event;

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
            self.judge(key);
        }
        self.queue(key);
    }

    /// The host's program has closed both directions: was that against a rule?
    pub(super) fn judge(&mut self, key: Key) {
        let Some(connection) = self.slots.get(key) else {
            return;
        };
        let (port, sent) = (connection.port, connection.sent);
        let age = connection.since.elapsed();
        let unsent = sent == 0 && !connection.host_shut;
        let reset = std::mem::take(&mut connection.host_reset);
        let rule = match connection.origin {
            _ if reset && sent > 0 => Rule::CloseUnread,
            // It was never accepted: its listener was closed.
            Origin::Guest if reset => Rule::NoListener,
            _ if !unsent || age >= AT_ONCE => return,
            Origin::Guest => Rule::AcceptAndClose,
            Origin::Forward if !connection.has_input() => Rule::Probe,
            Origin::Forward | Origin::Line => Rule::ImmediateClose,
        };
        let micros = age.as_micros();
        let detail = format!("port {port}, {micros} µs old, {sent} bytes sent to it");
        self.offend(rule, detail);
    }

    /// Frees the slot; the host's program gets EOF.
    pub(super) fn free(&mut self, key: Key) {
        let Some(connection) = self.remove(key) else {
            return;
        };
        if connection.sent == 0 {
            return;
        }
        let port = connection.port;
        let reset = if connection.host_gone {
            // Its end and the trace of unread bytes are not set in one step.
            was_reset(&connection.host)
        } else {
            self.buried += 1;
            let token = Subject::Afterlife(self.buried).token();
            let (host, half_closed) = (connection.host, connection.host_eof);
            let registry = self.poll.registry();
            self.afterlife
                .watch(host, port, half_closed, registry, token)
        };
        if reset {
            let detail = format!("port {port}, as the guest closed");
            self.offend(Rule::CloseUnread, detail);
        }
    }

    /// A client broke a rule.
    pub(super) fn offend(&mut self, rule: Rule, detail: String) {
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
