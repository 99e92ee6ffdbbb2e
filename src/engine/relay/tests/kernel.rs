//! A fake kernel: sockets with bounded queues, peers that follow a script, and an edge-triggered
//! poller.
//!
//! A [`Wire`] is one connection as the kernel sees it. `incoming` is the relay's receive queue,
//! `outgoing` what the relay has written and the peer has not read. The relay holds the one end as
//! a [`FakeSocket`]; the peer at the other end either moves by itself (a [`Script`], at random,
//! also in the middle of the relay's calls) or is moved by a named case (`say`, `fin`, `reset`,
//! `hear`, …).
//!
//! What it imitates:
//! - **Kernel edges** (epoll, kqueue; `FakeSocket<true>`). A wire is due an event when data or EOF
//!   or an error comes, and when a third of the send queue is free again after a write was short or
//!   would have blocked; not before. The event says all that is so (epoll), or only what has
//!   changed (kqueue, `terse`). A read is short only if the queue was drained.
//! - **Emulated edges** (mio on poll(2) and Windows; `FakeSocket<false>`). What an event has said
//!   it says no more until a call has returned `WouldBlock`, which arms both directions. Reads and
//!   writes may be short for no reason.
//! - `Interrupted`, now and then.
//! - A reset: what was queued for the peer is lost; what it had sent can still be read, or not
//!   (`reset_purges`). The error is told **once**: to the next read or, on Linux' TCP, to the next
//!   call, be it a write (`write_takes_error`). After that a read finds EOF and a write EPIPE,
//!   whatever happened. (Tried on Linux 6: `send` → ECONNRESET, `recv` → what was queued, `recv` →
//!   0.)
//! - A peer that shut its receiving side: writes fail with EPIPE while reads go on.
//! - A close with data unread, or with data that comes later: the peer is reset, and loses what it
//!   hasn't read.
//! - macOS' Unix sockets (`hides_resets`): a peer that closes with data unread has ended like any
//!   other, a half-close to who has closed fails, and what is written to a peer that shut its
//!   receiving side goes nowhere.
//!
//! The wire itself asserts what no schedule may break: each side gets its bytes once and in order,
//! nothing is written after a half-close or an error, nothing read after EOF or an error, and no
//! half-close is sent twice.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::rc::Rc;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::engine::relay::{Pipe, Readiness, Side, Socket};

/// The `i`th byte that the peer at `side` sends.
fn byte(side: Side, i: u64) -> u8 {
    (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8 ^ (side as u8 * 85)
}

/// What a kernel may do one way or the other.
#[derive(Clone, Debug)]
pub(super) struct Habits {
    pub(super) receive_queue: usize,
    pub(super) send_queue: usize,
    /// A reset takes what the relay has not read yet (BSD, Windows).
    pub(super) reset_purges: bool,
    /// The error of a reset is told to a write, if that is the next call (Linux' TCP).
    pub(super) write_takes_error: bool,
    /// An event says only what has changed (kqueue).
    pub(super) terse: bool,
    /// Interrupts calls and shortens them, where that is allowed.
    pub(super) nervous: bool,
    /// Urgent data stands behind so many bytes: a read ends there, the next one goes past it, and a
    /// splice never does. Where [`drains`](Habits::drains) says that short reads can be trusted, an
    /// event tells of it.
    pub(super) mark: Option<usize>,
    /// The peer sends urgent data now and then.
    pub(super) urgent: bool,
    /// But for a mark, a read takes all there is, as of Linux' TCP.
    pub(super) drains: bool,
    /// Its bytes can go through pipes.
    pub(super) splices: bool,
    /// Neither bytes left unread nor a receiving side that was shut are told (macOS' Unix sockets).
    pub(super) hides_resets: bool,
}

/// A calm kernel with room for everything.
impl Default for Habits {
    fn default() -> Habits {
        Habits {
            receive_queue: 1 << 20,
            send_queue: 1 << 20,
            reset_purges: false,
            write_takes_error: false,
            terse: false,
            nervous: false,
            mark: None,
            urgent: false,
            drains: false,
            splices: false,
            hides_resets: false,
        }
    }
}

/// How a peer ends what it sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// EOF; it still reads.
    HalfClose,
    /// EOF, and nobody reads any more; a reset if something was unread.
    Close,
    Reset,
    /// It says no more and stays.
    Never,
}

