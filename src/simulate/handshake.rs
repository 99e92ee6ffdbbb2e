//! How connections begin: the accept, the line, the guest's answer, and the guest's own dials.

use super::chargen::Chargen;
use super::connection::{Connection, Guest, Origin, TO_PAIR};
use super::device::Device;
use super::dial::Dialling;
use super::directory::{scan_line, socket_path};
use super::guest::{Builtin, Caller, GuestSocket, Service};
use super::http::Http;
use super::rules::{Ring, Rule, UNANSWERED_LIMIT};
use super::slots::{Key, Subject};
use crate::hyperkit::{HOST_CID, LINE_LEN};
use crate::listener::nonblocking::has_client_left;
use crate::sys::is_socket_alive;
use mio::net::UnixStream;
use socket2::SockRef;
use std::io::{self, ErrorKind, Read};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::{Duration, Instant};

/// How many connections are accepted before the others have their turn.
const ACCEPTS: usize = 256;

/// hyperkit's `DEFAULT_WRITE_BUF_LENGTH`, which it sets as both buffers of its sockets.
const SOCKET_BUFFER: usize = 128 * 1024;

/// After a stall as long as this, what has queued comes to the ring all at once.
const LONG_STALL: Duration = Duration::from_millis(20);

impl Device {
    /// Returns whether the device is out of descriptors, so that its `accept` fails.
    fn is_full(&self) -> bool {
        let limit = self.plan.descriptors;
        limit.is_some_and(|limit| self.taken() >= limit && limit < self.plan.slots)
    }

    /// Returns whether clients wait in the kernel for a descriptor.
    pub(super) fn leaves_clients_waiting(&self) -> bool {
        self.is_full() && !self.plan.loses_clients
    }

    pub(super) fn accept(&mut self) {
        for index in 0..self.listeners.len() {
            for _ in 0..ACCEPTS {
                let full = self.is_full();
                let waits = self.leaves_clients_waiting();
                let listener = &mut self.listeners[index];
                if !listener.ready || waits {
                    break;
                }
                match listener.socket.accept() {
                    // The kernel takes it out of the queue before it looks for a descriptor.
                    Ok(_) if full => self.counters.turned_away += 1,
                    Ok((stream, _)) => self.accepted(stream, index),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        listener.ready = false;
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(_) => {
                        // This process is out of descriptors: it tries again at the next turn,
                        // without a spin.
                        std::thread::sleep(Duration::from_millis(1));
                        break;
                    }
                }
                if self.stall.is_some() || self.fate.is_some() {
                    return;
                }
            }
        }
    }

    fn accepted(&mut self, stream: UnixStream, index: usize) {
        self.counters.accepted += 1;
        if self.taken() >= self.plan.slots {
            self.counters.turned_away += 1;
        } else if self.plan.mux.is_some() {
            self.greet(stream);
        } else if let Some(port) = self.listeners[index].port {
            self.dialled(stream, port, Origin::Forward);
        } else if let Some(stream) = self.read_line(stream) {
            self.counters.stalls += 1;
            self.stall = Some((stream, Instant::now()));
        }
    }

