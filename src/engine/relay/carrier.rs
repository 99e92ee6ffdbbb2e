//! The carriers of bytes from one socket to another, memory buffers or pipes, and the pool that
//! lends them.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::stream::socket::{COST_CLASSES, Pipe};

use super::chooser::{Chooser, Through};

/// A free list. What was returned last is lent first, since it may still be in a cache.
#[derive(Debug)]
struct FreeList<T> {
    items: Vec<T>,
    /// The fewest items on the list since the last [`trim`](FreeList::trim): so many were not
    /// needed since.
    fewest: usize,
}

impl<T> FreeList<T> {
    const fn new() -> FreeList<T> {
        FreeList {
            items: Vec::new(),
            fewest: 0,
        }
    }

    fn take(&mut self) -> Option<T> {
        let item = self.items.pop();
        self.fewest = self.fewest.min(self.items.len());
        item
    }

    /// Drops the items that were not needed since the last call, except for `keep`. Returns how
    /// many.
    fn trim(&mut self, keep: usize) -> usize {
        let surplus = self.fewest.min(self.items.len().saturating_sub(keep));
        self.items.drain(..surplus);
        self.fewest = self.items.len();
        surplus
    }
}

/// The kind of a flow, as far as it decides which carrier is the cheaper one on a machine: what the
/// sockets cost, and how much comes at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FlowKind {
    /// The [`Socket::cost_class`](crate::stream::socket::Socket::cost_class) of the source and of
    /// the sink.
    pub(crate) source: usize,
    pub(crate) sink: usize,
    /// Whether it fills at least half a buffer at a time.
    pub(crate) fills_buffers: bool,
}

/// The number of kinds of flows.
const KINDS: usize = COST_CLASSES * COST_CLASSES * 2;

impl FlowKind {
    fn index(self) -> usize {
        (self.source * COST_CLASSES + self.sink) * 2 + usize::from(self.fills_buffers)
    }
}

/// The bytes that the connections of one worker have delivered, by carrier. Any thread may read it.
#[derive(Debug, Default)]
pub(crate) struct Carried([AtomicU64; 2]);

impl Carried {
    /// Returns how many bytes have passed through such carriers.
    pub(crate) fn bytes(&self, through: Through) -> u64 {
        self.0[through as usize].load(Ordering::Relaxed)
    }

