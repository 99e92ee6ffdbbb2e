//! The relay between two sockets. It passes every byte, every half-close and every failure of one
//! end to the other.
//!
//! It depends on no poller, no clock and no operating system. It uses sockets through [`Socket`],
//! and takes a poller's events through [`End::latch`].
//!
//! # Invariants
//! 1. Readiness is latched: see [`End`]. The end of a splice is believed only when a read says so
//!    too.
//! 2. A carrier is filled only when it is empty: see [`Carrier`]. So memory is bounded,
//!    backpressure is free, EOF never overtakes data, and a `WouldBlock` has one meaning.
//! 3. EOF on one side becomes `shutdown(Write)` on the other, once, after the last byte, unless
//!    [`Pair::withhold_half_close`] keeps it back. Each direction ends by itself; the pair is done
//!    when both are.
//! 4. An error ends its own direction; what the other still holds may arrive. A broken upload is
//!    never turned into a clean EOF: [`CloseMode::Reset`] says where a reset is required.
//! 5. Work per turn is bounded by a budget of bytes; [`PairTurn::Again`] asks for another turn.
//!
//! Invariant 7: an idle connection holds no buffer and no pipe; carriers are borrowed from a
//! [`Pool`] while bytes are in flight.
//!
//! The carrier of a flow with much data is chosen by measurement: see
//! [`Chooser`](chooser::Chooser).

use std::io;

use crate::stream::socket::{Pipe, Socket};

mod carrier;
mod chooser;
mod end;
mod side;
#[cfg(test)]
mod tests;

use carrier::FlowKind;
pub(crate) use carrier::{Carried, Carrier, Pool};
pub(crate) use chooser::Through;
use chooser::{Rest, Span};
pub(crate) use end::{End, Half, Readiness};
pub(crate) use side::Side;

/// How a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PairTurn {
    /// Nothing more can be done before an event.
    Wait,
    /// The budget ran out: another turn is due after the others.
    Again,
    /// Both directions have ended: [`Pair::close_mode`] says how to close each end.
    Done,
}

/// How an end of a finished pair is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CloseMode {
    /// Close: both directions ended cleanly.
    Close,
    /// Read and discard to the EOF, then close. The end is a client that was sent its whole answer,
    /// and still sends to a server that is gone. A close with unread data would destroy the part of
    /// the answer that it has not read yet.
    Linger,
    /// Reset. What the peer was sent broke off, so that a clean EOF would be wrong, or a client is
    /// gone that a server still sends to.
    Reset,
}

impl CloseMode {
    /// Returns how the end of `side` is to be closed. `sent` says whether all was written to it,
    /// with the EOF, or whether that broke off. `input` is how its own data has ended, if it has.
    pub(crate) fn choose(side: Side, sent: Ending, input: Option<Ending>) -> CloseMode {
        match (sent, input) {
            (Ending::Whole, Some(_)) => CloseMode::Close,
            (Ending::Whole, None) if side == Side::Client => CloseMode::Linger,
            // The peer is gone itself, so a reset would reach nobody.
            (Ending::BrokenOff, Some(Ending::BrokenOff)) => CloseMode::Close,
            (Ending::Whole, None) | (Ending::BrokenOff, Some(Ending::Whole) | None) => {
                CloseMode::Reset
            }
        }
    }
}

/// What an EOF means: see [`Pair::doubt_end`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The peer has sent all of its data.
    Whole,
    BrokenOff,
}

/// Which kinds of a source's end may be caused by the end of its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doubt {
    None,
    /// A failure, and an EOF: see [`Pair::doubt_end`].
    End,
    /// A failure alone: see [`Pair::doubt_failure`].
    Failure,
}

/// What an EOF before the first byte means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SilentEnd {
    /// The peer has nothing to send.
    Answers,
    Refuses,
    /// A refusal, unless the peer has read what was delivered: it reads nothing before it accepts.
    RefusesUnread,
}