/// What a peer does.
#[derive(Clone, Debug)]
pub(super) struct Script {
    pub(super) sends: u64,
    pub(super) ending: Ending,
    /// Ends only when it has read EOF, or was reset.
    pub(super) waits: bool,
    /// The most that it sends or reads at a time.
    pub(super) piece: usize,
    /// Shuts its receiving side after so many bytes.
    pub(super) turns_deaf: Option<u64>,
    /// Reads no more after so many bytes, but stays.
    pub(super) stalls: Option<u64>,
    /// Resets after it has read so many bytes.
    pub(super) vanishes: Option<u64>,
}

#[derive(Debug)]
pub(super) struct Wire {
    pub(super) side: Side,
    pub(super) habits: Habits,
    script: Option<Script>,
    rng: Rng,

    incoming: VecDeque<u8>,
    outgoing: VecDeque<u8>,
    /// The peer has sent EOF.
    pub(super) fin: bool,
    /// The peer takes nothing more: writes fail.
    pub(super) deaf: bool,
    /// The peer has closed, and no reset has told of it.
    left: bool,
    /// The peer is gone: nothing comes or goes.
    pub(super) gone: bool,
    /// Why, until it was told.
    error: Option<ErrorKind>,

    /// What the peer has sent, and read.
    pub(super) sent: u64,
    pub(super) heard: u64,
    /// The peer read EOF, clean.
    pub(super) saw_eof: bool,
    /// The peer was reset.
    pub(super) saw_reset: bool,

    /// What the relay has read, and written.
    pub(super) read: u64,
    pub(super) written: u64,
    /// Calls the relay made.
    pub(super) calls: u64,
    /// Half-closes the relay sent.
    pub(super) half_closes: u32,
    /// A read said EOF or an error: there is nothing to ask any more.
    pub(super) read_ended: bool,
    /// What read errors, and write errors, the relay was told.
    pub(super) read_error: Option<ErrorKind>,
    pub(super) write_error: Option<ErrorKind>,
    closed: bool,

    /// Kernel edges: what has changed since the last event.
    raised: Readiness,
    /// A write was short or would have blocked: room will be an edge.
    blocked: bool,
    /// Emulated edges: what the next event may say.
    armed: Readiness,
}

impl Wire {
    pub(super) fn new(side: Side, habits: Habits, script: Option<Script>, rng: Rng) -> Wire {
        let both = Readiness {
            readable: true,
            writable: true,
            ..Readiness::default()
        };
        Wire {
            side,
            habits,
            script,
            rng,
            incoming: VecDeque::new(),
            outgoing: VecDeque::new(),
            fin: false,
            deaf: false,
            left: false,
            gone: false,
            error: None,
            sent: 0,
            heard: 0,
            saw_eof: false,
            saw_reset: false,
            read: 0,
            written: 0,
            calls: 0,
            half_closes: 0,
            read_ended: false,
            read_error: None,
            write_error: None,
            closed: false,
            // Registering raises what is so.
            raised: both,
            blocked: false,
            armed: both,
        }
    }

    // What the peer does.

    /// Sends `n` bytes; fewer if the queue is full. What is sent to a closed socket is answered by
    /// a reset.
    pub(super) fn say(&mut self, n: usize) {
        assert!(!self.fin && !self.gone);
        if self.closed {
            return self.be_reset();
        }
        for _ in 0..n.min(self.habits.receive_queue - self.incoming.len()) {
            self.incoming.push_back(byte(self.side, self.sent));
            self.sent += 1;
        }
        if self.habits.urgent && self.habits.mark.is_none() && self.chance(4) {
            self.habits.mark = Some(self.incoming.len());
        }
        self.raised.readable = true;
    }

    pub(super) fn fin(&mut self) {
        self.fin = true;
        self.raised.readable = true;
    }

    pub(super) fn close(&mut self) {
        if self.outgoing.is_empty() || self.habits.hides_resets {
            self.fin();
            self.turn_deaf();
            self.left = true;
        } else {
            self.reset(ErrorKind::ConnectionReset);
        }
    }

