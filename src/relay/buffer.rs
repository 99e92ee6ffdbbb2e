//! The memory carrier, and the pool that lends its buffers.

use std::ops::Range;

/// Buffers that wait for the next bytes, shared by all connections of one worker.
#[derive(Debug)]
pub(crate) struct Pool {
    free: Vec<Box<[u8]>>,
    size: usize,
    keep: usize,
}

impl Pool {
    /// A pool of buffers of `size` bytes that keeps at most `keep` unused ones.
    pub(crate) fn new(size: usize, keep: usize) -> Pool {
        Pool {
            free: Vec::new(),
            size,
            keep,
        }
    }

    pub(crate) fn take(&mut self) -> Box<[u8]> {
        self.free
            .pop()
            .unwrap_or_else(|| vec![0; self.size].into_boxed_slice())
    }

    pub(crate) fn give(&mut self, buffer: Box<[u8]>) {
        if self.free.len() < self.keep {
            self.free.push(buffer);
        }
    }

    /// Buffers that nobody has borrowed.
    #[cfg(test)]
    pub(crate) fn resting(&self) -> usize {
        self.free.len()
    }
}

/// Bytes on their way from one socket to another.
///
/// Filled only when empty (invariant 2), and without a buffer while empty (invariant 7).
#[derive(Debug, Default)]
pub(crate) struct Carrier {
    buffer: Option<Box<[u8]>>,
    filled: Range<usize>,
}

impl Carrier {
    pub(crate) fn is_empty(&self) -> bool {
        self.filled.is_empty()
    }

    /// Takes over `buffer`, whose first `len` bytes are to be carried.
    pub(crate) fn fill(&mut self, buffer: Box<[u8]>, len: usize) {
        debug_assert!(self.is_empty() && self.buffer.is_none());
        self.filled = 0..len;
        self.buffer = Some(buffer);
    }

    /// The bytes that are still to be written.
    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.buffer {
            Some(buffer) => &buffer[self.filled.clone()],
            None => &[],
        }
    }

    /// Notes that the first `n` of [`bytes`](Carrier::bytes) were written.
    pub(crate) fn consume(&mut self, n: usize, pool: &mut Pool) {
        self.filled.start += n;
        if self.filled.is_empty() {
            self.clear(pool);
        }
    }

    /// Drops what is left and gives the buffer back.
    pub(crate) fn clear(&mut self, pool: &mut Pool) {
        self.filled = 0..0;
        if let Some(buffer) = self.buffer.take() {
            pool.give(buffer);
        }
    }
}
