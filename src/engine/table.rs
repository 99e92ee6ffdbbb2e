//! The connections of one worker, found by tokens that carry a generation.
//!
//! Invariant 6: an event for an older generation is dropped. An event that was fetched before its
//! socket was closed must not reach the connection that uses the same index now.

use super::relay::Side;

/// The identifier of a connection within its worker. Its generation is never 0: tokens below
/// [`Id::FIRST`] are free for other uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Id(u64);

const SIDE_BITS: u32 = 1;
const GENERATION_SHIFT: u32 = 32;

impl Id {
    /// The smallest token of any connection.
    pub(crate) const FIRST: usize = 1 << GENERATION_SHIFT;

    fn new(index: usize, generation: u32) -> Id {
        Id((u64::from(generation) << GENERATION_SHIFT) | (index as u64) << SIDE_BITS)
    }

    fn index(self) -> usize {
        ((self.0 & u64::from(u32::MAX)) >> SIDE_BITS) as usize
    }

    fn generation(self) -> u32 {
        (self.0 >> GENERATION_SHIFT) as u32
    }

    /// Returns the token under which `side` is registered.
    pub(crate) fn token(self, side: Side) -> usize {
        self.0 as usize | side as usize
    }

    /// Returns the connection and the side of a token.
    pub(crate) fn from_token(token: usize) -> (Id, Side) {
        let side = match token & 1 {
            0 => Side::Client,
            _ => Side::Server,
        };
        (Id(token as u64 & !1), side)
    }
}

#[derive(Debug)]
struct TableEntry<T> {
    generation: u32,
    value: Option<T>,
}

/// A table of values by [`Id`]. No id is used twice (short of 2³² uses of one index).
#[derive(Debug)]
pub(crate) struct Table<T> {
    entries: Vec<TableEntry<T>>,
    free: Vec<usize>,
}

impl<T> Table<T> {
    pub(crate) fn new() -> Table<T> {
        Table {
            entries: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Returns the id that the next inserted value will have.
    pub(crate) fn next_id(&self) -> Id {
        match self.free.last() {
            Some(&index) => Id::new(index, self.entries[index].generation),
            None => Id::new(self.entries.len(), 1),
        }
    }

    /// Inserts a value, and returns its id.
    pub(crate) fn insert(&mut self, value: T) -> Id {
        let id = self.next_id();
        match self.free.pop() {
            Some(index) => self.entries[index].value = Some(value),
            None => self.entries.push(TableEntry {
                generation: 1,
                value: Some(value),
            }),
        }
        id
    }

    /// Returns the value of an id, if it is still there.
    pub(crate) fn get_mut(&mut self, id: Id) -> Option<&mut T> {
        let entry = self.entries.get_mut(id.index())?;
        if entry.generation == id.generation() {
            entry.value.as_mut()
        } else {
            None
        }
    }

    /// Replaces the value of an id, if it is still there, and returns the one before.
    pub(crate) fn replace(&mut self, id: Id, value: T) -> Option<T> {
        self.get_mut(id)
            .map(|before| std::mem::replace(before, value))
    }

    /// Removes a value. Its id is never used again.
    pub(crate) fn remove(&mut self, id: Id) -> Option<T> {
        let entry = self.entries.get_mut(id.index())?;
        if entry.generation != id.generation() {
            return None;
        }
        let value = entry.value.take()?;
        entry.generation = entry.generation.checked_add(1).unwrap_or(1);
        self.free.push(id.index());
        Some(value)
    }

    /// Returns the ids of all values.
    pub(crate) fn ids(&self) -> Vec<Id> {
        let used = self
            .entries
            .iter()
            .enumerate()
            .filter(|(_, entry)| entry.value.is_some());
        used.map(|(index, entry)| Id::new(index, entry.generation))
            .collect()
    }
}

// A token holds a generation of 32 bits besides the index.
const _: () = assert!(usize::BITS == 64, "hvsock needs a 64-bit system");

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_id_does_not_find_the_next_value_at_its_index() {
        let mut table = Table::new();
        let old = table.insert('a');
        assert_eq!(Id::from_token(old.token(Side::Server)), (old, Side::Server));
        assert!(old.token(Side::Client) >= Id::FIRST);
        assert_eq!(table.remove(old), Some('a'));
        let new = table.insert('b');
        assert_eq!(old.index(), new.index());
        assert_eq!(table.get_mut(old), None);
        assert_eq!(table.remove(old), None);
        assert_eq!(table.replace(old, 'c'), None);
        assert_eq!(table.get_mut(new), Some(&mut 'b'));
        assert_eq!(table.replace(new, 'c'), Some('b'));
        assert_eq!(table.get_mut(new), Some(&mut 'c'));
        assert_eq!(table.ids(), vec![new]);
    }
}
