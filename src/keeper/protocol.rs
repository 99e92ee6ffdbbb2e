//! The protocol by which a proxy gives orders to its keeper. The keeper never answers.
//!
//! There are two sockets. On `orders`, a stream, are frames, some of them with descriptors:
//!
//! | bytes | what |
//! |---|---|
//! | 0, 1 | the kind |
//! | 2, 3 | how many bytes follow the frame: its tail |
//! | 4 to 7 | flags: 1 if descriptors come with the frame's first byte |
//! | 8 to 15 | a number, most often the identifier of what is kept |
//!
//! All numbers are little-endian. A message has one frame with descriptors at most, which is its
//! first. A tail has fields with a NUL between them, or is a number. A keeper skips the
//! kinds that it doesn't know, with their tails and descriptors, and ignores fields behind those
//! that it knows; so a newer proxy may say more to an older keeper of the same protocol.
//!
//! The keeper reads `orders` only when it is told to, so that a connection costs it no wake-up: a
//! byte on the other socket, `notifier`, asks it to. The end of `notifier` says that the proxy has
//! ended.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::sys::{self, Identity};

/// How many bytes a frame has, without its tail.
pub(super) const FRAME: usize = 16;

const WITH_DESCRIPTORS: u32 = 1;

/// The version of the protocol that a proxy speaks with its keeper. A keeper serves proxies of this
/// version and of all earlier ones.
pub(super) const PROTOCOL: u32 = 2;

/// The exit code of a keeper that doesn't know the version of its proxy's protocol.
pub(super) const UNKNOWN_PROTOCOL: i32 = 3;

/// What the keeper is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Note the proxy's process.
    Proxy(u32),
    /// Keep this connection, whose descriptor comes with the order.
    Connection(u64),
    /// Keep so many connections, which are not made yet and whose identifiers follow each other
    /// from this one (since version 2).
    Connections(u64, u16),
    /// Close the copy of a connection: the proxy has ended it.
    Release(u64),
    /// Keep this listening socket, whose descriptor comes with the order.
    Listener(u64, GuestPort),
    /// Accept at this socket from now on: the proxy listens there no more.
    Serve(u64),
    /// Close the copy of a listening socket, and leave its file alone: another process has it.
    Forget(u64),
    /// Have a status socket in this directory.
    Directory(PathBuf),
}

/// A port that guests dial, with what the keeper needs to serve it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GuestPort {
    pub(crate) port: u32,
    /// The absolute path of the socket at which the VM connects.
    pub(crate) path: PathBuf,
    /// The identity of the file there.
    pub(crate) identity: Identity,
    /// The absolute path of the VM's own socket.
    pub(crate) connect: PathBuf,
}

impl GuestPort {
    fn to_tail(&self) -> Vec<u8> {
        [
            self.path.as_os_str().as_bytes(),
            self.connect.as_os_str().as_bytes(),
            self.identity.to_text().as_bytes(),
            self.port.to_string().as_bytes(),
        ]
        .join(&0)
    }

    fn from_tail(tail: &[u8]) -> Option<GuestPort> {
        let mut fields = tail.split(|byte| *byte == 0);
        let mut path = || Some(path_of(fields.next()?));
        let (path, connect) = (path()?, path()?);
        let mut text = || std::str::from_utf8(fields.next()?).ok();
        Some(GuestPort {
            path,
            connect,
            identity: Identity::from_text(text()?)?,
            port: text()?.parse().ok()?,
        })
    }
}

fn path_of(bytes: &[u8]) -> PathBuf {
    Path::new(OsStr::from_bytes(bytes)).to_owned()
}

impl Order {
    const PROXY: u16 = 1;
    const CONNECTION: u16 = 2;
    const RELEASE: u16 = 3;
    const LISTENER: u16 = 4;
    const SERVE: u16 = 5;
    const FORGET: u16 = 6;
    const DIRECTORY: u16 = 7;
    const CONNECTIONS: u16 = 8;

    /// Appends the frame. A tail that is too long for one is cut short, so that the keeper skips
    /// it.
    pub(super) fn write(&self, bytes: &mut Vec<u8>) {
        let tail = match self {
            Order::Listener(_, port) => port.to_tail(),
            Order::Directory(path) => path.as_os_str().as_bytes().to_vec(),
            Order::Connections(_, count) => count.to_le_bytes().to_vec(),
            _ => Vec::new(),
        };
        let (kind, id, flags) = match self {
            Order::Proxy(pid) => (Order::PROXY, u64::from(*pid), 0),
            Order::Connection(id) => (Order::CONNECTION, *id, WITH_DESCRIPTORS),
            Order::Connections(first, _) => (Order::CONNECTIONS, *first, WITH_DESCRIPTORS),
            Order::Release(id) => (Order::RELEASE, *id, 0),
            Order::Listener(id, _) => (Order::LISTENER, *id, WITH_DESCRIPTORS),
            Order::Serve(id) => (Order::SERVE, *id, 0),
            Order::Forget(id) => (Order::FORGET, *id, 0),
            Order::Directory(_) => (Order::DIRECTORY, 0, 0),
        };
        write_frame(bytes, kind, flags, id, &tail);
    }