    /// Reads the line with one read; the stream comes back if there is nothing to read yet.
    fn read_line(&mut self, mut stream: UnixStream) -> Option<UnixStream> {
        let mut line = [0; LINE_LEN];
        let read = loop {
            match stream.read(&mut line) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                read => break read,
            }
        };
        match read {
            Ok(LINE_LEN) => match scan_line(&line) {
                Some((cid, port)) if cid == self.plan.cid => {
                    self.dialled(stream, port, Origin::Line);
                }
                _ => self.counters.silent_closes += 1,
            },
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Some(stream),
            Ok(_) | Err(_) => self.counters.silent_closes += 1,
        }
        None
    }

    /// Waits with the whole device for one client's line, as hyperkit's loop around `EAGAIN` does.
    pub(super) fn wait_for_line(&mut self) {
        let Some((stream, since)) = self.stall.take() else {
            return;
        };
        let age = since.elapsed();
        self.counters.longest_stall = self.counters.longest_stall.max(age);
        if let Some(stream) = self.read_line(stream) {
            self.stall = Some((stream, since));
            // The line of a careful client comes within microseconds.
            if age < Duration::from_micros(200) {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(200));
            }
        } else if age > LONG_STALL {
            self.answer();
            self.ring.idle(Instant::now());
        }
    }

    /// Takes a dial of a host program to `port` of the guest.
    fn dialled(&mut self, stream: UnixStream, port: u32, origin: Origin) {
        self.count_dial();
        if self.fate.is_some() {
            return;
        }
        set_buffers(&stream);
        let connection = Connection::new(stream, origin, port, Guest::Unanswered);
        if let Some(key) = self.insert(connection) {
            self.dials.push_back(key);
        }
    }

    /// Takes a dial of a connection that is there already.
    pub(super) fn note_dial(&mut self, key: Key) {
        self.count_dial();
        self.dials.push_back(key);
    }

    fn count_dial(&mut self) {
        self.counters.dials += 1;
        let now = Instant::now();
        self.last_dial = Some(now);
        if self.paused {
            self.counters.unanswered += 1;
            let unanswered = self.counters.unanswered;
            if unanswered >= UNANSWERED_LIMIT {
                self.note_offence(Rule::Unanswered, format!("{unanswered} dials"));
            }
        } else {
            let level = self.ring.level(self.dials.len() + 1, now);
            self.counters.peak_burst = self.counters.peak_burst.max(level);
            if Ring::overflows(level) {
                self.note_offence(Rule::Burst, format!("{level} dials in the ring"));
            }
        }
    }

    /// Has the guest's kernel answer the dials.
    pub(super) fn answer(&mut self) {
        if self.paused {
            return;
        }
        let taken = self.ring.take(self.dials.len(), Instant::now());
        for key in self.dials.drain(..taken).collect::<Vec<_>>() {
            let Some(connection) = self.slots.get(key) else {
                continue;
            };
            let service = self.plan.services.get(&connection.port).cloned();
            match service.map(|service| self.take(key, service)) {
                Some(Ok(())) => self.queue(key),
                Some(Err(_)) | None => self.refuse(key),
            }
        }
    }

    /// Connects a dial to a program of the guest.
    fn take(&mut self, key: Key, service: Service) -> io::Result<()> {
        let Some(connection) = self.slots.get(key) else {
            return Ok(());
        };
        let mut pair = false;
        let mut guest = match service {
            Service::Echo => Guest::Builtin(Builtin::Echo),
            Service::Discard => Guest::Builtin(Builtin::Discard),
            Service::Chargen => Guest::Builtin(Builtin::Chargen(Chargen::default())),
            Service::Silent => Guest::Builtin(Builtin::Silent),
            Service::Endless => Guest::Builtin(Builtin::Endless(Chargen::default())),
            Service::Heedless(left) => Guest::Builtin(Builtin::Heedless {
                pattern: Chargen::default(),
                left,
            }),
            Service::Reset => Guest::Builtin(Builtin::Reset {
                has_answered: false,
            }),
            Service::Http => {
                let port = connection.port;
                let place = format!("{} (cid {}), port {port}", self.plan.name, self.plan.cid);
                Guest::Builtin(Builtin::Http(Box::new(Http::new(place))))
            }
            Service::Forward(endpoint) => Guest::Connecting(GuestSocket::connect(&endpoint)?),
            Service::Custom(program) => {
                let (theirs, ours) = StdUnixStream::pair()?;
                let ours = GuestSocket::of_pair(ours)?;
                std::thread::Builder::new()
                    .name(format!("guest:{}", connection.port))
                    .spawn(move || program(theirs))?;
                pair = true;
                Guest::Socket(ours)
            }
        };
        if let Guest::Connecting(socket) | Guest::Socket(socket) = &mut guest {
            socket.register(self.poll.registry(), Subject::Guest(key).token())?;
        }
        if pair {
            connection.to_guest.set_limit(TO_PAIR);
        }
        // A server behind the port answers when it has accepted.
        let is_answered = !matches!(guest, Guest::Connecting(_));
        connection.guest = guest;
        if is_answered {
            self.counters.answered += 1;
            self.confirm(key);
        }
        Ok(())
    }

    /// Has the guest reset a dial: nothing listens there.
    pub(super) fn refuse(&mut self, key: Key) {
        self.counters.refused += 1;
        // Closed, not merely ended: a payload that came with the line is lost, and Linux says so.
        drop(self.remove(key));
    }

    /// Lets the guest's programs dial the host.
    pub(super) fn dial_host(&mut self) {
        if self.paused {
            return;
        }
        for index in 0..self.dial_listeners.len() {
            while self.dial_listeners[index].ready {
                match self.dial_listeners[index].accept() {
                    Ok(socket) => {
                        let port = self.dial_listeners[index].port;
                        self.dialling.push(Dialling::new(port, socket, None));
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        self.dial_listeners[index].ready = false;
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) if has_client_left(&error) => {}
                    Err(_) => break,
                }
            }
        }
        for dialling in std::mem::take(&mut self.dialling) {
            self.dial_one(dialling);
            if self.fate.is_some() {
                return;
            }
        }
        for index in 0..self.paced.len() {
            let (plan, now) = (&self.plan, Instant::now());
            let paced = &mut self.paced[index];
            let port = paced.port;
            let path = || socket_path(plan, HOST_CID, port);
            if paced.is_due(now, || is_socket_alive(&path()).unwrap_or(false)) {
                let caller = Guest::Builtin(Builtin::Caller(Caller::default()));
                if let Ok(key) = self.connect_host(port, caller) {
                    self.queue(key);
                }
                if self.fate.is_some() {
                    return;
                }
            }
        }
    }

    fn dial_one(&mut self, dialling: Dialling) {
        match self.connect_host(dialling.port, Guest::Forgotten) {
            Ok(key) => {
                if let Some(connection) = self.slots.get(key) {
                    connection.to_guest.set_limit(TO_PAIR);
                }
                let socket = dialling.answer(Ok(()));
                self.attach(key, socket);
            }
            Err(error) => drop(dialling.answer(Err(error))),
        }
    }

    /// Connects a program of the guest to a port of the host.
    fn connect_host(&mut self, port: u32, guest: Guest) -> io::Result<Key> {
        let limit = self.plan.descriptors.unwrap_or(usize::MAX);
        if self.taken() >= limit.min(self.plan.slots) {
            self.note_failed_dial(Rule::NoSlot, format!("port {port}"));
            return Err(ErrorKind::ConnectionRefused.into());
        }
        let stream = match UnixStream::connect(socket_path(&self.plan, HOST_CID, port)) {
            Ok(stream) => stream,
            Err(error) => {
                // Linux waits where macOS, on which hyperkit runs, refuses.
                let rule = match error.kind() {
                    ErrorKind::WouldBlock => Rule::FullListener,
                    _ => Rule::NoListener,
                };
                self.note_failed_dial(rule, format!("port {port}: {error}"));
                return Err(match rule {
                    Rule::FullListener => ErrorKind::ConnectionRefused.into(),
                    _ => error,
                });
            }
        };
        self.counters.guest_dials += 1;
        set_buffers(&stream);
        let mut connection = Connection::new(stream, Origin::Guest, port, guest);
        connection.half_close = self.plan.mux.as_ref().is_none_or(|mux| mux.half_close);
        let unwatched = || io::Error::other("the stand-in cannot watch it");
        self.insert(connection).ok_or_else(unwatched)
    }

    fn attach(&mut self, key: Key, mut socket: GuestSocket) {
        let registered = socket.register(self.poll.registry(), Subject::Guest(key).token());
        if let Some(connection) = self.slots.get(key)
            && registered.is_ok()
        {
            connection.guest = Guest::Socket(socket);
            self.queue(key);
        }
    }
}

fn set_buffers(stream: &UnixStream) {
    let socket = SockRef::from(stream);
    // Fails on macOS if the peer has gone; that is told by an event.
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
}
