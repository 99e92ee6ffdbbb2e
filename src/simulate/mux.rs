//! The other VMM: Firecracker's and its kin's, with one Unix socket and a line of text for each
//! dial.
//!
//! A client says `CONNECT PORT\n`, and hears `OK N\n` when the guest has answered; it is closed if
//! the guest refuses. When the guest dials, the VMM connects to `PATH_PORT`. Nothing that a client
//! does hurts it.

use super::connection::{Connection, Guest, Origin};
use super::device::Device;
use super::slots::Key;
use mio::net::UnixStream;

/// The longest line that is waited for, as Firecracker's (`CSM_MAX_HANDSHAKE`) and more than
/// `CONNECT 4294967295\n` has.
const LONGEST_LINE: usize = 32;

/// Firecracker's first port of the host's side.
const FIRST_HOST_PORT: u64 = 1 << 30;

/// Returns the port for which a line asks.
fn scan_line(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let (word, port) = line.split_once(' ')?;
    let port = port.trim_end_matches('\r');
    let is_number = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    (word.eq_ignore_ascii_case("connect") && is_number).then(|| port.parse().ok())?
}

impl Device {
    /// Takes a client of the VMM's socket, whose line is still to come.
    pub(super) fn greet(&mut self, stream: UnixStream) {
        // Which port it is, the line tells.
        let connection = Connection::new(stream, Origin::Line, 0, Guest::Unnamed);
        let half_close = self.plan.mux.as_ref().is_none_or(|mux| mux.half_close);
        if let Some(key) = self.insert(connection)
            && let Some(connection) = self.slots.get(key)
        {
            connection.half_close = half_close;
        }
    }

    /// Has the guest dialled by a client whose line has come; one that says something else is
    /// closed.
    pub(super) fn read_mux_line(&mut self, key: Key) {
        let Some(connection) = self.slots.get(key) else {
            return;
        };
        let said = connection.to_guest.bytes();
        let end = said
            .iter()
            .take(LONGEST_LINE)
            .position(|byte| *byte == b'\n');
        let Some(end) = end else {
            if said.len() >= LONGEST_LINE || connection.host_eof {
                self.counters.silent_closes += 1;
                self.remove(key);
            }
            return;
        };
        let Some(port) = scan_line(&said[..end]) else {
            self.counters.silent_closes += 1;
            self.remove(key);
            return;
        };
        connection.to_guest.consume(end + 1);
        connection.port = port;
        connection.guest = Guest::Unanswered;
        self.note_dial(key);
    }

    /// Tells a client of the VMM's socket that the guest has answered.
    pub(super) fn confirm(&mut self, key: Key) {
        if self.plan.mux.is_none() {
            return;
        }
        let number = FIRST_HOST_PORT + self.counters.answered;
        if let Some(connection) = self.slots.get(key)
            && connection.origin == Origin::Line
        {
            connection.say(format!("OK {number}\n").as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_firecracker_reads() {
        assert_eq!(scan_line(b"CONNECT 80"), Some(80));
        assert_eq!(scan_line(b"connect 4294967295"), Some(u32::MAX));
        assert_eq!(scan_line(b"CONNECT"), None);
        assert_eq!(scan_line(b"CONNECT -1"), None);
        assert_eq!(scan_line(b"CONNECT 4294967296"), None);
        assert_eq!(scan_line(b"GET / HTTP/1.1"), None);
        assert_eq!(scan_line(b"00000003.00000050"), None);
    }
}
