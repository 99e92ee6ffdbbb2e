//! Bytes under way in one direction, up to a limit.

/// What is set as the buffer of a socket pair towards a guest program.
pub(super) const PAIR_BUFFER: usize = 32 * 1024;

#[derive(Debug)]
pub(super) struct Buffer {
    data: Vec<u8>,
    head: usize,
    limit: usize,
}

impl Buffer {
    pub(super) fn new(limit: usize) -> Buffer {
        Buffer {
            data: Vec::new(),
            head: 0,
            limit,
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.data[self.head..]
    }

    pub(super) fn len(&self) -> usize {
        self.data.len() - self.head
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn space(&self) -> usize {
        self.limit.saturating_sub(self.len())
    }

    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Takes as much of `bytes` as there is space for; how much that was.
    pub(super) fn push(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(self.space());
        if self.head > 0 && self.data.len() + n > self.data.capacity() {
            self.data.drain(..self.head);
            self.head = 0;
        }
        self.data.extend_from_slice(&bytes[..n]);
        n
    }

    pub(super) fn consume(&mut self, n: usize) {
        self.head += n;
        if self.head >= self.data.len() {
            self.clear();
        }
    }

    pub(super) fn clear(&mut self) {
        self.data.clear();
        self.head = 0;
    }

    /// Gives the memory back if nothing is in it: a thousand idle connections hold none.
    pub(super) fn release(&mut self) {
        if self.is_empty() {
            self.data = Vec::new();
            self.head = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_order_and_limit() {
        let mut buffer = Buffer::new(10);
        assert_eq!(buffer.push(b"0123456789ab"), 10);
        buffer.consume(4);
        assert_eq!(buffer.push(b"abcdef"), 4);
        assert_eq!(buffer.bytes(), b"456789abcd");
        assert_eq!(buffer.space(), 0);
        buffer.consume(10);
        buffer.release();
        assert!(buffer.is_empty());
        assert_eq!(buffer.space(), 10);
    }
}
