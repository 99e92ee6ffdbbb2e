//! The keeper's own process: one thread that waits in poll(2).
//!
//! While the proxy lives, it waits for the notifier and for clients of its status sockets, without
//! a timeout. When the proxy has ended, it waits for the connections that it ends and for guests
//! that dial, and looks each second whether their VM still runs.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{SockRef, Type};

use crate::error::{Error, Operation};
use crate::listener::file::{self, FileState, SocketFile};
use crate::sys;

use super::ending::{EndingConnection, EndingTurn};
use super::ports::{Fate, KeptListener};
use super::protocol::{Decoder, Order, PROTOCOL, UNKNOWN_PROTOCOL};
use super::status::{self, KeeperStatus, socket_path};

/// How often the keeper looks whether the VMs of served ports still run.
const LOOK: Duration = Duration::from_secs(1);

/// How many clients the status sockets have at a time; the oldest one goes when another comes.
const MOST_CLIENTS: usize = 16;

/// How many reads of orders are one turn: as many as a full socket needs.
const MOST_ORDERS: usize = 1024;

/// The pause after a client that could not be accepted.
const PAUSE: Duration = Duration::from_millis(20);

/// How many bytes a line of a client may have.
const LONGEST_LINE: usize = 256;

/// A status socket.
#[derive(Debug)]
struct StatusSocket {
    directory: PathBuf,
    /// The socket and its file, which goes with it. `None`: it can't be bound now.
    bound: Option<(UnixListener, SocketFile)>,
}

impl StatusSocket {
    /// Binds the socket, unless it is bound and its file is there.
    fn bind(&mut self) {
        let path = socket_path(&self.directory, std::process::id());
        if let Some((_, file)) = &self.bound
            && file.state() == FileState::Ours
        {
            return;
        }
        self.bound = bind_status(&path).ok();
        status::remove_dead(&self.directory);
    }
}

fn bind_status(path: &Path) -> crate::Result<(UnixListener, SocketFile)> {
    /// Clients are few, and each is answered at once.
    const BACKLOG: i32 = 16;
    let (socket, file) = file::bind(path.display(), path, Type::STREAM, 0o600.into())?;
    let listen = socket.listen(BACKLOG);
    listen
        .and_then(|()| socket.set_nonblocking(true))
        .map_err(|e| Error::new(Operation::Listen, path.display(), e))?;
    Ok((UnixListener::from(OwnedFd::from(socket)), file))
}

/// A client of a status socket.
#[derive(Debug)]
struct StatusClient {
    id: u64,
    stream: UnixStream,
    line: Vec<u8>,
}

/// What a descriptor that is waited for belongs to.
#[derive(Clone, Copy, Debug)]
enum PollSource {
    Notifier,
    StatusSocket(usize),
    Client(u64),
    Port(u64),
    Ending(usize),
}

/// Whether the keeper goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Course {
    GoesOn,
    Ends,
}

struct KeeperLoop<'a> {
    notifier: BorrowedFd<'a>,
    orders: BorrowedFd<'a>,
    decoder: Decoder,
    proxy: u32,
    /// Whether the proxy has ended, and left nothing that is not read.
    proxy_ended: bool,
    notifier_ended: bool,
    /// Whether more orders than one turn takes have come.
    has_more: bool,
    connections: HashMap<u64, OwnedFd>,
    /// The copies of connections that the proxy has ended, to be closed.
    released: Vec<OwnedFd>,
    ports: HashMap<u64, KeptListener>,
    endings: Vec<EndingConnection>,
    /// How many of them were closed though their guests went on sending.
    given_up: u64,
    status_sockets: Vec<StatusSocket>,
    clients: Vec<StatusClient>,
    next_client: u64,
    look_at: Instant,
    buffer: Vec<u8>,
}

/// Runs as a keeper: see [`serve`](super::serve).
pub(super) fn run(version: Option<&str>) -> i32 {
    let (notifier, orders) = (io::stdin(), io::stdout());
    let is_socket = |descriptor: BorrowedFd<'_>| SockRef::from(&descriptor).r#type().is_ok();
    if !is_socket(notifier.as_fd()) || !is_socket(orders.as_fd()) {
        let why = "hvsock: a keeper is started by a proxy, and not by hand\n";
        let _ = io::stderr().write_all(why.as_bytes());
        return 2;
    }
    let version = version.and_then(|it| it.parse::<u32>().ok());
    if !version.is_some_and(|version| (1..=PROTOCOL).contains(&version)) {
        return UNKNOWN_PROTOCOL;
    }
    sys::detach();
    // ps(1) shows this name in place of that of the link.
    #[cfg(target_os = "linux")]
    let _ = std::fs::write("/proc/self/comm", "hvsock-keeper");
    // The proxy has as many.
    let _ = sys::raise_descriptor_limit();
    for socket in [notifier.as_fd(), orders.as_fd()] {
        if SockRef::from(&socket).set_nonblocking(true).is_err() {
            return 1;
        }
    }
    let process = KeeperLoop {
        notifier: notifier.as_fd(),
        orders: orders.as_fd(),
        decoder: Decoder::default(),
        proxy: 0,
        proxy_ended: false,
        notifier_ended: false,
        has_more: false,
        connections: HashMap::new(),
        released: Vec::new(),
        ports: HashMap::new(),
        endings: Vec::new(),
        given_up: 0,
        status_sockets: Vec::new(),
        clients: Vec::new(),
        next_client: 0,
        look_at: Instant::now(),
        buffer: Vec::new(),
    };
    process.run();
    0
}

