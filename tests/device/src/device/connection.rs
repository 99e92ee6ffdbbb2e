//! One connection between a Unix socket of the host and a port of the guest: credit, half-close,
//! end.
//!
//! Nothing here knows rings or epoll. What the guest must be told follows from the state, one
//! packet at a time ([`Connection::next`]); it waits there, and takes no memory, for as long as the
//! ring is full or the guest down.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::EventSet;

use crate::packet::{Header, NEITHER, NO_RECEIVE, NO_SEND, Op};

/// What of the guest's data the device holds for a host that doesn't read, and so what it offers as
/// credit.
pub(crate) const BUF_ALLOC: u32 = 256 * 1024;

/// What is read from the host at a time, only when all that was read before has gone to the guest.
const READ: usize = 64 * 1024;

/// The two ports. No two connections that the guest knows of have both in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) guest_port: u32,
    pub(crate) host_port: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The host has connected; the guest is to be told.
    Request,
    /// The guest was told and hasn't answered.
    Requested,
    /// The guest has dialled, and the host taken it; the guest is to be told.
    Response,
    Established,
}

/// What is next for the guest.
pub(crate) struct Packet {
    pub(crate) op: Op,
    pub(crate) flags: u32,
    pub(crate) data: Vec<u8>,
}

pub(crate) struct Connection {
    stream: UnixStream,
    pub(crate) key: Key,
    phase: Phase,

    /// From the guest, not yet taken by the host: at most [`BUF_ALLOC`] bytes.
    to_host: VecDeque<u8>,
    /// How many bytes the host has taken, and what of it the guest knows.
    fwd_cnt: u32,
    fwd_cnt_told: u32,
    credit_asked_for: bool,
    /// The flags of the guest's SHUTDOWN.
    guest_ended: u32,
    /// The guest has reset it, or knows nothing of it any more.
    guest_gone: bool,
    half_closed: bool,
    /// The guest has booted anew since.
    stale: bool,
    /// Writing to the host fails.
    host_gone: bool,

    /// From the host, not yet gone to the guest.
    from_host: Vec<u8>,
    sent_of_it: usize,
    host_ended: bool,
    /// How many bytes went to the guest, and what it said that it can hold and has let go.
    tx_cnt: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    asked_for_credit: bool,
    /// The flags of our SHUTDOWN.
    told_ended: u32,
    reset_sent: bool,

    /// What epoll watches it for; None: epoll doesn't know it.
    pub(crate) watched: Option<EventSet>,
    /// The host has closed it altogether: no event is to come, reading and writing won't block.
    hung_up: bool,
    /// It stands in the queue of those that have something for the guest.
    pub(crate) queued: bool,
}

impl Connection {
    /// The host has dialled the guest.
    pub(crate) fn from_host(stream: UnixStream, key: Key) -> Connection {
        Connection::new(stream, key, Phase::Request)
    }

    /// The guest has dialled the host.
    pub(crate) fn from_guest(stream: UnixStream, key: Key, request: &Header) -> Connection {
        let mut connection = Connection::new(stream, key, Phase::Response);
        connection.hear_credit(request);
        connection
    }

    fn new(stream: UnixStream, key: Key, phase: Phase) -> Connection {
        Connection {
            stream,
            key,
            phase,
            to_host: VecDeque::new(),
            fwd_cnt: 0,
            fwd_cnt_told: 0,
            credit_asked_for: false,
            guest_ended: 0,
            guest_gone: false,
            half_closed: false,
            stale: false,
            host_gone: false,
            from_host: Vec::new(),
            sent_of_it: 0,
            host_ended: false,
            tx_cnt: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            asked_for_credit: false,
            told_ended: 0,
            reset_sent: false,
            watched: None,
            hung_up: false,
            queued: false,
        }
    }

    pub(crate) fn descriptor(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// The guest hasn't heard of it yet.
    pub(crate) fn is_new(&self) -> bool {
        self.phase == Phase::Request
    }

    pub(crate) fn buffered(&self) -> usize {
        self.to_host.len() + self.from_host.len() - self.sent_of_it
    }

    /// What the guest must still find in every packet: what we can hold and have let go.
    pub(crate) fn credit(&mut self) -> (u32, u32) {
        self.fwd_cnt_told = self.fwd_cnt;
        (BUF_ALLOC, self.fwd_cnt)
    }

    /// Takes a packet of the guest with its data; false if it broke the protocol.
    pub(crate) fn hear(&mut self, header: &Header, op: Op, data: &[u8]) -> bool {
        self.hear_credit(header);
        match (op, self.phase) {
            (Op::Response, Phase::Requested) => self.phase = Phase::Established,
            (Op::Reset, _) => self.forget_guest(),
            (Op::Data, Phase::Established) => {
                let room = BUF_ALLOC as usize - self.to_host.len();
                if data.len() > room || self.guest_ended & NO_SEND != 0 {
                    return false;
                }
                self.to_host.extend(data);
                self.write();
            }
            (Op::Shutdown, Phase::Established) => {
                self.guest_ended |= header.flags & NEITHER;
                if self.guest_ended & NO_RECEIVE != 0 {
                    self.stop_reading();
                }
                self.write();
            }
            (Op::CreditUpdate, _) => {}
            (Op::CreditRequest, _) => self.credit_asked_for = true,
            _ => return false,
        }
        true
    }

    fn hear_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        self.asked_for_credit &= self.free_credit() == 0;
    }

