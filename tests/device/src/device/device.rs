//! The table of connections: what the guest's packets and the host's sockets mean for them.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::connection::{Connection, Key, Packet};
use crate::packet::{HOST_CID, Header, Op, STREAM};
use crate::state_dir::StateDir;

/// As many as hyperkit has.
const SLOTS: usize = 1024;

/// How many resets of unknown connections may wait for room in the ring before no more of the
/// guest's packets are read.
const RESETS: usize = 1024;

/// epoll's token of `connect`; those of streams count up from [`FIRST`].
const LISTENER: u64 = 0;
const FIRST: u64 = 1;

/// The first of the ports from which the host seems to dial.
const FIRST_PORT: u32 = 0x4000_0000;

/// What it has done so far, and what is there now.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) live: usize,
    pub(crate) buffered: usize,
    pub(crate) from_host: u64,
    pub(crate) from_guest: u64,
    pub(crate) refused: u64,
    pub(crate) broken: u64,
    pub(crate) boots: u64,
}

pub(crate) struct Device {
    directory: StateDir,
    guest_cid: u64,
    epoll: Epoll,
    next_id: u64,
    next_port: u32,
    /// Connected, and the line not yet read.
    greeting: HashMap<u64, UnixStream>,
    connections: HashMap<u64, Connection>,
    by_key: HashMap<Key, u64>,
    /// Those that have something for the guest, in turn.
    queue: VecDeque<u64>,
    resets: VecDeque<Header>,
    pub(crate) counters: Counters,
}

impl Device {
    pub(crate) fn new(path: &Path, guest_cid: u64) -> io::Result<Device> {
        let directory = StateDir::open(path, guest_cid)?;
        let epoll = Epoll::new()?;
        epoll.ctl(
            ControlOperation::Add,
            directory.listener.as_raw_fd(),
            EpollEvent::new(EventSet::IN, LISTENER),
        )?;
        Ok(Device {
            directory,
            guest_cid,
            epoll,
            next_id: FIRST,
            next_port: FIRST_PORT,
            greeting: HashMap::new(),
            connections: HashMap::new(),
            by_key: HashMap::new(),
            queue: VecDeque::new(),
            resets: VecDeque::new(),
            counters: Counters::default(),
        })
    }