impl KeeperLoop<'_> {
    fn run(mut self) {
        loop {
            let (ready, now) = self.wait();
            if self.has_more {
                self.read_notifier(now);
            }
            let mut course = Course::GoesOn;
            for source in &ready {
                match source {
                    PollSource::Notifier => self.read_notifier(now),
                    PollSource::StatusSocket(index) => self.accept_client(*index),
                    PollSource::Client(id) if self.serve_client(*id, now) == Course::Ends => {
                        course = Course::Ends;
                    }
                    PollSource::Client(_) => {}
                    PollSource::Port(id) => self.accept_guests(*id, now),
                    PollSource::Ending(index) => self.endings[*index].ready = true,
                }
            }
            if course == Course::Ends {
                return self.break_off();
            }
            self.end_connections(now);
            if self.look_at <= now {
                self.look_at_ports(now);
            }
            if self.proxy_ended
                && self.connections.is_empty()
                && self.ports.is_empty()
                && self.endings.is_empty()
            {
                return;
            }
        }
    }

    /// Waits until something is ready or it is time for a look.
    fn wait(&self) -> (Vec<PollSource>, Instant) {
        let now = Instant::now();
        let mut wake_at = None;
        let mut wake_by =
            |at: Instant| wake_at = Some(wake_at.map_or(at, |it: Instant| it.min(at)));
        let mut sources = Vec::new();
        let mut polled = Vec::new();
        let mut add = |source, socket| {
            sources.push(source);
            polled.push(PollFd::new(socket, PollFlags::POLLIN));
        };
        if !self.notifier_ended {
            add(PollSource::Notifier, self.notifier);
        }
        if self.has_more {
            wake_by(now);
        }
        for (index, socket) in self.status_sockets.iter().enumerate() {
            if let Some((listener, _)) = &socket.bound {
                add(PollSource::StatusSocket(index), listener.as_fd());
            }
        }
        for client in &self.clients {
            add(PollSource::Client(client.id), client.stream.as_fd());
        }
        for (id, port) in &self.ports {
            match port.accepts(now) {
                Ok(true) => add(PollSource::Port(*id), port.as_fd()),
                Ok(false) => {}
                Err(later) => wake_by(later),
            }
        }
        for (index, ending) in self.endings.iter().enumerate() {
            if ending.is_waited_for(now) {
                add(PollSource::Ending(index), ending.as_fd());
            }
            if let Some(at) = ending.wakes_at(now) {
                wake_by(at);
            }
        }
        if self.ports.values().any(KeptListener::is_served) {
            wake_by(self.look_at);
        }
        let timeout = match wake_at {
            None => PollTimeout::NONE,
            Some(at) => {
                // Rounded up, so that it doesn't wake too early again and again.
                let timeout = at.saturating_duration_since(now) + Duration::from_micros(999);
                PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX)
            }
        };
        // An interrupted call (SIGCONT) has no event.
        let _ = poll(&mut polled, timeout);
        let is_ready = |polled: &PollFd<'_>| polled.any().unwrap_or(false);
        let ready = sources.into_iter().zip(&polled);
        let ready = ready.filter(|(_, polled)| is_ready(polled));
        (ready.map(|(source, _)| source).collect(), Instant::now())
    }

    /// Empties the notifier, and carries out orders, at most [`MOST_ORDERS`] reads of them.
    fn read_notifier(&mut self, now: Instant) {
        if self.proxy_ended {
            return;
        }
        let mut bytes = [0; 256];
        while !self.notifier_ended {
            match nix::unistd::read(self.notifier, &mut bytes) {
                Ok(0) => self.notifier_ended = true,
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::EAGAIN) => break,
                Err(_) => self.notifier_ended = true,
            }
        }
        self.has_more = self.take_orders(now);
        if self.notifier_ended && !self.has_more {
            self.proxy_ended = true;
            for (_, connection) in self.connections.drain() {
                self.endings.push(EndingConnection::begin(connection));
            }
            self.connections.shrink_to_fit();
            self.ports.values_mut().for_each(KeptListener::serve);
            self.look_at = now;
        }
    }

    /// Carries out what has come. Returns whether there may be more.
    fn take_orders(&mut self, now: Instant) -> bool {
        let mut has_more = true;
        for _ in 0..MOST_ORDERS {
            match self.decoder.receive(self.orders) {
                Ok(true) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(false) | Err(_) => {
                    has_more = false;
                    break;
                }
            }
            while let Some((order, descriptors)) = self.decoder.next() {
                self.obey(order, descriptors, now);
            }
        }
        // They are closed only now: each close of a Unix socket while others are in flight has
        // Linux look for garbage among those.
        self.released.clear();
        has_more
    }

    /// Carries out an order. If its descriptor was lost, since this process has too many, nothing
    /// is kept.
    fn obey(&mut self, order: Order, descriptors: Vec<OwnedFd>, now: Instant) {
        let mut descriptors = descriptors.into_iter();
        match order {
            Order::Proxy(pid) => self.proxy = pid,
            Order::Connection(id) => {
                self.connections
                    .extend(descriptors.next().map(|it| (id, it)));
            }
            Order::Connections(first, count) => {
                let ids = (0..u64::from(count)).map(|n| first.wrapping_add(n));
                self.connections.extend(ids.zip(descriptors));
            }
            Order::Release(id) => self.released.extend(self.connections.remove(&id)),
            Order::Listener(id, port) => {
                let kept = descriptors
                    .next()
                    .map(|it| (id, KeptListener::new(it, port)));
                self.ports.extend(kept);
            }
            Order::Serve(id) => {
                if let Some(port) = self.ports.get_mut(&id) {
                    port.serve();
                    self.look_at = now;
                }
            }
            Order::Forget(id) => drop(self.ports.remove(&id)),
            Order::Directory(directory) => {
                match self
                    .status_sockets
                    .iter_mut()
                    .find(|it| it.directory == directory)
                {
                    Some(socket) => socket.bind(),
                    None => {
                        let bound = None;
                        let mut socket = StatusSocket { directory, bound };
                        socket.bind();
                        self.status_sockets.push(socket);
                    }
                }
            }
        }
    }

    fn accept_guests(&mut self, id: u64, now: Instant) {
        let endings = &mut self.endings;
        let end = |guest| endings.push(EndingConnection::begin(guest));
        if let Some(port) = self.ports.get_mut(&id)
            && port.accept(now, end) == Fate::Closed
        {
            port.remove_file();
            self.ports.remove(&id);
        }
    }

    fn end_connections(&mut self, now: Instant) {
        let (buffer, given_up) = (&mut self.buffer, &mut self.given_up);
        self.endings.retain_mut(|ending| {
            let turn = ending.take_turn(buffer, now);
            *given_up += u64::from(turn == EndingTurn::GivenUp);
            turn == EndingTurn::Open
        });
    }

    /// Looks whether the served ports are still wanted.
    fn look_at_ports(&mut self, now: Instant) {
        self.look_at = now + LOOK;
        let closed: Vec<u64> = self
            .ports
            .iter()
            .filter(|(_, port)| port.look() == Fate::Closed)
            .map(|(id, _)| *id)
            .collect();
        for id in closed {
            self.close_port(id, now);
        }
    }

    /// Closes a port that nobody can reach any more. The guests that wait there are accepted first:
    /// it would harm their device to be closed at once.
    fn close_port(&mut self, id: u64, now: Instant) {
        /// As many batches as the longest backlog needs.
        const TURNS: usize = 64;
        for _ in 0..TURNS {
            let count = self.endings.len();
            self.accept_guests(id, now);
            if self.endings.len() == count {
                break;
            }
        }
        self.ports.remove(&id);
    }

    fn accept_client(&mut self, socket: usize) {
        let Some((listener, _)) = &self.status_sockets[socket].bound else {
            return;
        };
        match listener.accept() {
            Ok((stream, _)) => {
                if stream.set_nonblocking(true).is_err() {
                    return;
                }
                if self.clients.len() == MOST_CLIENTS {
                    let oldest = self.clients.remove(0);
                    self.forget_client(oldest.id);
                }
                self.next_client += 1;
                let (id, line) = (self.next_client, Vec::new());
                self.clients.push(StatusClient { id, stream, line });
            }
            // The socket is not polled for a while: it would be ready again at once, and the next
            // client may find a descriptor.
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => {
                std::thread::sleep(PAUSE);
            }
            Err(_) => {}
        }
    }

    fn forget_client(&mut self, id: u64) {
        self.clients.retain(|client| client.id != id);
        for port in self.ports.values_mut() {
            if port.taken_by == Some(id) {
                port.taken_by = None;
            }
        }
    }

    /// Answers the lines of a client.
    fn serve_client(&mut self, id: u64, now: Instant) -> Course {
        // The answer takes into account what the proxy has ordered before.
        self.read_notifier(now);
        let Some(client) = self.clients.iter_mut().find(|client| client.id == id) else {
            return Course::GoesOn;
        };
        let mut bytes = [0; LONGEST_LINE];
        let has_ended = match client.stream.read(&mut bytes) {
            Ok(0) => true,
            Ok(n) => {
                client.line.extend_from_slice(&bytes[..n]);
                client.line.len() > 2 * LONGEST_LINE
            }
            Err(e) => !matches!(
                e.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ),
        };
        if has_ended {
            self.forget_client(id);
            return Course::GoesOn;
        }
        let mut course = Course::GoesOn;
        while let Some(line) = self.next_line(id) {
            let (mut answer, next) = self.answer(&line, id, now);
            answer.push('\n');
            if next == Course::Ends {
                course = next;
            }
            let client = self.clients.iter_mut().find(|client| client.id == id);
            // The answer is short, and fits into the socket of one that reads.
            let written = client.map(|client| client.stream.write(answer.as_bytes()));
            if !matches!(written, Some(Ok(n)) if n == answer.len()) {
                self.forget_client(id);
            }
        }
        course
    }

    fn next_line(&mut self, id: u64) -> Option<String> {
        let client = self.clients.iter_mut().find(|client| client.id == id)?;
        let end = client.line.iter().position(|byte| *byte == b'\n')?;
        let line: Vec<u8> = client.line.drain(..=end).collect();
        Some(String::from_utf8_lossy(&line).trim().to_owned())
    }

    /// Returns the answer to a line.
    fn answer(&mut self, line: &str, client: u64, now: Instant) -> (String, Course) {
        let done = |done: bool| status::answer(done);
        let (word, argument) = line.split_once(' ').unwrap_or((line, ""));
        let inode = argument.trim().parse().ok();
        match word {
            "status" => (self.status().to_json(), Course::GoesOn),
            "take" => (done(self.take(inode, client)), Course::GoesOn),
            "release" => (done(self.release(inode, client, now)), Course::GoesOn),
            "end" => (done(true), Course::Ends),
            _ => (done(false), Course::GoesOn),
        }
    }

    fn status(&self) -> KeeperStatus {
        KeeperStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: PROTOCOL,
            pid: std::process::id(),
            proxy: self.proxy,
            proxy_ended: self.proxy_ended,
            connections: self.made() + self.endings.len(),
            given_up: self.given_up,
            ports: {
                let mut ports: Vec<_> = self.ports.values().map(KeptListener::status).collect();
                ports.sort_by_key(|port| port.port);
                ports
            },
        }
    }

    /// Returns how many of the kept connections are connected and not over. The others are sockets
    /// that the proxy has made ahead, and connections whose end it has not ordered yet.
    fn made(&self) -> usize {
        let is_made = |it: &&OwnedFd| SockRef::from(*it).peer_addr().is_ok();
        let made = self.connections.values().filter(is_made);
        made.filter(|it| !sys::is_hung_up(it.as_fd())).count()
    }

    /// Reserves a served port for a client. Returns false if there is none, or another has it.
    fn take(&mut self, inode: Option<u64>, client: u64) -> bool {
        let wanted = |port: &&mut KeptListener| Some(port.inode()) == inode && port.is_served();
        match self.ports.values_mut().find(wanted) {
            Some(port) if port.taken_by.is_none_or(|by| by == client) => {
                port.taken_by = Some(client);
                true
            }
            _ => false,
        }
    }

    /// Closes a port that a client has taken, once another socket has its name.
    fn release(&mut self, inode: Option<u64>, client: u64, now: Instant) -> bool {
        let wanted = |(id, port): (&u64, &KeptListener)| {
            (Some(port.inode()) == inode && port.taken_by == Some(client)).then_some(*id)
        };
        match self.ports.iter().find_map(wanted) {
            Some(id) => {
                self.close_port(id, now);
                true
            }
            None => false,
        }
    }

    /// Ends at once, as a client has asked.
    fn break_off(mut self) {
        // While the proxy lives, it removes its files itself.
        if self.proxy_ended {
            for port in self.ports.values() {
                port.remove_file();
            }
            for mut ending in std::mem::take(&mut self.endings) {
                ending.break_off(&mut self.buffer);
            }
        }
    }
}
