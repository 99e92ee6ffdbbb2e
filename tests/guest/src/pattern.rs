//! Byte patterns that can be told from any other bytes, sent and expected.

use std::error::Error;
use std::io::{self, Read, Write};

type Failure = Box<dyn Error + Send + Sync>;

/// A stream of bytes that has no period, made eight at a time; two of one seed are equal.
pub(crate) struct Pattern(u64);

impl Pattern {
    pub(crate) fn new(seed: u64) -> Pattern {
        Pattern(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
    }
}

const CHUNK: usize = 64 * 1024;

/// Writes `bytes` bytes of the pattern (a multiple of 8).
pub(crate) fn send_pattern(mut to: impl Write, seed: u64, bytes: usize) -> io::Result<()> {
    let mut pattern = Pattern::new(seed);
    let mut chunk = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let n = left.min(CHUNK);
        pattern.fill(&mut chunk[..n]);
        to.write_all(&chunk[..n])?;
        left -= n;
    }
    Ok(())
}

/// Reads `bytes` bytes. Fails unless they are those of the pattern.
pub(crate) fn receive_pattern(mut from: impl Read, seed: u64, bytes: usize) -> Result<(), Failure> {
    let mut pattern = Pattern::new(seed);
    let (mut chunk, mut wanted) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut left = bytes;
    while left > 0 {
        let n = left.min(CHUNK);
        pattern.fill(&mut wanted[..n]);
        from.read_exact(&mut chunk[..n])
            .map_err(|e| format!("{e}, with {left} of {bytes} bytes to come"))?;
        if chunk[..n] != wanted[..n] {
            return Err(format!("other bytes than were sent, {left} before the end").into());
        }
        left -= n;
    }
    Ok(())
}

/// Reads as [`receive_pattern`] does, and an EOF after it.
pub(crate) fn expect_pattern(mut from: impl Read, seed: u64, bytes: usize) -> Result<(), Failure> {
    receive_pattern(&mut from, seed, bytes)?;
    match from.read(&mut [0; 1]) {
        Ok(0) => Ok(()),
        other => Err(format!("{other:?} where the EOF should be, after {bytes} bytes").into()),
    }
}
