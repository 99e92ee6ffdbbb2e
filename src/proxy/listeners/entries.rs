//! The table of a worker's listeners.

use std::collections::HashMap;
use std::ops::{Index, IndexMut};

use super::listening::Listening;
use crate::engine::id::ForwardId;
use crate::proxy::driver::ListenerId;

/// The listeners of one worker, by their tokens. A token is used again for another listener.
#[derive(Debug)]
pub(super) struct Entries<L> {
    all: Vec<Listening<L>>,
    /// The listeners of the forwards that were not removed.
    tokens: HashMap<ForwardId, usize>,
    /// The entries that may be used for another listener.
    free: Vec<usize>,
}

impl<L> Default for Entries<L> {
    fn default() -> Entries<L> {
        Entries {
            all: Vec::new(),
            tokens: HashMap::new(),
            free: Vec::new(),
        }
    }
}

impl<L> Entries<L> {
    /// Returns all entries, those that are free included.
    pub(super) fn all(&self) -> &[Listening<L>] {
        &self.all
    }

    /// Returns all entries, to be changed.
    pub(super) fn all_mut(&mut self) -> &mut [Listening<L>] {
        &mut self.all
    }

    /// Returns the token that the next listener will have.
    pub(super) fn next_token(&self) -> usize {
        self.free.last().copied().unwrap_or(self.all.len())
    }

    /// Inserts a listener, and returns its token.
    pub(super) fn insert(&mut self, listening: Listening<L>) -> usize {
        let token = self.next_token();
        self.tokens.insert(listening.forward.id, token);
        match self.free.pop() {
            Some(token) => self.all[token] = listening,
            None => self.all.push(listening),
        }
        token
    }

    /// Returns the token of a forward's listener, if this worker has it.
    pub(super) fn token_of(&self, forward: ForwardId) -> Option<usize> {
        self.tokens.get(&forward).copied()
    }

    /// Forgets the forward of a listener, which has been removed.
    pub(super) fn forget_forward(&mut self, token: usize) {
        self.tokens.remove(&self.all[token].forward.id);
    }

    /// Frees the entry of a listener that has ended.
    pub(super) fn free_entry(&mut self, token: usize) {
        self.free.push(token);
    }

    /// Returns the entry of a token, if there is one.
    pub(super) fn get_mut(&mut self, token: usize) -> Option<&mut Listening<L>> {
        self.all.get_mut(token)
    }

    /// Returns the entry of a listener, unless another has its token by now.
    pub(super) fn find_mut(&mut self, of: ListenerId) -> Option<&mut Listening<L>> {
        let listening = self.get_mut(of.token)?;
        (listening.forward.id == of.forward).then_some(listening)
    }
}

impl<L> Index<usize> for Entries<L> {
    type Output = Listening<L>;

    fn index(&self, token: usize) -> &Listening<L> {
        &self.all[token]
    }
}

impl<L> IndexMut<usize> for Entries<L> {
    fn index_mut(&mut self, token: usize) -> &mut Listening<L> {
        &mut self.all[token]
    }
}
