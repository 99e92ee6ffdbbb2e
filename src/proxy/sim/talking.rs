//! How a peer says and hears, and what of it is told the judge.

use std::io::ErrorKind;
use std::rc::Rc;
use std::time::Duration;

use super::stage::Stage;
use super::talk::{Ends, Exit, Finish, Talk, byte};

impl Talk {
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