    /// Returns what a frame says; `None` if this keeper doesn't know its kind, or can't read it.
    fn read(kind: u16, id: u64, tail: &[u8]) -> Option<Order> {
        match kind {
            Order::PROXY => u32::try_from(id).ok().map(Order::Proxy),
            Order::CONNECTION => Some(Order::Connection(id)),
            Order::RELEASE => Some(Order::Release(id)),
            Order::LISTENER => GuestPort::from_tail(tail).map(|port| Order::Listener(id, port)),
            Order::SERVE => Some(Order::Serve(id)),
            Order::FORGET => Some(Order::Forget(id)),
            Order::DIRECTORY => {
                let path = tail.split(|byte| *byte == 0).next()?;
                Some(Order::Directory(path_of(path)))
            }
            Order::CONNECTIONS => {
                let count = tail.first_chunk()?;
                Some(Order::Connections(id, u16::from_le_bytes(*count)))
            }
            _ => None,
        }
    }
}

fn write_frame(bytes: &mut Vec<u8>, kind: u16, flags: u32, id: u64, tail: &[u8]) {
    let len = u16::try_from(tail.len()).unwrap_or(u16::MAX);
    bytes.extend_from_slice(&kind.to_le_bytes());
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.extend_from_slice(&flags.to_le_bytes());
    bytes.extend_from_slice(&id.to_le_bytes());
    bytes.extend_from_slice(&tail[..len.into()]);
}

/// Reads orders.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    bytes: Vec<u8>,
    /// The descriptors of each message that these bytes begin in, in their order. Those at the end
    /// of one may be lost, since this process had no numbers left for them.
    descriptors: VecDeque<Vec<OwnedFd>>,
}

impl Decoder {
    /// Reads what has come, at most so much that it carries the descriptors of one message. Returns
    /// false at the end.
    ///
    /// # Errors
    /// Returns `WouldBlock` if nothing has come; what the kernel says otherwise.
    pub(super) fn receive(&mut self, orders: BorrowedFd<'_>) -> io::Result<bool> {
        let mut buffer = [0; 4096];
        let received = match sys::receive(orders, &mut buffer) {
            Ok(received) => received,
            Err(e) if sys::is_out_of_descriptors(&e) => {
                // macOS returns this instead, and the bytes with the next read.
                self.descriptors.push_back(Vec::new());
                return Ok(true);
            }
            Err(e) => return Err(e),
        };
        self.bytes.extend_from_slice(&buffer[..received.bytes]);
        if received.stopped {
            self.descriptors.push_back(received.descriptors);
        }
        Ok(received.bytes > 0)
    }