impl SilentEnd {
    fn refuses<S: Socket>(self, source: &End<S>) -> bool {
        match self {
            SilentEnd::Answers => false,
            SilentEnd::Refuses => true,
            SilentEnd::RefusesUnread => source.is_dead() || !source.socket.peer_took_all(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FlowState {
    Open,
    /// The EOF was passed to the sink.
    Finished,
    /// An error has ended the direction. What the source still sends is read and dropped, to detect
    /// its end.
    Broken,
}

/// One direction of a pair.
#[derive(Debug)]
struct Flow<P> {
    state: FlowState,
    carrier: Carrier<P>,
    /// How much data the last read returned.
    size: Size,
    /// Whether the half-close is held back while the other direction is open.
    is_withheld: bool,
    doubt: Doubt,
    delivered: u64,
    /// How many of the first delivered bytes the source has not sent.
    foreign: u64,
}

/// How much data the reads of a flow return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    /// Little: small messages are cheaper to copy.
    Small,
    /// Less than before. It may still pass through a pipe.
    Medium,
    Bulk,
}

/// A flow whose reads return at least this part of a buffer may pass through a pipe from then on.
const BULK_PART: usize = 2;

/// A flow whose reads return less than this part of a buffer passes through memory again.
const SMALL_PART: usize = 8;

impl Size {
    /// Returns the size of a flow of this size after a read of `bytes`.
    fn after(self, bytes: usize, buffer: usize) -> Size {
        match self {
            _ if bytes >= buffer / BULK_PART => Size::Bulk,
            Size::Medium | Size::Bulk if bytes >= buffer / SMALL_PART => Size::Medium,
            _ => Size::Small,
        }
    }
}

/// The bytes that a flow has delivered in a turn, by carrier.
#[derive(Debug, Default)]
struct Moved {
    /// The kind of the flow when the turn began. All bytes of the turn are counted for it.
    kind: Option<FlowKind>,
    bytes: [u64; 2],
    /// Which carriers were filled or emptied.
    used: [bool; 2],
}

impl Moved {
    /// Returns the carrier that was used, if it was only one.
    fn only(&self) -> Option<Through> {
        let mut used = Through::ALL
            .into_iter()
            .filter(|through| self.used[*through as usize]);
        used.next().filter(|_| used.next().is_none())
    }
}

impl<P: Pipe> Flow<P> {
    fn new() -> Flow<P> {
        Flow {
            state: FlowState::Open,
            carrier: Carrier::Empty,
            size: Size::Small,
            is_withheld: false,
            doubt: Doubt::None,
            delivered: 0,
            foreign: 0,
        }
    }

    /// Ends the direction after an error, and drops what its carrier holds (invariant 4).
    fn break_off(&mut self, pool: &mut Pool<P>) {
        self.carrier.clear(pool);
        self.state = FlowState::Broken;
    }

    /// Returns the kind of the flow, if its bytes may pass through a pipe.
    fn kind<S: Socket<Pipe = P>>(
        &self,
        source: &End<S>,
        sink: &End<S>,
        pool: &Pool<P>,
    ) -> Option<FlowKind> {
        let may = self.size != Size::Small
            && pool.splices()
            && source.has_splice()
            && sink.socket.has_splice();
        may.then(|| FlowKind {
            source: source.socket.cost_class(),
            sink: sink.socket.cost_class(),
            fills_buffers: self.size == Size::Bulk,
        })
    }

    /// Moves at most about `budget` bytes, and measures the cost if the choice of the carrier needs
    /// it. Returns whether more could be moved at once.
    fn run<S: Socket<Pipe = P>>(
        &mut self,
        source: &mut End<S>,
        sink: &mut End<S>,
        pool: &mut Pool<P>,
        budget: usize,
        silent_end: SilentEnd,
    ) -> bool {
        let mut moved = Moved::default();
        let kind = self.kind(source, sink, pool);
        let begun = kind
            .filter(|kind| pool.chooser(*kind).needs_time())
            .map(|_| source.socket.clock());
        moved.kind = kind;
        let more = self.carry(source, sink, pool, budget, silent_end, &mut moved);
        for through in Through::ALL {
            pool.count(through, moved.bytes[through as usize]);
        }
        if let Some(kind) = kind {
            let span = begun.map(|begun| Span {
                begun,
                ended: source.socket.clock(),
            });
            let rest = match more {
                true => Rest::GoesOn,
                false => Rest::Sleeps,
            };
            let bytes = moved.bytes.iter().sum();
            pool.chooser(kind).note(moved.only(), bytes, span, rest);
        }
        more
    }

    /// Moves at most about `budget` bytes. Returns whether more could be moved at once.
    fn carry<S: Socket<Pipe = P>>(
        &mut self,
        source: &mut End<S>,
        sink: &mut End<S>,
        pool: &mut Pool<P>,
        mut budget: usize,
        silent_end: SilentEnd,
        moved: &mut Moved,
    ) -> bool {
        while self.state == FlowState::Open {
            if let Some(through) = self.carrier.through() {
                if !sink.is_writable() {
                    return false;
                }
                let n = match &mut self.carrier {
                    Carrier::Memory { buffer, filled } => sink.write(&buffer[filled.clone()]),
                    Carrier::Pipe { pipe, len } => sink.splice_out(pipe, *len),
                    Carrier::Empty => 0,
                };
                self.delivered += n as u64;
                moved.bytes[through as usize] += n as u64;
                moved.used[through as usize] = true;
                self.carrier.consume(n, pool);
                if matches!(sink.output, Half::Failed(_)) {
                    self.break_off(pool);
                } else if n == 0 && sink.is_writable() {
                    return true;
                }
                continue;
            }
            match source.input {
                Half::Open => {
                    if !source.is_readable() {
                        return false;
                    }
                    if budget == 0 {
                        return true;
                    }
                    budget = budget.saturating_sub(self.fill(source, sink, pool, moved.kind));
                    if let Some(through) = self.carrier.through() {
                        moved.used[through as usize] = true;
                    }
                    if source.is_readable() && self.carrier.is_empty() {
                        return true;
                    }
                    if source.input_ended() && source.received() == 0 && silent_end.refuses(source)
                    {
                        source.input = Half::Failed(io::ErrorKind::ConnectionRefused);
                    }
                }
                Half::Closed if self.is_withheld || self.doubt == Doubt::End => return false,
                // Invariant 3: the carrier is empty here, so the last byte was delivered.
                Half::Closed => {
                    sink.shutdown_write();
                    self.state = FlowState::Finished;
                }
                Half::Failed(_) => self.break_off(pool),
            }
        }
        self.state == FlowState::Broken && source.discard(pool)
    }

    /// Reads once. Returns how many bytes arrived. The flow was of the kind `begun_as` when the
    /// turn began.
    fn fill<S: Socket<Pipe = P>>(
        &mut self,
        source: &mut End<S>,
        sink: &End<S>,
        pool: &mut Pool<P>,
        begun_as: Option<FlowKind>,
    ) -> usize {
        if let Some(kind) = self.kind(source, sink, pool)
            && pool.chooser(begun_as.unwrap_or(kind)).choice() == Through::Pipe
            && let Some(mut pipe) = pool.take_pipe()
        {
            match source.splice_in(&mut pipe) {
                Some(len) => {
                    self.size = self.size.after(len, pool.size());
                    self.carrier = Carrier::Pipe { pipe, len };
                    return len;
                }
                None => pool.give_pipe(pipe),
            }
            if source.has_splice() {
                return 0;
            }
        }
        let mut buffer = pool.take_buffer();
        match source.read(&mut buffer) {
            Some(n) => {
                self.size = self.size.after(n, buffer.len());
                let filled = 0..n;
                self.carrier = Carrier::Memory { buffer, filled };
                n
            }
            None => {
                pool.give_buffer(buffer);
                0
            }
        }
    }
}

/// Two ends and the two directions between them.
#[derive(Debug)]
pub(crate) struct Pair<S: Socket> {
    pub(crate) ends: [End<S>; 2],
    /// The two directions; `flows[X]` carries what side X sends.
    flows: [Flow<S::Pipe>; 2],
    /// The most bytes within which an EOF is a refusal: see [`Pair::expect_refusal_by_eof`].
    silent_within: Option<u64>,
}

impl<S: Socket> Pair<S> {
    pub(crate) fn new(client: End<S>, server: End<S>) -> Pair<S> {
        Pair {
            ends: [client, server],
            flows: [Flow::new(), Flow::new()],
            silent_within: None,
        }
    }

    /// Notes that the server's family refuses only by an EOF before the first byte.
    ///
    /// Such an EOF is then an error, unless the half-close was passed on before, so that the EOF
    /// may answer it, or unless the peer has read what was delivered. It has if more than `unread`
    /// bytes were delivered, which can't all lie unread in between, or if the system says so
    /// ([`Socket::peer_took_all`]; Linux). On other systems (macOS) a guest that reads less than
    /// that and closes at once, without a byte of its own, looks like one that refuses.
    pub(crate) fn expect_refusal_by_eof(&mut self, unread: u64) {
        self.silent_within = Some(unread);
    }

    /// Holds back the half-close of `side` until [`release_half_close`](Pair::release_half_close),
    /// or until the other direction has ended.
    pub(crate) fn withhold_half_close(&mut self, side: Side) {
        self.flows[side].is_withheld = true;
    }

    pub(crate) fn release_half_close(&mut self, side: Side) {
        self.flows[side].is_withheld = false;
    }

    /// Marks the end of `side` as doubtful, since it looks the same when its VM crashes. Its EOF is
    /// held back until [`settle_end`](Pair::settle_end).
    pub(crate) fn doubt_end(&mut self, side: Side) {
        self.flows[side].doubt = Doubt::End;
    }

    /// Marks a failure of `side` as doubtful, while its EOF is certainly the peer's own and not
    /// held back.
    pub(crate) fn doubt_failure(&mut self, side: Side) {
        self.flows[side].doubt = Doubt::Failure;
    }

    /// Returns whether the end of `side` is doubtful and was read, with all data before it
    /// delivered.
    pub(crate) fn has_doubtful_end(&self, side: Side) -> bool {
        let (flow, end) = (&self.flows[side], &self.ends[side]);
        let has_delivered = flow.state == FlowState::Open && flow.carrier.is_empty();
        match flow.doubt {
            Doubt::None => false,
            Doubt::End => end.is_dead() || has_delivered && end.input == Half::Closed,
            Doubt::Failure => end.is_dead(),
        }
    }

    /// Sets whether the end of `side` was the peer's own or the connection broke off. A failure or
    /// a refusal stays one in either case.
    pub(crate) fn settle_end(&mut self, side: Side, end: Ending) {
        self.flows[side].doubt = Doubt::None;
        if end == Ending::BrokenOff {
            self.ends[side].input = Half::Failed(io::ErrorKind::ConnectionReset);
        }
    }

    /// Takes what `side` has sent already: the first `len` bytes of a buffer of the pool.
    pub(crate) fn give(&mut self, side: Side, buffer: Box<[u8]>, len: usize) {
        let filled = 0..len;
        self.flows[side].carrier = Carrier::Memory { buffer, filled };
    }

    /// Sets how many of the first bytes delivered for `side` it has not sent itself.
    pub(crate) fn discount(&mut self, side: Side, bytes: usize) {
        self.flows[side].foreign = bytes as u64;
    }

    /// Returns whether the half-close of `side` is held back now, until
    /// [`release_half_close`](Pair::release_half_close).
    pub(crate) fn is_withholding_half_close(&self, side: Side) -> bool {
        let flow = &self.flows[side];
        flow.is_withheld
            && flow.state == FlowState::Open
            && flow.carrier.is_empty()
            && self.ends[side].input == Half::Closed
    }

    /// Returns whether one side has ended. The EOF may not have been passed on yet.
    pub(crate) fn is_half_closed(&self) -> bool {
        self.half_closed_by().is_some()
    }

    /// Returns the side that has ended, or the client if both have. The EOF may not have been
    /// passed on yet.
    pub(crate) fn half_closed_by(&self) -> Option<Side> {
        let ended = |side: &Side| {
            self.flows[*side].state != FlowState::Open || self.is_withholding_half_close(*side)
        };
        Side::BOTH.into_iter().find(ended)
    }

    /// Returns how many bytes that `side` sent are in its carrier.
    pub(crate) fn in_flight(&self, side: Side) -> usize {
        self.flows[side].carrier.bytes_left()
    }

    /// Returns whether the server refused by an EOF before its first byte.
    pub(crate) fn was_refused(&self) -> bool {
        self.ends[Side::Server].input == Half::Failed(io::ErrorKind::ConnectionRefused)
    }

    /// Returns how many bytes that `side` sent were delivered.
    pub(crate) fn delivered(&self, side: Side) -> u64 {
        let flow = &self.flows[side];
        flow.delivered.saturating_sub(flow.foreign)
    }

    /// Returns whether a peer is gone, or no direction is open. The remaining data may then never
    /// be read, so the caller sets a deadline.
    pub(crate) fn is_ending(&self) -> bool {
        let open = |flow: &Flow<S::Pipe>| flow.state == FlowState::Open;
        self.ends.iter().any(End::is_gone) || !self.flows.iter().any(open)
    }

    /// Does a bounded amount of work, at most about `budget` bytes in each direction.
    pub(crate) fn turn(&mut self, pool: &mut Pool<S::Pipe>, budget: usize) -> PairTurn {
        let mut more = false;
        for side in [Side::Server, Side::Client] {
            more |= self.run(side, pool, budget);
        }
        // The end of one direction releases the half-close of the other. Two that wait for each
        // other are both released.
        let ended = |side: Side| {
            self.flows[side].state != FlowState::Open || self.is_withholding_half_close(side)
        };
        if ended(Side::Client)
            && ended(Side::Server)
            && (self.is_withholding_half_close(Side::Client)
                || self.is_withholding_half_close(Side::Server))
        {
            self.release_half_close(Side::Client);
            self.release_half_close(Side::Server);
            more = true;
        }
        for side in Side::BOTH {
            // Nothing is left to read what the other side sends. All that could be delivered
            // without waiting was delivered.
            if self.ends[side].is_dead()
                && !more
                && self.flows[side.other()].state == FlowState::Open
            {
                self.flows[side.other()].break_off(pool);
            }
        }
        if self.flows.iter().all(|flow| flow.state != FlowState::Open) {
            PairTurn::Done
        } else if more {
            PairTurn::Again
        } else {
            PairTurn::Wait
        }
    }

    /// Returns how `side` is to be closed after [`PairTurn::Done`], or when the pair is cut off
    /// before that.
    pub(crate) fn close_mode(&self, side: Side) -> CloseMode {
        let sent = match self.flows[side.other()].state {
            FlowState::Finished => Ending::Whole,
            FlowState::Open | FlowState::Broken => Ending::BrokenOff,
        };
        let input = match self.ends[side].input {
            Half::Open => None,
            Half::Closed => Some(Ending::Whole),
            Half::Failed(_) => Some(Ending::BrokenOff),
        };
        CloseMode::choose(side, sent, input)
    }

    /// Returns the ends, and drops what the carriers hold.
    pub(crate) fn into_ends(self, pool: &mut Pool<S::Pipe>) -> [End<S>; 2] {
        for mut flow in self.flows {
            flow.carrier.clear(pool);
        }
        self.ends
    }

    fn run(&mut self, side: Side, pool: &mut Pool<S::Pipe>, budget: usize) -> bool {
        let request = &self.flows[Side::Client];
        let silent_end = match self.silent_within.filter(|_| side == Side::Server) {
            Some(within) if request.state != FlowState::Finished && request.delivered <= within => {
                match request.delivered {
                    0 => SilentEnd::Refuses,
                    _ => SilentEnd::RefusesUnread,
                }
            }
            _ => SilentEnd::Answers,
        };
        let [client, server] = &mut self.ends;
        let (source, sink) = match side {
            Side::Client => (client, server),
            Side::Server => (server, client),
        };
        self.flows[side].run(source, sink, pool, budget, silent_end)
    }
}
