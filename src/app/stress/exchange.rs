//! A connection of a client: sends, compares, and ends it.

use std::io::{self, Read, Write};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::app::serve::{LOOK, Stop, completed};
use crate::stream::Stream;
use crate::sys::Wanted;

use super::data::{Data, MARK, StressRequest, Way};
use super::{Load, StressPlan, StressProgress};

const ONLY_ECHOES: &str = "the server only echoes: this load wants a `hvsock stress --server`";

/// What a connection has transferred, and how fast.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TransferResult {
    pub(super) sent: u64,
    pub(super) received: u64,
    /// The time from the dial to the first received byte.
    pub(super) first_byte: Option<Duration>,
}

/// A connection, and its state.
#[derive(Debug)]
pub(super) struct Exchange<'a> {
    pub(super) plan: &'a StressPlan,
    pub(super) stream: &'a Stream,
    pub(super) data: &'a Data,
    pub(super) stop: &'a Stop,
    pub(super) progress: &'a StressProgress,
    pub(super) rng: fastrand::Rng,
    /// The position in the data at which it begins.
    pub(super) start: u64,
    /// When the dial began.
    pub(super) dialled: Instant,
    /// When a byte was last sent or received.
    pub(super) moved: Instant,
    pub(super) done: TransferResult,
}