    /// Returns the next order that is known, and its descriptors.
    pub(super) fn next(&mut self) -> Option<(Order, Vec<OwnedFd>)> {
        loop {
            let head: [u8; FRAME] = self.bytes.get(..FRAME)?.try_into().ok()?;
            let [k0, k1, l0, l1, f0, f1, f2, f3, id @ ..] = head;
            let end = FRAME + usize::from(u16::from_le_bytes([l0, l1]));
            let tail = self.bytes.get(FRAME..end)?;
            let order = Order::read(u16::from_le_bytes([k0, k1]), u64::from_le_bytes(id), tail);
            let has_descriptors = u32::from_le_bytes([f0, f1, f2, f3]) & WITH_DESCRIPTORS != 0;
            let descriptors = match has_descriptors {
                true => self.descriptors.pop_front().unwrap_or_default(),
                false => Vec::new(),
            };
            self.bytes.drain(..end);
            if let Some(order) = order {
                return Some((order, descriptors));
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;
    use std::os::fd::{AsFd, AsRawFd};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn port() -> GuestPort {
        GuestPort {
            port: 5000,
            path: "/state/00000002.00001388".into(),
            identity: Identity::of(Path::new("/")).unwrap(),
            connect: "/state/connect".into(),
        }
    }

    fn all() -> Vec<Order> {
        vec![
            Order::Proxy(4711),
            Order::Directory("/state".into()),
            Order::Connection(1),
            Order::Listener(2, port()),
            Order::Release(1),
            Order::Connections(3, 5),
            Order::Serve(2),
            Order::Forget(u64::MAX),
        ]
    }

    /// Returns how many descriptors come with an order.
    fn descriptors_of(order: &Order) -> usize {
        match order {
            Order::Connection(_) | Order::Listener(..) => 1,
            Order::Connections(_, count) => usize::from(*count),
            _ => 0,
        }
    }

    /// Reads all orders of a stream, with their descriptors.
    fn read_all(theirs: &UnixStream) -> Vec<(Order, Vec<OwnedFd>)> {
        let mut decoder = Decoder::default();
        let mut read = Vec::new();
        while decoder.receive(theirs.as_fd()).unwrap() {
            while let Some(order) = decoder.next() {
                read.push(order);
            }
        }
        read
    }

    #[test]
    fn each_order_arrives_as_it_was_sent_with_its_descriptor() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (kept, _peer) = UnixStream::pair().unwrap();
        for order in all() {
            let mut bytes = Vec::new();
            order.write(&mut bytes);
            let descriptors = vec![kept.as_raw_fd(); descriptors_of(&order)];
            assert_eq!(
                sys::send(ours.as_fd(), &bytes, &descriptors).unwrap(),
                bytes.len()
            );
        }
        drop(ours);
        let read = read_all(&theirs);
        for ((order, descriptors), sent) in read.iter().zip(all()) {
            assert_eq!(*order, sent);
            assert_eq!(descriptors.len(), descriptors_of(&sent), "{sent:?}");
        }
        assert_eq!(read.len(), all().len());
    }

    /// As a keeper of this version reads what a later proxy says.
    #[test]
    fn unknown_kinds_are_skipped_with_their_descriptors_and_unknown_fields_are_ignored() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (one, mut one_peer) = UnixStream::pair().unwrap();
        let (two, mut two_peer) = UnixStream::pair().unwrap();
        let mut bytes = Vec::new();
        write_frame(&mut bytes, 999, WITH_DESCRIPTORS, 7, b"more\0fields");
        sys::send(ours.as_fd(), &bytes, &[one.as_raw_fd()]).unwrap();
        bytes.clear();
        // Flags that nobody knows yet.
        write_frame(&mut bytes, Order::CONNECTION, WITH_DESCRIPTORS | 6, 8, b"");
        write_frame(&mut bytes, 1000, 0, 9, &[b'x'; 5000]);
        Order::Release(8).write(&mut bytes);
        sys::send(ours.as_fd(), &bytes, &[two.as_raw_fd()]).unwrap();
        bytes.clear();
        let tail = [&port().to_tail()[..], b"and", b"more"].join(&0);
        write_frame(&mut bytes, Order::LISTENER, 0, 10, &tail);
        let tail = b"/state\0and more";
        write_frame(&mut bytes, Order::DIRECTORY, 0, 0, tail);
        // A listener that this keeper can't read.
        write_frame(&mut bytes, Order::LISTENER, 0, 11, b"/path alone");
        Order::Forget(12).write(&mut bytes);
        (&ours).write_all(&bytes).unwrap();
        drop((ours, one, two));
        let mut read = read_all(&theirs);
        let orders: Vec<Order> = read.iter().map(|(order, _)| order.clone()).collect();
        assert_eq!(
            orders,
            [
                Order::Connection(8),
                Order::Release(8),
                Order::Listener(10, port()),
                Order::Directory("/state".into()),
                Order::Forget(12),
            ]
        );
        // The unknown kind's descriptor is closed, and the connection has its own.
        assert_eq!(std::io::Read::read(&mut one_peer, &mut [0]).unwrap(), 0);
        let mut copy = UnixStream::from(read[0].1.remove(0));
        copy.write_all(b"x").unwrap();
        std::io::Read::read_exact(&mut two_peer, &mut [0]).unwrap();
    }

    /// A keeper and a proxy of two builds agree on these bytes for ever.
    #[test]
    fn the_bytes_of_each_version_stay_as_they_are() {
        let mut bytes = Vec::new();
        Order::Connection(0x0102).write(&mut bytes);
        Order::Release(3).write(&mut bytes);
        Order::Directory("/d".into()).write(&mut bytes);
        assert_eq!(
            bytes,
            [
                [2, 0, 0, 0, 1, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0],
                [3, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0],
                [7, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            ]
            .concat()
            .into_iter()
            .chain(*b"/d")
            .collect::<Vec<u8>>()
        );
        let tail = b"/s/p\0/s/connect\x001:2:3:4\x005000";
        let port = GuestPort::from_tail(tail).unwrap();
        assert_eq!(port.to_tail(), tail);
        assert_eq!((port.port, port.identity.inode()), (5000, 2));
        let kinds = [
            Order::PROXY,
            Order::CONNECTION,
            Order::RELEASE,
            Order::LISTENER,
            Order::SERVE,
            Order::FORGET,
            Order::DIRECTORY,
        ];
        assert_eq!(kinds, [1, 2, 3, 4, 5, 6, 7]);
        let mut bytes = Vec::new();
        Order::Connections(4, 0x0201).write(&mut bytes);
        let since_2 = [8, 0, 2, 0, 1, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 1, 2];
        assert_eq!(bytes, since_2);
    }

    #[test]
    fn frames_that_come_byte_by_byte_are_read_whole() {
        let mut bytes = Vec::new();
        let orders = [Order::Directory("/state".into()), Order::Serve(5)];
        orders.iter().for_each(|order| order.write(&mut bytes));
        let mut decoder = Decoder::default();
        let mut read = Vec::new();
        for byte in bytes {
            decoder.bytes.push(byte);
            read.extend(decoder.next().map(|(order, _)| order));
        }
        assert_eq!(read, orders);
    }
}
