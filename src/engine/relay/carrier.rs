//! What carries bytes from one socket to another, memory or a pipe, and the pool that lends both.

use std::fmt::Debug;
use std::ops::Range;

/// What bytes go through without being copied: a pipe for `splice(2)`, or nothing, where there is no such thing.
pub(crate) trait Pipe: Sized + Debug {
    /// An empty one, if there is one to be had.
    fn new() -> Option<Self>;
}

/// What is to be lent again: the last that came back first, for it may still be in a cache.
#[derive(Debug)]
struct Shelf<T> {
    items: Vec<T>,
    /// The fewest that lay here since the last [`trim`](Shelf::trim): so many nobody has needed since.
    fewest: usize,
}

impl<T> Shelf<T> {
    const fn new() -> Shelf<T> {
        Shelf {
            items: Vec::new(),
            fewest: 0,
        }
    }

    fn take(&mut self) -> Option<T> {
        let item = self.items.pop();
        self.fewest = self.fewest.min(self.items.len());
        item
    }

    /// Drops what nobody has needed since this was called before, but for so many; how many.
    fn trim(&mut self, keep: usize) -> usize {
        let surplus = self.fewest.min(self.items.len().saturating_sub(keep));
        self.items.drain(..surplus);
        self.fewest = self.items.len();
        surplus
    }
}

/// Buffers and pipes that wait for the next bytes, shared by all connections of one worker.
#[derive(Debug)]
pub(crate) struct Pool<P> {
    buffers: Shelf<Box<[u8]>>,
    size: usize,
    keep: usize,
    pipes: Shelf<P>,
    /// How many pipes may still be made.
    to_make: usize,
    /// Those that the system would not give; they are asked for again after the next [`trim`](Pool::trim).
    refused: usize,
}

impl<P: Pipe> Pool<P> {
    /// A pool of buffers of `size` bytes, of which `keep` are kept though nobody needs them, and of at most `pipes` pipes
    /// in all.
    pub(crate) fn new(size: usize, keep: usize, pipes: usize) -> Pool<P> {
        Pool {
            buffers: Shelf::new(),
            size,
            keep,
            pipes: Shelf::new(),
            to_make: pipes,
            refused: 0,
        }
    }

    pub(crate) fn take_buffer(&mut self) -> Box<[u8]> {
        self.buffers
            .take()
            .unwrap_or_else(|| vec![0; self.size].into_boxed_slice())
    }

    pub(crate) fn give_buffer(&mut self, buffer: Box<[u8]>) {
        self.buffers.items.push(buffer);
    }

    /// An empty pipe; `None` if all are in use.
    pub(crate) fn take_pipe(&mut self) -> Option<P> {
        if let Some(pipe) = self.pipes.take() {
            return Some(pipe);
        }
        if self.to_make == 0 {
            return None;
        }
        let made = P::new();
        match made {
            Some(_) => self.to_make -= 1,
            // Where there is none now it isn't asked for again and again.
            None => self.refused += std::mem::take(&mut self.to_make),
        }
        made
    }

    /// How many bytes a buffer holds.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Takes an empty pipe back.
    pub(crate) fn give_pipe(&mut self, pipe: P) {
        self.pipes.items.push(pipe);
    }

    /// Whether there is something for [`trim`](Pool::trim) to do, now or later.
    pub(crate) fn wants_trim(&self) -> bool {
        self.buffers.items.len() > self.keep || !self.pipes.items.is_empty() || self.refused > 0
    }

    /// Drops the buffers and pipes that nobody has needed since this was called before; pipes that could not be had then
    /// may be now.
    pub(crate) fn trim(&mut self) {
        self.buffers.trim(self.keep);
        self.to_make += self.pipes.trim(0) + std::mem::take(&mut self.refused);
    }

    /// One that still held bytes is gone: another may take its place.
    fn lose_pipe(&mut self) {
        self.to_make += 1;
    }

    /// Buffers that nobody has borrowed.
    #[cfg(test)]
    pub(crate) fn resting(&self) -> usize {
        self.buffers.items.len()
    }

    /// Pipes that were made, of those that nobody has borrowed.
    #[cfg(test)]
    pub(crate) fn made_pipes(&self) -> usize {
        self.pipes.items.len()
    }

    /// Pipes that nobody has borrowed, or that are still to be made.
    #[cfg(test)]
    pub(crate) fn resting_pipes(&self) -> usize {
        self.pipes.items.len() + self.to_make
    }
}

/// Bytes on their way from one socket to another.
///
/// Filled only when empty (invariant 2), and without a buffer or a pipe while empty (invariant 7).
#[derive(Debug)]
pub(crate) enum Carrier<P> {
    Empty,
    Memory {
        buffer: Box<[u8]>,
        filled: Range<usize>,
    },
    Pipe {
        pipe: P,
        holds: usize,
    },
}

impl<P: Pipe> Carrier<P> {
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Carrier::Empty)
    }

    /// Bytes that are still to be written.
    #[cfg(test)]
    pub(crate) fn left(&self) -> usize {
        match self {
            Carrier::Empty => 0,
            Carrier::Memory { filled, .. } => filled.len(),
            Carrier::Pipe { holds, .. } => *holds,
        }
    }

    /// Notes that the first `n` bytes were written.
    pub(crate) fn consume(&mut self, n: usize, pool: &mut Pool<P>) {
        let left = match self {
            Carrier::Empty => 0,
            Carrier::Memory { filled, .. } => {
                filled.start += n;
                filled.len()
            }
            Carrier::Pipe { holds, .. } => {
                *holds -= n;
                *holds
            }
        };
        if left == 0 {
            self.clear(pool);
        }
    }

    /// Drops what is left and gives back what carried it.
    pub(crate) fn clear(&mut self, pool: &mut Pool<P>) {
        match std::mem::replace(self, Carrier::Empty) {
            Carrier::Empty => {}
            Carrier::Memory { buffer, .. } => pool.give_buffer(buffer),
            Carrier::Pipe { pipe, holds: 0 } => pool.give_pipe(pipe),
            // What it holds can't be taken out but by another write.
            Carrier::Pipe { .. } => pool.lose_pipe(),
        }
    }
}