    /// Readable when a socket of the host has something to say.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    pub(crate) fn counters(&self) -> Counters {
        Counters {
            live: self.connections.len() + self.greeting.len(),
            buffered: self.connections.values().map(Connection::buffered).sum(),
            ..self.counters
        }
    }

    /// Looks at the host's sockets once, without waiting; whether there was anything.
    pub(crate) fn look_at_host(&mut self) -> bool {
        let mut events = [EpollEvent::default(); 64];
        let Ok(count) = self.epoll.wait(0, &mut events) else {
            return false;
        };
        for event in &events[..count] {
            let id = event.data();
            if id == LISTENER {
                self.accept();
            } else if let Some(stream) = self.greeting.remove(&id) {
                self.greet(id, stream);
            } else if let Some(connection) = self.connections.get_mut(&id) {
                connection.host_event(event.event_set());
                self.changed(id);
            }
        }
        count > 0
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.directory.listener.accept() {
            if self.greeting.len() + self.connections.len() >= SLOTS
                || stream.set_nonblocking(true).is_err()
            {
                continue;
            }
            let id = self.new_id();
            let watched = self.epoll.ctl(
                ControlOperation::Add,
                stream.as_raw_fd(),
                EpollEvent::new(EventSet::IN, id),
            );
            if watched.is_ok() {
                self.greeting.insert(id, stream);
            }
        }
    }

    fn greet(&mut self, id: u64, stream: UnixStream) {
        let Some(guest_port) = self.directory.read_line(&stream) else {
            return;
        };
        let key = loop {
            self.next_port = self.next_port.wrapping_add(1).max(FIRST_PORT);
            let host_port = self.next_port;
            let key = Key {
                guest_port,
                host_port,
            };
            if !self.by_key.contains_key(&key) {
                break key;
            }
        };
        self.counters.from_host += 1;
        let mut connection = Connection::from_host(stream, key);
        connection.watched = Some(EventSet::IN);
        self.insert(id, connection);
    }

    fn new_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    fn insert(&mut self, id: u64, connection: Connection) {
        self.by_key.insert(connection.key, id);
        self.connections.insert(id, connection);
        self.changed(id);
    }

    /// Whether the guest's packets may be read: there is room for the answers.
    pub(crate) fn may_hear(&self) -> bool {
        self.resets.len() < RESETS
    }

    /// A packet of the guest.
    pub(crate) fn hear(&mut self, header: &Header, data: &[u8]) {
        if header.source_cid != self.guest_cid
            || header.target_cid != HOST_CID
            || header.kind != STREAM
        {
            return self.reset(header);
        }
        let Some(op) = header.op else {
            return self.reset(header);
        };
        let key = Key {
            guest_port: header.source_port,
            host_port: header.target_port,
        };
        if op == Op::Request {
            return self.dialled(key, header);
        }
        let Some(&id) = self.by_key.get(&key) else {
            return self.reset(header);
        };
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let fine = connection.hear(header, op, data);
        if !fine {
            self.counters.broken += 1;
            connection.forget_guest();
            self.reset(header);
        }
        if !fine || op == Op::Reset {
            self.by_key.remove(&key);
        }
        self.changed(id);
    }

    /// The guest's driver has set up its rings.
    pub(crate) fn booted(&mut self) {
        self.counters.boots += 1;
        let ids: Vec<u64> = self.connections.keys().copied().collect();
        for id in ids {
            if let Some(connection) = self.connections.get_mut(&id)
                && !connection.is_new()
            {
                connection.outlive_guest();
                self.settle(id);
            }
        }
    }

    fn dialled(&mut self, key: Key, request: &Header) {
        // The guest has booted anew, and come upon the same ports.
        if let Some(id) = self.by_key.remove(&key)
            && let Some(connection) = self.connections.get_mut(&id)
        {
            connection.forget_guest();
            self.changed(id);
        }
        self.counters.from_guest += 1;
        if self.connections.len() >= SLOTS {
            return self.refuse(request);
        }
        match self.directory.dial(key.host_port) {
            Ok(stream) => {
                let id = self.new_id();
                self.insert(id, Connection::from_guest(stream, key, request));
            }
            Err(_) => self.refuse(request),
        }
    }

    fn refuse(&mut self, request: &Header) {
        self.counters.refused += 1;
        self.reset(request);
    }

    /// Answers with a reset. A reset itself is never answered.
    fn reset(&mut self, to: &Header) {
        if to.op == Some(Op::Reset) {
            return;
        }
        self.resets.push_back(Header {
            source_cid: to.target_cid,
            target_cid: to.source_cid,
            source_port: to.target_port,
            target_port: to.source_port,
            length: 0,
            kind: to.kind,
            op: Some(Op::Reset),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        });
    }

    /// The next packet for the guest, with at most `room` bytes of data.
    pub(crate) fn next(&mut self, room: usize) -> Option<(Header, Vec<u8>)> {
        if let Some(reset) = self.resets.pop_front() {
            return Some((reset, Vec::new()));
        }
        while let Some(id) = self.queue.pop_front() {
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            connection.queued = false;
            let Some(Packet { op, flags, data }) = connection.next(room) else {
                self.settle(id);
                continue;
            };
            let key = connection.key;
            let (buf_alloc, fwd_cnt) = connection.credit();
            let header = Header {
                source_cid: HOST_CID,
                target_cid: self.guest_cid,
                source_port: key.host_port,
                target_port: key.guest_port,
                length: data.len() as u32,
                kind: STREAM,
                op: Some(op),
                flags,
                buf_alloc,
                fwd_cnt,
            };
            if connection.is_over() {
                self.settle(id);
            } else {
                connection.queued = true;
                self.queue.push_back(id);
            }
            return Some((header, data));
        }
        None
    }

    /// Whether [`Device::next`] may have something.
    pub(crate) fn has_next(&self) -> bool {
        !self.resets.is_empty() || !self.queue.is_empty()
    }

    /// Something has changed for this connection: it may have something for the guest, or be over.
    fn changed(&mut self, id: u64) {
        self.settle(id);
        if let Some(connection) = self.connections.get_mut(&id)
            && !connection.queued
        {
            connection.queued = true;
            self.queue.push_back(id);
        }
    }

    /// Has epoll watch this connection for what it waits for, or forgets it if it is over.
    fn settle(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if connection.is_over() {
            let key = connection.key;
            if self.by_key.get(&key) == Some(&id) {
                self.by_key.remove(&key);
            }
            self.connections.remove(&id);
            return;
        }
        let wanted = connection.interest();
        if wanted == connection.watched {
            return;
        }
        let operation = match (connection.watched, wanted) {
            (None, _) => ControlOperation::Add,
            (_, None) => ControlOperation::Delete,
            _ => ControlOperation::Modify,
        };
        let event = EpollEvent::new(wanted.unwrap_or(EventSet::empty()), id);
        if self
            .epoll
            .ctl(operation, connection.descriptor(), event)
            .is_ok()
        {
            connection.watched = wanted;
        }
    }
}
