//! The device's slots, and the tokens by which events name them.

use super::connection::Connection;
use mio::Token;

/// hyperkit's `VTSOCK_MAXSOCKS`.
pub(super) const MAX_SLOTS: usize = 1024;

/// A slot, in one of its lives: an event that is older than the connection in the slot names
/// another key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key(usize);

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Subject {
    Waker,
    /// A listening socket of the state directory.
    Listener(usize),
    /// A listening socket whose clients are programs in the guest.
    DialListener(usize),
    Host(Key),
    Guest(Key),
    /// A host socket that the device is done with.
    Closed(usize),
}

impl Subject {
    pub(super) fn token(self) -> Token {
        let (kind, value) = match self {
            Subject::Waker => (0, 0),
            Subject::Listener(index) => (1, index),
            Subject::DialListener(index) => (2, index),
            Subject::Host(key) => (3, key.0),
            Subject::Guest(key) => (4, key.0),
            Subject::Closed(number) => (5, number),
        };
        Token(value << 3 | kind)
    }

    pub(super) fn of(token: Token) -> Subject {
        let value = token.0 >> 3;
        match token.0 & 7 {
            0 => Subject::Waker,
            1 => Subject::Listener(value),
            2 => Subject::DialListener(value),
            3 => Subject::Host(Key(value)),
            4 => Subject::Guest(Key(value)),
            _ => Subject::Closed(value),
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Slots {
    entries: Vec<(Key, Option<Connection>)>,
    free: Vec<usize>,
}

impl Slots {
    pub(super) fn live(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    pub(super) fn insert(&mut self, connection: Connection) -> Key {
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.entries.push((Key(self.entries.len()), None));
                self.entries.len() - 1
            }
        };
        self.entries[index].1 = Some(connection);
        self.entries[index].0
    }

    pub(super) fn get(&mut self, key: Key) -> Option<&mut Connection> {
        let (current, connection) = self.entries.get_mut(key.0 % MAX_SLOTS)?;
        connection.as_mut().filter(|_| *current == key)
    }

    pub(super) fn remove(&mut self, key: Key) -> Option<Connection> {
        let index = key.0 % MAX_SLOTS;
        let (current, connection) = self.entries.get_mut(index)?;
        if *current != key {
            return None;
        }
        let connection = connection.take()?;
        // The top bits are a token's; an index never changes.
        *current = Key((key.0 + MAX_SLOTS) & (usize::MAX >> 3));
        self.free.push(index);
        Some(connection)
    }

    /// Returns the keys of all connections.
    pub(super) fn keys(&self) -> Vec<Key> {
        let live = self.entries.iter().filter(|(_, entry)| entry.is_some());
        live.map(|(key, _)| *key).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_name_their_subjects() {
        for subject in [
            Subject::Waker,
            Subject::Listener(4),
            Subject::DialListener(7),
            Subject::Host(Key(1023 + 5 * MAX_SLOTS)),
            Subject::Guest(Key(0)),
            Subject::Closed(123_456),
        ] {
            assert_eq!(Subject::of(subject.token()), subject);
        }
    }
}
