//! What a peer of the proxy says on one connection, what it hears, and with which manners.
//!
//! What a peer says can be told from all else: four bytes with its number, and then bytes that
//! follow from the number and their place. So who hears them knows whose they are, and whether one
//! is missing, doubled, or another's.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::time::Duration;

use fastrand::Rng;

use super::kernel::SocketId;

/// Whose speech it is.
pub(super) type Voice = u32;

/// The `i`th byte that a voice says.
pub(super) fn byte(voice: Voice, i: u64) -> u8 {
    match usize::try_from(i) {
        Ok(i @ 0..4) => voice.to_le_bytes()[i],
        _ => ((i ^ (u64::from(voice) << 32)).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8,
    }
}

/// Hears one voice, and knows it by its first four bytes.
#[derive(Clone, Debug, Default)]
pub(super) struct Ear {
    first: Vec<u8>,
    pub(super) heard: u64,
}

impl Ear {
    pub(super) fn voice(&self) -> Option<Voice> {
        let first = self.first.as_slice().try_into().ok()?;
        Some(Voice::from_le_bytes(first))
    }

    /// Takes what comes next; panics if it is not what that voice says.
    pub(super) fn hear(&mut self, bytes: &[u8]) {
        for &heard in bytes {
            if self.first.len() < 4 {
                self.first.push(heard);
            } else if let Some(voice) = self.voice() {
                let right = byte(voice, self.heard);
                assert_eq!(heard, right, "byte {} of voice {voice}", self.heard);
            }
            self.heard += 1;
        }
    }
}

/// How a peer goes when something has come to pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    Reset,
    Close,
}

/// When a peer ends what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ends {
    /// It half-closes when it has said all.
    WhenSaid,
    /// It half-closes when the other has ended, and all is said.
    AfterOther,
    /// It says no more, and stays.
    Never,
    /// It closes when it has said all, whatever comes.
    Closes,
}

/// How a peer behaves.
#[derive(Clone, Debug)]
pub(super) struct Manner {
    /// Bytes that it says by itself: none, or four and more.
    pub(super) says: u64,
    /// It says them only when the other has ended.
    pub(super) answers: bool,
    /// It says what it hears.
    pub(super) echoes: bool,
    pub(super) ends: Ends,
    /// It reads no more after so many bytes.
    pub(super) reads: u64,
    /// It goes after it has heard and said so many bytes.
    pub(super) vanishes: Option<(u64, Exit)>,
    /// It waits so long before it says or hears the next piece, at most.
    pub(super) pause: Duration,
    /// It says and hears so many bytes at a time, at most.
    pub(super) piece: usize,
    /// It closes after so long, whatever is.
    pub(super) patience: Option<Duration>,
    /// Some of what it says is urgent.
    pub(super) urgent: bool,
}

impl Manner {
    /// One that says so much and ends when it has said it, reads all, and ends late.
    pub(super) fn orderly(says: u64, piece: usize) -> Manner {
        Manner {
            says,
            answers: false,
            echoes: false,
            ends: Ends::WhenSaid,
            reads: u64::MAX,
            vanishes: None,
            pause: Duration::ZERO,
            piece,
            patience: None,
            urgent: false,
        }
    }
}

/// How a talk has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finish {
    /// It read an EOF, and had said all.
    Eof,
    /// It was told an error.
    Broken(ErrorKind),
    /// It left by itself.
    Left(Exit),
}

/// One peer's end of a connection.
#[derive(Debug)]
pub(super) struct Talk {
    pub(super) socket: SocketId,
    pub(super) voice: Voice,
    pub(super) manner: Manner,
    pub(super) ear: Ear,
    pub(super) said: u64,
    /// What is to be said back.
    pub(super) echo: VecDeque<u8>,
    /// Its half-close is sent.
    pub(super) half_closed: bool,
    pub(super) heard_end: bool,
    /// It could not say all: the other takes nothing more.
    pub(super) is_gagged: bool,
    pub(super) finish: Option<Finish>,
    pub(super) begun: Duration,
    pub(super) not_before: Duration,
    pub(super) rng: Rng,
}

impl Talk {
    pub(super) fn new(
        socket: SocketId,
        voice: Voice,
        manner: Manner,
        rng: Rng,
        now: Duration,
    ) -> Talk {
        Talk {
            socket,
            voice,
            manner,
            ear: Ear::default(),
            said: 0,
            echo: VecDeque::new(),
            half_closed: false,
            heard_end: false,
            is_gagged: false,
            finish: None,
            begun: now,
            not_before: now,
            rng,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.finish.is_some()
    }
}
