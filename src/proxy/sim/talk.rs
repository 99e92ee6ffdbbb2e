//! What a peer of the proxy says on one connection, what it hears, and with which manners.
//!
//! What a peer says can be told from all else: four bytes with its number, and then bytes that follow
//! from the number and their place. So who hears them knows whose they are, and whether one is
//! missing, doubled, or another's.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::rc::Rc;
use std::time::Duration;

use fastrand::Rng;

use super::kernel::SocketId;
use super::stage::Stage;

/// Whose speech it is.
pub(super) type Voice = u32;

/// The `i`th byte that a voice says.
fn byte(voice: Voice, i: u64) -> u8 {
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
    fn hear(&mut self, bytes: &[u8]) {
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
    /// One that says so much and ends when it has said it, hears all, and is in no hurry to leave.
    pub(super) fn polite(says: u64, piece: usize) -> Manner {
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
    echo: VecDeque<u8>,
    /// Its half-close is sent.
    pub(super) half_closed: bool,
    pub(super) heard_end: bool,
    /// It could not say all: the other takes nothing more.
    pub(super) is_gagged: bool,
    pub(super) finish: Option<Finish>,
    begun: Duration,
    not_before: Duration,
    rng: Rng,
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

    /// Whether all is said that is to be said, as far as is known.
    fn has_said_all(&self) -> bool {
        match self.manner.echoes {
            true => self.echo.is_empty() && self.heard_end,
            false if self.manner.answers && !self.heard_end => false,
            false => self.said >= self.manner.says,
        }
    }

    /// Says and hears a piece; returns when to go on without an event.
    pub(super) fn act(&mut self, stage: &Rc<Stage>) -> Option<Duration> {
        if self.is_over() {
            return None;
        }
        let now = stage.now();
        if let Some(patience) = self.manner.patience
            && now >= self.begun + patience
        {
            self.leave(stage, Exit::Close);
            return None;
        }
        let deadline = self.manner.patience.map(|patience| self.begun + patience);
        if now < self.not_before {
            return Some(deadline.map_or(self.not_before, |at| at.min(self.not_before)));
        }
        let moved = match self.rng.bool() {
            true => self.hear(stage) | self.say(stage),
            false => self.say(stage) | self.hear(stage),
        };
        self.end(stage);
        if self.is_over() {
            return None;
        }
        if !moved {
            return deadline;
        }
        if !self.manner.pause.is_zero() {
            let pause = self.rng.u64(0..=self.manner.pause.as_micros() as u64);
            self.not_before = now + Duration::from_micros(pause);
        }
        Some(self.not_before.max(now))
    }

    fn hear(&mut self, stage: &Rc<Stage>) -> bool {
        if self.is_over() || self.heard_end || self.ear.heard >= self.manner.reads {
            return false;
        }
        // What can't be said back yet is not read.
        let echoes = self.manner.echoes && !self.is_gagged;
        if echoes && self.echo.len() > 4 * self.manner.piece {
            return false;
        }
        let left = self.manner.reads - self.ear.heard;
        let most = self.rng.usize(1..=self.manner.piece);
        let mut buffer = vec![0; most.min(usize::try_from(left).unwrap_or(usize::MAX))];
        let read = stage.kernel().read(self.socket, &mut buffer);
        match read {
            Ok(0) => {
                self.heard_end = true;
                stage.judge().heard_end(self);
                true
            }
            Ok(n) => {
                self.ear.hear(&buffer[..n]);
                if echoes {
                    self.echo.extend(&buffer[..n]);
                }
                stage.judge().heard(self);
                true
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => false,
            Err(e) => {
                self.break_off(stage, e.kind());
                true
            }
        }
    }

    fn say(&mut self, stage: &Rc<Stage>) -> bool {
        if self.is_over() || self.half_closed {
            return false;
        }
        let most = self.rng.usize(1..=self.manner.piece);
        let bytes: Vec<u8> = if self.manner.echoes {
            self.echo.iter().copied().take(most).collect()
        } else if self.manner.answers && !self.heard_end {
            return false;
        } else {
            let end = self.manner.says.min(self.said + most as u64);
            (self.said..end).map(|i| byte(self.voice, i)).collect()
        };
        if bytes.is_empty() {
            return false;
        }
        let written = stage.kernel().write(self.socket, &bytes);
        match written {
            Ok(n) => {
                if self.manner.urgent && self.rng.u8(..4) == 0 {
                    stage.kernel().mark_urgent(self.socket);
                }
                self.said += n as u64;
                if self.manner.echoes {
                    self.echo.drain(..n);
                }
                true
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => false,
            // What the other still says can be heard, as long as nobody has reset.
            Err(e) if e.kind() == ErrorKind::BrokenPipe && !self.heard_end => {
                (self.half_closed, self.is_gagged) = (true, true);
                true
            }
            Err(e) => {
                self.break_off(stage, e.kind());
                true
            }
        }
    }

    fn end(&mut self, stage: &Rc<Stage>) {
        if self.is_over() {
            return;
        }
        if let Some((after, exit)) = self.manner.vanishes
            && self.said + self.ear.heard >= after
        {
            return self.leave(stage, exit);
        }
        if !self.half_closed && self.has_said_all() {
            match self.manner.ends {
                Ends::WhenSaid => self.half_close(stage),
                Ends::AfterOther if self.heard_end => self.half_close(stage),
                Ends::Closes => return self.leave(stage, Exit::Close),
                Ends::AfterOther | Ends::Never => {}
            }
        }
        if self.half_closed && self.heard_end && !self.is_over() {
            self.finish = Some(Finish::Eof);
            stage.judge().finished(self, stage.now());
            stage.kernel().close(self.socket);
        }
    }

    fn half_close(&mut self, stage: &Rc<Stage>) {
        self.half_closed = true;
        // It may have been reset meanwhile: the next read tells.
        let _ = stage.kernel().shutdown_write(self.socket);
        stage.judge().half_closed(self);
    }

    fn break_off(&mut self, stage: &Rc<Stage>, kind: ErrorKind) {
        let kernel = stage.kernel();
        let lost = kernel.lost(self.socket);
        drop(kernel);
        let reads_all = self.manner.reads == u64::MAX && self.manner.pause.is_zero();
        stage
            .verdicts()
            .check_loss(self, lost.filter(|_| reads_all));
        self.finish = Some(Finish::Broken(kind));
        stage.judge().finished(self, stage.now());
        stage.kernel().close(self.socket);
    }

    pub(super) fn leave(&mut self, stage: &Rc<Stage>, exit: Exit) {
        if self.is_over() {
            return;
        }
        self.finish = Some(Finish::Left(exit));
        stage.judge().finished(self, stage.now());
        match exit {
            Exit::Reset => stage.kernel().reset(self.socket),
            Exit::Close => stage.kernel().close(self.socket),
        }
    }
}
