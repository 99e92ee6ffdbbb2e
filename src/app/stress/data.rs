//! The bytes that are sent. Both ends make them from a seed, so that each received byte can be
//! compared.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The bytes of a seed: a random block, repeated. Its length is a prime, so that a lost, doubled or
/// swapped buffer is always detected.
#[derive(Clone, Debug)]
pub(super) struct Data {
    pub(super) seed: u64,
    block: Arc<[u8]>,
}

const BLOCK: usize = 1_048_573;

impl Data {
    pub(super) fn new(seed: u64) -> Data {
        let mut block = vec![0; BLOCK];
        fastrand::Rng::with_seed(seed).fill(&mut block);
        Data {
            seed,
            block: block.into(),
        }
    }

    /// Returns the bytes from `position` on, at least one and at most `len`.
    pub(super) fn at(&self, position: u64, len: u64) -> &[u8] {
        let from = (position % BLOCK as u64) as usize;
        let rest = &self.block[from..];
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        &rest[..rest.len().min(len)]
    }

    /// Returns the first position at which `bytes` are not those from `position` on.
    pub(super) fn difference(&self, mut position: u64, mut bytes: &[u8]) -> Option<u64> {
        while !bytes.is_empty() {
            let right = self.at(position, bytes.len() as u64);
            let (now, rest) = bytes.split_at(right.len());
            if now != right {
                let same = now.iter().zip(right).take_while(|(a, b)| a == b).count();
                return Some(position + same as u64);
            }
            position += now.len() as u64;
            bytes = rest;
        }
        None
    }
}

/// A request to a `stress --server`, the first line of a connection: `hvsock-stress up BYTES SEED
/// START`. Any other connection is echoed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StressRequest {
    pub(super) way: Way,
    pub(super) bytes: u64,
    pub(super) seed: u64,
    /// The position in the data at which it begins.
    pub(super) start: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// The client sends, and the server answers with a line: `ok`, or what was wrong.
    Up,
    /// The server sends.
    Down,
}

pub(super) const MARK: &[u8] = b"hvsock-stress ";

/// The maximum length of a request in bytes.
pub(super) const LONGEST_LINE: usize = 128;

impl fmt::Display for StressRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = match self.way {
            Way::Up => "up",
            Way::Down => "down",
        };
        let StressRequest {
            bytes, seed, start, ..
        } = self;
        writeln!(f, "hvsock-stress {way} {bytes} {seed} {start}")
    }
}

impl FromStr for StressRequest {
    type Err = ();

    fn from_str(line: &str) -> Result<StressRequest, ()> {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let ["hvsock-stress", way, bytes, seed, start] = words[..] else {
            return Err(());
        };
        let number = |word: &str| word.parse().map_err(|_| ());
        Ok(StressRequest {
            way: match way {
                "up" => Way::Up,
                "down" => Way::Down,
                _ => return Err(()),
            },
            bytes: number(bytes)?,
            seed: number(seed)?,
            start: number(start)?,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_place() {
        let data = Data::new(7);
        for start in [0, 5, BLOCK as u64 - 3, 3 * BLOCK as u64 + 17] {
            let mut bytes = Vec::new();
            while bytes.len() < 3000 {
                let more = data.at(start + bytes.len() as u64, 1000);
                bytes.extend_from_slice(more);
            }
            assert_eq!(data.difference(start, &bytes), None);
            bytes[2500] ^= 1;
            assert_eq!(data.difference(start, &bytes), Some(start + 2500));
            bytes[2500] ^= 1;
            // A buffer is lost.
            bytes.drain(512..1024);
            let found = data.difference(start, &bytes).unwrap();
            assert!((start + 512..start + 520).contains(&found), "{found}");
        }
        assert_ne!(data.at(0, 64), Data::new(8).at(0, 64));
    }

    #[test]
    fn a_request_is_understood_and_nothing_else_is_taken_for_one() {
        let request = StressRequest {
            way: Way::Down,
            bytes: 1 << 40,
            seed: u64::MAX,
            start: 9,
        };
        assert_eq!(request.to_string().parse(), Ok(request));
        assert!(request.to_string().as_bytes().starts_with(MARK));
        let longest = StressRequest {
            bytes: u64::MAX,
            start: u64::MAX,
            ..request
        };
        assert!(longest.to_string().len() < LONGEST_LINE);
        for line in [
            "",
            "hvsock-stress",
            "hvsock-stress up 1 2",
            "hvsock-stress sideways 1 2 3",
            "hvsock-stress up 1 2 -3",
        ] {
            assert_eq!(line.parse::<StressRequest>(), Err(()), "{line}");
        }
    }
}