impl Exchange<'_> {
    /// Runs the plan's load to its end. Calls `told` with the time of each round trip.
    ///
    /// # Errors
    /// Returns what went wrong, for people.
    pub(super) fn run(&mut self, told: impl FnMut(Duration)) -> Result<(), String> {
        let nonblocking = self.stream.set_nonblocking(true);
        nonblocking.map_err(|e| e.to_string())?;
        let size = self.rng.u64(self.plan.size.clone());
        match self.plan.load {
            Load::Echo => self.echo(size),
            Load::Up => self.upload(size),
            Load::Down => self.download(size),
            Load::RoundTrips(count) => self.round_trips(count, size, told),
        }
    }

    fn echo(&mut self, size: u64) -> Result<(), String> {
        let mut buffer = self.buffer();
        let mut half_closed = false;
        loop {
            let mut wanted = Wanted::Readable;
            let mut idle = true;
            if self.done.sent < size {
                idle = !self.write_some(size)?;
                wanted = Wanted::Either;
            } else if !half_closed && (!self.held() || self.done.received == size) {
                if !self.stream.has_half_close() {
                    return self.check_length(size);
                }
                half_closed = true;
                self.half_close()?;
            }
            let len = self.next_read_size(&buffer);
            match completed((&*self.stream).read(&mut buffer[..len])) {
                Ok(None) => {}
                Ok(Some(0)) => return self.check_length(size),
                Ok(Some(n)) => {
                    idle = false;
                    self.compare(&buffer[..n], size)?;
                }
                // A VMM that ends both directions at once may do so by a reset.
                Err(_) if half_closed && self.held() => return self.check_length(size),
                Err(e) => return Err(self.describe_error(&e)),
            }
            if idle {
                self.wait(wanted)?;
            }
        }
    }

    fn upload(&mut self, size: u64) -> Result<(), String> {
        self.send_request(Way::Up, size)?;
        while self.done.sent < size {
            if !self.write_some(size)? {
                self.wait(Wanted::Writable)?;
            }
        }
        let mut answer = Vec::new();
        self.read_line(&mut answer)?;
        if answer.starts_with(MARK) {
            return Err(ONLY_ECHOES.to_owned());
        }
        if answer != b"ok\n" {
            let answer = String::from_utf8_lossy(&answer);
            return Err(format!("the server says: {}", answer.trim_end()));
        }
        self.half_close_and_drain()
    }

    fn download(&mut self, size: u64) -> Result<(), String> {
        self.send_request(Way::Down, size)?;
        let mut buffer = self.buffer();
        while self.done.received < size {
            let len = self.next_read_size(&buffer);
            let n = self.read_some(&mut buffer[..len])?;
            self.compare(&buffer[..n], size)?;
        }
        self.half_close_and_drain()
    }

    fn round_trips(
        &mut self,
        count: u64,
        size: u64,
        mut told: impl FnMut(Duration),
    ) -> Result<(), String> {
        let mut buffer = vec![0; usize::try_from(size).unwrap_or(usize::MAX).max(1)];
        for trip in 1..=count {
            let begun = Instant::now();
            while self.done.sent < trip * size {
                if !self.write_some(trip * size)? {
                    self.wait(Wanted::Writable)?;
                }
            }
            while self.done.received < trip * size {
                let left = (trip * size - self.done.received) as usize;
                let n = self.read_some(&mut buffer[..left])?;
                self.compare(&buffer[..n], trip * size)?;
            }
            told(begun.elapsed());
            if self.stop.is_asked() {
                break;
            }
        }
        self.half_close_and_drain()
    }

    /// Half-closes, and reads to the server's EOF.
    fn half_close_and_drain(&mut self) -> Result<(), String> {
        // Without a half-close, the close ends the connection.
        if !self.stream.has_half_close() {
            return Ok(());
        }
        self.half_close()?;
        loop {
            match completed((&*self.stream).read(&mut [0; 64])) {
                Ok(Some(0)) => return Ok(()),
                Ok(Some(_)) => return Err("more came than was asked for".to_owned()),
                Ok(None) => self.wait(Wanted::Readable)?,
                Err(_) if self.held() => return Ok(()),
                Err(e) => return Err(self.describe_error(&e)),
            }
        }
    }

    fn half_close(&self) -> Result<(), String> {
        let done = self.stream.half_close();
        done.map_err(|e| format!("half-close: {}", self.describe_error(&e)))
    }

    fn held(&self) -> bool {
        self.stream.half_close_ends_both()
    }

    fn send_request(&mut self, way: Way, bytes: u64) -> Result<(), String> {
        let request = StressRequest {
            way,
            bytes,
            seed: self.data.seed,
            start: self.start,
        };
        let line = request.to_string();
        let mut rest = line.as_bytes();
        while !rest.is_empty() {
            match completed((&*self.stream).write(rest)).map_err(|e| self.describe_error(&e))? {
                Some(n) => rest = &rest[n..],
                None => self.wait(Wanted::Writable)?,
            }
        }
        Ok(())
    }

    fn read_line(&mut self, line: &mut Vec<u8>) -> Result<(), String> {
        let mut byte = [0];
        while !line.ends_with(b"\n") && line.len() < 256 {
            self.read_some(&mut byte)?;
            line.push(byte[0]);
        }
        Ok(())
    }

    /// Writes at most a buffer up to the position `until`, if there is room. Returns whether there
    /// was.
    fn write_some(&mut self, until: u64) -> Result<bool, String> {
        let most = self.rng.u64(self.plan.buffer.clone());
        let len = most.min(until - self.done.sent);
        let bytes = self.data.at(self.start + self.done.sent, len);
        match completed((&*self.stream).write(bytes)).map_err(|e| self.describe_error(&e))? {
            Some(n) => {
                self.done.sent += n as u64;
                self.count_sent(n);
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Waits for bytes, and reads them.
    fn read_some(&mut self, buffer: &mut [u8]) -> Result<usize, String> {
        loop {
            match completed((&*self.stream).read(buffer)).map_err(|e| self.describe_error(&e))? {
                Some(0) => return Err(self.describe_eof()),
                Some(n) => return Ok(n),
                None => self.wait(Wanted::Readable)?,
            }
        }
    }

    fn count_sent(&mut self, bytes: usize) {
        self.moved = Instant::now();
        self.progress
            .moved
            .fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn count_received(&mut self, bytes: usize) {
        self.count_sent(bytes);
        let first = self.moved.duration_since(self.dialled);
        self.done.first_byte.get_or_insert(first);
    }

    /// Compares received bytes with the expected ones, of which there are `size`.
    fn compare(&mut self, bytes: &[u8], size: u64) -> Result<(), String> {
        self.count_received(bytes.len());
        let at = self.start + self.done.received;
        self.done.received += bytes.len() as u64;
        if self.done.received > size {
            return Err("more came back than was sent".to_owned());
        }
        match self.data.difference(at, bytes) {
            None => Ok(()),
            Some(_) if self.plan.load == Load::Down && bytes.starts_with(MARK) => {
                Err(ONLY_ECHOES.to_owned())
            }
            Some(differs) => Err(format!(
                "MISMATCH: byte {} is not the one that was sent",
                differs - self.start
            )),
        }
    }

    /// Checks the number of received bytes after the server's end.
    fn check_length(&self, size: u64) -> Result<(), String> {
        if self.done.received == size && self.done.sent == size {
            return Ok(());
        }
        Err(self.describe_eof())
    }

    fn describe_eof(&self) -> String {
        if self.done.received == 0 && self.stream.address().transport().refusal.by_eof().is_some() {
            return crate::dial::refused_by_eof(self.stream.address()).to_string();
        }
        "the server ended it early".to_owned()
    }

    fn describe_error(&self, error: &io::Error) -> String {
        use io::ErrorKind::{BrokenPipe, ConnectionReset};
        match error.kind() {
            // The result of a refusal after bytes were sent.
            BrokenPipe | ConnectionReset if self.done.received == 0 => self.describe_eof(),
            _ => error.to_string(),
        }
    }

    /// Waits until the socket is ready.
    fn wait(&mut self, wanted: Wanted) -> Result<(), String> {
        let ready = self.stream.wait(wanted, LOOK).map_err(|e| e.to_string())?;
        if self.stop.is_urgent() {
            return Err("interrupted".to_owned());
        }
        if !ready && self.moved.elapsed() >= self.plan.timeout {
            let seconds = self.plan.timeout.as_secs();
            return Err(format!("nothing moved for {seconds} s"));
        }
        Ok(())
    }

    fn buffer(&self) -> Vec<u8> {
        vec![0; usize::try_from(*self.plan.buffer.end()).unwrap_or(usize::MAX)]
    }

    /// Returns how many bytes to read next.
    fn next_read_size(&mut self, buffer: &[u8]) -> usize {
        let len = self.rng.u64(self.plan.buffer.clone());
        usize::try_from(len).unwrap_or(usize::MAX).min(buffer.len())
    }
}