    /// Vanishes. After an orderly EOF no error is left to be told to a read.
    pub(super) fn reset(&mut self, error: ErrorKind) {
        self.gone = true;
        self.outgoing.clear();
        if self.habits.reset_purges {
            self.incoming.clear();
        }
        if !self.fin || self.habits.reset_purges {
            self.error = Some(error);
        }
        self.raised.readable = true;
        self.raised.writable = true;
    }

    /// Shuts its receiving side.
    pub(super) fn turn_deaf(&mut self) {
        self.deaf = true;
        self.outgoing.clear();
        self.raised.writable = true;
    }

    /// Reads at most `n` bytes, each the right one, or EOF.
    pub(super) fn hear(&mut self, n: usize) {
        for _ in 0..n.min(self.outgoing.len()) {
            let heard = self.outgoing.pop_front().unwrap();
            let right = byte(self.side.other(), self.heard);
            assert_eq!(heard, right, "byte {} to {:?}", self.heard, self.side);
            self.heard += 1;
        }
        if self.blocked && self.has_room() {
            self.blocked = false;
            self.raised.writable = true;
        }
        if self.outgoing.is_empty() && self.half_closes > 0 && !self.saw_reset {
            self.saw_eof = true;
        }
    }

    /// Whether the peer reads at all.
    pub(super) fn listens(&self) -> bool {
        let stalled = |script: &Script| script.stalls.is_some_and(|at| self.heard >= at);
        !self.deaf && !self.gone && !self.saw_reset && !self.script.as_ref().is_some_and(stalled)
    }

    fn hears(&self) -> bool {
        let eof = self.half_closes > 0 && !self.saw_eof;
        self.listens() && (!self.outgoing.is_empty() || eof)
    }

    fn speaks(&self) -> bool {
        let Some(script) = &self.script else {
            return false;
        };
        if self.fin || self.gone || self.saw_reset {
            return false;
        }
        if self.sent < script.sends {
            return self.closed || self.incoming.len() < self.habits.receive_queue;
        }
        script.ending != Ending::Never && (!script.waits || self.saw_eof || self.deaf)
    }

    /// Whether the peer has something to do without the relay.
    pub(super) fn is_busy(&self) -> bool {
        self.script.is_some() && (self.hears() || self.speaks())
    }

    /// Lets the peer do one thing of its script.
    pub(super) fn tick(&mut self) {
        let Some(script) = self.script.clone() else {
            return;
        };
        let piece = self.rng.usize(1..=script.piece);
        if self.speaks() && self.rng.bool() {
            let left = script.sends - self.sent;
            if left > 0 {
                self.say(piece.min(left as usize));
            }
            // At times the end comes together with the last bytes.
            let ends = self.speaks() && self.sent == script.sends;
            if ends && (left == 0 || self.rng.bool()) {
                match script.ending {
                    Ending::HalfClose => self.fin(),
                    Ending::Close => self.close(),
                    Ending::Reset => self.reset(ErrorKind::ConnectionReset),
                    Ending::Never => unreachable!(),
                }
            }
        } else if self.hears() {
            self.hear(piece);
        }
        let reached = |at: Option<u64>| at.is_some_and(|at| self.heard >= at);
        if !self.gone && reached(script.vanishes) {
            let kinds = [ErrorKind::ConnectionReset, ErrorKind::TimedOut];
            let kind = *self.rng.choice(&kinds).unwrap();
            self.reset(kind);
        } else if !self.deaf && !self.gone && reached(script.turns_deaf) {
            self.turn_deaf();
        }
    }

    // What the proxy does when the relay is done.

    pub(super) fn close_here(&mut self) {
        self.closed = true;
        if !self.incoming.is_empty() {
            self.be_reset();
        } else if self.half_closes == 0 {
            self.half_closes = 1;
        }
    }

    pub(super) fn reset_here(&mut self) {
        self.closed = true;
        self.be_reset();
    }

    fn be_reset(&mut self) {
        // Who has read EOF already has all it wanted to read.
        self.saw_reset = true;
        self.outgoing.clear();
    }

    // What the poller says.

    fn has_room(&self) -> bool {
        let free = self.habits.send_queue - self.outgoing.len();
        3 * free >= self.habits.send_queue
    }