    /// The guest knows nothing of it any more: what it sent before still goes to the host.
    pub(crate) fn forget_guest(&mut self) {
        self.guest_gone = true;
        self.guest_ended = NEITHER;
        self.stop_reading();
        self.write();
    }

    /// The guest has booted anew. As with hyperkit the host isn't told before it sends something,
    /// and the guest resets.
    pub(crate) fn outlive_guest(&mut self) {
        self.stale = true;
    }

    /// How many more bytes the guest can hold.
    fn free_credit(&self) -> usize {
        let on_the_way = self.tx_cnt.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(on_the_way) as usize
    }

    /// What the host sends from now on goes nowhere, and it is told so.
    fn stop_reading(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Read);
        self.from_host.clear();
        self.sent_of_it = 0;
        self.host_ended = true;
    }

    /// epoll has something to say about the host's socket.
    pub(crate) fn host_event(&mut self, events: EventSet) {
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.hung_up = true;
        }
        self.read();
        self.write();
    }

    /// Gives the host what the guest sent, and after the last of it the guest's end.
    fn write(&mut self) {
        while !self.host_gone && !self.to_host.is_empty() {
            match self.stream.write(self.to_host.as_slices().0) {
                Ok(n) => {
                    self.to_host.drain(..n);
                    self.fwd_cnt = self.fwd_cnt.wrapping_add(n as u32);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.host_gone = true,
            }
        }
        if self.host_gone {
            self.fwd_cnt = self.fwd_cnt.wrapping_add(self.to_host.len() as u32);
            self.to_host.clear();
        }
        if self.guest_ended & NO_SEND != 0 && !self.half_closed {
            self.half_closed = true;
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    fn wants_to_read(&self) -> bool {
        self.phase == Phase::Established
            && !self.host_ended
            && self.from_host.is_empty()
            && self.free_credit() > 0
    }

    /// Reads from the host, if what came before has gone to a guest that can hold more.
    fn read(&mut self) {
        if !self.wants_to_read() {
            return;
        }
        self.from_host.resize(READ, 0);
        let read = loop {
            match self.stream.read(&mut self.from_host) {
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        self.from_host.truncate(*read.as_ref().unwrap_or(&0));
        match read {
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Ok(1..) => {}
            Ok(0) | Err(_) => self.host_ended = true,
        }
    }

    /// What the guest is to be told next, with at most `room` bytes of data.
    pub(crate) fn next(&mut self, room: usize) -> Option<Packet> {
        let bare = |op, flags| {
            Some(Packet {
                op,
                flags,
                data: Vec::new(),
            })
        };
        if self.guest_gone || self.reset_sent {
            return None;
        }
        match self.phase {
            Phase::Request => {
                self.phase = Phase::Requested;
                return bare(Op::Request, 0);
            }
            Phase::Requested => return None,
            Phase::Response => {
                self.phase = Phase::Established;
                return bare(Op::Response, 0);
            }
            Phase::Established => {}
        }
        if self.guest_ended == NEITHER && (self.to_host.is_empty() || self.host_gone) {
            self.reset_sent = true;
            return bare(Op::Reset, 0);
        }
        // A quarter: often enough that the guest never runs dry, seldom enough to be cheap.
        let untold = self.fwd_cnt.wrapping_sub(self.fwd_cnt_told);
        if self.credit_asked_for || untold >= BUF_ALLOC / 4 {
            self.credit_asked_for = false;
            return bare(Op::CreditUpdate, 0);
        }
        self.read();
        if !self.from_host.is_empty() {
            let n = (self.from_host.len() - self.sent_of_it)
                .min(self.free_credit())
                .min(room);
            if n == 0 {
                let ask = self.free_credit() == 0 && !self.asked_for_credit;
                self.asked_for_credit |= ask;
                return if ask {
                    bare(Op::CreditRequest, 0)
                } else {
                    None
                };
            }
            let data = self.from_host[self.sent_of_it..self.sent_of_it + n].to_vec();
            self.sent_of_it += n;
            if self.sent_of_it == self.from_host.len() {
                self.from_host.clear();
                self.sent_of_it = 0;
            }
            self.tx_cnt = self.tx_cnt.wrapping_add(n as u32);
            return Some(Packet {
                op: Op::Data,
                flags: 0,
                data,
            });
        }
        let mut ended = 0;
        if self.host_ended {
            ended |= NO_SEND;
        }
        if self.host_gone {
            ended |= NO_RECEIVE;
        }
        if ended != self.told_ended {
            self.told_ended = ended;
            return bare(Op::Shutdown, ended);
        }
        None
    }

    /// What epoll is to watch the host's socket for; None for nothing at all.
    pub(crate) fn interest(&self) -> Option<EventSet> {
        let mut events = EventSet::empty();
        if self.wants_to_read() {
            events |= EventSet::IN;
        }
        if !self.to_host.is_empty() {
            events |= EventSet::OUT;
        }
        // It would say again and again that the host has hung up.
        (!self.hung_up).then_some(events)
    }

    /// Nothing is left to do for either side.
    pub(crate) fn is_over(&self) -> bool {
        let delivered = self.to_host.is_empty() || self.host_gone;
        // The last: nobody is left on either side. hyperkit would keep its slot for good.
        (self.reset_sent || self.guest_gone) && delivered || self.stale && self.hung_up
    }
}

impl Drop for Connection {
    /// Closing a Unix socket with data unread shows as a reset; hyperkit's connections end with an
    /// EOF.
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        let mut discarded = [0; 4096];
        for _ in 0..1024 {
            match self.stream.read(&mut discarded) {
                Ok(1..) => {}
                _ => return,
            }
        }
    }
}
