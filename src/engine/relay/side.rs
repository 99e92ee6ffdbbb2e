//! The two sides of a connection.

use std::ops::{Index, IndexMut};

/// A side of a connection; it indexes a pair of what each side has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Side {
    /// The one that was accepted.
    Client,
    /// The one that was dialled.
    Server,
}

impl Side {
    /// Both, the client first.
    pub(crate) const BOTH: [Side; 2] = [Side::Client, Side::Server];

    /// Returns the opposite side.
    pub(crate) fn other(self) -> Side {
        match self {
            Side::Client => Side::Server,
            Side::Server => Side::Client,
        }
    }
}

impl<T> Index<Side> for [T; 2] {
    type Output = T;

    fn index(&self, side: Side) -> &T {
        &self[side as usize]
    }
}

impl<T> IndexMut<Side> for [T; 2] {
    fn index_mut(&mut self, side: Side) -> &mut T {
        &mut self[side as usize]
    }
}