    fn state(&self) -> Readiness {
        let ended = self.fin || self.gone;
        Readiness {
            readable: !self.incoming.is_empty() || ended,
            writable: self.has_room() || self.deaf || self.gone,
            failed: self.gone,
            hidden: ended,
            urgent: self.habits.mark.is_some(),
        }
    }

    /// The event that the poller has for this wire.
    pub(super) fn poll(&mut self, kernel_edges: bool) -> Option<Readiness> {
        let state = self.state();
        let masked = |by: Readiness| Readiness {
            readable: state.readable && by.readable,
            writable: state.writable && by.writable,
            failed: state.failed && by.readable,
            hidden: state.hidden && by.readable,
            urgent: state.urgent && by.readable,
        };
        let event = if !kernel_edges {
            let event = masked(self.armed);
            self.armed.readable &= !event.readable;
            self.armed.writable &= !event.writable;
            event
        } else {
            let raised = std::mem::take(&mut self.raised);
            match raised.readable || raised.writable {
                false => Readiness::default(),
                true if self.habits.terse => masked(raised),
                true => state,
            }
        };
        (event.readable || event.writable).then_some(event)
    }

    // What a call meets.

    fn chance(&mut self, one_in: usize) -> bool {
        self.habits.nervous && self.rng.usize(..one_in) == 0
    }

    /// Time passes in a call too.
    fn meanwhile(&mut self) {
        if self.chance(4) {
            self.tick();
        }
    }

    /// Whether what is written to a peer that takes no more is discarded.
    fn goes_nowhere(&self) -> bool {
        self.habits.hides_resets && !self.left
    }

    fn would_block<T>(&mut self) -> io::Result<T> {
        self.armed.readable = true;
        self.armed.writable = true;
        Err(ErrorKind::WouldBlock.into())
    }
}

/// The relay's hold on a [`Wire`].
#[derive(Clone, Debug)]
pub(super) struct FakeSocket<const KERNEL_EDGES: bool>(pub(super) Rc<RefCell<Wire>>);

/// What a byte costs through a buffer and through a pipe.
#[derive(Clone, Copy, Debug)]
pub(super) struct Costs {
    pub(super) copied: Duration,
    pub(super) spliced: Duration,
}

thread_local! {
    /// The time that the calls of this thread have taken.
    static SPENT: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    static COSTS: Cell<Costs> = const {
        Cell::new(Costs {
            copied: Duration::from_micros(2),
            spliced: Duration::from_micros(1),
        })
    };
}

/// Sets what a byte costs from now on, on this thread.
pub(super) fn set_costs(costs: Costs) {
    COSTS.set(costs);
}

fn spend(cost: impl FnOnce(Costs) -> Duration, bytes: usize) {
    SPENT.set(SPENT.get() + cost(COSTS.get()) * bytes as u32);
}

/// Bytes that a pipe holds at most.
pub(super) const PIPE: usize = 48;

/// A pipe, with what it holds.
#[derive(Debug, Default)]
pub(super) struct FakePipe(Vec<u8>);

impl Pipe for FakePipe {
    fn new() -> Option<FakePipe> {
        Some(FakePipe::default())
    }
}