    fn add(&self, through: Through, bytes: u64) {
        if bytes > 0 {
            self.0[through as usize].fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

/// The free buffers and pipes of one worker, shared by all its connections, and what it has learned
/// of their cost.
#[derive(Debug)]
pub(crate) struct Pool<P> {
    buffers: FreeList<Box<[u8]>>,
    size: usize,
    keep: usize,
    pipes: FreeList<P>,
    /// Whether there may be pipes at all.
    splices: bool,
    /// How many more pipes may be made.
    to_make: usize,
    /// How many pipes the system refused; they are tried again after the next [`trim`](Pool::trim).
    refused: usize,
    choosers: [Chooser; KINDS],
    carried: Arc<Carried>,
}

impl<P: Pipe> Pool<P> {
    /// Makes a pool of buffers of `size` bytes, of which `keep` are kept even if they are not
    /// needed, and of at most `pipes` pipes. What passes through them is added to `carried`.
    pub(crate) fn new(size: usize, keep: usize, pipes: usize, carried: Arc<Carried>) -> Pool<P> {
        Pool {
            buffers: FreeList::new(),
            size,
            keep,
            pipes: FreeList::new(),
            splices: pipes > 0,
            to_make: pipes,
            refused: 0,
            choosers: std::array::from_fn(|_| Chooser::new(size)),
            carried,
        }
    }

    /// Returns whether it may lend pipes at all.
    pub(crate) fn splices(&self) -> bool {
        self.splices
    }

    /// Returns what chooses the carrier of such flows.
    pub(crate) fn chooser(&mut self, kind: FlowKind) -> &mut Chooser {
        &mut self.choosers[kind.index()]
    }

    /// Counts bytes that were delivered.
    pub(crate) fn count(&self, through: Through, bytes: u64) {
        self.carried.add(through, bytes);
    }

    pub(crate) fn take_buffer(&mut self) -> Box<[u8]> {
        self.buffers
            .take()
            .unwrap_or_else(|| vec![0; self.size].into_boxed_slice())
    }

    pub(crate) fn give_buffer(&mut self, buffer: Box<[u8]>) {
        self.buffers.items.push(buffer);
    }

    /// Lends an empty pipe, or returns `None` if all are in use.
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
            // Once the system refuses one, it is not asked again and again.
            None => self.refused += std::mem::take(&mut self.to_make),
        }
        made
    }

    /// Returns how many bytes a buffer holds.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Takes an empty pipe back.
    pub(crate) fn give_pipe(&mut self, pipe: P) {
        self.pipes.items.push(pipe);
    }

    /// Returns whether [`trim`](Pool::trim) has something to do, now or later.
    pub(crate) fn wants_trim(&self) -> bool {
        self.buffers.items.len() > self.keep || !self.pipes.items.is_empty() || self.refused > 0
    }

    /// Drops the buffers and pipes that were not needed since the last call, and allows pipes that
    /// were refused to be tried again.
    pub(crate) fn trim(&mut self) {
        self.buffers.trim(self.keep);
        self.to_make += self.pipes.trim(0) + std::mem::take(&mut self.refused);
    }

    /// Notes that a pipe was dropped with bytes in it: another may be made.
    fn lose_pipe(&mut self) {
        self.to_make += 1;
    }

    /// Returns the number of free buffers.
    #[cfg(test)]
    pub(crate) fn free_buffers(&self) -> usize {
        self.buffers.items.len()
    }

    /// Returns the number of free pipes that were made.
    #[cfg(test)]
    pub(crate) fn made_pipes(&self) -> usize {
        self.pipes.items.len()
    }

    /// Returns the number of pipes that are free or may still be made.
    #[cfg(test)]
    pub(crate) fn resting_pipes(&self) -> usize {
        self.pipes.items.len() + self.to_make
    }
}

/// Bytes on their way from one socket to another.
///
/// It is filled only when empty (invariant 2), and holds no buffer or pipe while empty (invariant
/// 7).
#[derive(Debug)]
pub(crate) enum Carrier<P> {
    Empty,
    Memory {
        buffer: Box<[u8]>,
        filled: Range<usize>,
    },
    Pipe {
        pipe: P,
        len: usize,
    },
}

impl<P: Pipe> Carrier<P> {
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Carrier::Empty)
    }

    /// Returns what carries the bytes, if there are any.
    pub(crate) fn through(&self) -> Option<Through> {
        match self {
            Carrier::Empty => None,
            Carrier::Memory { .. } => Some(Through::Memory),
            Carrier::Pipe { .. } => Some(Through::Pipe),
        }
    }

    /// Returns how many bytes are still to be written.
    pub(crate) fn bytes_left(&self) -> usize {
        match self {
            Carrier::Empty => 0,
            Carrier::Memory { filled, .. } => filled.len(),
            Carrier::Pipe { len, .. } => *len,
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
            Carrier::Pipe { len, .. } => {
                *len -= n;
                *len
            }
        };
        if left == 0 {
            self.clear(pool);
        }
    }

    /// Drops the bytes that are left, and returns the buffer or pipe.
    pub(crate) fn clear(&mut self, pool: &mut Pool<P>) {
        match std::mem::replace(self, Carrier::Empty) {
            Carrier::Empty => {}
            Carrier::Memory { buffer, .. } => pool.give_buffer(buffer),
            Carrier::Pipe { pipe, len: 0 } => pool.give_pipe(pipe),
            // It is dropped, since only another write could empty it.
            Carrier::Pipe { .. } => pool.lose_pipe(),
        }
    }
}