impl FakePipe {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// Calls that cost nothing.
impl<const KERNEL_EDGES: bool> FakeSocket<KERNEL_EDGES> {
    fn take(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wire = &mut *self.0.borrow_mut();
        wire.calls += 1;
        assert!(!buffer.is_empty());
        assert!(!wire.read_ended, "read after the end");
        if wire.chance(16) {
            return Err(ErrorKind::Interrupted.into());
        }
        wire.meanwhile();
        let there = wire.incoming.len().min(buffer.len());
        if there > 0 {
            // A read may end anywhere, as at TCP's urgent mark.
            let mark = wire.habits.mark.take();
            let n = match mark {
                Some(mark @ 1..) => {
                    let n = mark.min(there);
                    wire.habits.mark = Some(mark - n);
                    n
                }
                _ if wire.habits.nervous && !wire.habits.drains => wire.rng.usize(1..=there),
                _ => there,
            };
            for (slot, byte) in buffer.iter_mut().zip(wire.incoming.drain(..n)) {
                *slot = byte;
            }
            wire.read += n as u64;
            wire.meanwhile();
            return Ok(n);
        }
        if let Some(error) = wire.error.take() {
            wire.read_ended = true;
            wire.read_error = Some(error);
            return Err(error.into());
        }
        if wire.fin || wire.gone {
            wire.read_ended = true;
            return Ok(0);
        }
        wire.would_block()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let wire = &mut *self.0.borrow_mut();
        wire.calls += 1;
        assert!(!bytes.is_empty());
        assert_eq!(wire.half_closes, 0, "written after the half-close");
        assert_eq!(wire.write_error, None, "written after an error");
        if wire.chance(16) {
            return Err(ErrorKind::Interrupted.into());
        }
        wire.meanwhile();
        if wire.gone || wire.deaf && !wire.goes_nowhere() {
            let error = match wire.error {
                Some(_) if wire.habits.write_takes_error => wire.error.take(),
                _ => None,
            };
            let error = error.unwrap_or(ErrorKind::BrokenPipe);
            wire.write_error = Some(error);
            return Err(error.into());
        }
        if wire.deaf && wire.goes_nowhere() {
            wire.written += bytes.len() as u64;
            return Ok(bytes.len());
        }
        let room = (wire.habits.send_queue - wire.outgoing.len()).min(bytes.len());
        if room == 0 {
            wire.blocked = true;
            return wire.would_block();
        }
        let n = match KERNEL_EDGES {
            false if wire.habits.nervous => wire.rng.usize(1..=room),
            _ => room,
        };
        wire.blocked |= n < bytes.len();
        wire.outgoing.extend(&bytes[..n]);
        wire.written += n as u64;
        wire.meanwhile();
        Ok(n)
    }
}

impl<const KERNEL_EDGES: bool> Socket for FakeSocket<KERNEL_EDGES> {
    type Pipe = FakePipe;

    const SHORT_WRITE_BLOCKS: bool = KERNEL_EDGES;

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.take(buffer)?;
        spend(|costs| costs.copied, n);
        Ok(n)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.put(bytes)?;
        spend(|costs| costs.copied, n);
        Ok(n)
    }

    fn short_read_blocks(&self) -> bool {
        KERNEL_EDGES && self.0.borrow().habits.drains
    }

    fn has_splice(&self) -> bool {
        self.0.borrow().habits.splices
    }

    fn clock(&self) -> Instant {
        static BEGUN: OnceLock<Instant> = OnceLock::new();
        *BEGUN.get_or_init(Instant::now) + SPENT.get()
    }

    fn splice_in(&mut self, pipe: &mut FakePipe) -> io::Result<usize> {
        assert!(pipe.0.is_empty(), "spliced into a pipe with bytes in it");
        // Linux' splice never gets past TCP's urgent data, and says there what it says at the end.
        if self.0.borrow().habits.mark == Some(0) {
            self.0.borrow_mut().calls += 1;
            return Ok(0);
        }
        // It ends wherever pages do.
        let most = match &mut *self.0.borrow_mut() {
            wire if wire.habits.nervous => wire.rng.usize(1..=PIPE),
            _ => PIPE,
        };
        let mut bytes = vec![0; most];
        let n = self.take(&mut bytes)?;
        spend(|costs| costs.spliced, n);
        if n == 0 {
            // Only a read may be the last one.
            self.0.borrow_mut().read_ended = false;
        }
        bytes.truncate(n);
        pipe.0 = bytes;
        Ok(n)
    }

    fn splice_out(&mut self, pipe: &mut FakePipe, len: usize) -> io::Result<usize> {
        assert_eq!(pipe.len(), len, "not all that the pipe holds");
        let most = match &mut *self.0.borrow_mut() {
            wire if wire.habits.nervous => wire.rng.usize(1..=len),
            _ => len,
        };
        let n = self.put(&pipe.0[..most])?;
        spend(|costs| costs.spliced, n);
        pipe.0.drain(..n);
        Ok(n)
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        let wire = &mut *self.0.borrow_mut();
        wire.calls += 1;
        wire.half_closes += 1;
        assert_eq!(wire.half_closes, 1, "half-closed twice");
        match wire.gone || wire.left && wire.habits.hides_resets {
            true => Err(ErrorKind::NotConnected.into()),
            false => Ok(()),
        }
    }
}
